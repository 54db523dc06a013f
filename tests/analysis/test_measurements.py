"""The measurements of `analysis` equal values counted and computed by hand."""

import collections
import json
import math
import threading

import pytest
import torch
from tiny_backbones import BACKBONES
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from engram_hf.analysis import (
    Off,
    compare_layers,
    cut_windows,
    draw,
    measure_attention,
    measure_depth,
    measure_gates,
    measure_traffic,
    measure_worth,
    read_text,
)
from engram_hf.analysis.evaluation import estimate, token_losses
from engram_hf.analysis.frequency import FREQUENCIES, frequency_classes, ngrams
from engram_hf.analysis.texts import TOKEN_CLASSES, Pieces
from engram_hf.hashing_engram import row_offsets


def bare_twin(model):
    """Return the backbone without memory, with the same weights."""
    bare = AutoModelForCausalLM.from_config(model.config.text_config, dtype=torch.float32)
    own = {
        name: part for name, part in model.state_dict().items() if ".engram." not in name and ".hashing." not in name
    }
    bare.load_state_dict(own)
    bare.set_attn_implementation(model.config._attn_implementation)
    return bare.eval()


def texts_of(windows):
    return [row[mask].tolist() for row, mask in zip(windows.input_ids, windows.valid, strict=True)]


# --- texts


def test_windows_contain_one_text_each(tokenizer):
    windows = cut_windows(["w1 w2 w3 w4 w5", "w6 w7", "w8"], tokenizer, length=3)
    ids = {f"w{index}": tokenizer(f"w{index}")["input_ids"][0] for index in range(9)}
    expected = [["w1", "w2", "w3"], ["w4", "w5"], ["w6", "w7"]]
    assert texts_of(windows) == [[ids[word] for word in words] for words in expected]
    assert len(cut_windows(["w1 w2 w3 w4 w5", "w6 w7"], tokenizer, length=3, limit=1)) == 1


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "two tokens"),
        ([""], {}, "two tokens"),
        (["w1"], {}, "two tokens"),
        (["<bos> <eos>"], {}, "two tokens"),
        ("w1 w2", {}, "one str"),
        ([b"w1 w2"], {}, "a bytes"),
        (["w1 w2"], {"length": 1}, "at least 2"),
    ],
)
def test_unreadable_texts_are_refused(tokenizer, texts, options, message):
    with pytest.raises(ValueError, match=message):
        cut_windows(texts, tokenizer, **options)


def test_token_classes():
    class Words:
        all_special_ids = (0,)
        words = ("<s>", "def", " read", "er", "(", " Name", "\n", "Path", " 42", "_x", "7")

        def decode(self, ids):
            return self.words[ids[0]]

        def convert_ids_to_tokens(self, index):
            return self.words[index]

    names = [TOKEN_CLASSES[kind] for kind in Pieces(Words()).classes(range(len(Words.words)))]
    words = ["special", "word start", "word start", "inside a word", "punctuation", "name", "space", "name", "digit"]
    assert names == [*words, "inside a word", "digit"]


def test_token_classes_of_sentencepiece_see_the_space():
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.WordLevel({"▁the": 0, "cat": 1}, unk_token="cat"))
    backend.decoder = decoders.Metaspace()
    assert Pieces(PreTrainedTokenizerFast(tokenizer_object=backend)).text(0) == " the"


def test_ngram_counts(model, windows):
    texts = texts_of(windows)
    compressed = [model.model.hashing.compress(torch.tensor([text]))[0].tolist() for text in texts]
    found = collections.Counter(tuple(text[at : at + 3]) for text in compressed for at in range(len(text) - 2))
    numbers, counts = ngrams(model.model, windows, 3)
    assert sorted(counts.tolist()) == sorted(found.values())
    classes = frequency_classes(model.model, windows)
    limits = (0, 1, 3, 15, 63, math.inf)
    for row, text in enumerate(compressed):
        for at in range(len(text)):
            times = found[tuple(text[at - 2 : at + 1])] if at >= 2 else 0
            assert (numbers[row, at] >= 0) == (at >= 2)
            assert classes[row, at] == next(index for index, limit in enumerate(limits) if times <= limit)


