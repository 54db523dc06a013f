"""Models that read images, through the public entry points: folders, remote code, pipelines, adapters, `Trainer`."""

import copy
import json

import numpy as np
import pytest
import torch
from child_processes import WITHOUT_PACKAGE, run_elsewhere
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_backbones import LAYER_IDS, bare, built, randomize, tiny_tokenizer
from tiny_vision_language import IMAGE, KINDS, bare_vl, build_vl, built_vl, memory_config, prompt
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.trainer_pt_utils import LabelSmoother

from engram_hf import EngramConfig, EngramError, EngramForCausalLM, EngramForConditionalGeneration, EngramTokenizer

on_every_kind = pytest.mark.parametrize("kind", KINDS)


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


def labelled(kind: str, **options) -> dict[str, torch.Tensor]:
    """Return a batch with labels, without labels at image positions."""
    inputs = prompt(kind, **options)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)}


def table_gradient(model, inputs) -> torch.Tensor:
    model.zero_grad()
    model(**inputs).loss.backward()
    return torch.cat([part.grad.flatten() for name, part in model.named_parameters() if ".table." in name])


# --- folders


@on_every_kind
def test_saved_model_has_the_same_logits(kind, tmp_path):
    model, inputs = built_vl(kind), prompt(kind)
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path / "saved")
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "saved", engram_residency="mapped", output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(logits_of(loaded, inputs), expected)


