"""Ask how well an outsider can tell, from an adapter alone, which examples it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._likelihood import answers
from ..change import side_by_side
from ..errors import UserError
from ..model import Model
from ..tokens import Text
from .asking import as_change
from .base import Adapter, Example

__all__ = ["Membership", "membership"]

_DRAWS = 2_000


@dataclass(frozen=True)
class Membership:
    """How well a threshold on the loss separates members from others.

    Attributes:
        auc: Probability that a member looks more like one than another example does; 0.5 is guessing.
        low: Lower end of its 95 % interval, by bootstrap over the examples.
        high: Upper end.
        n_members: Examples that were trained on.
        n_others: Examples of the same kind that were not.
    """

    auc: float
    low: float
    high: float
    n_members: int
    n_others: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def membership(
    model: Model, adapter: Adapter | None, members: Sequence[Example], others: Sequence[Example], *, seed: int = 0
) -> Membership:
    """Attack an adapter by the loss of its answers: low loss is taken for membership.

    Source:
        The loss-threshold attack of Yeom et al. (2018), calibrated by the base's own loss on the same example.

    Known problems:
        Stronger attacks exist, so a value near 0.5 is no proof of privacy; one well above it is proof of a leak.

    Args:
        model: The base.
        adapter: The adapter, recovered to the base's sizes; None attacks the base.
        members: What it was trained on.
        others: Examples of the same kind that it has never seen.
        seed: Of the bootstrap.

    Raises:
        UserError: One of the two lists is empty.
    """
    if not members or not others:
        raise UserError("Asking for membership needs examples that were trained on, and others that were not.")
    texts = [Text(before=e.prompt, target=e.target) for e in (*members, *others)]
    loss = _losses(model, texts)
    gain = -loss
    if adapter is not None:
        with side_by_side(model, [as_change(adapter)]):
            gain = loss - _losses(model, texts)
    inside, outside = gain[: len(members)], gain[len(members) :]
    draw = np.random.default_rng(seed)
    drawn = [_auc(draw.choice(inside, len(inside)), draw.choice(outside, len(outside))) for _ in range(_DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    auc = _auc(inside, outside)
    return Membership(auc, min(float(low), auc), max(float(high), auc), len(members), len(others))


def _losses(model: Model, texts: Sequence[Text]) -> NDArray[np.float64]:
    return np.array([a.nll for a in answers(model, texts)], dtype=np.float64)


def _auc(inside: NDArray[np.float64], outside: NDArray[np.float64]) -> float:
    """Share of pairs in which the member scores higher; ties count half."""
    ordered = np.sort(outside)
    below, upto = np.searchsorted(ordered, inside, "left"), np.searchsorted(ordered, inside, "right")
    return float((below + upto).mean() / 2 / len(outside))
