"""The generated model card agrees with the model, and never replaces a card written by hand."""

import json
import re

import pytest
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi, ModelCard, ModelCardData
from tiny_backbones import build, engram_config

from engram_hf import EngramConfig, EngramForCausalLM, EngramModel
from engram_hf.card_engram import model_card, write_model_card
from engram_hf.convert_scripts.deepseek_v41_config import to_engram_fields
from engram_hf.vision_deepseek_v41 import DeepseekV41VisionModel

PLACEHOLDER = "This is the model card of a model. This model card has been automatically generated."


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Run a Hub that the client in this process uses."""
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        yield server


def placeholder(tmp_path, **metadata):
    """Return a card as transformers saves it for a repository without one."""
    path = tmp_path / "README.md"
    data = ModelCardData(library_name="transformers", **metadata)
    ModelCard.from_template(data, model_description=PLACEHOLDER).save(path)
    return path


def test_only_the_package_writes_a_card():
    """Imports run one way: the models define a hook, and the package sets it."""
    assert EngramForCausalLM.write_model_card is EngramModel.write_model_card is write_model_card


def fact(card: str, name: str) -> str:
    return re.search(rf"^\| {name} \| (.*) \|$", card, re.MULTILINE)[1]


def number(text: str) -> float:
    """Return the last amount of a line, such as `28.4 kB` or `1.2 M parameters`."""
    value, prefix = re.findall(r"([\d.]+) ([kMGBT]?)", text)[-1]
    return float(value) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}[prefix]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v4"])
@pytest.mark.parametrize("table_dtype", [None, "float8_e4m3fn"])
def test_card_amounts_equal_those_of_the_model(name, table_dtype):
    model = build(name, "v4.1", engram_table_dtype=table_dtype, engram_head_dim=32)
    card = model_card(model.config, "me/model")
    tables = [table for memory in model.model.memories().values() for table in memory.table.parameters()]
    assert number(fact(card, "Tables")) == pytest.approx(sum(table.nbytes for table in tables), rel=5e-3)
    parameters = {name: p.numel() for name, p in model.named_parameters() if not name.endswith("table.scale")}
    in_memory = sum(count for name, count in parameters.items() if ".engram." in name)
    amount, share = fact(card, "Memory").split(" parameters, ")
    assert number(amount) == pytest.approx(in_memory, rel=5e-3)
    assert float(share.split("%")[0]) == pytest.approx(100 * in_memory / sum(parameters.values()), abs=0.051)
    assert number(fact(card, "Backbone")) == pytest.approx(sum(parameters.values()) - in_memory, rel=5e-3)


def test_card_front_matter_has_the_given_fields():
    card = ModelCard(model_card(engram_config("llama"), "me/model", license="mit", tags=["mine"], language="en"))
    assert card.data.to_dict() == {
        "language": "en",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["engram", "llama", "mine"],
        "widget": [{"text": "The capital of France is"}],
    }
    assert "`mit`." in card.text


def test_hub_accepts_the_card(hub):
    card = model_card(engram_config("mixtral"), "me/model", license="apache-2.0")
    hub.create("me/model")
    api = HfApi(endpoint=hub.endpoint, token=TOKEN)
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="me/model")
    assert hub.read("me/model", "README.md").decode() == card


def test_card_names_a_backbone_on_the_hub_with_its_licence(hub, tmp_path):
    repository = hub.create("org/backbone")
    repository.commit("main", "card", {"README.md": hub.store(b"---\nlicense: apache-2.0\n---\n# Backbone\n")})
    config = engram_config("mixtral")
    config.text_config.name_or_path = "org/backbone"
    path = placeholder(tmp_path)
    write_model_card(path, config, "me/model")
    data = ModelCard.load(path).data
    assert (data.base_model, data.license) == ("org/backbone", "apache-2.0")


@pytest.mark.parametrize("name", ["", "org/unknown", "/srv/someone/private", "./private", "private"])
def test_card_does_not_name_a_backbone_that_is_not_on_the_hub(hub, tmp_path, name):
    config = engram_config("mixtral")
    config.text_config.name_or_path = name
    path = placeholder(tmp_path)
    write_model_card(path, config, "me/model")
    card = ModelCard.load(path)
    assert card.data.base_model is None and card.data.license is None
    assert PLACEHOLDER not in card.text
    assert not name or name not in str(card)


@pytest.mark.parametrize("text", ["# Mine\n", "---\ntags: [a]\n---\n# Mine\n", "---\r\nlicense: mit\r\n---\r\n# Mine"])
def test_card_written_by_hand_is_kept(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_bytes(text.encode())
    write_model_card(path, engram_config("mixtral"), "me/model")
    assert path.read_bytes() == text.encode()


def test_card_mentions_images_and_drafts(golden):
    release = json.loads((golden / "deepseek_v41_tiny_vl" / "config.json").read_text(encoding="utf-8"))
    config = EngramConfig.from_dict(to_engram_fields(release, "float32", dequantize_tables=True))
    card = model_card(config, "me/v41")
    (images,) = re.findall(r"^\| Images \| (.*) \|$", card, re.MULTILINE)
    (drafts,) = re.findall(r"^\| Drafts \| (.*) \|$", card, re.MULTILINE)
    count = sum(p.numel() for p in DeepseekV41VisionModel(config.text_config.vision_config).parameters())
    assert images.startswith(f"a tower of 3 layers, {count / 1000:.3g} k parameters") and "AutoProcessor" in images
    assert drafts == "3 draft layers, 5 tokens a pass; `generate(..., use_mtp=True)`"
    config.text_config.vision_config, config.text_config.num_nextn_predict_layers = None, 0
    assert "| Images |" not in model_card(config) and "| Drafts |" not in model_card(config)
