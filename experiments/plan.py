"""The runs, their order, and their dependencies.

The most informative come first: rates of the dense backbone, memory against its twin, the controls, then effective
depth, memory against experts, and the ablations; seed by seed, so that an interrupted set has all variants of its
first seeds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from engram_hf import EngramError

from .models import SHARES
from .presets import Preset

EXPERIMENTS = {
    1: "Memory against experts",
    2: "Fair comparison",
    3: "Long context in the small",
    4: "Effective depth",
    5: "Compression and heads",
    6: "Learned or fixed addresses",
}
CONTROLS = ("one row", "shuffled rows")
ABLATIONS = ("gate open", "plain addition", "bigrams only", "every layer", "twin of all parameters")
HEADS = ("1 head", "2 heads", "8 heads")
TUNING_SEED = 100


@dataclass(frozen=True)
class Run:
    """The run of one result file.

    Args:
        kind: `tuning`, `text` (training on text), `long context`, or `layers` (CKA of two trained models).
        variant: see `models.build`.
        seed: the seed of data order and weights.
        experiments: the experiments whose tables need it.
        rate: the index of the learning rate in tuning runs.
        needs: the names of the runs that must be done before.
    """

    kind: str
    variant: str
    seed: int
    experiments: tuple[int, ...]
    rate: int | None = None
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the run's file."""
        parts = [self.kind, self.variant, f"rate-{self.rate}" if self.rate is not None else f"seed-{self.seed}"]
        return "_".join(part.replace(" ", "-") for part in parts)


def side_of(variant: str) -> str:
    """Return the variant with which the learning rate of this one was chosen."""
    if variant.startswith("share "):
        return "share 0" if variant == "share 0" else "share 20"
    return "twin" if variant.startswith("twin") else "memory"


def make_plan(preset: Preset) -> list[Run]:
    """Return the runs of a preset in their order."""
    rates = range(len(preset.rates))
    dense = [_tuning(side, rate, (2, 3, 4, 5, 6)) for side in ("memory", "twin") for rate in rates]
    moe = [_tuning(side, rate, (1,)) for side in ("share 0", "share 20") for rate in rates]
    tuned = {"text": dense, "share": moe}

    def text(variant: str, seed: int, *experiments: int, more: Iterable[str] = ()) -> Run:
        before = tuned["share" if variant.startswith("share") else "text"]
        needs = (*(run.name for run in before if run.variant == side_of(variant)), *more)
        return Run("text", variant, seed, experiments, needs=needs)

    def main(seed: int) -> list[Run]:
        return [text("memory", seed, 2, 4, 5, 6), text("twin", seed, 2, 4)]

    def by_seed(variants: Iterable[str], *experiments: int) -> list[Run]:
        return [text(variant, seed, *experiments) for seed in preset.seeds for variant in variants]

    def after_main(kind: str, variant: str, seed: int, experiment: int) -> Run:
        return Run(kind, variant, seed, (experiment,), needs=tuple(run.name for run in main(seed)))

    equal_time = [text("twin of equal time", seed, 2, more=[run.name for run in main(seed)]) for seed in preset.seeds]
    long_context = [
        Run("long context", side, seed, (3,), needs=tuple(run.name for run in dense if run.variant == side))
        for seed in preset.seeds
        for side in ("memory", "twin")
    ]
    return [
        *dense,
        *(run for seed in preset.seeds for run in main(seed)),
        *by_seed(CONTROLS, 2),
        *(after_main("layers", "memory and twin", seed, 4) for seed in preset.seeds),
        *equal_time,
        *moe,
        *by_seed([f"share {share}" for share in SHARES], 1),
        *by_seed(["raw ids"], 5),
        *by_seed(ABLATIONS, 2),
        *by_seed(HEADS, 5),
        *long_context,
        *by_seed(["learned addresses"], 6),
    ]


def _tuning(side: str, rate: int, experiments: tuple[int, ...]) -> Run:
    return Run("tuning", side, TUNING_SEED, experiments, rate=rate)


def select(plan: list[Run], experiment: int | None) -> list[Run]:
    """Return the runs of one experiment, with those they need; all runs if it is None.

    Raises:
        ValueError: there is no such experiment.
    """
    if experiment is None:
        return plan
    if experiment not in EXPERIMENTS:
        raise EngramError(f"There is no experiment {experiment}; they are {', '.join(map(str, EXPERIMENTS))}.")
    wanted = {run.name for run in plan if experiment in run.experiments and run.kind != "tuning"}
    for run in reversed(plan):  # A run stands behind those that it needs.
        if run.name in wanted:
            wanted.update(run.needs)
    return [run for run in plan if run.name in wanted]
