"""Write `engine_facts.json`: what the loaders of vLLM and SGLang require of a DeepSeek-V4.1 checkpoint.

    pip download --no-deps vllm==0.33.0 sglang==0.5.23
    python tests/convert_scripts/read_engine_wheels.py vllm-0.33.0-*.whl sglang-0.5.23-*.whl

The requirements are read from the sources in the wheels; nothing is installed. The script extracts the functions that
rename tensors from each wheel and calls them with the names of the miniature release. Everything else in the table is
backed by the snippets below, which must occur in the sources.
"""

import argparse
import ast
import dataclasses
import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

HERE = Path(__file__).parent
RELEASE = HERE.parent / "golden" / "deepseek_v41_tiny"
# Dtypes are spelled as in safetensors' headers; shapes are in config fields, and `columns` counts the concatenated
# rows.
TABLE = {
    "layers.N.engram.embed.weight": {"dtype": "F8_E4M3", "shape": ["engram_num_embeddings", "engram_head_dim"]},
    "layers.N.engram.embed.scale": {"dtype": "F8_E8M0", "shape": ["engram_num_embeddings", "engram_head_dim // 32"]},
    "layers.N.engram.q_weight": {"shape": ["hc_mult", "hidden_size"]},
    "layers.N.engram.k_weight": {"shape": ["hc_mult", "hidden_size"]},
    "layers.N.engram.wkv.weight": {"dtype": "F8_E4M3", "shape": ["hidden_size * (hc_mult + 1)", "columns"]},
}
# These attributes of the config are not in config.json: the engine sets them itself.
OWN_ATTRIBUTES = {"hc_pre_from_prev_sublayer", "q_head_norm", "vision_n_layers", "vision_downsample_ratio"}


class Wheel:
    """The Python sources in a wheel."""

    def __init__(self, path: Path):
        self.path, self.archive = path, zipfile.ZipFile(path)

    def source(self, name: str) -> str:
        return self.archive.read(name).decode()

    def require(self, name: str, *snippets: str) -> None:
        """Fail unless a file contains these snippets, whatever its line breaks."""
        text = "".join(self.source(name).split())
        missing = [snippet for snippet in snippets if "".join(snippet.split()) not in text]
        if missing:
            raise SystemExit(f"{name} of {self.path.name} no longer has {missing}; read it again.")

    def node(self, name: str, wanted: str) -> ast.AST:
        """Return the function, class or assignment `wanted` of a file."""
        for node in ast.walk(ast.parse(self.source(name))):
            target = getattr(node, "target", None) or next(iter(getattr(node, "targets", [])), None)
            if wanted in (getattr(node, "name", None), getattr(target, "id", None)):
                return node
        raise SystemExit(f"{name} of {self.path.name} has no {wanted}; read it again.")

    def config_fields(self, *names: str) -> list[str]:
        """Return the fields of the model's config that these files read."""
        read = re.compile(r"(?<![\w.])(?:self\.)?config\.(\w+)")
        found = {field for name in names for field in read.findall(self.source(name))}
        return sorted(field for field in found - OWN_ATTRIBUTES if not field.endswith("_config"))

    def describe(self, files: list[str], **facts: object) -> dict[str, object]:
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return {"wheel": self.path.name, "sha256": digest, "files": files, **facts}


def run(*nodes: ast.AST, **namespace: object) -> dict[str, object]:
    """Execute these definitions without their annotations, and return the names they define."""
    module = ast.parse("from __future__ import annotations")
    for node in nodes:
        node.decorator_list = [] if isinstance(node, ast.FunctionDef) else node.decorator_list
        module.body.append(node)
    exec(compile(ast.fix_missing_locations(module), "<wheel>", "exec"), namespace)
    return namespace


