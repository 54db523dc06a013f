"""SIGKILL at random moments: after the next run, each folder is byte for byte equal to one of an uninterrupted run.

    python tests/faults/kills.py --count 100 [--seed N] [convert export quantize save facts]

Every process is a fork that is killed at a random moment within the time of a complete run; a third of the kills hit a
run that resumes a killed one. The script prints one line of figures for each command, and ends with 1 if one of them
failed.
"""

import argparse
import multiprocessing
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from engram_cli.main import main as engram
from trial_models import answer, contents, load, save_folders, write_facts

from engram_hf.claiming_engram import is_hidden_file
from engram_hf.convert_scripts import convert_deepseek_v41, export_deepseek_v41
from engram_hf.training import EngramRowsConfig

GOLDEN = Path(__file__).parent.parent / "golden" / "deepseek_v41_tiny"
FORK = multiprocessing.get_context("fork")


def start(action: Callable[[Path], object], target: Path) -> multiprocessing.Process:
    """Run an action on a folder in a separate process, without its output."""

    def run():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
        sys.exit(action(target) or 0)

    process = FORK.Process(target=run)
    process.start()
    return process


def run_whole(action: Callable[[Path], object], target: Path) -> float:
    """Return the seconds that an uninterrupted run takes."""
    begin = time.perf_counter()
    process = start(action, target)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"A run that nothing killed ended with {process.exitcode}.")
    return time.perf_counter() - begin


def trial(
    action: Callable[[Path], object],
    prepare: Callable[[Path], object],
    is_allowed: Callable[[Path], bool],
    home: Path,
    count: int,
    draw: random.Random,
) -> Counter:
    """Kill `count` runs of an action.

    Args:
        prepare: makes the folder that a run begins with.
        is_allowed: returns whether a killed run may leave these files.

    Returns:
        How many runs were killed, how many ended before, and how many left a wrong folder.
    """
    whole, target, seen = home / "whole", home / "target", Counter()
    prepare(whole)
    span = run_whole(action, whole)
    expected = contents(whole)
    while seen["killed"] < count:
        shutil.rmtree(target, ignore_errors=True)
        prepare(target)
        for _ in range(1 + (draw.random() < 1 / 3)):
            process = start(action, target)
            time.sleep(draw.uniform(0, span))
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            seen["killed" if process.exitcode == -signal.SIGKILL else "ended before"] += 1
            seen["left something wrong"] += not is_allowed(target)
        run_whole(action, target)
        found = contents(target)
        if found != expected:
            seen["differ after the next run"] += 1
            names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            print(f"differ after the next run: {', '.join(names)}")
    return seen


def trials(home: Path) -> dict[str, tuple]:
    """Return the action, preparation and check of every command."""
    source, converted = home / "source", home / "converted"
    shutil.copytree(GOLDEN, source, ignore=shutil.ignore_patterns("golden.safetensors"))
    convert_deepseek_v41.main([str(source), str(converted)])
    folders = save_folders(home / "models")
    answers = [answer(load(folders[f"{name} plain"])) for name in ("old", "new")]
    new = load(folders["new files"], "mapped")

    def nothing(target: Path) -> None:
        """Do nothing: each of these commands makes its folder."""

    def is_old_or_new(target: Path) -> bool:
        try:
            found = answer(load(target))
        except ValueError as error:
            return "was killed while its files were put in place" in str(error)
        return any(torch.equal(found, one) for one in answers)

    def begun_exchange(target: Path) -> bool:
        return (target / "engram_tables.json").exists() or any(target.glob(".engram-exchange-*"))

    def is_no_model(target: Path) -> bool:
        return not (target / "config.json").exists() or begun_exchange(target)

    def quantize(target: Path) -> int:
        if begun_exchange(target):  # With this file the command accepts the folder as a model's.
            if not any(target.glob(".engram-*")):
                return 0
            shutil.rmtree(target)
        return engram(["quantize", str(folders["old files"]), str(target)])

    def demo(target: Path) -> int:
        return 0 if target.exists() else engram(["demo", str(target)])

    demo(home / "demo")
    whole_demo = contents(home / "demo")

    adapters = [home / f"adapter about {word}" for word in ("w5", "w6")]
    for adapter, word in zip(adapters, ("w5", "w6"), strict=True):
        write_facts(folders["old files"], adapter, word)
    known = [contents(adapter) for adapter in adapters]

    def is_old_or_new_adapter(target: Path) -> bool:
        try:
            EngramRowsConfig.from_pretrained(target)
        except ValueError as error:
            return "was killed while its files were put in place" in str(error)
        return {
            name: data for name, data in contents(target).items() if not is_hidden_file(name.split("/")[0])
        } in known

    return {
        "convert": (lambda t: convert_deepseek_v41.main([str(source), str(t)]), nothing, lambda target: True),
        "export": (lambda t: export_deepseek_v41.main([str(converted), str(t)]), nothing, lambda target: True),
        "quantize": (quantize, nothing, is_no_model),
        "demo": (demo, nothing, lambda target: not target.exists() or contents(target) == whole_demo),
        "save": (new.save_pretrained, lambda t: shutil.copytree(folders["old files"], t), is_old_or_new),
        "facts": (
            lambda t: write_facts(folders["old files"], t, "w6"),
            lambda t: shutil.copytree(adapters[0], t),
            is_old_or_new_adapter,
        ),
    }


def main() -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", help="convert, export, quantize, demo, save, facts (default: all)")
    parser.add_argument("--count", type=int, default=100, help="kills of each command")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    failed = False
    with tempfile.TemporaryDirectory() as home:
        found = trials(Path(home))
        for name in given.commands or found:
            folder = Path(home, f"of {name}")
            folder.mkdir()
            begin = time.perf_counter()
            seen = trial(*found[name], folder, given.count, random.Random(f"{given.seed} {name}"))
            failed |= bool(seen["left something wrong"] or seen["differ after the next run"])
            figures = ", ".join(f"{count} {what}" for what, count in seen.items())
            print(f"kills of {name}: seed {given.seed}, {figures}, {time.perf_counter() - begin:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
