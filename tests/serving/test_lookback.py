"""Engines with their own cache: a model runs exactly with look-back keywords, and is refused without them."""

import pytest
import torch
from tiny_backbones import VOCAB, build, built, random_ids
from toy_engine import Request, ToyEngine
from transformers.generation.continuous_batching import PagedAttentionCache

PROMPTS = [random_ids(1, length, seed=length)[0].tolist() for length in (1, 2, 7, 13)]


@pytest.fixture(scope="module", params=[("llama", "paper"), ("mixtral", "v4.1")], ids="-".join)
def engine(request) -> ToyEngine:
    return ToyEngine(build(*request.param))


@pytest.fixture(scope="module")
def paper() -> ToyEngine:
    return ToyEngine(build("llama"))


def expected(engine: ToyEngine, prompt: list[int], count: int) -> list[int]:
    engine.model.set_attn_implementation("sdpa")
    ids = engine.model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    engine.model.set_attn_implementation("toy_engine")
    return ids[0, len(prompt) :].tolist()


def test_chunked_prefill_and_decoding_mixed_in_one_row_equal_generate(engine):
    """Each step brings a chunk of three tokens of a prompt, or one token of an answer, of every request."""
    requests, answers = [Request() for _ in PROMPTS], [[] for _ in PROMPTS]
    for _ in range(12):
        chunks = []
        for request, prompt, answer in zip(requests, PROMPTS, answers, strict=True):
            text = prompt + answer
            chunks.append((request, text[len(request.tokens) :][:3]))
        logits = engine.step(chunks)
        for request, prompt, answer, row in zip(requests, PROMPTS, answers, logits, strict=True):
            if len(request.tokens) >= len(prompt):
                answer.append(int(row.argmax()))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer) >= 8 and answer == expected(engine, prompt, len(answer))


def test_prefix_sharing_equals_generate(engine):
    """Some requests begin with the states of another one; positions of the second continue from those of the first."""
    prompt = random_ids(1, 15, seed=4)[0].tolist()
    first = Request()
    engine.step([(first, prompt)])
    twin, longer = first.prefix(14), first.prefix(9)
    tails = [prompt[14:], random_ids(1, 6, seed=5)[0].tolist()]
    logits = engine.step([(longer, tails[1]), (twin, tails[0])])
    for request, row in zip((longer, twin), logits, strict=True):
        assert int(row.argmax()) == expected(engine, request.tokens, 1)[0]
    torch.testing.assert_close(logits[1], engine.step([(Request(), prompt)])[0], atol=2e-5, rtol=1e-4)


def test_look_back_changes_the_logits(paper):
    """Other tokens, or other convolution inputs, before a sequence change its logits."""
    request = Request()
    paper.step([(request, PROMPTS[3])])
    right = paper.step([(request.prefix(13), [5])])
    width = paper.config.engram_max_ngram_size - 1
    others = paper.step([(request.prefix(13), [5])], lookback_token_ids=torch.full((1, width), 9))
    without = paper.step([(request.prefix(13), [5])], lookback_conv_inputs={})
    assert (right - others).abs().max() > 1e-3 and (right - without).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_batch_of_continued_rows(dtype):
    """Each sequence has one row, some with left padding: the look-back precedes the first token of its text."""
    model, ids = built("mixtral", "v4.1"), random_ids(2, 12)
    whole = model.model.prepare_memory(ids).row_ids[:, :, 7:]
    width = model.config.engram_max_ngram_size - 1
    keywords = {"lookback_token_ids": ids[:, 7 - width : 7].to(dtype)}
    history = model.model.read_lookback(keywords)
    rest = model.model.prepare_memory(ids[:, 7:], position_ids=torch.arange(7, 12).expand(2, -1), history=history)
    assert torch.equal(rest.row_ids, whole)
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), ids[:, 7:]], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]]).expand(2, -1)
    positions = torch.tensor([[1, 1, 7, 8, 9, 10, 11]]).expand(2, -1)
    history = model.model.read_lookback({"lookback_token_ids": ids[:, 7 - width : 7]})
    rest = model.model.prepare_memory(padded, mask, positions, history=history)
    assert torch.equal(rest.row_ids[:, :, 2:], whole)


def test_sequences_are_recognized_by_positions_without_bounds():
    model, ids = built("mixtral", "v4.1"), random_ids(1, 9)
    width = model.config.engram_max_ngram_size - 1
    positions = torch.tensor([[4, 5, 6, 0, 1, 2, 11, 12, 13]])
    before = torch.tensor([[7] * width, [-1] * width, [8] * width])
    history = model.model.read_lookback({"lookback_token_ids": before})
    packed = model.model.prepare_memory(ids, position_ids=positions, history=history).row_ids
    for number, start in enumerate((0, 3, 6)):
        history = model.model.read_lookback({"lookback_token_ids": before[number : number + 1]})
        alone = model.model.prepare_memory(ids[:, start : start + 3], history=history).row_ids
        assert torch.equal(packed[:, :, start : start + 3], alone)
    history = model.model.read_lookback({"lookback_token_ids": before[:2]})
    with pytest.raises(ValueError, match="has 2 rows, but this call has 3 sequences"):
        model.model.prepare_memory(ids, position_ids=positions, history=history)


