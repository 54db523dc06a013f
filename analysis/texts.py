"""Texts as windows of token ids, and the class of each token.

Shape letters: N windows, S positions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..safetensors_engram import EngramError

# These characters stand for a space before a token in vocabularies: of byte-level BPE, and of SentencePiece.
_SPACES = ("Ġ", "▁")
TOKEN_CLASSES = ("word start", "inside a word", "name", "digit", "punctuation", "space", "special")


@dataclass(eq=False)
class Windows:
    """Texts cut into windows, one per row.

    Args:
        input_ids: int64 `[N, S]`, padded on the right.
        valid: bool `[N, S]`, False at padding.
        classes: int64 `[N, S]`, an index into `TOKEN_CLASSES`; -1 at padding.
    """

    input_ids: torch.Tensor
    valid: torch.Tensor
    classes: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def batches(self, size: int) -> Iterable[dict[str, torch.Tensor]]:
        """Yield `input_ids` and `attention_mask` of a few windows at a time, without the padding that all of them
        have.
        """
        for first in range(0, len(self), size):
            rows = slice(first, first + size)
            length = int(self.valid[rows].sum(1).max())
            yield {"input_ids": self.input_ids[rows, :length], "attention_mask": self.valid[rows, :length].long()}


def cut_windows(texts: Iterable[str], tokenizer: Any, *, length: int = 256, limit: int | None = None) -> Windows:
    """Cut texts into windows of at most `length` tokens; no window has tokens of two texts.

    Args:
        texts: strings; the rest of each makes a shorter window.
        tokenizer: the model's own tokenizer.
        length: tokens in a window, at least 2.
        limit: the maximum number of windows; None for all.

    Raises:
        ValueError: `texts` is one string or contains something else, `length` is too small, or no text has two tokens
            that are not special.
    """
    if isinstance(texts, (str, bytes)):
        raise EngramError(f"The texts are one {type(texts).__name__}; pass a list of strings.")
    if length < 2:
        raise EngramError(f"length is {length}; a window needs at least 2 tokens, one to read and one to predict.")
    windows: list[list[int]] = []
    for text in texts:
        if not isinstance(text, str):
            raise EngramError(f"One of the texts is a {type(text).__name__}; pass strings.")
        ids = tokenizer(text)["input_ids"]
        windows += [ids[first : first + length] for first in range(0, len(ids), length)]
        if limit is not None and len(windows) >= limit:
            break
    special = set(tokenizer.all_special_ids)
    windows = [ids for ids in windows[:limit] if len(ids) > 1 and not special.issuperset(ids)]
    if not windows:
        raise EngramError(
            "No text has two tokens, special ones apart, so there is nothing to predict; pass longer texts."
        )
    pieces = Pieces(tokenizer)
    rows = [torch.tensor(ids) for ids in windows]
    classes = [torch.tensor(pieces.classes(ids)) for ids in windows]
    valid = [torch.ones(len(ids), dtype=torch.bool) for ids in windows]
    pad = torch.nn.utils.rnn.pad_sequence
    return Windows(pad(rows, True), pad(valid, True), pad(classes, True, padding_value=-1))


class Pieces:
    """The text of single tokens, with the space before a word.

    Args:
        tokenizer: any tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._known: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        """Return the text of a token."""
        if token_id not in self._known:
            text = str(self.tokenizer.decode([token_id]))
            raw = self.tokenizer.convert_ids_to_tokens(token_id) or ""
            if raw.startswith(_SPACES) and not text[:1].isspace():
                text = " " + text
            self._known[token_id] = text
        return self._known[token_id]

    def classes(self, ids: Sequence[int]) -> list[int]:
        """Return, for each token of a text, the index of its class in `TOKEN_CLASSES`.

        A word starts after a space, or after a token that does not end in a letter or digit; a name is a word that
        starts with a capital letter.
        """
        found, before = [], ""
        for token_id in ids:
            text = self.text(token_id)
            found.append(TOKEN_CLASSES.index("special" if token_id in self._special else _class_of(text, before)))
            before = text
        return found


def _class_of(text: str, before: str) -> str:
    word = text.strip()
    if not word:
        return "space"
    if not any(letter.isalnum() for letter in word):
        return "punctuation"
    if not any(letter.isalpha() for letter in word):
        return "digit"
    if not text[0].isspace() and before[-1:].isalnum():
        return "inside a word"
    return "name" if word[0].isupper() else "word start"
