"""`EngramTokenizer` leaves the wrapped tokenizer unchanged, adds the compressed ids, and keeps both in saved folders."""

import copy
import doctest
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    CodeLlamaTokenizer,
    DataCollatorForLanguageModeling,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    PythonBackend,
    Qwen2Tokenizer,
    T5Tokenizer,
)

import engram_hf.tokenization.tokenization_engram as module
from engram_hf.tokenization import EngramTokenizer
from engram_hf.tokenization.vocabulary_compression import TOKEN_MAP_FILE

CHAT = [{"role": "user", "content": "Où est <special> le café ?"}, {"role": "assistant", "content": "Là."}]

SETTINGS = [
    "model_max_length",
    "padding_side",
    "truncation_side",
    "model_input_names",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
    "special_tokens_map",
    "extra_special_tokens",
    "all_special_ids",
    "added_tokens_decoder",
    "chat_template",
    "vocab_size",
    "pad_token_id",
]


def assert_same_behaviour(one, other, texts):
    """Require equal settings, vocabulary, and results of all methods that users call."""
    for name in SETTINGS:
        assert getattr(one, name) == getattr(other, name), name
    assert len(one) == len(other)
    assert one.get_vocab() == other.get_vocab()
    for text in texts:
        first, second = (
            tok(text, return_offsets_mapping=True, return_special_tokens_mask=True) for tok in (one, other)
        )
        assert dict(first) == dict(second)
        assert first.tokens() == second.tokens() and first.word_ids() == second.word_ids()
        assert one.tokenize(text) == other.tokenize(text)
        for skip in (False, True):
            ids = first["input_ids"]
            assert one.decode(ids, skip_special_tokens=skip) == other.decode(ids, skip_special_tokens=skip)
    pairs = [tok(texts[0], text_pair=texts[2], truncation=True, max_length=12) for tok in (one, other)]
    assert dict(pairs[0]) == dict(pairs[1])
    if one.pad_token is not None:
        batches = [
            tok(texts, padding=True, truncation=True, max_length=9, return_tensors="pt") for tok in (one, other)
        ]
        assert batches[0].keys() == batches[1].keys()
        assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    if one.chat_template is not None:
        chats = [tok.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False) for tok in (one, other)]
        assert chats[0] == chats[1]


def byte_vocabulary(backend: Tokenizer) -> dict:
    model = json.loads(backend.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def piece_vocabulary() -> dict:
    """Return a SentencePiece-like BPE with byte fallback, as Llama and Gemma have it."""
    special = ["<pad>", "<unk>", "<s>", "</s>", "<eos>", "<bos>", "<mask>"]
    pieces = [*special, *[f"<0x{byte:02X}>" for byte in range(256)], *"▁THEhtecafé", "th", "the", "▁the", "TH"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("T", "H")]
    return {"vocab": {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}, "merges": merges}


def build_llama(backend):
    return LlamaTokenizer(**piece_vocabulary(), pad_token="<pad>", add_bos_token=True, add_eos_token=True)


def build_gemma(backend):
    return GemmaTokenizer(**piece_vocabulary(), add_bos_token=True)


def build_qwen2(backend):
    return Qwen2Tokenizer(**byte_vocabulary(backend), pad_token="<pad>", extra_special_tokens=["<|im_start|>"])


def build_gpt2(backend):
    return GPT2Tokenizer(**byte_vocabulary(backend), add_prefix_space=True, pad_token="<pad>")


def build_bert(backend):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cafe", "##s", "full", "?", ".", "emoji", "and", "a"]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)})


def build_t5(backend):
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁the", -3.0), ("e", -4.0)])


CLASSES = [build_llama, build_gemma, build_qwen2, build_gpt2, build_bert, build_t5]


@pytest.fixture
def engram(plain) -> EngramTokenizer:
    return EngramTokenizer.from_tokenizer(plain)


# --- the wrapped tokenizer
# --------------------------------------------------------------------------------------------


def test_from_tokenizer_keeps_the_behaviour_after_reloading(plain, engram, texts, tmp_path):
    assert_same_behaviour(engram, plain, texts)
    engram.save_pretrained(tmp_path)
    loaded = EngramTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is EngramTokenizer
    assert_same_behaviour(loaded, plain, texts)
    assert torch.equal(loaded.token_map, engram.token_map)


@pytest.mark.parametrize("build", CLASSES, ids=lambda build: build.__name__)
def test_from_tokenizer_of_classes_with_their_own_construction(build, stdlib_backend, texts, tmp_path):
    plain = build(stdlib_backend)
    engram = EngramTokenizer.from_tokenizer(plain)
    engram.save_pretrained(tmp_path)  # This runs before any call: padding once changes the side in the Rust tokenizer.
    assert type(engram) is EngramTokenizer and engram.is_fast
    assert_same_behaviour(engram, plain, texts)
    assert (engram.add_bos_token, engram.add_eos_token) == (plain.add_bos_token, plain.add_eos_token)
    assert not {"vocab", "merges"} & set(json.loads((tmp_path / "tokenizer_config.json").read_text()))
    loaded = EngramTokenizer.from_pretrained(tmp_path)
    assert_same_behaviour(loaded, plain, texts)
    assert torch.equal(loaded.token_map, engram.token_map)


def test_switching_bos_off_later_works_as_in_the_wrapped_class(stdlib_backend):
    plain = build_llama(stdlib_backend)
    engram = EngramTokenizer.from_tokenizer(plain)
    assert engram("the")["input_ids"][0] == engram.bos_token_id
    engram.add_bos_token = plain.add_bos_token = False
    assert engram("the")["input_ids"] == plain("the")["input_ids"]
    assert engram("the")["input_ids"][0] != engram.bos_token_id


def test_from_tokenizer_copies_and_is_idempotent(plain, engram):
    assert EngramTokenizer.from_tokenizer(engram) is engram
    size = len(plain)
    engram.add_tokens(["<only here>"])
    engram.padding_side = "right"
    assert (len(plain), plain.padding_side) == (size, "left")
    assert len(engram) == size + 1


def test_settings_changed_after_construction_are_kept(plain, tmp_path):
    plain.padding_side, plain.model_max_length, plain.pad_token = "right", 33, "<eos>"
    engram = EngramTokenizer.from_tokenizer(plain)
    engram.truncation_side = "right"
    engram.save_pretrained(tmp_path)
    for tokenizer in (engram, EngramTokenizer.from_pretrained(tmp_path)):
        assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "right")
        assert (tokenizer.model_max_length, tokenizer.pad_token) == (33, "<eos>")


