"""``retouch fuse``: prune for the edges, train there, recover, fuse, ask composed questions."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _edges, _show
from ._settings import EXTRA, method_of

if TYPE_CHECKING:
    from ..fuse.base import Adapter
    from ..fuse.suites import Suite
    from ..model import Model
    from ..settings import Settings

__all__ = ["app", "parse_numbers", "parse_resolvers", "parse_suite"]

app = typer.Typer(
    help="Fuse adapters that private sites have trained, and prove what the result can do.", no_args_is_help=True
)

_BASE = Annotated[str, typer.Argument(help="The whole model: a folder, a hub id, a .gguf file, or smollm2.")]
_JSON = Annotated[bool, typer.Option("--json", help="Results for programs.")]


@app.callback()
def _() -> None:
    """Fuse adapters that private sites have trained, and prove what the result can do."""


# ---------------------------------------------------------------- the way of one adapter


@app.command()
def prune(
    base: _BASE,
    budget: Annotated[
        str | None, typer.Option(help="Share of the model's memory in training that an edge has: 60%.")
    ] = None,
    budget_mib: Annotated[float | None, typer.Option(help="Or what it has, in MiB, at the peak of training.")] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Or the share of what can be pruned that goes, up to 0.85.")
    ] = None,
    score: Annotated[str, typer.Option(help="random, magnitude, wanda, taylor or flap.")] = "wanda",
    align: Annotated[
        str, typer.Option(help="none, bias, lstsq or distil: how the pruned weights make up for it.")
    ] = "bias",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of the file.")] = "float32",
    rank: Annotated[int, typer.Option(help="Rank that the edge will train, for its memory.")] = 8,
    batch: Annotated[int, typer.Option(help="Rows of a pass at the edge, for its memory.")] = 8,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder that the edge gets.")] = Path("pruned"),
    plan: Annotated[
        Path | None, typer.Option(help="File of the plan, which stays here; default OUT.plan.json.")
    ] = None,
    json_: _JSON = False,
) -> None:
    """Prune a model for a class of edge; the plan stays here, the edge gets weights and the plan's hash.

    Example: retouch fuse prune smollm2 --budget 60% -o small
    """
    from ..errors import UserError
    from ..fuse.memory import Load
    from ..fuse.prune import plan_prune, save_plan
    from ..fuse.pruned import save_pruned
    from ..store import refuse_inside

    given = [x for x in (budget, budget_mib, ratio) if x is not None]
    if len(given) != 1:
        raise UserError("Give one of --budget, --budget-mib and --ratio.")
    place = plan or out.with_name(f"{out.name}.plan.json")
    _one_of("dtype", dtype, ("float32", "bfloat16"))
    refuse_inside(out)
    refuse_inside(place)
    if place.is_dir():
        raise UserError(f"--plan {place} is a folder, and the plan is a file. Choose another name.")
    with _show.progress():
        model = _open(base)
        load = Load(rank=rank, batch=batch)
        mib = budget_mib if budget is None else _share_of(budget) * _whole(model, load)
        made = plan_prune(
            model, budget_mib=mib, ratio=ratio, score=_one_of("score", score, ("random", "magnitude", "wanda", "taylor", "flap")),
            align=_one_of("align", align, ("none", "bias", "lstsq", "distil")), load=load, seed=seed,
        )  # fmt: skip
        save_pruned(model, made, out, dtype=dtype)
        save_plan(made, place)
    whole = _whole(model, load)
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
    _show.say(f"Next, at the edge: retouch fuse train {out} --data examples.jsonl -o adapter")


@app.command(context_settings=EXTRA)
def train(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="What `fuse prune` wrote, or a whole model.")],
    data: Annotated[Path, typer.Option(help="Private examples: JSON Lines or TSV with prompt and target.")],
    replay: Annotated[Path | None, typer.Option(help="Public examples that are mixed in.")] = None,
    name: Annotated[str, typer.Option(help="What reports call the adapter.")] = "",
    work: Annotated[Path | None, typer.Option(help="Folder of the state, for going on; default OUT.work.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the adapter.")] = Path("adapter"),
    json_: _JSON = False,
) -> None:
    """Train an adapter on private examples; killed, it goes on. Settings are flags: --rank 8 --epochs 3 …

    Example: retouch fuse train small --data examples.jsonl --rank 8 -o adapter
    """
    import dataclasses
    import shutil

    from ..fuse.adapter_file import ranks_of, write_adapter
    from ..fuse.train import LoraSettings, read_examples
    from ..fuse.train import train as fit
    from ..store import refuse_inside

    settings = method_of(context, LoraSettings)
    refuse_inside(out)
    examples = read_examples(data)
    public = read_examples(replay) if replay else []
    place = work or out.with_name(f"{out.name}.work")
    with _show.progress():
        opened = _open_any(model)
        if getattr(opened, "plan", "") and not any("a-init" in w or "a_init" in w for w in context.args):
            settings = dataclasses.replace(settings, a_init="independent")  # which columns it has, an edge cannot know
        made = fit(opened, examples, settings, place, replay=public, name=name or out.name)
        ranks = ranks_of(made)
        write_adapter(
            out,
            iter(made.parts.items()),
            ranks,
            opened,
            notes=dict(made.notes),
            plan=made.plan,
            n_examples=made.n_examples,
        )
    shutil.rmtree(place / "state", ignore_errors=True)
    with suppress(OSError):
        place.rmdir()  # stays where the user keeps other things in it
    size = sum(f.stat().st_size for f in out.iterdir()) / 2**20
    if json_:
        _show.emit({"adapter": str(out), "plan": made.plan, "mib": size, "notes": dict(made.notes)})
        return
    _show.say(
        f"Trained on {made.n_examples:,} examples in {made.notes['n_steps']} steps; peak {made.notes['peak_mib']:,.0f} MiB."
    )
    _show.say(f"Saved as {out} ({size:.1f} MiB: nothing else needs to leave this machine).")
    if made.plan:
        _show.say(f"Next, at the cloud: retouch fuse recover {out} --plan PLAN -o full")


@app.command()
def recover(
    adapter: Annotated[Path, typer.Argument(help="What an edge has trained on a pruned model.")],
    plan: Annotated[Path, typer.Option(help="The plan that `fuse prune` left here.")],
    model: Annotated[str, typer.Option(help="The whole model.")] = "smollm2",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the recovered adapter.")] = Path("recovered"),
    json_: _JSON = False,
) -> None:
    """Bring an adapter of a pruned model to the whole model's shape; plain PEFT loads the result.

    Example: retouch fuse recover adapter --plan small.plan.json -o full
    """
    from ..fuse.adapter_file import open_adapter, ranks_of, write_adapter
    from ..fuse.prune import open_plan
    from ..fuse.pruned import pruned
    from ..fuse.recover import recover as scatter
    from ..store import refuse_inside

    refuse_inside(out)
    made = open_plan(plan)
    with _show.progress():
        opened = _open(model)
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
        )
    if json_:
        _show.emit({"adapter": str(out), "plan": made.hash})
        return
    _show.say(f"Saved as {out}. PEFT loads it onto {model}; nothing of it was lost or changed.")


def _plain_notes(adapter: Adapter) -> dict[str, Any]:
    return {k: v for k, v in adapter.notes.items() if k != "file"}


# ---------------------------------------------------------------- many adapters


@app.command(context_settings=EXTRA)
def merge(
    context: typer.Context,
    base: _BASE,
    adapters: Annotated[list[Path], typer.Argument(help="Folders of adapters, as PEFT or `fuse recover` write them.")],
    method: Annotated[str, typer.Option(help="See: retouch methods fuse. Its settings are flags too.")] = "cat",
    resolve: Annotated[
        str, typer.Option(help="cr-sign or cr-subspace, with settings: cr-sign:beta=0.5; or none.")
    ] = "none",
    scale: Annotated[
        str, typer.Option(help="A number (1 is the mean), or tune: chosen on the selection questions of --data.")
    ] = "1",
    weights: Annotated[str, typer.Option(help="One a adapter: 1,2,1; or examples. Default: equal.")] = "",
    data: Annotated[
        str, typer.Option(help="Questions: a folder with a sub-folder for each domain, or MMLU's layout.")
    ] = "",
    max_harm: Annotated[
        float | None,
        typer.Option("--max-harm", help="Largest certified drop on any domain; more is refused with exit code 3."),
    ] = None,
    n_certify: Annotated[
        int | None, typer.Option(help="Test questions of each domain that certify; default: all.")
    ] = None,
    as_: Annotated[str, typer.Option("--as", help="adapter (PEFT), change, or model (merged).")] = "adapter",
    base_unverified: Annotated[
        bool, typer.Option("--base-unverified", help="Take adapters that do not say which base they belong to.")
    ] = False,
    targets_from_tensors: Annotated[
        bool,
        typer.Option("--targets-from-tensors", help="Take adapters whose configuration names targets by a pattern."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only the report of conflicts.")] = False,
    html: Annotated[Path | None, typer.Option(help="A report with the heat map.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the result.")] = Path("fused"),
    json_: _JSON = False,
) -> None:
    """Fuse adapters into one: conflict report, fusion, and with --max-harm a certificate.

    Example: retouch fuse merge smollm2 news law --method tsv --scale tune --data domains -o fused
    """
    from .. import registry
    from ..fuse.merging import seen_by_edges
    from ..report import to_json, to_terminal, write_html
    from ..store import refuse_inside

    cls = registry.load("fuse", method)
    adapters, context.args = _parted([str(a) for a in adapters], cls)
    chosen = method_of(context, cls)
    kind = _one_of("as", as_, ("adapter", "change", "model"))
    resolver = _resolver(resolve)
    given: Any = None if not weights else "examples" if weights == "examples" else parse_numbers("weights", weights)
    _show.writable("--html", html, "matplotlib", "jinja2")
    refuse_inside(out)
    _check_merge(chosen, scale, max_harm, n_certify, data, dry_run)
    suite = parse_suite(data) if data else None
    if scale != "tune":
        chosen = _scaled(chosen, scale)
    with _show.progress():
        model = _open(base)
        opened = [seen_by_edges(a) for a in _adapters(adapters, model, base_unverified, targets_from_tensors)]
        asked = {"weights": given, "resolver": resolver}
        judged = {"suite": suite, "tuned": scale == "tune", "limit": max_harm, "n_certify": n_certify}
        report, proof = _merged(model, opened, chosen, out, kind, dry_run, asked, judged)
    if html is not None:
        write_html(report, html)
    if json_:
        _show.emit(to_json(report))
    else:
        _show.console().print(to_terminal(report))
    if proof is not None:
        proof.require()
    if not json_ and not dry_run:
        _show.say(f"Saved as {out}.")


def _parted(words: list[str], cls: type[Settings]) -> tuple[list[Path], list[str]]:
    """Tell adapters from the method's settings: a command that takes any number of folders is handed both."""
    from ..settings import fields_of

    switches = {f.name for f in fields_of(cls) if f.type == "bool"}
    paths, flags, left = [], [], list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            paths.append(Path(word))
            continue
        flags.append(word)
        name = word[2:].replace("-", "_")
        follows = bool(left) and "=" not in word and not left[0].startswith("--")
        if follows and (name not in switches or left[0].lower() in ("true", "false")):
            flags.append(left.pop(0))
    return paths, flags


