"""A release is converted by its Hub id, through the real client: the result, and the downloads it takes.

One child process runs all conversions; each uses a separate repository, so that the Hub's log distinguishes them.
"""

import filecmp
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import HubServer, Request, client_environment

pytestmark = pytest.mark.any_version

INDEX = "model.safetensors.index.json"
DAMAGED = "model-00003-of-00014.safetensors"
SECONDS = 300

CONVERT = """
import contextlib, io, json, sys
from engram_hf.convert_scripts import command_line, convert_deepseek_v41

outcomes = {}
for case, arguments in json.load(open("cases.json")).items():
    output, errors = io.StringIO(), io.StringIO()
    most = command_line.FIRST_BYTES
    command_line.FIRST_BYTES = 100 if "long-headers" in case else most
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = convert_deepseek_v41.main(arguments)
    command_line.FIRST_BYTES = most
    outcomes[case] = code, output.getvalue(), errors.getvalue()
print(json.dumps(outcomes))
"""
DAMAGES = {
    "cut-off": (lambda content: content[:-1], "bytes, but its header describes"),
    "long-header": (lambda content: b"\xff" * 8 + content[8:], "announces a header of"),
    "no-header": (lambda content: content[:8] + b"[" + content[9:], "is not valid JSON"),
    "empty": (lambda content: b"", "The Hub did not give the header of"),
}
DRY_RUNS = {
    "dry": [],
    "dry-first": ["--layers", "4"],
    "dry-linked": ["--link-tables"],
    "dry-dequantized": ["--dtype", "bfloat16"],
}


def needed_shards(release: Path, layers: int = 9) -> set[str]:
    """Return the shards with a tensor that a conversion of the first `layers` of nine layers converts or passes
    through.
    """
    weight_map = json.loads((release / INDEX).read_text())["weight_map"]
    found = {key: re.match(r"layers\.(\d+)\.", key) for key in weight_map}
    return {weight_map[key] for key, match in found.items() if match is None or int(match[1]) < layers}


