"""Facts in rows are recalled, saved, combined and removed; texts that read none of the rows are unchanged."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_backbones import LAYER_IDS, build, tiny_tokenizer

from engram_hf import EngramForCausalLM
from engram_hf.training import forget_facts, scan_rows, write_facts
from engram_hf.training.fact_texts import choose_positions, parse_facts
from engram_hf.training.facts import facts_of, results_of

TOKENIZER = tiny_tokenizer()
FACTS = [{"prompt": f"word{i} word{i + 1} word{i + 2}", "target": f"word{i + 40} word{i + 3}"} for i in (0, 5, 10, 15)]
OTHER_TEXTS = ["word50 word49 word48 word47 word46", "word45 word0 word44 word1 word43"]
FLOAT8 = {"engram_table_dtype": "float8_e4m3fn", "engram_head_dim": 32}
INT2 = {"engram_table_dtype": "int2", "engram_head_dim": 32}


def write_both(*arguments, **options):
    """Write facts into both layers: one alone is too small in a model of random weights."""
    return write_facts(*arguments, **{"layers": LAYER_IDS, **options})


def make(name: str = "llama", **fields) -> EngramForCausalLM:
    # With many buckets, two n-grams seldom share a row.
    size = {"engram_compressed_vocab_size": 62, "engram_vocab_size": 9973, **fields}
    model = build(name, **size)
    model.set_token_map(TOKENIZER)
    return model


@pytest.fixture(scope="module")
def built() -> EngramForCausalLM:
    return make()


@pytest.fixture
def model(built) -> EngramForCausalLM:
    return copy.deepcopy(built)


@pytest.fixture(scope="module")
def written(built):
    """Return a model with facts, and the report; tests do not change it."""
    return write_both(copy.deepcopy(built), TOKENIZER, FACTS, protect=OTHER_TEXTS)


def logits(model, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENIZER(text)["input_ids"]])).logits


def answer(model, fact: dict) -> str:
    ids = torch.tensor([TOKENIZER(fact["prompt"])["input_ids"]])
    count = len(TOKENIZER(fact["target"])["input_ids"])
    tokens = model.eval().generate(input_ids=ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return TOKENIZER.decode(tokens[0, ids.shape[1] :])


def deltas(model) -> list[torch.Tensor]:
    return [parameter.detach() for name, parameter in model.named_parameters() if name.endswith(".delta")]


def test_facts_are_recalled_by_generate(built, written):
    model, report = written
    assert report.recall == 1.0
    assert [answer(model, fact) for fact in FACTS] == [fact["target"] for fact in FACTS]
    assert [answer(built, fact) for fact in FACTS] != [fact["target"] for fact in FACTS]
    with model.disable_adapter():
        assert torch.equal(logits(model, FACTS[0]["prompt"]), logits(built, FACTS[0]["prompt"]))


def test_report_agrees_with_the_model(built, written):
    model, report = written
    for fact, result in zip(FACTS, report.facts, strict=True):
        prompt, target = (TOKENIZER(fact[name])["input_ids"] for name in ("prompt", "target"))
        for tested, probability, rank in [
            (built, result.probability_before, result.rank_before),
            (model, result.probability_after, result.rank_after),
        ]:
            chances = logits(tested, f"{fact['prompt']} {fact['target']}")[0].softmax(-1)[len(prompt) - 1 : -1]
            right = chances[range(len(target)), target]
            assert probability == pytest.approx(right.prod().item(), rel=1e-3)
            assert rank == int((chances > right[:, None]).sum(1).max()) + 1
        assert result.rows == 2 * 2 * 2 and result.bytes == result.rows * (8 + 2 * 8)
    assert report.rows == sum(len(rows) for rows in model.peft_config["facts"].rows.values())
    assert json.loads(report.to_json())["facts"][0]["prompt"] == FACTS[0]["prompt"]
    lines = str(report).splitlines()
    assert lines[0].split()[0] == "fact" and "100% of 4 facts recalled" in str(report) and len(lines) >= 9


def test_only_the_largest_ngrams_of_the_predicting_positions_are_written(built, written):
    model, _ = written
    for fact in FACTS:
        ids = torch.tensor([TOKENIZER(f"{fact['prompt']} {fact['target']}")["input_ids"]])
        read = built.model.prepare_memory(ids).row_ids[:, 0]
        for index, (_, rows) in enumerate(model.peft_config["facts"].rows.items()):
            assert torch.isin(read[index, 2:4, 2:], rows).all()
            assert not torch.isin(read[index, :, :2], rows).any()


def test_protected_texts_keep_every_bit(built, written):
    model, report = written
    for text in OTHER_TEXTS:
        assert torch.equal(logits(model, text), logits(built, text))
    found = report.protected
    assert (found.texts, found.positions, found.reading, found.untouched_texts) == (2, 10, 0, 2)
    assert found.untouched_positions == 10 and found.changed_untouched == 0
    assert found.loss_before == found.loss_after and found.kl_by_distance == {}


def test_text_in_front_of_a_written_row_keeps_every_bit(built, written):
    model, _ = written
    text = f"word30 word31 word32 {FACTS[0]['prompt']} word33 word34 word35"
    before, after = logits(built, text), logits(model, text)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5], after[:, 5])


def test_write_facts_measures_texts_that_are_protected_in_part(model):
    texts = [f"{FACTS[0]['prompt']} word50 word51", *OTHER_TEXTS]
    _, report = write_both(model, TOKENIZER, FACTS, protect=texts, max_protected_reads=1, steps=20)
    found = report.protected
    assert found.reading == 1 and found.untouched_texts == 2 and found.changed_untouched == 0
    assert found.untouched_positions == 2 + 10
    assert list(found.kl_by_distance) == ["0", "1", "2-3"] and found.kl_by_distance["0"] > 0
    assert found.loss_before != found.loss_after


def test_fact_that_protected_texts_read_is_not_written(model):
    fact = FACTS[0]
    _, report = write_both(model, TOKENIZER, FACTS, protect=[f"{fact['prompt']} {fact['target']}"], steps=50)
    assert report.facts[0].rows == 0 and report.protected.reading == 0
    assert report.facts[0].probability_before == report.facts[0].probability_after
    assert any("Every row of fact 0 is read by the protected texts" in note for note in report.notes)
    assert [result.rank_after for result in report.facts[1:]] == [1, 1, 1]


def test_same_facts_give_the_same_rows(built, written):
    torch.manual_seed(123)
    again, _ = write_both(copy.deepcopy(built).train(), TOKENIZER, FACTS)
    assert all(map(torch.equal, deltas(again), deltas(written[0])))
    assert again.training


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, FLOAT8, INT2], ids=["float", "float8", "int2"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v4"])
def test_write_facts_on_other_backbones_and_mapped_tables(name, fields, tmp_path):
    make(name, **fields).save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, engram_residency="mapped")
    model, report = write_both(model, TOKENIZER, FACTS, protect=OTHER_TEXTS)
    assert report.recall == 1.0 and report.protected.changed_untouched == 0
    assert [answer(model, fact) for fact in FACTS] == [fact["target"] for fact in FACTS]


def test_adapter_with_facts_is_saved_loaded_and_forgotten(built, written, tmp_path):
    model, report = written
    built.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    folder = tmp_path / "adapter" / "facts"
    assert (folder / "adapter_model.safetensors").stat().st_size < report.bytes + 1000
    again = PeftModel.from_pretrained(
        EngramForCausalLM.from_pretrained(tmp_path / "base"), folder, adapter_name="mine"
    )
    assert [answer(again, fact) for fact in FACTS] == [fact["target"] for fact in FACTS]
    results = results_of(again, "mine")
    assert [result.rank_after for result in results] == [1] * 4 and [result.rows for result in results] == [8] * 4

    removed = forget_facts(again, "mine", [1, 3])
    assert removed == 16
    for index, fact in enumerate(FACTS):
        text = f"{fact['prompt']} {fact['target']}"
        assert torch.equal(logits(again, text), logits(built if index in (1, 3) else model, text))
    assert [fact.fact.prompt for fact in facts_of(again, "mine")] == [FACTS[0]["prompt"], FACTS[2]["prompt"]]

    again.save_pretrained(tmp_path / "less")
    less = PeftModel.from_pretrained(EngramForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "less" / "mine")
    for fact in FACTS:
        assert torch.equal(logits(less, fact["prompt"]), logits(again, fact["prompt"]))
    forget_facts(less, "default", [0, 1])
    less.save_pretrained(tmp_path / "none")
    none = PeftModel.from_pretrained(EngramForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "none")
    for fact in FACTS:
        assert torch.equal(logits(less, fact["prompt"]), logits(built, fact["prompt"]))
        assert torch.equal(logits(none, fact["prompt"]), logits(built, fact["prompt"]))


@pytest.mark.slow
def test_facts_of_two_users_that_share_rows_are_all_recalled():
    model = make(engram_vocab_size=7)
    for index, facts in enumerate([FACTS[:2], FACTS[2:]]):
        model, report = write_both(model, TOKENIZER, facts, name=f"user{index}", steps=100)
        assert report.recall == 1.0
    assert any("The adapter 'user0' writes" in note for note in report.notes)
    assert [answer(model, fact) for fact in FACTS] == [fact["target"] for fact in FACTS]


def test_earlier_fact_that_is_lost_is_named():
    model = make(engram_vocab_size=5)
    model, _ = write_both(model, TOKENIZER, FACTS[:2], name="first", steps=100)
    model, report = write_both(model, TOKENIZER, FACTS[2:], name="second", steps=2, learning_rate=30.0)
    lost = [f"{f['prompt']} → {f['target']}" for f in FACTS[:2] if answer(model, f) != f["target"]]
    named = [note for note in report.notes if "An earlier fact is no longer recalled" in note]
    assert lost and all(note.endswith(f"{fact}.") for note, fact in zip(named, lost, strict=True))


def test_new_target_of_a_prompt_replaces_that_of_an_earlier_adapter(model):
    first, second = ({"prompt": "word0 word1 word2", "target": f"word{i}"} for i in (40, 41))
    model, _ = write_both(model, TOKENIZER, [first], name="first", steps=40)
    model, report = write_both(model, TOKENIZER, [second], name="second", steps=40)
    assert report.recall == 1.0 and answer(model, second) == second["target"]


@pytest.mark.slow
def test_adapters_of_two_users_are_added_without_loss(model):
    users = [FACTS[:2], FACTS[2:]]
    for index, facts in enumerate(users):
        model, report = write_both(model, TOKENIZER, facts, name=f"user{index}")
        assert report.recall == 1.0 and report.notes == []
    assert model.base_model.active_adapters == ["user0", "user1"]
    assert [answer(model, fact) for fact in FACTS] == [fact["target"] for fact in FACTS]
    alone = copy.deepcopy(model)
    alone.delete_adapter("user1")
    both = [logits(model, fact["prompt"]) for fact in FACTS[:2]]
    assert all(torch.equal(logits(alone, fact["prompt"]), one) for fact, one in zip(FACTS[:2], both, strict=True))

    model.base_model.add_weighted_adapter(["user0", "user1"], [1.0, 1.0], "both")
    model.set_adapter("both")
    assert [answer(model, fact) for fact in FACTS] == [fact["target"] for fact in FACTS]
    assert len(facts_of(model, "both")) == 4
    forget_facts(model, "both", 2)
    assert answer(model, FACTS[2]) != FACTS[2]["target"] and answer(model, FACTS[3]) == FACTS[3]["target"]


def test_lora_stays_active_and_unchanged(model):
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    before = {name: parameter.detach().clone() for name, parameter in lora.named_parameters()}
    tuned = logits(lora, OTHER_TEXTS[0])
    adapted, report = write_both(lora, TOKENIZER, FACTS, protect=OTHER_TEXTS)
    assert report.recall == 1.0 and torch.equal(logits(adapted, OTHER_TEXTS[0]), tuned)
    assert all(torch.equal(parameter, before[name]) for name, parameter in lora.named_parameters() if name in before)
    assert all(parameter.grad is None for parameter in lora.parameters())


def test_only_the_first_layer_is_written_if_that_is_enough(built):
    """The first layer of a model of random weights recalls three of the four facts."""
    _, report = write_facts(copy.deepcopy(built), TOKENIZER, FACTS[1:])
    assert report.recall == 1.0 and report.layers == LAYER_IDS[:1]
    adapted, report = write_facts(copy.deepcopy(built), TOKENIZER, FACTS[:1], steps=30)
    assert report.layers == LAYER_IDS and list(adapted.peft_config) == ["facts"]


def test_write_facts_reads_the_fields_of_counterfact(model):
    facts = [{"subject": "word1 word2", "relation": "{} word3 word4", "target": {"str": "word5"}}]
    assert parse_facts(facts, TOKENIZER) == parse_facts(
        [{"prompt": "word1 word2 word3 word4", "target": "word5"}], TOKENIZER
    )
    _, report = write_both(model, TOKENIZER, facts, steps=30)
    assert report.facts[0].prompt == "word1 word2 word3 word4" and report.recall == 1.0


def test_prompts_that_end_alike_are_written_where_they_differ(model):
    facts = [{"prompt": f"word{i} word1 word2 word3", "target": f"word{i + 10}"} for i in (20, 30)]
    engram = model.model
    assert choose_positions(engram, parse_facts(facts, TOKENIZER), [1, 2], [3], {}) == [(2, 3), (2, 3)]
    _, report = write_both(model, TOKENIZER, facts, steps=100)
    assert report.recall == 1.0
    assert any("Facts 0 and 1 write 4 rows together, for different targets" in note for note in report.notes)
    assert [result.shared_rows for result in report.facts] == [4, 4]


def test_shared_rows_stay_until_the_last_fact_goes(model, library_log):
    facts = [{"prompt": f"word{i} word1 word2 word3", "target": f"word{i + 10}"} for i in (20, 30)]
    adapted, _ = write_both(model, TOKENIZER, facts, steps=10)
    assert forget_facts(adapted, "facts", 0) == 4
    assert "4 rows of the facts [0] are those of other facts in 'facts' too" in library_log[-1]
    assert forget_facts(adapted, "facts", 0) == 8


def test_conflicts_are_reported(model, capsys):
    facts = [
        {"prompt": "word1", "target": "word2"},
        {"prompt": "word5 word6 word7", "target": "word8"},
        {"prompt": "Word5 word6 word7", "target": "word9"},
        {"prompt": "Word5 Word6 word7", "target": "Word8"},
    ]
    adapted, report = write_both(model, TOKENIZER, facts, steps=2)
    assert "Writing 4 facts: 100%" in capsys.readouterr().err  # the progress bar
    said = "\n".join(report.notes)
    assert "The prompt of fact 0 is shorter than 3 tokens" in said
    assert "prompts of facts 1 and 2 differ only in what the compressed vocabulary leaves out" in said
    assert "texts of facts 1 and 3 differ only in what the compressed vocabulary leaves out" in said
    assert "is not recalled" in said
    _, report = write_both(adapted, TOKENIZER, facts[1:2], name="second", steps=2)
    assert any("The adapter 'facts' writes 4 of these rows too" in note for note in report.notes)


def test_closed_gate_is_reported(model):
    with torch.no_grad():
        for memory in model.model.memories().values():
            memory.q_norm.weight.fill_(60.0)
            memory.k_norm.weight.fill_(-60.0)
            half = memory.kv_proj.weight.shape[0] // 2
            memory.kv_proj.weight[:half].zero_()
            memory.kv_proj.bias[:half] = 1.0
            memory.kv_proj.weight[half:] *= 1e-4
    for memory in model.model.memories().values():
        memory.gate.forward = lambda dot, valid=None: torch.full_like(dot, 0.01)
    _, report = write_both(model, TOKENIZER, FACTS, steps=3)
    assert any("the gate opens 1% at most there" in note for note in report.notes)


BAD_FACTS = {
    "There are no facts": [],
    "The facts are one str": "word1 word2",
    "The facts are one dict": {"prompt": "word1", "target": "word2"},
    "Fact 1 is a str": [FACTS[0], "word1"],
    "Fact 0 has no prompt": [{"target": "word2"}],
    "Fact 1 has no target": [FACTS[0], {"prompt": "word1"}],
    "Fact 0 has no target": [{"prompt": "word1", "target": " "}],
    "Fact 0 has a relation but no subject": [{"relation": "{} word1", "target": "word2"}],
    "Facts 0 and 1 are the same": [FACTS[0], FACTS[0]],
    "Facts 0 and 1 give one prompt two targets": [FACTS[0], {**FACTS[0], "target": "word9"}],
}


@pytest.mark.parametrize("said", BAD_FACTS)
def test_bad_facts_are_one_sentence_and_change_nothing(model, said):
    with pytest.raises(ValueError, match=said):
        write_both(model, TOKENIZER, BAD_FACTS[said])
    assert not hasattr(model, "peft_config") and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
        ({"layers": [0]}, "Layer 0 has no Engram memory"),
        ({"orders": [7]}, r"orders is \[7\]"),
        ({"protect": []}, "no tokens in the data"),
        ({"protect": "word1"}, "The data is one str"),
        ({"protect": [f"{fact['prompt']} {fact['target']}" for fact in FACTS]}, "Every row of these facts is read by"),
    ],
)
def test_bad_arguments_are_one_sentence(model, fields, said):
    with pytest.raises(ValueError, match=said):
        write_both(model, TOKENIZER, FACTS, **fields)
    assert not hasattr(model, "peft_config")


def test_target_without_tokens_is_refused(model, monkeypatch):
    monkeypatch.setattr("engram_hf.training.fact_texts._tokenize", lambda tokenizer, prompt, target: ((1,), ()))
    with pytest.raises(ValueError, match="The target of fact 0 has no tokens"):
        write_both(model, TOKENIZER, FACTS)


def test_memory_that_contributes_nothing_cannot_learn(model):
    for memory in model.model.memories().values():
        memory.zero_value_projection()
    before = logits(model, FACTS[0]["prompt"])
    with pytest.raises(ValueError, match="its value projection is zero"):
        write_both(model, TOKENIZER, FACTS)
    assert torch.equal(logits(model, FACTS[0]["prompt"]), before)
    assert all(type(memory.table).__name__ == "EngramTable" for memory in model.model.memories().values())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_interrupted_write_keeps_earlier_adapters(written, monkeypatch):
    model = copy.deepcopy(written[0])
    before = logits(model, FACTS[0]["prompt"])

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("engram_hf.training.facts._train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_both(model, TOKENIZER, [{"prompt": "word50 word51", "target": "word52"}], name="new")
    assert list(model.peft_config) == ["facts"] and torch.equal(logits(model, FACTS[0]["prompt"]), before)


def test_forgetting_missing_facts_is_refused(written, model):
    adapted = written[0]
    for which in (4, -1, [0, 9], [], [True]):
        with pytest.raises(ValueError, match="it has facts 0 to 3"):
            forget_facts(adapted, "facts", which)
    with pytest.raises(ValueError, match="no adapter 'other' with facts"):
        forget_facts(adapted, "other", 0)
    with pytest.raises(ValueError, match="no adapter 'facts' with facts"):
        forget_facts(model, "facts", 0)
    with pytest.raises(ValueError, match="has an adapter 'facts' already"):
        write_both(adapted, TOKENIZER, FACTS)
    with pytest.raises(ValueError, match="has no head"):
        write_both(model.model, TOKENIZER, FACTS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda fact: fact.pop("positions"),
        lambda fact: fact.update(positions=[10**6]),
        lambda fact: fact.update(prompt_ids=[]),
        lambda fact: fact.update(target_ids=["word"]),
        lambda fact: fact.update(orders=3),
    ],
)
def test_damaged_facts_are_refused(written, damage):
    model = copy.deepcopy(written[0])
    damage(model.peft_config["facts"].facts[0])
    with pytest.raises(ValueError, match=r"facts in adapter_config\.json are damaged"):
        forget_facts(model, "facts", 0)


def test_another_tokenizer_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="pass the model's own tokenizer"):
        write_both(model, tokenizer, FACTS)


def test_scan_finds_the_rows_of_facts(written):
    """The adapter holds the rows that `scan_rows` finds for the facts."""
    model = written[0]
    texts = [f"{fact['prompt']} {fact['target']}" for fact in FACTS]
    read = scan_rows(texts, TOKENIZER, model, orders=[3])
    for layer, rows in model.peft_config["facts"].rows.items():
        assert torch.isin(rows, read[layer]).all()
