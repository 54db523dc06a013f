"""Peak memory of training row adapters on a mapped float8 table, against LoRA on the bare backbone.

    python benchmarks/row_adapters_mapped.py [--gigabytes 4] [--batches 2] [--folder DISK] [--steps 4]

Each trains in a separate process on the same few batches of 4 x 256 random tokens: row adapters for all rows that
these read (24 per token, nearly all of them different), or LoRA of rank 16 on the attention of the backbone alone,
with `Trainer`'s default optimizer (fused AdamW). The table's file is sparse and uses no disk, but its pages count like
those of any mapped file. Peaks are of all resident memory, with pages of files, and of memory outside files, sampled
every two milliseconds; the script also prints the memory of a process after its imports.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tables_folder import VOCAB, make_model_folder
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from engram_hf import EngramForCausalLM
from engram_hf.training import EngramRowsConfig, scan_rows

BATCH, LENGTH = 4, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the table (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the model is written")
    parser.add_argument(
        "--batches",
        type=int,
        default=2,
        help="batches of different tokens, whose rows are adapted (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=4, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--one", choices=["rows", "LoRA"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.folder, options.batches, options.steps)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_model_folder(Path(folder, "memory"), options.gigabytes, filled=False, layers=4, hidden=512)
        model = EngramForCausalLM.from_pretrained(Path(folder, "memory"), engram_residency="mapped")
        Qwen3ForCausalLM(model.config.backbone).save_pretrained(Path(folder, "bare"))
        table = model.model.memories()[1].table
        size = table.num_rows * table.width
        found = {kind: in_a_process(kind, folder, options.batches, options.steps) for kind in ("LoRA", "rows")}
    print(
        f"a mapped float8 table of {size / 1e9:.1f} GB, {options.batches} batches of {BATCH} x {LENGTH} tokens, {options.steps} steps"
    )
    print(
        f"{'':30}{'trained':>12}{'start MB':>10}{'peak MB':>9}{'to LoRA':>9}{'in no file':>12}{'to LoRA':>9}{'s a step':>10}"
    )
    for kind, title in (("LoRA", "LoRA on the bare backbone"), ("rows", "row adapters, table mapped")):
        one = found[kind]
        print(
            f"{title:30}{one['trained']:>12,}{one['start'] / 1e6:>10.0f}{one['peak'] / 1e6:>9.0f}"
            f"{one['peak'] / found['LoRA']['peak']:>9.2f}{one['own'] / 1e6:>12.0f}{one['own'] / found['LoRA']['own']:>9.2f}"
            f"{one['seconds']:>10.2f}"
        )


def in_a_process(kind: str, folder: str, batches: int, steps: int) -> dict[str, float]:
    numbers = ["--batches", str(batches), "--steps", str(steps)]
    command = [sys.executable, __file__, "--one", kind, "--folder", folder, *numbers]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(kind: str, folder: Path, count: int, steps: int) -> dict[str, float]:
    start = memory("VmHWM")
    torch.manual_seed(0)
    batches = [torch.randint(1, VOCAB, (BATCH, LENGTH)) for _ in range(count)]
    if kind == "LoRA":
        backbone = AutoModelForCausalLM.from_pretrained(folder / "bare")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(backbone, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=targets))
    else:
        base = EngramForCausalLM.from_pretrained(folder / "memory", engram_residency="mapped")
        rows = scan_rows([{"input_ids": ids} for ids in batches], None, base)
        model = get_peft_model(base, EngramRowsConfig(rows=rows))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    seconds = []
    with Watch() as watch:
        for step in range(steps):
            started, ids = time.process_time(), batches[step % count]
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.process_time() - started)
    size = sum(parameter.numel() for parameter in trained)
    peaks = {"start": start, "peak": memory("VmHWM"), "own": watch.peak}
    return {**peaks, "trained": size, "seconds": statistics.median(seconds)}


class Watch:
    """Records the largest `RssAnon` while it is entered; the system keeps no record of it."""

    def __enter__(self) -> "Watch":
        self.peak, self._is_over = memory("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._is_over.wait(0.002):
            self.peak = max(self.peak, memory("RssAnon"))


def memory(kind: str) -> int:
    """Return the bytes of this process: `RssAnon` outside files now, or the peak `VmHWM` of all kinds."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
