"""Run the common tests of transformers on models with memory: `python tests/upstream` (or `make test-upstream`).

The tests are those of the installed version of transformers, from its source distribution. Each of them runs on a bare
backbone and on the same backbone with memory. A test that passes on the first and fails on the second must be listed
in `excused.toml`, with the reason; an entry there whose test passes is out of date. Both end with exit code 1.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from excuses import Excuses
from report import compare, print_report
from source import unpack_tests

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / ".upstream", help="folder for what is downloaded")
    parser.add_argument("-n", "--processes", type=int, default=2)
    parser.add_argument(
        "-k", dest="selection", help="run only matching tests (pytest's -k); no entry is out of date then"
    )
    return parser.parse_args()


def run_tests(folder: Path, arguments: argparse.Namespace) -> dict[str, dict]:
    """Return the outcome and message of every test, by pytest's name of it."""
    outcomes = folder / "outcomes.json"
    outcomes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--no-header", "-p", "no:warnings"]
    command += ["--durations=20"]
    command += ["-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE), "-p", "outcomes", "--outcomes", str(outcomes)]
    command += ["-n", str(arguments.processes)] if arguments.processes > 1 else []
    command += ["-k", arguments.selection] if arguments.selection else []
    command += [str(HERE / "suite_models.py"), str(HERE / "suite_configs.py"), str(HERE / "suite_tokenizers.py")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        # The common tests that download something fail on the bare backbone too, and quickly.
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with (folder / "pytest.log").open("w") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    # Exit code 0: all passed, 1: some failed. Any other code means that tests did not run.
    if code not in (0, 1) or not outcomes.is_file():
        raise SystemExit(f"pytest ended with exit code {code}; see {folder / 'pytest.log'}")
    return json.loads(outcomes.read_text())


def main() -> int:
    arguments = parse_arguments()
    version, folder = unpack_tests(arguments.cache, HERE / "stand_ins")
    rows = compare(run_tests(folder, arguments), Excuses.read(HERE / "excused.toml", version))
    return print_report(rows, version, complete=arguments.selection is None)


if __name__ == "__main__":
    sys.exit(main())
