"""`EngramConfig`: its rules, its defaults for a backbone, and the fields that are saved."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_backbones import BACKBONES, LAYER_IDS, engram_config
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    BartConfig,
    DeepseekV3Config,
    Gemma3Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
)

import engram_hf
from engram_hf import EngramConfig, EngramForCausalLM
from engram_hf.configuration_engram import FORMAT_VERSION
from engram_hf.plain_config_engram import VARIANTS, parameters_beside_table, read_plain_config

FIXTURES = Path(__file__).parent / "fixtures"


def small(**fields) -> EngramConfig:
    text_config = fields.pop("text_config", None) or BACKBONES["mixtral"]()
    size = {"engram_layer_ids": [1], "engram_n_heads": 2, "engram_head_dim": 8, "engram_vocab_size": 97}
    return EngramConfig(text_config=text_config, **{**size, **fields})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return 100 ids that compress to 74: every lower-case letter has its capital."""
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = ["<pad>", "<eos>", *letters, *map(str.upper, letters), *(f"#{i}" for i in range(46))]
    words = models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>")


# --- rules


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engram_layer_ids": []}, "engram_layer_ids is empty; name at least one"),
        ({"engram_max_ngram_size": 10**9}, "n-grams have 2 to 64 tokens"),
        ({"engram_n_heads": 10**9}, "it must be positive, and at most 1024"),
        ({"engram_norm_eps": float("inf")}, "it must be positive, and finite"),
        ({"engram_layer_ids": [-1]}, r"engram_layer_ids \[-1\] must lie in 0\.\.2"),
        ({"engram_layer_ids": [1, 3]}, r"engram_layer_ids \[1, 3\] must lie in 0\.\.2"),
        ({"engram_layer_ids": [1, 1]}, r"engram_layer_ids \[1, 1\] names a layer twice"),
        ({"engram_max_ngram_size": 1}, "engram_max_ngram_size is 1, .* give 2 or more"),
        ({"engram_n_heads": 0}, "engram_n_heads is 0; it must be positive"),
        ({"engram_head_dim": 0}, "engram_head_dim is 0; it must be positive"),
        ({"engram_vocab_size": 0}, "engram_vocab_size is 0; it must be positive"),
        ({"engram_vocab_size": [97, -1]}, r"engram_vocab_size is \[97, -1\]; it must be positive"),
        ({"engram_vocab_size": [97]}, r"engram_vocab_size lists 1 .* orders 2\.\.3 need 2; give one number"),
        ({"engram_pad_token_id": 128}, "engram_pad_token_id is 128, outside the vocabulary of 128 ids; name"),
        ({"engram_pad_token_id": -1}, "engram_pad_token_id is -1, outside the vocabulary"),
        ({"engram_compressed_vocab_size": 0}, r"engram_compressed_vocab_size is 0 .* 1\.\.128"),
        ({"engram_compressed_vocab_size": 129}, "129 .* take it from EngramTokenizer.compressed_vocab_size"),
        ({"engram_compressed_vocab_size": 127, "engram_added_tokens": 2}, r"127 \(\+ 2 added\)"),
        ({"engram_added_tokens": -1}, "engram_added_tokens is -1; it must be 0 or more"),
        ({"engram_seed": -1}, "engram_seed is -1; it must be 0 or more"),
        ({"engram_conv_kernel_size": -1}, "engram_conv_kernel_size is -1; .* 0 for no convolution"),
        ({"engram_norm_eps": 0.0}, "engram_norm_eps is 0.0; it must be positive"),
        ({"engram_conv_norm_eps": 0.0}, "engram_conv_norm_eps is 0.0; it must be positive"),
        ({"engram_zero_gate_sign": -1}, r"engram_zero_gate_sign is -1; it must be 0 \(the demo\) or 1"),
        ({"engram_table_dtype": "float8_e5m2"}, r"engram_table_dtype is 'float8_e5m2'; it must be None"),
        ({"engram_table_dtype": "float8_e4m3fn"}, "engram_head_dim is 8, .* make it a multiple of 32"),
        ({"engram_num_embeddings": [410]}, r"engram_num_embeddings is \[410\], .* sum to \[408\] rows; leave it out"),
        ({"engram_layer_id": [1]}, "no field engram_layer_id; did you mean engram_layer_ids"),
        ({"engram_zzz": 1}, "no field engram_zzz; the fields are engram_layer_ids, "),
        (
            {"engram_format_version": FORMAT_VERSION + 1},
            f"engram_format_version is {FORMAT_VERSION + 1}, .* upgrade engram-hf",
        ),
        ({"engram_format_version": FORMAT_VERSION + 1, "engram_new": 1}, "upgrade engram-hf"),
        ({"text_config": {"model_type": "nosuch"}}, "model_type 'nosuch', .* AutoConfig.register"),
        ({"text_config": {"hidden_size": 8}}, "model_type None, .* name a registered decoder"),
        ({"text_config": T5Config()}, r"encoder-decoder \(t5\); give the config of a decoder-only model"),
        ({"text_config": BartConfig()}, r"encoder-decoder \(bart\)"),
        ({"text_config": Gemma3Config()}, r"\(gemma3\) has no vocab_size; .* config.get_text_config"),
        ({"text_config": ViTConfig()}, r"\(vit\) has no vocab_size"),
    ],
)
def test_validation_names_the_field_and_the_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"engram_layer_ids": (2, 0)},
        {"engram_max_ngram_size": 2},
        {"engram_vocab_size": [97, 50]},
        {"engram_compressed_vocab_size": 128},
        {"engram_compressed_vocab_size": 126, "engram_added_tokens": 2},
        {"engram_pad_token_id": 127},
        {"engram_conv_kernel_size": 0},
        {"engram_conv_kernel_size": 1},
        {"engram_norm_eps": 1e-20},
        {"engram_table_dtype": "float8_e4m3fn", "engram_head_dim": 32},
        {"engram_num_embeddings": (408,)},
        {"engram_layer_ids": [0], "engram_vocab_size": 1},
    ],
)
def test_config_accepts_values_at_the_bounds(fields):
    small(**fields)


