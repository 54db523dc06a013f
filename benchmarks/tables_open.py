"""Time and memory to open a mapped table and read from it, by size: `python benchmarks/tables_open.py [FOLDER]`.

Every figure comes from a separate process. The memory is what the load adds to the process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
import json, resource, sys, time
import torch
from engram_hf import EngramForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
def resident():
    return {line.split(":")[0]: int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith("VmRSS")}["VmRSS"]
EngramForCausalLM.from_pretrained(sys.argv[3], engram_residency=sys.argv[2])  # imports, first use of everything
before, start = resident(), time.perf_counter()
model = EngramForCausalLM.from_pretrained(sys.argv[1], engram_residency=sys.argv[2])
opened = time.perf_counter() - start
table = model.model.memories()[1].table
table(torch.randint(0, table.num_rows, (1, 24)), torch.bfloat16)
print(json.dumps({"open": opened, "lookup": time.perf_counter() - start - opened, "megabytes": resident() - before}))
"""


def measure(folder: Path, residency: str, warm_up: Path, repeats: int = 5) -> dict[str, float]:
    """Return the medians of `repeats` processes."""
    command = [sys.executable, "-c", SCRIPT, str(folder), residency, str(warm_up)]
    runs = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(repeats)]
    return {name: sorted(run[name] for run in runs)[repeats // 2] for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", nargs="?", help="a folder for the tables, which are 21 GB of holes (default: a temporary one)"
    )
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        from tables_folder import make_model_folder

        tiny = Path(folder) / "tiny"
        make_model_folder(tiny, 0.001, filled=False)
        results = {}
        for gigabytes in (1, 4, 16):
            make_model_folder(Path(folder) / str(gigabytes), gigabytes, filled=False)
            results[gigabytes] = measure(Path(folder) / str(gigabytes), "mapped", tiny)
            print_row(f"{gigabytes} GB mapped", results[gigabytes])
        print_row("1 GB resident", measure(Path(folder) / "1", "resident", tiny, repeats=3))
        for name in ("open", "lookup", "megabytes"):
            print(f"16 GB against 1 GB, {name}: {results[16][name] / results[1][name]:.2f}x")


def print_row(name: str, result: dict[str, float]) -> None:
    print(
        f"{name:14} open {result['open'] * 1e3:8.1f} ms, first lookup {result['lookup'] * 1e3:6.2f} ms, "
        f"{result['megabytes']:8.1f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
