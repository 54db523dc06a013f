"""The printed summary of a model's memory agrees with its tables, for every residency."""

import pytest
from tiny_backbones import LAYER_IDS, build, tiny_tokenizer

from engram_hf import EngramForCausalLM
from engram_hf.display import summarize_tables


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summaries")
    build("llama", "v4.1", engram_table_dtype="float8_e4m3fn", engram_head_dim=32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("residency", ["resident", "mapped"])
def test_summary_bytes_equal_those_of_the_rows(saved, residency):
    model = EngramForCausalLM.from_pretrained(saved, engram_residency=residency)
    tables = summarize_tables(model)
    assert [table.layer for table in tables] == LAYER_IDS
    for table, memory in zip(tables, model.model.memories().values(), strict=True):
        assert table.rows == memory.table.num_rows
        assert table.bytes == table.rows * (32 + 1)  # One row has 32 numbers in float8, and a scale.
        assert (table.residency, table.trainable, table.dtype) == (residency, False, "float8_e4m3fn")


def test_print_memory_summary_counts_every_parameter_once(capsys):
    model = build("llama")
    model.print_memory_summary()
    *lines, totals = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(LAYER_IDS)
    assert all(line.endswith("trainable") for line in lines[1:])
    words = totals.replace(",", "").replace("(", " ").split()
    assert sum(int(word) for word in words if word.isdigit()) == model.num_parameters()


def test_notebooks_show_escaped_html():
    model, tokenizer = build("llama"), tiny_tokenizer()
    shown = model._repr_html_()
    assert "<table>" in shown and "EngramForCausalLM on llama" in shown
    assert repr(model).splitlines()[1].strip().replace("(", "(") in shown
    assert "&lt;" in tokenizer._repr_html_() and "compressed ids" in tokenizer._repr_html_()
