"""Drafts in `generate` give the same output in fewer forward passes of the text model."""

import os
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from engram_hf.causal_lm_deepseek_v41 import DeepseekV41TextForCausalLM
from engram_hf.drafting_deepseek_v41 import DraftReport

PROMPT = [[0, 300, 411, 52, 633, 74, 85, 96, 107, 318, 129, 130, 241]]
PLAIN = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}


@pytest.fixture
def drafting(text, draft):
    """Return the text model without memory, with its draft layers."""
    text.draft = draft
    text.config.draft = True
    return text


@pytest.fixture
def agreeing(drafting):
    """Return draft layers whose Markov head knows the text model's answer to this prompt: most drafts are accepted."""
    ids = torch.tensor(PROMPT)
    sequence = drafting.generate(ids, max_new_tokens=24, **PLAIN)[0, ids.shape[1] - 1 :]
    with torch.no_grad():
        states = torch.eye(32)[torch.arange(len(sequence) - 1) % 32]
        drafting.draft.markov_embed.weight[sequence[:-1]] = states
        for state, following in zip(states, sequence[1:], strict=True):
            drafting.draft.markov_head.weight[following] += 20 * state
    return drafting


def count_passes(model) -> list[int]:
    """Return a list that records the tokens of each forward of the text model."""
    passes = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return passes


@pytest.mark.parametrize("length", [1, 2, 7, 24])
def test_drafting_keeps_the_greedy_output(drafting, length):
    ids = torch.tensor(PROMPT)
    plain = drafting.generate(ids, max_new_tokens=length, **PLAIN)
    assert torch.equal(drafting.generate(ids, max_new_tokens=length, use_mtp=True, **PLAIN), plain)


def test_drafting_needs_fewer_passes(agreeing):
    ids = torch.tensor(PROMPT)
    plain = agreeing.generate(ids, max_new_tokens=24, **PLAIN)
    passes = count_passes(agreeing)
    assert torch.equal(agreeing.generate(ids, max_new_tokens=24, use_mtp=True, **PLAIN), plain)
    assert len(passes) < 12 and passes[0] == 13
    report = agreeing.draft_report
    assert len(report.rounds) in (len(passes) - 1, len(passes) - 2)
    assert report.tokens_per_round > 2 and all(0 <= share <= 1 for share in report.acceptance)


def test_fewer_drafts_keep_the_output(agreeing):
    ids = torch.tensor(PROMPT)
    plain = agreeing.generate(ids, max_new_tokens=24, **PLAIN)
    passes = count_passes(agreeing)
    new = agreeing.generate(ids, max_new_tokens=24, use_mtp=True, num_assistant_tokens=2, **PLAIN)
    assert torch.equal(new, plain) and set(passes[1:]) <= {1, 2, 3}
    assert all(drafted <= 2 for drafted, _ in agreeing.draft_report.rounds)


def test_confidence_threshold_stops_a_block(agreeing):
    """Above every confidence nothing is drafted; at lower thresholds, fewer drafts are rejected."""
    ids = torch.tensor(PROMPT)
    plain = agreeing.generate(ids, max_new_tokens=24, **PLAIN)
    drafted = {}
    for threshold in (None, 0.5, 1.0):
        agreeing.draft.config.dspark_confidence_threshold = threshold
        assert torch.equal(agreeing.generate(ids, max_new_tokens=24, use_mtp=True, **PLAIN), plain)
        drafted[threshold] = sum(count for count, _ in agreeing.draft_report.rounds)
    assert drafted[1.0] == 0 < drafted[0.5] < drafted[None]


