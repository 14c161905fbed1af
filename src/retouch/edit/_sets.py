"""The facts that a bench is asked to measure: a suite's, those of files, or several files mixed."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..model import Model
from .bench import known_facts
from .facts import Fact, disjoint, load

__all__ = ["SUITES", "Asked", "apart", "draw"]

_log = logging.getLogger(__name__)
SUITES = ("counterfact", "same-subject", "knowedit", "zsre", "sequential")
"""The suites by name; sequential takes CounterFact's facts, one batch after another."""
SPARE = 4
"""How many times as many facts are drawn where those that the model does not know are dropped."""


@dataclass(frozen=True)
class Asked:
    """Which facts.

    Attributes:
        suite: One of `SUITES`, or empty for files.
        data: Files of facts; or the one folder that holds the data sets, by default that of ``RETOUCH_DATA``.
        n: Facts; groups of the same-subject suite.
        group_size: Facts of a group, in the same-subject suite.
        known: Only facts whose true answer the unedited model prefers.
        seed: Of the draw.
        skip_bad: Leave out records of files that cannot be used; suites always do.
    """

    suite: str = ""
    data: Sequence[Path] = ()
    n: int = 100
    group_size: int = 4
    known: bool = False
    seed: int = 0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.suite and self.suite not in SUITES:
            raise UserError(f"No suite is called {self.suite!r}. Known: {', '.join(SUITES)}.")
        if self.n < 1 or self.group_size < 1:
            raise UserError(f"--n and --group-size must be at least 1; got {self.n} and {self.group_size}.")
        if not self.suite and not self.data:
            raise UserError(f"Name a file of facts with --data, or a suite with --suite: {', '.join(SUITES)}.")
        self.files()

    def files(self) -> list[Path]:
        """Return the files of facts that were named.

        Raises:
            UserError: Folders and files are mixed, or a folder stands without a suite.
        """
        folders = [p for p in self.data if p.is_dir()]
        if folders and (len(self.data) > 1 or not self.suite):
            raise UserError(f"{folders[0]} is a folder: give it alone, with --suite; or give files of facts.")
        if self.suite == "same-subject" and self.data and not folders:
            raise UserError("The same-subject suite is drawn from the data sets: give their folder with --data.")
        return [] if folders else list(self.data)

    def folder(self) -> Path:
        """Return the folder of the data sets.

        Raises:
            UserError: None was named.
        """
        named = str(self.data[0]) if self.data else os.environ.get("RETOUCH_DATA", "")
        if not named or not Path(named).is_dir():
            what = f"{named!r} is no folder" if named else "no folder is named"
            raise UserError(f"Suites are drawn from published data sets, and {what}. Set RETOUCH_DATA or give --data.")
        return Path(named)

    @property
    def name(self) -> str:
        """What the facts are, for the record."""
        files = "+".join(p.name for p in self.files())
        return "/".join(filter(None, (self.suite, files)))


def draw(model: Model, asked: Asked, out: Path) -> list[list[Fact]]:
    """Draw the facts in groups: those of one subject in the same-subject suite, else each alone.

    Args:
        model: The unedited model; tells which facts are known.
        asked: Which.
        out: The bench's file; the same-subject groups are kept beside it.

    Raises:
        FactError: A file or a data set is missing or damaged.
    """
    from . import suites

    if asked.suite == "same-subject":
        kept = out.with_name(f"same-subject-{asked.group_size}x{asked.n}-seed{asked.seed}.jsonl")
        return suites.same_subject(model, asked.folder(), asked.group_size, asked.n, asked.seed, kept)
    n = asked.n * SPARE if asked.known else asked.n
    if files := asked.files():
        facts = _mixed(files, None if asked.known else n, bool(asked.suite) or asked.skip_bad)
    else:
        pick = {"counterfact": suites.counterfact, "knowedit": suites.knowedit, "zsre": suites.zsre}
        facts = pick.get(asked.suite, suites.counterfact)(asked.folder(), n, asked.seed)
    return [[f] for f in (_known(model, facts, asked.n) if asked.known else facts)]


def _known(model: Model, facts: Sequence[Fact], n: int) -> list[Fact]:
    kept = known_facts(model, facts, n)
    if not kept:
        raise UserError(
            f"There are no facts to measure on. Known are facts with a true answer (truth) that the unedited model prefers "
            f"to the new one; none of {len(facts)} is, and {sum(not f.truth for f in facts)} have no true answer."
        )
    if len(kept) < n:
        _log.warning("The model knows %d of %d facts; %d were asked for.", len(kept), len(facts), n)
    return kept


def apart(groups: Sequence[Sequence[Fact]], batch_size: int) -> list[list[Fact]]:
    """Drop the prompts that another fact of the same model edits: they are meant to change and tell of no harm.

    Args:
        groups: The facts.
        batch_size: Groups that are written into one model.
    """
    found: list[list[Fact]] = []
    for start in range(0, len(groups), batch_size):
        part = groups[start : start + batch_size]
        facts = iter(disjoint([f for g in part for f in g]))
        found += [[next(facts) for _ in g] for g in part]
    return found


def _mixed(files: Sequence[Path], n: int | None, skip_bad: bool) -> list[Fact]:
    """Take the first facts of each file in turn, so that `n` of them are spread over all files."""
    lists = [load(path, n, bad="skip" if skip_bad else "error") for path in files]
    turns = [facts[i] for i in range(max(map(len, lists))) for facts in lists if i < len(facts)]
    return turns[:n]
