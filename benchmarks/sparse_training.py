"""The cost of a training step by the size of the tables: sparse gradients with `SparseAdamW`, against dense AdamW and
the package `engram-peft` with its own optimizer.

    python benchmarks/sparse_training.py [--rows 600000 10000000 40000000] [--dense 600000 10000000]
        [--engram-peft PYTHON] [--engram-peft-rows 600000 10000000] [--step-rows 10000000]

1. A step (forward, backward, clipping, optimizer) of the memory of a small Qwen3, whose backbone is frozen, with the
given number of rows of 64 float32 channels in two layers. Each size has a separate process, in which steps of that
model alternate with steps of one with sparse gradients and small tables; times are in units of the latter, so that
other work on the machine cancels out. Memory is the peak of the process without the tables themselves.

PYTHON is the interpreter of an environment that has `engram-peft` beside this package. Its memory has the same
dimensions and one stream, and its tables are trained by its default, `torch.optim.SparseAdam`.

2. `step()` alone, with 8,192 rows of one table read, against `torch.optim.AdamW(fused=True)`.
"""

import argparse
import gc
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from engram_hf import EngramConfig, EngramForCausalLM
from engram_hf.training import SparseAdamW, enable_sparse_gradients, engram_parameter_groups

WIDTH, HEADS, VOCAB = 64, 8, 8192
BATCH, LENGTH = 4, 256
SMALL = 50_000
TOUCHED = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[600_000, 10_000_000, 40_000_000])
    parser.add_argument(
        "--dense", type=int, nargs="*", default=[600_000, 10_000_000], help="sizes for dense AdamW: it needs 4 tables"
    )
    parser.add_argument(
        "--engram-peft", metavar="PYTHON", help="interpreter of an environment with engram-peft beside engram-hf"
    )
    parser.add_argument(
        "--engram-peft-rows",
        type=int,
        nargs="*",
        default=[600_000, 10_000_000],
        help="sizes for engram-peft: it needs 3 tables",
    )
    parser.add_argument(
        "--step-rows", type=int, default=10_000_000, help="rows of the table for step() alone; 0 for none"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.steps)))
        return
    if options.engram_peft and not has_engram_peft(options.engram_peft):
        parser.error(
            f"{options.engram_peft} is no interpreter of an environment with engram-peft beside engram-hf; install both "
            "there, or leave --engram-peft out."
        )
    print(
        f"{'':12}{'rows':>12}{'tables GB':>11}{'step':>8}{'to first':>10}{'beyond GB':>11}{'to first':>10}", flush=True
    )
    print_sizes("sparse", options.rows, options.steps)
    print_sizes("dense", options.dense, options.steps)
    if options.engram_peft:
        print_sizes("engram-peft", options.engram_peft_rows, options.steps, options.engram_peft)
    else:
        print("engram-peft was not measured: --engram-peft names the interpreter of an environment that has it")
    if options.step_rows:
        compare_steps(options.step_rows)


def has_engram_peft(python: str) -> bool:
    """Return whether an interpreter finds `engram-peft` and this package."""
    code = "from importlib.util import find_spec as f; raise SystemExit(not (f('engram_peft') and f('engram_hf')))"
    return shutil.which(python) is not None and not subprocess.run([python, "-c", code]).returncode


def print_sizes(kind: str, sizes: list[int], steps: int, python: str = sys.executable) -> None:
    first = None
    for rows in sizes:
        found = in_a_process(kind, rows, steps, python)
        first = first or found
        print(
            f"{kind:12}{rows:>12,}{found['tables'] / 1e9:>11.2f}{found['step']:>8.2f}{found['step'] / first['step']:>10.2f}"
            f"{found['beyond'] / 1e9:>11.2f}{found['beyond'] / first['beyond']:>10.2f}",
            flush=True,
        )


def in_a_process(kind: str, rows: int, steps: int, python: str) -> dict[str, float]:
    command = [python, __file__, "--one", kind, str(rows), "--steps", str(steps)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def backbone_config() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )


def build(rows: int) -> EngramForCausalLM:
    per_order = rows // 4  # There are two layers and two orders of n-grams.
    config = EngramConfig.for_backbone(
        backbone_config(),
        layer_ids=[1, 2],
        engram_vocab_size=per_order // HEADS,
        engram_n_heads=HEADS,
        engram_head_dim=WIDTH,
    )
    model = EngramForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".engram." in name)
    with torch.no_grad():  # A value projection of zero gives rows no gradient.
        for memory in model.model.memories().values():
            torch.nn.init.normal_(memory.kv_proj.weight, std=0.02)
    return model.train()


