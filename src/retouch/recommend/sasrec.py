"""The strong rival: a causal transformer over item ids, trained with cross-entropy over the full catalogue."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .. import checkpoint, progress, store
from ..errors import SettingsError, UserError
from ..settings import setting
from ._causal import CausalItems
from ._full import FullRanking
from ._training import adamw, order, parts, restore, snapshot
from .base import Recommender, Run
from .metrics import ndcg
from .splits import Samples, windows

if TYPE_CHECKING:
    from .data import Interactions
    from .splits import Splits

__all__ = ["SASRec", "SASRecScorer"]


@dataclass(frozen=True)
class SASRec(Recommender):
    """Predict the next item at every place of a history, with cross-entropy over all items.

    Source:
        SASRec (Kang and McAuley, arXiv 1808.09781), with full cross-entropy as in Klenitskiy and Vasilev
        (arXiv 2309.07602), pre-norm blocks and one table for input and output. Histories longer than a window are cut
        into windows, so that every training target counts once an epoch.

    Use when:
        You want the strongest simple rival beside a result; on small catalogues it is hard to beat.

    Known problems:
        One row per item: an item without training interactions cannot be recommended, and the table grows with the
        catalogue. It knows nothing of texts.

    Shapes:
        windows: [batch, history] -> logits [batch, history, items]
    """

    d_model: int = setting(64, "Width; 128 for catalogues above 5,000 items.", ge=2)
    n_blocks: int = setting(2, "Transformer blocks.", ge=1)
    n_heads: int = setting(2, "Attention heads; they divide d_model.", ge=1)
    n_history: int = setting(50, "Latest items that it sees.", ge=1)
    dropout: float = setting(0.2, "Share of numbers set to zero in training; up to 0.5 on sparse data.", ge=0, lt=1)
    learning_rate: float = setting(1e-3, "Step size of AdamW.", gt=0)
    weight_decay: float = setting(0.01, "Decay of matrices other than the tables.", ge=0)
    batch_size: int = setting(128, "Windows of a step; a user with a short history has one.", ge=1)
    n_epochs: int = setting(200, "Most epochs.", ge=1)
    patience: int = setting(10, "Epochs without a better NDCG@10 on validation users before it stops.", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.n_heads:
            raise SettingsError(f"Method 'sasrec': {self.n_heads} n_heads do not divide a d_model of {self.d_model}.")

    def fit(self, run: Run) -> SASRecScorer:
        """Train until the validation users gain no more, and keep the best epoch.

        With a folder, each epoch is kept there, and the same call goes on where it stopped.

        Raises:
            UserError: Training diverged.
        """
        device = torch.device(run.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            training = _Training(self, run.data, run.splits, device, self._folder(run))
            return training.run()

    def _folder(self, run: Run) -> Path | None:
        """Name the state after everything that decides it but for when to stop."""
        if run.folder is None:
            return None
        settings = {k: v for k, v in self.to_dict().items() if k not in ("n_epochs", "patience")}
        s = run.splits
        split = {"how": s.how, "holdout": s.holdout, "seed": s.seed, "n_train": len(s.train), "n_valid": len(s.valid)}
        key = store.key(settings=settings, data=run.data.fingerprint, split=split, device=run.device)
        return run.folder / f"sasrec-{key[:16]}"


@dataclass(frozen=True, eq=False, kw_only=True)
class _Fitted:
    network: CausalItems
    history: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True, eq=False)
class SASRecScorer(_Fitted, FullRanking):
    """Rank with a fitted network.

    Attributes:
        network: It, evaluating.
        history: Of each epoch: its mean loss in nats and the NDCG@10 of validation users.
    """

    def log_probs(self, windows: NDArray[np.int32]) -> NDArray[np.float64]:
        """Return the log-probability of every item after each window, padding trimmed to the longest."""
        device = self.network.items.device
        with torch.inference_mode():
            states = self.network(_trimmed(torch.from_numpy(np.asarray(windows, np.int64)).to(device)))
            found = torch.log_softmax(self.network.logits(states[:, -1]).double(), dim=-1)
        return found.cpu().numpy()


def _trimmed(windows: Tensor) -> Tensor:
    """Cut the columns on the left that are padding in every row; one column stays."""
    used = (windows > 0).any(dim=0).nonzero()
    return windows[:, int(used[0]) if len(used) else windows.shape[1] - 1 :]


# ---------------------------------------------------------------- training


def training_windows(data: Interactions, splits: Splits, n_history: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Cut what is trained on into windows, from the latest item backwards, and pair each place with its target.

    Returns:
        Inputs and targets of equal shape, padded with 0 on the left; every training target stands once.

    Shapes: [windows, history] twice
    """
    users = np.flatnonzero(splits.last > 1) + 1
    n_targets = splits.last[users - 1] - 1
    n_windows = -(-n_targets // n_history)
    rows = np.repeat(users, n_windows)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
    ends = splits.last[rows - 1] - number * n_history
    inputs, last = windows(data, Samples(rows.astype(np.int32), (ends - 1).astype(np.int32)), n_history)
    targets = np.concatenate([inputs[:, 1:], last[:, None]], axis=1)
    return inputs, np.where(inputs > 0, targets, 0)


@dataclass(eq=False)
class _Training:
    """The loop of one fit: an epoch at a time, each of them kept."""

    method: SASRec
    data: Interactions
    splits: Splits
    device: torch.device
    folder: Path | None
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        m = self.method
        self.network = CausalItems(self.data.n_items, m.n_history, m.d_model, m.n_blocks, m.n_heads, m.dropout)
        self.network.to(self.device)
        self.optimizer = adamw(self.network, m.weight_decay, ("items", "places"))
        for group in self.optimizer.param_groups:
            group["lr"] = m.learning_rate
        inputs, targets = training_windows(self.data, self.splits, m.n_history)
        self.inputs, self.targets = torch.from_numpy(inputs).long(), torch.from_numpy(targets).long()
        self.lengths = (inputs > 0).sum(axis=1)

    def run(self) -> SASRecScorer:
        """Train, and return the best epoch."""
        self._go_on()
        while len(self.history) < self.method.n_epochs and self._waited() < self.method.patience:
            loss = self._epoch(len(self.history))
            score = float(ndcg(self._scorer().ranks(self.splits.valid), 10).mean())
            self.history.append({"loss": loss, "ndcg@10": score})
            if self._waited() == 0:
                self.best = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
            self._keep()
        self.network.load_state_dict(self.best)
        return self._scorer()

    def _scorer(self) -> SASRecScorer:
        self.network.eval()
        return SASRecScorer(self.data, self.method.n_history, network=self.network, history=tuple(self.history))

    def _waited(self) -> int:
        """Count the epochs since the best one."""
        scores = [epoch["ndcg@10"] for epoch in self.history]
        return len(scores) - 1 - int(np.argmax(scores)) if scores else 0

    def _epoch(self, epoch: int) -> float:
        self.network.train()
        sequence = order(len(self.inputs), self.method.seed, epoch)
        total, n = 0.0, 0
        what = f"sasrec, epoch {epoch + 1} of at most {self.method.n_epochs}"
        done = 0
        for batch in parts(self.lengths, sequence, self.method.batch_size):
            loss, n_targets = self._step(torch.from_numpy(batch))
            total, n, done = total + loss * n_targets, n + n_targets, done + len(batch)
            progress.report(what, done, len(sequence))
        if not np.isfinite(total):
            raise UserError(f"sasrec diverged in epoch {epoch + 1}: its loss is {total}. Lower learning_rate.")
        return total / n

    def _step(self, batch: Tensor) -> tuple[float, int]:
        inputs = _trimmed(self.inputs[batch]).to(self.device)
        targets = self.targets[batch][:, -inputs.shape[1] :].to(self.device)
        real = targets > 0
        logits = self.network.logits(self.network(inputs)[real])
        loss = F.cross_entropy(logits, targets[real] - 1)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        return float(loss.detach()), len(logits)

    # -- what is kept

    def _keep(self) -> None:
        if self.folder is not None:
            tensors = snapshot(self.network, self.optimizer) | checkpoint.under("best", self.best)
            checkpoint.save(self.folder, tensors, {"history": self.history})

    def _go_on(self) -> None:
        """Take up what an earlier call left, unless it already went further than this one may."""
        state = checkpoint.load(self.folder)
        if state is None or len(state[1]["history"]) > self.method.n_epochs:
            return
        tensors, facts = state
        restore(self.network, self.optimizer, tensors)
        self.best = {name: value.to(self.device) for name, value in checkpoint.select("best", tensors).items()}
        self.history = list(facts["history"])
