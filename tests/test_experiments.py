"""The experiments: their plan, the fairness of comparisons, runs that resume after an interruption, and the report."""

import json
import math
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import engram_hf
from engram_hf import EngramError

sys.path.append(str(Path(engram_hf.__file__).parent))
from experiments import __main__ as command
from experiments import long_context, models, tasks, training
from experiments.corpus import load_corpus, split
from experiments.learned_addresses import LearnedAddresses
from experiments.plan import EXPERIMENTS, Run, make_plan, select
from experiments.presets import PRESETS
from experiments.report import Found, write_report
from experiments.results import Results, held, interval
from experiments.running import Runner

pytestmark = pytest.mark.any_version

ROOT = Path(engram_hf.__file__).parent
TINY = replace(
    PRESETS["quick"],
    vocab_size=700,
    hidden_size=32,
    layers=2,
    memory_layers=(0, 1),
    memory_heads=2,
    rows=1200,
    block=32,
    batch=2,
    steps=4,
    test_windows=6,
    task_items=4,
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Write a folder of small programs."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    names = [f"{a}_{b}" for a in ("read", "write", "close") for b in ("table", "row", "page", "index")]
    words = ["".join(draw.choice(part) for part in ("bdfgkl", "aeiou", "mnprst", "aeiou")) for _ in range(90)]
    for number in range(80):
        lines = ["import struct\n"]
        for _ in range(12):
            lines.append(f"def {draw.choice(names)}(self, limit=10{draw.randrange(4)}):\n")
            lines.append(f"    # {' '.join(draw.sample(words, 8))}\n")
            lines.append(f"    return struct.{draw.choice(words)}({draw.choice(names)}(self.only_{number}_here))\n")
        (folder / f"{number}.py").write_text("".join(lines))
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe" * 100)  # This file is not text.
    return folder


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):
    return load_corpus(TINY, tmp_path_factory.mktemp("work"), texts)


def make_runner(corpus, folder: Path) -> Runner:
    results = Results(folder / "results")
    results.require_writable()
    return Runner(TINY, corpus, results, folder / "work")


# --- plan


@pytest.mark.parametrize("preset", PRESETS)
def test_make_plan_orders_a_run_after_those_it_needs(preset):
    plan = make_plan(PRESETS[preset])
    before: set[str] = set()
    for run in plan:
        assert set(run.needs) <= before
        before.add(run.name)
    assert len(before) == len(plan)
    assert {number for run in plan for number in run.experiments} == set(EXPERIMENTS)


def test_make_plan_adds_the_runs_an_experiment_needs():
    plan = make_plan(PRESETS["standard"])
    chosen = {run.name for run in select(plan, 4)}
    assert {"text_memory_seed-0", "text_twin_seed-0", "tuning_twin_rate-3"} < chosen
    assert not any("share" in name for name in chosen)
    with pytest.raises(EngramError, match=r"no experiment 7; they are 1, 2, 3, 4, 5, 6"):
        select(plan, 7)


def test_make_plan_tunes_both_sides_with_the_same_budget():
    plan = make_plan(PRESETS["standard"])
    tuned = {(run.variant, run.rate, run.seed) for run in plan if run.kind == "tuning"}
    seeds = {run.seed for run in plan if run.kind != "tuning"}
    for sides in (("memory", "twin"), ("share 0", "share 20")):
        assert len({frozenset((rate, seed) for name, rate, seed in tuned if name == side) for side in sides}) == 1
    assert not {seed for *_, seed in tuned} & seeds


# --- text


def test_split_parts_do_not_overlap(corpus):
    parts = [set(some) for some in corpus.parts.values()]
    assert all(parts) and not any(a & b for a in parts for b in parts if a is not b)


def test_too_few_texts_are_refused():
    with pytest.raises(EngramError, match="none fell into validation, test; every twentieth file"):
        split(iter([("23", "some text " * 30)]))


def test_paired_runs_see_the_same_blocks_and_every_pass_reorders_them(corpus):
    count = len(corpus.tokens)
    blocks = corpus.train_blocks(3, 2 * count)
    assert torch.equal(blocks, corpus.train_blocks(3, 2 * count))
    assert not torch.equal(blocks[:count], blocks[count:])
    assert sorted(blocks[:count].tolist()) == sorted(blocks[count:].tolist()) == sorted(corpus.tokens.tolist())


