"""Write a slim model as one ONNX file a stage, so that a service without torch can stop after any of them.

A stage is the blocks up to a cut, and the exit there. ``exits.json`` says who leaves where; `retouch.router` serves the
folder. One graph that decides inside itself would decide for a whole batch, so there is none.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._exits import Exits, read_exits, stage_name
from ..change import versions
from ..errors import UserError
from ..progress import track
from ..router import open_router
from ..store import check_folder, write_folder
from ._int8 import Quantised, Text, compared, mib, quantised
from ._stages import Stage, graph_of
from .rules import TOLERANCE, due

__all__ = ["Exported", "Quantised", "at_cuts", "default_cuts", "export", "quantise", "recalibrated"]

LEAST_SHARE = 0.05
"""A cut costs a session call, so by default there is one only where at least this share of texts leaves."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Args:
        folder: Where.
        exits: What its ``exits.json`` says.
        n_bytes: Size of the stages in bytes.
        quantised: What int8 did; None for float32.
    """

    folder: Path
    exits: Exits
    n_bytes: int
    quantised: Quantised | None = None

    def __str__(self) -> str:
        n, blocks = len(self.exits.cuts), ", ".join(map(str, self.exits.cuts))
        text = f"{self.folder}: {n} stage{'s' * (n > 1)}, {mib(self.n_bytes)}, exits after blocks {blocks}."
        return text if self.quantised is None else f"{text}\n{self.quantised}"


# ---------------------------------------------------------------- cuts


def default_cuts(exits: Sequence[int], shares: Mapping[int, float], least: float = LEAST_SHARE) -> tuple[int, ...]:
    """Choose the exits worth a stage: where at least `least` of the texts leaves, and the last.

    Args:
        exits: The blocks that have an exit, ascending.
        shares: By block, the share of held-out texts that leave there.
        least: The smallest share that is worth a stage.

    Raises:
        UserError: A share is of a block without an exit.

    Example:
        >>> default_cuts([0, 1, 2, 3], {0: 0.02, 1: 0.5, 3: 0.48})
        (1, 3)
    """
    if odd := sorted(set(shares) - set(exits)):
        raise UserError(f"There is no exit after block {odd[0]}; exits: {', '.join(map(str, exits))}.")
    return tuple(l for l in exits if l == exits[-1] or shares.get(l, 0.0) >= least)


def at_cuts(network: Any, cuts: Sequence[int]) -> Any:
    """Copy a slim network with some of its exits; calibrate the copy before it is exported.

    A threshold that was chosen with more exits says nothing sure about fewer.

    Args:
        network: A slim network; it stays as it is.
        cuts: Blocks whose exits stay; the last is added.

    Raises:
        UserError: A block has no exit, or one that the network's `every` and `min_block` never ask.
    """
    config, exits = copy.deepcopy(network.config), network.widths.exits
    asked = due(exits, config.every, config.min_block)
    kept = sorted({*cuts, exits[-1]})
    if odd := [block for block in kept if block not in asked]:
        raise UserError(f"cuts: no exit is asked after block {odd[0]}; choose from {', '.join(map(str, asked))}.")
    if config.temperatures is not None:
        config.temperatures = [config.temperatures[list(exits).index(block)] for block in kept]
    config.exits = kept
    small = type(network)(config)
    weights = network.state_dict()
    small.load_state_dict({name: weights[name] for name in small.state_dict()})
    return small.to(next(network.parameters()).dtype).train(network.training)


# ---------------------------------------------------------------- export


def export(
    network: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    cuts: Sequence[int] | None = None,
    shares: Mapping[int, float] | None = None,
    max_tokens: int = 128,
    int8: bool = False,
    texts: Sequence[Text] = (),
    replace: bool = True,
    pairs: bool | None = None,
) -> Exported:
    """Write the stages of a slim model, its thresholds and its tokenizer as one folder, whole or not at all.

    Known problems: a threshold that was chosen with more exits than the cuts keep says nothing sure about them; calibrate
        `at_cuts` first. For those of int8 see `quantise`.

    Args:
        network: A slim network, calibrated for the exits that it will have.
        tokenizer: Its fast tokenizer.
        folder: Where the export is to be.
        cuts: Blocks after which a stage ends; the last is added. None: by `shares`, or wherever the network asks.
        shares: By block, the share of held-out texts that leave there; see `default_cuts`.
        max_tokens: Where the router cuts texts, in tokens.
        int8: Quantise the stages, see `quantise`.
        texts: Texts, or pairs of texts, on which int8 is compared with float32.
        replace: Whether an export that is already there gives way.
        pairs: Whether the network was trained on pairs of texts, so that the router refuses the other kind; None: it
            takes both.

    Raises:
        UserError: A cut has no exit, both `cuts` and `shares` are given, int8 has no texts, the tokenizer is not a fast
            one, or onnx, onnxscript or onnxruntime is not installed.
        StoreError: The folder cannot be written.
    """
    _require_packages()
    if int8:
        _require_texts(texts)
    small = at_cuts(network, _cuts(network, cuts, shares)).float().cpu().eval()
    words = _words(tokenizer, max_tokens)
    exits = dataclasses.replace(_exits(small, tokenizer, max_tokens), pairs=pairs)
    stages = [Stage(small, start, stop) for start, stop in zip((-1, *exits.cuts), exits.cuts)]
    files = {stage_name(i): graph_of(s, exits) for i, s in enumerate(track(stages, "export stages"))}
    if not int8:
        return _write(Path(folder), files, exits, words, replace)
    with tempfile.TemporaryDirectory() as place:
        _write(Path(place) / "float32", files, exits, words, True)
        return quantise(Path(place) / "float32", folder, texts, replace=replace)


def _require_packages() -> None:
    from importlib.util import find_spec

    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise UserError(f"Exporting needs {', '.join(missing)}: pip install 'retouch[export]'.")


def _cuts(network: Any, cuts: Sequence[int] | None, shares: Mapping[int, float] | None) -> Sequence[int]:
    if cuts is not None and shares is not None:
        raise UserError("Give cuts, or shares from which cuts are chosen, but not both.")
    if cuts is not None:
        return cuts
    asked = due(network.widths.exits, network.config.every, network.config.min_block)
    return asked if shares is None else default_cuts(asked, shares)


def _words(tokenizer: Any, max_tokens: int) -> str:
    """Return the tokenizer's file, which says at which end long texts are cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("Only a fast tokenizer can be exported, and this model's is none. Convert it first.")
    words = type(backend).from_str(backend.to_str())
    words.enable_truncation(max_tokens, direction=tokenizer.truncation_side)
    return str(words.to_str())


