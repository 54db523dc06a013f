"""The memory's history in a cache follows every operation on the cache, and refuses states that it cannot know."""

import copy
import pickle

import pytest
import torch
from tiny_backbones import BACKBONES, VOCAB, build, built, random_ids
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache, StaticCache

from engram_hf.cache_engram import SPARE_POSITIONS, CacheWithHistory, StaticEngramHistory, attach_history

EXACT = {"rtol": 0, "atol": 1e-5}
# One backbone has plain layers, the other sliding ones: both kinds roll back together with ours.
NAMES = ["mixtral", "gpt_oss"]


@pytest.fixture(params=NAMES)
def model(request):
    return built(request.param)


@pytest.fixture
def mixtral():
    return built("mixtral")


@torch.no_grad()
def read(model, ids: torch.Tensor, cache, **kwargs) -> torch.Tensor:
    return model(ids, past_key_values=cache, **kwargs).logits


def read_alone(model, ids: torch.Tensor, last: int) -> torch.Tensor:
    """Return the logits of the `last` positions of `ids`, without a cache."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits[:, -last:]


def filled_cache(model, ids: torch.Tensor, recording: bool = True) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    attach_history(cache, model.config)
    if recording:
        cache.activate_past_recording()
    read(model, ids, cache)
    return cache


# The sliding layers of gpt-oss roll back only if they were recorded.
@pytest.mark.parametrize(("name", "recording"), [("mixtral", True), ("mixtral", False), ("gpt_oss", True)])
@pytest.mark.parametrize("removed", [1, 2, 7, 18])
def test_crop_forgets_the_cropped_positions(name, recording, removed):
    model, ids, others = built(name), random_ids(2, 20), random_ids(2, 5, seed=5)
    cache = filled_cache(model, ids, recording=recording)
    cache.crop(-removed)
    kept = ids[:, : 20 - removed]
    assert cache.engram_history.get_seq_length() == kept.shape[1]
    torch.testing.assert_close(read(model, others, cache), read_alone(model, torch.cat([kept, others], 1), 5), **EXACT)


def test_repeated_crops_equal_the_kept_text(model):
    """Read three tokens and crop two, repeatedly, as assisted decoding does."""
    ids = random_ids(1, 110)
    cache = filled_cache(model, ids[:, :100])
    cache.crop(0)
    for position in range(100, 110):
        logits = read(model, torch.cat([ids[:, position : position + 1], random_ids(1, 2, seed=position)], 1), cache)
        torch.testing.assert_close(logits[:, :1], read_alone(model, ids[:, : position + 1], 1), **EXACT)
        cache.crop(-2)
    held = cache.engram_history.conv_inputs.values()
    assert {states.shape[1] for states in held} == {9 + SPARE_POSITIONS}, "a crop also gives back what is not needed"


def test_crop_to_zero_equals_reset(mixtral):
    ids = random_ids(1, 12)
    cache = filled_cache(mixtral, ids)
    cache.crop(-12)
    torch.testing.assert_close(read(mixtral, ids, cache), read_alone(mixtral, ids, 12), **EXACT)


def test_crop_refuses_more_than_the_convolution_remembers(mixtral):
    cache = filled_cache(mixtral, random_ids(1, 100), recording=False)
    with pytest.raises(ValueError, match=r"forget at most 64 positions, not 65.*activate_past_recording"):
        cache.crop(-65)
    # The refused call cropped nothing.
    assert cache.engram_history.get_seq_length() == cache.get_seq_length() == 100
    more = random_ids(1, 2, seed=5)
    whole = torch.cat([random_ids(1, 100), more], 1)
    torch.testing.assert_close(read(mixtral, more, cache), read_alone(mixtral, whole, 2), **EXACT)


def test_crop_without_a_convolution_needs_no_recording():
    model, ids = built("mixtral", "v4.1"), random_ids(1, 20)
    cache = filled_cache(model, ids, recording=False)
    cache.crop(-15)
    torch.testing.assert_close(read(model, ids[:, 5:], cache), read_alone(model, ids, 15), **EXACT)


def test_positive_crop_is_refused(mixtral):
    cache = filled_cache(mixtral, random_ids(1, 5))
    with pytest.raises(ValueError, match="minus the number of positions"):
        cache.crop(3)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_reordered_batch_keeps_each_rows_history(model, change, rows):
    ids, others = random_ids(3, 14), random_ids(len(rows), 4, seed=5)
    cache = filled_cache(model, ids, recording=False)
    change(cache)
    torch.testing.assert_close(
        read(model, others, cache), read_alone(model, torch.cat([ids[rows], others], 1), 4), **EXACT
    )


def test_history_that_is_not_reordered_changes_logits(mixtral):
    ids, others = random_ids(3, 14), random_ids(3, 4, seed=5)
    cache, order = filled_cache(mixtral, ids, recording=False), torch.tensor([2, 0, 0])
    for layer in cache.layers:
        layer.reorder_cache(order)
    alone = read_alone(mixtral, torch.cat([ids[order], others], 1), 4)
    assert (read(mixtral, others, cache) - alone).abs().max() > 1e-2


@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices"])
def test_operations_on_an_unused_cache(mixtral, change):
    cache = DynamicCache(config=mixtral.config)
    history = attach_history(cache, mixtral.config)
    getattr(history, change)(torch.tensor([0]))
    history.batch_repeat_interleave(3)
    history.crop(-1)
    ids = random_ids(2, 6)
    torch.testing.assert_close(read(mixtral, ids, cache), read_alone(mixtral, ids, 6), **EXACT)


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=32)])
def test_reset_cache_equals_a_new_one(mixtral, make):
    cache = make(config=mixtral.config)
    read(mixtral, random_ids(2, 11, seed=3), cache)
    cache.reset()
    ids = random_ids(2, 9)
    if int(cache.get_seq_length()):
        # The DynamicCache of older releases continues behind zeros after a reset; that is not treated as a new text.
        with pytest.raises(ValueError, match="holds 11 positions, of which this model's memory saw 0"):
            read(mixtral, ids, cache)
        return
    torch.testing.assert_close(read(mixtral, ids, cache), read_alone(mixtral, ids, 9), **EXACT)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_static_cache_in_chunks_equals_one_forward(model, size):
    ids = random_ids(2, 20)
    cache = StaticCache(config=model.config, max_cache_len=32)
    chunks = torch.cat([read(model, chunk, cache) for chunk in ids.split(size, 1)], 1)
    torch.testing.assert_close(chunks, read_alone(model, ids, 20), **EXACT)
    assert isinstance(cache.engram_history, StaticEngramHistory)


def test_static_cache_keeps_its_tensors(mixtral):
    """Compiled code refers to their addresses."""
    cache = StaticCache(config=mixtral.config, max_cache_len=32)
    read(mixtral, random_ids(1, 5), cache)
    history = cache.engram_history
    tensors = [history.ids, history.documents, history.counts, *history.conv_inputs.values()]
    addresses = [tensor.data_ptr() for tensor in tensors]
    read(mixtral, random_ids(1, 1), cache)
    cache.reset()
    now = [history.ids, history.documents, history.counts, *history.conv_inputs.values()]
    assert [tensor.data_ptr() for tensor in now] == addresses and cache.is_compileable
    with pytest.raises(ValueError, match="static cache cannot forget"):
        cache.crop(-1)


def test_static_cache_separates_documents_like_a_dynamic_one(mixtral):
    ids, positions = random_ids(1, 12), torch.cat([torch.arange(5), torch.arange(7)])[None]
    results = []
    for cache in (DynamicCache(config=mixtral.config), StaticCache(config=mixtral.config, max_cache_len=16)):
        history = attach_history(cache, mixtral.config)
        for start in (0, 4, 7):
            stop = {0: 4, 4: 7, 7: 12}[start]
            window = slice(start, stop)
            memory = mixtral.model.prepare_memory(ids[:, window], position_ids=positions[:, window], history=history)
            history.commit()
            results.append(memory.row_ids)
    assert all(torch.equal(one, two) for one, two in zip(results[:3], results[3:], strict=True))
    whole = mixtral.model.prepare_memory(ids, position_ids=positions).row_ids
    assert torch.equal(torch.cat(results[:3], 2), whole)


def test_cache_that_creates_its_layers_lazily(mixtral):
    ids, cache = random_ids(2, 12), DynamicCache()
    chunks = torch.cat([read(mixtral, chunk, cache) for chunk in ids.split(5, 1)], 1)
    torch.testing.assert_close(chunks, read_alone(mixtral, ids, 12), **EXACT)


def test_deepcopied_cache_continues_independently(mixtral):
    """A prompt is read once and continued twice."""
    ids, cache = random_ids(1, 8), DynamicCache(config=mixtral.config)
    read(mixtral, ids, cache)
    for seed in (1, 2):
        more = random_ids(1, 4, seed=seed)
        branch = read(mixtral, more, copy.deepcopy(cache))
        torch.testing.assert_close(branch, read_alone(mixtral, torch.cat([ids, more], 1), 4), **EXACT)


def test_iterating_over_cache_layers_yields_the_backbones(model):
    """Tools that read keys and values (attention sinks, cache compression, visualization) need not know about memory."""
    ids = random_ids(2, 6)
    cache = filled_cache(model, ids, recording=False)
    bare = DynamicCache(config=model.config)
    assert isinstance(cache, (DynamicCache, CacheWithHistory)) and len(cache) == len(bare)
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in bare.layers]
    for layer in cache.layers:
        assert layer.keys.shape[0] == layer.values.shape[0] == 2 and layer.get_seq_length() == 6
    assert cache.get_max_length() == bare.get_max_length()
    assert cache.is_initialized and not cache.is_compileable


def test_cache_with_history_can_be_pickled(mixtral):
    ids, more = random_ids(1, 8), random_ids(1, 4, seed=2)
    cache = DynamicCache(config=mixtral.config)
    read(mixtral, ids, cache)
    again = pickle.loads(pickle.dumps(cache))
    assert type(again) is type(cache)
    torch.testing.assert_close(read(mixtral, more, again), read_alone(mixtral, torch.cat([ids, more], 1), 4), **EXACT)


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=32)])
def test_refused_call_leaves_the_cache_unchanged(mixtral, make):
    """The corrected call gives the logits of a first call."""
    ids, more = random_ids(2, 8), random_ids(2, 3, seed=2)
    cache = make(config=mixtral.config)
    read(mixtral, ids, cache)
    with pytest.raises(Exception, match=r"."):
        read(mixtral, more, cache, position_ids=torch.zeros(5, 7, 3))
    expected = read_alone(mixtral, torch.cat([ids, more], 1), 3)
    torch.testing.assert_close(read(mixtral, more, cache), expected, **EXACT)


def test_cache_of_the_bare_backbone_is_refused(mixtral):
    ids, bare = random_ids(1, 6), AutoModelForCausalLM.from_config(BACKBONES["mixtral"]()).eval()
    cache = bare(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"holds 6 positions, of which this model's memory saw 0.*bare backbone"):
        mixtral(ids, past_key_values=cache)
    cache = StaticCache(config=mixtral.config, max_cache_len=16)
    read(bare, ids, cache)
    with pytest.raises(ValueError, match=r"holds 6 positions, of which this model's memory saw 0"):
        mixtral(ids, past_key_values=cache)


def test_cache_extended_without_the_memory_is_refused(mixtral):
    cache = filled_cache(mixtral, random_ids(1, 6))
    for layer in cache.layers:
        layer.crop(-2)
    with pytest.raises(ValueError, match="holds 4 positions, of which this model's memory saw 6"):
        read(mixtral, random_ids(1, 1), cache)


def test_cache_of_another_engram_model_is_refused(mixtral):
    other = build("mixtral", engram_max_ngram_size=4)
    cache = filled_cache(other, random_ids(1, 6))
    with pytest.raises(ValueError, match="belongs to another Engram model"):
        mixtral(random_ids(1, 1), past_key_values=cache)


def test_cache_of_another_batch_is_refused(mixtral):
    cache = filled_cache(mixtral, random_ids(2, 6))
    with pytest.raises(ValueError, match="holds 2 sequences, but this call brings 3"):
        mixtral(random_ids(3, 1), past_key_values=cache)


def test_cache_without_layers_is_refused(mixtral):
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises(ValueError, match="The cache is a EncoderDecoderCache"):
        mixtral(random_ids(1, 4), past_key_values=cache)


def test_reading_into_a_cache_keeps_few_convolution_inputs(mixtral):
    cache = DynamicCache(config=mixtral.config)
    read(mixtral, torch.randint(3, VOCAB, (1, 240)), cache)
    for states in cache.engram_history.conv_inputs.values():
        kept = 9 + SPARE_POSITIONS
        assert states.shape[1] == kept and states.untyped_storage().nbytes() == kept * 32 * 4
