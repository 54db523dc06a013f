"""Models of other projects whose tables stay in their files give the stock models' numbers, bit for bit."""

import copy
import gc
import pickle
import re
from pathlib import Path

import other_tiny_models as tiny
import pytest
import torch
from other_tiny_models import GEMMA, IDS, QWEN, logits
from peft import LoraConfig, get_peft_model
from table_models import Driver
from tiny_tokenizer import make_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, pipeline

from engram_hf import EngramError, load_with_tables
from engram_hf.other_models.lookahead import Lookahead
from engram_hf.other_models.row_embedding import EmbeddingOfRows, RowsById
from engram_hf.prefetch_engram import FetchedRows


def load(folder, **options):
    return load_with_tables(AutoModelForCausalLM, str(folder), **options)


def tables_of(model) -> dict[str, EmbeddingOfRows]:
    return {name: module for name, module in model.named_modules() if isinstance(module, EmbeddingOfRows)}


@pytest.fixture(scope="module")
def mapped(folder):
    return load(folder)


# --- equal numbers


def test_logits_and_generation_equal_the_stock_model(stock, mapped):
    assert type(mapped).__name__ == type(stock).__name__ and isinstance(mapped, type(stock))
    assert tables_of(mapped) and not any(
        key.startswith(tuple(tables_of(mapped))) for key, _ in mapped.named_parameters() if "scale" not in key
    )
    assert torch.equal(logits(mapped), logits(stock))
    for options in ({}, {"num_beams": 2}) if "Gemma" in type(stock).__name__ else ({},):
        assert torch.equal(*(m.generate(IDS, max_new_tokens=5, do_sample=False, **options) for m in (stock, mapped)))


def test_tables_change_the_logits(stock):
    """Otherwise the equalities here could hold because no table is read."""
    other = copy.deepcopy(stock)
    table = next(module for name, module in other.named_modules() if name in (GEMMA, QWEN))
    stored = next(iter(table.parameters()))
    with torch.no_grad():
        stored.view(torch.uint8).copy_(stored.view(torch.uint8).flip(0).clone())
    assert not torch.equal(logits(other), logits(stock))


def test_gradients_of_other_parameters_equal_the_stock_model(stock, mapped):
    for name in tables_of(mapped):
        stock.get_submodule(name).requires_grad_(False)  # Torch has no gradient of float8 rows.
    for model in (stock, mapped):
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters() if parameter.grad is not None}
    own = {name: parameter.grad for name, parameter in mapped.named_parameters() if parameter.grad is not None}
    shared = [name for name in gradients if not name.startswith(tuple(tables_of(mapped)))]
    assert len(shared) > 10
    for name in shared:
        assert torch.equal(own[name], gradients[name]), name


@pytest.mark.parametrize("way", ["dtype", "moved", pytest.param("twice", marks=pytest.mark.slow)])
def test_other_dtypes_give_the_rows_of_the_stock_model(folders, way):
    for name in ("qwen4_exp float8",) if way == "twice" else ("gemma3n", "gemma4 int4"):
        folder = str(folders(name))
        options = {"dtype": torch.float32} if way == "dtype" else {}
        models = [AutoModelForCausalLM.from_pretrained(folder, **options), load(folder, **options)]
        for model in models if way != "dtype" else ():
            model.to(torch.float16 if way == "twice" else torch.float32)
            model.to(torch.float32)
        assert torch.equal(*map(logits, models)), name
        (table, other) = (dict(m.named_modules())[GEMMA if "gemma" in name else QWEN] for m in models)
        assert torch.equal(table(IDS), other(IDS)) and table(IDS).dtype == other(IDS).dtype


def test_copies_and_other_processes_read_the_same_files(folders):
    for name in ("gemma3n", "gemma4 int4"):
        model = load(folders(name))
        expected = logits(model)
        assert torch.equal(logits(copy.deepcopy(model)), expected)
        message = pickle.dumps(model)
        reader = next(iter(next(iter(tables_of(model).values())).readers.values()))
        assert reader.source.parts[0].weight[:8].numpy().tobytes() not in message
        assert torch.equal(logits(pickle.loads(message)), expected)


# --- residency


