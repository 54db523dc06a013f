"""The cost of training a table: the whole table as a parameter, against only the rows that a corpus reads.

    python benchmarks/row_adapters.py

Both train the memory of the same small Mixtral with AdamW on the same batches in one run, with a frozen backbone. The
losses of the first step must be equal, since both compute the same function.
"""

import argparse
import sysconfig
import time
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import MixtralConfig

from engram_hf import EngramConfig, EngramForCausalLM
from engram_hf.training import EngramRowsConfig, engram_parameter_groups, scan_rows

VOCAB = 256  # These are bytes.
BATCH, LENGTH = 4, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of each of the two tables")
    parser.add_argument("--batches", type=int, default=32, help="batches of 4 x 256 bytes in the corpus")
    parser.add_argument("--steps", type=int, default=8, help="training steps of each run (default: %(default)s)")
    arguments = parser.parse_args()
    batches = corpus(arguments.batches)

    dense = measure(build(arguments.rows), batches[: arguments.steps])
    model = build(arguments.rows)
    start = time.perf_counter()
    rows = scan_rows(batches, None, model)
    collecting = time.perf_counter() - start
    memory = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tables = {id(part.table.weight) for part in model.model.memories().values()}
    adapted = get_peft_model(model, EngramRowsConfig(rows=rows))
    for parameter in memory:  # The rest of the memory is trained beside the rows, as with whole tables.
        parameter.requires_grad_(id(parameter) not in tables)
    sparse = measure(adapted, batches[: arguments.steps])

    if abs(dense["loss"] - sparse["loss"]) > 1e-5:
        raise SystemExit(f"the first losses differ: {dense['loss']} and {sparse['loss']}")
    tokens, touched = arguments.batches * BATCH * LENGTH, sum(map(len, rows.values()))
    print(
        f"{tokens:,} tokens read {touched:,} of {2 * arguments.rows:,} rows; collecting them took {collecting:.2f} s"
    )
    print(f"{'':24}{'whole tables':>14}{'row adapters':>14}{'ratio':>9}")
    for name, unit, scale in [
        ("trained parameters", "M", 1e6),
        ("gradients + AdamW state", "MB", 1e6),
        ("step", "ms", 1e-3),
    ]:
        one, other = dense[name] / scale, sparse[name] / scale
        print(f"{name:24}{one:>11.1f} {unit:2}{other:>11.1f} {unit:2}{one / other:>7.1f} x")


def corpus(count: int) -> list[dict[str, torch.Tensor]]:
    """Return the first bytes of the Python standard library's sources."""
    size, text = count * BATCH * LENGTH, b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    ids = torch.frombuffer(bytearray(text[:size]), dtype=torch.uint8).long().view(count, BATCH, LENGTH)
    return [{"input_ids": batch, "labels": batch} for batch in ids]


def build(rows: int) -> EngramForCausalLM:
    torch.manual_seed(0)
    backbone = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = EngramForCausalLM(EngramConfig.for_backbone(backbone, layer_ids=[1, 2], rows=rows))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".engram." in name)
    return model


def measure(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Return sizes in bytes, and the median time of a step (without the first, which allocates)."""
    optimizer = torch.optim.AdamW(engram_parameter_groups(model, lr=1e-3))
    seconds, losses = [], []
    for batch in batches:
        start = time.perf_counter()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    state = sum(v.nbytes for values in optimizer.state.values() for v in values.values() if torch.is_tensor(v))
    return {
        "loss": losses[0],
        "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "gradients + AdamW state": gradients + state,
        "step": sorted(seconds[1:])[len(seconds[1:]) // 2],
    }


if __name__ == "__main__":
    main()
