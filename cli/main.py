"""Entry point of the command `engram`: its parser, and the handling of errors."""

import argparse
import os
import sys
from collections.abc import Sequence

from . import checkpoints, demo, facts, inspection, lookup, pictures, quantization, serving, tables, vocabulary
from .light import postpone_package
from .output import printable

EPILOG = """\
examples:
  engram demo                                     a small trained model to try the other commands on
  engram inspect ./model                          what memory a model has, and where it would live
  engram lookup ./model "the capital of France"   which rows a text reads
  engram show ./model "the capital of France"     a page: which tokens open the gates, and what memory changes
  engram quantize ./model ./smaller --dtype int4  store its tables in four bits a number
  engram check ./model                            verify table files against the format
  engram facts write ./model facts.jsonl --output ./facts   teach it facts, in an adapter of kilobytes
  engram serve ./model                            an OpenAI-compatible server for it

completion in a shell: pip install 'engram-hf[completion]', then  eval "$(register-python-argcomplete engram)"
exit status: 0 done, 1 bad input (one sentence on the error stream), 2 wrong usage.
"""


class _PrintVersion(argparse.Action):
    """An argparse action that reads the version when it is used, not when a parser is built; `const` is `owns_process`.

    It reads the sources: the metadata of an editable installation may be older.
    """

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        if self.const:
            postpone_package()
        from engram_hf.safetensors_engram import VERSION

        print(f"engram-hf {VERSION}")
        parser.exit()


def build_parser(*, owns_process: bool = False) -> argparse.ArgumentParser:
    """Return the parser of all commands and their arguments."""
    parser = argparse.ArgumentParser(
        prog="engram",
        description="Look at, check and convert language models with Engram memory.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action=_PrintVersion, nargs=0, const=owns_process, help="show the installed version and exit"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (demo, inspection, lookup, pictures, tables, quantization, vocabulary, checkpoints, facts, serving):
        group.add_commands(commands)
    return parser


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, as set up by `register-python-argcomplete engram`."""
    try:
        import argcomplete
    except ImportError:  # The extra `completion` is not installed.
        return
    argcomplete.autocomplete(parser)


def run_process() -> int:
    """Run the command of this process, which runs nothing else, and return the exit status."""
    return main(owns_process=True)


def main(arguments: Sequence[str] | None = None, *, owns_process: bool = False) -> int:
    """Run one command, and return the exit status.

    Args:
        arguments: those of the command line; None for those of this process.
        owns_process: nothing else runs in this process, so a command that runs no model may leave `engram_hf` half imported.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        for argument in arguments:
            if not argument.isascii() and argument != argument.encode(errors="replace").decode():
                raise ValueError(f"{argument!r} is not valid UTF-8; give names and texts in that encoding.")
        if checkpoints.is_for_script(arguments):
            if owns_process:
                postpone_package()
            return checkpoints.run_script(*arguments)
        if owns_process and checkpoints.is_completing():
            postpone_package()
        parser = build_parser(owns_process=owns_process)
        _complete(parser)
        options, others = parser.parse_known_args(arguments)
        if others and not getattr(options, "takes_others", False):
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        options.others = others
        if owns_process and getattr(options, "runs_no_model", False):
            postpone_package()
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has closed the pipe; closing the stream at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"engram: {printable(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("engram: interrupted", file=sys.stderr)
        return 130
    return 0
