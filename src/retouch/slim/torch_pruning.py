"""Torch-Pruning: the package that prunes any network structurally, on ours, with the training of the static rival."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from .. import store
from ..errors import ModelError, UserError
from ..model import Model
from ..settings import setting
from ._families import family_of
from .base import SlimMethod, Widths
from .encoded import order, padded
from .losses import hard_loss, targets
from .presets import TrainingSettings
from .schedule import n_cuts, widths_after
from .shrink import Kept, sliced
from .static import one_exit, recovered
from .teaching import inputs_of, numbered

if TYPE_CHECKING:
    from .network import SlimForSequenceClassification
    from .stages import Fitted, Run, Trained

__all__ = ["TorchPruning", "pruned"]


@dataclass(frozen=True)
class TorchPruning(TrainingSettings, SlimMethod):
    """Let the package Torch-Pruning choose and remove heads and neurons; the rest is as in `static`.

    It prunes the family's own network in as many cuts, and what it leaves is trained on as the static rival is, on the
    same number of tokens.

    Source: Fang et al., DepGraph: Towards Any Structural Pruning (CVPR 2023); VainF/Torch-Pruning 1.6 (MIT).

    Use when: to compare with the tool that is at hand everywhere.

    Known problems: it does not factorise embeddings, so the model has the plan's encoder and the original's whole
        table: compare encoders. It finds no heads to prune in mpnet, whose heads share a bias by distance. Saving a
        network that it pruned is left to its user; here the widths go into the configuration.

    Shapes: heads and neurons as planned, the embedding whole.

    Example:
        >>> TorchPruning(importance="taylor").importance
        'taylor'
    """

    importance: Literal["magnitude", "taylor"] = setting(
        "magnitude", "The size of a unit's weights, or of their products with the slope of the labels' loss."
    )

    def fit(self, run: Run) -> Fitted:
        """Train the stages in their order.

        Raises:
            UserError: The package is not installed, or task, model and plan do not fit each other.
            ModelError: The package cannot prune heads of this family.
        """
        _package()
        _require_heads(run)
        original = run.original()
        slim, goal = run.exited(original, []), replace(run.plan.widths, rank=None, exits=(run.plan.size.blocks - 1,))
        of, stage = n_cuts(run.plan.size, goal, run.stages.n_cuts), one_exit(run.stages.slenderise)
        for i in range(of):
            part = replace(stage.scaled(1 / of, stage.growth**i), growth=1.0)
            slim = self._cut(run, run.recovered(slim, original, part), widths_after(run.plan.size, goal, i + 1, of))
        return run.fitted(recovered(run, slim, original), original)

    def _cut(self, run: Run, slim: Trained, widths: Widths) -> Trained:
        batches = _batches(run, slim) if self.importance == "taylor" else None
        made_of = {"importance": self.importance, "package": version("torch-pruning"), "seed": self.seed}
        key = store.key(begin=slim.key, widths=widths.to_dict(), **made_of)
        return replace(slim, network=pruned(slim.network, widths, batches), key=key, record={})


def pruned(
    network: SlimForSequenceClassification, widths: Widths, batches: Iterator[dict[str, Any]] | None = None
) -> SlimForSequenceClassification:
    """Return the network that Torch-Pruning makes of a network, with its own weights, as one of ours.

    Args:
        network: In eval mode; it is left as it is.
        widths: Heads and neurons to reach; no other part is touched.
        batches: Labelled batches for the Taylor importance; None: by magnitude.

    Raises:
        UserError: The package is not installed.
        ModelError: It removed something else than was asked for, as in families whose heads it does not find.
    """
    package, work = _package(), copy.deepcopy(network).requires_grad_(True).eval()
    if batches is not None:
        _slopes(work, batches)
    importance = package.importance
    how = importance.MagnitudeImportance() if batches is None else importance.TaylorImportance()
    gone: dict[nn.Module, set[int]] = {}
    for group in _pruner(package, work, widths, how).step(interactive=True):
        for part, ids in group:
            if part.handler == package.prune_linear_out_channels:
                gone.setdefault(part.target.module, set()).update(int(i) for i in ids)
        group.prune()
    new = sliced(network, _kept(network, work, gone, widths))
    new.load_state_dict(work.state_dict())  # shapes are compared here
    return new


def _pruner(package: Any, work: SlimForSequenceClassification, widths: Widths, importance: Any) -> Any:
    """Set the package up so that heads and neurons go, and nothing else."""
    parts = [work.parts(block) for block in range(work.size.blocks)]
    attention = {linear: heads for p, heads in zip(parts, work.widths.heads) for linear in (p.query, p.key, p.value)}
    free = {*attention, *(p.up for p in parts)}
    fixed = [m for m in work.modules() if isinstance(m, nn.Linear | nn.Embedding | nn.LayerNorm) and m not in free]
    # half a unit, since the package rounds shares of heads up and of neurons down
    neurons = {p.up: 1 - (f + 0.5) / p.up.out_features for p, f in zip(parts, widths.d_ff)}
    heads = {linear: max(0.0, (attention[linear] - n - 0.5) / attention[linear])
             for p, n in zip(parts, widths.heads) for linear in (p.query, p.key, p.value)}  # fmt: skip
    ids = torch.arange(8, device=work.device)[None] % work.size.vocab
    return package.pruner.BasePruner(
        work,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        importance,
        pruning_ratio=0.5,  # of attention, which it has to be asked for before it looks at heads
        pruning_ratio_dict={linear: max(0.0, share) for linear, share in neurons.items()},
        head_pruning_ratio_dict=heads,
        ignored_layers=fixed,
        num_heads=attention,
        prune_num_heads=True,
        prune_head_dims=False,
        in_channel_groups={},  # its defaults are shared between calls
        out_channel_groups={},
        output_transform=lambda output: output.logits,
    )


def _kept(
    network: SlimForSequenceClassification, work: SlimForSequenceClassification, gone: dict[nn.Module, set[int]],
    widths: Widths,
) -> Kept:  # fmt: skip
    """Turn what the package removed into the units that stay."""
    k, heads, neurons = network.size.head_dim, [], []
    for block in range(network.size.blocks):
        parts = work.parts(block)
        query, up = gone.get(parts.query, set()), gone.get(parts.up, set())
        heads.append([h for h in range(network.widths.heads[block]) if h * k not in query])
        neurons.append([j for j in range(network.widths.d_ff[block]) if j not in up])
        same = query == gone.get(parts.key, set()) == gone.get(parts.value, set())
        if not same or (len(heads[-1]), len(neurons[-1])) != (widths.heads[block], widths.d_ff[block]):
            raise ModelError(
                f"Torch-Pruning left {len(heads[-1])} heads and {len(neurons[-1])} neurons in block {block} of this "
                f"{network.family.name} model; {widths.heads[block]} and {widths.d_ff[block]} were asked for. Take "
                "another version of the package (1.6 is known to work), or another method."
            )
    return Kept(heads, neurons)


def _slopes(network: SlimForSequenceClassification, batches: Iterator[dict[str, Any]]) -> None:
    """Add up the gradients of the labels' loss."""
    for batch in batches:
        logits = network.levels(**inputs_of(batch)).logits
        torch.autograd.backward(hard_loss(logits, targets(batch["labels"], network.config), network.config.task))


def _batches(run: Run, slim: Trained) -> Iterator[dict[str, Any]]:
    """Yield training batches, as many as the preset scores before a cut."""
    encoded, seen = run.encoded("train"), 0
    examples, tokens = run.stages.score_examples, run.stages.score_tokens
    for rows in order(encoded, run.settings.batch_size, seed=run.seed(f"torch_pruning {slim.key}")):
        if seen >= (examples or tokens or 0):
            return
        seen += len(rows) if examples is not None else padded(encoded, rows)
        yield numbered(encoded, rows, slim.network.device)


def _require_heads(run: Run) -> None:
    """Name before any work what would fail at the first cut."""
    family = family_of(run.model.network.config if isinstance(run.model, Model) else run.model.config.base_config)
    if family.relative:
        raise ModelError(
            f"Torch-Pruning finds no heads to prune in {family.name} models, whose heads share a bias by distance. Take "
            "another method, such as static."
        )


def _package() -> Any:
    try:
        return import_module("torch_pruning")
    except ImportError as error:
        raise UserError(
            "The method torch_pruning needs the package Torch-Pruning, which is not installed: pip install torch-pruning"
        ) from error
