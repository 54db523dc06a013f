"""A small mixture-of-experts model with Engram memory, and its twin without: same active parameters, same training."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProgressCallback,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from engram_hf import EngramConfig, EngramForCausalLM, EngramTokenizer
from engram_hf.training import engram_parameter_groups


@dataclass(frozen=True)
class Size:
    """The sizes that determine the duration."""

    files: int | None = None  # This is the length of the training text; None stands for all of it.
    vocab_size: int = 4096
    hidden_size: int = 192
    layers: int = 4
    # Without experts, the backbone is a dense Llama whose feed-forward layers are `expert_width` wide.
    experts: int = 8
    expert_width: int = 192
    memory_heads: int = 4
    memory_width: int = 32
    rows: int = 80_000  # This is the approximate size of each layer's table.
    block: int = 128
    batch: int = 4
    steps: int = 200  # both models together train within 150 seconds of processor time
    held_out_blocks: int = 512
    bf16: bool = False  # Matrix products use bfloat16, which some processors do much faster.
    learning_rate: float = 1.5e-3  # In shorter runs, 6e-4 and 3e-3 were worse for either model.


QUICK = Size(
    files=40,
    vocab_size=512,
    hidden_size=64,
    layers=3,
    experts=4,
    expert_width=32,
    memory_heads=2,
    memory_width=16,
    rows=2000,
    block=64,
    steps=3,
    held_out_blocks=8,
)


def backbone_config(size: Size, tokenizer: EngramTokenizer, expert_width: int) -> PreTrainedConfig:
    """Return a Qwen3-MoE of a few million parameters, whose tokens use two experts per layer; a Llama without experts."""
    common = dict(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden_size // 32,
        num_key_value_heads=size.hidden_size // 64,
        head_dim=32,
        max_position_embeddings=4 * size.block,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if not size.experts:
        return LlamaConfig(intermediate_size=expert_width, **common)
    return Qwen3MoeConfig(  # type: ignore[call-arg]  # not every field of a config is declared
        num_experts=size.experts,
        num_experts_per_tok=2,
        moe_intermediate_size=expert_width,
        # The grouped kernel needs widths in multiples of 16 bytes; the twin's experts get the width that makes it
        # equal.
        experts_implementation="eager",
        **common,
    )


def build_with_memory(size: Size, tokenizer: EngramTokenizer, seed: int) -> EngramForCausalLM:
    """Build the backbone with the paper's memory on two layers."""
    set_seed(seed)
    config = EngramConfig.for_backbone(
        backbone_config(size, tokenizer, size.expert_width),
        tokenizer,
        layer_ids=[1, 2],
        variant="paper",
        rows=size.rows,
        engram_n_heads=size.memory_heads,
        engram_head_dim=size.memory_width,
    )
    model = EngramForCausalLM(config)
    model.set_token_map(tokenizer)
    return model


def build_twin(size: Size, tokenizer: EngramTokenizer, seed: int, active: int) -> Qwen3MoeForCausalLM:
    """Build the backbone alone, with experts widened until a token uses `active` parameters, as it does with memory."""
    narrow, wider = (
        count_parameters(_backbone(size, tokenizer, seed, width))[0]
        for width in (size.expert_width, size.expert_width + 1)
    )
    extra = round((active - narrow) / (wider - narrow))
    return _backbone(size, tokenizer, seed, size.expert_width + extra)


def _backbone(size: Size, tokenizer: EngramTokenizer, seed: int, expert_width: int) -> Qwen3MoeForCausalLM:
    set_seed(seed)
    return Qwen3MoeForCausalLM(backbone_config(size, tokenizer, expert_width))  # type: ignore[arg-type]


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Return the number of parameters that one token uses, and of all of them.

    Experts that the router did not choose and table rows that no hash head reads are unused. The embedding is also the
    output head, so it counts as a whole.
    """
    config, total, active = model.config.get_text_config(), 0, 0
    for name, parameter in model.named_parameters():
        used = parameter.numel()
        if ".experts." in name:
            used = used * config.num_experts_per_tok // config.num_experts
        elif name.endswith("engram.table.weight"):
            used = model.config.engram_row_width
        total, active = total + parameter.numel(), active + used
    return active, total


class LossOnBar(ProgressCallback):
    """Shows the loss on the Trainer's own progress bar, instead of a line of log for every entry."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


@dataclass(frozen=True)
class Outcome:
    """The result of a training run."""

    title: str
    active: int
    total: int
    tokens: int
    seconds: float
    processor_seconds: float  # It does not grow with other work on the machine.
    loss: float  # It is in nats per token, on the held-out files.

    @property
    def perplexity(self) -> float:
        """Return e to the power of the loss."""
        return math.exp(self.loss)


def train(
    model, title: str, size: Size, blocks: dict[str, list], output: Path, seed: int, kind: type[Trainer] = Trainer
) -> Outcome:
    """Train `model` with the Trainer on `blocks["train"]`, then measure it on `blocks["held_out"]`."""
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=size.steps,
        per_device_train_batch_size=size.batch,
        per_device_eval_batch_size=8 * size.batch,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, size.steps // 10),
        logging_steps=max(1, size.steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        use_cpu=True,
        bf16=size.bf16,
        seed=seed,
    )
    groups = engram_parameter_groups(model, size.learning_rate, weight_decay=0.1)
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=blocks["train"],
        eval_dataset=blocks["held_out"],
        optimizers=(torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True), None),
    )
    trainer.pop_callback(ProgressCallback)
    trainer.add_callback(LossOnBar(title))
    clock, processor = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, processor_seconds = time.perf_counter() - clock, time.process_time() - processor
    loss = trainer.evaluate()["eval_loss"]
    tokens = size.steps * size.batch * size.block
    return Outcome(title, *count_parameters(model), tokens, seconds, processor_seconds, loss)
