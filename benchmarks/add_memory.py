"""Learning of a new domain, and forgetting of the old one, by memory added to a trained backbone and by LoRA.

    python benchmarks/add_memory.py [--preset short] [--steps 200 500 1000] [--seed 0] [--scales 1 5 20] [--only LoRA]

The backbone is a small Qwen3-MoE, trained here on the sources of Python's standard library. The new domain is English
about Python: its docstrings and the topics of `help()`. The backbone is frozen; the LoRA has as many trainable
parameters as the memory. Losses are in nats per token on held-out texts. The script prints the change of both losses
after each number of steps, and whether the logits moved at step 0. If the package `engram-peft` is installed, its
memory on the same backbone is measured, too.
"""

import argparse
import copy
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeForCausalLM, set_seed
from transformers.utils import logging

from engram_hf import EngramForCausalLM
from engram_hf.training import engram_parameter_groups

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from stdlib_text import read_documentation, read_sources, token_blocks, train_tokenizer
from twin_models import QUICK, Size, backbone_config

PRESETS = {
    "full": (replace(Size(), steps=450, rows=20_000), [200, 500, 1000]),
    "short": (replace(QUICK, files=60, rows=4000, steps=300, held_out_blocks=24), [50, 100, 200]),
}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="full",
        help="size of the backbone and of its training (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        help="steps of training after which losses are measured (default: those of the preset)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the new weights and of the order of texts (default: %(default)s)"
    )
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=[1, 5, 20],
        help="learning rates of the tables, in units of the others' (default: 1 5 20)",
    )
    parser.add_argument("--only", nargs="+", default=[""], help="first words of the ways to compare (default: all)")
    options = parser.parse_args()
    logging.disable_progress_bar()
    size, steps = PRESETS[options.preset]
    bench = Bench(size, options.steps or steps, options.seed)
    print(
        f"{'':36}{'trained':>9}{'step 0':>9}  "
        + "  ".join(f"{f'new, old at {step}':>17}" for step in bench.steps)
        + f"{'cpu s':>8}"
    )
    print(f"{'untouched':36}{'':>9}{'':>9}  {bench.before['new']:>8.4f} {bench.before['old']:>8.4f}", flush=True)
    for title, way in bench.ways(options.scales).items():
        if title.startswith(tuple(options.only)):
            bench.compare(title, way)


