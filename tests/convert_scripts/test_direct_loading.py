"""The Auto classes load the release's folder, and our converted folders that keep its quantization."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import engram_hf.modeling_deepseek_v41  # noqa: F401 (registers the backbone)
from engram_hf.convert_scripts import convert_deepseek_v41, export_deepseek_v41
from engram_hf.convert_scripts.deepseek_v41 import DEEPSEEK_V41
from engram_hf.convert_scripts.direct_loading import DeepseekV41Config, register, upstream_conversions
from engram_hf.convert_scripts.safetensors_files import read_checkpoint
from engram_hf.convert_scripts.tensor_rules import map_tensors

register()


@pytest.fixture(scope="module")
def truth(golden):
    names = [f"{case}.{what}" for case in CASES for what in ("input_ids", "attention_mask", "logits")]
    names += ["image.image_mask", "generate.input_ids", "generate.sequences", "full.loss"]
    with safe_open(golden / "deepseek_v41_tiny" / "golden.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in names}


@pytest.fixture(scope="module")
def float32(tiny, tmp_path_factory):
    target = tmp_path_factory.mktemp("float32") / "tiny"
    assert convert_deepseek_v41.main([str(tiny), str(target), "--dtype", "float32"]) == 0
    return target


CASES = ("full", "padded", "long", "image")


def load(folder, **options):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def assert_golden_logits(model, truth):
    for case in CASES:
        mask = truth[f"{case}.attention_mask"]
        images = {"image_mask": truth["image.image_mask"].bool()} if case == "image" else {}
        with torch.no_grad():
            logits = model(truth[f"{case}.input_ids"], attention_mask=mask, use_cache=False, **images).logits
        assert (logits - truth[f"{case}.logits"])[mask.bool()].abs().max() < 1e-4, case


@pytest.mark.parametrize("kind", ["tiny", "converted", "float32"])
def test_logits_equal_the_golden_ones(request, truth, kind):
    """The release itself, its quantized conversion and its dequantized conversion are loaded."""
    model = load(request.getfixturevalue(kind), dtype=torch.float32)
    assert (type(model).__name__, type(model.config).__name__) == ("EngramForCausalLM", "EngramConfig")
    tables = [tensor for memory in model.model.memories().values() for tensor in memory.table.parameters()]
    assert all(tensor.requires_grad == (model.config.engram_table_dtype is None) for tensor in tables)
    assert_golden_logits(model, truth)


@pytest.mark.parametrize("residency", ["resident", "mapped"])
def test_tables_have_the_requested_residency(tiny, truth, tmp_path, residency):
    """This includes the release's own shards; another save takes the tables out of them."""
    model = load(tiny, dtype=torch.float32, engram_residency=residency)
    assert all(memory.table.is_resident == (residency == "resident") for memory in model.model.memories().values())
    assert_golden_logits(model, truth)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "engram_tables.json").exists() == (residency == "mapped")
    assert_golden_logits(load(tmp_path, dtype=torch.float32), truth)


def test_model_with_memory_generates_and_learns_as_the_oracle(truth, float32):
    """Greedy continuation, loss, and decoding in chunks across every boundary are compared, with the memory."""
    model = load(float32, dtype=torch.float32)
    prompt = truth["generate.input_ids"]
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
    )
    assert torch.equal(written, truth["generate.sequences"])
    ids = truth["full.input_ids"]
    with torch.no_grad():
        assert abs(model(ids, labels=ids).loss - truth["full.loss"]) < 1e-5
        # The models are in float64: caches are rounded in steps, and on some processors float32 noise shows as a step.
        model.double().set_experts_implementation("eager")
        for size in (1, 2, 3, 7):
            cache, logits = None, []
            for chunk in ids.split(size, 1):
                output = model(chunk, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits)
            assert (torch.cat(logits, 1) - truth["full.logits"]).abs().max() < 1e-4, size


def test_all_gradients_equal_the_oracle(golden, tiny, tmp_path):
    """All 144 gradients of the oracle are found by the converter's own table; dequantized tables are trained, too."""
    options = ["--dtype", "float32", "--dequantize-tables"]
    assert convert_deepseek_v41.main([str(tiny), str(tmp_path / "out"), *options]) == 0
    model = load(tmp_path / "out").train()
    with safe_open(golden / "deepseek_v41_tiny" / "golden.safetensors", "pt") as file:
        ids, prefix = file.get_tensor("full.input_ids"), "full.gradients."
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
        expected = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    model(ids, labels=ids, use_cache=False).loss.backward()
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    places = {part.name: (mapping, part) for mapping in map_tensors(DEEPSEEK_V41, config) for part in mapping.weights}
    parameters = dict(model.named_parameters())
    for name, gradient in expected.items():
        mapping, part = places[name]
        ours = parameters[mapping.ours].grad
        ours = ours if part.expert is None else ours[part.expert]
        rows = mapping.part_shape[0]
        error = (ours[part.part * rows : (part.part + 1) * rows] - gradient).abs().max()
        assert error <= 1e-3 * gradient.abs().max(), name
    assert len(expected) == 144


