"""Train an edge's adapter on private examples: LoRA on the whole or the pruned model, loss on the answers alone.

A run is deterministic, and one that was killed goes on from its last saved state to the same adapter, bit for bit on a
CPU. The model is neither changed nor copied: only the adapter, its gradients and its moments are new memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import checkpoint, store, tokens
from ..errors import ModelError, RetouchError
from ..measure import watched
from ..model import Model
from ..progress import report
from ..settings import Settings, setting
from ..trace import first_tensor
from ._dp import Private, Steps
from ._examples import Order, encoded, read_examples, rows_key
from ._lora import beginning, folded, initial_a, injected, lean
from .base import Adapter, Example

__all__ = ["LoraSettings", "initial_a", "read_examples", "told_size", "train"]

_POINTS = 20
"""Points of the loss curve."""
_FULL = 0.7
"""Least share of a padded row that is text."""


@dataclass(frozen=True)
class LoraSettings(Settings):
    """How an edge trains its adapter."""

    rank: int = setting(8, "Rank of the adapter.", ge=1, le=1024)
    alpha: float = setting(16.0, "The difference is alpha / rank times B A.", gt=0, le=10_000)
    targets: tuple[str, ...] | None = setting(None, "Weights inside a block that get an adapter; None is all of them.")
    dropout: float = setting(0.05, "Share of an adapter's inputs that is dropped.", ge=0, lt=1)
    learning_rate: float = setting(2e-4, "Highest learning rate of AdamW.", gt=0)
    warmup: float = setting(0.05, "Share of the steps in which the rate rises; then it falls to 0.", ge=0, le=1)
    clip: float = setting(1.0, "Largest length of a gradient.", gt=0)
    epochs: float = setting(3.0, "Passes over the own examples.", gt=0)
    n_steps: int | None = setting(None, "Steps, in place of epochs.", ge=1)
    batch: int = setting(8, "Rows of one pass through the network.", ge=1)
    accumulation: int = setting(1, "Passes of one step.", ge=1)
    max_tokens: int = setting(512, "Tokens of a row; longer prompts lose their beginning.", ge=2)
    replay: float = setting(
        0.5, "Share of each batch that is taken from public examples, if any are given.", ge=0, lt=1
    )
    a_init: Literal["shared", "independent", "orthogonal"] = setting("shared", "How A begins at the edges.")
    a_seed: int = setting(0, "Seed of A where edges share it.", ge=0)
    freeze_a: bool = setting(False, "Train B alone.")
    seed: int = setting(0, "Seed of the order of examples, dropout and an edge's own A.", ge=0)
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "Type of the frozen weights; to save memory, open them so."
    )
    checkpointing: bool = setting(False, "Compute activations again in the backward pass, to save memory.")
    lean: bool = setting(
        True, "Give freed memory back at once (glibc): a third less memory beside the weights, half as long again."
    )
    save_every: int = setting(50, "Steps between two saved states.", ge=1)


def train(
    model: Model, examples: Sequence[Example], settings: LoraSettings | None = None, folder: str | Path | None = None, *,
    replay: Sequence[Example] = (), initial: Mapping[str, Tensor] | None = None, name: str = "edge",
    deadline_s: float | None = None, private: Private | None = None,
) -> Adapter:  # fmt: skip
    """Train an adapter.

    Source:
        Hu et al., LoRA (2021); on pruned models LoRAM (ICLR 2025); frozen A: FFA-LoRA (Sun et al., 2024).

    Args:
        model: The whole model, or what `open_pruned` gave.
        examples: What to learn.
        settings: How; by default as the fields say.
        folder: Where the state is kept while it trains. A run that was killed goes on from there; one that has ended
            gives its adapter again.
        replay: Public examples that keep the adapter quiet elsewhere; mixed into every batch.
        initial: Where A begins, from `initial_a` at the cloud.
        name: What reports call the adapter.
        deadline_s: Seconds after which it stops cleanly with what is there; the notes then say ``partial``.
        private: Clip the gradient of each own example and add noise (DP-SGD); what it promises stands in the notes.

    Returns:
        The adapter at the sizes of `model`, with the scale folded in. Notes hold steps, loss, seconds, peak memory.

    Raises:
        FactError: An example cannot be used.
        SettingsError: Rank or targets do not fit the model.
        UserError: `initial` is missing or does not fit.
        RetouchError: The loss is not finite.
    """
    settings = settings or LoraSettings()
    if not model.anatomy.has_head or model.anatomy.kind != "decoder":
        raise ModelError(f"{model.source} predicts no next token, so there is no loss to train on. Open a decoder.")
    rows = encoded(model, examples, settings.max_tokens)
    public = encoded(model, replay, settings.max_tokens) if replay else []
    first = beginning(model, settings, initial)
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        lean(settings.lean),
        watched(model.device) as cost,
    ):  # the caller's generators stay
        course = _Course(model, settings, rows, public, first, Path(folder) if folder else None, name, private)
        course.run(math.inf if deadline_s is None else time.monotonic() + deadline_s)
        parts = folded(model, course.network, list(first), settings)
    notes = course.notes() | {"peak_mib": round(cost.peak_mib, 1), "device_mib": round(cost.device_mib, 1)}
    plan = getattr(model, "plan", "")
    return Adapter(
        name, parts, model.base_fingerprint, plan=plan, n_examples=told_size(len(examples), private), notes=notes
    )


def told_size(n: int, private: Private | None) -> int:
    """Return the number of examples that steps are counted by and the adapter tells: a public one under DP-SGD."""
    return private.size_of(n) if private else n


# ---------------------------------------------------------------- the loop


@dataclass
class _Position:
    """How far a run is, in numbers that JSON can hold."""

    step: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    n_losses: int = 0
    curve: list[list[float]] = field(default_factory=list)


class _Course:
    def __init__(
        self, model: Model, settings: LoraSettings, rows: list[tokens.Row], public: list[tokens.Row],
        first: Mapping[str, Tensor], folder: Path | None, name: str,
        private: Private | None = None,
    ) -> None:  # fmt: skip
        self.model, self.settings, self.rows, self.public, self.name = model, settings, rows, public, name
        self.saved = folder / "state" if folder else None
        self.network = injected(model, settings, first)
        self.weights = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=0.0, weight_decay=0.0)
        self.n_public = round(settings.batch * settings.replay) if public else 0
        self.n_own = max(1, settings.batch - self.n_public)
        self.own, self.others = (Order(len(r), settings.seed, w) for r, w in ((rows, "own"), (public, "public")))
        a_step = self.n_own * settings.accumulation
        self.n_steps = settings.n_steps or math.ceil(settings.epochs * told_size(len(rows), private) / a_step)
        self.at = _Position()
        share, weights = self.n_own / (self.n_own + self.n_public), list(self.weights.values())
        self.private = Steps(private, rows, a_step, weights, self._loss, share) if private else None
        self.key = store.key(
            model=model.fingerprint, settings=settings.to_dict(), rows=rows_key(rows), public=rows_key(public),
            first={n: store.digest_tensor(t) for n, t in first.items()}, **({"private": asdict(private)} if private else {}),
        )  # fmt: skip

    def run(self, deadline: float) -> None:
        """Go on from the saved state, or begin; stop at the end or at the deadline."""
        if not self._resumed():
            torch.manual_seed(self.settings.seed)
        begun, before = time.monotonic(), self.at.seconds
        what = f"Training {self.name}"
        report(what, self.at.step, self.n_steps)
        while self.at.step < self.n_steps and time.monotonic() < deadline:
            self._step()
            self.at.seconds = before + time.monotonic() - begun
            ended = self.at.step == self.n_steps or time.monotonic() >= deadline
            if ended or self.at.step % self.settings.save_every == 0:
                self._save()
            report(what, self.at.step, self.n_steps)

    def notes(self) -> dict[str, Any]:
        """Say what was done."""
        at = self.at
        promised = self.private.facts(at.step) if self.private else {}
        return {
            "settings": self.settings.to_dict(), "n_steps": at.step, "partial": at.step < self.n_steps,
            "n_tokens": at.n_tokens, "seconds": round(at.seconds, 3), "curve": at.curve, "n_replay": len(self.public),
            **promised,
        }  # fmt: skip

    # ------------------------------------------------------------ one step

    def _step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        batches = self._batches() if self.private is None else [self._public()]
        loss = self._backward(batches) if self.private is None else self.private.gradient(batches)
        norm = float(nn.utils.clip_grad_norm_(list(self.weights.values()), self.settings.clip))
        self._require_finite(loss, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.at.n_tokens += sum(len(row.ids) for batch in batches for row in batch)
        self._note(loss)

    def _backward(self, batches: Sequence[Sequence[tokens.Row]]) -> float:
        n_answers, loss = sum(len(row.target) for batch in batches for row in batch), 0.0
        for batch in batches:
            part = self._loss(batch) / n_answers
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        return loss

    def _rate(self) -> float:
        """Rise to the highest rate, then fall to 0 in a line."""
        rising, step = round(self.settings.warmup * self.n_steps), self.at.step
        share = (step + 1) / rising if step < rising else (self.n_steps - step) / max(1, self.n_steps - rising)
        return self.settings.learning_rate * share

    def _batches(self) -> list[list[tokens.Row]]:
        """Take this step's rows; own and public ones stand together in every pass."""
        n = self.settings.accumulation
        own = self.own.take(self.at.step * n * self.n_own, n * self.n_own)
        others = self.others.take(self.at.step * n * self.n_public, n * self.n_public)
        a, b = self.n_own, self.n_public
        batches = [
            [self.rows[j] for j in own[i * a : (i + 1) * a]] + [self.public[j] for j in others[i * b : (i + 1) * b]]
            for i in range(n)
        ]
        return [part for batch in batches for part in _level(batch)] if self.model.device.type == "cpu" else batches

    def _public(self) -> list[tokens.Row]:
        """Take this step's public rows alone."""
        count = self.settings.accumulation * self.n_public
        return [self.public[j] for j in self.others.take(self.at.step * count, count)]

    def _loss(self, rows: Sequence[tokens.Row]) -> Tensor:
        """Sum the loss over the answers' tokens; the head is applied where they are predicted and nowhere else."""
        batch, anatomy = self.model.batch([row.ids for row in rows]), self.model.anatomy
        body: Any = self.network.base_model
        states = first_tensor(body(**self.model.inputs(batch), use_cache=False).to_tuple())
        places = [(i, j) for i, row in enumerate(rows) for j in range(row.prompt, len(row.ids) - 1)]
        lines, columns = torch.tensor(places, device=states.device).T
        logits = self.network.get_submodule(anatomy.path("head"))(states[lines, columns]).float()
        if anatomy.softcap is not None:
            logits = anatomy.softcap * (logits / anatomy.softcap).tanh()
        return nn.functional.cross_entropy(logits, batch.ids[lines, columns + 1], reduction="sum")

    def _require_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        raise RetouchError(
            f"Training {self.name} diverged at step {self.at.step + 1} of {self.n_steps}: the loss is {loss}, the "
            f"gradient's length {norm}, at learning rate {self._rate():.3g}. Lower learning_rate."
        )

    def _note(self, loss: float) -> None:
        at = self.at
        at.step, at.loss, at.n_losses = at.step + 1, at.loss + loss, at.n_losses + 1
        if at.step % max(1, self.n_steps // _POINTS) == 0 or at.step == self.n_steps:
            at.curve.append([at.step, at.loss / at.n_losses])
            at.loss, at.n_losses = 0.0, 0

    # ------------------------------------------------------------ saved states

    def _save(self) -> None:
        if self.saved is None:
            return
        tensors = {
            **checkpoint.under("weight", {n: p.detach() for n, p in self.weights.items()}),
            **checkpoint.under("moment", checkpoint.moments(self.optimizer, self.weights.items())),
            **checkpoint.under("generator", checkpoint.generators(self.model.device)),
        }
        checkpoint.save(self.saved, tensors, {"key": self.key, "position": asdict(self.at)})

    def _resumed(self) -> bool:
        if self.saved is None or (found := checkpoint.load(self.saved, self.key)) is None:
            return False
        tensors, facts = found
        for name, value in checkpoint.select("weight", tensors).items():
            self.weights[name].data.copy_(value)
        checkpoint.restore_moments(self.optimizer, self.weights.items(), checkpoint.select("moment", tensors))
        self.at = _Position(**facts["position"])
        checkpoint.restore_generators(self.model.device, checkpoint.select("generator", tensors))
        return True


def _level(batch: Sequence[tokens.Row]) -> list[list[tokens.Row]]:
    """Cut a batch where padding would cost more than another pass; the gradient is the same sum."""
    parts: list[list[tokens.Row]] = []
    for row in sorted(batch, key=lambda row: len(row.ids), reverse=True):
        if parts and len(row.ids) >= _FULL * len(parts[-1][0].ids):
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts
