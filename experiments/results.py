"""Result files, one per run, written atomically and never repeated; and intervals over seeds."""

import contextlib
import fcntl
import json
import math
import os
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from engram_hf import EngramError
from engram_hf.analysis import Estimate

# These are quantiles of Student's t for a two-sided interval of 95 %, by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Results:
    """The result files of a preset.

    Args:
        folder: their folder.
    """

    folder: Path

    def require_writable(self) -> None:
        """Make the folder.

        Raises:
            ValueError: the folder, or a file in it, cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe-{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise EngramError(
                f"Results cannot be written to {self.folder} ({error.strerror}); name a folder that can be, with --results."
            ) from error

    def path(self, name: str) -> Path:
        """Return the path of a run's file."""
        return self.folder / f"{name}.json"

    def read(self, name: str) -> dict[str, Any] | None:
        """Return a run's result, or None if it is not done.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.path(name)
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise EngramError(f"{path} is no JSON; delete it, so that the run is done again.") from error

    def write(self, name: str, result: dict[str, Any]) -> None:
        """Store a run's result."""
        path = self.path(name)
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(path)


def now() -> str:
    """Return the date in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M")


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
    """Yield whether this process holds the lock file `path`; it is held while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def provenance(corpus_digest: str, device: str) -> dict[str, Any]:
    """Return the kind of machine and the code that made a result, without names or paths."""
    return {
        "commit": _commit(),
        "machine": _machine(device),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
        "corpus": corpus_digest,
    }


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + (
            "+" if git("status", "--porcelain", "-uno").strip() else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    models = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {models[0] if models else 'unknown processor'}"


def interval(values: Sequence[float]) -> Estimate:
    """Return mean and 95 % interval of values of several seeds (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, None)
    reach = _STUDENT.get(len(values) - 1, 2.0) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - reach, mean + reach)
