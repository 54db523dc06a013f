"""`EngramModel` and `EngramForCausalLM` as transformers models: building, loading, inputs, outputs, resizing.

The requirements on every backbone are tested in test_backbones.py; here one or two backbones suffice.
"""

import copy
import inspect
import json

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_backbones import (
    BACKBONES,
    LAYER_IDS,
    VOCAB,
    as_able_as,
    build,
    built,
    engram_config,
    random_ids,
    randomize,
    tiny_tokenizer,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MambaConfig,
    MixtralModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from engram_hf import EngramConfig, EngramForCausalLM, EngramModel
from engram_hf.cache_engram import attach_history
from engram_hf.modeling_engram import CACHE_NAMES

SMALL = {"layer_ids": [1], "engram_vocab_size": 97, "engram_n_heads": 2, "engram_head_dim": 8}


@pytest.fixture
def mixtral() -> EngramForCausalLM:
    return built("mixtral")


@pytest.fixture
def own() -> EngramForCausalLM:
    """Return a model that the test may change."""
    return copy.deepcopy(built("mixtral"))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def compressed(tokenizer) -> EngramForCausalLM:
    """Return a model that hashes the compressed ids of `tokenizer`; eight of its embeddings have no token."""
    model = build("mixtral", engram_compressed_vocab_size=tokenizer.compressed_vocab_size)
    model.set_token_map(tokenizer)
    return model


@torch.no_grad()
def logits_of(model, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(ids, **kwargs).logits


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one - other).abs().max() > 1e-2


# --- names -----------------------------------------------------------------------------------------------------------


def test_state_dict_keys_are_the_documented_ones(mixtral):
    memory = ["table.weight", "kv_proj.weight", "kv_proj.bias", "q_norm.weight", "k_norm.weight"]
    memory += ["conv.weight", "conv_norm.weight"]
    expected = {f"model.layers.{layer}.engram.{name}" for layer in LAYER_IDS for name in memory}
    expected |= {"model.hashing.multipliers", "model.hashing.primes", "lm_head.weight"}
    keys = mixtral.state_dict().keys()
    backbone = {key for key in keys if key.startswith("model.") and ".engram." not in key and "hashing." not in key}
    assert keys - backbone == expected
    bare = AutoModel.from_config(BACKBONES["mixtral"]())
    assert {key.removeprefix("model.") for key in backbone} == bare.state_dict().keys()


def test_layers_with_memory_keep_their_class(mixtral):
    plain, first, second = mixtral.model.layers
    assert isinstance(first, type(plain)) and type(first) is type(second) is not type(plain)
    assert list(mixtral.model.memories()) == LAYER_IDS


# --- building and loading --------------------------------------------------------------------------------------------


def test_new_model_has_the_dtype_of_a_new_backbone():
    """It is the caller's dtype or, with `from_config`, that of the config."""
    text_config = BACKBONES["mixtral"]()
    text_config.dtype = torch.bfloat16
    config = EngramConfig.for_backbone(text_config, **SMALL)
    for build_model in (AutoModelForCausalLM.from_config, AutoModel.from_config):
        built_model = build_model(copy.deepcopy(config))
        assert {parameter.dtype for parameter in built_model.parameters()} == {torch.bfloat16}
    for build_model in (EngramForCausalLM, EngramModel):
        built_model = build_model(copy.deepcopy(config))
        assert {parameter.dtype for parameter in built_model.parameters()} == {torch.float32}


def test_config_made_invalid_afterwards_builds_no_model():
    config = engram_config("mixtral")
    config.num_hidden_layers = 2
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1, the backbone's 2 decoder layers"):
        EngramForCausalLM(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_model_is_initialized(dtype):
    """Tables and projections are initialized like the backbone's weights, norms to one, the convolution to the
    identity.
    """
    torch.manual_seed(0)
    config = engram_config("mixtral")
    config.text_config.initializer_range = 0.05
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for memory in model.model.memories().values():
        for weight in (memory.table.weight, memory.kv_proj.weight):
            assert weight.dtype == dtype and abs(weight.float().std() - 0.05) < 0.01
        assert memory.kv_proj.bias.abs().max() == 0 and memory.conv.weight.abs().max() == 0
        for norm in (memory.q_norm, memory.k_norm, memory.conv_norm):
            assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    model.model.hashing.verify_constants()


def test_output_layer_and_embeddings_are_found(mixtral):
    assert mixtral.get_output_embeddings() is mixtral.lm_head
    assert mixtral.get_input_embeddings() is mixtral.model.get_input_embeddings() is mixtral.model.embed_tokens
    assert mixtral.base_model is mixtral.model


def test_sharded_checkpoint_saves_and_loads(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    loaded, info = EngramForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = random_ids(2, 9)
    assert torch.equal(logits_of(loaded, ids), logits_of(mixtral, ids))


def test_state_dict_round_trip(mixtral):
    fresh = EngramForCausalLM(engram_config("mixtral")).eval()
    ids = random_ids(2, 9)
    assert differ(logits_of(fresh, ids), logits_of(mixtral, ids))
    assert not any(fresh.load_state_dict(mixtral.state_dict()))
    assert torch.equal(logits_of(fresh, ids), logits_of(mixtral, ids))


@pytest.mark.parametrize("used_before", [True, False])
def test_deep_copies_are_independent(used_before):
    model, ids = build("mixtral"), random_ids(2, 9)
    if used_before:
        model(ids)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for memory in model.model.memories().values():
            memory.table.weight.zero_()
        model.lm_head.weight.zero_()
    assert torch.equal(logits_of(copied, ids), logits_of(built("mixtral"), ids))
    assert logits_of(model, ids).abs().max() == 0


def edit_checkpoint(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("key", ["model.layers.2.engram.table.weight", "model.hashing.primes"])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_checkpoint_without_a_tensor_of_the_memory_is_refused(mixtral, tmp_path, key, auto):
    mixtral.save_pretrained(tmp_path)
    edit_checkpoint(tmp_path, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=f"lacks 1 tensors of the memory, such as .*{key.removeprefix('model.')}"):
        auto.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["multipliers", "primes"])
def test_hash_constants_of_another_model_are_refused(mixtral, tmp_path, name):
    mixtral.save_pretrained(tmp_path)
    edit_checkpoint(tmp_path, lambda tensors: tensors[f"model.hashing.{name}"][0, 0].add_(2))
    with pytest.raises(ValueError, match=f"hash {name} stored with the weights are not those that the config implies"):
        EngramForCausalLM.from_pretrained(tmp_path)


def test_config_of_another_seed_is_refused(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "engram_seed": 7}))
    with pytest.raises(ValueError, match="seed 7"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_plain_model_is_refused_before_it_is_built(tmp_path, monkeypatch, name):
    """`EngramConfig` would misread its config and add a default backbone and large tables."""
    AutoModelForCausalLM.from_config(BACKBONES[name]()).save_pretrained(tmp_path)
    monkeypatch.setattr(EngramForCausalLM, "__init__", None)
    with pytest.raises(
        ValueError, match=r"config of a '\w+' model, .* add memory to it with EngramForCausalLM.from_backbone"
    ):
        EngramForCausalLM.from_pretrained(tmp_path)


def test_plain_checkpoint_with_an_engram_config_is_refused(tmp_path):
    """An Engram config beside a backbone's weights must not give random memory."""
    AutoModelForCausalLM.from_config(BACKBONES["mixtral"]()).save_pretrained(tmp_path)
    engram_config("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_backbone"):
        EngramForCausalLM.from_pretrained(tmp_path)


# --- from_backbone ---------------------------------------------------------------------------------------------------


def test_from_backbone_keeps_tokenizer_dtype_mode_and_generation_settings(tokenizer):
    host = AutoModelForCausalLM.from_config(BACKBONES["mixtral"](), dtype=torch.bfloat16).train()
    host.generation_config.temperature = 0.3
    model = EngramForCausalLM.from_backbone(host, tokenizer, **SMALL)
    assert model.training and model.dtype == torch.bfloat16 and model.generation_config.temperature == 0.3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.engram_compressed_vocab_size == tokenizer.compressed_vocab_size
    assert model.config.engram_pad_token_id == tokenizer.pad_token_id
    expected = torch.as_tensor(tokenizer.token_map)
    assert torch.equal(model.model.hashing.token_map[: len(tokenizer)], expected)
    assert (model.model.hashing.token_map[len(tokenizer) :] == -1).all()


def test_from_backbone_passes_arguments_to_from_pretrained(tmp_path):
    AutoModelForCausalLM.from_config(BACKBONES["llama"]()).save_pretrained(tmp_path)
    model = EngramForCausalLM.from_backbone(tmp_path, **SMALL, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.model.config._attn_implementation == "eager"


def test_from_backbone_refuses_arguments_that_would_have_no_effect():
    host = AutoModelForCausalLM.from_config(BACKBONES["llama"]())
    with pytest.raises(ValueError, match=r"\['dtype'\] only apply to a backbone that is loaded by name"):
        EngramForCausalLM.from_backbone(host, **SMALL, dtype=torch.bfloat16)


def test_from_backbone_refuses_a_model_with_memory():
    host = AutoModelForCausalLM.from_config(BACKBONES["llama"]())
    EngramForCausalLM.from_backbone(host, **SMALL)
    with pytest.raises(ValueError, match="already has Engram memory"):
        EngramForCausalLM.from_backbone(host, **SMALL)


def test_backbone_without_a_cache_is_refused():
    host = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(ValueError, match="MambaModel keeps no transformers Cache that counts positions"):
        EngramForCausalLM.from_backbone(host, **SMALL)


class Forgetful(MixtralModel):
    """Passes no keyword arguments to its layers."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        known = {name: kwargs.get(name) for name in (*CACHE_NAMES, "inputs_embeds", "use_cache") if name in kwargs}
        return super().forward(input_ids, attention_mask, position_ids, **known)


Forgetful.forward.__signature__ = inspect.signature(MixtralModel.forward)


@torch.no_grad()
def test_backbone_that_drops_keyword_arguments_runs_with_memory():
    config, model = engram_config("mixtral"), built("mixtral").model
    forgetful = EngramModel(config, Forgetful(config.text_config)).eval()
    forgetful.load_state_dict(model.state_dict())
    for _ in range(2):  # The first forward learns how inputs reach the layers.
        assert torch.equal(forgetful(random_ids(2, 9))[0], model(random_ids(2, 9))[0])


class Shortcut(MixtralModel):
    """Calls none of its layers."""

    def forward(self, input_ids=None, **kwargs):
        return BaseModelOutputWithPast(self.embed_tokens(input_ids))


Shortcut.forward.__signature__ = inspect.signature(MixtralModel.forward)


def test_backbone_that_calls_no_layer_is_refused():
    """The first forward raises the error."""
    config = engram_config("mixtral")
    model = EngramModel(config, Shortcut(config.text_config))
    with pytest.raises(ValueError, match="Shortcut ran without memory"):
        model(random_ids(1, 4), use_cache=False)


class Amnesiac(MixtralModel):
    """Stores its keys in its own cache."""

    def forward(self, *args, **kwargs):
        own = {name: DynamicCache(config=self.config) for name in CACHE_NAMES if kwargs.get(name) is not None}
        return super().forward(*args, **{**kwargs, **own})


Amnesiac.forward.__signature__ = inspect.signature(MixtralModel.forward)


@pytest.mark.parametrize("return_dict", [True, False])
def test_backbone_that_loses_the_history_is_refused(return_dict):
    config = engram_config("mixtral")
    model = EngramModel(config, Amnesiac(config.text_config))
    with pytest.raises(ValueError, match="cache"):
        model(random_ids(1, 4), return_dict=return_dict)
    model(random_ids(1, 4), use_cache=False)


def test_encoder_decoder_is_refused():
    config = T5Config(vocab_size=VOCAB, d_model=32, d_ff=32, num_layers=2, num_heads=2, d_kv=8)
    with pytest.raises(ValueError, match="encoder-decoder"):
        EngramForCausalLM.from_backbone(T5ForConditionalGeneration(config), **SMALL)


# --- the token map ---------------------------------------------------------------------------------------------------


def test_forward_without_a_token_map_raises(tokenizer):
    model = build("mixtral", engram_compressed_vocab_size=tokenizer.compressed_vocab_size)
    with pytest.raises(ValueError, match="no token map yet"):
        model(random_ids(1, 4))


def test_equal_tokens_read_equal_rows(compressed):
    lower, upper = torch.tensor([[4, 10, 16]]), torch.tensor([[5, 11, 17]])
    rows = [compressed.model.prepare_memory(ids).row_ids for ids in (lower, upper, lower + 2)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_token_map_may_be_a_tensor(compressed, tokenizer):
    other = build("mixtral", engram_compressed_vocab_size=tokenizer.compressed_vocab_size)
    other.set_token_map(torch.as_tensor(tokenizer.token_map))
    assert torch.equal(other.model.hashing.token_map, compressed.model.hashing.token_map)


def test_token_map_is_saved_with_the_weights(compressed, tmp_path):
    compressed.save_pretrained(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(3, 120, (2, 9))
    assert torch.equal(logits_of(loaded, ids), logits_of(compressed, ids))


def test_wrong_token_map_is_refused(compressed, tokenizer):
    token_map = torch.as_tensor(tokenizer.token_map)
    size = tokenizer.compressed_vocab_size
    with pytest.raises(ValueError, match=f"compresses to 30 ids, but this model was built for {size}"):
        compressed.set_token_map(token_map % 30)
    with pytest.raises(ValueError, match="other compressed ids than this model was trained with"):
        compressed.set_token_map(token_map.flip(0))
    with pytest.raises(ValueError, match="has 200 tokens, but the model's vocabulary 128"):
        compressed.set_token_map(torch.arange(200))
    with pytest.raises(ValueError, match=r"has 2 tokens.* \(its pad token is 5\)"):
        build("mixtral", engram_compressed_vocab_size=2, engram_pad_token_id=5).set_token_map([0, 1])
    with pytest.raises(ValueError, match="takes no token map"):
        build("mixtral").set_token_map(token_map)
    fresh = build("mixtral", engram_compressed_vocab_size=size)
    with pytest.raises(ValueError, match=f"compresses to {size + 1} ids, but this model was built for {size}"):
        fresh.set_token_map(torch.cat([token_map, torch.tensor([size])]))


def test_tokens_without_an_entry_in_the_map_have_no_memory(compressed):
    """Embeddings are often padded beyond the tokenizer, and sampling eventually finds such an id."""
    ids = torch.tensor([[4, 9, 125, 8, 7]])
    gates = compressed.engram_gates(ids)
    for gate in gates.values():
        assert (gate[:, 2] == 0).all() and (gate[:, [0, 1, 3, 4]] > 0).all()
    # They end a look-back, as images do.
    rows = compressed.model.prepare_memory(ids).row_ids
    assert torch.equal(rows[:, :, 3:], compressed.model.prepare_memory(ids[:, 3:]).row_ids)


def test_padding_may_have_any_id(compressed):
    ids, mask = torch.tensor([[125, -100, 4, 9, 8]]), torch.tensor([[0, 0, 1, 1, 1]])
    rows = compressed.model.prepare_memory(ids, attention_mask=mask).row_ids
    assert torch.equal(rows[:, :, 2:], compressed.model.prepare_memory(ids[:, 2:]).row_ids)


# --- resizing --------------------------------------------------------------------------------------------------------


def test_resize_token_embeddings_keeps_the_old_tokens(compressed, tokenizer, tmp_path):
    ids = torch.randint(3, 120, (2, 9))
    before = logits_of(compressed, ids)
    compressed.resize_token_embeddings(140)
    size = tokenizer.compressed_vocab_size
    assert compressed.config.vocab_size == compressed.lm_head.out_features == 140
    assert compressed.model.hashing.token_map[128:].tolist() == list(range(size, size + 12))
    assert compressed.config.engram_added_tokens == 12
    torch.testing.assert_close(logits_of(compressed, ids)[..., :VOCAB], before, rtol=0, atol=1e-6)

    new = torch.tensor([[4, 130, 139]])
    loss = compressed(new, labels=new).loss
    compressed.save_pretrained(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(new, labels=new).loss, loss)
    # A new token has its own id: another one reads other rows.
    rows = [compressed.model.prepare_memory(ids).row_ids for ids in (new, torch.tensor([[4, 131, 139]]))]
    assert not torch.equal(*rows)


def test_added_tokens_share_the_ids_of_their_equals(compressed, tmp_path):
    tokenizer = tiny_tokenizer()
    size = tokenizer.compressed_vocab_size
    tokenizer.add_tokens(["WORD7", "quite new"])
    compressed.resize_token_embeddings(len(tokenizer))
    compressed.set_token_map(tokenizer)
    token_map = compressed.model.hashing.token_map
    assert token_map[-2] == token_map[tokenizer.convert_tokens_to_ids("word7")] and token_map[-1] == size
    assert compressed.config.engram_added_tokens == 1
    compressed.save_pretrained(tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path)
    ids = tokenizer("word1 WORD7 quite new word2", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(compressed, ids), rtol=0, atol=1e-6)


def test_resize_token_embeddings_shrinks_down_to_the_hash(compressed, tokenizer, tmp_path):
    ids = torch.randint(3, 120, (2, 9))
    before = logits_of(compressed, ids)
    compressed.resize_token_embeddings(len(tokenizer))
    assert torch.equal(logits_of(compressed, ids), before[..., : len(tokenizer)])
    compressed.resize_token_embeddings(len(tokenizer) + 4)
    compressed.resize_token_embeddings(len(tokenizer))
    assert compressed.config.engram_added_tokens == 0
    compressed.save_pretrained(tmp_path)
    assert torch.equal(logits_of(EngramForCausalLM.from_pretrained(tmp_path), ids), before[..., : len(tokenizer)])

    size = tokenizer.compressed_vocab_size
    with pytest.raises(ValueError, match=f"new_num_tokens is {size - 1}, but this model's memory hashes {size} ids"):
        compressed.resize_token_embeddings(size - 1)
    assert compressed.config.vocab_size == compressed.lm_head.out_features == len(tokenizer)


def test_uncompressed_ids_stay_when_tokens_are_added(own, tmp_path):
    ids = random_ids(2, 9)
    before = logits_of(own, ids)
    own.resize_token_embeddings(130, pad_to_multiple_of=8)
    assert own.config.vocab_size == 136 and own.config.engram_compressed_vocab_size == VOCAB
    torch.testing.assert_close(logits_of(own, ids)[..., :VOCAB], before, rtol=0, atol=1e-6)
    own.save_pretrained(tmp_path)
    loaded, new = EngramForCausalLM.from_pretrained(tmp_path), torch.tensor([[5, 135, 6]])
    torch.testing.assert_close(logits_of(loaded, new), logits_of(own, new), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="hashes 128 ids"):
        own.resize_token_embeddings(100)


def test_resize_to_the_same_size_changes_nothing(own):
    ids, before = random_ids(2, 9), logits_of(own, random_ids(2, 9))
    own.resize_token_embeddings(VOCAB)
    own.resize_token_embeddings()
    assert own.model.hashing.token_map is None and torch.equal(logits_of(own, ids), before)


def test_resize_keeps_tied_embeddings_tied(tmp_path):
    config = engram_config("llama")
    config.text_config.tie_word_embeddings = True
    model = randomize(EngramForCausalLM(config)).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, ids = EngramForCausalLM.from_pretrained(tmp_path), random_ids(2, 9)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    loaded.resize_token_embeddings(144)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert logits_of(loaded, ids).shape[-1] == loaded.config.vocab_size == 144


def test_untied_embeddings_stay_untied(mixtral):
    assert mixtral.lm_head.weight is not mixtral.get_input_embeddings().weight


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_embeddings_beside_ids_are_used(mixtral):
    ids = random_ids(2, 9)
    embeddings = mixtral.get_input_embeddings()(ids)
    assert torch.equal(logits_of(mixtral, ids, inputs_embeds=embeddings), logits_of(mixtral, ids))
    assert differ(logits_of(mixtral, ids, inputs_embeds=embeddings.flip(1)), logits_of(mixtral, ids))
    assert differ(logits_of(mixtral, ids.flip(1), inputs_embeds=embeddings), logits_of(mixtral, ids))


@pytest.mark.parametrize("part", ["model", "causal"])
def test_embeddings_alone_are_refused(mixtral, part):
    model = mixtral.model if part == "model" else mixtral
    with pytest.raises(ValueError, match="input_ids is needed"):
        model(inputs_embeds=torch.zeros(1, 4, 32))


def test_image_positions_have_no_memory_and_end_a_look_back(mixtral):
    ids, image = random_ids(1, 10), torch.zeros(1, 10, dtype=torch.bool)
    image[:, 4:6] = True
    rows = mixtral.model.prepare_memory(ids, image_mask=image).row_ids
    assert torch.equal(rows[:, :, 6:], mixtral.model.prepare_memory(ids[:, 6:]).row_ids)
    gates = mixtral.engram_gates(ids, image_mask=image)
    for gate in gates.values():
        assert (gate[:, 4:6] == 0).all() and (gate[:, :4] > 0).all() and (gate[:, 6:] > 0).all()
    assert differ(logits_of(mixtral, ids, image_mask=image), logits_of(mixtral, ids))
    with pytest.raises(ValueError, match=r"one entry per token, \[1, 10\]; got \[1, 9\]"):
        mixtral(ids, image_mask=image[:, :-1])


def test_memory_ignores_image_ids(mixtral):
    ids, image = random_ids(1, 10), torch.zeros(1, 10, dtype=torch.bool)
    image[:, 4:6] = True
    others = ids.masked_fill(image, 99)
    embeddings = mixtral.get_input_embeddings()(ids)
    one, two = (logits_of(mixtral, some, inputs_embeds=embeddings, image_mask=image) for some in (ids, others))
    assert torch.equal(one, two)


def test_mask_of_another_shape_needs_a_padding_mask(mixtral):
    """With a mask that is already 4-D (a static cache's), `padding_mask` marks the padding for the memory."""
    ids, padding = random_ids(1, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    positions = (padding.cumsum(1) - 1).clamp_min(0)
    causal = torch.ones(8, 8).tril().bool() & padding.bool()[:, None]
    arguments = {"attention_mask": causal[None], "position_ids": positions, "use_cache": False}
    found = logits_of(mixtral, ids, **arguments, padding_mask=padding)[:, 3:]
    torch.testing.assert_close(found, logits_of(mixtral, ids[:, 3:]), rtol=0, atol=1e-5)


POSITIONS = torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5, 6]])  # Two documents begin at the zeros.


def test_sequence_index_separates_documents_like_restarting_positions(mixtral):
    ids = random_ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    numbered = torch.tensor([[5, 5, 5, 5, 2, 2, 2, 2, 2]])
    by_position = mixtral.model.prepare_memory(ids, position_ids=positions).row_ids
    assert torch.equal(mixtral.model.prepare_memory(ids, sequence_ids=numbered).row_ids, by_position)
    arguments = {"position_ids": positions, "use_cache": False}
    assert torch.equal(logits_of(mixtral, ids, **arguments, seq_idx=numbered), logits_of(mixtral, ids, **arguments))


BY_NUMBER = {"sequence_ids": torch.tensor([[7, 7, 5, 5, 5, 5]])}
BY_POSITION = {"position_ids": POSITIONS[:, :6]}
LATER_POSITIONS = {"position_ids": POSITIONS[:, 6:]}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (BY_NUMBER, {"sequence_ids": torch.full((1, 3), 5)}),
        (BY_NUMBER, {}),
        (BY_NUMBER, LATER_POSITIONS),
        (BY_POSITION, {}),
        (BY_POSITION, LATER_POSITIONS),
    ],
)
def test_later_call_continues_the_last_document(mixtral, first, second):
    ids = random_ids(1, 9)
    expected = mixtral.model.prepare_memory(ids, position_ids=POSITIONS).row_ids

    history = attach_history(DynamicCache(config=mixtral.config.text_config), mixtral.config)
    parts = (ids[:, :6], first), (ids[:, 6:], second)
    found = []
    for part, said in parts:
        found.append(mixtral.model.prepare_memory(part, history=history, **said).row_ids)
        history.commit()
    assert torch.equal(torch.cat(found, dim=2), expected)


