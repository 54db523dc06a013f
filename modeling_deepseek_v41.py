"""The DeepSeek-V4.1 text backbone: the language model without its Engram memory.

Letters used for shapes: B rows, S tokens of this call, T cached tokens, H heads, D channels of a head (and of a
latent), G compressed positions, K of them read by one query, N residual streams. `hidden` is the model's width.

Where a class computes the same as transformers' DeepSeek-V4, it is that class or derives from it. The differences are:

* Hyper-connections run in a single pass: a sublayer's input is collapsed with the collapse weights (`pre`) that the
  *previous* sublayer produced, so `pre` is passed beside the streams.
* A few layers compute compressed latents, and select those that a query reads, for the layers after them. Both are
  explicit arguments too, so gradient checkpointing sees them.
* The cached values are rounded to FP8 and FP4 (`round_fp8`, `round_mxfp4`, `round_nvfp4`).
* Attention reads the window and the selected compressed positions, in blocks of queries, without an [S, S] matrix.
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, Cache, DynamicCache, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Experts,
    DeepseekV4GroupedLinear,
    DeepseekV4HyperConnection,
    DeepseekV4MLP,
    DeepseekV4PreTrainedModel,
    DeepseekV4RMSNorm,
    DeepseekV4RotaryEmbedding,
    DeepseekV4TopKRouter,
    apply_rotary_pos_emb,
)
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_deepseek_v41 import DeepseekV41CacheLayer, RowLayout, gather_rows, layer_cache, row_layout
from .configuration_deepseek_v41 import DeepseekV41TextConfig
from .configuration_vision_deepseek_v41 import known_copies
from .safetensors_engram import EngramError
from .table_engram import E4M3_MAX, exponent_above

# This is the cache's name in the output: transformers 5.24 renamed it.
CACHE_OUTPUT = next(
    field.name for field in dataclasses.fields(MoeModelOutputWithPast) if field.name in ("cache", "past_key_values")
)
# This is the number of elements of the largest intermediate of one block of queries: 64 MB in float32.
_BLOCK_ELEMENTS = 1 << 24
_SMALLEST_BLOCK = 64
E2M1_MAX = 6.0


# --- roundings of cached activations
#
# The release stores its window latents in FP8 and its compressed latents and index vectors in FP4, and was trained
# that way, so the rounding belongs to the model and not to a storage format: each function returns the rounded *value*
# in the input's dtype. The rules are those of the release's quantization kernels. Gradients pass through unchanged.


def power_of_two_above(x: torch.Tensor) -> torch.Tensor:
    """Return the smallest power of two that is at least positive normal float32 `x`."""
    return exponent_above(x).bitwise_left_shift(23).view(torch.float32)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round float32 `x` to the nearest E4M3 value, saturating at 448; ties to even."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round float32 `x` to the nearest E2M1 value (0, .5, 1, 1.5, 2, 3, 4, 6), saturating at 6; ties to the even code."""
    x = x.clamp(-E2M1_MAX, E2M1_MAX)
    # Codes are evenly spaced inside each binade, so rounding half to even there picks the even code on a tie.
    step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
    return (x / step).round() * step


def _round_groups(x: torch.Tensor, group: int, scale_of, to_format) -> torch.Tensor:
    """Round `x` `[..., channels]` in groups of `group` channels that share the scale `scale_of(largest magnitude)`."""
    with torch.no_grad():
        groups = x.float().unflatten(-1, (-1, group))
        scale = scale_of(groups.abs().amax(-1, keepdim=True))
        rounded = (to_format(groups / scale) * scale).flatten(-2).to(x.dtype)
    # `x - x.detach()` is exactly zero and carries the gradient; `x + (rounded - x)` would lose the last bit.
    return rounded + (x - x.detach()) if x.requires_grad else rounded


def round_fp8(x: torch.Tensor) -> torch.Tensor:
    """Round to E4M3 with a power-of-two scale per 32 channels, as for window latents. `[..., 32 n]`, any float dtype."""
    return _round_groups(x, 32, lambda a: power_of_two_above(a.clamp(min=1e-4) / E4M3_MAX), to_e4m3)


def round_mxfp4(x: torch.Tensor) -> torch.Tensor:
    """Round to E2M1 with a power-of-two scale per 32 channels, as for index queries and keys. `[..., 32 n]`, any float
    dtype.
    """
    return _round_groups(x, 32, lambda a: power_of_two_above(a.clamp(min=E2M1_MAX * 2**-126) / E2M1_MAX), to_e2m1)


