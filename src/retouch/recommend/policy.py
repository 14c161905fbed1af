"""The recommender with knowledge: a copy of the reference, instructions, a source of knowledge, and the fusion.

All that knowledge does for a user is one vector, the residual, added to the first input of the decoder. A policy that
was just made gives zeros: it is the reference.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .fusion import Fusion
from .generator import Generator
from .instruction import Chosen, GlobalInstructions, Instructions, PromptInstructions
from .knowledge import Source

__all__ = ["Context", "Policy", "Told"]

Context = Literal["reference", "policy"]
AnyInstructions = Instructions | GlobalInstructions | PromptInstructions


@dataclass(frozen=True, eq=False)
class Told:
    """What knowledge says about a batch of users.

    Attributes:
        residual: What is added to the first decoder input, (batch, d_model); zeros for an empty history.
        codes: Which instruction words were chosen, (batch, books).
        gate: How far each user's knowledge is let in, (batch,).
        losses: The losses of the instructions, by name; empty without gradients.
        state: The users' states that chose the instructions, (batch, d_model).
        moved: How far knowledge moved each user's first input before it was centred; see `Fusion.follow`.
    """

    residual: Tensor
    codes: Tensor
    gate: Tensor
    losses: dict[str, Tensor]
    state: Tensor
    moved: Tensor


class Policy(nn.Module):
    """A generator that also listens to knowledge.

    Source: arXiv 2605.18771, figure 2.

    Args:
        reference: The fitted recommender without knowledge. It is copied; the copy is trained.
        instructions: What a language model is told, by the user's state.
        fusion: How its answer enters.
        source: Who answers. None: nobody, and the residual is always zero.
        context: Whose encoder gives the state: the frozen ``reference``, so that codes do not move while the policy is
            trained, or the ``policy``, as published.
    """

    def __init__(
        self,
        reference: Generator,
        instructions: AnyInstructions | None,
        fusion: Fusion | None,
        source: Source | None,
        context: Context = "reference",
    ) -> None:
        super().__init__()
        self.generator = copy.deepcopy(reference).requires_grad_(True)
        self.instructions, self.fusion, self.context = instructions, fusion, context
        self.source_part = source if isinstance(source, nn.Module) else None
        self._outside = (reference.eval(), source)  # in a tuple: not part of what is trained and saved

    @property
    def reference(self) -> Generator:
        """The recommender without knowledge."""
        return self._outside[0]

    @property
    def source(self) -> Source | None:
        """Where knowledge comes from."""
        return self._outside[1]

    @property
    def new_parts(self) -> list[nn.Module]:
        """What the reference does not have."""
        return [part for part in (self.instructions, self.fusion, self.source_part) if part is not None]

    # ------------------------------------------------------------ knowledge

    def state(self, windows: Tensor) -> Tensor:
        """Return the state of each user.

        Shapes:
            (batch, history) -> (batch, d_model)
        """
        if self.context == "policy":
            return self.generator.pooled(self.generator.encode(windows))
        with torch.no_grad():
            return self.reference.pooled(self.reference.encode(windows))

    def choose(self, windows: Tensor) -> Chosen:
        """Return the instructions for some histories; no language model is needed.

        Shapes:
            (batch, history) -> codes (batch, books)
        """
        assert self.instructions is not None
        chosen: Chosen = self.instructions(self.state(windows))
        return chosen

    def codes(self, windows: Tensor) -> Tensor:
        """Return the codes of these instructions alone, (batch, books)."""
        assert self.instructions is not None
        return self.instructions.codes(self.state(windows))

    def tell(self, windows: Tensor) -> Told:
        """Return what knowledge says about some histories.

        Shapes:
            windows: (batch, history), 0 = padding on the left.
        """
        windows = windows.to(self.generator.first.device)
        if self.source is None or self.instructions is None or self.fusion is None or not len(windows):
            return self._silent(windows)
        state = self.state(windows)
        chosen: Chosen = self.instructions(state)
        known = self.source.states(chosen.tokens, windows)
        residual, gate, moved = self.fusion.whole(self.generator.first, known.states.to(state), known.mask)
        held = (windows > 0).any(1, keepdim=True)
        return Told(residual * held, chosen.codes, gate, chosen.losses, state, moved)

    def _silent(self, windows: Tensor) -> Told:
        first = self.generator.first
        nothing = first.new_zeros(len(windows), len(first))
        return Told(nothing, torch.zeros(len(windows), 0, dtype=torch.int64), nothing[:, 0], {}, nothing, nothing[:0])

    @torch.no_grad()
    def begin(self, windows: NDArray[np.int32], batch_size: int = 256) -> None:
        """Measure, once and before training, how knowledge is spread over training users."""
        if self.source is None or self.instructions is None or self.fusion is None:
            return
        known = []
        for part in _split(windows, batch_size):
            rows = torch.from_numpy(part).to(self.generator.first.device)
            found = self.source.states(self.instructions(self.state(rows)).tokens, rows)
            known.append((found.states.float(), found.mask))
        self.fusion.begin(self.generator.first, *_padded(known))

    def residual(self, windows: Tensor) -> Tensor:
        """Return what knowledge adds to the first decoder input.

        Shapes:
            (batch, history) -> (batch, d_model)
        """
        return self.tell(windows).residual

    @torch.no_grad()
    def residuals(self, windows: NDArray[np.int32], batch_size: int = 256) -> Tensor:
        """Return the same for any number of windows, without gradients and in batches."""
        parts = [self.residual(torch.from_numpy(part)) for part in _split(windows, batch_size)]
        return torch.cat(parts) if parts else self.generator.first.new_zeros(0, len(self.generator.first))

    # ------------------------------------------------------------ scores

    def code_log_probs(self, windows: Tensor, targets: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the log-probability of each code of the targets, (batch, levels); see `Generator.code_log_probs`."""
        return self.generator.code_log_probs(self.generator.encode(windows), targets, residual)

    def knowledge_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of everything that the reference does not have, by name."""
        own = {f"generator.{name}" for name in self.generator.state_dict()}
        return {name: value.detach() for name, value in self.state_dict().items() if name not in own}


def _split(windows: NDArray[np.int32], size: int) -> list[NDArray[np.int32]]:
    return [windows[i : i + size] for i in range(0, len(windows), size)]


def _padded(known: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Join batches of states; where they have masks, to the widest of them."""
    if known[0][1] is None:
        return torch.cat([states for states, _ in known]), None
    widest = max(states.shape[1] for states, _ in known)
    states = [F.pad(rows, (0, 0, widest - rows.shape[1], 0)) for rows, _ in known]
    masks = [F.pad(mask, (widest - mask.shape[1], 0)) for _, mask in known if mask is not None]
    return torch.cat(states), torch.cat(masks)