def test_generate_takes_the_documents_of_a_prompt(mixtral):
    ids, documents = random_ids(1, 6), torch.full((1, 6), 5)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(mixtral.generate(ids, seq_idx=documents, **options), mixtral.generate(ids, **options))


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_loss_is_averaged_over_the_items_of_the_whole_batch(mixtral):
    ids = random_ids(2, 9)
    labels = ids.clone()
    labels[0, :5] = -100
    logits = logits_of(mixtral, ids)
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    count = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(mixtral(ids, labels=labels).loss, total / count)
    torch.testing.assert_close(mixtral(ids, labels=labels, num_items_in_batch=40).loss, total / 40)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4, 7])])
def test_logits_to_keep(mixtral, kept):
    ids = random_ids(2, 9)
    chosen = slice(-kept, None) if isinstance(kept, int) else kept
    torch.testing.assert_close(
        logits_of(mixtral, ids, logits_to_keep=kept), logits_of(mixtral, ids)[:, chosen], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v4"])
def test_outputs_include_requested_states_attentions_and_router_logits(name):
    model, ids = build(name), random_ids(2, 9)
    model.set_attn_implementation("eager")
    outputs = model(ids, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    layers = model.config.num_hidden_layers
    assert len(outputs.hidden_states) == layers + 1 and len(outputs.attentions) == layers
    # The first layer of the tiny DeepSeek-V4 routes by a hash, without logits.
    assert len(outputs.router_logits) == layers - (name == "deepseek_v4")
    # The input of a layer is recorded before its memory is added: the rows of layer 1 cannot change it.
    with torch.no_grad():
        model.model.memories()[1].table.weight.zero_()
    without = model(ids, output_hidden_states=True)
    assert torch.equal(outputs.hidden_states[1], without.hidden_states[1])
    assert differ(outputs.hidden_states[2], without.hidden_states[2])


def test_tuples_instead_of_outputs(mixtral):
    ids = random_ids(2, 9)
    assert torch.equal(mixtral(ids, return_dict=False)[0], mixtral(ids).logits)


def test_engram_gates(mixtral):
    ids = random_ids(2, 9)
    gates = mixtral.engram_gates(ids)
    assert list(gates) == LAYER_IDS
    for gate in gates.values():
        assert gate.shape == (2, 9, 1) and (gate > 0).all() and (gate < 1).all() and gate.std() > 0.01
    assert built("deepseek_v4").engram_gates(ids)[1].shape == (2, 9, 4)


# --- precision, attention, devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("variant", ["paper", "v4.1"])
def test_forward_in_lower_precision(dtype, tolerance, variant, tmp_path):
    # The backbone is dense: with experts, a rounded router may choose others.
    reference, ids = built("llama", variant), random_ids(2, 9)
    reference.save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    logits = logits_of(model, ids)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), logits_of(reference, ids), rtol=0, atol=tolerance)
    assert model.generate(ids, max_new_tokens=3, eos_token_id=None).shape == (2, 12)


