"""Long-context tasks in RULER's style (arXiv 2404.06654) for small models: needles, chains of variables, common words.

Every example is a window of text, with sentences of the task put between its tokens and questions at its end. The
answers are single tokens, so that an answer is right if it is the model's first choice.

Shape letters: N examples, S positions.
"""

import random

import torch
from transformers import PreTrainedModel

from engram_hf import EngramError, EngramTokenizer

TASKS = ("multi-query needle", "variable tracking", "common words")
_NEEDLES, _QUERIES = 8, 4
_CHAINS, _HOPS = 3, 4
_COMMON, _RARE, _TIMES = 3, 12, 4
# One example in this many is trained on as text, with all of its tokens; the others on their answers alone.
_AS_TEXT = 8


class Maker:
    """Makes examples of single-token words.

    Args:
        tokenizer: the models' tokenizer.
        haystack: blocks of text int64 `[N, S]`.
        seed: the seed of all random choices.

    Raises:
        ValueError: the vocabulary has too few words.
    """

    def __init__(self, tokenizer: EngramTokenizer, haystack: torch.Tensor, seed: int):
        self.tokenizer, self.haystack = tokenizer, haystack
        self.random = random.Random(seed)
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.words = [
            at for at, piece in enumerate(pieces) if piece[0] == "Ġ" and len(piece) > 3 and piece[1:].isalpha()
        ]
        if len(self.words) < _COMMON + _RARE + _CHAINS * _HOPS:
            raise EngramError(
                f"The tokenizer has {len(self.words)} whole words of three letters and more, too few for these tasks; give a preset with "
                "a larger vocab_size, or more texts."
            )
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a piece of a sentence."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text)["input_ids"]
        return self._known[text]

    def example(self, task: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a window, and the positions of its answers."""
        sentences, questions = getattr(self, "_" + task.replace(" ", "_").replace("-", "_"))()
        room = self.haystack.shape[1] - sum(map(len, sentences)) - sum(len(ids) + 1 for ids, _ in questions)
        start = self.random.randrange(self.haystack.shape[1] - room + 1)
        text = self.haystack[self.random.randrange(len(self.haystack)), start : start + room].tolist()
        places = sorted(self.random.randrange(room + 1) for _ in sentences)
        window: list[int] = []
        for sentence, here, there in zip(sentences, [0, *places[:-1]], places, strict=True):
            window += text[here:there] + sentence
        window += text[places[-1] :]
        answers = []
        for question, answer in questions:
            window += question
            answers.append(len(window))
            window.append(answer)
        return window, answers

    def _multi_query_needle(self):
        keys, values = (self.random.sample(self.words, _NEEDLES) for _ in range(2))
        pairs = list(zip(keys, values, strict=True))
        needles = [
            [*self.ids("\nThe secret of"), key, *self.ids(" is"), value, *self.ids(".\n")] for key, value in pairs
        ]
        asked = self.random.sample(pairs, _QUERIES)
        return needles, [([*self.ids("\nThe secret of"), key, *self.ids(" is")], value) for key, value in asked]

    def _variable_tracking(self):
        names = self.random.sample(self.words, _CHAINS * (_HOPS + 1))
        chains = [names[first : first + _HOPS + 1] for first in range(0, len(names), _HOPS + 1)]
        steps = [
            [*self.ids("\nset"), second, *self.ids(" ="), first, *self.ids("\n")]
            for hop in range(_HOPS)
            for first, second in ((chain[hop], chain[hop + 1]) for chain in self.random.sample(chains, _CHAINS))
        ]
        asked = self.random.choice(chains)
        return steps, [
            ([*self.ids("\nset all of"), asked[0], *self.ids(":")], asked[1]),
            *(([], name) for name in asked[2:]),
        ]

    def _common_words(self):
        words = self.random.sample(self.words, _COMMON + _RARE)
        listed = words[:_COMMON] * _TIMES + words[_COMMON:]
        self.random.shuffle(listed)
        common = sorted(words[:_COMMON], key=listed.index)
        return [[*self.ids("\n-"), word, *self.ids("\n")] for word in listed], [
            (self.ids("\nmost common:"), common[0]),
            *(([], word) for word in common[1:]),
        ]


def training_examples(maker: Maker, count: int) -> list[dict[str, torch.Tensor]]:
    """Return `input_ids` and `labels`, the tasks one after the other."""
    found = []
    for number in range(count):
        window, answers = maker.example(TASKS[number % len(TASKS)])
        ids = torch.tensor(window)
        labels = ids.clone()
        if number // len(TASKS) % _AS_TEXT:
            labels = torch.full_like(ids, -100)
            labels[answers] = ids[answers]
        found.append({"input_ids": ids, "labels": labels})
    return found


@torch.no_grad()
def score(model: PreTrainedModel, maker: Maker, task: str, count: int, batch: int = 32) -> float:
    """Return the share of answers that are the model's first choice, given the true answers before them."""
    right = total = 0
    for first in range(0, count, batch):
        examples = [maker.example(task) for _ in range(min(batch, count - first))]
        ids = torch.tensor([window for window, _ in examples], device=model.device)
        best = model(input_ids=ids, use_cache=False).logits.argmax(-1).cpu()
        for row, (window, answers) in enumerate(examples):
            right += sum(int(best[row, at - 1]) == window[at] for at in answers)
            total += len(answers)
    return right / total
