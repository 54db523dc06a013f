"""Download the test files of the installed transformers from its source distribution."""

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

# `transformers.testing_utils` looks for a folder whose name ends in "tests" above the calling file.
PACKAGE = "transformers_tests"


def unpack_tests(cache: Path, stand_ins: Path) -> tuple[str, Path]:
    """Return the version of transformers, and a folder with its tests as the package `transformers_tests`.

    Args:
        cache: where the tests of each version are kept.
        stand_ins: files that replace those that the tests import but the distribution lacks.
    """
    version = importlib.metadata.version("transformers")
    folder = cache / version
    package = folder / PACKAGE
    if not package.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            archive = _download(version, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            _unpack(archive, unpacked)
            folder.mkdir(exist_ok=True)
            unpacked.rename(package)
    _fill_in(package, stand_ins)
    return version, folder


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", "--dest", str(folder), f"transformers=={version}"]
    subprocess.run(command, check=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def _unpack(archive: Path, target: Path) -> None:
    """Write the files of `tests/` in the archive to `target`."""
    target.mkdir()
    with tarfile.open(archive) as members:
        for member in members:
            parts = PurePosixPath(member.name).parts
            if len(parts) == 3 and parts[1] == "tests" and member.isfile():
                content = members.extractfile(member)
                assert content is not None
                (target / parts[2]).write_bytes(content.read())
    if not (target / "test_modeling_common.py").is_file():
        raise SystemExit(f"{archive.name} has no tests/test_modeling_common.py; this script needs a new source.")


def _fill_in(package: Path, stand_ins: Path) -> None:
    """Copy the replacement files into the package."""
    (package / "__init__.py").touch()
    for path in sorted(stand_ins.rglob("*")):
        target = package / path.relative_to(stand_ins)
        if path.is_file() and "__pycache__" not in path.parts:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
