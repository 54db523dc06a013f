"""The memory of one decoder layer: gated fusion of table rows into the residual streams.

Shape letters: B batch, S positions, G residual streams (1 without hyper-connections), D hidden size, L Engram layers,
T hash heads of all n-gram orders, W channels of a table row, K taps of the convolution.
"""

import contextlib
import inspect
import math
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GradientCheckpointingLayer, PreTrainedModel
from transformers.cache_utils import Cache

from .cache_engram import EngramHistory, RuntimeSubclass
from .configuration_engram import EngramConfig
from .hashing_engram import Compaction
from .safetensors_engram import EngramError
from .table_engram import EngramTable, RowReader

# Without gradients, this many tokens are compared or updated at once: a long prompt would need many times the memory
# of its residual streams.
_BLOCK_TOKENS = 1024


class EngramInputs(NamedTuple):
    """The inputs of every layer's memory in one forward; they depend on token ids alone."""

    row_ids: torch.Tensor  # [L, B, S, T]
    compaction: Compaction  # It moves padding out of the way of look-backs.
    valid: torch.Tensor | None = None  # bool [B, S], False where there is no memory; None if it is everywhere
    documents: torch.Tensor | None = None  # [B, R + S], padding moved in front; None if there is one document
    history: EngramHistory | None = None
    cache: Cache | None = None  # It has the history, and the backbone must store its keys in it.
    readers: set[int] | None = None  # layers whose memory has read these inputs; None if they are not recorded
    fetched: tuple[RowReader, ...] | None = None  # rows of every layer that are being read already
    gates: dict[int, torch.Tensor] | None = None  # receives the gates [B, S, G] of each memory if it is given
    edit: Callable | None = None  # called with (memory, rows, inputs); returns other rows, or None for no memory


class Carrier:
    """Passes the inputs of one forward to layers whose backbone drops keywords, and records whether any needed it."""

    def __init__(self, inputs: EngramInputs):
        self.inputs, self.was_needed = inputs, False


# These are the inputs of the innermost forward that runs in this thread.
CARRIER: ContextVar[Carrier | None] = ContextVar("what layers with memory read", default=None)
BESIDE: ContextVar[dict[str, Any] | None] = ContextVar(
    "arguments for the base model that its head does not know", default=None
)


@contextlib.contextmanager
def within(variable: ContextVar, value: object) -> Iterator[None]:
    """Set `variable` to `value` while the block runs."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


class EngramRMSNorm(nn.Module):
    """Root-mean-square norm over D with a separate weight `[G, D]` for every stream.

    Args:
        streams, hidden_size: G and D.
        eps: added to the mean square; None for float32's, the default of `torch.nn.RMSNorm` (here also for float64
            states, so that both precisions compute the same function).
        device, dtype: those of the weight.
    """

    def __init__(self, streams: int, hidden_size: int, eps: float | None, device=None, dtype=None):
        super().__init__()
        self.eps = torch.finfo(torch.float32).eps if eps is None else eps
        self.weight = nn.Parameter(torch.empty((streams, hidden_size), device=device, dtype=dtype))

    def inverse_rms(self, states: torch.Tensor) -> torch.Tensor:
        """Return `1 / sqrt(mean(x^2) + eps)` of `[..., G, D]`, one number for each token and stream: `[..., G]`."""
        return torch.rsqrt(states.square().mean(-1) + self.eps)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return normalized `states` `[..., G, D]`, in their dtype."""
        return states * self.inverse_rms(states).unsqueeze(-1) * self.weight.to(states.dtype)


