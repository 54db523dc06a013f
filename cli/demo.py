"""`engram demo`: the small trained model that comes with the package."""

import argparse
import contextlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

from .output import print_json

THINGS_TO_TRY = """\
{folder}: written. Three things to try:

  continue a text, with transformers alone
    python -c "from transformers import pipeline; print(pipeline('text-generation', '{folder}', trust_remote_code=True)('Return True if')[0]['generated_text'])"
  see which tokens open the gates, and what the model predicts without its memory (writes show.html and show.png)
    engram show {folder} "Raise a ValueError if the keyword arguments are not unique."
  store its tables in two bits a number instead of sixteen
    engram quantize {folder} {folder}-int2 --dtype int2"""


def add_commands(commands: Any) -> None:
    """Add the commands of this module to an argparse subparsers object."""
    demo = commands.add_parser(
        "demo",
        help="a small trained model to try things on",
        description="Copy the small trained model that comes with the package to a folder, and print what to try.",
    )
    demo.add_argument(
        "folder", nargs="?", type=Path, default=Path("engram-demo"), help="new folder (default: %(default)s)"
    )
    demo.add_argument("--json", action="store_true", help="print one JSON document")
    demo.set_defaults(run=run_demo, runs_no_model=True)


def run_demo(options: argparse.Namespace) -> None:
    """Copy the model to `options.folder`, completely or not at all.

    Raises:
        ValueError: the folder is there already, another process is copying to it, or the package came without the
            model.
    """
    from engram_hf.claiming_engram import FolderClaim

    source, target = find_demo(), options.folder
    if target.exists():
        raise ValueError(f"{target} is there already; name a new folder, or use it: it may be the demo model.")
    with FolderClaim(incomplete_folder(target)) as claim:
        copied = claim.folder / "model"
        shutil.rmtree(copied, ignore_errors=True)  # A killed process left it.
        try:
            copied.mkdir()
            for path in sorted(path for path in source.iterdir() if path.is_file()):
                # Only contents are copied: in the repository, code files are links to the package's files, and table
                # files are read-only.
                shutil.copyfile(path, copied / path.name)
            copied.rename(target)
        finally:
            shutil.rmtree(copied, ignore_errors=True)
    with contextlib.suppress(OSError):
        claim.folder.rmdir()  # The claim only removes a folder that it made.
    if options.json:
        print_json({"folder": str(target)})
    else:
        print(THINGS_TO_TRY.format(folder=target))


def incomplete_folder(target: Path) -> Path:
    """Return the hidden folder beside `target` in which it is made; one process uses it at a time."""
    return target.with_name(f".{target.name}-incomplete")


def find_demo() -> Path:
    """Return the folder of the model in the package, which is not imported for that: the import would take seconds."""
    found = importlib.util.find_spec("engram_hf")
    folder = Path(str(found.origin if found else "")).parent / "examples" / "engram-demo"
    if not (folder / "config.json").exists():
        raise ValueError(
            f"This installation came without the demo model ({folder} is missing); install engram-hf again."
        )
    return folder