def test_wrong_type_names_the_field():
    with pytest.raises(Exception, match="engram_n_heads"):
        small(engram_n_heads="8")


# --- layout


def test_rows_follow_from_the_primes():
    config = small(engram_layer_ids=[2, 0], engram_vocab_size=[5, 7])
    assert config.primes == [[[5, 7], [11, 13]], [[17, 19], [23, 29]]]
    assert config.engram_num_embeddings == [36, 88]
    assert config.bucket_counts == (5, 7)
    assert config.engram_layer_ids == [2, 0]
    assert config.engram_row_width == 2 * 2 * 8


def test_default_bucket_count_is_five_per_token():
    assert small(engram_vocab_size=None).engram_vocab_size == 5 * 128


def test_streams_are_the_hyper_connections_of_the_backbone():
    assert small().engram_streams == 1
    assert engram_config("deepseek_v4").engram_streams == 4


# --- for_backbone


def test_for_backbone_gives_the_numbers_of_the_v41_release():
    """The 768M rows of the release are only counted; nothing is allocated."""
    backbone = DeepseekV3Config(num_hidden_layers=40, hidden_size=5120, vocab_size=129_280)
    config = EngramConfig.for_backbone(
        backbone, layer_ids=[1, 14], variant="v4.1", engram_compressed_vocab_size=99_092, engram_pad_token_id=2
    )
    assert config.engram_num_embeddings == [384_006_168, 384_016_682]
    assert config.engram_row_width == 6144
    assert (config.engram_vocab_size, config.engram_max_ngram_size, config.engram_n_heads) == (16_000_000, 4, 8)
    assert (config.engram_bias, config.engram_conv_kernel_size, config.engram_zero_gate_sign) == (False, 0, 1)
    assert config.engram_norm_eps == 1e-20


def test_for_backbone_gives_the_numbers_of_the_papers_demo():
    backbone = LlamaConfig(num_hidden_layers=30, hidden_size=1024, vocab_size=129_280)
    config = EngramConfig.for_backbone(backbone, layer_ids=[1, 15], engram_compressed_vocab_size=99_092)
    assert config.engram_num_embeddings == [10_344_164, 10_348_242]
    assert config.engram_row_width == 1024
    assert (config.engram_bias, config.engram_conv_kernel_size, config.engram_norm_eps) == (True, 4, None)


def test_upstream_config_gives_the_same_layout(golden):
    """The fields keep the names of the release's config.json, so they can be passed unchanged."""
    upstream = json.loads((golden / "deepseek_v41_tiny" / "config.json").read_text())["text_config"]
    fields = {key: value for key, value in upstream.items() if key.startswith("engram_")}
    backbone = LlamaConfig(num_hidden_layers=9, hidden_size=64, num_attention_heads=4, vocab_size=1536)
    config = EngramConfig(text_config=backbone, **VARIANTS["v4.1"] | fields)
    assert config.engram_num_embeddings == upstream["engram_num_embeddings"]
    assert {key: getattr(config, key) for key in fields} == fields


