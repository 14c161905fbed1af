"""``retouch fuse merge, compose``: fuse adapters, and ask what the result can do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _options, _show
from ._fuse_flags import open_base, parse_numbers, parse_suite, resolver_of
from ._settings import EXTRA, method_of

if TYPE_CHECKING:
    from ..fuse.base import Adapter
    from ..fuse.suites import Suite
    from ..model import Model
    from ..settings import Settings

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add the commands to ``retouch fuse``."""
    app.command(context_settings=EXTRA)(merge)
    app.command()(compose)


# ---------------------------------------------------------------- many adapters


def merge(
    context: typer.Context,
    base: _options.WholeModel,
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
    json_: _options.Json = False,
) -> None:
    """Fuse adapters into one: conflict report, fusion, and with --max-harm a certificate.

    Example: retouch fuse merge smollm2 news law --method tsv --scale tune --data domains -o fused
    """
    from .. import registry
    from ..fuse.merging import open_adapters, refuse_replacing, seen_by_edges
    from ..store import refuse_place

    cls = registry.load("fuse", method)
    adapters, context.args = _parted([str(a) for a in adapters], cls)
    chosen = method_of(context, cls)
    fixed = {w[2:].partition("=")[0].replace("-", "_") for w in context.args if w.startswith("--")}
    kind = _options.one_of("as", as_, ("adapter", "change", "model"))
    resolver = resolver_of(resolve)
    given: Any = None if not weights else "examples" if weights == "examples" else parse_numbers("weights", weights)
    _show.writable("--html", html, "matplotlib", "jinja2")
    refuse_place(out)
    refuse_replacing(out, [base, *adapters])
    _check_merge(chosen, scale, max_harm, n_certify, data, dry_run)
    suite = parse_suite(data) if data else None
    if scale != "tune":
        chosen = _scaled(chosen, scale)
    with _show.progress():
        model = open_base(base)
        given_here = open_adapters(
            adapters, model, base_unverified=base_unverified, targets_from_tensors=targets_from_tensors
        )
        opened = [seen_by_edges(a, model) for a in given_here]
        asked = {"weights": given, "resolver": resolver}
        judged = {"suite": suite, "tuned": scale == "tune", "fixed": fixed, "limit": max_harm, "n_certify": n_certify}
        report, proof, lost = _merged(model, opened, chosen, out, kind, dry_run, asked, judged, html is not None)
    _show.report(report, html, json_)
    if proof is not None:
        proof.require()
    if lost and not json_:
        mean = sum(lost.values()) / len(lost)
        _show.say(
            f"The base is stored in {model.file_dtype}, which loses {mean:.1%} of the change in the mean over "
            f"{_show.count(len(lost), 'weight')}, and {max(lost.values()):.1%} at most. --as adapter loses nothing."
        )
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
    if n_certify is not None and max_harm is None and not dry_run:
        raise UserError(
            "--n-certify counts the questions of a certificate, and none is asked for: give --max-harm too."
        )
    if data and not dry_run and not any(wanting.values()):
        raise UserError(
            f"Nothing here asks the questions of --data {data}: they serve --scale tune, --max-harm and methods that choose "
            "weights by questions. Add one of these, or leave --data out."
        )
    if method.needs == "moments" and not dry_run:
        raise UserError(
            f"--method {method.name} needs second moments of each adapter's inputs, which no file of an adapter holds. "
            "In Python hand them to retouch.fuse.merging.merge (moments=); here choose another method."
        )


def _merged(
    model: Model, adapters: list[Adapter], method: Any, out: Path, kind: str, dry_run: bool, asked: dict[str, Any],
    judged: dict[str, Any], pictures: bool,
) -> tuple[Any, Any, dict[str, float]]:  # fmt: skip
    """Fuse, and keep the result unless its proof fails: weight by weight where nothing has to be judged first."""
    import dataclasses

    from ..fuse.base import shares
    from ..fuse.merging import conflict_report, fused_ranks, fused_report, merge, merge_to_folder

    by_weight = kind == "adapter" and not judged["tuned"] and judged["limit"] is None and not method.chooses
    if kind == "adapter" and not dry_run:
        fused_ranks(model, adapters, method, **asked)  # refuses before anything is measured what no adapter can hold
    if dry_run or by_weight:
        report = conflict_report(model, adapters, shares(adapters, asked["weights"]), method.seed, pictures=pictures)
        told = report if dry_run else fused_report(report, merge_to_folder(model, adapters, method, out, **asked))
        return told, None, {}
    made = merge(model, adapters, method, **asked, **judged, pictures=pictures)
    if made.proof is not None and not made.proof.holds:
        return made.report, made.proof, {}
    lost = _save(model, made.change, out, kind, made.proof is not None)
    return dataclasses.replace(made.report, numbers={**made.report.numbers, "lost": lost}), made.proof, lost


