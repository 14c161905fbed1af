"""Bring a pruned network's function back towards the whole one's, on public text, before it is given to an edge.

Only the frozen base that the edge trains on changes; none of it is sent back, and recovery leaves it behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import stats
from ..errors import RetouchError, UserError
from ..model import Model
from ..progress import track
from ._inputs import Inputs, Text
from ._scores import twin
from ._units import Units
from .prune import PrunePlan, check_plan, measured_inputs
from .pruned import PrunedModel, pruned, with_bias

__all__ = ["aligned"]

RIDGE = 1e-3
"""Added to the moments, relative to their mean diagonal."""
TEMPERATURE = 2.0


def aligned(
    model: Model, plan: PrunePlan, *, moments: Mapping[str, Inputs] | None = None, text: Text | None = None,
    n_steps: int = 200, learning_rate: float = 5e-5, batch: int = 8,
) -> PrunedModel:  # fmt: skip
    """Prune a model by a plan and align it as the plan says.

    Source:
        bias: FLAP (2024). lstsq: least squares on the kept inputs and a constant. distil: as LoRAM aligns, with a
        teacher's soft answers (Hinton et al., 2015).

    Args:
        model: The whole model.
        plan: The plan; ``none`` cuts alone, ``bias`` adds what the missing inputs gave on average, ``lstsq`` also fits
            the kept columns, ``distil`` trains the blocks' weights.
        moments: What flows into ``attention.out`` and ``mlp.down``; by default it is measured over `text`.
        text: Public text, the plan's own; needed if that was not the corpus that ships with Retouch.
        n_steps: For ``distil``.
        learning_rate: For ``distil``.
        batch: Rows of a step, for ``distil``.

    Raises:
        WrongBase: The plan was made for another model.
        UserError: `text` is not the plan's.
        RetouchError: Training diverged.
    """
    units, small = check_plan(plan, model), pruned(model, plan)
    cut = [b for b, kept in enumerate(plan.kept) if kept != units.whole]
    if plan.align == "none" or not cut:
        return replace(small, align=plan.align)
    text = _text(plan, text)
    if plan.align == "distil":
        return replace(_distil(model, small, text, n_steps, learning_rate, batch), align="distil")
    if moments is None:
        moments = measured_inputs(model, units, cut, text)
    if plan.align == "bias":
        return replace(with_bias(small, _biases(model, plan, units, cut, moments)), align="bias")
    return replace(_fitted(model, small, plan, units, cut, moments, text), align="lstsq")


def _text(plan: PrunePlan, given: Text | None) -> Text:
    """Return the text that the plan names, so that its hash covers what is done here."""
    told = plan.settings
    text = given or Text(n_tokens=told["n_tokens"], sequence_length=told["sequence_length"])
    if text.key != {n: told[n] for n in text.key}:
        raise UserError("This plan was made with another text, or another length of it; give aligned() the same text.")
    return text


def _sites(units: Units, plan: PrunePlan, cut: list[int]) -> list[tuple[str, Tensor]]:
    """List the weights that lost columns, with those that stay."""
    parts = [p for p in units.parts if units.axis(p) == "columns"]
    found = [(f"blocks.{b}.{p}", units.index(p, plan.kept[b])) for b in cut for p in parts]
    return [(name, index) for name, index in found if index is not None]


def _biases(
    model: Model, plan: PrunePlan, units: Units, cut: list[int], moments: Mapping[str, Inputs]
) -> dict[str, Tensor]:
    found = {}
    for name, kept in _sites(units, plan, cut):
        matrix, mean = model.matrix(name).double().cpu(), moments[name].mean.clone()
        mean[kept] = 0
        found[name] = matrix @ mean
    return found


def _fitted(
    model: Model, small: PrunedModel, plan: PrunePlan, units: Units, cut: list[int], moments: Mapping[str, Inputs], text: Text
) -> PrunedModel:  # fmt: skip
    """Fit the kept columns and a constant to the whole weight's output, by the inputs' moments."""
    sites = _sites(units, plan, cut)
    squares = stats.observe(model, [name for name, _ in sites], text.rows(model))
    weights, biases = {}, {}
    for name, kept in sites:
        mean = moments[name].mean
        gram = torch.cat([torch.cat([squares[name].mean, mean[:, None]], 1), torch.cat([mean, mean.new_ones(1)])[None]])
        some = torch.cat([kept, torch.tensor([len(mean)])])
        small_gram = gram[some][:, some]
        ridge = RIDGE * squares[name].mean.diagonal()[kept].mean() * torch.eye(len(some), dtype=torch.float64)
        wanted = gram[some, : len(mean)] @ model.matrix(name).double().cpu().T
        fitted = torch.cholesky_solve(wanted, torch.linalg.cholesky(small_gram + ridge)).T
        weight = fitted[:, :-1].T if model.anatomy.transposed(name) else fitted[:, :-1]
        weights[model.anatomy.weight(name)] = weight.float()
        biases[name] = fitted[:, -1]
    return with_bias(_with_weights(small, weights), biases)


def _with_weights(small: PrunedModel, weights: Mapping[str, Tensor]) -> PrunedModel:
    changed = small.with_weights(weights, base=small.base)
    assert isinstance(changed, PrunedModel)
    return changed


# ---------------------------------------------------------------- distillation


def _distil(
    model: Model, small: PrunedModel, text: Text, n_steps: int, learning_rate: float, batch: int
) -> PrunedModel:
    """Train the blocks' weights to give the whole model's answers and the text's own next words."""
    inner = small.anatomy.places["blocks"] + "."
    paths = [n for n, _ in small.network.named_parameters() if n.startswith(inner)]
    network, rows = twin(small.network, paths), text.rows(model)
    with torch.no_grad():
        for path in paths:  # the copy must not train the numbers that it shares
            parameter = network.get_parameter(path)
            parameter.data = parameter.data.clone()
    weights = [network.get_parameter(p) for p in paths]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate)
    for step in track(range(n_steps), "Aligning the pruned model"):
        chosen = [rows[(step * batch + i) % len(rows)] for i in range(batch)]
        loss = _lesson(model, network, chosen)
        if not torch.isfinite(loss):
            raise RetouchError(f"Aligning diverged at step {step + 1} of {n_steps}: the loss is {float(loss)}.")
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return _with_weights(small, {p: network.get_parameter(p).detach() for p in paths})


def _lesson(model: Model, network: nn.Module, rows: list[tuple[int, ...]]) -> Tensor:
    """T squared times the divergence from the teacher, and the cross-entropy of the next tokens."""
    batch = model.batch(rows)
    inputs, seen = model.inputs(batch), batch.mask[:, 1:].bool()
    with torch.no_grad():
        wanted = model.network(**inputs, use_cache=False).logits[:, :-1][seen] / TEMPERATURE
    logits = network(**inputs, use_cache=False).logits[:, :-1][seen]
    soft = nn.functional.kl_div(
        (logits / TEMPERATURE).log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
    )
    return TEMPERATURE**2 * soft + nn.functional.cross_entropy(logits, batch.ids[:, 1:][seen])