def test_forward_with_autocast():
    model, ids = build("llama"), random_ids(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.logits.float(), logits_of(model, ids), rtol=0, atol=0.1)
    assert model.model.memories()[1].table.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(mixtral, implementation, tmp_path):
    ids = random_ids(2, 9)
    mixtral.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    switched = AutoModelForCausalLM.from_pretrained(tmp_path)
    switched.set_attn_implementation(implementation)
    for model in (loaded, switched):
        assert model.model.layers[0].self_attn.config._attn_implementation == implementation
        torch.testing.assert_close(logits_of(model, ids), logits_of(mixtral, ids), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled_without_graph_breaks():
    """Gradients and padding are included."""
    torch.compiler.reset()
    model, ids, mask = build("llama"), random_ids(2, 9), torch.ones(2, 9)
    mask[0, :3] = 0
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for run in (compiled, model):
        model.zero_grad()
        loss = run(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_static_cache_compiles_once_for_all_tokens():
    torch.compiler.reset()
    model, ids = built("llama"), random_ids(2, 14)
    cache, graphs = StaticCache(config=model.config, max_cache_len=16), CompileCounterWithBackend("eager")
    model(ids[:, :8], past_key_values=cache)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    decoded = torch.cat([compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 14)], 1)
    assert graphs.frame_count == 1
    torch.testing.assert_close(decoded, logits_of(model, ids)[:, 8:], rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_forward_is_compiled_once():
    torch.compiler.reset()
    model, graphs = build("llama"), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for seed in range(3):
        compiled(random_ids(2, 9, seed=seed), use_cache=False)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_attention_implementation_has_the_backbones_name(name):
    """Trainers build a second model from the first one's config."""
    model = build(name)
    assert model.config._attn_implementation == model.model.config._attn_implementation
    model.set_attn_implementation(model.config._attn_implementation)


def test_every_device_map_gives_the_same_logits(mixtral, tmp_path):
    ids = random_ids(2, 9)
    mixtral.save_pretrained(tmp_path / "model")
    automatic = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    assert torch.equal(logits_of(automatic, ids), logits_of(mixtral, ids))
    on_disk = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": 300_000}, offload_folder=tmp_path / "offloaded"
    )
    assert "disk" in on_disk.hf_device_map.values()
    assert on_disk.model.memories()[1].table.weight.device.type == "meta"
    assert torch.equal(logits_of(on_disk, ids), logits_of(mixtral, ids))
    assert torch.equal(on_disk.generate(ids, max_new_tokens=3), mixtral.generate(ids, max_new_tokens=3))


def test_accelerate_dispatches_the_model(own):
    ids = random_ids(2, 9)
    before = logits_of(own, ids)
    dispatched = accelerate.cpu_offload(own, execution_device=torch.device("cpu"))
    assert dispatched.model.memories()[1].kv_proj.weight.device.type == "meta"
    assert torch.equal(logits_of(dispatched, ids), before)


def test_from_backbone_of_a_backbone_with_hooks():
    """`device_map` wraps the forward of each layer; the memory must run inside."""
    torch.manual_seed(0)
    host = AutoModelForCausalLM.from_config(BACKBONES["mixtral"]()).eval()
    host = accelerate.dispatch_model(host, {"": "cpu"}, force_hooks=True)
    model = randomize(EngramForCausalLM.from_backbone(host, **{**SMALL, "layer_ids": LAYER_IDS}))
    ids = random_ids(2, 9)
    torch.testing.assert_close(logits_of(model, ids), logits_of(built("mixtral"), ids), rtol=0, atol=1e-5)


def test_offloaded_backbone_is_refused(tmp_path):
    host = AutoModelForCausalLM.from_config(BACKBONES["mixtral"]())
    accelerate.disk_offload(host, tmp_path, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="weights are offloaded"):
        EngramForCausalLM.from_backbone(host, **SMALL)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v4"])
def test_memory_has_the_dtype_of_the_backbone(name, tmp_path):
    """DeepSeek-V4 keeps norms, sinks and hyper-connections in float32."""
    AutoModelForCausalLM.from_config(BACKBONES[name]()).save_pretrained(tmp_path / "host")
    added = EngramForCausalLM.from_backbone(tmp_path / "host", **SMALL, dtype=torch.bfloat16)
    added.save_pretrained(tmp_path / "model")
    for model in (added, EngramForCausalLM.from_pretrained(tmp_path / "model")):
        memory = model.model.memories()[1]
        assert model.dtype == memory.table.weight.dtype == memory.kv_proj.weight.dtype == torch.bfloat16
    ids, host = random_ids(2, 9), AutoModelForCausalLM.from_pretrained(tmp_path / "host", dtype=torch.bfloat16)
    with as_able_as(lambda: logits_of(host, ids)):
        assert torch.equal(logits_of(model, ids), logits_of(added, ids))


def test_float8_rows_stay_float8(tmp_path):
    config = engram_config("llama", engram_head_dim=32, engram_table_dtype="float8_e4m3fn")
    torch.manual_seed(0)
    model = EngramForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    loaded, ids = EngramForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), random_ids(2, 9)
    table = loaded.model.memories()[1].table
    assert table.weight.dtype == torch.float8_e4m3fn and table.scale.dtype == torch.float8_e8m0fnu
    torch.testing.assert_close(logits_of(loaded, ids).float(), logits_of(model, ids), rtol=0, atol=0.1)


