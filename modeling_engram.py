"""Engram memory for any decoder of transformers: the models that carry it.

Listed decoder layers of the backbone get a submodule `engram` and run it on the residual streams before their own
forward. What they read is decided once per forward, from token ids alone, and travels as one keyword argument.

Shape letters: B batch, S positions, G residual streams, D hidden size, L Engram layers, T hash heads of all orders.
"""

import copy
import dataclasses
import inspect
import os
from contextvars import ContextVar

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .cache_engram import EngramHistoryLayer, attach_history
from .card_engram import write_model_card
from .configuration_engram import EngramConfig
from .folder_writer_engram import FolderWriter, replace_files, require_settled
from .hashing_engram import DEAD, NgramHasher, as_token_map
from .layer_engram import EngramInputs, EngramMemory, EngramRMSNorm, add_memory_to_layer
from .loading_engram import settle_revision, undo_renamings_of_memory
from .modeling_deepseek_v41 import DeepseekV41TextModel
from .prefetch_engram import Prefetcher
from .residency_engram import (
    FoundTables,
    complete_save,
    find_tables,
    leave_tables_on_disk,
    save_tables,
    tables_by_reference,
)
from .table_engram import EngramTable

logger = logging.get_logger(f"transformers.{__name__}")

# Imported for its registration: a V4.1 model is to load as remote code, where nothing else would bring its backbone.
KNOWN_BACKBONES = (DeepseekV41TextModel,)

# What a folder with remote code says of itself in config.json.
AUTO_MAP = {
    "AutoConfig": "configuration_engram.EngramConfig",
    "AutoModel": "modeling_engram.EngramModel",
    "AutoModelForCausalLM": "modeling_engram.EngramForCausalLM",
}


# The save that runs: what it is written with, and the variant of its weights.
_SAVE: ContextVar[tuple[FolderWriter, str | None] | None] = ContextVar("the save that runs", default=None)


