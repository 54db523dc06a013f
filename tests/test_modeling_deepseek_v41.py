"""The DeepSeek-V4.1 text backbone as a transformers model: cost, saving, dtypes, names, configuration, bad input."""

import subprocess
import sys

import pytest
import torch
from deepseek_v41_models import as_mask, padded, tiny_config, tiny_model, tokens, worst
from deepseek_v41_reference import load_release, our_name, read_text_config, text_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from engram_hf import modeling_deepseek_v41 as modeling
from engram_hf.causal_lm_deepseek_v41 import DeepseekV41TextForCausalLM
from engram_hf.configuration_deepseek_v41 import DeepseekV41TextConfig
from engram_hf.modeling_deepseek_v41 import DeepseekV41TextModel, largest

# --- cost ---------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return result


@torch.no_grad()
def test_no_tensor_grows_with_the_square_of_the_length(monkeypatch):
    monkeypatch.setattr(modeling, "_BLOCK_ELEMENTS", 1 << 16)
    model, sizes = tiny_model().model, {}
    for length in (512, 1024, 2048):
        with LargestTensor() as largest_tensor:
            model(tokens(model, 1, length))
        sizes[length] = largest_tensor.size
    assert sizes[2048] <= 2.1 * sizes[1024] <= 4.5 * sizes[512]
    assert sizes[2048] < 2048 * 2048 / 4


@torch.no_grad()
def test_block_length_changes_no_logit(monkeypatch):
    model = tiny_model()
    ids = tokens(model, 2, 70)
    expected = model(ids).logits
    for elements in (1, 5000):
        monkeypatch.setattr(modeling, "_BLOCK_ELEMENTS", elements)
        assert worst(model(ids).logits, expected) < 1e-5


@torch.no_grad()
def test_candidates_restrict_even_where_all_positions_fit():
    model, chosen = tiny_model(index_topk=60), []
    for index in (3, 5):
        model.model.layers[index].self_attn.register_forward_hook(lambda _, __, output: chosen.append(output[1]))
    model(tokens(model, 2, 40))
    source, later = chosen
    assert (source.selected[:, -1] >= 0).sum(-1).tolist() == [40, 40]
    assert (later.selected[:, -1] >= 0).sum(-1).max() <= 9
    inside = as_mask(source.candidates, 3, 40)
    assert not (as_mask(later.selected, 1, 40) & ~inside).any()


def test_largest_breaks_ties_by_position():
    scores = torch.tensor([[0.0, -0.0, 2.0, 0.0, -1.0, float("-inf")]])
    assert sorted(largest(scores, 3)[0].tolist()) == [0, 1, 2]
    assert sorted(largest(scores, 4)[0].tolist()) == [0, 1, 2, 3]
    random = torch.randn(5, 300)
    assert torch.equal(largest(random, 40).sort(-1).values, random.topk(40).indices.sort(-1).values)


# --- a good citizen of transformers -------------------------------------------------------------------------------


