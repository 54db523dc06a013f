"""The program of every process in the tests of tables in shards; see `test_sharding.py`."""

import os
import resource
import signal
import socket
from pathlib import Path

import torch
from child_processes import forks_of_a_server
from peft import get_peft_model
from tiny_backbones import LAYER_IDS, build, random_ids
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_runs import losses as logged_losses
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from engram_hf import EngramForCausalLM
from engram_hf.row_sources_engram import MappedRows
from engram_hf.training import (
    EngramRowsConfig,
    EngramTrainingCallback,
    SparseAdamW,
    engram_parameter_groups,
    export_model,
    load_shards,
    save_shards,
    scan_rows,
    shard_tables,
)

BATCH = 4
# The import of these modules takes long.
PRELOADED = [
    "engram_hf.adding_engram",
    "engram_hf.training",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
]


def optimizer_of(model):
    """Return an optimizer with a large epsilon, so that the rounding of gradients near zero does not become a step."""
    return SparseAdamW(engram_parameter_groups(model, lr=1e-2, weight_decay=0.1), eps=1e-3)


def own_share(ids: torch.Tensor) -> torch.Tensor:
    """Return the sequences of a batch for this process."""
    share = len(ids) // dist.get_world_size() if dist.is_initialized() else len(ids)
    return ids.split(share)[dist.get_rank() if dist.is_initialized() else 0]


def mean(number: torch.Tensor) -> float:
    """Return the mean over all processes."""
    number = number.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(number)
        number /= dist.get_world_size()
    return number.item()


