"""Mutated files: each is refused with a sentence, or has the meaning that an independent reader finds.

    python tests/faults/fuzzing.py --count 100000 [--seed N] [--only KIND]

A file depends on the seed and its number alone, so `--seed N --first I --count 1` repeats one failure. Files are tried
in forked processes: a crash, or a file that takes more than ten seconds, is a failure, too. The script prints a line
of figures for each kind of file, and ends with 1 if there was a failure.
"""

import argparse
import contextlib
import faulthandler
import json
import multiprocessing
import os
import random
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from engram_cli.main import main as engram
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from transformers import LlamaConfig, PreTrainedConfig
from trial_models import load, make_tokenizer, save_folders, write_facts

import engram_hf
from engram_hf import EngramConfig, EngramTokenizer
from engram_hf.convert_scripts.streaming import read_manifest
from engram_hf.row_sources_engram import MappedRows
from engram_hf.safetensors_engram import read_header, read_weight_map
from engram_hf.saving_engram import manifest_entry, write_manifest
from engram_hf.table_format_engram import file_description, read_tables, require_same_hash
from engram_hf.table_writer_engram import quantize_table
from engram_hf.tokenization.vocabulary_compression import read_token_map

SECONDS = 10
CHUNK = 250
# A damaged file may be refused with these (the last, by transformers' own checks of a config). Anything else is a
# fault.
REFUSALS = (ValueError, OSError, StrictDataclassError)
WORDS = [
    "0",
    "-1",
    "1e9",
    "NaN",
    "null",
    "true",
    "[]",
    "{}",
    '""',
    "9223372036854775808",
    '"../x"',
    '"\\ud800"',
    "0.5",
]


class Wrong(AssertionError):
    """A file was accepted with another meaning."""


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Make one to four changes of bytes, or of a value, a name or a line of JSON."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        data = draw.choice((_change_byte, _change_byte, _cut, _repeat, _swap, _change_number, _change_value))(
            data, draw
        )
    return data


def _change_byte(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) or 1)
    return data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]


def _cut(data: bytes, draw: random.Random) -> bytes:
    first = draw.randrange(len(data) or 1)
    return data[:first] + data[first + draw.choice((1, 2, 8, 64, len(data))) :]


def _repeat(data: bytes, draw: random.Random) -> bytes:
    first = draw.randrange(len(data) or 1)
    return data[:first] + data[first : first + draw.choice((1, 8, 100))] * draw.choice((2, 3, 50)) + data[first:]