@pytest.mark.parametrize("layer_ids", [[1], [0, 2]])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [5000, 100_003, 40_000_000])
def test_for_backbone_meets_the_requested_rows_on_average(rows, variant, layer_ids):
    config = EngramConfig.for_backbone(BACKBONES["llama"](), layer_ids=layer_ids, variant=variant, rows=rows)
    assert sum(config.engram_num_embeddings) / len(layer_ids) == pytest.approx(rows, rel=0.01)


def test_for_backbone_chooses_the_nearest_size():
    """With one order and one head, the number of rows is a prime."""
    sizes = [
        EngramConfig.for_backbone(
            BACKBONES["llama"](), layer_ids=[1], rows=rows, engram_max_ngram_size=2, engram_n_heads=1
        ).engram_num_embeddings[0]
        for rows in (2, 23, 24, 25, 27, 28, 29, 97)
    ]
    assert sizes == [2, 23, 23, 23, 29, 29, 29, 97]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v4"])
@pytest.mark.parametrize("fraction", [0.4, 0.75])
def test_memory_fraction_is_the_share_of_a_built_model(name, variant, fraction):
    config = EngramConfig.for_backbone(
        BACKBONES[name](),
        layer_ids=LAYER_IDS,
        variant=variant,
        memory_fraction=fraction,
        engram_n_heads=2,
        engram_head_dim=4,
    )
    model = EngramForCausalLM(config)
    memory = sum(p.numel() for layer in model.model.memories().values() for p in layer.parameters())
    assert memory / model.num_parameters() == pytest.approx(fraction, rel=0.01)
    beside = memory - sum(config.engram_num_embeddings) * config.engram_head_dim
    assert beside == 2 * parameters_beside_table(config)


def test_tokenizer_sets_compressed_size_and_pad(tokenizer):
    config = EngramConfig.for_backbone(BACKBONES["llama"](), tokenizer, layer_ids=[1])
    assert (config.engram_compressed_vocab_size, config.engram_pad_token_id) == (74, 0)
    explicit = EngramConfig.for_backbone(
        BACKBONES["llama"](), tokenizer, layer_ids=[1], engram_compressed_vocab_size=80, engram_pad_token_id=9
    )
    assert (explicit.engram_compressed_vocab_size, explicit.engram_pad_token_id) == (80, 9)


def test_token_map_serves_as_well_as_a_tokenizer():
    config = EngramConfig.for_backbone(
        LlamaConfig(pad_token_id=None, eos_token_id=[7, 8]), torch.arange(60).repeat(2), layer_ids=[1], rows=5000
    )
    assert (config.engram_compressed_vocab_size, config.engram_pad_token_id) == (60, 7)


def test_without_a_tokenizer_nothing_is_compressed():
    config = EngramConfig.for_backbone(LlamaConfig(pad_token_id=11), layer_ids=[1])
    assert (config.engram_compressed_vocab_size, config.engram_pad_token_id) == (None, 11)
    bare = LlamaConfig(pad_token_id=None, eos_token_id=None, bos_token_id=None)
    assert EngramConfig.for_backbone(bare, layer_ids=[1]).engram_pad_token_id == 0


def test_memory_of_a_composite_model_follows_its_text_config():
    gemma = Gemma3Config(text_config={"num_hidden_layers": 4})
    config = EngramConfig.for_backbone(gemma, layer_ids=[3])
    assert config.backbone is gemma and config.text_config.text_config is gemma.text_config
    assert EngramConfig.for_backbone(gemma.text_config, layer_ids=[3]).text_config.model_type == "gemma3_text"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "v4"}, "variant is 'v4'; it must be one of 'paper', 'v4.1'"),
        ({"rows": 5000, "memory_fraction": 0.5}, "Give one of rows, memory_fraction and engram_vocab_size"),
        ({"rows": 5000, "engram_vocab_size": 97}, "Give one of rows"),
        ({"memory_fraction": 0.0}, "memory_fraction is 0.0; it must lie between 0 and 1"),
        ({"memory_fraction": 1.0}, "memory_fraction is 1.0"),
        ({"memory_fraction": 0.01}, "memory_fraction 0.01 is used up by the projections .* raise it"),
        ({"rows": 100}, "would have 100 rows each, .* 16 heads in 1 layers sum to at least 381"),
        ({"rows": -5}, "would have -5 rows each, .* raise rows"),
        ({"layer_ids": [3]}, r"engram_layer_ids \[3\] must lie in 0\.\.2"),
        ({"rows": 5000, "engram_n_heads": 0}, "engram_n_heads is 0; it must be positive"),
        ({"tokenizer": torch.arange(129)}, "has 129 ids, .* vocab_size is 128; resize the backbone"),
        ({"text_config": "mistralai/Mixtral-8x7B"}, "text_config is a str; .* AutoConfig.from_pretrained"),
        ({"text_config": T5Config()}, "encoder-decoder"),
        ({"engram_heads": 2}, "no field engram_heads; did you mean engram_n_heads"),
    ],
)
def test_for_backbone_refuses_bad_arguments(arguments, message):
    arguments = {"text_config": BACKBONES["llama"](), "layer_ids": [1], **arguments}
    with pytest.raises(ValueError, match=message):
        EngramConfig.for_backbone(**arguments)


