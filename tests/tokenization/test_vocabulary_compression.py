"""Vocabulary compression: known answers, the fast path against its definition, growth, missing ids."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from engram_hf.tokenization import EngramTokenizer
from engram_hf.tokenization import vocabulary_compression as vc


def test_real_tokenizer_has_the_known_map(deepseek, golden):
    known = json.loads((golden / "known_answers/hashing.json").read_text())
    token_map = vc.build_token_map(deepseek)
    assert len(token_map) == known["tokenizer_vocab_size"] == 129_280
    assert token_map.max() + 1 == known["compressed_vocab_size"] == 99_092
    assert token_map[:64].tolist() == known["token_map_head"][:64]
    assert vc.map_digest(token_map) == known["token_map_sha256_int32_le"]


def test_miniature_tokenizer_has_the_golden_map(golden):
    folder = golden / "deepseek_v41_tiny"
    token_map = vc.build_token_map(Tokenizer.from_file(str(folder / "tokenizer.json")))
    expected = load_file(folder / "golden.safetensors")["engram.token_map"]
    assert token_map.tolist() == expected.tolist()
    assert token_map.max() + 1 == 885


@pytest.mark.parametrize("name", ["deepseek", "stdlib_backend"])
def test_fast_keys_equal_the_definition_for_every_id(name, request):
    tokenizer = request.getfixturevalue(name)
    texts = vc.token_texts(tokenizer)
    assert vc.token_keys(tokenizer, texts) == vc.reference_token_keys(tokenizer, len(texts))


def test_joined_normalization_equals_one_call_per_text():
    """Every character of the basic plane is tried alone and between others, then random strings of difficult ones."""
    plane = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    awkward = list(vc.WHITESPACE) + list("aÅΣσς\u0301\u0327\u1100\u1161\u11a8ﬁ½İǅ\x1c\x1f\0\u200b\ue000\ue001\ufffd")
    draw = random.Random(0)
    texts = plane + ["Σ" + char + " Σ" for char in plane[::7]]
    texts += ["".join(draw.choices(awkward, k=draw.randrange(6))) for _ in range(20_000)]
    texts += [first + second for first in map(chr, range(128)) for second in map(chr, range(128))]
    assert vc.normalize_all(texts) == [vc.NORMALIZER.normalize_str(text) for text in texts]


@pytest.mark.parametrize("reserved", [vc.LONE_SPACE, vc.SEPARATOR])
def test_texts_with_a_reserved_character_are_normalized_alike(reserved):
    texts = ["é", reserved, f" {reserved} é", f"é{reserved}{reserved}"]
    assert vc.normalize_all(texts) == [vc.NORMALIZER.normalize_str(text) for text in texts]


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        (" The", "the"),
        ("CAFÉ", "cafe"),
        ("cafe\u0301", "cafe"),
        ("Ｆ", "f"),
        ("ﬁ", "fi"),
        (" ", " "),
        ("\t\r\n ", " "),
        ("\u3000", " "),  # NFKC makes it a plain space first.
        ("\u2028", ""),  # It is stripped, but is not one of the characters that become a space.
        ("a\t\n b", "a b"),
        ("a\vb", "a\vb"),
        ("\u0301", ""),
        ("\x1c", "\x1c"),  # Python would strip it, Rust does not.
    ],
)
def test_normalization_of_known_texts(text, normalized):
    assert vc.NORMALIZER.normalize_str(text) == normalized
    assert vc.normalize_all([text]) == [normalized]


def word_level(vocabulary: dict[str, int]) -> Tokenizer:
    return Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))


def test_empty_result_falls_back_to_the_text_and_partial_bytes_to_the_token():
    tokenizer = word_level({"\u0301": 0, "\u0327": 1, "\u0301\u0301": 2})
    assert vc.build_token_map(tokenizer).tolist() == [0, 1, 2], "accents alone are different tokens"
    tokenizer = Tokenizer(models.BPE({"Ã": 0, "©": 1, "Ã©": 2, "Ġ": 3, "é": 4}, [("Ã", "©")]))
    tokenizer.decoder = decoders.ByteLevel()
    assert vc.reference_token_keys(tokenizer, 5) == ["Ã", "©", "e", " ", "é"]
    assert vc.build_token_map(tokenizer).tolist() == [0, 1, 2, 3, 4]


def test_extending_in_steps_gives_the_map_of_the_whole():
    tokenizer = word_level({"the": 0, "cat": 1})
    token_map = vc.build_token_map(tokenizer)
    for added in (["THE", "dog"], ["Dog", "<new>"], ["CAT", "<NEW>", "bird"]):
        tokenizer.add_tokens(added)
        grown = vc.build_token_map(tokenizer, token_map)
        assert grown[: len(token_map)].tolist() == token_map.tolist()
        token_map = grown
    assert token_map.tolist() == [0, 1, 0, 2, 2, 3, 1, 3, 4]
    assert token_map.tolist() == vc.build_token_map(tokenizer).tolist()


def test_tokenizer_smaller_than_the_map_is_refused():
    with pytest.raises(ValueError, match="covers 3 ids but the tokenizer now has 2"):
        vc.build_token_map(word_level({"a": 0, "b": 1}), np.arange(3))


def test_vocabulary_with_missing_ids_reaches_the_largest_id():
    token_map = vc.build_token_map(word_level({"a": 0, "A": 3, "b": 5}))
    assert token_map.tolist() == [0, 1, 1, 0, 1, 2]


def test_map_file_is_int32_and_leaves_no_temporary_file(tmp_path, stdlib_backend):
    token_map = vc.build_token_map(stdlib_backend)
    path = tmp_path / vc.TOKEN_MAP_FILE
    vc.write_token_map(path, token_map, stdlib_backend)
    assert [file.name for file in tmp_path.iterdir()] == [vc.TOKEN_MAP_FILE]
    stored = load_file(path)["token_map"]
    assert str(stored.dtype) == "torch.int32"
    assert stored.tolist() == token_map.tolist()
    assert vc.read_token_map(path, stdlib_backend).tolist() == token_map.tolist()


@pytest.mark.slow
def test_every_save_gives_the_same_bytes(tmp_path, stdlib_backend):
    """Other processes seed the hashes of strings differently."""
    plain = PreTrainedTokenizerFast(tokenizer_object=stdlib_backend)
    EngramTokenizer.from_tokenizer(plain).save_pretrained(tmp_path / "saved")
    code = """