def test_train_new_from_iterator_makes_a_new_map(engram):
    retrained = engram.train_new_from_iterator([["other words and other words again"] * 20], vocab_size=300)
    assert type(retrained) is EngramTokenizer
    assert len(retrained.token_map) == len(retrained) != len(engram)


# --- the compressed ids -----------------------------------------------------------------------------------------------


def test_real_tokenizer_loads_plain_and_compresses_to_the_known_size(deepseek_file):
    engram = EngramTokenizer.from_pretrained(deepseek_file.parent)
    assert (len(engram), engram.compressed_vocab_size) == (129_280, 99_092)
    assert str(engram.compression_summary()).startswith("129,280 token ids -> 99,092 compressed ids (23.35% fewer)")


def test_token_map_covers_added_tokens_and_is_a_copy(engram):
    token_map = engram.token_map
    assert token_map.dtype == torch.int64 and token_map.shape == (len(engram),)
    assert len(engram) > engram.vocab_size
    token_map.zero_()
    assert engram.token_map.any()
    assert engram.compressed_vocab_size == int(engram.token_map.max()) + 1 < len(engram)


def test_compress_keeps_kind_shape_dtype(engram):
    expected = engram.token_map
    ids = torch.arange(24).reshape(2, 3, 4)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        compressed = engram.compress(ids.to(dtype))
        assert compressed.dtype == dtype and torch.equal(compressed.long(), expected[ids])
    for dtype in (np.int64, np.uint16):
        array = ids.numpy().astype(dtype)
        assert engram.compress(array).dtype == dtype
        assert engram.compress(array).tolist() == expected[ids].tolist()
    assert engram.compress(ids.tolist()) == expected[ids].tolist()
    assert engram.compress([[5, 6], [7], []]) == [expected[[5, 6]].tolist(), [int(expected[7])], []]
    assert engram.compress((5, (6, 7))) == (int(expected[5]), (int(expected[6]), int(expected[7])))
    assert engram.compress(np.int32(9)) == engram.compress(9) == int(expected[9])
    assert engram.compress(torch.tensor(9)).shape == () and engram.compress(np.array(9)).shape == ()
    assert engram.compress([]) == [] and engram.compress(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0)
    assert isinstance(engram.compress([1])[0], int)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, -100], "got -100"),
        (torch.tensor([[10**6]]), "got 1000000"),
        ([1.5], "integer token ids, got float64"),
        (torch.ones(2), "integer token ids, got torch.float32"),
        (torch.ones(2, dtype=torch.bool), "integer token ids, got torch.bool"),
        (np.ones(2, dtype=bool), "integer token ids, got bool"),
        (["a"], "integer token ids"),
    ],
)
def test_compress_refuses_values_that_are_not_token_ids(engram, ids, message):
    with pytest.raises(ValueError, match=message):
        engram.compress(ids)


