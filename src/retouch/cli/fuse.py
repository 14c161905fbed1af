"""``retouch fuse``: prune for the edges, train there, recover, fuse, ask composed questions."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _edges, _fuse_merge, _options, _show
from ._fuse_flags import open_any, open_base, share_of, whole_mib
from ._settings import EXTRA, method_of

if TYPE_CHECKING:
    from ..fuse.base import Adapter

__all__ = ["app"]

app = typer.Typer(
    help="Fuse adapters that private sites have trained, and prove what the result can do.", no_args_is_help=True
)


@app.callback()
def _() -> None:
    """Fuse adapters that private sites have trained, and prove what the result can do."""


_TOLD = ("settings", "n_steps", "partial")
"""What an adapter's folder, which leaves the edge, says of its training: no losses, and nothing that counts the texts."""


# ---------------------------------------------------------------- the way of one adapter


@app.command(context_settings=EXTRA)
def prune(
    context: typer.Context,
    base: _options.WholeModel,
    budget: Annotated[
        str | None, typer.Option(help="Share of the model's memory in training that an edge has: 70%.")
    ] = None,
    budget_mib: Annotated[float | None, typer.Option(help="Or what it has, in MiB, at the peak of training.")] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Or the share of what can be pruned that goes, up to 0.85.")
    ] = None,
    score: _options.Score = "wanda",
    align: _options.Align = "bias",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of the file.")] = "float32",
    seed: _options.Seed = 0,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder that the edge gets.")] = Path("pruned"),
    plan: Annotated[
        Path | None, typer.Option(help="File of the plan, which stays here; default OUT.plan.json.")
    ] = None,
    json_: _options.Json = False,
) -> None:
    """Prune a model for a class of edge; the plan stays here, the edge gets weights and the plan's hash.

    How the edge will train decides its memory and is given in flags: --batch 4 --n-tokens 128 --checkpointing true …

    Example: retouch fuse prune smollm2 --budget 70% -o small
    """
    from typing import get_args

    from ..errors import UserError
    from ..fuse._scores import Score
    from ..fuse.memory import Load
    from ..fuse.prune import Align, plan_prune, save_plan
    from ..fuse.pruned import save_pruned
    from ..store import refuse_place

    given = [x for x in (budget, budget_mib, ratio) if x is not None]
    if len(given) != 1:
        raise UserError("Give one of --budget, --budget-mib and --ratio.")
    place = plan or out.with_name(f"{out.name}.plan.json")
    _options.one_of("dtype", dtype, ("float32", "bfloat16"))
    refuse_place(out)
    refuse_place(place)
    if place.is_dir():
        raise UserError(f"--plan {place} is a folder, and the plan is a file. Choose another name.")
    load = method_of(context, Load)
    if budget_mib is not None and not 0 < budget_mib < math.inf:
        raise UserError(f"--budget-mib must be a finite number above 0; got {budget_mib:g}.")
    with _show.progress():
        model = open_base(base)
        mib = budget_mib if budget is None else share_of(budget) * whole_mib(model, load)
        made = plan_prune(
            model, budget_mib=mib, ratio=ratio, score=_options.one_of("score", score, get_args(Score)),
            align=_options.one_of("align", align, get_args(Align)), load=load, seed=seed,
        )  # fmt: skip
        save_pruned(model, made, out, dtype=dtype)
        save_plan(made, place)
    whole = whole_mib(model, load)
    peak = sum(made.peak.values()) if "total" not in made.peak else made.peak["total"]
    if json_:
        _show.emit(
            {
                "pruned": str(out),
                "plan": str(place),
                "hash": made.hash,
                "ratio": made.ratio,
                "peak_mib": dict(made.peak),
                "whole_mib": whole,
            }
        )
        return
    _show.say(
        f"{made.ratio:.0%} of what can be pruned is gone; training needs about {peak:,.0f} MiB instead of {whole:,.0f} MiB."
    )
    for note in made.notes:
        _show.say(note)
    _show.say(f"Saved as {out} (for the edge) and {place} (keep it: recovering needs it).")
    _show.say(f"Next, at the edge: {_show.command('fuse', 'train', out, '--data', 'examples.jsonl', '-o', 'adapter')}")


