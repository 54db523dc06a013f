"""Write ten facts into a model's memory, save them in kilobytes, and forget one of them.

The script teaches the demo model (or another saved model with memory) ten invented facts, saves them as an adapter,
loads that onto the model again, and removes one fact.

    python examples/teach_facts.py [--model examples/engram-demo] [--output out/facts]
"""

import argparse
import os
from pathlib import Path

# Waiting threads sleep, as in quickstart.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

DEMO = Path(__file__).parent / "engram-demo"
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
    parser.add_argument(
        "--model", type=Path, default=DEMO, help="a saved model with its tokenizer (default: the demo model)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out/facts"), help="folder for the adapters (default: %(default)s)"
    )
    args = parser.parse_args()
    run(args.model, args.output)


def run(folder: Path, output: Path) -> None:
    """Run all parts; everything is written below `output`."""
    import torch
    from peft import PeftModel
    from stdlib_text import read_documentation
    from transformers.utils import logging

    from engram_hf import EngramForCausalLM, EngramTokenizer
    from engram_hf.training import forget_facts, write_facts

    torch.set_num_threads(2)
    model, tokenizer = EngramForCausalLM.from_pretrained(folder), EngramTokenizer.from_pretrained(folder)
    protect = [text[:500] for text in read_documentation()[1]]  # The model was not trained on these files.

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
