"""A small engine with its own cache, as inference servers have, that runs a model without transformers' cache.

Requests are packed in one row; a step brings each of them a chunk of its prompt, or one token. A request can begin
with the states of another one that has the same prefix.
"""

import dataclasses

import torch
from torch.nn import functional as F
from transformers import AttentionInterface


@dataclasses.dataclass
class Request:
    """The state of one text: tokens that were run, keys and values by layer, convolution inputs by layer."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    states: dict[int, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)
    conv_inputs: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def prefix(self, length: int) -> "Request":
        """Return a request that begins with the first tokens of this one, and their states."""
        return Request(
            self.tokens[:length],
            {layer: (keys[:, :, :length], values[:, :, :length]) for layer, (keys, values) in self.states.items()},
            {layer: inputs[:length] for layer, inputs in self.conv_inputs.items()},
        )


def _attend(module, query, key, value, attention_mask, scaling=None, engine_chunks=None, **_):
    outputs, start = [], 0
    for request, length in engine_chunks:
        span = slice(start, start + length)
        new = key[:, :, span], value[:, :, span]
        past = request.states.get(module.layer_idx)
        keys, values = new if past is None else (torch.cat(pair, 2) for pair in zip(past, new, strict=True))
        request.states[module.layer_idx] = keys, values
        seen = torch.ones(length, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - length)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, span], keys, values, attn_mask=seen, scale=scaling, enable_gqa=True
            )
        )
        start += length
    return torch.cat(outputs, 2).transpose(1, 2), None


AttentionInterface.register("toy_engine", _attend)


class ToyEngine:
    """Runs `model` on packed chunks of requests; its memory looks back as its config says."""

    def __init__(self, model):
        self.model, self.config = model, model.config
        model.set_attn_implementation("toy_engine")

    @torch.no_grad()
    def step(self, chunks: list[tuple[Request, list[int]]], **changes) -> torch.Tensor:
        """Return the logits of the last token of each chunk `[n, V]`; `changes` replace keyword arguments of the
        forward.
        """
        tokens = [token for _, chunk in chunks for token in chunk]
        positions = [len(request.tokens) + i for request, chunk in chunks for i in range(len(chunk))]
        bounds = torch.tensor([0, *(len(chunk) for _, chunk in chunks)]).cumsum(0)
        collected: dict[int, torch.Tensor] = {}
        given = {
            "lookback_token_ids": torch.tensor([self._tokens_before(request) for request, _ in chunks]),
            "cu_seq_lens_q": bounds.int(),
        }
        if self.config.engram_conv_kernel_size:
            kept = {layer: self._conv_before(layer, chunks) for layer in self.config.engram_layer_ids}
            has_begun = any(request.conv_inputs for request, _ in chunks)
            given |= {"lookback_conv_inputs": kept if has_begun else {}, "engram_conv_inputs": collected}
        given = {name: value for name, value in {**given, **changes}.items() if value is not None}
        logits = self.model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            engine_chunks=[(request, len(chunk)) for request, chunk in chunks],
            **given,
        ).logits[0]
        for (request, chunk), start in zip(chunks, bounds, strict=False):
            request.tokens = request.tokens + chunk
            for layer, inputs in collected.items():
                new = inputs[0, start : start + len(chunk)]
                past = request.conv_inputs.get(layer)
                request.conv_inputs[layer] = new if past is None else torch.cat([past, new])
        return logits[bounds[1:] - 1]

    def _tokens_before(self, request: Request) -> list[int]:
        width = self.config.engram_max_ngram_size - 1
        return ([-1] * width + request.tokens)[-width:]

    def _conv_before(self, layer: int, chunks: list[tuple[Request, list[int]]]) -> torch.Tensor:
        reach = (self.config.engram_conv_kernel_size - 1) * self.config.engram_max_ngram_size
        known = next((r.conv_inputs[layer] for r, _ in chunks if layer in r.conv_inputs), None)
        if known is None:
            return torch.empty(0)
        empty = known.new_zeros(reach, *known.shape[1:])
        return torch.stack([torch.cat([empty, r.conv_inputs.get(layer, empty)])[-reach:] for r, _ in chunks])
