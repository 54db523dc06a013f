"""The table format: other readers and ours read what is written, and damaged files are never read."""

import contextlib
import copy
import errno
import gc
import json
import math
import mmap
import os
import pickle
import random
import re
import runpy
import shutil
import struct
import sys
import threading
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from table_models import write_table

from engram_hf import table_writer_engram
from engram_hf.hashing_engram import NgramHasher
from engram_hf.row_sources_engram import MappedRows
from engram_hf.safetensors_engram import FileFormatError, read_header
from engram_hf.saving_engram import manifest_entry, table_file_name, write_manifest
from engram_hf.table_check_engram import check_folder, main, read_token_map
from engram_hf.table_engram import apply_global_scale, dequantize_rows, read_rows
from engram_hf.table_format_engram import (
    METADATA_KEY,
    PAGE,
    ROW_FORMATS,
    TableFormatError,
    describe_table,
    file_description,
    read_manifest,
    read_tables,
    require_same_hash,
    tables_in_checkpoint,
    token_map_digest,
)
from engram_hf.table_writer_engram import (
    ERROR_EDGES,
    QuantizationError,
    TableWriter,
    compare_rows,
    quantize_rows,
    quantize_table,
)

pytestmark = pytest.mark.any_version

WIDTH, LAYERS = 32, [1, 3]
TOKEN_MAP = torch.arange(60, dtype=torch.int32) % 50


@pytest.fixture(scope="module")
def hasher() -> NgramHasher:
    hasher = NgramHasher(
        layer_ids=LAYERS,
        max_ngram=3,
        bucket_counts=[11, 13],
        heads=2,
        vocab_size=64,  # This is four ids more than the tokenizer has.
        compressed_vocab_size=50,
        pad_token_id=2,
    )
    for name, constant in hasher.derive_constants().items():
        getattr(hasher, name).copy_(constant)
    hasher.token_map[:60] = TOKEN_MAP
    return hasher