class EngramGate(nn.Module):
    """Computes `sigmoid(sign(x) * sqrt(max(|x|, 1e-6)))` of the scaled dot products `[B, S, G]`.

    The root is steep near zero.

    Args:
        zero_sign: the sign a product of exactly zero counts as (1 in DeepSeek-V4.1, 0 in the demo).
    """

    def __init__(self, zero_sign: int):
        super().__init__()
        self.zero_sign = zero_sign

    def forward(self, dot: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Return gates `[B, S, G]`, zero where `valid` `[B, S]` is False."""
        root = dot.abs().clamp_min(1e-6).sqrt()
        sign = torch.where(dot >= 0, 1.0, -1.0).to(dot.dtype) if self.zero_sign else torch.sign(dot)
        gate = torch.sigmoid(sign * root)
        return gate if valid is None else gate * valid.unsqueeze(-1)


class EngramConv(nn.Conv1d):
    """Depthwise causal convolution over positions that does not cross the start of the sequence or of its document.

    It is computed as K shifted products: documents need a mask for each tap, and it needs no transpose.

    Args:
        streams, hidden_size: G and D; each of the G * D channels has its own taps.
        kernel_size, dilation: K taps, and the distance between them in positions.
        device, dtype: those of the weight `[G * D, 1, K]`.
    """

    def __init__(self, streams: int, hidden_size: int, kernel_size: int, dilation: int, device=None, dtype=None):
        channels = streams * hidden_size
        factory = {"device": device, "dtype": dtype}
        super().__init__(channels, channels, kernel_size, groups=channels, dilation=dilation, bias=False, **factory)
        self.reach = (kernel_size - 1) * dilation

    def forward(self, padded: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
        """Return outputs `[B, S, G, D]` of `padded` `[B, reach + S, G, D]`, whose first positions are the past.

        Args:
            documents: `[B, reach + S]`, equal within a document; None for one.
        """
        length = padded.shape[1] - self.reach
        taps = self.weight.to(padded.dtype).view(*padded.shape[2:], -1)
        mixed = padded[:, self.reach :] * taps[..., -1]
        for tap in range(self.kernel_size[0] - 1):
            window = slice(tap * self.dilation[0], tap * self.dilation[0] + length)
            earlier = padded[:, window]
            if documents is not None:
                same = documents[:, window] == documents[:, self.reach :]
                earlier = earlier * same[..., None, None]
            mixed = torch.addcmul(mixed, earlier, taps[..., tap])
        return mixed


class EngramMemory(nn.Module):
    """One layer's memory: reads rows and adds them, gated, to the residual streams (arXiv 2601.07372, section 2).

        key_g, value = kv_proj(rows)
        gate_g = gate(<rms(h_g) * w_q, rms(key_g) * w_k> / sqrt(D))
        u_g    = gate_g * value
        h_g   <- h_g + u_g [+ silu(conv(rms(u_g)))]

    The convolution (none in V4.1) is depthwise over `G * D` channels and causal, with dilation N. Gates and norms are
    computed in float32 (float64 for float64 streams), whatever the model's dtype. At a position without memory the gate is zero: the position adds nothing to the convolution, but gets contributions of earlier ones.

    Args:
        config: the model's config.
        index: position of this layer in `config.engram_layer_ids`.
        device, dtype: those of the parameters.
    """

    def __init__(self, config: EngramConfig, index: int, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.index = index
        self.streams, self.hidden_size = config.engram_streams, config.text_config.hidden_size
        self.streams_first = config.engram_streams_first
        self.table = EngramTable(
            config.engram_num_embeddings[index], config.engram_head_dim, config.engram_table_dtype, **factory
        )
        self.kv_proj = nn.Linear(
            config.engram_row_width, (self.streams + 1) * self.hidden_size, bias=config.engram_bias, **factory
        )
        self.q_norm = EngramRMSNorm(self.streams, self.hidden_size, config.engram_norm_eps, **factory)
        self.k_norm = EngramRMSNorm(self.streams, self.hidden_size, config.engram_norm_eps, **factory)
        self.gate = EngramGate(config.engram_zero_gate_sign)
        self.conv, self.conv_norm = None, None
        if config.engram_conv_kernel_size:
            kernel, dilation = config.engram_conv_kernel_size, config.engram_max_ngram_size
            self.conv = EngramConv(self.streams, self.hidden_size, kernel, dilation, **factory)
            self.conv_norm = EngramRMSNorm(self.streams, self.hidden_size, config.engram_conv_norm_eps, **factory)

    def forward(self, hidden_states: torch.Tensor, inputs: EngramInputs) -> torch.Tensor:
        """Return the streams with memory added, in the shape and dtype of `hidden_states`.

        The shape is `[B, S, D]`, `[B, S, G, D]`, `[B, S, G * D]` or, if the config says so, `[G, B, S, D]`.
        """
        if inputs.readers is not None:
            inputs.readers.add(self.index)
        ahead = {} if inputs.fetched is None else {"source": inputs.fetched[self.index]}
        rows = self.table(inputs.row_ids[self.index], dtype=hidden_states.dtype, **ahead)
        rows = rows if inputs.edit is None else inputs.edit(self, rows, inputs)
        if rows is None:
            return hidden_states
        if self.streams_first:
            return self.fuse(hidden_states.movedim(0, 2), rows, inputs).movedim(2, 0)
        return self.fuse(hidden_states, rows, inputs)

    def fuse(self, hidden_states: torch.Tensor, rows: torch.Tensor, inputs: EngramInputs) -> torch.Tensor:
        """Do as `forward`, with the gathered rows `[B, S, T * W]` given."""
        streams = hidden_states.reshape(*hidden_states.shape[:2], self.streams, self.hidden_size)
        # Offloaded weights would be transferred once per block.
        is_offloaded = getattr(getattr(self.kv_proj, "_hf_hook", None), "offload", False)
        dot, value = self._compare(streams, rows) if is_offloaded else _in_blocks(self._compare, streams, rows)
        gate = self.gate(dot, inputs.valid)
        if inputs.gates is not None:
            inputs.gates[self.index] = gate
        if self.conv is None:
            (streams,) = _in_blocks(self._add, streams, gate, value)
        else:
            update = _update(gate, value)
            update = update + F.silu(self._convolve(self.conv_norm(update), inputs))
            streams = streams + update.to(streams.dtype)
        return streams.reshape(hidden_states.shape)

    @torch.no_grad()
    def zero_value_projection(self) -> None:
        """Make the memory contribute exactly nothing until it is trained."""
        self.kv_proj.weight[self.streams * self.hidden_size :].zero_()
        if self.kv_proj.bias is not None:
            self.kv_proj.bias[self.streams * self.hidden_size :].zero_()

    def _project(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys `[B, S, G, D]` and value `[B, S, D]`: one matrix, keys of all streams first (V4.1's `wkv`)."""
        keys, value = self.kv_proj(rows).split([self.streams * self.hidden_size, self.hidden_size], dim=-1)
        return keys.unflatten(-1, (self.streams, self.hidden_size)), value

    def _compare(self, streams: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scaled dot products `[B, S, G]` of normalized streams and keys, and the value `[B, S, D]`."""
        keys, value = self._project(rows)
        precise = torch.promote_types(streams.dtype, torch.float32)
        product = self.q_norm(streams.to(precise)) * self.k_norm(keys.to(precise))
        return product.sum(-1) / math.sqrt(self.hidden_size), value

    def _add(self, streams: torch.Tensor, gate: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor]:
        return (streams + _update(gate, value).to(streams.dtype),)

    def _convolve(self, states: torch.Tensor, inputs: EngramInputs) -> torch.Tensor:
        """Return the convolution of `[B, S, G, D]`, with inputs of earlier calls first; stage `states` for later ones."""
        if not self.conv.reach:
            return self.conv(states)
        if inputs.history is not None:
            past = inputs.history.stage_conv(self.index, states, inputs.compaction)
        else:
            past = states.new_zeros((states.shape[0], self.conv.reach, *states.shape[2:]))
        joined = inputs.compaction.join(past, states)
        documents = None if inputs.documents is None else inputs.documents[:, -joined.shape[1] :]
        return inputs.compaction.restore(self.conv(joined, documents))


def _update(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the update `[B, S, G, D]`, in the gate's dtype."""
    return gate.unsqueeze(-1) * value.to(gate.dtype).unsqueeze(-2)


def _in_blocks(compute: Callable[..., tuple[torch.Tensor, ...]], *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Apply `compute` to `states` `[B, S, ...]`, a block of positions at a time; positions are independent."""
    batch, length = states[0].shape[:2]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or batch * length <= _BLOCK_TOKENS:
        return compute(*states)
    step = max(1, _BLOCK_TOKENS // batch)
    results: list[torch.Tensor] = []
    for index, block in enumerate(zip(*(state.split(step, dim=1) for state in states), strict=True)):
        parts = compute(*block)
        results = results or [part.new_empty((batch, length, *part.shape[2:])) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result[:, index * step : (index + 1) * step] = part
    return tuple(results)


class LayerWithMemory(RuntimeSubclass):
    """Runs a decoder layer's submodule `engram` before the layer's own forward."""

    _states_name = "hidden_states"  # This is the layer's first argument.

    @classmethod
    def _members(cls, base: type) -> dict[str, Any]:
        return {**super()._members(base), "_states_name": list(inspect.signature(base.forward).parameters)[1]}

    def __call__(self, *args, **kwargs):
        """Call the module; the memory's inputs become an argument here, so that a replay in backward has them too."""
        if kwargs.get("engram_inputs") is None:
            carrier = CARRIER.get()
            if carrier is None:
                raise EngramError(
                    f"A {type(self).__name__} ran outside of its model's forward, so the rows that its memory reads are not known; call "
                    "the model (once before it is compiled), and checkpoint layers by gradient_checkpointing_enable() alone."
                )
            carrier.was_needed = True
            kwargs["engram_inputs"] = carrier.inputs
        return super().__call__(*args, **kwargs)

    def forward(self, *args, engram_inputs: EngramInputs, **kwargs):
        """Run with the layer's own arguments, plus `engram_inputs`."""
        _require_same_cache((*args, *kwargs.values()), engram_inputs)
        states, args = (args[0], args[1:]) if args else (kwargs.pop(self._states_name), args)
        return super().forward(self.engram(states, engram_inputs), *args, **kwargs)


def _require_same_cache(arguments: tuple, inputs: EngramInputs) -> None:
    """Refuse to run if the layer stores its keys in another cache than the one with the memory's history."""
    cache = next((argument for argument in arguments if isinstance(argument, Cache)), None)
    if inputs.cache is not None and cache is not None and cache is not inputs.cache:
        raise EngramError(
            f"The backbone uses a {type(cache).__name__} of its own, not the cache that holds the memory's history; pass it a "
            "cache made from this model's config, or use_cache=False."
        )


def add_memory_to_layer(layer: nn.Module, config: EngramConfig, index: int, dtype: torch.dtype | None = None) -> None:
    """Give a decoder layer of the backbone its memory, on the layer's device.

    Args:
        layer: changed in place; it becomes an instance of a class that extends its own.
        config, index: as in [`EngramMemory`].
        dtype: dtype of the memory's parameters; None for torch's default.

    Raises:
        ValueError: see [`require_extensible`].
    """
    require_extensible(layer)
    device = next(layer.parameters()).device
    layer.engram = EngramMemory(config, index, device=device, dtype=dtype)
    extend(layer, LayerWithMemory)


def require_extensible(module: nn.Module) -> None:
    """Refuse a module that has memory, or whose forward a tool replaced on the instance, which would bypass memory.

    Raises:
        ValueError: the message names the module's class.
    """
    if isinstance(module, RuntimeSubclass):
        raise EngramError("This backbone already has Engram memory; start from the backbone without it.")
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        raise EngramError(
            f"The forward of a {type(module).__name__} was replaced on the instance, so its memory would never run; add "
            "memory before other tools wrap the backbone."
        )


def extend(module: nn.Module, front: type[RuntimeSubclass]) -> None:
    """Make a module an instance of `front` combined with its own class."""
    module.__class__ = front.extending(type(module))
    # A hook of accelerate (`device_map`) keeps the wrapped forward on the instance, which would bypass the memory.
    if "_old_forward" in vars(module):
        module._old_forward = types.MethodType(type(module).forward, module)


def decoder_layers(model: PreTrainedModel, expected: int) -> tuple[str, nn.ModuleList]:
    """Return the name, and the list, of the decoder layers that a text model runs.

    Args:
        expected: the number in the config; there may be more (for drafts), or fewer that have several sublayers.

    Raises:
        ValueError: there is none, or several could be meant.
    """
    lists = _outermost_lists(model)
    whole = {
        name: found
        for name, found in lists.items()
        if all(isinstance(layer, GradientCheckpointingLayer) for layer in found)
    }
    candidates = whole or {name: found for name, found in lists.items() if len(found) >= expected}
    if len(candidates) > 1:
        candidates = {name: found for name, found in candidates.items() if len(found) >= expected}
    if len(candidates) > 1:  # A list in the model itself takes precedence over lists in its parts.
        candidates = {name: found for name, found in candidates.items() if "." not in name}
    if len(candidates) != 1:
        found = f"several lists of modules ({', '.join(sorted(lists))})" if lists else "none"
        raise EngramError(
            f"{type(model).__name__} must keep its {expected} decoder layers, to which memory is added, in one ModuleList, but has "
            f"{found}; use another backbone."
        )
    return next(iter(candidates.items()))


def _outermost_lists(module: nn.Module, prefix: str = "") -> dict[str, nn.ModuleList]:
    """Return lists of modules that are not inside other such lists, by name, without empty ones."""
    found: dict[str, nn.ModuleList] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            found |= {prefix + name: child} if len(child) else {}
        else:
            found |= _outermost_lists(child, f"{prefix}{name}.")
    return found


def name_base_model(host: PreTrainedModel) -> None:
    """Make `base_model` of a model with a head its decoder, if the class names an attribute that it does not have."""
    inner = [name for name, child in host.named_children() if isinstance(child, PreTrainedModel)]
    if host.base_model is host and len(inner) == 1:
        host.base_model_prefix = inner[0]
