"""Exact-match tasks made of held-out text: some need recall of the training text, some need none.

An item is a context and the target that follows it in the text; a model is right if every token of the target is its
own first choice, as in greedy decoding. lm-eval-harness counts the same (`acc` of a `loglikelihood` task).

Shape letters: B batch, S positions, V vocabulary.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from engram_hf import EngramTokenizer

_CONTEXT = 320  # These are characters.
# Names of code have an underscore or a capital inside.
_NAME = re.compile(r"\b[A-Za-z_]+?(?:_|(?<=[a-z])[A-Z])[A-Za-z0-9_]{3,}\b")
_CALL = re.compile(r"(?<![\w.])([a-z_]+)\.([A-Za-z_]+\()")
_IMPORTED = re.compile(r"^\s*(?:import|from) (\w+)", re.MULTILINE)
_NUMBER = re.compile(r"\b([A-Za-z_]{2,})([ =(]{1,3}\d{2,5}(?:-\d{2}-\d{2})?)\b")
_CLOSED = re.compile(r"\w([)\]}][:,)\]}]?)\n")
_SEEN = range(2, 16)

# These are the questions of each task.
NEED_RECALL = {
    "rare_names": "the rest of a name that the training text has 2 to 15 times, and the context does not have",
    "api_calls": "the attribute of an imported module, a call that the training text has and the context does not",
    "numbers": "the number or date behind a word, a pair of the training text that the context does not have",
}
NEED_NONE = {
    "copied_names": "the rest of a name that the context has and the training text does not",
    "closing_brackets": "the closing bracket at the end of a line",
}


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        context, target: the text to read, and the text that must follow.
    """

    context: str
    target: str


def make_tasks(train: list[str], held_out: list[str], tokenizer: EngramTokenizer, limit: int) -> dict[str, list[Item]]:
    """Return items by task, at most `limit` of each.

    Args:
        train: the texts that models are trained on.
        held_out: texts that items are made of.
        tokenizer: a target begins and ends at a boundary of its tokens.
    """
    known = _Known(train)
    found: dict[str, list[Item]] = {name: [] for name in (*NEED_RECALL, *NEED_NONE)}
    for text in held_out:
        for task, start, end in _places(text, known):
            if start > _CONTEXT // 4:
                found[task].append(Item(text[max(0, start - _CONTEXT) : start], text[start:end]))
    for items in found.values():
        random.Random(0).shuffle(items)
    return {task: _aligned(items, tokenizer, limit, task.endswith("names")) for task, items in found.items()}


class _Known:
    """Counts the names, calls and numbers of the training text."""

    def __init__(self, train: list[str]):
        self.names = Counter(name for text in train for name in _NAME.findall(text))
        self.calls = Counter(call for text in train for call in _CALL.findall(text))
        self.numbers = Counter(pair for text in train for pair in _NUMBER.findall(text))


def _places(text: str, known: _Known) -> Iterator[tuple[str, int, int]]:
    """Yield a task, and where the target begins and ends."""
    for match in _NAME.finditer(text):
        is_copy = match[0] in text[max(0, match.start() - _CONTEXT + 40) : match.start()]
        seen = known.names[match[0]]
        if seen in _SEEN and not is_copy:
            yield "rare_names", *match.span()
        if is_copy and not seen:
            yield "copied_names", *match.span()
    modules = set(_IMPORTED.findall(text))
    for pattern, counts, task in ((_CALL, known.calls, "api_calls"), (_NUMBER, known.numbers, "numbers")):
        for match in pattern.finditer(text):
            is_copy = match[2] in text[max(0, match.start() - _CONTEXT) : match.start()]
            if counts[match.groups()] and not is_copy and (task == "numbers" or match[1] in modules):
                yield task, *match.span(2)
    for match in _CLOSED.finditer(text):
        yield "closing_brackets", *match.span(1)


def _aligned(items: list[Item], tokenizer: EngramTokenizer, limit: int, has_first_token: bool) -> list[Item]:
    """Return items whose context and target give the same tokens alone as together; the first token of a name moves
    into the context.
    """
    chosen: list[Item] = []
    for item in dict.fromkeys(items):
        if has_first_token:
            first = tokenizer.decode(tokenizer(item.target)["input_ids"][:1])
            item = Item(item.context + first, item.target.removeprefix(first))
        context, whole = (tokenizer(text)["input_ids"] for text in (item.context, item.context + item.target))
        is_clean = item.target and item.context == item.context.rstrip()
        if is_clean and len(whole) > len(context) and whole[: len(context)] == context:
            chosen.append(item)
        if len(chosen) == limit:
            break
    return chosen


@torch.no_grad()
def exact_match(model: PreTrainedModel, tokenizer: EngramTokenizer, items: list[Item], batch: int = 32) -> float:
    """Return the share of items whose target a model would write with greedy decoding."""
    right = 0
    pairs = [tuple(tokenizer(text)["input_ids"] for text in (one.context, one.context + one.target)) for one in items]
    pairs.sort(key=lambda pair: len(pair[1]))
    for first in range(0, len(pairs), batch):
        some = pairs[first : first + batch]
        rows = [torch.tensor(whole) for _, whole in some]
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=tokenizer.pad_token_id).to(model.device)
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        mask = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
        best = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits.argmax(-1)
        for row, (context, whole) in enumerate(some):
            span = slice(len(context) - 1, len(whole) - 1)
            right += bool(torch.equal(best[row, span], ids[row, 1:][span]))
    return right / len(items)


_YAML = """\
task: engram_{name}
tag: engram_{tag}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def write_lm_eval_tasks(tasks: dict[str, list[Item]], folder: Path) -> list[str]:
    """Write a YAML file and its items for each task, for lm-eval-harness's `--include_path`; return the tasks' names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, items in tasks.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), encoding="utf-8")
        tag = "recall" if name in NEED_RECALL else "no_recall"
        (folder / f"{name}.yaml").write_text(_YAML.format(name=name, tag=tag, path=json.dumps(str(path.resolve()))))
        names.append(f"engram_{name}")
    return names
