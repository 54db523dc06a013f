"""A pytest plugin that writes the outcome of every test to a JSON file."""

import json
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, help="the file to write")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # It does not run in the processes of xdist, whose reports arrive here.
        config.pluginmanager.register(Outcomes(config.getoption("outcomes")))


class Outcomes:
    """Records the worst outcome of each test: of its setup, call, teardown and subtests."""

    def __init__(self, path: Path):
        self.path = path
        self.tests: dict[str, dict] = {}

    def pytest_runtest_logreport(self, report):
        order = ("passed", "skipped", "failed")
        known = self.tests.setdefault(report.nodeid, {"outcome": "passed", "message": ""})
        if order.index(report.outcome) > order.index(known["outcome"]):
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash is not None else str(report.longrepr or "")
            self.tests[report.nodeid] = {"outcome": report.outcome, "message": message[:2000]}

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.tests, indent=1))
