"""The miniature DeepSeek-V4.1 checkpoint for tests: dequantized, renamed, and with a plain version of its memory.

It is written independently of the converter, so that the two can be compared.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoImageProcessor

HAS_AUTO_IMAGE_PROCESSOR = not getattr(AutoImageProcessor, "is_dummy", False)
needs_auto_image_processor = pytest.mark.skipif(
    not HAS_AUTO_IMAGE_PROCESSOR, reason="AutoImageProcessor of this transformers needs torchvision"
)

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def golden_fixtures(name: str, answers_file: str) -> tuple:
    """Return fixtures of a golden folder: the folder, its golden tensors, and its dequantized release tensors by name."""

    @pytest.fixture(scope="session")
    def folder(golden):
        return golden / name

    @pytest.fixture(scope="session")
    def answers(folder):
        return load_file(folder / answers_file)

    @pytest.fixture(scope="session")
    def release(folder):
        return load_release(folder)

    return folder, answers, release


def copy_release(folder: Path, target: Path) -> Path:
    """Copy only the release's own files of a golden folder."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("golden*", "README.md")))


def inputs_of(answers: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    """Return the inputs of the model in a golden case with images."""
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_hws")
    return {name: answers[f"{case}.{name}"] for name in names if f"{case}.{name}" in answers}


# This maps a layer's release names to ours. Experts are stacked separately.
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.indexer.weights_proj.weight",
    "attn.indexer.wk.weight": "self_attn.indexer.k_proj.weight",
    "attn.indexer.k_norm.weight": "self_attn.indexer.k_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.bias_vl": "mlp.gate.e_score_correction_bias_vl",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
}
MODEL_NAMES = {"embed.weight": "embed_tokens.weight", "norm.weight": "norm.weight", "head.weight": "lm_head.weight"}


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dequantize an FP8 or packed FP4 weight with its E8M0 scales to float32; blocks may have any size that divides
    the shape.
    """
    if weight.dtype == torch.int8:
        codes = weight.view(torch.uint8)
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        values = E2M1[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
    else:
        values = weight.float()
    scale = scale.float()
    for axis in range(2):
        scale = scale.repeat_interleave(values.shape[axis] // scale.shape[axis], dim=axis)
    return values * scale


def load_release(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the checkpoint under its release name, dequantized to float32."""
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    raw = {}
    for file in sorted(set(files.values())):
        with safe_open(folder / file, "pt") as shard:
            raw.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return {
        name: dequantize(tensor, raw[scale])
        if (scale := name.removesuffix("weight") + "scale") in raw
        else tensor.float()
        for name, tensor in raw.items()
        if not name.endswith(".scale")
    }


def read_text_config(folder: Path) -> dict:
    """Return the config fields of the checkpoint's language model."""
    return json.loads((folder / "config.json").read_text())["text_config"]


def our_name(name: str) -> str | None:
    """Return our name of a release tensor that maps to one parameter of [`DeepseekV41TextModel`] or `lm_head`, else
    None.
    """
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return f"layers.{match[1]}.{LAYER_NAMES[match[2]]}" if match and match[2] in LAYER_NAMES else None


def text_state_dict(release: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """Return the state dict of [`DeepseekV41TextForCausalLM`] in float32."""
    state = {our_name(name): tensor for name, tensor in release.items() if our_name(name)}
    for layer in range(config.num_hidden_layers):
        experts = [f"layers.{layer}.ffn.experts.{expert}" for expert in range(config.n_routed_experts)]
        gate_up = [torch.cat([release[f"{expert}.w1.weight"], release[f"{expert}.w3.weight"]]) for expert in experts]
        down = [release[f"{expert}.w2.weight"] for expert in experts]
        state[f"layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        state[f"layers.{layer}.mlp.experts.down_proj"] = torch.stack(down)
    return {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in state.items()}


def memory(
    streams: torch.Tensor, rows: torch.Tensor, layer: int, release: dict[str, torch.Tensor], valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute one layer's V4.1 Engram (arXiv 2601.07372) for `streams` `[B, S, N, D]` and row ids `rows` `[B, S, heads]`.

    `valid` `[B, S]` is False where no memory is read (padding, images). Returns the new streams and the gate.
    """
    names = {
        name: release[f"layers.{layer}.engram.{name}"]
        for name in ("embed.weight", "wkv.weight", "q_weight", "k_weight")
    }
    count, width = streams.shape[2:]
    looked_up = functional.embedding(rows, names["embed.weight"]).flatten(2)
    keys, values = (looked_up @ names["wkv.weight"].T).split([count * width, width], dim=-1)

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-20) * weight

    query, key = norm(streams, names["q_weight"]), norm(keys.unflatten(-1, (count, width)), names["k_weight"])
    similarity = (query * key).sum(-1) * width**-0.5
    gate = (
        torch.sigmoid(similarity.abs().clamp(min=1e-6).sqrt() * torch.where(similarity < 0, -1.0, 1.0))
        * valid[..., None]
    )
    return streams + gate[..., None] * values[:, :, None], gate


class InjectedMemory:
    """Gives a backbone the memory of the miniature through hooks before its listed layers.

    Set `rows` (layer -> `[B, S, heads]`) and `valid` `[B, S]` before each call. `seen` records inputs and outputs.
    """

    def __init__(self, layers, layer_ids: list[int], release: dict[str, torch.Tensor]):
        self.release, self.rows, self.valid, self.seen = release, {}, None, {}
        for index in layer_ids:
            layers[index].register_forward_pre_hook(lambda _, args, index=index: self._inject(index, *args))

    def _inject(self, index, streams, *rest):
        streams, gate = memory(streams, self.rows[index], index, self.release, self.valid)
        self.seen[f"layers.{index}.engram.gate"], self.seen[f"layers.{index}.engram.streams"] = gate, streams
        return streams, *rest


def row_ids(ids: torch.Tensor, index: int, golden: dict[str, torch.Tensor], pad_token_id: int = 2) -> torch.Tensor:
    """Return the table rows `[B, S, heads]` of Engram layer `index` for unpadded text `[B, S]` (arXiv 2601.07372)."""
    compressed = golden["engram.token_map"][ids]
    multipliers, primes = golden["engram.multipliers"][index], golden["engram.primes"][index]
    orders = len(multipliers) - 1
    pad = golden["engram.token_map"][pad_token_id]
    heads = primes.view(orders, -1)
    mix, rows = compressed * multipliers[0], []
    for back in range(1, orders + 1):
        earlier = functional.pad(compressed, (back, 0), value=pad.item())[:, : ids.shape[1]]
        mix = mix ^ (earlier * multipliers[back])
        rows.append(mix[..., None] % heads[back - 1])
    return torch.cat(rows, dim=-1) + golden["engram.offsets"][index]