def test_pinned_rows_are_equal(folders, monkeypatch):
    driver = Driver()
    for name in ("gemma3n", "gemma4", "gemma4 int2", "qwen4_exp float8"):
        folder = folders(name)
        expected = logits(AutoModelForCausalLM.from_pretrained(folder))
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "cudart", lambda: driver)
            patch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
            model = load(folder, residency="pinned")
            readers = [reader for table in tables_of(model).values() for reader in table.readers.values()]
            assert sum(driver.locked.values()) == sum(reader.stored.size for reader in readers) > 0
            assert torch.equal(logits(model), expected)
            del model, readers
            gc.collect()
            assert not driver.locked


def test_resident_table_equals_the_stock_model(folders):
    for name in ("gemma3n", "gemma4", "qwen4_exp"):
        model = load(folders(name), residency="resident")
        assert not tables_of(model)
        assert not name.startswith("gemma") or type(model.get_submodule(GEMMA).weight) is nn.Parameter
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folders(name))))


def test_mapped_table_takes_no_anonymous_memory(tmp_path):
    """The table has 25 MB, the rest of the model less than one."""
    folder = tiny.save(tiny.gemma4(vocab_size_per_layer_input=1 << 19), tmp_path)
    gc.collect()
    before = anonymous_memory()
    model = load(folder)
    logits(model)
    table = next(iter(model.get_submodule(GEMMA).readers.values())).stored
    assert table.size > 25e6 and anonymous_memory() - before < table.size / 4


def anonymous_memory() -> int:
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


# --- prefetching


def lookaheads(model) -> list[Lookahead]:
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, Lookahead)]


def test_hashed_rows_are_prefetched_before_their_layer(folders, monkeypatch):
    folder = folders("qwen4_exp")
    stock, model = AutoModelForCausalLM.from_pretrained(folder), load(folder)
    (hook,) = lookaheads(model)
    hook.prefetcher.when = "always"
    taken, begin = [], hook.prefetcher.start

    def start(row_ids):
        taken.append(begin(row_ids))
        return taken[-1]

    monkeypatch.setattr(hook.prefetcher, "start", start)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0  # The model hashes other ids at padding.
    for options in ({}, {"attention_mask": mask}):
        texts = [m.generate(IDS, max_new_tokens=4, do_sample=False, **options) for m in (stock, model)]
        assert torch.equal(*texts)
    assert len(taken) == 8 and all(len(rows) == 2 for rows in taken)
    # Each prefetch was used by its own table.
    assert not any(reader._ahead for table in tables_of(model).values() for reader in table.readers.values())


def test_rows_prefetched_for_other_ids_are_not_used(folders):
    reader = load(folders("qwen4_exp")).get_submodule(QWEN).readers["weight"]
    ids = torch.tensor([5, 9, 7])
    expected = reader.read(ids)
    rows = FetchedRows(reader.source, torch.tensor([1, 2, 3]))
    reader.offer(rows)
    assert torch.equal(reader.read(ids), expected) and not reader._ahead


# --- other tools


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"dtype": "auto"}], ids=str)
def test_load_with_tables_with_loading_options(folders, options):
    for name in ("qwen4_exp",) if "dtype" in options else ("gemma3n", "gemma4 int4"):
        expected = logits(AutoModelForCausalLM.from_pretrained(folders(name)))
        model, info = load(folders(name), output_loading_info=True, **options)
        assert torch.equal(logits(model), expected) and not any(info.values())


def test_pipeline(folders):
    models = [AutoModelForCausalLM.from_pretrained(folders("gemma3n")), load(folders("gemma3n"))]
    tokenizer = make_tokenizer()
    texts = [
        pipeline("text-generation", model=m, tokenizer=tokenizer)("the", max_new_tokens=4, do_sample=False)
        for m in models
    ]
    assert texts[0] == texts[1]


def test_lora_of_other_parameters_in_trainer(folders, tmp_path):
    """The trained adapter equals one on the stock model; checkpoints of the Trainer are complete."""
    trained = []
    for number, model in enumerate(
        (AutoModelForCausalLM.from_pretrained(folders("gemma3n")), load(folders("gemma3n")))
    ):
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        train(model, tmp_path / str(number))
        trained.append({key: value for key, value in model.named_parameters() if "lora_" in key})
    assert trained[0].keys() == trained[1].keys() and any(
        value.any() for key, value in trained[0].items() if "lora_B" in key
    )
    assert all(torch.equal(trained[0][key], trained[1][key]) for key in trained[0])


def test_trainer_with_a_frozen_table_saves_the_whole_model(folders, tmp_path):
    model = load(folders("gemma4"))
    train(model, tmp_path, save_strategy="steps", save_steps=2)
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", output_loading_info=True)
    assert not any(info.values()) and torch.equal(logits(saved), logits(model))
    assert not torch.equal(logits(saved), logits(AutoModelForCausalLM.from_pretrained(folders("gemma4"))))


def train(model, folder, **options) -> None:
    arguments = {"save_strategy": "no", **options}
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model, arguments, train_dataset=data).train()
    model.eval()


def test_gradient_of_a_table_in_files_is_refused(folders):
    model = load(folders("gemma3n"))
    table = model.get_submodule(GEMMA)
    for ask in (
        table.requires_grad_,
        table.weight.requires_grad_,
        lambda: setattr(table.weight, "requires_grad", True),
    ):
        with pytest.raises(
            EngramError, match=r"embed_tokens_per_layer.weight .* has no gradient; .*residency='resident'"
        ):
            ask()
    with pytest.raises(EngramError, match="has no gradient"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens_per_layer"]))
    model.requires_grad_(True)  # All other parameters have gradients.
    table.requires_grad_(False)


def test_table_access_other_than_by_ids_is_refused(folders):
    """Multiplying with the whole table, copying or resizing it raises an error at once."""
    table = load(folders("gemma3n")).get_submodule(GEMMA)
    assert (
        isinstance(table.weight, RowsById) and table.weight.shape == (200, 24) and table.weight.dtype == torch.bfloat16
    )
    assert torch.equal(table.weight[IDS], nn.functional.embedding(IDS, table.weight))
    for read in (
        lambda: nn.functional.linear(torch.ones(1, 24, dtype=torch.bfloat16), table.weight),
        lambda: table.weight[3:5],
        lambda: table.weight.data,
        lambda: table.weight.clone(),
        lambda: nn.functional.embedding(IDS, table.weight, max_norm=1.0),
        lambda: load(folders("gemma3n")).resize_token_embeddings(210),
    ):
        with pytest.raises(EngramError, match=r"is read by ids alone, but .* residency='resident'"):
            read()
    with pytest.raises(IndexError, match=r"has no row 200, only 0\.\.199"):
        table(torch.tensor([3, 200]))
    with pytest.raises(IndexError, match="has no row -1"):
        table(torch.tensor([-1]))


# --- tables that no known model type names


class Embedders(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedders = nn.ModuleList(nn.Embedding(50 + number, config.hidden_size) for number in range(3))


class LongCatNames(LlamaForCausalLM):
    """A model with tables under the names of LongCat-Flash-Lite."""

    def __init__(self, config):
        super().__init__(config)
        self.model.ngram_embeddings = Embedders(config)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        embedded = self.get_input_embeddings()(input_ids)
        for number, embedder in enumerate(self.model.ngram_embeddings.embedders):
            embedded = embedded + embedder((input_ids * 7 + input_ids.roll(1, -1)) % (50 + number))
        return super().forward(inputs_embeds=embedded, **kwargs)


@pytest.fixture(scope="module")
def longcat(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    folder = tmp_path_factory.mktemp("longcat")
    LongCatNames(config).save_pretrained(folder, max_shard_size=30_000)
    return folder


def test_table_names_of_longcat_and_a_model_class(longcat):
    stock, model = LongCatNames.from_pretrained(longcat), load_with_tables(LongCatNames, longcat)
    assert len(tables_of(model)) == 3 and len(list(longcat.glob("*.safetensors"))) > 2
    assert torch.equal(logits(model), logits(stock))


def test_tables_given_by_name(longcat):
    name = "model.ngram_embeddings.embedders.1"
    model = load_with_tables(LongCatNames, longcat, tables=[name, "model.embed_tokens"])
    assert set(tables_of(model)) == {name, "model.embed_tokens"}
    assert torch.equal(logits(model), logits(LongCatNames.from_pretrained(longcat)))
