"""Start Python processes that stand for other machines."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 180
# This line goes in front of code that has to run where the package is not installed.
WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "engram_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def start(code: str, *arguments: object, env: dict[str, str], cwd: Path, isolated: bool = False) -> subprocess.Popen:
    """Start a Python process that runs `code`; `isolated` keeps it from its folder and its user's packages."""
    command = [sys.executable, *["-I"] * isolated, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=cwd, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def forks_of_a_server(*modules: str) -> multiprocessing.context.BaseContext:
    """Return a context whose processes fork from a single-threaded server that has imported the package.

    They start within milliseconds. A process has one such server, so all tests share it; it has imported `modules`
    too, unless it was running already.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engram_hf.convert_scripts.convert_deepseek_v41", *modules])
    return context


def finish(process: subprocess.Popen) -> Any:
    """Wait for a process and return its last line of output, parsed as JSON."""
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def run_elsewhere(code: str, home: Path) -> Any:
    """Run code in a process with its own folder, module cache and environment, without network; return its last line,
    parsed as JSON.
    """
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
