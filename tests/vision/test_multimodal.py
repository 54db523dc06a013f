"""The text backbone with images: golden activations, prompts in chunks, beams, training."""

import pytest
import torch
from deepseek_v41_reference import InjectedMemory, inputs_of
from reference_weights import model_name
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from transformers.generation import utils as generation_utils

from engram_hf.causal_lm_deepseek_v41 import DeepseekV41TextForCausalLM
from engram_hf.multimodal_deepseek_v41 import DeepseekV41ForConditionalGeneration

IMAGE = 1277


def remember(model, answers, release) -> InjectedMemory:
    """Give the backbone the miniature's memory, for the case `two`."""
    memory = InjectedMemory(model.model.layers, model.config.engram_layer_ids, release)
    memory.valid = answers["two.vision_token_types"] < 0
    memory.rows = {layer: answers[f"two.layers.{layer}.engram.rows"] for layer in (1, 4)}
    return memory


# --- the oracle


@torch.no_grad()
def test_image_features_are_inserted_where_the_oracle_inserts_them(model, answers):
    seen = {}
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.update(streams=args[0]))
    model(**inputs_of(answers, "two"))
    for stream in seen["streams"].unbind(2):
        torch.testing.assert_close(stream, answers["two.inputs_embeds"], atol=1e-5, rtol=0)


def test_logits_loss_and_gradients_match_the_oracle(model, answers, release):
    memory = remember(model, answers, release)
    ids = answers["two.input_ids"]
    output = model(**inputs_of(answers, "two"), labels=ids)
    torch.testing.assert_close(output.logits, answers["two.logits"], atol=1e-4, rtol=0)
    for layer in (1, 4):
        gate = memory.seen[f"layers.{layer}.engram.gate"]
        torch.testing.assert_close(gate, answers[f"two.layers.{layer}.engram.gate"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.loss, answers["two.loss"], atol=1e-5, rtol=0)
    output.loss.backward()
    parameters, compared = dict(model.named_parameters()), 0
    for name, tensor in answers.items():
        ours = model_name(name.removeprefix("two.gradients.")) if name.startswith("two.gradients.") else None
        if ours:
            gradient = parameters[f"model.{ours}"].grad
            assert (gradient - tensor).abs().max() < 1e-3 * tensor.abs().max(), name
            compared += 1
    assert compared == 34
    assert parameters["model.embed_tokens.weight"].grad[IMAGE].abs().max() == 0
    assert parameters["model.embed_tokens.weight"].grad[ids[0, 0]].abs().max() > 0


# --- equal results in other ways


@torch.no_grad()
def test_features_replace_pixels(model, answers):
    inputs = inputs_of(answers, "two")
    expected = model(**inputs).logits
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_hws"])
    assert [len(image) for image in features.pooler_output] == [20, 14]
    given = model(inputs["input_ids"], mm_encoder_outputs={"image": features}).logits
    torch.testing.assert_close(given, expected, atol=0, rtol=0)


@pytest.mark.parametrize("size", [1, 7, 16])
@torch.no_grad()
def test_prompt_may_be_cut_inside_an_image(model, answers, size):
    model.config.cache_rounding = False
    inputs = inputs_of(answers, "two")
    expected = model(**inputs).logits
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_hws"])
    vectors, cache, logits = torch.cat(features.pooler_output), DynamicCache(config=model.config), []
    for ids in inputs["input_ids"].split(size, dim=1):
        count = int((ids == IMAGE).sum())
        features.pooler_output, vectors = [vectors[:count]], vectors[count:]
        encoded = {"image": features} if count else None
        logits.append(model(ids, mm_encoder_outputs=encoded, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_batch_with_different_numbers_of_images(model, answers):
    """Each row equals the row alone, padded on either side."""
    model.config.cache_rounding = False  # The last bits differ, and a rounding would amplify the difference.
    inputs = inputs_of(answers, "batch")
    batch = model(**inputs).logits
    left = {**inputs}
    for name in ("input_ids", "attention_mask"):
        rows = zip(inputs[name], inputs["attention_mask"].sum(-1).tolist(), strict=True)
        left[name] = torch.stack([row.roll(-length) for row, length in rows])
    padded_left = model(**left).logits
    images = [(slice(0, 60), slice(0, 1)), (slice(60, None), slice(1, None)), None]
    for row, image in enumerate(images):
        length = int(inputs["attention_mask"][row].sum())
        ids = inputs["input_ids"][row : row + 1, :length]
        given = {} if image is None else {"pixel_values": inputs["pixel_values"][image[0]], "image_grid_hws": inputs["image_grid_hws"][image[1]]}  # fmt: skip
        alone = model(ids, **given).logits[0]
        torch.testing.assert_close(batch[row, :length], alone, atol=1e-4, rtol=0)
        torch.testing.assert_close(padded_left[row, -length:], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
@torch.no_grad()
def test_generate_with_images(model, answers, options):
    """Beams and several sequences get the images of their row; the first tokens agree with a plain forward."""
    inputs = inputs_of(answers, "batch")
    inputs = {
        name: tensor[:2] if name in ("input_ids", "attention_mask") else tensor for name, tensor in inputs.items()
    }
    inputs = {**inputs, "pixel_values": inputs["pixel_values"], "image_grid_hws": inputs["image_grid_hws"]}
    for name in ("input_ids", "attention_mask"):  # Generation requires padding on the left.
        rows = zip(inputs[name], answers["batch.attention_mask"][:2].sum(-1).tolist(), strict=True)
        inputs[name] = torch.stack([row.roll(-length) for row, length in rows])
    new = model.generate(**inputs, max_new_tokens=6, eos_token_id=None, pad_token_id=2, **options)
    width, copies = inputs["input_ids"].shape[1], options.get("num_return_sequences", 1)
    assert new.shape == (2 * copies, width + 6)
    greedy = model.generate(**inputs, max_new_tokens=6, eos_token_id=None, pad_token_id=2)
    if copies > 1:
        assert torch.equal(new, greedy.repeat_interleave(copies, dim=0))
    if options.get("num_beams"):
        assert score(model, inputs, new) >= score(model, inputs, greedy) - 1e-3
        return
    row = inputs["attention_mask"][0].bool()  # This is the first row, without a cache.
    ids, pixels = inputs["input_ids"][:1, row], {"pixel_values": inputs["pixel_values"][:60], "image_grid_hws": inputs["image_grid_hws"][:1]}  # fmt: skip
    for step in range(6):
        logits = model(ids, **pixels).logits[0, -1]
        logits[IMAGE] = float("-inf")
        assert new[0, width + step] == logits.argmax()
        ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)


def score(model, inputs, sequences) -> float:
    """Return the log probability of the new tokens of all rows."""
    prompt = inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, sequences.shape[1] - prompt), value=1)
    logits = model(**{**inputs, "input_ids": sequences, "attention_mask": mask}).logits[:, prompt - 1 : -1]
    logits[..., IMAGE] = float("-inf")
    return logits.log_softmax(-1).gather(-1, sequences[:, prompt:, None]).sum().item()


@pytest.mark.skipif(
    not hasattr(generation_utils, "_slice_mm_encoder_output"), reason="this transformers cuts no images in generate"
)
@torch.no_grad()
def test_generate_with_a_prompt_in_chunks(model, answers):
    inputs = inputs_of(answers, "two")
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 2}
    whole = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, prefill_chunk_size=13), whole)