def _swap(data: bytes, draw: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    if len(lines) > 1:
        draw.shuffle(pair := [draw.randrange(len(lines)) for _ in range(2)])
        lines[pair[0]], lines[pair[1]] = lines[pair[1]], lines[pair[0]]
    return b"".join(lines)


def _change_number(data: bytes, draw: random.Random) -> bytes:
    found = list(re.finditer(rb"\d+", data))
    if not found:
        return data
    one = draw.choice(found)
    number = int(one[0][:18])
    new = draw.choice((number + 1, number - 1, number * 2, -number, 0, 1 << 31, 1 << 62, 1 << 63, 10**12, 10**40))
    return data[: one.start()] + str(new).encode() + data[one.end() :]


def _change_value(data: bytes, draw: random.Random) -> bytes:
    found = list(re.finditer(rb'(?<=: )("[^"]*"|[^,{}\[\]\s]+)|"[^"]*"', data))
    if not found:
        return data
    one = draw.choice(found)
    return data[: one.start()] + draw.choice(WORDS).encode() + data[one.end() :]


class Kinds:
    """A reader of every kind of file, each with its own folder for the mutated file.

    Args:
        home: an empty folder.
    """

    NAMES = (
        "header",
        "packed header",
        "manifest",
        "token map",
        "config",
        "index",
        "tokenizer",
        "conversion",
        "adapter config",
        "adapter weights",
    )

    def __init__(self, home: Path):
        folders = save_folders(home / "models")
        self.model_folder = folders["old files"]
        self.model = load(folders["old plain"])
        self.hasher = self.model.model.hashing
        self._pack_tables()
        self.tokenizer = make_tokenizer()
        self.tables = {layer: self._meaning(table) for layer, table in read_tables(self.model_folder).items()}
        self.home = home
        self.kinds: dict[str, tuple[str, int, Callable[[Path, bytes], None]]] = {
            # Each name has its file, how many of its bytes are mutated (the rest are rows, which nothing describes),
            # and the reader.
            "header": ("engram-layer-00001.safetensors", 4096, self.check_tables),
            "packed header": ("engram-layer-00002.safetensors", 4096, self.check_tables),
            "manifest": ("engram_tables.json", 1 << 30, self.check_tables),
            "token map": ("engram_token_map.safetensors", 1 << 30, self.check_token_map),
            "config": ("config.json", 1 << 30, self.check_config),
            "index": ("model.safetensors.index.json", 1 << 30, self.check_index),
            "tokenizer": ("tokenizer.json", 1 << 30, self.check_tokenizer),
            "conversion": ("conversion_manifest.json", 1 << 30, self.check_conversion),
            "adapter config": ("adapter/adapter_config.json", 1 << 30, self.check_adapter),
        }
        self._write_others(folders["old plain"])
        self.adapter = self._meaning_of_adapter(self.model_folder / "adapter")
        weights = self.model_folder / "adapter" / "adapter_model.safetensors"
        # The differences stand at the end of the file, and nothing describes them.
        described = weights.stat().st_size - sum(data.nbytes for name, data in self.adapter.items() if "delta" in name)
        self.kinds["adapter weights"] = ("adapter/adapter_model.safetensors", described, self.check_adapter)
        self.originals = {kind: (self.model_folder / file).read_bytes() for kind, (file, _, _) in self.kinds.items()}
        self._folder: Path | None = None

    def _pack_tables(self) -> None:
        """Write rows of two bits, whose number per byte only the description gives, and rows of 4-bit floats."""
        entries, tables = {}, read_tables(self.model_folder)
        for (layer, table), dtype in zip(tables.items(), ("int2", "nvfp4"), strict=True):
            path = table.parts[0].file.path
            quantize_table(MappedRows(table), path, file_description(table.parts[0].file), dtype)
            described = file_description(read_header(path))
            entries[layer] = manifest_entry([(path.name, described.rows, described.tensors)])
        write_manifest(self.model_folder, entries)

    def _write_others(self, model: Path) -> None:
        files = {f"layers.{index}.weight": f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)}
        index = {"metadata": {"total_size": 96}, "weight_map": files}
        (self.model_folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        records = {name: {"size": 32, "crc32": "0badf00d"} for name in files.values()}
        manifest = {"format_version": 1, "fingerprint": "ab" * 32, "options": {"dtype": "keep"}, "files": records}
        (self.model_folder / "conversion_manifest.json").write_text(json.dumps(manifest, indent=2))
        write_facts(model, self.model_folder / "adapter", "w5")
        config = self.model_folder / "adapter" / "adapter_config.json"
        config.write_text(config.read_text().replace(str(model), "model"))  # The text is the same in every run.

    def make(self, kind: str, draw: random.Random) -> bytes:
        """Return a mutated file."""
        data, (_, count, _) = self.originals[kind], self.kinds[kind]
        return mutate(data[:count], draw) + data[count:]

    def check(self, kind: str, data: bytes) -> str:
        """Read a file; return `"refused"` or `"accepted"`.

        Raises:
            Wrong: it was accepted with another meaning.
            Exception: it was refused with an error that is not meant for damaged files.
        """
        if self._folder is None:  # Each forked process has its own.
            self._folder = self.home / f"of {os.getpid()}"
            shutil.copytree(self.model_folder, self._folder)
        file, _, read = self.kinds[kind]
        path = self._folder / file
        path.write_bytes(data)
        try:
            read(path, data)
        except Wrong:
            raise
        except REFUSALS as error:
            if not str(error):
                raise Wrong("It was refused without a word.") from error
            return "refused"
        finally:
            path.write_bytes(self.originals[kind])
        return "accepted"

    def _meaning(self, table) -> tuple:
        """Return everything that reading a table depends on, and its rows."""
        d = table.description
        said = (d.layer, d.num_rows, d.width, d.dtype, d.primes, d.offsets, d.multipliers, d.pad_id, d.vocab_size)
        source = MappedRows(table)
        rows = [rows for rows in (*source.read(0, table.num_rows), source.global_scale) if rows is not None]
        return (*said, *(some.contiguous().view(torch.uint8).numpy().tobytes() for some in rows))

    def check_tables(self, path: Path, data: bytes) -> None:
        """Check a model's tables: their hash is the model's, and the rows are those that were written."""
        for index, (layer, table) in enumerate(read_tables(path.parent).items()):
            if table.description is None:
                raise ValueError("without a description, only a model's own word says what is in it")
            require_same_hash(table.description, self.hasher, index)
            if self._meaning(table) != self.tables.get(layer):
                raise Wrong(f"The table of layer {layer} was read as another one.")

    def _meaning_of_adapter(self, folder: Path) -> dict[str, torch.Tensor]:
        """Return the rows of an adapter, and their differences, once it is on a model."""
        try:
            state = PeftModel.from_pretrained(self.model, str(folder)).state_dict()
            return {name: value.clone() for name, value in state.items() if "engram_rows_adapter" in name}
        finally:
            for memory in self.model.model.memories().values():  # It is removed even if it was refused half loaded.
                memory.table = getattr(memory.table, "base_layer", memory.table)

    def check_adapter(self, path: Path, data: bytes) -> None:
        """Check that rows and differences are those that were written; `engram facts list` ends with a sentence."""
        if engram(["facts", "list", str(path.parent)]) not in (0, 1):
            raise Wrong("The list of facts did not end well.")
        try:
            found = self._meaning_of_adapter(path.parent)
        except REFUSALS:
            raise
        except Exception as error:
            if _passes_through_our_code(error):
                raise
            raise ValueError(f"by PEFT: {type(error).__name__} {error}") from error
        same = found.keys() == self.adapter.keys() and all(
            torch.equal(value, self.adapter[name]) for name, value in found.items()
        )
        if not same:
            raise Wrong("Other rows or differences were loaded.")

    def check_token_map(self, path: Path, data: bytes) -> None:
        """Check a token map: its digests leave no other map."""
        if read_token_map(path, self.tokenizer._tokenizer).tolist() != self.tokenizer.token_map.tolist():
            raise Wrong("Another map was read.")

    def check_config(self, path: Path, data: bytes) -> None:
        """Check that each of our fields in the file has its value in the config."""
        try:
            config = EngramConfig.from_pretrained(path.parent)
        except REFUSALS:
            raise
        except Exception as error:
            if type(error) is not _error_of_transformers(path):
                raise
            raise ValueError(f"by transformers: {error}") from error
        given, kept = json.loads(data), config.to_dict()
        kept.pop("engram_hf_version")  # of the code that saves, as `transformers_version` is
        for name in given:
            if name.startswith("engram_") and name in kept and given[name] is not None and kept[name] != given[name]:
                raise Wrong(f"{name} is {given[name]!r} in the file, but {kept[name]!r} in the config.")

    def check_index(self, path: Path, data: bytes) -> None:
        """Check that the files of an index lie in the folder."""
        found = read_weight_map(path)
        if found != json.loads(data)["weight_map"]:
            raise Wrong("Other files were read.")
        for file in found.values():
            if Path(path.parent, file).resolve().parent != path.parent.resolve():
                raise Wrong(f"{file!r} leaves the folder.")

    def check_conversion(self, path: Path, data: bytes) -> None:
        """Check that the files of a conversion lie below the folder."""
        for name in read_manifest(path.parent)["files"]:
            if not Path(path.parent, name).resolve().is_relative_to(path.parent.resolve()):
                raise Wrong(f"{name!r} leaves the folder.")

    def check_tokenizer(self, path: Path, data: bytes) -> None:
        """Check that ids which tables were trained on keep their tokens and their compressed ids."""
        try:
            found = EngramTokenizer.from_pretrained(path.parent)
        except REFUSALS:
            raise
        except Exception as error:
            # `tokenizers` refuses a file with a bare Exception, and PyO3 turns a panic of Rust into another.
            raise ValueError(str(error) or type(error).__name__) from error
        count = len(self.tokenizer)
        if found.token_map[:count].tolist() != self.tokenizer.token_map.tolist():
            raise Wrong("The compressed ids changed.")
        if found.convert_ids_to_tokens(range(count)) != self.tokenizer.convert_ids_to_tokens(range(count)):
            raise Wrong("The tokens changed.")


def _error_of_transformers(path: Path) -> type[Exception] | None:
    """Return the error that a config without memory with the same fields is refused with."""
    try:
        PreTrainedConfig.from_pretrained(path.parent)
        LlamaConfig(**json.loads(path.read_bytes())["text_config"])
    except Exception as error:
        return type(error)
    return None


def _passes_through_our_code(error: Exception) -> bool:
    """Return whether an error was raised below a function of the package; otherwise another library refused the file
    itself.
    """
    package = Path(engram_hf.__file__).resolve().parent
    files = [Path(frame.filename).resolve() for frame in traceback.extract_tb(error.__traceback__)]
    elsewhere = {"tests", "site-packages"}  # A virtual environment may lie in the checkout.
    return any(file.is_relative_to(package) and not elsewhere & set(file.parts) for file in files)


def try_files(kinds: Kinds, seed: int, numbers: range, only: str | None) -> tuple[Counter, list[str]]:
    """Try the files of these numbers; return outcomes by kind, and failures."""
    names, seen, failures = [only] if only else list(kinds.kinds), Counter(), []
    for number in numbers:
        draw = random.Random(f"{seed} {number}")
        kind = names[number % len(names)]
        data = kinds.make(kind, draw)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            outcome = kinds.check(kind, data)
        except Exception as error:
            outcome = "failed"
            failures.append(f"{kind}, --seed {seed} --first {number}: {type(error).__name__}: {str(error)[:200]}")
        faulthandler.cancel_dump_traceback_later()
        seen[kind, outcome] += 1
    return seen, failures


def try_apart(kinds: Kinds, seed: int, numbers: range, only: str | None) -> tuple[Counter, list[str]]:
    """Do as `try_files` in a separate process, whose crash is a failure."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def run() -> None:
        faulthandler.disable()  # pytest enables it, but here the parent reports a crash.
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            theirs.send(try_files(kinds, seed, numbers, only))

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        if len(numbers) == 1:
            reason = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit {process.exitcode}"
            return Counter({("any", "failed"): 1}), [
                f"--seed {seed} --first {numbers[0]}: ended by {reason} or took too long"
            ]
        half = len(numbers) // 2
        first, second = (try_apart(kinds, seed, part, only) for part in (numbers[:half], numbers[half:]))
        return first[0] + second[0], first[1] + second[1]
    finally:
        process.join()
        shutil.rmtree(kinds.home / f"of {process.pid}", ignore_errors=True)


def main() -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="files")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--only", help="one kind of file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    seen, failures, begin = Counter(), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        kinds = Kinds(Path(home))
        stop = given.first + given.count
        for first in range(given.first, stop, CHUNK):
            found, failed = try_apart(kinds, given.seed, range(first, min(first + CHUNK, stop)), given.only)
            seen += found
            failures += failed
            for line in failed:
                print(f"FAILED {line}", flush=True)
    for kind in sorted({kind for kind, _ in seen}):
        figures = ", ".join(f"{seen[kind, outcome]} {outcome}" for outcome in ("refused", "accepted", "failed"))
        print(f"fuzz: {kind}: {figures}")
    seconds = time.perf_counter() - begin
    print(f"fuzz: seed {given.seed}, {seen.total()} files, {len(failures)} failures, {seconds:.0f} s")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
