"""Engram memory for any decoder of transformers: the models with memory.

A model of a backbone's own class becomes an instance of a class that is made at run time, with memory in front of the
backbone's behaviour: its attributes, plans, losses and heads are its own. Listed decoder layers get a submodule
`engram` and run it on the residual streams before their own forward. Its inputs are computed once per forward, from
token ids alone, and passed as one keyword argument.

Shape letters: B batch, S positions, R positions that a look-back reaches, G residual streams, D hidden size, L Engram
layers, T hash heads of all orders.
"""

import dataclasses
import functools
import inspect
import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .cache_engram import EngramHistory, RuntimeSubclass, attach_history, begin_cache, lookback_reach, nothing_before
from .configuration_engram import FORMAT_VERSION, STAGED, EngramConfig, needs_package, remote_module
from .hashing_engram import NO_ID, Compaction, NgramHasher, as_token_map
from .layer_engram import (
    BESIDE,
    CARRIER,
    Carrier,
    EngramConv,
    EngramInputs,
    EngramMemory,
    EngramRMSNorm,
    add_memory_to_layer,
    decoder_layers,
    extend,
    name_base_model,
    require_extensible,
    within,
)
from .loading_engram import (
    Checkpoint,
    FoundTables,
    leave_tables_on_disk,
    renamings_of_version,
    require_memory,
    require_sizes,
    stored_dtype_of_hash,
)
from .prefetch_engram import Prefetcher
from .safetensors_engram import EngramError
from .saving_engram import (
    FolderWriter,
    complete_save,
    require_settled,
    save_tables,
    tables_by_reference,
)
from .table_engram import EngramTable

logger = logging.get_logger(f"transformers.{__name__}")

# The test suite passes with these minor versions of transformers.
TESTED_VERSIONS = ((5, 17), (5, 24))
# This is the cache's name as an argument and in outputs: transformers 5.24 renamed it.
CACHE_NAMES = ("cache", "past_key_values")
# An engine with its own cache passes these keywords to a call.
LOOKBACK_NAMES = ("lookback_token_ids", "lookback_conv_inputs", "engram_conv_inputs")
# This is the running save: its writer, and the variant of its weights.
_SAVE: ContextVar[tuple[FolderWriter, str | None] | None] = ContextVar("the save that runs", default=None)


def _warn_of_untested_version() -> None:
    found = tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2]))
    oldest, newest = TESTED_VERSIONS
    if not oldest <= found <= newest:
        tested = " to ".join(".".join(map(str, version)) for version in TESTED_VERSIONS)
        logger.warning_once(
            f"Engram was tested with transformers {tested}, not with {transformers.__version__}; it refuses what it "
            "cannot do right, and may need an update of engram-hf."
        )