def read_vllm(wheel: Wheel, names: list[str]) -> dict[str, object]:
    folder = "vllm/models/deepseek_v41/"
    model, engram = folder + "nvidia/model.py", folder + "common/engram.py"
    utils, config = "vllm/model_executor/models/utils.py", "vllm/config/engram.py"
    runner, registry = "vllm/v1/worker/gpu_model_runner.py", "vllm/model_executor/models/registry.py"
    backend = "vllm/model_executor/models/transformers/base.py"
    mapper_class = wheel.node(utils, "WeightsMapper")
    mapper_class.decorator_list = [ast.Name("dataclass", ast.Load())]
    kept = [node for node in mapper_class.body if isinstance(node, ast.AnnAssign)]
    mapper_class.body = [
        *kept,
        *(node for node in mapper_class.body if getattr(node, "name", "").startswith("_map_name_w")),
    ]
    tools = {"re": re, "dataclass": dataclasses.dataclass, "field": field, "Mapping": Mapping}
    made = run(mapper_class, wheel.node(model, "_make_deepseek_v4_weights_mapper"), **tools)
    mapper = made["_make_deepseek_v4_weights_mapper"]("fp4", "weight_scale")
    stacked = ast.literal_eval(wheel.node(model, "stacked_params_mapping").value)

    def rename(name: str) -> str | None:
        mapped = mapper._map_name_with_shard(name)
        if mapped is None:
            return None
        for parameter, weight, _ in stacked if ".experts." not in name else []:
            if weight in mapped[0]:
                return mapped[0].replace(weight, parameter)
        return mapped[0]

    wheel.require(
        engram,
        "torch.empty(self.hc_mult, self.dim, dtype=torch.bfloat16)",
        "n_hash_cols * layout.head_dim, self.dim * (self.hc_mult + 1)",
        "self.weight = storage[:weight_bytes].view(torch.float8_e4m3fn).view(-1, dim)",
        "if loaded_weight.dtype == torch.float8_e8m0fnu: loaded_weight = loaded_weight.view(torch.uint8)",
    )
    wheel.require(
        runner,
        'lookback_depth = getattr(self.model, "token_lookback_depth", 0)',
        "pos = starts - np.arange(1, depth + 1)",
        "valid = (pos >= 0) & (pos < num_prompt)",
    )
    wheel.require(runner, "self.max_num_reqs, lookback_depth, dtype=torch.int32", "buf.np.fill(-1)")
    wheel.require(backend, "use_cache=False, position_ids=positions, return_dict=False,")
    wheel.require(backend, "self.text_config._attn_implementation = VLLM_ATTN_IMPL", "return AutoModel.from_config(")
    wheel.require(registry, '"DeepseekV41ForCausalLM": (', "transformers_model_cls.is_backend_compatible()")
    wheel.require("vllm/model_executor/model_loader/weight_utils.py", "def filter_duplicate_safetensors_files(")
    fields = [node.target.id for node in wheel.node(config, "EngramConfig").body if isinstance(node, ast.AnnAssign)]
    return wheel.describe(
        [model, engram, utils, config, runner, registry, backend],
        architecture="DeepseekV41ForCausalLM",
        model_type="deepseek_v41",
        options=fields,
        lookback={
            "attribute": "token_lookback_depth",
            "keyword": "lookback_token_ids",
            "dtype": "int32",
            "unknown": -1,
            "order": "nearest first",
            "positions": "of the prompt alone",
        },
        config=wheel.config_fields(model, engram, folder + "attention.py", folder + "compressor.py"),
        tensors=TABLE,
        names={name: rename(name) for name in names},
    )


def read_sglang(wheel: Wheel, names: list[str]) -> dict[str, object]:
    model, engram = "sglang/srt/models/deepseek_v4.py", "sglang/srt/layers/engram.py"
    config, environment = "sglang/srt/configs/deepseek_v41.py", "sglang/srt/environ.py"
    rename = run(wheel.node(model, "remap_weight_name_to_dpsk_hf_format"))["remap_weight_name_to_dpsk_hf_format"]
    wheel.require(
        engram,
        "torch.empty(self.rows, dim, dtype=torch.float8_e4m3fn)",
        "self.rows, dim // FP8_BLOCK_SIZE, dtype=torch.float8_e8m0fnu",
        "n_hash_cols * layout.head_dim, dim * (hc_mult + 1)",
        "self.q_weight = nn.Parameter(torch.ones(hc_mult, dim), requires_grad=False)",
    )
    wheel.require(
        config, 'if values.get("architectures") == ["DeepseekV41ForCausalLM"]:', 'model_type = "deepseek_v41"'
    )
    wheel.require("sglang/srt/model_loader/loader.py", "filter_duplicate_safetensors_files")
    wheel.require(model, 'if name.startswith("mtp"):')
    return wheel.describe(
        [model, engram, config, environment],
        architecture="DeepseekV41ForCausalLM",
        model_type="deepseek_v41",
        options=sorted(set(re.findall(r"SGLANG_\w*ENGRAM\w*", wheel.source(environment)))),
        config=wheel.config_fields(model, engram, "sglang/srt/layers/attention/dsv4/dsv41_sparse.py"),
        tensors=TABLE,
        names={name: None if name.startswith("mtp.") else rename(name) for name in names},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vllm", type=Path)
    parser.add_argument("sglang", type=Path)
    given = parser.parse_args()
    index = json.loads((RELEASE / "model.safetensors.index.json").read_text())
    names = sorted({re.sub(r"\b\d+\b", "N", name) for name in index["weight_map"]})
    # Renaming parses layer numbers, so a number is passed in and replaced by N in the result.
    renamed = {
        "vllm": read_vllm(Wheel(given.vllm), [name.replace("N", "7") for name in names]),
        "sglang": read_sglang(Wheel(given.sglang), [name.replace("N", "7") for name in names]),
    }
    for facts in renamed.values():
        facts["names"] = {
            name: target and re.sub(r"\b7\b", "N", target)
            for name, target in zip(names, facts["names"].values(), strict=True)
        }
    (HERE / "engine_facts.json").write_text(json.dumps(renamed, indent=2) + "\n")


if __name__ == "__main__":
    main()
