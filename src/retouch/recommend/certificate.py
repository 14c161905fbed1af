"""The certificate of a policy: what its mean harm is at most, for users who had no part in its making.

What was measured is one pair of arrays for each target; everything that is claimed is computed from these arrays alone
and can be computed again. Users are the independent unit: a user's targets are averaged first. It holds for users drawn
like these, at this time, for the staleness that was tested; of a changed population it says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import attempts, bound, store
from ..errors import BoundRefused, StoreError, UserError
from ..report import Table
from .evidence import CAP, REPORTED, ROUTABLE, Evidence
from .metrics import paired, per_user, values

__all__ = ["RUNGS", "Certified", "Line", "Terms", "certify", "recompute", "require"]

Floats = NDArray[np.float64]
Verdict = Literal["kept", "refused", "undecided", "reported"]

RUNGS = ("fresh", "stale", "prototype", "none")
"""How a user may be served, best first; behind them stands the reference, whose harm is 0 by definition."""

BENEFITS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
_FORMAT = 1
_HIT = 10
_JSON, _ARRAYS = "certificate.json", "certificate.safetensors"


# ---------------------------------------------------------------- what is claimed


@dataclass(frozen=True)
class Terms:
    """What is asked of a certificate, fixed before anything is looked at.

    Attributes:
        limit: The mean harm that is allowed, in nats per code.
        slack: What each target's harm forgives.
        confidence: That no upper bound of harm of any attempt is too low.
        method: Of the bounds; see `retouch.bound.upper_bound`.
        seed: Of the order in which the bound reads the users, and of resampling.
        attempt: How many times these users were looked at, this time included.
        least: Segments with fewer users are not tested alone.
    """

    limit: float
    slack: float = 0.0
    confidence: float = 0.95
    method: Literal["betting", "hoeffding_bentkus"] = "betting"
    seed: int = 0
    attempt: int = 1
    least: int = 200

    @property
    def alpha(self) -> float:
        """The error that this attempt may spend; see `retouch.attempts.share`."""
        return attempts.share(1 - self.confidence, self.attempt)


@dataclass(frozen=True)
class Line:
    """What was found of one rung in one segment.

    Attributes:
        rung: How these users were served.
        segment: Which users.
        n: How many.
        mean: Their mean harm, capped.
        mean_uncapped: The same without the cap.
        upper: What the true mean is at most; None where it was not tested.
        lower: What it is at least.
        capped: Share of the users with a target beyond the cap.
        verdict: ``kept``: at most the limit; ``refused``: more than it; ``undecided``; ``reported``: not tested.
        needed: How many users would probably decide, where it is undecided.
    """

    rung: str
    segment: str
    n: int
    mean: float
    mean_uncapped: float
    upper: float | None
    lower: float | None
    capped: float
    verdict: Verdict
    needed: int | None = None


@dataclass(frozen=True, eq=False)
class Certified:
    """A certificate: terms, what was found on these terms, and what it was found from.

    Attributes:
        terms: What was asked.
        lines: Each rung in each segment.
        hits: For each rung: targets lost from the first ten and gained, the bound of the share lost, a p-value of "no
            more is lost than gained".
        benefit: For each rung and metric: mean difference from the reference, lower and upper end.
        compared: Mean harm of recommenders that are told beside.
        about: Holdout mode, seed of the roles, fingerprints, versions.
        evidence: The arrays.
    """

    terms: Terms
    lines: tuple[Line, ...]
    hits: Mapping[str, Mapping[str, float]]
    benefit: Mapping[str, Mapping[str, list[float]]]
    compared: Mapping[str, float]
    about: Mapping[str, Any]
    evidence: Evidence

    def line(self, rung: str = "fresh", segment: str = "all") -> Line:
        """Return what was found of a rung in a segment.

        Raises:
            UserError: There is no such line.
        """
        for line in self.lines:
            if (line.rung, line.segment) == (rung, segment):
                return line
        raise UserError(f"The certificate says nothing of rung {rung!r} in segment {segment!r}.")

    @property
    def holds(self) -> bool:
        """Whether fresh knowledge is within the limit over all users."""
        return self.line().verdict == "kept"

    def allows(self, rung: str, segment: str) -> bool:
        """Tell whether users of a segment may be served so. A segment too small to be tested goes by all users."""
        known = {(line.rung, line.segment): line.verdict for line in self.lines}
        verdict = known.get((rung, segment), "reported")
        return (known.get((rung, "all")) if verdict == "reported" else verdict) == "kept"

    def routes(self, segment: str, *, reference: bool = True) -> tuple[str, ...]:
        """Return the rungs that a segment may be served by, best first; the reference at last.

        Args:
            segment: ``sparse`` or ``active``, or ``all``.
            reference: Whether the server holds the reference; then the policy alone is never needed.
        """
        rungs = tuple(r for r in RUNGS if self.allows(r, segment) and not (reference and r == "none"))
        return (*rungs, "reference") if reference else rungs

    def sentence(self) -> str:
        """Say the main result in one sentence."""
        line, terms = self.line(), self.terms
        told = f"the mean harm of fresh knowledge is at most {line.upper:.3g} nats per code"
        words = {
            "kept": f"within the limit of {terms.limit:g}",
            "refused": f"and at least {line.lower:.3g}: above the limit of {terms.limit:g}",
            "undecided": f"which does not decide about the limit of {terms.limit:g}; "
            + ("more users will not help" if line.needed is None else f"about {line.needed} users would"),
        }
        return (
            f"With {terms.confidence:.0%} confidence {told}, {words[line.verdict]} (measured: {line.mean:.3g} on "
            f"{line.n} users {self._who()}; attempt {terms.attempt})."
        )

    def _who(self) -> str:
        """Say what part the users had in training, as far as it is known."""
        window = self.about.get("window")
        if window is None:
            kept = self.about.get("holdout") == "targets"
            return "whose targets were kept from training" if kept else "who had no part in training"
        if window["trained"] is None:
            return "of whom it is not known whether they had a part in training"
        if window["trained"]:
            return f"of whom {window['trained']} had a part in training, with earlier items"
        return "who had no part in training"

    def table(self) -> Table:
        """Return the lines for people."""
        rows = tuple(
            (f"{x.rung}, {x.segment}", x.n, x.mean, x.mean_uncapped, _cell(x.upper), _cell(x.lower), x.verdict)
            for x in self.lines
        )
        columns = ("rung, segment", "users", "mean harm", "uncapped", "at most", "at least", "verdict")
        return Table("Certified harm", columns, rows, "Nats per code; harm of the reference is 0 by definition.")

    def to_dict(self) -> dict[str, Any]:
        """Return all but the arrays as plain values that JSON can hold."""
        terms = {"name": "recommend", "unit": "user", "cap": CAP, **asdict(self.terms)}
        return {
            "format": _FORMAT,
            "bound": terms,
            "lines": [asdict(line) for line in self.lines],
            "hits": {name: dict(found) for name, found in self.hits.items()},
            "benefit": {name: dict(found) for name, found in self.benefit.items()},
            "compared": dict(self.compared),
            "about": dict(self.about),
        }

    def save(self, folder: str | Path) -> None:
        """Write ``certificate.json`` and ``certificate.safetensors`` into a folder that is there."""
        store.write_json_atomic(Path(folder) / _JSON, self.to_dict())
        self.evidence.save(Path(folder) / _ARRAYS)

    @classmethod
    def load(cls, folder: str | Path) -> Certified:
        """Read a certificate and prove that its arrays give just these numbers.

        Raises:
            StoreError: A file is missing or damaged, or the numbers are not those of the arrays.
        """
        told = store.read_json(Path(folder) / _JSON)
        made = recompute(folder)
        if made.to_dict() != told:
            wrong = [name for name, part in made.to_dict().items() if told.get(name) != part]
            raise StoreError(
                f"{Path(folder) / _JSON} does not say what its arrays give (it differs in {', '.join(wrong)}). "
                "Certify the policy again."
            )
        return made


def _cell(value: float | None) -> float | str:
    return "" if value is None else value


def certify(evidence: Evidence, terms: Terms, about: Mapping[str, Any] | None = None) -> Certified:
    """Compute everything that can be claimed from the evidence.

    Source: bounds by betting of Waudby-Smith and Ramdas (2024) as in Bates et al. (2021); Clopper and Pearson (1934);
        the segments and rungs share the error of an attempt evenly, the attempts by 1/(k(k+1)).

    Args:
        evidence: What was measured.
        terms: What is asked.
        about: What the certificate is of, kept as it is.

    Raises:
        UserError: There is no evidence of a rung, or an attempt below 1.
    """
    if not evidence.after:
        raise UserError("A certificate needs evidence of at least one rung.")
    rungs = sorted(evidence.after, key=lambda rung: (RUNGS.index(rung) if rung in RUNGS else len(RUNGS), rung))
    everybody = _n(evidence, "all")
    worth = [s for s in ROUTABLE if s == "all" or terms.least <= _n(evidence, s) < everybody]  # not all of them twice
    tested = [(r, s) for r in rungs for s in worth]
    alpha = terms.alpha / len(tested)
    lines = tuple(
        _line(evidence, terms, rung, segment, alpha if (rung, segment) in tested else None)
        for rung in rungs
        for segment in (*ROUTABLE, *REPORTED)
        if _n(evidence, segment)
    )
    hits = {rung: _hits(evidence, ranks, terms) for rung, ranks in evidence.rank_after.items()}
    benefit = {rung: _benefit(evidence, ranks, terms.seed) for rung, ranks in evidence.rank_after.items()}
    compared = {
        n: float(_by_unit(evidence, evidence.harms(s, terms.slack)[0]).mean()) for n, s in evidence.compared.items()
    }
    return Certified(terms, lines, hits, benefit, compared, dict(about or {}), evidence)


def recompute(folder: str | Path) -> Certified:
    """Compute a saved certificate again, from its arrays and terms alone."""
    told = store.read_json(Path(folder) / _JSON)
    try:
        terms = Terms(**{name: told["bound"][name] for name in Terms.__dataclass_fields__})
        about = told["about"]
    except (KeyError, TypeError) as error:
        raise StoreError(f"{Path(folder) / _JSON} is no certificate: {error!r} is missing.") from error
    return certify(Evidence.load(Path(folder) / _ARRAYS), terms, about)


def require(certified: Certified) -> None:
    """Refuse to go on unless fresh knowledge is kept.

    Raises:
        BoundRefused: It is refused or undecided; the message has the numbers.
    """
    if not certified.holds:
        raise BoundRefused(
            f"{certified.sentence()} The policy is refused and the reference serves. Train with a lower max_harm, or "
            "allow a higher limit."
        )


# ---------------------------------------------------------------- one number at a time


def _mask(evidence: Evidence, segment: str) -> NDArray[np.bool_]:
    return np.ones(len(evidence.unit), bool) if segment == "all" else evidence.segments.get(
        segment, np.zeros(len(evidence.unit), bool)
    )  # fmt: skip


def _n(evidence: Evidence, segment: str) -> int:
    return len(np.unique(evidence.unit[_mask(evidence, segment)]))


def _by_unit(evidence: Evidence, found: Floats, segment: str = "all") -> Floats:
    """Average over the targets of each user, in the order of the users."""
    mask = _mask(evidence, segment)
    return per_user(evidence.unit[mask], found[mask, None])[1][:, 0]


def _line(evidence: Evidence, terms: Terms, rung: str, segment: str, alpha: float | None) -> Line:
    capped, raw = evidence.harms(evidence.after[rung], terms.slack)
    x = _by_unit(evidence, capped, segment)
    share = _by_unit(evidence, (raw > CAP).astype(np.float64), segment)
    told = (rung, segment, len(x), float(x.mean()), float(_by_unit(evidence, raw, segment).mean()))
    if alpha is None:
        return Line(*told, None, None, float((share > 0).mean()), "reported")
    upper, lower = _bounds(x, terms, alpha)
    verdict: Verdict = "kept" if upper <= terms.limit else "refused" if lower > terms.limit else "undecided"
    needed = _needed(x, terms, alpha) if verdict == "undecided" else None
    return Line(*told, upper, lower, float((share > 0).mean()), verdict, needed)


def _bounds(x: Floats, terms: Terms, alpha: float) -> tuple[float, float]:
    """Bound the mean from above and from below, each with error `alpha`."""
    how: Any = {"confidence": 1 - alpha, "method": terms.method, "seed": terms.seed}
    return bound.upper_bound(x, **how), 1 - bound.upper_bound(1 - x, **how)


def _needed(x: Floats, terms: Terms, alpha: float) -> int | None:
    """Estimate how many users like these would show that the limit is kept; None if it does not seem to be.

    The same users are taken several times over until the bound passes. The usual estimate from the variance comes in
    only where that would take too long: of small samples it says too little.
    """
    if x.mean() >= terms.limit:
        return None
    for times in _TIMES:
        if len(x) * times > _MOST_COPIES:
            break
        if _bounds(np.tile(x, times), terms, alpha)[0] <= terms.limit:
            return len(x) * times
    return math.ceil(2 * float(x.var()) * math.log(1 / alpha) / (terms.limit - float(x.mean())) ** 2)


_TIMES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_MOST_COPIES = 100_000


def _hits(evidence: Evidence, ranks: NDArray[np.int64], terms: Terms) -> dict[str, float]:
    """Count users who lost or gained a hit: a bound on likelihood does not bound ranks."""
    from scipy.stats import binomtest

    before, after = evidence.rank_before <= _HIT, ranks <= _HIT
    lost = _by_unit(evidence, (before & ~after).astype(np.float64)) > 0
    gained = _by_unit(evidence, (after & ~before).astype(np.float64)) > 0
    b, c = int(lost.sum()), int(gained.sum())
    share = bound.upper_bound(lost.astype(np.float64), confidence=1 - terms.alpha, method="binomial")
    p = float(binomtest(b, b + c, 0.5, alternative="greater").pvalue) if b + c else 1.0
    return {"lost": b, "gained": c, "lost_share": b / len(lost), "lost_share_at_most": share, "p_value": p}


def _benefit(evidence: Evidence, ranks: NDArray[np.int64], seed: int) -> dict[str, list[float]]:
    new, old = (per_user(evidence.unit, values(r, BENEFITS))[1] for r in (ranks, evidence.rank_before))
    return dict(zip(BENEFITS, paired(new, old, seed=seed).tolist()))
