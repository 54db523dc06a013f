"""Continuous batching of transformers for models with memory: `generate_batch`, its manager, and what is built on them.

transformers keeps keys and values of many requests in blocks that requests share, copy and give back. What the memory looks back to
is kept in the same blocks, as the keys and values of a few more layers: it goes wherever they go. The model itself is told of it by
look-back keywords; see `lookback`.

Shape letters: n sequences of a call, R positions that a look-back reaches, G residual streams, D hidden size, T packed tokens.
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

# Bytes of one token id in the blocks; it is stored plus one, so that zeros, which padding reads, mean that there is none.
_ID_BYTES = 4


def init_continuous_batching(
    model: EngramForCausalLM,
    generation_config=None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    **options,
):
    """As `GenerationMixin.init_continuous_batching`, which `generate_batch` and transformers' server call.

    Args:
        model: with a backbone that transformers can batch.
        generation_config, continuous_batching_config, **options: as there. The path that hands block tables to a flash kernel is
            not taken (`max_blocks_per_request=0`); CUDA graphs are recorded only if they are asked for.

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
    """How a token's record lies in blocks of keys and values.

    Args:
        heads, head_dim, dtype: of a layer's keys, and of its values.
        first_layer: index of the first layer that the cache has for records.
        layer_type: of these layers.
        conv_layers: decoder layers whose convolution inputs are kept.
        conv_shape, conv_dtype: of one position of them.
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
        """Bytes of a token in one layer of the cache."""
        return 2 * self.heads * self.head_dim * self.dtype.itemsize

    @property
    def layers(self) -> range:
        """Indices of the layers that records take."""
        count = math.ceil((_ID_BYTES + len(self.conv_layers) * self.conv_bytes) / self.layer_bytes)
        return range(self.first_layer, self.first_layer + count)

    def pack(self, input_ids: torch.Tensor, conv_inputs: dict[int, torch.Tensor]) -> torch.Tensor:
        """Records uint8 `[T, layers * layer_bytes]` of ids `[T]` and convolution inputs `[T, G, D]`, by decoder layer."""
        parts = [(input_ids.int() + 1).unsqueeze(1).view(torch.uint8)]
        for layer in self.conv_layers:
            inputs = conv_inputs[layer].to(device=input_ids.device, dtype=self.conv_dtype)
            parts.append(inputs.flatten(1).contiguous().view(torch.uint8))
        record = torch.cat(parts, 1)
        return torch.nn.functional.pad(record, (0, len(self.layers) * self.layer_bytes - record.shape[1]))

    def unpack(self, record: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Ids int64 `[..., ]`, -1 for none, and convolution inputs `[..., G, D]` of records uint8 `[..., layers * layer_bytes]`."""
        sizes = [_ID_BYTES, *[self.conv_bytes] * len(self.conv_layers)]
        ids, *inputs = record[..., : sum(sizes)].split(sizes, dim=-1)
        conv_inputs = {
            layer: part.contiguous().view(self.conv_dtype).unflatten(-1, self.conv_shape)
            for layer, part in zip(self.conv_layers, inputs, strict=True)
        }
        return ids.contiguous().view(torch.int32).squeeze(-1).long() - 1, conv_inputs