def test_frequencies_count_only_the_blocks_that_a_run_read(corpus):
    model = models.build("memory", TINY, corpus.tokenizer, 0)
    classes = corpus.frequencies(model, 0, 5)
    read = model.model.hashing.compress(corpus.train_blocks(0, 5)).tolist()
    threes = [tuple(row[at : at + 3]) for row in read for at in range(len(row) - 2)]
    test = model.model.hashing.compress(corpus.test.input_ids).tolist()
    for row, column in ((0, 2), (0, 9), (1, 5), (2, 20)):
        count = threes.count(tuple(test[row][column - 2 : column + 1]))
        assert classes[row, column] == sum(count >= first for first in (1, 4, 16, 64))
    assert (classes[:, :2] == -1).all()


# --- models


def test_twin_models_have_equal_parameter_counts(corpus):
    size = {
        name: models.size_of(models.build(name, TINY, corpus.tokenizer, 0), TINY.block)
        for name in ("memory", "twin", "twin of all parameters")
    }
    step = 3 * TINY.hidden_size * TINY.layers  # The difference is at most one more channel in every MLP.
    assert abs(size["twin"]["active"] - size["memory"]["active"]) <= step
    assert abs(size["twin"]["flops"] / size["memory"]["flops"] - 1) < 0.02
    assert abs(size["twin of all parameters"]["total"] - size["memory"]["total"]) <= step


def test_memory_shares_keep_active_and_total_parameters(corpus):
    sizes = [
        models.size_of(models.build(f"share {share}", TINY, corpus.tokenizer, 0), TINY.block) for share in (0, 20, 60)
    ]
    for key, tolerance in (("active", 0.01), ("total", 0.02), ("flops", 0.03)):
        assert max(size[key] for size in sizes) / min(size[key] for size in sizes) < 1 + tolerance


@pytest.mark.parametrize("variant", models.MEMORIES)
def test_variants_are_causal_and_learn(variant, corpus):
    model = models.build(variant, TINY, corpus.tokenizer, 0).eval()
    ids = corpus.train_blocks(0, 2)
    if variant == "shuffled rows":  # This variant reads rows of any position by design.
        return
    changed = torch.cat([ids[:, :20], ids[:, 20:].flip(1)], dim=1)
    logits = [model(input_ids=some, use_cache=False).logits[:, :20] for some in (ids, changed)]
    torch.testing.assert_close(*logits)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    tables = [memory.table.weight.grad for memory in model.model.memories().values()]
    assert all(grad.abs().sum() > 0 for grad in tables)
    if variant == "one row":
        rows = {int(row) for row in tables[0].abs().sum(1).nonzero()}
        offsets = model.model.hashing.primes[0].flatten().cumsum(0)[:-1].tolist()
        assert rows == {0, *offsets}


def test_open_gate_adds_the_value_itself(corpus):
    model = models.build("plain addition", TINY, corpus.tokenizer, 0)
    memory = model.model.memories()[0]
    inputs = model.model.prepare_memory(corpus.train_blocks(0, 1))
    states = torch.randn(1, TINY.block, TINY.hidden_size)
    rows = memory.table(inputs.row_ids[0])
    expected = states + memory.kv_proj(rows)[..., TINY.hidden_size :]
    torch.testing.assert_close(memory(states, inputs), expected)


def test_learned_addresses_stay_in_their_head_and_learn(corpus):
    model = models.build("learned addresses", TINY, corpus.tokenizer, 0)
    addresses: LearnedAddresses = model.addresses
    ids = corpus.train_blocks(0, 2)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(code.weight.grad.abs().sum() > 0 for code in addresses.codes)
    assert all(key.grad.abs().sum() > 0 for key in addresses.keys)
    for index in range(2):
        for order in range(2):
            rows, weights = addresses.addresses(index, order)
            assert rows.shape == (2, TINY.block, TINY.memory_heads, 4) and rows.min() >= 0
            assert (rows.amax((0, 1, 3)) < model.model.hashing.primes[index, order]).all()
            torch.testing.assert_close(weights.sum(-1), torch.ones(rows.shape[:-1]))


# --- tasks


@pytest.fixture(scope="module")
def items(corpus):
    return tasks.make_tasks(corpus.parts["train"], corpus.parts["test"], corpus.tokenizer, 8)


