"""What fusion is given and what it makes: examples, questions, adapters, the method and the resolver.

Nothing here knows a path. Factors are float32, seen as (outputs, rank) and (rank, inputs), with every scale folded in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import UserError
from ..settings import Settings, setting

if TYPE_CHECKING:
    from torch import Tensor

    from ..change import Change, LowRank
    from ..model import Model
    from .core import Core

__all__ = [
    "Adapter",
    "Entries",
    "Example",
    "FuseMethod",
    "Ground",
    "Kept",
    "Module",
    "Question",
    "Resolver",
    "modules",
    "shares",
]

Entries = Callable[["Tensor", int], "Tensor"]
"""What changes a block of rows of all differences before a rule sees it: (adapters, rows, inputs), first row -> the same."""


# ---------------------------------------------------------------- what an edge trains on, what a suite asks


@dataclass(frozen=True)
class Example:
    """A text to learn: what is given, and what is to follow it."""

    prompt: str
    target: str


@dataclass(frozen=True)
class Question:
    """A question with lettered options.

    Attributes:
        domain: The suite's domain, one adapter's field.
        subject: A finer name, for the prompt.
        stem: The question itself.
        options: Its options, in order.
        answer: Which option is right, from 0.
        key: Hash of the normalised question: equal questions have equal keys, so they share a split.
    """

    domain: str
    subject: str
    stem: str
    options: tuple[str, ...]
    answer: int
    key: str


# ---------------------------------------------------------------- adapters


MAX_EXAMPLES = 10**12
"""No edge counts more; whoever says so wants the whole weight of a fusion."""


@dataclass(frozen=True)
class Kept:
    """The rows or columns of a weight that an adapter's edge could see; all others are structural zeros.

    Attributes:
        axis: ``"rows"`` (outputs) or ``"columns"`` (inputs).
        index: The kept ones, sorted.
    """

    axis: Literal["rows", "columns"]
    index: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank change of some weights, trained somewhere.

    Attributes:
        name: What reports call it.
        parts: Its factors by our names of the weights. It may be a mapping that reads a weight's factors when asked,
            so that adapters larger than memory can be fused weight by weight.
        base: Fingerprint of the model it is a difference to.
        kept: What its edge could see of each weight, where it was not everything.
        plan: Hash of the pruning plan it was trained under; empty if the model was whole.
        n_examples: How many examples trained it, if known.
        notes: What reports say of it.
    """

    name: str
    parts: Mapping[str, LowRank]
    base: str
    kept: Mapping[str, Kept] = field(default_factory=dict)
    plan: str = ""
    n_examples: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Module:
    """One weight with the factors of those adapters that change it.

    Attributes:
        name: Our name of the weight; random streams are keyed by it.
        parts: A difference for each adapter of `owners`.
        weights: Their weights; over all adapters of the fusion they sum to 1, so here to at most 1.
        owners: Numbers of the adapters, in the order given to the fusion.
        n_adapters: How many adapters are fused, whether or not they change this weight.
        kept: What each could see of it; None is everything.
        names: What reports call those adapters; random streams are keyed by them, so that their order does not matter.
        moments: The second moment of what flows into the weight at each of them, for methods that need it.
        core: The differences as coordinates, where a resolver has changed them; `parts` then holds the same.
        entries: What a resolver does to the entries of the differences, for methods that look at single entries.
        ranks: The adapters' ranks, where a resolver has written `parts` with others.
    """

    name: str
    parts: tuple[LowRank, ...]
    weights: tuple[float, ...]
    owners: tuple[int, ...]
    n_adapters: int
    kept: tuple[Kept | None, ...]
    names: tuple[str, ...] = ()
    moments: tuple[Any, ...] = ()
    core: Core | None = None
    entries: Entries | None = None
    ranks: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of the weight."""
        return self.parts[0].shape

    @property
    def rank(self) -> int:
        """The sum of all ranks."""
        return sum(self.ranks or (part.rank for part in self.parts))


def shares(
    adapters: Sequence[Adapter], weights: Sequence[float] | Literal["examples"] | None = None
) -> tuple[float, ...]:
    """Return the weights of adapters, summing to 1: equal ones, those given, or by numbers of examples.

    Raises:
        UserError: There is no adapter, a weight is missing, negative or not finite, all are zero, or an adapter does
            not say how many examples trained it, or more than there can be.
    """
    import math

    if not adapters:
        raise UserError("There is no adapter to fuse.")
    if weights == "examples":
        if silent := [a.name for a in adapters if not a.n_examples]:
            raise UserError(f"The adapter {silent[0]} does not say how many examples trained it; give weights.")
        if false := [a.name for a in adapters if (a.n_examples or 0) > MAX_EXAMPLES]:
            raise UserError(
                f"The adapter {false[0]} says that over {MAX_EXAMPLES:,} examples trained it, which no edge has; give weights."
            )
        weights = [float(a.n_examples or 0) for a in adapters]
    numbers = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if len(numbers) != len(adapters):
        raise UserError(f"{len(adapters)} adapters need as many weights; got {len(numbers)}.")
    total = math.fsum(numbers)
    if not math.isfinite(total) or total <= 0 or min(numbers) < 0:
        raise UserError(f"Weights must be finite, not negative and not all 0; got {', '.join(map(str, numbers))}.")
    return tuple(n / total for n in numbers)


def modules(adapters: Sequence[Adapter], weights: Sequence[float]) -> Iterator[Module]:
    """Go through the weights that any adapter changes, in the adapters' order, reading one weight's factors at a time.

    Raises:
        UserError: Adapters belong to different bases, or disagree about a weight's size.
    """
    if len({a.base for a in adapters}) > 1:
        told = ", ".join(f"{a.name}: {a.base[:8] or 'unknown'}" for a in adapters)
        raise UserError(
            f"The adapters belong to different base models ({told}); only adapters of one base can be fused."
        )
    for name in dict.fromkeys(name for a in adapters for name in a.parts):
        owners = tuple(i for i, a in enumerate(adapters) if name in a.parts)
        parts = tuple(adapters[i].parts[name] for i in owners)
        if len({p.shape for p in parts}) > 1:
            told = ", ".join(f"{adapters[i].name}: {p.shape}" for i, p in zip(owners, parts))
            raise UserError(f"The adapters disagree about the size of {name} ({told}).")
        kept = tuple(adapters[i].kept.get(name) for i in owners)
        names = tuple(adapters[i].name for i in owners)
        yield Module(name, parts, tuple(weights[i] for i in owners), owners, len(adapters), kept, names)


# ---------------------------------------------------------------- methods


@dataclass(frozen=True, eq=False)
class Ground:
    """What methods that look at data or the model may use; all of it comes from selection, never from test.

    Attributes:
        model: The base.
        selection: Questions by domain.
        moments: For each adapter the second moments (inputs, inputs) of what flows into each weight, if sent.
        wording: Name of the template that the questions are asked with.
        chat: Whether they are asked through the chat template.
        shots: Answered examples in front, where the template wants them.
    """

    model: Model
    selection: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    moments: Sequence[Mapping[str, Any]] = ()
    wording: str = "plain"
    chat: bool = False
    shots: Sequence[Sequence[Question]] = ()


@dataclass(frozen=True)
class Resolver(Settings, ABC):
    """Base of what lessens conflict among adapters before any method fuses them. Its name is its file's name.

    It works on the adapters' coordinates in the core that they span, and leaves what they span alone.
    """

    norm_matched: bool = setting(
        False, "A control: leave the adapters as they are, at the norm that resolving gives their mean."
    )
    seed: int = setting(0, "Seed of everything random.", ge=0)

    @property
    def name(self) -> str:
        """The resolver's name: its file's."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @abstractmethod
    def resolve(self, core: Core, module: Module) -> Core:
        """Return the core with its adapters' coordinates changed.

        Args:
            core: In its canonical basis.
            module: Where the coordinates come from; its name keys random streams.
        """

    def entries(self, module: Module) -> Entries | None:
        """Return what changes the entries of the whole differences, or None if the resolver works in the core.

        Only methods that look at single entries of the weight can follow a resolver that does.
        """
        return None


