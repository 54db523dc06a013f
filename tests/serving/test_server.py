"""`engram serve`: transformers' own server gives the answers of `generate`."""

import concurrent.futures
import contextlib
import doctest
import functools
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from deepseek_v41_reference import needs_auto_image_processor
from engram_cli.main import main
from tiny_backbones import BACKBONES, needs_continuous_batching, randomize
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM
from transformers.utils.import_utils import is_serve_available

import engram_hf
from engram_hf import EngramConfig, EngramError, EngramForCausalLM
from engram_hf.convert_scripts import convert_deepseek_v41
from engram_hf.serving.server import Loader, prepare

needs_server = pytest.mark.skipif(not is_serve_available(), reason="the extra `serving` is not installed")
PROMPT = "the café w7"
ROOT = Path(engram_hf.__file__).parent
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Save a model that never ends an answer by itself, and its tokenizer; tests must not change it."""
    folder = tmp_path_factory.mktemp("served") / "model"
    sizes = {"engram_n_heads": 2, "engram_head_dim": 32, "engram_vocab_size": 499}
    config = EngramConfig.for_backbone(BACKBONES["mixtral"](), make_tokenizer(), layer_ids=[1, 2], **sizes)
    model, tokenizer = randomize(EngramForCausalLM(config)).eval(), make_tokenizer()
    model.set_token_map(tokenizer)
    model.generation_config.eos_token_id = None
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bare_folder(tmp_path_factory) -> Path:
    """Save a backbone without memory, and its tokenizer; tests must not change it."""
    folder = tmp_path_factory.mktemp("served") / "bare"
    torch.manual_seed(1)
    model, tokenizer = MixtralForCausalLM(BACKBONES["mixtral"]()), make_tokenizer()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_stays_known():
    """Remove our loaders from the namespace of transformers, which other tests share."""
    yield
    for name in [name for name, value in vars(transformers).items() if isinstance(value, Loader)]:
        delattr(transformers, name)


@contextlib.contextmanager
def serving(name: Path, residency: str = "auto", continuous_batching: bool = False, **options) -> Iterator:
    """Yield an `openai` client of a server in this process, and the served model."""
    from openai import OpenAI
    from transformers.cli.serve import Serve

    prepare(str(name), residency, continuous_batching)
    port = free_port()
    server = Serve(str(name), continuous_batching, port=port, device="cpu", non_blocking=True, **options)
    try:
        client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=60)
        wait_until(lambda: is_healthy(client))
        (loaded,) = server._model_manager.loaded_models.values()
        yield client, loaded.model
    finally:
        server.kill_server()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_healthy(client) -> bool:
    from openai import APIConnectionError

    try:
        return client.get("../health", cast_to=dict) == {"status": "ok"}
    except APIConnectionError:
        return False


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "mapped") as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    return server[0]


@pytest.fixture(scope="module")
def answer(folder) -> Callable[..., str]:
    """Return the answer of `generate` on a separate model with resident tables."""
    return generator(AutoModelForCausalLM.from_pretrained(folder, engram_residency="resident"), folder)


def generator(model, folder: Path) -> Callable[..., str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @functools.cache
    def answer(prompt: str, count: int) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return answer


def complete(client, prompt: str = PROMPT, count: int = 8, **options):
    return client.completions.create(model=None, prompt=prompt, max_tokens=count, temperature=0, **options)


def chat(client, prompt: str = PROMPT, count: int = 8, **options):
    messages = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(model=None, messages=messages, max_tokens=count, temperature=0, **options)


# --- answers


@needs_server
def test_served_model_has_the_requested_residency(server):
    _, model = server
    assert isinstance(model, EngramForCausalLM) and isinstance(model, MixtralForCausalLM)
    assert not [name for name, _ in model.named_parameters() if "table" in name]


@needs_server
def test_every_route_answers_like_generate(client, folder, answer):
    expected = answer(PROMPT, 8)
    assert complete(client).choices[0].text == expected
    assert chat(client).choices[0].message.content == expected
    asked = {"input": PROMPT, "max_output_tokens": 8, "temperature": 0}
    response = client.responses.create(model=str(folder), stream=False, **asked)  # Otherwise this server streams.
    assert response.output_text == expected
    warm = client.completions.create(model=str(folder), prompt=PROMPT, max_tokens=8, temperature=9)
    assert warm.choices[0].text == expected and warm.usage.completion_tokens == 8  # Its config does not sample.
    if transformers.__version__ >= "5.20":  # Before, only models in the Hub's cache were listed.
        assert [model.id for model in client.models.list()] == [str(folder)]


@needs_server
def test_streamed_answers_are_equal(client, answer):
    expected = answer(PROMPT, 8)
    pieces = [chunk.choices[0].text for chunk in complete(client, stream=True)]
    assert "".join(pieces) == expected and len(pieces) > 4
    deltas = [chunk.choices[0].delta.content or "" for chunk in chat(client, stream=True)]
    assert "".join(deltas) == expected
    stream = client.responses.create(model=None, input=PROMPT, max_output_tokens=8, temperature=0, stream=True)
    assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == expected


PROMPTS = [" ".join(f"w{(7 * index + step) % 118}" for step in range(1 + index % 5)) for index in range(16)]


def ask_many(client) -> list[str]:
    """Return the answers to prompts of several lengths, 32 at once."""
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        return list(pool.map(lambda prompt: complete(client, prompt, 4).choices[0].text, PROMPTS * 2))


@needs_server
def test_concurrent_requests_get_their_own_answers(client, answer):
    expected = [answer(prompt, 4) for prompt in PROMPTS]
    assert ask_many(client) == expected * 2 and len(set(expected)) > 8


@needs_server
def test_disconnected_client_does_not_block_the_others(client, answer):
    began = time.monotonic()
    stream = complete(client, count=4000, stream=True)
    next(iter(stream))
    stream.close()
    assert complete(client).choices[0].text == answer(PROMPT, 8)
    assert time.monotonic() - began < 15  # Generating 4,000 tokens takes longer.


@needs_server
def test_bad_requests_are_refused_and_the_next_one_is_answered(client, answer):
    from openai import APIStatusError

    client = client.with_options(max_retries=2)  # The server ends the connection after an internal error.
    bad = {
        "pinned": (400, {"model": "another"}),
        "must be a string": (400, {"prompt": [1, 2]}),
        "no_such_field": (422, {"extra_body": {"no_such_field": 1}}),
        "Internal Server Error": (500, {"temperature": "warm"}),
    }
    for words, (status, options) in bad.items():
        with pytest.raises(APIStatusError) as refused:
            client.completions.create(**{"model": None, "prompt": PROMPT, **options})
        assert refused.value.status_code == status and words in refused.value.response.text
    assert complete(client).choices[0].text == answer(PROMPT, 8)


@needs_server
def test_prompt_beyond_the_context_length_is_answered_like_generate(client, answer):
    """transformers continues beyond `max_position_embeddings` (256 here), and so does its server."""
    prompt = " ".join(f"w{index % 100}" for index in range(300))
    assert complete(client, prompt, 4).choices[0].text == answer(prompt, 4)


# --- continuous batching


@needs_server
@pytest.mark.slow
def test_request_longer_than_the_cache_ends_batching(bare_folder):
    """As the serving page says, every later request is refused and health reports it, so a supervisor can restart the
    server.
    """
    from openai import APIStatusError

    answer = generator(MixtralForCausalLM.from_pretrained(bare_folder), bare_folder)
    # The request comes now: the batching's thread leaves others little time.
    expected = [answer(prompt, 4) for prompt in PROMPTS]
    with serving(bare_folder, continuous_batching=True, cb_num_blocks=4, cb_max_batch_tokens=64) as (client, _):
        assert ask_many(client) == expected * 2 and len(set(expected)) > 8
        sampling = {"generation_config": json.dumps({"do_sample": True, "temperature": 1e5})}
        sampled = client.completions.create(model=None, prompt=PROMPTS[0], max_tokens=4, extra_body=sampling)
        assert sampled.choices[0].text == expected[0]  # The settings are those of the first request.
        client = client.with_options(max_retries=2)  # The server ends the connection after an internal error.
        for prompt, status in ((" ".join(["w1"] * 1100), (500, 503)), (PROMPT, (503,))):
            with pytest.raises(APIStatusError) as refused:
                complete(client, prompt)
            assert refused.value.status_code in status
        with pytest.raises(APIStatusError) as unhealthy:
            is_healthy(client)
        assert "cb_worker_dead" in unhealthy.value.response.text


@needs_server
@needs_continuous_batching
def test_model_with_memory_is_batched_and_refuses_a_request_longer_than_its_cache(folder, answer):
    from openai import BadRequestError

    expected = [answer(prompt, 4) for prompt in PROMPTS]
    with serving(folder, continuous_batching=True, cb_num_blocks=4, cb_max_batch_tokens=64) as (client, _):
        for streamed in (False, True):
            with pytest.raises(BadRequestError) as refused:
                complete(client, " ".join(["w1"] * 1100), stream=streamed)
            assert "longer than the whole cache of continuous batching" in refused.value.response.text
        assert ask_many(client) == expected * 2


# --- the chat format of the release


@pytest.fixture(scope="module")
def release(golden, tmp_path_factory) -> Path:
    """Convert the miniature of the release; tests must not change it."""
    folder = tmp_path_factory.mktemp("release") / "v41"
    assert convert_deepseek_v41.main([str(golden / "deepseek_v41_tiny_vl"), str(folder), "--dtype", "float32"]) == 0
    return folder


@needs_server
@needs_auto_image_processor  # Without it, the server asks for the code of its processor.
@pytest.mark.slow
def test_release_answers_with_reasoning_in_its_own_field(release):
    """The server separates reasoning and answer by the tokenizer's response template, which the conversion writes."""
    tokenizer = AutoTokenizer.from_pretrained(release)
    with serving(release) as (client, model):
        for thinks in (False, True):
            messages = [{"role": "user", "content": "1+1?"}]
            options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            inputs = tokenizer.apply_chat_template(messages, enable_thinking=thinks, **options)
            tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            extra = {"extra_body": {"chat_template_kwargs": {"enable_thinking": thinks}}}
            message = chat(client, "1+1?", 6, **extra).choices[0].message
            said = tokenizer.decode(tokens).strip()  # A response template strips the space around a text.
            texts = (message.reasoning_content, message.content) if thinks else (message.content, "")
            assert texts == (said, "") and said


