"""What slimming is asked for, and what it decides before any training: a budget, sizes, widths, a plan, a method.

Nothing here loads torch. The arithmetic of parameters and FLOPs lives in `widths.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..errors import UserError
from ..settings import Settings, setting

__all__ = ["Budget", "Plan", "Size", "SlimMethod", "Widths", "fraction"]

CostName = Literal["flops", "seconds"]


# ---------------------------------------------------------------- what is asked for


def fraction(text: str | float, name: str) -> float:
    """Read a share of the original: ``1/8``, ``0.125``, ``12.5%`` and ``8x`` (eight times less) are all 0.125.

    Args:
        text: What was written, or a number.
        name: What the share is of, for the error.

    Returns:
        A number above 0 and at most 1.

    Raises:
        UserError: It cannot be read, or is not such a number.

    Example:
        >>> fraction("1/8", "params"), fraction("12.5%", "params"), fraction("8x", "params")
        (0.125, 0.125, 0.125)
    """
    forms = "Write a share of the original above 0 and at most 1, such as 1/8, 0.125, 12.5% or 8x (eight times less)"
    try:
        value = _read(text)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{name} cannot be read from {text!r}. {forms}.") from error
    if not 0 < value <= 1:
        whole = value > 1 and math.isfinite(value) and not str(text).strip().endswith(("x", "X", "%"))
        hint = f" Did you mean 1/{value:g}?" if whole else ""
        raise UserError(f"{name} must be above 0 and at most 1; got {text!r}.{hint} {forms}.")
    return value


def _read(text: str | float) -> float:
    if isinstance(text, bool):
        raise TypeError("a truth value is no share")
    if not isinstance(text, str):
        return float(text)
    word = text.strip().lower()
    if word.endswith("%"):
        return float(word[:-1]) / 100
    if word.endswith("x"):
        return 1 / float(word[:-1])
    above, slash, below = word.partition("/")
    return float(above) / float(below) if slash else float(above)


@dataclass(frozen=True, init=False)
class Budget:
    """What the slim model may cost, and how much it may lose. Either sizes are given, or `max_drop` finds them.

    Args:
        params: Most parameters, as a share of the original's; None: not limited.
        flops: Most FLOPs on average, as a share of the original's; None: not limited, so every block runs.
        max_harm: Most harm that the certificate allows, between 0 and 1; None: no certificate.
        max_drop: In place of all of these: the smallest model whose quality falls by at most this much.
        cost: What `flops` is a share of when thresholds are chosen: ``"flops"``, or measured ``"seconds"``.

    Raises:
        UserError: A share cannot be read or lies outside of its range, or the fields contradict each other.

    Example:
        >>> Budget(params="1/8", flops="12.5%").flops
        0.125
    """

    params: float | None
    flops: float | None
    max_harm: float | None
    max_drop: float | None
    cost: CostName

    def __init__(
        self,
        params: str | float | None = None,
        flops: str | float | None = None,
        max_harm: str | float | None = None,
        max_drop: str | float | None = None,
        cost: str = "flops",
    ) -> None:
        given = {"params": params, "flops": flops, "max_harm": max_harm, "max_drop": max_drop}
        for name, value in given.items():
            read = fraction if name in ("params", "flops") else _loss
            object.__setattr__(self, name, None if value is None else read(value, name))
        object.__setattr__(self, "cost", cost)
        self._check()

    def _check(self) -> None:
        if self.cost not in ("flops", "seconds"):
            raise UserError(f"cost must be 'flops' or 'seconds'; got {self.cost!r}.")
        given = [name for name in ("params", "flops", "max_harm") if getattr(self, name) is not None]
        sizes = [name for name in given if name != "max_harm"]
        if self.max_drop is not None and given:
            raise UserError(
                "max_drop looks for the smallest model itself and certifies its own limit, so it cannot be joined with "
                f"{' and '.join(given)}. Give either max_drop or sizes (a certificate beside sizes is max_harm)."
            )
        if self.max_drop is None and not sizes:
            raise UserError("A budget needs params, flops or max_drop, for example params 1/8 and flops 1/19.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; ``Budget(**values)`` reads them."""
        return asdict(self)


