"""`engram facts`: write facts into rows of memory, save them as an adapter of a few kilobytes, list and check them."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .folders import is_model, read_utf8, require_folder, require_tokenizer
from .output import columns, print_json, printable, size

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_commands(commands: Any) -> None:
    """Add the commands of this module to an argparse subparsers object."""
    facts = commands.add_parser(
        "facts",
        help="write facts into rows of memory, list them, check them",
        description="Facts as adapters: rows of memory that make a model recall them, in a folder that PEFT loads.",
    )
    actions = facts.add_subparsers(title="actions", metavar="ACTION", required=True)
    write = actions.add_parser(
        "write",
        help="train the rows that facts are read from, and save them",
        description="Train the rows that the prompts read until the model continues each with its target. The model's own "
        "files stay as they are.",
    )
    write.add_argument("model", help="a saved model with its tokenizer, or a Hub id")
    write.add_argument("facts", help='JSON lines such as {"prompt": "The capital of France is", "target": "Paris"}')
    write.add_argument("--output", required=True, metavar="DIR", help="folder of the adapter")
    write.add_argument(
        "--protect", metavar="FILE", help="texts whose rows stay as they are: paragraphs, or JSON lines with 'text'"
    )
    write.add_argument("--steps", type=int, default=200, metavar="N", help="training steps at most (default: 200)")
    write.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="L",
        help="decoder layers (default: the first with memory, or all if that is not enough)",
    )
    write.add_argument("--orders", type=int, nargs="+", metavar="N", help="n-gram orders (default: the largest)")
    write.add_argument("--json", action="store_true", help="print one JSON document")
    write.set_defaults(run=run_write)
    show = actions.add_parser(
        "list", help="which facts an adapter holds", description="Show the facts of an adapter; no model is loaded."
    )
    show.add_argument("folder", help="folder or Hub id of the adapter")
    show.add_argument("--json", action="store_true", help="print one JSON document")
    show.set_defaults(run=run_list)
    check = actions.add_parser(
        "check",
        help="whether a model recalls the facts of an adapter",
        description="Load the adapter onto the model, and ask for every fact without and with it. It is an error if the model "
        "does not fit, or does not recall one.",
    )
    check.add_argument("model", help="a saved model, or a Hub id")
    check.add_argument("folder", help="folder or Hub id of the adapter")
    check.add_argument("--json", action="store_true", help="print one JSON document")
    check.set_defaults(run=run_check)


def run_write(options: argparse.Namespace) -> None:
    """Write `options.facts` into rows, and save them in `options.output`."""
    from engram_hf.claimed_saving_engram import ClaimedFolderWriter
    from engram_hf.claiming_engram import FolderClaim
    from engram_hf.training import write_facts

    folder, output = require_folder(options.model), Path(options.output)
    if output.is_dir() and is_model(output):
        raise ValueError(f"{output} holds a model; name another folder for the adapter.")
    facts = read_json_lines(Path(options.facts))
    protect = None if options.protect is None else read_texts(Path(options.protect))
    # A folder that cannot be written, or that another process writes to, is refused before the training.
    with FolderClaim(output), ClaimedFolderWriter(output) as writer:
        model, tokenizer = _load(folder, options.model)
        adapted, report = write_facts(
            model,
            tokenizer,
            facts,
            name="default",  # PEFT saves the adapter of this name in the folder itself.
            protect=protect,
            steps=options.steps,
            layers=options.layers,
            orders=options.orders,
        )
        adapted.save_pretrained(str(writer.path))
        writer.publish(last=CONFIG, is_claimed=True)
    if options.json:
        print_json(json.loads(report.to_json()))
        return
    print(printable_lines(str(report)))
    print(f"saved in {output}")


def run_list(options: argparse.Namespace) -> None:
    """Print the facts of the adapter in `options.folder`."""
    found = describe_adapter(require_folder(options.folder))
    if options.json:
        print_json(found)
        return
    print(columns(["fact", "prompt", "target"], [[i, f["prompt"], f["target"]] for i, f in enumerate(found["facts"])]))
    rows = ", ".join(f"{count:,} of layer {printable(layer)}" for layer, count in found["rows"].items())
    print(f"rows: {rows}; {size(found['bytes'])}; of {printable(found['model'])}")


def run_check(options: argparse.Namespace) -> None:
    """Ask the model in `options.model` for the facts of the adapter in `options.folder`."""
    from peft import PeftModel

    from engram_hf.training.fact_report import fact_lines
    from engram_hf.training.facts import results_of

    folder, adapter = require_folder(options.model), require_folder(options.folder)
    describe_adapter(adapter)
    model, _ = _load(folder, options.model, needs_tokenizer=False)
    results = results_of(PeftModel.from_pretrained(model, str(adapter)), "default")
    failed = [index for index, fact in enumerate(results) if fact.rank_after != 1]
    if options.json:
        print_json({"facts": [asdict(fact) for fact in results], "not_recalled": failed})
    else:
        print(printable_lines(fact_lines(results)))
    if failed:
        raise ValueError(f"{len(failed)} of {len(results)} facts are not recalled: {', '.join(map(str, failed))}.")
    if not options.json:
        print(f"all {len(results)} facts are recalled")


def describe_adapter(folder: Path) -> dict[str, Any]:
    """Return the facts of an adapter, its rows by layer, the bytes of its file and its base model, as JSON values.

    Raises:
        ValueError: the folder holds no adapter with facts, or a file in it is broken.
    """
    from engram_hf.safetensors_engram import read_json
    from engram_hf.saving_engram import require_settled
    from engram_hf.training.fact_texts import WrittenFact

    require_settled(folder)
    config, weights = folder / CONFIG, folder / WEIGHTS
    for path in (config, weights):
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no adapter ({path.name} is missing); name a folder that facts write made."
            )
    values = read_json(config)
    if values.get("peft_type") != "ENGRAM_ROWS" or not values.get("facts"):
        raise ValueError(f"{folder} holds an adapter, but none with facts; name a folder that facts write made.")
    memory = values.get("memory")
    parts = list(memory.values()) if isinstance(memory, dict) else [None]
    if not all(isinstance(part, dict) and type(part.get("rows")) is int for part in parts):
        raise ValueError(f"{config} is damaged: it does not say which rows there are; write the facts again.")
    return {
        "folder": str(folder),
        "model": values.get("base_model_name_or_path"),
        "bytes": weights.stat().st_size,
        "rows": {layer: part["rows"] for layer, part in memory.items()},
        "facts": [
            {"prompt": fact.fact.prompt, "target": fact.fact.target}
            for fact in map(WrittenFact.from_dict, values["facts"])
        ],
    }


def read_json_lines(path: Path) -> list[Any]:
    """Return the values of a file with one JSON value a line.

    Raises:
        ValueError: a line is not JSON, or the file is empty.
        OSError: the file cannot be read.
    """
    values = []
    for number, line in enumerate(read_utf8(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"Line {number} of {path} is no JSON ({error}); write one object a line.") from None
    if not values:
        raise ValueError(f"{path} is empty; write one JSON object a line.")
    return values


def read_texts(path: Path) -> list[Any]:
    """Return the paragraphs of a text file, or the items of a file with JSON lines."""
    if path.suffix == ".jsonl":
        return read_json_lines(path)
    texts = [text for text in read_utf8(path).split("\n\n") if text.strip()]
    if not texts:
        raise ValueError(f"{path} is empty; give texts that are to stay as they are, or leave --protect out.")
    return texts


def printable_lines(text: str) -> str:
    """Return lines that quote texts from files, without characters that move a terminal's cursor."""
    return "\n".join("".join(letter if letter.isprintable() else "?" for letter in line) for line in text.split("\n"))


def _load(folder: Path, name: str, needs_tokenizer: bool = True) -> tuple[Any, Any]:
    """Return the model in `folder`, with the `name` that an adapter records as its base model, and its tokenizer."""
    from engram_hf import EngramForCausalLM, EngramTokenizer

    if not is_model(folder):
        raise ValueError(f"{folder} holds no model; name a folder that save_pretrained wrote.")
    if needs_tokenizer:
        require_tokenizer(folder)
    tokenizer = EngramTokenizer.from_pretrained(folder) if needs_tokenizer else None
    model = EngramForCausalLM.from_pretrained(folder).eval()
    model.name_or_path = name  # For a Hub id, `folder` is in this machine's cache.
    return model, tokenizer
