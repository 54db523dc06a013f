"""Generating with a mapped table, and saving it: `python benchmarks/tables_model.py [FOLDER] [--device cuda]`.

On a GPU, a pinned table generates, too. The time of a save is compared with that of a hard link of the table and of a
copy by `cp`.
"""

import argparse
import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch
from tables_folder import LAYER, VOCAB, make_model_folder
from transformers import PreTrainedModel
from transformers.utils import logging

from engram_hf import EngramForCausalLM
from engram_hf.saving_engram import table_file_name


def generating(folder: Path, device: str, tokens: int, repeats: int) -> None:
    """Return tokens per second of greedy decoding, warm, with alternating residencies."""
    residencies = ["resident", "mapped"] if device == "cpu" else ["resident", "mapped", "pinned"]
    models = {
        residency: EngramForCausalLM.from_pretrained(
            folder, engram_residency=residency, dtype=torch.bfloat16, device_map=device
        )
        for residency in residencies
    }
    prompt = torch.randint(3, VOCAB, (1, 64), device=device)
    texts = {}
    times: dict[str, list[float]] = {residency: [] for residency in models}
    for turn in range(repeats + 1):
        # The order changes, because the second run finds the processor in another state than the first.
        for residency, model in sorted(models.items(), reverse=turn % 2 == 0):
            start = time.perf_counter()
            text = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            texts[residency] = text.cpu()  # This waits for a GPU.
            if turn:  # The first run warms up.
                times[residency].append(time.perf_counter() - start)
    speeds = {residency: tokens / min(some) for residency, some in times.items()}
    for residency, speed in speeds.items():
        assert torch.equal(texts["resident"], texts[residency])
        print(f"generating, {residency:9} {speed:7.1f} tokens/s")
    for residency in residencies[1:]:
        print(f"{residency} against resident: {speeds[residency] / speeds['resident']:.3f}x")


class PeakMemory:
    """Measures the peak anonymous memory of this process while the block runs, in megabytes above that at its
    beginning.
    """

    def __enter__(self):
        self._done, self.peak, self._start = threading.Event(), 0.0, anonymous_megabytes()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.001):
            self.peak = max(self.peak, anonymous_megabytes() - self._start)

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()


def anonymous_megabytes() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


def saving(folder: Path, repeats: int) -> None:
    model = EngramForCausalLM.from_pretrained(folder, engram_residency="mapped")
    table = folder / table_file_name(LAYER)
    times: dict[str, list[float]] = {"hard link": [], "cp": [], "save_pretrained": [], "the same without a table": []}
    weights = {name: tensor for name, tensor in model.state_dict().items()}
    with PeakMemory() as memory:
        for turn in range(repeats):
            target = folder / f"saved-{turn}"
            times["save_pretrained"].append(timed(lambda target=target: model.save_pretrained(target)))
    for turn in range(repeats):
        times["hard link"].append(timed(lambda turn=turn: os.link(table, folder / f"link-{turn}")))
        bare = folder / f"bare-{turn}"
        times["the same without a table"].append(timed(lambda bare=bare: without_tables(model, bare, weights)))
    for _ in range(2):
        times["cp"].append(timed(lambda: subprocess.run(["cp", table, folder / "copy"], check=True)))
        (folder / "copy").unlink()
    best = {name: min(some) for name, some in times.items()}
    for name, seconds in best.items():
        print(f"saving {table.stat().st_size / 1e9:.1f} GB, {name:25} {seconds * 1e3:9.1f} ms")
    print(f"save_pretrained: {best['save_pretrained'] / best['cp']:.3f} of cp, {memory.peak:.0f} MB of memory at most")


def without_tables(model: EngramForCausalLM, folder: Path, weights: dict) -> None:
    PreTrainedModel.save_pretrained(model, folder, state_dict=weights)


def timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="a folder with space for 1 + 4 GB (default: a temporary one)")
    parser.add_argument(
        "--gigabytes", type=float, default=4, help="size of the table that is saved (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="device that generates (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that are generated (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=8, help="pairs of runs (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_model_folder(Path(folder) / "generate", min(1, options.gigabytes), filled=True, layers=4, hidden=512)
        generating(Path(folder) / "generate", options.device, options.tokens, options.repeats)
        make_model_folder(Path(folder) / "save", options.gigabytes, filled=True)
        saving(Path(folder) / "save", repeats=min(5, options.repeats))


if __name__ == "__main__":
    main()