def test_every_auto_class_opens_the_folder(tmp_path):
    model, inputs = built_vl("qwen2_5_vl"), prompt("qwen2_5_vl")
    model.save_pretrained(tmp_path / "mapped")
    mapped = AutoModelForImageTextToText.from_pretrained(tmp_path / "mapped", engram_residency="mapped")
    mapped.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "engram-layer-00001.safetensors").exists()
    base = AutoModel.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(base(**inputs)[0], model.model(**inputs)[0])
    with pytest.raises(EngramError, match="a qwen2_5_vl, which reads more than text; use EngramForConditionalGen"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    # The language model is a text model like any other.
    model.memory_model.save_pretrained(tmp_path / "text")
    text, ids = AutoModel.from_pretrained(tmp_path / "text"), torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(text(ids)[0], model.memory_model(ids)[0])
    files = {path.name for path in (tmp_path / "text").glob("*.py")}
    assert files == {path.name for path in (tmp_path / "whole").glob("*.py")} - {"multimodal_engram.py"}


def test_from_backbone_of_a_folder(tmp_path):
    backbone, inputs = bare_vl("llava"), prompt("llava")
    backbone.save_pretrained(tmp_path)
    sizes = {"memory_fraction": 0.75, "engram_head_dim": 8, "engram_n_heads": 2}
    model = EngramForConditionalGeneration.from_backbone(tmp_path, layer_ids=LAYER_IDS, **sizes).eval()
    assert torch.equal(logits_of(model, inputs), logits_of(backbone, inputs))
    memory = sum(part.numel() for name, part in model.named_parameters() if ".engram." in name)
    # This counts all parts, the vision tower included.
    assert memory / model.num_parameters() == pytest.approx(0.75, abs=0.01)


# --- processors, pipelines and remote code


def processor() -> LlavaProcessor:
    """Return a processor of tiny words and images, with an `EngramTokenizer`; `<image>` is an image."""
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    plain = tiny_tokenizer()
    words = [*plain.convert_ids_to_tokens(range(IMAGE)), "<image>"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {name: getattr(plain, name) for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **special)
    chat = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
    )
    return LlavaProcessor(
        pil.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        EngramTokenizer.from_tokenizer(fast),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    )


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    noise = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture(scope="module")
def with_processor(tmp_path_factory):
    """Save a model with a compressed vocabulary, and its processor."""
    reader, folder = processor(), tmp_path_factory.mktemp("with_processor")
    model = EngramForConditionalGeneration.from_backbone(
        bare_vl("llava"), reader, layer_ids=LAYER_IDS, engram_vocab_size=97
    )
    assert model.config.engram_compressed_vocab_size == reader.tokenizer.compressed_vocab_size
    randomize(model).save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


ASK = """
import json
from transformers import AutoModelForImageTextToText, AutoProcessor
def ask(folder, messages, **options):
    model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    processor = AutoProcessor.from_pretrained(folder, **options)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return model, processor, processor.batch_decode(tokens, skip_special_tokens=True)[0]
"""


def test_pipeline_and_remote_code_give_the_same_text(with_processor, picture, tmp_path):
    scope = {}
    exec(ASK, scope)
    content = [{"type": "image", "url": str(picture)}, {"type": "text", "text": "word1 Word2"}]
    messages = [{"role": "user", "content": content}]
    model, reader, expected = scope["ask"](str(with_processor), messages)
    assert len(expected.split()) > 3 and type(model).__module__.startswith("engram_hf")
    said = pipeline("image-text-to-text", model=model, processor=reader)(
        text=messages, max_new_tokens=6, return_full_text=False
    )
    assert said[0]["generated_text"].split() == expected.split()
    code = f"""
model, _, answer = ask({str(with_processor)!r}, {messages!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.") and "engram_hf" not in sys.modules
model.save_pretrained({str(tmp_path / "again")!r})
print(json.dumps(answer))
"""
    assert run_elsewhere(WITHOUT_PACKAGE + ASK + code, tmp_path) == expected
    entry = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert entry["AutoModelForImageTextToText"] == "multimodal_engram.EngramForConditionalGeneration"


def test_from_backbone_takes_the_tokenizer_of_a_processor():
    backbone = bare_vl("llava")
    with pytest.raises(
        EngramError, match="A CLIPImageProcessorPil has no tokenizer whose vocabulary can be compressed"
    ):
        EngramForConditionalGeneration.from_backbone(backbone, processor().image_processor, layer_ids=LAYER_IDS)
    assert type(backbone).__module__.startswith("transformers.")


# --- training


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    model, inputs = copy.deepcopy(built_vl(kind)).train(), labelled(kind)
    expected = table_gradient(model, inputs)
    assert expected.abs().max() > 0
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.testing.assert_close(table_gradient(model, inputs), expected, rtol=0, atol=1e-5)


class Prompts(Dataset):
    """A data set that repeats one prompt with an image."""

    def __init__(self, kind: str):
        inputs = labelled(kind, rows=1)
        whole = ("pixel_values", "image_grid_thw")
        self.item = {name: value if name in whole else value[0] for name, value in inputs.items()}

    def __len__(self):
        return 4

    def __getitem__(self, _):
        return self.item


def collate(items):
    """Stack rows; concatenate the tensors of images."""
    flat = ("pixel_values", "image_grid_thw")
    return {name: (torch.cat if name in flat else torch.stack)([item[name] for item in items]) for name in items[0]}


def test_lora_and_rows_are_trained_by_trainer(tmp_path, kind="qwen3_vl"):
    model, inputs = build_vl(kind), labelled(kind)
    before = model(**inputs).loss.item()
    tables = [name for name, _ in model.named_modules() if name.endswith(".engram.table")]
    rows = model.memory_model.memories()[LAYER_IDS[0]].table.weight.clone()
    tuned = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*\.q_proj", modules_to_save=tables))
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.05, "report_to": []}
    arguments = TrainingArguments(tmp_path, remove_unused_columns=False, use_cpu=True, save_strategy="no", **options)
    Trainer(tuned, arguments, train_dataset=Prompts(kind), data_collator=collate).train()
    assert tuned.eval()(**labelled(kind, rows=1)).loss.item() < before
    changed = tuned.base_model.model.memory_model.memories()[LAYER_IDS[0]].table
    assert not torch.equal(changed.modules_to_save["default"].weight, rows)
    tuned.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@torch.no_grad()
