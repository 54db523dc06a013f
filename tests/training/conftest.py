"""Small training inputs: a corpus, a tokenizer, and a function that makes a Trainer."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_backbones import random_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from training_runs import TEXTS
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from engram_hf import EngramTokenizer

# Refusing the import is stronger than hiding the path: an editable install adds its own finder.
WITHOUT_THE_PACKAGE = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "engram_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""

# transformers 5.24 has this name for gradient checkpointing.
CHECKPOINTING = "activation_checkpointing"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> EngramTokenizer:
    """Return a tokenizer of the words of TEXTS, some of which share a compressed id (`the` and `The`)."""
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=64
    )
    return EngramTokenizer.from_tokenizer(plain)


@pytest.fixture
def corpus() -> list[dict]:
    """Return eight short sequences that are easy to memorize."""
    return [{"input_ids": row, "labels": row} for row in random_ids(8, 12, seed=7)]


@pytest.fixture
def trainer(tmp_path, corpus):
    """Make a stock Trainer for a model; keyword arguments override the `TrainingArguments` that are set here."""

    def make(model, *, train_dataset=corpus, optimizers=(None, None), data_collator=None, **fields) -> Trainer:
        settings = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "linear",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **fields,
        }
        if CHECKPOINTING in TrainingArguments.__dataclass_fields__ and "gradient_checkpointing" in settings:
            settings[CHECKPOINTING] = settings.pop("gradient_checkpointing")
        return Trainer(
            model,
            TrainingArguments(**settings),
            train_dataset=train_dataset,
            optimizers=optimizers,
            data_collator=data_collator,
        )

    return make


@pytest.fixture
def run_without_the_package(tmp_path):
    """Run code in a fresh process that cannot import `engram_hf`, and return the JSON of the last line it prints."""

    def run(code: str) -> dict:
        environment = {"PATH": "", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE + code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
