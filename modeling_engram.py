"""Engram memory for any decoder of transformers: the models that carry it.

A model of a backbone's own class becomes an instance of a class that is made at run time, with memory in front of the
backbone's behaviour: its attributes, plans, losses and heads are its own. Listed decoder layers get a submodule `engram`
and run it on the residual streams before their own forward. What they read is decided once per forward, from token ids
alone, and travels as one keyword argument.

Shape letters: B batch, S positions, R positions that a look-back reaches, G residual streams, D hidden size, L Engram
layers, T hash heads of all orders.
"""

import copy
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
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .cache_engram import EngramHistory, RuntimeSubclass, attach_history, begin_cache, lookback_reach, nothing_before
from .configuration_engram import FORMAT_VERSION, EngramConfig, remote_module
from .hashing_engram import DEAD, Compaction, NgramHasher, as_token_map
from .layer_engram import (
    EngramConv,
    EngramInputs,
    EngramMemory,
    EngramRMSNorm,
    add_memory_to_layer,
    extend,
    require_extensible,
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
    replace_files,
    require_settled,
    save_tables,
    tables_by_reference,
)
from .table_engram import EngramTable

logger = logging.get_logger(f"transformers.{__name__}")

# The minor versions of transformers that the test suite passes with.
TESTED_VERSIONS = ((5, 17), (5, 24))
# The cache's name as an argument and in outputs: transformers 5.24 renamed it.
CACHE_NAMES = ("cache", "past_key_values")
# The save that runs: what it is written with, and the variant of its weights.
_SAVE: ContextVar[tuple[FolderWriter, str | None] | None] = ContextVar("the save that runs", default=None)


def _warn_of_untested_version() -> None:
    found = tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2]))
    oldest, newest = TESTED_VERSIONS
    if not oldest <= found <= newest:
        tested = " to ".join(".".join(map(str, version)) for version in TESTED_VERSIONS)
        logger.warning_once(
            f"Engram was tested with transformers {tested}, not with {transformers.__version__}; what it cannot do right it "
            "refuses, and an update of engram-hf may be needed."
        )