def _exits(network: Any, tokenizer: Any, max_tokens: int) -> Exits:
    config, size, widths = network.config, network.size, network.widths
    padding = getattr(network.body.embeddings, "padding_idx", None)  # where there is one, positions begin after it
    positions = size.positions - (0 if padding is None else padding + 1)
    regression = config.task == "regression"
    tolerance = getattr(config, "tolerance", None)
    return Exits(
        cuts=tuple(widths.exits),
        rule=config.rule,
        threshold=None if config.threshold is None else float(config.threshold),
        temperatures=tuple(config.temperatures or [1.0] * len(widths.exits)),
        blocks=size.blocks,
        classes=config.num_labels,
        task=config.task,
        vocab=size.vocab,
        positions=positions,
        token_types=size.token_types > 1,
        max_tokens=min(max_tokens, positions),
        pad=tokenizer.pad_token_id or 0,
        labels=None if regression else tuple(str(config.id2label[i]) for i in range(config.num_labels)),
        target_mean=config.target_mean if regression else 0.0,
        target_scale=config.target_scale if regression else 1.0,
        tolerance=TOLERANCE if tolerance is None else tolerance,
        widths=widths.to_dict(),
        made_with=versions(),
    )


def _write(folder: Path, stages: Mapping[str, bytes], exits: Exits, words: str, replace: bool) -> Exported:
    about = {"exits.json": _json(exits), "tokenizer.json": words, "README.md": _readme(exits)}
    write_folder(folder, {**stages, **about}, replace=replace)
    return Exported(folder, exits, sum(map(len, stages.values())))


