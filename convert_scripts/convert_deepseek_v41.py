"""Convert a DeepSeek-V4.1 checkpoint to an Engram model that transformers loads.

    python -m engram_hf.convert_scripts.convert_deepseek_v41 deepseek-ai/DeepSeek-V4.1-Flash ./v41

The conversion is streaming (memory does not grow with the checkpoint), resumable (repeat the command after an
interruption) and verified (names, dtypes and shapes before the first byte, checksums after the last).
"""

import argparse
import sys
from pathlib import Path

from .command_line import Source, run_command
from .safetensors_files import ConversionError
from .streaming import Plan, Stopwatch, print_plan, read_manifest, run_plan, verify_files


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command's arguments; it imports nothing heavy, so that `--help` is quick."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder or Hub id of the upstream checkpoint; it is only read")
    parser.add_argument("target", type=Path, help="new or empty folder, or one where this conversion was interrupted")
    parser.add_argument("--dtype", choices=("keep", "bfloat16", "float32"), default="keep",
                        help="keep: FP8/FP4 as released (default); otherwise dequantize all but the memory tables")  # fmt: skip
    parser.add_argument("--layers", type=int, metavar="N", help="convert the first N decoder layers only")
    parser.add_argument(
        "--link-tables", action="store_true", help="link the shards of memory tables instead of copying"
    )
    parser.add_argument("--dequantize-tables", action="store_true", help="apply --dtype to the memory tables too")
    parser.add_argument("--dry-run", action="store_true", help="check the source, print what would be written, stop; of a Hub id, no shard is downloaded")  # fmt: skip
    parser.add_argument(
        "--verify-only", action="store_true", help="compare a finished TARGET with SOURCE and its checksums"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def plan_conversion(source: Source, options) -> Plan:
    """Check a checkpoint against its own config and plan its conversion (`options`: `ImportOptions`).

    Only headers of shards are read, and only those of shards with a tensor that is converted or passed through.
    """
    from ..safetensors_engram import read_json
    from .deepseek_v41 import DEEPSEEK_V41
    from .deepseek_v41_config import (
        TEMPLATE,
        additions,
        auto_map,
        check_config,
        first_layers,
        parsing_documents,
        processor_config,
        remote_code,
        require_plain,
        to_engram_fields,
    )
    from .import_plan import plan_import
    from .safetensors_files import read_checkpoint
    from .tensor_rules import check_tensors, map_tensors

    folder = source.folder
    config = read_json(folder / "config.json", constants=True)
    check_config(config)
    every = mappings = map_tensors(DEEPSEEK_V41, config)
    if options.layers is not None:
        config = first_layers(config, options.layers)
        mappings = map_tensors(DEEPSEEK_V41, config)
    later = {
        tensor.name
        for mapping in every
        for tensor in mapping.upstream
        if not DEEPSEEK_V41.may_pass_through(tensor.name)
    }
    later -= {tensor.name for mapping in mappings for tensor in mapping.upstream}
    checkpoint = read_checkpoint(folder, lambda name: name not in later, source.read_shard)
    check_tensors(DEEPSEEK_V41, every, checkpoint.tensors, checkpoint.elsewhere)
    fields = to_engram_fields(config, options.dtype, options.dequantize_tables)
    reads_images = fields["text_config"]["vision_config"] is not None
    documents = {"chat_template.jinja": TEMPLATE.read_bytes(), **parsing_documents(folder)}
    if options.dtype != "keep":
        # Weights that stay quantized are read by `direct_loading`, which is no part of the remote code.
        fields["auto_map"] = auto_map(reads_images)
        documents |= remote_code()
    ours = require_plain(fields)
    if reads_images:
        documents |= processor_config(ours)
    ours_alone = additions(fields, ours, folder, documents)
    return plan_import(DEEPSEEK_V41, checkpoint, config, mappings, options, ours_alone)


def convert(source: str, target: Path, options, revision: str | None = None, as_json: bool = False) -> None:
    """Convert `source`, a folder or Hub id, into `target`."""
    watch = Stopwatch()
    checkpoint = Source.open(source, revision)
    plan = plan_conversion(checkpoint, options)
    checkpoint.fetch_read_shards()
    written = run_plan(plan, target)
    print(watch.report(target, "wrote", written, as_json))


def verify(source: str, target: Path, revision: str | None = None, as_json: bool = False) -> None:
    """Check that `target` is a complete, undamaged conversion of `source`."""
    from .import_plan import ImportOptions

    watch = Stopwatch()
    manifest = read_manifest(target)
    plan = plan_conversion(Source.open(source, revision), ImportOptions.from_record(manifest.get("options")))
    if plan.fingerprint != manifest["fingerprint"]:
        raise ConversionError(
            f"{target} is a conversion of another checkpoint than {source}, or of another version of it; give the one that was converted."
        )
    print(watch.report(target, "verified", verify_files(target, manifest), as_json))


def dry_run(source: str, target: Path, options, revision: str | None = None, as_json: bool = False) -> None:
    """Print the files a conversion would write and the disk it needs."""
    print_plan(plan_conversion(Source.open(source, revision), options), target, as_json)


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command, which its help calls `prog`, and return its exit code."""
    given = build_parser(prog).parse_args(arguments)

    def command() -> None:
        from .import_plan import ImportOptions

        if given.verify_only:
            return verify(given.source, given.target, given.revision, given.json)
        options = ImportOptions(given.dtype, given.link_tables, given.dequantize_tables, given.layers)
        action = dry_run if given.dry_run else convert
        return action(given.source, given.target, options, given.revision, given.json)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
