"""Codes by a residual-quantised auto-encoder, as in TIGER: the vector is squeezed first, then quantised level by level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import StoreError
from ..progress import report
from ..settings import Settings, setting
from ._kmeans import Rows, checked, codes_for, kmeans
from .tokenise import Codes, Fitted

__all__ = ["RQVAE", "FittedRQVAE"]

_ROWS_FOR_START = 20_000
_UNUSED_STEPS = 100
"""A code that no row chose for so many steps moves onto a row that is served badly."""


@dataclass(frozen=True)
class RQVAE(Settings):
    """Give items codes by training an auto-encoder whose narrow middle is quantised level by level.

    Source: RQ-VAE as in TIGER (Rajput et al., arXiv 2305.05065).

    Use when: numbers are compared with published ones that use it. `rq_kmeans` takes seconds and collides no more.

    Known problems: thousands of epochs; codebooks may collapse, which the health report finds.

    Example:
        >>> vectors = np.random.default_rng(0).normal(size=(60, 8))
        >>> RQVAE(hidden=(8,), width=4, levels=2, codes=4, epochs=2).fit(vectors).encode(vectors).shape
        (60, 2)
    """

    hidden: tuple[int, ...] = setting((512, 256, 128), "Widths between the vector and the narrow middle.")
    width: int = setting(32, "Width of the narrow middle.", ge=1)
    levels: int = setting(3, "How many codes describe an item, the last digit not counted.", ge=1, le=8)
    codes: int | None = setting(None, "Codes of each level; none: 256, or 64 below 3,000 items.", ge=2)
    commitment: float = setting(0.25, "Weight of pulling the middle towards its codes.", ge=0)
    learning_rate: float = setting(1e-3, "Step size of AdamW.", gt=0)
    batch_size: int = setting(2048, "Items of a step.", ge=1)
    epochs: int = setting(10_000, "Most passes over the items.", ge=1)
    patience: int = setting(
        200, "Epochs without more different codes after which training ends; as many are granted first.", ge=1
    )

    def fit(self, vectors: Rows, seed: int = 0) -> FittedRQVAE:
        """Train the auto-encoder and its codes.

        Shapes: [items, width]

        Raises:
            UserError: The vectors are not finite, or fewer than codes.
        """
        n_codes = codes_for(len(vectors), self.codes)
        rows = checked(vectors, n_codes).astype(np.float32)
        mean, deviation = torch.from_numpy(rows.mean(0)), torch.from_numpy(rows.std(0)).clamp_(min=1e-6)
        x = (torch.from_numpy(rows) - mean) / deviation
        network = _Network((x.shape[1], *self.hidden, self.width), self.levels, n_codes, seed)
        network.start(x[:_ROWS_FOR_START], seed)
        _train(network, x, self, torch.Generator().manual_seed(seed))
        layers = [
            (layer.weight.detach(), layer.bias.detach()) for layer in network.encoder if isinstance(layer, nn.Linear)
        ]
        return FittedRQVAE(mean, deviation, tuple(layers), network.books.detach())


class _Network(nn.Module):
    """Encoder, codes and decoder."""

    def __init__(self, widths: tuple[int, ...], levels: int, n_codes: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.encoder, self.decoder = _stack(widths, generator), _stack(widths[::-1], generator)
        self.books = nn.Parameter(torch.zeros(levels, n_codes, widths[-1]))

    @torch.no_grad()
    def start(self, x: Tensor, seed: int) -> None:
        """Begin with the centres of what the untrained encoder gives."""
        left = self.encoder(x)
        for level, book in enumerate(self.books):
            book.copy_(torch.from_numpy(kmeans(left.numpy(), len(book), seed * 1000 + level, 1, 20)))
            left = left - book[_nearest(left, book)]

    def forward(self, x: Tensor, commitment: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the codes and how badly each row is rebuilt. Shapes: [], [rows, levels], [rows]"""
        z = self.encoder(x)
        left, total, codes, loss = z, torch.zeros_like(z), [], z.new_zeros(())
        for book in self.books:
            codes.append(_nearest(left.detach(), book.detach()))
            chosen = book[codes[-1]]
            pull, hold = (left.detach() - chosen) ** 2, (left - chosen.detach()) ** 2
            loss = loss + (pull.sum(1) + commitment * hold.sum(1)).mean()
            left, total = left - chosen.detach(), total + chosen.detach()
        miss = ((self.decoder(z + (total - z).detach()) - x) ** 2).sum(1)
        return loss + miss.mean(), torch.stack(codes, 1), miss.detach()