@dataclass(frozen=True)
class FuseMethod(Settings, ABC):
    """Base of every fusion method. Its name is its file's name.

    Its one job is `plan`, and most methods only say how one weight's differences become one (`fuse`). The result of
    `fuse` is normalised as a mean: adapters that are equal give that adapter. `lam` multiplies it afterwards.
    """

    lam: float = setting(1.0, "Scale of the fused change; 1 is the mean.", gt=0)
    coverage: bool = setting(True, "Average over the edges that could see a row or column, not over all.")
    seed: int = setting(0, "Seed of everything random.", ge=0)

    averages: ClassVar[bool] = True
    """Whether the rule averages, so that what few edges could see must be divided by fewer."""
    gauge_dependent: ClassVar[bool] = False
    """Whether the result changes when an adapter's factors B, A are replaced by B G and the inverse of G times A."""
    resolvable: ClassVar[bool] = True
    """Whether a resolver may stand before the method: not where it fuses factors and not differences."""
    chooses: ClassVar[bool] = False
    """Whether the method chooses the weights, and so the scale, itself (`weigh`); `lam` is then not tuned."""
    needs: ClassVar[Literal["", "selection", "moments"]] = ""
    """What `Ground` must hold."""

    @property
    def name(self) -> str:
        """The method's name: its file's."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @property
    def label(self) -> str:
        """What a fused change calls its method; a rule that is another one in another space says so."""
        return self.name

    def corrects(self) -> bool:
        """Whether what few edges could see is divided by the weight of those few."""
        return self.averages and self.coverage

    def takes_entries(self) -> bool:
        """Whether the rule looks at single entries of the weight, so that a resolver of entries may stand before it."""
        return False

    def out_rank(self, ranks: Sequence[int], shape: tuple[int, int], resolver: Resolver | None = None) -> int:
        """Return the rank that one weight's fused difference has at most, known before anything is fused.

        Args:
            ranks: Of each adapter's difference; 0 where an adapter does not change the weight.
            shape: Outputs and inputs of the weight.
            resolver: What is to stand before the method.
        """
        return min(sum(ranks), *shape)

    def weigh(
        self, adapters: Sequence[Adapter], weights: Sequence[float], ground: Ground | None
    ) -> tuple[Sequence[float], Mapping[str, Any]]:
        """Choose the adapters' weights before anything is fused; most methods leave them as they are.

        Args:
            adapters: The adapters.
            weights: Those given, summing to 1.
            ground: What the choice may look at.

        Returns:
            The weights, of any sign, and what the fused change is to say of the choice.
        """
        return weights, {}

    @abstractmethod
    def fuse(self, module: Module) -> LowRank:
        """Turn the differences of one weight into one, normalised as a mean."""

    def stream(self, adapters: Sequence[Adapter], weights: Sequence[float], ground: Ground | None = None,
               resolver: Resolver | None = None) -> Iterator[tuple[str, LowRank]]:  # fmt: skip
        """Fuse weight by weight: one weight's factors are in memory at a time.

        Raises:
            UserError: The adapters do not belong together, or the method needs what `ground` does not hold.
        """
        from .fusing import stream

        return stream(self, adapters, weights, ground, resolver)

    def plan(self, adapters: Sequence[Adapter], weights: Sequence[float] | None = None, ground: Ground | None = None,
             resolver: Resolver | None = None) -> Change:  # fmt: skip
        """Fuse adapters into one change of their base; nothing is altered.

        Raises:
            UserError: As `stream`.
        """
        from .fusing import plan

        return plan(self, adapters, weights, ground, resolver)
