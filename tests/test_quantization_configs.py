"""`quantization_config` quantizes linear layers and never tables, and the residency of the tables changes no value.

bitsandbytes runs on a CPU. Layers are a multiple of 64 wide, because it packs four-bit weights in blocks of 64 there.
It packs in the first forward and does not unpack all of them exactly, so models are saved before it.
"""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny_backbones import BACKBONES, LAYER_IDS, random_ids, randomize
from torch import nn
from transformers import (
    AqlmConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
)
from transformers.quantizers import AutoHfQuantizer

from engram_hf import EngramConfig, EngramForCausalLM
from engram_hf.convert_scripts import convert_deepseek_v41
from engram_hf.training import EngramRowsConfig, scan_rows

IDS = random_ids(2, 9)
SIZE = {"engram_n_heads": 2, "engram_head_dim": 32, "engram_vocab_size": 97}
QUANTIZERS = {
    "8 bit": lambda **options: BitsAndBytesConfig(load_in_8bit=True, **options),
    "nf4": lambda **options: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options),
    "nf4 twice": lambda **options: QUANTIZERS["nf4"](bnb_4bit_use_double_quant=True, **options),
}
PLACES = [("resident", "together"), ("resident", "apart"), ("mapped", "together"), ("mapped", "apart")]
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)

# bitsandbytes computes in float16 and warns so once per layer.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


def wide(name: str) -> PreTrainedConfig:
    config = BACKBONES[name]()
    config.hidden_size = config.intermediate_size = 64
    config.head_dim = 16
    return config


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def tables(model) -> list[torch.Tensor]:
    """Return all rows and scales as bytes, for any residency."""
    stored = []
    for memory in model.model.memories().values():
        table = memory.table
        found = (
            table.fetch(torch.arange(table.num_rows)) if table.is_resident else table.source.read(0, table.num_rows)
        )
        stored += [tensor.view(torch.uint8) for tensor in found if tensor is not None]
    return stored


