"""Measure the cost of quantized tables: the loss on a text before and after, and the loss without memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .folders import is_model, read_utf8, read_whole_config, require_tokenizer
from .output import columns

if TYPE_CHECKING:
    import torch

    from engram_hf import EngramForCausalLM

_LENGTH = 512
_BATCH = 4


def read_blocks(folder: Path, path: Path) -> "torch.Tensor":
    """Return the tokens of a text, int64 `[n, S]`, in blocks of at most 512 and at most the model's maximum length.

    Raises:
        ValueError: the folder has no model or no tokenizer, or the text fills no block of at least two tokens.
    """
    import torch

    from engram_hf.tokenization import EngramTokenizer

    if not is_model(folder):
        raise ValueError(
            f"{folder} holds tables without a model, so there is no loss to measure; leave --measure out."
        )
    length = min(_LENGTH, getattr(read_whole_config(folder).text_config, "max_position_embeddings", None) or _LENGTH)
    require_tokenizer(folder)
    ids = EngramTokenizer.from_pretrained(folder)(read_utf8(path))["input_ids"]
    length = min(length, len(ids))
    if length < 2:
        raise ValueError(f"{path} has {len(ids)} tokens; give a text of at least two, better of some ten thousand.")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


class Loss(NamedTuple):
    """Means over all positions except the first of each block, in nats.

    Args:
        before, after, without: cross-entropy of the next token with the original tables, the new tables, and no memory.
        divergence: Kullback-Leibler divergence of the predictions after from those before.
        positions: the number of positions.
    """

    before: float
    after: float
    without: float
    divergence: float
    positions: int

    @property
    def share(self) -> float | None:
        """The part of the memory's worth that is lost; None if it is worth nothing."""
        return (self.after - self.before) / self.worth if self.worth > 0 else None

    @property
    def worth(self) -> float:
        """The increase of the loss without memory."""
        return self.without - self.before

    def __str__(self) -> str:
        rows = [
            ["without memory", f"{self.without:.4f}", "", ""],
            ["before", f"{self.before:.4f}", "", ""],
            ["after", f"{self.after:.4f}", f"{self.after - self.before:+.4f}", f"{self.divergence:.5f}"],
        ]
        table = columns(["held-out loss, nats a token", "loss", "change", "KL from before"], rows)
        verdict = (
            f"Memory is worth nothing on this text ({self.worth:.4f} nats), so that this says nothing of its tables."
            if self.share is None
            else f"Memory is worth {self.worth:.4f} nats on this text; {self.share:.1%} of that is lost."
        )
        return f"{table}\n{verdict} ({self.positions:,} positions)"


def measure(folder: Path, target: Path, blocks: "torch.Tensor") -> Loss:
    """Return the loss of a model before and after quantization.

    Args:
        folder, target: the model before and after.
        blocks: the result of [`read_blocks`].
    """
    from engram_hf import EngramForCausalLM

    before, after = (
        EngramForCausalLM.from_pretrained(at, engram_residency="mapped").eval() for at in (folder, target)
    )
    return compare(before, after, blocks)


def compare(before: "EngramForCausalLM", after: "EngramForCausalLM", blocks: "torch.Tensor") -> Loss:
    """Return the losses of two models that differ in their tables on token ids `[n, S]`, with a progress bar."""
    import torch
    from torch.nn import functional as F
    from tqdm import tqdm

    from engram_hf.analysis.evaluation import Off

    sums, positions = torch.zeros(4, dtype=torch.float64), 0
    for some in tqdm(blocks.split(_BATCH), desc="Measuring", disable=None):
        labels = some[:, 1:].flatten()
        with torch.no_grad():
            first, second = (_log_probabilities(model, some) for model in (before, after))
            without = _log_probabilities(before, some, engram_edit=Off())
        losses = [F.nll_loss(predicted, labels, reduction="sum") for predicted in (first, second, without)]
        divergence = F.kl_div(second, first, reduction="sum", log_target=True)
        sums += torch.stack([*losses, divergence]).double()
        positions += labels.numel()
    before_loss, after_loss, without_loss, kl = (sums / positions).tolist()
    return Loss(before_loss, after_loss, without_loss, kl, positions)


def _log_probabilities(model: "EngramForCausalLM", ids: "torch.Tensor", **options: Any) -> "torch.Tensor":
    """Return the log-probabilities of each next token, float32 `[n * (S - 1), V]`."""
    return model(input_ids=ids, use_cache=False, **options).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
