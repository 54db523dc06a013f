"""A setting on a model with memory, on its config or by a tool has the effect that it has on the backbone."""

import copy
import functools
import inspect
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_backbones import (
    BACKBONES,
    LAYER_IDS,
    MOE_WITH_AUX_LOSS,
    VOCAB,
    bare,
    build,
    built,
    engram_config,
    random_ids,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from engram_hf import EngramForCausalLM, EngramModel

on_every_backbone = pytest.mark.parametrize("name", BACKBONES)
MEMORY = {"layer_ids": LAYER_IDS, "engram_vocab_size": 97, "engram_n_heads": 2, "engram_head_dim": 8}


def with_memory(host: PreTrainedModel) -> EngramForCausalLM:
    """Return a copy of a backbone with memory that keeps its logits."""
    return EngramForCausalLM.from_backbone(copy.deepcopy(host), **MEMORY)


def outcome(call: Callable[[], object]) -> object:
    """Return the result of a call, or the type of its error."""
    try:
        return call()
    except Exception as error:
        return type(error).__name__


# --- the class


@on_every_backbone
def test_model_is_an_instance_of_the_backbones_class(name):
    host, model = bare(name), built(name)
    assert isinstance(model, type(host)) and isinstance(model, EngramForCausalLM)
    assert isinstance(model.model, type(host.model)) and isinstance(model.model, EngramModel)
    # Its `self` is the model that users have.
    assert type(model).forward.__wrapped__ is type(host).forward
    assert inspect.signature(type(model.model).forward) == inspect.signature(type(host.model).forward)
    assert vars(host).keys() <= vars(model).keys() and vars(host.model).keys() <= vars(model.model).keys()


@on_every_backbone
def test_parameter_names_are_the_backbones(name):
    """Adapters, merges and quantized checkpoints of the backbone therefore fit, and tools find the names they expect."""
    own = {key for key, _ in built(name).named_parameters() if ".engram." not in key}
    assert own == {key for key, _ in bare(name).named_parameters()}


@on_every_backbone
def test_adapter_of_the_backbone_fits(name):
    host = bare(name)
    linear = [key for key, part in host.named_modules() if type(part) is torch.nn.Linear and "self_attn" in key]
    targets = sorted({key.split(".")[-1] for key in linear})  # PEFT converts the names of experts by the model's type.
    # The memory has a `kv_proj`, too.
    options = {"target_modules": targets, "exclude_modules": r".*\.engram\..*", "init_lora_weights": False}
    config = LoraConfig(task_type="CAUSAL_LM", r=2, **options)
    torch.manual_seed(0)
    adapted, model = get_peft_model(copy.deepcopy(host), config), get_peft_model(with_memory(host), config)
    own = {key for key in model.state_dict() if "lora_" in key and ".engram." not in key}
    assert own == {key for key in adapted.state_dict() if "lora_" in key}
    model.load_state_dict({key: value for key, value in adapted.state_dict().items() if "lora_" in key}, strict=False)
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, adapted.eval()(ids).logits)


# --- what is set on the model


@on_every_backbone
def test_custom_loss_function_is_used(name):
    model, ids = build(name), random_ids(2, 9)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + 42.0
    assert float(model(ids, labels=ids).loss) == 42.0


@pytest.mark.parametrize("name", MOE_WITH_AUX_LOSS)
def test_numeric_attributes_of_the_backbone_can_be_read_and_set(name):
    """Every plain number that the backbone's causal model keeps changes the loss with memory as it does without."""
    host, ids = bare(name), random_ids(2, 9)
    model = with_memory(host)
    numbers = [key for key, value in vars(host).items() if type(value) in (int, float) and key not in ("vocab_size",)]
    assert numbers
    for key in numbers:
        assert getattr(model, key) == getattr(host, key)
        changed = []
        for each in (copy.deepcopy(host), copy.deepcopy(model)):
            setattr(each, key, getattr(each, key) + 1)
            result = outcome(lambda each=each: float(each(ids, labels=ids, output_router_logits=True).loss))
            changed.append(result)
        assert changed[0] == changed[1], key