def not_quantized(model: nn.Module) -> set[str]:
    """Return the names of linear layers with plain weights."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name for name, module in linear.items() if type(module.weight) is nn.Parameter}


@pytest.fixture(scope="module", params=[None, "float8_e4m3fn", "int8"])
def saved(request, tmp_path_factory):
    """Return a model and its two folders: tables among its weights, and tables in files of their own."""
    folder = tmp_path_factory.mktemp("quantized")
    config = EngramConfig.for_backbone(
        wide("llama"), layer_ids=LAYER_IDS, variant="paper", engram_table_dtype=request.param, **SIZE
    )
    model = randomize(EngramForCausalLM(config)).eval()
    model.save_pretrained(folder / "together")
    mapped = EngramForCausalLM.from_pretrained(folder / "together", engram_residency="mapped")
    mapped.save_pretrained(folder / "apart")
    return model, folder


@every_quantizer
def test_quantization_covers_every_linear_layer_and_no_table(saved, quantizer):
    model, folder = saved
    seen = []
    for residency, where in PLACES:
        quantized = EngramForCausalLM.from_pretrained(
            folder / where, engram_residency=residency, quantization_config=QUANTIZERS[quantizer]()
        )
        assert not_quantized(quantized) == {"lm_head"}
        for memory in quantized.model.memories().values():
            assert memory.table.is_resident == (residency == "resident")
        assert all(map(torch.equal, tables(quantized), tables(model)))
        seen.append((logits(quantized), quantized.generate(IDS, max_new_tokens=4, do_sample=False)))
    assert all(torch.equal(one, seen[0][0]) and torch.equal(text, seen[0][1]) for one, text in seen)
    error = (seen[0][0] - logits(model)).abs().mean() / logits(model).std()
    assert 0 < error < (0.05 if quantizer == "8 bit" else 0.25)


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_unquantized_layers_have_the_requested_dtype(saved, quantizer, dtype):
    folder = saved[1]
    options = {"quantization_config": QUANTIZERS[quantizer](), "dtype": dtype}
    resident, mapped = (
        EngramForCausalLM.from_pretrained(folder / where, engram_residency=residency, **options)
        for residency, where in (("resident", "together"), ("mapped", "apart"))
    )
    expected = torch.float32 if dtype == "auto" else dtype
    assert resident.lm_head.weight.dtype == mapped.model.memories()[1].k_norm.weight.dtype == expected
    assert resident.model.memories()[1].table.weight.dtype in (expected, torch.float8_e4m3fn, torch.int8)
    assert logits(mapped).dtype == expected and torch.equal(logits(mapped), logits(resident))


@every_quantizer
@pytest.mark.parametrize(("residency", "where"), [PLACES[0], PLACES[-1]])
def test_quantized_model_saves_and_loads(saved, tmp_path, quantizer, residency, where):
    model, folder = saved
    quantized = EngramForCausalLM.from_pretrained(
        folder / where, engram_residency=residency, quantization_config=QUANTIZERS[quantizer]()
    )
    quantized.save_pretrained(tmp_path)
    for again in ("resident", "mapped"):
        loaded = EngramForCausalLM.from_pretrained(tmp_path, engram_residency=again)
        assert loaded.model.memories()[1].table.is_resident == (again == "resident")
        assert not_quantized(loaded) == {"lm_head"} and all(map(torch.equal, tables(loaded), tables(model)))
        assert torch.equal(logits(loaded), logits(quantized))
    base = AutoModel.from_pretrained(tmp_path, engram_residency="mapped")
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, quantized.model(IDS).last_hidden_state)


@every_quantizer
def test_memory_can_be_excluded_from_quantization(saved, quantizer):
    options = {"llm_int8_skip_modules": ["engram.kv_proj", "lm_head"]}
    resident, mapped = (
        AutoModelForCausalLM.from_pretrained(
            saved[1] / "apart", engram_residency=residency, quantization_config=QUANTIZERS[quantizer](**options)
        )
        for residency in ("resident", "mapped")
    )
    projections = {f"model.layers.{layer}.engram.kv_proj" for layer in LAYER_IDS}
    assert not_quantized(resident) == not_quantized(mapped) == {*projections, "lm_head"}
    assert torch.equal(logits(resident), logits(mapped))


def test_experts_stay_floats_beside_quantized_layers(tmp_path):
    """On the bare backbone, too, stacked experts are not linear layers, so these quantizers leave them alone."""
    config = EngramConfig.for_backbone(wide("mixtral"), layer_ids=LAYER_IDS, variant="v4.1", **SIZE)
    randomize(EngramForCausalLM(config)).save_pretrained(tmp_path)
    resident, mapped = (
        EngramForCausalLM.from_pretrained(
            tmp_path, engram_residency=residency, quantization_config=QUANTIZERS["8 bit"]()
        )
        for residency in ("resident", "mapped")
    )
    assert resident.model.layers[1].mlp.experts.down_proj.dtype == torch.float32
    torch.testing.assert_close(logits(resident), logits(mapped), rtol=0, atol=1e-5)


LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "engram.kv_proj"])


def trained(model: PeftModel, steps: int = 6) -> list[float]:
    """Return the losses of a few steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@every_quantizer
def test_lora_on_quantized_layers_beside_a_mapped_table(saved, tmp_path, quantizer):
    model, folder = saved

    def load(residency: str):
        options = {"engram_residency": residency, "quantization_config": QUANTIZERS[quantizer]()}
        return prepare_model_for_kbit_training(EngramForCausalLM.from_pretrained(folder / "apart", **options))

    adapted = get_peft_model(load("mapped"), copy.deepcopy(LORA))
    kinds = {
        type(adapted.get_submodule(f"base_model.model.model.layers.1.{name}")).__name__
        for name in ("self_attn.q_proj", "engram.kv_proj")
    }
    assert kinds == {"Linear8bitLt" if quantizer == "8 bit" else "Linear4bit"}
    losses = trained(adapted)
    assert losses[-1] < 0.8 * losses[0]
    assert all(map(torch.equal, tables(adapted.base_model.model), tables(model)))
    adapted.save_pretrained(tmp_path)
    adapters = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1.2 * adapters + 10_000
    again = PeftModel.from_pretrained(load("resident"), tmp_path).eval()
    assert torch.equal(logits(again), logits(adapted))


