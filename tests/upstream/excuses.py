"""The list of tests that may fail with memory though they pass on the bare backbone."""

import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from packaging.specifiers import SpecifierSet

FIELDS = {"test", "backbones", "transformers", "reason"}


@dataclass(frozen=True)
class Excuse:
    """One entry: a pattern of test names, its backbones (empty: all), and the reason."""

    test: str
    reason: str
    backbones: tuple[str, ...] = ()

    def covers(self, backbone: str, test: str) -> bool:
        """Return whether the entry covers this test on this backbone."""
        return fnmatchcase(test, self.test) and (not self.backbones or backbone in self.backbones)


@dataclass
class Excuses:
    """The entries that hold for one version of transformers, and those that a test has used."""

    entries: list[Excuse]
    used: set[tuple[Excuse, str]] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path, version: str) -> "Excuses":
        """Read the entries for `version`.

        Raises:
            ValueError: an entry has no reason, or an unknown field.
        """
        entries = []
        for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("excused", []):
            if not entry.get("reason") or entry.keys() - FIELDS or "test" not in entry:
                raise ValueError(
                    f"{path.name}: {entry} needs `test` and `reason`, and may have `backbones`, `transformers`."
                )
            if SpecifierSet(entry.get("transformers", "")).contains(version, prereleases=True):
                entries.append(Excuse(entry["test"], entry["reason"], tuple(entry.get("backbones", ()))))
        return cls(entries)

    def excuses(self, backbone: str, test: str) -> bool:
        """Return whether some entry covers the test; the entry then counts as used for this backbone."""
        found = [entry for entry in self.entries if entry.covers(backbone, test)]
        self.used.update((entry, backbone) for entry in found)
        return bool(found)

    def unused(self, backbones: list[str]) -> list[str]:
        """Return the entries that no failing test needed, as sentences."""
        lines = []
        for entry in self.entries:
            idle = [name for name in entry.backbones or backbones if (entry, name) not in self.used]
            if entry.backbones and idle:
                lines.append(f"{entry.test} does not fail on {', '.join(idle)}")
            elif len(idle) == len(backbones):
                lines.append(f"{entry.test} does not fail on any backbone")
        return lines
