"""Find the threshold at which rows may leave, from data: a cost that is met, a risk that is certified, or both.

Run the network once over held-out examples (`read_table`), fix temperatures and the grid on `valid`, then `choose` on
examples that decided nothing else. What cannot be had is a value and not an exception: `Threshold.reachable` is False,
`reason` says why, `nearest` what could be had instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bound import Certificate, certify, p_value
from ..errors import BoundRefused, SettingsError
from .risk import Guarantee, Risk, approved, check_grid, guarantee, losses, passed, too_few
from .rules import Floats, Ints, Rule
from .table import Costs, Table, fit_temperatures, flops_costs, grid, leaving, read_table, scan, unsure

__all__ = [
    "Costs",
    "Likeness",
    "Risk",
    "Table",
    "Threshold",
    "choose",
    "choose_rule",
    "fit_temperatures",
    "flops_costs",
    "grid",
    "likeness",
    "read_table",
    "scan",
]


@dataclass(frozen=True)
class Threshold:
    """What was found.

    Args:
        value: The threshold; None if none does what was asked.
        reachable: Whether one does.
        rule: With which it was found and must be used.
        reason: Why none does, or what a found one lacks.
        nearest: The smallest limit that could have been met: of the cost's share, or of the risk.
        certificate: What is proved about the risk; for an unreachable one, about never leaving early.
        cost_certificate: What is proved about the mean share of the cost.
        cost: Total cost as a share of the original's, at `value`.
        exit_layer: Mean number of blocks that ran.
        leaves: Share of the examples that left after each asked block.
        certified: All thresholds of the grid that are certified for the risk.
    """

    value: float | None
    reachable: bool
    rule: Rule
    reason: str | None = None
    nearest: float | None = None
    certificate: Guarantee | None = None
    cost_certificate: Certificate | None = None
    cost: float | None = None
    exit_layer: float | None = None
    leaves: Mapping[int, float] = field(default_factory=dict)
    certified: tuple[float, ...] = ()

    @property
    def saved(self) -> float:
        """The threshold to write: `value`, or 0, at which nobody leaves early."""
        return self.value if self.value is not None else 0.0

    def require(self) -> None:
        """Refuse to go on without a threshold.

        Raises:
            BoundRefused: With the reason.
        """
        if not self.reachable:
            raise BoundRefused(self.reason or "No threshold does what was asked.")

    def sentences(self) -> list[str]:
        """Say what is proved and what is lacking.

        A certificate that fails is told where it is why there is no threshold. A threshold at which nobody leaves needs
        none: it harms nobody.
        """
        reason = self.reason or ""
        proofs = [p for p in self._proofs().values() if p is not None and (p.holds or not self.reachable)]
        said = [p.sentence() for p in proofs]
        return [*(s for s in said if s not in reason), *filter(None, [reason])]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold."""
        plain = {k: v for k, v in asdict(self).items() if k not in ("certificate", "cost_certificate")}
        proofs = {k: v.to_dict() if v else None for k, v in self._proofs().items()}
        return plain | proofs | {"leaves": {str(l): share for l, share in self.leaves.items()}}

    def _proofs(self) -> dict[str, Guarantee | None]:
        return {"certificate": self.certificate, "cost_certificate": self.cost_certificate}


# ---------------------------------------------------------------- the choice


def choose(
    calib: Table,
    rule: Rule,
    lambdas: Sequence[float] | Floats,
    *,
    budget: float | None = None,
    costs: Costs | None = None,
    confidence: float | None = None,
    risk: Risk | None = None,
    original: NDArray[Any] | None = None,
    span: float | None = None,
    seed: int = 0,
) -> Threshold:
    """Find the threshold that meets a cost, a risk, or both.

    With a cost it is the most careful one that meets it. With a risk alone it is the fastest one that is certified.

    Source:
        Bates et al. (2021), risk-controlling prediction sets; Angelopoulos et al. (2021, 2024); for early exits, Jazbec
        et al. (2024).

    Args:
        calib: Examples that decided nothing else.
        rule: Which exits are asked, and how.
        lambdas: Thresholds to try, from 0 upwards; see `grid`. Fixed before `calib` was looked at.
        budget: Largest cost as a share of the original's.
        costs: What examples cost; needed for a budget, and reported without one.
        confidence: With which the mean of the examples' shares of the cost must be shown to lie within the budget.
            None: their total over the original's on `calib` must.
        risk: The harm that is allowed.
        original: See `losses`.
        span: See `losses`.
        seed: Of the order in which the cost's bound reads the examples.

    Raises:
        SettingsError: Neither a budget nor a risk is given, or something does not fit; the message names the field.
    """
    points = np.asarray(lambdas, dtype=np.float64)
    check_grid(points)
    if budget is None and risk is None:
        raise SettingsError("budget or risk must be given: there is nothing to choose a threshold by.")
    if budget is not None and (costs is None or not budget > 0):
        raise SettingsError(f"budget must be above 0 and come with costs; got {budget!r}.")
    found = _Walk(calib, rule, points, leaving(calib, rule, points), costs)
    values = None if risk is None else losses(calib, found.where, risk, original=original, span=span)
    if risk is None or values is None:
        return found.by_cost(budget or 0.0, confidence, seed)
    n_safe = passed(values, risk, calib.classes)
    if n_safe == 0:
        return found.unsafe(values, risk)
    slow = 0 if budget is None else found.slowest(budget, confidence, seed)
    proved = {"certified": tuple(map(float, points[:n_safe]))}
    if budget is None or (slow is not None and slow < n_safe):
        index = n_safe - 1 if budget is None else slow or 0
        lacks = "No saving is certified: nobody leaves early." if found.spares_nothing(index) else None
        proof = guarantee(values, index, risk, calib.classes)
        at = found.at(index, reason=lacks, certificate=proof, **proved)
        return at if budget is None else found.with_cost_proof(at, index, budget, confidence, seed)
    return found.torn(values, risk, n_safe, slow, budget, **proved)