def test_auto_classes_save_and_load(tmp_path):
    model = tiny_model()
    ids = tokens(model, 1, 12)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DeepseekV41TextConfig
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (
        type(loaded) is DeepseekV41TextForCausalLM
        and type(AutoModel.from_pretrained(tmp_path)) is DeepseekV41TextModel
    )
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_deepseek_v41_of_transformers_takes_precedence():
    code = """
from transformers import AutoConfig, AutoModel, PreTrainedConfig
class Theirs(PreTrainedConfig):
    model_type = "deepseek_v41_text"
AutoConfig.register("deepseek_v41_text", Theirs)
from engram_hf.modeling_deepseek_v41 import DeepseekV41TextModel
from engram_hf.configuration_deepseek_v41 import DeepseekV41TextConfig
assert type(AutoConfig.for_model("deepseek_v41_text")) is Theirs
ours = DeepseekV41TextConfig(
    vocab_size=8, hidden_size=32, num_hidden_layers=1, head_dim=32, qk_rope_head_dim=8, n_routed_experts=8,
    moe_intermediate_size=32, q_lora_rank=8, o_lora_rank=8, index_head_dim=32,
)
assert type(AutoModel.from_config(ours)) is DeepseekV41TextModel
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_float32_parameters_stay_float32_in_bfloat16(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    float32 = {
        name.split(".", 3)[-1] for name, tensor in tensors if tensor.dtype == torch.float32 and "layers" in name
    }
    assert float32 == {
        *(f"{where}_hc.{what}" for where in ("attn", "ffn") for what in ("fn", "base", "scale")),
        "self_attn.sinks", "mlp.gate.e_score_correction_bias", "mlp.gate.e_score_correction_bias_vl",
        "self_attn.rotary_emb.main_inv_freq", "self_attn.rotary_emb.main_original_inv_freq",
        "self_attn.rotary_emb.compress_inv_freq", "self_attn.rotary_emb.compress_original_inv_freq",
    }  # fmt: skip
    assert model(tokens(model, 1, 9)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_and_generates(tmp_path, dtype):
    tiny_model(initializer_range=0.05).save_pretrained(tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ids = tokens(model, 2, 20)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert torch.isfinite(out.loss) and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # The mean is compared: at single positions another expert or compressed position is chosen.
    assert (out.logits.float() - exact(ids).logits).abs().mean() < 0.02
    assert model.generate(ids, max_new_tokens=3, pad_token_id=2).shape == (2, 23)


def test_autocast_keeps_the_mixers_and_the_router_exact():
    model, seen = tiny_model(), []
    ids = tokens(model, 1, 12)
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    model.model.layers[0].attn_hc.register_forward_hook(lambda _, __, output: seen.append(output[2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids, labels=ids).loss.isfinite()
    assert all(tensor.dtype == torch.float32 for tensor in seen)
    model(ids)
    assert worst(seen[0], seen[2]) == 0  # The first mixer reads the same streams.


def test_recorded_outputs():
    model = tiny_model()
    ids = tokens(model, 2, 10)
    out = model(ids, output_hidden_states=True, output_router_logits=True, labels=ids)
    assert len(out.hidden_states) == 7 and len(out.router_logits) == 6
    assert all(state.shape == (2, 10, 3, 48) for state in out.hidden_states[:-1])
    assert out.hidden_states[-1].shape == (2, 10, 48) and out.router_logits[0].shape == (20, 4)
    assert out.attentions is None and out.aux_loss.isfinite()


def test_unknown_keywords_reach_the_layers():
    model, seen = tiny_model(), []
    model.model.layers[2].register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["flag"]), with_kwargs=True
    )
    model(tokens(model, 1, 4), flag="here")
    assert seen == ["here"]


@pytest.mark.slow
@torch.no_grad()
def test_compiled_model_gives_the_same():
    schedule = {"kv_source_layer_ids": [1], "index_source_layer_ids": [1], "candidate_source_layer_id": None}
    model = tiny_model(num_hidden_layers=2, compress_ratios=[0, 3], **schedule)
    batch, mask = padded(tokens(model, 2, 14), [14, 9], "left")
    compiled = torch.compile(model, backend="aot_eager")
    expected = model(batch, attention_mask=mask).logits
    assert worst(compiled(batch, attention_mask=mask).logits[mask.bool()], expected[mask.bool()]) < 1e-5
    positions = torch.cat([torch.arange(8), torch.arange(6)])[None].expand(2, -1)
    packed = model(batch, position_ids=positions).logits
    assert worst(compiled(batch, position_ids=positions).logits, packed) < 1e-5


FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [32, 32],
    "scale_fmt": "ue8m0",
    "expert_dtype": "fp4",
}


def quantized_checkpoint(folder, release, target, config):
    """Write the miniature under our names, with a module for every matrix, as the release stores it."""
    state = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                scale = name.endswith(".scale")
                ours = our_name(name.replace(".scale", ".weight"))
                if ours is not None:
                    ours = ours.replace(".weight", ".weight_scale_inv") if scale else ours
                    state[ours if ours.startswith("lm_head") else f"model.{ours}"] = shard.get_tensor(name)
    # Stacked experts are decoded: on a machine without a GPU, transformers decodes only tensors called `weight`.
    decoded = text_state_dict(release, config)
    state.update({name: tensor.bfloat16() for name, tensor in decoded.items() if ".experts." in name})
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config.quantization_config, config.dtype = FP8, "bfloat16"
    config.architectures = ["DeepseekV41TextForCausalLM"]
    config.save_pretrained(target)


@torch.no_grad()
def test_quantized_weights_load(golden, tmp_path):
    """Without a GPU, transformers decodes to bfloat16 while loading; every weight must equal the release's."""
    folder = golden / "deepseek_v41_tiny"
    release, config = load_release(folder), DeepseekV41TextConfig(**read_text_config(folder))
    quantized_checkpoint(folder, release, tmp_path, config)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = text_state_dict(release, config)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.float(), expected[name].to(tensor.dtype).float()), name


