"""What a language model says about a user: its states over the titles of the user's items and the instruction tokens.

Three sources share one contract, `Source`: a language model; attention over the items' text vectors, which has none;
and nothing. Only positions that depend on something trained are computed more than once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import store
from ..errors import ModelError, SettingsError
from ._titles import Embedded, TitleCache

if TYPE_CHECKING:
    from ..model import Model

__all__ = ["Knowledge", "LanguageKnowledge", "Order", "Source", "TextKnowledge", "Titles", "histories_of"]

Order = Literal["suffix", "prefix"]
Titles = Literal["pooled", "tokens"]


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What is known about a batch of users.

    Attributes:
        states: (batch, positions, d_llm).
        mask: Which positions are real, (batch, positions); None: all.
    """

    states: Tensor
    mask: Tensor | None = None


class Source(Protocol):
    """Where knowledge comes from."""

    d_llm: int
    rms: float

    def states(self, tokens: Tensor, windows: Tensor) -> Knowledge:
        """Return what is known when these tokens are asked about these histories.

        Shapes:
            tokens (batch, books, d_llm), windows (batch, history), 0 = padding on the left.
        """
        ...

    def prepare(self, windows: NDArray[np.int32]) -> None:
        """Do ahead what can be done for these histories."""
        ...

    @property
    def fingerprint(self) -> str:
        """Name everything that decides the states, except the tokens."""
        ...


