"""The texts: Python sources and prose of the installed packages, split by file, with a tokenizer of the training part.

Shape letters: N windows or blocks, S positions.
"""

import hashlib
import importlib.metadata
import json
import random
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file, save_file

from engram_hf import EngramError, EngramTokenizer
from engram_hf.analysis import Windows, cut_windows
from engram_hf.analysis.frequency import ngrams
from engram_hf.training.memory import find_engram

from .presets import Preset

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from stdlib_text import END_OF_TEXT, SKIPPED, train_tokenizer

# One file in 20, by a checksum of its name, is for the test, and one for choosing learning rates.
_PARTS = 20
_TEST, _VALIDATION = 0, 1
FREQUENCIES = ("never", "1 to 3", "4 to 15", "16 to 63", "64 and more")
_FIRST_OF_CLASS = (1, 4, 16, 64)


def installed_texts() -> Iterator[tuple[str, str]]:
    """Yield names and texts: sources of the standard library, its language reference, and the documentation of the
    packages that `make evidence` installs.

    Other installed packages are left out, and so is this one, whose README changes; with the same Python and the pinned
    versions, the texts are then the same everywhere.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not SKIPPED.intersection(name.parts) and not name.name.startswith("_sysconfigdata"):
            yield f"python/{name.as_posix()}", path.read_text(encoding="utf-8", errors="replace")
    from pydoc_data.topics import topics

    yield from ((f"topics/{name}", text) for name, text in sorted(topics.items()))
    needed = _required("engram-hf", {"test", "examples"}) - {"engram-hf"}
    described = ((name, importlib.metadata.metadata(name).get_payload()) for name in sorted(needed))
    yield from ((f"packages/{name}", text) for name, text in described if isinstance(text, str))


def _required(package: str, extras: set[str]) -> set[str]:
    """Return the names of a package and of all installed packages that it requires, directly or not."""
    found: set[str] = set()
    waiting = [(package, extra) for extra in ("", *extras)]
    for name, extra in waiting:  # The list grows while it is read.
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise EngramError(
                f"The documentation of {name} is part of the texts, but it is not installed; install engram-hf with the extras test "
                "and examples, as `make evidence` does, or name a folder of texts with --texts."
            ) from None
        for line in lines:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                one = canonicalize_name(requirement.name)
                new = [(one, more) for more in ("", *requirement.extras)]
                waiting += [pair for pair in new if pair not in waiting]
        found.add(name)
    return found


def texts_of_folder(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield names and texts of a folder's files, without those that are not UTF-8."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            try:
                yield path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def split(texts: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the texts of the parts train, validation and test, without duplicates.

    Raises:
        ValueError: a part is empty.
    """
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for name, text in texts:
        if len(text) < 200 or text in seen:
            continue
        seen.add(text)
        number = zlib.crc32(name.encode()) % _PARTS
        parts["test" if number == _TEST else "validation" if number == _VALIDATION else "train"].append(text)
    empty = [name for name, some in parts.items() if not some]
    if empty:
        raise EngramError(
            f"Too few texts: none fell into {', '.join(empty)}; every twentieth file goes to the test and to the validation, so "
            "name a folder with more files, or use a Python that has its sources."
        )
    return parts


def _installed_parts(path: Path) -> dict[str, list[str]]:
    """Return the split of the installed texts; it is stored in a file, since packages may be updated between runs."""
    if not path.exists():
        parts = split(installed_texts())
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(parts), encoding="utf-8")
        beside.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(eq=False)
