"""Facts as token ids: check the input of `write_facts`, and choose the positions of a fact whose rows are written.

Shape letters: S positions of a fact, L Engram layers, T heads of all n-gram orders.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..safetensors_engram import EngramError
from .memory import heads_of_orders, read_rows_of

if TYPE_CHECKING:
    from ..modeling_engram import EngramModel

# A prompt should have this number of written n-grams that no other prompt reads.
_OWN_NGRAMS = 2


@dataclass(frozen=True)
class Fact:
    """A prompt, and the target that should follow it.

    Args:
        prompt, target: their texts.
        prompt_ids, target_ids: their token ids, neither of them empty.
    """

    prompt: str
    target: str
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    @property
    def input_ids(self) -> torch.Tensor:
        """Prompt and target, int64 `[S]`."""
        return torch.tensor([*self.prompt_ids, *self.target_ids])

    @property
    def predicting(self) -> range:
        """Positions whose next token belongs to the target."""
        first = len(self.prompt_ids) - 1
        return range(first, first + len(self.target_ids))


@dataclass(frozen=True)
class WrittenFact:
    """A fact of an adapter, and the places of its rows.

    Args:
        fact: the fact.
        positions: the positions whose rows are written, ascending.
        layers, orders: the layers and n-gram orders of the rows.
    """

    fact: Fact
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    orders: tuple[int, ...]

    def rows(self, engram: "EngramModel") -> dict[int, torch.Tensor]:
        """Return the distinct rows that these positions read, by layer."""
        row_ids = _row_ids(engram, self.fact)[:, list(self.positions)][..., heads_of_orders(engram, self.orders)]
        return {layer: torch.unique(row_ids[engram.hashing.layer_ids.index(layer)]) for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """Return the fact as JSON values."""
        return {
            "prompt": self.fact.prompt,
            "target": self.fact.target,
            "prompt_ids": list(self.fact.prompt_ids),
            "target_ids": list(self.fact.target_ids),
            "positions": list(self.positions),
            "layers": list(self.layers),
            "orders": list(self.orders),
        }

    @classmethod
    def from_dict(cls, values: Any) -> "WrittenFact":
        """Return the fact that `to_dict` was called on.

        Raises:
            ValueError: the values are not the result of `to_dict`.
        """
        try:
            numbers = {name: tuple(values[name]) for name in ("positions", "layers", "orders")}
            ids = {name: tuple(values[name]) for name in ("prompt_ids", "target_ids")}
            found = cls(Fact(str(values["prompt"]), str(values["target"]), **ids), **numbers)
        except (KeyError, TypeError):
            raise _damaged() from None
        counts = [number for part in (*numbers.values(), *ids.values()) for number in part]
        length = len(found.fact.prompt_ids) + len(found.fact.target_ids)
        is_fine = all(type(number) is int and number >= 0 for number in counts) and all(ids.values())
        if not is_fine or not all(numbers.values()) or max(found.positions) >= length:
            raise _damaged()
        return found


def _damaged() -> EngramError:
    return EngramError(
        "The facts in adapter_config.json are damaged; restore the file that save_pretrained wrote, or write the facts again."
    )


def parse_facts(facts: Iterable[Mapping[str, Any]], tokenizer: Any) -> list[Fact]:
    """Check facts and tokenize them.

    Args:
        facts: each with `prompt` and `target`; or with `subject`, `relation` (a template with `{}` for the subject) and
            `target`. A target may be `{"str": ...}`, as in CounterFact.
        tokenizer: the model's.

    Raises:
        ValueError: there are no facts; a fact lacks a field or has a target without tokens; or two facts contradict each other.
    """
    if isinstance(facts, (str, bytes, Mapping)):
        raise EngramError(
            f"The facts are one {type(facts).__name__}; pass a list of dictionaries with prompt and target."
        )
    parsed = [_parse(index, item, tokenizer) for index, item in enumerate(facts)]
    if not parsed:
        raise EngramError("There are no facts; pass at least one dictionary with prompt and target.")
    first_with: dict[tuple[int, ...], int] = {}
    for index, fact in enumerate(parsed):
        earlier = first_with.setdefault(fact.prompt_ids, index)
        if earlier != index:
            what = "are the same" if parsed[earlier].target_ids == fact.target_ids else "give one prompt two targets"
            raise EngramError(f"Facts {earlier} and {index} {what} ({fact.prompt!r}); keep one of them.")
    return parsed


def _parse(index: int, item: Any, tokenizer: Any) -> Fact:
    if not isinstance(item, Mapping):
        raise EngramError(f"Fact {index} is a {type(item).__name__}; it must be a dictionary with prompt and target.")
    prompt = item.get("prompt", item.get("relation"))
    if isinstance(prompt, str) and isinstance(item.get("subject"), str):
        prompt = prompt.replace("{}", item["subject"])
    if not isinstance(prompt, str) or not prompt.strip():
        raise EngramError(
            f"Fact {index} has no prompt; give 'prompt', or 'subject' and 'relation' (got {sorted(map(str, item))})."
        )
    if "prompt" not in item and "subject" not in item:
        raise EngramError(f"Fact {index} has a relation but no subject; give both, or 'prompt'.")
    target = item.get("target")
    target = target.get("str") if isinstance(target, Mapping) else target
    if not isinstance(target, str) or not target.strip():
        raise EngramError(f"Fact {index} has no target; give the text that is to follow {prompt!r}.")
    prompt_ids, target_ids = _tokenize(tokenizer, prompt, target)
    if not prompt_ids or not target_ids:
        which = "target" if prompt_ids else "prompt"
        raise EngramError(f"The {which} of fact {index} has no tokens in this tokenizer; choose other words.")
    return Fact(prompt, target, prompt_ids, target_ids)


def _tokenize(tokenizer: Any, prompt: str, target: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of a prompt as it will be asked, and of the target behind it, with a space between them if there
    is none.
    """
    space = "" if prompt[-1].isspace() or target[0].isspace() else " "
    prompt_ids, both = (tuple(tokenizer(text)["input_ids"]) for text in (prompt, prompt + space + target))
    if both[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, both[len(prompt_ids) :]
    # A token crosses the border between prompt and target, or the tokenizer appends a special token to every text.
    return prompt_ids, tuple(tokenizer(space + target, add_special_tokens=False)["input_ids"])


def choose_positions(
    engram: "EngramModel",
    facts: Sequence[Fact],
    layers: Sequence[int],
    orders: Sequence[int],
    protected: Mapping[int, torch.Tensor],
) -> list[tuple[int, ...]]:
    """Return the positions of every fact whose rows are written.

    These are the positions that predict its target, and before them the last `_OWN_NGRAMS` n-grams of the prompt that no other
    fact reads and that are not protected: a shared n-gram cannot distinguish facts. N-grams that the beginning of the text cuts
    off are written only if there is no other.

    Args:
        engram, layers, orders: the model, and the layers and n-gram orders to choose.
        facts: all facts that are written together.
        protected: rows that must not be written, by layer.
    """
    heads = heads_of_orders(engram, orders)
    ngrams, free = [], []
    for fact in facts:
        row_ids = _row_ids(engram, fact)[..., heads]
        ngrams.append([tuple(ids.tolist()) for ids in row_ids[0]])
        is_free = torch.zeros(len(ngrams[-1]), dtype=torch.bool)
        for layer in layers:
            ids = row_ids[engram.hashing.layer_ids.index(layer)]
            is_free |= ~torch.isin(ids, protected.get(layer, ids[:0])).all(-1)
        free.append(is_free.tolist())
    readers: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for index, fact in enumerate(facts):
        for ngram in ngrams[index][: len(fact.prompt_ids)]:
            readers[ngram].add(index)
    chosen = []
    for index, fact in enumerate(facts):
        own: list[int] = []
        first = len(fact.prompt_ids)
        while first > (max(orders) - 1 if own else 0) and len(own) < _OWN_NGRAMS:
            first -= 1
            if free[index][first] and len(readers[ngrams[index][first]]) == 1:
                own.append(first)
        chosen.append(tuple(sorted({*own, *fact.predicting})))
    return chosen


def say_conflicts(engram: "EngramModel", facts: Sequence[Fact], orders: Sequence[int]) -> list[str]:
    """Return a sentence for each group of facts that memory cannot distinguish, and each prompt that it reads as a
    shorter one.
    """
    notes = []
    compressed: dict[tuple[int, ...], int] = {}
    for index, fact in enumerate(facts):
        if len(fact.prompt_ids) < max(orders):
            notes.append(
                f"The prompt of fact {index} is shorter than {max(orders)} tokens: every text that begins like it reads its rows."
            )
        for what, ids in (("prompts", fact.prompt_ids), ("texts", (*fact.prompt_ids, *fact.target_ids))):
            key = tuple(engram.hashing.compress(torch.tensor(ids)).tolist())
            other = compressed.setdefault((what == "texts", *key), index)
            if other != index:
                notes.append(
                    f"The {what} of facts {other} and {index} differ only in what the compressed vocabulary leaves out (case, "
                    "accents, spaces): they read the same rows."
                )
    return notes


def _row_ids(engram: "EngramModel", fact: Fact) -> torch.Tensor:
    """Return the row ids, int64 `[L, S, T]`."""
    return read_rows_of(engram, {"input_ids": fact.input_ids.unsqueeze(0)}).row_ids[:, 0]
