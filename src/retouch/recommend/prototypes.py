"""What knowledge adds for people who have none of their own: the mean over training users who hold the same codes.

The codes come from the recommender's encoder alone, so a prototype needs no language model and costs a few look-ups.
Where too few users hold all codes, the books that say least are left out one by one; at last stands the mean of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import store
from ..errors import StoreError, UserError
from ..progress import track
from .instruction import Instructions
from .splits import Samples

if TYPE_CHECKING:
    from .fitted import PolicyScorer
    from .policy import Policy
    from .splits import Splits

__all__ = ["LEAST", "Prototypes", "drawn_users", "fit_prototypes", "on_prototypes"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

LEAST = 5
"""Users that a mean is made of at least."""
N_USERS = 4096
"""Users whom prototypes are made from, drawn at random where there are more: each costs a pass of the language model."""
_ROWS = 256


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Means of what knowledge adds, as a tree over the codes; the book that explains most of it stands at the root.

    Attributes:
        books: The books in the order of the tree, [books].
        sizes: How many words each of these books has, [books].
        keys: For each depth the nodes below the root, ascending: node of the depth before times words, plus the code.
        means: For each depth from the root on, the mean of each node, [nodes, d_model].
    """

    books: Ints
    sizes: Ints
    keys: tuple[Ints, ...]
    means: tuple[Floats, ...]

    @classmethod
    def fit(
        cls, codes: NDArray[np.integer], residuals: Floats, sizes: tuple[int, ...], least: int = LEAST
    ) -> Prototypes:
        """Average what knowledge adds over users with equal codes.

        Shapes:
            codes: [users, books]; residuals: [users, d_model]

        Args:
            codes: Which word of each book a user holds.
            residuals: What knowledge adds for that user.
            sizes: How many words each book has.
            least: Users that a mean is made of at least; the mean of all is always there.

        Raises:
            UserError: There are no users, or a code is none of its book's.

        Example:
            >>> made = Prototypes.fit(np.array([[0], [0], [1]]), np.array([[1.0], [3.0], [8.0]], np.float32), (2,), 2)
            >>> vectors, depth = made.of(np.array([[0], [1]]))
            >>> vectors[:, 0].tolist(), depth.tolist()
            ([2.0, 4.0], [1, 0])
        """
        codes = codes.astype(np.int64)
        _check(codes, residuals, sizes)
        rows = residuals.astype(np.float64)
        books = np.array(sorted(range(len(sizes)), key=lambda k: (-_explained(codes[:, k], rows), k)), np.int64)
        widths = np.array([sizes[k] for k in books], np.int64)
        keys: list[Ints] = []
        means = [rows.mean(0, keepdims=True).astype(np.float32)]
        node = np.zeros(len(rows), np.int64)
        for book, width in zip(books, widths):
            asked = node * width + codes[:, book]
            names, place, counts = np.unique(asked, return_inverse=True, return_counts=True)
            kept = counts >= least
            means.append((_sums(place, rows, len(names)) / counts[:, None])[kept].astype(np.float32))
            keys.append(names[kept])
            alive = kept[place]
            node, rows, codes = (np.cumsum(kept) - 1)[place[alive]], rows[alive], codes[alive]
        return cls(books, widths, tuple(keys), tuple(means))

    @property
    def d_model(self) -> int:
        """Width of the recommender."""
        return int(self.means[0].shape[1])

    def of(self, codes: NDArray[np.integer] | Tensor) -> tuple[Floats, Ints]:
        """Look up what to add for users with these codes.

        Shapes:
            [users, books] -> [users, d_model], [users]

        Returns:
            The vectors, and how many books each of them goes by: all at best, 0 for the mean of all.
        """
        asked = np.asarray(codes.cpu() if isinstance(codes, Tensor) else codes).astype(np.int64)
        n = len(asked)
        found, depth = np.repeat(self.means[0], n, 0), np.zeros(n, np.int64)
        node, alive = np.zeros(n, np.int64), np.ones(n, bool)
        for level, (book, width) in enumerate(zip(self.books, self.sizes)):
            code, keys = asked[:, book], self.keys[level]
            if not len(keys):
                break
            name = node * width + code
            at = np.minimum(np.searchsorted(keys, name), len(keys) - 1)
            alive &= (keys[at] == name) & (code >= 0) & (code < width)
            found[alive], depth[alive], node = self.means[level + 1][at[alive]], level + 1, at
        return found, depth

    def save(self, path: str | Path) -> None:
        """Write all arrays to a safetensors file."""
        arrays: dict[str, NDArray[np.generic]] = {"books": self.books, "sizes": self.sizes}
        arrays |= {f"keys.{level}": keys for level, keys in enumerate(self.keys)}
        arrays |= {f"means.{level}": means for level, means in enumerate(self.means)}
        store.save_tensors(path, {name: _tensor(array) for name, array in arrays.items()})

    @classmethod
    def load(cls, path: str | Path) -> Prototypes:
        """Read what `save` wrote, and check that it is a tree.

        Raises:
            StoreError: The file is missing or damaged, or holds something else.
        """
        arrays = {name: tensor.numpy() for name, tensor in store.load_tensors(path).items()}
        n = sum(name.startswith("keys.") for name in arrays)
        wanted = {"books", "sizes", *(f"keys.{i}" for i in range(n)), *(f"means.{i}" for i in range(n + 1))}
        if arrays.keys() != wanted or not _is_tree(arrays, n):
            raise StoreError(f"{path} holds no prototypes that fit together. Make the bundle again.")
        keys = tuple(arrays[f"keys.{i}"] for i in range(n))
        return cls(arrays["books"], arrays["sizes"], keys, tuple(arrays[f"means.{i}"] for i in range(n + 1)))