@dataclass
class Converted:
    """The output and results of all conversions; `release` is the release as a folder."""

    folder: Path
    release: Path
    outcomes: dict[str, tuple[int, str, str]]
    requests: list[Request]

    def lines(self, case: str) -> list[str]:
        """Return the output of a conversion that succeeded."""
        code, output, errors = self.outcomes[case]
        assert code == 0, errors
        return output.splitlines()

    def error(self, case: str) -> str:
        """Return the one line that a conversion failed with."""
        code, _, errors = self.outcomes[case]
        assert code == 1
        (line,) = (line for line in errors.splitlines() if line.startswith("engram: "))
        return line

    def shards(self, case: str, by_range: bool) -> list[str]:
        """Return the requested shards, in parts or as a whole, once for every request."""
        gets = [request for request in self.requests if request.method == "GET" and f"/org/{case}/" in request.path]
        paths = [request.path for request in gets if (request.range is not None) == by_range]
        return sorted(path.rpartition("/")[2] for path in paths if path.endswith(".safetensors"))

    def cached_shards(self, case: str) -> set[str]:
        """Return the shards in the download cache."""
        cache = self.folder / "home" / "hub" / f"models--org--{case}"
        assert (cache / "snapshots").is_dir()
        return {path.name for path in cache.rglob("*.safetensors")}

    def assert_same(self, made: str, expected: str) -> None:
        folders = self.folder / made, self.folder / expected
        made_names, names = (
            sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            for folder in folders
        )
        assert made_names == names
        assert filecmp.cmpfiles(*folders, names, shallow=False) == (names, [], [])


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory) -> Converted:
    folder = tmp_path_factory.mktemp("conversions")
    checkpoint = golden / "deepseek_v41_tiny"
    files = {path.name: path for pattern in ("*.safetensors", "*.json") for path in checkpoint.glob(pattern)}
    del files["golden.safetensors"]
    release, part = folder / "release", folder / "part"
    for path in (release, part):
        path.mkdir()
    for name, path in files.items():
        (release / name).symlink_to(path)
    first = needed_shards(release, 4)
    for name, path in files.items():
        if not name.endswith(".safetensors") or name in first:
            (part / name).symlink_to(path)

    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        stored = {name: hub.store(path.read_bytes()) for name, path in files.items()}

        def create(case: str, **changed) -> str:
            return hub.create(f"org/{case}").commit("main", "release", stored | changed)

        revision = create("whole")
        hub.repository("org/whole").commit("main", "emptied", {})
        for case in ("first", "long-headers", "verify", *DRY_RUNS):
            create(case)
        for case, (damage, _) in DAMAGES.items():
            create(case, **{DAMAGED: hub.store(damage(files[DAMAGED].read_bytes()))})
        cases = {
            "whole": ["org/whole", "from-hub", "--revision", revision],
            "whole-folder": ["release", "from-folder"],
            "first": ["org/first", "first-from-hub", "--layers", "4"],
            "first-folder": ["release", "first-from-folder", "--layers", "4"],
            "part-folder": ["part", "first-from-part", "--layers", "4"],
            "part-folder-too-small": ["part", "too-many", "--layers", "5"],
            "long-headers": ["org/long-headers", "dry", "--dry-run"],
            "verify": ["org/verify", "from-folder", "--verify-only"],
            "verify-first": ["org/verify", "first-from-folder", "--verify-only"],
            "none": ["org/none", "dry", "--dry-run"],
            **{case: [f"org/{case}", "dry", "--dry-run", *options] for case, options in DRY_RUNS.items()},
            **{f"{case}-folder": ["release", "dry", "--dry-run", *options] for case, options in DRY_RUNS.items()},
            **{case: [f"org/{case}", "damaged"] for case in DAMAGES},
        }
        (folder / "cases.json").write_text(json.dumps(cases))
        env = client_environment(hub, folder / "home")
        done = subprocess.run(
            [sys.executable, "-c", CONVERT],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        outcomes = json.loads(done.stdout.splitlines()[-1])
        return Converted(folder, release, outcomes, list(hub.requests))


def test_convert_from_a_hub_id_equals_convert_from_the_folder(converted):
    assert converted.lines("whole") and converted.lines("whole-folder")
    converted.assert_same("from-hub", "from-folder")


def test_layers_option_downloads_only_the_shards_it_needs(converted):
    needed = needed_shards(converted.release, 4)
    assert 0 < len(needed) < len(needed_shards(converted.release))
    assert converted.lines("first") and converted.lines("first-folder")
    assert converted.shards("first", by_range=False) == sorted(needed)
    assert converted.cached_shards("first") == needed
    converted.assert_same("first-from-hub", "first-from-folder")


def test_folder_needs_no_shards_of_later_layers(converted):
    assert converted.lines("part-folder")
    converted.assert_same("first-from-part", "first-from-folder")
    assert "which is not in the folder" in converted.error("part-folder-too-small")


@pytest.mark.parametrize("case", DRY_RUNS)
def test_dry_run_downloads_no_shard(converted, case):
    needed = needed_shards(converted.release, 4 if case == "dry-first" else 9)
    assert converted.shards(case, by_range=True) == sorted(needed)
    assert converted.shards(case, by_range=False) == []
    assert converted.cached_shards(case) == set()
    assert not (converted.folder / "dry").exists()


@pytest.mark.parametrize("case", DRY_RUNS)
def test_dry_run_prints_the_same_as_for_the_folder(converted, case):
    *files, total = (line.partition(" -> ")[0] for line in converted.lines(case))
    *expected, expected_total = (line.partition(" -> ")[0] for line in converted.lines(f"{case}-folder"))
    assert files == expected
    assert total.partition(",")[0] == expected_total.partition(",")[0]


def test_header_may_be_longer_than_the_first_part_that_is_read(converted):
    assert converted.lines("long-headers")[:-1] == converted.lines("dry")[:-1]
    shards = converted.shards("long-headers", by_range=True)
    assert shards == sorted(2 * list(needed_shards(converted.release)))
    assert converted.cached_shards("long-headers") == set()


def test_verify_needs_no_shards(converted):
    assert "from-folder: verified" in converted.lines("verify")[-1]
    assert "first-from-folder: verified" in converted.lines("verify-first")[-1]
    assert converted.cached_shards("verify") == set()


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_shard_is_found_before_any_download(converted, case):
    error = converted.error(case)
    assert DAMAGES[case][1] in error and DAMAGED in error
    assert converted.cached_shards(case) == set()
    assert not (converted.folder / "damaged").exists()


def test_missing_repository_is_reported(converted):
    assert "the Hub did not give a repository of that name" in converted.error("none")