@on_every_backbone
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_set_experts_implementation_behaves_as_on_the_backbone(name, implementation):
    models = copy.deepcopy(bare(name)), copy.deepcopy(built(name))
    said = [outcome(lambda each=each: each.set_experts_implementation(implementation)) for each in models]
    assert said[0] == said[1]


# --- what is set on the config


@on_every_backbone
def test_fields_of_the_backbones_config_can_be_read_and_set_on_the_outer_config(name):
    config = engram_config(name)
    fields = [
        key for key in vars(config.text_config) if not key.startswith("_") and key not in ("dtype", "architectures")
    ]
    own = set(vars(config)) - {"text_config"}
    assert len(set(fields) - own) > 20
    for key in set(fields) - own:
        assert getattr(config, key) == getattr(config.text_config, key), key
    for key in ("attention_dropout", "rms_norm_eps", "rope_parameters", "use_cache", "output_hidden_states"):
        value = getattr(config.text_config, key)
        setattr(config, key, not value if isinstance(value, bool) else copy.deepcopy(value))
        assert getattr(config.text_config, key) == getattr(config, key)
        assert key not in vars(config)


@on_every_backbone
def test_undeclared_config_attributes_reach_the_backbone(name):
    """transformers reads such fields: a model is built with checkpointing if its config asks for it."""
    config, host = engram_config(name), BACKBONES[name]()
    for each in (config, host):
        each.gradient_checkpointing = True
        each.of_the_users_own = {"a": 1}
    assert config.text_config.of_the_users_own == config.of_the_users_own == {"a": 1}
    expected = AutoModelForCausalLM.from_config(host).is_gradient_checkpointing
    assert EngramForCausalLM(config).is_gradient_checkpointing == expected


@on_every_backbone
def test_fields_given_to_from_pretrained_reach_the_backbone(name, tmp_path):
    built(name).save_pretrained(tmp_path)
    fields = {"attention_dropout": 0.25, "rms_norm_eps": 1e-4, "output_hidden_states": True}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **fields)
    assert {key: getattr(model.config.text_config, key) for key in fields} == fields
    assert len(model(random_ids(1, 5)).hidden_states) == model.config.num_hidden_layers + 1
    bare(name).save_pretrained(tmp_path / "bare")
    for wrong in ({"rms_norm_eps": "small"}, {"no_such_field": 1}):
        said = [
            outcome(functools.partial(AutoModelForCausalLM.from_pretrained, path, **wrong))
            for path in (tmp_path, tmp_path / "bare")
        ]
        assert said[0] == said[1] and isinstance(said[0], str)


@on_every_backbone
def test_output_flags_of_the_config_take_effect(name):
    host, model, ids = bare(name), build(name), random_ids(2, 9)
    flags = ["hidden_states", "attentions", "router_logits"]
    for each in (host, model):
        each.set_attn_implementation("eager")
        for flag in flags:
            setattr(each.config, f"output_{flag}", True)
    given = [[each(ids).get(flag) is not None for flag in flags] for each in (host, model)]
    assert given[0] == given[1] and given[0][0]


# --- plans and defaults of tools


@on_every_backbone
@pytest.mark.parametrize("plan", ["_tp_plan", "_pp_plan", "_fsdp_plan", "_ep_plan"])
def test_parallel_plans_are_the_backbones_and_name_existing_modules(name, plan):
    host, model = bare(name), built(name)
    found = getattr(model, plan, None) or {}
    assert found == (getattr(host, plan, None) or {})
    names = {".".join("*" if part.isdigit() else part for part in key.split(".")) for key, _ in model.named_modules()}
    names |= {
        ".".join("*" if part.isdigit() else part for part in key.split(".")) for key, _ in model.named_parameters()
    }
    known = {".".join("*" if part.isdigit() else part for part in key.split(".")) for key, _ in host.named_modules()}
    missing_in_host = {key for key in found if isinstance(key, str) and key not in known}
    assert {key for key in found if isinstance(key, str) and key not in names} <= missing_in_host


@on_every_backbone
def test_lora_without_targets_uses_the_backbones_defaults(name):
    def targets(model):
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM"))
        return sorted(key for key, _ in adapted.named_parameters() if "lora_" in key)

    expected = outcome(lambda: targets(bare(name)))
    if isinstance(expected, str):
        pytest.skip(f"PEFT has no default that fits the backbone itself: {expected}")
    assert targets(built(name)) == expected


