"""Put the memory of the public Engram demo onto a backbone, as a model of the `paper` variant.

    python -m engram_hf.convert_scripts.convert_engram_demo demo.safetensors deepseek-ai/DeepSeek-V3 ./model

The state dict is a safetensors file with the names of the demo's modules (github.com/deepseek-ai/Engram, `engram_demo_v1.py`),
`layers.L.engram.*` under any prefix. Its hash is not in the file: bucket counts and pad id must be those it was trained with,
and the row count of every table is checked against the primes that follow.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..claiming_engram import FolderClaim, FolderInUseError, is_hidden_file
from ..safetensors_engram import TensorSpan
from .command_line import run_command
from .safetensors_files import ConversionError, enumerate_names, read_shard

NAME = re.compile(r"(?:^|.*\.)layers\.(\d+)\.engram\.(.+)$")


@dataclass(frozen=True)
class DemoRule:
    """A tensor of this package: the demo's tensors, with `{g}` for the residual stream, and how they are joined."""

    ours: str
    parts: tuple[str, ...]
    join: str = "only"  # The others are "rows", one part below the other, and "streams", along a new first dimension.


# The demo normalizes keys with `norm1` and queries with `norm2`. Our projection holds the keys of all streams, then the value.
RULES = (
    DemoRule("table.weight", ("multi_head_embedding.embedding.weight",)),
    DemoRule("kv_proj.weight", ("key_projs.{g}.weight", "value_proj.weight"), "rows"),
    DemoRule("kv_proj.bias", ("key_projs.{g}.bias", "value_proj.bias"), "rows"),
    DemoRule("k_norm.weight", ("norm1.{g}.weight",), "streams"),
    DemoRule("q_norm.weight", ("norm2.{g}.weight",), "streams"),
    DemoRule("conv.weight", ("short_conv.conv.weight",)),
    DemoRule("conv_norm.weight", ("short_conv.norms.{g}.weight",), "streams"),
)
# This tensor follows from the primes, so it is compared and not loaded.
OFFSETS = "multi_head_embedding.offsets"


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command's arguments; it imports nothing heavy, so that `--help` is quick."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("state", type=Path, help="safetensors file with the demo's state dict")
    parser.add_argument("backbone", help="folder or Hub id of a causal language model")
    parser.add_argument("target", type=Path, help="new or empty folder for the model")
    parser.add_argument(
        "--tokenizer", help="folder or Hub id of the tokenizer the hash was built on (default: BACKBONE)"
    )
    parser.add_argument(
        "--layer-ids", type=int, nargs="+", help="layers in the order the hash was laid out (default: ascending)"
    )
    parser.add_argument("--max-ngram-size", type=int, default=3, help="largest n-gram (default: the demo's 3)")
    parser.add_argument(
        "--engram-vocab-size",
        type=int,
        nargs="+",
        help="base bucket count, one or one for each order (default: five times the vocabulary)",
    )
    parser.add_argument("--pad-token-id", type=int, default=2, help="pad id of the hash (default: the demo's 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the hash (default: the demo's 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def read_state(path: Path) -> dict[int, dict[str, TensorSpan]]:
    """Return the places of the demo's tensors in the file, by layer and by name below `engram`.

    Raises:
        ConversionError: the file is not a safetensors file, or has no memory.
    """
    if path.suffix != ".safetensors":
        raise ConversionError(
            f"{path} is no .safetensors file; save the state dict with safetensors.torch.save_file first."
        )
    layers: dict[int, dict[str, TensorSpan]] = {}
    for name, span in read_shard(path).tensors.items():
        match = NAME.match(name)
        if match:
            layers.setdefault(int(match[1]), {})[match[2]] = span
    if not layers:
        raise ConversionError(
            f"{path} holds no tensor named layers.L.engram.*; is it the state dict of the Engram demo?"
        )
    return layers


def load_state(path: Path, layers: dict[int, dict[str, TensorSpan]]) -> dict[int, dict]:
    """Read the demo's tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {
            layer: {name: file.get_tensor(span.name) for name, span in state.items()}
            for layer, state in layers.items()
        }


def convert_layer(state: dict, layer: int, streams: int) -> dict:
    """Return this package's tensors of one layer's memory.

    Args:
        state: the demo's tensors, by name below `engram`.
        layer: for messages.
        streams: residual streams of the backbone, G.
    """
    import torch

    joins: dict[str, Callable] = {"only": lambda parts: parts[0], "rows": torch.cat, "streams": torch.stack}
    ours, used = {}, {OFFSETS}
    for rule in RULES:
        names = [name for part in rule.parts for name in _expand(part, streams)]
        missing = [name for name in names if name not in state]
        if missing:
            raise ConversionError(
                f"Layer {layer} of the state dict lacks {enumerate_names(missing)}; the backbone has {streams} residual "
                f"streams, and the demo's memory must have as many."
            )
        ours[rule.ours] = joins[rule.join]([state[name] for name in names])
        used.update(names)
    unknown = state.keys() - used
    if unknown:
        raise ConversionError(
            f"Layer {layer} of the state dict holds {enumerate_names(unknown)}, which the demo with {streams} residual streams "
            f"does not have; choose a backbone with the same streams."
        )
    return ours


def _expand(part: str, streams: int) -> list[str]:
    return [part.format(g=stream) for stream in range(streams)] if "{g}" in part else [part]


def load_memory(model, layers: dict[int, dict]) -> None:
    """Fill the memory of an `EngramForCausalLM` with the demo's tensors."""
    from ..hashing_engram import row_offsets

    memories, hashing = model.base_model.memories(), model.base_model.hashing
    offsets = dict(zip(memories, row_offsets(hashing.primes).flatten(1), strict=True))
    for layer, memory in memories.items():
        found = layers[layer].get(OFFSETS)
        if found is not None and found.tolist() != offsets[layer].tolist():
            raise ConversionError(
                f"Layer {layer} of the state dict has head offsets {found.tolist()[:4]}..., but the primes give "
                f"{offsets[layer].tolist()[:4]}...; give the --layer-ids, --max-ngram-size and --engram-vocab-size of the demo."
            )
        ours = convert_layer(layers[layer], layer, memory.streams)
        expected = {name: tensor.shape for name, tensor in memory.state_dict().items()}
        for name, tensor in ours.items():
            if tensor.shape != expected.get(name):
                raise ConversionError(
                    f"{name} of layer {layer} would be {list(tensor.shape)}, but the backbone asks for "
                    f"{list(expected.get(name, ()))}; choose the backbone, n-gram size and bucket counts of the demo."
                )
        memory.load_state_dict(ours)


def build_config_fields(layers: dict[int, dict[str, TensorSpan]], given: argparse.Namespace) -> dict:
    """Return the memory's config fields, from the state dict's shapes and the command line."""
    ids = given.layer_ids or sorted(layers)
    if sorted(ids) != sorted(layers):
        raise ConversionError(
            f"--layer-ids are {ids}, but the state dict holds the layers {sorted(layers)}; give these."
        )
    state = layers[ids[0]]
    try:
        width = state["multi_head_embedding.embedding.weight"].shape[1]
        heads, rest = divmod(state["value_proj.weight"].shape[1], width)
        kernel = state["short_conv.conv.weight"].shape[-1]
    except KeyError as error:
        raise ConversionError(f"Layer {ids[0]} of the state dict lacks {error}; save the whole state dict.") from error
    orders = given.max_ngram_size - 1
    if rest or orders < 1 or heads % orders:
        raise ConversionError(
            f"{heads} hash heads of width {width} do not divide among {orders} n-gram orders; give the demo's --max-ngram-size."
        )
    counts = given.engram_vocab_size
    return {
        "layer_ids": ids,
        "engram_max_ngram_size": given.max_ngram_size,
        "engram_n_heads": heads // orders,
        "engram_head_dim": width,
        "engram_conv_kernel_size": kernel,
        "engram_pad_token_id": given.pad_token_id,
        "engram_seed": given.seed,
        "engram_num_embeddings": [layers[layer]["multi_head_embedding.embedding.weight"].shape[0] for layer in ids],
    } | ({} if counts is None else {"engram_vocab_size": counts[0] if len(counts) == 1 else counts})


def convert(given: argparse.Namespace) -> None:
    """Build the model, and save it and its tokenizer, both or neither."""
    state = read_state(given.state)
    fields = build_config_fields(state, given)
    layers = fields["layer_ids"]
    try:
        with FolderClaim(given.target):
            if strangers := [path for path in given.target.iterdir() if not is_hidden_file(path.name)]:
                raise ConversionError(
                    f"{given.target} is not empty (it holds {strangers[0].name}); choose a new or an empty folder."
                )
            _write(given, state, fields)
    except FolderInUseError as error:
        raise ConversionError(str(error)) from error
    said = {"target": str(given.target), "backbone": given.backbone, "layers": layers}
    print(
        json.dumps(said, indent=2)
        if given.json
        else f"{given.target}: {given.backbone} with memory in layers {layers}"
    )


def _write(given: argparse.Namespace, state: dict[int, dict[str, TensorSpan]], fields: dict) -> None:
    """Write the model and its tokenizer into the claimed target."""
    from transformers import AutoTokenizer

    from .. import EngramForCausalLM, EngramTokenizer
    from ..claimed_saving_engram import ClaimedFolderWriter

    try:
        tokenizer = EngramTokenizer.from_tokenizer(AutoTokenizer.from_pretrained(given.tokenizer or given.backbone))
        model = EngramForCausalLM.from_backbone(given.backbone, tokenizer, variant="paper", **fields)
        load_memory(model, load_state(given.state, state))
    except (ValueError, OSError) as error:
        raise ConversionError(str(error)) from error
    with ClaimedFolderWriter(given.target) as folder:
        model.save_pretrained(folder.path)
        tokenizer.save_pretrained(folder.path)
        folder.publish(is_claimed=True)


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command, which its help calls `prog`, and return its exit code."""
    given = build_parser(prog).parse_args(arguments)
    return run_command(lambda: convert(given))


if __name__ == "__main__":
    sys.exit(main())