def _json(exits: Exits) -> str:
    return json.dumps(exits.to_dict(), indent=1, allow_nan=False) + "\n"


def _readme(exits: Exits) -> str:
    leaves = "no text leaves early" if exits.threshold is None else f"texts leave below {exits.threshold:g}"
    return f"""# A slim classifier in {len(exits.cuts)} stages ({exits.precision})

Exits after blocks {", ".join(map(str, exits.cuts))} of {exits.blocks}; rule `{exits.rule}`, {leaves}.

    from retouch.router import open_router

    router = open_router("this folder")
    router.predict(["a text", "another text"])

It needs numpy, onnxruntime and tokenizers, and no torch.
"""


# ---------------------------------------------------------------- what was exported, changed


def quantise(source: str | Path, folder: str | Path, texts: Sequence[Text], *, replace: bool = True) -> Exported:
    """Quantise an exported folder to int8, linear maps per channel, and compare the two on texts.

    Known problems: scales of activations span the batch, so that a text's answer depends on its batch mates and padding.
        Temperatures and threshold are still those of float32: read the new folder's exits by `Router.every_exit`, fit
        on that, and call `recalibrated`.

    Args:
        source: What `export` wrote, in float32.
        folder: Where the quantised folder is to be.
        texts: Texts, or pairs of texts, of the kind that will be answered.
        replace: Whether an export that is already there gives way.

    Raises:
        StoreError: `source` is damaged or no export, or `folder` cannot be written.
        UserError: There are no texts, `source` is int8 already, or a package is not installed.
    """
    _require_packages()
    _require_texts(texts)
    place, router = Path(source), open_router(source, threads=1)
    if router.exits.precision != "float32":
        raise UserError(f"{place} is {router.exits.precision} already. Give the float32 export.")
    names = [stage_name(i) for i in range(len(router.exits.cuts))]
    graphs = {name: (place / name).read_bytes() for name in names}
    small = {name: quantised(graph) for name, graph in track(graphs.items(), "quantise stages", len(graphs))}
    exits, words = dataclasses.replace(router.exits, precision="int8"), (place / "tokenizer.json").read_text("utf-8")
    with tempfile.TemporaryDirectory() as trial:
        _write(Path(trial) / "int8", small, exits, words, True)
        sizes = [sum(map(len, files.values())) for files in (graphs, small)]
        found = compared(router, open_router(Path(trial) / "int8", threads=1), texts, sizes)
    return dataclasses.replace(_write(Path(folder), small, exits, words, replace), quantised=found)


def _require_texts(texts: Sequence[Text]) -> None:
    if isinstance(texts, str) or not len(texts):
        raise UserError("int8 is compared with float32 before it is trusted: give a list of texts.")


def recalibrated(
    folder: str | Path,
    *,
    threshold: float | None,
    temperatures: Sequence[float] | None = None,
    rule: str | None = None,
) -> Exits:
    """Give an exported folder another threshold; its stages stay as they are.

    An int8 export needs its own: read what its exits say by `Router.every_exit`, fit on that, and write it here.

    Args:
        folder: What `export` wrote.
        threshold: The new one; None: nobody leaves early.
        temperatures: One a cut; None: as they are.
        rule: None: as it is.

    Raises:
        StoreError: The folder is damaged or no export.
        UserError: A value does not fit the exits.
    """
    place = Path(folder)
    names = [name for name in check_folder(place)["files"] if name not in ("exits.json", "README.md")]
    old = read_exits(place / "exits.json")
    heat = old.temperatures if temperatures is None else tuple(float(t) for t in temperatures)
    new = dataclasses.replace(old, threshold=threshold, temperatures=heat, rule=rule or old.rule)
    files: dict[str, bytes | str | Callable[[Path], None]] = {name: (place / name).read_bytes() for name in names}
    write_folder(place, {**files, "exits.json": _json(new), "README.md": _readme(new)})
    return new
