"""Carry changes: recompose weights, prove that they moved as planned, run several changes beside one another, join them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import NoEffect, WrongBase
from ..lanes import Factors, Lanes
from ..model import Model
from ..trace import Trace
from .parts import Change, Dense, LowRank, Part, matrix_of, path_of, size_of

__all__ = [
    "TOLERANCE",
    "apply",
    "cast_error",
    "check_base",
    "combine",
    "compose",
    "edited",
    "prove_stored",
    "side_by_side",
]

TOLERANCE = 0.01
"""How far the stored difference of a weight may be from the planned one, relative, before it is an error."""


def compose(model: Model, originals: Mapping[str, Tensor], changes: Iterable[Change]) -> dict[str, Tensor]:
    """Recompose weights from their unchanged values: cast(W0 + sum of all differences), once.

    The sum runs in float64 in the order of the changes' ids, not of their arrival, low-rank ones first and as one
    product: so it depends on the set alone, and a thousand small changes cost one multiplication.

    Args:
        model: Tells each weight's orientation.
        originals: Unchanged values by our names, as (outputs, inputs).
        changes: The changes that are in force.

    Returns:
        New values by parameter path, in the parameter's own shape.
    """
    ordered = sorted(changes, key=lambda c: c.id)
    values = {}
    for name, original in originals.items():
        parts = [c.parts[name] for c in ordered if name in c.parts]
        low = [p for p in parts if isinstance(p, LowRank)]
        deltas = [p.delta() for p in parts if not isinstance(p, LowRank)]
        if low:
            deltas.insert(0, LowRank(torch.cat([p.left for p in low], 1), torch.cat([p.right for p in low])).delta())
        total = original.double()
        for delta in deltas:
            total = total + delta.to(original.device)
        value = total.float() if deltas else original
        if name.endswith(":bias"):
            value = value[:, 0]
        elif model.anatomy.transposed(name):
            value = value.T
        values[path_of(model, name)] = value
    return values


def check_base(model: Model, change: Change) -> None:
    """Refuse a change that was planned for another model.

    Raises:
        WrongBase: The fingerprints, a weight's name or a shape differ.
    """
    sizes = [(n, "x".join(map(str, p.shape)), size_of(model, n)) for n, p in change.parts.items()]
    wrong = [row for row in sizes if row[1] != row[2]]
    if not wrong and change.base == model.base_fingerprint:
        return
    name, shape, here = [*wrong, *sizes, ("no weight", "nothing", "nothing")][0]
    raise WrongBase(
        f"This change was planned for model {change.base[:6]} ({shape} at {name}); "
        f"this model is {model.base_fingerprint[:6]} ({here}). Open the model it was planned for, or plan it anew."
    )


def apply(model: Model, change: Change) -> Model:
    """Return a new model that carries the change; all untouched tensors are shared.

    Raises:
        WrongBase: The change was planned for another model.
        NoEffect: The weights did not become what was planned.
    """
    check_base(model, change)
    values = compose(model, {n: matrix_of(model, n) for n in change.parts}, [change])
    new = model.with_weights(values)
    prove_stored(model, new, change)
    return new


def prove_stored(before: Model, after: Model, change: Change) -> None:
    """Check that each weight moved by what was planned, to one percent.

    Raises:
        NoEffect: A part is zero, not finite, or lost in the cast.
    """
    if not change.parts:
        raise NoEffect(f"Change {change.id} ({change.method}) holds no weights, so it would do nothing.")
    for name, part in change.parts.items():
        planned = part.delta()
        size = float(planned.norm())
        moved = (matrix_of(after, name).double() - matrix_of(before, name).double()).cpu()
        if not math.isfinite(size) or not torch.isfinite(moved).all():
            raise NoEffect(
                f"The change of {name} is not finite. Plan it with a lower learning rate or a smaller clamp."
            )
        if name.endswith(":bias") and size == 0:
            continue
        error = float((moved - planned.cpu()).norm()) / size if size else math.inf
        if error > TOLERANCE:
            raise NoEffect(
                f"{name} was to move by {size:.3g} and the stored weight misses that by {error:.1%} (allowed {TOLERANCE:.0%})."
            )


def cast_error(model: Model, originals: Mapping[str, Tensor], dtype: str) -> dict[str, float]:
    """Measure how much of a change is lost when weights are cast to a file's type.

    Args:
        model: The changed model.
        originals: The unchanged values by our names, as (outputs, inputs).
        dtype: Of the file, e.g. ``"bfloat16"``.

    Returns:
        For each weight ‖cast(W) - W‖ / ‖W - W0‖: 0 when all survives, 1 when the loss is as large as the change.
    """
    kind = getattr(torch, dtype)
    errors = {}
    for name, old in originals.items():
        new = matrix_of(model, name)
        moved = float((new - old).norm())
        errors[name] = float((new.to(kind).float() - new).norm()) / moved if moved else 0.0
    return errors


@contextmanager
def edited(model: Model, change: Change) -> Iterator[Model]:
    """Give the changed model inside a ``with``; the model itself is never altered.

    Example:
        >>> with edited(model, change) as new:  # doctest: +SKIP
        ...     new.network(...)
    """
    yield apply(model, change)


@contextmanager
def side_by_side(model: Model, changes: Sequence[Change]) -> Iterator[Lanes]:
    """Run n changes of one model at once: each row of a pass sees the change that it carries.

    Equal to applying each change and running its rows alone, at the price of one model: decoding is bound by reading
    the weights, and these are read once for all. Rows come in n equal groups, in order, unless the `Lanes` are told
    otherwise; a change that occurs several times in the list is kept once.

    Example:
        >>> with side_by_side(model, changes) as lanes, lanes.carrying([0, 0, 1]):  # doctest: +SKIP
        ...     model.network(...)  # three rows: two of the first edited model, one of the second
    """
    distinct = list({id(c): c for c in changes}.values())
    lane = {id(c): i for i, c in enumerate(distinct)}
    lanes = Lanes([lane[id(c)] for c in changes], model.device)
    with Trace(model) as trace:
        for name in dict.fromkeys(n for c in distinct for n in c.parts):
            parts = {i: c.parts[name] for i, c in enumerate(distinct) if name in c.parts}
            if name.endswith(":bias"):
                trace.edit(name.removesuffix(":bias"), _shift(parts, lanes, len(distinct), model.device))
            else:
                trace.branches(name, {i: _factors(part) for i, part in parts.items()}, lanes)
        yield lanes


def _factors(part: Part) -> Factors:
    return (part.left, part.right) if isinstance(part, LowRank) else (part.delta().float(), None)


def _shift(parts: Mapping[int, Part], lanes: Lanes, n: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what adds to each row the bias of the change that it carries."""
    some = next(iter(parts.values()))
    stacked = torch.stack(
        [parts[i].delta().float()[:, 0] if i in parts else torch.zeros(some.shape[0]) for i in range(n)]
    )
    stacked = stacked.to(device)
    return lambda out: (out.reshape(lanes.n_rows, -1, out.shape[-1]) + stacked[lanes.index][:, None]).reshape(out.shape)