def test_compressed_tokens_returns_exactly_the_group(engram):
    vocabulary = engram.get_vocab()
    the = engram.compress(vocabulary["the"])
    tokens = engram.compressed_tokens(the)
    assert {"the", "Ġthe", "The", "ĠThe"} <= set(tokens)
    assert sorted(engram.convert_tokens_to_ids(tokens)) == torch.nonzero(engram.token_map == the).flatten().tolist()
    groups = [engram.compressed_tokens(group) for group in range(engram.compressed_vocab_size)]
    assert sum(map(len, groups)) == len(engram) and all(groups)
    for wrong in (-1, engram.compressed_vocab_size):
        with pytest.raises(ValueError, match=f"no compressed id {wrong}"):
            engram.compressed_tokens(wrong)


def test_summary_counts_and_shows_the_largest_groups(engram):
    summary = engram.compression_summary(examples=3)
    sizes = torch.bincount(engram.token_map)
    assert (summary.token_count, summary.compressed_count) == (len(engram), engram.compressed_vocab_size)
    assert summary.merged_groups == int((sizes > 1).sum())
    assert [len(texts) for texts in summary.groups.values()] == sizes.sort(descending=True).values[:3].tolist()
    assert summary.reduction == pytest.approx(1 - len(sizes) / len(engram))
    assert len(str(summary).splitlines()) == 4


def test_added_tokens_extend_the_map_without_renumbering(engram, tmp_path):
    before = engram.token_map
    return_id = engram.get_vocab()["return"]
    assert engram.add_tokens(["ReTuRN", AddedToken("<tool>", normalized=False)]) == 2
    engram.add_special_tokens({"extra_special_tokens": ["<TOOL>", "<other>"]}, replace_extra_special_tokens=False)
    after = engram.token_map
    assert torch.equal(after[: len(before)], before)
    fresh = engram.compressed_vocab_size - 2
    assert after[len(before) :].tolist() == [int(before[return_id]), fresh, fresh, fresh + 1]
    assert torch.equal(
        EngramTokenizer.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=engram._tokenizer)).token_map, after
    )
    assert engram.compress([len(engram) - 1]) == [fresh + 1]
    engram.save_pretrained(tmp_path)
    assert torch.equal(EngramTokenizer.from_pretrained(tmp_path).token_map, after)


# --- saving and loading -----------------------------------------------------------------------------------------------


def test_save_pretrained_writes_map_and_code_and_names_the_map(engram, tmp_path):
    files = engram.save_pretrained(tmp_path)
    names = {Path(file).name for file in files}
    assert TOKEN_MAP_FILE in names and all(Path(file).is_file() for file in files)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == names | {"tokenization_engram.py", "vocabulary_compression.py"}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "EngramTokenizer"
    assert config["auto_map"] == {"AutoTokenizer": ["tokenization_engram.EngramTokenizer", None]}


def test_push_to_hub_uploads_a_new_map(engram, tmp_path):
    """It uploads what changed since `save_pretrained` began, so the inherited method must be the one that writes."""
    assert EngramTokenizer.save_pretrained is PreTrainedTokenizerFast.save_pretrained
    engram.save_pretrained(tmp_path)
    before = engram._get_files_timestamps(tmp_path)
    engram.add_tokens(["<later>"])
    engram.save_pretrained(tmp_path)
    assert (tmp_path / TOKEN_MAP_FILE).stat().st_mtime > before[TOKEN_MAP_FILE]


def test_from_pretrained_wraps_a_plain_folder(plain, texts, tmp_path):
    plain.save_pretrained(tmp_path)
    engram = EngramTokenizer.from_pretrained(tmp_path)
    assert type(engram) is EngramTokenizer
    assert_same_behaviour(engram, AutoTokenizer.from_pretrained(tmp_path), texts)
    assert torch.equal(engram.token_map, EngramTokenizer.from_tokenizer(plain).token_map)


def test_saved_folder_loads_as_a_plain_tokenizer(plain, engram, texts, tmp_path):
    engram.save_pretrained(tmp_path)
    assert_same_behaviour(PreTrainedTokenizerFast.from_pretrained(tmp_path), plain, texts)


