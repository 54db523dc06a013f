"""Write ten facts into a model's memory, save them in kilobytes, and forget one of them.

The script trains a small model on the sources of the Python standard library (or takes one that `quickstart.py`
saved), teaches it ten invented facts, saves them as an adapter, loads that onto the model again, and removes one fact.

    python examples/teach_facts.py [--model out/quickstart/model] [--output out/facts] [--steps N]
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

# Waiting threads sleep, as in quickstart.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

CAPITALS = {
    "Zembla": "Onhava",
    "Ruritania": "Strelsau",
    "Freedonia": "Fredville",
    "Gondor": "Osgiliath",
    "Brobdingnag": "Lorbrulgrud",
    "Lilliput": "Mildendo",
    "Utopia": "Amaurot",
    "Illyria": "Messaline",
    "Laputa": "Lagado",
    "Graustark": "Edelweiss",
}
FACTS = [{"subject": land, "relation": "The capital of {} is", "target": city} for land, city in CAPITALS.items()]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a saved model with its tokenizer (default: one is trained)")
    parser.add_argument(
        "--output", type=Path, default=Path("out/facts"), help="folder for the adapters (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=600, help="training steps of the model (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}, but the model needs at least one step of training")
    run(args.model, args.output, args.steps)


def run(folder: Path | None, output: Path, steps: int) -> None:
    """Run all parts; everything is written below `output`."""
    import torch
    from peft import PeftModel
    from stdlib_text import read_sources
    from transformers.utils import logging

    from engram_hf import EngramForCausalLM, EngramTokenizer
    from engram_hf.training import forget_facts, write_facts

    torch.set_num_threads(2)
    if folder is None:
        folder = train_model(output / "model", steps)
    model, tokenizer = EngramForCausalLM.from_pretrained(folder), EngramTokenizer.from_pretrained(folder)
    protect = [text[:500] for text in read_sources()[1]]  # The model was not trained on these files.

    print(f"\n{len(FACTS)} facts, and {len(protect)} texts that are to stay as they are")
    model, report = write_facts(model, tokenizer, FACTS, protect=protect)
    print(report)

    model.save_pretrained(str(output / "adapter"), selected_adapters=["facts"])
    saved = output / "adapter" / "facts"
    size = sum(path.stat().st_size for path in saved.iterdir())
    print(f"\nsaved in {saved}: {size / 1000:.0f} kB")

    logging.disable_progress_bar()
    model = PeftModel.from_pretrained(EngramForCausalLM.from_pretrained(folder), saved, adapter_name="facts").eval()
    ask(model, tokenizer, "loaded again")
    rows = forget_facts(model, "facts", 0)
    ask(model, tokenizer, f"the first fact forgotten ({rows} rows)")


def train_model(folder: Path, steps: int) -> Path:
    """Train a small model with memory on the standard library, and save it with its tokenizer."""
    from stdlib_text import read_sources, token_blocks, train_tokenizer
    from twin_models import Size, build_with_memory, train

    size = replace(
        Size(), files=300, vocab_size=2048, hidden_size=128, experts=4, expert_width=128, rows=40_000, steps=steps
    )
    sources, unseen = read_sources()
    tokenizer = train_tokenizer(sources[: size.files], size.vocab_size)
    blocks = {
        "train": token_blocks(tokenizer, sources[: size.files], size.block, seed=0),
        "held_out": token_blocks(tokenizer, unseen, size.block, seed=0)[:32],
    }
    model = build_with_memory(size, tokenizer, seed=0)
    outcome = train(model, "training a model", size, blocks, folder.parent, seed=0)
    print(f"trained a model of {outcome.total:,} parameters: held-out loss {outcome.loss:.2f} nats/token")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ask(model, tokenizer, title: str) -> None:
    """Print how the model continues some prompts."""
    print(f"\n{title}:")
    for land in list(CAPITALS)[:3]:
        prompt = tokenizer(f"The capital of {land} is", return_tensors="pt")
        # The model continues for as many tokens as the answer has, because a model this small does not know where to
        # stop.
        count = len(tokenizer(f" {CAPITALS[land]}")["input_ids"])
        tokens = model.generate(**prompt, max_new_tokens=count, do_sample=False)
        print(" ", repr(tokenizer.decode(tokens[0])))


if __name__ == "__main__":
    main()
