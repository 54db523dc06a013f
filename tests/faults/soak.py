"""Mixed requests by threads and forked workers on mapped tables: every answer is compared, and no resource may grow.

Row adapters are switched, and loaded again, between requests: PEFT switches them for all threads of a process at once,
so a switch waits until no request runs, as in a server.

    python tests/faults/soak.py --minutes 20 [--seed N]

The script prints memory, threads and open files of the process at each tenth of the time, and the number of compared
answers; it ends with 1 if one of them was wrong, or if a resource grew after the first third.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import re
import secrets
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from trial_models import load, random_ids, save_folders, write_facts

FORK = multiprocessing.get_context("fork")
THREADS, WORKERS = 4, 2
# Memory may grow by this after the first third: allocators take and return pages as threads come and go.
MEMORY_SLACK = 8 << 20


CHOICES = ((), ("w5",), ("w6",), ("w5", "w6"))
SWITCHES = 1 / 10  # A request is followed by a switch with this probability.


class AdaptedModel:
    """A model with adapters that are switched while no request runs.

    Args:
        model: a model without adapters.
        folders: folders of adapters by name.
    """

    def __init__(self, model, folders: dict[str, Path]):
        self.folders = folders
        self.peft = PeftModel.from_pretrained(model, folders["w5"], adapter_name="w5")
        self.peft.load_adapter(folders["w6"], "w6")
        self._turn, self._running, self._waiting = threading.Condition(), 0, 0
        self._choice: tuple[str, ...] = ()
        self.switch(())

    @contextlib.contextmanager
    def request(self) -> Iterator[tuple]:
        """Yield the model and its active adapters, which stay active as long as the request runs."""
        with self._turn:
            self._turn.wait_for(lambda: not self._waiting)
            self._running += 1
        try:
            yield self.peft.get_base_model(), self._choice
        finally:
            with self._turn:
                self._running -= 1
                self._turn.notify_all()

    def switch(self, choice: tuple[str, ...], reloads: bool = False) -> None:
        """Activate these adapters, perhaps after one of them was removed and loaded from its folder again."""
        with self._turn:
            self._waiting += 1
            self._turn.wait_for(lambda: not self._running)
            self._waiting -= 1
            if reloads:
                self.peft.base_model.set_adapter(["w6"])
                self.peft.delete_adapter("w5")
                self.peft.load_adapter(self.folders["w5"], "w5")
            if choice:
                self.peft.base_model.enable_adapter_layers()
                self.peft.base_model.set_adapter(list(choice))
            else:
                self.peft.base_model.disable_adapter_layers()
            self._choice = choice
            self._turn.notify_all()


def requests(model: AdaptedModel) -> list:
    """Return calls of many shapes, each with the answers of a resident model for each choice of adapters."""

    @torch.no_grad()
    def forward(ids, mask=None):
        return lambda model: model(ids, attention_mask=mask).logits

    def generate(ids, **options):
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
        return lambda model: model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    calls = [forward(random_ids(batch, length, length)) for batch, length in ((1, 1), (1, 63), (3, 17), (2, 128))]
    calls += [
        generate(random_ids(2, 7)),
        generate(random_ids(1, 33), num_beams=2),
        generate(random_ids(1, 5), use_cache=False),
    ]
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    calls.append(forward(ids, mask))
    expected = []
    for choice in CHOICES:
        model.switch(choice)
        with torch.no_grad(), model.request() as (adapted, _):
            expected.append([call(adapted) for call in calls])
    for other in expected[1:]:
        assert any(not torch.equal(one, two) for one, two in zip(expected[0], other, strict=True))
    return [
        (call, dict(zip(CHOICES, answers, strict=True)))
        for call, answers in zip(calls, zip(*expected, strict=True), strict=True)
    ]


def serve(model: AdaptedModel, calls: list, seed: str, stop) -> tuple[int, int, int]:
    """Send requests until `stop()`; return the numbers of answers, wrong answers and switches."""
    draw, asked, wrong, switches = random.Random(seed), 0, 0, 0
    while not stop():
        call, expected = draw.choice(calls)
        with torch.no_grad(), model.request() as (adapted, choice):
            wrong += not torch.allclose(call(adapted).float(), expected[choice].float(), atol=1e-5)
        asked += 1
        if draw.random() < SWITCHES:
            model.switch(draw.choice(CHOICES), reloads=draw.random() < 0.1)
            switches += 1
    return asked, wrong, switches


def measure() -> dict[str, int]:
    """Return the resources that must not grow."""
    status = Path("/proc/self/status").read_text()
    memory = int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024
    return {
        "memory": memory,
        "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),
        "files": len(os.listdir("/proc/self/fd")),
    }


def main() -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="peft")
    with tempfile.TemporaryDirectory() as home:
        folders = save_folders(Path(home))
        adapters = {word: Path(home, word) for word in ("w5", "w6")}
        for word, folder in adapters.items():
            write_facts(folders["old plain"], folder, word)
        calls = requests(AdaptedModel(load(folders["old plain"]), adapters))
        model = AdaptedModel(load(folders["old files"], "mapped"), adapters)
        end, queue = time.monotonic() + 60 * given.minutes, FORK.Queue()

        def is_over() -> bool:
            return time.monotonic() > end

        def work(seed: str) -> None:
            queue.put(serve(model, calls, seed, is_over))

        workers = [FORK.Process(target=work, args=(f"{given.seed} process {i}",)) for i in range(WORKERS)]
        for worker in workers:
            worker.start()
        threads = [threading.Thread(target=work, args=(f"{given.seed} thread {i}",)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        figures = []
        for tenth in range(1, 10):
            time.sleep(max(0, end - time.monotonic() - 6 * given.minutes * (10 - tenth)))
            figures.append(measure())
            print(f"soak: after {tenth}/10 of the time, {figures[-1]}", flush=True)
        answers = [queue.get() for _ in workers + threads]
        for one in workers + threads:
            one.join()
    settled, last = figures[2], figures[-1]
    grew = last["memory"] > settled["memory"] + MEMORY_SLACK or any(
        last[name] > max(one[name] for one in figures[:3]) for name in ("threads", "files")
    )
    asked, wrong, switches = (sum(column) for column in zip(*answers, strict=True))
    print(
        f"soak: seed {given.seed}, {given.minutes} minutes, {asked} answers, {switches} switches, {wrong} wrong, "
        f"{'grew' if grew else 'flat'}"
    )
    return int(bool(wrong or grew))


if __name__ == "__main__":
    sys.exit(main())