class EngramPreTrainedModel(RuntimeSubclass, PreTrainedModel):
    """The common base of [`EngramModel`] and [`EngramForCausalLM`]: loading, initialization, saving and the token map."""

    config_class = EngramConfig
    # Called as `write_model_card(path, config, repo_id, token)` when a model is pushed; the package engram_hf sets it, and a
    # model that was loaded as remote code has the card that transformers writes.
    write_model_card: Callable[..., None] | None = None
    # This class puts all files of a save into a folder in one step; the package's class excludes other processes, too.
    folder_writer: type[FolderWriter] = FolderWriter
    _takes_image_mask: bool = False
    _runs_inside: bool = False
    # The package sets these too. They refuse backbones that memory cannot be added to; a saved model's backbone has passed.
    require_backbone: Callable[..., None] = staticmethod(lambda backbone, options=None: None)
    require_decoder: Callable[..., None] = staticmethod(lambda model, config: None)

    def __new__(cls, config: EngramConfig | None = None, *args, **kwargs):
        if config is None:  # Pickle and torch's replicas call it so; they fill in the state themselves.
            return super().__new__(cls)
        config.validate_engram()  # Fields of the backbone may have changed since the config was made.
        model = cls._prepare(config, *args, **kwargs)
        extend(model, cls if cls._extends is None else cls._extends[0])
        return model

    @classmethod
    def _prepare(cls, config: EngramConfig, *args, **kwargs) -> PreTrainedModel:
        """Prepare the backbone's own model, its parts with memory, for becoming an instance of this class."""
        raise EngramError(f"{cls.__name__} is the base of models with memory; build EngramModel or EngramForCausalLM.")

    @classmethod
    def _members(cls, base: type) -> dict[str, Any]:
        # Its name is that of the public class, because config.json names it, and trainers look for it.
        module = remote_module(base.config_class.model_type) or cls.__module__.rpartition(".")[2]
        return {
            "__module__": f"{cls.__module__.rpartition('.')[0]}.{module}",
            "__name__": cls.__name__,
            "__qualname__": f"{cls.__name__}[{base.__qualname__}]",  # transformers distinguishes classes by it.
            "__doc__": cls.__doc__,
            "config_class": EngramConfig,
        }

    @property
    def memory_model(self) -> "EngramModel":
        """The model whose layers have the memory: this one, its base model, or the language model in that."""
        base = self.base_model
        return base if base is self else base.memory_model

    def _become(self, config: EngramConfig) -> None:
        """Register the extended class with transformers, as every class is when it is first built."""
        built = dict(vars(self))
        PreTrainedModel.__init__(self, config)
        vars(self).update(built)
        self.config, self.name_or_path = config, config.name_or_path

    def _take_over(self, part: "EngramPreTrainedModel", prefix: str) -> None:
        """Treat the names that this model's `part`, the submodule `prefix`, lists as that part treats them."""
        for name in ("_no_split_modules", "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
            known = (getattr(one, name) or () for one in (type(self), self, part))
            setattr(self, name, set().union(*known))
        beside = {f"{prefix}.{name}" for name in part._keys_to_ignore_on_save or () if name.endswith(_TOKEN_MAP_KEY)}
        self._keys_to_ignore_on_save = {*(self._keys_to_ignore_on_save or ()), *beside}

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls._extends is None or cls._extends[1]._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls._extends is None or cls._extends[1]._can_set_experts_implementation()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        engram_residency: str = "auto",
        output_loading_info: bool = False,
        **kwargs,
    ):
        """Load as in transformers; the stored hash is compared with the config, and no table may be missing.

        Args:
            engram_residency: where the tables are kept. `"resident"`: parameters of the model. `"mapped"`: in their
                files, paged in as rows are read, frozen. `"pinned"`: page-locked host memory, frozen. `"auto"`:
                resident if they take at most a quarter of the free memory.

        Raises:
            ValueError: tables or hash constants are missing from the checkpoint, or disagree with its config; tables
                were saved with other weights; or a save to this folder was killed at its end.
        """
        if cls._extends is not None:  # The config determines the backbone.
            cls = cls._extends[0]
        checkpoint = Checkpoint(pretrained_model_name_or_path, kwargs)
        if checkpoint.folder is not None:
            require_settled(checkpoint.folder)
        tables, kwargs = checkpoint.find_tables(engram_residency), checkpoint.kwargs
        if tables is not None:
            kwargs = {**kwargs, "engram_tables": tables}
        model, info = super().from_pretrained(checkpoint.name_or_path, *args, output_loading_info=True, **kwargs)
        model.config.engram_format_version = FORMAT_VERSION
        model.memory_model.settle_memory()
        if tables is not None:
            tables.verify(model.memory_model)
        return (model, info) if output_loading_info else model

    # Only here is the key mapping of all submodels known.
    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        model.memory_model.hashing.stored_dtype = stored_dtype_of_hash(state_dict, checkpoint_files)
        mapping = [*(load_config.weight_mapping or ()), *renamings_of_version(model.config.engram_format_version)]
        load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        require_sizes(model, () if load_config.ignore_mismatched_sizes else checkpoint_files)
        leave_tables_on_disk(model, load_config.device_map)
        model.memory_model.prefetch_mounted()
        # The backbone's own method may refuse checkpoints, too.
        info, *others = model._extends[1]._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        if expected_keys is None:  # else it is an adapter
            require_memory(model, info.missing_keys)
        return info, *others

    def push_to_hub(self, *args, **kwargs):
        """Push as in transformers; tables that are not parameters are uploaded from their files."""
        with tables_by_reference():
            return super().push_to_hub(*args, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, token=None, **kwargs):
        # `push_to_hub` and `save_pretrained(push_to_hub=True)` meet here, after their README.md is written.
        if _SAVE.get() is not None:  # A failed upload must not lose the saved files.
            self._complete_save()
            writer, _ = _SAVE.get()
            working_dir, others = writer.target, set(os.listdir(writer.target)) - writer.names
            files_timestamps = dict.fromkeys(others, float("inf"))
        if self.write_model_card is not None and not self._saves_adapter():
            self.write_model_card(os.path.join(working_dir, "README.md"), self.config, repo_id, token)
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, token=token, **kwargs)

    def barrier_after_gathered_checkpoint_save(self, *args, **kwargs):
        # The other processes of a sharded model wait here, and may load what was saved.
        self._complete_save()
        return super().barrier_after_gathered_checkpoint_save(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, EngramTable):
            if not module.is_resident or module.weight.is_meta:
                return  # A device map has sent it to the disk.
            module.reset_parameters(getattr(self.config, "initializer_range", None) or 0.02)
        elif isinstance(module, EngramRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, EngramConv):
            init.zeros_(module.weight)  # The convolution starts as the identity (arXiv 2601.07372).
        elif isinstance(module, NgramHasher):
            for name, constant in module.derive_constants().items():
                init.copy_(getattr(module, name), constant)
            if module.token_map is not None:
                init.constant_(module.token_map, NO_ID)
        else:
            super()._init_weights(module)

    def set_token_map(self, tokenizer) -> None:
        """Set the compressed id of each token on a model that was built from a config.

        On a model that has a map, tokens may be added, but none of the original ids may change.

        Args:
            tokenizer: `EngramTokenizer`, another fast tokenizer, or the map as a tensor `[V]`.

        Raises:
            ValueError: the map has another size than the model was built for, or renumbers ids.
        """
        self.memory_model.replace_token_map(as_token_map(tokenizer))

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """Resize as in transformers; the token map grows too, and each new token gets its own compressed id.

        Old ids and the tables keep their meaning. Call `set_token_map(tokenizer)` afterwards if the new tokens should
        share the ids of tokens they are equal to.

        Raises:
            ValueError: the vocabulary would become smaller than that of the hash.
        """
        config = self.memory_model.config
        old_size = config.vocab_size
        smallest = max(self.memory_model.hashing.hash_vocab_size, config.engram_pad_token_id + 1)
        if new_num_tokens is not None and new_num_tokens < min(smallest, old_size):
            raise EngramError(
                f"new_num_tokens is {new_num_tokens}, but this model's memory hashes {smallest} ids; its vocabulary "
                "cannot become smaller than that."
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.memory_model.resize_token_map(old_size, config.vocab_size)
        return embeddings

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """Save as in transformers; whichever class is saved, every Auto class can open the folder as remote code.

        Tables that are not parameters are linked to the folder, or copied by the kernel: they have not changed. After any interruption, a folder has its old model or the new one; it needs disk space for both meanwhile.
        """
        for memory in self.memory_model.memories().values():
            getattr(memory.table, "require_whole", bool)()  # Shards of a table cannot be saved in this way.
        self.config.auto_map = self.config.remote_code_map()
        # The names are those of the modules: `Trainer` resumes by `load_state_dict`, and would silently skip experts
        # that had been split and renamed as in the backbone's own Hub layout (transformers issue 48805).
        kwargs.setdefault("save_original_format", False)
        # Every process of a sharded model calls this; only the first one writes, unless each writes a part.
        writes = self.should_save_on_this_rank(is_main_process) and not os.path.isfile(save_directory)
        if not writes or self._saves_adapter() or kwargs.get("distributed_checkpoint"):
            return super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", os.path.basename(os.path.normpath(save_directory)))
        with (
            self.folder_writer(save_directory) as writer,
            within(_SAVE, (writer, kwargs.get("variant"))),
            within(STAGED, writer.path),
        ):
            save_tables(self.memory_model, writer.path)
            super().save_pretrained(writer.path, is_main_process=is_main_process, **kwargs)
            self._complete_save()

    def _complete_save(self) -> None:
        """Put the saved files in place, if this process saves and has not done that."""
        if _SAVE.get() is not None:
            complete_save(self.memory_model, *_SAVE.get())

    def _read_call(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
        """Return the arguments of `prepare_memory` for a call; those that remain in `inputs` are the backbone's."""
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            raise EngramError(
                "Engram looks memory up by token id, so input_ids is needed (got None); pass it together with "
                "inputs_embeds if the embeddings are your own."
            )
        image_mask, padding_mask = inputs.pop("image_mask", None), inputs.pop("padding_mask", None)
        if image_mask is None and hasattr(self, "get_image_mask"):
            image_mask = self.get_image_mask(input_ids)
        if self._takes_image_mask:
            inputs["image_mask"] = image_mask
        if inputs.get("inputs_embeds") is not None:
            inputs["input_ids"] = None
        return {
            "input_ids": input_ids,
            "attention_mask": inputs.get("attention_mask") if padding_mask is None else padding_mask,
            "position_ids": inputs.get("position_ids"),
            "image_mask": image_mask,
            "sequence_ids": inputs.get("seq_idx"),
        }

    def _saves_adapter(self) -> bool:
        # For a model with adapters that transformers added, transformers saves the adapters alone.
        return getattr(self, "_hf_peft_config_loaded", False)


def _hold_hash(hashing: NgramHasher) -> None:
    """Keep the hash buffers on the device: they are read outside `forward`, and are small."""
    hook = getattr(hashing, "_hf_hook", None)
    if hook is not None and any(buffer.is_meta for buffer in hashing.buffers()):
        hook.pre_forward(hashing)
        hook.offload = False


class EngramModel(EngramPreTrainedModel):
    """A backbone with memory, without a language-model head.

    An instance is also one of the backbone's own class: its parameters have the same names as there, and its `forward`
    takes the same arguments.

    Args:
        config: names the backbone in `text_config`, or in `backbone_config`.
        backbone: an instance to use instead of a new one; it is changed in place.
        engram_tables: tables that were found beside the weights; None if they are among the weights.

    Raises:
        ValueError: the backbone has memory already, has no decoder layers or no cache, or its forward was replaced.
    """

    _cache_name: str = CACHE_NAMES[0]  # This is the name of the cache in the backbone's forward.
    # It is for backbones of several parts; multimodal_engram sets it.
    composite_class: Callable[..., PreTrainedModel] = staticmethod(needs_package)
    # A call with some of `LOOKBACK_NAMES` passes its keyword arguments to this; the package engram_hf sets it.
    read_lookback: Any = staticmethod(needs_package)

    def __new__(cls, config: EngramConfig | None = None, *args, **kwargs):
        if config is not None and config.is_composite:
            return EngramModel.composite_class(config, *args, **kwargs)
        return super().__new__(cls, config, *args, **kwargs)

    @classmethod
    def _prepare(
        cls, config: EngramConfig, backbone: PreTrainedModel | None = None, engram_tables: FoundTables | None = None
    ) -> PreTrainedModel:
        if backbone is None:
            # The memory gets the dtype that the caller builds this model in, as the backbone does.
            backbone = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())
        require_extensible(backbone)
        cls.require_decoder(backbone, config)
        _, layers = decoder_layers(backbone, config.num_hidden_layers)
        if max(config.engram_layer_ids) >= len(layers):
            raise EngramError(
                f"engram_layer_ids {config.engram_layer_ids} must lie in 0..{len(layers) - 1}, the {len(layers)} decoder "
                f"layers of {type(backbone).__name__} (0-based)."
            )
        for layer_id in config.engram_layer_ids:
            require_extensible(layers[layer_id])  # All layers are checked before the first one is changed.
        return backbone

    def __init__(
        self,
        config: EngramConfig,
        backbone: PreTrainedModel | None = None,
        engram_tables: FoundTables | None = None,
    ):
        # The backbone's own class has initialized it; only the memory is added here.
        _warn_of_untested_version()
        config.text_config = self.config  # `from_config` copies the config, but both must be one object.
        self._become(config)
        self.hashing = NgramHasher.from_config(config)
        # Use the embedding's dtype; layers may be partly float32 or quantized.
        dtype = self.get_input_embeddings().weight.dtype
        self._layers_name, layers = decoder_layers(self, config.num_hidden_layers)
        for index, layer_id in enumerate(config.engram_layer_ids):
            add_memory_to_layer(layers[layer_id], config, index, dtype)
        names = {type(layers[layer_id]).__name__ for layer_id in config.engram_layer_ids}
        self._no_split_modules = {*(self._no_split_modules or ()), *names}
        # It tells if the backbone passes unknown keywords to its layers; None before the first forward.
        self._hands_on: bool | None = None
        # A head may call a decoder inside its base model, without the base model's own forward.
        inner = self.get_submodule(self._layers_name.rpartition(".")[0])
        self._runs_inside = inner is not self and isinstance(inner, PreTrainedModel)
        if self._runs_inside:
            extend(inner, DecoderWithMemory)
            inner.engram_models = (self,)  # It is in a tuple, so that it is not a submodule.
        if engram_tables is not None:
            engram_tables.mount(self)
        self.prefetcher: Prefetcher | None = None
        self.prefetch_mounted()
        self._added_tokens_share_ids = False
        self._keep_token_map_beside_embeddings()
        self.init_weights()
        if not self.hashing.primes.is_meta and bool(self.hashing.primes.any()):
            self.hashing.settle()  # Otherwise it must be loaded first.

    @classmethod
    def _members(cls, base: type) -> dict[str, Any]:
        parameters = inspect.signature(base.forward).parameters
        return {
            **super()._members(base),
            "forward": forward_with_memory(base.forward),
            "_cache_name": next(name for name in CACHE_NAMES if name in parameters),
            "_takes_image_mask": "image_mask" in parameters,
        }

    def prefetch_mounted(self) -> None:
        """Prefetch rows if the tables are not parameters."""
        tables = [memory.table for memory in self.memories().values()]
        if self.prefetcher is None and not any(table.is_resident for table in tables):
            self.prefetcher = Prefetcher(tables)

    def memories(self) -> dict[int, EngramMemory]:
        """Return the memory of every listed decoder layer, by layer."""
        layers = self.get_submodule(self._layers_name)
        return {layer_id: layers[layer_id].engram for layer_id in self.config.engram_layer_ids}

    def settle_memory(self) -> None:
        """Check and fix the loaded buffers and rows: the hash is exact, and quantized rows take no gradient."""
        for memory in self.memories().values():
            memory.table.keep_frozen()
        _hold_hash(self.hashing)
        self.hashing.settle()

    def _keep_token_map_beside_embeddings(self) -> None:
        """Store the ids of added tokens beside their embeddings, which is what an adapter saves of added tokens."""
        embeddings = self.get_input_embeddings()
        embeddings.register_state_dict_post_hook(_AddTokenMap(self))
        embeddings.register_load_state_dict_pre_hook(_TakeTokenMap(self))
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._keys_to_ignore_on_save = {*(self._keys_to_ignore_on_save or ()), f"{name}.{_TOKEN_MAP_KEY}"}

    def replace_token_map(self, token_map: torch.Tensor) -> None:
        """Check and install a token map `[V]`; see [`EngramPreTrainedModel.set_token_map`]."""
        current = self.hashing.token_map
        if current is None:
            raise EngramError(
                "This model hashes uncompressed ids (engram_compressed_vocab_size is None), so it takes no token map."
            )
        if not self.config.engram_pad_token_id < token_map.numel() <= current.numel():
            raise EngramError(
                f"The token map has {token_map.numel()} tokens, but the model's vocabulary {current.numel()} (its pad "
                f"token is {self.config.engram_pad_token_id}); for more tokens, call "
                "resize_token_embeddings(len(tokenizer)) first."
            )
        self._require_same_ids(token_map, current[: token_map.numel()].cpu())
        known = int((current >= 0).sum())
        self._added_tokens_share_ids |= known > 0 and not torch.equal(current[: token_map.numel()].cpu(), token_map)
        current.fill_(NO_ID)
        current[: token_map.numel()] = token_map.to(current.device)
        self.config.engram_added_tokens = int(token_map.max()) + 1 - self.config.engram_compressed_vocab_size
        self.hashing.settle()

    def _require_same_ids(self, token_map: torch.Tensor, current: torch.Tensor) -> None:
        size, hashed = int(token_map.max()) + 1, self.config.engram_compressed_vocab_size
        original = (current >= 0) & (current < hashed)
        expected = hashed + self.config.engram_added_tokens
        if size < hashed or (size != expected and not original.any()):
            raise EngramError(
                f"The tokenizer compresses to {size} ids, but this model was built for {expected} "
                "(engram_compressed_vocab_size); every hash depends on that number. Use the tokenizer the model was "
                "built with."
            )
        if not torch.equal(current[original], token_map[original]):
            raise EngramError(
                "The tokenizer gives tokens other compressed ids than this model was trained with, which would turn "
                "its tables into noise. Use the tokenizer saved with the model, or one with tokens added to it."
            )

    def resize_token_map(self, old_size: int, new_size: int) -> None:
        """Follow a change of the vocabulary from `old_size` to `new_size` ids."""
        if new_size == old_size:
            return
        config, hashing = self.config, self.hashing
        if hashing.token_map is None:
            # The hash was drawn for the old vocabulary, so its size must be stated from here on.
            config.engram_compressed_vocab_size = old_size
            hashing.token_map = torch.arange(old_size, device=hashing.multipliers.device)
        token_map = hashing.token_map[:new_size]
        first = max(config.engram_compressed_vocab_size, int(token_map.max()) + 1)
        added = torch.arange(first, first + max(new_size - old_size, 0), device=token_map.device)
        if not (token_map >= 0).any():
            added = torch.full_like(added, NO_ID)
        hashing.token_map = torch.cat([token_map, added])
        hashing.settle()
        config.engram_added_tokens = max(int(hashing.token_map.max()) + 1 - config.engram_compressed_vocab_size, 0)

    def prepare_memory(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        history: Any = None,
        past_length: int | torch.Tensor | None = None,
    ) -> EngramInputs:
        """Return the row ids of all layers, from token ids alone: this can run before the backbone, or elsewhere.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, past + S]`, 0 for padding; masks of other shapes do not mark padding here. Padding is
                skipped, unless positions have a gap there.
            position_ids: `[B, S]`; a document starts wherever they do not increase by one.
            image_mask: bool `[B, S]`, True at image positions: they have no memory, and a look-back ends there.
            sequence_ids: `[B, S]`, equal within a packed document; instead of `position_ids`. Later calls of the same
                `history` continue with it, or by default with the last document.
            history: the history of earlier calls; this call is staged in it, to be committed after the backbone's
                forward. Or the result of `read_lookback`.
            past_length: positions before this call, for reading the mask; by default, those of the history.
        """
        _hold_hash(self.hashing)
        if past_length is None and isinstance(history, EngramHistory):
            past_length = history.get_seq_length()
        is_text = _mask_of_call(attention_mask, input_ids, past_length)
        compaction: Any = Compaction(is_text)
        valid = is_text
        if image_mask is not None:
            if image_mask.shape != input_ids.shape:
                raise EngramError(
                    f"`image_mask` must have one entry per token, {list(input_ids.shape)}; got {list(image_mask.shape)}."
                )
            no_image = ~image_mask.to(input_ids.device).bool()
            valid = no_image if is_text is None else is_text & no_image
        ids = self.hashing.compress(input_ids)
        if valid is not None:
            ids = ids.where(valid, NO_ID)
        if self.hashing.token_map is not None:
            valid = ids >= 0  # A token that is unknown to the hash has no memory either.
        if history is not None and not isinstance(history, EngramHistory):
            compaction, documents, past = history.arrange(input_ids, compaction, position_ids, sequence_ids)
        elif history is not None:
            history.require_batch(input_ids.shape[0])
            documents = _documents(input_ids, compaction, position_ids, sequence_ids, history)
            documents = torch.zeros_like(ids) if documents is None else documents
            past = history.before(ids)
            history.stage(ids, documents, compaction, sequence_ids is not None)
        else:
            if sequence_ids is None:
                _require_known_past(input_ids, is_text, position_ids)
            documents = _documents(input_ids, compaction, position_ids, sequence_ids, None)
            past = nothing_before(ids, lookback_reach(self.config))
        row_ids, documents = self._hash(ids, documents, past, compaction)
        # Nothing is recorded once inputs are known to reach the layers, or in compiled code: a change would recompile.
        readers = None if self._hands_on is not None or torch.compiler.is_compiling() else set()
        return EngramInputs(row_ids, compaction, valid, documents, history, readers=readers)

    def _hash(
        self,
        ids: torch.Tensor,
        documents: torch.Tensor | None,
        past: tuple[torch.Tensor, torch.Tensor],
        compaction: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return row ids `[L, B, S, T]` of ids `[B, S]`, and documents `[B, R + S]` with padding moved first."""
        reach, ids = past[0].shape[1], compaction.join(past[0], ids)
        documents = None if documents is None else compaction.join(past[1], documents)
        split = (None, None) if documents is None else (documents[:, reach:], documents[:, :reach])
        row_ids = self.hashing(ids[:, reach:], split[0], ids[:, :reach], split[1])
        row_ids = compaction.restore(row_ids.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)
        if compaction.is_text is not None:
            row_ids = row_ids.where(compaction.is_text[..., None], 0)
        return row_ids, documents

    def _run_with_memory(self, run_backbone: Callable, inputs: dict[str, Any]):
        """Return the backbone's outputs for the keyword arguments `inputs`, with memory."""
        if self._asks_context:
            inputs |= BESIDE.get() or {}
        call = self._read_call(inputs)
        lookback = self.read_lookback(inputs) if any(name in inputs for name in LOOKBACK_NAMES) else None
        cache = self._settle_cache(inputs) if lookback is None else None
        history = lookback if cache is None else attach_history(cache, self.config)
        past_length = None if cache is None else cache.get_seq_length()
        memory = self.prepare_memory(**call, history=history, past_length=past_length)
        memory = memory._replace(
            cache=cache, gates=inputs.pop("engram_gate_values", None), edit=inputs.pop("engram_edit", None)
        )
        if self.prefetcher is not None:
            memory = memory._replace(fetched=self.prefetcher.start(memory.row_ids))
        outputs = self._run_to_layers(run_backbone, inputs, memory)
        if cache is not None:
            self._require_history_kept(cache, outputs, inputs["use_cache"])
            history.commit()
        return outputs

    @property
    def _asks_context(self) -> bool:
        """Return whether to read the context variable: a compiler cannot trace it, and few backbones need it."""
        return self._hands_on is False or not torch.compiler.is_compiling()

    def _run_to_layers(self, run_backbone: Callable, inputs: dict[str, Any], memory: EngramInputs):
        """Run the backbone with `memory` as a keyword for its layers; if it may drop that, through a context variable."""
        if self._hands_on or not self._asks_context:
            return run_backbone(self, **inputs, engram_inputs=memory)
        keyword = {} if self._hands_on is False else {"engram_inputs": memory}
        carrier = Carrier(memory)
        with within(CARRIER, carrier), within(BESIDE, None):
            outputs = run_backbone(self, **inputs, **keyword)
        self._require_reached(memory)
        if memory.readers:
            self._hands_on = not carrier.was_needed
        return outputs

    def _settle_cache(self, inputs: dict[str, Any]) -> Cache | None:
        """Return the cache of a call, made if one is needed; in `inputs` it has the backbone's name for it."""
        given = [inputs.pop(name) for name in CACHE_NAMES if inputs.get(name) is not None]
        if len(given) > 1 and given[0] is not given[1]:
            raise EngramError(f"Two caches were passed, as {' and as '.join(CACHE_NAMES)}; pass one.")
        cache = given[0] if given else None
        use_cache = inputs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", None) or False
        if self.training and getattr(self, "gradient_checkpointing", False):
            if cache is not None:
                logger.warning_once("The cache is ignored: gradient checkpointing runs without one.")
            use_cache, cache = False, None  # A replayed layer would store its states twice.
        if use_cache and cache is None:
            cache = begin_cache(self.config)
        inputs.pop("past_key_values", None), inputs.pop("cache", None)
        inputs[self._cache_name], inputs["use_cache"] = cache, use_cache
        return cache

    def _require_reached(self, memory: EngramInputs) -> None:
        # With `assistant_early_exit`, the layers that run may all come before the first memory.
        if memory.readers == set() and min(self.config.engram_layer_ids) < self.config.num_hidden_layers:
            raise EngramError(
                f"{self._extends[1].__name__} ran without memory: it does not call the layers that have one, so Engram "
                "cannot reach them; use another backbone."
            )

    def _require_history_kept(self, cache: Cache | None, outputs, use_cache: bool) -> None:
        """Refuse outputs whose cache is not the one with the memory's history: the next step would be wrong."""
        if cache is None:
            return
        parts = outputs if isinstance(outputs, tuple) else outputs.values()
        used = next((part for part in parts if isinstance(part, Cache)), None)
        if used is not cache and (use_cache or used is not None):
            raise EngramError(
                f"{self._extends[1].__name__} returned another cache than the one that holds the memory's history, so that later "
                "tokens would read wrong rows; pass use_cache=False, or try another version of transformers."
            )


# This is its name in a state dict, under the input embeddings.
_TOKEN_MAP_KEY = "engram_token_map"


class _AddTokenMap:
    """A hook of the input embeddings that adds the compressed ids of added tokens to their state dict.

    PEFT saves the embeddings of a model whose vocabulary has grown with the adapter, and nothing else of the model.
    `save_pretrained` does not write these ids: there, the whole token map is a separate buffer.
    """

    def __init__(self, model: "EngramModel"):
        self.model = model

    def __call__(self, _module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_) -> None:
        # The same resizing alone would give each new token its own id.
        if self.model._added_tokens_share_ids:
            state_dict[prefix + _TOKEN_MAP_KEY] = self.model.hashing.token_map.clone()


class _TakeTokenMap(_AddTokenMap):
    """A hook of the input embeddings that installs the compressed ids that were saved with them."""

    def __call__(self, _module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_) -> None:
        token_map = state_dict.pop(prefix + _TOKEN_MAP_KEY, None)
        if token_map is not None:
            self.model.replace_token_map(as_token_map(token_map[token_map >= 0]))


def forward_with_memory(forward: Callable) -> Callable:
    """Run the backbone's `forward`, with memory, with the same arguments by position and by name."""
    parameters = tuple(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def with_memory(self: EngramModel, *args, **kwargs):
        given = dict(zip(parameters, args, strict=False))
        if self._runs_inside or len(args) > len(given) or given.keys() & kwargs.keys():
            return forward(self, *args, **kwargs)  # It runs the decoder with memory, or refuses the arguments.
        if kwargs.get("pixel_values") is not None and not {"pixel_values", "image_mask"} & set(parameters):
            raise EngramError(
                f"{type(self)._extends[1].__name__} reads text alone, but was given pixel_values; leave the images out, or use "
                "EngramForConditionalGeneration on a backbone that reads images."
            )
        return self._run_with_memory(forward, {**given, **kwargs})

    return with_memory


class DecoderWithMemory(RuntimeSubclass):
    """The decoder inside a base model (`OPTModel.decoder`), which runs with the memory of that base model."""

    _runs_inside = False

    @classmethod
    def _members(cls, base: type) -> dict[str, Any]:
        return {**super()._members(base), "forward": forward_with_memory(base.forward)}

    def _init_weights(self, module: nn.Module) -> None:
        self.engram_models[0]._init_weights(module)

    def _run_with_memory(self, run_decoder: Callable, inputs: dict[str, Any]):
        (model,) = self.engram_models
        return model._run_with_memory(lambda _, **arguments: run_decoder(self, **arguments), inputs)


def _forward_of_head(forward: Callable) -> Callable:
    """Run the `forward` of a model with a head; a context variable passes the keywords that it may not know."""
    known = inspect.signature(forward).parameters
    ours = {"engram_edit", "engram_gate_values", "image_mask", "padding_mask", "seq_idx", *LOOKBACK_NAMES}
    unknown = ours.difference(known)
    new_name, old_name = sorted(CACHE_NAMES, key=lambda name: name not in known)

    @functools.wraps(forward)
    def forward_of_head(self: EngramForCausalLM, *args, **kwargs):
        if old_name in kwargs and new_name not in kwargs and LOOKBACK_NAMES[0] not in kwargs:  # engines keep theirs
            kwargs[new_name] = kwargs.pop(old_name)
        names = unknown & kwargs.keys()
        if not names or not self.memory_model._asks_context:
            return forward(self, *args, **kwargs)
        with within(BESIDE, {name: kwargs.pop(name) for name in names}):
            return forward(self, *args, **kwargs)

    return forward_of_head


def _mask_of_call(
    mask: torch.Tensor | None, input_ids: torch.Tensor, past: int | torch.Tensor | None
) -> torch.Tensor | None:
    """Return where the positions `[B, S]` of a call are text; the mask begins with the past and may be longer."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    length = input_ids.shape[1]
    others = mask.shape[1] - length
    if not isinstance(past, torch.Tensor):
        start = others if past is None else min(past, others)
        mask = mask[:, start : start + length]
    else:
        # A static cache has its length on the device; reading it would synchronize with the device.
        start = past.to(mask.device).clamp_max(others)
        mask = mask.index_select(1, torch.arange(length, device=mask.device) + start)
    return mask.to(input_ids.device).bool()


def _require_known_past(ids: torch.Tensor, is_text: torch.Tensor | None, position_ids: torch.Tensor | None) -> None:
    """Refuse positions `[B, S]` without a cache that begin or restart after 0; warn once where they have a gap."""
    if position_ids is None or position_ids.dim() != 2 or torch.compiler.is_compiling() or position_ids.is_meta:
        return
    if position_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    positions = position_ids.to(ids.device).expand_as(ids)
    text = torch.ones_like(ids, dtype=torch.bool) if is_text is None else is_text
    late = text & (text.cumsum(1) == 1) & (positions > torch.arange(ids.shape[1], device=ids.device))
    steps = positions.diff(dim=1).where(text[:, 1:] & text[:, :-1], 1)
    late = late.any() | ((steps < 1) & (positions[:, 1:] > 0)).any()
    is_late, jumps = torch.stack([late, (steps > 1).any()]).tolist()
    if is_late:
        raise EngramError(
            "This call has no cache, but its position_ids begin or restart after 0: the memory reads the tokens before each "
            "sequence, and they are missing. Pass lookback_token_ids (-1 where there are none), or a cache."
        )
    if jumps:
        logger.warning_once(
            "position_ids go on by more than one within a row, without a cache: the memory takes that for the beginning of "
            "another text. If an engine packs requests that began earlier, pass lookback_token_ids."
        )


def _documents(
    input_ids: torch.Tensor,
    compaction: Compaction,
    position_ids: torch.Tensor | None,
    sequence_ids: torch.Tensor | None,
    history: EngramHistory | None,
) -> torch.Tensor | None:
    """Return documents `[B, S]`: as given, or from where position ids restart; by default, the last one continues."""
    if sequence_ids is not None:
        return sequence_ids.to(input_ids.device).long().expand_as(input_ids)
    has_past = history is not None and history.ids is not None
    # The caller's numbers cannot be compared with those from positions.
    if has_past and (position_ids is None or history.is_numbered):
        return history.before(input_ids)[1][:, -1:].expand_as(input_ids)
    if position_ids is None:
        return None
    positions = position_ids[0] if position_ids.dim() == 3 else position_ids  # of three axes, the temporal one
    index = torch.ones_like(input_ids) if compaction.is_text is None else compaction.is_text.long()
    index = index.cumsum(1) - 1 + (0 if history is None else history.text_before(input_ids))
    # This is the beginning of each document, counted in text: equal within a document, and different for the next one.
    return index - positions.to(input_ids.device)


class EngramForCausalLM(EngramPreTrainedModel, GenerationMixin):
    """A causal language model with memory, on any backbone.

    An instance is also one of the backbone's own class (`MixtralForCausalLM`, ...), whose forward it runs: head, logit
    scaling, loss and auxiliary losses, and all settings on the model, are the backbone's.

    Args:
        config: names the backbone in `text_config`.
        host: a causal language model to use instead of a new one; it is changed in place.
        engram_tables: as in [`EngramModel`].

    Raises:
        ValueError: as [`EngramModel`].
    """

    host_class = AutoModelForCausalLM
    _reads_images = False
    # It adds memory to a causal language model, or to the one of a name; the package engram_hf sets it.
    from_backbone: Any = staticmethod(needs_package)
    # The first makes the manager of `generate_batch` and servers; the package engram_hf sets both.
    init_continuous_batching: Any = staticmethod(needs_package)
    generate_batch: Any = staticmethod(needs_package)

    @classmethod
    def _prepare(
        cls, config: EngramConfig, host: PreTrainedModel | None = None, engram_tables: FoundTables | None = None
    ) -> PreTrainedModel:
        if config.is_composite and not cls._reads_images:
            raise EngramError(
                f"The backbone is a {config.backbone.model_type}, which reads more than text; use EngramForConditionalGeneration "
                "(AutoModelForImageTextToText), or a model of its language model alone."
            )
        if host is None:
            host = cls.host_class.from_config(config.backbone, dtype=torch.get_default_dtype())
        require_extensible(host)
        cls.require_backbone(host)
        config.backbone = host.config  # `from_config` copies the config, but both must be one object.
        name_base_model(host)
        EngramModel(config, host.base_model, engram_tables)  # This changes the host's base model in place.
        return host

    def __init__(
        self,
        config: EngramConfig,
        host: PreTrainedModel | None = None,
        engram_tables: FoundTables | None = None,
    ):
        # The host's own class has initialized it, and its base model has memory.
        self._become(config)
        self._take_over(self.base_model, self.base_model_prefix)
        self.init_weights()

    @classmethod
    def _members(cls, base: type) -> dict[str, Any]:
        return {**super()._members(base), "forward": _forward_of_head(base.forward)}

    def prepare_inputs_for_generation(
        self, input_ids, *args, attention_mask=None, inputs_embeds=None, image_mask=None, seq_idx=None, **kwargs
    ):
        """Do as the host, and add the memory's inputs: ids beside embeddings, and masks of just these positions."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        # Phi-3 drops its cache past the original context length.
        embeds, cache = inputs.get("inputs_embeds"), _cache_in(inputs)
        length = (inputs["input_ids"] if embeds is None else embeds).shape[1]
        if embeds is not None and input_ids.shape[1] >= length:
            inputs["input_ids"] = input_ids[:, -length:]
        if image_mask is not None:  # Generated tokens are text.
            inputs["image_mask"] = _slice_to_step(image_mask, torch.zeros_like(image_mask[:, :1]), cache, length)
        if seq_idx is not None:  # They belong to the last document.
            inputs["seq_idx"] = _slice_to_step(seq_idx, seq_idx[:, -1:], cache, length)
        if attention_mask is not None and inputs.get("attention_mask") is not attention_mask:
            # For a static cache the mask became 4-D, which no longer says what is padding.
            inputs["padding_mask"] = attention_mask[:, -length:]
        return inputs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        # Assisted decoding asks the cache to record its past before the first forward; the history must be there.
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = _cache_in(model_kwargs)
        if isinstance(cache, Cache):
            history = attach_history(cache, self.memory_model.config)
            if generation_config.is_assistant:
                history.activate_past_recording()

    @torch.no_grad()
    def engram_gates(self, input_ids: torch.LongTensor, **kwargs) -> dict[int, torch.Tensor]:
        """Return how far the memory's gates open for a text, in one forward.

        Args:
            input_ids: `[B, S]`.
            **kwargs: arguments of `forward`.

        Returns:
            Gates `[B, S, G]` between 0 and 1, by decoder layer.
        """
        gates: dict[int, torch.Tensor] = {}
        self(input_ids, **{**kwargs, "use_cache": False}, engram_gate_values=gates)
        return {layer_id: gates[index] for index, layer_id in enumerate(self.config.engram_layer_ids)}


def _cache_in(arguments: dict[str, Any]) -> Cache | None:
    """Return the cache among keyword arguments, under either name."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def _slice_to_step(mask: torch.Tensor, fill: torch.Tensor, cache: Cache | None, length: int) -> torch.Tensor:
    """Return the `length` positions after those in `cache` of a mask `[B, S]` of a prompt; later ones are `fill`."""
    start = 0 if cache is None else int(cache.get_seq_length())
    missing = max(start + length - mask.shape[1], 0)
    return torch.cat([mask, fill.expand(-1, missing)], dim=1)[:, start : start + length]


# Trainer looks here to decide whether labels are shifted when it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(EngramConfig.model_type, EngramForCausalLM.__name__)

EngramModel.register_for_auto_class("AutoModel")
EngramForCausalLM.register_for_auto_class("AutoModelForCausalLM")