class Bench:
    """The trained backbone, and texts of both domains."""

    def __init__(self, size: Size, steps: list[int], seed: int):
        self.size, self.steps, self.seed = size, sorted(steps), seed
        sources, documentation = read_sources(), read_documentation()
        self.tokenizer = train_tokenizer(sources[0][: size.files], size.vocab_size)
        self.blocks = {
            name: stack(token_blocks(self.tokenizer, texts[: size.files], size.block, seed))
            for name, texts in {
                "old": sources[0],
                "old, held out": sources[1],
                "new": documentation[0],
                "new, held out": documentation[1],
            }.items()
        }
        set_seed(seed)
        self.backbone = Qwen3MoeForCausalLM(backbone_config(size, self.tokenizer, size.expert_width))
        self.train(
            self.backbone, torch.optim.AdamW(self.backbone.parameters(), lr=size.learning_rate), "old", size.steps
        )
        self.backbone.requires_grad_(False)
        self.before = self.losses(self.backbone)

    def ways(self, scales: list[float]) -> dict[str, Callable]:
        """Return, by title, functions that give a model and its optimizer."""
        memory: dict[str, tuple] = {f"memory, rows at {scale:g}x": (scale, 0.0, 0) for scale in scales}
        memory |= {"memory, 5x, value projection 0.02": (5, 0.02, 0), "memory, 5x, rate warmed up": (5, 0.0, 50)}
        ways: dict[str, Callable] = {
            title: lambda fields=fields: self.memory(*fields) for title, fields in memory.items()
        }
        others = {"engram-peft, one stream": self.engram_peft} if importlib.util.find_spec("engram_peft") else {}
        return ways | others | {"LoRA": self.lora}

    def memory(self, scale: float, std: float, warm_up: int):
        set_seed(self.seed)
        model = EngramForCausalLM.from_backbone(
            copy.deepcopy(self.backbone),
            self.tokenizer,
            layer_ids=[1, 2],
            rows=self.size.rows,
            engram_n_heads=self.size.memory_heads,
            engram_head_dim=self.size.memory_width,
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".engram." in name)
        for memory in model.model.memories().values():
            if std:
                torch.nn.init.normal_(memory.kv_proj.weight[len(memory.kv_proj.weight) // 2 :], std=std)
        groups = engram_parameter_groups(model, self.size.learning_rate, table_lr_scale=scale)
        return model, torch.optim.AdamW(groups), warm_up

    def engram_peft(self):
        """Return a model with the memory of the package `engram-peft`, of the same dimensions and with its own
        optimizer.
        """
        from engram_peft import EngramConfig, get_engram_model, get_optimizer

        set_seed(self.seed)
        orders = [2, 3]
        config = EngramConfig(
            target_layers=[1, 2],
            ngram_sizes=orders,
            n_head_per_ngram=self.size.memory_heads,
            engram_vocab_size_per_ngram=[self.size.rows // len(orders)] * len(orders),
            embedding_dim=len(orders) * self.size.memory_heads * self.size.memory_width,
            hc_mult=1,
            use_sparse_embeddings=False,  # Torch has no norm of sparse gradients, by which all are clipped here.
        )
        model = get_engram_model(copy.deepcopy(self.backbone), config, self.tokenizer)
        return model, get_optimizer(model, self.size.learning_rate, engram_sparse_optimizer="adam"), 0

    def lora(self):
        target = sum(p.numel() for p in self.memory(5, 0.0, 0)[0].parameters() if p.requires_grad)
        set_seed(self.seed)
        sizes = [
            sum(m.weight.shape) for name, m in self.backbone.named_modules() if name.endswith(tuple(LORA_TARGETS))
        ]
        config = LoraConfig(task_type="CAUSAL_LM", r=max(1, round(target / sum(sizes))), target_modules=LORA_TARGETS)
        model = get_peft_model(copy.deepcopy(self.backbone), config)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, torch.optim.AdamW(trained, lr=self.size.learning_rate), 0

    def compare(self, title: str, way: Callable) -> None:
        model, optimizer, warm_up = way()
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        ids = self.blocks["new, held out"][:2]
        with torch.no_grad():
            start = self.backbone.eval()(input_ids=ids, use_cache=False).logits
            moved = (model.eval()(input_ids=ids, use_cache=False).logits - start).abs().max()
        cells, done, started = [], 0, time.process_time()
        for step in self.steps:
            self.train(model, optimizer, "new", step - done, done, warm_up)
            done, found = step, self.losses(model)
            cells.append(f"{found['new'] - self.before['new']:>+8.4f} {found['old'] - self.before['old']:>+8.4f}")
        seconds = time.process_time() - started
        print(f"{title:36}{trained:>9,}{float(moved):>9.1e}  " + "  ".join(cells) + f"{seconds:>8.1f}", flush=True)

    def train(self, model, optimizer, domain: str, count: int, first: int = 0, warm_up: int = 0) -> None:
        blocks, size = self.blocks[domain], self.size.batch
        rates = [group["lr"] for group in optimizer.param_groups]
        model.train()
        for step in range(first, first + count):
            places = torch.arange(step * size, (step + 1) * size) % len(blocks)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, (step + 1) / warm_up) if warm_up else rate
            model(input_ids=blocks[places], labels=blocks[places], use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    @torch.no_grad()
    def losses(self, model) -> dict[str, float]:
        """Return the losses on held-out texts of both domains."""
        model.eval()
        found = {}
        for domain in ("new", "old"):
            parts = self.blocks[f"{domain}, held out"][: self.size.held_out_blocks].split(8)
            sums = [float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(ids) for ids in parts]
            found[domain] = sum(sums) / sum(map(len, parts))
        return found


def stack(blocks: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.stack([block["input_ids"] for block in blocks])


if __name__ == "__main__":
    main()
