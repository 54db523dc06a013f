"""One text, token by token: the rows that memory reads, how far its gates open, and its effect on the prediction.

Shape letters: S positions, T heads of all n-gram orders, H heads of an order, W channels of a row, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..safetensors_engram import EngramError
from ..training.memory import find_engram, read_rows_of
from .evaluation import Measurement, Off, run
from .frequency import compressed_ids
from .texts import Pieces, cut_windows

# A page of a longer text would no longer be readable.
LONGEST = 2048


@dataclass
class Ngram:
    """An n-gram that ends at a token, and the rows that one layer reads for it.

    Args:
        order: the number of its tokens.
        text: the text of its tokens.
        rows, norms: row and norm of each head.
    """

    order: int
    text: str
    rows: list[int]
    norms: list[float]


@dataclass
class TokenReading:
    """The rows that one token reads, and the effect of memory there.

    Args:
        text, token_id, compressed: the token, its id, and the compressed id that is hashed (-1: none).
        gates: by layer, one for each residual stream.
        ngrams: by layer.
        next_probability, next_probability_off: the probability of the following token, with memory and without; None
            for the last one.
        predicted, predicted_off: the most probable next token.
    """

    text: str
    token_id: int
    compressed: int
    gates: dict[int, list[float]]
    ngrams: dict[int, list[Ngram]]
    next_probability: float | None
    next_probability_off: float | None
    predicted: str
    predicted_off: str


@dataclass
class Reading(Measurement):
    """How a model reads a text.

    Args:
        layers: decoder layers with memory.
        tokens: one entry for each token.
    """

    layers: list[int]
    tokens: list[TokenReading]


@torch.no_grad()
def read_text(model: PreTrainedModel, tokenizer: Any, text: str) -> Reading:
    """Read a text with memory and without.

    Args:
        model: an Engram causal language model in evaluation mode.
        tokenizer: the model's own tokenizer.
        text: a text of at least two tokens, and at most 2,048.

    Raises:
        ValueError: the text is shorter or longer, or has only special tokens.
    """
    engram = find_engram(model)
    windows = cut_windows([text], tokenizer, length=LONGEST)
    if len(windows) > 1:
        raise EngramError(f"The text has more than {LONGEST:,} tokens; show a part of it.")
    gates: dict[int, torch.Tensor] = {}
    ((_, outputs),) = run(model, windows, engram_gate_values=gates, title="With memory")
    ((_, without),) = run(model, windows, edit=Off(), title="Without memory")
    probabilities, probabilities_off = (each.logits[0].float().softmax(-1).cpu() for each in (outputs, without))
    ids = windows.input_ids[0]
    compressed = compressed_ids(engram, windows)[0].tolist()
    pieces, ngrams = Pieces(tokenizer), _ngrams(engram, windows, Pieces(tokenizer))
    layers = list(engram.config.engram_layer_ids)
    tokens = [
        TokenReading(
            text=pieces.text(int(token)),
            token_id=int(token),
            compressed=compressed[at],
            gates={layer: gates[index][0, at].float().tolist() for index, layer in enumerate(layers)},
            ngrams=ngrams[at],
            next_probability=None if at + 1 == len(ids) else float(probabilities[at, ids[at + 1]]),
            next_probability_off=None if at + 1 == len(ids) else float(probabilities_off[at, ids[at + 1]]),
            predicted=pieces.text(int(probabilities[at].argmax())),
            predicted_off=pieces.text(int(probabilities_off[at].argmax())),
        )
        for at, token in enumerate(ids)
    ]
    return Reading(layers, tokens)


def _ngrams(engram: Any, windows: Any, pieces: Pieces) -> list[dict[int, list[Ngram]]]:
    """Return, for every position and by layer, the n-grams that end there and fit into the text."""
    row_ids = read_rows_of(engram, next(iter(windows.batches(1)))).row_ids[:, 0]  # [L, S, T]
    texts = [pieces.text(int(token)) for token in windows.input_ids[0]]
    heads = engram.hashing.heads
    found: list[dict[int, list[Ngram]]] = [{} for _ in texts]
    for layer, memory in engram.memories().items():
        rows = row_ids[memory.index]
        device = memory.kv_proj.weight.device
        read = memory.table(rows.to(device), dtype=torch.float32).float()  # Those of a float table keep their dtype.
        norms = read.unflatten(-1, (rows.shape[1], -1)).norm(dim=-1).cpu()
        for at in range(len(texts)):
            found[at][layer] = [
                Ngram(
                    order, "".join(texts[at + 1 - order : at + 1]), rows[at, part].tolist(), norms[at, part].tolist()
                )
                for order in range(2, engram.hashing.max_ngram + 1)
                if order <= at + 1
                for part in [slice((order - 2) * heads, (order - 1) * heads)]
            ]
    return found
