"""TRL's online trainers sample by continuous batching; this file runs two steps of GRPO on a model with memory."""

import pytest
import torch
from tiny_backbones import build, needs_continuous_batching, tiny_tokenizer

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
trl = pytest.importorskip("trl", reason="TRL is not installed")


@needs_continuous_batching
@pytest.mark.slow  # Importing the trainer alone takes a while.
def test_grpo_samples_in_batches_and_trains_the_memory(tmp_path, monkeypatch):
    model, rewarded = build("llama"), []

    def count_of_word7(completions, **_):
        rewarded.extend(completions)
        return [float(text.lower().count("word7")) + 0.01 * len(set(text)) for text in completions]

    sampled, sample = [], type(model).generate_batch
    monkeypatch.setattr(
        type(model),
        "generate_batch",
        lambda self, prompts, **k: sampled.append(len(prompts)) or sample(self, prompts, **k),
    )
    args = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        learning_rate=0.05,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"page_size": 8, "num_blocks": 64, "max_batch_tokens": 32},
    )
    dataset = datasets.Dataset.from_dict({"prompt": [f"word{i} Word{i + 1} word{i + 2}" for i in range(8)]})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if ".engram." in name}
    trainer = trl.GRPOTrainer(
        model, reward_funcs=count_of_word7, args=args, train_dataset=dataset, processing_class=tiny_tokenizer()
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 2 and len(losses) == 2 and len(sampled) == 2 and len(rewarded) == 8
    assert all(torch.tensor(losses).isfinite())
    moved = [
        name
        for name, parameter in model.named_parameters()
        if name in before and not torch.equal(parameter, before[name])
    ]
    assert any(".table." in name for name in moved) and any(".kv_proj." in name for name in moved)
