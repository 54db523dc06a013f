"""Requirements on every backbone: all ways to feed a text give the same logits, and memory is part of the model.

Where a backbone by itself is not exact, the model on it need not be either; the lists below say so. The memory's own
part is still compared there.
"""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_backbones import (
    BACKBONES,
    LAYER_IDS,
    MOE_WITH_AUX_LOSS,
    VOCAB,
    as_able_as,
    build,
    built,
    engram_config,
    random_ids,
)
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PhiConfig

from engram_hf import EngramForCausalLM, EngramModel
from engram_hf.hashing_engram import NO_ID

VARIANTS = ["paper", "v4.1"]
# DeepSeek-V4 compresses keys in windows that start at the first position, padded or not, and ignores documents.
LEFT_PADDED = [name for name in BACKBONES if name != "deepseek_v4"]
# The attention sinks of gpt-oss see the whole packed row.
PACKED = [name for name in BACKBONES if name not in ("deepseek_v4", "gpt_oss")]
EXACT = {"rtol": 0, "atol": 1e-5}

on_every_backbone = pytest.mark.parametrize("name", BACKBONES)
in_both_variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def model(name, variant) -> EngramForCausalLM:
    return built(name, variant)


@torch.no_grad()
def logits_of(model, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(ids, **kwargs).logits


@torch.no_grad()
def logits_in_chunks(model, ids: torch.Tensor, size: int, between=None) -> torch.Tensor:
    """Return the logits of `ids` fed `size` at a time; `between` is called on the memory's history after every chunk."""
    cache, parts = DynamicCache(config=model.config), []
    for chunk in ids.split(size, dim=1):
        parts.append(model(chunk, past_key_values=cache).logits)
        if between is not None:
            between(cache.engram_history)
    return torch.cat(parts, dim=1)


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one - other).abs().max() > 1e-2


@on_every_backbone
@in_both_variants
def test_memory_changes_the_logits_at_every_position(model):
    ids = random_ids(2, 9)
    zeroed = copy.deepcopy(model)
    for memory in zeroed.model.memories().values():
        memory.zero_value_projection()
    change = (logits_of(model, ids) - logits_of(zeroed, ids)).abs().amax(-1)
    assert change.min() > 1e-3


@on_every_backbone
@in_both_variants
@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_forward_in_chunks_equals_one_forward(model, size):
    ids = random_ids(2, 20)
    torch.testing.assert_close(logits_in_chunks(model, ids, size), logits_of(model, ids, use_cache=False), **EXACT)


@on_every_backbone
@in_both_variants
def test_forward_in_chunks_needs_the_ids_of_earlier_chunks(model):
    ids = random_ids(2, 20)
    forgetful = logits_in_chunks(model, ids, 3, between=lambda history: history.ids.fill_(NO_ID))
    assert differ(forgetful, logits_of(model, ids))


@on_every_backbone
def test_forward_in_chunks_needs_the_convolution_inputs_of_earlier_chunks(name):
    model, ids = built(name, "paper"), random_ids(2, 20)
    forgetful = logits_in_chunks(model, ids, 3, between=lambda history: history.conv_inputs.clear())
    assert differ(forgetful, logits_of(model, ids))


@on_every_backbone
@in_both_variants
def test_right_padding_changes_nothing(model):
    ids = random_ids(1, 11)
    padded, mask = torch.cat([ids, random_ids(1, 4, seed=9)], 1), torch.ones(1, 15, dtype=torch.long)
    mask[:, 11:] = 0
    padded_logits = logits_of(model, padded, attention_mask=mask)[:, :11]
    torch.testing.assert_close(padded_logits, logits_of(model, ids), **EXACT)


@pytest.mark.parametrize("name", LEFT_PADDED)
@in_both_variants
@pytest.mark.parametrize("size", [3, 15])
def test_left_padding_changes_nothing(model, size):
    ids = random_ids(1, 11)
    padded, mask = torch.cat([random_ids(1, 4, seed=9), ids], 1), torch.ones(1, 15, dtype=torch.long)
    mask[:, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        for start in range(0, 15, size):
            stop = min(start + size, 15)
            parts.append(
                model(
                    padded[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                ).logits
            )
    torch.testing.assert_close(torch.cat(parts, 1)[:, 4:], logits_of(model, ids), **EXACT)
    # Padding is not part of the preceding text.
    assert differ(logits_of(model, padded)[:, 4:], logits_of(model, ids))


@pytest.mark.parametrize("name", PACKED)
@in_both_variants
def test_packed_documents_do_not_see_each_other(model):
    documents = [random_ids(1, length, seed) for seed, length in enumerate((5, 2, 9))]
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(document.shape[1])[None] for document in documents], 1)
    together = logits_of(model, packed, position_ids=positions, use_cache=False)
    alone = torch.cat([logits_of(model, document) for document in documents], 1)
    torch.testing.assert_close(together, alone, **EXACT)
    assert differ(logits_of(model, packed, use_cache=False), alone)