# --- losses, and the value of memory


def test_losses_equal_those_of_each_text_alone(model, windows):
    losses = token_losses(model, windows, batch=3)
    for row, text in enumerate(texts_of(windows)):
        ids = torch.tensor([text])
        with torch.no_grad():
            expected = functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        torch.testing.assert_close(losses[row, : len(expected)], expected, atol=2e-6, rtol=1e-5)
        assert not losses[row, len(expected) :].any()


@pytest.mark.parametrize("variant", ["paper", "v4.1"])
@pytest.mark.parametrize("name", BACKBONES)
def test_memory_off_equals_the_bare_backbone(make_model, name, variant):
    model, ids = make_model(name, variant), torch.arange(4, 20).view(2, 8)
    bare = bare_twin(model)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False, engram_edit=Off()).logits, bare(ids, use_cache=False).logits)
        one = model(ids, use_cache=False, engram_edit=Off([0])).logits
        assert not torch.equal(one, model(ids, use_cache=False).logits)


def test_measure_worth(model, windows):
    worth = measure_worth(model, windows, batch=3)
    base, valid = token_losses(model, windows), windows.valid[:, 1:]
    bare = token_losses(bare_twin(model), windows)
    assert worth.tokens == int(valid.sum())
    assert worth.loss == pytest.approx(float(base[valid].mean()), abs=1e-5)
    off = worth.increase["memory off"]
    assert off.value == pytest.approx(float((bare - base)[valid].mean()), abs=1e-5) and off.low < off.value < off.high
    controls = ["addresses shuffled", "mean row", "one row"]
    layers, orders = ["layer 1 off", "layer 2 off"], ["order 2 unknown", "order 3 unknown"]
    assert list(worth.increase) == ["memory off", *layers, *orders, *controls]
    for groups in (worth.by_class, worth.by_frequency):
        assert sum(group.tokens for group in groups.values()) == worth.tokens
        total = sum(group.tokens * group.increase.value for group in groups.values())
        assert total / worth.tokens == pytest.approx(off.value, abs=1e-5)


def test_measure_worth_controls_read_other_rows(model, windows):
    """The rows that reach a layer are those of another position, the mean of the rows read, or the first of each head."""
    from engram_hf.analysis.worth import MeanRows, OneRow, Shuffled, _mean_rows

    memory = model.model.memories()[1]
    (batch,) = windows.batches(len(windows))
    seen = {}
    with torch.no_grad():
        model(
            **batch,
            use_cache=False,
            engram_edit=lambda memory, rows, inputs: seen.setdefault(memory.index, (rows, inputs))[0],
        )
        rows, inputs = seen[0]
        real = rows[windows.valid]
        shuffled = Shuffled()(memory, rows, inputs)
        means = _mean_rows(model.model, windows, 2)
        first = OneRow(row_offsets(model.model.hashing.primes).flatten(1))(memory, rows, inputs)
    assert not torch.equal(shuffled[windows.valid], real)
    assert sorted(shuffled[windows.valid].tolist()) == sorted(real.tolist())
    torch.testing.assert_close(means[0], real.double().mean(0))
    mixed = MeanRows(means, [1])(memory, rows, inputs)
    width = memory.table.width
    assert torch.equal(mixed[..., :width], rows[..., :width]) and torch.equal(
        mixed[..., 2 * width :], rows[..., 2 * width :]
    )
    torch.testing.assert_close(mixed[0, 0, width : 2 * width].double(), means[0][width : 2 * width])
    offsets = row_offsets(model.model.hashing.primes)[0].flatten()
    assert torch.equal(first[0, 0], memory.table.weight[offsets].flatten())


