"""How much each attention head and each MLP neuron matters to the answers of all exits.

Every score compares the network with a teacher on data, without dropout, with gradients in equilibrium, and changes
nothing. Higher is more important. Only the order inside one kind of score means anything: two kinds have two units.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UserError, unknown
from ..progress import track
from .losses import exit_loss, hard_loss, targets
from .teaching import resting

if TYPE_CHECKING:
    from .network import Levels, Parts, SlimForSequenceClassification

__all__ = ["LOSSES", "SCORES", "Scores", "gate_gradients", "score"]

SCORES = ("gates", "paper", "qkvo", "grain", "magnitude", "random")
LOSSES = ("exits_ce", "paper", "final_only")

_BETA = 0.998
"""How slowly GRAIN's running mean forgets."""

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Scores:
    """One number for every head and every neuron of the network as it is now.

    Attributes:
        heads: For each block the scores of its heads, (heads,), float64 on the CPU.
        neurons: For each block the scores of its neurons, (d_ff,), likewise.
        n_examples: How many examples were seen; 0 where none is needed.
    """

    heads: list[Tensor]
    neurons: list[Tensor]
    n_examples: int = 0


def score(
    network: SlimForSequenceClassification,
    teacher: SlimForSequenceClassification,
    batches: Iterable[Batch],
    *,
    how: str = "gates",
    loss: str = "exits_ce",
    seed: int = 0,
    equilibrium: bool = True,
) -> Scores:
    """Score all heads and neurons.

    ``gates`` multiplies each head's context and each neuron's activation by a gate that is 1, one per example, and
    takes the mean over examples of the size of the loss's slope in it. ``paper`` takes |w| times the sum over batches
    of |slope in w|, added up over the unit's columns of the output maps (a neuron's row of the input map too);
    ``qkvo`` adds a head's rows of the query, key and value maps. ``grain`` is a gate for each batch, as a running mean.
    ``magnitude`` is the sum of |w| over all weights that would go; ``random`` is noise.

    Source: Michel et al. 2019 (gates of heads); Shen et al. 2022 (paper); Yang et al. 2023 (grain).

    Use when: deciding what to cut.

    Known problems: a student that equals its teacher has no slope in ``exits_ce``; train it first.

    Args:
        network: What is to be cut.
        teacher: The assistant, or any network with the same exits.
        batches: Dictionaries with input_ids, attention_mask, perhaps token_type_ids, and labels where the loss needs
            them. Examples count once each in ``gates``, however they are batched.
        how: One of `SCORES`.
        loss: One of `LOSSES`: all exits against the teacher's; those with a tenth of hard labels and the hidden
            states; the last exit alone.
        seed: Of ``random``.
        equilibrium: Whether the slope that leaves a block is the mean over the exits above it, or their sum.

    Raises:
        UnknownName: `how` or `loss` is not known.
        UserError: No batch came, or the paper's loss found no labels.
    """
    if how not in SCORES:
        raise unknown("score", how, SCORES)
    if loss not in LOSSES:
        raise unknown("loss of a score", loss, LOSSES)
    if how == "random":
        return _random(network, seed)
    if how == "magnitude":
        return _by_magnitude(network)
    charge = functools.partial(_charge, network, teacher, how=loss, equilibrium=equilibrium)
    scorer = _by_gates if how == "gates" else functools.partial(_by_weights, how=how)
    with _resting(network), _resting(teacher):
        return scorer(network, charge, track(batches, "Scoring"))


# ---------------------------------------------------------------- what is charged


def _charge(
    network: SlimForSequenceClassification,
    teacher: SlimForSequenceClassification,
    batch: Batch,
    *,
    how: str,
    equilibrium: bool,
) -> Tensor:
    """Return the mean loss of a batch."""
    batch = {key: value.to(network.device) for key, value in batch.items()}
    inputs = batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids")
    with torch.no_grad():
        taught = teacher.levels(*inputs)
    seen = network.levels(*inputs, equilibrium=equilibrium)
    task = network.config.task
    if how == "final_only":
        last = max(seen.logits)
        return exit_loss({last: seen.logits[last]}, taught.logits, task)
    if how == "exits_ce":
        return exit_loss(seen.logits, taught.logits, task)
    if batch.get("labels") is None:
        raise UserError("The score's loss 'paper' needs labels in every batch; 'exits_ce' needs none.")
    hard = hard_loss(seen.logits, targets(batch["labels"], network.config), task)
    return 0.9 * exit_loss(seen.logits, taught.logits, task) + 0.1 * hard + _spread(seen, taught, batch)


def _spread(seen: Levels, taught: Levels, batch: Batch) -> Tensor:
    """The authors' hidden loss: averaged over all positions, padding counting as zero."""
    mask = batch["attention_mask"].unsqueeze(-1)
    pairs = zip(seen.hidden, taught.hidden, strict=True)
    return torch.stack([((s - t) * mask).square().mean() for s, t in pairs]).sum()


# ---------------------------------------------------------------- gates


