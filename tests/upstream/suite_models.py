"""Run transformers' common, training and tensor-parallel tests of models on backbones without and with memory."""

import copy
import unittest

import awake
import torch
from transformers.testing_utils import torch_device
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

# Tests that start processes take half a minute each; two kinds of plan, with experts and without, are enough.
IN_SEVERAL_PROCESSES = ("mixtral", "llama")

awake.wake()


class ModelTester:
    """Answers the questions of the mix-ins about a model."""

    batch_size = 3
    seq_length = 8
    is_training = True
    sequence_classification_class = None

    def __init__(self, parent: unittest.TestCase, config, base_model_class: type, causal_lm_class: type):
        self.parent = parent
        self.config = config
        self.base_model_class, self.causal_lm_class = base_model_class, causal_lm_class
        text_config = config.get_text_config()
        self.vocab_size = text_config.vocab_size
        self.hidden_size = text_config.hidden_size
        self.num_hidden_layers = text_config.num_hidden_layers
        self.num_attention_heads = text_config.num_attention_heads

    def get_config(self):
        """Return a new copy of the config."""
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        """Return a config, and ids without special tokens and padding."""
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length), device=torch_device)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def prepare_config_and_inputs_for_model_class(self, _model_class):
        """Return the same for every class."""
        return self.prepare_config_and_inputs_for_common()


class CommonTests(ModelTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin):
    """Runs every test for one backbone; subclasses name their models."""

    backbone: str
    make_config = None
    # Not every batch chooses every expert.
    test_all_params_have_gradient = False
    # The test of initialization runs whatever year the file of the config names.
    test_can_init_all_missing_weights_before_2023 = True
    model_tester = None

    def setUp(self):
        """Make the tester of this test."""
        if self._testMethodName.startswith("test_tp"):  # These tests send the classes to other processes, by name.
            self.all_model_classes = awake.named_classes(self.all_model_classes)
        self.model_tester = ModelTester(self, type(self).make_config(self.backbone), *self.all_model_classes)

    def _skip_if_tp_distributed_not_enabled(self):
        if self.backbone not in IN_SEVERAL_PROCESSES:
            self.skipTest("runs on two backbones only")


def _test_class(kind: str, name: str, classes: tuple, make_config) -> type:
    fields = {"backbone": name, "all_model_classes": classes, "make_config": staticmethod(make_config)}
    return type(f"{kind}_{name}", (CommonTests, unittest.TestCase), {**fields, "__module__": __name__})


for _name in awake.NAMES:
    globals()[f"Bare_{_name}"] = _test_class("Bare", _name, awake.bare_classes(_name), awake.bare_config)
    globals()[f"Memory_{_name}"] = _test_class("Memory", _name, awake.memory_classes(_name), awake.memory_config)


class Bare_awake(unittest.TestCase):
    """Bare counterpart of `Memory_awake`; it requires nothing."""

    def test_memory_changes_the_logits(self):
        """Pass for any model."""


class Memory_awake(unittest.TestCase):
    """Checks that memory matters: a run without its effect would pass and prove nothing."""

    @torch.no_grad()
    def test_memory_changes_the_logits(self):
        """Zero rows instead of random ones change every model's logits."""
        for name in awake.NAMES:
            with self.subTest(name):
                model = awake.memory_classes(name)[-1](awake.memory_config(name)).eval()
                ids = torch.randint(3, 128, (2, 8))
                before = model(ids).logits
                for parameter_name, parameter in model.named_parameters():
                    if parameter_name.endswith("table.weight"):
                        parameter.zero_()
                assert (model(ids).logits - before).abs().max() > 1e-2
