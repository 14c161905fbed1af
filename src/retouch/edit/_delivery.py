"""What of a write arrives when the fact is asked differently: the delivered fraction under each metric.

The smallest write that is exact at the keys K under a metric M listens with B = (Kᵀ M⁻¹ K)⁻¹ Kᵀ M⁻¹. At a moved key k' fact i
receives (B k')ᵢ of its residual: 1 is exact, and what the other facts receive there is cross talk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..change import Change
from ..errors import FactError, SolveError
from ..linalg import Metric
from ..model import Model
from ..tokens import Bos, Row
from ._drift import Keys, keys_of, reference, wrapped, wrappings
from .base import block_at, require_decoder
from .facts import Fact

__all__ = ["Delivered", "Delivery", "MetricRow", "deliver", "delivered_by", "listeners"]

ETA = 1e-2
"""Ridge of the drift metric, in mean entries of its diagonal."""


@dataclass(frozen=True)
class MetricRow:
    """What one metric delivers on texts that it was not made from.

    Attributes:
        off: Mean abs(alpha - 1).
        alpha: Mean delivered fraction.
        cross_talk: Mean size of what other facts receive at a fact's moved key; None with one key.
        expected: Root mean square of alpha - 1 that the drift on the other half of the texts predicts.
        amplification: How much more the write reacts to drift than the isotropic one, mean over keys, at least 1.
        bound: Kantorovich's upper bound of the amplification.
    """

    off: float
    alpha: float
    cross_talk: float | None
    expected: float
    amplification: float
    bound: float


@dataclass(frozen=True)
class Delivery:
    """Delivered fractions of isotropic and other writes at one block.

    Attributes:
        block: The block whose ``mlp.down`` is written.
        n_keys: Distinct keys; facts that share theirs are one.
        n_texts: Texts that were held out, and those that the drift metric and the prediction were made from.
        rows: By metric.
        notes: Metrics that could not be measured, and why.
    """

    block: int
    n_keys: int
    n_texts: tuple[int, int]
    rows: dict[str, MetricRow]
    notes: tuple[str, ...]

    @property
    def predicted(self) -> str:
        """The metric that drift on one half of the texts predicts to deliver best on the other."""
        return min(self.rows, key=lambda n: self.rows[n].expected)

    @property
    def observed(self) -> str:
        """The metric that delivers best on the held-out half."""
        return min(self.rows, key=lambda n: self.rows[n].off)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for programs."""
        rows = {n: dict(vars(r)) for n, r in self.rows.items()}
        return {**vars(self), "rows": rows, "predicted": self.predicted, "observed": self.observed}


def deliver(
    model: Model,
    facts: Sequence[Fact],
    block: int = -1,
    *,
    moment: Tensor | None = None,
    texts: Sequence[str] = (),
    bos: Bos = "tokenizer",
) -> Delivery:
    """Measure what writes under different metrics deliver when an instruction stands before the prompt.

    Every second text makes the drift metric (and the prediction), the others are held out.

    Args:
        model: A decoder.
        facts: Facts with a subject.
        block: Where the write goes; -1: 0.18 of the depth.
        moment: Second moment of the keys there, for the metrics covariance and nullspace; None leaves them out.
        texts: What is put before the prompt, at least 4; by default `wrappings`.
        bos: Beginning-of-text rule.

    Raises:
        FactError: There are no facts, one has no subject, or there are fewer than 4 texts.
        SettingsError: The model has no such block.
    """
    require_decoder(model, "diagnose")
    at = block_at(block, 0.18, model.anatomy, "block")
    chosen = list(texts) or wrappings(model)
    if len(chosen) < 4:
        raise FactError(f"The delivered fraction needs at least 4 texts, two to learn drift from; got {len(chosen)}.")
    keys, moved = _keys(model, facts, chosen, at, bos)
    rows: dict[str, MetricRow] = {}
    notes = []
    fit, held = moved[:, ::2], moved[:, 1::2]
    for name, make in _metrics(keys, fit, moment).items():
        try:
            rows[name] = _measured(name, make(), keys, fit, held)
        except SolveError as error:
            notes.append(f"Metric {name}: {error}")
    return Delivery(at, keys.shape[1], (held.shape[1], fit.shape[1]), rows, tuple(notes))


def _keys(model: Model, facts: Sequence[Fact], texts: Sequence[str], block: int, bos: Bos) -> tuple[Tensor, Tensor]:
    """Read the distinct keys, (d_ff, keys), and where they move to, (keys, texts, d_ff)."""
    distinct: dict[tuple[int, ...], tuple[Row, Fact]] = {}
    for fact in facts:
        row = reference(model, fact, bos)
        distinct.setdefault(row.ids[: (row.subject or 0) + 1], (row, fact))
    if not distinct:
        raise FactError("There are no facts to diagnose.")
    read = [
        keys_of(model, [row, *wrapped(model, fact, texts, bos)]).subject[:, block].double()
        for row, fact in distinct.values()
    ]
    return torch.stack([r[0] for r in read], 1), torch.stack([r[1:] for r in read])