def _scaled(method: Any, scale: str) -> Any:
    import dataclasses

    from ..errors import UserError

    try:
        return method if scale == "1" else dataclasses.replace(method, lam=float(scale))
    except ValueError as error:
        raise UserError(f"--scale must be a number above 0, or tune; got {scale!r}.") from error


def _save(model: Model, change: Any, out: Path, kind: str, proven: bool) -> dict[str, float]:
    """Keep the result, and return what share of each weight's change the base's own type swallows."""
    from ..change import TOLERANCE, save
    from ..errors import NoEffect
    from ..fuse.adapter_file import write_adapter
    from ..ledger import Ledger, save_ledger, survival

    if kind == "change":
        save(change, out)
    elif kind == "adapter":
        ranks = {name: part.rank for name, part in change.parts.items()}
        write_adapter(out, iter(change.parts.items()), ranks, model, notes=dict(change.notes))
    else:
        after = Ledger(model).apply(change)
        lost = survival(after, accept_loss=True)
        if proven and (most := max(lost.values(), default=0.0)) > TOLERANCE:
            raise NoEffect(
                f"Stored in {model.file_dtype}, the base's own type, a weight would lose {most:.0%} of its change, so that the "
                "certificate would be another model's. Keep the result with --as adapter or --as change."
            )
        save_ledger(after, out)
        return lost
    return {}


# ---------------------------------------------------------------- composed questions


def compose(
    data: Annotated[str, typer.Option(help="A folder with a sub-folder for each domain, MMLU's layout, or text-cd.")],
    k: Annotated[int | None, typer.Option("-k", help="Questions of a prompt: 2, 3 or 4.")] = None,
    split: Annotated[str | None, typer.Option(help="selection or test; default: test.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Ask every question once.")] = False,
    n: Annotated[
        int | None, typer.Option("-n", help="Bundles at most; a bundle is nine prompts, or one with --once.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Ask this model.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="With this adapter.")] = None,
    how: Annotated[str, typer.Option(help="constrained, joint or free.")] = "constrained",
    chat: _options.Chat = False,
    template: Annotated[str, typer.Option(help="Wording, e.g. plain or words; default: the suite's.")] = "",
    examples: Annotated[
        Path | None, typer.Option(help="Also write each domain's training examples to this folder.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the drawing; default: 0.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Ask what this file says, in place of -k, -n, --once, --split and --seed.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="New file for the recipe: hashes and seed, no texts.")
    ] = None,
    json_: _options.Json = False,
) -> None:
    """Compose prompts that ask questions of several domains at once, and score a model on them.

    Example: retouch fuse compose --data domains -k 3 --model smollm2
    """
    from ..errors import UserError
    from ..fuse.asking import as_change, asked
    from ..fuse.compose import bundles, drawn_as, read_recipe, singles, write_recipe
    from ..fuse.composed_metrics import measure
    from ..fuse.merging import open_adapters
    from ..fuse.suites import answered

    if adapter is not None and model is None:
        raise UserError("--adapter is asked together with its base: give --model too.")
    if n is not None and n < 1:
        raise UserError(f"-n must be at least 1; got {n}.")
    _check_recipe(recipe, out, {"-k": k, "-n": n, "--once": once or None, "--split": split, "--seed": seed})
    drawn: dict[str, Any] = drawn_as(recipe) if recipe else {"seed": seed or 0, "split": split or "test"}
    suite = parse_suite(data, drawn["seed"], template)
    pool = suite.questions(_options.one_of("split", drawn["split"], ("selection", "test")))
    instances = read_recipe(recipe, pool) if recipe else bundles(pool, k, drawn["seed"], once, n_bundles=n)
    if out is not None:
        write_recipe(out, suite.name, instances, drawn)
    if examples is not None:
        _write_examples(suite, examples, drawn["seed"])
    told: dict[str, Any] = {"suite": suite.name, "domains": list(suite.domains), "instances": len(instances)}
    if model is not None:
        with _show.progress():
            opened = open_base(model)
            change = alone = None
            if adapter is not None:
                change = as_change(open_adapters([adapter], opened, base_unverified=True)[0])
            where: dict[str, Any] = {"how": how, "chat": chat, "wording": suite.template}
            composed = asked(opened, change, instances, shots=answered(suite, len(instances[0].parts)), **where)
            if how != "free":
                alone = asked(opened, change, singles(instances), shots=answered(suite, 1), **where)
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
    if out is not None:
        _show.say(f"Recipe: {out}. To ask the same again: --recipe {out}")


def _check_recipe(recipe: Path | None, out: Path | None, drawing: dict[str, Any]) -> None:
    """A recipe is read or written, never both, and says itself how it was drawn."""
    from ..errors import UserError

    told = next((flag for flag, value in {**drawing, "-o": out}.items() if value is not None), None)
    if recipe is not None and told is not None:
        raise UserError(f"--recipe {recipe} says what is asked, so {told} has nothing to say. Leave one of them out.")
    if out is not None and out.exists():
        raise UserError(
            f"-o {out} exists already. To ask what it says: --recipe {out}. To draw anew, name another file."
        )


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
