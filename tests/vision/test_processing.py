"""The processor: golden conversations and texts, batches, saving, remote code, and the input it refuses."""

import base64
import json
import subprocess
import sys

import jinja2
import numpy as np
import pytest
import torch
import transformers
from deepseek_v41_reference import needs_auto_image_processor
from packaging.version import Version
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from engram_hf.convert_scripts.deepseek_v41_config import TEMPLATE
from engram_hf.image_processing_deepseek_v41 import DeepseekV41ImageProcessor
from engram_hf.processing_deepseek_v41 import IMAGE_TOKEN, DeepseekV41Processor

IMAGE = 1277


@pytest.fixture
def processor(folder, config):
    return DeepseekV41Processor(
        DeepseekV41ImageProcessor.from_vision_config(config.vision_config),
        AutoTokenizer.from_pretrained(folder),
        chat_template=TEMPLATE.read_text(encoding="utf-8"),
    )


@pytest.fixture(scope="module")
def images(answers):
    return {name: Image.fromarray(answers[f"processing.{name}.image"].numpy()) for name in ("a", "b")}


@pytest.fixture(scope="module")
def texts(folder):
    return json.loads((folder / "golden_vl.json").read_text(encoding="utf-8"))


# --- the oracle


@pytest.mark.parametrize("number", [0, 1])
def test_conversations_match_the_golden_ones(processor, answers, images, texts, number):
    conversation = texts["conversations"][number]
    for message in conversation["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image":
                part["image"] = images[part["image"]]
    options = {"add_generation_prompt": conversation["add_generation_prompt"]}
    assert processor.apply_chat_template(conversation["messages"], tokenize=False, **options) == conversation["text"]
    inputs = processor.apply_chat_template(
        conversation["messages"], tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    assert set(inputs) >= {"input_ids", "attention_mask", "pixel_values", "image_grid_hws"}
    for name in ("input_ids", "image_grid_hws"):
        assert torch.equal(inputs[name], answers[f"conversation.{number}.{name}"]), name
    types = answers[f"conversation.{number}.vision_token_types"]
    assert torch.equal(inputs["input_ids"] == IMAGE, types >= 0)


def test_batch_of_texts_matches_the_golden_ones(processor, answers, images, texts):
    rows = texts["cases"]["batch"]
    inputs = processor(
        images=[[images[name] for name in row["images"]] for row in rows],
        text=[row["text"] for row in rows],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_hws"):
        assert torch.equal(inputs[name], answers[f"batch.{name}"]), name


@pytest.mark.parametrize("case", ["two", "generate"])
def test_texts_match_the_golden_ones(processor, answers, images, texts, case):
    row = texts["cases"][case]
    row = row[0] if isinstance(row, list) else row
    inputs = processor(images=[images[name] for name in row["images"]], text=row["text"], return_tensors="pt")
    for name in ("input_ids", "pixel_values", "image_grid_hws"):
        assert torch.equal(inputs[name], answers[f"{case}.{name}"]), name


def test_model_takes_the_processors_output(processor, model, answers, images, texts):
    row = texts["cases"]["two"][0]
    inputs = processor(images=[images[name] for name in row["images"]], text=row["text"], return_tensors="pt")
    seen = {}
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.update(streams=args[0]))
    with torch.no_grad():
        model(**inputs)
    torch.testing.assert_close(seen["streams"][:, :, 0], answers["two.inputs_embeds"], atol=1e-5, rtol=0)


# --- forms of input


def block(kind: str, place: str) -> dict:
    return (
        {"type": "image_url", "image_url": {"url": place}} if kind == "image_url" else {"type": "image", kind: place}
    )


@pytest.mark.parametrize("kind", ["path", "url", "image_url"])
def test_images_of_a_conversation_may_be_files_and_data_urls(processor, images, tmp_path, kind):
    images["a"].save(tmp_path / "a.png")
    places = [str(tmp_path / "a.png")]
    if kind != "path":
        places.append("data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode())
    expected = processor.image_processor(images["a"], return_tensors="pt")["pixel_values"]
    for place in places:
        message = {"role": "user", "content": [block(kind, place), {"type": "text", "text": "What is this?"}]}
        inputs = processor.apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected)
        assert int((inputs["input_ids"] == IMAGE).sum()) == 20


def test_batch_of_conversations(processor, images):
    def ask(*names):
        parts = [{"type": "image", "image": images[name]} for name in names]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]

    inputs = processor.apply_chat_template(
        [ask("a"), ask(), ask("b", "a")],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    assert (inputs["input_ids"] == IMAGE).sum(-1).tolist() == [20, 0, 34]
    assert inputs["image_grid_hws"].tolist() == [[8, 13], [12, 5], [8, 13]]
    alone = processor.apply_chat_template(ask("b", "a"), tokenize=True, return_dict=True, return_tensors="pt")
    length = alone["input_ids"].shape[1]
    assert torch.equal(inputs["input_ids"][2, -length:], alone["input_ids"][0])


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="this transformers marks by unexpanded text"
)
def test_assistant_mask_accounts_for_images(processor, images):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": images["a"]}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "two"},
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (ids,), (mask,) = inputs["input_ids"], inputs["assistant_masks"]
    written = [token for token, marked in zip(ids, mask, strict=True) if marked]
    assert processor.tokenizer.decode(written) == f"two{processor.tokenizer.eos_token}"


def test_limits_can_be_passed_to_the_call(processor, images):
    """A larger image has more positions, and patches to fill them."""
    text, big = f"{IMAGE_TOKEN}what", images["a"].resize((400, 300))
    small = processor(images=big, text=text, return_tensors="pt")
    large = processor(images=big, text=text, max_image_tokens=60, return_tensors="pt")
    nested = processor(images=big, text=text, images_kwargs={"max_image_tokens": 60}, return_tensors="pt")
    assert torch.equal(large["input_ids"], nested["input_ids"])
    assert (small["input_ids"] == IMAGE).sum() <= 22 < (large["input_ids"] == IMAGE).sum() <= 60
    assert len(large["pixel_values"]) > len(small["pixel_values"])


def test_text_without_images(processor):
    inputs = processor(text=["hello there", "you"], padding=True, return_tensors="pt")
    assert set(inputs) >= {"input_ids", "attention_mask"} and "pixel_values" not in inputs
    assert torch.equal(inputs["input_ids"], processor.tokenizer(["hello there", "you"], padding=True, return_tensors="pt")["input_ids"])  # fmt: skip


# --- saving and remote code


@needs_auto_image_processor
def test_processor_saves_and_loads(processor, images, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is DeepseekV41Processor and type(loaded.image_processor) is DeepseekV41ImageProcessor
    assert loaded.chat_template == processor.chat_template
    assert (loaded.image_processor.max_image_tokens, loaded.image_processor.patch_size) == (22, 4)
    given = {"images": images["a"], "text": f"{IMAGE_TOKEN}what", "return_tensors": "pt"}
    for name, tensor in processor(**given).items():
        assert torch.equal(loaded(**given)[name], tensor)


REMOTE = """
import sys, numpy as np, torch
from transformers import AutoProcessor
assert "engram_hf" not in sys.modules
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "transformers_modules" in type(processor).__module__, type(processor).__module__
assert "transformers_modules" in type(processor.image_processor).__module__
inputs = processor(images=np.full((31, 50, 3), 9, np.uint8), text="<｜deepseek_image｜>what", return_tensors="pt")
print(int((inputs["input_ids"] == 1277).sum()), inputs["image_grid_hws"].tolist())
"""


@needs_auto_image_processor
def test_processor_as_remote_code(processor, tmp_path, monkeypatch):
    """The folder is self-contained where this package is not installed."""
    processor.save_pretrained(tmp_path / "processor")
    names = {path.name for path in (tmp_path / "processor").glob("*.py")}
    assert names == {
        "processing_deepseek_v41.py",
        "image_processing_deepseek_v41.py",
        "configuration_vision_deepseek_v41.py",
        "fields_deepseek_v41.py",
        "safetensors_engram.py",
    }
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", REMOTE, str(tmp_path / "processor")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "20 [[8, 13]]", done.stderr


# --- bad input


def test_placeholders_and_images_must_match(processor, images):
    a, two = images["a"], f"{IMAGE_TOKEN} and {IMAGE_TOKEN}"
    for text, given in ((two, [a]), ("none", [a]), (two, None), (IMAGE_TOKEN, [a, a]), (two, [])):
        with pytest.raises(ValueError, match=r"The text has . placeholders"):
            processor(images=given, text=text)
    with pytest.raises(ValueError, match=r"Text 0 has 2 placeholders .* 1 images"):
        processor(images=[[a], [a]], text=[two, "none"])


def test_truncated_image_is_refused(processor, images):
    with pytest.raises(ValueError, match="max_length"):
        processor(images=images["a"], text=f"{IMAGE_TOKEN} what", truncation=True, max_length=10)


def test_placeholder_in_a_users_text_is_no_image(processor, images):
    """This holds for the text alone, and beside an image that it could be mistaken for."""
    evil = {"type": "text", "text": f"look: {IMAGE_TOKEN}"}
    for content in ([evil], [evil, {"type": "image", "image": images["a"]}], f"look: {IMAGE_TOKEN}"):
        with pytest.raises(jinja2.exceptions.TemplateError, match="placeholder"):
            processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)


def test_web_address_in_a_conversation_is_refused(processor):
    message = {"role": "user", "content": [block("image_url", "https://example.com/cat.png")]}
    with pytest.raises(ValueError, match="web address"):
        processor.apply_chat_template([message], tokenize=True, return_dict=True)


def test_tokenizer_without_placeholder_is_refused(processor, golden):
    with pytest.raises(ValueError, match="no token"):
        DeepseekV41Processor(processor.image_processor, AutoTokenizer.from_pretrained(golden / "deepseek_v41_tiny"))


def test_bad_images_are_refused(processor):
    with pytest.raises(ValueError, match="float64"):
        processor(images=np.zeros((5, 5, 3)), text=IMAGE_TOKEN)