# --- inputs


def loss_of(model: torch.nn.Module, parameters: dict, ids: torch.Tensor) -> torch.Tensor:
    arguments = {"labels": ids[None], "use_cache": False}
    return torch.func.functional_call(model, parameters, (ids[None],), arguments).loss


@on_every_backbone
def test_per_sample_gradients_with_functional_call(name):
    ids, results = random_ids(3, 7), []
    for model in (bare(name), built(name)):
        parameters = {key: value.detach() for key, value in model.named_parameters()}
        gradient = torch.func.vmap(
            torch.func.grad(lambda p, one, model=model: loss_of(model, p, one)), in_dims=(None, 0), randomness="same"
        )
        results.append(outcome(lambda gradient=gradient, parameters=parameters: gradient(parameters, ids)))
    if isinstance(results[0], str):
        pytest.skip(f"the backbone itself cannot: {results[0]}")
    alone = torch.func.grad(lambda p: loss_of(built(name), p, ids[1]))(parameters)
    for key, gradient in alone.items():
        torch.testing.assert_close(results[1][key][1], gradient, rtol=1e-4, atol=1e-5, msg=key)


# DeepSeek-V4 compresses keys by place in the row, and the window of gpt-oss counts padding: neither is exact by
# itself.
LOOKED_THROUGH = [name for name in BACKBONES if name not in ("deepseek_v4", "gpt_oss")]


@pytest.mark.parametrize("name", LOOKED_THROUGH)
@pytest.mark.parametrize("variant", ["paper", "v4.1"])
@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_padding_inside_a_row_is_skipped(name, variant, cached):
    """A right-padded first turn precedes a second one; each row equals the row alone."""
    model, lengths, first, second = built(name, variant), (5, 3, 8), random_ids(3, 8), random_ids(3, 6, seed=4)
    mask = torch.tensor([[1] * length + [0] * (8 - length) + [1] * 6 for length in lengths])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    if cached:
        cache = model(first, attention_mask=mask[:, :8]).get(
            "past_key_values" if "past_key_values" in inspect.signature(model.forward).parameters else "cache"
        )
        logits = model(second, attention_mask=mask, position_ids=positions[:, 8:], past_key_values=cache).logits
    else:
        logits = model(
            torch.cat([first, second], 1), attention_mask=mask, position_ids=positions, use_cache=False
        ).logits[:, 8:]
    for row, length in enumerate(lengths):
        alone = model(torch.cat([first[row, :length], second[row]])[None]).logits[0, length:]
        torch.testing.assert_close(logits[row], alone, rtol=0, atol=2e-5)


@torch.no_grad()
def test_padding_is_not_skipped_where_positions_have_a_gap():
    model, ids = built("llama"), random_ids(1, 12)
    mask = torch.ones_like(ids)
    mask[:, 5:8] = 0
    rows = model.model.prepare_memory(ids, mask, torch.arange(12)[None]).row_ids[:, :, 8:]
    assert torch.equal(rows, model.model.prepare_memory(ids[:, 8:]).row_ids)
    joined = model.model.prepare_memory(torch.cat([ids[:, :5], ids[:, 8:]], 1)).row_ids[:, :, 5:]
    assert torch.equal(model.model.prepare_memory(ids, mask).row_ids[:, :, 8:], joined)
    assert not torch.equal(rows, joined)


@on_every_backbone
def test_sampled_id_without_a_token_does_not_end_generation(name):
    """Embeddings are often padded beyond the tokenizer."""
    model = build(name, engram_compressed_vocab_size=60)
    model.set_token_map(torch.arange(120) // 2)
    torch.manual_seed(0)
    tokens = model.generate(
        torch.tensor([[5, 6, VOCAB - 1, 7]]),
        do_sample=True,
        temperature=10.0,
        num_return_sequences=20,
        max_new_tokens=20,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert tokens.shape == (20, 24)
    assert tokens[:, 4:].max() >= 120, "an id without a token was to be sampled"


def test_attribute_set_during_a_call_is_removed_after_it():
    """transformers sets `is_causal` on the config during a forward, and deletes it."""
    model = built("llama")
    model(random_ids(1, 4), is_causal=True)
    assert not hasattr(model.config, "is_causal")
