"""The models that fault trials work on, and a way to tell which of them a folder holds."""

import contextlib
import io
import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch

# The scripts of this folder need it, since pytest does not start them.
sys.path.insert(0, str(Path(__file__).parent.parent))
from engram_cli.main import main as engram
from peft import PeftModel
from tiny_backbones import engram_config, random_ids, randomize  # noqa: F401
from tiny_tokenizer import make_tokenizer

from engram_hf import EngramConfig, EngramForCausalLM

FORK = multiprocessing.get_context("fork")
TEXT = ["the café THE cafe w7 w8 the w9", "w1 w2 w3 w4 w5 w6 w7 the"]


def make_model(seed: int) -> EngramForCausalLM:
    """Build a model with a token map whose memory changes its logits; each seed gives another model."""
    backbone = engram_config("llama").text_config
    size = {"engram_n_heads": 2, "engram_head_dim": 32, "engram_vocab_size": 97}
    config = EngramConfig.for_backbone(backbone, make_tokenizer(), layer_ids=[1, 2], **size)
    torch.manual_seed(seed)
    model = randomize(EngramForCausalLM(config), seed).eval()
    model.set_token_map(make_tokenizer())
    return model


def save_folders(home: Path) -> dict[str, Path]:
    """Save two models, each with its tables among the weights and in files: `old plain`, `old files`, `new plain`,
    `new files`.
    """
    found = {}
    for seed, name in enumerate(("old", "new")):
        plain, files = home / f"{name}_plain", home / f"{name}_files"
        make_model(seed).save_pretrained(plain)
        load(plain, "mapped").save_pretrained(files)
        for folder in (plain, files):
            make_tokenizer().save_pretrained(folder)
        found |= {f"{name} plain": plain, f"{name} files": files}
    return found


def write_facts(model: Path, target: Path, word: str) -> int:
    """Write two facts about a word with `engram facts write`; return its exit code. Other words give adapters of equal
    size.
    """
    path = target.parent / f"facts about {word} of {os.getpid()}.jsonl"
    facts = [{"prompt": f"{word} w2 w3", "target": "w9"}, {"prompt": f"w1 {word} w4", "target": "w7 w8"}]
    path.write_text("\n".join(map(json.dumps, facts)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return engram(["facts", "write", str(model), str(path), "--output", str(target), "--steps", "20"])


def load(folder: Path, residency: str = "resident") -> EngramForCausalLM:
    """Load a saved model."""
    return EngramForCausalLM.from_pretrained(folder, engram_residency=residency).eval()


def load_kind(folders: dict[str, Path], kind: str) -> EngramForCausalLM:
    """Load the old model, resident or mapped; or `adapted`: its quantized tables, mapped, with facts written into rows
    of them.
    """
    if kind != "adapted":
        return load(folders["old files"], kind)
    return adapt(load(folders["old int8"], "mapped"), folders["old facts"])


def adapt(model: EngramForCausalLM, adapter: Path) -> EngramForCausalLM:
    """Put an adapter on the model."""
    return PeftModel.from_pretrained(model, adapter).get_base_model()


@torch.no_grad()
def answer(model: EngramForCausalLM, rows: int = 2) -> torch.Tensor:
    """Return its logits on a text."""
    return model(**make_tokenizer()(TEXT[:rows], return_tensors="pt")).logits


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by relative name."""
    paths = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def all_at_once(functions) -> list:
    """Return the results of functions that separate processes start within milliseconds of each other."""
    barrier, results = FORK.Barrier(len(functions)), FORK.Queue()

    def run(function, index):
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
        barrier.wait(60)
        try:
            results.put((index, function()))
        except BaseException as error:
            results.put((index, f"{type(error).__name__}: {error}"))

    processes = [FORK.Process(target=run, args=(function, index)) for index, function in enumerate(functions)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(120)
    return [found[index] for index in range(len(functions))]