def _tensor(array: NDArray[np.generic]) -> Tensor:
    made: Tensor = torch.from_numpy(np.ascontiguousarray(array))
    return made if array.size else made.new_empty(made.shape)  # an empty array's strides are 0, which no file takes


def _check(codes: NDArray[np.integer], residuals: Floats, sizes: tuple[int, ...]) -> None:
    if not len(residuals) or codes.shape != (len(residuals), len(sizes)):
        raise UserError(
            f"Prototypes need one row of {len(sizes)} codes for each of some users; got codes {codes.shape} and "
            f"vectors {residuals.shape}."
        )
    if len(sizes) and ((codes < 0) | (codes >= np.array(sizes))).any():
        raise UserError(f"A code is none of its book's; the books have {', '.join(map(str, sizes))} words.")


def _is_tree(arrays: Mapping[str, NDArray[np.generic]], n: int) -> bool:
    whole = all(a.dtype == np.int64 and a.ndim == 1 for name, a in arrays.items() if not name.startswith("means"))
    rows = [arrays[f"means.{i}"] for i in range(n + 1)]
    if not whole or any(m.dtype != np.float32 or m.ndim != 2 or m.shape[1] != rows[0].shape[1] for m in rows):
        return False
    lengths = [1, *(len(arrays[f"keys.{i}"]) for i in range(n))]
    books, sizes = arrays["books"], arrays["sizes"]
    if sorted(books.tolist()) != list(range(n)) or len(sizes) != n or lengths != [len(m) for m in rows]:
        return False
    for level in range(n):
        keys = arrays[f"keys.{level}"].astype(np.int64)
        highest = lengths[level] * int(np.asarray(sizes)[level])
        if len(keys) and (keys[0] < 0 or int(keys[-1]) >= highest or (np.diff(keys) <= 0).any()):
            return False
    return True


