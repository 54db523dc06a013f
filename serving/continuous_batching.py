"""Continuous batching of transformers for models with memory: `generate_batch`, its manager, and their users.

transformers stores keys and values of many requests in blocks that requests share, copy and free. The memory's
look-back is stored in the same blocks, as the keys and values of a few more layers, and follows them. The model itself
receives it as look-back keywords; see `lookback`.

Shape letters: n sequences of a call, R positions that a look-back reaches, G residual streams, D hidden size, T packed
tokens.
"""

import copy
import dataclasses
import functools
import inspect
import math
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationMixin
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.utils import logging

from ..cache_engram import lookback_reach
from ..modeling_engram import EngramForCausalLM
from ..safetensors_engram import EngramError
from .admission import check_requests

logger = logging.get_logger(f"transformers.{__name__}")

# A token id has this number of bytes in the blocks; it is stored plus one, so that zeros, which padding reads, mean
# none.
_ID_BYTES = 4


def init_continuous_batching(
    model: EngramForCausalLM,
    generation_config=None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    **options,
):
    """Do as `GenerationMixin.init_continuous_batching`, which `generate_batch` and transformers' server call.

    Args:
        model: a model with a backbone that transformers can batch.
        generation_config, continuous_batching_config, **options: as in transformers. Flash kernels do not get block
            tables (`max_blocks_per_request=0`); CUDA graphs are recorded only on request.

    Returns:
        The `ContinuousBatchingManager`; it refuses requests that would end the batching, see `admission`.

    Raises:
        ValueError: the backbone cannot be batched, or not with these settings, or not by this version of transformers.
    """
    if "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters:
        raise EngramError(
            f"Continuous batching of models with memory needs transformers 5.20 or later, not {transformers.__version__}; update it, or "
            "call generate instead of generate_batch."
        )
    batched = BatchedModel(model)
    config = copy.copy(continuous_batching_config) or ContinuousBatchingConfig()
    batched.settle(config)
    manager = GenerationMixin.init_continuous_batching(
        batched, generation_config=generation_config, continuous_batching_config=config, **options
    )
    return check_requests(manager, model.config.get_text_config().vocab_size)


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """The layout of a token's record in blocks of keys and values.

    Args:
        heads, head_dim, dtype: those of a layer's keys, and of its values.
        first_layer: the index of the first layer that the cache has for records.
        layer_type: the type of these layers.
        conv_layers: decoder layers whose convolution inputs are stored.
        conv_shape, conv_dtype: shape and dtype of these inputs at one position.
    """

    heads: int
    head_dim: int
    dtype: torch.dtype
    first_layer: int
    layer_type: str
    conv_layers: tuple[int, ...]
    conv_shape: tuple[int, ...]
    conv_dtype: torch.dtype

    @property
    def conv_bytes(self) -> int:
        return math.prod(self.conv_shape) * self.conv_dtype.itemsize

    @property
    def layer_bytes(self) -> int:
        """The bytes of a token in one layer of the cache."""
        return 2 * self.heads * self.head_dim * self.dtype.itemsize

    @property
    def layers(self) -> range:
        """The indices of the layers for records."""
        count = math.ceil((_ID_BYTES + len(self.conv_layers) * self.conv_bytes) / self.layer_bytes)
        return range(self.first_layer, self.first_layer + count)

    def pack(self, input_ids: torch.Tensor, conv_inputs: dict[int, torch.Tensor]) -> torch.Tensor:
        """Return records uint8 `[T, layers * layer_bytes]` of ids `[T]` and convolution inputs `[T, G, D]`, by decoder
        layer.
        """
        parts = [(input_ids.int() + 1).unsqueeze(1).view(torch.uint8)]
        for layer in self.conv_layers:
            inputs = conv_inputs[layer].to(device=input_ids.device, dtype=self.conv_dtype)
            parts.append(inputs.flatten(1).contiguous().view(torch.uint8))
        record = torch.cat(parts, 1)
        return torch.nn.functional.pad(record, (0, len(self.layers) * self.layer_bytes - record.shape[1]))

    def unpack(self, record: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Return ids int64 `[..., ]`, -1 for none, and convolution inputs `[..., G, D]` of records uint8 `[..., layers
        * layer_bytes]`.
        """
        sizes = [_ID_BYTES, *[self.conv_bytes] * len(self.conv_layers)]
        ids, *inputs = record[..., : sum(sizes)].split(sizes, dim=-1)
        conv_inputs = {
            layer: part.contiguous().view(self.conv_dtype).unflatten(-1, self.conv_shape)
            for layer, part in zip(self.conv_layers, inputs, strict=True)
        }
        return ids.contiguous().view(torch.int32).squeeze(-1).long() - 1, conv_inputs


class BatchedModel:
    """A model with memory as transformers' manager of continuous batching uses it: its blocks have layers for records.

    All other attributes are read and set on the model itself.

    Args:
        model: a model that runs once, on one token, to show what its backbone caches.

    Raises:
        ValueError: the backbone cannot be batched; the message names it.
    """

    def __init__(self, model: EngramForCausalLM):
        vars(self).update(model=model, reach=lookback_reach(model.config), layout=_layout_of(model))

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self.model, name, value)

    def eval(self) -> "BatchedModel":
        """Put the model in eval mode."""
        self.model.eval()
        return self

    @property
    def config(self) -> "_ConfigWithRecords":
        """The model's config, whose `get_text_config()` has the layers for records, too."""
        return _ConfigWithRecords(self.model.config, self.layout)

    def settle(self, config: ContinuousBatchingConfig) -> None:
        """Turn off in `config` what records do not support.

        Raises:
            ValueError: CUDA graphs are requested, but rows are read from outside the device.
        """
        if config.max_blocks_per_request:
            logger.warning_once(
                "max_blocks_per_request is set to 0: a model with memory is batched without block tables of flash kernels."
            )
        config.max_blocks_per_request = 0
        wanted = config.use_cuda_graph
        if any(wanted) if isinstance(wanted, tuple) else wanted:
            if not all(memory.table.is_resident for memory in self.model.memory_model.memories().values()):
                raise EngramError(
                    "CUDA graphs cannot read rows from outside of the device; load the model with engram_residency='resident', or leave "
                    "use_cuda_graph out."
                )
        elif wanted is None:
            config.use_cuda_graph = False

    def __call__(self, **inputs: Any):
        """Return the model's outputs for one packed batch, with the look-back of each of its requests."""
        cache, layout = inputs["cache"], self.layout
        group = list(cache.cache_allocators).index(layout.layer_type)
        slots = self._slots_before(inputs, group)
        before = layout.unpack(_read(cache, layout, inputs, group, slots)) if slots is not None else None
        keywords = self._keywords(inputs, before)
        outputs = self.model(**inputs, **keywords)
        record = layout.pack(
            inputs["input_ids"][0], {k: v[0] for k, v in keywords.get("engram_conv_inputs", {}).items()}
        )
        _write(cache, layout, inputs, group, record)
        return outputs

    def _slots_before(self, inputs: dict[str, Any], group: int) -> torch.Tensor | None:
        """Return indices `[n, R]` into the blocks, of the positions before each sequence; None if no sequence has
        begun.

        Positions before the beginning point to the first block, from which transformers makes padding read zeros.
        """
        read_index = inputs["read_index"][group]
        if not read_index.numel():
            return None
        bounds_q, bounds_k = inputs["cu_seq_lens_q"].long(), inputs["cu_seq_lens_k"][self.layout.layer_type].long()
        first, past = bounds_k[:-1], bounds_k.diff() - bounds_q.diff()
        offsets = torch.arange(-self.reach, 0, device=read_index.device) + past.unsqueeze(1)
        found = read_index[(first.unsqueeze(1) + offsets).clamp(0, read_index.numel() - 1)]
        return found.where(offsets >= 0, 0)

    def _keywords(
        self, inputs: dict[str, Any], before: tuple[torch.Tensor, dict[int, torch.Tensor]] | None
    ) -> dict[str, Any]:
        width = self.model.config.engram_max_ngram_size - 1
        if before is None:
            count = inputs["cu_seq_lens_q"].numel() - 1
            ids, conv_inputs = inputs["input_ids"].new_full((count, width), -1), {}
        else:
            ids, conv_inputs = before
        keywords = {"lookback_token_ids": ids[:, ids.shape[1] - width :]}
        if self.layout.conv_layers:
            keywords |= {"lookback_conv_inputs": conv_inputs, "engram_conv_inputs": {}}
        return keywords


class _ConfigWithRecords:
    """A config of a model whose decoder has a few more layers; all other attributes are the config's own."""

    def __init__(self, config, layout: BlockLayout):
        vars(self).update(wrapped_config=config, block_layout=layout)

    def __getattr__(self, name: str):
        return getattr(self.wrapped_config, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self.wrapped_config, name, value)

    def get_text_config(self, *args, **kwargs):
        """Return the decoder's config, with layers for records."""
        text = copy.deepcopy(self.wrapped_config.get_text_config(*args, **kwargs))
        layers = self.block_layout.layers
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = [*text.layer_types, *[self.block_layout.layer_type] * len(layers)]
        text.num_hidden_layers = layers.stop
        return text


def _read(cache, layout: BlockLayout, inputs: dict[str, Any], group: int, slots: torch.Tensor) -> torch.Tensor:
    """Return records uint8 `[n, R, layers * layer_bytes]` at `slots` `[n, R]`."""
    empty = torch.empty(1, layout.heads, 0, layout.head_dim, dtype=layout.dtype, device=slots.device)
    nowhere = slots.new_empty(0)
    parts = [
        part.squeeze(0).transpose(0, 1).reshape(*slots.shape, -1).view(torch.uint8)
        for layer in layout.layers
        for part in _update(cache, inputs, group, layer, (empty, empty), slots.flatten(), nowhere)
    ]
    return torch.cat(parts, -1)


def _write(cache, layout: BlockLayout, inputs: dict[str, Any], group: int, record: torch.Tensor) -> None:
    """Store records uint8 `[T, layers * layer_bytes]` of a call's tokens in the slots of their keys and values."""
    index = inputs["write_index"][group]
    parts = record.view(layout.dtype).view(len(record), len(layout.layers), 2, layout.heads, layout.head_dim)
    for number, layer in enumerate(layout.layers):
        key, value = (part.transpose(0, 1).unsqueeze(0) for part in parts[:, number].unbind(1))
        _update(cache, inputs, group, layer, (key, value), index.new_empty(0), index)


def _update(cache, inputs, group: int, layer: int, states, read: torch.Tensor, write: torch.Tensor):
    """Store keys and values like an attention layer, and read others, by the cache's own method."""
    indices = {"read_index": read, "write_index": write}
    kwargs = {
        "cu_seq_lens_k": inputs["cu_seq_lens_k"],
        "max_length_k": inputs["max_length_k"],
        **{name: [index] * (group + 1) for name, index in indices.items()},
    }
    return cache.update(*states, layer, kwargs)


@torch.no_grad()
def _layout_of(model: EngramForCausalLM) -> BlockLayout:
    """Return the layout of records beside the keys and values of a model, which runs on one token to show them.

    Raises:
        ValueError: the backbone cannot be batched; the message names it and the reason.
    """
    refuse = functools.partial(_refusal, model)
    if model.config.is_composite:
        raise refuse("it reads more than text")
    text = model.config.get_text_config()
    if getattr(model, "_device_mesh", None) is not None:
        raise refuse("it is spread over devices by a tensor-parallel plan")
    kinds = set(getattr(text, "layer_types", None) or [_only_kind(text)])
    if not kinds <= {"full_attention", "sliding_attention"}:
        others = ", ".join(sorted(kinds - {"full_attention", "sliding_attention"}))
        raise refuse(f"transformers batches full and sliding attention, and it has layers of {others}")
    states, conv_inputs = _states_of_one_token(model)
    shapes = {tuple(part.shape[1::2]) for pair in states for part in pair}
    expected = (_kv_heads(text), _head_dim(text))
    if len(states) != text.num_hidden_layers or shapes != {expected}:
        found = " and ".join(f"{heads} x {size}" for heads, size in sorted(shapes))
        raise refuse(
            f"transformers keeps keys and values of {expected[0]} x {expected[1]} for {text.num_hidden_layers} layers, and it caches "
            f"{found or 'nothing'} for {len(states)}"
        )
    layer_type = "full_attention" if "full_attention" in kinds else "sliding_attention"
    reach = lookback_reach(model.config)
    if layer_type == "sliding_attention" and text.sliding_window - 1 < reach:
        raise refuse(
            f"its memory looks back {reach} positions, further than its sliding window of {text.sliding_window}"
        )
    sample = next(iter(conv_inputs.values()), None)
    return BlockLayout(
        *expected,
        dtype=model.dtype,
        first_layer=text.num_hidden_layers,
        layer_type=layer_type,
        conv_layers=tuple(sorted(conv_inputs)),
        conv_shape=() if sample is None else tuple(sample.shape[2:]),
        conv_dtype=model.dtype if sample is None else sample.dtype,
    )


def _states_of_one_token(
    model: EngramForCausalLM,
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], dict[int, torch.Tensor]]:
    """Return keys and values `[1, heads, 1, head size]` that each layer caches, and convolution inputs by decoder
    layer.
    """
    implementation = model.config._attn_implementation
    if implementation.startswith("paged|"):  # This attention runs in a batch only.
        model.set_attn_implementation(implementation.removeprefix("paged|"))
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, use_cache=True)
    finally:
        model.set_attn_implementation(implementation)
    states = [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
    history = cache.engram_history
    return states, {model.config.engram_layer_ids[index]: inputs for (index, _), inputs in history.conv_inputs.items()}


def _refusal(model: EngramForCausalLM, reason: str) -> EngramError:
    name = model.config.backbone.model_type
    return EngramError(f"A {name} cannot be batched continuously ({reason}); call generate instead of generate_batch.")


def _only_kind(text) -> str:
    return "full_attention" if getattr(text, "sliding_window", None) is None else "sliding_attention"


def _kv_heads(text) -> int:
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def _head_dim(text) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
