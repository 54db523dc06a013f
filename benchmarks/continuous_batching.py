"""Random requests by continuous batching, in a cache that holds a few of them, each compared with `generate`.

python benchmarks/continuous_batching.py [--requests 200] [--backbones mixtral llama gpt_oss glm4_moe]
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny_backbones import VOCAB, bare, build

NEW_TOKENS = range(2, 24)
GREEDY = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def draw_requests(count: int, seed: int) -> list[tuple[list[int], int]]:
    """Return prompts of 1 to 90 tokens, every third with one of two long prefixes, and the number of tokens to
    generate for each.
    """
    draw = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, VOCAB, (length,), generator=draw).tolist()

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    prefixes = [tokens(33), tokens(20)]
    return [
        (
            (prefixes[number(0, 2)] if i % 3 == 0 else []) + tokens(number(1, 58)),
            number(NEW_TOKENS.start, NEW_TOKENS.stop),
        )
        for i in range(count)
    ]


def run(model, requests: list[tuple[list[int], int]], seed: int) -> tuple[list[list[int]], float, int]:
    """Return the answers, the seconds, and how often requests gave up their blocks."""
    preemptions, offload = [], OffloadingManager.offload_requests

    def counted(self, *args, **kwargs):
        preemptions.append(1)
        return offload(self, *args, **kwargs)

    OffloadingManager.offload_requests = counted
    settings = ContinuousBatchingConfig(page_size=8, num_blocks=40, max_batch_tokens=64, safety_margin=0.0, seed=seed)
    start = time.perf_counter()
    try:
        with model.continuous_batching_context_manager(
            GenerationConfig(**GREEDY), continuous_batching_config=settings
        ) as manager:
            names = [manager.add_request(prompt, max_new_tokens=count) for prompt, count in requests]
            results: dict[str, list[int]] = {}
            while len(results) < len(names):
                output = manager.get_result(timeout=60)
                if output is None or output.error:
                    raise RuntimeError(f"a request ended without an answer: {output and output.error}")
                results[output.request_id] = output.generated_tokens
    finally:
        OffloadingManager.offload_requests = offload
    return [results[name] for name in names], time.perf_counter() - start, len(preemptions)


@torch.no_grad()
def count_differences(model, requests: list[tuple[list[int], int]], answers: list[list[int]]) -> int:
    """Return how many answers differ from those of `generate` for the request alone."""
    wrong = 0
    for (prompt, count), answer in zip(tqdm(requests, leave=False), answers, strict=True):
        alone = model.generate(torch.tensor([prompt]), **GREEDY, max_new_tokens=count)[0, len(prompt) :].tolist()
        wrong += alone != answer
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Print one row for each backbone and variant; return 1 if an answer with memory differs where the bare backbone's
    does not.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200, help="number of random requests (default: %(default)s)")
    parser.add_argument(
        "--backbones",
        nargs="+",
        default=["mixtral", "llama", "gpt_oss", "glm4_moe"],
        help="model types of the backbones",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests (default: %(default)s)")
    options = parser.parse_args(arguments)
    requests, failed = draw_requests(options.requests, options.seed), False
    print("| backbone | memory | requests | preemptions | answers that differ from `generate` | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in options.backbones:
        models = {"none": bare(name), "paper": build(name, "paper"), "v4.1": build(name, "v4.1")}
        exact = True
        for memory, model in models.items():
            answers, seconds, preemptions = run(model, requests, options.seed)
            wrong = count_differences(model, requests, answers)
            exact = exact and not (memory == "none" and wrong)
            failed = failed or bool(exact and wrong)
            print(f"| {name} | {memory} | {len(requests)} | {preemptions} | {wrong} | {seconds:.1f} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
