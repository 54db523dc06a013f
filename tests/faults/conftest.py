"""Trials of faults: how many rounds they have, which seed they draw from, and the folders they work on.

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

# The lock of tqdm is shared with forked processes: one that is killed while it holds it would stop all others for good.
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())

FACTOR = int(os.environ.get("ENGRAM_TRIALS", "1"))
SEED = int(os.environ.get("ENGRAM_SEED") or secrets.randbelow(1 << 32))


def pytest_report_header() -> str:
    return f"trials: ENGRAM_TRIALS={FACTOR} ENGRAM_SEED={SEED}"


def pytest_collection_modifyitems(items) -> None:
    """All trials are slow."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def draw(request) -> random.Random:
    """Random numbers of one test; a failure shows the seed."""
    print(f"ENGRAM_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture
def rounds():
    """The number of rounds of a trial that has `count` of them in CI."""
    return lambda count: count * FACTOR


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Saved models (see `trial_models.save_folders`); `old int8`, and two adapters of facts, `old facts` and `new facts`."""
    torch.set_num_threads(1)  # forked processes do not have the threads of this one
    home = tmp_path_factory.mktemp("trials")
    found = save_folders(home) | {name: home / name for name in ("old int8", "old facts", "new facts")}
    engram(["quantize", str(found["old files"]), str(found["old int8"]), "--dtype", "int8"])
    for name, word in (("old facts", "w7"), ("new facts", "w8")):  # which the text of the trials has
        write_facts(found["old files"], found[name], word)
    return found
