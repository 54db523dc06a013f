"""The fusion of rows into the streams: known answers, a second implementation, gradients, and causality."""

import copy
import pickle

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from tiny_backbones import BACKBONES, engram_config, randomize
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from engram_hf import EngramConfig, layer_engram
from engram_hf.cache_engram import EngramHistory
from engram_hf.hashing_engram import Compaction
from engram_hf.layer_engram import EngramInputs, EngramMemory, LayerWithMemory, add_memory_to_layer

VARIANTS = ["paper", "v4.1"]
HIDDEN, LENGTH = 8, 20
REACH = 12  # The minimum holds for every memory in this file.


def make_memory(variant: str = "paper", streams: int = 2, dtype=torch.float64, **fields) -> EngramMemory:
    """Return a layer whose parameters all matter: a nonzero convolution and norm weights other than one."""
    backbone = LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=2, num_hidden_layers=2, vocab_size=64, hc_mult=streams
    )
    size = {"engram_max_ngram_size": 3, "engram_n_heads": 2, "engram_head_dim": 4, "engram_vocab_size": 5, **fields}
    config = EngramConfig.for_backbone(backbone, layer_ids=[0, 1], variant=variant, **size)
    return randomize(EngramMemory(config, index=1, dtype=dtype))


def make_inputs(valid=None, sequence_ids=None, past_sequence_ids=None, history=None) -> EngramInputs:
    """Return inputs without padding; `past_sequence_ids` `[B, P]` are the documents of the positions before."""
    documents = sequence_ids
    if sequence_ids is not None:
        past = sequence_ids[:, :0] if past_sequence_ids is None else past_sequence_ids[:, -REACH:]
        documents = F.pad(torch.cat([past, sequence_ids], dim=1), (REACH - past.shape[1], 0), value=-1)
    return EngramInputs(torch.empty(0), Compaction(None), valid=valid, documents=documents, history=history)


def random_states(streams: int = 2, length: int = LENGTH, dtype=torch.float64, seed: int = 3):
    """Return streams `[2, S, G, D]` and gathered rows `[2, S, 16]`."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((2, length, streams, HIDDEN), generator=generator, dtype=torch.float64)
    rows = torch.randn((2, length, 16), generator=generator, dtype=torch.float64)
    return hidden.to(dtype), rows.to(dtype)


def documents(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)


def two_invalid() -> torch.Tensor:
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[0, :3] = valid[1, 9] = valid[:, 14] = False
    return valid


def watch_gates(memory: EngramMemory) -> list[torch.Tensor]:
    gates = []
    memory.gate.register_forward_hook(lambda module, args, gate: gates.append(gate))
    return gates


def reference_fuse(memory: EngramMemory, hidden: torch.Tensor, rows: torch.Tensor, valid=None) -> torch.Tensor:
    """Compute one document as the paper writes it, with torch's own norm and convolution."""
    streams, channels = hidden.shape[-2:]

    def norm(states, module):
        return F.rms_norm(states, (channels,), eps=module.eps) * module.weight

    parts = memory.kv_proj(rows).split(channels, dim=-1)
    keys, value = torch.stack(parts[:streams], dim=-2), parts[-1]
    dot = (norm(hidden, memory.q_norm) * norm(keys, memory.k_norm)).sum(-1) / channels**0.5
    gate = torch.sigmoid(dot.sign() * dot.abs().clamp(min=1e-6).sqrt())
    if valid is not None:
        gate = torch.where(valid[..., None], gate, 0.0)
    update = gate[..., None] * value[..., None, :]
    if memory.conv is None:
        return hidden + update
    reach = (memory.conv.kernel_size[0] - 1) * memory.conv.dilation[0]
    channels_first = norm(update, memory.conv_norm).flatten(2).transpose(1, 2)
    mixed = nn.Conv1d.forward(memory.conv, F.pad(channels_first, (reach, 0))).transpose(1, 2).view_as(update)
    return hidden + update + F.silu(mixed)


def gradients(memory: EngramMemory, fuse, hidden, rows, *args):
    """Return the outputs of `fuse`, and the gradients of a weighted sum of them for streams, rows and every parameter."""
    hidden, rows = hidden.clone().requires_grad_(), rows.clone().requires_grad_()
    out = fuse(hidden, rows, *args)
    parameters = [parameter for name, parameter in memory.named_parameters() if name != "table.weight"]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad((out * weights).sum(), [hidden, rows, *parameters])


