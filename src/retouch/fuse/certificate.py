"""The proof that fusing harms no domain by more than a stated drop: one bound for each domain and reference.

The questions are asked one by one, each once, and none of them has chosen a scale, a weight, a method or a resolver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import attempts
from ..bound import Certificate, certify, needed
from ..errors import BoundRefused, UserError
from ..report import Table

__all__ = ["DomainProof", "Proof", "Single", "prove"]

Right = NDArray[np.bool_]


@dataclass(frozen=True)
class DomainProof:
    """One domain against one reference.

    Attributes:
        domain: The domain.
        reference: ``"base"`` or the name of the best single adapter.
        broken: Share of the questions that the reference answers rightly and the fused model wrongly.
        mended: Share of those that it is the other way round.
        certificate: Bounds the mean drop: broken minus mended.
    """

    domain: str
    reference: str
    broken: float
    mended: float
    certificate: Certificate

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {
            "domain": self.domain,
            "reference": self.reference,
            "broken": self.broken,
            "mended": self.mended,
            **self.certificate.to_dict(),
        }


@dataclass(frozen=True)
class Single:
    """One adapter alone on one domain's selection questions.

    Attributes:
        domain: The domain.
        adapter: The adapter's name.
        right: Share of the questions that it answers rightly.
        likelihood: Mean log-likelihood of the right answers.
        n: How many questions it was asked.
        best: Whether the domain is compared with it.
    """

    domain: str
    adapter: str
    right: float
    likelihood: float
    n: int
    best: bool


@dataclass(frozen=True)
class Proof:
    """All domains against all references, together at the confidence 1 - delta.

    Attributes:
        limit: The drop that is allowed, 0 to 1.
        delta: Probability that any bound is too low.
        attempt: How often these questions have been asked for a certificate, this time included.
        domains: One proof for each domain and reference.
        singles: How the single adapters among the references were chosen; empty where there was no choice.
    """

    limit: float
    delta: float
    attempt: int
    domains: tuple[DomainProof, ...]
    singles: tuple[Single, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every bound is within the limit."""
        return all(d.certificate.holds for d in self.domains)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {
            "limit": self.limit,
            "delta": self.delta,
            "attempt": self.attempt,
            "holds": self.holds,
            "domains": [d.to_dict() for d in self.domains],
            "singles": [asdict(s) for s in self.singles],
        }

    def table(self) -> Table:
        """Return it for people."""
        rows = tuple(
            (d.domain, d.reference, d.certificate.mean, d.certificate.upper, d.certificate.n, self.limit,
             "yes" if d.certificate.holds else "no")
            for d in self.domains
        )  # fmt: skip
        return Table(
            "Drop on held-out questions", ("domain", "against", "measured", "at most", "n", "limit", "holds"), rows,
            f"All bounds hold together with {1 - self.delta:.0%} confidence for questions drawn like these, and for "
            f"no others. Attempt {self.attempt} on these questions.",
        )  # fmt: skip

    def tables(self) -> list[Table]:
        """Return it for people, with how the references were chosen."""
        if not self.singles:
            return [self.table()]
        rows = tuple((s.domain, s.adapter, s.right, s.likelihood, s.n, "yes" if s.best else "no") for s in self.singles)
        return [self.table(), Table(
            "Single adapters on selection questions",
            ("domain", "adapter", "right", "log-likelihood", "n", "compared with"), rows,
            "A domain is compared with the adapter that answers most of its selection questions rightly.",
        )]  # fmt: skip

    def require(self) -> None:
        """Refuse to go on unless every bound is within the limit.

        Raises:
            BoundRefused: One is not; the message has the worst, and how many questions could do.
        """
        if self.holds:
            return
        worst = max(self.domains, key=lambda d: d.certificate.upper)
        c = worst.certificate
        least = needed(self.limit, c.confidence, high=1.0) if self.limit > 0 else 0
        few = f" Even without any drop {least:,} questions a domain are needed." if c.n < least else ""
        raise BoundRefused(
            f"On {worst.domain} the fused model may lose up to {c.upper:.3g} against {worst.reference} (measured: "
            f"{c.mean:.3g} on {c.n:,} questions), above the limit of {self.limit:g}. The fusion is refused.{few} "
            "Certify on more questions, fuse with another method or scale, or allow a larger drop."
        )


def prove(
    fused: Mapping[str, Sequence[bool] | Right],
    references: Mapping[str, Mapping[str, Sequence[bool] | Right]],
    limit: float,
    *,
    delta: float = 0.05,
    attempt: int = 1,
    seed: int = 0,
) -> Proof:
    """Bound the drop of each domain against each reference.

    Args:
        fused: By domain, whether the fused model answers each question rightly.
        references: By name, the same questions answered by the base or a single adapter. A reference may be given for
            some domains only.
        limit: The drop that is allowed, 0 to 1.
        delta: Probability that any of the bounds is too low.
        attempt: The number of this attempt on the same questions; see `retouch.attempts.share`.
        seed: Of the order in which questions are bet on.

    Raises:
        UserError: Answers are missing, or not as many as there are questions.

    Example:
        >>> answers = {"news": [True] * 300}
        >>> prove(answers, {"base": answers}, 0.05).holds
        True
    """
    asked = [(d, name) for name, by_domain in references.items() for d in by_domain]
    if not asked:
        raise UserError("A certificate needs at least one reference: the base, or a single adapter.")
    if not 0 < delta < 1:
        raise UserError(f"delta must lie between 0 and 1; got {delta!r}.")
    error = attempts.share(delta, attempt) / len(asked)
    found = []
    for domain, name in asked:
        if domain not in fused:
            raise UserError(f"The fused model has not answered the domain {domain!r}.")
        right, before = np.asarray(fused[domain], bool), np.asarray(references[name][domain], bool)
        if right.shape != before.shape or right.ndim != 1:
            raise UserError(f"{domain}: {right.size} answers of the fused model, {before.size} of {name}.")
        drop = before.astype(float) - right.astype(float)
        bound = certify(drop, limit, confidence=1 - error, low=-1.0, what="lost answers", seed=seed)
        found.append(DomainProof(domain, name, float((drop > 0).mean()), float((drop < 0).mean()), bound))
    return Proof(float(limit), delta, attempt, tuple(found))