def _check_merge(
    method: Any, scale: str, max_harm: float | None, n_certify: int | None, data: str, dry_run: bool
) -> None:
    """Name what would fail only after the model is open."""
    from ..errors import UserError

    if max_harm is not None and not 0 < max_harm <= 1:
        raise UserError(f"--max-harm is a share of right answers, above 0 and at most 1; got {max_harm:g}.")
    if n_certify is not None and n_certify < 1:
        raise UserError(f"--n-certify must be at least 1; got {n_certify}.")
    wanting = {"--scale tune": scale == "tune", "--max-harm": max_harm is not None,
               f"--method {method.name}": method.needs == "selection"}  # fmt: skip
    if not data and not dry_run and (what := next((w for w, needs in wanting.items() if needs), None)):
        raise UserError(f"{what} needs questions of the adapters' domains: give --data.")


def _merged(
    model: Model, adapters: list[Adapter], method: Any, out: Path, kind: str, dry_run: bool, asked: dict[str, Any],
    judged: dict[str, Any],
) -> tuple[Any, Any]:  # fmt: skip
    """Fuse, and keep the result unless its proof fails: weight by weight where nothing has to be judged first."""
    from ..fuse.base import shares
    from ..fuse.merging import conflict_report, merge, merge_to_folder

    by_weight = kind == "adapter" and not judged["tuned"] and judged["limit"] is None and not method.chooses
    if dry_run or by_weight:
        report = conflict_report(model, adapters, shares(adapters, asked["weights"]), method.seed)
        if not dry_run:
            merge_to_folder(model, adapters, method, out, **asked)
        return report, None
    made = merge(model, adapters, method, **asked, **judged)
    if made.proof is None or made.proof.holds:
        _save(model, made.change, out, kind)
    return made.report, made.proof


