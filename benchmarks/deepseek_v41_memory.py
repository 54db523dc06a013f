"""What DeepSeek-V4.1-Flash takes in memory, part by part: computed from the conversion's table of tensors, nothing is run.

    python benchmarks/deepseek_v41_memory.py

`released` is FP8 and FP4 with scales, `bfloat16` what the same tensors take dequantized (what the release keeps in float32
stays so). With `engram_residency="mapped"` the tables take only the rows that were read lately.
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
    """The release's config.json; what is not named here is a default of our config classes."""
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
    """The row of the table that a tensor counts in."""
    if mapping.rule.file == "table":
        return "tables"
    if mapping.rule.where in ("drafts", "vision"):
        return "drafts" if mapping.rule.where == "drafts" else "tower and aligner"
    return "routed experts" if mapping.rule.is_stacked else "rest of the text model"


def parameters(mapping: TensorMapping) -> int:
    """Numbers of a tensor of ours."""
    return math.prod(mapping.shape)


def released_bytes(mapping: TensorMapping) -> int:
    """Bytes of the release's tensors that make it, with scales."""
    return sum(math.prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, 1) for tensor in mapping.upstream)


def bfloat16_bytes(mapping: TensorMapping) -> int:
    """Bytes of it, dequantized."""
    return parameters(mapping) * (4 if mapping.rule.storage.dtype == "F32" else 2)


def lines() -> list[str]:
    """The table, in Markdown."""
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
    """Entry point."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("\n".join(lines()))


if __name__ == "__main__":
    main()
