"""Tiny configs of backbones that read images, Engram models on them, and prompts: every image is four positions."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from tiny_backbones import LAYER_IDS, VOCAB, randomize
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from engram_hf import EngramConfig, EngramForConditionalGeneration

IMAGE, VIDEO, START, END = 120, 121, 122, 123
IMAGE_LENGTH = 4
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def _rope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


KINDS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma3": lambda: Gemma3Config(
        text_config={
            **_TEXT,
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        vision_config={**_TOWER, "image_size": 28, "patch_size": 7},
        mm_tokens_per_image=IMAGE_LENGTH,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    ),
    "llava": lambda: LlavaConfig(
        text_config=LlamaConfig(**_TEXT),
        vision_config=CLIPVisionConfig(**_TOWER, image_size=28, patch_size=14, projection_dim=32),
        image_token_index=IMAGE,
        image_seq_length=IMAGE_LENGTH,
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config={**_TEXT, **_rope(1, 1, 2)},
        vision_config={**_QWEN_TOWER, "window_size": 16, "fullatt_block_indexes": [1]},
        **_QWEN_IDS,
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config={**_TEXT, **_rope(2, 1, 1)},
        vision_config={**_QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **_QWEN_IDS,
    ),
    "smolvlm": lambda: SmolVLMConfig(
        text_config=LlamaConfig(**_TEXT),
        vision_config={**_TOWER, "image_size": 16, "patch_size": 4},
        image_token_id=IMAGE,
        pad_token_id=0,
        scale_factor=2,
    ),
    "mistral3": lambda: Mistral3Config(
        text_config=MistralConfig(**_TEXT),
        vision_config=PixtralVisionConfig(**_TOWER, image_size=16, patch_size=4, head_dim=16),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    ),
}


def memory_config(kind: str, variant: str = "paper", **fields) -> EngramConfig:
    """Return the config of a small memory on the backbone `kind`: two layers, a few hundred rows."""
    size = {"engram_n_heads": 2, "engram_head_dim": 8, "engram_vocab_size": 97, **fields}
    return EngramConfig.for_backbone(KINDS[kind](), layer_ids=LAYER_IDS, variant=variant, **size)


def build_vl(kind: str, variant: str = "paper", **fields) -> EngramForConditionalGeneration:
    """Build a float32 Engram model in eval mode whose memory changes its logits."""
    torch.manual_seed(0)
    return randomize(EngramForConditionalGeneration(memory_config(kind, variant, **fields))).eval()


@functools.cache
def built_vl(kind: str, variant: str = "paper") -> EngramForConditionalGeneration:
    """Return the model of `build_vl`, cached for the run: for tests that do not change it."""
    return build_vl(kind, variant)


def bare_vl(kind: str) -> torch.nn.Module:
    """Return the backbone itself, with random weights that matter."""
    torch.manual_seed(0)
    return randomize(AutoModelForImageTextToText.from_config(KINDS[kind]())).eval()


def pixels(kind: str, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the output of the image processor of `kind` for `count` images."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if kind.startswith("qwen"):
        return {"pixel_values": draw(count * 16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}
    if kind == "mistral3":
        return {"pixel_values": draw(count, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * count)}
    return {"pixel_values": draw(count, 1, 3, 16, 16) if kind == "smolvlm" else draw(count, 3, 28, 28)}


def token_types(kind: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the token types of `ids` that the processor of `kind` gives."""
    names = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids", "qwen3_vl": "mm_token_type_ids"}
    return {names[kind]: (ids == IMAGE).long()} if kind in names else {}


def prompt(kind: str, rows: int = 2, seed: int = 0, before: int = 4, after: int = 6) -> dict[str, torch.Tensor]:
    """Return a batch in which every row is text, an image between its start and end tokens, and text."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(3, 100, (rows, before + after), generator=generator)
    texts[:, before - 1], texts[:, before] = START, END
    ids = torch.cat([texts[:, :before], torch.full((rows, IMAGE_LENGTH), IMAGE), texts[:, before:]], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **pixels(kind, rows, seed),
        **token_types(kind, ids),
    }
