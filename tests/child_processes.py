"""Python processes that stand for other machines."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 180
# Goes in front of code that is to run where the package is not installed.
WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "engram_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def start(code: str, *arguments: object, env: dict[str, str], cwd: Path, isolated: bool = False) -> subprocess.Popen:
    """A Python process that runs `code`; `isolated` from its folder and its user's packages."""
    command = [sys.executable, *["-I"] * isolated, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=cwd, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def forks_of_a_server(*modules: str) -> multiprocessing.context.BaseContext:
    """Processes that fork from one without threads, which has imported the package: they start within milliseconds.

    A process has one such server, so all tests that want one ask here; it has imported `modules` too, unless it ran before.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engram_hf.convert_scripts.convert_deepseek_v41", *modules])
    return context


def finish(process: subprocess.Popen) -> Any:
    """Wait for a process; what its last line says, in JSON."""
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def run_elsewhere(code: str, home: Path) -> Any:
    """What code prints last, in JSON, in a process of its own folder, module cache and environment, without network."""
    elsewhere = home / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    environment = {
        "PATH": "",
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
    }
    return finish(start(code, env=environment, cwd=elsewhere, isolated=True))
