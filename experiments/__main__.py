"""Run the experiments of docs/evidence.md: whether memory helps, where, and why.

python -m experiments run [--preset quick] [--experiment N] [--minutes M]
python -m experiments report [--preset standard]
python -m experiments tasks --output FOLDER
"""

import argparse
import os
import sys
import time
from pathlib import Path

# This must be set before torch starts its threads: waiting threads then sleep, which helps on a machine with other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_HERE = Path(__file__).parent


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do what is not done yet; goes on where it was interrupted")
    run.add_argument(
        "--experiment",
        type=int,
        help="number of one experiment, 1 to 6, to make only the runs that it needs (default: all)",
    )
    run.add_argument("--minutes", type=float, help="stop after this many minutes, in the middle of a run too")
    run.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    report = commands.add_parser("report", help="write tables and pictures of the results that are there")
    report.add_argument("--page", type=Path, help="the page whose tables are written (default: docs/evidence.md)")
    tasks = commands.add_parser("tasks", help="write the downstream tasks for lm-eval-harness, and the tokenizer")
    tasks.add_argument("--output", type=Path, required=True, help="folder for the tasks")
    for command in (run, report, tasks):
        command.add_argument(
            "--preset",
            default="standard",
            choices=("quick", "standard", "gpu"),
            help="size of the runs (default: %(default)s)",
        )
        command.add_argument(
            "--results",
            type=Path,
            default=_HERE / "results",
            help="folder of the results (default: experiments/results)",
        )
        command.add_argument(
            "--work", type=Path, default=Path("out/experiments"), help="folder for checkpoints (default: %(default)s)"
        )
        command.add_argument("--texts", type=Path, help="a folder of text files instead of the installed packages")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0, or 1 with one sentence on standard error, or 3 if the minutes end before the runs."""
    args = build_parser().parse_args(arguments)
    from engram_hf import EngramError

    try:
        return {"run": _run, "report": _report, "tasks": _tasks}[args.command](args)
    except EngramError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    from .corpus import load_corpus
    from .plan import make_plan, select
    from .presets import PRESETS
    from .results import Results
    from .running import Runner
    from .training import Interrupted

    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    preset, work = PRESETS[args.preset], args.work / args.preset
    runs = select(make_plan(preset), args.experiment)
    results = Results(args.results / args.preset)
    results.require_writable()
    runner = Runner(preset, load_corpus(preset, work, args.texts), results, work, args.device, deadline)
    try:
        runner.do_all(runs)
    except Interrupted:
        print("The time is up; the same command goes on from here.")
        return 3
    missing = sum(results.read(run.name) is None for run in runs)
    print(f"{len(runs) - missing} of {len(runs)} runs are done.")
    return 0


def _report(args: argparse.Namespace) -> int:
    from .plan import make_plan
    from .presets import PRESETS
    from .report import write_report
    from .results import Results

    page = args.page or _HERE.parent / "docs" / "evidence.md"
    results = Results(args.results / args.preset)
    print(write_report(args.preset, PRESETS[args.preset], make_plan(PRESETS[args.preset]), results, page))
    return 0


def _tasks(args: argparse.Namespace) -> int:
    from .corpus import load_corpus
    from .presets import PRESETS
    from .tasks import make_tasks, write_lm_eval_tasks

    preset = PRESETS[args.preset]
    corpus = load_corpus(preset, args.work / args.preset, args.texts)
    made = make_tasks(corpus.parts["train"], corpus.parts["test"], corpus.tokenizer, preset.task_items)
    names = write_lm_eval_tasks({name: items for name, items in made.items() if items}, args.output)
    corpus.tokenizer.save_pretrained(args.output / "tokenizer")
    print(f"lm_eval --include_path {args.output} --tasks {','.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
