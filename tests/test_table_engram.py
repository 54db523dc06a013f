"""One table of every dtype: its rows, their numbers, and the effect of moving and training it."""

import pytest
import torch
from table_models import DTYPES as SOME_DTYPES
from table_models import OTHER_DTYPES
from torch.nn import functional as F

from engram_hf.modeling_deepseek_v41 import round_fp8
from engram_hf.table_engram import EngramTable, apply_global_scale, dequantize_rows, read_rows
from engram_hf.table_writer_engram import quantize_rows

ROWS, WIDTH = 40, 64
DTYPES = [*SOME_DTYPES, *OTHER_DTYPES]


def make_table(table_dtype: str | None, dtype: torch.dtype = torch.float32) -> tuple[EngramTable, torch.Tensor]:
    """Return a table, and its rows as float32 numbers."""
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    table = EngramTable(ROWS, WIDTH, table_dtype, dtype=dtype)
    with torch.no_grad():
        if table_dtype is None:
            table.weight.copy_(rows)
            return table, table.weight.float()
        if table.global_scale is not None:
            table.global_scale.fill_(300.0)
        values, scale = quantize_rows(rows, table_dtype, table.global_scale)
        table.weight.copy_(values)
        table.scale.copy_(scale)
    return table, decoded(values, scale, table.global_scale)


def decoded(values, scale, global_scale=None, width=WIDTH) -> torch.Tensor:
    return dequantize_rows(values, apply_global_scale(scale, global_scale), None, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table_dtype", DTYPES)
def test_rows_are_stored_contiguously(table_dtype, dtype):
    table, rows = make_table(table_dtype, dtype)
    ids = torch.randint(0, ROWS, (2, 5, 3))
    found = table(ids, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found, rows[ids].flatten(-2).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_only_float_rows_are_trainable(dtype):
    table, _ = make_table(None, dtype)
    ids = torch.tensor([[3, 3], [7, 0]])
    table(ids).sum().backward()
    reference = table.weight.detach().clone().requires_grad_()
    F.embedding(ids, reference).sum().backward()
    assert torch.equal(table.weight.grad, reference.grad)
    for quantized in DTYPES[1:]:
        assert not any(parameter.requires_grad for parameter in make_table(quantized)[0].parameters())


def test_rows_are_float32_unless_requested_otherwise():
    """They do not depend on the default dtype at the time the model is built."""
    table, rows = make_table("int8")
    torch.set_default_dtype(torch.float64)
    try:
        found = read_rows(table, torch.tensor([[3, 5]]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, rows[[3, 5]].view(1, -1))


def test_every_float8_number_times_every_scale():
    """The fast path on the CPU equals the definition, and is not used where it does not apply."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    exponents = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    values = numbers.view(torch.uint8).repeat(256, 1).view(torch.float8_e4m3fn)  # Row r has scale r.
    table = EngramTable(256, 256, "float8_e4m3fn")
    scale = exponents.view(torch.uint8).unsqueeze(1).repeat(1, 8).view(torch.float8_e8m0fnu)
    for nan_free in (True, False):
        some = values.view(torch.uint8).clone()
        if nan_free:
            some[:, [0x7F, 0xFF]] = 0
        with torch.no_grad():
            table.weight.copy_(some.view(torch.float8_e4m3fn))
            table.scale.copy_(scale)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected = (table.weight.float() * exponents.float().unsqueeze(1)).to(dtype)
            for row in range(256):
                found = table(torch.tensor([[row]]), dtype=dtype)
                assert torch.equal(found.nan_to_num(7.0), expected[row : row + 1].nan_to_num(7.0)), (row, dtype)


def test_flushing_subnormal_numbers_changes_no_rows():
    # Seven of them are subnormal.
    values = torch.arange(1, 33, dtype=torch.uint8).view(1, 32).view(torch.float8_e4m3fn)
    scale = torch.full((1, 1), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    table = EngramTable(1, 32, "float8_e4m3fn")
    with torch.no_grad():
        table.weight.copy_(values)
        table.scale.copy_(scale)
    torch.set_flush_denormal(True)
    try:
        found = table(torch.tensor([[0]]), dtype=torch.bfloat16)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, dequantize_rows(values, scale, torch.bfloat16))


def test_quantizing_follows_the_rule_of_the_release():
    rows = torch.randn(300, 64) * torch.logspace(-8, 4, 300).unsqueeze(1)
    assert torch.equal(dequantize_rows(*quantize_rows(rows, "float8_e4m3fn")), round_fp8(rows))
    values, scale = quantize_rows(rows, "int8")
    assert values.abs().max() == 127
    assert ((dequantize_rows(values, scale) - rows).abs() <= scale * 0.5001).all()
    for table_dtype in DTYPES[1:]:
        zeros = quantize_rows(torch.zeros(2, 64), table_dtype)
        one = torch.ones(1) if table_dtype == "nvfp4" else None
        assert torch.equal(decoded(*zeros, one), torch.zeros(2, 64))
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantize_rows(torch.full((1, 64), float("inf")), table_dtype)
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_rows(torch.zeros(1, 48), "float8_e4m3fn")
    with pytest.raises(ValueError, match="cannot be stored as 'int3'"):
        EngramTable(3, 64, "int3")


@pytest.mark.parametrize("table_dtype", DTYPES)
def test_rows_beyond_the_table_are_refused(table_dtype):
    table, _ = make_table(table_dtype)
    for wrong in (ROWS, -1):
        with pytest.raises(ValueError, match=f"Row {wrong} was asked for, but the table has rows 0..{ROWS - 1}"):
            table(torch.tensor([[0, wrong]]))
    assert table(torch.empty(2, 0, 3, dtype=torch.long)).shape == (2, 0, 3 * WIDTH)


@pytest.mark.parametrize("table_dtype", DTYPES[1:])
def test_quantized_table_keeps_its_dtypes(table_dtype):
    table, _ = make_table(table_dtype)
    before = table.weight.dtype, table.scale.dtype
    assert (table.bfloat16().weight.dtype, table.scale.dtype) == before
    assert table.to("meta").weight.device.type == table.scale.device.type == "meta"


def test_float_table_follows_the_dtype_of_the_model():
    table, rows = make_table(None)
    assert table.bfloat16().weight.dtype == torch.bfloat16
    assert torch.equal(table(torch.tensor([[3, 5]])), rows[[3, 5]].view(1, -1).bfloat16())


@pytest.mark.parametrize("table_dtype", DTYPES)
def test_new_table_has_noise_of_the_given_scale(table_dtype):
    table = EngramTable(3000, 64, table_dtype)
    table.reset_parameters(0.5)
    rows = table(torch.arange(3000).unsqueeze(1), dtype=torch.float32).detach()
    assert rows.std().item() == pytest.approx(0.5, rel=0.05)
    assert rows.mean().item() == pytest.approx(0.0, abs=0.01)
