"""What surrounds a model: threads, processes, limits, settings of the user, files that go away."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from tiny_tokenizer import make_tokenizer
from trial_models import answer, load, random_ids

from engram_hf import EngramForCausalLM

RESIDENCIES = ["resident", "mapped"]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def expected(folders):
    return answer(load(folders["old plain"]))


def in_a_process(code: str, *arguments: object, **environment: str) -> str:
    """Standard output of code that finds the modules of these tests; it has to end well."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, *code.split("\0")[:-1], "-c", code.split("\0")[-1], *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


ANSWER = """
import sys
from trial_models import answer, load, random_ids
for residency in sys.argv[2:]:
    print(answer(load(sys.argv[1], residency)).double().sum().item())
"""


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_threads(folders, expected, rounds, residency):
    model, wrong = load(folders["old files"], residency), []
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
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("residency", RESIDENCIES)
@torch.no_grad()
def test_what_is_asked_for_beside_other_threads(folders, rounds, residency, name):
    """It is that of the text that was asked for, whatever else the model reads meanwhile."""
    model, done, failed = load(folders["old files"], residency), threading.Event(), []
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


def put_answers(models, queue):
    torch.set_num_threads(1)
    queue.put([answer(model).tolist() for model in models])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(folders, expected, method):
    models, context = [load(folders["old files"], residency) for residency in RESIDENCIES], get_context(method)
    queue = context.Queue()
    process = context.Process(target=put_answers, args=(models, queue))
    process.start()
    assert all(torch.equal(torch.tensor(found), expected) for found in queue.get(timeout=120))
    process.join()
    assert all(torch.equal(answer(model), expected) for model in models)


class Answers(torch.utils.data.Dataset):
    """What a data set does that embeds its texts."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 6

    def __getitem__(self, index):
        torch.set_num_threads(1)
        return answer(self.model)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_data_loader_workers(folders, expected, residency):
    loader = torch.utils.data.DataLoader(Answers(load(folders["old files"], residency)), num_workers=2)
    found = list(loader)
    assert len(found) == 6 and all(torch.equal(one[0], expected) for one in found)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_pickles_and_copies(folders, expected, residency):
    model = load(folders["old files"], residency)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(answer(other), expected)


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


@pytest.mark.parametrize("options", ["", "-O\0"], ids=["bare surroundings", "-O"])
def test_settings_of_the_user(folders, expected, tmp_path, options):
    """No locale, no home, no rights for new files: all at once, since a process takes long to start; and no assertions."""
    code, environment = ANSWER, {}
    if not options:
        home = tmp_path / "file" / "home"  # where not even root can make one
        home.parent.write_bytes(b"")
        environment = {"HOME": str(home), "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache")}
        environment |= {"LC_ALL": "C", "PYTHONDONTWRITEBYTECODE": "1"}
        code = f"import locale, os\nlocale.setlocale(locale.LC_ALL, '')\nos.umask(0o777)\n{code}"
    found = in_a_process(options + code, folders["old files"], *RESIDENCIES, **environment)
    assert [float(line) for line in found.split()] == [expected.double().sum().item()] * 2


def test_a_turkish_locale_does_not_change_the_map(tmp_path):
    """There, a C library's lower case of I is a dotless one. The locale is compiled for the test."""
    code = """
import locale, sys
print(locale.setlocale(locale.LC_ALL, "tr_TR.UTF-8"))
from tiny_tokenizer import make_tokenizer
from tokenizers import Tokenizer, models
from engram_hf.tokenization.vocabulary_compression import build_token_map
words = ["I", "i", "\\u0130", "\\u0131", "TITLE", "title", "?"]
tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
print([make_tokenizer().token_map.tolist(), build_token_map(tokenizer).tolist()])
"""
    if shutil.which("localedef") is None or not os.path.exists("/usr/share/i18n/locales/tr_TR"):
        pytest.skip("no locale can be compiled here")
    subprocess.run(
        ["localedef", "-i", "tr_TR", "-f", "UTF-8", tmp_path / "tr_TR.UTF-8"], check=False, capture_output=True
    )
    name, maps = in_a_process(code, LOCPATH=str(tmp_path)).splitlines()
    assert name == "tr_TR.UTF-8"
    assert json.loads(maps) == [make_tokenizer().token_map.tolist(), [0, 0, 0, 1, 2, 2, 3]]


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


OPEN_FILES = """
import resource, sys
from tiny_backbones import engram_config, randomize
from engram_hf import EngramConfig, EngramForCausalLM
from transformers import LlamaConfig
from tiny_backbones import random_ids
import torch
size = dict(vocab_size=128, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2)
text = LlamaConfig(num_hidden_layers=80, **size)
config = EngramConfig.for_backbone(text, layer_ids=list(range(80)), engram_n_heads=1, engram_head_dim=8, engram_vocab_size=11)
randomize(EngramForCausalLM(config)).save_pretrained(sys.argv[1] + "/plain")
mapped = EngramForCausalLM.from_pretrained(sys.argv[1] + "/plain", engram_residency="mapped")
mapped.save_pretrained(sys.argv[1] + "/files")
ids = random_ids(1, 5)
with torch.no_grad(): expected = mapped(ids).logits
del mapped
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
for residency in ("resident", "mapped"):
    try:
        model = EngramForCausalLM.from_pretrained(sys.argv[1] + "/files", engram_residency=residency)
        with torch.no_grad(): print("equal" if torch.equal(model(ids).logits, expected) else "WRONG")
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_more_table_files_than_files_may_be_open(tmp_path):
    for line in in_a_process(OPEN_FILES, tmp_path).splitlines():
        assert line == "equal" or "Too many open files" in line, line


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
