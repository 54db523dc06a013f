"""Export an Engram model with the DeepSeek-V4.1 backbone in the release's own layout, as serving engines load it.

    python -m engram_hf.convert_scripts.export_deepseek_v41 ./v41 ./upstream

An unmodified conversion is exported byte for byte. Float tensors (of a dequantized or fine-tuned model) are quantized by
the release's rules. A model saved after training lacks the record of the release; `--record` names the converted folder
that it was trained from, for the vision tower, the draft layers and the shards.
"""

import argparse
import sys
from pathlib import Path

from .command_line import local_folder, run_command
from .safetensors_files import ConversionError
from .streaming import Plan, Stopwatch, print_plan, read_manifest, run_plan, verify_files


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command's arguments; it imports nothing heavy, so that `--help` is quick."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder or Hub id of the Engram model; it is only read")
    parser.add_argument("target", type=Path, help="new or empty folder, or one where this export was interrupted")
    parser.add_argument(
        "--record", help="converted folder or Hub id whose record of the release to follow (default: SOURCE)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check the source, print what would be written, stop")
    parser.add_argument("--verify-only", action="store_true", help="compare a finished TARGET with its checksums")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def plan(folder: Path, record: Path) -> Plan:
    """Check a model folder against its config and plan its export."""
    from ..safetensors_engram import read_json
    from .deepseek_v41 import DEEPSEEK_V41
    from .deepseek_v41_config import to_upstream_config, without_missing_parts
    from .export_plan import plan_export, read_model
    from .tensor_rules import map_tensors

    ours = read_json(folder / "config.json", constants=True)
    text = ours.get("text_config") or {}
    if ours.get("model_type") != "engram" or text.get("model_type") != "deepseek_v41_text":
        raise ConversionError(
            f"{folder} holds a {ours.get('model_type')!r} with the backbone {text.get('model_type')!r}; only an 'engram' model "
            f"with the backbone 'deepseek_v41_text' has a DeepSeek-V4.1 form."
        )
    model = read_model(folder, record)
    config = without_missing_parts(to_upstream_config(ours), model.tensors)
    return plan_export(DEEPSEEK_V41, model, record, config, map_tensors(DEEPSEEK_V41, config))


def export(source: str, target: Path, record: str | None = None, as_json: bool = False) -> None:
    """Export `source`, a folder or Hub id, into `target`; `record` may be a Hub id, too."""
    watch = Stopwatch()
    written = run_plan(_plan(source, record), target)
    print(watch.report(target, "wrote", written, as_json))


def dry_run(source: str, target: Path, record: str | None = None, as_json: bool = False) -> None:
    """Print the files an export would write and the disk it needs."""
    print_plan(_plan(source, record), target, as_json)


def _plan(source: str, record: str | None) -> Plan:
    folder = local_folder(source)
    return plan(folder, folder if record is None else local_folder(record))


def verify(target: Path, as_json: bool = False) -> None:
    """Check that `target` is a complete, undamaged export."""
    watch = Stopwatch()
    print(watch.report(target, "verified", verify_files(target, read_manifest(target)), as_json))


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command, which its help calls `prog`, and return its exit code."""
    given = build_parser(prog).parse_args(arguments)
    if given.verify_only:
        return run_command(lambda: verify(given.target, given.json))
    action = dry_run if given.dry_run else export
    return run_command(lambda: action(given.source, given.target, given.record, given.json))


if __name__ == "__main__":
    sys.exit(main())
