"""`scan_rows` finds the rows that get a gradient, from every kind of data, with all filters."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_backbones import LAYER_IDS, build, random_ids, tiny_tokenizer
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import DataCollatorWithFlattening

from engram_hf import EngramForCausalLM
from engram_hf.training import EngramRowsConfig, row_scan, scan_rows

TEXTS = ["word1 word2 word3 word4", "word9 word2 word3", "Word1 Word2 word3"]


@pytest.fixture(scope="module")
def model() -> EngramForCausalLM:
    return build("mixtral")


@pytest.fixture(scope="module")
def text_model() -> EngramForCausalLM:
    tokenizer = tiny_tokenizer()
    model = build("llama", engram_compressed_vocab_size=len(set(tokenizer.token_map.tolist())))
    model.set_token_map(tokenizer)
    return model


def same(one, other) -> bool:
    return list(one) == list(other) and all(torch.equal(one[layer], other[layer]) for layer in one)


def test_rows_are_those_that_get_a_gradient(model, corpus):
    model = copy.deepcopy(model)
    ids = torch.stack([row["input_ids"] for row in corpus])
    model(ids, labels=ids).loss.backward()
    rows = scan_rows(DataLoader(corpus, batch_size=3), None, model)
    assert list(rows) == LAYER_IDS
    for layer, memory in model.model.memories().items():
        # The last position predicts nothing, so its rows may have no gradient.
        last = model.model.prepare_memory(ids).row_ids[LAYER_IDS.index(layer), :, -1].flatten()
        trained = memory.table.weight.grad.abs().sum(1).nonzero().squeeze(1)
        assert set(trained.tolist()) <= set(rows[layer].tolist()) <= set(trained.tolist()) | set(last.tolist())
        assert 0 < len(rows[layer]) < memory.table.num_rows


def test_rows_follow_padding_packing_and_wrapping(model):
    documents = [random_ids(1, length, seed=length)[0] for length in (4, 7)]
    alone = [scan_rows([{"input_ids": ids[None]}], None, model) for ids in documents]
    expected = {layer: torch.unique(torch.cat([rows[layer] for rows in alone])) for layer in LAYER_IDS}
    padded, mask = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, 7, dtype=torch.int64)
    for index, ids in enumerate(documents):
        padded[index, 7 - len(ids) :], mask[index, 7 - len(ids) :] = ids, 1
    features = [{"input_ids": ids.tolist()} for ids in documents]
    packed = DataCollatorWithFlattening(return_seq_idx=True)(features, return_tensors="pt")
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    for reader, batch in [
        (model, {"input_ids": padded, "attention_mask": mask, "labels": padded}),
        (model, packed),
        (model, {"input_ids": packed["input_ids"], "seq_idx": packed["seq_idx"]}),
        (model.model, packed),
        (peft, packed),
        (torch.nn.DataParallel(model), packed),
    ]:
        found = scan_rows([batch], None, reader)
        assert same(found, expected) and found.positions == 11
    assert not same(scan_rows([{"input_ids": packed["input_ids"]}], None, model), expected)


def test_every_kind_of_data_gives_the_same_rows(text_model):
    tokenizer = tiny_tokenizer()
    expected = scan_rows(TEXTS, tokenizer, text_model)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    for data in [
        [{"input_ids": part} for part in ids],
        [{"input_ids": torch.tensor([part])} for part in ids],
        DataLoader([{"input_ids": torch.tensor(part)} for part in ids], batch_size=1),
        (text for text in TEXTS),
    ]:
        found = scan_rows(data, tokenizer, text_model)
        assert same(found, expected) and same(found.counts, expected.counts)
    assert expected.positions == 10


def test_datasets_are_read_by_their_columns(text_model):
    datasets = pytest.importorskip("datasets")
    tokenizer = tiny_tokenizer()
    expected = scan_rows(TEXTS, tokenizer, text_model)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    for columns in ({"text": TEXTS}, {"input_ids": ids}, {"input_ids": ids, "labels": ids}):
        found = scan_rows(datasets.Dataset.from_dict(columns), tokenizer, text_model)
        assert same(found, expected) and same(found.counts, expected.counts)


def test_counts_orders_layers_and_exclusion(text_model):
    tokenizer = tiny_tokenizer()
    every = scan_rows(TEXTS, tokenizer, text_model)
    assert {layer: int(counts.sum()) for layer, counts in every.counts.items()} == dict.fromkeys(LAYER_IDS, 10 * 4)
    orders = [scan_rows(TEXTS, tokenizer, text_model, orders=[order]) for order in (2, 3)]
    for layer in LAYER_IDS:
        assert torch.equal(torch.cat([part[layer] for part in orders]), every[layer])
    often = scan_rows(TEXTS, tokenizer, text_model, min_count=2)
    for layer in LAYER_IDS:
        assert torch.equal(often[layer], every[layer][every.counts[layer] >= 2])
    assert list(scan_rows(TEXTS, tokenizer, text_model, layers=[2])) == [2]
    rest = scan_rows(TEXTS, tokenizer, text_model, exclude=scan_rows(TEXTS[:1], tokenizer, text_model))
    for layer in LAYER_IDS:
        first = scan_rows(TEXTS[:1], tokenizer, text_model)[layer]
        assert torch.equal(rest[layer], every[layer][~torch.isin(every[layer], first)])


def test_long_corpora_are_counted_in_pieces(text_model, monkeypatch):
    whole = scan_rows(TEXTS * 40, tiny_tokenizer(), text_model)
    monkeypatch.setattr(row_scan, "_PENDING", 8)
    pieces = scan_rows(TEXTS * 40, tiny_tokenizer(), text_model)
    assert same(whole, pieces) and same(whole.counts, pieces.counts)


def test_progress_bar_counts_every_text(text_model, monkeypatch):
    bars = io.StringIO()

    def shown(items, **fields):
        return tqdm(items, **{**fields, "delay": 0, "file": bars})

    monkeypatch.setattr(row_scan.logging, "tqdm", shown)
    scan_rows(TEXTS * 20, tiny_tokenizer(), text_model)
    assert "Scanning rows: 100%" in bars.getvalue() and "60/60" in bars.getvalue()


def test_row_scan_prints_as_a_table_and_goes_into_an_adapter(text_model):
    found = scan_rows(TEXTS, tiny_tokenizer(), text_model, orders=[3])
    lines = str(found).splitlines()
    assert lines[0] == "10 positions" and lines[1].split() == ["layer", "order", "read", "kept", "of", "table"]
    assert [line.split()[:2] for line in lines[2:]] == [["1", "3"], ["2", "3"]]
    assert sum(part["kept"] for part in found.summary) == sum(map(len, found.values()))
    peft = get_peft_model(copy.deepcopy(text_model), EngramRowsConfig(rows=found))
    trained = sum(p.shape[0] for p in peft.parameters() if p.requires_grad)
    assert trained == sum(map(len, found.values()))


@pytest.mark.parametrize(
    ("data", "fields", "said"),
    [
        ("word1 word2", {}, "The data is one str"),
        ([], {}, "no tokens in the data"),
        ([""], {}, "no tokens in the data"),
        ([3], {}, "a int; it must be a string"),
        ([{"words": 1}], {}, r"a mapping with \['words'\]"),
        (TEXTS, {"min_count": 0}, "min_count is 0"),
        (TEXTS, {"min_count": 99}, "None of the rows that were read is left"),
        (TEXTS, {"orders": [4]}, r"orders is \[4\], but this model reads n-grams of the orders \[2, 3\]"),
        (TEXTS, {"orders": []}, "orders is"),
        (TEXTS, {"layers": [0]}, "Layer 0 has no Engram memory"),
        (TEXTS, {"layers": []}, "layers is empty"),
    ],
)
def test_bad_input_is_one_sentence(text_model, data, fields, said):
    with pytest.raises(ValueError, match=said):
        scan_rows(data, tiny_tokenizer(), text_model, **fields)


def test_another_tokenizer_is_refused(text_model, tokenizer):
    with pytest.raises(ValueError, match="pass the model's own tokenizer"):
        scan_rows(TEXTS, tokenizer, text_model)
    with pytest.raises(ValueError, match="no tokenizer was passed"):
        scan_rows(TEXTS, None, text_model)
    with pytest.raises(ValueError, match="Linear has no Engram memory"):
        scan_rows(TEXTS, None, torch.nn.Linear(2, 2))