def test_interval_contains_the_mean_19_times_of_20():
    """The tokens of a window depend on each other, which intervals over tokens would ignore."""
    random = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        values = torch.randn(40, 1, generator=random) + 0.3 * torch.randn(40, 12, generator=random)
        valid = torch.arange(12) < torch.randint(1, 13, (40, 1), generator=random)
        found = estimate(values, valid)
        assert found.value == pytest.approx(float(values[valid].mean()), abs=1e-5)
        hits += found.low <= 0 <= found.high
    assert 0.90 < hits / 400 < 0.98
    assert estimate(values[:1], valid[:1]).low is None


def test_measurement_does_not_affect_other_threads(model, windows):
    (batch,) = windows.batches(len(windows))
    with torch.no_grad():
        expected = model(**batch).logits
    done, wrong = threading.Event(), []

    def forward():
        while not done.is_set():
            with torch.no_grad():
                wrong.extend([] if torch.equal(model(**batch).logits, expected) else [1])

    thread = threading.Thread(target=forward)
    thread.start()
    try:
        measure_worth(model, windows)
        read_text(model, PlainWords(), "w1 w2 w3")
    finally:
        done.set()
        thread.join()
    assert not wrong


class PlainWords:
    all_special_ids = ()

    def __call__(self, text):
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, ids):
        return f"w{ids[0]} "

    def convert_ids_to_tokens(self, index):
        return f"w{index}"


# --- gates, depth, attention, rows


@pytest.mark.parametrize("name", ["llama", "deepseek_v4"])
def test_measure_gates(make_model, windows, name):
    model = make_model(name)
    found, real = measure_gates(model, windows, batch=2), windows.valid
    assert found.positions == int(real.sum())
    gates = {layer: values[real] for layer, values in model.engram_gates(**next(iter(windows.batches(99)))).items()}
    for layer, values in gates.items():
        torch.testing.assert_close(torch.tensor(found.by_stream[layer]), values.mean(0), atol=1e-5, rtol=0)
        assert sum(found.histogram[layer]) == pytest.approx(1)
        chosen = frequency_classes(model.model, windows)[real] == 1
        assert found.by_frequency[layer][FREQUENCIES[1]] == pytest.approx(float(values[chosen].mean()), abs=1e-5)


def test_measure_depth(model, windows):
    found = measure_depth(model, windows, batch=2)
    sums = torch.zeros(3, dtype=torch.float64)
    for text in texts_of(windows):
        with torch.no_grad():
            outputs = model(torch.tensor([text]), output_hidden_states=True)
            final = outputs.logits[0].double().log_softmax(-1)
            for layer, states in enumerate(outputs.hidden_states[1:-1]):
                lens = model.lm_head(model.model.norm(states[0])).double().log_softmax(-1)
                sums[layer] += (final.exp() * (final - lens)).sum()
    assert found.divergence == pytest.approx((sums / found.positions).tolist(), abs=1e-5)
    assert found.divergence[-1] == 0 < found.divergence[0]


def test_similarity_of_layers(model, make_model, windows):
    same = compare_layers(model, bare_twin(model), windows).similarity
    assert same[0][0] == pytest.approx(1)  # This layer precedes the first memory.
    assert same[2][2] < 0.999
    with pytest.raises(ValueError, match="differ in num_hidden_layers, 3 and 2"):
        config = BACKBONES["llama"]()
        config.num_hidden_layers = 2
        compare_layers(model, AutoModelForCausalLM.from_config(config).eval(), windows)
    with pytest.raises(ValueError, match="differ in vocab_size, 128 and 64"):
        config = BACKBONES["llama"]()
        config.vocab_size = 64
        compare_layers(model, AutoModelForCausalLM.from_config(config).eval(), windows)


def test_linear_cka_ignores_rotations():
    from engram_hf.analysis.depth import _linear_cka

    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=random, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=random, dtype=torch.float64)).Q
    assert _linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    assert _linear_cka(x, torch.randn(200, 8, generator=random, dtype=torch.float64)) < 0.2


