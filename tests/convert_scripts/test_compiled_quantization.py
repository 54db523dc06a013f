"""Compiled code writes the bytes of torch's path, for all stored numbers and scales, and refuses the same rows."""

import sys

import pytest
import torch
from engram_cli import quantization

from engram_hf import table_writer_engram
from engram_hf.hashing_engram import NgramHasher
from engram_hf.row_sources_engram import MappedRows
from engram_hf.saving_engram import manifest_entry, table_file_name, write_manifest
from engram_hf.table_engram import dequantize_rows
from engram_hf.table_format_engram import describe_table, read_tables
from engram_hf.table_writer_engram import TableWriter, quantize_rows, quantize_table

pytest.importorskip("numba", reason="the extra `quantize` is not installed")
from engram_hf.convert_scripts.compiled_quantization import CompiledRounding, is_compilable

pytestmark = pytest.mark.any_version

FROM_BFLOAT16 = ["float8_e4m3fn", "int8", "int4", "int2", "nvfp4"]
FROM_FLOAT8 = ["int4", "int2", "nvfp4"]
LEAST_SQUARES = ["int4", "int2"]
WIDTHS = {
    "float8_e4m3fn": (32, 96),
    "int8": (4, 36),
    "int4": (4, 36, 256, 516),
    "int2": (8, 40, 520),
    "nvfp4": (16, 48),
}


def global_scale(table_dtype: str) -> torch.Tensor | None:
    return torch.tensor([37.5]) if table_dtype == "nvfp4" else None


def require_equal(dtype: str, values: torch.Tensor, scale: torch.Tensor | None, table_dtype: str) -> None:
    """Fail unless compiled code and torch give the same bytes."""
    divisor = global_scale(table_dtype)
    found, found_scale, _ = CompiledRounding(dtype, table_dtype, values.shape[1]).quantize(
        values, scale, divisor, False
    )
    expected, expected_scale = quantize_rows(dequantize_rows(values, scale), table_dtype, divisor)
    for some, other in ((found, expected), (found_scale, expected_scale)):
        wrong = (some != other.view(torch.uint8)).any(1).nonzero().flatten().tolist()
        assert not wrong, (len(wrong), values[wrong[0]], some[wrong[0]], other[wrong[0]])


