"""``lorahub``: a mean whose weights are found by trying them on a few selection questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ..progress import report
from ..settings import setting
from .base import Adapter, Ground
from .cat import Cat

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Lorahub"]

RADIUS = 0.5, 1e-3
"""How far the first steps of the search go, and the last ones."""


@dataclass(frozen=True)
class Lorahub(Cat):
    """Weigh the adapters so that the right answers to a few selection questions become likely, then fuse as `cat`.

    Minimises the questions' mean cross-entropy plus ``penalty`` times the mean of ``|w|`` over weights w from -1.5 to
    1.5, without gradients, from the weights given (equal ones by default).

    Source:
        LoraHub (Huang et al., COLM 2024; sail-sg/lorahub), there for factors of equal shape and with another search.
        Here differences are weighed, and the search is COBYQA (Ragonneau and Zhang), which is deterministic.

    Use when:
        Some adapters are worth more than others for the questions at hand, or one is to be subtracted.

    Known problems:
        Forty evaluations suffice for about ten adapters; `bounded` follows gradients and is made for more. The weights
        set the scale too, so `lam` is not tuned. All factors are in memory at once. No domain is protected.

    Shapes:
        One evaluation costs a pass over the questions' prompts, and the ranks of all adapters.

    Example:
        >>> Lorahub().n_evaluations
        40
    """

    penalty: float = setting(0.05, "What a mean size of the weights of 1 costs, in nats.", ge=0)
    box: float = setting(1.5, "Largest size of a weight.", gt=0)
    n_evaluations: int = setting(40, "How many weightings are tried.", ge=2)
    n_questions: int = setting(32, "Selection questions of each domain at most.", ge=1)

    averages: ClassVar[bool] = False
    resolvable: ClassVar[bool] = False
    chooses: ClassVar[bool] = True
    needs: ClassVar[Literal["", "selection", "moments"]] = "selection"

    def takes_entries(self) -> bool:
        """The weights are chosen for the differences as they are."""
        return False

    def weigh(
        self, adapters: Sequence[Adapter], weights: Sequence[float], ground: Ground | None
    ) -> tuple[Sequence[float], Mapping[str, Any]]:
        """Search for the weights."""
        from scipy.optimize import minimize

        from ._weighing import Mixture

        assert ground is not None
        mixture = Mixture(adapters, ground, self.n_questions, self.seed)
        tried: list[tuple[float, float, tuple[float, ...]]] = []

        def cost(at: NDArray[Any]) -> float:
            report("weighing adapters", len(tried), self.n_evaluations)
            w = [float(min(self.box, max(-self.box, x))) for x in at]
            entropy = mixture.ask(torch.tensor(w)).cross_entropy
            tried.append((entropy + self.penalty * sum(map(abs, w)) / len(w), entropy, tuple(w)))
            return tried[-1][0]

        first = [min(self.box, w) for w in weights]
        far, near = (r * self.box / 1.5 for r in RADIUS)
        minimize(
            cost, first, method="COBYQA", bounds=[(-self.box, self.box)] * len(first),
            options={"maxfev": self.n_evaluations, "initial_tr_radius": far, "final_tr_radius": near},
        )  # fmt: skip
        best = min(tried)
        told = {
            "n_evaluations": len(tried), "n_questions": len(mixture.domain), "objective": best[0],
            "objective_before": tried[0][0], "cross_entropy": best[1], "cross_entropy_before": tried[0][1],
        }  # fmt: skip
        return best[2], {"weighing": told}