class EngramPreTrainedModel(RuntimeSubclass, PreTrainedModel):
    """What [`EngramModel`] and [`EngramForCausalLM`] share: loading, initialization, saving and the token map."""

    config_class = EngramConfig
    # Called as `write_model_card(path, config, repo_id, token)` when a model is pushed; the package engram_hf sets it, and a
    # model that was loaded as remote code has the card that transformers writes.
    write_model_card: Callable[..., None] | None = None

    @classmethod
    def _members(cls, base: type) -> dict[str, Any]:
        # Named as the class that users know: config.json names it, and trainers look for it.
        module = remote_module(base.config_class.model_type) or cls.__module__.rpartition(".")[2]
        return {
            "__module__": f"{cls.__module__.rpartition('.')[0]}.{module}",
            "__name__": cls.__name__,
            "__qualname__": f"{cls.__name__}[{base.__qualname__}]",  # by which transformers tells classes apart
            "__doc__": cls.__doc__,
            "config_class": EngramConfig,
        }

    def _become(self, config: EngramConfig) -> None:
        """Have transformers take note of the extended class, as it does of every class when it is first built."""
        built = dict(vars(self))
        PreTrainedModel.__init__(self, config)
        vars(self).update(built)
        self.config, self.name_or_path = config, config.name_or_path

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
        """As in transformers; the stored hash is compared with the config, and no table may be missing.

        Args:
            engram_residency: where the tables live. `"resident"`: parameters of the model. `"mapped"`: in their
                files, paged in as rows are read, frozen. `"pinned"`: page-locked host memory, frozen. `"auto"`:
                resident while they take at most a quarter of the free memory.

        Raises:
            ValueError: tables or hash constants are missing from the checkpoint, or disagree with its config; tables were
                saved with other weights; or a save to this folder was killed at its end.
        """
        if cls._extends is not None:  # the backbone is what the config says
            cls = cls._extends[0]
        checkpoint = Checkpoint(pretrained_model_name_or_path, kwargs)
        if checkpoint.folder is not None:
            require_settled(checkpoint.folder)
        tables, kwargs = checkpoint.find_tables(engram_residency), checkpoint.kwargs
        if tables is not None:
            kwargs = {**kwargs, "engram_tables": tables}
        model, info = super().from_pretrained(checkpoint.name_or_path, *args, output_loading_info=True, **kwargs)
        model.config.engram_format_version = FORMAT_VERSION
        model.base_model.settle_memory()
        if tables is not None:
            tables.verify(model.base_model)
        return (model, info) if output_loading_info else model

    # Only here is the key mapping of all submodels known.
    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        model.base_model.hashing.stored_dtype = stored_dtype_of_hash(state_dict, checkpoint_files)
        mapping = [*(load_config.weight_mapping or ()), *renamings_of_version(model.config.engram_format_version)]
        load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        require_sizes(model, () if load_config.ignore_mismatched_sizes else checkpoint_files)
        leave_tables_on_disk(model, load_config.device_map)
        model.base_model.prefetch_mounted()
        # The backbone's own, which may refuse checkpoints too.
        info, *others = model._extends[1]._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        if expected_keys is None:  # else it is an adapter
            require_memory(model, info.missing_keys)
        return info, *others

    def push_to_hub(self, *args, **kwargs):
        """As in transformers; tables that are not parameters are uploaded from the files they are in."""
        with tables_by_reference():
            return super().push_to_hub(*args, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, token=None, **kwargs):
        # `push_to_hub` and `save_pretrained(push_to_hub=True)` meet here, after their README.md is written.
        if _SAVE.get() is not None:  # an upload that breaks off must not lose what is saved here
            self._complete_save()
            writer, _ = _SAVE.get()
            working_dir, others = writer.target, set(os.listdir(writer.target)) - writer.names
            files_timestamps = dict.fromkeys(others, float("inf"))
        if self.write_model_card is not None and not self._saves_adapter():
            self.write_model_card(os.path.join(working_dir, "README.md"), self.config, repo_id, token)
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, token=token, **kwargs)

    def barrier_after_gathered_checkpoint_save(self, *args, **kwargs):
        # The other processes of a sharded model go on behind this, and may load what was saved.
        self._complete_save()
        return super().barrier_after_gathered_checkpoint_save(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, EngramTable):
            if not module.is_resident or module.weight.is_meta:
                return  # a device map put it on disk
            module.reset_parameters(getattr(self.config, "initializer_range", None) or 0.02)
        elif isinstance(module, EngramRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, EngramConv):
            init.zeros_(module.weight)  # the convolution starts as the identity (spec of the paper)
        elif isinstance(module, NgramHasher):
            for name, constant in module.derive_constants().items():
                init.copy_(getattr(module, name), constant)
            if module.token_map is not None:
                init.constant_(module.token_map, DEAD)
        else:
            super()._init_weights(module)

    def set_token_map(self, tokenizer) -> None:
        """Tell a model that was built from a config which compressed id each token has.

        On a model that has a map, tokens may be added, but none of the original ids may change.

        Args:
            tokenizer: `EngramTokenizer`, another fast tokenizer, or the map as a tensor `[V]`.

        Raises:
            ValueError: the map has another size than the model was built for, or renumbers ids.
        """
        self.base_model.replace_token_map(as_token_map(tokenizer))

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """As in transformers; the token map grows too, each new token with a compressed id of its own.

        Old ids and the tables keep their meaning. Call `set_token_map(tokenizer)` afterwards if the new tokens should
        share the ids of tokens they are equal to.

        Raises:
            ValueError: the vocabulary would become smaller than what the hash was drawn for.
        """
        old_size = self.config.vocab_size
        smallest = max(self.base_model.hashing.hash_vocab_size, self.config.engram_pad_token_id + 1)
        if new_num_tokens is not None and new_num_tokens < min(smallest, old_size):
            raise EngramError(
                f"new_num_tokens is {new_num_tokens}, but this model's memory hashes {smallest} ids; its vocabulary "
                "cannot become smaller than that."
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.base_model.resize_token_map(old_size, self.config.vocab_size)
        return embeddings

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As in transformers; whichever class is saved, every Auto class can open the folder as remote code.

        Tables that are not parameters are linked to the folder, or copied by the kernel: they have not changed. A folder
        that holds a model is that model or the new one, whatever interrupts the save, and needs room for both until its end.
        """
        self.config.auto_map = self.config.remote_code_map()
        # Under the names of the modules: `Trainer` resumes by `load_state_dict`, and would silently skip experts that had
        # been split and renamed as the backbone's own hub layout has them (transformers issue 48805).
        kwargs.setdefault("save_original_format", False)
        # Of a sharded model every process calls this; only the first one writes, unless all write a part each.
        writes = self.should_save_on_this_rank(is_main_process) and not os.path.isfile(save_directory)
        if not writes or self._saves_adapter() or kwargs.get("distributed_checkpoint"):
            return super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", os.path.basename(os.path.normpath(save_directory)))
        with replace_files(save_directory) as writer:
            token = _SAVE.set((writer, kwargs.get("variant")))
            try:
                save_tables(self.base_model, writer.path)
                super().save_pretrained(writer.path, is_main_process=is_main_process, **kwargs)
                self._complete_save()
            finally:
                _SAVE.reset(token)

    def _complete_save(self) -> None:
        """Put what was saved in place, if this process saves and has not done that."""
        if _SAVE.get() is not None:
            complete_save(self.base_model, *_SAVE.get())

    def _saves_adapter(self) -> bool:
        # Of a model with adapters that transformers added, it saves those alone.
        return getattr(self, "_hf_peft_config_loaded", False)


def _hold_hash(hashing: NgramHasher) -> None:
    """Keep the hash buffers on the device: they are read outside of `forward`, and are small."""
    hook = getattr(hashing, "_hf_hook", None)
    if hook is not None and any(buffer.is_meta for buffer in hashing.buffers()):
        hook.pre_forward(hashing)
        hook.offload = False


class EngramModel(EngramPreTrainedModel):
    """A backbone with memory, without a language-model head.

    An instance is also one of the backbone's own class: its parameters have the names that they have there, and its
    `forward` takes the same arguments.

    Args:
        config: names the backbone in `text_config`.
        backbone: an instance to use instead of a new one; it is changed in place.
        engram_tables: tables that were found beside the weights; None to have them among the weights.

    Raises:
        ValueError: the backbone has memory already, has no decoder layers or no cache, or its forward was replaced.
    """

    _cache_name: str = CACHE_NAMES[0]  # what the backbone's forward calls its cache
    _takes_image_mask: bool = False

    def __new__(cls, config: EngramConfig | None = None, backbone: PreTrainedModel | None = None, engram_tables=None):
        if config is None:  # for pickle and torch's replicas, which fill in the state themselves
            return super().__new__(cls)
        config.validate_engram()  # fields of the backbone may have changed since the config was made
        if backbone is None:
            # In the dtype that the caller builds this model in, as a backbone that is built by itself.
            backbone = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())
        require_extensible(backbone)
        layers = _decoder_layers(backbone, config)
        for layer_id in config.engram_layer_ids:
            require_extensible(layers[layer_id])  # all of them before the first one is changed
        extend(backbone, cls if cls._extends is None else cls._extends[0])
        return backbone

    def __init__(
        self,
        config: EngramConfig,
        backbone: PreTrainedModel | None = None,
        engram_tables: FoundTables | None = None,
    ):
        # The backbone has been initialized as what it is: here the memory is added.
        _warn_of_untested_version()
        config.text_config = self.config  # from_config copies; there is to be one
        self._become(config)
        self.hashing = NgramHasher.from_config(config)
        # Use the embedding's dtype; layers may be partly float32 or quantized.
        dtype = self.get_input_embeddings().weight.dtype
        for index, layer_id in enumerate(config.engram_layer_ids):
            add_memory_to_layer(self.layers[layer_id], config, index, dtype)
        self._no_split_modules = {
            *(self._no_split_modules or ()),
            *(type(self.layers[layer_id]).__name__ for layer_id in config.engram_layer_ids),
        }
        self._reaches_layers = False  # whether what forward hands to the backbone is known to arrive
        if engram_tables is not None:
            engram_tables.mount(self)
        self.prefetcher: Prefetcher | None = None
        self.prefetch_mounted()
        self._added_tokens_share_ids = False
        self._keep_token_map_beside_embeddings()
        self.init_weights()
        if not self.hashing.primes.is_meta and bool(self.hashing.primes.any()):
            self.hashing.settle()  # else it is to be loaded first

    @classmethod
    def _members(cls, base: type) -> dict[str, Any]:
        parameters = inspect.signature(base.forward).parameters
        return {
            **super()._members(base),
            "forward": _forward_with_memory(base.forward, tuple(parameters)[1:]),
            "_cache_name": next(name for name in CACHE_NAMES if name in parameters),
            "_takes_image_mask": "image_mask" in parameters,
        }

    def prefetch_mounted(self) -> None:
        """Have rows fetched ahead if the tables are no parameters."""
        tables = [memory.table for memory in self.memories().values()]
        if self.prefetcher is None and not any(table.is_resident for table in tables):
            self.prefetcher = Prefetcher(tables)

    def memories(self) -> dict[int, EngramMemory]:
        """The memory of every listed decoder layer, by layer."""
        return {layer_id: self.layers[layer_id].engram for layer_id in self.config.engram_layer_ids}

    def settle_memory(self) -> None:
        """Check and fix what loading has filled in: the hash is exact, and quantized rows take no gradient."""
        for memory in self.memories().values():
            memory.table.keep_frozen()
        _hold_hash(self.hashing)
        self.hashing.settle()

    def _keep_token_map_beside_embeddings(self) -> None:
        """Have the ids of added tokens travel with their embeddings, which is what an adapter saves of added tokens."""
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
        current.fill_(DEAD)
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
            # The hash was drawn for the old vocabulary; from here on that has to be said.
            config.engram_compressed_vocab_size = old_size
            hashing.token_map = torch.arange(old_size, device=hashing.multipliers.device)
        token_map = hashing.token_map[:new_size]
        first = max(config.engram_compressed_vocab_size, int(token_map.max()) + 1)
        added = torch.arange(first, first + max(new_size - old_size, 0), device=token_map.device)
        if not (token_map >= 0).any():
            added = torch.full_like(added, DEAD)
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
        history: EngramHistory | None = None,
        past_length: int | torch.Tensor | None = None,
    ) -> EngramInputs:
        """Row ids of all layers, from token ids alone: this can run before, or elsewhere than, the backbone.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, past + S]`, 0 for padding; masks of other shapes say nothing about padding here. Padding
                is looked through, unless positions say that something else is between.
            position_ids: `[B, S]`; a document starts wherever they do not go on by one.
            image_mask: bool `[B, S]`, True at image positions: no memory there, none looked back through.
            sequence_ids: `[B, S]`, equal within a packed document; instead of `position_ids`. Later calls of the same
                `history` go on with it, or without any with the last document.
            history: what earlier calls left; this call is staged in it, to be committed when the backbone has run.
            past_length: positions before this call, by which the mask is read; those of the history if not given.
        """
        _hold_hash(self.hashing)
        if past_length is None and history is not None:
            past_length = history.get_seq_length()
        is_text = _mask_of_call(attention_mask, input_ids, past_length)
        compaction = Compaction(is_text)
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
            ids = ids.where(valid, DEAD)
        if self.hashing.token_map is not None:
            valid = ids >= 0  # no memory either where the hash does not know a token
        if history is not None:
            history.require_batch(input_ids.shape[0])
        documents = _documents(input_ids, compaction, position_ids, sequence_ids, history)
        if history is not None:
            documents = torch.zeros_like(ids) if documents is None else documents
            past = history.before(ids)
            history.stage(ids, documents, compaction, sequence_ids is not None)
        else:
            past = nothing_before(ids, lookback_reach(self.config))
        row_ids, documents = self._hash(ids, documents, past, compaction)
        # Known to reach the layers, or compiled: what they note would be guarded, and compiled again whenever it changes.
        readers = None if self._reaches_layers or torch.compiler.is_compiling() else set()
        return EngramInputs(row_ids, compaction, valid, documents, history, readers=readers)

    def _hash(
        self,
        ids: torch.Tensor,
        documents: torch.Tensor | None,
        past: tuple[torch.Tensor, torch.Tensor],
        compaction: Compaction,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Row ids `[L, B, S, T]` of ids `[B, S]`, and documents `[B, R + S]` with padding moved in front."""
        length = ids.shape[1]
        ids = compaction.join(past[0], ids)
        documents = None if documents is None else compaction.join(past[1], documents)
        reach = ids.shape[1] - length
        split = (None, None) if documents is None else (documents[:, reach:], documents[:, :reach])
        row_ids = self.hashing(ids[:, reach:], split[0], ids[:, :reach], split[1])
        if compaction.is_text is not None:
            row_ids = compaction.restore(row_ids.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)
            row_ids = row_ids.where(compaction.is_text[..., None], 0)
        return row_ids, documents

    def _run_with_memory(self, run_backbone: Callable, inputs: dict[str, Any]):
        """The backbone's outputs for the keyword arguments `inputs`, with memory."""
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            raise EngramError(
                "Engram looks memory up by token id, so input_ids is needed (got None); pass it together with "
                "inputs_embeds if the embeddings are your own."
            )
        cache = self._settle_cache(inputs)
        history = None if cache is None else attach_history(cache, self.config)
        image_mask, padding_mask = inputs.pop("image_mask", None), inputs.pop("padding_mask", None)
        if image_mask is None and hasattr(self, "get_image_mask"):
            image_mask = self.get_image_mask(input_ids)
        mask = inputs.get("attention_mask") if padding_mask is None else padding_mask
        memory = self.prepare_memory(
            input_ids,
            mask,
            inputs.get("position_ids"),
            image_mask,
            inputs.get("seq_idx"),
            history,
            None if cache is None else cache.get_seq_length(),
        )
        memory = memory._replace(
            cache=cache, gates=inputs.pop("engram_gate_values", None), edit=inputs.pop("engram_edit", None)
        )
        if self.prefetcher is not None:
            memory = memory._replace(fetched=self.prefetcher.start(memory.row_ids))
        if self._takes_image_mask:
            inputs["image_mask"] = image_mask
        if inputs.get("inputs_embeds") is not None:
            inputs["input_ids"] = None
        outputs = run_backbone(self, **inputs, engram_inputs=memory)
        self._require_reached(memory)
        self._require_history_kept(cache, outputs, inputs["use_cache"])
        if history is not None:
            history.commit()
        return outputs

    def _settle_cache(self, inputs: dict[str, Any]) -> Cache | None:
        """The cache of a call, made if one is needed; in `inputs` under the name that the backbone has for it."""
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
            use_cache, cache = False, None  # a replayed layer would store its states twice
        if use_cache and cache is None:
            cache = begin_cache(self.config)
        inputs.pop("past_key_values", None), inputs.pop("cache", None)
        inputs[self._cache_name], inputs["use_cache"] = cache, use_cache
        return cache

    def _require_reached(self, memory: EngramInputs) -> None:
        self._reaches_layers |= bool(memory.readers)
        # With `assistant_early_exit`, the layers that run may all come before the first memory.
        if memory.readers == set() and min(self.config.engram_layer_ids) < self.config.num_hidden_layers:
            raise EngramError(
                f"{self._extends[1].__name__} ran without memory: it does not hand keyword arguments on to its layers, so Engram "
                "cannot reach them; use another backbone."
            )

    def _require_history_kept(self, cache: Cache | None, outputs, use_cache: bool) -> None:
        """Refuse outputs whose cache is not the one that holds the memory's history: the next step would be wrong."""
        if cache is None:
            return
        parts = outputs if isinstance(outputs, tuple) else outputs.values()
        used = next((part for part in parts if isinstance(part, Cache)), None)
        if used is not cache and (use_cache or used is not None):
            raise EngramError(
                f"{self._extends[1].__name__} returned another cache than the one that holds the memory's history, so that later "
                "tokens would read wrong rows; use_cache=False runs it, and another version of transformers may."
            )


# In a state dict, under the input embeddings.
_TOKEN_MAP_KEY = "engram_token_map"


class _AddTokenMap:
    """Hook of the input embeddings: adds the compressed ids of added tokens to their state dict.

    PEFT saves the embeddings of a model whose vocabulary has grown with the adapter, and nothing else of the model. What
    `save_pretrained` writes does not have them: there, the whole token map is a buffer of its own.
    """

    def __init__(self, model: "EngramModel"):
        self.model = model

    def __call__(self, _module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_) -> None:
        # The same resizing alone would give each new token an id of its own.
        if self.model._added_tokens_share_ids:
            state_dict[prefix + _TOKEN_MAP_KEY] = self.model.hashing.token_map.clone()


class _TakeTokenMap(_AddTokenMap):
    """Hook of the input embeddings: installs the compressed ids that were saved with them."""

    def __call__(self, _module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_) -> None:
        token_map = state_dict.pop(prefix + _TOKEN_MAP_KEY, None)
        if token_map is not None:
            self.model.replace_token_map(as_token_map(token_map[token_map >= 0]))


def _forward_with_memory(forward: Callable, parameters: tuple[str, ...]) -> Callable:
    """The backbone's `forward`, with memory: of the same arguments, by position and by name."""

    @functools.wraps(forward)
    def forward_with_memory(self: EngramModel, *args, **kwargs):
        given = dict(zip(parameters, args, strict=False))
        if len(args) > len(given) or given.keys() & kwargs.keys():
            return forward(self, *args, **kwargs)  # which refuses them
        return self._run_with_memory(forward, {**given, **kwargs})

    return forward_with_memory


def _mask_of_call(
    mask: torch.Tensor | None, input_ids: torch.Tensor, past: int | torch.Tensor | None
) -> torch.Tensor | None:
    """Where the positions `[B, S]` of a call are text, in a mask that begins with the past and may go on into the future."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    length = input_ids.shape[1]
    others = mask.shape[1] - length
    if not isinstance(past, torch.Tensor):
        start = others if past is None else min(past, others)
        mask = mask[:, start : start + length]
    else:
        # A static cache knows its length on the device; asking for it would wait for that.
        start = past.to(mask.device).clamp_max(others)
        mask = mask.index_select(1, torch.arange(length, device=mask.device) + start)
    return mask.to(input_ids.device).bool()


def _documents(
    input_ids: torch.Tensor,
    compaction: Compaction,
    position_ids: torch.Tensor | None,
    sequence_ids: torch.Tensor | None,
    history: EngramHistory | None,
) -> torch.Tensor | None:
    """Documents `[B, S]`: as given, or told from where position ids restart; without either, the last one goes on."""
    if sequence_ids is not None:
        return sequence_ids.to(input_ids.device).long().expand_as(input_ids)
    has_past = history is not None and history.ids is not None
    # The caller's numbers cannot be compared with what positions tell.
    if has_past and (position_ids is None or history.is_numbered):
        return history.before(input_ids)[1][:, -1:].expand_as(input_ids)
    if position_ids is None:
        return None
    positions = position_ids[0] if position_ids.dim() == 3 else position_ids  # multimodal: the temporal axis
    index = torch.ones_like(input_ids) if compaction.is_text is None else compaction.is_text.long()
    index = index.cumsum(1) - 1 + (0 if history is None else history.text_before(input_ids))
    # Where a document began, counted in text: the same for all of its positions, and another for the next document.
    return index - positions.to(input_ids.device)


def _decoder_layers(backbone: PreTrainedModel, config: EngramConfig) -> nn.ModuleList:
    layers = getattr(backbone, "layers", None)
    expected = config.text_config.num_hidden_layers
    if not set(CACHE_NAMES) & set(inspect.signature(backbone.forward).parameters) or not _counts_positions(config):
        raise EngramError(
            f"{type(backbone).__name__} keeps no transformers Cache that counts positions, where the memory's history lives; "
            "use a backbone with attention layers and such a cache."
        )
    if not isinstance(layers, nn.ModuleList) or len(layers) < expected:
        raise EngramError(
            f"{type(backbone).__name__} has no `layers` with its {expected} decoder layers, so there is nothing to add "
            "memory to; use a decoder whose model keeps them in a ModuleList `layers`, as Mixtral or Llama do."
        )
    return layers


def _counts_positions(config: EngramConfig) -> bool:
    """Whether the backbone's cache knows how many positions it holds; that of recurrent layers alone does not."""
    try:
        return DynamicCache(config=config.text_config).get_seq_length() == 0
    except ValueError:
        return False


class EngramForCausalLM(EngramPreTrainedModel, GenerationMixin):
    """A causal language model with memory, on any backbone.

    An instance is also one of the backbone's own class (`MixtralForCausalLM`, ...), whose forward it runs: head, logit
    scaling, loss and auxiliary losses, and whatever is set on the model, are the backbone's.

    Args:
        config: names the backbone in `text_config`.
        host: a causal language model to use instead of a new one; it is changed in place.
        engram_tables: as in [`EngramModel`].

    Raises:
        ValueError: as [`EngramModel`].
    """

    _host_class = AutoModelForCausalLM

    def __new__(cls, config: EngramConfig | None = None, host: PreTrainedModel | None = None, engram_tables=None):
        if config is None:  # for pickle and torch's replicas, which fill in the state themselves
            return super().__new__(cls)
        config.validate_engram()
        if host is None:
            host = cls._host_class.from_config(config.text_config, dtype=torch.get_default_dtype())
        require_extensible(host)
        config.text_config = host.config  # from_config copies; there is to be one
        EngramModel(config, host.base_model, engram_tables)  # changes the host's base model in place
        extend(host, cls if cls._extends is None else cls._extends[0])
        return host

    def __init__(
        self,
        config: EngramConfig,
        host: PreTrainedModel | None = None,
        engram_tables: FoundTables | None = None,
    ):
        # The host has been initialized as what it is, and its base model has memory.
        self._become(config)
        base, prefix = self.base_model, self.base_model_prefix
        for name in ("_no_split_modules", "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
            known = (getattr(part, name) or () for part in (type(self), self, base))
            setattr(self, name, set().union(*known))
        beside = {f"{prefix}.{name}" for name in base._keys_to_ignore_on_save or () if name.endswith(_TOKEN_MAP_KEY)}
        self._keys_to_ignore_on_save = {*(self._keys_to_ignore_on_save or ()), *beside}
        self.init_weights()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike | PreTrainedModel,
        tokenizer=None,
        *,
        layer_ids: list[int],
        variant: str = "paper",
        rows: int | None = None,
        memory_fraction: float | None = None,
        **kwargs,
    ) -> "EngramForCausalLM":
        """Add memory to a pretrained causal language model, whose logits stay exactly as they are until trained.

        Args:
            backbone: a causal language model (changed in place), or a name or folder for `AutoModelForCausalLM`. If it is
                quantized, the memory is not.
            tokenizer, layer_ids, variant, rows, memory_fraction: see [`EngramConfig.for_backbone`].
            **kwargs: `engram_*` fields of the config; the rest goes to `AutoModelForCausalLM.from_pretrained`.

        Raises:
            ValueError: see [`EngramConfig.for_backbone`]; or the backbone is an encoder-decoder, has no layers, or is
                quantized in a way that cannot leave the memory out.
        """
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("engram_")}
        if isinstance(backbone, PreTrainedModel):
            if kwargs:
                raise EngramError(f"{sorted(kwargs)} only apply when the backbone is loaded by name.")
            host = backbone
        else:
            host = cls._host_class.from_pretrained(backbone, **kwargs)
        if any(parameter.is_meta for parameter in host.parameters()):
            raise EngramError(
                "Some of the backbone's weights are offloaded; add memory with all of them loaded, save the model, and "
                "load that with a device_map."
            )
        config = EngramConfig.for_backbone(
            host.config,
            tokenizer,
            layer_ids=layer_ids,
            variant=variant,
            rows=rows,
            memory_fraction=memory_fraction,
            **fields,
        )
        config.dtype = host.dtype
        for module in host.modules():
            module._is_hf_initialized = True  # its weights are trained ones
        model = cls(config, host)
        model.model.hashing.to(host.device)
        model.generation_config = host.generation_config
        _leave_memory_unquantized(model)
        for memory in model.model.memories().values():
            memory.zero_value_projection()
        if tokenizer is not None and config.engram_compressed_vocab_size is not None:
            model.set_token_map(tokenizer)
        return model.train(host.training)

    def prepare_inputs_for_generation(
        self, input_ids, *args, attention_mask=None, inputs_embeds=None, image_mask=None, seq_idx=None, **kwargs
    ):
        """As the host does, and what memory needs besides: ids beside embeddings, and masks of just these positions."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        # Phi-3 drops its cache past the original context length.
        embeds, cache = inputs.get("inputs_embeds"), _cache_in(inputs)
        length = (inputs["input_ids"] if embeds is None else embeds).shape[1]
        if embeds is not None and input_ids.shape[1] >= length:
            inputs["input_ids"] = input_ids[:, -length:]
        if image_mask is not None:  # what is generated is text
            inputs["image_mask"] = _slice_to_step(image_mask, torch.zeros_like(image_mask[:, :1]), cache, length)
        if seq_idx is not None:  # and belongs to the last document
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
            history = attach_history(cache, self.config)
            if generation_config.is_assistant:
                history.activate_past_recording()

    def init_continuous_batching(self, *args, **kwargs):
        """Not supported: `generate_batch` keeps its state in paged blocks, where the memory's history has no place.

        Raises:
            ValueError: always.
        """
        raise EngramError("Engram models do not support continuous batching (generate_batch); call generate instead.")

    @torch.no_grad()
    def engram_gates(self, input_ids: torch.LongTensor, **kwargs) -> dict[int, torch.Tensor]:
        """How far the memory's gates open for a text, in one forward.

        Args:
            input_ids: `[B, S]`.
            **kwargs: of `forward`.

        Returns:
            Gates `[B, S, G]` between 0 and 1, by decoder layer.
        """
        gates: dict[int, torch.Tensor] = {}
        self(input_ids, **{**kwargs, "use_cache": False}, engram_gate_values=gates)
        return {layer_id: gates[index] for index, layer_id in enumerate(self.config.engram_layer_ids)}


class EngramForConditionalGeneration(EngramForCausalLM):
    """A model of text and images with memory, on a backbone that reads images; positions of images have no memory.

    Of the same checkpoint, [`EngramForCausalLM`] is the model of text. The arguments are the same.
    """

    _host_class = AutoModelForImageTextToText


def _cache_in(arguments: dict[str, Any]) -> Cache | None:
    """The cache among keyword arguments, under whichever name."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def _slice_to_step(mask: torch.Tensor, fill: torch.Tensor, cache: Cache | None, length: int) -> torch.Tensor:
    """The `length` positions after those in `cache`, of what is `[B, S]` for a prompt and `[B, 1]` for all that follows."""
    start = 0 if cache is None else int(cache.get_seq_length())
    missing = max(start + length - mask.shape[1], 0)
    return torch.cat([mask, fill.expand(-1, missing)], dim=1)[:, start : start + length]


def _leave_memory_unquantized(model: EngramForCausalLM) -> None:
    """On a quantized host, list the unquantized modules as skipped: loading quantizes every layer that is not.

    Raises:
        ValueError: the host is quantized in a way that cannot leave anything out.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return
    config = copy.deepcopy(model.hf_quantizer.quantization_config)
    names = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
    skipped = next((name for name in names if hasattr(config, name)), None)
    if skipped is None:
        raise EngramError(
            f"A {type(config).__name__} cannot leave the memory out of what it quantizes; add memory to the backbone "
            "before it is quantized."
        )
    setattr(config, skipped, _unquantized_modules(model))
    model.hf_quantizer.quantization_config = model.config.quantization_config = config
    vars(model.config.text_config).pop("quantization_config", None)  # of the backbone alone, and no longer true of it


def _unquantized_modules(model: EngramForCausalLM) -> list[str]:
    # Patterns, from the root of a model with head or without: not every quantizer takes the end of a name.
    prefix = f"{model.base_model_prefix}."
    names = [name for name, module in model.named_modules() if _is_unquantized(module)]
    return [f"({prefix})?{name.removeprefix(prefix)}" if name.startswith(prefix) else name for name in names]


def _is_unquantized(module: nn.Module) -> bool:
    """Whether a linear layer, or one of stacked experts, has only matrices of ordinary floats."""
    matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1]
    is_candidate = isinstance(module, nn.Linear) or any(matrix.dim() > 2 for matrix in matrices)
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return is_candidate and all(type(matrix) is nn.Parameter and matrix.dtype in floats for matrix in matrices)


# Trainer looks here for whether labels are to be shifted when it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(EngramConfig.model_type, EngramForCausalLM.__name__)

EngramModel.register_for_auto_class("AutoModel")
EngramForCausalLM.register_for_auto_class("AutoModelForCausalLM")
EngramForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
