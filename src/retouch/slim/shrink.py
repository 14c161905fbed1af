"""Choose the heads and neurons that stay, and make a smaller network of them.

A cut is two steps: `choose` (or `choose_globally`) reads scores, `sliced` copies what stays into smaller tensors in
memory. The word embedding is not scored: `factorised` replaces it by the best two factors of a given rank.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from .base import Size, Widths
from .network import Factors, SlimConfig, SlimForSequenceClassification

if TYPE_CHECKING:
    from .scores import Scores

__all__ = ["Kept", "choose", "choose_globally", "factorised", "masked", "sliced", "unit_parameters"]

_FLOOR = 1e-6
"""Weight of a token that the training set never shows."""

_ROWS = 4096
"""Rows of the word embedding that are turned into float64 at a time."""


@dataclass(frozen=True)
class Kept:
    """The heads and neurons that stay, in the numbering of the network as it is now.

    Attributes:
        heads: For each block the ids of its heads, ascending.
        neurons: For each block the ids of its neurons, ascending.
    """

    heads: list[list[int]]
    neurons: list[list[int]]


# ---------------------------------------------------------------- choosing


def choose(scores: Scores, widths: Widths) -> Kept:
    """Keep each block's best heads and neurons, in their old order; of equals the one that stands first stays.

    Args:
        scores: Of the network as it is.
        widths: How many stay in each block.

    Raises:
        UserError: A score is not a finite number, or a block has fewer units than are to stay.
    """
    blocks = len(scores.heads)
    if blocks != len(widths.heads):
        raise UserError(f"The scores are of {blocks} blocks; the widths name {len(widths.heads)}.")
    heads = [_best(scores.heads[b], widths.heads[b], f"heads of block {b}") for b in range(blocks)]
    neurons = [_best(scores.neurons[b], widths.d_ff[b], f"neurons of block {b}") for b in range(blocks)]
    return Kept(heads, neurons)


def choose_globally(scores: Scores, size: Size, total: int | Widths) -> Kept:
    """Let the blocks compete: drop what is worth least per parameter until all heads and neurons fit.

    Each block's scores are divided by their mean over its heads and neurons, so that no block wins by the size of its
    gradients. Neurons go eight at a time, and leave a multiple of eight. One head and eight neurons stay in each block.

    Args:
        scores: Of the network as it is.
        size: Of the original.
        total: The parameters that all heads and neurons together may have (see `unit_parameters`), or the widths of a
            plan, whose heads and neurons are then counted.

    Raises:
        UserError: A score is not a finite number, or even the least widths exceed the total.
    """
    allowed = unit_parameters(size, total) if isinstance(total, Widths) else total
    n_heads, n_neurons = [len(s) for s in scores.heads], [len(s) for s in scores.neurons]
    spent = sum(n_heads) * _head_parameters(size) + sum(n_neurons) * _neuron_parameters(size)
    for drop in sorted(_drops(scores, size), key=lambda drop: drop.worth):
        if spent <= allowed:
            break
        (n_heads if drop.heads else n_neurons)[drop.block] -= drop.heads or drop.neurons
        spent -= drop.heads * _head_parameters(size) + drop.neurons * _neuron_parameters(size)
    if spent > allowed:
        raise UserError(
            f"All heads and neurons together are to have {allowed:,} parameters; one head and eight neurons in each of "
            f"the {size.blocks} blocks have {spent:,} already. Ask for more."
        )
    return choose(scores, Widths(tuple(n_heads), tuple(n_neurons), None, size.exits()))


def unit_parameters(size: Size, widths: Widths) -> int:
    """Count the parameters of all heads and neurons: what `choose_globally` shares out between the blocks."""
    return sum(widths.heads) * _head_parameters(size) + sum(widths.d_ff) * _neuron_parameters(size)


def _best(scores: Tensor, n: int, what: str) -> list[int]:
    _require_finite(scores, what)
    if n > len(scores):
        raise UserError(f"There are {len(scores)} {what}, and {n} are to stay.")
    return sorted(_order(scores)[:n])


def _order(scores: Tensor) -> list[int]:
    """Return the ids from the best to the worst; equals stay in order."""
    found: list[int] = scores.sort(descending=True, stable=True).indices.tolist()
    return found


def _require_finite(scores: Tensor, what: str) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise UserError(
            f"The scores of the {what} are not all finite numbers. Was the training too fast, or in float16?"
        )


class _Drop(NamedTuple):
    """One head, or some neurons, that may go, and their mean score per parameter."""

    worth: float
    block: int
    heads: int
    neurons: int


def _drops(scores: Scores, size: Size) -> Iterator[_Drop]:
    """Yield everything that may go, within a block from the worst to the best: that is also the order of worth."""
    for block, (heads, neurons) in enumerate(zip(scores.heads, scores.neurons, strict=True)):
        _require_finite(heads, f"heads of block {block}")
        _require_finite(neurons, f"neurons of block {block}")
        mean = float(torch.cat([heads, neurons]).mean()) or 1.0
        for value in (heads / mean).sort().values[:-1].tolist():
            yield _Drop(value / _head_parameters(size), block, 1, 0)
        values, worst = (neurons / mean).sort().values, -math.inf
        bounds = [0, *range(len(values) % 8 or 8, len(values) - 7, 8)]
        for low, high in itertools.pairwise(bounds):
            worst = max(worst, float(values[low:high].mean()))  # rounding may not turn the order of equals around
            yield _Drop(worst / _neuron_parameters(size), block, 0, high - low)


def _head_parameters(size: Size) -> int:
    return size.head_dim * (4 * size.d_model + 3)  # query, key and value with their biases, and columns of the output


def _neuron_parameters(size: Size) -> int:
    return 2 * size.d_model + 1


# ---------------------------------------------------------------- slicing


def sliced(network: SlimForSequenceClassification, kept: Kept) -> SlimForSequenceClassification:
    """Return a smaller network that computes what `network` would with all other heads and neurons silenced.

    Its configuration records what is kept in the numbering of the original, over any number of cuts.

    Args:
        network: Left as it is.
        kept: In the numbering of `network`.

    Raises:
        UserError: An id does not exist, comes twice or out of order, or a block would lose everything.
    """
    _check(network, kept)
    config = copy.deepcopy(network.config)
    config.heads = [len(ids) for ids in kept.heads]
    config.d_ff = [len(ids) for ids in kept.neurons]
    config.kept_heads = [_taken(network.kept_heads(b), ids) for b, ids in enumerate(kept.heads)]
    config.kept_neurons = [_taken(network.kept_neurons(b), ids) for b, ids in enumerate(kept.neurons)]
    state = network.state_dict()
    names = {id(weight): name for name, weight in network.named_parameters()}
    for weight, value in _slices(network, kept):
        state[names[id(weight)]] = value
    return _rebuilt(network, config, state)


@contextmanager
def masked(network: SlimForSequenceClassification, kept: Kept) -> Iterator[None]:
    """Silence all other heads and neurons of `network` itself inside a ``with``, by zeros in the maps that read them.

    Args:
        network: Its weights are bit for bit the old ones afterwards.
        kept: In the numbering of `network`.

    Raises:
        UserError: As of `sliced`.
    """
    _check(network, kept)
    weights = [
        part.weight for b in range(network.size.blocks) for part in (network.parts(b).out, network.parts(b).down)
    ]
    before = [weight.detach().clone() for weight in weights]
    columns = [ids for b in range(network.size.blocks) for ids in (_columns(network, kept.heads[b]), kept.neurons[b])]
    try:
        with torch.no_grad():
            for weight, ids in zip(weights, columns, strict=True):
                gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
                gone[ids] = False
                weight[:, gone] = 0
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def _check(network: SlimForSequenceClassification, kept: Kept) -> None:
    for what, lists, widths in (
        ("head", kept.heads, network.widths.heads),
        ("neuron", kept.neurons, network.widths.d_ff),
    ):
        if len(lists) != len(widths):
            raise UserError(f"The {what}s of {len(lists)} blocks are named; the network has {len(widths)} blocks.")
        for block, (ids, width) in enumerate(zip(lists, widths)):
            if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= width:
                raise UserError(
                    f"Block {block} must keep at least one {what}, each once and in order, from 0 to {width - 1}; "
                    f"got {list(ids)}."
                )


def _taken(old: Sequence[int], ids: Sequence[int]) -> list[int]:
    return [old[i] for i in ids]


def _columns(network: SlimForSequenceClassification, heads: Sequence[int]) -> list[int]:
    k = network.size.head_dim
    return [head * k + i for head in heads for i in range(k)]


def _slices(network: SlimForSequenceClassification, kept: Kept) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each parameter that is cut, and what stays of it."""
    for block in range(network.size.blocks):
        parts = network.parts(block)
        inner, neurons = _columns(network, kept.heads[block]), kept.neurons[block]
        for linear, ids in ((parts.query, inner), (parts.key, inner), (parts.value, inner), (parts.up, neurons)):
            yield linear.weight, linear.weight.detach()[ids]
            yield linear.bias, linear.bias.detach()[ids]
        yield parts.out.weight, parts.out.weight.detach()[:, inner]
        yield parts.down.weight, parts.down.weight.detach()[:, neurons]


