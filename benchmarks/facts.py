"""Invented facts, learned by rows of memory, by LoRA, and by the whole memory; and stacked facts of several users.

    python benchmarks/facts.py [MODEL] [--facts 100] [--users 10] [--steps 200]

MODEL is a saved, trained model with its tokenizer, such as `out/quickstart/model`; the default is
`examples/engram-demo`. All methods train the same number of steps on the same facts; rows stop earlier when all facts
are recalled with certainty. Held-out texts are files of the Python standard library. Sizes in kB are those of an
adapter's whole folder. Times are processor seconds, which other work on the machine does not change, and wall-clock
seconds.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers.utils import logging

from engram_hf import EngramError, EngramForCausalLM, EngramTokenizer
from engram_hf.training import write_facts
from engram_hf.training.fact_report import batch_of, logits_of, measure_facts, measure_protected
from engram_hf.training.fact_texts import Fact, parse_facts
from engram_hf.training.facts import rows_layers

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from stdlib_text import read_sources

DEMO = Path(__file__).parent.parent / "examples" / "engram-demo"
SYLLABLES = [
    "ba",
    "be",
    "bo",
    "da",
    "du",
    "fa",
    "fe",
    "ga",
    "go",
    "ka",
    "ko",
    "la",
    "lo",
    "ma",
    "mo",
    "na",
    "no",
    "pa",
    "po",
    "ra",
    "ro",
    "sa",
    "so",
    "ta",
    "to",
    "va",
    "vo",
    "za",
    "zo",
]
KINDS = ["capital", "river", "king", "language", "coin"]
TARGETS = ["q_proj", "v_proj", "engram.kv_proj"]
PIECE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=DEMO, help="default: examples/engram-demo")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--users", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--texts", type=int, default=30, help="held-out texts")
    parser.add_argument("--protect", type=int, default=20, help="other texts, whose rows are left alone")
    parser.add_argument("--rank", type=int, default=4, help="of the LoRA")
    options = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = EngramTokenizer.from_pretrained(options.model)
    facts = invent(options.facts)
    texts = [tokenizer(text[:500])["input_ids"][:200] for text in read_sources()[1][: options.texts]]
    bench = Bench(options, tokenizer, facts, texts)
    print(
        f"{'':28}{'recall':>8}{'paraphrase':>12}{'loss':>9}{'texts as before':>17}{'positions':>11}{'kB':>9}{'cpu s':>7}{'s':>7}"
    )
    print(f"{'untouched':28}{bench.row(bench.load(), None)}")
    size = bench.show("rows", bench.rows, facts)
    rank = bench.rank_of(size)
    for title, way in {
        f"rows, {options.protect} texts protected": bench.protected_rows,
        f"LoRA of rank {options.rank}": bench.lora,
        f"LoRA of rank {rank}, equal kB": lambda facts: bench.lora(facts, rank=rank),
        "whole memory": bench.memory,
    }.items():
        bench.show(title, way, facts)
    each = len(facts) // options.users
    users = [facts[first : first + each] for first in range(0, each * options.users, each)]
    ways = {"rows": bench.stacked_rows, "rows, each alone": bench.rows_alone, "LoRAs, each alone": bench.stacked_loras}
    for title, stack in ways.items():
        bench.show(f"{options.users} users: {title}", stack, users)


def invent(count: int) -> list[dict[str, str]]:
    """Invent facts about places that do not exist, with distinct prompts."""
    draw, facts = random.Random(0), {}
    while len(facts) < count:
        place, name = ("".join(draw.choices(SYLLABLES, k=3)).capitalize() for _ in range(2))
        kind = draw.choice(KINDS)
        facts[place] = {"prompt": f"The {kind} of {place} is", "target": name, "asked": f"In {place} the {kind} is"}
    return list(facts.values())


class Bench:
    """The model and texts that all methods share."""

    def __init__(self, options: argparse.Namespace, tokenizer, facts: list[dict[str, str]], texts: list[list[int]]):
        self.options, self.tokenizer, self.texts = options, tokenizer, [torch.tensor([ids]) for ids in texts]
        self.parsed = parse_facts(facts, tokenizer)
        self.asked = parse_facts([{"prompt": f["asked"], "target": f["target"]} for f in facts], tokenizer)
        base = self.load()
        with torch.no_grad():
            self.before = [base(ids).logits for ids in self.texts]

    def load(self) -> EngramForCausalLM:
        return EngramForCausalLM.from_pretrained(self.options.model, engram_residency="resident").eval()

    def show(self, title: str, way: Callable, facts) -> int:
        """Print the results and the cost of a method; return its bytes."""
        processor, clock = time.process_time(), time.perf_counter()
        try:
            model, size = way(facts)
        except EngramError as error:
            print(f"{title:28}{error}", flush=True)
            return 0
        processor, clock = time.process_time() - processor, time.perf_counter() - clock
        print(f"{title:28}{self.row(model, size)}{processor:>7.1f}{clock:>7.1f}", flush=True)
        self.say_untouched(model)
        return size

    @torch.no_grad()
    def row(self, model, size: int | None) -> str:
        """Return recall, recall of paraphrases, held-out loss, share of texts with bit-identical logits, and size."""
        recall, asked = (sum(r.rank == 1 for r in measure_facts(model, f)) / len(f) for f in (self.parsed, self.asked))
        after = [model(input_ids=ids, use_cache=False).logits for ids in self.texts]
        losses = [F.cross_entropy(a[0, :-1], ids[0, 1:]) for a, ids in zip(after, self.texts, strict=True)]
        same = sum(map(torch.equal, self.before, after)) / len(after)
        equal = [(b == a).all(-1) for b, a in zip(self.before, after, strict=True)]
        positions = torch.cat([part.flatten() for part in equal]).double().mean()
        kilobytes = "" if size is None else f"{size / 1000:,.0f}"
        return f"{recall:>8.2f}{asked:>12.2f}{torch.stack(losses).mean():>9.4f}{same:>17.2f}{positions:>11.2f}{kilobytes:>9}"

    def say_untouched(self, model) -> None:
        """Print, for row adapters, whether texts that read none of their rows are unchanged; long texts read some, so
        all are cut.
        """
        configs = getattr(model, "peft_config", {})
        if not configs or any(config.peft_type != "ENGRAM_ROWS" for config in configs.values()):
            return
        of_layer: dict[int, list[torch.Tensor]] = {}
        for name in configs:
            for layer, table in rows_layers(model, name).items():
                of_layer.setdefault(layer, []).append(table.engram_rows_adapter[name].rows)
        written = {layer: torch.cat(rows) for layer, rows in of_layer.items()}
        pieces = [{"input_ids": piece} for ids in self.texts for piece in ids.split(PIECE, dim=1)]
        found = measure_protected(model, pieces, written, model.disable_adapter)
        print(
            f"  of {found.texts} texts of {PIECE} tokens, {found.untouched_texts} read no written row; of {found.untouched_positions:,} positions "
            f"in these and before any such read, {found.changed_untouched} changed in any bit",
            flush=True,
        )

    def rows(self, facts) -> tuple[torch.nn.Module, int]:
        model, _ = write_facts(self.load(), self.tokenizer, facts, steps=self.options.steps)
        return model, saved_size(model)

    def protected_rows(self, facts) -> tuple[torch.nn.Module, int]:
        """Write rows while protecting other texts of the same kind as the measured ones."""
        protect = [text[:1000] for text in read_sources()[0][: self.options.protect]]
        model, _ = write_facts(self.load(), self.tokenizer, facts, steps=self.options.steps, protect=protect)
        return model, saved_size(model)

    def rank_of(self, size: int) -> int:
        """Return the rank of a LoRA that takes about `size` bytes."""
        one = get_peft_model(self.load(), LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=TARGETS))
        return max(1, round(size / sum(p.nbytes for p in one.parameters() if p.requires_grad)))

    def lora(self, facts, model=None, name: str = "default", rank: int | None = None) -> tuple[torch.nn.Module, int]:
        config = LoraConfig(task_type="CAUSAL_LM", r=rank or self.options.rank, target_modules=TARGETS)
        if model is None:
            model = get_peft_model(self.load(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
            model.set_adapter(name)
        self.train(model, facts, lr=2e-3)
        return model, saved_size(model)

    def memory(self, facts) -> tuple[torch.nn.Module, int]:
        model = self.load().requires_grad_(False)
        for memory in model.model.memories().values():
            memory.requires_grad_(True)
        self.train(model, facts, lr=1e-3)
        return model, sum(p.nbytes for p in model.parameters() if p.requires_grad)

    def stacked_rows(self, users) -> tuple[torch.nn.Module, int]:
        model = self.load()
        for index, facts in enumerate(users):
            model, _ = write_facts(model, self.tokenizer, facts, name=f"user{index}", steps=self.options.steps)
        return model, saved_size(model)

    def rows_alone(self, users) -> tuple[torch.nn.Module, int]:
        """Stack adapters of users who did not know of each other."""
        with tempfile.TemporaryDirectory() as folder:
            for index, facts in enumerate(users):
                model, _ = write_facts(
                    self.load(), self.tokenizer, facts, name=f"user{index}", steps=self.options.steps
                )
                model.save_pretrained(folder)
            names = [f"user{index}" for index in range(len(users))]
            model = PeftModel.from_pretrained(self.load(), f"{folder}/user0", adapter_name="user0")
            for name in names[1:]:
                model.load_adapter(f"{folder}/{name}", name)
        model.base_model.set_adapter(names)
        return model.eval(), saved_size(model)

    def stacked_loras(self, users) -> tuple[torch.nn.Module, int]:
        """Stack adapters that were trained alone, since users do not know of each other."""
        model = None
        for index, facts in enumerate(users):
            model, _ = self.lora(facts, model, f"user{index}")
        size, names = saved_size(model), list(model.peft_config)
        model.add_weighted_adapter(names, [1.0] * len(names), "sum", combination_type="cat")
        model.set_adapter("sum")
        return model, size

    def train(self, model: torch.nn.Module, facts, lr: float) -> None:
        parsed = parse_facts(facts, self.tokenizer)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
        for _ in range(self.options.steps):
            logits = logits_of(model.eval(), batch_of(parsed, model))
            loss = torch.stack([loss_of(fact, rows) for fact, rows in zip(parsed, logits, strict=True)]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def loss_of(fact: Fact, logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[list(fact.predicting)], torch.tensor(fact.target_ids))


def saved_size(model) -> int:
    """Return the bytes that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
