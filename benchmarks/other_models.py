"""A tiny Qwen4-Exp with a table of a gigabyte, stock and with the table in its files.

    python benchmarks/other_models.py

The script prints the time of a load, its anonymous memory and that of the same model with a table of a few rows, and
the time of decoding, as ratios of alternating runs. The files are in the page cache; every load has a separate forked
process.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from engram_hf import load_with_tables

IDS = torch.randint(3, 1000, (1, 48), generator=torch.Generator().manual_seed(1))


def make_folder(folder: Path, rows_per_head: int) -> None:
    """Save a model of two million parameters with a table of 16 heads with `rows_per_head` rows of 160 channels each."""
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 1000,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    linear = {"head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    experts = {
        "linear_value_head_dim": 16,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 8,
    }
    table = {
        "ple_layer_ids": [2],
        "ple_embed_dim": 2560,
        "ngram_vocab_size_base": rows_per_head,
        "split_ngram_parts": 128,
    }
    indexer = {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    }
    rest = {"num_experts_per_tok": 2, "hc_lowrank": 16, "eos_token_id": 2, "pad_token_id": 0}
    config = Qwen4ExpTextConfig(**sizes, **linear, **experts, **table, **indexer, **rest)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300MB")


def load(kind: str, folder: Path) -> torch.nn.Module:
    if kind == "stock":
        return AutoModelForCausalLM.from_pretrained(folder)
    return load_with_tables(AutoModelForCausalLM, str(folder))


def anonymous_megabytes() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


def measure_load(kind: str, folder: Path, results) -> None:
    """Return the seconds of a load in a separate process, and its final and peak anonymous memory above the imports in
    MB.
    """
    start_memory, done, peak = anonymous_megabytes(), threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_megabytes() - start_memory)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, work = time.perf_counter(), time.process_time()
    model = load(kind, folder)
    seconds, work = time.perf_counter() - start, time.process_time() - work
    done.set()
    watcher.join()
    held = anonymous_megabytes() - start_memory
    with torch.no_grad():
        sum_of_logits = model(IDS).logits.double().sum().item()
    used = anonymous_megabytes() - start_memory
    results.put({"seconds": seconds, "work": work, "held": held, "peak": peak[0], "used": used, "sum": sum_of_logits})


def loading(folder: Path, small: Path, repeats: int) -> None:
    cases = {"stock": ("stock", folder), "mapped": ("mapped", folder), "without": ("stock", small)}
    found: dict[str, list[dict]] = {case: [] for case in cases}
    torch.set_num_threads(1)  # A forked process does not have the threads of its parent.
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    for turn in range(repeats + 1):
        for case, (kind, path) in cases.items():
            process = context.Process(target=measure_load, args=(kind, path, results))
            process.start()
            measured = results.get()
            process.join()
            if turn:  # The first run fills the page cache.
                found[case].append(measured)
    assert {some["sum"] for some in found["stock"]} == {some["sum"] for some in found["mapped"]}
    middle = {
        case: {
            name: statistics.median(some[name] for some in runs)
            for name in ("seconds", "work", "held", "peak", "used")
        }
        for case, runs in found.items()
    }
    for case, name in (("stock", "stock"), ("mapped", "mapped"), ("without", "stock, a table of a few rows")):
        some = middle[case]
        print(
            f"loading, {name:30} {some['seconds']:6.2f} s, of the processor {some['work']:.2f} s   anonymous {some['held']:7.1f} MB, at most {some['peak']:7.1f} MB, "
            f"{some['used']:7.1f} MB after a forward"
        )
    print(
        f"loading, mapped against stock: {middle['mapped']['seconds'] / middle['stock']['seconds']:.2f}x the time, "
        f"{middle['mapped']['work'] / middle['stock']['work']:.2f}x the time of the processor"
    )
    print(
        f"anonymous memory, mapped against a table of a few rows: {middle['mapped']['held'] / middle['without']['held']:.2f}x"
    )


@torch.no_grad()
def decoding(folder: Path, tokens: int, repeats: int) -> None:
    models = {kind: load(kind, folder) for kind in ("stock", "mapped")}
    logits = {kind: model(IDS).logits for kind, model in models.items()}
    assert torch.equal(logits["stock"], logits["mapped"])
    times: dict[str, list[float]] = {kind: [] for kind in models}
    texts = {}
    for turn in range(repeats + 1):
        for kind, model in sorted(models.items(), reverse=turn % 2 == 0):
            start = time.process_time()
            texts[kind] = model.generate(IDS, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            if turn:
                times[kind].append(time.process_time() - start)
    assert torch.equal(texts["stock"], texts["mapped"])
    print(
        f"decoding {tokens} tokens, mapped against stock: {min(times['mapped']) / min(times['stock']):.3f}x the time of the processor"
    )
    print("logits and tokens: bit-identical")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000, help="rows of each of the 16 heads (320 bytes each)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that are decoded (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs (default: %(default)s)")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder, small = Path(temporary) / "large", Path(temporary) / "small"
        make_folder(folder, options.rows)
        make_folder(small, 50)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(
            f"Qwen4-Exp with a table of {16 * options.rows:,} rows x 160 bfloat16 in 128 shards, {size / 1e9:.2f} GB of files"
        )
        loading(folder, small, options.repeats)
        decoding(folder, options.tokens, options.repeats)


if __name__ == "__main__":
    main()