def combine(changes: Iterable[Change]) -> Change:
    """Join changes of one base into one: low-rank factors are put side by side, whole differences are added.

    Raises:
        WrongBase: The changes have different bases.
    """
    every = sorted(changes, key=lambda c: c.id)
    if len({c.base for c in every}) != 1:
        raise WrongBase("Only changes that were planned for one model can be combined.")
    parts: dict[str, Part] = {}
    keys: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    for change in every:
        for name, part in change.parts.items():
            parts[name] = _joined(parts[name], part) if name in parts else part
        for columns, more in ((keys, change.keys), (targets, change.targets)):
            for name, column in more.items():
                columns[name] = torch.cat([columns[name], column], 1) if name in columns else column
    # where only some of the changes kept targets, nothing would say whose they are
    targets = {n: t for n, t in targets.items() if n in keys and t.shape[1] == keys[n].shape[1]}
    return Change(
        "+".join(dict.fromkeys(c.method for c in every)),
        every[0].base,
        parts,
        facts=tuple(f for c in every for f in c.facts),
        keys=keys,
        targets=targets,
        notes={"combined": [c.id for c in every]},
    )


def _joined(one: Part, two: Part) -> Part:
    if isinstance(one, LowRank) and isinstance(two, LowRank):
        return LowRank(torch.cat([one.left, two.left], 1), torch.cat([one.right, two.right], 0))
    return Dense((one.delta() + two.delta()).float())
