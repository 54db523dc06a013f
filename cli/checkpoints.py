"""`engram convert` and `engram export`: conversion from and to other checkpoint layouts, by the scripts in
`convert_scripts`.
"""

import importlib
import os
from collections.abc import Sequence
from typing import Any

# Each command and layout has a script and a sentence for the help.
SCRIPTS = {
    ("convert", "deepseek-v4.1"): ("convert_deepseek_v41", "a DeepSeek-V4.1 checkpoint to a model of this package"),
    ("convert", "demo"): ("convert_engram_demo", "memory of the public Engram demo, put onto a backbone"),
    ("export", "deepseek-v4.1"): ("export_deepseek_v41", "a model with the V4.1 backbone in the release's own layout"),
}
_SUMMARY = {
    "convert": "make a model from a checkpoint in another layout",
    "export": "write a model in another layout",
}


def add_commands(commands: Any) -> None:
    """Add the commands of this module to an argparse subparsers object."""
    for command, summary in _SUMMARY.items():
        parser = commands.add_parser(
            command,
            help=summary,
            description=f"{summary.capitalize()}. `engram {command} LAYOUT --help` shows the arguments of each.",
        )
        layouts = parser.add_subparsers(title="layouts", metavar="LAYOUT", required=True)
        for (of, layout), (module, what) in SCRIPTS.items():
            if of == command:
                parents = [_import(module).build_parser()] if is_completing() else []
                layouts.add_parser(layout, help=what, add_help=False, parents=parents)


def is_completing() -> bool:
    """Return whether a shell asks for completions; then the parser needs all options, of the scripts too."""
    return "COMP_LINE" in os.environ  # Shells pass the line to a program that completes it.


def is_for_script(arguments: Sequence[str]) -> bool:
    """Return whether a script parses the rest of the command line."""
    return tuple(arguments[:2]) in SCRIPTS


def run_script(command: str, layout: str, *arguments: str) -> int:
    """Run the script of a layout with its own arguments, and return its exit status."""
    module, _ = SCRIPTS[command, layout]
    return _import(module).main(list(arguments), prog=f"engram {command} {layout}")


def _import(module: str) -> Any:
    return importlib.import_module(f"engram_hf.convert_scripts.{module}")