def test_fp8_replaces_the_modules_that_the_release_quantizes():
    from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear, replace_with_fp8_linear
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.utils.quantization_config import FineGrainedFP8Config

    with torch.device("meta"):
        model = DeepseekV41TextForCausalLM(
            tiny_config(
                compress_ratios=[0, *[3] * 5],
                kv_source_layer_ids=[1],
                index_source_layer_ids=[1],
                candidate_source_layer_id=None,
            )
        )
    kept = [*get_keys_to_not_convert(model), *model._keep_in_fp32_modules]
    options = {key: value for key, value in FP8.items() if key not in ("fmt", "quant_method")}
    replace_with_fp8_linear(model, kept, FineGrainedFP8Config(**options), pre_quantized=True)
    replaced = {
        name for name, module in model.model.layers[1].named_modules() if isinstance(module, FP8Linear | FP8Experts)
    }
    assert replaced == {
        *(f"self_attn.{name}_proj" for name in ("q_a", "q_b", "kv", "o_a", "o_b")),
        *(f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")),
        "self_attn.indexer.q_b_proj",
        "mlp.experts",
    }
    assert type(model.lm_head) is torch.nn.Linear
    assert model.model.layers[1].mlp.experts.limit == model.config.swiglu_limit


def test_state_dict_names():
    """They are the contract with the converter: the tensors of a KV source that is an index source, too."""
    names = [name.removeprefix("model.layers.1.") for name in tiny_model().state_dict() if "layers.1." in name]
    assert names == [
        "self_attn.sinks",
        *(f"self_attn.{name}.weight" for name in ("q_a_proj", "q_a_norm", "q_b_proj", "kv_proj", "kv_norm", "o_a_proj", "o_b_proj")),
        *(f"self_attn.compressor.{name}.weight" for name in ("kv_proj", "gate_proj", "kv_norm")),
        *(f"self_attn.indexer.{name}.weight" for name in ("q_b_proj", "weights_proj", "k_proj", "k_norm")),
        "mlp.gate.weight", "mlp.gate.e_score_correction_bias", "mlp.gate.e_score_correction_bias_vl",
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
        *(f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
        "input_layernorm.weight", "post_attention_layernorm.weight",
        *(f"{where}_hc.{what}" for where in ("attn", "ffn") for what in ("fn", "base", "scale")),
    ]  # fmt: skip


def test_default_config_gives_the_shapes_of_the_release():
    """The expected shapes are those of the tensors of DeepSeek-V4.1-Flash."""
    with torch.device("meta"):
        model = DeepseekV41TextForCausalLM(DeepseekV41TextConfig())
    shapes = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["embed_tokens.weight"] == shapes["lm_head.weight"] == (129280, 5120)
    layer = {name.removeprefix("layers.20."): shape for name, shape in shapes.items() if name.startswith("layers.20.")}
    expected = {
        "attn_hc.fn": (24, 20480), "attn_hc.base": (24,), "attn_hc.scale": (3,), "self_attn.q_a_proj.weight": (1280, 5120),
        "self_attn.q_b_proj.weight": (32768, 1280), "self_attn.kv_proj.weight": (512, 5120),
        "self_attn.o_a_proj.weight": (8192, 4096), "self_attn.o_b_proj.weight": (5120, 8192), "self_attn.sinks": (64,),
        "self_attn.indexer.q_b_proj.weight": (4096, 1280), "self_attn.indexer.weights_proj.weight": (32, 5120),
        "self_attn.indexer.k_proj.weight": (128, 512), "self_attn.indexer.k_norm.weight": (128,),
        "mlp.gate.weight": (384, 5120), "mlp.gate.e_score_correction_bias_vl": (384,),
        "mlp.experts.gate_up_proj": (384, 4608, 5120), "mlp.experts.down_proj": (384, 5120, 2304),
        "mlp.shared_experts.gate_proj.weight": (2304, 5120), "mlp.shared_experts.down_proj.weight": (5120, 2304),
    }  # fmt: skip
    assert {name: layer[name] for name in expected} == expected

    def having(part):
        return [index for index in range(40) if any(name.startswith(f"layers.{index}.{part}") for name in shapes)]

    assert having("self_attn.compressor.kv_proj") == having("self_attn.indexer.k_proj") == [2, 8, 14, 20]
    assert having("self_attn.compressor.gate_proj") == [2, 8, 14]
    assert having("self_attn.indexer.q_b_proj") == [2, 8, 14, 20, 24, 28, 32, 36]


def test_experts_plans_name_existing_modules():
    config, model = tiny_config(), tiny_model()
    names = {name for name, _ in model.model.named_modules()} | {name for name, _ in model.model.named_parameters()}
    plans = [plan for plan in (config.base_model_tp_plan, config.base_model_ep_plan) if plan]
    assert plans  # transformers 5.17 has one of the two for DeepSeek-V4, 5.23 has both.
    for plan in plans:
        assert "layers.*.mlp.experts" in plan and all(rule.replace("*", "0") in names for rule in plan)


# --- configuration ------------------------------------------------------------------------------------------------


def test_config_keeps_unknown_fields(golden):
    release_config = read_text_config(golden / "deepseek_v41_tiny")
    config = DeepseekV41TextConfig(**release_config)
    again = DeepseekV41TextConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    for name in (
        "engram_layer_ids",
        "dspark_markov_rank",
        "num_nextn_predict_layers",
        "compress_ratios",
        "topk_method",
    ):
        assert getattr(again, name) == release_config[name]
    assert again.upstream_rope_scaling == release_config["rope_scaling"]
    assert (
        again.rope_parameters["main"]["rope_theta"] == 10000
        and again.rope_parameters["compress"]["rope_theta"] == 160000
    )


def test_config_defaults_are_those_of_the_release():
    config = DeepseekV41TextConfig()
    assert [config.compress_ratios.count(ratio) for ratio in (0, 2, 1)] == [2, 18, 20]
    assert config.kv_source_layer_ids == [2, 8, 14, 20] and config.candidate_source_layer_id == 20
    assert config.upstream_rope_scaling["original_max_position_embeddings"] == 65536
    prefix = DeepseekV41TextConfig(num_hidden_layers=10)
    assert prefix.index_source_layer_ids == [2, 8] and prefix.candidate_source_layer_id is None
    assert DeepseekV41TextConfig(rope_scaling=None).upstream_rope_scaling is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 0}, "`hidden_size` must be a positive integer"),
        ({"index_topk": 2.5}, "`index_topk` must be a positive integer"),
        ({"o_groups": 3}, "`num_attention_heads` must be a multiple of `o_groups`"),
        ({"qk_rope_head_dim": 7}, "`qk_rope_head_dim` must be even"),
        ({"qk_rope_head_dim": 34}, "not exceed `head_dim`"),
        ({"head_dim": 40}, "`head_dim` must be a multiple of 32"),
        ({"num_experts_per_tok": 5}, "not exceed `n_routed_experts`"),
        ({"scoring_func": "softmax"}, "`scoring_func` must be 'sqrtsoftplus'"),
        ({"n_shared_experts": 2}, "`n_shared_experts` must be 1"),
        ({"compress_ratios": [0, 3]}, "`compress_ratios` must give each of 6 layers"),
        ({"kv_source_layer_ids": [3, 1]}, "`kv_source_layer_ids` must be ascending"),
        ({"index_source_layer_ids": [1, 3, 6]}, "`index_source_layer_ids` must be ascending layers below"),
        ({"kv_source_layer_ids": [0, 1, 3]}, "with a compress ratio above 0"),
        ({"index_source_layer_ids": [3, 5]}, "must be in `index_source_layer_ids` too"),
        ({"kv_source_layer_ids": [3]}, "Layer 1 has compress ratio 3"),
        ({"candidate_source_layer_id": 4}, "`candidate_source_layer_id` must be one of"),
        ({"candidate_source_layer_id": 1}, "with no KV source"),
        ({"rope_scaling": {"type": "yarn", "factor": 16}}, "needs \\['original_max_position_embeddings'\\]"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "'default' or 'yarn'"),
    ],
)
def test_config_rules_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"inputs_embeds": torch.zeros(2, 6, 48)}, "exactly one of `input_ids` and `inputs_embeds`"),
        ({"attention_mask": torch.ones(2, 5)}, "`attention_mask` must be"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "never forms"),
        ({"attention_mask": {"full_attention": None}}, "`attention_mask` must be"),
        ({"position_ids": torch.tensor([[0, 1, 3, 4, 5, 6]])}, "count up by one"),
        ({"position_ids": torch.arange(3, 9)[None]}, "from 0 or from the last cached position"),
        ({"position_ids": torch.zeros(3, 6, dtype=torch.long)}, "`position_ids` must be \\[2, 6\\]"),
        ({"image_mask": torch.zeros(2, 5, dtype=torch.bool)}, "`image_mask` must have one entry per token"),
        ({"past_key_values": DynamicCache()}, "DynamicCache\\(config=model.config\\)"),
    ],
)
def test_forward_refuses_bad_input(arguments, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model(tokens(model, 2, 6), **arguments)
