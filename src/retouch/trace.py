"""Read and replace activations inside a ``with``, and run only the part of a pass that an edit can change.

`Trace` hooks into a full pass. `Suffix` is the fast path of every search for a value: what lies below the edited
block, and what stands before the edited position, is computed once and never again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch

from . import tokens
from .errors import ModelError
from .lanes import Factors, Lanes
from .model import Model

if TYPE_CHECKING:
    from torch import Tensor

    from ._packing import Layout

__all__ = ["Suffix", "Trace", "first_tensor"]

Side = Literal["input", "output"]


class _Stop(Exception):
    """Ends a pass early; never leaves this module."""


def first_tensor(output: Any) -> Tensor:
    """Return the state of a layer's output: some families return it alone, some first in a tuple."""
    tensor: Tensor = output[0] if isinstance(output, tuple | list) else output
    return tensor


def _like(output: Any, tensor: Tensor) -> Any:
    return (tensor, *output[1:]) if isinstance(output, tuple | list) else tensor


class Trace:
    """Hook into a model's passes; every hook is gone after the ``with``.

    Shapes:
        Activations are (rows, columns, width), as the network computes them.

    Example:
        >>> with Trace(model) as trace:                            # doctest: +SKIP
        ...     trace.read("blocks.6.mlp.down", "input")
        ...     trace.run(batch, stop_after="blocks.6")
        >>> keys = trace["blocks.6.mlp.down", "input"]             # doctest: +SKIP
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._handles: list[Any] = []
        self._seen: dict[tuple[str, Side], Tensor] = {}
        self._rows: int | None = None

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getitem__(self, site: tuple[str, Side]) -> Tensor:
        return self._seen[site]

    def read(self, name: str, side: Side = "output") -> None:
        """Keep what flows into or out of a part in every pass that follows."""

        def keep(tensor: Tensor) -> None:
            self._seen[name, side] = tensor

        self.watch(name, keep, side)

    def watch(self, name: str, see: Callable[[Tensor], None], side: Side = "output") -> None:
        """Call `see` with what flows into or out of a part, without changing it."""

        def shaped(tensor: Tensor) -> Tensor:  # OPT flattens rows and columns before its MLP
            return tensor.view(self._rows, -1, tensor.shape[-1]) if tensor.dim() == 2 and self._rows else tensor

        module = self.model.module(name)
        if side == "input":
            self._handles.append(module.register_forward_pre_hook(lambda _, args: see(shaped(args[0]))))
        else:
            self._handles.append(module.register_forward_hook(lambda _, args, out: see(shaped(first_tensor(out)))))

    def edit(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what flows out of a part by ``change(it)``."""

        def hook(_: Any, args: Any, out: Any) -> Any:
            return _like(out, change(first_tensor(out)))

        self._handles.append(self.model.module(name).register_forward_hook(hook))

    def branch(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right`` to a weight as a side branch: its output gains ``left (right x)``.

        Shapes:
            left: (outputs, rank); right: (rank, inputs).
        """
        left, right = (t.to(self.model.device, torch.float32) for t in (left, right))

        def hook(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out + (args[0] @ right.mT) @ left.mT

        self._handles.append(self.model.module(name).register_forward_hook(hook))

    def branches(self, name: str, parts: Mapping[int, Factors], lanes: Lanes) -> None:
        """Add a side branch for each lane: every row's output gains what the change that it carries adds.

        Shapes:
            A lane's part is left (outputs, rank) and right (rank, inputs), or the whole difference (outputs, inputs)
            and None. A lane without a part gains nothing.
        """
        gain = lanes.gain(parts)

        def hook(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            # OPT flattens rows and columns before its MLP
            return out + gain(args[0].reshape(lanes.n_rows, -1, args[0].shape[-1])).reshape(out.shape)

        self._handles.append(self.model.module(name).register_forward_hook(hook))

    def run(self, batch: tokens.Batch, stop_after: str | None = None) -> Tensor | None:
        """Run a pass; return the logits, or None when it was to stop early.

        Args:
            batch: The rows.
            stop_after: The part after whose output nothing is computed any more.
        """

        def stop(*_: Any) -> None:
            raise _Stop

        self._rows = batch.shape[0]
        handle = self.model.module(stop_after).register_forward_hook(stop) if stop_after else None
        try:
            output = self.model.network(**self.model.inputs(batch), **self._cache_flag())
        except _Stop:
            return None
        finally:
            if handle is not None:
                handle.remove()
        return first_tensor(output.to_tuple())

    def _cache_flag(self) -> dict[str, bool]:
        return {"use_cache": False} if self.model.anatomy.kind == "decoder" else {}

    def states(self, batch: tokens.Batch) -> Tensor:
        """Run the blocks and return the states after the last one, without the final norm and the head."""
        last = f"blocks.{self.model.anatomy.n_blocks - 1}"
        self.read(last)
        self.run(batch, stop_after=last)
        return self[last, "output"]


class _Prefix:
    """The keys and values of the columns before the edited one; `update` joins them and keeps nothing."""

    def __init__(self, pairs: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs
        self.is_updated: dict[int, bool] = {}
        self.is_compileable = False

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        before_keys, before_values = self.pairs[layer_idx]
        return torch.cat([before_keys, keys], dim=-2), torch.cat([before_values, values], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return next(iter(self.pairs.values()))[0].shape[-2]

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True, eq=False)
class _Call:
    """How the network called one block: every argument but the state, cut to the columns that remain."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Suffix:
    """What remains of a pass above block `first` and from one column on; the rest is constant.

    With an activation added at block l and token t, everything below l is constant, and so is every position before t
    in every block, because attention looks back only. Rows are aligned so that their edited tokens share a column, one
    full pass keeps each block's arguments and the earlier columns' attention keys and values, and `run` computes only
    what is left. For d columns of t and b blocks of L that is b/L * d/t of a full pass.

    Attributes:
        model: The model.
        first: The first block that runs.
        state: Its input, (rows, columns, d_model); column 0 is the edited token.
        offset: (rows,), the index of each row's token that stands in column 0.
    """

    model: Model
    first: int
    state: Tensor
    offset: Tensor
    _calls: tuple[_Call, ...]
    _pairs: dict[int, tuple[Tensor, Tensor]]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, rows: Sequence[tuple[int, ...]], anchors: Sequence[int], first: int) -> Suffix:
        """Run the rows once and keep what a later change at `anchors` in block `first` cannot reach.

        Args:
            model: A decoder.
            rows: Token ids.
            anchors: Each row's edited token.
            first: The block whose input is constant.

        Raises:
            ModelError: The model is no decoder, or its blocks take an argument that cannot be cut.
        """
        if model.anatomy.kind != "decoder":
            raise ModelError(f"{model.source} is an encoder: every position sees every other, so nothing is constant.")
        from transformers import DynamicCache

        # one spare column in front: padding makes every family build its mask instead of leaving it to the kernel
        batch = model.batch(list(rows), anchors=anchors, spare=1)
        start = max(anchors) + 1
        cache = DynamicCache()
        calls: list[_Call] = []
        state: list[Tensor] = []
        blocks = [model.module(f"blocks.{i}") for i in range(first, model.anatomy.n_blocks)]
        cut = _Cutter(start, batch.shape[1])

        def keep(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not state:
                state.append(args[0][:, start:].clone() if args else kwargs["hidden_states"][:, start:].clone())
            calls.append(_Call(tuple(cut(None, a) for a in args[1:]), {k: cut(k, v) for k, v in kwargs.items()}))

        handles = [b.register_forward_pre_hook(keep, with_kwargs=True) for b in blocks]
        handles.append(blocks[-1].register_forward_hook(_raise_stop))
        try:
            model.network(**model.inputs(batch), past_key_values=cache, use_cache=True)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        pairs = {i: _columns(cache, i, start) for i in range(first, model.anatomy.n_blocks)}
        return cls(model, first, state[0], batch.first.new_tensor(list(anchors)), tuple(calls), pairs)

    def above(self) -> Suffix:
        """Run block `first` once and return the suffix that starts after it: for a change of that block's output."""
        state = self.run(upto=self.first).detach()
        return replace(self, first=self.first + 1, state=state, _calls=self._calls[1:])

    def select(self, rows: Tensor) -> Suffix:
        """Keep only some rows."""
        n = self.state.shape[0]
        memo: dict[int, Tensor] = {}

        def pick(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == n and n > 1:
                if id(value) not in memo:
                    memo[id(value)] = value[rows]
                return memo[id(value)]
            return tuple(map(pick, value)) if isinstance(value, tuple) else value

        calls = tuple(_Call(tuple(map(pick, c.args)), {k: pick(v) for k, v in c.kwargs.items()}) for c in self._calls)
        pairs = {i: (k[rows], v[rows]) for i, (k, v) in self._pairs.items()}
        return replace(self, state=self.state[rows], offset=self.offset[rows], _calls=calls, _pairs=pairs)

    def pack(self, layout: Layout) -> Suffix:
        """Lay tokens of several rows side by side: a suffix whose rows and columns are the layout's places.

        Raises:
            ModelError: The family's blocks take an argument that belongs to no token.
        """
        device = self.state.device
        row, column, before_row, before_column = (
            t.to(device) for t in (layout.row, layout.column, layout.before_row, layout.before_column)
        )
        start = next(iter(self._pairs.values()))[0].shape[-2]
        move = _Mover(self.state.shape[1], row, column, torch.cat([before_column, column], 1) + start, layout.sees)
        calls = tuple(_Call(tuple(map(move, c.args)), {k: move(v) for k, v in c.kwargs.items()}) for c in self._calls)

        def take(pair: Tensor) -> Tensor:  # (rows, heads, columns, width)
            return pair[before_row, :, before_column + start].transpose(1, 2)

        pairs = {i: (take(keys), take(values)) for i, (keys, values) in self._pairs.items() if i >= self.first}
        offset = self.offset[row[:, 0]] + column[:, 0]
        return replace(self, state=self.state[row, column], offset=offset, _calls=calls, _pairs=pairs)

    def run(self, state: Tensor | None = None, upto: int | None = None) -> Tensor:
        """Run the blocks that remain.

        Args:
            state: The input of block `first`; by default the one that was kept.
            upto: The last block to run; by default the model's last.

        Returns:
            The state after it, (rows, columns, d_model).
        """
        prefix = _Prefix(self._pairs)
        state = self.state if state is None else state
        last = self.model.anatomy.n_blocks - 1 if upto is None else upto
        for block, call in zip(range(self.first, last + 1), self._calls):
            args = [prefix if a is _CACHE else a for a in call.args]
            kwargs = {k: prefix if v is _CACHE else v for k, v in call.kwargs.items()}
            kwargs.pop("hidden_states", None)
            state = first_tensor(self.model.module(f"blocks.{block}")(state, *args, **kwargs))
        return state


_CACHE = object()
"""Stands for the cache in a kept call."""


def _raise_stop(*_: Any) -> None:
    raise _Stop


def _columns(cache: Any, block: int, start: int) -> tuple[Tensor, Tensor]:
    layer = cache.layers[block]
    return layer.keys[..., :start, :].clone(), layer.values[..., :start, :].clone()


class _Cutter:
    """Cut the arguments of a block to the columns from `start` on; shared tensors are cut once."""

    def __init__(self, start: int, columns: int) -> None:
        self.start, self.columns = start, columns
        self.memo: dict[int, tuple[Any, Any]] = {}

    def __call__(self, name: str | None, value: Any) -> Any:
        if id(value) not in self.memo:
            self.memo[id(value)] = (value, self._cut(name, value))  # keep `value`, or its id could be used again
        return self.memo[id(value)][1]

    def _cut(self, name: str | None, value: Any) -> Any:
        from transformers import Cache

        if isinstance(value, Cache):
            return _CACHE
        if isinstance(value, tuple):
            return tuple(self._cut(name, v) for v in value)
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        if value.dim() == 4 and value.shape[-2] == self.columns:  # mask: (rows or 1, 1, queries, keys)
            return value[:, :, self.start :, :]
        if value.dim() >= 2 and value.shape[1] == self.columns:  # position ids, rotary tables, states
            return value[:, self.start :]
        if value.dim() == 1 and value.shape[0] == self.columns:
            return value[self.start :]
        raise ModelError(f"A block takes {name or 'an argument'} of shape {tuple(value.shape)}, which cannot be cut.")


class _Mover:
    """Take the arguments of a block from rows and columns to places; shared tensors are moved once."""

    def __init__(self, columns: int, row: Tensor, column: Tensor, key: Tensor, sees: Tensor) -> None:
        self.columns, self.row, self.column, self.key, self.sees = columns, row, column, key, sees.to(row.device)
        self.memo: dict[int, tuple[Any, Any]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self, value))
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        if id(value) not in self.memo:
            self.memo[id(value)] = (value, self._moved(value))
        return self.memo[id(value)][1]

    def _moved(self, value: Tensor) -> Tensor:
        row = self.row if value.shape[0] > 1 else torch.zeros_like(self.row)
        if value.dim() == 4 and value.shape[1:3] == (1, self.columns):  # mask: (rows or 1, 1, queries, keys)
            mask = value[row[:, :, None], 0, self.column[:, :, None], self.key[:, None]]
            blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            return mask.masked_fill(~self.sees, blocked)[:, None]
        if value.dim() >= 2 and value.shape[1] == self.columns:
            return value[row, self.column]
        raise ModelError(f"A block takes an argument of shape {tuple(value.shape)}, which belongs to no token.")
