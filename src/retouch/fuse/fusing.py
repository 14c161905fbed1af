"""The driver of all fusion: weight by weight, what stands before a method, the method, and its scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..change import Change, LowRank
from ..errors import UserError
from ..progress import track
from ._blocks import Blocks, averaged
from .base import Adapter, FuseMethod, Ground, Module, Resolver, modules, shares
from .core import Core, Fused, spanned, triples, weighted, within
from .coverage import corrected

__all__ = ["gathered", "plan", "resolved", "stream"]


def stream(
    method: FuseMethod,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    ground: Ground | None = None,
    resolver: Resolver | None = None,
) -> Iterator[tuple[str, LowRank]]:
    """Fuse weight by weight: one weight's factors are in memory at a time.

    Args:
        method: What fuses.
        adapters: The adapters, of one base.
        weights: One for each; a mean has weights that sum to 1.
        ground: What methods that look at data need.
        resolver: What lessens conflict first.

    Yields:
        Our name of each weight and its fused difference, scaled. Differences that are zero are yielded too.

    Raises:
        UserError: The adapters do not belong together, the method needs what `ground` does not hold, or the resolver
            cannot stand before the method.
    """
    chosen, choice = _weighed(method, adapters, weights, ground, resolver)
    return _stream(method, adapters, chosen, ground, resolver, choice.get("weights_of", {}))


def _weighed(
    method: FuseMethod,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    ground: Ground | None,
    resolver: Resolver | None,
) -> tuple[Sequence[float], Mapping[str, Any]]:
    """Check what was given, and let the method choose the weights."""
    if not adapters or len(adapters) != len(weights):
        raise UserError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter.")
    _check_ground(method, adapters, ground)
    if resolver is not None and not method.resolvable:
        why = "chooses weights for the differences as they are" if method.chooses else "fuses factors, not differences"
        raise UserError(
            f"{method.name} {why}, so no resolver can stand before it. Leave {resolver.name} out, or fuse by cat."
        )
    return method.weigh(adapters, weights, ground)


def _stream(
    method: FuseMethod,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    ground: Ground | None,
    resolver: Resolver | None,
    weights_of: Mapping[str, Sequence[float]],
) -> Iterator[tuple[str, LowRank]]:
    total = len({name for adapter in adapters for name in adapter.parts})
    for module in track(modules(adapters, weights), "fusing weights", total):
        if (own := weights_of.get(module.name)) is not None:
            module = replace(module, weights=tuple(own[i] for i in module.owners))
        if not any(module.weights):
            yield module.name, LowRank(torch.zeros(module.shape[0], 1), torch.zeros(1, module.shape[1]))
            continue
        asked = _weighty(module, own or weights)
        if method.needs == "moments":
            asked = _with_moments(asked, ground)
        if method.corrects():
            asked = corrected(asked)
        if resolver is not None:
            asked = resolved(asked, method, resolver)
        yield module.name, _scaled(_fitted(method.fuse(asked)), method.lam)


def _check_ground(method: FuseMethod, adapters: Sequence[Adapter], ground: Ground | None) -> None:
    if method.needs == "selection" and (ground is None or not ground.selection):
        raise UserError(
            f"{method.name} needs questions of the selection split; none were given. Give the domains' questions (--data)."
        )
    if method.needs == "moments" and (ground is None or len(ground.moments) != len(adapters)):
        got = 0 if ground is None else len(ground.moments)
        raise UserError(
            f"{method.name} needs each adapter's second moments; {got} of {len(adapters)} were given. "
            "Ask the edges for them (they tell something of the edges' data), or fuse by cat."
        )


def _weighty(module: Module, weights: Sequence[float]) -> Module:
    """Leave out adapters of weight 0, which no rule hears."""
    n = sum(w != 0 for w in weights)
    kept = [i for i, w in enumerate(module.weights) if w != 0]
    if n == len(weights):
        return module
    picked: dict[str, Any] = {
        field: tuple(getattr(module, field)[i] for i in kept)
        for field in ("parts", "weights", "owners", "kept", "names")
    }
    return replace(module, n_adapters=n, **picked)


def _with_moments(module: Module, ground: Ground | None) -> Module:
    given = [ground.moments[i] for i in module.owners] if ground is not None else []
    if lacking := [str(i) for i, m in zip(module.owners, given) if module.name not in m]:
        names = ", ".join(module.names[module.owners.index(int(i))] for i in lacking)
        raise UserError(f"No second moments of {module.name} were given for {names}.")
    return replace(module, moments=tuple(m[module.name] for m in given))


def resolved(module: Module, method: FuseMethod, resolver: Resolver) -> Module:
    """Let a resolver change the differences of one weight, in the core or entry by entry.

    Raises:
        UserError: The resolver changes single entries and the method does not look at them, or it has given back
            something else than coordinates of as many adapters.
    """
    entries = resolver.entries(module)
    if entries is None:
        core = spanned(module.parts)
        new = resolver.resolve(core, module)
        _check_core(new, module, resolver)
        if resolver.norm_matched:
            old, wanted = (float(weighted(c, module.weights).norm()) for c in (core, new))
            new = replace(core, middles=core.middles * (wanted / old if old else 1.0))
        return replace(module, parts=_parts(new), core=new, ranks=tuple(p.rank for p in module.parts))
    if not method.takes_entries():
        raise UserError(
            f"{resolver.name} changes single entries of the whole weight, which leaves no low rank for {method.label} "
            f"to work on. Set space=core for {resolver.name}, or fuse by cat or a method of entries such as ties."
        )
    lessened = replace(module, entries=entries)
    if resolver.norm_matched:
        before, after = _mean_norm(module), _mean_norm(lessened)
        scale = after / before if before else 1.0
        return replace(module, parts=tuple(LowRank(p.left * scale, p.right) for p in module.parts))
    return lessened


def _mean_norm(module: Module) -> float:
    """Return the norm of the weighted mean of a weight's differences, entries changed as the module says."""
    return math.sqrt(sum(float(averaged(x, module.weights).double().square().sum()) for _, x in Blocks(module)))


