"""Row adapters as a method of PEFT: `EngramRowsConfig` is to rows of memory what `LoraConfig` is to linear layers.

    found = scan_rows(texts, tokenizer, model)
    model = get_peft_model(model, EngramRowsConfig(rows=found))

An adapter holds rows, their numbers and the parameters of the model's hash: under another hash the same numbers mean other
n-grams, so another model refuses it.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, PeftType, mixed_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn

from ..safetensors_engram import EngramError
from ..saving_engram import require_settled
from ..table_format_engram import covers_token_map, describe_table
from .memory import find_engram, memory_of_layer
from .row_adapters import RowsLayer, combine, rows_digest

if TYPE_CHECKING:
    from ..modeling_engram import EngramModel

NAME = "ENGRAM_ROWS"
# These are the members of a hash besides the token map, as in a table file (docs/engram-table-format.md).
_OF_THE_HASH = ("primes", "multipliers", "vocab_size", "pad_id")
_LOADING = """
## Loading

This adapter holds rows of Engram memory. PEFT knows the method once `engram_hf` is imported:

```python
import engram_hf
from peft import PeftModel

model = PeftModel.from_pretrained(model, "this/adapter")
```
"""


@dataclass
class EngramRowsConfig(PeftConfig):
    """Train differences for some rows of the memory's tables; everything else is frozen.

    Args:
        rows: the rows to train by decoder layer, int64 `[n]` without repetitions: the result of [`scan_rows`]. They are
            saved with the weights, not in `adapter_config.json`.
        memory: by decoder layer, the number of rows, their digest, the layers
            with rows, and the parameters of the hash. It is filled in when the adapter
            is added to a model, and compared when the adapter is loaded.
        facts: the facts that [`write_facts`] wrote, one dictionary each.
        task_type: as in PEFT; a causal language model if not given.
    """

    rows: Mapping[int, torch.Tensor] | None = field(default=None, compare=False, repr=False)
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: list[dict[str, Any]] | None = None
    target_modules: list[str] | None = field(default=None, metadata={"help": "The tables of the layers with rows."})

    def __post_init__(self) -> None:
        self.peft_type = getattr(PeftType, NAME)
        if self.task_type is None:
            self.task_type = "CAUSAL_LM"
        super().__post_init__()
        if not isinstance(self.memory, dict) or not isinstance(self.rows, Mapping | None):
            raise EngramError(
                "adapter_config.json does not say which memory this adapter is for; restore the file that save_pretrained "
                "wrote."
            )
        layers = list(self.memory) if self.rows is None else [str(layer) for layer in self.rows]
        self.target_modules = [f"{layer}.engram.table" for layer in layers]

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `adapter_config.json`: all fields except the row numbers."""
        rows, self.rows = self.rows, None
        try:
            return super().to_dict()
        finally:
            self.rows = rows

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs
    ) -> "EngramRowsConfig":
        """Load a config as in PEFT; a folder is refused if `engram facts write` was killed at the very end of writing
        it.
        """
        require_settled(Path(pretrained_model_name_or_path, subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save the config as in PEFT; the README beside it says what to import before the adapter is loaded."""
        super().save_pretrained(save_directory, **kwargs)
        readme = Path(save_directory) / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
        if _LOADING not in text:
            readme.write_text(text + _LOADING, encoding="utf-8")


class EngramRowsModel(BaseTuner):
    """Puts row adapters around the tables of a model; PEFT creates it from an [`EngramRowsConfig`]."""

    prefix = "engram_rows_"
    tuner_layer_cls = RowsLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # A config names its tables itself.

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter with the rows of several adapters: the weighted sum of their differences.

        Args:
            adapters: names of adapters of this model.
            weights: one weight for each adapter.
            adapter_name: name of the new adapter, which is not activated.

        Raises:
            ValueError: a name is unknown or taken, or there is not one weight for each.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters or len(adapters) != len(weights):
            raise EngramError(
                f"Adapters {list(adapters)} with weights {list(weights)} cannot be added up: give one weight for each of "
                f"{list(self.peft_config)}."
            )
        if adapter_name in self.peft_config:
            raise EngramError(f"There is an adapter {adapter_name!r} already; choose another name.")
        sums = {layer: combine(parts) for layer, parts in self._parts(adapters, weights).items()}
        facts = [fact for name in adapters for fact in self.peft_config[name].facts or []]
        config = EngramRowsConfig(rows={layer: rows for layer, (rows, _) in sums.items()}, facts=facts or None)
        config.task_type = self.peft_config[adapters[0]].task_type
        config.base_model_name_or_path = self.peft_config[adapters[0]].base_model_name_or_path
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            raise
        for layer, (_, delta) in sums.items():
            self._layer(layer).engram_rows_adapter[adapter_name].delta.data.copy_(delta)

    def _layer(self, layer: int) -> RowsLayer:
        return memory_of_layer(find_engram(self.model), layer).table

    def _parts(self, adapters: Sequence[str], weights: Sequence[float]) -> dict[int, list[tuple]]:
        parts: dict[int, list[tuple]] = {}
        for layer in find_engram(self.model).memories():
            table = self._layer(layer)
            held = getattr(table, "engram_rows_adapter", {})
            found = [(held[name], weight) for name, weight in zip(adapters, weights, strict=True) if name in held]
            if found:
                parts[layer] = found
        return parts

    def _prepare_model(self, peft_config: EngramRowsConfig, model: nn.Module) -> None:
        engram = find_engram(model)
        if peft_config.rows is not None:
            peft_config.rows = {layer: _checked_rows(engram, layer, ids) for layer, ids in peft_config.rows.items()}
            layers = sorted(peft_config.rows)
            peft_config.memory = {
                str(layer): describe_memory(engram, layer, ids.numel())
                | {"rows_sha256": rows_digest(ids), "layers": layers}
                for layer, ids in peft_config.rows.items()
            }
        if not peft_config.memory:
            raise EngramError("EngramRowsConfig has no rows; take them from scan_rows(data, tokenizer, model).")
        for layer, described in peft_config.memory.items():
            require_same_memory(engram, layer, described)
        layers = sorted(map(int, peft_config.memory))
        for described in peft_config.memory.values():
            # PEFT ignores tensors without a place in the model, and does not warn.
            if described.get("layers", layers) != layers:
                raise EngramError(
                    f"adapter_config.json describes rows of the layers {layers}, but this adapter has rows of the layers "
                    f"{described['layers']}; restore the file that save_pretrained wrote."
                )

    def _create_and_replace(
        self,
        peft_config: EngramRowsConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        (layer,) = (layer for layer in peft_config.memory if f".{current_key}".endswith(f".{layer}.engram.table"))
        if not isinstance(target, RowsLayer):
            target = RowsLayer(target, next(parent.kv_proj.parameters()).device)
            setattr(parent, target_name, target)
        rows = None if peft_config.rows is None else peft_config.rows[int(layer)]
        described = peft_config.memory[layer]
        target.add_adapter(adapter_name, rows, described["rows"], described.get("rows_sha256"))
        target.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _check_merge_allowed(self) -> None:
        """Check all tables before the first one changes."""
        super()._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, RowsLayer):
                module.require_mergeable()


def hotswap_rows(model: PeftModel, model_name_or_path: str, adapter_name: str = "default", **kwargs: Any) -> None:
    """Replace a row adapter of a model by a saved one, as `peft.utils.hotswap.hotswap_adapter` does for LoRA.

    The adapter keeps its name and stays active or inactive, and neither the model nor its tables change. The number of rows may
    differ, and so may the layers.

    Args:
        model: a model with a row adapter `adapter_name`.
        model_name_or_path: folder or Hub id of the adapter.
        adapter_name: the adapter to replace.
        kwargs: as in `PeftModel.load_adapter`; without `is_trainable=True`, the new rows are frozen.

    Raises:
        ValueError: there is no such adapter, it is merged, or the saved one is for another memory. The model is unchanged.
    """
    if getattr(getattr(model, "peft_config", {}).get(adapter_name), "peft_type", None) != NAME:
        raise EngramError(
            f"There is no row adapter {adapter_name!r} to be replaced; load one first by PeftModel.from_pretrained or load_adapter."
        )
    tables = [module for module in model.modules() if isinstance(module, RowsLayer)]
    if any(adapter_name in table.merged_adapters for table in tables):
        raise EngramError(f"The adapter {adapter_name!r} is merged into the tables; call unmerge_adapter() first.")
    arriving = f"{adapter_name}-{secrets.token_hex(8)}"
    active, modes = list(model.base_model.active_adapters), [(module, module.training) for module in model.modules()]
    try:
        model.load_adapter(model_name_or_path, arriving, **kwargs)
    except BaseException:
        if arriving in model.peft_config:
            model.delete_adapter(arriving)
        raise
    finally:
        for module, mode in modes:
            module.training = mode
    for table in (module for module in model.modules() if isinstance(module, RowsLayer)):
        held = table.engram_rows_adapter
        if adapter_name in held:
            del held[adapter_name]
        if arriving in held:
            held[adapter_name] = held.pop(arriving)
    model.peft_config[adapter_name] = model.peft_config.pop(arriving)
    model.base_model.set_adapter(active, inference_mode=not kwargs.get("is_trainable", False))


def _checked_rows(engram: "EngramModel", layer: int, rows: torch.Tensor) -> torch.Tensor:
    """Return `rows` in ascending order."""
    num_rows = memory_of_layer(engram, layer).table.num_rows
    rows = torch.as_tensor(rows)
    distinct = torch.unique(rows)
    if rows.dtype != torch.int64 or rows.dim() != 1 or not 0 < distinct.numel() == rows.numel():
        raise EngramError(
            f"Rows of layer {layer} must be a non-empty int64 vector without repetitions, got "
            f"{rows.dtype} {list(rows.shape)} with {distinct.numel()} distinct rows; take them from scan_rows."
        )
    if distinct[0] < 0 or distinct[-1] >= num_rows:
        raise EngramError(
            f"Rows {int(distinct[0])} to {int(distinct[-1])} were given for layer {layer}, whose table has rows 0 to "
            f"{num_rows - 1}; take them from scan_rows of this very model."
        )
    return distinct


def describe_memory(engram: "EngramModel", layer: int, rows: int) -> dict[str, Any]:
    """Return the description of the memory that an adapter is for, with the adapter's number of rows in each layer, as
    JSON values.
    """
    width = memory_of_layer(engram, layer).table.width
    own = describe_table(engram.hashing, engram.hashing.layer_ids.index(layer), width=width, dtype="F32")
    described = {name: getattr(own, name) for name in (*_OF_THE_HASH, "token_map_sha256", "token_map_ids")}
    return {"rows": rows, "width": width, **described}


def require_same_memory(engram: "EngramModel", layer: str, described: dict[str, Any]) -> None:
    """Refuse an adapter whose row numbers mean other n-grams in this model.

    Args:
        engram: the model.
        layer: number of a decoder layer, as a string (a JSON key).
        described: the result of [`describe_memory`] at the adapter's creation.

    Raises:
        ValueError: the memory differs, or the description is damaged.
    """
    names = {"rows", "width", *_OF_THE_HASH, "token_map_sha256", "token_map_ids"}
    if not layer.isdecimal() or not isinstance(described, dict) or not names <= described.keys():
        raise EngramError(
            f"adapter_config.json does not say which memory layer {layer!r} of this adapter is for; restore the file that "
            "save_pretrained wrote."
        )
    if (
        type(described["rows"]) is not int
        or not 0 <= described["rows"] <= memory_of_layer(engram, int(layer)).table.num_rows
    ):
        raise EngramError(
            f"adapter_config.json says {described['rows']!r} rows of layer {layer}, which no table has; restore it."
        )
    own = describe_memory(engram, int(layer), described["rows"])
    for name in ("width", *_OF_THE_HASH):
        if own[name] != described[name]:
            raise EngramError(
                f"This row adapter is for a memory with the {name} {_short(described[name])} in layer {layer}, but this model "
                f"has {_short(own[name])}: its row numbers would be other n-grams. Load it onto the model it was trained on."
            )
    if not _same_token_map(engram, own, described):
        raise EngramError(
            f"This row adapter was trained with another token map than this model has (layer {layer}): its row numbers "
            "would be other n-grams. Use the tokenizer and the model it was trained with."
        )


def _same_token_map(engram: "EngramModel", own: dict[str, Any], described: dict[str, Any]) -> bool:
    """Return whether one token map begins with the other: tokens may have been added since."""
    if own["token_map_sha256"] == described["token_map_sha256"]:
        return True
    token_map, ids = engram.hashing.token_map, described["token_map_ids"]
    if token_map is None or type(ids) is not int:
        return False
    covered = _Covered(described["token_map_sha256"], ids)
    return covers_token_map(covered, token_map)  # The function reads only these two attributes.


@dataclass
class _Covered:
    token_map_sha256: str | None
    token_map_ids: int


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def register() -> None:
    """Register the method with PEFT, once a process."""
    if NAME in PeftType.__members__:
        return
    # PEFT registers methods of other packages only under names of its closed enumeration.
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    if not hasattr(PeftType, NAME):
        type.__setattr__(PeftType, NAME, member)
    register_peft_method(name=NAME.lower(), config_cls=EngramRowsConfig, model_cls=EngramRowsModel)
    # PEFT would only list the methods that its mixed model takes. Without this name, PEFT's own refusal stays.
    if (refuse := getattr(mixed_model, "_check_config_compatible", None)) is not None:
        mixed_model._check_config_compatible = partial(_refuse_rows_in_a_mixed_model, refuse)


def _refuse_rows_in_a_mixed_model(refuse: Callable[[PeftConfig], None], peft_config: PeftConfig) -> None:
    if isinstance(peft_config, EngramRowsConfig):
        raise EngramError(
            "PeftMixedModel takes a fixed list of methods, to which row adapters do not belong; put them beside another "
            'method by get_peft_model(peft_model.get_base_model(), EngramRowsConfig(rows=rows), adapter_name="corpus"), or a '
            "saved one by PeftModel.from_pretrained(peft_model.get_base_model(), folder); the result saves both."
        )
    refuse(peft_config)
