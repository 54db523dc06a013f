"""Tiny models of other projects with tables, built and saved by transformers itself."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

QWEN = "model.layers.1.ple.ple_embedding.ngram_embedding"
GEMMA = "model.embed_tokens_per_layer"
IDS = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))


def qwen4_exp(**changes) -> PreTrainedModel:
    """Return a config with two tables of 16 hashed heads, saved as four shards each."""
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    config = Qwen4ExpTextConfig(
        **{
            **{"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2},
            **{"num_key_value_heads": 1, "head_dim": 32, "linear_num_key_heads": 1, "linear_num_value_heads": 2},
            **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "moe_intermediate_size": 16},
            **{"shared_expert_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "hc_lowrank": 8},
            **{"ple_layer_ids": [2, 3], "ple_embed_dim": 64, "ngram_vocab_size_base": 50, "eos_token_id": 2},
            **{"split_ngram_parts": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32},
            **{"indexer_budget": 64, "indexer_compress_ratio": 4, "pad_token_id": 0, "bos_token_id": 1},
            **changes,
        }
    )
    return awake(config)


def gemma3n(**changes) -> PreTrainedModel:
    """Return the config of the text model alone."""
    from transformers import Gemma3nTextConfig

    return awake(Gemma3nTextConfig(**{**_gemma(), "altup_num_inputs": 2, "laurel_rank": 4, **changes}))


def gemma4(**changes) -> PreTrainedModel:
    """Return the config of the text model alone."""
    from transformers import Gemma4TextConfig

    return awake(Gemma4TextConfig(**{**_gemma(), **changes}))


def _gemma() -> dict:
    return {
        **{"vocab_size": 200, "vocab_size_per_layer_input": 200, "hidden_size": 32, "hidden_size_per_layer_input": 8},
        **{"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"head_dim": 16, "num_kv_shared_layers": 1, "sliding_window": 8, "activation_sparsity_pattern": [0.0] * 3},
        **{"layer_types": ["sliding_attention", "full_attention", "full_attention"], "global_head_dim": 16},
    }


def awake(config) -> PreTrainedModel:
    """Return a model of `config` in bfloat16 whose output depends on all of its parameters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, **options) -> Path:
    """Save a model as transformers does; return the folder."""
    model.save_pretrained(folder, **options)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        # Older versions save the single scale of a table as that of its first shard, and do not find it again.
        whole = {name.replace("shard_0.weight_scale", "weight_scale"): tensor for name, tensor in tensors.items()}
        if whole.keys() != tensors.keys():
            save_file(whole, path, {"format": "pt"})
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Return the logits of a model on `IDS`."""
    return model(IDS).logits


def qwen4_exp_float8() -> PreTrainedModel:
    """Store the tables in float8 with one scale each, as in the release; everything else is bfloat16."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_embedding

    model = qwen4_exp()
    patterns = ["ple.ple_embedding.ngram_embedding"]
    trained = {name: module.weight.detach() for name, module in model.named_modules() if name.endswith(patterns[0])}
    replace_with_fp8_embedding(model, patterns)
    for number, (name, weight) in enumerate(trained.items(), 1):
        table = model.get_submodule(name)
        table.weight = torch.nn.Parameter((weight * 64).to(torch.float8_e4m3fn), requires_grad=False)
        table.weight_scale = torch.nn.Parameter(torch.tensor([number / 48], dtype=torch.float32), requires_grad=False)
    model.config.quantization_config = FineGrainedFP8Config(modules_to_convert=patterns)
    return model


def gemma4_quantized(bits: int = 4) -> PreTrainedModel:
    """Store rows of `bits` bits with a float32 scale each, as Google does."""
    from transformers import GemmaQuantizationConfig
    from transformers.integrations.gemma_quant import replace_with_quant_layers

    model, kept = gemma4(tie_word_embeddings=False), ["lm_head", "model.embed_tokens$"]
    config = GemmaQuantizationConfig(8, True, {"embed_tokens_per_layer": {"num_bits": bits}}, kept)
    replace_with_quant_layers(model, config, kept)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                parameter.copy_(torch.randint(0, 256, parameter.shape, generator=generator).to(parameter.dtype))
            elif "scale" in name and parameter.ndim == 2:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.02)
    model.config.quantization_config = config
    return model