class Corpus:
    """Texts and their tokens.

    Args:
        preset: the sizes.
        folder: a folder that stores frequencies.
        tokenizer: trained on the training part.
        parts: texts by part.
        tokens: those of the training part, int64 `[N, block]`.
        digest: a digest of all texts and of the tokenizer.
    """

    preset: Preset
    folder: Path
    tokenizer: EngramTokenizer
    parts: dict[str, list[str]]
    tokens: torch.Tensor
    digest: str

    def train_blocks(self, seed: int, count: int) -> torch.Tensor:
        """Return blocks `[count, block]` in an order drawn from the seed; each pass over the text has another order."""
        generator = torch.Generator().manual_seed(seed)
        passes = -(-count // len(self.tokens))
        order = torch.cat([torch.randperm(len(self.tokens), generator=generator) for _ in range(passes)])
        return self.tokens[order[:count]]

    @cached_property
    def test(self) -> Windows:
        """Return the windows for measuring losses."""
        return self._windows("test", self.preset.test_windows)

    @cached_property
    def validation(self) -> Windows:
        """Return the windows for choosing learning rates."""
        return self._windows("validation", self.preset.test_windows // 2)

    def _windows(self, part: str, count: int) -> Windows:
        windows = cut_windows(self.parts[part], self.tokenizer, length=self.preset.block)
        chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:count]
        return Windows(windows.input_ids[chosen], windows.valid[chosen], windows.classes[chosen])

    def frequencies(self, model, seed: int, count: int) -> torch.Tensor:
        """Return how often the n-gram before each tested token was in a run's blocks, as an index in `FREQUENCIES`
        `[N, S - 1]`.

        Args:
            model: a model with memory, whose largest order and compressed ids are used.
            seed, count: those of the run.
        """
        path = self.folder / f"frequencies-{seed}-{count}.safetensors"
        if not path.exists():
            read, test = self.train_blocks(seed, count), self.test
            ids = torch.cat(
                [read, torch.nn.functional.pad(test.input_ids, (0, read.shape[1] - test.input_ids.shape[1]))]
            )
            valid = torch.nn.functional.pad(test.valid, (0, read.shape[1] - test.valid.shape[1]))
            valid = torch.cat([torch.ones_like(read, dtype=torch.bool), valid])
            engram = find_engram(model)
            numbers, _ = ngrams(engram, Windows(ids, valid, torch.zeros_like(ids)), engram.hashing.max_ngram)
            before = numbers[: len(read)]
            counts = torch.zeros(int(numbers.max()) + 1, dtype=torch.int64)
            counts.index_add_(0, before[before >= 0], torch.ones_like(before[before >= 0]))
            tested = numbers[len(read) :, : test.input_ids.shape[1] - 1]
            classes = torch.bucketize(counts[tested.clamp_min(0)], torch.tensor(_FIRST_OF_CLASS), right=True)
            write_tensors(path, {"classes": classes.where(tested >= 0, -1)})
        return load_file(path)["classes"]


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file beside its name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
    beside.replace(path)


def load_corpus(preset: Preset, work: Path, texts: Path | None = None) -> Corpus:
    """Read, split and tokenize the texts; all results are stored in `work` and made once.

    Args:
        preset: the sizes.
        work: a folder for files that can be made again.
        texts: a folder of text files; None for those of the installed packages, as they were when `work` was made.

    Raises:
        ValueError: there are too few texts.
    """
    parts = _installed_parts(work / "texts.json") if texts is None else split(texts_of_folder(texts))
    random.Random(0).shuffle(parts["train"])
    parts["train"] = parts["train"][: preset.train_files]
    told = json.dumps([parts, preset.vocab_size, preset.block]).encode()
    digest = hashlib.sha256(told).hexdigest()[:16]
    folder = work / f"corpus-{digest}"
    if not (folder / "tokens.safetensors").exists():
        tokenizer = train_tokenizer(parts["train"], preset.vocab_size)
        tokenizer.save_pretrained(folder)
        encoded = tokenizer([text + END_OF_TEXT for text in parts["train"]])["input_ids"]
        tokens = torch.cat([torch.tensor(ids) for ids in encoded])
        blocks = tokens[: len(tokens) // preset.block * preset.block].view(-1, preset.block)
        write_tensors(folder / "tokens.safetensors", {"tokens": blocks})
    tokenizer = EngramTokenizer.from_pretrained(folder)
    return Corpus(preset, folder, tokenizer, parts, load_file(folder / "tokens.safetensors")["tokens"], digest)
