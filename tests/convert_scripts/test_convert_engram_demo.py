"""The converted memory of the demo computes the demo's formulas on a backbone."""

import math

import pytest
import torch
import torch.nn.functional as F
from checkpoint_tools import contents
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from engram_hf import EngramForCausalLM
from engram_hf.convert_scripts import convert_engram_demo
from engram_hf.table_format_engram import draw_primes

pytestmark = pytest.mark.any_version

HIDDEN, HEADS, WIDTH, KERNEL, LAYERS = 32, 2, 8, 4, (1, 2)
WORDS = ["the", "The", "cat", "Cat", "sat", "on", "mat", "MAT", "a", "A", "?", "!"]
BUCKETS = 40


def demo_state(streams, layers=LAYERS, max_ngram=3):
    """Return a random state dict with the demo's names and shapes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    primes = draw_primes(len(layers), (BUCKETS,) * (max_ngram - 1), HEADS)
    width = (max_ngram - 1) * HEADS * WIDTH
    state = {}
    for layer, orders in zip(layers, primes, strict=True):
        sizes = torch.tensor(orders).flatten()
        tensors = {
            "multi_head_embedding.embedding.weight": draw(int(sizes.sum()), WIDTH),
            "multi_head_embedding.offsets": sizes.cumsum(0) - sizes,
            "value_proj.weight": draw(HIDDEN, width),
            "value_proj.bias": draw(HIDDEN),
            "short_conv.conv.weight": draw(streams * HIDDEN, 1, KERNEL),
        }
        for stream in range(streams):
            tensors |= {
                f"key_projs.{stream}.weight": draw(HIDDEN, width),
                f"key_projs.{stream}.bias": draw(HIDDEN),
                f"norm1.{stream}.weight": 1 + draw(HIDDEN),
                f"norm2.{stream}.weight": 1 + draw(HIDDEN),
                f"short_conv.norms.{stream}.weight": 1 + draw(HIDDEN),
            }
        state |= {f"layers.{layer}.engram.{name}": tensor for name, tensor in tensors.items()}
    return state


def demo_forward(state, layer, streams, rows, max_ngram=3):
    """Compute the output of a demo layer on streams `[B, S, G, D]`, from gathered `rows` `[B, S, heads * width]`."""
    get = {name.split(".engram.")[1]: tensor for name, tensor in state.items() if name.startswith(f"layers.{layer}.")}
    count = streams.shape[2]

    def rms(x, weight, eps):
        return F.rms_norm(x, (HIDDEN,), weight, eps)

    value = F.linear(rows, get["value_proj.weight"], get["value_proj.bias"])
    gated = []
    for stream in range(count):
        key = F.linear(rows, get[f"key_projs.{stream}.weight"], get[f"key_projs.{stream}.bias"])
        key = rms(key, get[f"norm1.{stream}.weight"], None)
        query = rms(streams[:, :, stream], get[f"norm2.{stream}.weight"], None)
        dot = (key * query).sum(-1) / math.sqrt(HIDDEN)
        gate = torch.sigmoid(dot.abs().clamp_min(1e-6).sqrt() * dot.sign())
        gated.append(gate[..., None] * value)
    normed = [rms(gated[stream], get[f"short_conv.norms.{stream}.weight"], 1e-5) for stream in range(count)]
    channels = torch.cat(normed, dim=-1).transpose(1, 2)
    weight = get["short_conv.conv.weight"]
    reach = (KERNEL - 1) * max_ngram
    mixed = F.conv1d(F.pad(channels, (reach, 0)), weight, groups=len(weight), dilation=max_ngram)
    conv = F.silu(mixed.transpose(1, 2)).unflatten(-1, (count, HIDDEN))
    return torch.stack(gated, dim=2) + conv


@pytest.fixture(scope="module")
def tokenizer():
    words = models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="?")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="?")


BACKBONES = {
    1: LlamaConfig(
        vocab_size=len(WORDS), hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    ),
    4: DeepseekV4Config(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=16,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=4,
        hc_mult=4,
    ),
}


@pytest.fixture(params=sorted(BACKBONES))
def backbone(request, tokenizer, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "backbone"
    model = AutoModelForCausalLM.from_config(BACKBONES[request.param])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, request.param


def convert(state, backbone, target, *options):
    path = target.parent / "demo.safetensors"
    save_file(state, path)
    arguments = [str(path), str(backbone), str(target), "--engram-vocab-size", str(BUCKETS), "--max-ngram-size", "3"]
    return convert_engram_demo.main([*arguments, *options])


def test_converted_memory_equals_the_demo(backbone, tmp_path):
    folder, streams = backbone
    state = demo_state(streams)
    assert convert(state, folder, tmp_path / "out") == 0
    model = EngramForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[0, 3, 2, 5, 7, 1, 9, 4, 6, 2, 11, 0], [8, 8, 1, 0, 2, 4, 6, 10, 3, 5, 7, 9]])
    inputs = model.model.prepare_memory(ids)
    hidden = torch.randn(2, 12, streams, HIDDEN, generator=torch.Generator().manual_seed(1))
    for index, layer in enumerate(LAYERS):
        memory = model.model.memories()[layer]
        table = state[f"layers.{layer}.engram.multi_head_embedding.embedding.weight"]
        rows = table[inputs.row_ids[index]].flatten(-2)
        with torch.no_grad():
            found = memory(hidden if streams > 1 else hidden.squeeze(2), inputs)
        expected = hidden + demo_forward(state, layer, hidden, rows)
        assert torch.allclose(found.view_as(expected), expected, atol=2e-6)


def test_key_and_query_norms_are_not_exchanged(backbone, tmp_path):
    folder, streams = backbone
    state = demo_state(streams)
    swapped = {
        name.replace("norm1", "normX").replace("norm2", "norm1").replace("normX", "norm2"): t
        for name, t in state.items()
    }
    assert convert(swapped, folder, tmp_path / "out") == 0
    model = EngramForCausalLM.from_pretrained(tmp_path / "out")
    memory = model.model.memories()[1]
    assert torch.equal(memory.k_norm.weight[0], state["layers.1.engram.norm2.0.weight"])
    assert torch.equal(memory.q_norm.weight[0], state["layers.1.engram.norm1.0.weight"])


def test_backbone_and_tokenizer_are_saved(backbone, tmp_path):
    folder, streams = backbone
    assert convert({f"model.{name}": t for name, t in demo_state(streams).items()}, folder, tmp_path / "out") == 0
    model = EngramForCausalLM.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    weights = dict(model.model.named_parameters())
    for name, parameter in plain.base_model.named_parameters():
        assert torch.equal(weights[name], parameter), name
    assert model.config.engram_compressed_vocab_size == 8
    assert model.model.hashing.token_map.tolist()[:4] == [0, 0, 1, 1]


def without(name):
    return lambda state: state.pop(name)


REFUSED = {
    "a tensor is missing": (without("layers.2.engram.norm1.0.weight"), (), "lacks 'norm1.0.weight'"),
    "no table": (without("layers.1.engram.multi_head_embedding.embedding.weight"), (), "lacks"),
    "an unknown tensor": (lambda s: s.update({"layers.1.engram.extra": torch.zeros(1)}), (), "holds 'extra'"),
    "more streams": (lambda s: s.update({"layers.1.engram.norm1.4.weight": torch.ones(HIDDEN)}), (), "'norm1.4.weight'"),
    "other hidden size": (lambda s: s.update({"layers.1.engram.value_proj.bias": torch.zeros(9)}), (), "kv_proj.bias of layer 1"),
    "other buckets": (lambda s: None, ("--engram-vocab-size", "60"), "primes"),
    "other offsets": (lambda s: s["layers.1.engram.multi_head_embedding.offsets"].add_(1), (), "head offsets"),
    "heads do not divide": (lambda s: None, ("--max-ngram-size", "4"), "do not divide among 3"),
    "layers that are not there": (lambda s: None, ("--layer-ids", "1"), "--layer-ids are"),
    "layer past the end": (
        lambda s: [s.update({n.replace("layers.2", "layers.7"): s.pop(n)}) for n in list(s) if "layers.2" in n],
        (),
        "must lie in 0..2",
    ),
    "no memory at all": (lambda s: [s.pop(name) for name in list(s)[1:]] and s.update(x=s.pop(next(iter(s)))), (), "holds no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_convert_refuses_a_state_dict_that_does_not_fit(backbone, tmp_path, capsys, case):
    folder, streams = backbone
    state = demo_state(streams)
    change, options, words = REFUSED[case]
    change(state)
    assert convert(state, folder, tmp_path / "out", *options) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("engram: ") and words in message
    assert not (tmp_path / "out").exists()


def test_unsupported_files_are_refused(tmp_path, capsys):
    for name, content in (("demo.pt", b"PK"), ("demo.safetensors", b"\x00" * 4)):
        (tmp_path / name).write_bytes(content)
        assert convert_engram_demo.main([str(tmp_path / name), "backbone", str(tmp_path / "out")]) == 1
        assert "safetensors" in capsys.readouterr().err


def test_folder_in_use_is_refused(backbone, tmp_path, capsys):
    folder, streams = backbone
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert convert(demo_state(streams), folder, tmp_path / "out") == 1
    assert "is not empty (it holds mine)" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"mine": b"x"}