def test_left_padding_is_not_counted_as_positions(agreeing):
    ids = torch.tensor(PROMPT)
    expected = agreeing.generate(ids, max_new_tokens=12, use_mtp=True, **PLAIN)
    rounds = agreeing.draft_report.rounds
    padded = torch.cat([torch.full((1, 4), 2), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 4).long()[None]
    new = agreeing.generate(padded, attention_mask=mask, max_new_tokens=12, use_mtp=True, **PLAIN)
    assert torch.equal(new[:, 4:], expected) and agreeing.draft_report.rounds == rounds


def test_stop_token_inside_a_block_ends_the_output(agreeing):
    ids = torch.tensor(PROMPT)
    plain = agreeing.generate(ids, max_new_tokens=24, **PLAIN)
    for place in range(3, 12):
        options = {**PLAIN, "eos_token_id": int(plain[0, ids.shape[1] + place])}
        expected = agreeing.generate(ids, max_new_tokens=24, **options)
        assert torch.equal(agreeing.generate(ids, max_new_tokens=24, use_mtp=True, **options), expected)


def test_logits_processors_apply_to_every_draft(agreeing):
    """A repetition penalty changes the choice; drafts pass through it like the text model's tokens."""
    ids = torch.tensor(PROMPT)
    options = {**PLAIN, "repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "max_new_tokens": 16}
    plain = agreeing.generate(ids, **options)
    assert torch.equal(agreeing.generate(ids, use_mtp=True, **options), plain)


def exact_distribution(model, ids: torch.Tensor, length: int, options: dict) -> dict[tuple[int, ...], float]:
    """Return the probability of each continuation of `length` tokens under plain sampling with these options."""
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for continuation, probability in found.items():
            given = torch.cat([ids, torch.tensor([continuation], dtype=torch.long)], dim=1)
            logits = model(given).logits[0, -1] / options["temperature"]
            best, tokens = logits.topk(options["top_k"])
            for token, share in zip(tokens.tolist(), best.double().softmax(0).tolist(), strict=True):
                longer[(*continuation, token)] = probability * share
        found = longer
    return found


@pytest.mark.slow
@torch.no_grad()
def test_sampling_keeps_the_distribution(agreeing):
    """Three tokens sampled often with drafts match the exact probabilities in a chi-square test.

    `ENGRAM_TRIALS=20` draws 2,400 times.
    """
    ids, draws = torch.tensor(PROMPT), 120 * int(os.environ.get("ENGRAM_TRIALS", "1"))
    options = {"do_sample": True, "top_k": 2, "temperature": 1.5, "eos_token_id": None, "pad_token_id": 2}
    probabilities = exact_distribution(agreeing, ids, 3, options)
    torch.manual_seed(1)
    counts, accepted = Counter(), 0
    for _ in range(draws):
        counts[tuple(agreeing.generate(ids, max_new_tokens=3, use_mtp=True, **options)[0, -3:].tolist())] += 1
        accepted += sum(count for _, count in agreeing.draft_report.rounds)
    assert 0 < accepted < draws and counts.keys() <= probabilities.keys()
    # Continuations expected less than five times are counted together, as the approximation requires.
    cells = [(counts[kind], draws * share) for kind, share in probabilities.items()]
    rare = [cell for cell in cells if cell[1] < 5]
    cells = [cell for cell in cells if cell[1] >= 5] + ([tuple(map(sum, zip(*rare, strict=True)))] if rare else [])
    statistic, degrees = sum((seen - expected) ** 2 / expected for seen, expected in cells), len(cells) - 1
    # This is the 99.9 % point of the chi-square distribution (Wilson and Hilferty).
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    print(
        f"{draws} draws, {accepted} drafts accepted: chi-square {statistic:.2f} of {degrees} degrees, limit {limit:.2f}"
    )
    assert degrees >= 3 and statistic < limit, (statistic, limit)


# --- loading


def test_draft_layers_are_loaded_on_request(agreeing, tmp_path):
    agreeing.config.draft = True
    agreeing.save_pretrained(tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, draft=False, output_loading_info=True)
    assert plain.draft is None and not info["unexpected_keys"] and not info["missing_keys"]
    ids = torch.tensor(PROMPT)
    expected = agreeing.generate(ids, max_new_tokens=12, use_mtp=True, **PLAIN)
    rounds = agreeing.draft_report.rounds
    assert torch.equal(plain.generate(ids, max_new_tokens=12, use_mtp=True, **PLAIN), expected)
    assert plain.draft_report.rounds == rounds
    asked, info = AutoModelForCausalLM.from_pretrained(tmp_path, draft=True, output_loading_info=True)
    assert asked.draft is not None and not info["unexpected_keys"] and not info["missing_keys"]
    asked.generate(ids, max_new_tokens=12, use_mtp=True, **PLAIN)
    assert asked.draft_report.rounds == rounds


def test_folder_without_draft_layers_is_refused(text, tmp_path):
    text.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks .* tensors of the draft layers"):
        model.generate(torch.tensor(PROMPT), use_mtp=True, max_new_tokens=2)


# --- bad input


def test_use_mtp_is_refused_where_it_cannot_draft(text, drafting, config):
    ids = torch.tensor(PROMPT)
    with pytest.raises(ValueError, match="beams"):
        drafting.generate(ids, use_mtp=True, num_beams=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="batch_size = 1"):
        drafting.generate(ids.expand(2, -1), use_mtp=True, max_new_tokens=2, pad_token_id=2)
    config.num_nextn_predict_layers = 0
    with pytest.raises(ValueError, match="no draft layers"):
        DeepseekV41TextForCausalLM(config).generate(ids, use_mtp=True, max_new_tokens=2)


def test_memory_before_a_layer_that_drafts_read_is_refused(drafting):
    drafting.config.engram_layer_ids = [1, 7]
    with pytest.raises(ValueError, match="memory"):
        drafting.generate(torch.tensor(PROMPT), use_mtp=True, max_new_tokens=2)


def test_drafting_report():
    report = DraftReport()
    assert report.tokens_per_round == 0 and report.acceptance == []
    report.rounds = [(5, 2), (5, 0), (5, 5), (2, 2)]
    assert report.tokens_per_round == 13 / 4
    assert report.acceptance == [3 / 4, 3 / 4, 1 / 3, 1 / 3, 1 / 3]
    assert "3.25 tokens a round in 4 rounds" in str(report)
