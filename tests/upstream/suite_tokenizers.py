"""Run transformers' common tests of tokenizers on a bare tokenizer and on the same one as `EngramTokenizer`."""

import unittest

from tiny_tokenizer import make_tokenizer
from transformers import PreTrainedTokenizerFast
from transformers_tests.test_tokenization_common import TokenizerTesterMixin

from engram_hf import EngramTokenizer


class CommonTests(TokenizerTesterMixin):
    """The mix-in saves a tokenizer from the Hub to its folder; ours replaces it."""

    # Tests for one kind of tokenizer only (slow, sentencepiece, another library's) are skipped by these.
    test_seq2seq = False
    test_tokenizer_from_extractor = False

    @classmethod
    def setUpClass(cls):
        """Save the tokenizer whose copies the tests load."""
        super().setUpClass()
        tokenizer = make_tokenizer()
        if cls.tokenizer_class is not EngramTokenizer:
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map
            )
        tokenizer.save_pretrained(cls.tmpdirname)


class Bare_tokenizer(CommonTests, unittest.TestCase):
    """The tokenizer is bare."""

    tokenizer_class = PreTrainedTokenizerFast


class Memory_tokenizer(CommonTests, unittest.TestCase):
    """The tokenizer has compressed ids."""

    tokenizer_class = EngramTokenizer
