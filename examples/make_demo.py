"""Make the model in examples/engram-demo: it is trained on the English in Python's standard library.

    python examples/make_demo.py [--output examples/engram-demo] [--trained out/demo] [--seed N] [--steps N]

The script trains a small Llama with memory (20 minutes of one core) and saves it in float32 to `--trained`; an
existing model there is used again. Then it writes the weights and tables in bfloat16, the tokenizer and the card to
`--output`. The remote code there consists of links to the repository's own files.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from huggingface_hub import EvalResult
from stdlib_text import read_documentation, token_blocks, train_tokenizer
from transformers import Trainer
from twin_models import Size, build_with_memory, train

from engram_hf import EngramConfig, EngramForCausalLM, EngramTokenizer
from engram_hf.card_engram import model_card
from engram_hf.row_sources_engram import MappedRows
from engram_hf.saving_engram import manifest_entry, table_file_name, write_manifest
from engram_hf.table_format_engram import describe_table, read_tables
from engram_hf.table_writer_engram import TableWriter

ROOT = Path(__file__).parents[1]
DEMO = Size(experts=0, expert_width=576, rows=40_000, block=256, batch=4, steps=4000, held_out_blocks=128, bf16=True)
GATE_COST = 0.03
ABOUT = """
## What it was trained on

The docstrings of Python's standard library and the topics that `help()` knows (2 MB of English; Python Software Foundation License),
4.1 million tokens of them, so that it has read everything seven times and knows much by heart: the loss of the training text ended at
1.0 nats a token, that of files it has not seen is {loss:.2f}. Open gates had a cost of up to {cost} nats a token in training: without it, so
small a model leaves all gates open. The model is there to look at, not to rely on. `examples/make_demo.py` makes it.
"""


class TrainerOfSparseGates(Trainer):
    """Adds a cost of open gates to the loss of training, without which so small a model leaves all gates open.

    The cost of a token is `GATE_COST` nats, times the mean gate of all layers.
    """

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        gates: dict[int, torch.Tensor] = {}
        loss = super().compute_loss(model, {**inputs, "engram_gate_values": gates}, *args, **kwargs)
        assert isinstance(loss, torch.Tensor)  # The outputs are not asked for in training.
        return loss + GATE_COST * torch.stack([gate.mean() for gate in gates.values()]).mean()


def trained(size: Size, seed: int, folder: Path) -> None:
    """Train the model, unless `folder` has it, and save it there in float32."""
    if (folder / "loss.txt").exists():
        return
    texts, unseen = read_documentation()
    tokenizer = train_tokenizer(texts, size.vocab_size)
    blocks = {
        "train": token_blocks(tokenizer, texts, size.block, seed),
        "held_out": token_blocks(tokenizer, unseen, size.block, seed)[: size.held_out_blocks],
    }
    model = build_with_memory(size, tokenizer, seed)
    outcome = train(model, "the demo", size, blocks, folder, seed, TrainerOfSparseGates)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "loss.txt").write_text(str(outcome.loss))


def pack(trained: Path, output: Path) -> None:
    """Write the trained model to `output` in bfloat16, its tables in separate files."""
    model = EngramForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    for link in output.glob("*.py"):
        link.unlink()  # A library would write the copy through the link, into the repository's file.
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        entries = {}
        for index, (layer, memory) in enumerate(model.model.memories().items()):
            rows = memory.table.weight.detach()
            description = describe_table(model.model.hashing, index, width=rows.shape[1], dtype="BF16")
            name = table_file_name(layer)
            with TableWriter(Path(folder, name), description) as writer:
                writer.write(0, rows)
            entries[layer] = manifest_entry([(name, description.rows, description.tensors)])
        write_manifest(folder, entries)
        for layer, table in read_tables(folder).items():
            model.model.memories()[layer].table.mount(MappedRows(table))
        model.save_pretrained(output)
    EngramTokenizer.from_pretrained(trained).save_pretrained(output)
    loss = float((trained / "loss.txt").read_text())
    (output / "README.md").write_text(card_of_demo(model.config, loss), encoding="utf-8")
    link_code(output)


def card_of_demo(config: EngramConfig, loss: float) -> str:
    """Return the model card; `loss` is in nats per token, on the held-out files."""
    result = EvalResult(
        task_type="text-generation",
        dataset_type="python-documentation",
        dataset_name="Python's own documentation, files that were held out",
        metric_type="loss",
        metric_value=round(loss, 2),
    )
    card = model_card(
        config,
        "examples/engram-demo",
        license="other",
        license_name="psf-2.0",
        language="en",
        widget=[{"text": "Return True if"}],
        eval_results=[result],
    )
    return card.rstrip() + "\n" + ABOUT.format(loss=loss, cost=GATE_COST)


def link_code(output: Path) -> None:
    """Replace the copies of remote code by links to the repository's files, so that each exists once."""
    for copy in output.glob("*.py"):
        (own,) = (path for path in (ROOT / copy.name, ROOT / "tokenization" / copy.name) if path.exists())
        copy.unlink()
        copy.symlink_to(os.path.relpath(own, output.resolve()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "examples" / "engram-demo")
    parser.add_argument("--trained", type=Path, default=Path("out/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=DEMO.steps)
    args = parser.parse_args()
    torch.set_num_threads(1)
    trained(replace(DEMO, steps=args.steps), args.seed, args.trained)
    pack(args.trained, args.output)
