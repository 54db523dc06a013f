"""What DeepSeek-V4.1-Flash takes in memory, part by part: computed from the conversion's table of tensors, nothing is run.

    python benchmarks/deepseek_v41_memory.py

`released` is FP8 and FP4 with scales, `bfloat16` what the same tensors take dequantized (what the release keeps in float32
stays so). With `engram_residency="mapped"` the tables take only the rows that were read lately.
"""

import argparse
import math

from engram_hf.adding_engram import VARIANTS
from engram_hf.configuration_deepseek_v41 import DeepseekV41TextConfig
from engram_hf.configuration_engram import EngramConfig
from engram_hf.convert_scripts.deepseek_v41 import DEEPSEEK_V41
from engram_hf.convert_scripts.deepseek_v41_config import to_upstream_config
from engram_hf.convert_scripts.tensor_rules import Binding, bind

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


def part_of(binding: Binding) -> str:
    """The row of the table that a tensor counts in."""
    if binding.rule.file == "table":
        return "tables"
    if binding.rule.where in ("drafts", "vision"):
        return "drafts" if binding.rule.where == "drafts" else "tower and aligner"
    return "routed experts" if binding.rule.is_stacked else "rest of the text model"


def parameters(binding: Binding) -> int:
    """Numbers of a tensor of ours."""
    return math.prod(binding.shape)


def released_bytes(binding: Binding) -> int:
    """Bytes of the release's tensors that make it, with scales."""
    return sum(math.prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, 1) for tensor in binding.upstream)


def bfloat16_bytes(binding: Binding) -> int:
    """Bytes of it, dequantized."""
    return parameters(binding) * (4 if binding.rule.storage.dtype == "F32" else 2)


def lines() -> list[str]:
    """The table, in Markdown."""
    bindings = bind(DEEPSEEK_V41, release_config())
    rows = [(part, [binding for binding in bindings if part_of(binding) == part]) for part in PARTS]
    rows.append(("all", bindings))
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
