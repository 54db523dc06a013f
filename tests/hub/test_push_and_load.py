"""A model and its tokenizer are pushed to a Hub, and loaded elsewhere by name, through the real clients.

Two child processes do the work, once: one pushes with `engram_hf`; one loads, and cannot import `engram_hf`. The tests
examine the Hub, the cache, and the Hub's log afterwards: after any fault, a repository has complete commits and a
cache complete files.
"""

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from child_processes import SECONDS, WITHOUT_PACKAGE, finish, start
from hub_server import TOKEN, Fault, HubServer, Request, client_environment
from huggingface_hub import ModelCard
from tiny_backbones import BACKBONES, randomize
from tiny_tokenizer import make_tokenizer

from engram_hf import EngramConfig, EngramForCausalLM, EngramTokenizer

TEXT = "the café THE cafe w7 w8 w9 Café"
HANDWRITTEN = "---\nlicense: mit\ntags:\n- mine\n---\n\n# Written by hand\n\nEvery word of it.\n"
UNNEEDED = {"original/consolidated.safetensors", "pytorch_model.bin", "training.log"}
UPLOAD = "Upload EngramForCausalLM"

PUSH = """
import json, os, sys
import numpy as np
import torch
from engram_hf import EngramForCausalLM, EngramTokenizer

folder, text, logits_file = sys.argv[1:]
model = EngramForCausalLM.from_pretrained(folder)
tokenizer = EngramTokenizer.from_pretrained(folder)

def logits():
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits.numpy()

child = os.fork()
if child == 0:
    model.push_to_hub("me/interrupted")
    os._exit(0)
print(child, flush=True)
killed_by = os.waitpid(child, 0)[1]

model.push_to_hub("me/interrupted")
first = model.push_to_hub("me/model").oid
tokenizer.push_to_hub("me/model")
tokenizer.push_to_hub("me/tokenizer-first")
model.push_to_hub("me/tokenizer-first", tags=["mine"])
model.push_to_hub("me/handwritten")
model.save_pretrained(folder + "-saved", push_to_hub=True, repo_id="me/saved")
EngramForCausalLM.from_pretrained(folder, engram_residency="mapped").push_to_hub("me/mapped")

answers = {"first": logits()}
with torch.no_grad():
    model.lm_head.weight.mul_(2)
answers["second"] = logits()
second = model.push_to_hub("me/model").oid
with torch.no_grad():
    model.lm_head.weight.mul_(2)
answers["branch"] = logits()
model.push_to_hub("me/model", revision="experiment")
np.savez(logits_file, **answers)
print(json.dumps({"killed_by": killed_by, "first": first, "second": second}))
"""

LOAD = (
    WITHOUT_PACKAGE
    + """
import json, sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

text, first, logits_file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained("me/model", trust_remote_code=True)

def logits(name="me/model", **kwargs):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **kwargs)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert ("engram_residency" in kwargs) == (not any(".table." in key for key in model.state_dict()))
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits.numpy()

answers = {"second": logits(), "first": logits(revision=first), "branch": logits(revision="experiment")}
answers["mapped"] = logits("me/mapped", engram_residency="mapped")
np.savez(logits_file, **answers)
print(json.dumps({"compressed": tokenizer.compressed_vocab_size, "known": "engram_hf" in sys.modules}))
"""
)