def _sums(group: Ints, rows: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    found = np.zeros((n, rows.shape[1]))
    np.add.at(found, group, rows)
    return found


def _explained(code: NDArray[np.integer], rows: NDArray[np.float64]) -> float:
    """Return how much of the rows' variance lies between the users of different words."""
    _, group, counts = np.unique(code, return_inverse=True, return_counts=True)
    apart = _sums(group, rows, len(counts)) / counts[:, None] - rows.mean(0)
    return float((counts[:, None] * np.square(apart)).sum())


# ---------------------------------------------------------------- from a policy


def book_sizes(policy: Policy) -> tuple[int, ...]:
    """Return how many words each book has; books that say the same to everybody have one."""
    parts = policy.instructions
    if isinstance(parts, Instructions):
        return (parts.n_codewords,) * parts.n_books
    return () if parts is None else (1,) * len(next(iter(parts.state_dict().values())))


def fit_prototypes(
    fitted: PolicyScorer, splits: Splits, *, n_users: int = N_USERS, least: int = LEAST, seed: int = 0
) -> Prototypes:
    """Make prototypes of a policy from training users, each as before the last training target.

    Args:
        fitted: What fitting a policy returned.
        splits: Who trains; nobody else is read.
        n_users: Most users, drawn at random.
        least: Users that a mean is made of at least.
        seed: Of the draw.

    Raises:
        UserError: The scorer has no policy, or nobody trains.
    """
    policy, asked = fitted.policy, fitted.asked
    if policy is None or asked is None:
        raise UserError("Prototypes are made of a policy's knowledge; this recommender has none.")
    windows = asked.windows(drawn_users(splits, n_users, seed))
    windows = windows[np.argsort((windows > 0).sum(1), kind="stable")]
    residuals, codes = [], []
    parts = [windows[i : i + _ROWS] for i in range(0, len(windows), _ROWS)]
    for part in track(parts, "Asking for prototypes"):
        with torch.no_grad():
            told = policy.tell(torch.from_numpy(part))
        residuals.append(told.residual.float().cpu().numpy())
        codes.append(told.codes.cpu().numpy())
    if not residuals:
        raise UserError("There are no training users to make prototypes of.")
    return Prototypes.fit(np.concatenate(codes), np.concatenate(residuals), book_sizes(policy), least)


def drawn_users(splits: Splits, n_users: int = N_USERS, seed: int = 0) -> Samples:
    """Return the last training sample of each training user, or of as many as are wanted."""
    samples = _last(splits.train)
    if len(samples) > n_users:
        samples = samples.take(np.sort(np.random.default_rng((seed, 31)).permutation(len(samples))[:n_users]))
    return samples


def _last(train: Samples) -> Samples:
    """Return each user's last training sample."""
    order = np.lexsort((train.cuts, train.users))
    last = np.append(train.users[order][1:] != train.users[order][:-1], True) if len(order) else np.zeros(0, bool)
    return train.take(order[last])


def on_prototypes(fitted: PolicyScorer, prototypes: Prototypes) -> PolicyScorer:
    """Return the policy as it serves users without knowledge of their own: the rung ``prototype``."""
    policy, asked = fitted.policy, fitted.asked
    if policy is None or asked is None:
        raise UserError("Prototypes are added by a policy; this recommender has none.")

    def of_windows(windows: NDArray[np.int32]) -> Tensor:
        return residuals_of(policy, prototypes, windows)

    def of_samples(samples: Samples) -> Tensor:
        return of_windows(asked.windows(samples))

    return replace(fitted, residuals=of_samples, window_residuals=of_windows)


@torch.no_grad()
def residuals_of(policy: Policy, prototypes: Prototypes, windows: NDArray[np.int32]) -> Tensor:
    """Return what prototypes add for some histories; zeros for an empty one.

    Shapes:
        [n, history] -> [n, d_model]
    """
    rows = torch.from_numpy(windows).to(policy.generator.first.device)
    if policy.instructions is None or not len(rows):
        return policy.generator.first.new_zeros(len(rows), prototypes.d_model)
    vectors = torch.from_numpy(prototypes.of(policy.codes(rows))[0]).to(policy.generator.first)
    return vectors * (rows > 0).any(1, keepdim=True)
