"""`docs/seams.md` agrees with the libraries and with our files: each seam exists as we use it, and none is missing."""

import inspect
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import seam_scan

import engram_hf

ROOT = Path(engram_hf.__file__).parent
PAGE = ROOT / "docs" / "seams.md"
ROOMS = ("training", "convert_scripts", "tokenization", "other_models", "serving", "cli")
NAME = re.compile(r"`([\w.]+)(?::(\w+))?(?:\(([\w, ]*)\))?`")


class Seam(NamedTuple):
    """One name of the page."""

    row: str
    path: str  # This name is dotted; it is a module's if `member` is given.
    member: str | None  # This text occurs in the module's source.
    parameters: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def last_name(self) -> str:
        """Return the name as our files spell it."""
        return self.member or self.path.rpartition(".")[2]


def rows_of_page(columns: int) -> list[list[str]]:
    """Return the cells of all tables with this number of columns, without headings."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = ("seam", "behaviour", "---")
    return [row for row in rows if len(row) == columns and not row[0].startswith(heads)]


def read_seams() -> list[Seam]:
    """Return every name of the page."""
    seams = []
    for row, names, files, *_ in rows_of_page(6):
        for path, member, parameters in NAME.findall(names):
            wanted = tuple(parameters.replace(" ", "").split(",")) if parameters else ()
            seams.append(Seam(row, path, member or None, wanted, tuple(files.replace(" ", "").split(","))))
    return seams


SEAMS = read_seams()


def our_files() -> list[Path]:
    flat = [path for path in sorted(ROOT.glob("*.py")) if path.stem != "setup"]
    return flat + [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


@pytest.fixture(scope="module")
def used() -> dict[str, set[str]]:
    """Return, by file, the names that belong to a host and are not public."""
    defined = set().union(*(seam_scan.names_defined(seam_scan.parse(path)) for path in our_files()))
    hosts = seam_scan.private_names_of_hosts()
    return {name_of(path): seam_scan.seams_in(path, defined, hosts) for path in our_files()}


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.row}: {seam.last_name}")
def test_host_still_has_each_seam(seam):
    """The name exists and has the parameters that we pass."""
    if seam.member is not None:
        target = seam_scan.resolve(seam.path)
        assert re.search(rf"\b\w*{seam.member}\b", inspect.getsource(target)), f"{seam.path} has no {seam.member}"
        return
    found = seam_scan.resolve(seam.path)
    if seam.parameters:
        have = inspect.signature(found).parameters
        assert [name for name in seam.parameters if name not in have] == [], f"{seam.path}{inspect.signature(found)}"


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.row}: {seam.last_name}")
def test_files_of_a_row_still_use_the_seam(seam, used):
    """A name that no file of its row uses should be removed from the page."""
    for name in seam.files:
        assert (ROOT / f"{name}.py").is_file(), f"{PAGE.name} names {name}, which is no file"
    assert any(seam.last_name in _words(ROOT / f"{name}.py") for name in seam.files), f"{seam.last_name} is not used"


@pytest.mark.parametrize("path", our_files(), ids=name_of)
def test_every_seam_of_a_file_is_on_the_page(path, used):
    listed = {seam.last_name for seam in SEAMS if name_of(path) in seam.files}
    assert used[name_of(path)] - listed == set(), f"list these in {PAGE.name}, or use something public"


def test_every_row_has_a_reason_and_a_consequence():
    rows = rows_of_page(6)
    assert len(rows) > 5 and all(all(row) for row in rows)
    assert len({row[0] for row in rows}) == len(rows)


@pytest.mark.parametrize("row", rows_of_page(3), ids=lambda row: row[0])
def test_every_relied_on_behaviour_has_a_test(row):
    (test,) = re.findall(r"`(tests/[\w/]+\.py)(?:::\w+)?`", row[2])
    assert "def test_" in (ROOT / test).read_text(encoding="utf-8")


def _words(path: Path) -> set[str]:
    return set(re.findall(r"\w+", path.read_text(encoding="utf-8")))


def test_seam_scan_finds_every_kind_of_seam(tmp_path):
    """It must find private attributes, overrides, strings, and imports that a library does not export."""
    path = tmp_path / "sample.py"
    path.write_text(
        "from transformers import PreTrainedModel\n"
        "from transformers.modeling_utils import load_state_dict\n"
        "class Ours(PreTrainedModel):\n"
        "    def _init_weights(self, module):\n"
        "        self._own = getattr(module, '_hf_hook', None)\n"
        "        return module._buffers, self._own\n"
    )
    defined = seam_scan.names_defined(seam_scan.parse(path))
    found = seam_scan.seams_in(path, defined, seam_scan.private_names_of_hosts())
    assert found == {"_init_weights", "_hf_hook", "_buffers", "load_state_dict"}
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        seam_scan.resolve("transformers.PreTrainedModel._no_such_name")
