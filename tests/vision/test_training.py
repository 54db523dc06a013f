"""Training on pairs of image and text: a stock `Trainer`, LoRA, and bfloat16."""

import pytest
import torch
from deepseek_v41_reference import HAS_AUTO_IMAGE_PROCESSOR
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from engram_hf.image_processing_deepseek_v41 import DeepseekV41ImageProcessor
from engram_hf.processing_deepseek_v41 import IMAGE_TOKEN, DeepseekV41Processor

VISION = ("vision_tower.patch_embedding.weight", "vision_tower.layers.2.mlp.down_proj.weight", "aligner.linear_1.bias")
DELIMITERS = ("image_start", "image_newline", "image_end")


@pytest.fixture
def model(float32):
    return AutoModelForImageTextToText.from_pretrained(float32, dtype=torch.float32)


@pytest.fixture
def processor(float32, config):
    return DeepseekV41Processor(
        DeepseekV41ImageProcessor.from_vision_config(config.vision_config), AutoTokenizer.from_pretrained(float32)
    )


@pytest.fixture
def pairs(answers):
    """Return two images with the answers to learn."""
    images = [Image.fromarray(answers[f"processing.{name}.image"].numpy()) for name in ("a", "b")]
    return list(zip(images, ("what is this? one", "what is that two"), strict=True))


@pytest.fixture
def collate(processor):
    """Collate batches as users do: padding and image positions are no labels."""

    def make(batch):
        inputs = processor(
            images=[[image] for image, _ in batch],
            text=[IMAGE_TOKEN + text for _, text in batch],
            padding=True,
            return_tensors="pt",
        )
        ids = inputs["input_ids"]
        unlabelled = (inputs["attention_mask"] == 0) | (ids == processor.image_token_id)
        return {**inputs, "labels": ids.masked_fill(unlabelled, -100)}

    return make


@pytest.fixture
def train(pairs, collate, processor, tmp_path):
    def run(model, collate=collate, **fields) -> Trainer:
        settings = {
            "max_steps": 4,
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            **fields,
        }
        arguments = TrainingArguments(
            str(tmp_path / "run"), use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, **settings,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=pairs, data_collator=collate, processing_class=processor)
        trainer.train()
        return trainer

    return run


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_on_pairs_of_image_and_text(model, train, collate, pairs, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = train(model)
    first, *_, last = losses(trainer)
    assert first == pytest.approx(8.1, abs=0.5)  # The loss is a mean over the labels, not over all positions.
    assert last < 0.6 * first
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    for part in (*VISION, *DELIMITERS, "lm_head.weight", "engram.kv_proj.weight"):
        assert any(name.endswith(part) for name in changed), part
    trainer.save_model(tmp_path / "trained")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "trained")
    inputs = collate(pairs)
    saved = again.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        # A product of matrices depends on how they lie in memory, in its last bits and on some processors.
        torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=1e-5)
    if HAS_AUTO_IMAGE_PROCESSOR:
        assert isinstance(AutoProcessor.from_pretrained(tmp_path / "trained"), DeepseekV41Processor)


def test_gradient_checkpointing_changes_no_gradient(model, train, float32):
    newer = "activation_checkpointing"  # This is its name from transformers 5.24 on.
    field = newer if newer in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
    plain = losses(train(model, max_steps=3))
    again = AutoModelForImageTextToText.from_pretrained(float32, dtype=torch.float32)
    assert losses(train(again, max_steps=3, **{field: True})) == pytest.approx(plain, abs=1e-4)


def test_labels_at_image_positions_are_warned_of(model, train, collate, monkeypatch):
    """`Trainer` divides by the labels it counts, so a loss without image positions comes out too small."""

    def careless(batch):
        inputs = collate(batch)
        return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}

    warnings = []
    monkeypatch.setattr("engram_hf.multimodal_deepseek_v41.logger.warning_once", warnings.append)
    train(model, max_steps=1)
    assert not warnings
    train(model, careless, max_steps=1)
    assert warnings and "-100" in warnings[0]


def test_lora_on_text_model_tower_and_aligner(model, float32, collate, pairs, tmp_path):
    """An adapter on the text model, the tower and the aligner is saved, loaded again, and merged."""
    torch.manual_seed(0)
    targets = ["q_a_proj", "kv_proj", "qkv_proj", "linear_1"]
    adapted, inputs = get_peft_model(model, LoraConfig(target_modules=targets)), collate(pairs)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("vision_tower.layers.2." in name for name in trained) and any("aligner" in name for name in trained)
    optimizer, seen = torch.optim.AdamW(trained.values(), lr=1e-2), []
    for _ in range(6):
        loss = adapted(**inputs).loss
        loss.backward()
        seen.append(loss.item())
        if len(seen) == 2:  # At first, one of the two matrices is zero.
            assert all(parameter.grad.abs().max() > 0 for parameter in trained.values())
        optimizer.step()
        optimizer.zero_grad()
    assert seen[-1] < 0.8 * seen[0]
    adapted.eval().save_pretrained(tmp_path)
    base = AutoModelForImageTextToText.from_pretrained(float32, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        expected = adapted(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, expected)
        with loaded.disable_adapter():
            assert (loaded(**inputs).logits - expected).abs().max() > 0.1
        torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, expected, atol=1e-2, rtol=0)


def test_load_train_and_generate_in_bfloat16(float32, collate, pairs, answers):
    """The model loads, learns and generates in bfloat16; norms of the tower stay in float32, and its features are
    close.
    """
    model = AutoModelForImageTextToText.from_pretrained(float32, dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["model.vision_tower.layers.0.layer_norm1.weight"] == torch.float32
    assert dtypes["model.vision_tower.aligner.linear_1.weight"] == dtypes["model.image_end"] == torch.bfloat16
    features = model.get_image_features(answers["processing.a.pixel_values"], torch.tensor([[8, 13]])).pooler_output[0]
    vectors = features[1:-1].view(3, 6, 64)[:, :5].flatten(0, 1)  # This excludes start, row ends and end.
    assert features.dtype == torch.bfloat16
    assert (vectors - answers["vision.a.aligned"]).abs().mean() < 0.01
    model(**collate(pairs)).loss.backward()
    for name, parameter in model.named_parameters():
        if name.endswith((*VISION, *DELIMITERS)):
            assert parameter.grad.abs().max() > 0 and torch.isfinite(parameter.grad).all(), name
    inputs = collate(pairs[:1])
    del inputs["labels"]
    new = model.generate(**inputs, max_new_tokens=3, eos_token_id=None, pad_token_id=2)
    assert new.shape[1] == inputs["input_ids"].shape[1] + 3
