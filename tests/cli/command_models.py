"""A small model for the command, the text that it reads, and its logits."""

import torch
from tiny_backbones import BACKBONES
from tiny_tokenizer import make_tokenizer

from engram_hf import EngramConfig, EngramForCausalLM

TEXT = "the café THE cafe w7"


def make_config(**sizes) -> EngramConfig:
    sizes = {"engram_n_heads": 2, "engram_head_dim": 32, "engram_vocab_size": 499, **sizes}
    return EngramConfig.for_backbone(BACKBONES["mixtral"](), make_tokenizer(), layer_ids=[1, 2], **sizes)


def logits(model: EngramForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_tokenizer()(TEXT, return_tensors="pt")).logits
