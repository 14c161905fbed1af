"""Fine-tune one weight: what FT-L and FT-M share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..change import Dense
from ..errors import NoEffect
from ..model import Model
from ..progress import track
from ..tokens import Row
from ..trace import Suffix, Trace

__all__ = ["Reads", "tune"]


@dataclass(frozen=True)
class Reads:
    """One row, the indices where its loss is read, and the token wanted at each."""

    ids: tuple[int, ...]
    at: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def at_prompt(cls, row: Row) -> Reads:
        """Read all of the target's tokens at the prompt's last token, which sees none of them (FT-L)."""
        return cls(row.ids[: row.prompt + 1], (row.prompt,) * len(row.target), row.target)

    @classmethod
    def at_target(cls, row: Row) -> Reads:
        """Read each token of the target at the token before it (FT-M)."""
        return cls(row.seen, tuple(range(row.prompt, row.prompt + len(row.target))), row.target)


class _Weight:
    """A weight under training, beside the network's own, which stays as it is."""

    def __init__(self, model: Model, name: str) -> None:
        self.start = model.matrix(name).clone()
        self.matrix = self.start.clone().requires_grad_(True)
        bias = getattr(model.module(name), "bias", None)
        self.bias_start = None if bias is None else bias.detach().clone()
        self.bias = None if bias is None else bias.detach().clone().requires_grad_(True)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.matrix] if self.bias is None else [self.matrix, self.bias]

    @torch.no_grad()
    def hold(self, max_change: float) -> None:
        """Keep every entry within `max_change` of its start."""
        self.matrix.clamp_(self.start - max_change, self.start + max_change)
        if self.bias is not None and self.bias_start is not None:
            self.bias.clamp_(self.bias_start - max_change, self.bias_start + max_change)


@torch.enable_grad()  # a caller may plan inside torch.no_grad
def tune(
    model: Model,
    name: str,
    rows: Sequence[Reads],
    *,
    learning_rate: float,
    n_steps: int,
    max_change: float,
    stop_loss: float,
    batch_size: int,
) -> tuple[dict[str, Dense], list[float]]:
    """Train one weight (and its bias) on rows, and return the difference.

    The blocks below run once. Adam without decay; at most `n_steps` passes over the rows; a batch whose loss is under
    `stop_loss` takes no step, and the training ends when a pass's mean is.

    Source:
        FT-L: kmeng01/rome (MIT). FT-M: zjunlp/EasyEdit (MIT).

    Returns:
        The differences by our names, and the mean loss of each pass.

    Raises:
        NoEffect: No step was taken: the model says the targets already.
    """
    batches = [_Batch(model, name, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    weight = _Weight(model, name)
    adam = torch.optim.Adam(weight.parameters, lr=learning_rate)
    means = []
    for _ in track(range(n_steps), f"Fine-tuning {name}"):
        losses = []
        for batch in batches:
            loss = batch.loss(weight)
            losses.append(float(loss.detach()))
            if losses[-1] >= stop_loss:
                adam.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                adam.step()
                if max_change:
                    weight.hold(max_change)
        means.append(sum(losses) / len(losses))
        if means[-1] < stop_loss:
            break
    if torch.equal(weight.matrix, weight.start):
        raise NoEffect(f"Nothing was to learn: the loss was {means[0]:.4f} from the start, under {stop_loss}.")
    parts = {name: Dense((weight.matrix.detach() - weight.start).cpu())}
    if weight.bias is not None and weight.bias_start is not None:
        parts[f"{name}:bias"] = Dense((weight.bias.detach() - weight.bias_start).cpu()[:, None])
    return parts, means


class _Batch:
    """Rows whose pass below the trained block is done."""

    def __init__(self, model: Model, name: str, rows: Sequence[Reads]) -> None:
        self.model, self.name = model, name
        self.suffix = Suffix.of(model, [r.ids for r in rows], [0] * len(rows), model.anatomy.block_of(name))
        self.row = torch.tensor([i for i, r in enumerate(rows) for _ in r.at], device=model.device)
        self.column = torch.tensor([a for r in rows for a in r.at], device=model.device)
        self.token = torch.tensor([t for r in rows for t in r.tokens], device=model.device)
        self.share = torch.tensor([1 / (len(r.at) * len(rows)) for r in rows for _ in r.at], device=model.device)

    def loss(self, weight: _Weight) -> Tensor:
        """Mean over rows of the mean NLL of each row's tokens."""
        seen: list[Tensor] = []
        with Trace(self.model) as trace:
            trace.watch(self.name, seen.append, "input")
            trace.edit(self.name, lambda out: functional.linear(seen[-1], weight.matrix, weight.bias))
            state = self.suffix.run()
        logp = self.model.logits(state[self.row, self.column]).log_softmax(-1)
        return -(logp.gather(1, self.token[:, None])[:, 0] * self.share).sum()
