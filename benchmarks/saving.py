"""The cost of a save, and the cost at loading of checking that tables belong to their weights.

    python benchmarks/saving.py [--against FOLDER] [--megabytes 360] [--rounds 5]

The script prints the minimum of all rounds in milliseconds of processor time, of all threads and of the kernel, so
that other work on the machine does not count. With `--against`, a folder with another state of this repository (`git
worktree add FOLDER COMMIT`), the two versions alternate in separate processes, and their ratio is printed. Everything
is in the page cache; from a disk, reading takes longer. The time of the digest is compared with that of reading the
weights.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
STEPS = 16


def least(action: Callable[[], object], prepare: Callable[[], object] = lambda: None, repeats: int = 3) -> float:
    """Return the minimum of the milliseconds of processor time that an action takes, each time after `prepare`."""
    found = []
    for _ in range(repeats):
        prepare()
        begin = time.process_time()
        action()
        found.append(1e3 * (time.process_time() - begin))
    return min(found)


def build(megabytes: int):
    """Build a model with about `megabytes` of weights beside its tables."""
    from engram_hf import EngramConfig, EngramForCausalLM

    layers = max(1, (megabytes - 34) // 103)
    # This is the vocabulary of a model of 1 to 2 billion parameters.
    size = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
    backbone = LlamaConfig(vocab_size=4096, num_hidden_layers=layers, **size)
    memory = {"engram_n_heads": 2, "engram_head_dim": 32, "engram_vocab_size": 100_000}
    torch.manual_seed(0)
    return EngramForCausalLM(EngramConfig.for_backbone(backbone, layer_ids=[0], **memory)).to(torch.bfloat16).eval()


def read(path: Path) -> None:
    """Return all bytes of a file."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def measure(home: Path, megabytes: int) -> dict[str, float]:
    """Return milliseconds by action, with the version of the package that Python finds."""
    from engram_hf import EngramForCausalLM

    def load():
        return EngramForCausalLM.from_pretrained(files, engram_residency="mapped").eval()

    def generate(tokens: int) -> None:
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    def remove() -> None:
        shutil.rmtree(target, ignore_errors=True)

    def write() -> None:
        target.mkdir()
        save_file(state, target / "model.safetensors")

    plain, files, target = home / "plain", home / "files", home / "target"
    build(megabytes).save_pretrained(plain)
    EngramForCausalLM.from_pretrained(plain, engram_residency="mapped").save_pretrained(files)
    shutil.rmtree(plain)
    weights, model, ids = files / "model.safetensors", load(), torch.arange(32).unsqueeze(0)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    figures = {
        "writing the weights alone": least(write, remove),
        "saving to a new folder": least(lambda: model.save_pretrained(target), remove),
        "saving over an older model": least(lambda: model.save_pretrained(target)),
        "loading, tables mapped": least(load),
        "the first token": least(lambda: generate(1)),
        "a decoding step": (least(lambda: generate(1 + STEPS)) - least(lambda: generate(1))) / STEPS,
        "reading the weights": least(lambda: read(weights), repeats=9),
    }
    try:
        from engram_hf.loading_engram import weights_digest
    except ImportError:  # An older version does not have it.
        return figures
    return figures | {"their digest": least(lambda: weights_digest([weights]), repeats=9)}


def measure_apart(checkout: Path, megabytes: int) -> dict[str, float]:
    """Do as `measure` in a separate process, with the package in a checkout of the repository."""
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "engram_hf").symlink_to(checkout.resolve())
        paths = os.pathsep.join([home, os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", home, "--megabytes", str(megabytes)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, check=True, cwd=home
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="an older state of the repository")
    parser.add_argument("--megabytes", type=int, default=360, help="size of the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="saves and loads of each version (default: %(default)s)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measure(given.measure, given.megabytes)))
        return
    versions = {"now": ROOT} if given.against is None else {"before": given.against, "now": ROOT}
    rounds: dict[str, list[dict[str, float]]] = {version: [] for version in versions}
    for _ in range(given.rounds):
        for version, checkout in versions.items():
            rounds[version].append(measure_apart(checkout, given.megabytes))
    figures = {version: {name: min(one[name] for one in some) for name in some[0]} for version, some in rounds.items()}
    print(f"{given.megabytes} MB of weights, {given.rounds} rounds, torch {torch.__version__}; ms of processor time")
    print(f"{'':28}" + "".join(f"{version:>10}" for version in versions) + ("     ratio" if given.against else ""))
    for name, now in figures["now"].items():
        before = figures.get("before", {}).get(name)
        cells = [f"{figures[version][name]:10.2f}" if name in figures[version] else f"{'':10}" for version in versions]
        print(f"{name:28}" + "".join(cells) + ("" if before is None else f"{now / before:10.3f}"))
    share = figures["now"]["their digest"] / figures["now"]["reading the weights"]
    print(f"the digest takes {share:.1%} of reading the weights")


if __name__ == "__main__":
    main()