def all_bfloat16(table_dtype: str) -> torch.Tensor:
    """Return every finite bfloat16 number; for least squares, every one whose square is not too large."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    largest = table_writer_engram.LARGEST_SQUARED if table_dtype in LEAST_SQUARES else float("inf")
    return numbers[numbers.isfinite() & (numbers.float().abs() <= largest)]


@pytest.mark.parametrize("table_dtype", FROM_BFLOAT16)
def test_every_bfloat16_number(table_dtype):
    numbers, generator = all_bfloat16(table_dtype), torch.Generator().manual_seed(0)
    alone = numbers.unsqueeze(1).repeat(1, 32)
    beside_zeros = alone.clone()
    beside_zeros[:, 1:] = 0
    mixed = numbers[torch.randint(0, len(numbers), (4000, 32), generator=generator)]
    # A row of neighbours in size has all kinds of ties between levels.
    ordered = numbers[numbers >= 0].sort().values
    ordered = ordered[: len(ordered) // 32 * 32].view(-1, 32)
    for rows in (alone, beside_zeros, mixed, ordered, -ordered):
        require_equal("BF16", rows, None, table_dtype)


@pytest.mark.parametrize("table_dtype", FROM_BFLOAT16)
def test_random_bfloat16_rows_of_all_sizes_and_widths(table_dtype):
    for seed, width in enumerate(WIDTHS[table_dtype]):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(2000, width, generator=generator) * torch.logspace(-44, 15, 2000).unsqueeze(1)
        outliers = torch.randn(500, width, generator=generator)
        outliers[:, width // 2] *= 1e4
        for some in (rows, outliers, rows.round(decimals=1)):
            require_equal("BF16", some.bfloat16(), None, table_dtype)


@pytest.mark.parametrize("table_dtype", FROM_FLOAT8)
def test_every_float8_number_with_every_scale(table_dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    # Larger scales are infinite in torch's path, and from 2^47 on, squares are too large.
    exponents = torch.arange(247 if table_dtype == "nvfp4" else 127 + 47, dtype=torch.uint8)
    alone = codes.repeat(len(exponents)).unsqueeze(1).repeat(1, 32)
    mixed = codes[torch.randint(0, len(codes), alone.shape, generator=torch.Generator().manual_seed(0))]
    scale = exponents.repeat_interleave(len(codes)).unsqueeze(1).view(torch.float8_e8m0fnu)
    for some in (alone, mixed):
        require_equal("F8_E4M3", some.view(torch.float8_e4m3fn), scale, table_dtype)
    wide = mixed[: len(mixed) // 18 * 18].view(-1, 576).view(torch.float8_e4m3fn)
    require_equal(
        "F8_E4M3", wide, scale.view(torch.uint8)[: wide.shape[0] * 18].view(-1, 18).view(scale.dtype), table_dtype
    )


def complaint(call) -> str:
    with pytest.raises(ValueError) as raised:
        call()
    return str(raised.value)


@pytest.mark.parametrize("table_dtype", FROM_BFLOAT16)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_refused(table_dtype, number):
    rows = torch.ones(3, 32).bfloat16()
    rows[1, 30] = number
    expected = complaint(lambda: quantize_rows(rows, table_dtype))
    compiled = CompiledRounding("BF16", table_dtype, 32)
    assert complaint(lambda: compiled.quantize(rows, None, global_scale(table_dtype), True)) == expected
    assert "NaN or infinite" in expected


@pytest.mark.parametrize(("code", "exponent"), [(0x7F, 100), (0xFF, 100), (1, 247), (1, 255)])
def test_float8_rows_that_are_not_finite_are_refused(code, exponent):
    values, scale = torch.zeros(2, 64, dtype=torch.uint8), torch.full((2, 2), 127, dtype=torch.uint8)
    values[1, 40], scale[1, 1] = code, exponent
    compiled = CompiledRounding("F8_E4M3", "nvfp4", 64)
    stored = values.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)
    for call in (compiled.largest, lambda *rows: compiled.quantize(*rows, torch.ones(1), False)):
        assert "NaN or infinite" in complaint(lambda call=call: call(*stored))


@pytest.mark.parametrize("table_dtype", LEAST_SQUARES)
def test_rows_with_too_large_squares_are_refused(table_dtype):
    rows = torch.ones(2, 32).bfloat16()
    for number, is_refused in ((2.0**56, False), (-(2.0**57), True)):
        rows[1, 3] = number
        if not is_refused:
            require_equal("BF16", rows, None, table_dtype)
            continue
        expected = complaint(lambda: quantize_rows(rows, table_dtype))
        compiled = CompiledRounding("BF16", table_dtype, 32)
        assert complaint(lambda compiled=compiled: compiled.quantize(rows, None, None, False)) == expected
        assert "cannot be stored" in expected


@pytest.mark.parametrize("table_dtype", LEAST_SQUARES)
@pytest.mark.parametrize("width", [64, 512])
def test_least_squares_do_not_depend_on_the_order_of_channels(table_dtype, width):
    """Sums of float32 numbers would, in their last bits."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3000, width, generator=generator).bfloat16()
    for _ in range(3):
        order = torch.randperm(width, generator=generator)
        values, scale = quantize_rows(rows, table_dtype)
        others, other_scale = quantize_rows(rows[:, order], table_dtype)
        decoded = dequantize_rows(values, scale, None, width)
        assert torch.equal(scale, other_scale)
        assert torch.equal(decoded[:, order], dequantize_rows(others, other_scale, None, width))


def test_rows_without_compiled_code():
    assert is_compilable("BF16", 256) and is_compilable("F8_E4M3", 32)
    assert not any(is_compilable(dtype, 64) for dtype in ("F32", "F16", "I8")) and not is_compilable("BF16", 1 << 20)


