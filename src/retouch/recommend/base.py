"""What recommending is given and what a fitted method can do: items, histories, the run, the method, the scorer.

Nothing here loads torch. Inside, users and items are numbers from 1 and 0 is padding; raw ids are strings and stay so
in every answer. A window of history is padded on the left, so its last place is the latest item.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from ..errors import UserError
from ..settings import Settings, setting

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..model import Model
    from .data import Interactions
    from .reference import Generator
    from .splits import Samples, Splits
    from .tokenise import Catalogue

__all__ = ["OUTSIDE", "History", "Item", "Recommender", "Run", "Scorer"]

T = TypeVar("T")

OUTSIDE = 2**31 - 1
"""The rank of a target that a search did not find: worse than any place in a catalogue."""


@dataclass(frozen=True)
class Item:
    """One thing that can be recommended.

    Attributes:
        id: Its id in the user's own data.
        text: Everything that describes it, in one line; the title when nothing else is known.
        title: Its name for people.
        categories: Names of groups that it belongs to, for filters and health reports.
    """

    id: str
    text: str
    title: str
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class History:
    """What one user took.

    Attributes:
        user: The user's id in the user's own data.
        items: Raw ids of the items, oldest first.
    """

    user: str
    items: tuple[str, ...]


@runtime_checkable
class Scorer(Protocol):
    """What every fitted method can do, in batches of its own.

    A sample names a user and a cut: the target is the item at the cut, the prefix is what stands before it.
    """

    def ranks(self, samples: Samples) -> NDArray[np.int64]:
        """Return the rank of each target in the full catalogue, 1 = best.

        An item with an equal score counts as better than the target. A target that a search did not reach has rank
        `OUTSIDE`.

        Shapes: [samples]
        """
        ...

    def log_likelihood(self, samples: Samples) -> NDArray[np.float64]:
        """Return the log-probability of each target given its prefix, in nats per item.

        Shapes: [samples]
        """
        ...

    def top(self, windows: NDArray[np.int32], k: int) -> NDArray[np.int32]:
        """Return the best `k` items for each window of history, best first; 0 where there are fewer.

        Shapes: windows [n, history] -> [n, k]
        """
        ...


@dataclass(frozen=True, eq=False)
class Run:
    """Everything that a method may use to fit; it knows no other path, device or data.

    Attributes:
        data: The interactions and items.
        splits: Who and what is trained on.
        catalogue: The items' codes, where a method recommends by codes.
        folder: Where long work leaves its checkpoints and finds them again; None: nothing is kept.
        reference: The fitted recommender without knowledge.
        model: The opened language model.
        n_history: How many of the latest items a method sees, unless its own settings say otherwise.
        device: Where to compute, as torch names it.
    """

    data: Interactions
    splits: Splits
    catalogue: Catalogue | None = None
    folder: Path | None = None
    reference: Generator | None = None
    model: Model | None = None
    n_history: int = 20
    device: str = "cpu"

    def needs_catalogue(self) -> Catalogue:
        """Return the items' codes.

        Raises:
            UserError: The run has none.
        """
        return _given(self.catalogue, "the items' codes: tokenise the catalogue first")

    def needs_reference(self) -> Generator:
        """Return the fitted recommender without knowledge.

        Raises:
            UserError: The run has none.
        """
        return _given(self.reference, "a fitted reference: fit the method 'reference' first")

    def needs_model(self) -> Model:
        """Return the language model.

        Raises:
            UserError: The run has none.
        """
        return _given(self.model, "a language model: name one, such as smollm2")


def _given(part: T | None, what: str) -> T:
    if part is None:
        raise UserError(f"This method needs {what}.")
    return part


@dataclass(frozen=True)
class Recommender(Settings, ABC):
    """Base of every recommender, rival or control, all measured by the same harness. Its name is its file's name.

    The fields are what it can be told; its one job is `fit`.
    """

    seed: int = setting(0, "Seed of everything random.", ge=0)

    @property
    def name(self) -> str:
        """The method's name: its file's."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @abstractmethod
    def fit(self, run: Run) -> Scorer:
        """Fit to the training targets of a run, and to nothing else.

        Args:
            run: Data, splits, and whatever a method builds upon.

        Returns:
            What ranks items and measures likelihoods.

        Raises:
            UserError: The run lacks something that this method needs.
        """