@dataclass(frozen=True, eq=False)
class _Walk:
    """One table walked along one grid."""

    table: Table
    rule: Rule
    lambdas: Floats
    where: Ints
    costs: Costs | None

    def at(self, index: int, **fields: Any) -> Threshold:
        blocks, counts = np.unique(self.where[:, index], return_counts=True)
        left = dict(zip(blocks.tolist(), (counts / self.table.n).tolist()))
        return Threshold(
            float(self.lambdas[index]),
            True,
            self.rule,
            cost=self.share(index),
            exit_layer=float(self.where[:, index].mean() + 1),
            leaves={l: left.get(l, 0.0) for l in self.rule.due(self.table.exits)},
            **fields,
        )

    def refused(self, index: int, reason: str, nearest: float | None, **fields: Any) -> Threshold:
        """Show the numbers of the nearest threshold, and have none."""
        return replace(self.at(index, **fields), value=None, reachable=False, reason=reason, nearest=nearest)

    def share(self, index: int) -> float | None:
        return None if self.costs is None else float(self.costs.share(self.where[:, index : index + 1])[0])

    def spares_nothing(self, index: int) -> bool:
        return bool((self.where[:, index] == self.table.exits[-1]).all())

    # ------------------------------------------------ cost

    def by_cost(self, budget: float, confidence: float | None, seed: int) -> Threshold:
        index = self.slowest(budget, confidence, seed)
        if index is None:
            return self._too_dear(budget, confidence, seed)
        return self.with_cost_proof(self.at(index), index, budget, confidence, seed)

    def slowest(self, budget: float, confidence: float | None, seed: int) -> int | None:
        """Return the most careful threshold that meets the cost, or None."""
        assert self.costs is not None
        if confidence is None:
            meets = self.costs.share(self.where) <= budget
            return int(meets.argmax()) if meets.any() else None
        ratios, high = self.costs.ratios(self.where), self.costs.highest()
        index = len(self.lambdas)  # walked from the fastest one, so that all that are passed are certified at once
        while index and p_value(
            ratios[:, index - 1], budget, high=high, method="betting", confidence=confidence, seed=seed
        ) <= 1 - confidence:  # fmt: skip
            index -= 1
        return index if index < len(self.lambdas) else None

    def with_cost_proof(
        self, at: Threshold, index: int, budget: float, confidence: float | None, seed: int
    ) -> Threshold:
        if confidence is None or self.costs is None:
            return at
        ratios, high = self.costs.ratios(self.where[:, index : index + 1])[:, 0], self.costs.highest()
        what = "shares of the original's cost"
        return replace(
            at, cost_certificate=certify(ratios, budget, confidence=confidence, high=high, what=what, seed=seed)
        )

    def _too_dear(self, budget: float, confidence: float | None, seed: int) -> Threshold:
        last = len(self.lambdas) - 1
        least = self.share(last) or 0.0
        fastest = self.with_cost_proof(self.at(last), last, budget, confidence, seed)
        proof = fastest.cost_certificate
        if proof is not None and least <= budget:
            reason = (
                f"{proof.sentence()} That is at the fastest threshold; measure more examples or allow a higher cost."
            )
            return self.refused(last, reason, proof.upper, cost_certificate=proof)
        reason = (
            f"A cost of {budget:.4g} of the original's is out of reach: with everybody leaving at the first exit that "
            f"is asked (block {self.rule.due(self.table.exits)[0]}) it is still {least:.4g}."
        )
        return self.refused(last, reason, proof.upper if proof else least, cost_certificate=proof)

    # ------------------------------------------------ risk

    def unsafe(self, values: Floats, risk: Risk) -> Threshold:
        proof, n = guarantee(values, 0, risk, self.table.classes), self.table.n
        least = too_few(n, risk, self.table.classes)
        if least is not None:
            why = f"{n} examples cannot show a limit of {risk.limit:g} even without any loss: {least} are needed."
        else:
            why = "The slim model itself exceeds the limit at full depth, before anybody leaves early."
        return self.refused(0, f"{why} {proof.sentence()}", proof.upper, certificate=proof)

    def torn(
        self, values: Floats, risk: Risk, n_safe: int, slow: int | None, budget: float, **fields: Any
    ) -> Threshold:
        """Refuse a cost and a risk that exclude one another, with both numbers."""
        index, classes = n_safe - 1, self.table.classes
        proof = guarantee(values, index, risk, classes)
        reason = (
            f"The cost and the risk exclude one another: the fastest certified threshold {self.lambdas[index]:.4g} costs "
            f"{self.share(index):.4g} of the original, above the budget of {budget:.4g}; "
        )
        if slow is None:
            reason += "and no threshold meets the budget."
        else:
            dear = guarantee(values, slow, risk, classes).upper
            reason += f"the slowest within the budget, {self.lambdas[slow]:.4g}, has a risk of up to {dear:.4g}, above "
            reason += f"the limit of {risk.limit:.4g} or behind one that is."
        return self.refused(index, reason, self.share(index), certificate=proof, **fields)