def train(model, optimizer, seeds, wrapped=None) -> dict[str, torch.Tensor]:
    """Run steps of two accumulated batches with clipping; return the losses of both, and the norm."""
    losses, norms = [], []
    for seed in seeds:
        for half in range(2):
            ids = own_share(random_ids(BATCH, 10, seed=2 * seed + half))
            loss = (wrapped or model)(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            losses.append(mean(loss))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        optimizer.step()
        optimizer.zero_grad()
        norms.append(norm.item())
    return {"losses": torch.tensor(losses), "norms": torch.tensor(norms)}


def later(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the results of `train` under other names."""
    return {f"later.{name}": value for name, value in found.items()}


def values(model) -> dict[str, torch.Tensor]:
    """Return all parameters, gathered."""
    whole = {}
    for name, parameter in model.named_parameters():
        parameter = parameter.detach()
        whole[name] = (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).clone()
    return whole


def in_shards(seed=0, name="llama"):
    model = build(name, seed=seed)
    shard_tables(model)
    return model, optimizer_of(model), DistributedDataParallel(model)


# --- scenarios, for any number of processes ---


def ddp(folder: Path) -> dict[str, torch.Tensor]:
    """Train, save a checkpoint and an ordinary folder half-way, and train further."""
    model, optimizer, wrapped = in_shards()
    found = train(model, optimizer, range(2), wrapped)
    half = {f"half.{name}": value for name, value in values(model).items()}
    save_shards(wrapped, folder / f"checkpoint-{dist.get_world_size()}", optimizer, {"step": 2})
    export_model(wrapped, folder / f"model-{dist.get_world_size()}")
    found |= later(train(model, optimizer, range(2, 4), wrapped))
    rows = {f"own.{layer}": torch.tensor(memory.table.weight.to_local().shape) for layer, memory in memories(model)}
    return found | half | rows | values(model)


def resumed(folder: Path) -> dict[str, torch.Tensor]:
    """Resume the training that two processes saved."""
    model, optimizer, wrapped = in_shards(seed=1)
    progress = load_shards(wrapped, folder / "checkpoint-2", optimizer)
    assert progress == {"step": 2}
    return later(train(model, optimizer, range(2, 4), wrapped)) | values(model)


def fsdp2(folder: Path) -> dict[str, torch.Tensor]:
    """Run the same training with all other parameters sharded by FSDP2, and save its checkpoint."""
    model = build("llama")
    tables = shard_tables(model)
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, ignored_params=tables)
    fully_shard(model, ignored_params=tables)
    optimizer = optimizer_of(model)
    found = train(model, optimizer, range(2))
    half = values(model)
    save_shards(model, folder / "fsdp2", optimizer)
    export_model(model, folder / "fsdp2-model")
    train(model, optimizer, [7])
    load_shards(model, folder / "fsdp2", optimizer)
    for name, value in values(model).items():
        assert torch.equal(value, half[name]), name
    return found | half


def mapped(folder: Path) -> dict[str, torch.Tensor]:
    """Load a model whose tables are in files: every process reads its own rows, and no others."""
    read, found = [], {}
    original = MappedRows.read
    MappedRows.read = lambda self, first, stop: (
        read.append((self.num_rows, first, stop)) or original(self, first, stop)
    )
    for kind in ("model-2", "float8"):
        model = EngramForCausalLM.from_pretrained(folder / kind, engram_residency="mapped")
        assert not read, "loading reads no rows"
        shard_tables(model)
        count, rank = dist.get_world_size(), dist.get_rank()
        for rows, first, stop in read:
            step = -(-rows // count)
            assert step * rank <= first < stop <= step * (rank + 1), "its own rows only"
        read.clear()
        with torch.no_grad():
            found[f"logits.{kind}"] = model(random_ids(2, 9)).logits
    MappedRows.read = original
    return found


def tensor_parallel(folder: Path) -> dict[str, torch.Tensor]:
    """Use transformers' plan for the other parameters: every process reads the same rows, and the gradient equals that
    of one process.
    """
    plan = {"distributed_config": DistributedConfig(tp_plan="auto")} if dist.get_world_size() == 2 else {}
    model = EngramForCausalLM.from_pretrained(folder / "model-2", engram_residency="mapped", **plan)
    shard_tables(model)
    ids = random_ids(2, 9)
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    table = model.model.memories()[LAYER_IDS[0]].table.weight
    gradient = torch.zeros(table.shape)
    gradient[table.grad.rows + table.row_shard.first] = table.grad.row_values
    dist.all_reduce(gradient)
    logits = output.logits.detach()
    return {"logits": logits.full_tensor() if hasattr(logits, "full_tensor") else logits, "gradient": gradient}


def row_adapters(folder: Path) -> dict[str, torch.Tensor]:
    """Train differences of rows on tables in shards, which do not change, under DDP."""
    model = build("llama")
    ids = random_ids(BATCH, 10, seed=5)
    rows = scan_rows([{"input_ids": ids}], None, model)
    shard_tables(model)
    before = values(model)
    adapted = get_peft_model(model, EngramRowsConfig(rows=rows))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    wrapped = DistributedDataParallel(adapted)
    for _ in range(2):
        share = own_share(ids)
        wrapped(input_ids=share, labels=share, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = values(adapted)
    for name, value in before.items():
        assert any(torch.equal(other, value) for other in found.values() if other.shape == value.shape), name
    try:
        adapted.merge_and_unload()
        raise AssertionError("rows of other processes cannot be merged")
    except ValueError as error:
        assert "A table in shards cannot take differences" in str(error), error
    return {name: value for name, value in found.items() if name.endswith(".delta")}


def trainer(folder: Path) -> dict[str, torch.Tensor]:
    """Train with the stock Trainer, which wraps the model by itself, and with the callback."""
    model = build("llama")
    shard_tables(model)
    rows = [{"input_ids": row, "labels": row} for row in random_ids(4, 10, seed=3)]
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=BATCH // dist.get_world_size(),
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    run = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer_of(model), None))
    run.add_callback(EngramTrainingCallback(run))
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    for entry in logged:
        assert entry["engram/layer_1/update_norm"] > 0 and entry["engram/layer_1/rows_per_step"] > 0
    norms = torch.tensor([entry["grad_norm"] for entry in logged])
    return values(model) | {"losses": torch.tensor(logged_losses(run)), "norms": norms}


def full_disk(folder: Path) -> dict[str, torch.Tensor]:
    """Let one process fail to write: it ends the save in all processes, and the earlier checkpoint is unchanged."""
    model, optimizer, wrapped = in_shards(seed=2)
    train(model, optimizer, range(1), wrapped)
    save_shards(model, folder / "full", optimizer, {"step": 1})
    before = values(model)
    train(model, optimizer, range(1, 2), wrapped)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    for save in (
        lambda: save_shards(model, folder / "full", optimizer, {"step": 2}),
        lambda: export_model(model, folder / "never"),
    ):
        try:
            save()
            raise AssertionError("the disk was full")
        except ValueError as error:
            assert f"Process {dist.get_world_size() - 1} could not write" in str(error), error
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_shards(model, folder / "full", optimizer) == {"step": 1}
    for name, value in values(model).items():
        assert torch.equal(value, before[name]), name
    return {}


def death(folder: Path) -> dict[str, torch.Tensor]:
    """Let a process exit in the middle of training."""
    model, optimizer, wrapped = in_shards(seed=2)
    train(model, optimizer, range(1), wrapped)
    save_shards(model, folder / "death", optimizer, {"step": 1})
    if dist.get_rank() == 1:
        os._exit(7)
    train(model, optimizer, range(1, 9), wrapped)
    return {}


def after_death(folder: Path) -> dict[str, torch.Tensor]:
    """Load the checkpoint that the exited process left."""
    model, optimizer, _ = in_shards(seed=3)
    assert load_shards(model, folder / "death", optimizer) == {"step": 1}
    return {}


def memories(model):
    return model.model.memories().items()


def process(rank: int, processes: int, port: int, scenarios: list[str], folder: Path) -> None:
    """Run scenarios one after the other."""
    torch.set_num_threads(1)
    group = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in {**group, "GLOO_SOCKET_IFNAME": "lo"}.items()}
    dist.init_process_group("gloo")
    for name in scenarios:
        found = globals()[name](folder)
        if rank == 0:
            torch.save(found, folder / f"{name}_{processes}.pt")
        dist.barrier()
    # Gloo's threads that still hold tensors may abort a process whose interpreter shuts down (pytorch 179291).
    os._exit(0)


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run(processes: int, scenarios: list[str], folder: Path, seconds: float = 150) -> list[int | None]:
    """Return the exit codes of `processes` processes that run scenarios together."""
    port = free_port()
    context = forks_of_a_server(*PRELOADED)
    children = [
        context.Process(target=process, args=(rank, processes, port, scenarios, folder)) for rank in range(processes)
    ]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join(seconds)
        return [child.exitcode for child in children]
    finally:
        for child in children:
            child.kill()
