"""Find a model's memory inside of any wrapper, and the rows that token ids read.

Shape letters: B batch, S positions, L Engram layers, T heads of all n-gram orders.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from ..hashing_engram import as_token_map
from ..safetensors_engram import EngramError

if TYPE_CHECKING:
    from ..layer_engram import EngramMemory
    from ..modeling_engram import EngramModel

# `prepare_memory` takes these inputs besides the ids; collators use the same names.
_BESIDE_IDS = ("attention_mask", "position_ids", "image_mask", "seq_idx")


class ReadRows(NamedTuple):
    """The rows that a batch reads from memory.

    Args:
        row_ids: int64 `[L, B, S, T]`, on the CPU.
        valid: bool `[B, S]`, False at positions that read nothing.
    """

    row_ids: torch.Tensor
    valid: torch.Tensor


def find_engram(model: nn.Module) -> "EngramModel":
    """Return the `EngramModel` inside of any wrapper; its class is the installed one or comes from remote code.

    Raises:
        ValueError: the model has no memory.
    """
    found = next((module for module in model.modules() if hasattr(type(module), "prepare_memory")), None)
    if found is None:
        raise EngramError(f"{type(model).__name__} has no Engram memory; pass an EngramModel or EngramForCausalLM.")
    return cast("EngramModel", found)


def why_frozen(table: Any) -> str:
    """Return why the rows of a table cannot be trained themselves: where or how they are stored; "" if they can."""
    if table.source is not None:
        return "in its file or in host memory"
    return "quantized" if table.table_dtype else ""


def memory_of_layer(engram: "EngramModel", layer: int) -> "EngramMemory":
    """Return the memory of a decoder layer.

    Raises:
        ValueError: this layer has no memory.
    """
    memories = engram.memories()
    if layer not in memories:
        raise EngramError(f"Layer {layer} has no Engram memory; the layers that have are {sorted(memories)}.")
    return memories[layer]


def read_rows_of(engram: "EngramModel", batch: Mapping[str, torch.Tensor]) -> ReadRows:
    """Return the rows that a batch reads, from its token ids alone: no layer of the backbone runs.

    Args:
        engram: the model.
        batch: `input_ids` `[B, S]` and, if the model will get them, `attention_mask`, `position_ids`, `seq_idx` and
            `image_mask`. Labels and anything else are ignored.
    """
    device = cast(torch.Tensor, engram.hashing.multipliers).device
    mask, positions, images, documents = (
        None if batch.get(name) is None else batch[name].to(device) for name in _BESIDE_IDS
    )
    memory = engram.prepare_memory(batch["input_ids"].to(device), mask, positions, images, documents)
    everywhere = torch.ones(memory.row_ids.shape[1:3], dtype=torch.bool)
    valid = everywhere if memory.valid is None else memory.valid.cpu().expand_as(everywhere)
    return ReadRows(memory.row_ids.cpu(), valid)


def require_tokenizer_of(engram: "EngramModel", tokenizer: Any) -> None:
    """Refuse a tokenizer whose compressed ids are not those that the model hashes.

    Raises:
        ValueError: the compressed ids differ. A tokenizer without compressed ids is not compared.
    """
    own, theirs = cast(torch.Tensor | None, engram.hashing.token_map), getattr(tokenizer, "token_map", None)
    if own is None or theirs is None:
        return
    token_map = as_token_map(theirs)
    common = min(len(own), len(token_map))
    if not torch.equal(own[:common].cpu(), token_map[:common]):
        raise EngramError(
            "This tokenizer's compressed ids are not those that the model hashes; pass the model's own tokenizer."
        )


def check_layers(engram: "EngramModel", layers: Iterable[int] | None) -> list[int]:
    """Return the requested decoder layers, ascending; all with memory if None.

    Raises:
        ValueError: a layer has no memory, or the list is empty.
    """
    if layers is None:
        return sorted(engram.memories())
    chosen = sorted(set(layers))
    for layer in chosen:
        memory_of_layer(engram, layer)
    if not chosen:
        raise EngramError(f"layers is empty; name some of {sorted(engram.memories())}, or leave it out for all.")
    return chosen


def check_orders(engram: "EngramModel", orders: Iterable[int] | None) -> list[int]:
    """Return the requested n-gram orders, ascending; all orders of the model if None.

    Raises:
        ValueError: the model has no n-grams of an order, or the list is empty.
    """
    known = list(range(2, engram.hashing.max_ngram + 1))
    chosen = known if orders is None else sorted(set(orders))
    if not chosen or not set(chosen) <= set(known):
        raise EngramError(
            f"orders is {chosen}, but this model reads n-grams of the orders {known}; name some of these."
        )
    return chosen


def heads_of_orders(engram: "EngramModel", orders: Sequence[int]) -> list[int]:
    """Return positions of the heads of some orders among the T of a row id."""
    heads = engram.hashing.heads
    return [(order - 2) * heads + head for order in orders for head in range(heads)]


def rows_of_orders(engram: "EngramModel", layer: int) -> dict[int, tuple[int, int]]:
    """Return, by order, the first row of a layer's table that its heads read, and the row after the last."""
    hashing = engram.hashing
    primes = cast(torch.Tensor, hashing.primes)[hashing.layer_ids.index(layer)]
    ends = [0, *primes.sum(1).cumsum(0).tolist()]
    return {order: (ends[order - 2], ends[order - 1]) for order in range(2, hashing.max_ngram + 1)}