def _scaled(method: Any, scale: str) -> Any:
    import dataclasses

    from ..errors import UserError

    try:
        return method if scale == "1" else dataclasses.replace(method, lam=float(scale))
    except ValueError as error:
        raise UserError(f"--scale must be a number above 0, or tune; got {scale!r}.") from error


def _save(model: Model, change: Any, out: Path, kind: str) -> None:
    from ..change import save
    from ..fuse.adapter_file import write_adapter
    from ..ledger import Ledger, save_ledger

    if kind == "change":
        save(change, out)
    elif kind == "adapter":
        ranks = {name: part.rank for name, part in change.parts.items()}
        write_adapter(out, iter(change.parts.items()), ranks, model, notes=dict(change.notes))
    else:
        save_ledger(Ledger(model).apply(change), out)


def _adapters(paths: list[Path], model: Model, unverified: bool, from_tensors: bool) -> list[Adapter]:
    from ..errors import UserError
    from ..fuse.adapter_file import open_adapter

    names = [p.name for p in paths]
    if twice := {n for n in names if names.count(n) > 1}:
        raise UserError(
            f"Two adapters are called {sorted(twice)[0]!r}; reports could not tell them apart. Rename a folder."
        )
    return [open_adapter(p, model, base_unverified=unverified, targets_from_tensors=from_tensors) for p in paths]


