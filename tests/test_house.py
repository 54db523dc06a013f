"""The structure of the package: imports between files, public names, and the tensors of a checkpoint."""

import ast
import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from tiny_backbones import build
from version_matrix import constraints_files

import engram_hf

pytestmark = pytest.mark.any_version

ROOT = Path(engram_hf.__file__).parent

# Flat files are uploaded to the Hub beside the weights. A file imports only files that stand before it in its family.
FAMILIES = [
    [
        "safetensors_engram",
        "table_format_engram",
        "table_engram",
        "hashing_engram",
        "configuration_engram",
        "row_sources_engram",
        "loading_engram",
        "saving_engram",
        "prefetch_engram",
        "cache_engram",
        "layer_engram",
        "modeling_engram",
        # The files below are not uploaded, and no file above imports them; only the first one goes with models that
        # read images.
        "multimodal_engram",
        "claiming_engram",
        "claimed_saving_engram",
        "plain_config_engram",
        "backbone_engram",
        "adding_engram",
        "table_writer_engram",
        "table_check_engram",
        "card_engram",
    ],
    [
        "fields_deepseek_v41",
        "configuration_vision_deepseek_v41",
        "configuration_deepseek_v41",
        "cache_deepseek_v41",
        "modeling_deepseek_v41",
        "draft_deepseek_v41",
        "drafting_deepseek_v41",
        "causal_lm_deepseek_v41",
        "vision_deepseek_v41",
        "multimodal_deepseek_v41",
        "image_processing_deepseek_v41",
        "processing_deepseek_v41",
    ],
    ["auto_deepseek_v41"],
]
# Every user of remote code has these packages.
INSTALLED_WITH_TRANSFORMERS = {"torch", "transformers", "safetensors", "numpy", "tokenizers", "huggingface_hub"}
# A flat file may import these, but must work without them.
OPTIONAL = {"PIL", "accelerate", "psutil"}
ROOMS_THAT_ARE_NOT_INSTALLED = {"tests", "benchmarks", "examples", "experiments", "docs"}


def flat_files() -> list[Path]:
    return sorted(path for path in ROOT.glob("*.py") if path.stem not in ("__init__", "setup"))


def installed_files() -> list[Path]:
    rooms = [path for path in ROOT.iterdir() if (path / "__init__.py").is_file()]
    return flat_files() + [path for room in rooms for path in sorted(room.rglob("*.py"))]


