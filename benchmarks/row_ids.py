"""The speed of computing row ids: against a NumPy implementation of the same algorithm, and beside a model's forward.

    python benchmarks/row_ids.py

The script hashes 4 x 2048 compressed ids for two layers (orders 2 and 3, 8 heads each) both ways alternately, checks
that the row ids are equal, and prints the best time of each and their ratio; NumPy uses one thread, torch one and all.
Then it runs a model of the quickstart's size on the same batch, and prints the share of row ids in the time of its
forward.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import Qwen3MoeConfig

from engram_hf import EngramConfig, EngramForCausalLM
from engram_hf.hashing_engram import NO_ID, hash_ngrams

BATCH, LENGTH, VOCAB, PAD = 4, 2048, 4096, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50, help="runs of each measurement (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model is; NumPy is left out on a GPU")
    arguments = parser.parse_args()
    repeats = arguments.repeats
    threads = torch.get_num_threads()
    model = quickstart_sized_model()
    input_ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    for count in sorted({1, threads}) if arguments.device == "cpu" else ():
        torch.set_num_threads(count)
        compare_with_numpy(model, input_ids, repeats, count)
    compare_with_forward(model.to(arguments.device), input_ids.to(arguments.device), repeats)


def quickstart_sized_model() -> EngramForCausalLM:
    """Build four layers of width 192 with 8 experts, two of them active, and memory in layers 1 and 2."""
    backbone = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=192,
        tie_word_embeddings=True,
    )
    config = EngramConfig.for_backbone(
        backbone, layer_ids=[1, 2], rows=80_000, engram_head_dim=16, engram_pad_token_id=PAD
    )
    return EngramForCausalLM(config).eval()


def compare_with_numpy(model: EngramForCausalLM, input_ids: torch.Tensor, repeats: int, threads: int) -> None:
    hashing = model.model.hashing
    ids, multipliers, primes = input_ids.numpy(), hashing.multipliers.numpy(), hashing.primes.tolist()
    contestants = {
        "NumPy": lambda: numpy_row_ids(ids, multipliers, primes),
        "hash_ngrams": lambda: hash_ngrams(input_ids, hashing.multipliers, hashing.primes, PAD),
    }
    if not np.array_equal(contestants["NumPy"](), contestants["hash_ngrams"]().numpy()):
        raise SystemExit("the row ids differ")
    seconds = best_times(contestants, repeats)
    print(f"{BATCH} x {LENGTH} tokens, 2 layers, orders 2 and 3, 8 heads; torch threads: {threads}")
    for name, best in seconds.items():
        print(f"  {name:<12}{best * 1e3:8.2f} ms  {input_ids.numel() / best / 1e6:6.2f}M tokens/s")
    print(f"  ratio       {seconds['NumPy'] / seconds['hash_ngrams']:8.2f} x  (best of {repeats}, interleaved)")


def numpy_row_ids(ids: np.ndarray, multipliers: np.ndarray, primes: list[list[list[int]]]) -> np.ndarray:
    """Compute the definition, vectorized over positions: layer by layer, order by order, head by head."""
    tokens, cut = [], np.zeros(ids.shape, dtype=bool)
    for back in range(multipliers.shape[1]):
        earlier = np.pad(ids, ((0, 0), (back, 0)), constant_values=NO_ID)[:, : ids.shape[1]]
        cut = cut | (earlier == NO_ID)
        tokens.append(np.where(cut, PAD, earlier))
    layers = []
    for factors, orders in zip(multipliers, primes, strict=True):
        mix, offset, heads = tokens[0] * factors[0], 0, []
        for token, factor, sizes in zip(tokens[1:], factors[1:], orders, strict=True):
            mix = mix ^ (token * factor)
            for size in sizes:
                heads.append(mix % size + offset)
                offset += size
        layers.append(np.stack(heads, axis=-1))
    return np.stack(layers)


def compare_with_forward(model: EngramForCausalLM, input_ids: torch.Tensor, repeats: int) -> None:
    with torch.no_grad():
        rows = best_times({"row ids": lambda: model.model.prepare_memory(input_ids)}, repeats)["row ids"]
        whole = best_times({"forward": lambda: model(input_ids, use_cache=False)}, 3)["forward"]
    print(f"a forward of {model.num_parameters() / 1e6:.1f}M parameters takes {whole * 1e3:.0f} ms,")
    print(f"  of which the row ids {rows * 1e3:.2f} ms or {100 * rows / whole:.2f} %")


def best_times(contestants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the shortest of `repeats` alternating runs of each."""
    seconds = dict.fromkeys(contestants, float("inf"))
    for _ in range(repeats):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
