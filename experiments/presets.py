"""The sizes of the experiments (models, tokens and seeds), chosen by a rule and not by results.

The rule of `standard`, written before its first run, is that the whole set takes at most three hours on two cores, or
21,600 seconds of one core. Half of that is left for evaluation, for the variants that are slower than the plain
backbone, and for a busy machine. The other half, divided by the 80 runs of full length in the plan, is 135 s per run.
A dense model of 1.5 million parameters trains on 6,300 tokens a second (one core, bfloat16 mixed precision), so that a
run has 3 * 2 ** 18 tokens, rounded down to a multiple of 2 ** 18. A learning rate is chosen by runs of half that length
on separate files (validation), with the same four rates for either side.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """The sizes that all runs of a set share.

    Args:
        vocab_size: the size of the tokenizer.
        hidden_size, layers, mlp_width: the sizes of the dense backbone.
        memory_layers: 0-based layers with memory.
        memory_heads, memory_width, rows: heads per order, channels of a row, and the approximate rows of a layer's
            table.
        moe_layers, moe_memory_layers, experts, expert_width, shared_width: the sizes of the backbone with routed
            experts; 2 are active.
        block, batch, steps: tokens of a window, windows of a step, and steps of a run.
        seeds: the seeds of the compared runs.
        rates: the learning rates that either side is tuned with.
        test_windows: the number of windows for measuring the loss.
        task_items: the maximum number of items of a downstream task.
        train_files: the number of files of the training part; None for all.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    mlp_width: int
    memory_layers: tuple[int, ...]
    memory_heads: int
    memory_width: int
    rows: int
    moe_layers: int
    moe_memory_layers: tuple[int, ...]
    experts: int
    expert_width: int
    shared_width: int
    block: int
    batch: int
    steps: int
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    test_windows: int
    task_items: int
    train_files: int | None = None


PRESETS = {
    "quick": Preset(
        vocab_size=1024,
        hidden_size=64,
        layers=3,
        mlp_width=128,
        memory_layers=(1, 2),
        memory_heads=4,
        memory_width=8,
        rows=4000,
        moe_layers=2,
        moe_memory_layers=(1,),
        experts=12,
        expert_width=32,
        shared_width=128,
        block=64,
        batch=4,
        steps=24,
        seeds=(0, 1),
        rates=(3e-3, 6e-3),
        test_windows=32,
        task_items=16,
        train_files=60,
    ),
    "standard": Preset(
        vocab_size=2048,
        hidden_size=128,
        layers=6,
        mlp_width=384,
        memory_layers=(1, 3),
        memory_heads=4,
        memory_width=16,
        rows=80_000,
        moe_layers=4,
        moe_memory_layers=(1, 2),
        experts=32,
        expert_width=64,
        shared_width=256,
        block=256,
        batch=4,
        steps=768,
        seeds=(0, 1, 2),
        rates=(7.5e-4, 1.5e-3, 3e-3, 6e-3),
        test_windows=256,
        task_items=200,
    ),
    # This preset is for a GPU, with `--texts` of a few hundred million tokens. It has never been run.
    "gpu": Preset(
        vocab_size=16_384,
        hidden_size=512,
        layers=12,
        mlp_width=1536,
        memory_layers=(1, 6),
        memory_heads=8,
        memory_width=32,
        rows=2_000_000,
        moe_layers=8,
        moe_memory_layers=(1, 4),
        experts=32,
        expert_width=256,
        shared_width=1024,
        block=1024,
        batch=32,
        steps=8192,
        seeds=(0, 1, 2, 3, 4),
        rates=(2e-4, 4e-4, 8e-4, 1.6e-3),
        test_windows=512,
        task_items=1000,
    ),
}
