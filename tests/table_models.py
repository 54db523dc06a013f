"""Helpers that tests of tables share: how tables may be stored, and what distinguishes two models."""

import torch
from peft import PeftModel, get_peft_model
from tiny_backbones import random_ids

from engram_hf.table_writer_engram import TableWriter
from engram_hf.training import EngramRowsConfig, scan_rows

DTYPES = [None, "float8_e4m3fn", "nvfp4"]
OTHER_DTYPES = ["int8", "int4", "int2"]
IDS = random_ids(2, 9)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Return the logits of a model on `IDS`."""
    return model(IDS).logits


def table_keys(model) -> list[str]:
    """Return the state dict keys of table tensors."""
    return [key for key in model.state_dict() if ".table." in key]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, in which NaN equals itself and zeros differ by their sign."""
    return tensor.contiguous().view(torch.uint8)


def put_logits(model, queue) -> None:
    torch.set_num_threads(1)  # A forked process does not have the threads of its parent.
    queue.put(logits(model).tolist())


def write_table(path, description, values: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Write one table file with all rows, and a global scale that is not a power of two if its format has one."""
    global_scale = torch.tensor([3.0]) if "global_scale" in description.tensors else None
    with TableWriter(path, description, global_scale) as writer:
        writer.write(description.rows[0], values, scale)


class Driver:
    """Replaces the GPU driver's page locking and records which pages of host memory are locked."""

    def __init__(self):
        self.locked = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.locked[address] = size
        return 0

    def cudaGetErrorString(self, error: int) -> str:
        return "out of memory"

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def train_rows_of(model, ids: torch.Tensor) -> tuple[PeftModel, torch.Tensor]:
    """Train an adapter of the rows that `ids` read for two steps; return the model, and the loss before each step."""
    model.eval()
    peft = get_peft_model(model, EngramRowsConfig(rows=scan_rows([{"input_ids": ids}], None, model)))
    optimizer = torch.optim.SGD([parameter for parameter in peft.parameters() if parameter.requires_grad], lr=1.0)
    found = []
    for _ in range(2):
        loss = peft(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return peft, torch.stack(found)