# --- the page


@needs_server
@pytest.mark.slow
def test_serving_pages_show_the_printed_output(tmp_path, monkeypatch):
    """The requests by curl, and the Python, of the README and of `docs/serving.md` run with the demo model behind
    another port.
    """
    page, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/serving.md", "README.md"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples" / "engram-demo", "engram-demo")
    with serving(Path("engram-demo")) as (client, _):
        address = str(client.base_url).rstrip("/").removesuffix("/v1")
        (body, printed), *_ = re.findall(r"/v1/completions .* -d '(.*)'\n(.*)$", page, re.MULTILINE)
        shown, said = json.loads(printed), client.post("completions", body=json.loads(body), cast_to=object)
        assert said | {"id": None, "created": None} == shown | {"id": None, "created": None}
        code, output = re.search(r"```python\n(from openai.*?)```\n\n```text\n(.*?)```", page, re.DOTALL).groups()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code.replace("http://localhost:8000", address), {})
        assert printed.getvalue() == output.rstrip("\n")

        body, printed = re.search(r"--json '(.*)' \| grep -o '\"text.*\n\"text\":\"(.*)\"", readme).groups()
        assert client.post("completions", body=json.loads(body), cast_to=dict)["choices"][0]["text"] == printed
        session = readme[readme.index(">>> from openai") : readme.index("```", readme.index(">>> from openai"))]
        (failed, _) = doctest.DocTestRunner().run(
            doctest.DocTestParser().get_doctest(
                session.replace("http://localhost:8000", address), {}, "README", None, 0
            )
        )
        assert failed == 0