# --- whole tables -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["BF16", "F8_E4M3"])
def table(request, tmp_path, monkeypatch):
    """Return a folder with a table of some thousand rows, read and written in many steps."""
    monkeypatch.setattr(table_writer_engram, "_STEP_NUMBERS", 100 * 64)
    hasher = NgramHasher(
        layer_ids=[1],
        max_ngram=3,
        bucket_counts=[500, 600],
        heads=2,
        vocab_size=64,
        compressed_vocab_size=None,
        pad_token_id=2,
    )
    for name, constant in hasher.derive_constants().items():
        getattr(hasher, name).copy_(constant)
    description = describe_table(hasher, 0, width=64, dtype=request.param)
    rows = torch.randn(description.num_rows, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    rows[7] = 0
    stored = (rows.bfloat16(), None) if request.param == "BF16" else quantize_rows(rows, "float8_e4m3fn")
    name = table_file_name(1)
    with TableWriter(tmp_path / name, description) as writer:
        writer.write(0, *stored)
    write_manifest(tmp_path, {1: manifest_entry([(name, description.rows, description.tensors)])})
    return tmp_path, description


def targets(dtype: str) -> list[str]:
    return FROM_BFLOAT16 if dtype == "BF16" else FROM_FLOAT8


def test_compiled_tables_are_equal_and_report_the_same_errors(table):
    folder, description = table
    source, before = MappedRows(read_tables(folder)[1]), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for table_dtype in targets(description.dtype):
            compiled = CompiledRounding(description.dtype, table_dtype, 64)
            expected, found = (
                quantize_table(source, folder / name, description, table_dtype, rounding=rounding)
                for name, rounding in (("torch", None), ("compiled", compiled))
            )
            assert (folder / "torch").read_bytes() == (folder / "compiled").read_bytes(), table_dtype
            assert (found.rows, found.largest, found.histogram) == (
                expected.rows,
                expected.largest,
                expected.histogram,
            )
            assert found.relative == pytest.approx(expected.relative, rel=1e-6) and found.relative > 0
    finally:
        torch.set_num_threads(before)


def test_compiled_code_resumes_a_table_that_torch_began(table):
    folder, description = table
    source, whole, cut = MappedRows(read_tables(folder)[1]), folder / "whole", folder / "cut"
    quantize_table(source, whole, description, "nvfp4")
    read: list[int] = []

    def advance(count: int) -> None:
        read.append(count)
        if sum(read) > 1.5 * source.stored.size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_table(source, cut, description, "nvfp4", advance, folder / "journal", save_seconds=0)
    compiled = CompiledRounding(description.dtype, "nvfp4", 64)
    resumed: list[int] = []
    quantize_table(
        source, cut, description, "nvfp4", resumed.append, folder / "journal", rounding=_Counting(compiled, resumed)
    )
    assert whole.read_bytes() == cut.read_bytes()
    assert 0 < resumed.count(-1) < description.num_rows / 100


class _Counting:
    """Append -1 to a list for every call of `quantize`."""

    def __init__(self, rounding: CompiledRounding, calls: list[int]):
        self.largest, self._rounding, self._calls = rounding.largest, rounding, calls

    def quantize(self, *arguments):
        self._calls.append(-1)
        return self._rounding.quantize(*arguments)


@pytest.mark.parametrize("table", ["BF16"], indirect=True)
def test_quantize_command_compiles_for_large_tables(table, monkeypatch, capsys):
    folder, _ = table
    made: list[str] = []
    compiled_rounding = quantization._compiled_rounding
    monkeypatch.setattr(
        quantization, "_compiled_rounding", lambda *given: made.append(given[1]) or compiled_rounding(*given)
    )
    for name, least in (("small", 4 << 30), ("large", 0)):
        monkeypatch.setattr(quantization, "COMPILED_BYTES", least)
        (folder / name).mkdir()
        quantization.quantize_folder(folder, folder / name, folder / f"{name} work", "int4")
    assert made == ["int4"] and capsys.readouterr().err == ""
    # Without numba, one line names it.
    monkeypatch.setitem(sys.modules, "numba", None)
    (folder / "without").mkdir()
    quantization.quantize_folder(folder, folder / "without", folder / "without work", "int4")
    assert made == ["int4"] and capsys.readouterr().err.count("engram-hf[quantize]") == 1
    files = [(folder / name / table_file_name(1)).read_bytes() for name in ("small", "large", "without")]
    assert files[0] == files[1] == files[2]
