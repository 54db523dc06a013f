"""`benchmarks/on_gpu.sh`, as far as it runs without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_version

ROOT = Path(__file__).parent.parent
STEPS = ["environment", "tests", "memory_cost_paper", "memory_cost_v41", "row_ids", "tables_model"]


def run_script(out: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OUT": str(out), "PYTHON": python, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(ROOT / "benchmarks" / "on_gpu.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)


def results(out: Path) -> dict[str, str]:
    lines = (out / "summary.txt").read_text().splitlines()[1:]
    return {line.split()[0]: line[23:33].strip() for line in lines}


@pytest.mark.slow
def test_every_step_runs_on_the_cpu(tmp_path):
    done = run_script(tmp_path, "--dry-run")
    texts = {name: (tmp_path / f"{name}.txt").read_text() for name in STEPS}
    assert results(tmp_path) == dict.fromkeys(STEPS, "ok"), texts
    assert done.returncode == 0
    assert "skipped" in texts["tests"] and "no GPU" in texts["environment"]
    assert "decoding" in texts["memory_cost_v41"] and "row ids" in texts["row_ids"]
    assert "mapped against resident" in texts["tables_model"]


def test_failing_steps_do_not_stop_the_rest(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    done = run_script(tmp_path / "out", python=str(python))
    assert results(tmp_path / "out") == dict.fromkeys(STEPS, "exit 3")
    assert done.returncode == 1


def test_time_limits_fit_into_eight_minutes():
    text = (ROOT / "benchmarks" / "on_gpu.sh").read_text()
    limits = [int(line.split()[2]) for line in text.splitlines() if line.startswith("step ")]
    assert len(limits) == len(STEPS) and max(limits) < 300
    assert "SECONDS_IN_ALL=470" in text


@pytest.mark.parametrize("arguments", [["--help"], ["cuda"]])
def test_other_arguments_are_refused(arguments, tmp_path):
    done = run_script(tmp_path, *arguments)
    assert done.returncode == 2 and "usage" in done.stderr
