"""Continuously batched requests get the tokens that `generate` gives each of them alone."""

import gc

import pytest
import torch
from tiny_backbones import BACKBONES, VOCAB, build, built, needs_continuous_batching, random_ids
from transformers import ContinuousBatchingConfig, GenerationConfig, MistralConfig
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

from engram_hf import EngramConfig, EngramForCausalLM, EngramModel
from engram_hf.serving.continuous_batching import BlockLayout

pytestmark = needs_continuous_batching
BATCHED = ["mixtral", "llama", "gpt_oss", "glm4_moe"]
GREEDY = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def prompts_of(count: int, longest: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    """Return random prompts of 1 to `longest` tokens; every third one begins with the same `shared` tokens."""
    draw = torch.Generator().manual_seed(seed)
    prefix = random_ids(1, shared, seed=99)[0].tolist() if shared else []
    lengths = torch.randint(1, longest + 1, (count,), generator=draw).tolist()
    return [
        (prefix if i % 3 == 0 else []) + torch.randint(3, VOCAB, (length,), generator=draw).tolist()
        for i, length in enumerate(lengths)
    ]


def batched(model, prompts: list[list[int]], new: int, sequences: int = 1, **config) -> list[list[int]]:
    settings = ContinuousBatchingConfig(**{"page_size": 8, "num_blocks": 64, "max_batch_tokens": 32, **config})
    generation = GenerationConfig(**GREEDY, max_new_tokens=new)
    generation.num_return_sequences = sequences  # A config for `generate` would refuse these beside greedy decoding.
    outputs = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=settings)
    assert not [output.error for output in outputs.values() if output.error]
    return [output.generated_tokens for output in outputs.values()]


def alone(model, prompts: list[list[int]], new: int) -> list[list[int]]:
    return [
        model.generate(torch.tensor([p]), generation_config=GenerationConfig(**GREEDY, max_new_tokens=new))[
            0, len(p) :
        ].tolist()
        for p in prompts
    ]