def _loss(text: str | float, name: str) -> float:
    """Read a loss that is allowed; 1 would allow everything and ``8x`` has no meaning."""
    times = isinstance(text, str) and text.strip().lower().endswith("x")
    try:
        value = math.nan if times else _read(text)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        value = math.nan
    if not 0 < value < 1:
        raise UserError(f"{name} must be above 0 and below 1, such as 0.03 or 3%; got {text!r}.")
    return value


# ---------------------------------------------------------------- the original and the slim one in numbers


@dataclass(frozen=True)
class Size:
    """The original encoder in numbers.

    Args:
        blocks: How many blocks it has.
        d_model: Width of the residual stream.
        heads: Attention heads of a block; their size, d_model / heads, is never cut.
        d_ff: Neurons of a block's MLP.
        vocab: Rows of the word embedding.
        positions: Rows of the position embedding.
        token_types: Rows of the token type embedding; 0 where the family has none.
        classes: Outputs of the classifier.
        pooler: Whether the original has a dense d_model x d_model map before its classifier.
        extra: Parameters that are never cut and belong to no row of the formula.

    Raises:
        UserError: A number is not possible.
    """

    blocks: int
    d_model: int
    heads: int
    d_ff: int
    vocab: int
    positions: int
    token_types: int
    classes: int
    pooler: bool = True
    extra: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            least = 0 if f.name in ("positions", "token_types", "pooler", "extra") else 1
            if not isinstance(value := getattr(self, f.name), int) or value < least:
                raise UserError(f"An encoder's {f.name} must be a whole number of at least {least}; got {value!r}.")
        if self.d_model % self.heads:
            raise UserError(f"{self.heads} heads do not divide a width of {self.d_model}.")

    @property
    def head_dim(self) -> int:
        """The size of one head."""
        return self.d_model // self.heads

    def exits(self, exits: Iterable[int] | None = None) -> tuple[int, ...]:
        """Return the blocks with an exit in order, all of them by default; the last always has one.

        Raises:
            UserError: There is no such block.
        """
        found = set(range(self.blocks)) if exits is None else {*exits, self.blocks - 1}
        for block in found:
            if not 0 <= block < self.blocks:
                raise UserError(f"There is no block {block} for an exit: blocks count from 0 to {self.blocks - 1}.")
        return tuple(sorted(found))


