"""Options that several commands share, so that each reads alike and is described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["one_of"]

# ---------------------------------------------------------------- every verb

ModelArgument = Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or smollm2.")]
Json = Annotated[bool, typer.Option("--json", help="Results for programs.")]
Html = Annotated[Path | None, typer.Option(help="A report with pictures.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Result = Annotated[Path, typer.Option("--json", help="The result.")]
Work = Annotated[Path | None, typer.Option(help="Folder of what is finished; default: in the cache.")]
Stages = Annotated[Path | None, typer.Option(help="Folder of the stages, for going on; default: in the cache.")]

# ---------------------------------------------------------------- edit

Subject = Annotated[str, typer.Option(help="What the fact is about.")]
Target = Annotated[str | None, typer.Option(help="The new answer.")]
Facts = Annotated[Path | None, typer.Option(help="A file of facts instead, JSON or JSON Lines.")]
Page = Annotated[Path | None, typer.Option(help="Write a page with pictures here, e.g. page.html.")]
SomeFacts = Annotated[int | None, typer.Option(help="How many facts of the file.")]

# ---------------------------------------------------------------- slim

MaxTrain = Annotated[int | None, typer.Option(help="Training rows to keep at most.")]

# ---------------------------------------------------------------- fuse

WholeModel = Annotated[str, typer.Argument(help="The whole model: a folder, a hub id, a .gguf file, or smollm2.")]
Score = Annotated[str, typer.Option(help="random, magnitude, wanda, taylor or flap.")]
Align = Annotated[str, typer.Option(help="none, bias, lstsq or distil: how the pruned weights make up for it.")]
Chat = Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")]
Keys = Annotated[Path | None, typer.Option("--keys", help="Folder cloud that `fuse keys` made.")]

# ---------------------------------------------------------------- recommend

Bundle = Annotated[Path, typer.Argument(help="What `recommend fit` wrote.")]
Store = Annotated[str, typer.Option(help="sqlite:PATH or redis://HOST:PORT/NUMBER.")]
FittedWith = Annotated[str, typer.Option(help="The language model; default: the one it was fitted with.")]
LanguageModel = Annotated[str, typer.Option(help="The language model: a folder, a hub id, a .gguf file, or smollm2.")]
Format = Annotated[str, typer.Option(help="atomic, sequence, csv, parquet or movielens; default: by the file.")]
UserColumn = Annotated[str, typer.Option(help="Column of users.")]
ItemColumn = Annotated[str, typer.Option(help="Column of items.")]
TimeColumn = Annotated[str, typer.Option(help="Column of times.")]
TextColumns = Annotated[str, typer.Option(help="Columns of an item's text: title,brand.")]
TitleMap = Annotated[Path | None, typer.Option(help="A map of titles beside a sequence file.")]
MinRating = Annotated[float | None, typer.Option(help="Ratings below it are no interactions.")]
MinCount = Annotated[int, typer.Option(help="Users and items with fewer interactions are left out; 0: none.")]
AllowMissingText = Annotated[bool, typer.Option("--allow-missing-text", help="Go on with many items without text.")]
Split = Annotated[str, typer.Option(help="leave-one-out or time.")]
Holdout = Annotated[str, typer.Option(help="What is kept for the certificate: users or targets.")]
Tokeniser = Annotated[str, typer.Option(help="rq_kmeans, rq_vae or opq.")]
Codes = Annotated[int | None, typer.Option(help="Codes of a level; default: by the number of items.")]
Encoder = Annotated[str, typer.Option(help="Turns texts into vectors: minilm, a folder, or a .npy file.")]
Force = Annotated[bool, typer.Option("--force", help="Go on with codes that collapsed.")]
Size = Annotated[str, typer.Option(help="Of the reference: tiny, small, base or tiger.")]
ReferenceEpochs = Annotated[int, typer.Option(help="Most epochs of the reference.")]
SamplesPerEpoch = Annotated[int | None, typer.Option(help="Samples of an epoch of the reference.")]
Dropout = Annotated[float, typer.Option(help="Of the reference; 0.2 for sparse data.")]


def one_of(flag: str, value: str, allowed: tuple[str, ...]) -> Any:
    """Refuse a value that is not among a few."""
    from ..errors import unknown

    if value not in allowed:
        raise unknown(f"value of --{flag}", value, allowed)
    return value