@on_every_backbone
@in_both_variants
def test_rows_do_not_depend_on_padding_or_packing(model):
    ids, other = random_ids(1, 6), random_ids(1, 4, seed=9)
    joined = torch.cat([other, ids], 1)
    alone = model.model.prepare_memory(ids).row_ids
    padded = model.model.prepare_memory(joined, attention_mask=torch.tensor([[0] * 4 + [1] * 6]))
    packed = model.model.prepare_memory(joined, position_ids=torch.cat([torch.arange(4), torch.arange(6)])[None])
    numbered = model.model.prepare_memory(joined, sequence_ids=torch.tensor([[7] * 4 + [3] * 6]))
    for inputs in (padded, packed, numbered):
        assert torch.equal(inputs.row_ids[:, :, 4:], alone)
    assert not torch.equal(model.model.prepare_memory(joined).row_ids[:, :, 4:], alone)


@on_every_backbone
@pytest.mark.parametrize("by", ["instance", "folder"])
def test_from_backbone_keeps_the_logits_until_trained(name, by, tmp_path):
    torch.manual_seed(0)
    host = AutoModelForCausalLM.from_config(BACKBONES[name]()).eval()
    ids = random_ids(2, 12)
    before = logits_of(host, ids)
    host.save_pretrained(tmp_path)
    model = EngramForCausalLM.from_backbone(
        host if by == "instance" else str(tmp_path),
        layer_ids=LAYER_IDS,
        engram_vocab_size=97,
        engram_n_heads=2,
        engram_head_dim=8,
    )
    assert torch.equal(logits_of(model, ids), before)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for memory in model.model.memories().values():
        assert memory.kv_proj.weight.grad[-1].abs().max() > 0
    assert not torch.equal(logits_of(model, ids), before)


@on_every_backbone
def test_from_pretrained_keeps_float32_modules_of_a_backbone(name, tmp_path):
    """The model is loaded in bfloat16 and has the logits of the backbone loaded in the same way."""
    config = BACKBONES[name]()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "host")
    host = AutoModelForCausalLM.from_pretrained(tmp_path / "host", dtype=torch.bfloat16).eval()
    dtypes = {key: tensor.dtype for key, tensor in host.base_model.state_dict().items()}
    ids = random_ids(2, 12)
    # Some releases of transformers do not cast between the two everywhere.
    with torch.autocast("cpu", torch.bfloat16):
        before = logits_of(host, ids)
    size = {"engram_vocab_size": 97, "engram_n_heads": 2, "engram_head_dim": 8}
    EngramForCausalLM.from_backbone(host, layer_ids=LAYER_IDS, **size).save_pretrained(tmp_path / "model")
    loaded = EngramForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    found = {
        key: tensor.dtype
        for key, tensor in loaded.model.state_dict().items()
        if "engram." not in key and "hashing." not in key
    }
    assert found == dtypes
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits_of(loaded, ids), before)


@on_every_backbone
@in_both_variants
def test_save_and_load_keeps_the_logits(model, tmp_path):
    ids = random_ids(2, 12)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits_of(loaded.eval(), ids), logits_of(model, ids))
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(base, EngramModel)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def gradients(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@on_every_backbone
def test_gradient_checkpointing_changes_no_gradient(name):
    model, ids = build(name).train(), random_ids(2, 12)
    plain = gradients(model, ids)
    for layer_id in LAYER_IDS:
        for part in (
            "table.weight",
            "kv_proj.weight",
            "q_norm.weight",
            "k_norm.weight",
            "conv.weight",
            "conv_norm.weight",
        ):
            assert plain[f"model.layers.{layer_id}.engram.{part}"].abs().max() > 0
    for reentrant in (True, False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.testing.assert_close(gradients(model, ids), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MOE_WITH_AUX_LOSS)
def test_auxiliary_loss_equals_the_hosts(name):
    """Host and model have equal losses and equal router logits while the value projection is zero."""
    torch.manual_seed(0)
    config = BACKBONES[name]()
    config.router_aux_loss_coef = 0.5
    host = AutoModelForCausalLM.from_config(config).eval()
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids, "output_router_logits": True}
    memory = {"layer_ids": LAYER_IDS, "engram_vocab_size": 97, "engram_head_dim": 8}
    model = EngramForCausalLM.from_backbone(copy.deepcopy(host), **memory)
    with torch.no_grad(), as_able_as(lambda: host(**batch)):
        got, expected = model(**batch), host(**batch)
        without = model(**{**batch, "output_router_logits": False})
        assert torch.equal(got.aux_loss, expected.aux_loss) and torch.equal(got.loss, expected.loss)
        assert all(torch.equal(one, two) for one, two in zip(got.router_logits, expected.router_logits, strict=True))
        torch.testing.assert_close(got.loss - without.loss, 0.5 * got.aux_loss)


def test_output_layer_with_a_bias_keeps_its_bias(tmp_path):
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    host = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(host.lm_head.bias)
    ids = random_ids(2, 8)
    before = logits_of(host, ids)
    model = EngramForCausalLM.from_backbone(host, layer_ids=[1], engram_vocab_size=97, engram_head_dim=8)
    assert torch.equal(logits_of(model, ids), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(EngramForCausalLM.from_pretrained(tmp_path).eval(), ids), before)


def test_granite_keeps_its_scaling_of_logits():
    config = engram_config("granitemoe")
    config.text_config.logits_scaling = 1.0
    torch.manual_seed(0)
    unscaled = EngramForCausalLM(config).eval()
    unscaled.load_state_dict(built("granitemoe").state_dict())
    ids = random_ids(2, 8)
    torch.testing.assert_close(logits_of(built("granitemoe"), ids) * 2.0, logits_of(unscaled, ids))