def test_task_targets_follow_their_contexts_and_are_new_or_copied(items, corpus):
    assert set(items) == {*tasks.NEED_RECALL, *tasks.NEED_NONE}
    test, train = ("\n".join(corpus.parts[part]) for part in ("test", "train"))
    for name in ("api_calls", "copied_names", "closing_brackets"):
        assert items[name]
        for item in items[name]:
            assert item.context + item.target in test and item.target and not item.context[-1].isspace()
    for item in items["copied_names"]:
        name = re.search(r"\w*$", item.context)[0] + item.target
        assert name in item.context and name not in train


def test_exact_match_equals_greedy_decoding(items, corpus):
    model = models.build("memory", TINY, corpus.tokenizer, 0).eval()
    tokenizer, some = corpus.tokenizer, items["closing_brackets"][:3]
    context = tokenizer(some[0].context, return_tensors="pt")
    written = model.generate(**context, max_new_tokens=2, min_new_tokens=2, do_sample=False)[0, -2:]
    right = tasks.Item(some[0].context, tokenizer.decode(written))
    if tokenizer(right.context + right.target)["input_ids"][-2:] != written.tolist():
        pytest.skip("what it writes tokenizes otherwise")
    assert tasks.exact_match(model, tokenizer, [right]) == 1
    assert tasks.exact_match(model, tokenizer, [right, *(tasks.Item(one.context, "?!?") for one in some)]) == 0.25


@pytest.mark.slow
def test_our_scores_equal_lm_evals(items, corpus, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = models.build("memory", TINY, corpus.tokenizer, 0)
    blocks = corpus.train_blocks(0, 80)
    examples = [{"input_ids": block, "labels": block} for block in blocks]
    training.train(model, examples, folder=tmp_path / "run", batch=2, rate=1e-2, seed=0)
    model.eval().save_pretrained(tmp_path / "model")
    corpus.tokenizer.save_pretrained(tmp_path / "model")
    names = tasks.write_lm_eval_tasks({name: some for name, some in items.items() if some}, tmp_path / "tasks")
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(tmp_path / "model"), trust_remote_code=True, device="cpu", batch_size=4),
        tasks=names,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks")),
    )["results"]
    ours = {name: tasks.exact_match(model, corpus.tokenizer, items[name.removeprefix("engram_")]) for name in names}
    assert {name: found[name]["acc,none"] for name in names} == pytest.approx(ours)
    assert any(ours.values())