# --- refusals before a server starts


@pytest.fixture
def complaint(capfd):
    def run(*arguments: object) -> str:
        assert main(["serve", *map(str, arguments)]) == 1
        (sentence,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("engram: ")]
        return sentence

    return run


@needs_server
def test_port_in_use_is_named(folder, complaint):
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"The server cannot listen on port {port} of localhost (Address already in use" in complaint(
            folder, "--port", port
        )


@needs_server
def test_folder_without_a_tokenizer_is_named(folder, tmp_path, complaint):
    for path in folder.iterdir():
        if "token" not in path.name:
            shutil.copy(path, tmp_path)
    assert f"{tmp_path} has no tokenizer that can be loaded" in complaint(tmp_path, "--port", free_port())


@needs_server
def test_residency_of_a_model_without_memory_is_refused(tmp_path, complaint):
    MixtralForCausalLM(BACKBONES["mixtral"]()).save_pretrained(tmp_path)
    assert "has no memory whose residency could be mapped" in complaint(
        tmp_path, "--residency", "mapped", "--port", free_port()
    )


@needs_server
def test_tokenizer_larger_than_the_embeddings_is_refused(folder, tmp_path, complaint):
    shutil.copytree(folder, tmp_path / "grown")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["one_more"])
    tokenizer.save_pretrained(tmp_path / "grown")
    assert "token ids up to 128, but the model embeds 128" in complaint(tmp_path / "grown", "--port", free_port())