def test_replicas_do_not_share_modules(mixtral):
    """The replicas of `DataParallel` run in threads."""
    replica, ids = mixtral._replicate_for_data_parallel(), random_ids(2, 9)
    before = logits_of(mixtral, ids)
    replica.lm_head = torch.nn.Linear(32, VOCAB, bias=False)
    assert differ(logits_of(replica, ids), before) and torch.equal(logits_of(mixtral, ids), before)


def test_from_backbone_keeps_other_modules(tmp_path):
    host = AutoModelForCausalLM.from_config(LlamaConfig(**BACKBONES["llama"]().to_diff_dict()))
    host.value_head = torch.nn.Linear(32, 1)
    model = EngramForCausalLM.from_backbone(host, **SMALL)
    assert model.value_head is host.value_head and "value_head.weight" in model.state_dict()


@pytest.mark.parametrize(
    ("version", "warns"), [("5.16.1", True), ("5.17.0", False), ("5.24.3", False), ("5.25.0.dev0", True)]
)
def test_untested_version_of_transformers_is_warned_of_once(monkeypatch, library_log, version, warns):
    monkeypatch.setattr(transformers, "__version__", version)
    logging.warning_once.cache_clear()
    found = []
    for _ in range(2):
        library_log.clear()
        EngramModel(engram_config("llama"))
        tested = [text for text in library_log if "was tested with transformers 5.17 to 5.24" in text]
        found.append([text for text in tested if version in text])
    assert [len(texts) for texts in found] == [warns, 0]


def test_base_model_can_be_built_alone():
    model, ids = randomize(EngramModel(engram_config("mixtral"))).eval(), random_ids(2, 9)
    assert model(ids).last_hidden_state.shape == (2, 9, 32)
