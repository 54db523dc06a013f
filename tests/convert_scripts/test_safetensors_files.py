"""Headers and indexes of unknown origin: every damage is named in an error."""

import json
import random
import struct

import pytest
from safetensors import safe_open

from engram_hf.convert_scripts.deepseek_v41 import DEEPSEEK_V41
from engram_hf.convert_scripts.safetensors_files import ConversionError, read_checkpoint, read_shard
from engram_hf.convert_scripts.tensor_rules import check_tensors, map_tensors
from engram_hf.safetensors_engram import FileFormatError, header_bytes, read_json

pytestmark = pytest.mark.any_version


def check(folder):
    """Run the checks of a conversion before it writes, without the hash."""
    config = read_json(folder / "config.json")
    checkpoint = read_checkpoint(folder)
    check_tensors(DEEPSEEK_V41, map_tensors(DEEPSEEK_V41, config), checkpoint.tensors)
    return checkpoint


def test_miniature_is_accepted(tiny):
    checkpoint = check(tiny)
    assert len(checkpoint.tensors) == 830
    assert checkpoint.size == sum(path.stat().st_size for path in tiny.glob("model-*.safetensors"))


def test_spans_agree_with_the_safetensors_library(tiny):
    checkpoint = read_checkpoint(tiny)
    for shard in checkpoint.shards.values():
        with safe_open(shard.path, "pt") as file:
            assert set(file.keys()) == set(shard.tensors)
            for name, span in shard.tensors.items():
                piece = file.get_slice(name)
                assert (piece.get_dtype(), tuple(piece.get_shape())) == (span.dtype, span.shape)
    span = checkpoint.tensors["layers.1.hc_attn_fn"]
    with safe_open(span.path, "np") as file:
        expected = file.get_tensor(span.name)[3:5].tobytes()
    rows = span.rows(3, 5)
    assert span.path.read_bytes()[rows.offset : rows.offset + rows.size] == expected


def test_written_headers_are_aligned_and_accepted(tmp_path):
    head = header_bytes([("b", "F32", (2, 3)), ("a", "BF16", ()), ("c", "I8", (0, 4))])
    path = tmp_path / "x.safetensors"
    path.write_bytes(head + bytes(26))
    assert len(head) % 8 == 0
    assert {name: span.shape for name, span in read_shard(path).tensors.items()} == {"b": (2, 3), "a": (), "c": (0, 4)}
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {"a", "b", "c"}


def test_shard_truncated_anywhere_is_refused(checkpoint):
    draw = random.Random(0)
    for _ in range(20):
        path = draw.choice(checkpoint.shards)
        whole = path.read_bytes()
        path.write_bytes(whole[: draw.randrange(len(whole))])
        with pytest.raises(FileFormatError, match=path.name):
            check(checkpoint.folder)
        path.write_bytes(whole)
    check(checkpoint.folder)


def test_flipped_byte_anywhere_in_a_header_is_refused(checkpoint):
    draw = random.Random(1)
    for _ in range(60):
        path = draw.choice(checkpoint.shards)
        whole = bytearray(path.read_bytes())
        position = draw.randrange(8 + struct.unpack("<Q", whole[:8])[0])
        original = whole[position]
        whole[position] ^= 1 << draw.randrange(8)
        path.write_bytes(whole)
        with pytest.raises((FileFormatError, ConversionError)):
            check(checkpoint.folder)
        whole[position] = original
        path.write_bytes(whole)
    check(checkpoint.folder)