def imports(path: Path) -> list[tuple[int, str]]:
    """Return every import of a file, including those in functions: the number of leading dots, and the module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.level, name) for name in names]
    return found


def setup_arguments() -> dict:
    (call,) = (node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if _is_setup(node))
    return {word.arg: ast.literal_eval(word.value) for word in call.keywords if _is_literal(word.value)}


def _is_setup(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", None) == "setup"


def _is_literal(node: ast.AST) -> bool:
    return not any(isinstance(part, (ast.Call, ast.Name)) for part in ast.walk(node))


# --- arrows


def test_every_flat_file_has_a_place_in_its_family():
    assert sorted(path.stem for path in flat_files()) == sorted(name for family in FAMILIES for name in family)


@pytest.mark.parametrize("path", flat_files(), ids=lambda path: path.stem)
def test_flat_files_import_one_way(path):
    """`trust_remote_code` follows imports of the form `from .name import`; a circle would not load."""
    engram, backbone, entry = FAMILIES
    # The backbone imports only the memory's errors and number formats, and the memory imports nothing of the backbone;
    # the remote code of a V4.1 model combines both in the file where it begins.
    families = engram, [*engram[:3], *backbone], [*engram, *backbone, *entry]
    family = next(family for family in families if path.stem in family)
    before = family[: family.index(path.stem)]
    relative = [("." * level + module) for level, module in imports(path) if level]
    assert [name for name in relative if name not in {f".{module}" for module in before}] == []


@pytest.mark.parametrize("path", flat_files(), ids=lambda path: path.stem)
def test_flat_files_need_only_what_transformers_installs(path):
    packages = {module.partition(".")[0] for level, module in imports(path) if not level}
    assert packages - INSTALLED_WITH_TRANSFORMERS - OPTIONAL - sys.stdlib_module_names == set()


def uploaded_files(name: str) -> set[str]:
    """Return the flat files that are pushed with a model of this modeling file."""
    found, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting += [module for level, module in imports(ROOT / f"{name}.py") if level and module not in found]
    return found


def test_pushed_model_has_the_files_that_running_it_needs():
    """A user who passes `trust_remote_code=True` should be able to read all of it."""
    engram = FAMILIES[0]
    assert uploaded_files("modeling_engram") == set(engram[: engram.index("modeling_engram") + 1])
    assert engram.index("modeling_engram") < 12


def test_tokenizer_imports_nothing_of_the_model():
    """Its two files work alone beside a saved tokenizer."""
    for path in sorted((ROOT / "tokenization").glob("*.py")):
        assert [module for level, module in imports(path) if level > 1 or module.startswith("engram_hf")] == []


def test_installed_files_import_only_installed_files():
    for path in installed_files():
        names = {module.removeprefix("engram_hf.").partition(".")[0] for level, module in imports(path) if level != 1}
        assert names & ROOMS_THAT_ARE_NOT_INSTALLED == set(), path


# --- what is public


PUBLIC_NAMES = {
    "engram_hf": [
        "EngramConfig",
        "EngramError",
        "EngramForCausalLM",
        "EngramForConditionalGeneration",
        "EngramModel",
        "EngramTokenizer",
        "load_with_tables",
    ],
    "engram_hf.display": [
        "TableSummary",
        "model_html",
        "print_memory_summary",
        "register",
        "summarize_tables",
        "tokenizer_html",
    ],
    "engram_hf.other_models": ["load_with_tables"],
    "engram_hf.analysis": [
        "AttentionFreed",
        "Edit",
        "EffectiveDepth",
        "Estimate",
        "Gates",
        "LayerSimilarity",
        "MemoryWorth",
        "Off",
        "Reading",
        "Report",
        "RowTraffic",
        "Windows",
        "compare_layers",
        "cut_windows",
        "draw",
        "draw_depths",
        "measure_attention",
        "measure_depth",
        "measure_gates",
        "measure_traffic",
        "measure_worth",
        "read_text",
        "reading_page",
    ],
    "engram_hf.tokenization": ["CompressionSummary", "EngramTokenizer"],
    "engram_hf.training": [
        "EngramRowsConfig",
        "EngramTrainingCallback",
        "FactReport",
        "RowScan",
        "SparseAdamW",
        "enable_sparse_gradients",
        "engram_parameter_groups",
        "export_model",
        "forget_facts",
        "hotswap_rows",
        "load_shards",
        "save_shards",
        "scan_rows",
        "shard_tables",
        "tables_on_meta",
        "write_facts",
    ],
}
# Users run `python -m engram_hf.convert_scripts.NAME`; their shell scripts pass these options.
SCRIPTS = {
    "convert_deepseek_v41": "source target --dequantize-tables --dry-run --dtype --json --layers --link-tables --revision --verify-only",
    "convert_engram_demo": (
        "state backbone target --engram-vocab-size --json --layer-ids --max-ngram-size --pad-token-id --seed --tokenizer"
    ),
    "export_deepseek_v41": "source target --dry-run --json --record --verify-only",
}


@pytest.mark.parametrize("package", PUBLIC_NAMES)
def test_public_names(package):
    """Adding or removing a public name is a decision: this list is edited by hand."""
    module = importlib.import_module(package)
    assert module.__all__ == PUBLIC_NAMES[package]
    assert all(hasattr(module, name) for name in module.__all__)


def test_scripts_that_can_be_run():
    scripts = {path.stem for path in (ROOT / "convert_scripts").glob("*.py") if "def main(" in path.read_text()}
    assert scripts == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_of_a_script(script):
    parser = importlib.import_module(f"engram_hf.convert_scripts.{script}").build_parser()
    options = {(action.option_strings or [action.dest])[-1] for action in parser._actions}
    assert options - {"--help"} == set(SCRIPTS[script].split())


HASH = {"model.hashing.multipliers", "model.hashing.primes"}
BACKBONE = {
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    *(
        f"model.layers.{layer}.{name}.weight"
        for layer in range(3)
        for name in (
            "input_layernorm",
            "mlp.down_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "post_attention_layernorm",
            "self_attn.k_proj",
            "self_attn.o_proj",
            "self_attn.q_proj",
            "self_attn.v_proj",
        )
    ),
}
MEMORY = {
    "paper": {
        "table.weight": (408, 8),
        "kv_proj.weight": (64, 32),
        "kv_proj.bias": (64,),
        "q_norm.weight": (1, 32),
        "k_norm.weight": (1, 32),
        "conv.weight": (32, 1, 4),
        "conv_norm.weight": (1, 32),
    },
    "v4.1": {
        "table.weight": (630, 8),
        "kv_proj.weight": (64, 48),
        "q_norm.weight": (1, 32),
        "k_norm.weight": (1, 32),
    },
}


@pytest.mark.parametrize("variant", MEMORY)
def test_checkpoint_tensor_names(variant):
    """A renamed tensor makes every existing checkpoint unreadable: this list changes with the format version only."""
    state = build("llama", variant).state_dict()
    memory = {f"model.layers.{layer}.engram.{name}" for layer in (1, 2) for name in MEMORY[variant]}
    assert set(state) == HASH | BACKBONE | memory
    shapes = {name: tuple(state[f"model.layers.1.engram.{name}"].shape) for name in MEMORY[variant]}
    assert shapes == MEMORY[variant]


def test_checkpoint_tensor_names_of_compression_and_float8_rows():
    state = build("llama", engram_compressed_vocab_size=100).state_dict()
    assert "model.hashing.token_map" in state
    state = build("llama", "v4.1", engram_table_dtype="float8_e4m3fn", engram_head_dim=32).state_dict()
    assert {name for name in state if name.endswith("table.scale")} == {
        "model.layers.1.engram.table.scale",
        "model.layers.2.engram.table.scale",
    }


# --- the package


def test_every_room_is_in_the_wheel():
    rooms = sorted(path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file())
    packages = setup_arguments()["packages"]
    expected = ["engram_hf", *("engram_cli" if room == "cli" else f"engram_hf.{room}" for room in rooms)]
    assert sorted(packages) == sorted(expected)
    assert not {name.partition(".")[2] for name in packages} & ROOMS_THAT_ARE_NOT_INSTALLED


def test_versions_of_transformers_agree():
    """The oldest tested version is the one that setup.py allows; the newest is that of `constraints.txt`."""
    tested = list(constraints_files())
    (allowed,) = (need for need in setup_arguments()["install_requires"] if need.startswith("transformers"))
    assert f"{allowed.partition('>=')[2]}.0" == tested[0]
    assert constraints_files()[tested[-1]].samefile(ROOT / "constraints.txt")
    assert f"OLDEST := {tested[0]}" in (ROOT / "Makefile").read_text()
    first, last = (version.rpartition(".")[0] for version in (tested[0], tested[-1]))
    assert f"transformers {first} to {last}" in (ROOT / "README.md").read_text()


def test_version_is_the_same_everywhere():
    """`setup.py` reads it from the package; the other places are written by hand."""
    number = re.escape(engram_hf.__version__)
    assert re.search(rf"^version: {number}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert re.search(rf"^## {number}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_types_are_in_the_wheel():
    assert setup_arguments()["package_data"]["engram_hf"][0] == "py.typed"
    assert (ROOT / "py.typed").read_bytes() == b""


def test_python_versions_agree():
    """The oldest version is written in three places and must parse every installed file."""
    oldest = (3, 11)
    arguments = setup_arguments()
    assert arguments["python_requires"] == importlib.metadata.metadata("engram-hf")["Requires-Python"] == ">=3.11"
    prefix = "Programming Language :: Python :: 3."
    named = [int(line.removeprefix(prefix)) for line in arguments["classifiers"] if line.startswith(prefix)]
    assert named == [11, 12, 13]
    assert 'target-version = "py311"' in (ROOT / "pyproject.toml").read_text()
    for path in installed_files():
        ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=oldest)
    assert sys.version_info >= oldest
