"""What surrounds a model: threads, processes, limits, settings of the user, files that go away."""

import ast
import copy
import json
import locale
import os
import pickle
import resource
import shutil
import subprocess
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from engram_cli.main import main as engram
from tiny_backbones import randomize
from tiny_tokenizer import make_tokenizer
from tokenizers import Tokenizer, models
from transformers import LlamaConfig
from trial_models import adapt, all_at_once, answer, load, load_kind, random_ids

from engram_hf import EngramConfig, EngramForCausalLM
from engram_hf.tokenization.vocabulary_compression import build_token_map
from engram_hf.training import scan_rows

RESIDENCIES = ["resident", "mapped"]
KINDS = [*RESIDENCIES, "adapted"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def expected(folders):
    return answer(load(folders["old plain"]))


@pytest.fixture(scope="module")
def expected_of(folders, expected):
    """What a model of each kind answers, by resident tables."""
    adapted = answer(adapt(load(folders["old int8"], "resident"), folders["old facts"]))
    assert not torch.equal(adapted, expected) and not torch.equal(adapted, answer(load(folders["old int8"])))
    return {"resident": expected, "mapped": expected, "adapted": adapted}


@pytest.mark.parametrize("kind", KINDS)
def test_threads(folders, expected_of, rounds, kind):
    model, expected, wrong = load_kind(folders, kind), expected_of[kind], []
    short = answer(model, rows=1)

    def ask(rows):
        for _ in range(rounds(10)):
            if not torch.equal(answer(model, rows), expected if rows == 2 else short):
                wrong.append(rows)

    threads = [threading.Thread(target=ask, args=(1 + index % 2,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# What the public methods of a model return that reads memory, as tensors.
ASKED = {
    "engram_gates": lambda model, ids: list(model.engram_gates(ids).values()),
    "forward": lambda model, ids: [model(ids).logits],
    "base model": lambda model, ids: [model.base_model(ids).last_hidden_state],
    "generate": lambda model, ids: [model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)],
    "prepare_memory": lambda model, ids: [model.base_model.prepare_memory(ids).row_ids],
    "scan_rows": lambda model, ids: [
        rows.unsqueeze(0) for rows in scan_rows([{"input_ids": one} for one in ids], None, model).values()
    ],
}
# Those that change a model, give parts of it, or say how it is run.
OTHERS = {
    *(
        "from_backbone",
        "from_pretrained",
        "save_pretrained",
        "push_to_hub",
        "write_model_card",
        "print_memory_summary",
        "extending",
        "config_class",
    ),
    *(
        "set_token_map",
        "resize_token_embeddings",
        "resize_token_map",
        "replace_token_map",
        "memories",
        "settle_memory",
    ),
    *(
        "prepare_inputs_for_generation",
        "prefetch_mounted",
        "init_continuous_batching",
        "generate_batch",
        "read_lookback",
    ),
    *("composite_class", "folder_writer", "host_class", "memory_model", "require_backbone", "require_decoder"),
    "barrier_after_gathered_checkpoint_save",
}


def test_every_public_method_is_asked_beside_other_threads(folders):
    model = load(folders["old plain"])
    classes = [part for whole in (model, model.base_model) for part in type(whole).__mro__]
    ours = [part for part in classes if part.__module__.startswith("engram_hf")]
    public = {name for part in ours for name in vars(part) if not name.startswith("_")}
    assert public - OTHERS == ASKED.keys() - {"base model", "generate", "scan_rows"}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_public_methods_beside_other_threads(folders, rounds, kind, name):
    """It is that of the text that was asked for, whatever else the model reads meanwhile."""
    model, done, failed = load_kind(folders, kind), threading.Event(), []
    asked, others = random_ids(1, 12), random_ids(3, 20, seed=5)
    alone = ASKED[name](model, asked)
    assert len(alone) and not torch.equal(alone[0][:1, :12], ASKED[name](model, others)[0][:1, :12])

    def read_others():
        # The other threads' answers must not depend on what is asked for either.
        with torch.no_grad():
            expected = None
            while not done.is_set():
                logits = model(others).logits
                expected = logits if expected is None else expected
                if not torch.equal(logits, expected):
                    failed.append("logits")

    threads = [threading.Thread(target=read_others) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(rounds(8)):
            found = ASKED[name](model, asked)
            failed += [name for one, other in zip(found, alone, strict=True) if not torch.equal(one, other)]
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failed


def put_answers(models, folder, queue):
    locale.setlocale(locale.LC_ALL, "")
    torch.set_num_threads(1)
    loaded = [load(folder, residency) for residency in RESIDENCIES]
    queue.put([answer(model).tolist() for model in (*models, *loaded)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(folders, expected_of, tmp_path, monkeypatch, method):
    """With no locale, no home and no rights for new files, all at once, since a process takes long to start."""
    home = tmp_path / "file" / "home"  # where not even root can make one
    home.parent.write_bytes(b"")
    for name, value in {"HOME": home, "HF_HOME": home / "hf", "XDG_CACHE_HOME": home / "cache", "LC_ALL": "C"}.items():
        monkeypatch.setenv(name, str(value))
    models, context = [load_kind(folders, kind) for kind in KINDS], get_context(method)
    expected = [expected_of[kind] for kind in KINDS]
    queue = context.Queue()
    process = context.Process(target=put_answers, args=(models, folders["old files"], queue))
    umask = os.umask(0o777)
    try:
        process.start()
    finally:
        os.umask(umask)
    assert all(map(torch.equal, map(torch.tensor, queue.get(timeout=120)), [*expected, *[expected_of["mapped"]] * 2]))
    process.join()
    assert all(map(torch.equal, map(answer, models), expected))


class Answers(torch.utils.data.Dataset):
    """What a data set does that embeds its texts."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 6

    def __getitem__(self, index):
        torch.set_num_threads(1)
        return answer(self.model)


@pytest.mark.parametrize("kind", KINDS)
def test_data_loader_workers(folders, expected_of, kind):
    loader = torch.utils.data.DataLoader(Answers(load_kind(folders, kind)), num_workers=2)
    found = list(loader)
    assert len(found) == 6 and all(torch.equal(one[0], expected_of[kind]) for one in found)


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_and_copies(folders, expected_of, kind):
    model = load_kind(folders, kind)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(answer(other), expected_of[kind])


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_files_that_are_deleted_or_replaced(folders, expected, tmp_path, residency):
    """By new files under their names, as every save does; the open ones live on."""
    folder = shutil.copytree(folders["old files"], tmp_path / "model")
    model = load(folder, residency)
    for path in sorted(folder.glob("engram-layer-*")):
        shutil.copy(folders["new files"] / path.name, tmp_path / "other")
        os.replace(tmp_path / "other", path)
    assert torch.equal(answer(model), expected)
    shutil.rmtree(folder)
    assert torch.equal(answer(model), expected)
    model.save_pretrained(folder)
    assert torch.equal(answer(load(folder)), expected)


def test_results_do_not_depend_on_assertions():
    """`python -O` leaves out assertions, and nothing else."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/**/*.py")]:
        if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks", "examples", "build"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                assert not isinstance(node, ast.Assert) and getattr(node, "id", None) != "__debug__", path


def test_a_turkish_locale_does_not_change_the_map(tmp_path):
    """There, a C library's lower case of I is a dotless one. The locale is compiled for the test."""
    if shutil.which("localedef") is None or not os.path.exists("/usr/share/i18n/locales/tr_TR"):
        pytest.skip("no locale can be compiled here")
    command = ["localedef", "-i", "tr_TR", "-f", "UTF-8", tmp_path / "tr_TR.UTF-8"]
    subprocess.run(command, check=False, capture_output=True)

    def make_maps():
        os.environ["LOCPATH"] = str(tmp_path)
        name = locale.setlocale(locale.LC_ALL, "tr_TR.UTF-8")
        words = ["I", "i", "\u0130", "\u0131", "TITLE", "title", "?"]
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
        return name, make_tokenizer().token_map.tolist(), build_token_map(tokenizer).tolist()

    expected = "tr_TR.UTF-8", make_tokenizer().token_map.tolist(), [0, 0, 0, 1, 2, 2, 3]
    assert all_at_once([make_maps]) == [expected]


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_defaults_of_torch(folders, expected, residency):
    """A default dtype or device is for what the user makes, not for what is loaded."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = load(folders["old files"], residency)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(answer(model), expected)
    torch.set_default_device("cpu")
    try:
        assert torch.equal(answer(load(folders["old files"], residency)), expected)
    finally:
        torch.set_default_device(None)


def test_more_table_files_than_files_may_be_open(tmp_path):
    """80 table files where a process may open 64 files: the answer, or what to do."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    text = LlamaConfig(vocab_size=128, num_hidden_layers=80, **size)
    memory = {"engram_n_heads": 1, "engram_head_dim": 8, "engram_vocab_size": 11}
    model = randomize(EngramForCausalLM(EngramConfig.for_backbone(text, layer_ids=list(range(80)), **memory))).eval()
    model.save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain", "mapped").save_pretrained(tmp_path / "files")
    ids = random_ids(1, 5)
    expected = model(ids).logits

    def load_and_answer(residency):
        limit = max(map(int, os.listdir("/proc/self/fd"))) + 64  # of what is open now, some belongs to other tests
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        return torch.equal(load(tmp_path / "files", residency)(ids).logits, expected)

    found = all_at_once([lambda residency=residency: load_and_answer(residency) for residency in RESIDENCIES])
    for outcome in found:
        assert outcome is True or ("Too many open files" in outcome and "ulimit -n" in outcome), found


@pytest.mark.parametrize("source", ["old plain", "old files"])
@pytest.mark.parametrize("field", ["engram_vocab_size", "engram_head_dim", "vocab_size"])
def test_the_word_of_a_config_takes_no_memory(folders, tmp_path, capsys, source, field):
    """A table of 10^12 rows, or of rows of as many channels, is refused in a sentence; so are as many tokens by the command."""
    folder = shutil.copytree(folders[source], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["engram_num_embeddings"]
    (config if field in config else config["text_config"])[field] = 32 * 10**12
    (folder / "config.json").write_text(json.dumps(config))
    for residency in RESIDENCIES if field.startswith("engram") else ():
        with pytest.raises(ValueError, match="but the config asks for"):
            load(folder, residency)
    capsys.readouterr()
    for command in (["check", str(folder)], ["lookup", str(folder), "w1 w2"]):
        assert engram(command) == 1
        assert "of one model" in capsys.readouterr().err


def test_a_model_in_the_background_of_a_fork_keeps_its_files(folders, expected):
    """A child that ends must not close what its parent reads."""
    model = load(folders["old files"], "mapped")
    for _ in range(3):
        process = get_context("fork").Process(target=answer, args=(model,))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert torch.equal(answer(model), expected)
    assert isinstance(model, EngramForCausalLM)
