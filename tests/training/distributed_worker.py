"""The program of every process in the distributed tests; `torchrun` starts it, and the first process writes the
results.

torchrun --nproc-per-node 2 distributed_worker.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from engram_hf import EngramForCausalLM
from engram_hf.training import EngramRowsConfig, engram_parameter_groups, scan_rows

LEARNING_RATE = 0.5


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, gathered if it is sharded."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone().contiguous()


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes, in order."""
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return gradients and values of all parameters."""
    found = {}
    for name, parameter in model.named_parameters():
        found[f"after.{name}"] = whole(parameter)
        if parameter.grad is not None:
            found[f"grad.{name}"] = whole(parameter.grad)
    return found


def accelerate_loop(model: EngramForCausalLM, rows: list[dict], folder: Path) -> dict[str, torch.Tensor]:
    """Run one step of a plain accelerate loop, which is DDP with more than one process."""
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(engram_parameter_groups(model, LEARNING_RATE))
    loader = DataLoader(rows, batch_size=len(rows) // accelerator.num_processes)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    (batch,) = loader
    output = prepared(**batch)
    accelerator.backward(output.loss)
    optimizer.step()
    return parameters(model) | {"logits": gathered(output.logits)}


def row_adapters(model: EngramForCausalLM, rows: list[dict], folder: Path) -> dict[str, torch.Tensor]:
    """Run the same loop, and train only row adapters."""
    found = scan_rows([{"input_ids": torch.stack([row["input_ids"] for row in rows])}], None, model)
    return accelerate_loop(get_peft_model(model, EngramRowsConfig(rows=found)), rows, folder)


def trainer(model: EngramForCausalLM, rows: list[dict], folder: Path) -> dict[str, torch.Tensor]:
    """Run three steps of a Trainer."""
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=len(rows) // distributed.get_world_size(),
        optim="sgd",
        learning_rate=LEARNING_RATE,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    model.zero_grad()
    return parameters(model)


def fsdp2(model: EngramForCausalLM, rows: list[dict], folder: Path) -> dict[str, torch.Tensor]:
    """Run one step with every parameter sharded, by the modules that the model names itself.

    This is torch's own call; accelerate makes it on accelerators only.
    """
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    fully_shard(model)
    optimizer = torch.optim.SGD(engram_parameter_groups(model, LEARNING_RATE))
    share = len(rows) // distributed.get_world_size()
    mine = rows[share * distributed.get_rank() :][:share]
    output = model(**{key: torch.stack([row[key] for row in mine]) for key in mine[0]})
    output.loss.backward()
    optimizer.step()
    local = {
        f"local.{name}": torch.tensor(parameter.to_local().shape[0])
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor)
    }
    return parameters(model) | local | {"logits": gathered(output.logits)}


@torch.no_grad()
def tensor_parallel(model: EngramForCausalLM, rows: list[dict], folder: Path) -> dict[str, torch.Tensor]:
    """Run a forward pass of every process over all rows; the plans of the backbone and its head split the weights."""
    logits = model(torch.stack([row["input_ids"] for row in rows])).logits
    local = {
        f"local.{name}": torch.tensor((one.to_local() if isinstance(one, DTensor) else one).shape[0])
        for name, one in model.named_parameters()
    }
    return local | {"logits": whole(logits)}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    stored = load_file(folder / "rows.safetensors")
    rows = [dict(zip(stored, values, strict=True)) for values in zip(*stored.values(), strict=True)]
    for run in (accelerate_loop, row_adapters, trainer, fsdp2, tensor_parallel):
        options = {"distributed_config": DistributedConfig(tp_plan="auto")} if run is tensor_parallel else {}
        tensors = run(EngramForCausalLM.from_pretrained(folder / "model", **options), rows, folder)
        if distributed.get_rank() == 0:
            save_file(tensors, folder / f"{run.__name__}_{distributed.get_world_size()}.safetensors")
    distributed.barrier()
    distributed.destroy_process_group()
    # All results are written. Gloo's threads that still hold tensors may abort a process whose interpreter shuts down
    # (pytorch 179291).
    os._exit(0)


if __name__ == "__main__":
    main()
