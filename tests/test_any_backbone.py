"""Memory on decoders of many architectures: other layer names, no keywords, looped layers; and refused models.

`make backbones` sweeps the whole of `AutoModelForCausalLM`; a sample runs here.
"""

import concurrent.futures
import copy
import importlib
import json
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from child_processes import WITHOUT_PACKAGE, run_elsewhere
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GradientCheckpointingLayer,
    TorchAoConfig,
)
from transformers.models.auto import CONFIG_MAPPING

import engram_hf
from engram_hf import EngramConfig, EngramForCausalLM, EngramModel

ROOT = Path(engram_hf.__file__).parent
sys.path.insert(0, str(ROOT / "benchmarks"))
backbone_configs, backbones = map(importlib.import_module, ("backbone_configs", "backbones"))
# transformers 5.17 compiles some of its functions by torch.jit, which fails under the warning filters of the tests.
importlib.import_module("transformers.models.gpt_bigcode.modeling_gpt_bigcode")

MEMORY = {"layer_ids": [1, 2], "engram_n_heads": 2, "engram_head_dim": 8, "engram_vocab_size": 97}
IDS = torch.randint(4, 120, (2, 12), generator=torch.Generator().manual_seed(1))
# Each kind of decoder has one entry: layer names, layers without keywords, several streams, recurrent layers, loops,
# experts.
SAMPLE = [
    "bloom",
    "codegen",
    "ctrl",
    "falcon",
    "falcon_h1",
    "gemma3n_text",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox_japanese",
    "gptj",
    "jamba",
    "lfm2",
    "llama4_text",
    "longcat_flash",
    "modernbert-decoder",
    "mpt",
    "opt",
    "phi",
    "roberta",
]


def bare(kind: str) -> torch.nn.Module:
    return backbone_configs.build(kind, IDS)[0]


def with_memory(kind: str) -> EngramForCausalLM:
    model = EngramForCausalLM.from_backbone(bare(kind), **MEMORY).eval()
    backbones.wake(model)
    return model


@pytest.fixture(scope="module")
def bloom() -> EngramForCausalLM:
    """Return a Bloom model, whose layers are called `h` and take no keywords of ours."""
    return with_memory("bloom")


@torch.no_grad()
def logits(model, ids=IDS, **kwargs) -> torch.Tensor:
    return model(ids, **{"use_cache": False, **kwargs}).logits


# --- the sweep and its page


@pytest.mark.parametrize("kind", SAMPLE)
def test_backbone_passes_the_checks_of_the_sweep(kind):
    assert backbones.check(kind, quick=True) == ("full", "")


def test_backbones_page_matches_the_recorded_sweep():
    noted = json.loads(backbones.NOTED.read_text(encoding="utf-8"))
    assert backbones.PAGE.read_text(encoding="utf-8") == backbones.page(noted)
    found = [state for results in noted.values() for state, _ in results.values()]
    assert "broken" not in found and "refused-late" not in found
    assert f"**{backbones.count_full(noted)} kinds**" in (ROOT / "README.md").read_text(encoding="utf-8")


# --- where inputs reach layers that take no keywords


def test_first_forwards_in_two_threads_read_their_own_rows(bloom):
    """Two threads run the first forwards of a model at once, which learn how inputs reach its layers."""
    texts = [IDS, IDS.flip(1)]
    expected = [logits(bloom, ids) for ids in texts]
    model, barrier, found = copy.deepcopy(bloom), threading.Barrier(2), {}
    model.base_model._hands_on = None

    def run(index: int) -> None:
        barrier.wait()
        found[index] = [logits(model, texts[index]) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected[index]) for index in range(2) for one in found[index])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_read_their_own_rows_again(bloom, reentrant):
    model = copy.deepcopy(bloom)
    plain = backbones.table_gradients(model, IDS)
    backbones.checkpoint_layers(model, reentrant)
    # Another text runs before backward does; the replay must read the rows of the first one.
    torch.manual_seed(0)
    model.train().zero_grad()
    loss = model(IDS, labels=IDS).loss
    logits(model, IDS.flip(1))
    loss.backward()
    tables = [memory.table.weight for memory in model.base_model.memories().values()]
    torch.testing.assert_close(torch.cat([table.grad.flatten() for table in tables]), plain, rtol=1e-4, atol=1e-6)


