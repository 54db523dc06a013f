"""Make the model in examples/engram-demo: trained on the English that Python's standard library comes with.

    python examples/make_demo.py [--output examples/engram-demo] [--seed N] [--steps N]

Trains a small Llama with memory (half an hour of one core) and writes its weights and tables in bfloat16, its tokenizer and its card.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from stdlib_text import read_documentation, token_blocks, train_tokenizer
from twin_models import Size, build_with_memory, train

DEMO = Size(experts=0, expert_width=576, rows=40_000, block=256, batch=4, steps=4000, held_out_blocks=128, bf16=True)


def trained(size: Size, seed: int, output: Path):
    """The model, its tokenizer, and its loss on files that it was not trained on."""
    texts, unseen = read_documentation()
    tokenizer = train_tokenizer(texts, size.vocab_size)
    blocks = {
        "train": token_blocks(tokenizer, texts, size.block, seed),
        "held_out": token_blocks(tokenizer, unseen, size.block, seed)[: size.held_out_blocks],
    }
    model = build_with_memory(size, tokenizer, seed)
    return model, tokenizer, train(model, "the demo", size, blocks, output, seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("examples/engram-demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=DEMO.steps)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, outcome = trained(replace(DEMO, steps=args.steps), args.seed, args.output)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(outcome, outcome.perplexity)
