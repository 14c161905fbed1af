"""Soft instructions: a few made-up words for a language model, chosen for each user by what the recommender knows.

K books of codewords stand side by side; a user's state picks one word of each, so K books of m words tell m^K users
apart with K m vectors. The choice is a hard one, and its gradient still reaches every word of every book.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._kmeans import kmeans

__all__ = ["Chosen", "GlobalInstructions", "InstructionMode", "Instructions", "PromptInstructions", "Usage"]

InstructionMode = Literal["codebooks", "continuous", "global", "prompt"]

WEIGHTS = {"vq": 1.0, "ae": 0.25, "ent": 0.05}
"""What each loss of the instructions weighs beside the recommender's own."""

_START_ROWS = 20_000
_DECAY = 0.99


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a batch of users is told to the language model with.

    Attributes:
        tokens: The made-up words, as the language model's input, (batch, books, d_llm).
        codes: Which word of each book, (batch, books).
        losses: What keeps books and states together, by name: ``vq``, ``ae``, ``ent``; empty without gradients.
    """

    tokens: Tensor
    codes: Tensor
    losses: dict[str, Tensor]


@dataclass(frozen=True)
class Usage:
    """How one book is used.

    Attributes:
        used: Share of its words that somebody holds.
        perplexity: How many words it would have if all were used alike, as a share of what it has.
        largest: Share of the users who hold the most frequent word.
    """

    used: float
    perplexity: float
    largest: float

    @property
    def collapsed(self) -> bool:
        """Whether so few words are in use that the book says little."""
        return self.used < 0.5 or self.perplexity < 0.2


class Instructions(nn.Module):
    """Choose a user's instruction tokens by the user's state.

    Source: arXiv 2605.18771 (parallel codebooks, straight-through on the distribution over the words, an auto-encoder
        beside them); the gradient is that of IBQ (Shi et al., arXiv 2412.02692). Unit vectors, standardised states, the
        scale of the tokens, the start by k-means and the revival of unused words are ours.

    Shapes:
        forward: (batch, d_model) -> tokens (batch, books, d_llm), codes (batch, books)

    Args:
        d_model: Width of a user's state.
        d_llm: Width of the language model.
        n_books: Instruction tokens for each user.
        n_codewords: Words of each book.
        d_code: Width of a word.
        temperature: Of the distribution that carries the gradient.
        quantise: Whether a word is chosen; without, what the state asks for is taken as it is.
        rms: Size of the tokens at the start: what the language model's own embeddings have.
    """

    mean: Tensor
    std: Tensor
    usage: Tensor

    def __init__(
        self,
        d_model: int,
        d_llm: int,
        *,
        n_books: int = 5,
        n_codewords: int = 64,
        d_code: int = 32,
        temperature: float = 0.1,
        quantise: bool = True,
        rms: float = 1.0,
    ) -> None:
        super().__init__()
        self.temperature, self.quantise = temperature, quantise
        self.ask = nn.Parameter(torch.empty(n_books, d_code, d_model))
        for book in self.ask:
            nn.init.orthogonal_(book.data)
        self.words = nn.Parameter(torch.randn(n_books, n_codewords, d_code))
        self.lift = nn.Parameter(torch.randn(n_books, d_llm, d_code) * d_code**-0.5)
        self.gain = nn.Parameter(torch.full((n_books,), float(rms)))
        self.recall = nn.Sequential(nn.Linear(n_books * d_code, 256), nn.GELU(), nn.Linear(256, d_model))
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("std", torch.ones(d_model))
        self.register_buffer("usage", torch.full((n_books, n_codewords), 1 / n_codewords))

    @property
    def n_books(self) -> int:
        """How many tokens each user has."""
        return self.words.shape[0]

    @property
    def n_codewords(self) -> int:
        """How many words each book has."""
        return self.words.shape[1]

    # ------------------------------------------------------------ choosing

    def forward(self, state: Tensor) -> Chosen:
        """Return the tokens and codes of each user, and the losses that train them."""
        standard = (state - self.mean) / self.std
        wanted, words, likeness = self._compared(standard)
        codes = likeness.argmax(-1)
        hard = words[torch.arange(self.n_books, device=codes.device), codes]
        shares = (likeness / self.temperature).softmax(-1)
        # the value of the chosen word, to the last bit, and the gradient of the mean of all words
        held = hard + torch.einsum("bkv,kvc->bkc", shares - shares.detach(), words) if self.quantise else wanted
        losses = self._losses(standard, wanted, hard, held, shares) if torch.is_grad_enabled() else {}
        return Chosen(self._tokens(held), codes, losses)

    def codes(self, state: Tensor) -> Tensor:
        """Return the codes of each user alone, which is all that a request needs."""
        return self._compared((state - self.mean) / self.std)[2].argmax(-1)

    def _compared(self, standard: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what each state asks for, the words, and how alike they are."""
        wanted, words = self._wanted(standard), F.normalize(self.words, dim=-1)
        return wanted, words, torch.einsum("bkc,kvc->bkv", wanted, words)

    def _wanted(self, standard: Tensor) -> Tensor:
        return F.normalize(torch.einsum("bd,kcd->bkc", standard, self.ask), dim=-1)

    def _tokens(self, held: Tensor) -> Tensor:
        """Return words in the language model's width and in the range that it was trained on."""
        lifted = torch.einsum("bkc,kdc->bkd", held, self.lift)
        return self.gain[:, None] * _rms_normalised(lifted)

    def _losses(
        self, standard: Tensor, wanted: Tensor, hard: Tensor, held: Tensor, shares: Tensor
    ) -> dict[str, Tensor]:
        recalled = self.recall(held.flatten(1))
        losses = {"ae": (recalled - standard.detach()).square().mean()}
        if self.quantise:
            losses["vq"] = (
                _apart(held, wanted) + _apart(hard.detach(), wanted) + 0.25 * _apart(hard, wanted.detach())
            ).mean()
            losses["ent"] = (_entropy(shares).mean(0) - _entropy(shares.mean(0))).mean()
        return losses

    # ------------------------------------------------------------ before and while it is trained

    @torch.no_grad()
    def begin(self, states: Tensor, seed: int = 0) -> None:
        """Measure how states are spread and place the words where users are. Call once, before training.

        Shapes:
            states: (users, d_model), of training users only.
        """
        self.mean.copy_(states.mean(0))
        # a dimension that never moves says nothing: it stays as it is
        spread = states.std(0, correction=0)
        self.std.copy_(torch.where(spread > 1e-6, spread, torch.ones_like(spread)))
        if not self.quantise:
            return
        rows = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))[:_START_ROWS]
        wanted = self._wanted((states[rows.to(states.device)] - self.mean) / self.std)
        for k in range(self.n_books):
            self.words[k] = _centres(wanted[:, k], self.words[k], seed + k)

    @torch.no_grad()
    def count(self, codes: Tensor) -> None:
        """Remember which words a batch of users held, for `revive`."""
        held = F.one_hot(codes, self.n_codewords).to(self.usage).mean(0)
        self.usage.mul_(_DECAY).add_(held, alpha=1 - _DECAY)

    @torch.no_grad()
    def revive(self, state: Tensor, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Give each word that hardly anybody holds to the user of a batch whom the words describe worst.

        Returns:
            How many words were given.
        """
        if not self.quantise:
            return 0
        wanted, given = self._wanted((state - self.mean) / self.std), 0
        for k in range(self.n_books):
            dead = (self.usage[k] < 1 / (20 * self.n_codewords)).nonzero().flatten()
            nearest = (wanted[:, k] @ F.normalize(self.words[k], dim=-1).T).amax(1)
            worst = nearest.argsort(stable=True)[: len(dead)]
            dead = dead[: len(worst)]
            self.words[k, dead] = wanted[worst, k]
            self.usage[k, dead] = 1 / self.n_codewords
            self._forget(optimizer, k, dead)
            given += len(dead)
        return given

    def _forget(self, optimizer: torch.optim.Optimizer | None, book: int, dead: Tensor) -> None:
        for kept in (optimizer.state.get(self.words, {}) if optimizer else {}).values():
            if isinstance(kept, Tensor) and kept.shape == self.words.shape:
                kept[book, dead] = 0

    def measure(self, codes: Tensor) -> list[Usage]:
        """Say how each book is used by the users who hold these codes.

        Shapes:
            codes: (users, books)
        """
        return [_usage(torch.bincount(book, minlength=self.n_codewords)) for book in codes.T]


class GlobalInstructions(nn.Module):
    """The same trainable tokens for everybody: a control that shows what the personal part is worth.

    Shapes:
        forward: (batch, d_model) -> tokens (batch, books, d_llm), codes all 0
    """

    quantise = False

    def __init__(self, d_llm: int, n_books: int = 5, rms: float = 1.0) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.randn(n_books, d_llm))
        self.gain = nn.Parameter(torch.full((n_books,), float(rms)))

    def forward(self, state: Tensor) -> Chosen:
        """Return the tokens, once for each user."""
        tokens = self.gain[:, None] * _rms_normalised(self.free)
        return _for_all(tokens, state)

    def codes(self, state: Tensor) -> Tensor:
        """Return the code 0 of every book, for each user."""
        return _zeros(self.free, state)


class PromptInstructions(nn.Module):
    """The tokens of a fixed text, the same for everybody and not trained.

    Shapes:
        forward: (batch, d_model) -> tokens (batch, tokens of the text, d_llm), codes all 0
    """

    quantise = False
    tokens: Tensor

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens)

    def forward(self, state: Tensor) -> Chosen:
        """Return the tokens, once for each user."""
        return _for_all(self.tokens, state)

    def codes(self, state: Tensor) -> Tensor:
        """Return the code 0 of every book, for each user."""
        return _zeros(self.tokens, state)


def _for_all(tokens: Tensor, state: Tensor) -> Chosen:
    return Chosen(tokens.expand(len(state), -1, -1), _zeros(tokens, state), {})


def _zeros(tokens: Tensor, state: Tensor) -> Tensor:
    return torch.zeros(len(state), len(tokens), dtype=torch.int64, device=state.device)


def _rms_normalised(rows: Tensor) -> Tensor:
    return rows * (rows.square().mean(-1, keepdim=True) + 1e-12).rsqrt()


def _apart(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().sum(-1)


def _entropy(shares: Tensor) -> Tensor:
    return -(shares * shares.clamp(min=1e-12).log()).sum(-1)


def _centres(rows: Tensor, words: Tensor, seed: int) -> Tensor:
    """Return k-means centres of the rows; where there are fewer rows than words, the rows and what was there."""
    if len(rows) <= len(words):
        return torch.cat([rows, words[len(rows) :]])
    return torch.from_numpy(kmeans(rows.cpu().numpy(), len(words), seed)).to(words)


def _usage(counts: Tensor) -> Usage:
    shares = counts / counts.sum().clamp(min=1)
    perplexity = float(_entropy(shares).exp())
    return Usage(float((counts > 0).float().mean()), perplexity / len(counts), float(shares.max()))