def test_layer_replayed_outside_a_forward_is_refused(bloom):
    layer = bloom.transformer.h[1]
    with pytest.raises(ValueError, match=r"EngramBloomBlock ran outside of its model's forward"):
        checkpoint(layer, torch.zeros(1, 3, 64), use_reentrant=False)


@pytest.mark.parametrize("kind", ["bloom", "opt"])
def test_layers_wrapped_for_checkpointing_are_exact_or_refused(kind):
    """FSDP and accelerate wrap layers so; Bloom's layers take no keywords, so nothing reaches the replay."""
    model = with_memory(kind)
    plain = backbones.table_gradients(model, IDS)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, GradientCheckpointingLayer))
    if kind == "opt":
        assert backbones.relative(backbones.table_gradients(model, IDS), plain) < 1e-4
        return
    with pytest.raises(ValueError, match=r"checkpoint layers by gradient_checkpointing_enable\(\) alone"):
        backbones.table_gradients(model, IDS)


@pytest.mark.parametrize("kind", ["bloom", "opt"])
def test_replicas_in_threads_read_their_own_rows(kind, monkeypatch):
    """Torch's own `replicate` runs them as `DataParallel` does; only the copying between GPUs is done here."""

    def copies(tensors, devices, detach=False):
        return [[tensor.detach().clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(importlib.import_module("torch.nn.parallel.replicate"), "_broadcast_coalesced_reshape", copies)
    model, texts = with_memory(kind), [IDS, IDS.flip(1), IDS.roll(1, 0) + 1]
    replicas = torch.nn.parallel.replicate(model, [0, 1, 2], detach=True)
    with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
        found = list(pool.map(logits, replicas, texts))
    for text, one in zip(texts, found, strict=True):
        torch.testing.assert_close(one, logits(model, text))
    assert not torch.allclose(found[0], found[1])


@pytest.mark.slow
@torch.no_grad()
def test_compiled_model_reads_its_rows():
    """The graph breaks at each layer, once a forward has found that it must."""
    sizes = {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 120}
    config = EngramConfig.for_backbone(transformers.BloomConfig(**sizes), **{**MEMORY, "layer_ids": [0]})
    model = EngramForCausalLM(config).eval()
    expected = logits(model)
    assert torch.equal(torch.compile(model, backend="eager")(IDS, use_cache=False).logits, expected)


def test_gates_and_documents_work_with_heads_that_drop_keywords(bloom):
    gates = bloom.engram_gates(IDS)
    assert {layer: gate.shape for layer, gate in gates.items()} == {1: (2, 12, 1), 2: (2, 12, 1)}
    documents = torch.arange(12).div(6, rounding_mode="floor").expand(2, -1)
    apart = bloom.engram_gates(IDS, seq_idx=documents)[1]
    assert not torch.equal(apart[:, 6:], gates[1][:, 6:]) and torch.equal(apart[:, :6], gates[1][:, :6])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "gptj"])
def test_static_cache_handles_padding(kind):
    model = with_memory(kind)
    padded = torch.nn.functional.pad(IDS, (3, 0))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mask = torch.nn.functional.pad(torch.ones_like(IDS), (3, 0))
    dynamic = model.generate(padded, attention_mask=mask, **options)
    static = model.generate(padded, attention_mask=mask, cache_implementation="static", **options)
    assert torch.equal(dynamic, static) and torch.equal(dynamic[:, 3:], model.generate(IDS, **options))


# --- looped layers


@torch.no_grad()
@pytest.mark.skipif("dory" not in CONFIG_MAPPING, reason="this transformers has no dory")
def test_looped_layers_apply_memory_in_every_pass():
    model, passes = with_memory("dory"), []
    model.model.memories()[1].register_forward_hook(lambda *_: passes.append(1))
    whole = logits(model)
    assert len(passes) == model.config.n_recurrent_loops == 2
    assert backbones.cached_error(model, IDS) < 1e-4  # The convolution continues from its own pass.
    cache = model(IDS[:, :5], use_cache=True).cache
    assert set(cache.engram_history.conv_inputs) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    zeroed = copy.deepcopy(model)
    zeroed.model.memories()[1].zero_value_projection()
    assert not torch.equal(logits(zeroed), whole)