def parse_resolvers(text: str) -> dict[str, Any]:
    """Read resolvers with commas between, by the words that named them."""
    found = {word: _resolver(word) for word in (part.strip() for part in text.split(","))}
    return {word: resolver for word, resolver in found.items() if resolver is not None}


def _resolver(text: str) -> Any:
    """Read ``cr-sign:beta=0.5`` as a resolver."""
    if text in ("", "none"):
        return None
    from ..errors import unknown
    from ..fuse.cr_sign import CRSign
    from ..fuse.cr_subspace import CRSubspace
    from ..settings import from_flags

    known: dict[str, Any] = {"cr_sign": CRSign, "cr_subspace": CRSubspace}
    name, *settings = text.split(":")
    key = name.strip().lower().replace("-", "_")
    if key not in known:
        raise unknown("resolver", name, known)
    return from_flags(known[key], [f"--{s}" for s in settings])


# ---------------------------------------------------------------- composed questions


@app.command()
def compose(
    data: Annotated[str, typer.Option(help="A folder with a sub-folder for each domain, MMLU's layout, or text-cd.")],
    k: Annotated[int | None, typer.Option("-k", help="Questions of a prompt: 2, 3 or 4.")] = None,
    split: Annotated[str, typer.Option(help="selection or test.")] = "test",
    once: Annotated[bool, typer.Option("--once", help="Ask every question once.")] = False,
    n: Annotated[
        int | None, typer.Option("-n", help="Bundles at most; a bundle is nine prompts, or one with --once.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Ask this model.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="With this adapter.")] = None,
    how: Annotated[str, typer.Option(help="constrained, joint or free.")] = "constrained",
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    examples: Annotated[
        Path | None, typer.Option(help="Also write each domain's training examples to this folder.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    recipe: Annotated[
        Path | None, typer.Option("-o", "--out", help="File of the recipe: hashes and seed, no texts.")
    ] = None,
    json_: _JSON = False,
) -> None:
    """Compose prompts that ask questions of several domains at once, and score a model on them.

    Example: retouch fuse compose --data domains -k 3 --model smollm2
    """
    from ..errors import UserError
    from ..fuse.asking import as_change, asked
    from ..fuse.compose import bundles, read_recipe, singles, write_recipe
    from ..fuse.composed_metrics import measure

    if adapter is not None and model is None:
        raise UserError("--adapter is asked together with its base: give --model too.")
    if n is not None and n < 1:
        raise UserError(f"-n must be at least 1; got {n}.")
    suite = parse_suite(data, seed)
    pool = suite.questions(_one_of("split", split, ("selection", "test")))
    if recipe is not None and recipe.is_file() and model is not None:
        instances = read_recipe(recipe, pool)
    else:
        instances = bundles(pool, k, seed, once, n_bundles=n)
        if recipe is not None:
            write_recipe(recipe, suite.name, instances)
    if examples is not None:
        _write_examples(suite, examples, seed)
    told: dict[str, Any] = {"suite": suite.name, "domains": list(suite.domains), "instances": len(instances)}
    if model is not None:
        with _show.progress():
            opened = _open(model)
            change = None
            if adapter is not None:
                change = as_change(_adapters([adapter], opened, True, False)[0])
            where = {"how": how, "chat": chat, "wording": suite.template}
            composed = asked(opened, change, instances, **where)
            alone = None if how == "free" else asked(opened, change, singles(instances), **where)
        told |= measure(composed, alone=alone).to_dict()
    if json_:
        _show.emit(told)
        return
    _show.say(f"{len(instances):,} prompts of {suite.name}: {', '.join(suite.domains)}.")
    if model is not None:
        names = (
            "all_correct",
            "chance_all",
            "part_correct",
            "chance_part",
            "worst_domain",
            "composition_cost",
            "coupling",
        )
        _show.table(f"{model} on them", ["", "share"], [[n.replace("_", " "), told.get(n)] for n in names])
    if recipe is not None:
        _show.say(f"Recipe: {recipe}")


def _write_examples(suite: Suite, folder: Path, seed: int) -> None:
    import json

    from ..fuse.suites import examples

    folder.mkdir(parents=True, exist_ok=True)
    for domain in suite.domains:
        rows = [
            json.dumps({"prompt": e.prompt, "target": e.target}, ensure_ascii=False)
            for e in examples(suite, domain, seed=seed)
        ]
        (folder / f"{domain}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- reading what was asked


def _open(source: str) -> Model:
    from ..model import open_model

    return open_model(source)


def _open_any(source: str) -> Model:
    """Open a pruned folder or a model."""
    from ..fuse.pruned import open_pruned
    from ..store import read_json

    record = Path(source) / "retouch.json"
    if record.is_file() and read_json(record).get("kind") == "pruned":
        return open_pruned(source)
    return _open(source)


def parse_suite(data: str, seed: int = 0) -> Suite:
    """Read a suite: own folders, MMLU, or the published sets of text-cd."""
    import os

    from ..errors import UserError
    from ..fuse.suites import folders, text_cd

    if data == "text-cd":
        if not os.environ.get("RETOUCH_DATA"):
            raise UserError(
                "text-cd reads published files: set RETOUCH_DATA to the folder that holds sentence_cls and glue."
            )
        return text_cd(os.environ["RETOUCH_DATA"], seed=seed)
    return folders(data, seed=seed)


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> Any:
    from ..errors import unknown

    if value not in allowed:
        raise unknown(f"value of --{flag}", value, allowed)
    return value


def _number(flag: str, text: str) -> float:
    from ..errors import UserError

    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--{flag} must be a number; got {text!r}.") from error


def parse_numbers(flag: str, text: str) -> list[float]:
    """Read numbers with commas between."""
    return [_number(flag, part) for part in text.split(",")]


def _share_of(text: str) -> float:
    from ..errors import UserError

    number = _number("budget", text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < number <= 1:
        raise UserError(f"--budget is a share of what the whole model needs, such as 60% or 0.6; got {text!r}.")
    return number


def _whole(model: Model, load: Any) -> float:
    """Return what training needs without pruning, in MiB."""
    from ..fuse._units import units_of
    from ..fuse.memory import predicted

    units = units_of(model)
    widths = {b: (len(units.whole.kv), len(units.whole.ff)) for b in range(model.anatomy.n_blocks)}
    return predicted(model, units, widths, load).mib


_edges.add_to(app)
