"""Tiny configs of every backbone in the tests, and Engram models on them whose memory changes the logits."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV4Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.generation.continuous_batching import PagedAttentionCache

from engram_hf import EngramConfig, EngramForCausalLM, EngramTokenizer

VOCAB = 128
LAYER_IDS = [1, 2]

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


# Before 5.20, transformers stores keys and values of continuous batching differently.
needs_continuous_batching = pytest.mark.skipif(
    "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters,
    reason="continuous batching of models with memory needs transformers 5.20 or later",
)


def _moe(**fields):
    return {**_COMMON, "moe_intermediate_size": 24, "num_experts_per_tok": 2, **fields}


BACKBONES = {
    "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_moe(num_experts=4, head_dim=8)),
    "olmoe": lambda: OlmoeConfig(**_COMMON, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: GptOssConfig(
        **_COMMON, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **_moe(**_MLA, n_routed_experts=4, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1)
    ),
    "deepseek_v4": lambda: DeepseekV4Config(
        **_moe(
            num_key_value_heads=1,
            n_routed_experts=4,
            n_shared_experts=1,
            head_dim=16,
            qk_rope_head_dim=8,
            q_lora_rank=16,
            o_lora_rank=8,
            o_groups=2,
            index_n_heads=2,
            index_head_dim=16,
            index_topk=64,
            sliding_window=16,
            layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            mlp_layer_types=["hash_moe", "moe", "moe"],
            compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        )
    ),
    "glm4_moe": lambda: Glm4MoeConfig(
        **_moe(n_routed_experts=4, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, head_dim=8)
    ),
    "granitemoe": lambda: GraniteMoeConfig(
        **_COMMON, num_local_experts=4, num_experts_per_tok=2, logits_scaling=2.0, residual_multiplier=0.5
    ),
    "llama": lambda: LlamaConfig(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=8),
}
MOE_WITH_AUX_LOSS = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "deepseek_v4"]


def engram_config(name: str, variant: str = "paper", **fields) -> EngramConfig:
    """Return the config of a small memory on the backbone `name`: two layers, a few hundred rows."""
    size = {"engram_n_heads": 2, "engram_head_dim": 8, "engram_vocab_size": 97, **fields}
    return EngramConfig.for_backbone(BACKBONES[name](), layer_ids=LAYER_IDS, variant=variant, **size)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Randomize every parameter: with zero convolutions and unit norms, most equalities would hold trivially."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("global_scale"):
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                scale = 1.0 if ".table." in name else 0.3 if ".engram." in name else 0.15
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def build(name: str, variant: str = "paper", *, seed: int = 0, **fields) -> EngramForCausalLM:
    """Build a float32 Engram model in eval mode whose memory changes its logits."""
    torch.manual_seed(seed)
    return randomize(EngramForCausalLM(engram_config(name, variant, **fields)), seed).eval()


@functools.cache
def built(name: str, variant: str = "paper") -> EngramForCausalLM:
    """Return the model of `build`, cached for the run: for tests that do not change it."""
    return build(name, variant)


def bare(name: str) -> torch.nn.Module:
    """Return the backbone's own causal language model, with weights like those of `build`."""
    torch.manual_seed(0)
    return randomize(AutoModelForCausalLM.from_config(BACKBONES[name]())).eval()


@contextlib.contextmanager
def as_able_as(call_bare: Callable[[], object]) -> Iterator[None]:
    """Expect the model to refuse what the backbone itself cannot do in some release of transformers."""
    try:
        call_bare()
    except Exception as error:
        with pytest.raises(type(error)):
            yield
    else:
        yield


def random_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Return token ids without the special ones (pad, BOS, EOS)."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer() -> EngramTokenizer:
    """Return a tokenizer with 120 ids of `VOCAB`, of which 58 words occur twice: `word7` and `Word7` share a
    compressed id.
    """
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>"] + [f"{word}{i}" for i in range(58) for word in ("word", "Word")]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )
    return EngramTokenizer.from_tokenizer(wrapped)