class BatchedModel:
    """A model with memory as transformers' manager of continuous batching sees it: with layers for records in its blocks.

    Whatever is asked of it, or set on it, is the model's own.

    Args:
        model: it is run once, on one token, to see what its backbone caches.

    Raises:
        ValueError: the backbone cannot be batched; names it.
    """

    def __init__(self, model: EngramForCausalLM):
        vars(self).update(model=model, reach=lookback_reach(model.config), layout=_layout_of(model))

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self.model, name, value)

    def eval(self) -> "BatchedModel":
        """The model in eval mode."""
        self.model.eval()
        return self

    @property
    def config(self) -> "_ConfigWithRecords":
        """The model's config, whose `get_text_config()` has the layers for records, too."""
        return _ConfigWithRecords(self.model.config, self.layout)

    def settle(self, config: ContinuousBatchingConfig) -> None:
        """Leave out of `config` what records cannot follow.

        Raises:
            ValueError: CUDA graphs are asked for, but rows are read from outside of the device.
        """
        if config.max_blocks_per_request:
            logger.warning_once(
                "max_blocks_per_request is taken for 0: a model with memory is batched without block tables of flash kernels."
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
        """The model's outputs for one packed batch, told of what stands before each of its requests."""
        cache, layout = inputs["cache"], self.layout
        group = list(cache.cache_allocators).index(layout.layer_type)
        slots = self._slots_before(inputs, group)
        before = layout.unpack(_read(cache, layout, inputs, group, slots)) if slots is not None else None
        told = self._keywords(inputs, before)
        outputs = self.model(**inputs, **told)
        record = layout.pack(inputs["input_ids"][0], {k: v[0] for k, v in told.get("engram_conv_inputs", {}).items()})
        _write(cache, layout, inputs, group, record)
        return outputs

    def _slots_before(self, inputs: dict[str, Any], group: int) -> torch.Tensor | None:
        """Indices `[n, R]` into the blocks, of the positions before each sequence; None if no sequence has begun.

        Where there is none it is the first block's, from which transformers lets padding read zeros.
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
        told = {"lookback_token_ids": ids[:, ids.shape[1] - width :]}
        if self.layout.conv_layers:
            told |= {"lookback_conv_inputs": conv_inputs, "engram_conv_inputs": {}}
        return told


class _ConfigWithRecords:
    """A config of a model whose decoder is said to have a few more layers; everything else is the config's own."""

    def __init__(self, config, layout: BlockLayout):
        vars(self).update(wrapped_config=config, block_layout=layout)

    def __getattr__(self, name: str):
        return getattr(self.wrapped_config, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self.wrapped_config, name, value)

    def get_text_config(self, *args, **kwargs):
        """The decoder's config, with layers for records."""
        text = copy.deepcopy(self.wrapped_config.get_text_config(*args, **kwargs))
        layers = self.block_layout.layers
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = [*text.layer_types, *[self.block_layout.layer_type] * len(layers)]
        text.num_hidden_layers = layers.stop
        return text


def _read(cache, layout: BlockLayout, inputs: dict[str, Any], group: int, slots: torch.Tensor) -> torch.Tensor:
    """Records uint8 `[n, R, layers * layer_bytes]` at `slots` `[n, R]`."""
    empty = torch.empty(1, layout.heads, 0, layout.head_dim, dtype=layout.dtype, device=slots.device)
    nowhere = slots.new_empty(0)
    parts = [
        part.squeeze(0).transpose(0, 1).reshape(*slots.shape, -1).view(torch.uint8)
        for layer in layout.layers
        for part in _update(cache, inputs, group, layer, (empty, empty), slots.flatten(), nowhere)
    ]
    return torch.cat(parts, -1)


def _write(cache, layout: BlockLayout, inputs: dict[str, Any], group: int, record: torch.Tensor) -> None:
    """Store records uint8 `[T, layers * layer_bytes]` of a call's tokens where their keys and values are stored."""
    index = inputs["write_index"][group]
    parts = record.view(layout.dtype).view(len(record), len(layout.layers), 2, layout.heads, layout.head_dim)
    for number, layer in enumerate(layout.layers):
        key, value = (part.transpose(0, 1).unsqueeze(0) for part in parts[:, number].unbind(1))
        _update(cache, inputs, group, layer, (key, value), index.new_empty(0), index)


def _update(cache, inputs, group: int, layer: int, states, read: torch.Tensor, write: torch.Tensor):
    """Store keys and values as an attention layer does, and read others; by the cache's own method for that."""
    indices = {"read_index": read, "write_index": write}
    kwargs = {
        "cu_seq_lens_k": inputs["cu_seq_lens_k"],
        "max_length_k": inputs["max_length_k"],
        **{name: [index] * (group + 1) for name, index in indices.items()},
    }
    return cache.update(*states, layer, kwargs)


@torch.no_grad()
def _layout_of(model: EngramForCausalLM) -> BlockLayout:
    """Where records lie beside the keys and values of a model, which runs on one token to show them.

    Raises:
        ValueError: the backbone cannot be batched; names it, and why.
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
    """Keys and values `[1, heads, 1, head size]` that each layer caches, and convolution inputs by decoder layer."""
    implementation = model.config._attn_implementation
    if implementation.startswith("paged|"):  # which runs in a batch only
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