def _check_core(core: Core, module: Module, resolver: Resolver) -> None:
    want = (len(module.parts), core.left.shape[1], core.right.shape[0])
    fits = (core.left.shape[0], core.right.shape[1]) == module.shape and tuple(core.middles.shape) == want
    if not fits or not bool(core.middles.isfinite().all()):
        raise UserError(
            f"The resolver {resolver.name} gave coordinates {tuple(core.middles.shape)} at {module.name}; "
            f"finite ones of shape {want} are wanted."
        )


def _parts(core: Core) -> tuple[LowRank, ...]:
    """Write coordinates as factors; all adapters share the longer one."""
    left, right = core.left, core.right
    if left.shape[0] * right.shape[0] <= right.shape[1] * left.shape[1]:
        shared = right.float()
        return tuple(LowRank((left @ middle).float(), shared) for middle in core.middles)
    shared = left.float()
    return tuple(LowRank(shared, (middle @ right).float()) for middle in core.middles)


def _fitted(fused: LowRank) -> LowRank:
    """Cut factors that are wider than their product."""
    if fused.rank <= min(fused.shape):
        return fused
    notes = fused.notes if isinstance(fused, Fused) else {}
    return replace(within(*triples(fused)), notes=notes)


def _scaled(fused: LowRank, lam: float) -> LowRank:
    left: Tensor = fused.left if lam == 1 else fused.left * lam
    return replace(fused, left=left.float().contiguous(), right=fused.right.float().contiguous())


def gathered(pairs: Iterable[tuple[str, LowRank]], told: dict[str, dict[str, float]]) -> Iterator[tuple[str, LowRank]]:
    """Pass fused differences on, and gather in `told` what their method says of each weight: by what, by weight."""
    for name, fused in pairs:
        for what, number in (fused.notes if isinstance(fused, Fused) else {}).items():
            told.setdefault(what, {})[name] = number
        yield name, fused


def plan(
    method: FuseMethod,
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    ground: Ground | None = None,
    resolver: Resolver | None = None,
) -> Change:
    """Fuse adapters into one change of their base; nothing is altered.

    Args:
        method: What fuses.
        adapters: The adapters, of one base.
        weights: Their shares, made to sum to 1; by default equal ones.
        ground: What methods that look at data need.
        resolver: What lessens conflict first.

    Raises:
        UserError: As `stream`; or nothing is left of the adapters' differences.
    """
    given, choice = _weighed(method, adapters, shares(adapters, weights), ground, resolver)
    parts: dict[str, LowRank] = {}
    told: dict[str, dict[str, float]] = {}
    zero = []
    found = _stream(method, adapters, given, ground, resolver, choice.get("weights_of", {}))
    for name, fused in gathered(found, told):
        if not (bool(fused.left.any()) and bool(fused.right.any())):
            zero.append(name)
            continue
        parts[name] = LowRank(fused.left, fused.right)
    if not parts:
        raise UserError(
            f"Nothing is left after fusing {', '.join(a.name for a in adapters)} by {method.label}: every difference is 0."
        )
    notes: dict[str, Any] = {"adapters": [a.name for a in adapters], "weights": list(given), **told, **choice}
    if zero:
        notes["zero"] = zero
    if resolver is not None:
        notes["resolver"] = {"name": resolver.name, **resolver.to_dict()}
    return Change(method.label, adapters[0].base, parts, settings=method.to_dict(), notes=notes)
