"""The memory of DeepSeek-V4.1-Flash, part by part, computed from the conversion's table of tensors without running it.

    python benchmarks/deepseek_v41_memory.py

`released` means FP8 and FP4 with scales; `bfloat16` means the same tensors dequantized (float32 tensors of the release
stay float32). With `engram_residency="mapped"` the tables only need memory for recently read rows.
"""

import argparse
import math

from engram_hf.configuration_deepseek_v41 import DeepseekV41TextConfig
from engram_hf.configuration_engram import EngramConfig
from engram_hf.convert_scripts.deepseek_v41 import DEEPSEEK_V41
from engram_hf.convert_scripts.deepseek_v41_config import to_upstream_config
from engram_hf.convert_scripts.tensor_rules import TensorMapping, map_tensors
from engram_hf.plain_config_engram import VARIANTS

ITEM_BYTES = {"BF16": 2, "F32": 4}
PARTS = ("tables", "routed experts", "rest of the text model", "tower and aligner", "drafts")


def release_config() -> dict:
    """Return the release's config.json; fields that are not named here have the defaults of our config classes."""
    text = DeepseekV41TextConfig(
        vision_config={},
        image_token_id=129264,
        num_nextn_predict_layers=3,
        dspark_block_size=5,
        dspark_noise_token_id=128799,
        dspark_target_layer_ids=[37, 38, 39],
        dspark_markov_rank=256,
        dspark_n_routed_experts=128,
        dspark_num_experts_per_tok=3,
    )
    ours = EngramConfig(
        text_config=text, **{**VARIANTS["v4.1"], "engram_layer_ids": [1, 14], "engram_compressed_vocab_size": 99_092}
    )
    return to_upstream_config(ours.to_dict())


def part_of(mapping: TensorMapping) -> str:
    """Return the row of the table that counts a tensor."""
    if mapping.rule.file == "table":
        return "tables"
    if mapping.rule.where in ("drafts", "vision"):
        return "drafts" if mapping.rule.where == "drafts" else "tower and aligner"
    return "routed experts" if mapping.rule.is_stacked else "rest of the text model"


def parameters(mapping: TensorMapping) -> int:
    """Return the number of elements of one of our tensors."""
    return math.prod(mapping.shape)


def released_bytes(mapping: TensorMapping) -> int:
    """Return the bytes of the release's tensors that it is made from, with scales."""
    return sum(math.prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, 1) for tensor in mapping.upstream)


def bfloat16_bytes(mapping: TensorMapping) -> int:
    """Return its bytes when dequantized."""
    return parameters(mapping) * (4 if mapping.rule.storage.dtype == "F32" else 2)


def lines() -> list[str]:
    """Return the table in Markdown."""
    mappings = map_tensors(DEEPSEEK_V41, release_config())
    rows = [(part, [mapping for mapping in mappings if part_of(mapping) == part]) for part in PARTS]
    rows.append(("all", mappings))
    table = ["| part | parameters | released | bfloat16 |", "| --- | --- | --- | --- |"]
    for part, found in rows:
        count = sum(map(parameters, found)) / 1e9
        released, plain = (sum(map(size, found)) / 1e9 for size in (released_bytes, bfloat16_bytes))
        table.append(f"| {part} | {count:.1f}B | {released:.1f} GB | {plain:.1f} GB |")
    return table


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("\n".join(lines()))


if __name__ == "__main__":
    main()