@dataclass(frozen=True)
class Widths:
    """How wide each block is, and where the exits are.

    Args:
        heads: Attention heads, for each block.
        d_ff: MLP neurons, for each block.
        rank: Rank of the word embedding's two factors; None: one table, as in the original.
        exits: Blocks with an exit, in order; the last block is among them.

    Raises:
        UserError: The blocks of two fields differ in number, a width is below 1, or the exits are not in order.
    """

    heads: tuple[int, ...]
    d_ff: tuple[int, ...]
    rank: int | None
    exits: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.heads) != len(self.d_ff) or not self.heads:
            raise UserError(f"Widths need one entry a block: got {len(self.heads)} of heads, {len(self.d_ff)} of d_ff.")
        if min(self.heads + self.d_ff) < 1 or (self.rank is not None and self.rank < 1):
            raise UserError(f"Widths must be at least 1; got heads {self.heads}, d_ff {self.d_ff}, rank {self.rank}.")
        ordered = list(self.exits) == sorted(set(self.exits)) and min(self.exits, default=-1) >= 0
        if not ordered or self.exits[-1] != len(self.heads) - 1:
            raise UserError(f"Exits must be blocks in order, up to the last block {len(self.heads) - 1}; got "
                            f"{list(self.exits)}.")  # fmt: skip

    @classmethod
    def full(cls, size: Size, exits: Iterable[int] | None = None) -> Widths:
        """Return the original's widths, with exits at the given blocks (all by default)."""
        return cls.uniform(size, size.heads, size.d_ff, None, exits)

    @classmethod
    def uniform(cls, size: Size, heads: int, d_ff: int, rank: int | None, exits: Iterable[int] | None = None) -> Widths:
        """Return the same widths for every block, with exits at the given blocks (all by default).

        Raises:
            UserError: A width exceeds the original's, or there is no such block.
        """
        widths = cls((heads,) * size.blocks, (d_ff,) * size.blocks, rank, size.exits(exits))
        widths.require_within(size)
        return widths

    @property
    def n_exits(self) -> int:
        """How many exits there are."""
        return len(self.exits)

    def require_within(self, size: Size) -> None:
        """Check that these widths can be cut from an original.

        Raises:
            UserError: The blocks differ in number, or a width exceeds the original's.
        """
        if len(self.heads) != size.blocks:
            raise UserError(f"These widths are for {len(self.heads)} blocks; the original has {size.blocks}.")
        most = {"heads": (max(self.heads), size.heads), "d_ff": (max(self.d_ff), size.d_ff)}
        most["rank"] = (self.rank or 0, min(size.d_model, size.vocab))
        for name, (value, limit) in most.items():
            if value > limit:
                raise UserError(f"{name} {value} is more than the original's {limit}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return {"heads": list(self.heads), "d_ff": list(self.d_ff), "rank": self.rank, "exits": list(self.exits)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Widths:
        """Read what `to_dict` wrote."""
        heads, d_ff, exits = (tuple(int(v) for v in values[name]) for name in ("heads", "d_ff", "exits"))
        return cls(heads, d_ff, None if values["rank"] is None else int(values["rank"]), exits)


@dataclass(frozen=True)
class Plan:
    """What a budget becomes before any training.

    Args:
        size: The original.
        widths: What is kept of it.
        params_ratio: Parameters of the slim model, as a share of the original's.
        flops_ratio: FLOPs when every example runs all blocks, as a share of the original's, at the lengths planned for.
        mean_depth: How many blocks an example may run on average; all of them where no FLOPs target asks for less.

    Raises:
        UserError: The widths cannot be cut from such an original.
    """

    size: Size
    widths: Widths
    params_ratio: float
    flops_ratio: float
    mean_depth: float

    def __post_init__(self) -> None:
        self.widths.require_within(self.size)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON can hold."""
        return {**asdict(self), "widths": self.widths.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Read what `to_dict` wrote."""
        size, widths = Size(**values["size"]), Widths.from_dict(values["widths"])
        return cls(size, widths, **{k: values[k] for k in ("params_ratio", "flops_ratio", "mean_depth")})


# ---------------------------------------------------------------- methods


@dataclass(frozen=True)
class SlimMethod(Settings, ABC):
    """Base of every slimming method, and of every rival in the same bench. Its name is its file's name.

    The fields are what it can be told; its one job is `fit`. It knows no path, no device and no command line: those
    belong to the run that it is given.
    """

    preset: Literal["fast", "paper"] = setting(
        "fast", "fast: minutes on a CPU, budgets in tokens; paper: the published epochs and rates, for a GPU."
    )
    seed: int = setting(0, "Seed of everything random.", ge=0)

    @property
    def name(self) -> str:
        """The method's name: its file's."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @abstractmethod
    def fit(self, run: Any) -> Any:
        """Train what this method makes of the original, and return it before any threshold is chosen.

        Args:
            run: What `retouch.slim.stages` offers: the task with its splits (`task`), the opened model (`model`), the
                plan (`plan`), a folder for what is resumed or reused (`folder`), and the stages themselves.

        Returns:
            The fitted networks and their history, as `retouch.slim.stages` declares them.

        Raises:
            UserError: The task or the model cannot be used by this method.
        """
