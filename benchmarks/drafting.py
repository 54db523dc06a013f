"""Rounds, accepted tokens and time with drafts on the miniature, and the computed cost of a round of the release.

    python benchmarks/drafting.py

The miniature's weights are random, so no draft layer can predict it. As in the golden data, its Markov head is trained
on a part of the transitions of its own greedy continuation. Decoding with drafts alternates with plain decoding of the
same tokens. Then the script computes, without running the release, the bytes that a step of DeepSeek-V4.1-Flash reads
at batch size 1, without drafts and with them, and how many tokens a round must give for drafts to save time. (A step
reads each weight it uses once; the experts of a block's tokens are assumed to be chosen independently of each other,
which is the worst case.)
"""

import argparse
import contextlib
import io
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from deepseek_v41_memory import bfloat16_bytes, part_of, release_config, released_bytes
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from engram_hf.convert_scripts import convert_deepseek_v41
from engram_hf.convert_scripts.deepseek_v41 import DEEPSEEK_V41
from engram_hf.convert_scripts.tensor_rules import map_tensors

MINIATURE = Path(__file__).parents[1] / "tests" / "golden" / "deepseek_v41_tiny_vl"
PLAIN = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def load_miniature(folder: Path):
    """Load the miniature with memory and drafts, in float32."""
    release, target = folder / "release", folder / "float32"
    shutil.copytree(MINIATURE, release, ignore=shutil.ignore_patterns("golden*", "README.md"))
    with contextlib.redirect_stdout(io.StringIO()):
        convert_deepseek_v41.main([str(release), str(target), "--dtype", "float32"])
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, draft=True).eval()


@torch.no_grad()
def teach(model, sequence: torch.Tensor, share: float) -> None:
    """Make the Markov head predict the first `share` of the transitions in `sequence` `[S]`, and no others."""
    embed, head = model.draft.markov_embed.weight, model.draft.markov_head.weight
    embed.zero_(), head.zero_()
    following = dict(zip(sequence[:-1].tolist(), sequence[1:].tolist(), strict=True))
    taught = list(following.items())[: round(share * len(following))]
    states = torch.nn.functional.normalize(torch.randn(len(taught), embed.shape[1]), dim=-1)
    for state, (token, after) in zip(states, taught, strict=True):
        embed[token] = state
        head[after] += 50 * state


def measure(model, tokens: int, runs: int) -> None:
    """Print the effect of drafts for several shares of learned transitions."""
    prompt = torch.tensor([[0, 300, 411, 52, 633, 74, 85, 96, 107, 318, 129, 130, 241]])
    expected = model.generate(prompt, max_new_tokens=tokens, **PLAIN)
    for share in (0.0, 0.5, 0.8, 1.0):
        teach(model, expected[0, prompt.shape[1] - 1 :], share)
        times: dict[bool, list[float]] = {False: [], True: []}
        for drafts in [False, True] * runs:
            start = time.perf_counter()
            new = model.generate(prompt, max_new_tokens=tokens, use_mtp=drafts or None, **PLAIN)
            times[drafts].append(time.perf_counter() - start)
            assert torch.equal(new, expected)
        report, plain = model.draft_report, statistics.median(times[False])
        accepted = sum(count for _, count in report.rounds)
        ratio = statistics.median(times[True]) / plain
        print(f"{share:4.0%} of the transitions taught: {len(report.rounds):3} rounds, {accepted:3} drafts accepted, "
              f"{report.tokens_per_round:.2f} tokens a round, {ratio:.2f}x the time of plain decoding ({plain / tokens * 1e3:.1f} ms a token)")  # fmt: skip


def expected_experts(tokens: int, chosen: int, experts: int) -> float:
    """Return the expected number of different experts for `tokens` tokens, each choosing `chosen` of `experts`."""
    return experts * (1 - (1 - chosen / experts) ** tokens)


def read_bytes(size) -> dict[str, float]:
    """Return the bytes read by a plain step, by a step that verifies d drafts (`"verify d"`), and by a drafting pass.

    Args:
        size: returns the bytes of a mapping.
    """
    config = release_config()
    text, total = config["text_config"], {}
    for mapping in map_tensors(DEEPSEEK_V41, config):
        part = part_of(mapping)
        if mapping.ours in ("model.embed_tokens.weight", "draft.markov_embed.weight"):
            continue  # Each token reads a row.
        if part == "drafts" and mapping.rule.is_stacked:
            part = "draft experts"
        total[part] = total.get(part, 0) + size(mapping)
        if mapping.ours in ("lm_head.weight", "draft.markov_head.weight"):
            total[mapping.ours] = size(mapping)
    chosen, experts = text["num_experts_per_tok"], text["n_routed_experts"]
    steps = {
        f"verify {drafts}": total["rest of the text model"]
        + total["routed experts"] / experts * expected_experts(1 + drafts, chosen, experts)
        for drafts in range(text["dspark_block_size"] + 1)
    }
    block, chosen, experts = (text[f"dspark_{name}"] for name in ("block_size", "num_experts_per_tok", "n_routed_experts"))  # fmt: skip
    share = expected_experts(block, chosen, experts) / experts
    drafting = total["drafts"] + total["draft experts"] * share + total["lm_head.weight"]
    return steps | {"draft": drafting + (block - 1) * total["draft.markov_head.weight"]}


def print_arithmetic() -> None:
    """Print the bytes that a round of the release reads, and the drafts it must accept to save time."""
    for name, size in (("released (FP8, FP4)", released_bytes), ("bfloat16", bfloat16_bytes)):
        found = read_bytes(size)
        plain, draft = found["verify 0"], found["draft"]
        print(f"{name}: a plain step reads {plain / 1e9:.1f} GB, a drafting pass {draft / 1e9:.1f} GB")
        for drafts in range(1, 6):
            cost = (found[f"verify {drafts}"] + draft) / plain
            print(f"  {drafts} drafts: verifying reads {found[f'verify {drafts}'] / 1e9:.1f} GB, a round costs {cost:.2f} plain steps: "
                  f"it pays from {cost:.2f} tokens a round, {cost - 1:.2f} of {drafts} drafts accepted")  # fmt: skip


def main() -> None:
    """Print both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=96, help="new tokens of each run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each measurement (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        measure(load_miniature(Path(folder)), given.tokens, given.runs)
    print_arithmetic()


if __name__ == "__main__":
    main()
