"""The miniature with memory, images and drafts, opened through the Auto classes: converted, or as the release."""

import json

import pytest
import torch
from deepseek_v41_reference import inputs_of, needs_auto_image_processor
from PIL import Image
from reference_weights import model_name
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)

from engram_hf import EngramForCausalLM, EngramForConditionalGeneration
from engram_hf.convert_scripts import export_deepseek_v41

pytestmark = pytest.mark.any_version

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def load(folder, auto_class=AutoModelForImageTextToText, **options):
    model, info = auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module")
def model(float32):
    return load(float32)


# --- images


@pytest.mark.parametrize("kind", ["upstream", "kept", "float32"])
@torch.no_grad()
def test_logits_with_images_equal_the_golden_ones(request, answers, kind):
    """The release's folder, its quantized conversion and its dequantized conversion are loaded."""
    model = load(request.getfixturevalue(kind))
    assert isinstance(model, EngramForConditionalGeneration) and type(model.config).__name__ == "EngramConfig"
    floats = {tensor.dtype for name, tensor in model.named_parameters() if ".engram.table." not in name}
    assert floats == {torch.float32}
    for case in ("two", "batch"):
        logits = model(**inputs_of(answers, case)).logits
        real = answers[f"{case}.attention_mask"].bool()
        torch.testing.assert_close(logits[real], answers[f"{case}.logits"][real], atol=1e-4, rtol=0)


def test_loss_and_gradients_with_images_equal_the_golden_ones(model, answers):
    output = model(**inputs_of(answers, "two"), labels=answers["two.input_ids"], use_cache=False)
    torch.testing.assert_close(output.loss, answers["two.loss"], atol=1e-5, rtol=0)
    output.loss.backward()
    parameters, compared = dict(model.named_parameters()), 0
    for name, tensor in answers.items():
        ours = model_name(name.removeprefix("two.gradients.")) if name.startswith("two.gradients.") else None
        if ours:
            error = (parameters[f"model.{ours}"].grad - tensor).abs().max()
            assert error < 1e-3 * tensor.abs().max(), name
            compared += 1
    assert compared == 34
    model.zero_grad()


@torch.no_grad()
def test_generation_with_images_equals_the_golden_one(model, answers):
    output = model.generate(
        **inputs_of(answers, "generate"),
        max_new_tokens=24,
        output_logits=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    assert torch.equal(output.sequences, answers["generate.sequences"])
    logits = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(logits, answers["generate.logits"][:, :24], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 5, 16])
@torch.no_grad()
def test_prompt_with_images_in_chunks(float32, answers, size):
    """Memory and backbone continue across every cut, inside an image too.

    The model is in float64: the rounding of caches is a step function, and on some processors float32 noise shows as a
    step.
    """
    model = load(float32).double()
    model.set_experts_implementation("eager")  # Grouped matrix products do not support float64.
    inputs = inputs_of(answers, "two")
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_hws"])
    vectors, cache, logits = torch.cat(features.pooler_output), None, []
    for ids in inputs["input_ids"].split(size, dim=1):
        count = int((ids == model.config.image_token_id).sum())
        features.pooler_output, vectors = [vectors[:count]], vectors[count:]
        output = model(
            ids, mm_encoder_outputs={"image": features} if count else None, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), answers["two.logits"], atol=1e-4, rtol=0, check_dtype=False)


