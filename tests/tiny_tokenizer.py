"""A tokenizer that fits `tiny_backbones`: 128 words, some of them equal up to case and accents."""

from tiny_backbones import VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engram_hf import EngramTokenizer

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "the", "THE", "café", "Café", "cafe", "CAFE"]


def make_tokenizer() -> EngramTokenizer:
    """Return a tokenizer for which `the café w7` is three tokens; `THE CAFE` has the compressed ids of `the café`."""
    words = [*WORDS, *(f"w{index}" for index in range(VOCAB - len(WORDS)))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return EngramTokenizer.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **special))
