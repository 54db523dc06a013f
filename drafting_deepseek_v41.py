"""Drafts in `generate`: the candidates of DeepSeek-V4.1's draft layers for transformers' assisted decoding.

transformers' own `use_mtp` builds another kind of draft layer out of the text model's; its decoding loop is used
unchanged.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.utils import logging, output_capturing

from .draft_deepseek_v41 import DeepseekV41DraftModel, Drafts

logger = logging.get_logger(f"transformers.{__name__}")


class DraftReport:
    """The number of accepted drafts of a generation.

    `rounds` has, for each pass of the text model, how many tokens were drafted, and how many of them were accepted.
    """

    def __init__(self):
        self.rounds: list[tuple[int, int]] = []

    @property
    def tokens_per_round(self) -> float:
        """New tokens per pass of the text model: the accepted drafts, and the one that the text model chose itself."""
        return sum(accepted + 1 for _, accepted in self.rounds) / len(self.rounds) if self.rounds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """The share of accepted drafts by position in the block, among the rounds that drafted up to there."""
        longest = max((drafted for drafted, _ in self.rounds), default=0)
        reached = [
            [accepted > place for drafted, accepted in self.rounds if drafted > place] for place in range(longest)
        ]
        return [sum(part) / len(part) for part in reached]

    def __str__(self) -> str:
        places = ", ".join(f"{share:.2f}" for share in self.acceptance)
        return (
            f"{self.tokens_per_round:.2f} tokens a round in {len(self.rounds)} rounds; accepted by position: {places}"
        )


class DeepseekV41CandidateGenerator(CandidateGenerator):
    """Drafts blocks with the draft layers of the model that verifies them.

    Args:
        draft: the draft layers.
        embedding, head: the text model's.
        generation_config: the config of this generation; `num_assistant_tokens` shortens blocks.
        logits_processor: the processors of this generation.
    """

    requires_model_outputs = True

    def __init__(
        self,
        draft: DeepseekV41DraftModel,
        embedding: torch.nn.Module,
        head: torch.nn.Module,
        generation_config,
        logits_processor=None,
    ):
        self.draft, self.embedding, self.head = draft, embedding, head
        self.targets = list(draft.config.dspark_target_layer_ids)
        # Before transformers 5.21 a list names the layers whose output is meant, so there the streams of all are kept.
        by_index = hasattr(output_capturing, "selected_hidden_states")
        self.model_kwargs_overrides = {"output_hidden_states": self.targets if by_index else True}
        self.do_sample, self.max_length = generation_config.do_sample, generation_config.max_length
        self.block = min(draft.config.dspark_block_size, generation_config.num_assistant_tokens or 1)
        stop = generation_config.eos_token_id
        self.stop_ids = torch.tensor([] if stop is None else stop, dtype=torch.long).flatten()
        self.logits_processor = logits_processor
        self.context = draft.new_context()
        self.report = DraftReport()
        self.drafted: int | None = None  # in the round that is being verified

    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        model_kwargs: dict[str, Any],
        model_outputs,
        is_first_iteration: bool,
        n_last_matches: int,
        **kwargs,
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """Return the sequence `[1, S]` with drafts appended, and the logits `[1, drafts, vocab]` they were chosen
        from.

        The first pass of the text model is over the prompt alone: before it there are no features to draft from.
        """
        self.drafted = None
        if is_first_iteration:
            return input_ids, None
        self._read(model_outputs, model_kwargs.get("attention_mask"), n_last_matches)
        count = min(self.block, self.max_length - input_ids.shape[1] - 1)
        if count < 1:
            return input_ids, None
        drafts = self.draft.draft(
            input_ids[:, -1], self.context, self.embedding, self.head, count, self._chooser(input_ids)
        )
        count = self._before_the_end(drafts.tokens[:, : self._confident(drafts)])
        self.drafted = count
        if count < 1:
            return input_ids, None
        tokens = drafts.tokens[:, :count].to(input_ids.device)
        return torch.cat([input_ids, tokens], dim=1), drafts.logits[:, :count].to(input_ids.device)

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Record how many drafts of this round were accepted."""
        if self.drafted is not None:
            self.report.rounds.append((self.drafted, int(num_matches)))

    def _read(self, outputs, attention_mask: torch.Tensor | None, matches: int) -> None:
        """Extend the context by the positions that the text model has passed since, as far as their tokens were
        accepted.
        """
        streams = [outputs.hidden_states[layer] for layer in self.targets]
        passed = streams[0].shape[1]
        if self.context.length:
            streams = [part[:, : matches + 1] for part in streams]
        elif attention_mask is not None:
            # Left padding is not a position. (The mask covers the token that was chosen since, too.)
            real = attention_mask[0, -passed - 1 : -1].bool()
            streams = [part[:, real.to(part.device)] for part in streams]
        # Positions out of the window's reach count, but are not read.
        skipped = max(0, streams[0].shape[1] - self.context.window)
        self.context.length += skipped
        features = [part[:, skipped:].float().mean(2).to(self.draft.device, part.dtype) for part in streams]
        self.draft.extend(self.context, torch.cat(features, dim=-1))

    def _confident(self, drafts: Drafts) -> int:
        """Return how many drafts come before the first one that is likely to be rejected."""
        threshold = self.draft.config.dspark_confidence_threshold
        count = drafts.tokens.shape[1]
        if threshold is None:
            return count
        doubtful = (drafts.confidence[0].sigmoid() < threshold).nonzero()
        return int(doubtful[0]) if len(doubtful) else count

    def _before_the_end(self, tokens: torch.Tensor) -> int:
        """Return how many of the drafts `[1, K]` there are up to the first stop token, which transformers looks for at
        the end.
        """
        stops = torch.isin(tokens[0], self.stop_ids.to(tokens.device)).nonzero()
        return int(stops[0]) + 1 if len(stops) else tokens.shape[1]

    def _chooser(self, input_ids: torch.LongTensor) -> Callable:
        """Return how to choose a draft: like the text model's own tokens, so that most are accepted."""

        def choose(tokens: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = logits.to(input_ids.device)
            if self.logits_processor:
                sequence = torch.cat([input_ids, tokens.to(input_ids.device)], dim=1)
                logits = self.logits_processor(sequence, logits)
            if self.do_sample:
                return torch.multinomial(logits.softmax(-1), 1).squeeze(1), logits
            return logits.argmax(-1), logits

        return choose


__all__ = ["DeepseekV41CandidateGenerator", "DraftReport"]