def _rebuilt(
    network: SlimForSequenceClassification, config: SlimConfig, state: Mapping[str, Tensor]
) -> SlimForSequenceClassification:
    """Build a network of other widths with given weights, in all else like `network`."""
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        new = type(network)(config)
    weight = next(network.parameters())
    new.to(weight.device, weight.dtype)
    new.load_state_dict(state)
    wanted = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(wanted.get(name, True))
    new.train(network.training)
    return new


# ---------------------------------------------------------------- the word embedding


def factorised(
    network: SlimForSequenceClassification, rank: int, counts: Tensor | Sequence[float] | None = None
) -> SlimForSequenceClassification:
    """Return a network whose word embedding is the best product of two factors of a rank.

    With Q the `rank` leading eigenvectors of E^T diag(w) E, the table is E Q and the map Q^T: of all such products the
    one with the least sum of w |error of the row|^2. An embedding in factors is factorised anew.

    Source: Eckart and Young 1936; the weights by frequency are ours.

    Args:
        network: Left as it is.
        rank: Of the factors, at most d_model, the vocabulary, and the rank that the embedding has.
        counts: How often the training set shows each token, (vocab,); None: all rows weigh the same.

    Raises:
        UserError: The rank is not possible, or the counts do not fit the vocabulary.
    """
    words = network.get_input_embeddings()
    limit = min(network.size.d_model, network.size.vocab, network.widths.rank or network.size.d_model)
    if not 1 <= rank <= limit:
        raise UserError(f"The rank of the word embedding must be from 1 to {limit}; got {rank}.")
    basis = _basis(words, rank, _weights(counts, network.size.vocab))
    config = copy.deepcopy(network.config)
    config.rank = rank
    prefix = next(name for name, module in network.named_modules() if module is words)
    state = {name: value for name, value in network.state_dict().items() if not name.startswith(f"{prefix}.")}
    dtype = next(words.parameters()).dtype
    state[f"{prefix}.table.weight"] = torch.cat([(rows @ basis).to(dtype) for rows in _rows(words)])
    state[f"{prefix}.map.weight"] = basis.to(dtype)
    return _rebuilt(network, config, state)