def _metrics(keys: Tensor, fit: Tensor, moment: Tensor | None) -> dict[str, Callable[[], Metric]]:
    found: dict[str, Callable[[], Metric]] = {"identity": linalg.Identity}
    if moment is not None:
        found["covariance"] = partial(linalg.Covariance.from_moment, moment)
        found["nullspace"] = partial(linalg.null_space, moment)
    found["drift"] = partial(drift_metric, keys, fit)
    return found


def drift_metric(keys: Tensor, moved: Tensor) -> linalg.Woodbury:
    """Make the metric S + eta I, S the mean of eps epsᵀ over facts and texts.

    Shapes:
        keys (d_ff, keys), moved (keys, texts, d_ff).

    Raises:
        SolveError: Nothing has moved.
    """
    eps = (moved - keys.T[:, None]).flatten(0, 1)
    scale = float(eps.square().mean())
    if not scale > 0:
        raise SolveError("No key moves under these texts, so there is no drift to make a metric from.")
    return linalg.Woodbury.of(ETA * scale, eps.T / math.sqrt(len(eps)))


def listeners(keys: Tensor, metric: Metric) -> Tensor:
    """Return B, what each fact of an exact write listens to, (keys, d_ff)."""
    n = keys.shape[1]
    return linalg.solve(keys, torch.eye(n), metric, mode="equality", ridge=1e-6 if n > 1 else 0.0).right


def _measured(name: str, metric: Metric, keys: Tensor, fit: Tensor, held: Tensor) -> MetricRow:
    listen = listeners(keys, metric)
    reach = torch.einsum("jm,itm->itj", listen, held)  # what fact j's write gives at fact i's moved key
    own = reach.diagonal(dim1=0, dim2=2)
    n = keys.shape[1]
    cross = float((reach.abs().sum() - own.abs().sum()) / (held.shape[1] * n * (n - 1))) if n > 1 else None
    return MetricRow(
        float((own - 1).abs().mean()),
        float(own.mean()),
        cross,
        _folded(keys, fit) if name == "drift" else _expected(listen, keys, fit),
        sum(linalg.amplification(k, metric) for k in keys.T) / n,
        linalg.amplification_bound(metric.condition),
    )


def _expected(listen: Tensor, keys: Tensor, moved: Tensor) -> float:
    eps = moved - keys.T[:, None]
    return float(torch.einsum("im,itm->it", listen, eps).square().mean().sqrt())


def _folded(keys: Tensor, fit: Tensor) -> float:
    """Predict the drift metric from each half of its own texts for the other, or it would be judged by what it has seen."""
    halves = (fit[:, ::2], fit[:, 1::2])
    parts = [_expected(listeners(keys, drift_metric(keys, a)), keys, b) for a, b in (halves, halves[::-1])]
    return sum(parts) / 2


# ---------------------------------------------------------------- of a change


@dataclass(frozen=True)
class Delivered:
    """What a change's weight delivers at moved keys, ⟨ΔW k', r⟩ / ‖r‖² with r = ΔW k*.

    Attributes:
        place: ``subject`` or ``prompt``: the last token of which hears the write more.
        alpha: Mean over facts and texts.
        off: Mean abs(alpha - 1).
    """

    place: str
    alpha: float
    off: float


def delivered_by(
    model: Model, change: Change, facts: Sequence[Fact], *, texts: Sequence[str] = (), bos: Bos = "tokenizer"
) -> dict[str, Delivered]:
    """Measure what a change delivers when an instruction stands before the prompt, for each ``mlp.down`` it writes.

    Args:
        model: The model without the change.
        change: The change.
        facts: Its facts.
        texts: What is put before the prompt; by default `wrappings`.
        bos: Beginning-of-text rule.
    """
    names = [n for n in change.parts if n.endswith(".mlp.down")]
    chosen = list(texts) or wrappings(model)
    blocks = [model.anatomy.block_of(name) for name in names]
    read = []
    for fact in facts:
        every = keys_of(model, [reference(model, fact, bos), *wrapped(model, fact, chosen, bos)])
        read.append(Keys(*(keys[:, blocks] for keys in every)))  # those of all blocks would fill the memory
    found = {}
    for i, name in enumerate(names):
        delta = change.parts[name].delta()
        places = {p: torch.stack([getattr(k, p)[:, i] for k in read]).double() for p in ("subject", "prompt")}
        found[name] = _heard({p: keys @ delta.T for p, keys in places.items()})
    return found


def _heard(writes: Mapping[str, Tensor]) -> Delivered:
    place = max(writes, key=lambda p: float(writes[p][:, 0].norm()))
    bare, moved = writes[place][:, :1], writes[place][:, 1:]
    alpha = (moved * bare).sum(2) / bare.square().sum(2).clamp(min=1e-300)
    return Delivered(place, float(alpha.mean()), float((alpha - 1).abs().mean()))