def test_measure_attention(model, windows):
    found = measure_attention(model, windows, batch=2)
    entropy, distance = 0.0, 0.0
    for text in texts_of(windows):
        with torch.no_grad():
            weights = model(torch.tensor([text]), output_attentions=True).attentions[1][0].double()
        for query in range(len(text)):
            for head in weights[:, query]:
                entropy += -sum(p * math.log(p) for p in head.tolist() if p > 0) / len(weights)
                distance += sum(p * (query - key) for key, p in enumerate(head.tolist())) / len(weights)
    positions = int(windows.valid.sum())
    assert found.entropy[1] == pytest.approx(entropy / positions, abs=1e-4)
    assert found.distance[1] == pytest.approx(distance / positions, abs=1e-4)
    assert found.entropy[0] == pytest.approx(found.entropy_off[0], abs=1e-6)  # This layer precedes the first memory.
    assert found.entropy[1] != pytest.approx(found.entropy_off[1], abs=1e-4)


def test_attention_that_is_not_returned_is_reported(make_model, windows):
    model = make_model("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        measure_attention(model, windows)


def test_measure_traffic(model, windows):
    """Rows, n-grams and collisions of one head are counted one by one."""
    found = measure_traffic(model, windows, batch=2)
    assert found.positions == int(windows.valid.sum())
    (head,) = (each for each in found.heads if (each.layer, each.order, each.head) == (2, 3, 1))
    row_of, times = {}, collections.Counter()
    for text in texts_of(windows):
        ids = torch.tensor([text])
        compressed = model.model.hashing.compress(ids)[0].tolist()
        rows = model.model.hashing(model.model.hashing.compress(ids))[1, 0, :, 3].tolist()
        for at in range(2, len(text)):
            ngram = tuple(compressed[at - 2 : at + 1])
            assert row_of.setdefault(ngram, rows[at]) == rows[at]
            times[ngram] += 1
    users = collections.Counter(row_of.values())
    shared = [ngram for ngram, row in row_of.items() if users[row] > 1]
    assert (head.ngrams, head.read) == (len(row_of), len(users))
    assert head.shared == pytest.approx(len(shared) / len(row_of))
    assert head.traffic == pytest.approx(sum(times[ngram] for ngram in shared) / sum(times.values()))
    assert head.shared_expected == pytest.approx(1 - (1 - 1 / head.rows) ** (len(row_of) - 1))
    assert found.zipf[2][0][0] == 1 and found.hit_rate[2][-1][1] == pytest.approx(1)
    assert 0 < found.never_read[2] < 1 and len(found.norms[2]["read"]) == 5


def test_collisions_of_a_large_vocabulary_are_as_expected(make_model, tokenizer):
    draw_words = torch.Generator().manual_seed(0)
    texts = [
        " ".join(f"w{int(index)}" for index in torch.randint(100, (200,), generator=draw_words)) for _ in range(8)
    ]
    found = measure_traffic(make_model("llama", engram_vocab_size=997), cut_windows(texts, tokenizer))
    for head in found.heads:
        assert head.shared == pytest.approx(head.shared_expected, abs=0.05)


# --- common behaviour


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_plain_data_and_have_pictures(make_model, windows, tokenizer, dtype):
    model = make_model("llama").to(dtype)
    model.set_attn_implementation("eager")
    measure = (measure_worth, measure_gates, measure_depth, measure_traffic, measure_attention)
    for found in [
        *(each(model, windows) for each in measure),
        compare_layers(model, model, windows),
        read_text(model, tokenizer, "w1 w2 w3"),
    ]:
        assert json.loads(found.to_json())
        assert len(draw(found).axes) >= 1
    with pytest.raises(ValueError, match="no picture of a dict"):
        draw({})


def test_training_mode_and_models_without_memory_are_refused(model, windows):
    bare = bare_twin(model)
    with pytest.raises(ValueError, match="no Engram memory"):
        measure_worth(bare, windows)
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            measure_gates(model, windows)
    finally:
        model.eval()