def _stack(widths: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        with torch.device("meta"):
            layer = nn.Linear(inputs, outputs)
        layer = layer.to_empty(device="cpu")
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _nearest(rows: Tensor, book: Tensor) -> Tensor:
    return ((book * book).sum(1) - 2 * rows @ book.T).argmin(1)


def _train(network: _Network, x: Tensor, settings: RQVAE, generator: torch.Generator) -> None:
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate)
    unused = torch.zeros(network.books.shape[:2], dtype=torch.int64)
    best, best_epoch = 0, settings.patience
    for epoch in range(settings.epochs):
        seen = []
        for batch in torch.split(torch.randperm(len(x), generator=generator), settings.batch_size):
            loss, codes, miss = network(x[batch], settings.commitment)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            _reseed(network, x[batch], codes, miss, unused, optimiser)
            seen.append(codes)
        unique = len(np.unique(torch.cat(seen).numpy(), axis=0))
        report("auto-encoder", epoch + 1, settings.epochs)
        if epoch < settings.patience:  # the codes of k-means differ most, then fall together before training parts them
            continue
        if unique > best:
            best, best_epoch = unique, epoch
        elif epoch - best_epoch >= settings.patience:
            return


@torch.no_grad()
def _reseed(
    network: _Network, x: Tensor, codes: Tensor, miss: Tensor, unused: Tensor, optimiser: torch.optim.Optimizer
) -> None:
    """Move codes that nobody chose for long onto what is left over of the worst rebuilt rows."""
    unused += 1
    unused[torch.arange(codes.shape[1]).expand_as(codes), codes] = 0
    if not bool((unused >= _UNUSED_STEPS).any()):
        return
    worst = miss.argsort(descending=True, stable=True)
    left = network.encoder(x[worst])
    state = optimiser.state[network.books]
    for level, book in enumerate(network.books):
        dead = (unused[level] >= _UNUSED_STEPS).nonzero().flatten()[: len(left)]
        book[dead] = left[: len(dead)]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name][level, dead] = 0
        unused[level, dead] = 0
        left = left - book[_nearest(left, book)]


@dataclass(frozen=True, eq=False)
class FittedRQVAE(Fitted):
    """Hold the trained encoder and the codes' vectors; the decoder has done its work.

    Args:
        mean: Taken from each vector first; [width].
        deviation: What it is divided by then; [width].
        layers: Weight and bias of the encoder's linear layers, ReLU between them.
        books: The codes' vectors; [levels, codes, narrow width].
    """

    mean: Tensor
    deviation: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]
    books: Tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many codes each level has."""
        return (self.books.shape[1],) * self.books.shape[0]

    def encode(self, vectors: Rows) -> Codes:
        """Return the codes of each vector, computed in float64.

        Shapes: [items, width] -> [items, levels]

        Raises:
            UserError: The vectors are not finite, or of another width.
        """
        return self._walk(vectors)[0]

    def residual_shares(self, vectors: Rows) -> tuple[float, ...]:
        """Return for each level the share of the narrow middle's squared length that is left over."""
        return self._walk(vectors)[1]

    @torch.no_grad()
    def _walk(self, vectors: Rows) -> tuple[Codes, tuple[float, ...]]:
        rows = torch.from_numpy(checked(vectors, 0, len(self.mean)).astype(np.float64))
        left = (rows - self.mean.double()) / self.deviation.double()
        for i, (weight, bias) in enumerate(self.layers):
            left = functional.linear(left.relu() if i else left, weight.double(), bias.double())
        whole, codes, shares = max(float((left**2).sum()), 1e-30), [], []
        for book in self.books.double():
            codes.append(_nearest(left, book))
            left = left - book[codes[-1]]
            shares.append(float((left**2).sum()) / whole)
        return torch.stack(codes, 1).numpy().astype(np.int32), tuple(shares)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that makes it."""
        found = {"rq_vae.mean": self.mean, "rq_vae.deviation": self.deviation, "rq_vae.books": self.books}
        for i, (weight, bias) in enumerate(self.layers):
            found |= {f"rq_vae.layers.{i}.weight": weight, f"rq_vae.layers.{i}.bias": bias}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FittedRQVAE:
        """Make it again from `tensors`.

        Raises:
            StoreError: They are not those of this tokeniser.
        """
        count = sum(name.endswith(".weight") for name in tensors)
        try:
            pairs = ((tensors[f"rq_vae.layers.{i}.weight"], tensors[f"rq_vae.layers.{i}.bias"]) for i in range(count))
            layers = tuple(pairs)
            mean, deviation, books = (tensors[f"rq_vae.{name}"] for name in ("mean", "deviation", "books"))
        except KeyError as error:
            raise StoreError(f"The tokeniser lacks {error}. Copy it again from its source.") from error
        if not _fit(mean, deviation, layers, books):
            raise StoreError("The tokeniser's layers do not fit one another. Copy it again from its source.")
        return cls(mean, deviation, layers, books)


def _fit(mean: Tensor, deviation: Tensor, layers: tuple[tuple[Tensor, Tensor], ...], books: Tensor) -> bool:
    """Tell whether each part takes what the one before it gives."""
    width = len(mean)
    for weight, bias in layers:
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            return False
        width = weight.shape[0]
    return deviation.shape == mean.shape and books.ndim == 3 and books.shape[2] == width
