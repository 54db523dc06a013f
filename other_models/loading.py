"""`load_with_tables`: a model of another project whose tables stay in their files, or in page-locked host memory."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..cache_engram import RuntimeSubclass
from ..loading_engram import Checkpoint, resolver
from ..row_sources_engram import MappedRows, PinnedRows
from ..safetensors_engram import EngramError, find_weights
from .kinds import kind_of
from .lookahead import Lookahead
from .row_embedding import EmbeddingOfRows, TableReader, TableRows, mount
from .saving import save_with_tables
from .stored_tables import (
    CheckpointNames,
    StoredTensor,
    open_tables_folder,
    recorded_digests,
    require_same_files,
    require_same_ids,
    unexpected_keys,
)

RESIDENCIES = ("mapped", "pinned", "resident")
# These arguments of `from_pretrained` say where files come from, and how the Hub is reached.
_REACH = ("cache_dir", "force_download", "proxies", "token", "local_files_only")
_ORIGIN = (*_REACH, "revision", "subfolder")
# A config's loader would accept these arguments although they have no meaning for it.
_NOT_OF_THE_CONFIG = ("dtype", "torch_dtype", "quantization_config", "device_map")
# With these arguments, weights come from another source, or are split between devices.
_REFUSED = {
    "state_dict": "tables are read from safetensors files",
    "gguf_file": "tables are read from safetensors files",
    "tp_plan": "a table that is not a parameter cannot be sharded",
    "tp_size": "a table that is not a parameter cannot be sharded",
    "distributed_config": "a table that is not a parameter cannot be sharded",
}
_READ_ROWS = 65_536


def load_with_tables(
    auto_class: type,
    name_or_path: str,
    *,
    residency: str = "mapped",
    tables: Collection[str] | None = None,
    tables_from: str | None = None,
    **from_pretrained_arguments: Any,
) -> Any:
    """Load a model of another project without its lookup tables, whose rows are read from the checkpoint.

    The files of the checkpoint are used unchanged, whether a table is one tensor in them or many shards. Logits,
    generation and all gradients except the tables' are those of the stock model, bit for bit. Tables have no gradient.

    Args:
        auto_class: `AutoModelForCausalLM`, another Auto class, or a model class.
        name_or_path: a folder or Hub id, as for `from_pretrained`.
        residency: `"mapped"` reads rows from the files; `"pinned"` from a copy in page-locked host memory, which a GPU
            reads directly; `"resident"` is the stock model with its tables as parameters.
        tables: names of the embedding modules to read in this way; None for those of known kinds.
        tables_from: a folder or Hub id with the tables, instead of the checkpoint itself.
        from_pretrained_arguments: as for `from_pretrained`.

    Returns:
        The result of `from_pretrained`: a model, which is an instance of the class that the config names.

    Raises:
        EngramError: there is no such table, it cannot be read by ids alone, or files and model do not belong together.
            The message says what to do.
    """
    if residency not in RESIDENCIES:
        raise EngramError(f"residency is {residency!r}; it must be one of {', '.join(map(repr, RESIDENCIES))}.")
    if residency == "pinned" and not torch.cuda.is_available():
        raise EngramError(
            "residency='pinned' keeps tables in page-locked memory for a GPU, but there is none; use 'mapped'."
        )
    for argument, reason in _REFUSED.items():
        if from_pretrained_arguments.get(argument) is not None:
            raise EngramError(f"{argument} cannot be given here: {reason}; leave it out, or use from_pretrained.")
    if isinstance(tables, str):
        tables = [tables]
    checkpoint = Checkpoint(name_or_path, from_pretrained_arguments)
    plan = TablePlan(checkpoint, residency, tables, tables_from)
    if residency == "resident":
        loaded = auto_class.from_pretrained(checkpoint.name_or_path, **checkpoint.kwargs)
        plan.fill(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded
    model_class, arguments = _class_and_arguments(auto_class, checkpoint)
    return ModelWithTables.extending(model_class).from_pretrained(
        checkpoint.name_or_path, table_plan=plan, **arguments
    )


def _class_and_arguments(auto_class: type, checkpoint: Checkpoint) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    """Return the model class that an Auto class would choose, and the arguments for its `from_pretrained`."""
    given = dict(checkpoint.kwargs)
    if issubclass(auto_class, PreTrainedModel):
        return auto_class, given
    config, code_revision = given.pop("config", None), given.pop("code_revision", None)
    if not isinstance(config, PreTrainedConfig):
        kept = {name: given.pop(name) for name in _NOT_OF_THE_CONFIG if name in given}
        origin = {name: given[name] for name in (*_ORIGIN, "trust_remote_code") if name in given}
        source = checkpoint.name_or_path if config is None else config
        config, given = AutoConfig.from_pretrained(
            source, return_unused_kwargs=True, code_revision=code_revision, **{**given, **origin}
        )
        given = {**given, **origin, **kept}
    # A model without memory shows the class, of transformers or of remote code.
    options = {"code_revision": code_revision or given.get("revision")} if _has_remote_code(config, given) else {}
    with torch.device("meta"):
        sample = auto_class.from_config(config, trust_remote_code=given.get("trust_remote_code"), **options)
    if type(sample.config) is not type(config):
        quantization = getattr(config, "quantization_config", None)
        config = config.get_text_config()
        if quantization is not None:
            config.quantization_config = quantization
    return type(sample), {**given, "config": config}


def _has_remote_code(config: PreTrainedConfig, given: Mapping[str, Any]) -> bool:
    return bool(getattr(config, "auto_map", None)) and bool(given.get("trust_remote_code"))


@dataclass
class TablePlan:
    """The tables of a model to load, and where each is read from.

    Args:
        checkpoint: the checkpoint of the model.
        residency: one of [`RESIDENCIES`].
        tables: names of modules; None for known ones.
        tables_from: a folder or Hub id with the tables; None for the checkpoint's own.
    """

    checkpoint: Checkpoint
    residency: str
    tables: Collection[str] | None
    tables_from: str | None

    def mount(self, model: PreTrainedModel, dtype_plan: Mapping[str, torch.dtype]) -> None:
        """Replace the tables of a model without weights by readers of their files.

        Args:
            model: a new model on the meta device, prepared by its quantizer.
            dtype_plan: parameters that are loaded in another dtype than the model's.
        """
        modules, ignored = self._find_modules(model), []
        for name, stored in self._find_tensors(model, modules).items():
            module = modules[name]
            readers = {leaf: self._reader(f"{name}.{leaf}", module, leaf, stored[leaf], dtype_plan) for leaf in stored}
            module.__class__ = EmbeddingOfRows.extending(type(module))
            for leaf, reader in readers.items():
                mount(module, leaf, reader)
                ignored.append(unexpected_keys(reader.stored.name, f"{name}.{leaf}"))
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
        _hook_lookahead(model, modules)

    def fill(self, model: PreTrainedModel) -> None:
        """Read the tables of a loaded stock model from another place, a few rows at a time."""
        modules = self._find_modules(model)
        if self.tables_from is None:
            return
        for name, stored in self._find_tensors(model, modules).items():
            for leaf, tensor in stored.items():
                parameter = getattr(modules[name], leaf)
                if parameter.device.type == "meta":
                    raise EngramError(
                        f"{name} is off-loaded by the device map, so tables_from cannot fill it; use residency='mapped'."
                    )
                rows = MappedRows(tensor.as_bytes())
                with torch.no_grad():
                    for first in range(0, rows.num_rows, _READ_ROWS):
                        stop = min(first + _READ_ROWS, rows.num_rows)
                        raw, _ = rows.read(first, stop)
                        parameter[first:stop].copy_(raw.view(tensor.dtype).view(stop - first, *tensor.row_shape))

    def _find_modules(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        modules = dict(model.named_modules())
        embeddings = [name for name, module in modules.items() if _is_embedding(module)]
        known = [name for name in embeddings if kind_of(name)]
        found = known if self.tables is None else list(self.tables)
        if not found:
            raise EngramError(
                f"{type(model).__name__} has no table of a kind that is known; name its modules by tables=[...] (its embeddings are "
                f"{', '.join(embeddings) or 'none'}), or use from_pretrained."
            )
        for name in found:
            if name not in embeddings:
                what = "is no embedding" if name in modules else "is no module of the model"
                raise EngramError(f"{name!r} {what}; the embeddings are {', '.join(embeddings) or 'none'}.")
            _require_untied(model, name, modules[name])
        return {name: modules[name] for name in found}

    def _find_tensors(
        self, model: PreTrainedModel, modules: Mapping[str, nn.Module]
    ) -> dict[str, dict[str, StoredTensor]]:
        own, kwargs = str(self.checkpoint.name_or_path), self.checkpoint.kwargs
        resolve, variant = resolver(own, kwargs), kwargs.get("variant")
        names, resolve_tables = CheckpointNames.of_checkpoint(own, resolve, variant), resolve
        own_names = names
        if self.tables_from is not None:
            reach = {name: kwargs[name] for name in _REACH if name in kwargs}
            names, resolve_tables = open_tables_folder(str(self.tables_from), reach)
            other = resolve_tables("config.json")
            for name in modules:
                require_same_ids(kind_of(name), model.config.to_dict(), other, names.where)
        found = {}
        for name, module in modules.items():
            rows = _parameters_with_rows(module)
            small = [key for key, _ in module.named_parameters(recurse=False) if key not in rows]
            found[name] = names.table(name, rows, [*small, *(key for key, _ in module.named_buffers(recurse=False))])
            for leaf in small:
                _require_small(own_names, names, name, leaf)
            if names is not own_names:
                _require_same_dtype(found[name], own_names, name, names.where)
        stems = {names.stem_of(name) for name in modules}
        if len(stems) < len(modules):
            raise EngramError(f"{names.where} has tensors of {len(stems)} tables for {len(modules)}; complete it.")
        self._digests = [
            recorded_digests(find_weights(resolve, variant)[1]),
            recorded_digests(find_weights(resolve_tables, None)[1]) if names is not own_names else {},
        ]
        return found

    def _reader(
        self, name: str, module: nn.Module, leaf: str, stored: StoredTensor, dtype_plan: Mapping[str, torch.dtype]
    ) -> TableReader:
        parameter = getattr(module, leaf)
        if parameter.device.type != "meta":
            raise EngramError(
                f"{name} was allocated before it could be left in its files (DeepSpeed ZeRO-3 does that); use from_pretrained."
            )
        source = (PinnedRows if self.residency == "pinned" else TableRows)(stored.as_bytes())
        for recorded in self._digests:
            require_same_files(recorded, source.digests, str(self.checkpoint.name_or_path))
        planned = next((dtype for key, dtype in dtype_plan.items() if key in name), parameter.dtype)
        wanted = planned if parameter.is_floating_point() else parameter.dtype
        reader = TableReader(name, stored, source, ())
        return reader.cast(wanted)


def _is_embedding(module: nn.Module) -> bool:
    """Return whether a module is an embedding of torch, or one of transformers that quantizes its rows."""
    return isinstance(module, nn.Embedding) or (
        type(getattr(module, "num_embeddings", None)) is int and type(getattr(module, "embedding_dim", None)) is int
    )


def _parameters_with_rows(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of an embedding that have a row for every id."""
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1 and parameter.shape[0] == module.num_embeddings
    }