# --- pretrained, quantized, elsewhere


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_from_backbone_of_a_folder_with_memory_fraction(kind, tmp_path):
    host = bare(kind)
    before = logits(host)
    host.save_pretrained(tmp_path / "host")
    sizes = {name: MEMORY[name] for name in ("layer_ids", "engram_n_heads", "engram_head_dim")}
    model = EngramForCausalLM.from_backbone(str(tmp_path / "host"), memory_fraction=0.5, **sizes).eval()
    assert torch.equal(logits(model), before)
    memory = sum(parameter.numel() for name, parameter in model.named_parameters() if ".engram." in name)
    assert abs(memory / model.num_parameters() - 0.5) < 0.01
    backbones.wake(model)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path / "model").eval()), logits(model))
    mapped = EngramForCausalLM.from_pretrained(tmp_path / "model", engram_residency="mapped").eval()
    assert torch.equal(logits(mapped), logits(model))
    base = AutoModel.from_pretrained(tmp_path / "model").eval()
    assert isinstance(base, EngramModel) and base.memories().keys() == {1, 2}


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", ["opt", "falcon"])
def test_memory_on_a_quantized_backbone(kind, tmp_path):
    bare(kind).save_pretrained(tmp_path / "host")
    host = AutoModelForCausalLM.from_pretrained(
        tmp_path / "host", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    ).eval()
    before = logits(host)
    model = EngramForCausalLM.from_backbone(host, **MEMORY).eval()
    assert torch.equal(logits(model), before)
    backbones.wake(model)
    awake = logits(model)
    assert not torch.equal(awake, before)
    model.save_pretrained(tmp_path / "model")
    again = EngramForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert all(type(memory.kv_proj) is torch.nn.Linear for memory in again.base_model.memories().values())
    torch.testing.assert_close(logits(again), awake)


