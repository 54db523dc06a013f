"""Two processes on the CPU compute the results of one on the whole batch: DDP, Trainer, and FSDP2 with sharded tables."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shard_runs import free_port
from tiny_backbones import LAYER_IDS, build, random_ids

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("distributed_worker.py")


def worker(folder: Path, rank: int, size: int, port: int) -> subprocess.Popen:
    """Start a process of a group, with the environment that torchrun would give it."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings = {"OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1, "GLOO_SOCKET_IFNAME": "lo", **group}
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(folder)],
        env={**os.environ, **{name: str(value) for name, value in settings.items()}},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple[str, int], dict[str, torch.Tensor]]:
    """Return the results that the worker wrote, by scenario and number of processes."""
    folder = tmp_path_factory.mktemp("distributed")
    build("mixtral").save_pretrained(folder / "model")
    ids = random_ids(4, 12, seed=3)
    labels = ids.clone()
    labels[:, :3] = -100  # Each row has the same number of labels, because a plain loop averages over processes.
    save_file({"input_ids": ids, "labels": labels}, folder / "rows.safetensors")
    # One and two processes run at the same time; they are started directly, which saves torchrun's own process.
    workers = [
        worker(folder, rank, size, port) for size, port in ((1, free_port()), (2, free_port())) for rank in range(size)
    ]
    try:
        for process in workers:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in workers:
            process.kill()  # It may wait for another process that failed.
    return {
        (name, int(processes)): load_file(path)
        for path in folder.glob("*_[12].safetensors")
        for name, _, processes in [path.stem.rpartition("_")]
    }


@pytest.mark.parametrize("run", ["accelerate_loop", "fsdp2"])
def test_two_processes_have_the_logits_gradients_and_step_of_one(results, run):
    one, two = results["accelerate_loop", 1], results[run, 2]
    gradients = [key for key in one if key.startswith("grad.")]
    assert len(gradients) == len([key for key in one if key.startswith("after.")]) == (len(one) - 1) / 2
    for key, expected in one.items():
        torch.testing.assert_close(
            two[key], expected, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
        assert not key.startswith("grad.") or expected.abs().max() > 0


def test_row_adapters_have_the_gradients_and_step_of_one_process(results):
    one, two = results["row_adapters", 1], results["row_adapters", 2]
    gradients = [key for key in one if key.startswith("grad.")]
    assert len(gradients) == len(LAYER_IDS) and all(key.endswith(".delta") for key in gradients)
    for key, expected in one.items():
        torch.testing.assert_close(two[key], expected, rtol=1e-5, atol=1e-6)
    assert all(one[key].abs().max() > 0 for key in gradients)


def test_trainer_has_the_weights_of_one_process(results):
    for key, expected in results["trainer", 1].items():
        torch.testing.assert_close(results["trainer", 2][key], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(results["trainer", 1]["after.lm_head.weight"], results["fsdp2", 1]["after.lm_head.weight"])


def test_fsdp2_shards_every_parameter_including_tables(results):
    two = results["fsdp2", 2]
    names = [key.removeprefix("after.") for key in two if key.startswith("after.")]
    assert {f"local.{name}" for name in names} == {key for key in two if key.startswith("local.")}
    for layer in LAYER_IDS:
        name = f"model.layers.{layer}.engram.table.weight"
        rows = two[f"after.{name}"].shape[0]
        assert two[f"local.{name}"].item() == (rows + 1) // 2


def test_tensor_parallel_splits_weights_by_the_plans_of_backbone_and_head(results):
    """The model is loaded with `tp_plan="auto"`; every process reads whole tables."""
    one, two = results["tensor_parallel", 1], results["tensor_parallel", 2]
    torch.testing.assert_close(two["logits"], one["logits"], rtol=1e-5, atol=1e-5)
    split = {key for key in one if key.startswith("local.") and two[key] * 2 == one[key]}
    assert {"local.lm_head.weight", "local.model.layers.1.self_attn.q_proj.weight"} <= split
    assert not any(".engram." in key for key in split)
