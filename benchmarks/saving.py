"""What a save costs, and what it costs at load that tables know their weights.

    python benchmarks/saving.py [--megabytes 400] [--repeats 5]

Prints medians of seconds: saving a model to a new folder and over an older one, writing its bytes alone, loading it with its
tables mapped, reading its weights, and their digest. Everything is in the page cache; on a disk, reading takes longer.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from engram_hf import EngramConfig, EngramForCausalLM
from engram_hf.safetensors_engram import read_header


def median(action: Callable[[], object], repeats: int, prepare: Callable[[], object] = lambda: None) -> float:
    """Seconds of an action, each time after `prepare`."""
    seconds = []
    for _ in range(repeats):
        prepare()
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def build(megabytes: int) -> EngramForCausalLM:
    """A model with about so many megabytes of weights beside its tables."""
    hidden, layers = 512, max(2, megabytes // 16)
    backbone = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=8
    )
    size = {"engram_n_heads": 2, "engram_head_dim": 32, "engram_vocab_size": 100_000}
    return EngramForCausalLM(EngramConfig.for_backbone(backbone, layer_ids=[0, 1], **size)).eval()


def read(path: Path) -> None:
    """All bytes of a file."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        plain, files, target = Path(home, "plain"), Path(home, "files"), Path(home, "target")
        build(given.megabytes).save_pretrained(plain)
        model = EngramForCausalLM.from_pretrained(plain, engram_residency="mapped")
        model.save_pretrained(files)
        shutil.rmtree(plain)
        weights = files / "model.safetensors"

        def remove() -> None:
            shutil.rmtree(target, ignore_errors=True)

        state = {key: tensor for key, tensor in model.state_dict().items() if key in read_header(weights).tensors}

        def write() -> None:
            target.mkdir()
            save_file(state, target / "model.safetensors")

        figures = {
            "saving to a new folder": median(lambda: model.save_pretrained(target), given.repeats, remove),
            "saving over an older model": median(lambda: model.save_pretrained(target), given.repeats),
            "writing the weights alone": median(write, given.repeats, remove),
            "loading, tables mapped": median(
                lambda: EngramForCausalLM.from_pretrained(files, engram_residency="mapped"), given.repeats
            ),
            "reading the weights": median(lambda: read(weights), given.repeats),
        }
        try:
            from engram_hf.loading_engram import weights_digest
        except ModuleNotFoundError:  # of an older version, to compare with
            pass
        else:
            figures["their digest"] = median(lambda: weights_digest([weights]), given.repeats)
        print(f"{weights.stat().st_size / 1e6:.0f} MB of weights, torch {torch.__version__}")
        for name, seconds in figures.items():
            print(f"{name:28} {seconds * 1e3:9.1f} ms")


if __name__ == "__main__":
    main()
