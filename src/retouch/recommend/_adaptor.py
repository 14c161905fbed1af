"""One vector a user, read from a language model with a fixed prompt, and the adaptor that is trained on it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..progress import track
from .knowledge import Knowledge, LanguageKnowledge, histories_of

__all__ = ["FixedKnowledge"]

_ROWS = 64


class FixedKnowledge(nn.Module):
    """Mean of a language model's last states over the titles behind a fixed prompt, through a small network.

    Each history's mean is computed once and kept: nothing before the adaptor changes in training.

    Shapes:
        states: tokens (batch, prompt, d_llm), windows (batch, history) -> (batch, 1, d_llm)
    """

    def __init__(self, source: LanguageKnowledge) -> None:
        super().__init__()
        self.d_llm, self.rms = source.d_llm, source.rms
        self.adaptor = nn.Sequential(
            nn.LayerNorm(self.d_llm), nn.Linear(self.d_llm, self.d_llm), nn.GELU(), nn.Linear(self.d_llm, self.d_llm)
        )
        self._source = (source,)  # in a tuple: its weights are not this module's
        self._means: dict[bytes, Tensor] = {}
        self._tokens: Tensor | None = None

    @property
    def fingerprint(self) -> str:
        """Name everything in front of the adaptor, except the prompt."""
        return self._source[0].fingerprint

    def ask(self, tokens: Tensor) -> None:
        """Set the prompt's input embeddings, (prompt, d_llm)."""
        self._tokens = tokens
        self._means.clear()

    def prepare(self, windows: NDArray[np.int32]) -> None:
        """Compute and keep the means of these histories."""
        assert self._tokens is not None
        wanted = {items.tobytes(): row for row, items in enumerate(histories_of(windows))}
        rows = [row for key, row in wanted.items() if key not in self._means]
        rows.sort(key=lambda row: int((windows[row] > 0).sum()))
        batches = [rows[i : i + _ROWS] for i in range(0, len(rows), _ROWS)]
        for batch in track(batches, "Reading the histories with the language model"):
            self._means |= zip([items.tobytes() for items in histories_of(windows[batch])], self._read(windows[batch]))

    @torch.no_grad()
    def _read(self, windows: NDArray[np.int32]) -> Tensor:
        assert self._tokens is not None
        known = self._source[0].states(self._tokens.expand(len(windows), -1, -1), torch.from_numpy(windows))
        assert known.mask is not None
        mask = known.mask[..., None].to(known.states)
        return (known.states * mask).sum(1) / mask.sum(1).clamp(min=1)

    def states(self, tokens: Tensor, windows: Tensor) -> Knowledge:
        """Return the adapted mean of each history."""
        rows = windows.cpu().numpy().astype(np.int32)
        keys = [items.tobytes() for items in histories_of(rows)]
        missing = [row for row, key in enumerate(keys) if key not in self._means]
        fresh = dict(zip(missing, self._read(rows[missing]))) if missing else {}
        means = torch.stack([fresh[row] if row in fresh else self._means[key] for row, key in enumerate(keys)])
        return Knowledge(self.adaptor(means.to(tokens.device))[:, None])
