"""DeepSeek-V4.1's draft layers (DSpark): a small model that drafts a block of tokens in one pass, for verification by
the text model.

It reads the text model's residual streams at a few layers (the *features* of a position), and shares its embedding and
head.

Letters used for shapes: B rows, K tokens of a block, P positions, C context positions within the window, N residual
streams, L draft layers, D channels of a latent. `hidden` is the text model's width.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm, DeepseekV4RotaryEmbedding

from .configuration_deepseek_v41 import DeepseekV41TextConfig
from .fields_deepseek_v41 import DRAFT_FIELDS
from .modeling_deepseek_v41 import (
    DeepseekV41Attention,
    DeepseekV41DecoderLayer,
    DeepseekV41PreTrainedModel,
    SharedAttention,
    collapse,
    open_streams,
)
from .safetensors_engram import EngramError


def has_drafts(config: DeepseekV41TextConfig) -> bool:
    """Return whether a text model with this config was trained with draft layers."""
    return bool(getattr(config, "num_nextn_predict_layers", 0))


def require_readable_features(config) -> None:
    """Refuse a model whose features cannot be read from the outside.

    Raises:
        ValueError: memory is added to the streams of a layer that the draft layers read, after the point where they
            can be read.
    """
    both = set(getattr(config, "dspark_target_layer_ids", None) or ()) & set(getattr(config, "engram_layer_ids", ()))
    if both:
        raise EngramError(
            f"The draft layers read layers {sorted(both)}, in front of which memory stands; generate without `use_mtp`."
        )


def draft_layers_config(config: DeepseekV41TextConfig) -> DeepseekV41TextConfig:
    """Return the config of the draft layers: the text model's, with window attention only, and with their own experts.

    Raises:
        ValueError: the text model has no draft layers, or the fields that describe them are missing or wrong.
    """
    if not has_drafts(config):
        raise EngramError(
            "The config has no draft layers (`num_nextn_predict_layers`); generate without `use_mtp`, or open a checkpoint "
            "that has them."
        )
    missing = [name for name in DRAFT_FIELDS if getattr(config, name, None) is None]
    if missing:
        raise EngramError(f"The config has draft layers, but lacks `{missing[0]}`; take config.json of the release.")
    targets, layers = config.dspark_target_layer_ids, config.num_hidden_layers
    if not targets or any(not 0 <= layer < layers for layer in targets):
        raise EngramError(
            f"`dspark_target_layer_ids` {targets} must be layers of the text model, 0 to {layers - 1}; a checkpoint of which "
            "only the first layers were kept cannot draft."
        )
    fields = copy.deepcopy(config)
    fields.num_hidden_layers = config.num_nextn_predict_layers
    fields.compress_ratios = [0] * config.num_nextn_predict_layers
    fields.kv_source_layer_ids = fields.index_source_layer_ids = []
    fields.candidate_source_layer_id = fields.vision_config = None
    fields.n_routed_experts = config.dspark_n_routed_experts
    fields.num_experts_per_tok = config.dspark_num_experts_per_tok
    fields.validate()
    return fields


class DraftContext:
    """The draft layers' cache of a sequence: each layer's keys of the newest positions within the window."""

    def __init__(self, layers: int, window: int):
        self.window = window
        self.length = 0  # positions of the sequence so far
        self.keys: list[torch.Tensor | None] = [None] * layers  # [B, C, D], the newest last

    def append(self, layer: int, keys: torch.Tensor) -> None:
        """Add the keys `[B, P, D]` of new positions to one layer's; `length` must be increased after the last layer."""
        known = keys if self.keys[layer] is None else torch.cat([self.keys[layer], keys], dim=1)
        self.keys[layer] = known[:, -self.window :]


class DeepseekV41DraftAttention(DeepseekV41Attention):
    """Attention of a block: each of its tokens sees the same context positions, and the whole block."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        shared: SharedAttention,
        layout: None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: DraftContext,
    ) -> tuple[torch.Tensor, SharedAttention]:
        """Map `[B, K, hidden]` to `[B, K, hidden]`; the block's own keys are not stored."""
        cos, sin = position_embeddings
        _, query = self._query(hidden_states, cos, sin)
        keys, context = self.latents(hidden_states, cos, sin), cache.keys[self.layer_idx]
        keys = keys if context is None else torch.cat([context.to(keys.dtype), keys], dim=1)
        output = self._attend_block(query, keys, None, None, None)
        return self._output(output, cos, sin), shared

    def _sees(self, positions: None, length: int) -> torch.Tensor:
        return torch.ones(1, 1, length, dtype=torch.bool, device=self.sinks.device)


class DeepseekV41DraftLayer(DeepseekV41DecoderLayer):
    """A decoder layer on a block of tokens."""

    _attention_class = DeepseekV41DraftAttention


class Drafts(NamedTuple):
    """A drafted block."""

    tokens: torch.Tensor  # [B, K] int64
    logits: torch.Tensor  # [B, K, vocab] float32, those the tokens were chosen from
    confidence: torch.Tensor  # [B, K] float32; the sigmoid is the predicted probability that a draft is accepted