def choose_rule(
    calib: Table,
    candidates: Sequence[tuple[Rule, Sequence[float] | Floats]],
    risk: Risk,
    costs: Sequence[Costs],
    *,
    original: NDArray[Any] | None = None,
    span: float | None = None,
) -> Threshold:
    """Find the cheapest certified threshold among several rules.

    All points of all rules are tested, each at delta over their number; choosing among rules by `choose` would void
    its confidence.

    Args:
        calib: Examples that decided nothing else.
        candidates: Rules, each with its thresholds.
        risk: The harm that is allowed; `how` must be ``ltt``.
        costs: Of each rule.
        original: See `losses`.
        span: See `losses`.

    Raises:
        SettingsError: The message names the field.
    """
    if risk.how != "ltt" or len(costs) != len(candidates) or not candidates:
        raise SettingsError("how must be 'ltt' to choose among rules, with one Costs for each of at least one rule.")
    grids = [np.asarray(lambdas, dtype=np.float64) for _, lambdas in candidates]
    walks = [_Walk(calib, rule, g, leaving(calib, rule, g), c) for (rule, _), g, c in zip(candidates, grids, costs)]
    values = np.concatenate([losses(calib, w.where, risk, original=original, span=span) for w in walks], axis=1)
    places = [(w, i) for w in walks for i in range(len(w.lambdas))]
    fair = np.flatnonzero(approved(values, risk, calib.classes))
    if fair.size == 0:
        return walks[0].unsafe(values, replace(risk, delta=risk.delta / len(places)))
    best = min(fair.tolist(), key=lambda k: places[k][0].share(places[k][1]) or 0.0)
    walk, index = places[best]
    return walk.at(index, certificate=guarantee(values, best, risk, calib.classes, points=len(places)))


# ---------------------------------------------------------------- likeness


@dataclass(frozen=True)
class Likeness:
    """How alike the examples of the choice and of the use are; a certificate assumes that they are drawn alike.

    Args:
        calib_length: Mean tokens of the examples of the choice.
        use_length: Mean tokens of those of the use.
        calib_unsure: Mean uncertainty of the former, over the exits that are asked.
        use_unsure: Mean uncertainty of the latter.
    """

    calib_length: float
    use_length: float
    calib_unsure: float
    use_unsure: float

    @property
    def alike(self) -> bool:
        """Whether the mean lengths differ by at most a quarter."""
        return abs(self.use_length - self.calib_length) <= self.calib_length / 4

    def sentence(self) -> str:
        """Say both pairs of numbers, and warn where they differ."""
        said = (
            f"Mean length {self.calib_length:.1f} tokens where the threshold was chosen, {self.use_length:.1f} in use; "
            f"mean uncertainty {self.calib_unsure:.3f} and {self.use_unsure:.3f}."
        )
        return said if self.alike else f"{said} The lengths differ by more than a quarter: certificates may not hold."


def likeness(calib: Table, use: Table, rule: Rule) -> Likeness:
    """Compare the examples of the choice with those of the use."""
    lengths = (float(np.mean(t.lengths)) for t in (calib, use))
    return Likeness(*lengths, *(float(unsure(t, rule).mean()) for t in (calib, use)))