class EngramPreTrainedModel(PreTrainedModel):
    """What [`EngramModel`] and [`EngramForCausalLM`] share: loading, initialization and the token map."""

    config_class = EngramConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 (transformers' convention)
    # The backbone checks what it supports itself, with its own message.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

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
            ValueError: tables or hash constants are missing from the checkpoint, or disagree with its config.
        """
        require_settled(pretrained_model_name_or_path)
        kwargs = settle_revision(pretrained_model_name_or_path, kwargs)
        tables = find_tables(pretrained_model_name_or_path, engram_residency, **kwargs)
        if tables is not None:
            kwargs["engram_tables"] = tables
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        missing = sorted(key for key in info["missing_keys"] if ".engram." in key or "hashing." in key)
        if missing:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} tensors of the memory, such as {missing[0]}; complete the folder "
                "(a shard or engram_tables.json may be absent), or add memory to a plain backbone with EngramForCausalLM.from_backbone."
            )
        model.base_model.keep_tables_frozen()
        _hold_hash(model.base_model.hashing)
        model.base_model.hashing.verify_constants()
        if tables is not None:
            tables.verify(model.base_model)
        return (model, info) if output_loading_info else model

    # The one place where the names of what is loaded can be told after all submodels have had their say.
    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        mapping = load_config.weight_mapping or []
        mapping = [*mapping, *undo_renamings_of_memory(model, mapping)]
        load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        leave_tables_on_disk(model, load_config.device_map)
        model.base_model.prefetch_mounted()
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

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
        if not self._saves_adapter():
            write_model_card(os.path.join(working_dir, "README.md"), self.config, repo_id, token)
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, token=token, **kwargs)

    def barrier_after_gathered_checkpoint_save(self, *args, **kwargs):
        # The other processes of a sharded model go on behind this, and may load what was saved.
        self._complete_save()
        return super().barrier_after_gathered_checkpoint_save(*args, **kwargs)

    def initialize_weights(self):
        """Initialize what was not loaded.

        Memory sits inside layers of the backbone, whose own initialization does not know it, so it goes first.
        """
        self._initialize_memory()
        super().initialize_weights()

    @torch.no_grad()
    @init.guard_torch_init_functions()
    def _initialize_memory(self) -> None:
        for memory in self.base_model.memories().values():
            for module in memory.modules():
                # Custom code, to transformers: what a checkpoint filled is left alone without drawing anything. So is what
                # a device map put on disk.
                if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                    self._initialize_weights(module, is_custom_code=True)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, EngramTable):
            module.reset_parameters(getattr(self.config.text_config, "initializer_range", None) or 0.02)
        elif isinstance(module, EngramRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Conv1d):
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
            raise ValueError(
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
        self.config.auto_map = dict(AUTO_MAP)
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
    """Bring back what `offload_buffers` took away: the hash is used outside of its forward too, and is small."""
    hook = getattr(hashing, "_hf_hook", None)
    if hook is not None and any(buffer.is_meta for buffer in hashing.buffers()):
        hook.pre_forward(hashing)
        hook.offload = False


class EngramModel(EngramPreTrainedModel):
    """A backbone with memory, without a language-model head.

    Args:
        config: names the backbone in `text_config`.
        backbone: an instance to use instead of a new one; it is changed in place.
        engram_tables: tables that were found beside the weights; None to have them among the weights.
    """

    def __init__(
        self,
        config: EngramConfig,
        backbone: PreTrainedModel | None = None,
        engram_tables: FoundTables | None = None,
    ):
        super().__init__(config)
        config.validate_engram()  # fields of the backbone may have changed since the config was made
        if backbone is None:
            # In the dtype that the caller builds this model in, as a backbone that is built by itself.
            backbone = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())
        config.text_config = backbone.config  # from_config copies; there is to be one
        self.hashing = NgramHasher.from_config(config)
        layers = _decoder_layers(backbone, config)
        # Not a layer's: some backbones keep part of each layer in float32, and quantized ones most in a byte.
        dtype = backbone.get_input_embeddings().weight.dtype
        for index, layer_id in enumerate(config.engram_layer_ids):
            add_memory_to_layer(layers[layer_id], config, index, dtype)
        self.backbone = backbone
        self._no_split_modules = sorted({type(layers[layer_id]).__name__ for layer_id in config.engram_layer_ids})
        self._reaches_layers = False  # whether what forward hands to the backbone is known to arrive
        self._takes_image_mask = "image_mask" in inspect.signature(backbone.forward).parameters
        _inherit_abilities(self, backbone)
        if engram_tables is not None:
            engram_tables.mount(self)
        self.prefetcher: Prefetcher | None = None
        self.prefetch_mounted()
        self.post_init()

    def prefetch_mounted(self) -> None:
        """Have rows fetched ahead if the tables are no parameters."""
        tables = [memory.table for memory in self.memories().values()]
        if self.prefetcher is None and not any(table.is_resident for table in tables):
            self.prefetcher = Prefetcher(tables)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embedding."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's token embedding."""
        self.backbone.set_input_embeddings(value)

    def memories(self) -> dict[int, EngramMemory]:
        """The memory of every listed decoder layer, by layer."""
        return {layer_id: self.backbone.layers[layer_id].engram for layer_id in self.config.engram_layer_ids}

    def keep_tables_frozen(self) -> None:
        """To be called after loading; see [`~table_engram.EngramTable.keep_frozen`]."""
        for memory in self.memories().values():
            memory.table.keep_frozen()

    def replace_token_map(self, token_map: torch.Tensor) -> None:
        """Check and install a token map `[V]`; see [`EngramPreTrainedModel.set_token_map`]."""
        current = self.hashing.token_map
        if current is None:
            raise ValueError(
                "This model hashes uncompressed ids (engram_compressed_vocab_size is None), so it takes no token map."
            )
        if not self.config.engram_pad_token_id < token_map.numel() <= current.numel():
            raise ValueError(
                f"The token map has {token_map.numel()} tokens, but the model's vocabulary {current.numel()} (its pad "
                f"token is {self.config.engram_pad_token_id}); for more tokens, call "
                "resize_token_embeddings(len(tokenizer)) first."
            )
        self._require_same_ids(token_map, current[: token_map.numel()].cpu())
        current.fill_(DEAD)
        current[: token_map.numel()] = token_map.to(current.device)
        self.config.engram_added_tokens = int(token_map.max()) + 1 - self.config.engram_compressed_vocab_size

    def _require_same_ids(self, token_map: torch.Tensor, current: torch.Tensor) -> None:
        size, hashed = int(token_map.max()) + 1, self.config.engram_compressed_vocab_size
        original = (current >= 0) & (current < hashed)
        expected = hashed + self.config.engram_added_tokens
        if size < hashed or (size != expected and not original.any()):
            raise ValueError(
                f"The tokenizer compresses to {size} ids, but this model was built for {expected} "
                "(engram_compressed_vocab_size); every hash depends on that number. Use the tokenizer the model was "
                "built with."
            )
        if not torch.equal(current[original], token_map[original]):
            raise ValueError(
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
        if not hashing.has_token_map:
            added = torch.full_like(added, DEAD)
        hashing.token_map = torch.cat([token_map, added])
        config.engram_added_tokens = max(int(hashing.token_map.max()) + 1 - config.engram_compressed_vocab_size, 0)

    def prepare_memory(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        history: EngramHistoryLayer | None = None,
    ) -> EngramInputs:
        """Row ids of all layers, from token ids alone: this can run before, or elsewhere than, the backbone.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, past + S]`, 0 for padding; masks of other shapes say nothing about padding here.
            position_ids: `[B, S]`; a document starts wherever they do not go on by one.
            image_mask: bool `[B, S]`, True at image positions: no memory there, none looked back through.
            sequence_ids: `[B, S]`, equal within a packed document; instead of `position_ids`. Later calls of the same
                `history` go on with it, or without any with the last document.
            history: what earlier calls left; extended by this one.
        """
        _hold_hash(self.hashing)
        alive = _alive(input_ids, attention_mask, image_mask, history)
        if alive is None:
            ids = self.hashing.compress(input_ids)
        else:
            # A padded position may hold anything, even an id without an entry in the map.
            ids = self.hashing.compress(input_ids.masked_fill(~alive, self.config.engram_pad_token_id))
            ids = ids.masked_fill(~alive, DEAD)
        is_numbered = sequence_ids is not None
        sequence_ids = _sequence_ids(input_ids, position_ids, sequence_ids, history)
        past_ids = past_sequence_ids = None
        if history is not None:
            history.is_numbered |= is_numbered
            sequence_ids = torch.zeros_like(ids) if sequence_ids is None else sequence_ids
            past_ids, past_sequence_ids = history.remember_ids(ids, sequence_ids)
        row_ids = self.hashing(ids, sequence_ids, past_ids, past_sequence_ids)
        # Known to reach the layers, or compiled: what they note would be guarded, and compiled again whenever it changes.
        readers = None if self._reaches_layers or torch.compiler.is_compiling() else set()
        return EngramInputs(row_ids, alive, sequence_ids, past_sequence_ids, history, readers)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        image_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """The backbone's forward, with memory; returns the backbone's output.

        Args:
            input_ids: `[B, S]`; always needed, since memory is addressed by token ids.
            inputs_embeds: `[B, S, D]`, fed to the backbone instead of the embeddings of `input_ids`.
            image_mask: bool `[B, S]`, True at image positions, which have no memory.
            padding_mask: `[B, S]`, 0 for padding, for an `attention_mask` that is not 2-D and so does not tell.
            **kwargs: anything the backbone takes, and `seq_idx` `[B, S]`, the document of each packed position.

        Raises:
            ValueError: without `input_ids`, or for a cache that another model filled.
        """
        if input_ids is None:
            raise ValueError(
                "Engram looks memory up by token id, so input_ids is needed (got None); pass it together with "
                "inputs_embeds if the embeddings are your own."
            )
        if use_cache is None:
            use_cache = getattr(self.config.text_config, "use_cache", False)
        if self.training and getattr(self.backbone, "gradient_checkpointing", False):
            if past_key_values is not None:
                logger.warning_once(
                    "past_key_values is left out of account: gradient checkpointing runs without a cache."
                )
            use_cache, past_key_values = False, None  # a replayed layer would store its states twice
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        history = None if past_key_values is None else attach_history(past_key_values, self.config)
        padding = attention_mask if padding_mask is None else padding_mask
        memory = self.prepare_memory(input_ids, padding, position_ids, image_mask, kwargs.get("seq_idx"), history)
        if self.prefetcher is not None:
            memory = memory._replace(fetched=self.prefetcher.start(memory.row_ids))
        if self._takes_image_mask:
            kwargs["image_mask"] = image_mask
        outputs = self.backbone(
            input_ids=input_ids if inputs_embeds is None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            engram_inputs=memory,
            **kwargs,
        )
        self._reaches_layers |= bool(memory.readers)
        # With `assistant_early_exit`, the layers that run may all come before the first memory.
        if memory.readers == set() and min(self.config.engram_layer_ids) < self.config.num_hidden_layers:
            raise ValueError(
                f"{type(self.backbone).__name__} ran without memory: it does not hand keyword arguments on to its layers, "
                "so Engram cannot reach them; use another backbone."
            )
        return outputs


def _alive(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_mask: torch.Tensor | None,
    history: EngramHistoryLayer | None,
) -> torch.Tensor | None:
    """Positions `[B, S]` that are neither padding nor image; None if that is all of them."""
    alive = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        alive = _mask_of_call(attention_mask, input_ids.shape[1], history).to(input_ids.device).bool()
    if image_mask is not None:
        text = ~image_mask.to(input_ids.device).bool()
        alive = text if alive is None else alive & text
    return alive


def _mask_of_call(mask: torch.Tensor, length: int, history: EngramHistoryLayer | None) -> torch.Tensor:
    """The `length` positions of this call in a mask that begins with the past, and may go on into the future."""
    others = mask.shape[1] - length
    past = others if history is None else history.get_seq_length()
    if not isinstance(past, torch.Tensor):
        start = min(past, others)
        return mask[:, start : start + length]
    # A static cache knows its length on the device; asking for it would wait for that.
    start = past.to(mask.device).clamp_max(others)
    return mask.index_select(1, torch.arange(length, device=mask.device) + start)


def _sequence_ids(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    sequence_ids: torch.Tensor | None,
    history: EngramHistoryLayer | None,
) -> torch.Tensor | None:
    """Documents `[B, S]`: as given, or told from where position ids restart; without either, the last one goes on."""
    if sequence_ids is not None:
        return sequence_ids.to(input_ids.device).long().expand_as(input_ids)
    last = None if history is None else history.last_sequence_ids(input_ids)
    # The caller's numbers cannot be compared with what positions tell.
    if last is not None and (position_ids is None or history.is_numbered):
        return last.expand_as(input_ids)
    if position_ids is None:
        return None
    past_length = 0 if history is None else history.get_seq_length()
    positions = position_ids[0] if position_ids.dim() == 3 else position_ids  # multimodal: the temporal axis
    index = torch.arange(input_ids.shape[1], device=input_ids.device) + past_length  # a tensor in a static cache
    # Where a document began: the same for all of its positions, and another for the next document.
    return (index - positions.to(input_ids.device)).expand_as(input_ids)


def _decoder_layers(backbone: PreTrainedModel, config: EngramConfig) -> nn.ModuleList:
    if isinstance(backbone, EngramModel):
        backbone = backbone.backbone  # its layers will say that they have memory
    if "past_key_values" not in inspect.signature(backbone.forward).parameters:
        raise ValueError(
            f"{type(backbone).__name__} keeps no past_key_values, where the memory's history lives; use a backbone with "
            "a transformers Cache."
        )
    layers = getattr(backbone, "layers", None)
    expected = config.text_config.num_hidden_layers
    if not isinstance(layers, nn.ModuleList) or len(layers) < expected:
        raise ValueError(
            f"{type(backbone).__name__} has no `layers` with its {expected} decoder layers, so there is nothing to add "
            "memory to; use a decoder whose model keeps them in a ModuleList `layers`, as Mixtral or Llama do."
        )
    return layers


def _inherit_abilities(model: PreTrainedModel, backbone: PreTrainedModel) -> None:
    """What `generate`, `compile` and trainers ask of a model is decided by its backbone."""
    model._is_stateful = backbone._is_stateful
    model._can_compile_fullgraph = backbone._can_compile_fullgraph
    model.config._attn_implementation = backbone.config._attn_implementation


class EngramForCausalLM(EngramPreTrainedModel, GenerationMixin):
    """A causal language model with memory, on any backbone.

    The backbone's own causal language model (its *host*: `MixtralForCausalLM`, ...) lends its forward, so that its
    head, logit scaling, loss and auxiliary losses are exactly the host's; the modules are this model's.

    Args:
        config: names the backbone in `text_config`.
        host: a causal language model to use instead of a new one; it is changed in place.
        engram_tables: as in [`EngramModel`].
    """

    def __init__(
        self,
        config: EngramConfig,
        host: PreTrainedModel | None = None,
        engram_tables: FoundTables | None = None,
    ):
        super().__init__(config)
        if host is None:
            host = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.get_default_dtype())
        self.model = EngramModel(config, host.base_model, engram_tables)
        self.lm_head = host.get_output_embeddings()
        self._host_names = _host_parts(host)
        embeddings = self.get_input_embeddings()
        embedding_name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{embedding_name}.weight"}
        # In a tuple, so that torch does not register the host as a submodule: it only lends its forward.
        self._host = (host,)
        self._lend_parts()  # now, lest the first forward change what a compiler has seen
        self.vocab_size = config.vocab_size
        _inherit_abilities(self, host)
        self.post_init()
        for plan in (
            "_tp_plan",
            "_pp_plan",
        ):  # what the host's class says of its head; the layers' came with the backbone
            own = getattr(type(host), plan, None) or {}
            getattr(self, plan).update(
                {self._host_names[name]: how for name, how in own.items() if name in self._host_names}
            )

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
                raise ValueError(f"{sorted(kwargs)} only apply when the backbone is loaded by name.")
            host = backbone
        else:
            host = AutoModelForCausalLM.from_pretrained(backbone, **kwargs)
        if any(parameter.is_meta for parameter in host.parameters()):
            raise ValueError(
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
        _inherit_quantization(model, host)
        for memory in model.model.memories().values():
            memory.silence()
        if tokenizer is not None and config.engram_compressed_vocab_size is not None:
            model.set_token_map(tokenizer)
        return model.train(host.training)

    def _replicate_for_data_parallel(self):
        # Replicas run at the same time, each in a host that holds its own parts.
        replica = super()._replicate_for_data_parallel()
        replica._host = (self._host[0]._replicate_for_data_parallel(),)
        return replica

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's token embedding."""
        self.model.set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """See [`EngramPreTrainedModel.resize_token_embeddings`]."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self._host[0].vocab_size = self.config.vocab_size
        return embeddings

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ):
        """The host's forward, with memory; returns the host's output.

        Args:
            input_ids: `[B, S]`; always needed, since memory is addressed by token ids.
            inputs_embeds: `[B, S, D]`, fed to the backbone instead of the embeddings of `input_ids`.
            labels: `[B, S]`, -100 where there is no loss.
            logits_to_keep: compute logits of the last so many positions only (0: all), or of these positions.
            **kwargs: `image_mask`, `seq_idx` (see [`EngramModel.forward`]) and anything the host takes.
        """
        host = self._lend_parts()
        return host.forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _lend_parts(self) -> PreTrainedModel:
        """The host, with this model's modules for its own: adapters and resizing replace them."""
        host = self._host[0]
        for host_name, own_name in self._host_names.items():
            module = getattr(self, own_name)
            if host._modules[host_name] is not module:
                host._modules[host_name] = module
        return host

    def prepare_inputs_for_generation(
        self,
        input_ids,
        *args,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        image_mask=None,
        seq_idx=None,
        **kwargs,
    ):
        """As the host does, and what memory needs besides: ids beside embeddings, and masks of just these positions."""
        inputs = self._host[0].prepare_inputs_for_generation(
            input_ids,
            *args,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        # Some hosts begin anew in the middle (Phi-3, where other rotations hold from a length on).
        embeds, past_key_values = inputs.get("inputs_embeds"), inputs.get("past_key_values")
        length = (inputs["input_ids"] if embeds is None else embeds).shape[1]
        if embeds is not None and input_ids.shape[1] >= length:
            inputs["input_ids"] = input_ids[:, -length:]
        if image_mask is not None:  # what is generated is text
            image_mask = _of_call(image_mask, torch.zeros_like(image_mask[:, :1]), past_key_values, length)
            inputs["image_mask"] = image_mask
        if seq_idx is not None:  # and belongs to the last document
            inputs["seq_idx"] = _of_call(seq_idx, seq_idx[:, -1:], past_key_values, length)
        if attention_mask is not None and inputs.get("attention_mask") is not attention_mask:
            # For a static cache the mask became 4-D, which no longer says what is padding.
            inputs["padding_mask"] = attention_mask[:, -length:]
        return inputs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        # Assisted decoding asks the cache to record its past before the first forward; the history must be there.
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, Cache):
            history = attach_history(cache, self.config)
            if generation_config.is_assistant:
                history.activate_past_recording()

    def init_continuous_batching(self, *args, **kwargs):
        """Not supported: `generate_batch` keeps its state in paged blocks, where the memory's history has no place.

        Raises:
            ValueError: always.
        """
        raise ValueError("Engram models do not support continuous batching (generate_batch); call generate instead.")

    @torch.no_grad()
    def engram_gates(self, input_ids: torch.LongTensor, **kwargs) -> dict[int, torch.Tensor]:
        """How far the memory's gates open for a text: one forward, watched.

        Args:
            input_ids: `[B, S]`.
            **kwargs: of `forward`.

        Returns:
            Gates `[B, S, G]` between 0 and 1, by decoder layer.
        """
        gates, hooks = {}, []
        for layer_id, memory in self.model.memories().items():
            hooks.append(
                memory.gate.register_forward_hook(
                    lambda _module, _args, gate, layer_id=layer_id: gates.__setitem__(layer_id, gate)
                )
            )
        try:
            self(input_ids, **{**kwargs, "use_cache": False})
        finally:
            for hook in hooks:
                hook.remove()
        return gates


def _of_call(prompt: torch.Tensor, beyond: torch.Tensor, cache: Cache | None, length: int) -> torch.Tensor:
    """The `length` positions after those in `cache`, of what is `[B, S]` for a prompt and `[B, 1]` for all that follows."""
    start = 0 if cache is None else int(cache.get_seq_length())
    missing = max(start + length - prompt.shape[1], 0)
    return torch.cat([prompt, beyond.expand(-1, missing)], dim=1)[:, start : start + length]


def _host_parts(host: PreTrainedModel) -> dict[str, str]:
    """Names of the host's two parts, its base model and its head, to what they are called here."""
    head = host.get_output_embeddings()
    names = {name: "lm_head" for name, module in host.named_children() if module is head}
    names[host.base_model_prefix] = "model"
    left_out = [name for name, _ in host.named_parameters() if name.split(".")[0] not in names]
    if head is None or left_out:
        raise ValueError(
            f"{type(host).__name__} is more than a base model and a head (it also has {left_out or 'no head'}); Engram "
            "needs a plain causal language model."
        )
    return names


def _inherit_quantization(model: PreTrainedModel, host: PreTrainedModel) -> None:
    """Say of a model on a quantized host what it is: transformers saves, and PEFT adapts, such layers in their own way.

    Loading such a model quantizes every layer that its config does not name as left out, so all that are not are named.

    Args:
        model: an `EngramForCausalLM`; changed in place.
        host: the causal language model that lent it its layers.

    Raises:
        ValueError: the host is quantized in a way that cannot leave anything out.
    """
    if getattr(host, "hf_quantizer", None) is None:
        return
    config = copy.deepcopy(host.hf_quantizer.quantization_config)
    names = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
    skipped = next((name for name in names if hasattr(config, name)), None)
    if skipped is None:
        raise ValueError(
            f"A {type(config).__name__} cannot leave the memory out of what it quantizes; add memory to the backbone "
            "before it is quantized."
        )
    setattr(config, skipped, _unquantized_modules(model.model) + ["lm_head"] * _is_unquantized(model.lm_head))
    for flag in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(host, flag):
            setattr(model, flag, getattr(host, flag))
    model.hf_quantizer = copy.copy(host.hf_quantizer)
    model.hf_quantizer.quantization_config = model.config.quantization_config = config
    del host.config.quantization_config  # of the backbone alone, and no longer true of it


def _unquantized_modules(model: PreTrainedModel) -> list[str]:
    # Patterns, from the root of a model with head or without: not every quantizer takes the end of a name.
    return [f"(model.)?{name}" for name, module in model.named_modules() if _is_unquantized(module)]


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
