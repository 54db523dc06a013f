"""Tables in shards: several processes compute the results of one, and none of them has a whole table."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shard_runs import free_port, later, optimizer_of, run, train, values
from tiny_backbones import LAYER_IDS, build, random_ids
from torch import distributed as dist
from torch.distributed.tensor import Shard

from engram_hf import EngramForCausalLM
from engram_hf.training import (
    SparseAdamW,
    enable_sparse_gradients,
    engram_parameter_groups,
    load_shards,
    save_shards,
    shard_tables,
    tables_on_meta,
)
from engram_hf.training.row_shards import RowShard

PAGE = Path(__file__).parents[2] / "docs" / "large-models.md"
# The script on the page assumes these lines.
BEFORE_SCRIPT = """import torch
device, batches = "cpu", [{"input_ids": ids, "labels": ids} for ids in torch.arange(40).view(2, 2, 10)]
"""
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# The norms of gradients are sums over all parameters, hence the wider tolerance.
NORM_CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def tables(found):
    return {
        name: value for name, value in found.items() if name.startswith("model.") and name.endswith(".table.weight")
    }


def assert_close(found, expected):
    for name, value in expected.items():
        close = NORM_CLOSE if name.endswith("norms") else CLOSE
        torch.testing.assert_close(found[name], value, **close, msg=lambda text, name=name: f"{name}: {text}")


def float8(folder, **options):
    return build("llama", "v4.1", engram_table_dtype="float8_e4m3fn", engram_head_dim=32, **options)


# --- several processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    float8(folder).save_pretrained(folder / "float8")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """Return the results by scenario and number of processes."""
    assert run(
        2, ["ddp", "resumed", "fsdp2", "mapped", "tensor_parallel", "row_adapters", "trainer", "full_disk"], folder
    ) == [0, 0]
    assert run(4, ["ddp", "resumed", "mapped"], folder) == [0] * 4
    assert run(1, ["resumed", "tensor_parallel", "row_adapters", "trainer"], folder) == [0]
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*_?.pt")}


@pytest.fixture(scope="module")
def one():
    """Return the results of a single process."""
    torch.set_num_threads(1)
    model = build("llama")
    enable_sparse_gradients(model)
    optimizer = optimizer_of(model)
    found = train(model, optimizer, range(2))
    half = {f"half.{name}": value for name, value in values(model).items()}
    return found | half | later(train(model, optimizer, range(2, 4))) | values(model)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_losses_norms_and_tables_are_those_of_one_process(results, one, processes):
    """The training runs under DDP, with accumulated batches and clipping; the other parameters are compared, too."""
    assert_close(results[f"ddp_{processes}"], one)
    start = tables(values(build("llama")))
    assert all((one[name] - value).abs().max() > 1e-2 for name, value in start.items())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_process_has_its_part_of_the_rows(results, processes):
    for layer in LAYER_IDS:
        rows, width = results[f"ddp_{processes}"][f"model.layers.{layer}.engram.table.weight"].shape
        assert results[f"ddp_{processes}"][f"own.{layer}"].tolist() == [-(-rows // processes), width]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_checkpoint_of_two_processes_resumes_with_any_number(results, one, processes):
    found = results[f"resumed_{processes}"]
    goes_on = {name: value for name, value in one.items() if name.startswith("later.")}
    assert_close(found, goes_on | tables(one) | {"lm_head.weight": one["lm_head.weight"]})


@pytest.mark.slow
def test_fsdp2_shards_other_parameters(results, one):
    half = {name.removeprefix("half."): value for name, value in one.items() if name.startswith("half.")}
    assert_close(results["fsdp2_2"], half | {name: one[name] for name in ("losses", "norms")})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model-2", "model-4", "fsdp2-model"])
def test_exported_folder_is_an_ordinary_one(results, folder, one, name):
    """Each process wrote one of its files."""
    model = EngramForCausalLM.from_pretrained(folder / name, engram_residency="resident")
    assert_close(values(model), {key.removeprefix("half."): one[key] for key in one if key.startswith("half.")})
    files = json.loads((folder / name / "engram_tables.json").read_text())["tables"]["1"]["weight"]
    assert len(files) == (4 if name == "model-4" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_rows_are_read_from_their_ranges(results, folder, processes):
    """Quantized tables can be sharded too, and are read to the bit; the processes assert that they do not read others'
    rows.
    """
    for name in ("model-2", "float8"):
        with torch.no_grad():
            logits = EngramForCausalLM.from_pretrained(folder / name)(random_ids(2, 9)).logits
        assert torch.equal(results[f"mapped_{processes}"][f"logits.{name}"], logits)


@pytest.mark.slow
def test_tensor_parallel_plan_changes_no_result(results):
    one, two = results["tensor_parallel_1"], results["tensor_parallel_2"]
    assert one["gradient"].abs().max() > 1e-4
    assert_close(two, one)


@pytest.mark.slow
def test_row_adapters_train_on_shards(results):
    one, two = results["row_adapters_1"], results["row_adapters_2"]
    assert len(one) == len(LAYER_IDS) and all(value.abs().max() > 1e-4 for value in one.values())
    assert_close(two, one)


@pytest.mark.slow
def test_trainer_trains_tables_in_shards(results):
    assert_close(results["trainer_2"], results["trainer_1"])


@pytest.mark.slow
def test_exit_of_a_process_ends_the_others_and_the_last_checkpoint_loads(folder):
    first, second = run(2, ["death"], folder)
    assert second == 7 and first not in (0, None)
    assert run(1, ["after_death"], folder) == [0]


@pytest.mark.slow
def test_script_of_the_page_runs_by_the_command_of_the_page(tmp_path):
    """It runs on two processes, by `accelerate launch`, which calls torchrun to start them."""
    page = PAGE.read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(# train\.py\n.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"^accelerate launch .*$", page, re.MULTILINE)
    (tmp_path / "train.py").write_text(BEFORE_SCRIPT + script)
    start = build("llama")
    start.save_pretrained(tmp_path / "path" / "to" / "model")
    program, *words = shlex.split(command.replace(" 8 ", f" 2 --main_process_port {free_port()} "))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = [Path(sys.executable).with_name(program), *words]
    done = subprocess.run(launcher, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    trained = tables(values(EngramForCausalLM.from_pretrained(tmp_path / "trained", engram_residency="resident")))
    for name, before in tables(values(start)).items():
        changed = (trained[name] != before).any(1)
        assert 0 < changed.sum() < len(changed)
    files = json.loads((tmp_path / "trained" / "engram_tables.json").read_text())["tables"]["1"]["weight"]
    assert len(files) == 2  # Each process wrote its own file.


# --- one process


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def backward(model, seed=1):
    ids = random_ids(2, 10, seed=seed)
    model(ids, labels=ids, use_cache=False).loss.backward()


def test_tables_on_meta_are_filled_and_learn(alone):
    with tables_on_meta():
        model = build("llama")
    weight = model.model.memories()[1].table.weight
    assert weight.is_meta and not model.lm_head.weight.is_meta
    parameters = shard_tables(model)
    table = model.model.memories()[1].table
    assert table.weight in parameters and len(parameters) == len(LAYER_IDS)
    assert table.weight.placements == (Shard(0),)
    assert table.weight.detach().to_local().std().item() == pytest.approx(0.02, rel=0.1)
    optimizer, before = optimizer_of(model), table.weight.detach().to_local().clone()
    backward(model)
    optimizer.step()
    changed = (table.weight.to_local() != before).any(1).nonzero().flatten()
    assert 0 < changed.numel() <= optimizer.rows_of(table.weight).numel() < table.num_rows


def test_random_rows_do_not_depend_on_the_number_of_processes(monkeypatch):
    """The table has more than one block."""
    from engram_hf.table_engram import EngramTable
    from engram_hf.training.sharding import _cut

    with tables_on_meta():
        table = EngramTable(150_000, 2)
    parts = [_cut(table, RowShard(150_000, rank, 3, None), torch.device("cpu"), 1, 0.5)["weight"] for rank in range(3)]
    whole = _cut(table, RowShard(150_000, 0, 1, None), torch.device("cpu"), 1, 0.5)["weight"]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.std().item() == pytest.approx(0.5, rel=0.02) and whole[:65_536].ne(whole[65_536 : 2 * 65_536]).all()


def test_sharded_model_can_be_moved(alone):
    model = build("llama")
    shard_tables(model)
    model.to(torch.bfloat16)
    optimizer = SparseAdamW(engram_parameter_groups(model, lr=1e-3))
    backward(model)
    optimizer.step()
    assert optimizer.rows_of(model.model.memories()[1].table.weight).numel() > 10


def test_sharding_without_processes_is_refused():
    with pytest.raises(ValueError, match="start the script by torchrun or accelerate launch"):
        shard_tables(build("llama"))


def test_sharded_model_is_not_sharded_again(alone):
    model = build("llama")
    shard_tables(model)
    with pytest.raises(ValueError, match="is in shards already"):
        shard_tables(model)


def test_more_processes_than_rows_are_refused(alone, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 500)
    with pytest.raises(ValueError, match=r"has 408 rows, which cannot be divided among 500 processes"):
        shard_tables(build("llama"))


def test_other_optimizers_are_refused(alone):
    model = build("llama")
    shard_tables(model)
    backward(model)
    for optimizer in (torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.parameters(), lr=1e-3)):
        with pytest.raises(ValueError, match=r"cannot take the sparse gradients of tables.*SparseAdamW"):
            optimizer.step()


def test_state_of_another_number_of_processes_is_refused(alone):
    model = build("llama")
    shard_tables(model)
    optimizer = optimizer_of(model)
    backward(model)
    optimizer.step()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    part = next(part for part in state["state"].values() if "shard" in part)
    part["shard"] = torch.tensor([0, 204, 408])
    with pytest.raises(ValueError, match=r"the rows 0 to 204 of 408.*start as many processes as saved them, or load"):
        optimizer.load_state_dict(state)


def test_save_pretrained_says_what_to_call(alone, tmp_path):
    model = build("llama")
    shard_tables(model)
    with pytest.raises(ValueError, match=r"call export_model\(model, folder\) in every process"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_damaged_checkpoints_are_refused(alone, tmp_path):
    model = build("llama")
    shard_tables(model)
    optimizer = optimizer_of(model)
    backward(model)
    optimizer.step()
    save_shards(model, tmp_path, optimizer)
    other = build("llama", engram_vocab_size=11)
    shard_tables(other)
    with pytest.raises(ValueError, match="primes"):
        load_shards(other, tmp_path)
    with pytest.raises(ValueError, match="has the optimizer of other parameters"):
        load_shards(model, tmp_path, SparseAdamW([model.model.memories()[1].table.weight]))
    file = next(tmp_path.glob("shard-*-00003-of-*.safetensors"))
    data = file.read_bytes()
    for wrong, said in ((data[:-8], "safetensors"), (None, "safetensors")):
        file.write_bytes(wrong) if wrong else file.unlink()
        with pytest.raises(ValueError, match=said):
            load_shards(model, tmp_path)
    file.write_bytes(data)
    file.with_name("shard-00009-model-00001-of-00003.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="which is not of this checkpoint"):
        load_shards(model, tmp_path)