# --- known answers


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("variant", "file"), [("paper", "fusion_paper"), ("v4.1", "fusion_v41")])
def test_fuse_matches_the_known_answers(golden, variant, file, dtype, tolerance):
    known = load_file(golden / "known_answers" / f"{file}.safetensors")
    config = engram_config(
        "deepseek_v4", variant, engram_max_ngram_size=3, engram_n_heads=2, engram_head_dim=16, engram_vocab_size=5
    )
    memory = EngramMemory(config, index=0, dtype=torch.float64)
    weights = {
        "table.weight": memory.table.weight,
        "kv_proj.weight": torch.cat([known["key_weight"].flatten(0, 1), known["value_weight"]]),
        "q_norm.weight": known["query_norm"],
        "k_norm.weight": known["key_norm"],
    }
    if variant == "paper":
        weights["kv_proj.bias"] = torch.cat([known["key_bias"].flatten(), known["value_bias"]])
        weights["conv.weight"] = known["conv_weight"].unsqueeze(1)
        weights["conv_norm.weight"] = known["conv_norm"]
    memory.load_state_dict(weights)
    gates = watch_gates(memory.to(dtype))
    out = memory.fuse(known["streams"].to(dtype), known["rows"].flatten(-2).to(dtype), make_inputs())
    torch.testing.assert_close(gates[0], known["gate"].to(dtype), rtol=0, atol=tolerance)
    torch.testing.assert_close(out, known["out"].to(dtype), rtol=0, atol=tolerance)


# --- a second implementation


@pytest.mark.parametrize("has_invalid", [False, True], ids=["all_valid", "some_invalid"])
@pytest.mark.parametrize("lengths", [[LENGTH], [7, 13], [1, 2, 17]], ids=["one", "two", "three"])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fuse_and_its_gradients_equal_the_reference(variant, streams, lengths, has_invalid):
    memory, states = make_memory(variant, streams), random_states(streams)
    valid = two_invalid() if has_invalid else None
    inputs = make_inputs(valid=valid, sequence_ids=documents(lengths))

    def one_by_one(hidden, rows):
        masks = [None] * len(lengths) if valid is None else valid.split(lengths, dim=1)
        parts = zip(hidden.split(lengths, dim=1), rows.split(lengths, dim=1), masks, strict=True)
        return torch.cat([reference_fuse(memory, *part) for part in parts], dim=1)

    out, grads = gradients(memory, memory.fuse, *states, inputs)
    expected, expected_grads = gradients(memory, one_by_one, *states)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kernel", [1, 2, 5])
def test_fuse_with_any_kernel_size(kernel):
    memory, states = make_memory(engram_conv_kernel_size=kernel), random_states()
    torch.testing.assert_close(memory.fuse(*states, make_inputs()), reference_fuse(memory, *states))


def test_dilation_is_the_largest_ngram_order():
    assert make_memory(engram_max_ngram_size=4).conv.dilation == (4,)


# --- gradients