def _require_untied(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    head = model.get_output_embeddings()
    tied = {part.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for part in pair}
    if name in tied or (head is not None and head is not module and _weight(head) is _weight(module) is not None):
        raise EngramError(
            f"{name!r} is tied to the head or to another module, which read all of it; only a table that is read by ids alone can be "
            "left in its files."
        )


def _weight(module: nn.Module) -> torch.Tensor | None:
    return dict(module.named_parameters(recurse=False)).get("weight")


def _require_small(own: CheckpointNames, names: CheckpointNames, name: str, leaf: str) -> None:
    """Refuse a checkpoint that lacks a tensor needed to interpret rows, and tables from another place whose tensor
    differs.
    """
    loaded, beside = own.small(name, leaf), names.small(name, leaf)
    if loaded is None:
        raise EngramError(
            f"{own.where} has no tensor {name}.{leaf}, without which its rows mean nothing; complete it."
        )
    if beside is not None and beside != loaded:
        raise EngramError(
            f"The tables of {names.where} have another {leaf} of {name} than the checkpoint {own.where}; take the tables that belong to "
            "the model."
        )


def _require_same_dtype(found: Mapping[str, StoredTensor], own: CheckpointNames, name: str, where: str) -> None:
    """Compare tables from another place with those of the checkpoint itself, if it has any."""
    stem = own.stem_of(name)
    stored = {} if stem is None else {key: own.tensor(key)[1].dtype for key in own.files if key.startswith(f"{stem}.")}
    for leaf, tensor in found.items():
        theirs = tensor.parts[0][1].dtype
        ours = {dtype for key, dtype in stored.items() if key.endswith(f".{leaf}")}
        if ours and ours != {theirs}:
            raise EngramError(
                f"The table {name} of {where} is stored as {theirs}, but the checkpoint has it as {', '.join(sorted(ours))}; take "
                "tables of the model's own dtype."
            )


def _hook_lookahead(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> None:
    """Fetch hashed rows when the first decoder layer begins."""
    by_layers: dict[str, list[str]] = {}
    for name in modules:
        kind, (stack, found, _) = kind_of(name), name.partition(".layers.")
        if kind is not None and kind.is_hashed and found:
            by_layers.setdefault(stack, []).append(name)
    for stack, names in by_layers.items():
        parents = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        hook = Lookahead(parents, names[0].rpartition(".")[2])
        model.get_submodule(f"{stack}.layers.0").register_forward_pre_hook(hook, with_kwargs=True)


class ModelWithTables(RuntimeSubclass):
    """A mix-in before a model class of another project, for a model whose tables are not parameters."""

    @classmethod
    def _members(cls, base: type) -> dict[str, Any]:
        # Configs, pipelines and conversions identify the class by its name.
        return {"__module__": base.__module__, "__name__": base.__name__, "__qualname__": base.__qualname__}

    def __init__(self, *args: Any, table_plan: TablePlan | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.table_plan = table_plan

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        # transformers calls this on a model that is built and quantized, before it makes a device map or loads anything.
        dtype_plan = super()._get_dtype_plan(dtype)
        if self.table_plan is not None:
            plan, self.table_plan = self.table_plan, None
            plan.mount(self, dtype_plan)
        return dtype_plan

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, variant: str | None = None, **kwargs):
        """Save the model as in transformers; the tables are linked or copied, so that the stock `from_pretrained`
        loads the result.

        Raises:
            EngramError: `push_to_hub` is passed, which would upload before the tables are there; call
                `model.push_to_hub`.
        """
        if push_to_hub:
            raise EngramError(
                "save_pretrained(push_to_hub=True) would leave the tables out; use model.push_to_hub(repo_id)."
            )
        save_with_tables(self, super().save_pretrained, save_directory, *args, variant=variant, **kwargs)