def stored_rows(dtype: str, count: int, seed: int = 0):
    """Return values and scales of random rows."""
    rows = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    if ROW_FORMATS[dtype].scale_dtype is not None:
        return quantize_rows(rows, ROW_FORMATS[dtype].name, torch.tensor([3.0]))
    return rows.to({"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]), None


def write_folder(folder: Path, hasher: NgramHasher, dtype: str = "BF16", parts: int = 1) -> dict[int, tuple]:
    """Write a folder of tables for both layers; return the rows in it."""
    folder.mkdir(exist_ok=True)
    entries, content = {}, {}
    for index, layer in enumerate(LAYERS):
        description = describe_table(hasher, index, width=WIDTH, dtype=dtype)
        values, scale = content[layer] = stored_rows(dtype, description.num_rows, seed=layer)
        cuts = [round(description.num_rows * part / parts) for part in range(parts + 1)]
        locations = []
        for part, (first, stop) in enumerate(pairwise(cuts)):
            name, own = table_file_name(layer, part, parts), description.with_rows(first, stop)
            write_table(folder / name, own, values[first:stop], None if scale is None else scale[first:stop])
            locations.append((name, (first, stop), own.tensors))
        entries[layer] = manifest_entry(locations)
    write_manifest(folder, entries)
    return content


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", ROW_FORMATS)
def test_rows_are_read_back_bit_for_bit(tmp_path, hasher, dtype, parts):
    content = write_folder(tmp_path, hasher, dtype, parts)
    for layer, table in read_tables(tmp_path).items():
        values, scale = content[layer]
        rows = MappedRows(table)
        ids = torch.tensor([0, table.num_rows - 1, 7, 7, table.num_rows // 2])
        found, found_scale = rows.fetch(ids)
        assert found.dtype == values.dtype
        assert torch.equal(bits(found), bits(values[ids]))
        assert torch.equal(bits(rows.read(3, table.num_rows)[0]), bits(values[3:]))
        assert (scale is None) == (found_scale is None)
        if scale is not None:
            assert torch.equal(bits(found_scale), bits(scale[ids].float() / 3 if dtype == "NVFP4" else scale[ids]))
            assert torch.equal(bits(rows.read(3, table.num_rows)[1]), bits(scale[3:]))
    assert [report.aligned for report in check_folder(tmp_path, rows=True)] == [True, True]


def test_rows_begin_at_a_page_and_safetensors_reads_the_file(tmp_path, hasher):
    content = write_folder(tmp_path, hasher, "F8_E4M3")
    path = tmp_path / table_file_name(1)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (8 + length) % PAGE == 0
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()[METADATA_KEY])
        weight = file.get_tensor(described["tensors"]["weight"])
    assert torch.equal(bits(weight), bits(content[1][0]))


def test_file_alone_leads_from_ids_to_rows(tmp_path, hasher):
    """The page's own pseudocode, with nothing but the file's description, gives the hasher's rows."""
    write_folder(tmp_path, hasher)
    d = file_description(read_header(tmp_path / table_file_name(3)))
    compressed = [5, 9, 2, 41]
    rows = []
    for p in range(len(compressed)):
        mix, found = compressed[p] * d.multipliers[0], []
        for k in range(1, len(d.orders) + 1):
            token = compressed[p - k] if p >= k else d.pad_id
            mix ^= (token * d.multipliers[k] + 2**63) % 2**64 - 2**63
            found += [offset + mix % prime for prime, offset in zip(d.primes[k - 1], d.offsets[k - 1], strict=True)]
        rows.append(found)
    assert hasher(torch.tensor([compressed]))[1, 0].tolist() == rows


def test_description_names_the_token_map_of_the_tokenizer(hasher):
    d = describe_table(hasher, 0, width=WIDTH, dtype="BF16")
    assert (d.token_map_ids, d.token_map_sha256) == (60, token_map_digest(TOKEN_MAP))
    assert d.pad_id == 2
    assert d.num_rows == int(hasher.primes[0].sum())
    again = copy.deepcopy(hasher)
    again.token_map[59] = 0  # It is as valid an id as any other.
    assert describe_table(again, 0, width=WIDTH, dtype="BF16").token_map_ids == 60


def test_header_may_list_tensors_in_any_order(tmp_path, hasher):
    content = write_folder(tmp_path, hasher, "I8")
    edit_header(tmp_path / table_file_name(1), lambda header: header.update([header.popitem(), header.popitem()]))
    found, scale = MappedRows(read_tables(tmp_path)[1]).read(0, 60)
    assert torch.equal(found, content[1][0]) and torch.equal(scale, content[1][1])


def test_upstream_shard_is_read_unchanged(tmp_path):
    values, scale = stored_rows("F8_E4M3", 20)
    names = {"weight": "layers.2.engram.embed.weight", "scale": "layers.2.engram.embed.scale"}
    # The shard holds another tensor of odd size, so its rows do not begin at a page, and it has no description.
    save_file({names["weight"]: values, names["scale"]: scale, "a": torch.zeros(3)}, tmp_path / "shard.safetensors")
    write_manifest(tmp_path, {2: manifest_entry([("shard.safetensors", (0, 20), names)])})
    (report,) = check_folder(tmp_path)
    assert (report.aligned, report.token_map, report.table.description) == (False, "unknown", None)
    assert str(report).endswith("in 1 file, not page-aligned, hash not described")
    found, found_scale = MappedRows(report.table).fetch(torch.tensor([19, 4]))
    assert torch.equal(dequantize_rows(found, found_scale), dequantize_rows(values, scale)[[19, 4]])


@pytest.mark.parametrize(
    ("bits", "dtypes"),
    [
        (4, ["F4"]),
        (6, ["F6_E2M3", "F6_E3M2"]),
        (8, ["BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"]),
        (16, ["I16", "U16", "F16", "BF16"]),
        (32, ["I32", "U32", "F32"]),
        (64, ["I64", "U64", "F64", "C64"]),
    ],
)
def test_shard_may_hold_any_other_safetensors_dtype(tmp_path, bits, dtypes):
    values, _ = stored_rows("F32", 4)
    others = {f"other {index}": torch.zeros(24, dtype=torch.uint8) for index in range(len(dtypes))}
    save_file({"rows": values, **others}, tmp_path / "shard.safetensors")

    def change(header):
        for name, dtype in zip(others, dtypes, strict=True):
            header[name].update(dtype=dtype, shape=[24 * 8 // bits])

    edit_header(tmp_path / "shard.safetensors", change)
    with safe_open(tmp_path / "shard.safetensors", "pt") as file:
        assert set(file.keys()) == {"rows", *others}
    write_manifest(tmp_path, {0: manifest_entry([("shard.safetensors", (0, 4), {"weight": "rows"})])})
    found, _ = MappedRows(read_tables(tmp_path)[0]).fetch(torch.arange(4))
    assert torch.equal(found, values)


def test_tables_among_ordinary_weights_are_found_by_name(tmp_path):
    name = "model.layers.12.engram.table.weight"
    save_file({name: torch.randn(9, 4), "lm_head.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    tables = tables_in_checkpoint([tmp_path / "model.safetensors"])
    assert {layer: (table.num_rows, table.width) for layer, table in tables.items()} == {12: (9, 4)}


def test_table_check_prints_a_summary(tmp_path, hasher, capsys):
    write_folder(tmp_path, hasher, "I8", parts=2)
    assert main([str(tmp_path), "--rows"]) == 0
    summary = capsys.readouterr().out
    assert f"layer 1: {int(hasher.primes[0].sum())} rows x 32 I8" in summary
    assert summary.count("in 2 files, token map absent\n") == 2
    (tmp_path / "engram_tables.json").unlink()
    assert main([str(tmp_path)]) == 1
    assert "engram_tables.json cannot be read" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_table_check_runs_as_a_module(tmp_path, hasher, capsys, monkeypatch):
    write_folder(tmp_path, hasher)
    monkeypatch.setattr(sys, "argv", ["table_check_engram", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("engram_hf.table_check_engram", run_name="__main__")
    assert ended.value.code == 0
    assert f"{tmp_path}: 2 tables" in capsys.readouterr().out


def test_table_check_fails_if_its_output_cannot_be_written(tmp_path, hasher, capsys, monkeypatch):
    write_folder(tmp_path, hasher)
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # Closing it raises an error, too.
        monkeypatch.setattr(sys, "stdout", full)
        status = main([str(tmp_path)])
    assert status == 1
    assert "No space left on device" in capsys.readouterr().err


# --- quantizing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table_dtype", "worst"),
    # The tolerance is half a step of three mantissa bits, with the largest channel at 448 or just below half of it; or
    # half of 1/127. With fewer bits, a channel far from the others may be clipped.
    [("float8_e4m3fn", 2**-4), ("int8", 1 / 254), ("nvfp4", 0.2), ("int4", 0.3), ("int2", 0.7)],
)
def test_quantizing_reports_its_error(tmp_path, hasher, monkeypatch, table_dtype, worst):
    monkeypatch.setattr(table_writer_engram, "_STEP_NUMBERS", 7 * WIDTH)  # The rows do not divide evenly into blocks.
    content = write_folder(tmp_path, hasher, "BF16")
    source = read_tables(tmp_path)[1]
    description = describe_table(hasher, 0, width=WIDTH, dtype="BF16")
    path = tmp_path / "quantized.safetensors"
    error = quantize_table(MappedRows(source), path, description, table_dtype)

    described = file_description(read_header(path))
    write_manifest(tmp_path, {1: manifest_entry([(path.name, described.rows, described.tensors)])})
    found = MappedRows(read_tables(tmp_path)[1])
    decoded = read_rows(found, torch.arange(source.num_rows).unsqueeze(1))
    rows = content[1][0].float()
    values, scale = quantize_rows(rows, table_dtype)
    expected = dequantize_rows(values, apply_global_scale(scale, found.global_scale), None, WIDTH)
    assert torch.equal(decoded, expected)
    assert error.rows == source.num_rows == sum(error.histogram)
    relative = (decoded - rows).norm(dim=1) / rows.norm(dim=1)
    edges = [0, *ERROR_EDGES, math.inf]
    assert error.histogram == [int(((relative >= a) & (relative < b)).sum()) for a, b in pairwise(edges)]
    assert error.largest == (decoded - rows).abs().max().item() > 0
    assert error.relative == pytest.approx(((decoded - rows).norm() / rows.norm()).item(), rel=1e-5)
    assert error.largest <= worst * rows.abs().max()


def test_quantizing_threads_change_no_bytes_and_no_global_settings(tmp_path, hasher, monkeypatch):
    monkeypatch.setattr(table_writer_engram, "_STEP_NUMBERS", 7 * WIDTH)
    write_folder(tmp_path, hasher, "BF16")
    source = MappedRows(read_tables(tmp_path)[1])
    description = describe_table(hasher, 0, width=WIDTH, dtype="BF16")
    seen: list[int] = []

    def advance(count: int) -> None:
        seen.append(torch.get_num_threads())
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start(), other.join()

    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            path = tmp_path / f"{threads}.safetensors"
            made.append((quantize_table(source, path, description, "nvfp4", advance), path.read_bytes()))
            assert set(seen) == {threads}
            own = table_writer_engram._in_order(lambda _: torch.get_num_threads(), range(9))
            assert {found for _, found in own} == {1}
            seen.clear()
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]


def test_quantizing_zeros_has_no_error():
    error = QuantizationError()
    error.add(compare_rows(torch.zeros(3, WIDTH), torch.zeros(3, WIDTH)))
    assert (error.rows, error.largest, error.relative) == (3, 0, 0)


def test_quantizing_a_quantized_table_is_refused(tmp_path, hasher):
    write_folder(tmp_path, hasher, "I8")
    description = describe_table(hasher, 0, width=WIDTH, dtype="I8")
    with pytest.raises(ValueError, match="is I8 already"):
        quantize_table(MappedRows(read_tables(tmp_path)[1]), tmp_path / "x", description, "int8")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", ["I4", "I2", "NVFP4"])
def test_quantizing_rows_of_four_bits_or_fewer_is_refused(tmp_path, hasher, dtype):
    write_folder(tmp_path, hasher, dtype)
    description = describe_table(hasher, 0, width=WIDTH, dtype=dtype)
    with pytest.raises(ValueError, match=f"is {dtype} already, rows of . bits; quantize rows of 8 bits or more"):
        quantize_table(MappedRows(read_tables(tmp_path)[1]), tmp_path / "x", description, "int2")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8"])
@pytest.mark.parametrize("table_dtype", ["int2", "int4", "nvfp4"])
def test_quantizing_reduces_rows_of_eight_bits(tmp_path, hasher, dtype, table_dtype):
    content = write_folder(tmp_path, hasher, dtype)
    source, path = MappedRows(read_tables(tmp_path)[1]), tmp_path / "quantized.safetensors"
    error = quantize_table(source, path, describe_table(hasher, 0, width=WIDTH, dtype=dtype), table_dtype)
    assert 0.05 < error.relative < {"int2": 0.4, "int4": 0.11, "nvfp4": 0.11}[table_dtype]
    values, scale = quantize_rows(dequantize_rows(*content[1]), table_dtype)
    file = read_header(path)
    for kind, tensor in (("weight", values), ("scale", scale)):
        span = file.tensors[file_description(file).tensors[kind]]
        assert path.read_bytes()[span.offset : span.offset + span.size] == bits(tensor).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["int2", "nvfp4"])
def test_interrupted_quantization_resumes(tmp_path, hasher, monkeypatch, dtype):
    monkeypatch.setattr(table_writer_engram, "_STEP_NUMBERS", 7 * WIDTH)
    monkeypatch.setattr(table_writer_engram, "_ALL_COMPARED_ROWS", 20)
    write_folder(tmp_path, hasher, "BF16")
    source = MappedRows(read_tables(tmp_path)[1])
    description = describe_table(hasher, 0, width=WIDTH, dtype="BF16")
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    expected = quantize_table(source, whole, description, dtype)
    assert expected.rows == sum(min(7, source.num_rows - first) for first in range(0, source.num_rows, 8 * 7))
    read: list[int] = []

    def advance(count: int) -> None:
        read.append(count)
        # The second reading reports four steps; the first report, of the finished part, is zero.
        if len(read) - (dtype == "nvfp4") * (1 + math.ceil(source.num_rows / 7)) == 5:
            raise KeyboardInterrupt

    journal = tmp_path / "journal"
    with pytest.raises(KeyboardInterrupt):
        quantize_table(source, cut, description, dtype, advance, journal, save_seconds=0)
    read.clear()
    monkeypatch.setattr(MappedRows, "read", _counting(MappedRows.read, begun := []))
    for first in ([3 * 7], []):  # The finished part is not repeated.
        error = quantize_table(source, cut, description, dtype, read.append, journal)
        assert (error, cut.read_bytes()) == (expected, whole.read_bytes())
        assert sorted(begun)[:1] == first and sum(read) == source.stored.size * (2 if dtype == "nvfp4" else 1)
        begun.clear(), read.clear()

    # Another source, another dtype, or a damaged journal prevents resuming.
    for text in (journal.read_text(), "{"):
        journal.write_text(text.replace("multipliers", "others"))
        assert quantize_table(source, cut, description, dtype, journal=journal) == expected and min(begun) == 0
        begun.clear()


def _counting(read, begun: list[int]):
    def counted(self, first, stop):
        begun.append(first)
        return read(self, first, stop)

    return counted


# --- files ------------------------------------------------------------------------------------------------------------


def test_failed_write_leaves_no_file(tmp_path, hasher):
    description = describe_table(hasher, 0, width=WIDTH, dtype="F32")
    path = tmp_path / "table.safetensors"
    with pytest.raises(KeyboardInterrupt), TableWriter(path, description):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# --- bad input --------------------------------------------------------------------------------------------------------


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_header(path: Path, change) -> None:
    """Rewrite a file with a changed header, padded to pages again."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_description(path: Path, **members) -> None:
    def change(header):
        described = json.loads(header["__metadata__"][METADATA_KEY])
        described.update(members)
        header["__metadata__"][METADATA_KEY] = json.dumps({k: v for k, v in described.items() if v is not ...})

    edit_header(path, change)


def test_manifest_of_another_version_or_without_tables_is_refused(tmp_path, hasher):
    write_folder(tmp_path, hasher)
    for version, message in (
        (2, "upgrade engram-hf"),
        ("1", "expected 1"),
        (None, "expected 1"),
        (0, "expected 1"),
        (True, "expected 1"),
    ):
        edit_json(tmp_path / "engram_tables.json", lambda m, version=version: m.update(format_version=version))
        with pytest.raises(TableFormatError, match=message):
            read_tables(tmp_path)
    (tmp_path / "engram_tables.json").write_text('{"format_version": 1, "tables": {}}')
    with pytest.raises(TableFormatError, match="no object `tables`"):
        read_tables(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", "", ".", "a\\b", "c:x", "a\0b", "\ud800", 3, None]
)
def test_manifest_paths_may_not_leave_its_folder(tmp_path, hasher, name):
    write_folder(tmp_path, hasher)
    edit_json(tmp_path / "engram_tables.json", lambda m: m["tables"]["1"]["weight"][0].update(file=name))
    with pytest.raises(TableFormatError, match="without a path"):
        read_tables(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 20], [21, 48]], "a gap or an overlap"),
        ([[0, 20], [19, 48]], "a gap or an overlap"),
        ([[1, 20], [20, 48]], "goes on with row 1 where row 0 is due"),
        ([[0, 0], [0, 48]], "a range without rows"),
        ([[0, 20], [20]], r"not \[first, stop\]"),
        ([[0, 20.0], [20, 48]], r"not \[first, stop\]"),
        ([[0, 20], [20, 10**15]], "expected 20 rows"),
        ([[0, 20], [20, 10**30]], r"not \[first, stop\]"),
    ],
)
def test_row_ranges_have_no_gap_or_overlap(tmp_path, hasher, rows, message):
    write_folder(tmp_path, hasher, parts=2)

    def change(manifest):
        for location, some in zip(manifest["tables"]["1"]["weight"], rows, strict=True):
            location["rows"] = some

    edit_json(tmp_path / "engram_tables.json", change)
    with pytest.raises(TableFormatError, match=message):
        read_tables(tmp_path)


def test_manifest_with_more_rows_than_the_file_is_refused(tmp_path, hasher):
    write_folder(tmp_path, hasher)
    edit_json(tmp_path / "engram_tables.json", lambda m: m["tables"]["1"]["weight"][0].update(rows=[0, 999]))
    with pytest.raises(TableFormatError, match="expected 999 rows"):
        read_tables(tmp_path)


def test_two_layers_may_not_share_bytes(tmp_path):
    names = {"weight": "t"}
    save_file({"t": torch.zeros(4, 8)}, tmp_path / "one.safetensors")
    write_manifest(tmp_path, {layer: manifest_entry([("one.safetensors", (0, 4), names)]) for layer in (1, 2)})
    with pytest.raises(TableFormatError, match="claimed twice"):
        read_tables(tmp_path)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_file_with_two_names_is_opened_once(tmp_path, link):
    save_file({"t": torch.zeros(4, 8)}, tmp_path / "one.safetensors")
    link(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    files = {1: "one.safetensors", 2: "two.safetensors"}
    write_manifest(
        tmp_path, {layer: manifest_entry([(name, (0, 4), {"weight": "t"})]) for layer, name in files.items()}
    )
    with pytest.raises(TableFormatError, match="claimed twice"):
        read_tables(tmp_path)


@pytest.mark.parametrize(
    "name", ["engram_tables.json", "engram-layer-00001.safetensors", "engram_token_map.safetensors"]
)
def test_pipe_is_refused_without_waiting_for_it(tmp_path, hasher, name):
    write_folder(tmp_path, hasher)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(FileFormatError, match="no regular file"):
        check_folder(tmp_path)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_manifest_is_strict_json(tmp_path, hasher, constant):
    write_folder(tmp_path, hasher)
    manifest = tmp_path / "engram_tables.json"
    manifest.write_text(manifest.read_text().replace("{", f'{{"note": {constant}, ', 1))
    with pytest.raises(FileFormatError, match="not valid JSON"):
        read_tables(tmp_path)


def test_scales_must_belong_to_their_rows(tmp_path, hasher):
    write_folder(tmp_path, hasher, "F8_E4M3", parts=2)
    manifest = tmp_path / "engram_tables.json"
    good = manifest.read_text()
    edit_json(manifest, lambda m: m["tables"]["1"].pop("scale"))
    with pytest.raises(TableFormatError, match="needs scales"):
        read_tables(tmp_path)
    edit_json(manifest, lambda m: m["tables"]["1"].update(scale=3))
    with pytest.raises(TableFormatError, match=r"The scale of layer 1 in .* must list the tensors"):
        read_tables(tmp_path)
    manifest.write_text(good)
    edit_json(manifest, lambda m: m["tables"]["1"]["scale"].pop())
    with pytest.raises(TableFormatError, match="split differently"):
        read_tables(tmp_path)
    manifest.write_text(good)
    edit_json(manifest, lambda m: m["tables"]["1"]["scale"][0].update(file=table_file_name(3, 0, 2)))
    with pytest.raises(TableFormatError, match="different files"):
        read_tables(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"format_version": 2}, "upgrade engram-hf"),
        ({"multipliers": ...}, "lacks 'multipliers'"),
        ({"primes": [[11, 13], [17, 23]]}, "num_rows is 60, expected 64"),
        ({"primes": [[0, 24], [11, 13]], "offsets": [[0, 0], [24, 35]]}, "as many positive numbers"),
        ({"offsets": [[0, 1], [2, 3]]}, "offsets is .*as the others imply"),
        ({"multipliers": [1, 2, 3]}, "odd numbers"),
        ({"multipliers": [1, 3]}, "odd numbers"),
        ({"multipliers": [1.0, 3, 5]}, "odd numbers"),
        ({"pad_id": 50}, "a compressed id below 50"),
        ({"orders": [2, 4]}, "expected \\[2, 3\\]"),
        ({"heads": 3}, "heads is 3, expected 2"),
        ({"dtype": "F16"}, "is used as"),
        ({"dtype": "F8_E4M3"}, "tensors is"),
        ({"width": 16}, "is used as"),
        ({"layer": 2}, "is used as"),
        ({"layer": True}, "expected a count"),
        ({"rows": [0, 5]}, "expected 5 rows"),
        ({"rows": [0, 0]}, "of 60 rows"),
        ({"rows": [0, 61]}, "of 60 rows"),
        ({"tensors": {"weight": "other"}}, "but holds others"),
        ({"tensors": {}}, "expected names of"),
        ({"tensors": {"weight": ["a list"]}}, "names by kind"),
        ({"tensors": 3}, "names by kind"),
        ({"primes": 3}, "a list for every order"),
        ({"rows": [0]}, "of 60 rows"),
        ({"dtype": ["BF16"]}, "expected one of F32, BF16"),
        ({"dtype": "F64"}, "expected one of F32, BF16"),
        ({"scale_dtype": 3}, "scale_dtype is 3, expected None"),
        ({"scale_block": -1}, "scale_block is -1, expected None"),
        ({"token_map_ids": None}, "or both null"),
    ],
)
def test_contradictory_description_is_refused(tmp_path, hasher, members, message):
    write_folder(tmp_path, hasher)
    edit_description(tmp_path / table_file_name(1), **members)
    with pytest.raises(TableFormatError, match=message):
        read_tables(tmp_path)


@pytest.mark.parametrize("members", [{"dtype": "F16"}, {"width": 16}, {"rows": [0, 5]}], ids=str)
def test_description_of_a_file_without_manifest_is_checked(tmp_path, hasher, members):
    """There is no manifest beside it to compare with."""
    write_folder(tmp_path, hasher)
    edit_description(tmp_path / table_file_name(1), **members)
    with pytest.raises(TableFormatError, match=r"is used as|expected 5 rows"):
        file_description(read_header(tmp_path / table_file_name(1)))


@pytest.mark.parametrize(
    ("member", "other"),
    [("primes", [[11, 13], [17, 23]]), ("multipliers", [1, 3, 5]), ("vocab_size", 51), ("pad_id", 3)],
)
def test_table_of_another_hash_is_refused(hasher, member, other):
    described = describe_table(hasher, 0, width=WIDTH, dtype="BF16")
    require_same_hash(described, hasher, 0)
    with pytest.raises(TableFormatError, match=f"written for the {member} {re.escape(str(other))}"):
        require_same_hash(replace(described, **{member: other}), hasher, 0)


def test_parts_of_one_table_may_have_different_tensor_names(tmp_path, hasher):
    description = describe_table(hasher, 0, width=WIDTH, dtype="F32")
    values, parts = stored_rows("F32", 60)[0], []
    for name, rows in (("a", (0, 20)), ("b", (20, 60))):
        own = replace(description, rows=rows, tensors={"weight": name})
        write_table(tmp_path / name, own, values[slice(*rows)])
        parts.append((name, rows, own.tensors))
    write_manifest(tmp_path, {1: manifest_entry(parts)})
    assert torch.equal(MappedRows(read_tables(tmp_path)[1]).read(0, 60)[0], values)


def with_token_map(hasher: NgramHasher, token_map: torch.Tensor | None) -> NgramHasher:
    changed = copy.deepcopy(hasher)
    changed.token_map = token_map
    return changed


def test_table_of_another_token_map_is_refused(hasher):
    described = describe_table(hasher, 0, width=WIDTH, dtype="BF16")
    unmapped = replace(described, token_map_sha256=None, token_map_ids=None)
    padding, other = TOKEN_MAP.new_full((4,), -1), TOKEN_MAP.where(TOKEN_MAP != 49, 48)
    for token_map in (other, TOKEN_MAP[:59]):
        with pytest.raises(TableFormatError, match="was written for another token map"):
            require_same_hash(described, with_token_map(hasher, token_map), 0)
    for table, token_map in ((unmapped, other), (described, None)):
        with pytest.raises(TableFormatError, match="Only model or table of layer"):
            require_same_hash(table, with_token_map(hasher, token_map), 0)
    # Tokens were added; the tokenizer is not known yet; or its map is the identity.
    longer = torch.cat([TOKEN_MAP, TOKEN_MAP.new_tensor([7]), padding])
    unknown = replace(described, pad_id=-1), torch.cat([TOKEN_MAP.new_full((60,), -1), padding])
    for table, token_map in ((described, longer), unknown, (unmapped, torch.arange(64))):
        require_same_hash(table, with_token_map(hasher, token_map), 0)


def test_parts_of_one_table_must_describe_one_hash(tmp_path, hasher):
    write_folder(tmp_path, hasher, parts=2)
    edit_description(tmp_path / table_file_name(1, 1, 2), multipliers=[1, 3, 5])
    with pytest.raises(TableFormatError, match="describe different tables"):
        read_tables(tmp_path)
    edit_header(tmp_path / table_file_name(1, 1, 2), lambda header: header["__metadata__"].pop(METADATA_KEY))
    with pytest.raises(TableFormatError, match="does not describe itself"):
        read_tables(tmp_path)


def test_description_in_the_manifest_is_checked(tmp_path, hasher):
    write_folder(tmp_path, hasher)
    edit_header(tmp_path / table_file_name(1), lambda header: header.pop("__metadata__"))
    description = describe_table(hasher, 0, width=WIDTH, dtype="BF16")
    part = (table_file_name(1), description.rows, description.tensors)
    write_manifest(tmp_path, {1: manifest_entry([part], description)})
    assert read_tables(tmp_path)[1].description.multipliers == description.multipliers
    entry = json.loads((tmp_path / "engram_tables.json").read_text())["tables"]["1"]
    # The parts belong to one file.
    assert entry["description"].keys() == asdict(description).keys() - {"rows", "tensors"}
    write_manifest(tmp_path, {1: manifest_entry([part], replace(description, dtype="F16"))})
    with pytest.raises(TableFormatError, match="but describe"):
        read_tables(tmp_path)


def test_rows_that_do_not_begin_at_a_page_are_refused(tmp_path, hasher):
    write_folder(tmp_path, hasher)
    path = tmp_path / table_file_name(1)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length].rstrip()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(TableFormatError, match="not at a page"):
        read_tables(tmp_path)


def write_token_map(
    folder: Path, values: torch.Tensor, digest: str | None = None, version: str = "1", name: str = "token_map"
) -> None:
    metadata = {"format_version": version, "map_sha256": digest or token_map_digest(values), "vocabulary_sha256": "0"}
    save_file({name: values}, folder / "engram_token_map.safetensors", metadata=metadata)


def test_token_map_must_belong_to_the_tables(tmp_path, hasher):
    write_folder(tmp_path, hasher)
    assert {report.token_map for report in check_folder(tmp_path)} == {"absent"}
    write_token_map(tmp_path, torch.cat([TOKEN_MAP, TOKEN_MAP.new_tensor([50, 51])]))  # Tokens were added.
    assert {report.token_map for report in check_folder(tmp_path)} == {"checked"}
    write_token_map(tmp_path, TOKEN_MAP.flip(0))
    with pytest.raises(TableFormatError, match="another token map"):
        check_folder(tmp_path)
    write_token_map(tmp_path, TOKEN_MAP, digest="0" * 64)
    with pytest.raises(TableFormatError, match="is damaged"):
        check_folder(tmp_path)
    write_token_map(tmp_path, torch.cat([TOKEN_MAP, TOKEN_MAP.new_tensor([-1])]))
    with pytest.raises(TableFormatError, match="negative ids"):
        check_folder(tmp_path)
    write_token_map(tmp_path, TOKEN_MAP[:0])
    with pytest.raises(TableFormatError, match="no vector `token_map`"):
        check_folder(tmp_path)
    (tmp_path / "engram_token_map.safetensors").unlink()
    (tmp_path / "engram_token_map.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(FileFormatError, match="cannot be read"):
        check_folder(tmp_path)


@pytest.mark.parametrize("other", [torch.zeros(4, 8, dtype=torch.float16), torch.zeros(4, 16)])
def test_parts_of_one_table_must_have_one_format(tmp_path, other):
    """This includes shards without a description."""
    save_file({"a": torch.zeros(4, 8), "b": other}, tmp_path / "shard.safetensors")
    parts = [("shard.safetensors", rows, {"weight": name}) for name, rows in (("a", (0, 4)), ("b", (4, 8)))]
    write_manifest(tmp_path, {0: manifest_entry(parts)})
    with pytest.raises(TableFormatError, match="differ in dtype or width"):
        read_tables(tmp_path)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (TOKEN_MAP, {"version": "2"}, "has format_version '2', expected '1'; upgrade engram-hf"),
        (TOKEN_MAP.long(), {}, "no vector `token_map` of I32"),
        (TOKEN_MAP[None], {}, "no vector `token_map` of I32"),
        (TOKEN_MAP, {"name": "map"}, "no vector `token_map` of I32"),
    ],
)
def test_token_map_of_another_form_is_refused(tmp_path, values, options, message):
    write_token_map(tmp_path, values, **options)
    with pytest.raises(TableFormatError, match=re.escape(message)):
        read_token_map(tmp_path / "engram_token_map.safetensors")


def test_two_tensors_for_one_table_are_refused(tmp_path):
    names = ["draft.layers.12.engram.table.weight", "model.layers.12.engram.table.weight"]
    save_file({name: torch.randn(9, 4) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(TableFormatError, match="are the weight of the table of layer 12; take one of them out"):
        tables_in_checkpoint([tmp_path / "model.safetensors"])


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (torch.zeros(4, 8, dtype=torch.int64), None, "is I64, expected one of F32, BF16"),
        (torch.zeros(4, 0), None, "expected 4 rows"),
        (torch.zeros(4, 8, 1), None, "expected 4 rows"),
        (torch.zeros(4, 8), torch.zeros(4, 1), "needs no scales"),
        (torch.zeros(4, 6, dtype=torch.int8), torch.zeros(4, 1), "multiple of 4"),
        (torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4, 2), "scales F32 \\[4, 1\\]"),
        (torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4, 1).half(), "scales F32 \\[4, 1\\]"),
        (torch.zeros(4, 48).to(torch.float8_e4m3fn), torch.ones(4, 2).to(torch.float8_e8m0fnu), "multiple of 32"),
        (torch.zeros(4, 64).to(torch.float8_e4m3fn), torch.ones(4, 1).to(torch.float8_e8m0fnu), "\\[4, 2\\]"),
    ],
)
def test_rows_and_scales_must_have_one_format(tmp_path, weight, scale, message):
    tensors = {"weight": weight} if scale is None else {"weight": weight, "scale": scale}
    save_file({f"layers.2.engram.table.{kind}": some for kind, some in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(TableFormatError, match=message):
        tables_in_checkpoint([tmp_path / "a.safetensors"])


@pytest.mark.parametrize("name", ["layers.7.engram.table.weight", f"layers.{'9' * 5000}.engram.table.weight"])
def test_tensor_with_a_tables_name_alone_is_no_table(tmp_path, name):
    save_file({name: torch.zeros(())}, tmp_path / "model.safetensors")
    if len(name) > 1000:  # The layer has no number.
        assert tables_in_checkpoint([tmp_path / "model.safetensors"]) == {}
    else:
        with pytest.raises(TableFormatError, match=r"has shape \[\], expected 0 rows"):
            tables_in_checkpoint([tmp_path / "model.safetensors"])


@pytest.mark.parametrize("pickled", [False, True])
def test_file_replaced_since_its_check_is_refused(tmp_path, hasher, pickled):
    """Every save of the same model writes a file of equal size in its place."""
    write_folder(tmp_path / "one", hasher)
    table = read_tables(tmp_path / "one")[1]
    source = MappedRows(table)
    other = describe_table(hasher, 0, width=WIDTH, dtype="BF16")
    write_table(tmp_path / "other", other, *stored_rows("BF16", other.num_rows, seed=5))
    os.replace(tmp_path / "other", tmp_path / "one" / table_file_name(1))
    with pytest.raises(TableFormatError, match="was changed while it was in use"):
        pickle.loads(pickle.dumps(source)) if pickled else MappedRows(table)
    # The open file still has its old content.
    assert torch.equal(source.fetch(torch.arange(5))[0], stored_rows("BF16", other.num_rows, seed=1)[0][:5])


@pytest.mark.parametrize("length", [10, 1000, 1001, 10**6])
def test_error_messages_quote_at_most_a_screenful(length):
    message = str(FileFormatError("begin" + "x" * (length - 8) + "end"))
    assert message.startswith("begin") and message.endswith("end")
    assert len(message) == (length if length <= 1000 else 1005)


def test_emptied_file_is_refused(tmp_path, hasher):
    write_folder(tmp_path, hasher)
    table = read_tables(tmp_path)[1]
    os.truncate(tmp_path / table_file_name(1), 0)
    with pytest.raises(TableFormatError, match="was changed"):
        MappedRows(table)


@pytest.mark.parametrize("shape", [100_000 * [1 << 62], 500 * [10**4000], 300_000 * [1]])
def test_huge_numbers_are_refused_without_delay(tmp_path, shape):
    digits = f"[{','.join('1' + '0' * 4000 if size >> 64 else str(size) for size in shape)}]"
    text = f'{{"a": {{"dtype": "F32", "shape": {digits}, "data_offsets": [0, 4]}}}}'.encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    begin = time.process_time()
    with pytest.raises(FileFormatError, match="expected lists of sizes") as caught:
        read_header(tmp_path / "a.safetensors")
    assert time.process_time() - begin < 5
    assert len(str(caught.value)) < 1100


@pytest.mark.parametrize("token_map", [TOKEN_MAP[:40], TOKEN_MAP.where(TOKEN_MAP != 49, 64)])
def test_token_map_must_fit_the_vocabulary(tmp_path, hasher, token_map):
    """A correct digest does not excuse a map that is too short, or points outside the vocabulary."""
    write_folder(tmp_path, hasher)
    write_token_map(tmp_path, token_map)
    for layer in LAYERS:
        edit_description(tmp_path / table_file_name(layer), token_map_sha256=token_map_digest(token_map[:60]))
    with pytest.raises(TableFormatError, match="another token map"):
        check_folder(tmp_path)


@pytest.mark.parametrize("wrong", [None, float("nan"), float("inf"), -0.5], ids=str)
def test_scales_must_be_finite_numbers(tmp_path, hasher, wrong):
    dtype = "F8_E4M3" if wrong is None else "I8"
    content = write_folder(tmp_path, hasher, dtype)
    values, scale = content[1]
    scale = scale.clone()
    if wrong is None:
        scale.view(torch.uint8)[5, 0] = 255
    else:
        scale[4:6, 0] = torch.tensor([0.0, wrong])
    description = describe_table(hasher, 0, width=WIDTH, dtype=dtype)
    write_table(tmp_path / table_file_name(1), description, values, scale)
    with pytest.raises(TableFormatError, match="Row 5 of layer 1 has a scale that is no valid number"):
        check_folder(tmp_path)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F8_E4M3", "I8"])
def test_rows_must_be_numbers(tmp_path, hasher, dtype):
    content = write_folder(tmp_path, hasher, dtype, parts=2)
    values, scale = content[3]
    values = values.clone()
    values.view(torch.uint8)[-2].fill_(0x80 if dtype == "I8" else 0xFF)
    description = describe_table(hasher, 1, width=WIDTH, dtype=dtype)
    first = round(description.num_rows / 2)
    rows = (values[first:], None if scale is None else scale[first:])
    write_table(tmp_path / table_file_name(3, 1, 2), description.with_rows(first, description.num_rows), *rows)
    check_folder(tmp_path)
    with pytest.raises(TableFormatError, match=f"Row {len(values) - 2} of layer 3 has a weight"):
        check_folder(tmp_path, rows=True)


def test_missing_truncated_or_foreign_file_is_refused(tmp_path, hasher):
    write_folder(tmp_path, hasher)
    path = tmp_path / table_file_name(1)
    data = path.read_bytes()
    foreign = {
        data[:-1]: "cut off or damaged",
        data + b"\0": "cut off or damaged",
        data[: PAGE // 2]: "not a whole safetensors file",
        b"": "not a whole safetensors file",
        pickle.dumps({"weight": np.zeros((9, 9))}): "not a whole safetensors file",
        struct.pack("<Q", 2**63) + data[8:]: "not a whole safetensors file",
        struct.pack("<Q", 4) + b"[[1]": "not valid JSON",
        struct.pack("<Q", 2) + b"[]": "must be a JSON object",
        struct.pack("<Q", 9) + b'{"a":[1]}': "expected dtype, shape and data_offsets",
        struct.pack("<Q", 19) + b'{"__metadata__":[]}': "must map strings to strings",
        struct.pack("<Q", 24) + b'{"__metadata__":{"a":1}}': "must map strings to strings",
        struct.pack("<Q", 100_000) + b"[" * 100_000: "not valid JSON",
    }
    for content, message in foreign.items():
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=message):
            read_tables(tmp_path)
    path.unlink()
    with pytest.raises(FileFormatError, match="fetch the missing file"):
        read_tables(tmp_path)
    path.mkdir()
    with pytest.raises(FileFormatError, match="cannot be read \\(Is a directory\\)"):
        read_tables(tmp_path)


def test_file_that_changes_while_open_is_noticed(tmp_path, hasher):
    write_folder(tmp_path, hasher)
    path = tmp_path / table_file_name(1)
    table = read_tables(tmp_path)[1]
    rows = MappedRows(table)
    rows.fetch(torch.tensor([0]))
    os.truncate(path, PAGE)
    for use in (lambda: rows.fetch(torch.tensor([40])), lambda: rows.read(0, 40), lambda: MappedRows(table)):
        with pytest.raises(TableFormatError, match="changed while it was in use"):
            use()


def test_touch_link_and_chmod_do_not_count_as_changes(tmp_path, hasher):
    write_folder(tmp_path, hasher)
    path = tmp_path / table_file_name(1)
    table = read_tables(tmp_path)[1]
    rows, ids = MappedRows(table), torch.arange(5)
    expected, _ = rows.fetch(ids)
    for change in (
        path.touch,
        lambda: os.utime(path, (1, 1)),
        lambda: os.link(path, tmp_path / "link"),
        lambda: path.chmod(0o444),
        lambda: path.rename(tmp_path / "moved"),
    ):
        change()
        assert torch.equal(rows.fetch(ids)[0], expected)
        assert torch.equal(rows.read(0, 5)[0], expected)
        if path.exists():  # A table that was checked before can be opened, here and in another process.
            assert torch.equal(MappedRows(table).fetch(ids)[0], expected)
            assert torch.equal(pickle.loads(pickle.dumps(rows)).fetch(ids)[0], expected)


@pytest.mark.parametrize("keeps_time", [False, True])
def test_file_written_in_place_is_noticed(tmp_path, hasher, keeps_time):
    """The size and header stay equal, even if the old time is restored, too (`cp -p`, `rsync -t --inplace`)."""
    write_folder(tmp_path, hasher)
    path = tmp_path / table_file_name(1)
    rows = MappedRows(read_tables(tmp_path)[1])
    message = pickle.dumps(rows)
    rows.fetch(torch.tensor([0]))
    status = path.stat()
    other = describe_table(hasher, 0, width=WIDTH, dtype="BF16")
    write_table(tmp_path / "other", other, *stored_rows("BF16", other.num_rows, seed=5))
    assert (tmp_path / "other").read_bytes()[:PAGE] == path.read_bytes()[:PAGE]
    shutil.copyfile(tmp_path / "other", path)
    if keeps_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_size) == (status.st_ino, status.st_size)
    for use in (lambda: rows.fetch(torch.tensor([40])), lambda: rows.read(0, 40), lambda: pickle.loads(message)):
        with pytest.raises(TableFormatError, match="changed while it was in use"):
            use()


SYSTEM_ERRORS = {
    errno.EACCES: (PermissionError, "give this user the right"),
    errno.EMFILE: (OSError, "ulimit -n"),
    errno.EIO: (OSError, "check the disk"),
    errno.ESTALE: (OSError, "load the model again"),
    errno.ENOMEM: (OSError, "free memory"),
    errno.EBUSY: (OSError, "Device or resource busy"),
}


@pytest.mark.parametrize("code", SYSTEM_ERRORS, ids=errno.errorcode.get)
def test_system_errors_keep_their_type(tmp_path, hasher, monkeypatch, code):
    """Opening, mapping and reading a table file keep the system's error; none of them reports a missing file."""
    write_folder(tmp_path, hasher)
    write_token_map(tmp_path, TOKEN_MAP)
    table = read_tables(tmp_path)[1]
    rows = MappedRows(table)

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    places = [
        (Path, "open", lambda: read_tables(tmp_path)),
        (Path, "open", lambda: read_token_map(tmp_path / "engram_token_map.safetensors")),
        (Path, "read_bytes", lambda: read_tables(tmp_path)),
        (os, "open", lambda: MappedRows(table)),
        (mmap, "mmap", lambda: MappedRows(table)),
        (os, "preadv", lambda: rows.read(0, 5)),
    ]
    kind, advice = SYSTEM_ERRORS[code]
    for owner, name, use in places:
        with monkeypatch.context() as patch, pytest.raises(kind, match=advice) as caught:
            patch.setattr(owner, name, fail)
            use()
        assert type(caught.value) is kind and caught.value.errno == code
        assert Path(caught.value.filename).parent == tmp_path
        assert "missing" not in str(caught.value)


def test_missing_table_file_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="fetch the missing file") as caught:
        read_header(tmp_path / "gone.safetensors")
    assert isinstance(caught.value, FileFormatError) and caught.value.errno == errno.ENOENT
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(FileNotFoundError, match="is the right folder"):
        read_manifest(tmp_path / "engram_tables.json")


def test_files_are_closed_with_their_table(tmp_path, hasher):
    def is_open() -> bool:
        links = Path("/proc/self/fd").iterdir()
        return any(os.path.realpath(link) == os.path.realpath(tmp_path / table_file_name(1)) for link in links)

    write_folder(tmp_path, hasher)
    rows = MappedRows(read_tables(tmp_path)[1])
    assert is_open()
    del rows
    gc.collect()
    assert not is_open()


def mutated(data: bytes, generator: random.Random) -> bytes:
    """Return a file's header with one random change: a byte, a number, or a range that is lost, doubled or moved."""
    (length,) = struct.unpack("<Q", data[:8])
    head, body = bytearray(data[: 8 + length].rstrip()), data[8 + length :]
    kind = generator.randrange(6)
    place = generator.randrange(len(head))
    stretch = slice(place, place + generator.randrange(1, 30))
    if kind == 0:
        head[place] ^= 1 << generator.randrange(8)
    elif kind == 1:
        head[place] = generator.choice(b'0123456789{}[],:"\\ -.eE\0\xff')
    elif kind == 2:
        del head[stretch]
    elif kind == 3:
        head[place:place] = head[stretch]
    elif kind == 4:
        target = generator.randrange(len(head))
        head[target : target + stretch.stop - stretch.start] = head[stretch]
    else:
        digits = [at for at in range(8, len(head)) if chr(head[at]).isdigit()]
        head[generator.choice(digits)] = generator.choice(b"0123456789")
    if generator.random() < 0.7:  # Most changes keep the length, so that the content decides.
        head += b" " * (-len(head) % PAGE)
        head[:8] = struct.pack("<Q", len(head) - 8)
    return bytes(head) + body


def overwrite(path: Path, content: bytes) -> None:
    """Overwrite a file like `write_bytes`, but without truncating it first: file systems flush truncated files to the
    disk.
    """
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def test_ten_thousand_mutated_headers(tmp_path, hasher):
    """A header gives the rows that were written, or an error of one sentence."""
    content = write_folder(tmp_path, hasher, "I8")
    edit_json(tmp_path / "engram_tables.json", lambda manifest: manifest["tables"].pop("3"))
    path, generator = tmp_path / table_file_name(1), random.Random(0)
    data, refused = path.read_bytes(), 0
    values, scale = content[1]
    for _ in range(10_000):
        overwrite(path, mutated(data, generator))
        try:
            rows = MappedRows(read_tables(tmp_path)[1])
        except FileFormatError:
            refused += 1
            continue
        found, found_scale = rows.fetch(torch.arange(rows.num_rows))
        assert torch.equal(found, values)
        assert torch.equal(found_scale, scale)
    assert refused > 5_000


def test_thousand_mutated_manifests(tmp_path, hasher):
    content = write_folder(tmp_path, hasher, "BF16", parts=2)
    path, generator = tmp_path / "engram_tables.json", random.Random(1)
    data, refused = path.read_bytes(), 0
    for _ in range(1_000):
        changed = bytearray(data)
        for _ in range(generator.randrange(1, 3)):
            changed[generator.randrange(len(changed))] = generator.choice(b'0123456789{}[],:"\\ -.etw/')
        overwrite(path, changed)
        try:
            tables = read_tables(tmp_path)
        except FileFormatError:
            refused += 1
            continue
        for layer, table in tables.items():
            found, _ = MappedRows(table).fetch(torch.arange(table.num_rows))
            assert torch.equal(found, content[layer][0])
    assert refused > 500
    path.write_bytes(data)
    assert set(read_manifest(path)) == set(LAYERS)


# --- four-bit floats of other libraries -------------------------------------------------------------------------------


def nvfp4_tensors(rows: int = 6) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a table as compressed-tensors stores it, and its rows, computed code by code."""
    draw = torch.Generator().manual_seed(3)
    packed = torch.randint(0, 256, (rows, WIDTH // 2), dtype=torch.uint8, generator=draw)
    scale = (torch.rand(rows, WIDTH // 16, generator=draw) * 300).to(torch.float8_e4m3fn)
    global_scale = torch.tensor([1234.5])
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    expected = torch.empty(rows, WIDTH)
    for row in range(rows):
        for channel in range(WIDTH):
            code = int(packed[row, channel // 2]) >> 4 * (channel % 2) & 15  # The first channel is in the low bits.
            value = magnitudes[code & 7] * (-1 if code & 8 else 1)
            expected[row, channel] = value * (scale[row, channel // 16].float() / global_scale[0])
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": global_scale}, expected


def modelopt(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same table as NVIDIA's ModelOpt stores it: its second scale multiplies."""
    return {
        "weight": tensors["weight_packed"],
        "weight_scale": tensors["weight_scale"],
        "weight_scale_2": tensors["weight_global_scale"].reciprocal().squeeze(),
    }


@pytest.mark.parametrize("spelling", [dict, modelopt])
def test_four_bit_floats_of_other_libraries(tmp_path, spelling):
    tensors, expected = nvfp4_tensors()
    state = {f"model.layers.1.engram.table.{name}": tensor for name, tensor in spelling(tensors).items()}
    save_file(state, tmp_path / "model.safetensors")
    (table,) = tables_in_checkpoint([tmp_path / "model.safetensors"]).values()
    assert (table.dtype, table.width, table.num_rows) == ("NVFP4", WIDTH, 6)
    found = read_rows(MappedRows(table), torch.arange(6).unsqueeze(1))
    # The second scale is inverted twice, with a rounding each time.
    torch.testing.assert_close(found, expected, rtol=0 if spelling is dict else 3e-7, atol=0)
    assert torch.equal(read_rows(MappedRows(table), torch.arange(6).unsqueeze(1), torch.bfloat16), found.bfloat16())

    # A manifest may refer to these tensors unchanged.
    kinds = {"weight": 0, "scale": 1, "global_scale" if spelling is dict else "scale_2": 2}
    names = {kind: list(state)[at] for kind, at in kinds.items()}
    write_manifest(tmp_path, {1: manifest_entry([("model.safetensors", (0, 6), names)])})
    assert torch.equal(read_rows(MappedRows(read_tables(tmp_path)[1]), torch.arange(6).unsqueeze(1)), found)
    check_folder(tmp_path, rows=True)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_global_scale_must_be_a_positive_number(tmp_path, wrong):
    tensors = {f"layers.1.engram.embed.{name}": tensor for name, tensor in nvfp4_tensors()[0].items()}
    tensors["layers.1.engram.embed.weight_global_scale"][0] = wrong
    save_file(tensors, tmp_path / "model.safetensors")
    (table,) = tables_in_checkpoint([tmp_path / "model.safetensors"]).values()
    with pytest.raises(ValueError, match=r"The global scale of layer 1 in .* expected one positive number"):
        MappedRows(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_global_scale": None}, "NVFP4, which needs one global scale"),
        ({"weight_global_scale": torch.ones(2)}, "NVFP4, which needs one global scale"),
        ({"weight_scale": torch.ones(6, 1).to(torch.float8_e4m3fn)}, r"scales F8_E4M3 \[6, 2\]"),
        ({"weight_scale": torch.ones(6, 1).bfloat16()}, "packed numbers, but nothing says of how many bits"),
        ({"weight_packed": torch.zeros(6, 12, dtype=torch.uint8)}, "multiple of 16"),
    ],
)
def test_inconsistent_four_bit_floats_are_refused(tmp_path, change, message):
    tensors = {name: tensor for name, tensor in (nvfp4_tensors()[0] | change).items() if tensor is not None}
    save_file(
        {f"layers.1.engram.embed.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ValueError, match=message):
        tables_in_checkpoint([tmp_path / "x.safetensors"])


def test_config_gives_the_bits_of_packed_numbers(tmp_path):
    tensors = {"weight": torch.zeros(6, 16, dtype=torch.uint8), "scale": torch.ones(6, 1).bfloat16()}
    save_file(
        {f"layers.1.engram.table.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "x.safetensors"
    )
    for table_dtype, width, value in (("int4", 32, -7.5), ("int2", 64, -1.5)):
        (table,) = tables_in_checkpoint([tmp_path / "x.safetensors"], table_dtype).values()
        assert table.width == width
        assert read_rows(MappedRows(table), torch.tensor([[2]])).unique().tolist() == [value]