def test_memory_on_a_torchao_quantized_backbone(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    bare("opt").save_pretrained(tmp_path / "host")
    options = {"quantization_config": TorchAoConfig(quantization.Int8WeightOnlyConfig()), "dtype": torch.float32}
    host = AutoModelForCausalLM.from_pretrained(tmp_path / "host", **options).eval()
    before = logits(host)
    model = EngramForCausalLM.from_backbone(host, **MEMORY).eval()
    assert torch.equal(logits(model), before)
    backbones.wake(model)
    model.save_pretrained(tmp_path / "model")
    for residency in ("resident", "mapped"):
        again = EngramForCausalLM.from_pretrained(tmp_path / "model", engram_residency=residency).eval()
        assert type(again.model.decoder.layers[0].fc1.weight.data) is type(
            host.model.decoder.layers[0].fc1.weight.data
        )
        torch.testing.assert_close(logits(again), logits(model))


def test_remote_code_on_layers_of_other_names(tmp_path):
    models = {kind: with_memory(kind) for kind in ("opt", "bloom")}
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
    expected = {
        kind: model.generate(IDS, max_new_tokens=4, do_sample=False).tolist() for kind, model in models.items()
    }
    code = f"""{WITHOUT_PACKAGE}
import json, torch
from transformers import AutoModelForCausalLM
found = {{}}
for kind in {sorted(models)!r}:
    model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + kind, trust_remote_code=True).eval()
    found[kind] = model.generate(torch.tensor({IDS.tolist()}), max_new_tokens=4, do_sample=False).tolist()
print(json.dumps(found))
"""
    assert run_elsewhere(code, tmp_path) == expected


# --- what is refused, and as what it is


def model_of(name: str, config: str, **fields) -> torch.nn.Module:
    return getattr(transformers, name)(getattr(transformers, config)(**fields))


def _with_two_lists() -> torch.nn.Module:
    """Return a model in which no rule can tell which layer list its forward walks."""
    model = model_of("LlamaForCausalLM", "LlamaConfig", **_TINY)
    model.model.others = copy.deepcopy(model.model.layers)
    return model


_TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 120,
}
_TINY |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 120}
_BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
REFUSED = {
    "an encoder with a head": (
        lambda: model_of("BertLMHeadModel", "BertConfig", **_TINY),
        "BertLMHeadModel is an encoder",
    ),
    "an encoder": (
        lambda: model_of("ModernBertModel", "ModernBertConfig", **_TINY),
        "ModernBertModel generates no text: it is an encoder",
    ),
    "a masked model": (
        lambda: model_of("ModernBertForMaskedLM", "ModernBertConfig", **_TINY),
        "generates no text: it is an encoder",
    ),
    "an encoder-decoder": (
        lambda: model_of("BartForConditionalGeneration", "BartConfig", **_BART),
        "is an encoder-decoder",
    ),
    "the half of one": (
        lambda: model_of("BartForCausalLM", "BartConfig", **_BART),
        "BartForCausalLM is an encoder-decoder, or the decoder of one",
    ),
    "a reward model": (
        lambda: model_of("LlamaForSequenceClassification", "LlamaConfig", **_TINY),
        "LlamaForSequenceClassification is a classifier or reward model",
    ),
    "a model without head": (
        lambda: model_of("LlamaModel", "LlamaConfig", **_TINY),
        "without its language-model head",
    ),
    "sound": (lambda: model_of("WhisperForAudioClassification", "WhisperConfig", **_BART), "encoder-decoder"),
    "sound without tokens": (
        lambda: model_of(
            "HubertForCTC",
            "HubertConfig",
            **_TINY,
            conv_dim=(8,),
            conv_kernel=(3,),
            conv_stride=(2,),
            num_feat_extract_layers=1,
        ),
        "HubertForCTC reads no token ids",
    ),
    "an adapter": (
        lambda: get_peft_model(
            model_of("LlamaForCausalLM", "LlamaConfig", **_TINY), LoraConfig(task_type="CAUSAL_LM")
        ),
        "PeftModelForCausalLM is an adapter",
    ),
    "another module": (lambda: torch.nn.Linear(2, 2), "Linear is no model of transformers"),
    "a cache of its own": (lambda: bare("minimax"), "MiniMaxModel takes a MiniMaxCache of its own"),
    "a past of its own": (
        lambda: bare("recurrent_gemma"),
        "RecurrentGemmaModel does not return the cache that it takes",
    ),
    "several lists of layers": (
        _with_two_lists,
        r"LlamaModel must keep its \d decoder layers, .* \(layers, others\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_from_backbone_refuses_other_models(what):
    make, message = REFUSED[what]
    model = make()
    names = set(vars(model))
    with pytest.raises(ValueError, match=message):
        EngramForCausalLM.from_backbone(model, layer_ids=[1], engram_vocab_size=97)
    assert set(vars(model)) == names and not any("engram" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": {}}, "is an adapter"),
        ({"model_index.json": {}}, "is a diffusion model"),
        (
            {"config.json": {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}},
            "reward model",
        ),
        ({"config.json": {"model_type": "t5"}}, "is an encoder-decoder"),
        (
            {"config.json": {"model_type": "modernbert"}},
            "is of the kind 'modernbert', of which transformers has no causal",
        ),
        (
            {"config.json": {"model_type": "wav2vec2"}},
            "is of the kind 'wav2vec2', of which transformers has no causal",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_folder_of_an_unsupported_model_is_refused_before_loading(files, message, tmp_path):
    for name, fields in files.items():
        (tmp_path / name).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        EngramForCausalLM.from_backbone(tmp_path, layer_ids=[1])


def test_constructor_refuses_unsupported_models():
    config = EngramConfig.for_backbone(backbone_configs.config_of("minimax"), **MEMORY)
    for build in (EngramForCausalLM, EngramModel):
        with pytest.raises(ValueError, match="MiniMaxModel takes a MiniMaxCache of its own"):
            build(config)


def test_layers_with_two_sublayers_are_counted_once():
    config = CONFIG_MAPPING["longcat_flash"](**backbone_configs.OWN["longcat_flash"])
    with pytest.raises(
        ValueError, match=r"engram_layer_ids \[4\] must lie in 0\.\.3, the 4 decoder layers of LongcatFlashModel"
    ):
        EngramForCausalLM(EngramConfig.for_backbone(config, layer_ids=[4], engram_vocab_size=97))