DOWNLOAD = (
    WITHOUT_PACKAGE
    + """
from huggingface_hub import snapshot_download
snapshot_download("me/model", allow_patterns="model*.safetensors")
"""
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Save a model with memory on a Mixtral that came from the Hub as `org/backbone`, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer, backbone = make_tokenizer(), BACKBONES["mixtral"]()
    backbone.name_or_path = "org/backbone"
    # The client reads up to 10 MB from a connection at once; the file is larger, so that a download can stop in the
    # middle.
    sizes = {"engram_n_heads": 2, "engram_head_dim": 16, "engram_vocab_size": 50_000}
    config = EngramConfig.for_backbone(backbone, tokenizer, layer_ids=[1, 2], **sizes)
    model = randomize(EngramForCausalLM(config))
    model.set_token_map(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def server_threads() -> list[threading.Thread]:
    """Return the threads that keep a process from ending; those of the Hub's client do."""
    return [thread for thread in threading.enumerate() if not thread.daemon]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Run a Hub with a backbone that has a licence, and a repository with a card of its own."""
    before = server_threads()
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        card = "---\nlicense: other\nlicense_name: tiny\nlicense_link: https://example.com/tiny\n---\n# Backbone\n"
        server.create("org/backbone").commit("main", "card", {"README.md": server.store(card.encode())})
        mine = server.create("me/handwritten")
        mine.commit("main", "card", {"README.md": server.store(HANDWRITTEN.encode())})
        yield server
    assert server_threads() == before


def wait_for(fault: Fault, process: subprocess.Popen) -> None:
    """Wait until `process` has met `fault`; raise if it ends before."""
    deadline = time.monotonic() + SECONDS
    while not fault.reached.wait(0.1):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{fault.method} {fault.path} was not reached: {process.communicate()[1]}")


@dataclass
class Pushed:
    """The output of the pushing process, and the Hub's content while its first upload hung."""

    said: dict
    logits: dict[str, np.ndarray]
    files_when_killed: set[str]
    history_when_killed: list
    objects_when_killed: list[str]


@pytest.fixture(scope="module")
def pushed(hub, model_folder, tmp_path_factory) -> Pushed:
    folder = tmp_path_factory.mktemp("push")
    hang = hub.fail_once("PUT", "/lfs/me/interrupted/", "hold")
    hub.fail_once("PUT", "/lfs/me/model/", "error")
    hub.fail_once("PUT", "/lfs/me/model/", "drop")
    # Temporary files are in memory, as on many systems: the tables of a mapped model are on another file system.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        env = client_environment(hub, folder / "home", HF_TOKEN=TOKEN, TMPDIR=memory)
        process = start(PUSH, model_folder, TEXT, folder / "logits.npz", env=env, cwd=folder)
        child = process.stdout.readline()
        wait_for(hang, process)
        os.kill(int(child), signal.SIGKILL)
        files, history = hub.files("me/interrupted"), list(hub.repository("me/interrupted").history)
        large = [path.name for path in hub.objects.iterdir() if len(path.name) == 64]
        said = finish(process)
    with np.load(folder / "logits.npz") as logits:
        return Pushed(said, dict(logits), files, history, large)


@dataclass
class Loaded:
    """The output of the loading process, the Hub's log of it, and the cache after an interrupted download."""

    said: dict
    logits: dict[str, np.ndarray]
    log: list[Request]
    cache_after_interruption: list[Path]

    @property
    def downloads(self) -> list[Request]:
        return [request for request in self.log if request.method == "GET" and "/resolve/" in request.path]


@pytest.fixture(scope="module")
def loaded(hub, pushed, tmp_path_factory) -> Loaded:
    folder = tmp_path_factory.mktemp("load")
    repository = hub.repository("me/model")
    tree = dict(repository.commits[repository.branches["main"]])
    repository.commit("main", "more files", tree | {path: hub.store(path.encode()) for path in UNNEEDED})
    env = client_environment(hub, folder / "home")

    weights = max(tree, key=lambda path: tree[path].size)
    hang = hub.fail_once("GET", weights, "hold")
    process = start(DOWNLOAD, env=env, cwd=folder)
    wait_for(hang, process)
    process.kill()
    process.communicate()
    while hub.requests[-1].status != 0:  # This waits until the Hub has noticed.
        time.sleep(0.01)
    cache = [path for path in (folder / "home" / "hub").rglob("*") if path.is_file() and "trees" not in path.parts]

    hub.requests.clear()
    hub.fail_once("GET", weights, "drop")
    arguments = (TEXT, pushed.said["first"], folder / "logits.npz")
    said = finish(start(LOAD, *arguments, env=env, cwd=folder))
    with np.load(folder / "logits.npz") as logits:
        return Loaded(said, dict(logits), list(hub.requests), cache)


def metadata(hub: HubServer, name: str) -> dict:
    return ModelCard(hub.read(name, "README.md").decode()).data.to_dict()


# --- pushing


def test_push_to_hub_uploads_model_tokenizer_code_and_card(hub, pushed, model_folder):
    code = {path.name for path in model_folder.glob("*.py")}
    assert {"modeling_engram.py", "saving_engram.py", "tokenization_engram.py"} <= code
    assert not {"card_engram.py", "table_check_engram.py", "table_writer_engram.py"} & code
    saved = {path.name for path in model_folder.iterdir()}
    assert hub.files("me/model", pushed.said["second"]) == saved | {"README.md"}


def test_uploaded_weights_equal_those_of_the_folder(hub, pushed, model_folder):
    weights = [path.name for path in model_folder.glob("model*.safetensors")]
    assert weights
    for name in weights:
        assert hub.read("me/interrupted", name) == (model_folder / name).read_bytes()


def test_generated_card_names_the_base_model_and_its_licence(hub, pushed):
    assert metadata(hub, "me/model") == {
        "base_model": "org/backbone",
        "library_name": "transformers",
        "license": "other",
        "license_name": "tiny",
        "license_link": "https://example.com/tiny",
        "pipeline_tag": "text-generation",
        "tags": ["engram", "mixtral"],
        "widget": [{"text": "The capital of France is"}],
    }
    text = hub.read("me/model", "README.md").decode()
    assert 'from_pretrained("me/model", trust_remote_code=True' in text


def test_placeholder_card_of_a_tokenizer_is_replaced_and_tags_are_kept(hub, pushed):
    card = metadata(hub, "me/tokenizer-first")
    assert card["tags"] == ["engram", "mixtral", "mine"]
    assert card["base_model"] == "org/backbone"


def test_save_pretrained_with_push_to_hub_writes_the_card(hub, pushed):
    assert metadata(hub, "me/saved")["base_model"] == "org/backbone"


def test_card_written_by_hand_is_kept_on_the_hub(hub, pushed):
    assert hub.read("me/handwritten", "README.md").decode() == HANDWRITTEN
    assert "config.json" in hub.files("me/handwritten")


def test_killed_upload_leaves_no_partial_commit(pushed):
    assert pushed.said["killed_by"] == signal.SIGKILL
    assert pushed.files_when_killed == set()
    assert pushed.history_when_killed == [("main", "initial commit")]
    assert pushed.objects_when_killed == []


def test_push_after_a_killed_push_succeeds(hub, pushed, model_folder):
    assert [summary for _, summary in hub.repository("me/interrupted").history] == ["initial commit", UPLOAD]
    assert "model.safetensors" in hub.files("me/interrupted")


def test_one_push_recovers_from_a_failed_and_a_dropped_upload(hub, pushed):
    uploads = [request.status for request in hub.requests if request.path.startswith("/lfs/me/model/")]
    assert uploads[:3] in ([500, 0, 200], [0, 500, 200])


def test_each_push_is_one_commit(hub, pushed):
    history = hub.repository("me/model").history
    assert history[:4] == [
        ("main", "initial commit"),
        ("main", UPLOAD),
        ("main", "Upload tokenizer"),
        ("main", UPLOAD),
    ]
    assert ("experiment", UPLOAD) in history


# --- loading


@pytest.mark.parametrize("revision", ["first", "second", "branch"])
def test_loaded_logits_equal_those_of_the_pushed_revision(pushed, loaded, revision):
    np.testing.assert_allclose(loaded.logits[revision], pushed.logits[revision], rtol=0, atol=1e-6)


def test_mapped_tables_are_downloaded_as_separate_files(hub, pushed, loaded):
    tables = {f"engram-layer-0000{layer}.safetensors" for layer in (1, 2)}
    assert tables | {"engram_tables.json", "model.safetensors"} <= hub.files("me/mapped")
    assert len(hub.read("me/mapped", "model.safetensors")) < len(hub.read("me/model", "model.safetensors")) / 10
    np.testing.assert_allclose(loaded.logits["mapped"], pushed.logits["first"], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["me/model", "me/mapped"])
def test_all_downloaded_files_belong_to_one_commit(hub, pushed, tmp_path, name):
    """Commits may be pushed while tables are downloaded: after the first file, none is requested by the branch's name."""
    code = f'from engram_hf import EngramForCausalLM; EngramForCausalLM.from_pretrained("{name}", engram_residency="mapped"); print(1)'
    before = len(hub.requests)
    assert finish(start(code, env=client_environment(hub, tmp_path / "home"), cwd=tmp_path)) == 1
    asked = [re.fullmatch(f"/{name}/resolve/([^/]+)/(.+)", request.path) for request in hub.requests[before:]]
    by_branch = {found[2] for found in asked if found and found[1] == "main"}
    by_commit = {found[2] for found in asked if found and found[1] == hub.repository(name).resolve("main")}
    # Some releases of transformers look for an adapter before anything else.
    assert by_branch - {"adapter_config.json"} == {"config.json"}
    assert "model.safetensors" in by_commit


BUSY = """
import json, sys, time
time.sleep = lambda seconds: None  # between the client's many tries
from engram_hf import EngramForCausalLM
for line in sys.stdin:
    try:
        name, _, residency = line.strip().partition(" ")
        EngramForCausalLM.from_pretrained(name, **({"engram_residency": residency} if residency else {}))
        print("loaded", flush=True)
    except OSError as error:
        print(json.dumps(str(error)), flush=True)
print(0)
"""


@pytest.mark.slow
def test_busy_hub_is_not_mistaken_for_one_without_tables(hub, pushed, tmp_path):
    client = start(BUSY, env=client_environment(hub, tmp_path / "home"), cwd=tmp_path)

    def load(what: str) -> str:
        client.stdin.write(what + "\n")
        client.stdin.flush()
        return client.stdout.readline().strip()

    commit = hub.repository("me/mapped").resolve("main")
    try:
        assert load("me/model") == "loaded"
        # Earlier answers are cached, including that there is no such file.
        hub.busy = {"/me/model/resolve"}
        assert load("me/model") == "loaded"
        for file in ("engram_tables.json", "engram-layer-00001.safetensors"):
            hub.busy = {f"/me/mapped/resolve/{commit}/{file}"}
            assert "couldn't connect" in load("me/mapped auto")
            assert "couldn't connect" in load("me/mapped mapped")
    finally:
        hub.busy = set()
        finish(client)


def test_revisions_differ(pushed):
    assert not np.allclose(pushed.logits["first"], pushed.logits["second"], atol=1e-3)
    assert not np.allclose(pushed.logits["second"], pushed.logits["branch"], atol=1e-3)


def test_loading_process_cannot_import_the_package(loaded):
    assert loaded.said == {"compressed": make_tokenizer().compressed_vocab_size, "known": False}


def test_only_needed_files_are_downloaded(loaded):
    fetched = {re.sub(".*/resolve/[^/]+/", "", request.path) for request in loaded.downloads}
    assert not fetched & (UNNEEDED | {"README.md"})
    assert {"config.json", "modeling_engram.py", "engram_token_map.safetensors"} <= fetched


def test_each_file_is_downloaded_once(loaded):
    complete = [request.path for request in loaded.downloads if request.status in (200, 206)]
    assert complete and len(complete) == len(set(complete))


def test_killed_download_leaves_nothing_under_a_final_name(loaded):
    blobs = [path for path in loaded.cache_after_interruption if path.parent.name == "blobs"]
    assert all(path.name.endswith(".incomplete") for path in blobs)
    assert not [path for path in loaded.cache_after_interruption if path.name.endswith(".safetensors")]


def test_dropped_download_resumes(loaded):
    (cut,) = (index for index, request in enumerate(loaded.downloads) if request.status == 0)
    rest = next(request for request in loaded.downloads[cut + 1 :] if request.path == loaded.downloads[cut].path)
    assert rest.status == 206 and re.fullmatch(r"bytes=[1-9]\d*-\d*", rest.range)


def test_pushed_and_loaded_models_are_equal(model_folder, pushed):
    model, tokenizer = EngramForCausalLM.from_pretrained(model_folder), EngramTokenizer.from_pretrained(model_folder)
    with torch.no_grad():
        logits = model(**tokenizer(TEXT, return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(logits, pushed.logits["first"], rtol=0, atol=1e-6)