def gate_gradients(
    network: SlimForSequenceClassification, batch: Batch, charge: Callable[[Batch], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the slope of the summed loss in each example's gates, with their signs.

    Shapes: for each block (batch, heads), and for each block (batch, d_ff).

    Args:
        network: Whose heads and neurons are gated.
        batch: Passed on.
        charge: The mean loss of the batch.
    """
    examples = len(batch["input_ids"])
    with ExitStack() as stack:
        gates = []
        for parts in _all_parts(network):
            n_heads = parts.out.in_features // network.size.head_dim
            for module, count in ((parts.out, n_heads), (parts.down, parts.down.in_features)):
                weight = module.weight
                gate = torch.ones(examples, count, dtype=weight.dtype, device=weight.device, requires_grad=True)
                hook = module.register_forward_pre_hook(functools.partial(_gated, gate))
                stack.callback(hook.remove)
                gates.append(gate)
        slopes = torch.autograd.grad(charge(batch) * examples, gates)
    return list(slopes[::2]), list(slopes[1::2])


def _gated(gate: Tensor, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Multiply what flows into an output map, (batch, tokens, units x width of one)."""
    x = inputs[0]
    units = x.reshape(*x.shape[:-1], gate.shape[1], -1)
    return ((units * gate[:, None, :, None]).reshape(x.shape), *inputs[1:])


def _by_gates(
    network: SlimForSequenceClassification, charge: Callable[[Batch], Tensor], batches: Iterable[Batch]
) -> Scores:
    total: list[Tensor] = []
    seen = 0
    for batch in batches:
        heads, neurons = gate_gradients(network, batch, charge)
        found = [slope.abs().double().sum(0).cpu() for slope in (*heads, *neurons)]
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        seen += len(batch["input_ids"])
    _require(seen)
    half = len(total) // 2
    return Scores([t / seen for t in total[:half]], [t / seen for t in total[half:]], seen)


# ---------------------------------------------------------------- weights

_MAPS = ("query.weight", "key.weight", "value.weight", "out.weight", "up.weight", "down.weight")
_WEIGHTS = {
    "paper": ("out.weight", "up.weight", "down.weight"),
    "qkvo": (*_MAPS, "query.bias", "key.bias", "value.bias"),
    "grain": ("out.weight", "down.weight"),
}
"""Which weights speak for a unit."""


def _by_weights(
    network: SlimForSequenceClassification, charge: Callable[[Batch], Tensor], batches: Iterable[Batch], how: str
) -> Scores:
    blocks = [_weights(parts, _WEIGHTS[how]) for parts in _all_parts(network)]
    leaves = [weight.requires_grad_() for block in blocks for weight in block.values()]
    total: list[Tensor] = []
    n_batches = seen = 0
    for batch in batches:
        slopes = iter(torch.autograd.grad(charge(batch), leaves))
        products = [{key: weight.detach() * next(slopes) for key, weight in block.items()} for block in blocks]
        found = _found(products, network.size.head_dim, how)
        total = total or [torch.zeros_like(unit) for unit in found]
        total = [_joined(a, b, how) for a, b in zip(total, found, strict=True)]
        n_batches += 1
        seen += len(batch["input_ids"])
    _require(seen)
    share = 1 - _BETA**n_batches if how == "grain" else 1.0  # the running mean began at 0
    return Scores([t / share for t in total[::2]], [t / share for t in total[1::2]], seen)


def _found(products: Sequence[Mapping[str, Tensor]], head_dim: int, how: str) -> list[Tensor]:
    """Return one batch's part of the scores, heads and neurons by turns: sizes summed, or the size of the sum."""
    if how == "grain":
        return [unit.abs() for block in products for unit in _units(block, head_dim)]
    return [unit for block in products for unit in _units({k: v.abs() for k, v in block.items()}, head_dim)]


def _joined(total: Tensor, found: Tensor, how: str) -> Tensor:
    return _BETA * total + (1 - _BETA) * found if how == "grain" else total + found


def _by_magnitude(network: SlimForSequenceClassification) -> Scores:
    blocks = [_weights(parts, _MAPS) for parts in _all_parts(network)]
    found = _found([{k: w.detach() for k, w in block.items()} for block in blocks], network.size.head_dim, "magnitude")
    return Scores(found[::2], found[1::2])


def _random(network: SlimForSequenceClassification, seed: int) -> Scores:
    noise = torch.Generator().manual_seed(seed)
    widths = [(p.out.in_features // network.size.head_dim, p.down.in_features) for p in _all_parts(network)]
    drawn = [torch.rand(n, generator=noise, dtype=torch.float64) for pair in widths for n in pair]
    return Scores(drawn[::2], drawn[1::2])


def _weights(parts: Parts, keys: Sequence[str]) -> dict[str, Tensor]:
    return {key: operator.attrgetter(key)(parts) for key in keys}


def _units(values: Mapping[str, Tensor], head_dim: int) -> tuple[Tensor, Tensor]:
    """Add up what belongs to each head, (heads,), and to each neuron, (d_ff,)."""
    sums = {key: _along(key, value.double().cpu()) for key, value in values.items()}
    neurons = [v for key, v in sums.items() if key.startswith(("up.", "down."))]
    heads = [v for key, v in sums.items() if not key.startswith(("up.", "down."))]
    return torch.stack(heads).sum(0).reshape(-1, head_dim).sum(1), torch.stack(neurons).sum(0)


def _along(key: str, value: Tensor) -> Tensor:
    """Units are the columns of the output maps, and the rows of all others."""
    if value.ndim == 1:
        return value
    return value.sum(0 if key.startswith(("out.", "down.")) else 1)


# ---------------------------------------------------------------- leaving everything as it was


def _all_parts(network: SlimForSequenceClassification) -> list[Parts]:
    return [network.parts(block) for block in range(network.size.blocks)]


@contextmanager
def _resting(network: nn.Module) -> Iterator[None]:
    """Switch dropout off and ask no weight for its slope; afterwards every module and weight is as it was."""
    wanted = [(weight, weight.requires_grad) for weight in network.parameters()]
    with resting(network):
        try:
            network.requires_grad_(False)
            yield
        finally:
            for weight, asked in wanted:
                weight.requires_grad_(asked)


def _require(seen: int) -> None:
    if not seen:
        raise UserError("Scoring needs at least one batch of examples; none came.")
