"""The quickstart: its complete command line at a tiny size, and the fairness of its comparison."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


def python(*arguments, cwd: Path) -> str:
    """Return the standard output of a fresh Python."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=OFFLINE, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, str]:
    """Return the folder and output of a quick run that starts over the remains of an interrupted one."""
    folder = tmp_path_factory.mktemp("quickstart")
    left = folder / "out" / "model"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{")
    (left / "model.safetensors").write_text("half a fi")
    (folder / "out" / "gates.png").write_text("")
    return folder / "out", python(EXAMPLES / "quickstart.py", "--quick", "--output", "out", "--steps", 2, cwd=folder)


def printed_row(text: str, label: str) -> list[float]:
    (line,) = (line for line in text.splitlines() if label in line)
    return [float(cell.strip().rstrip("%").replace(",", "")) for cell in line.split("│")[2:-1]]


def test_quickstart_prints_the_comparison(quick):
    _, text = quick
    without, with_memory, difference = printed_row(text, "held-out loss")
    assert 4 < with_memory < 7 and 4 < without < 7
    assert difference == pytest.approx(with_memory - without, abs=1e-4)
    assert printed_row(text, "tokens trained on") == [512, 512, 0]
    assert abs(printed_row(text, "active parameters")[2]) < 1
    assert printed_row(text, "all parameters")[1] > printed_row(text, "all parameters")[0]
    assert re.search(r"512 token ids -> \d+ compressed ids", text)


def test_quickstart_prints_the_output_of_a_fresh_process(quick):
    _, text = quick
    prompt = "class Reader:\n    def __init__(self, stream, encoding=None):\n        self."
    start = text.index(prompt) + len(prompt)
    assert text[start : text.index("4. Which tokens")].strip()


def test_quickstart_saves_the_files_it_lists(quick):
    folder, text = quick
    for name in ("model", "gates.png"):
        assert str(Path("out", name)) in text
    assert (folder / "gates.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(folder / "model" / "model.safetensors", "pt") as weights:
        tables = [key for key in weights.keys() if key.endswith("engram.table.weight")]  # noqa: SIM118 (not a dict)
    assert len(tables) == 2
    assert re.search(r"elapsed +\d+\.\d s", text)


def test_quickstart_draws_a_gate_for_every_token(quick):
    _, text = quick
    for layer in (1, 2):
        start = text.index(f"layer {layer}")
        tokens, bars, widest = (line[9:].rstrip() for line in text[start:].splitlines()[:3])
        assert tokens.replace(" ", "").replace("·", " ") == "for name, value in self.__dict__.items():"
        assert bars and set(bars) <= set(" ▁▂▃▄▅▆▇█") and len(bars) <= len(tokens)
        assert all(0 < float(gate) < 1 for gate in re.findall(r"\d\.\d\d", widest))


def test_quickstart_help_imports_no_torch(tmp_path):
    program = (
        "import runpy, sys; sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_path({str(EXAMPLES / 'quickstart.py')!r}, run_name='__main__')\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    assert "--quick" in python("-c", program, cwd=tmp_path)


def test_quickstart_refuses_a_run_without_steps(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py", "--steps", "0"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "at least one step" in done.stderr


@pytest.fixture(scope="module")
def twin_models():
    sys.path.insert(0, str(EXAMPLES))
    import stdlib_text
    import twin_models

    yield twin_models, stdlib_text
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def sources(twin_models):
    return twin_models[1].read_sources()


def test_twins_have_the_same_backbone_parameters(twin_models, sources):
    models, text = twin_models
    size = models.Size()
    tokenizer = text.train_tokenizer(sources[0][:60], size.vocab_size)
    assert len(tokenizer) == size.vocab_size
    model = models.build_with_memory(size, tokenizer, seed=0)
    twin = models.build_twin(size, tokenizer, 0, models.count_parameters(model)[0])
    assert models.count_parameters(twin)[0] == pytest.approx(models.count_parameters(model)[0], rel=0.01)
    bare = replace(size, rows=size.rows // 2)
    assert (
        models.count_parameters(models.build_with_memory(bare, tokenizer, 0))[0] == models.count_parameters(model)[0]
    )


def test_twins_see_the_same_data(twin_models, sources, tmp_path):
    models, text = twin_models
    size = models.QUICK

    class Recorded(list):
        def __init__(self, blocks):
            super().__init__(blocks)
            self.asked = []

        def __getitem__(self, index):
            self.asked.append(index)
            return super().__getitem__(index)

    tokenizer = text.train_tokenizer(sources[0][:10], size.vocab_size)
    blocks = text.token_blocks(tokenizer, sources[0][:10], size.block, seed=0)
    orders = []
    for model in (models.build_with_memory(size, tokenizer, 0), models.build_twin(size, tokenizer, 0, 120_000)):
        train = Recorded(blocks)
        models.train(model, "", size, {"train": train, "held_out": blocks[:4]}, tmp_path, seed=0)
        orders.append(train.asked)
    assert orders[0] == orders[1] and len(set(orders[0])) >= size.steps * size.batch


def test_blocks_are_a_seeded_permutation_of_the_text(twin_models, sources):
    _, text = twin_models
    tokenizer = text.train_tokenizer(sources[0][:10], 300)
    first, same, other = (text.token_blocks(tokenizer, sources[0][:10], 16, seed) for seed in (0, 0, 1))
    assert [b["input_ids"].tolist() for b in first] == [b["input_ids"].tolist() for b in same]
    assert [b["input_ids"].tolist() for b in first] != [b["input_ids"].tolist() for b in other]
    whole = "".join(t + text.END_OF_TEXT for t in sources[0][:10])
    assert all(tokenizer.decode(b["input_ids"]) in whole for b in first[:5])


def test_held_out_files_are_not_trained_on(sources):
    train, held_out = sources
    assert len(train) > 5 * len(held_out) > 0
    # Only empty packages of the standard library repeat each other.
    assert not {text for text in train if len(text) > 500} & set(held_out)