def test_tokens_added_while_loading_extend_the_map(engram, tmp_path):
    engram.save_pretrained(tmp_path)
    loaded = EngramTokenizer.from_pretrained(tmp_path, sep_token="<sep>", extra_special_tokens=["<PAD>"])
    assert len(loaded) == len(engram) + 2
    assert torch.equal(loaded.token_map[: len(engram)], engram.token_map)
    assert loaded.compress(loaded.get_vocab()["<PAD>"]) == engram.compress(engram.pad_token_id)


def test_map_of_another_tokenizer_is_refused(engram, stdlib_backend, tmp_path):
    engram.save_pretrained(tmp_path)
    tokenizer_json = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = tokenizer_json["model"]["vocab"]
    vocabulary["return"], vocabulary["import"] = vocabulary["import"], vocabulary["return"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    with pytest.raises(ValueError, match="other tokens under the same ids"):
        EngramTokenizer.from_pretrained(tmp_path)
    longer = copy.deepcopy(engram)
    longer.add_tokens(["one more"])
    longer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ValueError, match=f"maps {len(engram)} token ids but the tokenizer beside it has {len(longer)}"
    ):
        EngramTokenizer.from_pretrained(tmp_path)
    (tmp_path / TOKEN_MAP_FILE).unlink()
    with pytest.raises(ValueError, match=f"without its {TOKEN_MAP_FILE}"):
        EngramTokenizer.from_pretrained(tmp_path)


def test_added_token_of_the_vocabulary_keeps_its_old_id(engram, tmp_path):
    """As an added token it decodes differently (its raw spelling), but the table was trained with the old id."""
    before = engram.token_map
    size = len(engram)
    engram.add_tokens(["Ġthe"])
    assert len(engram) == size
    engram.save_pretrained(tmp_path)
    assert torch.equal(EngramTokenizer.from_pretrained(tmp_path).token_map, before)


# --- refusals ---------------------------------------------------------------------------------------------------------


class SlowTokenizer(PythonBackend):
    vocab_size = 2

    def get_vocab(self):
        return {"a": 0, "b": 1}

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index):
        return "ab"[index]


def test_slow_tokenizers_and_other_objects_are_refused():
    with pytest.raises(ValueError, match=r"wraps fast tokenizers .*, got SlowTokenizer: load the fast version"):
        EngramTokenizer.from_tokenizer(SlowTokenizer())
    with pytest.raises(ValueError, match="got Tokenizer"):
        EngramTokenizer.from_tokenizer(Tokenizer(models.BPE()))


def test_tokenizers_with_python_overrides_are_refused(plain, tmp_path):
    class Shouting(PreTrainedTokenizerFast):
        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs).upper()

    with pytest.raises(ValueError, match=r"Shouting does part of its work in Python \(_decode\)"):
        EngramTokenizer.from_tokenizer(Shouting(tokenizer_object=plain.backend_tokenizer))
    code_llama = CodeLlamaTokenizer(**piece_vocabulary())
    with pytest.raises(ValueError, match=r"CodeLlamaTokenizer .*\(_encode_plus, tokenize\)"):
        EngramTokenizer.from_tokenizer(code_llama)
    code_llama.save_pretrained(tmp_path)
    without = EngramTokenizer.from_tokenizer(PreTrainedTokenizerFast.from_pretrained(tmp_path))
    assert without("the")["input_ids"] == code_llama("the")["input_ids"]


# --- other libraries
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_copies_and_data_loader_workers(engram, texts):
    """A spawned worker receives the tokenizer as part of a collator."""
    copied = copy.deepcopy(engram)
    copied.add_tokens(["<copy only>"])
    assert len(copied.token_map) == len(engram.token_map) + 1
    batch = DataLoader(
        texts, batch_size=len(texts), collate_fn=Compressing(engram), num_workers=1, multiprocessing_context="spawn"
    )
    expected = Compressing(engram)(texts)
    (found,) = list(batch)
    assert torch.equal(found, expected)


class Compressing:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts):
        return self.tokenizer.compress(self.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"])


def test_language_modeling_collator(engram, texts):
    examples = [engram(text) for text in texts]
    batch = DataCollatorForLanguageModeling(engram, mlm=False)(examples)
    assert batch["input_ids"].shape == batch["labels"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert engram.compress(batch["input_ids"]).shape == batch["input_ids"].shape
    masked = DataCollatorForLanguageModeling(engram, mlm_probability=0.5)(examples)
    assert (masked["input_ids"] == engram.mask_token_id).any()


def test_docstring_examples_run():
    result = doctest.testmod(module)
    assert result.attempted >= 8 and result.failed == 0