# The other backbones take long and cover little more.
QUICK = [("mixtral", "paper"), ("llama", "v4.1"), ("gpt_oss", "paper")]
CASES = [
    pytest.param(name, variant, marks=[] if (name, variant) in QUICK else pytest.mark.slow)
    for name in BATCHED
    for variant in ("paper", "v4.1")
]


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_collect():
    """Freeze live objects: each manager collects garbage twice when it stops, which takes a second beside other tests'
    objects.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def preempted(monkeypatch) -> list[int]:
    """Record how many requests were active each time that some had to give up their blocks."""
    counts, offload = [], OffloadingManager.offload_requests

    def counted(self, *args, **kwargs):
        counts.append(len(self.scheduler.active_requests))
        return offload(self, *args, **kwargs)

    monkeypatch.setattr(OffloadingManager, "offload_requests", counted)
    return counts


@pytest.fixture
def look_backs(monkeypatch) -> list[list[int]]:
    """Record the tokens before each sequence of each call, as the model receives them."""
    seen, read = [], EngramModel.read_lookback

    def noted(self, inputs):
        seen.extend([token for token in row if token >= 0] for row in inputs["lookback_token_ids"].tolist())
        return read(self, inputs)

    monkeypatch.setattr(EngramModel, "read_lookback", noted)
    return seen


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_batched_tokens_equal_generate(name, variant):
    """Prompts are longer than a batch, prefill and decoding share batches, and requests share prefixes."""
    model, prompts = built(name, variant), prompts_of(7, 24, shared=17)
    assert batched(model, prompts, 5, max_batch_tokens=16) == alone(model, prompts, 5)


@pytest.mark.parametrize("variant", ["paper", pytest.param("v4.1", marks=pytest.mark.slow)])
def test_preempted_requests_give_the_same_tokens(variant, preempted):
    """The cache holds about two complete requests, so that some give up their blocks and start again."""
    model, prompts = built("llama", variant), prompts_of(3, 12, seed=2)
    assert batched(model, prompts, 16, num_blocks=4, safety_margin=0.0) == alone(model, prompts, 16)
    assert preempted


def test_forked_requests_have_the_look_back_of_their_parent():
    """A fork copies the incomplete block and continues alone; greedy decoding gives the same tokens."""
    model, prompts = built("llama"), prompts_of(3, 14, seed=3)
    answers = batched(model, prompts, 6, sequences=3)
    assert answers == [answer for answer in alone(model, prompts, 6) for _ in range(3)]


def test_sampled_tokens_have_the_probabilities_of_a_plain_forward():
    model, prompts = built("llama"), prompts_of(4, 14, seed=4)
    settings = ContinuousBatchingConfig(page_size=8, num_blocks=64, max_batch_tokens=16, return_logprobs=True)
    generation = GenerationConfig(**{**GREEDY, "do_sample": True, "max_new_tokens": 8, "num_return_sequences": 2})
    outputs = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=settings)
    assert len(outputs) == 8
    for output in outputs.values():
        with torch.no_grad():
            logits = model(torch.tensor([[*output.prompt_ids, *output.generated_tokens]]), use_cache=False).logits[0]
        chosen = logits.log_softmax(-1)[len(output.prompt_ids) - 1 : -1].gather(
            1, torch.tensor(output.generated_tokens).unsqueeze(1)
        )
        torch.testing.assert_close(torch.tensor(output.logprobs), chosen[:, 0], atol=1e-4, rtol=1e-4)


def test_eager_attention_in_bfloat16_and_the_model_after_batching(look_backs):
    """In bfloat16, tokens may differ from those of `generate`, which adds in another order; look-backs may not."""
    model = build("mixtral").bfloat16()
    model.set_attn_implementation("eager")
    settings = ContinuousBatchingConfig(page_size=8, num_blocks=32, max_batch_tokens=16)
    prompts = prompts_of(6, 20, seed=5, shared=17)
    outputs = model.generate_batch(
        prompts, generation_config=GenerationConfig(**GREEDY, max_new_tokens=5), continuous_batching_config=settings
    )
    texts = ["," + ",".join(map(str, [*o.prompt_ids, *o.generated_tokens])) + "," for o in outputs.values()]
    assert len(texts) == 6 and len(look_backs) > 30
    for look_back in look_backs:
        assert any("," + ",".join(map(str, look_back)) + "," in text for text in texts) or not look_back
    assert model.config._attn_implementation == "eager" and model.config.num_hidden_layers == 3


def test_mapped_tables_are_prefetched(tmp_path):
    built("llama").save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, engram_residency="mapped")
    assert model.model.prefetcher is not None
    prompts = prompts_of(3, 14, seed=6)
    assert batched(model, prompts, 4) == alone(built("llama"), prompts, 4)
    with pytest.raises(ValueError, match="CUDA graphs cannot read rows from outside of the device"):
        batched(model, prompts, 4, use_cuda_graph=True)


def test_persistent_manager_serves_later_requests():
    model, prompts = build("llama"), prompts_of(4, 14, seed=7)
    settings = {"page_size": 8, "num_blocks": 32, "max_batch_tokens": 16}
    generation = GenerationConfig(**GREEDY, max_new_tokens=4)
    answers = []
    for half in (prompts[:2], prompts[2:]):
        outputs = model.generate_batch(
            half,
            generation_config=generation,
            continuous_batching_config=ContinuousBatchingConfig(**settings),
            persistent_manager=True,
        )
        answers += [output.generated_tokens for output in outputs.values()]
    assert answers == alone(model, prompts, 4)
    model.destroy_cached_continuous_batching_manager()
    assert getattr(model, "_cached_continuous_batching_manager", None) is None


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v4"])
def test_backbone_that_cannot_be_batched_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"A {name} cannot be batched continuously .*; call generate instead"):
        built(name).generate_batch([[3, 4, 5]])


def test_window_shorter_than_the_look_back_is_refused():
    backbone = MistralConfig(**BACKBONES["llama"]().to_diff_dict() | {"sliding_window": 4})
    config = EngramConfig.for_backbone(
        backbone, layer_ids=[1], engram_n_heads=2, engram_head_dim=8, engram_vocab_size=97
    )
    with pytest.raises(ValueError, match="looks back 9 positions, further than its sliding window of 4"):
        EngramForCausalLM(config).eval().init_continuous_batching()


def test_block_tables_of_flash_kernels_are_not_used(library_log):
    asked = ContinuousBatchingConfig(max_blocks_per_request=4, num_blocks=4, max_batch_tokens=8)
    manager = built("llama").init_continuous_batching(GenerationConfig(**GREEDY), asked)
    assert manager.continuous_batching_config.max_blocks_per_request == 0 and asked.max_blocks_per_request == 4
    assert any("max_blocks_per_request is set to 0" in line for line in library_log)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (random_ids(1, 100)[0].tolist(), "100 tokens and up to 4 new ones is longer .* which holds 32"),
        ([3, VOCAB + 5, 4], f"token ids from 3 to {VOCAB + 5}, but the model knows 0 to {VOCAB - 1}"),
        ([], "A request has no tokens"),
    ],
    ids=["too long", "unknown token", "no tokens"],
)
def test_impossible_request_is_refused_when_it_is_added(prompt, message):
    """With the bare model it ends the batching; here the manager continues, up to the very longest request."""
    model = built("llama")
    settings = ContinuousBatchingConfig(page_size=8, num_blocks=4, max_batch_tokens=16)
    longest = random_ids(1, 29)[0].tolist()  # With 4 new tokens, of which the last one needs no space, these are 32.
    generation = GenerationConfig(**GREEDY, max_new_tokens=4)
    with model.continuous_batching_context_manager(generation, continuous_batching_config=settings) as manager:
        with pytest.raises(ValueError, match=message):
            manager.add_request(prompt)
        with pytest.raises(ValueError, match="30 tokens and up to 4 new ones is longer"):
            manager.add_request([*longest, 3])
        request = manager.add_request(longest)
        answer = next(output for output in manager if output.request_id == request)
    assert [answer.generated_tokens] == alone(model, [longest], 4) and answer.error is None
    with pytest.raises(ValueError, match=message):
        model.generate_batch([longest, prompt], generation_config=generation, continuous_batching_config=settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conv_dtype", [torch.float32, torch.bfloat16])
def test_block_records_keep_every_bit(dtype, conv_dtype):
    layout = BlockLayout(2, 5, dtype, 3, "full_attention", (1, 2), (2, 7), conv_dtype)
    bits = torch.randint(0, 256, (4, 2, 7 * conv_dtype.itemsize), dtype=torch.uint8)
    ids, inputs = torch.tensor([0, 70000, 2**31 - 2, 5]), {1: bits.view(conv_dtype), 2: -bits.view(conv_dtype)}
    record = layout.pack(ids, inputs)
    assert record.shape == (4, len(layout.layers) * layout.layer_bytes) and layout.layers.start == 3
    got, parts = layout.unpack(record.view(dtype).clone().view(torch.uint8).view(2, 2, -1))
    assert torch.equal(got.flatten(), ids)
    for layer, part in parts.items():
        assert torch.equal(part.flatten(0, 1).view(torch.uint8), inputs[layer].view(torch.uint8))
    assert layout.unpack(torch.zeros_like(record))[0].tolist() == [-1] * 4