def entry(dtype="F32", shape=(2,), start=0, stop=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


BAD_HEADERS = {
    "no object": ([], "JSON object"),
    "unknown dtype": ({"a": entry("F31")}, "unknown dtype 'F31'"),
    "dtype is no text": ({"a": entry(["F32"])}, "unknown dtype"),
    "negative size": ({"a": entry(shape=[-2])}, "lists of sizes"),
    "boolean size": ({"a": entry(shape=[True, 2])}, "lists of sizes"),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 4, 8]}}, "lists of sizes"),
    "extra key": ({"a": {**entry(), "byte_order": "big"}}, "expected dtype, shape and data_offsets"),
    "size and shape disagree": ({"a": entry(shape=[3])}, "12 bytes"),
    "half a byte": ({"a": entry("F4", shape=[17])}, "8 bytes"),
    "hole": ({"a": entry(), "b": entry(start=12, stop=20)}, "leave a hole"),
    "overlap": ({"a": entry(), "b": entry(start=4, stop=12)}, "overlap"),
    "starts late": ({"a": entry(start=4, stop=12)}, "leave a hole"),
    "strange metadata": ({"__metadata__": {"format": "tf"}, "a": entry()}, "metadata"),
    "huge size": ({"a": entry(shape=[2**62, 2**62])}, "bytes"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_malformed_headers_are_refused(tmp_path, case):
    header, words = BAD_HEADERS[case]
    text = json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(FileFormatError, match=words):
        read_shard(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a whole safetensors file: it has 0 bytes"),
        (b"\x01\x00", "not a whole safetensors file: it has 2 bytes"),
        (struct.pack("<Q", 1 << 62), "announces a header"),
        (struct.pack("<Q", 100) + b"{}", "announces a header"),
        (struct.pack("<Q", 2) + b"{}" + b"x", "its header describes 10"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "not valid JSON"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "JSON"),
        (struct.pack("<Q", 10_007) + b'{"a":1' + b"0" * 10_000 + b"}", "JSON"),
        (struct.pack("<Q", 33) + b'{"a":{"dtype":"F32"},"a":{"x":1}}', "twice"),
    ],
)
def test_malformed_bytes_are_refused(tmp_path, content, words):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=words):
        read_shard(path)


def test_header_of_more_than_100_mb_is_not_read(tmp_path):
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    with pytest.raises(FileFormatError, match="a header may have 100000000"):
        read_shard(path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../b", "..", "", "sub/x.safetensors", "a\\b"])
def test_index_may_not_leave_its_folder(checkpoint, name):
    checkpoint.edit_index(lambda index: index.update({"norm.weight": name}))
    with pytest.raises(FileFormatError, match="without a path"):
        check(checkpoint.folder)


def test_index_with_a_missing_file_is_refused(checkpoint):
    checkpoint.shards[3].unlink()
    with pytest.raises(ConversionError, match=r"model-00004-of-00014\.safetensors, which is not in the folder"):
        check(checkpoint.folder)


def test_index_with_a_missing_tensor_is_refused(checkpoint):
    checkpoint.edit_index(
        lambda index: index.update({"layers.99.attn.wkv.weight": "model-00002-of-00014.safetensors"})
    )
    with pytest.raises(ConversionError, match=r"layers\.99\.attn\.wkv\.weight"):
        check(checkpoint.folder)


def test_tensor_that_the_index_does_not_name_is_refused(checkpoint):
    checkpoint.edit_index(lambda index: index.pop("layers.3.attn.attn_sink"))
    with pytest.raises(ConversionError, match="does not name"):
        check(checkpoint.folder)


def test_tensor_in_two_shards_is_refused(checkpoint):
    stolen = {}
    checkpoint.rewrite(checkpoint.shards[1], lambda tensors: stolen.update(sink=tensors["layers.0.attn.attn_sink"]))
    checkpoint.rewrite(
        checkpoint.shards[2], lambda tensors: tensors.update({"layers.0.attn.attn_sink": stolen["sink"]})
    )
    with pytest.raises(ConversionError, match="may be in one file only"):
        check(checkpoint.folder)


def test_index_that_names_a_tensor_twice_is_refused(checkpoint):
    path = checkpoint.folder / "model.safetensors.index.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"weight_map": {', '"weight_map": {"norm.weight": "x",', 1), encoding="utf-8")
    with pytest.raises(FileFormatError, match="twice"):
        check(checkpoint.folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{"])
def test_malformed_indexes_are_refused(checkpoint, content):
    (checkpoint.folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    with pytest.raises((FileFormatError, ConversionError), match=r"model\.safetensors\.index\.json"):
        check(checkpoint.folder)