@torch.no_grad()
def test_image_id_is_never_generated(model, answers):
    """It is masked even where it is the likeliest token by far."""
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(1280).index_fill(0, torch.tensor([IMAGE]), 100.0))
    inputs = inputs_of(answers, "two")
    assert model(**inputs).logits[0, -1].argmax() == IMAGE
    new = model.generate(**inputs, max_new_tokens=3, eos_token_id=None, pad_token_id=2)[0, 67:]
    assert len(new) == 3 and IMAGE not in new.tolist()


# --- one checkpoint, opened twice


@torch.no_grad()
def test_one_checkpoint_opens_with_images_and_as_text(model, answers, tmp_path):
    model.save_pretrained(tmp_path)
    seeing, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(seeing) is DeepseekV41ForConditionalGeneration
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = inputs_of(answers, "two")
    assert torch.equal(seeing(**inputs).logits, model(**inputs).logits)
    text, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(text) is DeepseekV41TextForCausalLM
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any("vision" in name for name in text.state_dict())
    words = inputs["input_ids"][inputs["input_ids"] != IMAGE][None]
    torch.testing.assert_close(text(words).logits, model(words).logits, atol=1e-4, rtol=0)


def test_attention_of_tower_and_text_are_chosen_separately(model, tmp_path):
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    eager = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.model.vision_tower.config._attn_implementation == "eager"
    chosen = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation={"vision_config": "sdpa"})
    assert chosen.model.vision_tower.config._attn_implementation == "sdpa"


# --- bad input


def test_images_and_positions_must_match(model, answers):
    inputs = inputs_of(answers, "two")
    with pytest.raises(ValueError, match=r"34 image positions .* fill 0"):
        model(inputs["input_ids"])
    with pytest.raises(ValueError, match=r"0 image positions .* fill 34"):
        model(inputs["input_ids"][:, :10], **{name: inputs[name] for name in ("pixel_values", "image_grid_hws")})
    with pytest.raises(ValueError, match="33 image positions"):
        model(**{**inputs, "input_ids": inputs["input_ids"].index_fill(1, torch.tensor([11]), 5)})
    with pytest.raises(ValueError, match="without `image_grid_hws`"):
        model(inputs["input_ids"], pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="without `pixel_values`"):
        model(inputs["input_ids"], image_grid_hws=inputs["image_grid_hws"])
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_hws"])
    with pytest.raises(ValueError, match="not both"):
        model(**inputs, mm_encoder_outputs={"image": features})
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="hold the images already"):
        model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])


def test_image_mask_must_match_the_ids(model, answers):
    inputs = inputs_of(answers, "two")
    mask = model.model.get_image_mask(inputs["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**inputs, image_mask=mask).logits, model(**inputs).logits)
    for wrong in (mask[:, :-1], mask.roll(1), torch.zeros_like(mask)):
        with pytest.raises(ValueError, match=r"`image_mask` .* leave it out"):
            model(**inputs, image_mask=wrong)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="one entry per token"):
        model(inputs_embeds=embeds, image_mask=mask[:, :-1])


def test_images_in_a_text_model_are_refused(model, answers, tmp_path):
    model.save_pretrained(tmp_path)
    text, inputs = AutoModelForCausalLM.from_pretrained(tmp_path), inputs_of(answers, "two")
    with pytest.raises(ValueError, match="AutoModelForImageTextToText"):
        text(inputs["input_ids"])
    with pytest.raises(ValueError, match=r"`pixel_values` were given .* AutoModelForImageTextToText"):
        text(**inputs)


def test_checkpoint_without_tower_refuses_images(model, config, tmp_path):
    config.vision_config = None
    DeepseekV41TextForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tower"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["vision_tower.layers.1.", "vision_tower.", "image_newline"])
def test_checkpoint_with_an_incomplete_tower_is_refused(model, tmp_path, part):
    """transformers alone would fill it with random numbers and report them in a table; as a text model it loads all
    the same.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if part not in name}
    missing = len(model.state_dict()) - len(state)
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=rf"lacks {missing} tensors of the vision tower, such as model\.{part}"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is DeepseekV41TextForCausalLM
