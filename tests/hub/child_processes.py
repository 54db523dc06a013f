"""Python processes that talk to the Hub of a test as other machines would."""

import json
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


def start(code: str, *arguments: object, env: dict[str, str], cwd: Path) -> subprocess.Popen:
    """A Python process that runs `code`."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=cwd, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen) -> Any:
    """Wait for a process; what its last line says, in JSON."""
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])