def histories_of(windows: Tensor | NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """Return the items of each window, oldest first, without the padding."""
    rows = np.asarray(windows.cpu() if isinstance(windows, Tensor) else windows).astype(np.int32)
    return [np.ascontiguousarray(row[row > 0]) for row in rows]


class LanguageKnowledge:
    """Ask a language model about a history.

    With ``suffix`` the instructions stand behind the titles and their states are the knowledge: titles then depend on
    nothing trained, so their keys and values are kept, and only the instructions' positions run forward and backward.
    With ``prefix``, as published, the instructions stand in front and the titles' states are the knowledge.

    Source: arXiv 2605.18771; the suffix order and the kept titles are ours.

    Args:
        model: An opened decoder. Its weights are not trained, and not copied unless `dtype` is another one.
        titles: One title an item.
        order: See above.
        titles_as: ``pooled``: a title is one position, the mean of its tokens' input embeddings. ``tokens``: up to
            `max_title_tokens` positions.
        n_llm_layers: How many of its blocks are used, from the first; None: all. Its own final norm follows.
        max_title_tokens: Where a title is cut with ``tokens``.
        text_cache_mib: Memory for keys and values of titles, in MiB.
        cache_dtype: How they are kept; ``float16`` halves the memory and moves states by about a thousandth.
        dtype: What the language model computes in; None: float32 on a CPU, bfloat16 on a GPU.

    Raises:
        ModelError: The model is no decoder.
        SettingsError: It has not that many blocks.
    """

    def __init__(
        self,
        model: Model,
        titles: Sequence[str],
        *,
        order: Order = "suffix",
        titles_as: Titles = "pooled",
        n_llm_layers: int | None = None,
        max_title_tokens: int = 12,
        text_cache_mib: float = 2048,
        cache_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
    ) -> None:
        if model.anatomy.kind != "decoder":
            raise ModelError(f"{model.source} is an encoder; knowledge comes from a decoder, such as smollm2.")
        self.model, self.order, self.titles_as = model, order, titles_as
        self.n_blocks = _blocks(model, n_llm_layers)
        self.dtype = dtype or (torch.float32 if model.device.type == "cpu" else torch.bfloat16)
        self.llm = _first_blocks(model, self.n_blocks, self.dtype)
        self.d_llm = model.anatomy.d_embed
        self.rms = _embedding_rms(model)
        self.embedded = _embed(model, titles, titles_as, max_title_tokens, self.dtype)
        self.cache = TitleCache(self.llm, self.embedded, text_cache_mib, cache_dtype)
        self._titles = store.key(titles=list(titles), how=titles_as, most=max_title_tokens, order=order)

    @property
    def fingerprint(self) -> str:
        """Name the model's part that is used, the titles, and how they are read."""
        return store.key(llm=self.model.fingerprint, blocks=self.n_blocks, titles=self._titles, dtype=str(self.dtype))

    def prompt(self, text: str) -> Tensor:
        """Return the input embeddings of a text, (tokens, d_llm)."""
        return _token_rows(self.model, [text], 10**6)[0]

    def prepare(self, windows: NDArray[np.int32]) -> None:
        """Read the titles of these windows now, if they can be kept."""
        if self.order == "suffix":
            self.cache.prepare(histories_of(windows))

    def states(self, tokens: Tensor, windows: Tensor) -> Knowledge:
        """Return the states of the instructions (``suffix``) or of the titles (``prefix``)."""
        histories = histories_of(windows)
        tokens = tokens.to(self.dtype)
        return self._suffix(tokens, histories) if self.order == "suffix" else self._prefix(tokens, histories)

    def _suffix(self, tokens: Tensor, histories: list[NDArray[np.int32]]) -> Knowledge:
        from transformers import DynamicCache

        past, mask = self.cache.gather(histories)
        known = DynamicCache()
        for block, (keys, values) in enumerate(past.permute(2, 3, 0, 4, 1, 5)):
            known.update(keys, values, block)
        mask = torch.cat([mask, mask.new_ones(tokens.shape[:2])], 1).long()
        places = mask.cumsum(1)[:, -tokens.shape[1] :] - 1
        out = self.llm(
            inputs_embeds=tokens, attention_mask=mask, position_ids=places, past_key_values=known, use_cache=True
        )
        return Knowledge(out.last_hidden_state.float())

    def _prefix(self, tokens: Tensor, histories: list[NDArray[np.int32]]) -> Knowledge:
        titles, real = self.embedded.batch(histories, left=True)
        # the padding stands between instructions and titles, where the mask hides it just as well
        mask = torch.cat([real.new_ones(tokens.shape[:2]), real], 1).long()
        out = self.llm(
            inputs_embeds=torch.cat([tokens, titles], 1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
        return Knowledge(out.last_hidden_state[:, tokens.shape[1] :].float(), real)


class TextKnowledge(nn.Module):
    """No language model: the instruction tokens attend to the text vectors of the user's items.

    A control: what it reaches needs no language model.

    Shapes:
        vectors: (items, d_llm), row ``i - 1`` is item ``i``

    Args:
        vectors: The items' text vectors.
        n_history: How many items a window holds.
    """

    vectors: Tensor

    def __init__(self, vectors: NDArray[np.float32], n_history: int) -> None:
        super().__init__()
        padded = np.concatenate([np.zeros_like(vectors[:1]), vectors])
        self.register_buffer("vectors", torch.from_numpy(padded), persistent=False)
        self.d_llm = vectors.shape[1]
        self.rms = float(np.sqrt(np.mean(np.square(vectors, dtype=np.float64))))
        self.positions = nn.Parameter(torch.zeros(n_history, self.d_llm))
        self.query = nn.Linear(self.d_llm, self.d_llm, bias=False)
        self.key = nn.Linear(self.d_llm, self.d_llm, bias=False)

    @property
    def fingerprint(self) -> str:
        """Name the vectors."""
        return store.key(vectors=store.digest_tensor(self.vectors))

    def prepare(self, windows: NDArray[np.int32]) -> None:
        """Do nothing: there is nothing to keep."""

    def states(self, tokens: Tensor, windows: Tensor) -> Knowledge:
        """Return what each token sees of the items."""
        windows = windows.to(self.vectors.device).long()
        items = self.vectors[windows] + self.positions[-windows.shape[1] :]
        mask = windows > 0
        shown = (mask | ~mask.any(1, keepdim=True))[:, None]
        seen = F.scaled_dot_product_attention(self.query(tokens), self.key(items), items, shown)
        return Knowledge(seen)


# ---------------------------------------------------------------- the language model's parts


def _blocks(model: Model, wanted: int | None) -> int:
    most = model.anatomy.n_blocks
    if wanted is not None and not 1 <= wanted <= most:
        raise SettingsError(f"{model.source} has {most} blocks; n_llm_layers must be from 1 to {most}, got {wanted}.")
    return wanted or most


def _first_blocks(model: Model, n_blocks: int, dtype: torch.dtype) -> Any:
    """Return the decoder without its head, of its first blocks and its final norm; the weights are shared."""
    network: Any = model.network
    path = model.anatomy.places["blocks"]
    prefix = f"{network.base_model_prefix}."
    base = _without(network.base_model, path.removeprefix(prefix).split("."), n_blocks)
    if dtype != torch.float32:
        base = copy.deepcopy(base).to(dtype)  # the opened model stays as it is
    return base.eval()


def _without(module: nn.Module, path: list[str], n_blocks: int) -> nn.Module:
    """Copy the modules along a path, but not their weights, and shorten the list of blocks at its end."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    child = module.get_submodule(path[0])
    last = len(path) == 1
    twin._modules[path[0]] = child[:n_blocks] if last else _without(child, path[1:], n_blocks)  # type: ignore[index]
    return twin


def _embedding_rms(model: Model) -> float:
    """Return the mean size of the input embeddings, as the model's own embedding module gives them."""
    network: Any = model.network
    embed = network.get_input_embeddings()
    with torch.no_grad():
        ids = torch.arange(embed.weight.shape[0], device=model.device)
        parts = [ids[i : i + 8192] for i in range(0, len(ids), 8192)]
        sizes = [embed(part).float().square().mean(-1).sqrt() for part in parts]
    return float(torch.cat(sizes).mean())


def _token_rows(model: Model, texts: Sequence[str], most: int) -> list[Tensor]:
    """Return the input embeddings of each text's tokens; a text without any counts as one token that ends a text."""
    network: Any = model.network
    coded = model.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    rows = [ids[:most] or [model.pad_id] for ids in coded]
    with torch.no_grad():
        flat = network.get_input_embeddings()(torch.tensor([i for ids in rows for i in ids], device=model.device))
    return list(torch.split_with_sizes(flat, [len(ids) for ids in rows]))


def _embed(model: Model, titles: Sequence[str], how: Titles, most: int, dtype: torch.dtype) -> Embedded:
    most = 10**6 if how == "pooled" else most
    parts = [titles[i : i + 4096] for i in range(0, len(titles), 4096)]
    rows: list[Tensor] = []
    for part in parts:
        found = _token_rows(model, part, most)
        rows.extend([row.mean(0, keepdim=True) for row in found] if how == "pooled" else found)
    return Embedded(torch.cat(rows).to(dtype), [len(row) for row in rows])