def likeliest(tokens: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the likeliest token `[B]` of `logits` `[B, vocab]`; `tokens` `[B, k]`, drafted before, are ignored."""
    return logits.argmax(-1), logits


class DeepseekV41DraftModel(DeepseekV41PreTrainedModel):
    """The draft layers with their heads. Embedding and language-model head are the text model's, and passed to each
    call.

    Args:
        config: the text model's.
        among_others: whether it is loaded from the folder of a whole model, which has other tensors, too.
    """

    base_model_prefix = "draft"
    _no_split_modules = ["DeepseekV41DraftLayer"]  # noqa: RUF012

    def __init__(self, config: DeepseekV41TextConfig, among_others: bool = False):
        super().__init__(config)
        layers = draft_layers_config(config)
        hidden, rank = config.hidden_size, config.dspark_markov_rank
        self.main_proj = nn.Linear(len(config.dspark_target_layer_ids) * hidden, hidden, bias=False)
        self.main_norm = DeepseekV4RMSNorm(hidden, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(DeepseekV41DraftLayer(layers, index) for index in range(layers.num_hidden_layers))
        # The name differs from `norm`: the release has a tensor `norm.weight`, the text model's, beside which this
        # model is loaded.
        self.final_norm = DeepseekV4RMSNorm(hidden, eps=config.rms_norm_eps)
        self.markov_embed = nn.Embedding(config.vocab_size, rank)
        self.markov_head = nn.Linear(rank, config.vocab_size, bias=False)
        self.confidence_head = nn.Linear(hidden + rank, 1, bias=False)
        self.rotary_emb = DeepseekV4RotaryEmbedding(config)
        self.post_init()
        if among_others:
            self._keys_to_ignore_on_load_unexpected.add(r"^(?!draft\.)")

    def new_context(self) -> DraftContext:
        """Return an empty context."""
        return DraftContext(len(self.layers), self.config.sliding_window)

    def extend(self, context: DraftContext, features: torch.Tensor) -> None:
        """Extend the context by the next positions of its sequence.

        Args:
            features: `[B, P, targets * hidden]`, the mean over the residual streams that enter each of the layers
                `config.dspark_target_layer_ids`, concatenated.
        """
        skipped = max(0, features.shape[1] - context.window)
        features = features[:, skipped:]
        start = context.length + skipped
        states = self.main_norm(self.main_proj(features.to(self.main_proj.weight.device)))
        angles = self._angles(start, states)
        for index, layer in enumerate(self.layers):
            context.append(index, layer.self_attn.latents(states, *angles))
        context.length = start + features.shape[1]

    def forward(self, inputs_embeds: torch.Tensor, context: DraftContext) -> torch.Tensor:
        """Return states `[B, K, hidden]`, before the last norm, of a block that follows `context`.

        Args:
            inputs_embeds: `[B, K, hidden]`, the text model's embeddings of the newest token and of noise.
        """
        streams, pre = open_streams(inputs_embeds, self.config.hc_mult)
        angles = self._angles(context.length, inputs_embeds)
        for layer in self.layers:
            streams, pre, *_ = layer(streams, pre, layout=None, position_embeddings=angles, cache=context)
        return collapse(streams, pre)

    def draft(
        self,
        token: torch.LongTensor,
        context: DraftContext,
        embedding: nn.Module,
        head: nn.Module,
        count: int | None = None,
        choose: Callable = likeliest,
    ) -> Drafts:
        """Draft the continuation of `token`, the newest of the sequence, which is not in `context` yet.

        Args:
            token: `[B]`.
            embedding, head: the text model's.
            count: the number of drafts, at most `config.dspark_block_size`; the whole block runs in any case, because
                it was trained as a whole.
            choose: takes the tokens drafted before `[B, k]` and logits `[B, vocab]`, returns the next token `[B]` and
                the logits it was chosen from.
        """
        noise = token.new_full((len(token), self.config.dspark_block_size - 1), self.config.dspark_noise_token_id)
        block = torch.cat([token[:, None], noise], dim=1)
        states = self(embedding(block).to(self.device), context)[:, : count or self.config.dspark_block_size]
        normalized = self.final_norm(states)
        base = head(normalized.to(head.weight.device)).float().to(self.device)
        tokens, logits, confidence = token.new_zeros(len(token), 0), [], []
        for place in range(states.shape[1]):
            markov = self.markov_embed(token.to(self.device))
            confidence.append(self._confidence(states[:, place], markov))
            token, chosen_from = choose(tokens, base[:, place] + self.markov_head(markov).float())
            tokens = torch.cat([tokens, token[:, None].to(tokens.device)], dim=1)
            logits.append(chosen_from)
        return Drafts(tokens, torch.stack(logits, dim=1), torch.stack(confidence, dim=1))

    def _confidence(self, state: torch.Tensor, markov: torch.Tensor) -> torch.Tensor:
        weight = self.confidence_head.weight.float()
        return F.linear(torch.cat([state, markov], dim=-1).float(), weight).squeeze(-1)

    def _angles(self, start: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines of the positions from `start` on, one for each of `states` `[B, P, hidden]`."""
        positions = torch.arange(start, start + states.shape[1], device=states.device)[None]
        return self.rotary_emb(states.new_empty(0, dtype=torch.float32), positions, layer_type="main")


__all__ = ["DeepseekV41DraftModel"]
