"""The cost of the DeepSeek-V4.1 backbone's attention as the context grows.

    python benchmarks/deepseek_v41_attention.py

The script prefills a small model whose window, selection and candidate sizes are a quarter of the release's, at 1k to
8k tokens. It prints the seconds of the attention modules without and with the index scores, and the peak of resident
memory during the prefill; then the milliseconds of one decoding step behind such a context. The last column compares
with the shortest context: 1.00 per token is linear growth. The bytes printed beside the peak are those of a `[heads,
tokens, tokens]` matrix.

Scoring is quadratic by design (a KV source's queries are scored against all compressed positions, in narrow heads);
from the candidate source on it is linear.
"""

import argparse
import ctypes
import re
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import DynamicCache

from engram_hf.configuration_deepseek_v41 import DeepseekV41TextConfig
from engram_hf.modeling_deepseek_v41 import DeepseekV41TextModel

LENGTHS = (1024, 2048, 4096, 8192)


def small_config() -> DeepseekV41TextConfig:
    """Return a config with every kind of layer: window only, both ratios, a reused selection, a candidate source and
    its successor.
    """
    return DeepseekV41TextConfig(
        vocab_size=1024, hidden_size=256, moe_intermediate_size=128, num_hidden_layers=6, num_attention_heads=8,
        head_dim=64, qk_rope_head_dim=32, q_lora_rank=128, o_lora_rank=64, o_groups=2, sliding_window=32,
        compress_ratios=[0, 2, 2, 1, 1, 1], kv_source_layer_ids=[1, 3], index_source_layer_ids=[1, 3, 5],
        index_n_heads=4, index_head_dim=32, index_topk=128, candidate_source_layer_id=3, candidate_topk_blocks=64,
        candidate_block_size=8, n_routed_experts=8, num_experts_per_tok=2,
    )  # fmt: skip


def resident(field: str) -> int:
    """Return `VmRSS` (now) or `VmHWM` (peak) of this process in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def reset_peak() -> int:
    """Free memory, reset the peak, and return the resident bytes."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


@contextmanager
def timed(modules, seconds: list[float]):
    """Append the seconds of each forward of `modules`."""
    started = []
    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())))
        hooks.append(module.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - started.pop())))
    yield
    for hook in hooks:
        hook.remove()


def prefill(model: DeepseekV41TextModel, length: int) -> dict[str, float]:
    """Return the seconds of attention and of index scoring, and the peak bytes, of one forward over `length` tokens."""
    ids = torch.randint(0, model.config.vocab_size, (1, length))
    attention, scoring = [], []
    before = reset_peak()
    indexers = [layer.self_attn.indexer for layer in model.layers if layer.self_attn.indexer is not None]
    with timed([layer.self_attn for layer in model.layers], attention), timed(indexers, scoring):
        model(ids, use_cache=False)
    return {
        "attention": sum(attention) - sum(scoring),
        "scoring": sum(scoring),
        "peak": resident("VmHWM") - before,
    }


def decode(model: DeepseekV41TextModel, length: int, steps: int) -> float:
    """Return the median seconds of one decoding step behind `length` tokens."""
    cache = DynamicCache(config=model.config)
    model(torch.randint(0, model.config.vocab_size, (1, length)), past_key_values=cache)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        model(torch.randint(0, model.config.vocab_size, (1, 1)), past_key_values=cache)
        seconds.append(time.perf_counter() - start)
    return torch.tensor(seconds).median().item()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="decoding steps for each context")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = DeepseekV41TextModel(small_config()).eval()
    prefill(model, LENGTHS[0])  # This warms up.
    print("prefill: seconds and peak memory; growth per token against the shortest context")
    first = None
    for length in LENGTHS:
        cost = prefill(model, length)
        first = first or cost
        growth = {key: cost[key] / first[key] / (length / LENGTHS[0]) for key in cost}
        matrix = model.config.num_attention_heads * length**2 * 4
        print(
            f"{length:6} tokens: attention {cost['attention']:6.2f} s ({growth['attention']:.2f}x)  "
            f"index scores {cost['scoring']:6.2f} s ({growth['scoring']:.2f}x)  "
            f"peak {cost['peak'] / 2**20:6.0f} MB ({growth['peak']:.2f}x; one score matrix: {matrix / 2**20:.0f} MB)"
        )
    print("decoding: milliseconds for one token; growth against the shortest context")
    first = None
    for length in LENGTHS:
        seconds = decode(model, length, arguments.steps)
        first = first or seconds
        print(f"{length:6} tokens: {seconds * 1e3:6.2f} ms ({seconds / first:.2f}x)")


if __name__ == "__main__":
    main()
