"""Which weight is which in a family of models: our name, its path, its axes, its ties.

Each family is a table beside this file (``llama.yaml``), data and not code, chosen by ``config.model_type``. Own tables
go into the folder named by ``RETOUCH_ANATOMY``. An `Anatomy` is a table filled in with one configuration's sizes.

Our names: ``embed``, ``final_norm``, ``head``, ``blocks.5``, and inside a block ``attention``, ``attention.out``,
``mlp``, ``mlp.up``, ``mlp.gate`` (or ``mlp.gate_up`` where the two are fused), ``mlp.down``; encoders also name
``attention.query``, ``attention.key`` and ``attention.value``. The output of ``attention`` and ``mlp`` is what they add
to the residual stream, before any norm that a family puts behind them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ModelError, UnknownName, unknown
from ._proof import prove
from ._tables import axes_of, table_of, tables

if TYPE_CHECKING:
    import torch

__all__ = ["Anatomy", "describe", "families", "prove"]

_BLOCK = re.compile(r"blocks\.(0|[1-9]\d*)(?:\.(.+))?")


@dataclass(frozen=True)
class Anatomy:
    """Say where everything is in one model, without a look at its weights.

    Shapes: ``shape(name)`` is always (out, in), whatever the storage; ``transposed(name)`` tells whether the parameter
    is stored as (in, out), as GPT-2's are.

    Attributes:
        family: ``config.model_type``.
        kind: ``"decoder"`` or ``"encoder"``.
        n_blocks: Blocks, counted from 0.
        d_model: Width of the residual stream.
        d_ff: Width of what flows into ``mlp.down``.
        heads: Attention heads.
        head_dim: Width of one head; heads x head_dim flow into ``attention.out``.
        kv_heads: Heads that have keys and values of their own; groups of the others share them.
        d_embed: Width of one row of the embedding (OPT may project it to d_model).
        vocab_size: Rows of the embedding.
        parallel: Whether attention and MLP read the same input.
        flat_mlp: Whether ``mlp.up`` and ``mlp.down`` see (batch x tokens, width) instead of (batch, tokens, width).
        softcap: The bound c of logits squashed as c tanh(logits / c), or None.
        mlp_norm: Path inside a block of the norm that what ``mlp.down`` gives passes before it is added, or None.
        tied: Whether head and embedding are one parameter.
        groups: The families whose rules for choosing a block hold here; always holds the family itself.
        table: The file of the table.
        places: Paths of ``blocks``, ``embed`` and, where they exist, ``final_norm`` and ``head``.
        parts: Our names inside a block and their paths inside a block.
        inverted: The parts whose weight is stored (in, out).
        steps: The modules from the last block's output to the network's output; a trailing ``?`` marks one that some
            sizes lack, as long as `describe` was given no network to look at.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(model_type="gpt2", n_layer=2, n_embd=8, n_inner=None, n_head=2, vocab_size=50,
        ...                          tie_word_embeddings=True)
        >>> anatomy = describe(config)
        >>> anatomy.weight("blocks.1.mlp.down"), anatomy.shape("blocks.1.mlp.down")
        ('transformer.h.1.mlp.c_proj.weight', (8, 32))
        >>> anatomy.transposed("blocks.1.mlp.down")
        True
    """

    family: str
    kind: Literal["decoder", "encoder"]
    n_blocks: int
    d_model: int
    d_ff: int
    heads: int
    head_dim: int
    kv_heads: int
    d_embed: int
    vocab_size: int
    parallel: bool
    flat_mlp: bool
    softcap: float | None
    mlp_norm: str | None
    tied: bool
    groups: frozenset[str]
    table: str
    places: Mapping[str, str] = field(hash=False, repr=False)
    parts: Mapping[str, str] = field(hash=False, repr=False)
    inverted: frozenset[str] = field(repr=False)
    steps: tuple[str, ...] = field(repr=False)

    @property
    def has_head(self) -> bool:
        """Whether the model ends in logits over its vocabulary."""
        return "head" in self.places

    def path(self, name: str) -> str:
        """Return the path of the module that we call `name`.

        Raises:
            UnknownName: There is no such place, or no such block.
        """
        if _BLOCK.fullmatch(name):
            index, part = self._split(name)
            inside = f".{self.parts[part]}" if part else ""
            return f"{self.places['blocks']}.{index}{inside}"
        if name == "blocks" or name not in self.places:
            places = [p for p in self.places if p != "blocks"]
            raise unknown(
                f"place in a {self.family} model", name, [*places, "blocks.N", *(f"blocks.N.{p}" for p in self.parts)]
            )
        return self.places[name]

    def weight(self, name: str) -> str:
        """Return the path of the parameter that holds the matrix `name`.

        Raises:
            UnknownName: There is no such matrix.
        """
        self.shape(name)
        return f"{self.path(name)}.weight"

    def shape(self, name: str) -> tuple[int, int]:
        """Return the size of the matrix `name` as (out, in), however it is stored.

        Raises:
            UnknownName: There is no such matrix.
        """
        self.path(name)
        match = _BLOCK.fullmatch(name)
        part = match[2] if match else name
        shapes = self._shapes()
        if part not in shapes:
            known = [p if p in self.places else f"blocks.N.{p}" for p in shapes if p in self.places or p in self.parts]
            raise unknown(f"weight of a {self.family} model", name, known)
        return shapes[part]

    def transposed(self, name: str) -> bool:
        """Tell whether the matrix `name` is stored as (in, out).

        An embedding maps a word, its row, to a vector: it is stored (in, out), and the head tied to it (out, in).

        Raises:
            UnknownName: There is no such matrix.
        """
        self.shape(name)
        match = _BLOCK.fullmatch(name)
        return match[2] in self.inverted if match else name == "embed"

    def names(self) -> list[str]:
        """List our names of all matrices: embedding, every block's from first to last, head."""
        parts = [p for p in self.parts if p in self._shapes()]
        inner = [f"blocks.{i}.{part}" for i in range(self.n_blocks) for part in parts]
        return ["embed", *inner, *(["head"] if self.has_head else [])]

    def name(self, path: str) -> str:
        """Return our name of the module or parameter at `path`.

        Where two names share a module (BERT's ``mlp`` is its ``mlp.down``) the longer one is returned.

        Raises:
            UnknownName: Nothing that we name lies at `path`.
        """
        bare = path.removesuffix(".weight")
        for place in ("embed", "final_norm", "head"):
            if self.places.get(place) == bare:
                return place
        index, _, inside = bare.removeprefix(f"{self.places['blocks']}.").partition(".")
        if bare.startswith(f"{self.places['blocks']}.") and index.isdecimal() and int(index) < self.n_blocks:
            names = [part for part, where in self.parts.items() if where == inside]
            if names or not inside:
                return ".".join(["blocks", index, *sorted(names, key=len)[-1:]])
        raise unknown(f"module named by {self.table}", path, [self.path(n) for n in ("embed", "blocks.0")])

    def block_of(self, name: str) -> int:
        """Return the number of the block that `name` lies in.

        Raises:
            UnknownName: `name` lies in no block, or in one that does not exist.
        """
        if not _BLOCK.fullmatch(name):
            raise UnknownName(
                f"{name!r} lies in no block. Allowed: blocks.0 ... blocks.{self.n_blocks - 1}, and inside."
            )
        return self._split(name)[0]

    def read_out(self, network: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Turn the last block's output into the network's own output: logits, or without a head its last state.

        Given an earlier block's output, this is the logit lens.

        Shapes: `hidden` (..., d_model); returns (..., vocab_size), or (..., d_model) without a head.
        """
        for step in self.steps:
            if not step.endswith("?") or _has(network, step[:-1]):
                hidden = network.get_submodule(step.removesuffix("?"))(hidden)
        if self.softcap is None or not self.has_head:
            return hidden
        return self.softcap * (hidden / self.softcap).tanh()

    def _split(self, name: str) -> tuple[int, str]:
        match = _BLOCK.fullmatch(name)
        assert match is not None  # the callers have looked
        index, part = int(match[1]), match[2] or ""
        if index >= self.n_blocks:
            raise UnknownName(
                f"{name!r}: this {self.family} model has no block {index}. "
                f"Allowed: blocks.0 ... blocks.{self.n_blocks - 1} (blocks count from 0)."
            )
        if part and part not in self.parts:
            raise unknown(f"part of a {self.family} block", part, self.parts)
        return index, part

    def _shapes(self) -> dict[str, tuple[int, int]]:
        up, inner = (self.d_ff, self.d_model), self.heads * self.head_dim
        grouped = self.kv_heads * self.head_dim
        return {
            "embed": (self.d_embed, self.vocab_size),
            "attention.query": (inner, self.d_model),
            "attention.key": (grouped, self.d_model),
            "attention.value": (grouped, self.d_model),
            "attention.qkv": (inner + 2 * grouped, self.d_model),
            "attention.out": (self.d_model, inner),
            "mlp.gate": up,
            "mlp.up": up,
            "mlp.gate_up": (2 * self.d_ff, self.d_model),
            "mlp.down": (self.d_model, self.d_ff),
            "head": (self.vocab_size, self.d_embed),
        }


def families() -> list[str]:
    """List the values of ``config.model_type`` that have a table.

    Example:
        >>> "llama" in families()
        True
    """
    return sorted(tables())


def describe(config: Any, network: torch.nn.Module | None = None) -> Anatomy:
    """Fill the table of a configuration's family in with its sizes.

    Args:
        config: A configuration of transformers.
        network: The network itself. With it, paths are those of its class: a `BertModel` keeps its blocks elsewhere
            than a `BertForMaskedLM`, and has no head. Without it, the class with a language-model head is meant.

    Raises:
        ModelError: The family has no table, the configuration lacks a field, or the blocks are not in `network`.
    """
    table = table_of(config)
    sizes = _sizes(config, table)
    cut, has_head = _rooted(table, network)
    steps = tuple(s for s in table["steps"] if has_head or s.startswith(f"{table['body']}."))
    places = {key: table[key] for key in ("blocks", "embed", "final_norm", "head") if table[key]}
    if not has_head:
        del places["head"]
    places = {key: path.removeprefix(cut) for key, path in places.items()}
    steps = tuple(step.removeprefix(cut) for step in steps)
    if network is not None:
        absent = {step[:-1] for step in steps if step.endswith("?") and not _has(network, step[:-1])}
        places = {key: path for key, path in places.items() if path not in absent}
        steps = tuple(step.removesuffix("?") for step in steps if step.removesuffix("?") not in absent)
    return Anatomy(
        family=config.model_type,
        kind=table["kind"],
        parallel=_value(config, table, "parallel") is True,
        flat_mlp=table["flat_mlp"],
        softcap=_value(config, table, "softcap"),
        mlp_norm=table["mlp_norm"],
        tied=has_head and _is_tied(config, table, network),
        groups=frozenset([config.model_type, *table["groups"]]),
        table=table["file"],
        places=places,
        parts=dict(table["block"]),
        inverted=frozenset(part for part, axes in axes_of(table).items() if axes == "in_out"),
        steps=steps,
        **sizes,
    )


def _has(network: torch.nn.Module, path: str) -> bool:
    try:
        network.get_submodule(path)
    except AttributeError:
        return False
    return True


def _rooted(table: Mapping[str, Any], network: torch.nn.Module | None) -> tuple[str, bool]:
    """Return the prefix that all paths lose in this network's class, and whether it has a head."""
    if network is None:
        return "", True
    prefix = f"{table['body']}."
    if _has(network, table["blocks"]):
        return "", _has(network, table["head"])
    bare = table["blocks"].removeprefix(prefix)
    if _has(network, bare):
        return prefix, False
    children = ", ".join(name for name, _ in network.named_children())
    raise ModelError(
        f"{table['file']}: the blocks are expected at {table['blocks']!r} or {bare!r}; "
        f"{type(network).__name__} has {children or 'no modules'}. Correct the table or open another class."
    )


def _sizes(config: Any, table: Mapping[str, Any]) -> dict[str, int]:
    fields = table["sizes"]
    sizes = {key: _field(config, table, fields[key]) for key in ("n_blocks", "d_model", "heads")}
    d_ff = _field(config, table, fields["d_ff"])
    if d_ff is None and table["d_ff_multiple"]:
        d_ff = table["d_ff_multiple"] * sizes["d_model"]
    sizes |= {"d_ff": d_ff, "vocab_size": _field(config, table, "vocab_size")}
    for key, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{table['file']}: {key} must be a count of at least 1; the configuration has {value!r}.")
    sizes["head_dim"] = getattr(config, "head_dim", None) or sizes["d_model"] // sizes["heads"]
    sizes["kv_heads"] = getattr(config, fields.get("kv_heads", ""), None) or sizes["heads"]
    sizes["d_embed"] = getattr(config, fields.get("d_embed", ""), None) or sizes["d_model"]
    return sizes


def _field(config: Any, table: Mapping[str, Any], name: str) -> Any:
    if not hasattr(config, name):
        raise ModelError(
            f"{table['file']} reads the field {name!r}, which this {config.model_type} configuration "
            "does not have. Correct the table or the configuration."
        )
    return getattr(config, name)


def _value(config: Any, table: Mapping[str, Any], key: str) -> Any:
    """A table's entry is a value, or the name of the configuration's field that holds it."""
    entry = table[key]
    return _field(config, table, entry) if isinstance(entry, str) else entry


def _is_tied(config: Any, table: Mapping[str, Any], network: torch.nn.Module | None) -> bool:
    if network is None or not _has(network, table["embed"]):
        return bool(_value(config, table, "tied"))
    # A checkpoint may hold two matrices although its configuration says one: the network is right.
    return network.get_submodule(table["embed"]).weight is network.get_submodule(table["head"]).weight
