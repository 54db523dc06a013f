"""The cost of two layers of memory in a small Mixtral: prefill and decoding, against its bare backbone.

    python benchmarks/memory_cost.py

Both models run alternately in one process, with the same weights outside the memory. The script prints the medians,
and the median ratio of the pairs of runs, which varies less than the times.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, DynamicCache, MixtralConfig

from engram_hf import EngramForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--variant", default="paper", choices=("paper", "v4.1"), help="form of the memory (default: %(default)s)"
    )
    parser.add_argument("--rows", type=int, default=200_000, help="rows of each of the two tables")
    parser.add_argument("--head-dim", type=int, default=64, help="channels of a row (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="prompt tokens of each row")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens that are decoded (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="pairs of runs (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where both models are; bfloat16 on a GPU")
    arguments = parser.parse_args()

    bare, engram = build_models(arguments)
    active = 8 * (4 * 512**2 + 2 * 3 * 512 * 1792)
    print(f"Mixtral, hidden 512, 8 layers, {active / 1e6:.0f}M active parameters, {torch.get_num_threads()} threads")
    print(f"memory in layers 1 and 4, {arguments.variant}, {arguments.rows:,} rows of {arguments.head_dim} each")
    prompt = torch.randint(
        3, bare.config.vocab_size, (arguments.batch, max(arguments.length, 64 + arguments.new_tokens))
    )
    prompt = prompt.to(arguments.device)
    with torch.inference_mode():
        compare(
            "prefill",
            f"{arguments.batch} x {arguments.length}",
            prefill,
            bare,
            engram,
            prompt[:, : arguments.length],
            arguments.repeats,
        )
        work = f"{arguments.new_tokens} tokens after 64"
        tokens = prompt[:1, : 64 + arguments.new_tokens]
        compare("decoding", work, decode, bare, engram, tokens, arguments.repeats)


def build_models(arguments: argparse.Namespace) -> tuple[torch.nn.Module, torch.nn.Module]:
    config = MixtralConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    bare = AutoModelForCausalLM.from_config(config).eval()
    host = AutoModelForCausalLM.from_config(config).eval()
    host.load_state_dict(bare.state_dict())
    engram = EngramForCausalLM.from_backbone(
        host,
        layer_ids=[1, 4],
        variant=arguments.variant,
        rows=arguments.rows,
        engram_head_dim=arguments.head_dim,
        engram_pad_token_id=0,
    )
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    return bare.to(arguments.device, dtype), engram.to(arguments.device, dtype)


def now() -> float:
    """Return the time after all work of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def prefill(model: torch.nn.Module, prompt: torch.Tensor) -> None:
    model(prompt, use_cache=True, logits_to_keep=1)


def decode(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Feed `tokens` `[1, 64 + N]` one by one after the first 64; return the seconds of the N steps."""
    cache = DynamicCache(config=model.config)
    model(tokens[:, :64], past_key_values=cache, logits_to_keep=1)
    start = now()
    for step in range(64, tokens.shape[1]):
        model(tokens[:, step : step + 1], past_key_values=cache, logits_to_keep=1)
    return now() - start


def compare(name: str, work: str, run: Callable, bare, engram, inputs: torch.Tensor, repeats: int) -> None:
    seconds = {bare: [], engram: []}
    for _ in range(repeats + 1):
        for model, taken in seconds.items():
            start = now()
            inner = run(model, inputs)
            taken.append(now() - start if inner is None else inner)
    pairs = list(zip(*seconds.values(), strict=True))[1:]  # The first pair warms up.
    ratio = statistics.median(with_memory / without for without, with_memory in pairs)
    without, with_memory = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(
        f"{name:9}{work:22}bare {without * 1e3:8.1f} ms   with memory {with_memory * 1e3:8.1f} ms   ratio {ratio:.3f}"
    )


if __name__ == "__main__":
    main()