def round_nvfp4(x: torch.Tensor) -> torch.Tensor:
    """Round to E2M1 with an E4M3 scale per 16 channels, as for compressed latents. `[..., 16 n]`, any float dtype."""
    return _round_groups(x, 16, lambda a: to_e4m3(a.clamp(min=E2M1_MAX * 2**-9) / E2M1_MAX), to_e2m1)


# --- attention


class SharedAttention(NamedTuple):
    """The compressed positions that a layer passes to the layers after it."""

    latents: torch.Tensor | None = None  # [B, G, D] compressed latents, rotated and rounded
    index_keys: torch.Tensor | None = None  # [B, G, index_head_dim]
    first: torch.Tensor | None = None  # [B, S] slot where each token's sequence begins; None: 0
    selected: torch.Tensor | None = None  # [B, S, K] int32 slots that a query reads, -1 for none
    candidates: torch.Tensor | None = None  # [B, S, blocks] int32, counted from `first`, -1 for none; None: all


def rotate(latents: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the last channels of `[B, S, D]`, or of each head of `[B, S, H, D]`, by the tokens' angles."""
    if latents.dim() == 3:
        return rotate(latents.unsqueeze(2), cos, sin).squeeze(2)
    return apply_rotary_pos_emb(latents, cos, sin, unsqueeze_dim=2)


def project(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Compute `linear(x)` for the projections that transformers keeps in float32 when a model is loaded in float16."""
    return linear(x.float()) if linear.weight.dtype == torch.float32 else linear(x)


def largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return the indices of the `k` largest of float32 `[..., n]`; of equal scores, the first.

    Index scores tie exactly (the relu cuts off every head), and `torch.topk` breaks ties by the length of its input:
    decoding in chunks would then choose other positions than a full forward. The sort key combines the score's bits,
    in an order that integers share, with the reversed index.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    countdown = torch.arange(scores.shape[-1], 0, -1, device=scores.device)
    return ((ordered.long() << 32) | countdown).topk(k, dim=-1, sorted=False).indices


class DeepseekV41Compressor(nn.Module):
    """Pools `ratio` tokens into one latent, on the layers that are KV sources.

    A softmax over the group, channel by channel, weighs its tokens. Ratio 1 is a projection without gate.
    """

    def __init__(self, config: DeepseekV41TextConfig, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.kv_proj = nn.Linear(config.hidden_size, config.head_dim, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, config.head_dim, bias=False) if ratio > 1 else None
        self.kv_norm = DeepseekV4RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, last: torch.Tensor, state: DeepseekV41CacheLayer, layout: RowLayout
    ) -> torch.Tensor:
        """Return latents `[B, n, D]` of the groups that end at the tokens `last` `[B, n]` of `x` `[B, S, hidden]`.

        A group may have begun in an earlier call: `state` stores its tokens.
        """
        values = project(self.kv_proj, x)
        if self.gate_proj is None:
            return self.kv_norm(gather_rows(values, last).to(x.dtype))
        projected = torch.cat([values, project(self.gate_proj, x)], dim=-1).float()
        tokens = state.update_tail(projected, layout)
        back = torch.arange(1 - self.ratio, 1, device=x.device) + tokens.shape[1] - x.shape[1]
        # Slots without a group have arbitrary values; the cache drops their results.
        values, gates = gather_rows(tokens, (last[..., None] + back).clamp(min=0)).chunk(2, dim=-1)
        return self.kv_norm((values * gates.softmax(dim=2)).sum(dim=2).to(x.dtype))


class DeepseekV41Indexer(nn.Module):
    """Selects the compressed positions that a query reads, on the layers that are index sources.

    Scores are `sum_h relu(q_h . k) * w_h`, in float32. The selection is a step function, so nothing here gets a
    gradient.
    """

    def __init__(self, config: DeepseekV41TextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.is_candidate_source = layer_idx == config.candidate_source_layer_id
        self.scaling = self.head_dim**-0.5 * self.num_heads**-0.5
        self.q_b_proj = nn.Linear(config.q_lora_rank, self.num_heads * self.head_dim, bias=False)
        self.weights_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        if layer_idx in config.kv_source_layer_ids:
            self.k_proj = nn.Linear(config.head_dim, self.head_dim, bias=False)
            self.k_norm = DeepseekV4RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    @torch.no_grad()
    def keys(self, latents: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return index keys `[B, n, head_dim]` of unrotated latents `[B, n, D]` at the angles of their groups."""
        keys = rotate(self.k_norm(project(self.k_proj, latents).to(latents.dtype)), cos, sin)
        return round_mxfp4(keys) if self.config.cache_rounding else keys

    @torch.no_grad()
    def forward(
        self,
        x: torch.Tensor,
        q_latent: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        visible: torch.Tensor,
        shared: SharedAttention,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Select for `x` `[B, S, hidden]`, whose queries see `visible` `[B, S]` compressed positions.

        Returns `selected` `[B, S, K]` and, from the candidate source on, `candidates` `[B, S, blocks]` (see
        [`SharedAttention`]).
        """
        available = shared.index_keys.shape[1]
        if shared.candidates is None and available <= self._unrestricted():
            return self._everything(visible, shared), None
        query = rotate(self.q_b_proj(q_latent).view(*x.shape[:2], self.num_heads, self.head_dim), cos, sin)
        query = round_mxfp4(query) if self.config.cache_rounding else query
        weights = project(self.weights_proj, x).float() * self.scaling
        blocks = self._blocks(x, available if shared.candidates is None else self._candidate_positions())
        with maybe_autocast(x.device.type, enabled=False):  # Near ties are decided in float32.
            chosen = [
                self._choose(query[:, block].float(), weights[:, block], visible[:, block], block, shared)
                for block in blocks
            ]
        selected, candidates = zip(*chosen, strict=True)
        if self.is_candidate_source and candidates[0] is not None:
            return torch.cat(selected, dim=1), torch.cat(candidates, dim=1)
        return torch.cat(selected, dim=1), shared.candidates

    def _candidate_positions(self) -> int:
        return self.config.candidate_topk_blocks * self.config.candidate_block_size

    def _unrestricted(self) -> int:
        """Up to this many compressed positions are all attended to, without a selection."""
        topk = self.config.index_topk
        return min(topk, self._candidate_positions()) if self.is_candidate_source else topk

    def _blocks(self, x: torch.Tensor, keys: int) -> list[slice]:
        """Yield slices of S queries, so that scoring `keys` keys for a slice stays within bounds."""
        batch, length = x.shape[:2]
        step = max(1, _BLOCK_ELEMENTS // (batch * keys * (self.num_heads + self.head_dim)))
        return [slice(start, min(start + step, length)) for start in range(0, length, step)]

    def _everything(self, visible: torch.Tensor, shared: SharedAttention) -> torch.Tensor:
        places = torch.arange(shared.index_keys.shape[1], device=visible.device)
        return self._slots(places.expand(*visible.shape, -1), visible, shared.first)

    def _slots(self, places: torch.Tensor, visible: torch.Tensor, first: torch.Tensor | None) -> torch.Tensor:
        """Convert places in the sequence `[B, Q, K]` to slots, -1 for places that are not visible."""
        slots = places if first is None else places + first[..., None]
        return torch.where((places >= 0) & (places < visible[..., None]), slots, -1).int()

    def _choose(self, query, weights, visible, block, shared: SharedAttention):
        first = None if shared.first is None else shared.first[:, block]
        if shared.candidates is not None:
            places, scores = self._score_candidates(query, weights, shared.candidates[:, block], first, shared)
        else:
            places, scores = self._score_all(query, weights, first, shared)
        scores = scores.masked_fill((places < 0) | (places >= visible[..., None]), float("-inf"))
        candidates = self._best_blocks(scores, visible) if self.is_candidate_source else None
        best = largest(scores, min(self.config.index_topk, scores.shape[-1]))
        places = places.expand_as(scores).gather(-1, best)
        return self._slots(places, visible, first), candidates

    def _score_all(self, query, weights, first, shared: SharedAttention):
        """Return scores `[B, Q, G]` of all keys, by place in the query's sequence; and the places."""
        heads = query.flatten(1, 2) @ shared.index_keys.float().transpose(1, 2)
        heads = heads.relu_().view(*query.shape[:3], -1)
        scores = (weights.unsqueeze(2) @ heads).squeeze(2)
        places = torch.arange(scores.shape[-1], device=scores.device)
        if first is not None:
            slots = (first[..., None] + places).clamp(max=scores.shape[-1] - 1)
            scores = scores.gather(-1, slots)
        return places, scores

    def _score_candidates(self, query, weights, candidates, first, shared: SharedAttention):
        """Return scores `[B, Q, blocks * block]` of the keys in the candidate blocks, and their places in the
        sequence.
        """
        inside = torch.arange(self.config.candidate_block_size, device=query.device)
        blocks = candidates.long()[..., None]
        places = torch.where(blocks < 0, -1, blocks * len(inside) + inside).flatten(2)
        slots = places if first is None else places + first[..., None]
        keys = gather_rows(shared.index_keys, slots.clamp(0, shared.index_keys.shape[1] - 1)).float()
        heads = (query @ keys.transpose(2, 3)).relu_()
        return places, (weights.unsqueeze(2) @ heads).squeeze(2)

    def _best_blocks(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor | None:
        """Return ascending ids of the best candidate blocks of masked scores `[B, Q, G]`; a block's score is that of
        its best key.
        """
        size, keep = self.config.candidate_block_size, self.config.candidate_topk_blocks
        if scores.shape[-1] <= size * keep:
            return None
        scores = F.pad(scores, (0, -scores.shape[-1] % size), value=float("-inf")).unflatten(-1, (-1, size)).amax(-1)
        newest = (visible[..., None] - 1).div(size, rounding_mode="floor").clamp(min=0)
        scores = scores.scatter(-1, newest, float("inf"))
        best = largest(scores, keep)
        known = scores.gather(-1, best) > float("-inf")
        return torch.where(known, best, -1).sort(dim=-1).values.int()


class DeepseekV41Attention(nn.Module):
    """Attention over a sliding window and selected compressed positions, in one softmax with a sink per head.

    Keys and values are one latent that all heads share. Queries come from a low-rank projection, without a norm after
    `q_b_proj` (DeepSeek-V4 has one). Compressed latents come from the latest KV source.
    """

    def __init__(self, config: DeepseekV41TextConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.ratio = config.compress_ratios[layer_idx]
        # Layers with compressed positions use one set of angles for window, queries and compressed positions.
        self.rope_type = "compress" if self.ratio else "main"
        self.scaling = self.head_dim**-0.5
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_a_norm = DeepseekV4RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, self.num_heads * self.head_dim, bias=False)
        self.kv_proj = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.kv_norm = DeepseekV4RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.o_a_proj = DeepseekV4GroupedLinear(
            self.num_heads * self.head_dim // config.o_groups, config.o_groups * config.o_lora_rank, config.o_groups
        )
        self.o_b_proj = nn.Linear(config.o_groups * config.o_lora_rank, config.hidden_size, bias=False)
        self.sinks = nn.Parameter(torch.empty(self.num_heads))
        is_kv_source = layer_idx in config.kv_source_layer_ids
        self.compressor = DeepseekV41Compressor(config, self.ratio) if is_kv_source else None
        self.indexer = DeepseekV41Indexer(config, layer_idx) if layer_idx in config.index_source_layer_ids else None
        self.rotary_emb = DeepseekV4RotaryEmbedding(config) if is_kv_source else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        shared: SharedAttention,
        layout: RowLayout,
        position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]],
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, SharedAttention]:
        """Map `[B, S, hidden]` to `[B, S, hidden]`; return it with the data for later layers.

        `position_embeddings` are the cosines and sines `[B, S, rotary / 2]` of the tokens in compacted order, by kind
        of layer.
        """
        # Without a cache, only this call's state is needed, and dropped after it.
        state = DeepseekV41CacheLayer() if cache is None else layer_cache(cache, self.layer_idx)
        cos, sin = position_embeddings[self.rope_type]
        x = layout.compact(hidden_states)
        q_latent, query = self._query(x, cos, sin)
        history = max(self.config.sliding_window, self.ratio) - 1
        window, _ = state.update(self.latents(x, cos, sin).unsqueeze(1), layout=layout, history=history)
        if self.compressor is not None:
            shared = self._compress(x, state, layout)
        if self.indexer is not None:
            visible = (layout.positions + 1) // self.ratio
            selected, candidates = self.indexer(x, q_latent, cos, sin, visible, shared)
            shared = shared._replace(selected=selected, candidates=candidates)
        read = shared if self.ratio else SharedAttention()
        output = self._attend(query, window.squeeze(1), layout.positions, read.latents, read.selected)
        return layout.restore(self._output(output, cos, sin)), shared

    def _query(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the low-rank latents `[B, S, q_lora_rank]`, and the rotated queries `[B, S, H, D]`."""
        q_latent = self.q_a_norm(self.q_a_proj(x))
        return q_latent, rotate(self.q_b_proj(q_latent).view(*x.shape[:2], self.num_heads, self.head_dim), cos, sin)

    def latents(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return the latents of the tokens `x` `[B, S, hidden]` for later queries: `[B, S, D]`, rotated and rounded."""
        latents = rotate(self.kv_norm(self.kv_proj(x)), cos, sin)
        return round_fp8(latents) if self.config.cache_rounding else latents

    def _output(self, output: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Map `[B, S, H, D]` to `[B, S, hidden]`; values were keys, so the rotation is undone."""
        output = rotate(output, cos, -sin).reshape(*output.shape[:2], self.config.o_groups, -1)
        return self.o_b_proj(self.o_a_proj(output).flatten(2))

    def _compress(self, x: torch.Tensor, state: DeepseekV41CacheLayer, layout: RowLayout) -> SharedAttention:
        """Pool the groups that complete in this call, and return all compressed positions so far."""
        groups = state.close_groups(layout, self.ratio)
        latents = self.compressor(x, groups.last, state, layout)
        begins = layout.positions.gather(1, groups.last) - (self.ratio - 1)
        cos, sin = self.rotary_emb(x.new_empty(0, dtype=torch.float32), begins, layer_type=self.rope_type)
        keys = state.append("index_keys", self.indexer.keys(latents, cos, sin), groups.slots)
        latents = rotate(latents, cos, sin)
        latents = round_nvfp4(latents) if self.config.cache_rounding else latents
        return SharedAttention(state.append("latents", latents, groups.slots), keys, groups.first)

    def _attend(self, query, window, positions, latents, selected) -> torch.Tensor:
        """Return the attention of all queries `[B, S, H, D]`, block by block; see `_attend_block`."""
        length, cached = query.shape[1], window.shape[1] - query.shape[1]
        reach = self.config.sliding_window - 1
        step = self._block_length(query, 0 if selected is None else selected.shape[-1])
        # Recomputing a block in the backward pass keeps the gathered latents of one block in memory, not of all.
        recompute = length > step and torch.is_grad_enabled() and query.requires_grad
        outputs = []
        for start in range(0, length, step):
            block = slice(start, min(start + step, length))
            first = max(0, cached + start - reach)
            arguments = (
                query[:, block],
                window[:, first : cached + block.stop],
                positions[:, block],
                latents,
                None if selected is None else selected[:, block],
            )
            if recompute:
                outputs.append(
                    checkpoint(self._attend_block, *arguments, use_reentrant=False, preserve_rng_state=False)
                )
            else:
                outputs.append(self._attend_block(*arguments))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _block_length(self, query: torch.Tensor, selected: int) -> int:
        window = self.config.sliding_window
        per_query = selected * self.head_dim + self.num_heads * (selected + 2 * window)
        affordable = max(1, _BLOCK_ELEMENTS // (query.shape[0] * per_query))
        # With a length much above the window, most of a block's window scores would be masked.
        return min(affordable, max(window, _SMALLEST_BLOCK))

    def _attend_block(
        self,
        query: torch.Tensor,
        window: torch.Tensor,
        positions: torch.Tensor,
        latents: torch.Tensor | None,
        selected: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the attention of Q consecutive queries.

        Args:
            query: `[B, Q, H, D]`.
            window: `[B, M, D]`, the latents of the tokens up to the last query's own.
            positions: `[B, Q]`, the queries' places in their sequences.
            latents, selected: `[B, G, D]` and `[B, Q, K]`, or None.

        Returns: `[B, Q, H, D]`.
        """
        batch, queries = query.shape[:2]
        scores = (query.flatten(1, 2) @ window.transpose(1, 2)).view(batch, queries, self.num_heads, -1)
        hidden = ~self._sees(positions, window.shape[1])
        read = selected is not None and latents.shape[1] > 0
        if read:
            chosen = gather_rows(latents, selected.clamp(min=0).long())
            scores = torch.cat([scores, query @ chosen.transpose(2, 3)], dim=-1)
            hidden = torch.cat([hidden, selected < 0], dim=-1)
        scores = (scores.float() * self.scaling).masked_fill(hidden.unsqueeze(2), float("-inf"))
        sinks = self.sinks.float()[:, None].expand(batch, queries, -1, 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1].to(query.dtype)
        output = (weights[..., : window.shape[1]].flatten(1, 2) @ window).view_as(query)
        return output + weights[..., window.shape[1] :] @ chosen if read else output

    def _sees(self, positions: torch.Tensor, length: int) -> torch.Tensor:
        """Return which of the last `length` tokens each query sees, `[B, Q, length]`: its window, within its sequence."""
        queries = positions.shape[1]
        places = torch.arange(length, device=positions.device)
        distance = places[length - queries :, None] - places
        near = (distance >= 0) & (distance < self.config.sliding_window)
        return near & (distance <= positions[..., None])


class DeepseekV41HyperConnection(DeepseekV4HyperConnection):
    """The mixer of one sublayer: it collapses streams for the next sublayer, and expands its own output to streams."""

    def forward(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return weights from the streams `[B, S, N, hidden]`, in float32.

        These are `pre` `[B, S, N]` (collapses the streams for the *next* sublayer), `post` `[B, S, N]` and `comb` `[B,
        S, N, N]`, whose rows and columns sum to 1.
        """
        with maybe_autocast(streams.device.type, enabled=False):
            mixes = F.linear(self.input_norm(streams.flatten(2).float()), self.fn.float())
        count = self.hc_mult
        groups = zip(
            *(x.split([count, count, count * count], dim=-1) for x in (mixes, self.base.float())), strict=True
        )
        pre, post, comb = (mix * scale + base for (mix, base), scale in zip(groups, self.scale.float(), strict=True))
        comb = comb.unflatten(-1, (count, count)).softmax(dim=-1) + self.hc_eps
        comb = comb / (comb.sum(dim=-2, keepdim=True) + self.hc_eps)
        for _ in range(self.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(dim=-1, keepdim=True) + self.hc_eps)
            comb = comb / (comb.sum(dim=-2, keepdim=True) + self.hc_eps)
        return pre.sigmoid() + self.hc_eps, 2 * post.sigmoid(), comb


def open_streams(embeds: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return equal streams `[B, S, N, hidden]` of embeddings, and the first collapse weights `[B, S, N]`: the first
    stream's.
    """
    pre = F.one_hot(embeds.new_zeros(embeds.shape[:2], dtype=torch.long), count).float()
    return embeds.unsqueeze(2).repeat(1, 1, count, 1), pre


def collapse(streams: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """Map `[B, S, N, hidden]` with weights `[B, S, N]` to `[B, S, hidden]`, summed in float32."""
    return (pre.unsqueeze(-1) * streams).sum(dim=2).to(streams.dtype)


def expand(streams: torch.Tensor, output: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """Return new streams `post_k * output + sum_j comb[j, k] * stream_j`, summed in float32."""
    with maybe_autocast(streams.device.type, enabled=False):
        kept = comb.transpose(2, 3) @ streams.float()
    return (post.unsqueeze(-1) * output.unsqueeze(2) + kept).to(streams.dtype)


class DeepseekV41MLP(DeepseekV4MLP):
    """The shared expert: DeepSeek-V4's, in float32 between the projections."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x).float().clamp(max=self.limit)
        up = self.up_proj(x).float().clamp(min=-self.limit, max=self.limit)
        return self.down_proj((self.act_fn(gate) * up).to(x.dtype))


class DeepseekV41Experts(DeepseekV4Experts):
    """The routed experts: DeepSeek-V4's, in float32 between the projections."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return super()._apply_gate(gate_up.float()).to(gate_up.dtype)


class DeepseekV41TopKRouter(DeepseekV4TopKRouter):
    """DeepSeek-V4's router in float32, with a second bias for image tokens."""

    def __init__(self, config: DeepseekV41TextConfig):
        super().__init__(config)
        self.e_score_correction_bias_vl = nn.Buffer(torch.zeros(self.num_experts))

    def forward(
        self, hidden_states: torch.Tensor, image_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route `[B, S, hidden]`; `image_mask` `[B, S]` marks the tokens with the second bias.

        Returns logits `[B * S, experts]`, and weights and expert ids `[B * S, top_k]`. The bias affects the selection
        only; the weights are the unbiased scores.
        """
        flat = hidden_states.reshape(-1, self.hidden_dim)
        with maybe_autocast(flat.device.type, enabled=False):
            logits = F.linear(flat.float(), self.weight.float())
        scores = self.score_fn(logits)
        bias = self.e_score_correction_bias
        if image_mask is not None:
            bias = torch.where(image_mask.reshape(-1, 1), self.e_score_correction_bias_vl, bias)
        indices = torch.topk(scores + bias, self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, indices)
        return logits, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.routed_scaling_factor, indices


class DeepseekV41SparseMoeBlock(nn.Module):
    """Routed experts and one shared expert."""

    def __init__(self, config: DeepseekV41TextConfig):
        super().__init__()
        self.gate = DeepseekV41TopKRouter(config)
        self.experts = DeepseekV41Experts(config)
        self.shared_experts = DeepseekV41MLP(config)

    def forward(self, hidden_states: torch.Tensor, image_mask: torch.Tensor | None = None) -> torch.Tensor:
        _, weights, indices = self.gate(hidden_states, image_mask)
        routed = self.experts(hidden_states.flatten(0, 1), indices, weights)
        return routed.view_as(hidden_states) + self.shared_experts(hidden_states)


class DeepseekV41DecoderLayer(GradientCheckpointingLayer):
    """A layer with attention and mixture of experts on residual streams."""

    _attention_class = DeepseekV41Attention

    def __init__(self, config: DeepseekV41TextConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = self._attention_class(config, layer_idx)
        self.mlp = DeepseekV41SparseMoeBlock(config)
        self.input_layernorm = DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn_hc = DeepseekV41HyperConnection(config)
        self.ffn_hc = DeepseekV41HyperConnection(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        pre: torch.Tensor,
        *shared: torch.Tensor | None,
        layout: RowLayout,
        position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]],
        image_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor | None, ...]:
        """Map streams `[B, S, N, hidden]` and their collapse weights `[B, S, N]` to the next layer's.

        All arguments that carry gradients are positional, for checkpointing: `shared` are the fields of
        [`SharedAttention`]. Returns `(streams, pre, *shared)`. Further keywords are accepted for layers that are
        extended from outside, and ignored here.
        """
        attention_input = self.input_layernorm(collapse(hidden_states, pre))
        output, shared = self.self_attn(attention_input, SharedAttention(*shared), layout, position_embeddings, cache)
        pre, post, comb = self.attn_hc(hidden_states)
        hidden_states = expand(hidden_states, output, post, comb)
        output = self.mlp(self.post_attention_layernorm(collapse(hidden_states, pre)), image_mask)
        pre, post, comb = self.ffn_hc(hidden_states)
        return expand(hidden_states, output, post, comb), pre, *shared


class DeepseekV41PreTrainedModel(DeepseekV4PreTrainedModel):
    """The attributes that transformers requires of the architecture.

    Attention weights are not among the recorded outputs: each query selects its own keys, so there is no matrix to
    return. The attention is neither SDPA nor a flash kernel (a sink per head, and keys gathered for each query).
    """

    config: DeepseekV41TextConfig
    config_class = DeepseekV41TextConfig
    _no_split_modules = ["DeepseekV41DecoderLayer"]  # noqa: RUF012
    _supports_attention_backend = False
    # The cache can be rolled back, so assisted decoding works.
    _is_stateful = False
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(DeepseekV41TopKRouter, index=0),
        "hidden_states": DeepseekV41DecoderLayer,
    }
    # These are float32 in the release.
    _keep_in_fp32_modules_strict = ["attn_hc", "ffn_hc", "sinks", "e_score_correction_bias"]  # noqa: RUF012
    # The release does not quantize these: transformers' FP8 loader leaves out the modules that are listed here.
    _keep_in_fp32_modules = [  # noqa: RUF012
        "self_attn.compressor.kv_proj",
        "self_attn.compressor.gate_proj",
        "self_attn.indexer.k_proj",
        "self_attn.indexer.weights_proj",
    ]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the experts in the file of each class, and classes of other files have these experts too.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DeepseekV41TopKRouter):
            initialization.zeros_(module.e_score_correction_bias_vl)
        elif isinstance(module, DeepseekV41Attention):
            initialization.zeros_(module.sinks)


# A model with a vision tower takes these beside the arguments of text.
IMAGE_INPUTS = ("pixel_values", "image_grid_hws", "mm_encoder_outputs")
# This matches the names of tensors of the vision part.
VISION_TENSOR = r"(^|\.)(vision_tower\.|image_(start|newline|end)$)"


class DeepseekV41TextModel(DeepseekV41PreTrainedModel):
    """The DeepSeek-V4.1 decoder, from token ids to the state after the final norm."""

    # A checkpoint with images opens as text.
    _keys_to_ignore_on_load_unexpected = [VISION_TENSOR]  # noqa: RUF012

    def __init__(self, config: DeepseekV41TextConfig):
        super().__init__(config)
        # There is no `padding_idx`: where the mask is 1, the pad id is an ordinary token and is trained.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DeepseekV41DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekV4RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        image_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: `[B, S]`; or `inputs_embeds` `[B, S, hidden]`.
            attention_mask: `[B, cached + S]`, nonzero where a token is real. Padding may be on either side.
            position_ids: `[B, S]`, counting up by one; a 0 inside a row starts another sequence there, which is
                independent of the tokens before it (packed rows). By default the real tokens are counted.
            cache: made by `DynamicCache(config=config)`; `past_key_values` is its name up to transformers 5.23.
            image_mask: `[B, S]` bool, True where the router treats a token as part of an image.
            kwargs: passed to every layer, except the arguments of a model with a vision tower: see
                [`DeepseekV41Model`].

        Returns:
            `last_hidden_state` `[B, S, hidden]`, the cache, and on request `hidden_states` (the streams `[B, S, N,
            hidden]` that enter each layer, then `last_hidden_state`) and `router_logits`.

        Raises:
            ValueError: for inputs of another shape, position ids that skip, and a cache of another model.
        """
        older_name = kwargs.pop("past_key_values", None)
        cache = older_name if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise EngramError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise EngramError(
                "DeepSeek-V4.1 has no attention matrix to return: each query chooses its own keys. Leave `output_attentions` out."
            )
        images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        inputs_embeds, image_mask = self._embed(input_ids, inputs_embeds, image_mask, cache, **images)
        if image_mask is not None and image_mask.shape != inputs_embeds.shape[:2]:
            raise EngramError(
                f"`image_mask` must have one entry per token, {list(inputs_embeds.shape[:2])}; got "
                f"{list(image_mask.shape)}."
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        layout = row_layout(inputs_embeds, attention_mask, position_ids, layer_cache(cache, 0))
        streams, pre = open_streams(inputs_embeds, self.config.hc_mult)
        shared = SharedAttention()
        angles = self._position_embeddings(layout)
        for layer in self.layers[: self.config.num_hidden_layers]:
            streams, pre, *shared = layer(
                streams,
                pre,
                *shared,
                layout=layout,
                position_embeddings=angles,
                image_mask=None if image_mask is None else image_mask.bool(),
                cache=cache,
                **kwargs,
            )
        hidden_states = self.norm(collapse(streams, pre))
        return MoeModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_OUTPUT: cache})

    def _embed(
        self, input_ids, inputs_embeds, image_mask, cache, **images
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return embeddings `[B, S, hidden]` of the call's inputs, and the positions of images."""
        if images.get("pixel_values") is not None:
            raise EngramError(
                "`pixel_values` were given to a model that was opened as text; open it with AutoModelForImageTextToText."
            )
        if inputs_embeds is not None:
            return inputs_embeds, image_mask
        # Images of a prompt need the tower. (The id may be generated by chance: then it is an ordinary token.)
        image_token_id = self.config.image_token_id
        is_looked_for = image_token_id is not None and image_mask is None and not torch.compiler.is_compiling()
        is_prompt = cache is None or not cache.get_seq_length()
        if is_looked_for and is_prompt and bool((input_ids == image_token_id).any()):
            raise EngramError(
                f"`input_ids` holds the image id {image_token_id}, but this model was opened as text; open it with "
                "AutoModelForImageTextToText to give it images."
            )
        return self.embed_tokens(input_ids), image_mask

    def _position_embeddings(self, layout: RowLayout) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return cosines and sines by kind of layer, in float32 for any dtype of the model: bfloat16 angles are
        coarse.
        """
        like = layout.positions.new_empty(0, dtype=torch.float32)
        return {kind: self.rotary_emb(like, layout.positions, layer_type=kind) for kind in ("main", "compress")}


# The key is our own config class, so nothing of a later transformers release is replaced.
for _config in known_copies(DeepseekV41TextConfig):
    AutoModel.register(_config, DeepseekV41TextModel, exist_ok=True)

__all__ = ["DeepseekV41PreTrainedModel", "DeepseekV41TextModel"]
