"""The draft layers equal the golden activations at every stage."""

import pytest
import torch

from engram_hf.draft_deepseek_v41 import DeepseekV41DraftModel, draft_layers_config


def behind(draft, answers, number: int):
    """Return the context before anchor `number`, and the anchor's token `[1]`."""
    anchor = int(answers["draft.anchors"][number])
    context = draft.new_context()
    draft.extend(context, answers["draft.target_hidden"][:, :anchor])
    return context, answers["draft.input_ids"][:, anchor]


@torch.no_grad()
def test_main_states_match_the_oracle(draft, answers):
    states = draft.main_norm(draft.main_proj(answers["draft.target_hidden"]))
    torch.testing.assert_close(states, answers["draft.main_states"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("number", range(8))
@torch.no_grad()
def test_every_draft_activation_matches_the_oracle(draft, text, answers, number):
    context, token = behind(draft, answers, number)
    seen = {}
    for index, layer in enumerate(draft.layers):
        layer.register_forward_pre_hook(
            lambda _, args, index=index: seen.update({f"layers.{index}.pre": args[1], f"embeds.{index}": args[0]})
        )
        layer.self_attn.register_forward_hook(
            lambda _, __, output, index=index: seen.update({f"layers.{index}.attention": output[0]})
        )
        layer.mlp.register_forward_hook(
            lambda _, __, output, index=index: seen.update({f"layers.{index}.moe": output})
        )
    draft.register_forward_hook(lambda _, __, output: seen.update(collapsed=output))
    draft.final_norm.register_forward_hook(lambda _, __, output: seen.update(normalized=output))
    drafts = draft.draft(token, context, text.model.embed_tokens, text.lm_head)
    rows = slice(5 * number, 5 * number + 5)
    seen["block_embeds"] = seen["embeds.0"][:, :, 0]
    stages = [f"layers.{layer}.{part}" for layer in range(3) for part in ("pre", "attention", "moe")]
    for stage in ("block_embeds", *stages, "collapsed", "normalized"):
        torch.testing.assert_close(seen[stage], answers[f"draft.{stage}"][:, rows], atol=1e-4, rtol=0, msg=stage)
    assert torch.equal(drafts.tokens, answers["draft.tokens"][:, number])
    torch.testing.assert_close(drafts.logits, answers["draft.logits"][:, number], atol=1e-4, rtol=0)
    torch.testing.assert_close(drafts.confidence, answers["draft.confidence"][:, number], atol=1e-4, rtol=0)


@torch.no_grad()
def test_context_may_be_extended_in_chunks(draft, text, answers):
    """The drafts equal those of a context that was read in one call."""
    anchor = int(answers["draft.anchors"][6])
    for sizes in ([1] * anchor, [anchor - 3, 3], [5] * (anchor // 5) + [anchor % 5]):
        context, start = draft.new_context(), 0
        for size in sizes:
            draft.extend(context, answers["draft.target_hidden"][:, start : start + size])
            start += size
        assert context.length == anchor and context.keys[0].shape[1] == 8
        drafts = draft.draft(answers["draft.input_ids"][:, anchor], context, text.model.embed_tokens, text.lm_head)
        torch.testing.assert_close(drafts.logits, answers["draft.logits"][:, 6], atol=1e-4, rtol=0)


@torch.no_grad()
def test_fewer_drafts_are_the_first_of_the_block(draft, text, answers):
    context, token = behind(draft, answers, 4)
    drafts = draft.draft(token, context, text.model.embed_tokens, text.lm_head, count=2)
    assert torch.equal(drafts.tokens, answers["draft.tokens"][:, 4, :2])
    torch.testing.assert_close(drafts.logits, answers["draft.logits"][:, 4, :2], atol=1e-4, rtol=0)
    assert drafts.confidence.shape == (1, 2)


@torch.no_grad()
def test_drafted_block_is_not_kept_in_the_context(draft, text, answers):
    context, token = behind(draft, answers, 4)
    before = [keys.clone() for keys in context.keys]
    draft.draft(token, context, text.model.embed_tokens, text.lm_head)
    assert all(torch.equal(*pair) for pair in zip(context.keys, before, strict=True))


def test_new_draft_model_is_initialized(config):
    model = DeepseekV41DraftModel(config)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


BAD_FIELDS = [
    ({"num_nextn_predict_layers": 0}, "no draft layers"),
    ({"dspark_markov_rank": None}, "dspark_markov_rank"),
    ({"dspark_target_layer_ids": [6, 9]}, "dspark_target_layer_ids"),
    ({"dspark_num_experts_per_tok": 9}, "num_experts_per_tok"),
]


@pytest.mark.parametrize("fields, message", BAD_FIELDS)
def test_config_without_usable_drafts_is_refused(config, fields, message):
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        draft_layers_config(config)