@needs_server
def test_batching_an_unsupported_backbone_is_refused_at_start(tmp_path, complaint):
    """On DeepSeek-V3 the first request would fail: keys and values have different widths."""
    sizes = {"engram_n_heads": 2, "engram_head_dim": 32, "engram_vocab_size": 499}
    config = EngramConfig.for_backbone(BACKBONES["deepseek_v3"](), make_tokenizer(), layer_ids=[1], **sizes)
    EngramForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    refusal = complaint(tmp_path, "--port", free_port(), "--continuous-batching", "--device", "cpu")
    assert f"{tmp_path} cannot be batched continuously (" in refusal and "leave --continuous-batching out" in refusal


@needs_server
@pytest.mark.slow
def test_batching_with_images_is_refused(release, tmp_path):
    shutil.copytree(release, tmp_path / "reads-images")
    config = json.loads((release / "config.json").read_text()) | {"architectures": ["EngramForConditionalGeneration"]}
    (tmp_path / "reads-images" / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngramError, match="reads images, and the server batches only models of text"):
        prepare(str(tmp_path / "reads-images"), "auto", True)


@needs_server
def test_last_residency_of_a_served_model_applies(folder):
    for residency in ("resident", "mapped"):
        prepare(str(folder), residency, False)
    model = transformers.EngramForCausalLM.from_pretrained(str(folder))
    assert not [name for name, _ in model.named_parameters() if "table" in name]


@needs_server
def test_unknown_option_is_passed_to_transformers(folder, capfd):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", str(folder), "--port", str(free_port()), "--no-such-option"])
    assert stopped.value.code == 2 and "--no-such-option" in capfd.readouterr().err


def test_missing_extra_is_named(folder, monkeypatch, complaint):
    monkeypatch.setattr("engram_hf.serving.server.is_serve_available", lambda: False)
    assert "pip install 'engram-hf[serving]'" in complaint(folder)


def test_other_commands_refuse_unknown_options(folder, capfd):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(folder), "--no-such-option"])
    assert stopped.value.code == 2 and "unrecognized arguments: --no-such-option" in capfd.readouterr().err


# --- models with remote code

OTHERS_CONFIG = """
from transformers import LlamaConfig

class OtherConfig(LlamaConfig):
    model_type = "other_model"
"""
OTHERS_MODEL = """
from transformers import LlamaForCausalLM
from .configuration_other import OtherConfig

class OtherForCausalLM(LlamaForCausalLM):
    config_class = OtherConfig
"""


@needs_server
def test_trusted_remote_code_is_served(tmp_path):
    (tmp_path / "configuration_other.py").write_text(OTHERS_CONFIG)
    (tmp_path / "modeling_other.py").write_text(OTHERS_MODEL)
    backbone = AutoModelForCausalLM.from_config(BACKBONES["llama"]())
    backbone.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    auto_map = {
        "AutoConfig": "configuration_other.OtherConfig",
        "AutoModelForCausalLM": "modeling_other.OtherForCausalLM",
    }
    config |= {"model_type": "other_model", "architectures": ["OtherForCausalLM"], "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        prepare(str(tmp_path), "auto", False)
    prepare(str(tmp_path), "auto", False, trust_remote_code=True)
    loader = transformers.OtherForCausalLM
    model = loader.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert type(model).__name__ == "OtherForCausalLM" and type(model).__module__.startswith("transformers_modules")


# --- the command


@needs_server
@pytest.mark.slow
def test_shutdown_finishes_the_running_answer(folder, answer):
    from openai import OpenAI

    port = free_port()
    command = [sys.executable, "-m", "engram_cli", "serve", str(folder), "--port", str(port), "--log-level", "error"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
            wait_until(lambda: process.poll() is None and is_healthy(client))
            stream = iter(complete(client, count=150, stream=True))
            text = next(stream).choices[0].text
            process.send_signal(signal.SIGTERM)
            text += "".join(chunk.choices[0].text for chunk in stream)
            assert text == answer(PROMPT, 150)
            assert process.wait(30) == -signal.SIGTERM
            assert not is_healthy(client)
        finally:
            process.kill()