@on_every_kind
def test_label_smoothing_equals_the_backbones(kind, tmp_path):
    """`Trainer` shifts them for classes that it knows as causal language models, of which Gemma 3's is one."""
    host, inputs = bare_vl(kind), labelled(kind)
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[], label_smoothing_factor=0.2)
    bare_loss = Trainer(host, arguments).compute_loss(host, dict(inputs))
    model = EngramForConditionalGeneration.from_backbone(host, layer_ids=LAYER_IDS, engram_vocab_size=97).eval()
    assert torch.equal(Trainer(model, arguments).compute_loss(model, dict(inputs)), bare_loss)
    logits, labels = logits_of(model, inputs), inputs["labels"]
    shifted = LabelSmoother(0.2)({"logits": logits}, labels, shift_labels=True)
    assert torch.isclose(bare_loss, shifted) == (kind == "gemma3")


# --- configs


def test_config_is_read_and_set_like_the_backbones():
    config = memory_config("gemma3")
    backbone = config.backbone
    assert config.mm_tokens_per_image == 4 and config.vision_config is backbone.vision_config
    assert not hasattr(config, "hidden_size") and config.text_config.hidden_size == 32
    config.backbone = copy.deepcopy(backbone)
    assert not hasattr(backbone, "backbone") and config.backbone is not backbone
    assert config.text_config.text_config is config.backbone.text_config
    backbone, config.mm_tokens_per_image, config.engram_added_tokens = config.backbone, 9, 1
    assert backbone.mm_tokens_per_image == 9 and config.text_config.engram_added_tokens == 1
    config._attn_implementation = "eager"
    assert backbone.vision_config._attn_implementation == backbone.text_config._attn_implementation == "eager"
    again = EngramConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict() == copy.deepcopy(config).to_dict()
    assert again.text_config.text_config is again.backbone.text_config


def test_language_models_config_is_shared_with_the_whole():
    model = copy.deepcopy(built_vl("llava"))
    assert model.config.text_config is model.memory_model.config
    model.resize_token_embeddings(140)
    assert model.config.backbone.text_config.vocab_size == 140 and model.config.engram_added_tokens == 12
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    assert model.memory_model.layers[0].self_attn.config._attn_implementation == "eager"


# --- bad input


def _with_deep_tower() -> torch.nn.Module:
    """Return a model whose vision tower has more layers than its language model."""
    config = KINDS["llava"]()
    config.vision_config.num_hidden_layers = 5
    model = AutoModelForImageTextToText.from_config(config)
    assert len(model.model.vision_tower.encoder.layers) == 5
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: EngramForConditionalGeneration.from_backbone(_with_deep_tower(), layer_ids=[4]),
            r"engram_layer_ids \[4\] must lie in 0..2, the backbone's 3 decoder layers",
        ),
        (
            lambda: EngramForCausalLM.from_backbone(bare_vl("llava"), layer_ids=LAYER_IDS),
            "The backbone is a llava, which reads more than text; use EngramForConditionalGeneration",
        ),
        (
            lambda: EngramForConditionalGeneration.from_backbone(bare("llama"), layer_ids=LAYER_IDS),
            "The backbone is a llama, which reads text alone; use EngramForCausalLM",
        ),
        (lambda: built("llama")(**prompt("llava")), "LlamaModel reads text alone, but was given pixel_values"),
        (
            lambda: EngramConfig(backbone_config=KINDS["llava"](), text_config=KINDS["llava"]().text_config),
            "give the config of a decoder alone as text_config instead",
        ),
        (lambda: built_vl("llava")(inputs_embeds=torch.zeros(1, 4, 32)), "input_ids is needed"),
        (
            lambda: built_vl("llava")(input_ids=torch.ones(1, 3).long(), inputs_embeds=torch.zeros(1, 4, 32)),
            r"input_ids \[1, 3\] do not fit: .* \[1, 4\] positions",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message):
    with pytest.raises(EngramError, match=message):
        call()