GOOD = torch.full((1, 2), -1)
BAD = {
    "length": ({"lookback_token_ids": GOOD[:, :1]}, r"is torch.int64 \[1, 1\] on cpu; give integers \[sequences, 2\]"),
    "dtype": ({"lookback_token_ids": GOOD.float()}, "is torch.float32"),
    "bool": ({"lookback_token_ids": GOOD.bool()}, "is torch.bool"),
    "shape": ({"lookback_token_ids": GOOD[0]}, r"is torch.int64 \[2\]"),
    "device": ({"lookback_token_ids": GOOD.to("meta")}, "on meta"),
    "kind": ({"lookback_token_ids": [[-1, -1]]}, "is a list"),
    "missing": ({"lookback_conv_inputs": {}}, "is a NoneType"),
    "rows": ({"lookback_token_ids": GOOD.expand(2, -1)}, "has 2 rows, but this call has 1 sequences"),
    "bounds": ({"lookback_token_ids": GOOD, "cu_seq_lens_q": torch.tensor([0, 2, 4])}, r"is \[3\]; it needs \[2\]"),
    "cache": ({"lookback_token_ids": GOOD, "use_cache": True}, "this call has a transformers cache"),
    "no convolution": ({"lookback_token_ids": GOOD, "engram_conv_inputs": None}, "needs more than lookback_token_ids"),
    "layers": ({"lookback_token_ids": GOOD, "lookback_conv_inputs": {0: GOOD}}, r"entries for \[0\].* \[1, 2\]"),
    "convolution": (
        {"lookback_token_ids": GOOD, "lookback_conv_inputs": dict.fromkeys((1, 2), torch.zeros(1, 3, 1, 32))},
        r"of decoder layer 1 are \[1, 3, 1, 32\], but this memory needs \[1, 9, 1, 32\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_look_back_is_refused(case):
    model, (given, message) = built("llama"), BAD[case]
    assert model.config.engram_max_ngram_size == 3
    keywords = {"lookback_conv_inputs": {}, "engram_conv_inputs": {}, **given}
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 4), **keywords)


def test_packed_row_with_look_back_may_not_have_padding():
    model = built("mixtral", "v4.1")
    keywords = {"lookback_token_ids": torch.full((2, 3), -1), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="leave attention_mask out"):
        model(random_ids(1, 4), position_ids=torch.tensor([[3, 4, 0, 1]]), use_cache=False, **keywords)


def test_unknown_tokens_in_the_look_back_count_as_none():
    model = built("mixtral", "v4.1")
    rows = [
        model.model.prepare_memory(
            random_ids(1, 3), history=model.model.read_lookback({"lookback_token_ids": torch.tensor([[-1, -1, last]])})
        ).row_ids
        for last in (-1, VOCAB, VOCAB - 1)
    ]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


POSITIONS = {
    "begins late": [[3, 4, 5, 6]],
    "restarts late": [[0, 1, 5, 3]],
    "stands": [[0, 1, 1, 2]],
    "one row of two": [[0, 1, 2, 3], [1, 2, 3, 4]],
}


@pytest.mark.parametrize("case", POSITIONS)
def test_positions_with_missing_tokens_are_refused_without_a_cache(case):
    positions = torch.tensor(POSITIONS[case])
    with pytest.raises(ValueError, match="This call has no cache, but its position_ids begin or restart"):
        built("llama")(random_ids(len(positions), 4), position_ids=positions, use_cache=False)


def test_gap_in_positions_is_warned_of_once(library_log):
    for _ in range(2):
        built("llama")(random_ids(1, 4), position_ids=torch.tensor([[0, 1, 7, 8]]), use_cache=False)
    assert len([line for line in library_log if "go on by more than one" in line]) == 1


@pytest.mark.parametrize(
    "call",
    [
        {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 0]])},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])},
        {"position_ids": torch.tensor([[1, 1, 0, 1, 2, 3]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 1, 1]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])},
    ],
    ids=["packed", "padded by index", "padded on the left", "padded on the right"],
)
def test_positions_of_packing_and_padding_are_accepted(call, library_log):
    assert built("llama")(random_ids(1, 6), use_cache=False, **call).logits.isfinite().all()
    assert not [line for line in library_log if "position_ids" in line]


def test_unsupported_block_storage_of_transformers_is_refused(monkeypatch):
    """Releases before 5.20 store blocks differently."""
    monkeypatch.setattr(
        PagedAttentionCache, "update", lambda self, key_states, value_states, layer_idx, read_index: None
    )
    with pytest.raises(ValueError, match=r"needs transformers 5\.20 or later"):
        built("llama").generate_batch([[3, 4, 5]])
