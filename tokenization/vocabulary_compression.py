"""Vocabulary compression: which token ids count as the same token in Engram's n-grams, and the file of this map.

Every token id gets a *key* (its decoded text, normalized by case, accents, width and surrounding spaces); ids with
equal keys share one *compressed id*, and compressed ids number the keys in order of first appearance. The source is
"tokenizer compression" in arXiv 2601.07372 and the `CompressedTokenizer` of its public demo. Every hash multiplier of
a trained table depends on the size of the result, so it must be exact to the last id.

    token map: integers [ids], token id -> compressed id, never larger than the token id itself

All functions take the raw Rust `tokenizers.Tokenizer`: clean-up and special-token handling of the Python classes above
it must not reach the keys.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Regex, Tokenizer, normalizers

UNDECODABLE = "\ufffd"  # Decoding replaces bytes that are not a complete UTF-8 character by this one.
LONE_SPACE = "\ue000"  # It replaces a text of exactly one space while spaces are stripped.
SEPARATOR = "\ue001"  # It is a starter that neither composes, decomposes nor has case: text cannot interact across it.
CHUNK = 512  # A call joins this many texts; a reserved character in one text makes only its chunk slow.

# Rust's `char::is_whitespace` strips these. `str.strip()` alone would also strip U+001C to U+001F.
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
SPACES = re.compile(r"[ \t\r\n]+")

FOLD = [normalizers.NFKC(), normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
FOLDER = normalizers.Sequence(FOLD)
NORMALIZER = normalizers.Sequence(
    [
        *FOLD,
        normalizers.Replace(Regex(SPACES.pattern), " "),
        normalizers.Replace(Regex("^ $"), LONE_SPACE),
        normalizers.Strip(),
        normalizers.Replace(LONE_SPACE, " "),
    ]
)


# This is the class of errors; the package sets its own base class, which a tokenizer that is saved alone does not
# have.
_refusal_class: type[ValueError] = ValueError


def refusal(message: str) -> ValueError:
    """Return the error for wrong input."""
    return _refusal_class(message)


def set_refusal_class(refusal_class: type[ValueError]) -> None:
    """Make [`refusal`] return errors of this class; `engram_hf` calls this when it is imported."""
    global _refusal_class
    _refusal_class = refusal_class


def reference_token_keys(tokenizer: Tokenizer, count: int) -> list[str | None]:
    """Return the keys of ids `0..count-1`, with one call per id: the definition that `token_keys` must equal."""
    keys: list[str | None] = []
    for token_id in range(count):
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        if UNDECODABLE in text:
            keys.append(tokenizer.id_to_token(token_id))
        else:
            keys.append(NORMALIZER.normalize_str(text) or text)
    return keys


def token_keys(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str | None]:
    """Return the keys of ids `0..len(texts)-1` from their decoded `texts` (see `token_texts`), in few calls."""
    normalized = normalize_all(texts)
    return [
        tokenizer.id_to_token(token_id) if UNDECODABLE in text else key or text
        for token_id, (text, key) in enumerate(zip(texts, normalized, strict=True))
    ]


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """Decode every id alone, special tokens included: one text per id, `len(tokenizer)` of them.

    An id without a token decodes to the empty text, as an empty list of ids does. If ids are missing, some token's id
    is at or past the number of tokens; the list then extends to the largest id, so that every id has an entry.
    """
    count = tokenizer.get_vocab_size(with_added_tokens=True)
    texts = _decode_each(tokenizer, range(count))
    nothing = tokenizer.decode([])
    if any(text == nothing and tokenizer.id_to_token(token_id) is None for token_id, text in enumerate(texts)):
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
        texts += _decode_each(tokenizer, range(count, largest + 1))
    return texts


def _decode_each(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    return tokenizer.decode_batch(list(zip(ids)), skip_special_tokens=False)


def normalize_all(texts: Sequence[str]) -> list[str]:
    """Return `NORMALIZER.normalize_str` of every text, without a call for every text.

    ASCII has no other normal form, no accents, and one lower case, so Python's own `lower` is the same. The Rust
    normalizer handles the other texts many at a time.
    """
    ascii_texts = iter([_squeeze(text.lower()) for text in texts if text.isascii()])
    other_texts = iter(_normalize_joined([text for text in texts if not text.isascii()]))
    return [next(ascii_texts if text.isascii() else other_texts) for text in texts]


def _normalize_joined(texts: Sequence[str]) -> list[str]:
    result = []
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        pieces = FOLDER.normalize_str(SEPARATOR.join(chunk)).split(SEPARATOR)
        if len(pieces) != len(chunk) or any(LONE_SPACE in text for text in chunk):
            result += [NORMALIZER.normalize_str(text) for text in chunk]
        else:
            result += map(_squeeze, pieces)
    return result


def _squeeze(text: str) -> str:
    """Apply the steps of `NORMALIZER` after folding. Stripping first leaves few texts for the costly substitution."""
    stripped = text.strip(WHITESPACE)
    if not stripped:
        return " " if SPACES.fullmatch(text) else ""
    return stripped if stripped.isalnum() else SPACES.sub(" ", stripped)


def number_keys(keys: Iterable[str | None], known: np.ndarray) -> np.ndarray:
    """Number `keys` as compressed ids, int64 `[len(keys)]`; the first `len(known)` of them are those of `known`.

    A later key that an earlier id has joins that id's group; a new one gets the next free number. With an empty
    `known` this numbers by first appearance, and numbering in two steps equals numbering in one.
    """
    keys = list(keys)
    result = known.tolist()
    numbers: dict[str | None, int] = {}
    for key, number in zip(keys, result, strict=False):
        numbers.setdefault(key, number)
    free = max(result, default=-1) + 1
    for key in keys[len(result) :]:
        number = numbers.setdefault(key, free)
        free += number == free
        result.append(number)
    return np.asarray(result, dtype=np.int64)


def build_token_map(tokenizer: Tokenizer, known: np.ndarray | None = None) -> np.ndarray:
    """Return the token map of `tokenizer`, int64 `[ids]`, keeping the entries of a map made `known` for its first ids.

    Raises `ValueError` if `known` covers more ids than the tokenizer has.
    """
    known = np.empty(0, dtype=np.int64) if known is None else known
    texts = token_texts(tokenizer)
    if len(known) > len(texts):
        raise refusal(
            f"The token map covers {len(known)} ids but the tokenizer now has {len(texts)}: tokens were taken away; "
            "wrap the smaller tokenizer anew with EngramTokenizer.from_tokenizer."
        )
    return number_keys(token_keys(tokenizer, texts), known)


@dataclass(frozen=True)
class CompressionSummary:
    """The effect of vocabulary compression on a tokenizer; print it.

    `groups` maps compressed ids to the decoded texts of their tokens, the largest groups first.
    """

    token_count: int
    compressed_count: int
    merged_groups: int
    groups: dict[int, tuple[str, ...]]

    @property
    def reduction(self) -> float:
        """The share of the vocabulary that compression saves, 0 to 1."""
        return 1 - self.compressed_count / self.token_count if self.token_count else 0.0

    def __str__(self) -> str:
        head = f"{self.token_count:,} token ids -> {self.compressed_count:,} compressed ids"
        lines = [f"{head} ({self.reduction:.2%} fewer), {self.merged_groups:,} groups of more than one token"]
        for compressed_id, texts in self.groups.items():
            shown = " ".join(map(repr, texts[:8])) + (" ..." if len(texts) > 8 else "")
            lines.append(f"  {compressed_id:>7}: {len(texts)} tokens  {shown}")
        return "\n".join(lines)


def summarize(tokenizer: Tokenizer, token_map: np.ndarray, examples: int) -> CompressionSummary:
    """Return how far `token_map` shrinks the vocabulary of `tokenizer`, and the `examples` largest groups of tokens."""
    sizes = np.bincount(token_map)
    largest = np.argsort(-sizes, kind="stable")[:examples]
    members = {int(group): np.flatnonzero(token_map == group).tolist() for group in largest}
    groups = {group: tuple(_decode_each(tokenizer, ids)) for group, ids in members.items()}
    return CompressionSummary(len(token_map), len(sizes), int((sizes > 1).sum()), groups)


# --- the file ---------------------------------------------------------------------------------------------------------
# One int32 tensor `token_map` [ids] in a safetensors file, and three strings in its header: the version of this layout,
# the SHA-256 of the tensor's little-endian bytes, and the SHA-256 of the vocabulary that the map was made for.

TOKEN_MAP_FILE = "engram_token_map.safetensors"
TENSOR = "token_map"
FORMAT_VERSION = "1"
UNFINISHED = ".unfinished"
SECONDS_TO_WRITE = 60
REMEDY = (
    "put back the tokenizer.json it was saved with, or make a new map by wrapping the tokenizer with "
    "EngramTokenizer.from_tokenizer (tables trained with the old map do not fit a new one)."
)


def write_token_map(path: str | os.PathLike, token_map: np.ndarray, tokenizer: Tokenizer) -> None:
    """Write `token_map` and its digests to `path` atomically (beside its name, then renamed).

    Several processes may write at once: the last one wins. Remains of killed writers are removed.
    """
    path, data = Path(path), token_map_bytes(token_map, tokenizer)
    unfinished = Path(f"{path}.{os.getpid()}-{secrets.token_hex(8)}{UNFINISHED}")
    try:
        _remove_left(path)
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _remove_left(path: Path) -> None:
    """Remove unfinished files of processes that have ended (files of another machine may be live for a minute)."""
    for left in path.parent.glob(f"{glob.escape(path.name)}*{UNFINISHED}"):
        process = re.fullmatch(r"\.(\d+)-[0-9a-f]+", left.name[len(path.name) : -len(UNFINISHED)])
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > SECONDS_TO_WRITE and not (process and _is_alive(int(process[1]))):
                left.unlink()


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # On Windows, `os.kill` would end the process.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def token_map_bytes(token_map: np.ndarray, tokenizer: Tokenizer) -> bytes:
    """Return the whole file. Equal maps of equal tokenizers give equal bytes, so that pushing a tokenizer again
    changes nothing.

    (safetensors' own writer does not: it writes several members of the metadata in another order each time.)
    """
    values = token_map.astype("<i4")
    metadata = {
        "format_version": FORMAT_VERSION,
        "map_sha256": map_digest(values),
        "vocabulary_sha256": vocabulary_digest(tokenizer, len(values)),
    }
    tensor = {"dtype": "I32", "shape": [len(values)], "data_offsets": [0, values.nbytes]}
    header = json.dumps({"__metadata__": metadata, TENSOR: tensor}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # The numbers are aligned.
    return len(header).to_bytes(8, "little") + header + values.tobytes()


def read_token_map(path: str | os.PathLike, tokenizer: Tokenizer, may_be_new: Iterable[str] = ()) -> np.ndarray:
    """Read the map at `path`, int64 `[ids]`, verified to be complete and to belong to `tokenizer`.

    Tokens past the end of the stored map are accepted, and the map is extended over them, only if named in
    `may_be_new`. Raises `ValueError` if the file is damaged, of another version, or belongs to another vocabulary.
    """
    values, metadata = _read_file(path)
    if metadata.get("format_version") != FORMAT_VERSION:
        found = metadata.get("format_version")
        raise refusal(f"{path} has format version {found}, expected {FORMAT_VERSION}: update this code.")
    if values.ndim != 1 or values.dtype != np.int32 or map_digest(values) != metadata.get("map_sha256"):
        raise refusal(f"{path} is damaged (its token map does not have the recorded digest): fetch it again.")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    ids = max(vocabulary.values(), default=-1) + 1
    beyond = {token for token, token_id in vocabulary.items() if token_id >= len(values)}
    if ids < len(values) or not beyond.issubset(may_be_new):
        raise refusal(f"{path} maps {len(values)} token ids but the tokenizer beside it has {ids}: {REMEDY}")
    if vocabulary_digest(tokenizer, len(values)) != metadata.get("vocabulary_sha256"):
        raise refusal(f"{path} belongs to a tokenizer with other tokens under the same ids: {REMEDY}")
    token_map = values.astype(np.int64)
    return build_token_map(tokenizer, token_map) if beyond else token_map


def _read_file(path: str | os.PathLike) -> tuple[np.ndarray, dict[str, str]]:
    try:
        with safe_open(path, framework="np") as file:
            return file.get_tensor(TENSOR), file.metadata() or {}
    except SafetensorError as error:
        raise refusal(f"{path} is not a readable token map ({error}): fetch it again.") from error


def map_digest(values: np.ndarray) -> str:
    """Return the SHA-256 of a token map as little-endian int32, in hex."""
    return hashlib.sha256(values.astype("<i4").tobytes()).hexdigest()


def vocabulary_digest(tokenizer: Tokenizer, count: int) -> str:
    """Return the SHA-256 over the vocabulary strings of ids `0..count-1` (null for an id without a token), in hex."""
    tokens = [tokenizer.id_to_token(token_id) for token_id in range(count)]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