# --- saving


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", BACKBONES)
def test_save_and_load(name, variant, tmp_path):
    config = engram_config(name, variant, engram_seed=3, engram_compressed_vocab_size=100, engram_added_tokens=2)
    config.save_pretrained(tmp_path)
    for loaded in (EngramConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is EngramConfig
        assert type(loaded.text_config) is type(config.text_config)
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert loaded.primes == config.primes


def test_saved_config_names_the_backbones_repository_but_no_folder(tmp_path):
    for name, is_kept in (("org/backbone", True), (str(tmp_path), False), (str(tmp_path / "gone"), False)):
        config = small()
        config.text_config.name_or_path = name
        config.save_pretrained(tmp_path)
        assert EngramConfig.from_pretrained(tmp_path).text_config.name_or_path == (name if is_kept else "")
        assert (name in (tmp_path / "config.json").read_text()) == is_kept


def test_saved_config_holds_every_field_even_at_its_default(tmp_path):
    """A later release may change a default; a saved model must keep the value it was built with."""
    EngramConfig(text_config=MixtralConfig()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    fields = [name for name in EngramConfig.__annotations__ if name.startswith("engram_")]
    assert [name for name in fields if name not in saved] == []
    assert saved["engram_format_version"] == FORMAT_VERSION


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_every_released_format_still_loads(version):
    path = FIXTURES / f"config_version_{version}.json"
    config = EngramConfig.from_json_file(path)
    assert type(config.text_config) is LlamaConfig
    saved = json.loads(path.read_text())
    text = saved.pop("text_config")
    assert {name: getattr(config, name) for name in saved if name.startswith("engram_")} == {
        name: value for name, value in saved.items() if name.startswith("engram_")
    }
    assert {name: getattr(config.text_config, name) for name in text} == text


def test_config_of_a_later_version_is_warned_of_once(tmp_path, library_log):
    """That of an earlier version, or of one that did not say, is fine; what loads is equal either way, and saves its own version."""
    config = small()
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["engram_hf_version"] == engram_hf.__version__
    major, minor = map(int, re.findall(r"\d+", engram_hf.__version__)[:2])
    later = {f"{major + 1}.0.0", f"{major}.{minor + 1}.0", f"{major}.{minor + 1}.0.dev1"}
    for version in [*later, "0.1.0", f"{major}.{minor}.99", engram_hf.__version__, "", None, 3]:
        (tmp_path / "config.json").write_text(json.dumps({**fields, "engram_hf_version": version}))
        told = len(library_log)
        for load in (EngramConfig.from_pretrained, AutoConfig.from_pretrained, read_plain_config, read_plain_config):
            loaded = load(tmp_path)
            assert load is read_plain_config or loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert ["upgrade engram-hf" in message for message in library_log[told:]] == [True] * (version in later), (
            version
        )
    del fields["engram_hf_version"]
    assert EngramConfig.from_dict(fields).to_diff_dict() == config.to_diff_dict()


# --- beside the backbone's config


def test_attributes_of_the_backbone_are_forwarded_both_ways():
    config = small()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (128, 32, 3)
    assert config.get_text_config() is config.get_text_config(decoder=True) is config.text_config
    config.use_cache = False
    config.output_router_logits = True
    assert (config.text_config.use_cache, config.text_config.output_router_logits) == (False, True)
    assert config.eos_token_id == 2
    assert not hasattr(small(text_config=BACKBONES["llama"]()), "router_aux_loss_coef")


def test_forwarded_attributes_are_saved_once():
    saved = small(text_config=LlamaConfig(num_hidden_layers=3, vocab_size=77, tie_word_embeddings=True)).to_dict()
    assert "vocab_size" not in saved and "num_hidden_layers" not in saved
    assert saved["text_config"]["vocab_size"] == 77
    assert EngramConfig(**saved).tie_word_embeddings is True


def test_attention_implementation_of_the_backbone_is_kept():
    text_config = BACKBONES["mixtral"]()
    text_config._attn_implementation = "eager"
    assert small(text_config=text_config).text_config._attn_implementation == "eager"
    asked = small(text_config=text_config, attn_implementation="sdpa")
    assert asked._attn_implementation == asked.text_config._attn_implementation == "sdpa"