def _weights(counts: Tensor | Sequence[float] | None, vocab: int) -> Tensor:
    if counts is None:
        return torch.ones(vocab, dtype=torch.float64)
    seen = torch.as_tensor(counts).detach().double().cpu()
    if seen.shape != (vocab,) or bool((seen < 0).any()) or not 0 < float(seen.sum()) < float("inf"):
        raise UserError(f"counts must be {vocab} numbers, none below 0 and not all 0; got {tuple(seen.shape)}.")
    return seen / seen.sum() + _FLOOR


def _basis(words: nn.Module, rank: int, weights: Tensor) -> Tensor:
    """Return the leading eigenvectors of the weighted second moment of the rows, (d_model, rank), in float64."""
    parts = zip(_rows(words), torch.split(weights, _ROWS), strict=True)
    moment = torch.stack([rows.T @ (rows * w[:, None]) for rows, w in parts]).sum(0)
    basis: Tensor = torch.linalg.eigh(moment).eigenvectors[:, -rank:].flip(1)
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # an eigenvector's sign is anyone's choice
    return basis * signs


def _rows(words: nn.Module) -> Iterator[Tensor]:
    """Yield the word embedding in pieces of (some of the vocabulary, d_model), in float64 on the CPU."""
    table = words.table if isinstance(words, Factors) else words
    turn = words.map.weight.detach().double().cpu().T if isinstance(words, Factors) else None
    for piece in torch.split(table.get_parameter("weight").detach(), _ROWS):
        rows = piece.double().cpu()
        yield rows if turn is None else rows @ turn