import sys
from engram_hf import EngramTokenizer
tokenizer = EngramTokenizer.from_pretrained(sys.argv[1])
for number in range(4):
    tokenizer.save_pretrained(f"{sys.argv[2]}-{number}")
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "saved"), str(tmp_path / f"again-{seed}")],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        )
        for seed in (1, 2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    again = [path.read_bytes() for path in tmp_path.glob(f"again-*/{vc.TOKEN_MAP_FILE}")]
    assert len(again) == 8 and set(again) == {(tmp_path / "saved" / vc.TOKEN_MAP_FILE).read_bytes()}


def test_map_file_by_another_writer_is_read(tmp_path, stdlib_backend):
    """Earlier files were written by safetensors, with the members of the metadata in any order."""
    path, token_map = tmp_path / vc.TOKEN_MAP_FILE, vc.build_token_map(stdlib_backend)
    metadata = {
        "vocabulary_sha256": vc.vocabulary_digest(stdlib_backend, len(token_map)),
        "map_sha256": vc.map_digest(token_map),
        "format_version": "1",
    }
    save_file({"token_map": torch.from_numpy(token_map).int()}, path, metadata=metadata)
    assert vc.read_token_map(path, stdlib_backend).tolist() == token_map.tolist()


def test_every_changed_bit_of_the_map_file_is_refused(tmp_path, stdlib_backend):
    path = tmp_path / vc.TOKEN_MAP_FILE
    vc.write_token_map(path, vc.build_token_map(stdlib_backend), stdlib_backend)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged"):
        vc.read_token_map(path, stdlib_backend)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="not a readable token map"):
        vc.read_token_map(path, stdlib_backend)
    path.write_bytes(good.replace(b'"format_version":"1"', b'"format_version":"9"'))
    with pytest.raises(ValueError, match="format version 9, expected 1"):
        vc.read_token_map(path, stdlib_backend)


def test_map_of_another_vocabulary_is_refused(tmp_path):
    path = tmp_path / vc.TOKEN_MAP_FILE
    made_for = word_level({"a": 0, "b": 1, "c": 2})
    vc.write_token_map(path, vc.build_token_map(made_for), made_for)
    with pytest.raises(ValueError, match="other tokens under the same ids"):
        vc.read_token_map(path, word_level({"a": 0, "c": 1, "b": 2}))
    with pytest.raises(ValueError, match="maps 3 token ids but the tokenizer beside it has 2"):
        vc.read_token_map(path, word_level({"a": 0, "b": 1}))
    longer = word_level({"a": 0, "b": 1, "c": 2, "d": 3})
    with pytest.raises(ValueError, match="maps 3 token ids but the tokenizer beside it has 4"):
        vc.read_token_map(path, longer)
    assert vc.read_token_map(path, longer, may_be_new=["d"]).tolist() == [0, 1, 2, 3]