@app.command(context_settings=EXTRA)
def train(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="What `fuse prune` wrote, or a whole model.")],
    data: Annotated[Path, typer.Option(help="Private examples: JSON Lines or TSV with prompt and target.")],
    replay: Annotated[Path | None, typer.Option(help="Public examples that are mixed in.")] = None,
    name: Annotated[str, typer.Option(help="What reports call the adapter.")] = "",
    deadline: Annotated[
        float | None,
        typer.Option(help="Seconds after which it stops with what is there; the same command goes on from there."),
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of the state, for going on; default OUT.work.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the adapter.")] = Path("adapter"),
    json_: _options.Json = False,
) -> None:
    """Train an adapter on private examples; killed, it goes on. Settings are flags: --rank 8 --epochs 3 …

    Example: retouch fuse train small --data examples.jsonl --rank 8 -o adapter
    """
    import dataclasses
    import shutil

    from ..errors import UserError
    from ..fuse.adapter_file import ranks_of, write_adapter
    from ..fuse.train import LoraSettings, read_examples
    from ..fuse.train import train as fit
    from ..store import refuse_place

    settings = method_of(context, LoraSettings)
    if deadline is not None and not deadline > 0:
        raise UserError(f"--deadline is in seconds, above 0; got {deadline:g}.")
    refuse_place(out)
    examples = read_examples(data)
    public = read_examples(replay) if replay else []
    place = work or out.with_name(f"{out.name}.work")
    with _show.progress():
        opened = open_any(model)
        if getattr(opened, "plan", "") and not any("a-init" in w or "a_init" in w for w in context.args):
            settings = dataclasses.replace(settings, a_init="independent")  # which columns it has, an edge cannot know
        made = fit(opened, examples, settings, place, replay=public, name=name or out.name, deadline_s=deadline)
        ranks = ranks_of(made)
        write_adapter(
            out,
            iter(made.parts.items()),
            ranks,
            opened,
            notes={what: made.notes[what] for what in _TOLD},
            plan=made.plan,
            n_examples=made.n_examples,
        )
    partial = made.notes["partial"]
    if not partial:
        shutil.rmtree(place / "state", ignore_errors=True)
        with suppress(OSError):
            place.rmdir()  # stays where the user keeps other things in it
    size = sum(f.stat().st_size for f in out.iterdir()) / 2**20
    if json_:
        _show.emit({"adapter": str(out), "plan": made.plan, "mib": size, "notes": dict(made.notes)})
        return
    _show.say(
        f"Trained on {_show.count(made.n_examples or 0, 'example')} in {_show.count(made.notes['n_steps'], 'step')}; "
        f"peak {made.notes['peak_mib']:,.0f} MiB."
    )
    if partial:
        _show.say(
            f"The deadline came before the end: the adapter is marked partial. The same command goes on from {place}."
        )
    _show.say(f"Saved as {out} ({size:.1f} MiB: nothing else needs to leave this machine).")
    if made.plan:
        recovering = _show.command("fuse", "recover", out, "--plan", "PLAN", "--model", "MODEL", "-o", "full")
        _show.say(f"Next, at the cloud: {recovering}")


@app.command()
def recover(
    adapter: Annotated[Path, typer.Argument(help="What an edge has trained on a pruned model.")],
    plan: Annotated[Path, typer.Option(help="The plan that `fuse prune` left here.")],
    model: Annotated[str, typer.Option(help="The whole model that the plan was made for.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the recovered adapter.")] = Path("recovered"),
    json_: _options.Json = False,
) -> None:
    """Bring an adapter of a pruned model to the whole model's shape; plain PEFT loads the result.

    Example: retouch fuse recover adapter --plan small.plan.json --model smollm2 -o full
    """
    from ..fuse.adapter_file import open_adapter, origin_of, ranks_of, write_adapter
    from ..fuse.prune import open_plan
    from ..fuse.pruned import pruned
    from ..fuse.recover import check_origin
    from ..fuse.recover import recover as scatter
    from ..store import refuse_place

    refuse_place(out)
    made = open_plan(plan)
    check_origin(adapter.name, origin_of(adapter), made)  # before a large model is opened in vain
    with _show.progress():
        opened = open_base(model)
        small = open_adapter(adapter, pruned(opened, made))
        full = scatter(small, made, opened)
        write_adapter(
            out,
            iter(full.parts.items()),
            ranks_of(small),
            opened,
            notes=_plain_notes(full),
            plan=full.plan,
            n_examples=full.n_examples,
            kept=full.kept,
        )
    if json_:
        _show.emit({"adapter": str(out), "plan": made.hash})
        return
    _show.say(f"Saved as {out}. PEFT loads it onto {model}; nothing of it was lost or changed.")


def _plain_notes(adapter: Adapter) -> dict[str, Any]:
    return {k: v for k, v in adapter.notes.items() if k != "file"}


_fuse_merge.add_to(app)
_edges.add_to(app)