@pytest.mark.parametrize("history", [False, True], ids=["fresh", "history"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_of_fuse(variant, history):
    """Streams, rows, every weight and the past convolution inputs are checked, with an invalid position and two
    documents.
    """
    memory = make_memory(variant, streams=2)
    names = [name for name, _ in memory.named_parameters() if name != "table.weight"]
    length, reach = 6, 9
    valid = torch.tensor([[True] * 6, [True, True, False, True, True, True]])
    sequence_ids = torch.tensor([[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 1]])

    def fuse(hidden, rows, past, *parameters):
        layer = None
        if history:
            layer = EngramHistory(owner=(), reach=reach)
            layer.conv_inputs[memory.index, 0] = past
        inputs = make_inputs(
            valid=valid,
            sequence_ids=sequence_ids,
            past_sequence_ids=torch.ones(2, reach, dtype=torch.int64) if history else None,
            history=layer,
        )
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(
            _Fuse(memory), {f"memory.{k}": v for k, v in weights.items()}, (hidden, rows, inputs)
        )

    hidden, rows = random_states(length=length)
    past = torch.randn((2, reach, 2, HIDDEN), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = [dict(memory.named_parameters())[name].detach() for name in names]
    arguments = [tensor.clone().requires_grad_() for tensor in (hidden, rows, past, *parameters)]
    assert torch.autograd.gradcheck(fuse, arguments, fast_mode=True)
    used = torch.autograd.grad(fuse(*arguments).sum(), arguments, allow_unused=True)
    assert (used[2] is not None and bool(used[2].any())) == (history and variant == "paper")
    assert all(bool(grad.any()) for index, grad in enumerate(used) if index != 2)


class _Fuse(nn.Module):
    def __init__(self, memory: EngramMemory):
        super().__init__()
        self.memory = memory

    def forward(self, *args):
        return self.memory.fuse(*args)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_of_the_table(variant):
    memory = make_memory(variant)
    hidden, _ = random_states(length=5)
    row_ids = torch.randint(0, memory.table.num_rows, (2, 2, 5, 4), generator=torch.Generator().manual_seed(0))

    def forward(hidden, table):
        return torch.func.functional_call(
            memory, {"table.weight": table}, (hidden, EngramInputs(row_ids, Compaction(None)))
        )

    table = memory.table.weight.detach().clone()
    assert torch.autograd.gradcheck(forward, (hidden.requires_grad_(), table.requires_grad_()), fast_mode=True)


# --- the gate


@pytest.mark.parametrize(("variant", "expected"), [("paper", 0.5), ("v4.1", 0.50025)])
def test_gate_of_a_product_of_exactly_zero(variant, expected):
    """Without rows the key is zero: the demo's sign of zero is 0, the release's is +1."""
    memory = make_memory(variant, dtype=torch.float32, engram_bias=False)
    gates = watch_gates(memory)
    hidden, rows = random_states(dtype=torch.float32)
    out = memory.fuse(hidden, torch.zeros_like(rows), make_inputs())
    torch.testing.assert_close(gates[0], torch.full_like(gates[0], expected), rtol=0, atol=1e-6)
    assert torch.equal(out, hidden)


def test_signs_of_the_gate():
    memory = make_memory(engram_bias=False, engram_conv_kernel_size=0)
    gates = watch_gates(memory)
    hidden, rows = random_states()
    for sign in (1, -1):
        memory.fuse(sign * hidden, rows, make_inputs())
    torch.testing.assert_close(gates[0] + gates[1], torch.ones_like(gates[0]))
    assert gates[0].min() < 0.4 and gates[0].max() > 0.6


# --- causality and documents


def changed_outputs(memory, inputs, position: int, batch: int = 0) -> torch.Tensor:
    """Return the positions `[B, S]` whose outputs change with the streams and rows of one position."""
    hidden, rows = random_states()
    before = memory.fuse(hidden, rows, inputs)
    hidden, rows = hidden.clone(), rows.clone()
    hidden[batch, position] += 1
    rows[batch, position] -= 1
    return (memory.fuse(hidden, rows, inputs) != before).flatten(2).any(-1)


def positions(flags: torch.Tensor) -> list[int]:
    return flags.nonzero().flatten().tolist()


def test_convolution_reaches_its_taps_only():
    changed = changed_outputs(make_memory(), make_inputs(), position=5)
    assert positions(changed[0]) == [5, 8, 11, 14]
    assert not changed[1].any()
    assert positions(changed_outputs(make_memory("v4.1"), make_inputs(), position=5)[0]) == [5]


def test_documents_do_not_leak():
    changed = changed_outputs(make_memory(), make_inputs(sequence_ids=documents([10, 10])), position=5)
    assert positions(changed[0]) == [5, 8]


@pytest.mark.parametrize("variant", VARIANTS)
def test_invalid_positions_contribute_nothing(variant):
    """Only the invalid position's own streams change, by the amount added to them."""
    memory, inputs = make_memory(variant), make_inputs(valid=two_invalid())
    assert positions(changed_outputs(memory, inputs, position=9, batch=1)[1]) == [9]
    hidden, rows = random_states()
    out = memory.fuse(hidden, rows, inputs)
    assert torch.equal(out[0, :3], hidden[0, :3])


def test_invalid_positions_get_exactly_no_memory_in_v41():
    hidden, rows = random_states()
    same = (make_memory("v4.1").fuse(hidden, rows, make_inputs(valid=two_invalid())) == hidden).flatten(2).all(-1)
    assert torch.equal(same, ~two_invalid())


def test_fuse_gives_no_nan_at_invalid_positions():
    """The norm of the convolution gets rows of zeros."""
    memory = make_memory(dtype=torch.float32)
    hidden, rows = random_states(dtype=torch.float32)
    out, grads = gradients(memory, memory.fuse, hidden, rows, make_inputs(valid=torch.zeros(2, LENGTH).bool()))
    assert torch.equal(out, hidden)
    assert all(grad.isfinite().all() for grad in grads)


# --- history


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fuse_in_chunks_equals_one_call(variant, size):
    memory, (hidden, rows) = make_memory(variant), random_states()
    sequence_ids, valid = documents([9, 11]), two_invalid()
    whole = memory.fuse(hidden, rows, make_inputs(valid=valid, sequence_ids=sequence_ids))
    history, parts = EngramHistory(owner=(), reach=9), []
    for start in range(0, LENGTH, size):
        now = slice(start, start + size)
        inputs = make_inputs(
            valid=valid[:, now],
            sequence_ids=sequence_ids[:, now],
            past_sequence_ids=sequence_ids[:, :start],
            history=history,
        )
        history.stage(sequence_ids[:, now], sequence_ids[:, now], inputs.compaction, False)
        parts.append(memory.fuse(hidden[:, now], rows[:, now], inputs))
        history.commit()
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)


# --- shapes and dtypes


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block", [1, 14, 2 * LENGTH - 1])
def test_long_prompt_is_fused_in_blocks(monkeypatch, variant, block):
    """Without gradients, a few tokens are fused at a time, which a hook on the gate cannot observe."""
    memory, (hidden, rows) = make_memory(variant), random_states()
    inputs = make_inputs(valid=two_invalid())
    whole = memory.fuse(hidden, rows, inputs)
    gates, projected = watch_gates(memory), []
    memory.kv_proj.register_forward_hook(lambda module, args, output: projected.append(output.shape[:2].numel()))
    monkeypatch.setattr(layer_engram, "_BLOCK_TOKENS", block)
    with torch.no_grad():
        torch.testing.assert_close(memory.fuse(hidden, rows, inputs), whole.detach())
    assert [gate.shape for gate in gates] == [(2, LENGTH, 2)]
    assert sum(projected) == 2 * LENGTH and max(projected) <= max(block, 2)


def test_offloaded_weights_are_fetched_once_for_a_long_prompt(monkeypatch):
    memory, (hidden, rows), calls = make_memory(), random_states(), []
    accelerate.cpu_offload(memory, execution_device="cpu")
    fetch = memory.kv_proj._hf_hook.pre_forward
    monkeypatch.setattr(
        memory.kv_proj._hf_hook, "pre_forward", lambda *args, **kwargs: calls.append(1) or fetch(*args, **kwargs)
    )
    monkeypatch.setattr(layer_engram, "_BLOCK_TOKENS", 4)
    with torch.no_grad():
        memory.fuse(hidden, rows, make_inputs())
    assert len(calls) == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_stream_may_omit_its_axis(variant):
    memory, (hidden, rows) = make_memory(variant, streams=1), random_states(streams=1)
    out = memory.fuse(hidden.squeeze(2), rows, make_inputs())
    assert out.shape == (2, LENGTH, HIDDEN)
    assert torch.equal(out.unsqueeze(2), memory.fuse(hidden, rows, make_inputs()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_streams_keep_their_dtype_and_gates_are_float32(variant, dtype):
    memory, (hidden, rows) = make_memory(variant), random_states()
    exact = memory.fuse(hidden, rows, make_inputs())
    gates = watch_gates(memory.to(dtype))
    out = memory.fuse(hidden.to(dtype), rows.to(dtype), make_inputs())
    assert out.dtype == dtype
    assert gates[0].dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=40 * torch.finfo(dtype).eps)


def test_autocast_keeps_the_streams_in_float32():
    memory, (hidden, rows) = make_memory(dtype=torch.float32), random_states(dtype=torch.float32)
    expected = memory.fuse(hidden, rows, make_inputs())
    with torch.autocast("cpu", torch.bfloat16):
        out = memory.fuse(hidden, rows, make_inputs())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_value_projection_changes_nothing(variant, dtype):
    memory, (hidden, rows) = make_memory(variant, dtype=dtype), random_states(dtype=dtype)
    assert not torch.equal(memory.fuse(hidden, rows, make_inputs()), hidden)
    memory.zero_value_projection()
    assert torch.equal(memory.fuse(hidden, rows, make_inputs()), hidden)
    _, grads = gradients(memory, memory.fuse, hidden, rows, make_inputs())
    assert grads[2][-HIDDEN:].any()  # The value rows of the projection still get a gradient.


def test_forward_reads_the_rows_of_its_own_layer():
    memory, (hidden, _) = make_memory(), random_states()
    row_ids = torch.randint(0, memory.table.num_rows, (2, 2, LENGTH, 4), generator=torch.Generator().manual_seed(0))
    rows = memory.table.weight[row_ids[1]].flatten(-2)
    assert torch.equal(
        memory(hidden, EngramInputs(row_ids, Compaction(None))), memory.fuse(hidden, rows, make_inputs())
    )


# --- inside a decoder layer


@pytest.fixture(scope="module")
def config() -> EngramConfig:
    return engram_config("mixtral")


@pytest.fixture
def decoder_layer(config) -> MixtralDecoderLayer:
    layer = MixtralDecoderLayer(BACKBONES["mixtral"](), layer_idx=1)
    add_memory_to_layer(layer, config, index=0)
    return randomize(layer).eval()


def run_layer(layer: nn.Module, config: EngramConfig, with_memory: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((1, 6, 32), generator=generator)
    row_ids = torch.randint(0, min(config.engram_num_embeddings), (2, 1, 6, 4), generator=generator)
    memory = {"engram_inputs": EngramInputs(row_ids, Compaction(None))} if with_memory else {}
    rotary = (torch.ones(1, 6, 8), torch.zeros(1, 6, 8))
    return layer(hidden, position_embeddings=rotary, attention_mask=None, **memory)


@torch.no_grad()
def test_layer_with_memory_keeps_its_class(decoder_layer, config):
    assert isinstance(decoder_layer, MixtralDecoderLayer)
    plain = MixtralDecoderLayer(BACKBONES["mixtral"](), layer_idx=1).eval()
    plain.load_state_dict({k: v for k, v in decoder_layer.state_dict().items() if not k.startswith("engram.")})
    expected = run_layer(plain, config, with_memory=False)
    assert not torch.equal(run_layer(decoder_layer, config), expected)
    decoder_layer.engram.zero_value_projection()
    assert torch.equal(run_layer(decoder_layer, config), expected)
    with pytest.raises(ValueError, match="EngramMixtralDecoderLayer ran outside of its model's forward"):
        run_layer(decoder_layer, config, with_memory=False)
    other = MixtralDecoderLayer(BACKBONES["mixtral"](), layer_idx=2)
    add_memory_to_layer(other, config, index=1)
    assert type(other) is type(decoder_layer)


def test_add_memory_uses_the_layers_device_and_the_given_dtype(config):
    layer = MixtralDecoderLayer(BACKBONES["mixtral"](), layer_idx=1).to("meta")
    add_memory_to_layer(layer, config, index=0, dtype=torch.bfloat16)
    assert {(p.dtype, p.device.type) for p in layer.engram.parameters()} == {(torch.bfloat16, "meta")}


def test_layer_with_a_replaced_forward_is_refused(config):
    layer = MixtralDecoderLayer(BACKBONES["mixtral"](), layer_idx=1)
    layer.forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(ValueError, match="forward of a MixtralDecoderLayer was replaced"):
        add_memory_to_layer(layer, config, index=0)


def test_second_memory_is_refused(decoder_layer, config):
    with pytest.raises(ValueError, match="already has Engram memory; start from the backbone"):
        add_memory_to_layer(decoder_layer, config, index=0)


@torch.no_grad()
def test_layer_with_memory_can_be_deep_copied(decoder_layer, config):
    twin = copy.deepcopy(decoder_layer)
    assert type(twin) is type(decoder_layer)
    assert torch.equal(run_layer(twin, config), run_layer(decoder_layer, config))
    twin.engram.zero_value_projection()
    assert not torch.equal(run_layer(twin, config), run_layer(decoder_layer, config))


@torch.no_grad()
def test_layer_with_memory_can_be_pickled(decoder_layer, config):
    """No module contains its class, so the pickle must name the class it extends (nothing is unpickled here)."""
    assert b"MixtralDecoderLayer" in pickle.dumps(decoder_layer)
    rebuild, arguments, state = decoder_layer.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    assert arguments == (LayerWithMemory, MixtralDecoderLayer)
    twin = rebuild(*arguments)
    twin.__setstate__(state)
    assert type(twin) is type(decoder_layer)
    assert torch.equal(run_layer(twin, config), run_layer(decoder_layer, config))


def test_class_that_a_layer_extends_is_found_under_a_wrapper(decoder_layer):
    """FSDP and other wrappers put their own class in front of the layer's."""
    decoder_layer.__class__ = type("Wrapped", (type(decoder_layer),), {})
    assert isinstance(decoder_layer, LayerWithMemory)
    assert decoder_layer.__reduce_ex__(pickle.HIGHEST_PROTOCOL)[1] == (LayerWithMemory, MixtralDecoderLayer)
