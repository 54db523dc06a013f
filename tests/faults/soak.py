"""Mixed requests by threads and forked workers on mapped tables: every answer is compared, nothing may grow.

    python tests/faults/soak.py --minutes 20 [--seed N]

Prints memory, threads and open files of the process at each tenth of the time, and how many answers were compared; ends with
1 if one of them was wrong, or if something grew after the first third.
"""

import argparse
import multiprocessing
import os
import random
import re
import secrets
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from trial_models import load, random_ids, save_folders

FORK = multiprocessing.get_context("fork")
THREADS, WORKERS = 4, 2
# What memory may grow by after the first third: allocators take and give back pages as threads come and go.
MEMORY_SLACK = 8 << 20


def requests(model) -> list:
    """Calls of many shapes, each with what a resident model answers."""

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
    with torch.no_grad():
        return [(call, call(model)) for call in calls]


def serve(model, calls: list, seed: str, stop) -> tuple[int, int]:
    """Ask until `stop()`; how many answers there were, and how many of them were wrong."""
    draw, asked, wrong = random.Random(seed), 0, 0
    while not stop():
        call, expected = draw.choice(calls)
        with torch.no_grad():
            wrong += not torch.allclose(call(model).float(), expected.float(), atol=1e-5)
        asked += 1
    return asked, wrong


def measure() -> dict[str, int]:
    """What must not grow."""
    status = Path("/proc/self/status").read_text()
    memory = int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024
    return {
        "memory": memory,
        "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),
        "files": len(os.listdir("/proc/self/fd")),
    }


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        folders = save_folders(Path(home))
        calls = requests(load(folders["old plain"]))
        model = load(folders["old files"], "mapped")
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
    asked, wrong = (sum(column) for column in zip(*answers, strict=True))
    print(
        f"soak: seed {given.seed}, {given.minutes} minutes, {asked} answers, {wrong} wrong, {'grew' if grew else 'flat'}"
    )
    return int(bool(wrong or grew))


if __name__ == "__main__":
    sys.exit(main())
