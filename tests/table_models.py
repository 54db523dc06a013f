"""What tests of tables share: how they may be stored, and what tells two models apart."""

import torch
from tiny_backbones import random_ids

from engram_hf.table_writer_engram import TableWriter

DTYPES = [None, "float8_e4m3fn", "nvfp4"]
OTHER_DTYPES = ["int8", "int4", "int2"]
IDS = random_ids(2, 9)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Of a model on `IDS`."""
    return model(IDS).logits


def table_keys(model) -> list[str]:
    """Tensors of tables in its state dict."""
    return [key for key in model.state_dict() if ".table." in key]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, by which NaN equals itself and zeros differ by their sign."""
    return tensor.contiguous().view(torch.uint8)


def put_logits(model, queue) -> None:
    torch.set_num_threads(1)  # a forked process does not have the threads of the other
    queue.put(logits(model).tolist())


def write_table(path, description, values: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """One table file with all of its rows, and a global scale that is no power of two if its format has one."""
    global_scale = torch.tensor([3.0]) if "global_scale" in description.tensors else None
    with TableWriter(path, description, global_scale) as writer:
        writer.write(description.rows[0], values, scale)
