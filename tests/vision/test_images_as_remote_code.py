"""A saved folder is enough to ask about an image: the child process cannot import `engram_hf`."""

import json

import pytest
from child_processes import WITHOUT_PACKAGE, run_elsewhere
from deepseek_v41_reference import needs_auto_image_processor
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

pytestmark = needs_auto_image_processor

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
ASK = f"""
import json
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
def ask(folder, image, **options):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32", **options)
    processor = AutoProcessor.from_pretrained(folder, **options)
    content = [{{"type": "image", "image": Image.open(image)}}, {{"type": "text", "text": "What is this?"}}]
    messages = [{{"role": "user", "content": content}}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    plain = model.generate(**inputs, **{GREEDY!r})
    drafted = model.generate(**inputs, **{GREEDY!r}, use_mtp=True)
    text = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options)
    said = text.generate(processor.tokenizer("hello", return_tensors="pt")["input_ids"], **{GREEDY!r})
    return model, processor, [plain.tolist(), drafted.tolist(), [list(pair) for pair in model.draft_report.rounds], said.tolist()]
"""
ELSEWHERE = (
    WITHOUT_PACKAGE
    + ASK
    + """
model, processor, answer = ask(folder, image, trust_remote_code=True)
for part in (model, processor, processor.image_processor):
    assert type(part).__module__.startswith("transformers_modules."), type(part).__module__
assert "engram_hf" not in sys.modules
model.save_pretrained(again)
processor.save_pretrained(again)
print(json.dumps(answer))
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["converted", "saved"])
def test_saved_folder_alone_answers_about_an_image(float32, answers, tmp_path, kind):
    """The folder that the child process saves again works too, with drafts, and as a text model."""
    folder, image = float32, str(tmp_path / "a.png")
    Image.fromarray(answers["processing.a.image"].numpy()).save(image)
    scope = {}
    exec(ASK, scope)
    if kind == "saved":
        folder = tmp_path / "saved"
        AutoModelForImageTextToText.from_pretrained(float32, draft=True).save_pretrained(folder)
        AutoProcessor.from_pretrained(float32).save_pretrained(folder)
    model, _, expected = scope["ask"](folder, image)
    assert expected[0] == expected[1] and type(model).__module__.startswith("engram_hf")
    again = tmp_path / "again"
    names = f"folder, image, again = {str(folder)!r}, {image!r}, {str(again)!r}\n"
    assert run_elsewhere(names + ELSEWHERE, tmp_path) == expected
    config = json.loads((again / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"].endswith(".EngramForConditionalGeneration")
    assert scope["ask"](again, image)[2] == expected
