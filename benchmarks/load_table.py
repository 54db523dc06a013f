"""Loading a model with a table of 40M x 64 bfloat16 rows (5.1 GB), against reading its bytes with safetensors.

    python benchmarks/load_table.py

Each run has a separate process, and the two alternate. A run lasts until every page is in memory; the file is in the
page cache if memory allows. A loader that initialized the table before overwriting it would take many times as long,
and twice the memory (three times in float32).
"""

import argparse
import json
import multiprocessing
import re
import statistics
import struct
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from engram_hf import EngramConfig, EngramForCausalLM

BLOCK_BYTES = 64 << 20
TABLE = "model.layers.1.engram.table.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=40_000_000, help="rows of the table (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="channels of a row (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each loader (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="a folder for the model, which is deleted afterwards (default: a temporary one)"
    )
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        table_bytes = write_model(Path(folder), arguments.rows, arguments.head_dim)
        print(f"table of {arguments.rows / 1e6:.0f}M x {arguments.head_dim} bfloat16, {table_bytes / 1e9:.2f} GB")
        runs = {title: [] for title in WAYS}
        for _ in range(arguments.repeats):
            for title, results in runs.items():
                results.append(in_a_process(WAYS[title], folder))
    for title, results in runs.items():
        print(f"{title:34}" + "".join(f"{seconds:7.2f} s {peak / 1e9:6.2f} GB" for seconds, peak in results))
    (read_time, read_peak), (load_time, load_peak) = (
        map(statistics.median, zip(*r, strict=True)) for r in runs.values()
    )
    extra = load_time - read_time
    print(f"from_pretrained takes {extra:.2f} s more and {load_peak / read_peak:.2f} x the memory (medians)")


def write_model(folder: Path, rows: int, head_dim: int) -> int:
    """Write a tiny Llama with one large table, the table in blocks; return the table's bytes."""
    backbone = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        dtype="bfloat16",
    )
    config = EngramConfig.for_backbone(
        backbone, layer_ids=[1], rows=rows, engram_head_dim=head_dim, engram_pad_token_id=0, dtype="bfloat16"
    )
    with torch.device("meta"):
        model = EngramForCausalLM(config).to(torch.bfloat16)
    constants = {f"model.hashing.{name}": value for name, value in model.model.hashing.derive_constants().items()}
    small = {
        name: torch.zeros_like(value, device="cpu") for name, value in model.state_dict().items() if name != TABLE
    }
    save_file({**small, **constants}, folder / "small.safetensors", metadata={"format": "pt"})
    write_table(folder / "table.safetensors", model.get_parameter(TABLE).shape)
    weight_map = {**dict.fromkeys(small, "small.safetensors"), TABLE: "table.safetensors"}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["EngramForCausalLM"]
    config.save_pretrained(folder)
    return model.get_parameter(TABLE).numel() * 2


def write_table(path: Path, shape: torch.Size) -> None:
    size = shape.numel() * 2
    entry = {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": "pt"}, TABLE: entry}).encode()
    header += b" " * (-len(header) % 8)
    block = torch.randn(BLOCK_BYTES // 2).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, size, BLOCK_BYTES):
            file.write(block[: min(BLOCK_BYTES, size - start)])


def read_tensors(folder: str) -> dict[str, torch.Tensor]:
    """Read every tensor of a folder."""
    tensors = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return tensors


def load_model(folder: str) -> EngramForCausalLM:
    """Load the model of a folder."""
    return EngramForCausalLM.from_pretrained(folder)


WAYS = {"reading with safetensors": read_tensors, "EngramForCausalLM.from_pretrained": load_model}


def in_a_process(work, folder: str) -> tuple[float, int]:
    """Return the seconds of `work`, and the growth of peak memory in bytes, in a new process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure, (work, folder))


def measure(work, folder: str) -> tuple[float, int]:
    idle, start = peak_memory(), time.perf_counter()
    touch_every_page(work(folder))
    return time.perf_counter() - start, peak_memory() - idle


def touch_every_page(result) -> None:
    """Read every page: on the CPU, both ways map the file and read it lazily."""
    tensors = result.values() if isinstance(result, dict) else result.state_dict().values()
    for tensor in tensors:
        tensor.flatten()[:: 4096 // tensor.element_size()].sum()


def peak_memory() -> int:
    """Return the peak memory of this process in bytes, including mapped files (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


if __name__ == "__main__":
    main()