def test_training_rows_of_a_mapped_table_beside_quantized_layers(saved, tmp_path):
    folder, options = saved[1] / "apart", {"engram_residency": "mapped"}
    model = EngramForCausalLM.from_pretrained(folder, **options, quantization_config=QUANTIZERS["nf4"]())
    rows = scan_rows([{"input_ids": IDS}], None, model)
    adapted = get_peft_model(model, EngramRowsConfig(rows=rows))
    losses = trained(adapted)
    assert losses[-1] < 0.9 * losses[0]
    adapted.save_pretrained(tmp_path)
    again = EngramForCausalLM.from_pretrained(folder, **options, quantization_config=QUANTIZERS["nf4"]())
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path).eval()), logits(adapted))


@pytest.mark.parametrize("link", [[], ["--link-tables"]], ids=["copied", "linked"])
def test_fp8_weights_beside_fp8_tables(golden, tmp_path, link):
    """The config of a converted release has a `quantization_config`; on a CPU its weights are decoded and its tables
    are not.
    """
    assert convert_deepseek_v41.main([str(golden / "deepseek_v41_tiny"), str(tmp_path / "kept"), *link]) == 0
    resident, mapped = (
        EngramForCausalLM.from_pretrained(tmp_path / "kept", engram_residency=residency, dtype=torch.bfloat16)
        for residency in ("resident", "mapped")
    )
    layer = resident.config.engram_layer_ids[0]
    assert resident.model.memories()[layer].table.weight.dtype == torch.float8_e4m3fn
    assert not mapped.model.memories()[layer].table.is_resident
    assert all(map(torch.equal, tables(resident), tables(mapped)))
    assert torch.equal(logits(resident), logits(mapped))
    mapped.save_pretrained(tmp_path / "saved")
    again = EngramForCausalLM.from_pretrained(tmp_path / "saved", engram_residency="mapped")
    assert torch.equal(logits(again), logits(mapped))


# --- memory added to a backbone that is quantized already -------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    randomize(AutoModelForCausalLM.from_config(wide("mixtral"))).save_pretrained(folder)
    return folder


@every_quantizer
def test_memory_on_a_quantized_backbone(backbone, tmp_path, quantizer):
    host = AutoModelForCausalLM.from_pretrained(backbone, quantization_config=QUANTIZERS[quantizer]())
    expected = logits(host)
    model = EngramForCausalLM.from_backbone(
        backbone, layer_ids=LAYER_IDS, quantization_config=QUANTIZERS[quantizer](), **SIZE
    )
    projections = {f"model.layers.{layer}.engram.kv_proj" for layer in LAYER_IDS}
    assert not_quantized(model) == {*projections, "lm_head"}
    model.save_pretrained(tmp_path / "undescribed")
    assert torch.equal(logits(model), expected)
    for residency in ("resident", "mapped"):
        loaded = EngramForCausalLM.from_pretrained(tmp_path / "undescribed", engram_residency=residency)
        assert not_quantized(loaded) == {*projections, "lm_head"}
        # Experts are multiplied in another order if their weights begin at another address.
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    fresh = EngramForCausalLM.from_pretrained(tmp_path / "undescribed", engram_residency="mapped")
    options = {"target_modules": ["q_proj"], "modules_to_save": ["kv_proj", "k_norm"]}
    losses = trained(get_peft_model(fresh, LoraConfig(task_type="CAUSAL_LM", r=4, **options)))
    assert losses[-1] < losses[0]


def test_from_backbone_refuses_a_quantizer_that_cannot_skip_modules():
    host = AutoModelForCausalLM.from_config(wide("llama"))
    host.hf_quantizer = AutoHfQuantizer.from_config(AqlmConfig())
    with pytest.raises(ValueError, match="AqlmConfig cannot leave the memory out"):
        EngramForCausalLM.from_backbone(host, layer_ids=LAYER_IDS, **SIZE)
