"""The chat template reproduces the golden strings through `apply_chat_template`."""

import json

import jinja2
import pytest
from transformers import AutoTokenizer

from engram_hf.convert_scripts.deepseek_v41_config import TEMPLATE


@pytest.fixture(scope="module")
def tokenizer(golden):
    tokenizer = AutoTokenizer.from_pretrained(golden / "deepseek_v41_tiny")
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture(scope="module")
def conversations(golden):
    return json.loads((golden / "chat_v41.json").read_text(encoding="utf-8"))


def render(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def golden_options(conversation):
    given = {name: conversation[name] for name in ("reasoning_effort", "drop_thinking") if name in conversation}
    return {"enable_thinking": conversation["thinking"], **given}


def test_template_gives_every_golden_string(tokenizer, conversations):
    assert len(conversations) == 38
    for conversation in conversations:
        options = golden_options(conversation)
        text = render(tokenizer, conversation["messages"], add_generation_prompt=True, **options)
        assert text == conversation["text"], conversation["name"]


def test_without_generation_prompt_only_the_header_is_missing(tokenizer, conversations):
    for conversation in conversations:
        text = render(tokenizer, conversation["messages"], add_generation_prompt=False, **golden_options(conversation))
        header = "<｜Assistant｜><think>" if conversation["thinking"] else "<｜Assistant｜></think>"
        ends_open = conversation["messages"][-1]["role"] != "assistant"
        assert text + header * ends_open == conversation["text"], conversation["name"]


def test_prompt_is_a_prefix_of_the_answered_conversation(tokenizer):
    """Supervised fine-tuning relies on it."""
    question = [{"role": "user", "content": "1+1?"}]
    answer = {"role": "assistant", "content": "2", "reasoning_content": "One and one."}
    for thinking in (False, True):
        prompt = render(tokenizer, question, add_generation_prompt=True, enable_thinking=thinking)
        whole = render(tokenizer, [*question, answer], enable_thinking=thinking)
        reasoning = "One and one.</think>" if thinking else ""
        assert whole == f"{prompt}{reasoning}2{tokenizer.eos_token}"


def test_assistant_mask_covers_what_the_model_generates(tokenizer):
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "two"}]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    written = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(written) == f"two{tokenizer.eos_token}"


def test_parts_are_joined_by_a_blank_line(tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    rendered = render(tokenizer, [{"role": "user", "content": parts}])
    assert rendered == f"{tokenizer.bos_token}<｜User｜>a\n\n<｜deepseek_image｜>\n\nb"


def test_default_is_chat_mode(tokenizer):
    messages = [{"role": "user", "content": "a"}]
    assert render(tokenizer, messages) == render(tokenizer, messages, enable_thinking=False)


def test_thinking_is_an_alias_of_enable_thinking(tokenizer):
    """DeepSeek's templates call the option `thinking`; ignoring it would silently render the prompt of chat mode."""
    messages = [{"role": "user", "content": "a"}]
    for value in (True, False):
        expected = render(tokenizer, messages, add_generation_prompt=True, enable_thinking=value)
        for options in ({"thinking": value}, {"thinking": value, "enable_thinking": value}):
            assert render(tokenizer, messages, add_generation_prompt=True, **options) == expected
    for absent in ({"thinking": None}, {"enable_thinking": None}):
        assert render(tokenizer, messages, **absent) == render(tokenizer, messages)


USER = {"role": "user", "content": "a"}
REFUSED = {
    "tools": ([USER], {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
    "tool calls": ([USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}], {}, "tool_calls"),
    "tool role": ([USER, {"role": "tool", "content": "1"}], {}, "role tool"),
    "video": ([{"role": "user", "content": [{"type": "video"}]}], {}, "type video"),
    "placeholder": ([{"role": "user", "content": "see <｜deepseek_image｜>"}], {}, "placeholder"),
    "placeholder in a part": (
        [{"role": "user", "content": [{"type": "text", "text": "<｜deepseek_image｜>"}]}],
        {},
        "placeholder",
    ),
    "placeholder in an answer": ([USER, {"role": "assistant", "content": "<｜deepseek_image｜>"}], {}, "placeholder"),
    "placeholder in reasoning": (
        [USER, {"role": "assistant", "content": "b", "reasoning_content": "<｜deepseek_image｜>"}],
        {"enable_thinking": True},
        "placeholder",
    ),
    "effort word": ([USER], {"enable_thinking": True, "reasoning_effort": "huge"}, "huge"),
    "effort number": ([USER], {"enable_thinking": True, "reasoning_effort": 101}, "101"),
    "effort alone": ([USER], {"reasoning_effort": "high"}, "enable_thinking=True too"),
    "two switches": ([USER], {"enable_thinking": False, "thinking": True}, "different values"),
    "thinking_mode": ([USER], {"thinking_mode": "thinking"}, "pass enable_thinking"),
    "documents": ([USER], {"documents": [{"title": "t", "text": "x"}]}, "documents"),
    "effort zero": ([USER], {"enable_thinking": True, "reasoning_effort": 0}, "effort is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_template_refuses_messages_that_it_cannot_render(tokenizer, case):
    messages, options, words = REFUSED[case]
    with pytest.raises(jinja2.exceptions.TemplateError, match=words):
        render(tokenizer, messages, **options)


ANSWERS = {
    True: ("One and one.</think>2", {"reasoning_content": "One and one.", "content": "2"}),
    False: ("2", {"content": "2"}),
}


@pytest.mark.parametrize("thinks", ANSWERS)
def test_response_template_parses_reasoning_and_content(converted, thinks):
    """The conversion writes the response template into the tokenizer's config; a server streams with it."""
    tokenizer = AutoTokenizer.from_pretrained(converted)
    question = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "No."},
    ]
    prompt = render(tokenizer, question, add_generation_prompt=True, enable_thinking=thinks)
    text, message = ANSWERS[thinks]
    for end in (tokenizer.eos_token, ""):
        assert tokenizer.parse_response(text + end, prefix=prompt) == {"role": "assistant", **message}
    again = render(tokenizer, [*question, message | {"role": "assistant"}], enable_thinking=thinks)
    assert again == prompt + text + tokenizer.eos_token