@pytest.mark.parametrize("residency", ["mapped", "resident"])
@torch.no_grad()
def test_mapped_tables_with_images(float32, answers, residency):
    model = load(float32, engram_residency=residency)
    logits = model(**inputs_of(answers, "two")).logits
    torch.testing.assert_close(logits, answers["two.logits"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_beam_search_with_images(model, answers):
    inputs = inputs_of(answers, "generate")
    beams = model.generate(**inputs, max_new_tokens=5, num_beams=3, num_return_sequences=3, **GREEDY)
    assert beams.shape == (3, 36) and len({tuple(row) for row in beams.tolist()}) == 3


@torch.no_grad()
def test_folder_with_images_opens_as_a_text_model(float32, answers):
    model = load(float32, AutoModelForCausalLM)
    assert isinstance(model, EngramForCausalLM) and not isinstance(model, EngramForConditionalGeneration)
    assert not any("vision" in name or "draft" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="AutoModelForImageTextToText"):
        model(answers["two.input_ids"])
    row = answers["batch.input_ids"][2:, :19]
    torch.testing.assert_close(model(row).logits, answers["batch.logits"][2:, :19], atol=1e-4, rtol=0)


def test_incomplete_tower_beside_memory_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "aligner" not in k})
    with pytest.raises(ValueError, match="lacks 4 tensors of the vision tower"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


# --- the processor


@needs_auto_image_processor
@pytest.mark.parametrize("kind", ["upstream", "kept", "float32"])
def test_processor_of_a_folder(request, answers, folder, kind):
    processor = AutoProcessor.from_pretrained(request.getfixturevalue(kind))
    image = Image.fromarray(answers["processing.a.image"].numpy())
    (conversation, *_) = json.loads((folder / "golden_vl.json").read_text(encoding="utf-8"))["conversations"]
    conversation["messages"][0]["content"][0]["image"] = image
    inputs = processor.apply_chat_template(
        conversation["messages"], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert torch.equal(inputs["input_ids"], answers["conversation.0.input_ids"])
    assert torch.equal(inputs["pixel_values"], answers["processing.a.pixel_values"])


@needs_auto_image_processor
def test_pipeline(float32, answers):
    pipe = pipeline("image-text-to-text", model=float32, dtype=torch.float32)
    image = Image.fromarray(answers["processing.a.image"].numpy())
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]}
    ]
    (said,) = pipe(text=messages, max_new_tokens=5, return_full_text=False)
    inputs = pipe.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    new = pipe.model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert said["generated_text"] == pipe.processor.decode(new, skip_special_tokens=True)


# --- saving, export


@torch.no_grad()
def test_model_with_images_saves_and_loads(model, answers, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"]["AutoModelForImageTextToText"].endswith(".EngramForConditionalGeneration")
    again = load(tmp_path)
    torch.testing.assert_close(again(**inputs_of(answers, "two")).logits, answers["two.logits"], atol=1e-4, rtol=0)


def test_release_with_images_exports_byte_for_byte(upstream, kept, tmp_path):
    assert export_deepseek_v41.main([str(kept), str(tmp_path / "back")]) == 0
    names = sorted(path.name for path in upstream.iterdir())
    assert sorted(path.name for path in (tmp_path / "back").iterdir() if path.name in names) == names
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (upstream / name).read_bytes(), name


# --- drafts


@pytest.mark.parametrize("kind", ["upstream", "kept", "float32"])
@torch.no_grad()
def test_drafts_with_images_equal_the_golden_ones(request, answers, kind):
    """Drafts, counts and tokens equal the oracle's in every round; the layers are loaded at their first use."""
    model = load(request.getfixturevalue(kind))
    assert model.draft is None
    inputs = inputs_of(answers, "generate")
    rounds = []
    model.load_drafts()
    drafted = model.draft.draft
    model.draft.draft = lambda *args, **kwargs: rounds.append(drafted(*args, **kwargs)) or rounds[-1]
    new = model.generate(**inputs, max_new_tokens=24, use_mtp=True, **GREEDY)
    assert torch.equal(new, answers["generate.sequences"])
    *full, last = zip(rounds, answers["speculate.drafts"], answers["speculate.confidence"], strict=True)
    for drafts, tokens, confidence in full:
        assert torch.equal(drafts.tokens[0], tokens)
        torch.testing.assert_close(drafts.confidence[0], confidence, atol=1e-4, rtol=0)
    assert torch.equal(last[0].tokens[0], last[1][: last[0].tokens.shape[1]])  # The rest of the block is still wanted.
    accepted = [count for _, count in model.draft_report.rounds]
    assert accepted[:-1] == answers["speculate.accepted"][:-1].tolist()
    assert accepted[-1] == 2  # A third draft would have exceeded the length.


@torch.no_grad()
def test_draft_layers_are_loaded_at_their_first_use(model, float32, answers):
    fresh = load(float32)
    new = fresh.generate(**inputs_of(answers, "generate"), max_new_tokens=8, use_mtp=True, **GREEDY)
    assert torch.equal(new, answers["generate.sequences"][:, :39])
    assert fresh.draft_report.tokens_per_round > 1
    asked = load(float32, draft=True)
    assert asked.draft is not None
    new = asked.generate(**inputs_of(answers, "generate"), max_new_tokens=8, use_mtp=True, **GREEDY)
    assert torch.equal(new, answers["generate.sequences"][:, :39])


@torch.no_grad()
def test_drafts_read_the_right_features(model, float32, answers):
    """They read the mean streams entering layers 6, 7, 8, of a prompt with an image."""
    output = model(**inputs_of(answers, "draft"), output_hidden_states=True)
    features = torch.cat([output.hidden_states[layer].mean(2) for layer in (6, 7, 8)], dim=-1)
    torch.testing.assert_close(features, answers["draft.target_hidden"], atol=1e-4, rtol=0)
