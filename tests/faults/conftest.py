"""Fault trials: the number of rounds, the seed, and the folders they work on.

`make faults` sets ENGRAM_TRIALS to 100 and so runs a hundred times as many rounds; ENGRAM_SEED repeats a run.
"""

import os
import random
import secrets
import threading
from pathlib import Path

import pytest
import torch
from engram_cli.main import main as engram
from tqdm import tqdm
from trial_models import save_folders, write_facts

# Forked processes share the lock of tqdm: one that is killed while it holds it would block all others for good.
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())

FACTOR = int(os.environ.get("ENGRAM_TRIALS", "1"))
SEED = int(os.environ.get("ENGRAM_SEED") or secrets.randbelow(1 << 32))


def pytest_report_header() -> str:
    return f"trials: ENGRAM_TRIALS={FACTOR} ENGRAM_SEED={SEED}"


def pytest_collection_modifyitems(items) -> None:
    """Mark all trials as slow."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def draw(request) -> random.Random:
    """Return the random generator of one test; a failure shows the seed."""
    print(f"ENGRAM_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture
def rounds():
    """Return the number of rounds of a trial that runs `count` of them in CI."""
    return lambda count: count * FACTOR


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Save models (see `trial_models.save_folders`), `old int8`, and two row adapters, `old facts` and `new facts`."""
    torch.set_num_threads(1)  # Forked processes do not have the threads of this one.
    home = tmp_path_factory.mktemp("trials")
    found = save_folders(home) | {name: home / name for name in ("old int8", "old facts", "new facts")}
    engram(["quantize", str(found["old files"]), str(found["old int8"]), "--dtype", "int8"])
    for name, word in (("old facts", "w7"), ("new facts", "w8")):  # The text of the trials contains this word.
        write_facts(found["old files"], found[name], word)
    return found