def test_release_and_its_conversion_are_equal(tiny, converted):
    direct, through = load(tiny, dtype=torch.bfloat16), load(converted, dtype=torch.bfloat16)
    ours, theirs = through.state_dict(), direct.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in ours)
    assert direct.config.to_dict().keys() == through.config.to_dict().keys()


@pytest.mark.parametrize("kind", ["tiny", "converted"])
def test_saves_as_an_ordinary_model(request, truth, tmp_path, kind):
    load(request.getfixturevalue(kind), dtype=torch.float32).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "engram"
    assert_golden_logits(load(tmp_path), truth)


def test_first_layers_have_the_streams_of_the_whole_model(golden, tiny, tmp_path):
    assert convert_deepseek_v41.main([str(tiny), str(tmp_path / "out"), "--layers", "5", "--dtype", "float32"]) == 0
    model = load(tmp_path / "out")
    with safe_open(golden / "deepseek_v41_tiny" / "golden.safetensors", "pt") as file:
        ids, expected = file.get_tensor("long.input_ids"), file.get_tensor("long.layers.4.streams")
    seen = []
    model.model.layers[4].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    assert (seen[0] - expected).abs().max() < 1e-4


def test_saved_model_exports_to_the_values_of_the_release(tiny, converted, tmp_path):
    """The model is loaded, saved, and exported with the conversion's record; the logits are the release's again."""
    load(tiny, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    arguments = [str(tmp_path / "saved"), str(tmp_path / "back"), "--record", str(converted)]
    assert export_deepseek_v41.main(arguments) == 0
    original, back = (
        load(tiny, dtype=torch.float32).state_dict(),
        load(tmp_path / "back", dtype=torch.float32).state_dict(),
    )
    assert all(torch.equal(original[name].float(), back[name].float()) for name in original)


def test_converted_tokenizer_has_the_chat_template(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜></think>"


def test_config_of_the_release_is_read(tiny):
    config = AutoConfig.from_pretrained(tiny)
    assert isinstance(config, DeepseekV41Config)
    assert config.engram_layer_ids == [1, 4] and config.text_config.num_hidden_layers == 9


def test_tensor_missing_from_a_shard_is_named(tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    gone = "model-00004-of-00014.safetensors"
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != gone}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=r"lacks the weights of 'model\.layers\.2\."):
        AutoModelForCausalLM.from_pretrained(folder)


def test_another_tokenizer_is_refused(tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<｜User｜>", "ａ"), encoding="utf-8")
    with pytest.raises(ValueError, match="884"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_key_mapping_agrees_with_the_tensor_table(tiny):
    """Every upstream name, passed through transformers' renamings and converters, becomes the name in the table."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = upstream_conversions(DEEPSEEK_V41)
    renamings = [item for item in conversions if isinstance(item, WeightRenaming)]
    converters = [item for item in conversions if isinstance(item, WeightConverter)]
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    seen = set()
    for mapping in map_tensors(DEEPSEEK_V41, config):
        for tensor in mapping.weights:
            renamed, _ = rename_source_key(tensor.name, renamings, converters)
            assert renamed == mapping.ours, tensor.name
            seen.add(tensor.name)
    weights = {name for name in read_checkpoint(tiny).tensors if not name.endswith(".scale")}
    assert seen == weights


@pytest.mark.parametrize("saved_again", [False, True])
def test_dequantized_folder_needs_no_installed_package(truth, float32, tmp_path, saved_again):
    """The folder runs as remote code in a process that cannot import the package: it contains the backbone's code,
    too.
    """
    folder = tmp_path if saved_again else float32
    if saved_again:
        load(float32, dtype=torch.float32).save_pretrained(folder)
    script = f"""
import sys
sys.modules["engram_hf"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
with torch.no_grad():
    print(model(torch.tensor({truth["full.input_ids"].tolist()!r})).logits[:, -1, 7].tolist())
"""
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert (printed - truth["full.logits"][:, -1, 7]).abs().max() < 1e-4