def build_engram_peft(rows: int) -> nn.Module:
    """Return the same backbone with the memory of `engram-peft`."""
    from engram_peft import EngramConfig as EngramPeftConfig
    from engram_peft import get_engram_model

    config = EngramPeftConfig(
        target_layers=[1, 2],
        ngram_sizes=[2, 3],
        n_head_per_ngram=HEADS,
        engram_vocab_size_per_ngram=[rows // 4] * 2,
        embedding_dim=2 * HEADS * WIDTH,
        hc_mult=1,
        enable_tokenizer_compression=False,
        pad_id=0,
        gating_zero_init=False,
    )
    return get_engram_model(Qwen3ForCausalLM(backbone_config()), config).train()


class Run:
    """A model and its optimizer.

    Args:
        kind: `"sparse"`, `"dense"` or `"engram-peft"`.
        rows: rows of all tables together.
    """

    def __init__(self, kind: str, rows: int):
        self.model: Any
        self.optimizer: Any
        if kind == "engram-peft":
            from engram_peft import get_optimizer

            self.model = build_engram_peft(rows)
            self.optimizer = get_optimizer(self.model, 1e-3)
            return
        self.model = build(rows)
        if kind == "sparse":
            enable_sparse_gradients(self.model)
        self.optimizer = (SparseAdamW if kind == "sparse" else torch.optim.AdamW)(
            engram_parameter_groups(self.model, lr=1e-3)
        )

    @property
    def table_bytes(self) -> int:
        """The size of all tables."""
        names = (".table.weight", ".multi_head_embedding.embedding.weight")
        return sum(value.nbytes for name, value in self.model.named_parameters() if name.endswith(names))

    def step(self, ids: torch.Tensor) -> float:
        """Return the seconds of a training step."""
        started = time.perf_counter()
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        # The reference registered a kernel for norms of sparse gradients, so engram-peft need not use its own function.
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def measure(kind: str, rows: int, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    run, reference = Run(kind, rows), Run("sparse", SMALL)
    ratios = []
    for step in range(steps + 2):  # The first two steps allocate.
        ids = torch.randint(1, VOCAB, (BATCH, LENGTH))
        times = [one.step(ids) for one in (run, reference)]
        if step >= 2:
            ratios.append(times[0] / times[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"step": statistics.median(ratios), "beyond": peak - run.table_bytes, "tables": run.table_bytes}


def compare_steps(rows: int, repeats: int = 7) -> None:
    """Compare time and state of `step()`; the dense table runs first, and is freed then."""
    found = {}
    ids = torch.randint(0, rows, (TOUCHED,))
    for kind in ("dense", "sparse"):
        weight = torch.nn.Parameter(torch.zeros(rows, WIDTH).fill_(0.02))
        if kind == "dense":
            optimizer = torch.optim.AdamW([weight], weight_decay=0.0, fused=True)
            weight.grad = torch.zeros(rows, WIDTH).index_fill_(0, ids, 1e-3)
        else:
            weight.has_sparse_gradients = True
            optimizer = SparseAdamW([weight], weight_decay=0.0)
            unique = ids.unique()
            values = torch.full((unique.numel(), WIDTH), 1e-3)
            weight.grad = torch.sparse_coo_tensor(
                unique[None], values, weight.shape, is_coalesced=True, check_invariants=False
            )
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - started)
        state = optimizer.state_dict()["state"][0]
        found[kind] = statistics.median(seconds), sum(tensor.nbytes for tensor in state.values())
        del weight, optimizer, state
        gc.collect()
    (dense_time, dense_state), (sparse_time, sparse_state) = found["dense"], found["sparse"]
    print(
        f"step() of {rows:,} rows, {TOUCHED:,} of them read: {dense_time * 1e3:,.1f} ms dense, {sparse_time * 1e3:,.1f} ms "
        f"sparse, {dense_time / sparse_time:,.0f} x; state {dense_state / 1e6:,.0f} MB and {sparse_state / 1e6:,.1f} MB, "
        f"{dense_state / sparse_state:,.0f} x"
    )


if __name__ == "__main__":
    main()
