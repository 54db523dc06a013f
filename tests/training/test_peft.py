"""PEFT adapters on the backbone and on the memory: train, save, reload onto the remote-code model, merge."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from tiny_backbones import build, random_ids
from training_runs import losses

from engram_hf import EngramForCausalLM

# PEFT compares the ends of names, so `engram.kv_proj` leaves a backbone's own `self_attn.kv_proj` alone.
TARGETS = ["q_proj", "v_proj", "engram.kv_proj"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build("mixtral").save_pretrained(folder)
    return folder


@pytest.fixture
def base(saved) -> EngramForCausalLM:
    return EngramForCausalLM.from_pretrained(saved)


def logits(model, ids=None) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(random_ids(2, 9) if ids is None else ids).logits


def keys(folder: Path) -> list[str]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return list(file.keys())


def lora(**fields) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": TARGETS, **fields})


def perturbed(model: PeftModel, seed: int = 0) -> PeftModel:
    """Move every trainable weight: a new LoRA is the identity, for which most equalities hold trivially."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


RELOAD = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({base!r}, trust_remote_code=True)
assert type(base).__module__.startswith("transformers_modules.")
ids = torch.tensor({ids!r})
model = PeftModel.from_pretrained(base, {adapter!r}).eval()
with torch.no_grad():
    result = {{"adapted": model(ids).logits.tolist()}}
    with model.disable_adapter():
        result["base"] = model(ids).logits.tolist()
    result["tokens"] = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False).tolist()
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    result["merged"] = merged(ids).logits.tolist()
    merged.save_pretrained({target!r})
print(json.dumps(result))
"""


def test_train_save_reload_on_remote_code_and_merge(base, saved, trainer, tmp_path, run_without_the_package):
    ids = random_ids(2, 9)
    before = logits(base, ids)
    model = get_peft_model(base, lora())
    run = trainer(model, max_steps=10)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    run.save_model(tmp_path / "adapter")
    after = logits(model, ids)
    assert (after - before).abs().max() > 1e-2

    names = keys(tmp_path / "adapter")
    assert all("lora_" in name for name in names)
    for target in ("q_proj", "v_proj", "engram.kv_proj"):
        assert any(f".{target}." in name for name in names)
    size = {path: (path / name).stat().st_size for path, name in
            [(saved, "model.safetensors"), (tmp_path / "adapter", "adapter_model.safetensors")]}  # fmt: skip
    assert size[tmp_path / "adapter"] < size[saved] / 4

    paths = {"base": str(saved), "adapter": str(tmp_path / "adapter"), "target": str(tmp_path / "merged")}
    there = run_without_the_package(RELOAD.format(ids=ids.tolist(), **paths))
    torch.testing.assert_close(torch.tensor(there["base"]), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(there["adapted"]), after, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(there["merged"]), after, rtol=0, atol=1e-5)
    assert there["tokens"] == model.generate(input_ids=ids, max_new_tokens=6, do_sample=False).tolist()
    again = EngramForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again, ids), after, rtol=0, atol=1e-5)


def test_resumed_adapter_run_equals_the_uninterrupted_one(saved, trainer):
    def fresh():
        torch.manual_seed(0)
        return get_peft_model(EngramForCausalLM.from_pretrained(saved), lora())

    whole = trainer(fresh(), save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(perturbed(fresh()))
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_adapters_before_and_after_the_memory(base, checkpointing, trainer):
    model = perturbed(get_peft_model(base, lora()))
    run = trainer(model, max_steps=1, optim="sgd", learning_rate=1.0, gradient_checkpointing=checkpointing)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_lora_on_the_memory_leaves_the_kv_proj_of_the_backbone_alone():
    model = build("deepseek_v4")
    assert any(name.endswith("self_attn.kv_proj") for name, _ in model.named_modules())
    peft = get_peft_model(model, lora(target_modules=["engram.kv_proj"]))
    hit = sorted(name.removesuffix(".lora_A") for name, _ in peft.named_modules() if name.endswith(".lora_A"))
    assert [name.partition("layers.")[2] for name in hit] == ["1.engram.kv_proj", "2.engram.kv_proj"]
    before = logits(peft)
    adapted = logits(perturbed(peft))
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(peft.merge_and_unload()), adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [5, 7]},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"target_modules": [*TARGETS, "lm_head"]},
    ],
    ids=lambda fields: next(iter(fields)) + "_" + str(next(iter(fields.values()))[-1]),
)
def test_replaced_modules_are_used(base, saved, fields, tmp_path):
    """The backbone's own class defines the forward that uses the head; it has to see the module that PEFT put in its
    place.
    """
    ids = random_ids(2, 9)
    ids[:, 4] = 5
    before = logits(base, ids)
    model = get_peft_model(base, lora(**fields))
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-6)
    (special,) = fields.values()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Only parameters of these fields move, so that a change of the logits can only come from them.
            if parameter.requires_grad and not any(f".{target}." in name for target in TARGETS):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    after = logits(model, ids)
    assert (after - before).abs().max() > 1e-3, special
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(EngramForCausalLM.from_pretrained(saved), tmp_path)
    torch.testing.assert_close(logits(reloaded, ids), after, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(reloaded.merge_and_unload(), ids), after, rtol=0, atol=1e-5)


def test_two_adapters_are_switched(base, tmp_path):
    before = logits(base)
    model = perturbed(get_peft_model(base, lora()), seed=1)
    first = logits(model)
    model.add_adapter("second", lora(r=2, target_modules=["engram.kv_proj"]))
    model.set_adapter("second")
    second = logits(perturbed(model, seed=2))
    assert (first - before).abs().max() > 1e-3 and (second - first).abs().max() > 1e-3
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert len(keys(tmp_path / "second")) < len(keys(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [{"do_sample": False}, {"num_beams": 3}, {"do_sample": False, "use_cache": False}],
    ids=["greedy", "beams", "no cache"],
)
def test_generate_through_peft_is_generate_of_the_merged_model(base, settings):
    model = perturbed(get_peft_model(base, lora()))
    ids = random_ids(2, 7)
    tokens = model.eval().generate(input_ids=ids, max_new_tokens=6, **settings)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(tokens, merged.generate(input_ids=ids, max_new_tokens=6, **settings))


@pytest.mark.parametrize(
    ("method", "message"),
    [(PromptTuningConfig, "memory up by token id"), (PrefixTuningConfig, "The cache holds")],
)
def test_methods_without_token_ids_are_refused(base, method, message):
    model = get_peft_model(base, method(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=message):
        model(random_ids(2, 9))