@pytest.mark.parametrize("task", long_context.TASKS)
def test_long_context_answers_lie_in_the_window(task, corpus):
    tokens = corpus.tokens.flatten()
    maker = long_context.Maker(corpus.tokenizer, tokens[: len(tokens) // 256 * 256].view(-1, 256), 0)
    for _ in range(5):
        window, answers = maker.example(task)
        assert len(window) == 256
        for at in answers:
            assert window[at] in window[:at]
    labels = [example["labels"] for example in long_context.training_examples(maker, 6)]
    assert (labels[0] >= 0).all() and 3 <= int((labels[5] >= 0).sum()) <= 4


# --- runs


def test_interrupted_run_resumes_and_gives_the_same_result(corpus, tmp_path):
    blocks = [{"input_ids": block, "labels": block} for block in corpus.train_blocks(0, 8)]
    trained = []
    for name in ("whole", "parts"):
        model = models.build("memory", TINY, corpus.tokenizer, 0)
        options = {"folder": tmp_path / name, "batch": 2, "rate": 1e-2, "seed": 0}
        if name == "parts":
            with pytest.raises(training.Interrupted):
                training.train(model, blocks, **options, deadline=time.monotonic() - 1)
            model = models.build("memory", TINY, corpus.tokenizer, 0)
        spent = training.train(model, blocks, **options)
        assert spent["processor"] > 0
        trained.append(model.state_dict())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=0, atol=0)


def test_runner_skips_finished_runs(corpus, tmp_path):
    runner = make_runner(corpus, tmp_path)
    runs = [Run("tuning", side, 100, (2,), rate=rate) for side in ("memory", "twin") for rate in (0, 1)]
    runner.do_all(runs[:2])
    done = {run.name: runner.results.path(run.name).stat().st_mtime_ns for run in runs[:2]}
    with pytest.raises(EngramError, match="learning rate of 'twin' is not chosen yet"):
        runner.best_rate("twin of equal time")
    runner.do_all(runs)
    assert {name: runner.results.path(name).stat().st_mtime_ns for name in done} == done
    assert runner.best_rate("gate open") in TINY.rates
    result = runner.results.read(runs[0].name)
    assert result["tokens"] == 2 * TINY.batch * TINY.block
    assert not re.search(r"/(tmp|root|home|work)\b", json.dumps(result))
    assert not list((tmp_path / "work" / "checkpoints").iterdir())

    # The test needs a run with its measurements, and the page made from it.
    main = Run("text", "memory", 0, (2,))
    runner.do(main)
    result = runner.results.read(main.name)
    assert result["loss"] == pytest.approx(result["worth"]["loss"], abs=1e-4)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- fair -->\nold\n<!-- end -->\n<!-- experts -->\nold\n<!-- end -->\nafter\n")
    summary = write_report("tiny", TINY, [*runs, main], runner.results, page)
    text = page.read_text()
    assert summary.startswith("5 of 5 runs are in") and text.startswith("before\n") and text.endswith("after\n")
    assert f"{result['loss']:.4f} (one seed)" in text and "No run of this is in yet." in text and "old" not in text


def test_runner_leaves_a_run_to_the_process_that_has_it(corpus, tmp_path):
    runner, run = make_runner(corpus, tmp_path), Run("tuning", "twin", 100, (2,), rate=0)
    with held(runner.work / "locks" / run.name) as is_ours:
        assert is_ours
        runner.do_all([run, replace(run, rate=1, needs=(run.name,))])
    assert not list(runner.results.folder.glob("*.json"))


def test_results_of_other_texts_are_not_mixed_in(corpus, tmp_path):
    runner, run = make_runner(corpus, tmp_path), Run("tuning", "twin", 100, (2,), rate=0)
    runner.results.write(run.name, {"provenance": {"corpus": "another"}})
    with pytest.raises(EngramError, match=f"measured on other texts .another, now {corpus.digest}"):
        runner.do_all([run])


def test_runner_stops_when_the_time_is_up_before_a_run(corpus, tmp_path):
    runner = make_runner(corpus, tmp_path)
    runner.deadline = time.monotonic() - 1
    with pytest.raises(training.Interrupted):
        runner.do_all([Run("tuning", "twin", 100, (2,), rate=0)])


# --- results


def test_intervals_use_students_distribution():
    found = interval([1.0, 2.0, 3.0])
    assert found.value == 2 and found.high == pytest.approx(2 + 4.303 / math.sqrt(3))
    assert interval([1.0]).low is None


def test_differences_are_paired_by_seed(tmp_path):
    results, plan = Results(tmp_path), []
    for variant, losses in (("memory", {0: 1.0, 1: 5.0, 2: 7.0}), ("twin", {0: 1.5, 1: 5.5, 3: 0.0})):
        for seed, loss in losses.items():
            plan.append(Run("text", variant, seed, (2,)))
            results.write(plan[-1].name, {"loss": loss})
    found = Found(plan, results).difference("twin", "memory", lambda one: one["loss"])
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    assert Found(plan, results).difference("one row", "memory", lambda one: one["loss"]) is None


@pytest.mark.parametrize("arguments", [["run"], ["report"]])
def test_results_that_cannot_be_written_are_refused(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    page = tmp_path / "page.md"
    page.write_text("<!-- state -->\n<!-- end -->\n")
    more = ["--page", str(page)] if arguments == ["report"] else []
    assert command.main([*arguments, *more, "--preset", "quick", "--results", str(tmp_path / "file")]) == 1
    assert "cannot be written to" in capsys.readouterr().err


def test_damaged_result_and_page_without_markers_are_refused(tmp_path, capsys):
    results = Results(tmp_path / "quick")
    results.require_writable()
    (tmp_path / "page.md").write_text("nothing\n")
    arguments = ["report", "--preset", "quick", "--results", str(tmp_path), "--page", str(tmp_path / "page.md")]
    assert command.main(arguments) == 1
    assert "has no marker for a table" in capsys.readouterr().err
    results.path("tuning_memory_rate-0").write_text('{"loss"')
    with pytest.raises(EngramError, match="is no JSON; delete it"):
        results.read("tuning_memory_rate-0")


def test_page_has_a_marker_for_every_table(tmp_path):
    page = tmp_path / "evidence.md"
    page.write_text((ROOT / "docs" / "evidence.md").read_text())
    plan = make_plan(PRESETS["quick"])
    assert write_report("quick", PRESETS["quick"], plan, Results(tmp_path / "none"), page).startswith("0 of 56 runs")
    assert page.read_text().count("No run of this is in yet.") == 11
