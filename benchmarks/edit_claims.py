"""The claims of the editing papers, measured: jobs that run alone or side by side, and the table made of their results.

    python benchmarks/edit_claims.py prepare --model smollm2 --data DATA --out WORK     suites, from public data on disk
    python benchmarks/edit_claims.py run --model smollm2 --out WORK --jobs single,same --workers 4
    python benchmarks/edit_claims.py table --out WORK --json benchmarks/results/edit_claims-smollm2.json

Every job leaves one JSON file; a job whose file is there is not run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
N_SINGLE, N_SUBJECTS, N_SEQUENCE = 200, 100, 1000

SINGLE = ["ft_l", "ft_m", "rome", "memit", "emmet", "alphaedit", "rets", "top", "rose"]
SEEDED = ("rome", "memit", "rets", "top", "rose")
SINGLE_VARIANTS = ["rome:metric=covariance", "memit:metric=identity", "rets:subject_weight=0", "rets:moment_weight=1"]
SAME = ["memit", "memit_merge", "rose"]
SAME_VARIANTS = [
    "alphaedit", "ft_m", "rome", "rose:metric=covariance", "rose:integrate=joint", "rose:integrate=joint:metric=covariance",
    "rose:integrate=mean", "rose:integrate=sum", "rose:integrate=tree", "rose:metric=nullspace", "rose:metric=drift",
    "rose:contexts=both", "memit_merge:contexts=both", "rose:flat=0.1",
]  # fmt: skip
SEQUENCE = ["memit", "alphaedit", "rose", "rome"]


def jobs(n_seeds: int = 3) -> dict[str, dict[str, Any]]:
    """Name every job."""
    found: dict[str, dict[str, Any]] = {}
    for spec in SINGLE:
        for seed in SEEDS[: n_seeds if spec in SEEDED else 1]:
            found[f"single/{spec}/{seed}"] = {"kind": "single", "spec": spec, "seed": seed}
    for spec in SINGLE_VARIANTS:
        found[f"single/{spec}/0"] = {"kind": "single", "spec": spec, "seed": 0}
    for n in (1, 2, 4, 8):
        for spec in SAME:
            for seed in SEEDS[: n_seeds if n == 4 else 1]:
                found[f"same/{n}/{spec}/{seed}"] = {"kind": "same", "spec": spec, "seed": seed, "n": n, "batch": 1}
    for spec in SAME_VARIANTS:
        found[f"same/4/{spec}/0"] = {"kind": "same", "spec": spec, "seed": 0, "n": 4, "batch": 1}
    for batch in (10, 100):
        for spec in SAME:
            found[f"batch/{batch}/{spec}/0"] = {"kind": "same", "spec": spec, "seed": 0, "n": 4, "batch": batch}
    for spec in SEQUENCE:
        for batch in (1, 10, 100):
            found[f"sequence/{batch}/{spec}"] = {"kind": "sequence", "spec": spec, "seed": 0, "batch": batch}
    for spec in ("rome", "memit", "rets", "rose"):
        for limit in (0.0, 0.02, 0.1):
            found[f"bounded/{spec}/{limit}"] = {"kind": "bounded", "spec": spec, "limit": limit}
    for name in ("drift", "landscape", "shortcut", "certify", "undo"):
        found[name] = {"kind": name}
    return found


# ---------------------------------------------------------------- the jobs


def _model(args: argparse.Namespace) -> Any:
    return _opened(args.model)


@functools.cache
def _opened(name: str) -> Any:
    import torch

    from retouch.model import open_model

    return open_model(name, device="cuda" if torch.cuda.is_available() else None)


def _method(spec: str, seed: int, **more: Any) -> Any:
    import torch

    from retouch import registry

    (method,) = registry.parse("edit", spec, seed=seed).values()
    wide = {"budget_mib": 2048} if torch.cuda.is_available() and hasattr(method, "budget_mib") else {}
    return replace(method, **wide, **more)


def _facts(path: Path) -> list[Any]:
    from retouch.edit.facts import Fact

    return [Fact.from_dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def prepare(args: argparse.Namespace) -> None:
    """Build the suites that the jobs read: test and dev records that the unedited model knows."""
    from retouch.edit import suites
    from retouch.edit.bench import known_facts
    from retouch.edit.facts import disjoint, load

    model, data, out = _model(args), Path(args.data), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for split, n in (("test", N_SINGLE), ("dev", 60)):
        facts = known_facts(model, suites.counterfact(data, None, 0, split=split), n)  # type: ignore[arg-type]
        _write(out / f"{split}.jsonl", facts)
    full = suites.counterfact(data, None, 1, split="all")
    flat = load(data / "counterfact" / "counterfact_flat.jsonl", 4 * N_SEQUENCE, bad="skip")
    by_subject = {f.subject.casefold(): f for f in [*reversed(flat), *reversed(full)]}
    _write(out / "sequence.jsonl", disjoint(list(by_subject.values())[::-1][:N_SEQUENCE]))
    for n in (1, 2, 4, 8):
        groups = suites.same_subject(model, data, n, N_SUBJECTS, 0, out / f"same-{n}.jsonl")
        print(f"same-{n}.jsonl", len(groups), file=sys.stderr)
    suites.same_subject(model, data, 4, 24, 0, out / "dev-4.jsonl", split="dev")


def _suite(args: argparse.Namespace, name: str) -> list[Any]:
    """Read records or groups, at most as many as were asked for."""
    from retouch.edit.suites import read

    path = Path(args.out) / f"{name}.jsonl"
    found = read(path) if name.startswith(("same-", "dev-")) else _facts(path)
    return found[: args.records or None]


def _write(path: Path, facts: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(f.to_dict()) + "\n" for f in facts), encoding="utf-8")
    print(path, len(facts), file=sys.stderr)


def single(args: argparse.Namespace, job: dict[str, Any], out: Path) -> None:
    """Edit every record alone with one method."""
    from retouch.edit.bench import Bench, run

    method = _method(job["spec"], job["seed"])
    generations = args.generations if job["seed"] == 0 else 0  # texts are the dearest part; one seed tells of fluency
    bench = Bench({job["spec"]: method}, 1, generations, job["seed"], keep_rows=True, chunk=args.chunk)
    run(_model(args), _suite(args, args.split), bench, out, data="counterfact")


def same(args: argparse.Namespace, job: dict[str, Any], out: Path) -> None:
    """Edit all facts of a subject together; several subjects at once with a batch."""
    from retouch.edit.bench import Bench, run

    method = _method(job["spec"], job["seed"])
    groups = _suite(args, f"{'dev' if args.split == 'dev' else 'same'}-{job['n']}")
    bench = Bench({job["spec"]: method}, job["batch"], 0, job["seed"], True, keep_rows=True, chunk=args.chunk)
    run(_model(args), groups, bench, out, data=f"same-subject n={job['n']}")


def sequence(args: argparse.Namespace, job: dict[str, Any], out: Path) -> None:
    """Edit a thousand facts one batch after another."""
    from retouch.edit.sequence import run_bench

    facts = _suite(args, "sequence")[: args.sequence if job["batch"] == 1 else None]
    run_bench(_model(args), facts, {job["spec"]: _method(job["spec"], 0)}, job["batch"], out, data="counterfact")


def bounded(args: argparse.Namespace, job: dict[str, Any], out: Path) -> None:
    """Keep a limit on the neighbours' drift during the search, against the fixed weights (limit 0)."""
    from retouch.edit.bench import Bench, run

    method = _method(job["spec"], 0, max_drift=job["limit"])
    bench = Bench({f"{job['spec']} {job['limit']}": method}, 1, 0, 0, keep_rows=True, chunk=args.chunk)
    run(_model(args), _suite(args, args.split)[:100], bench, out, data="counterfact")


def drift(args: argparse.Namespace, job: dict[str, Any], out: Path) -> None:
    """Measure delivered fractions under instruction wrappings, by metric, at the edited blocks."""
    from retouch import stats
    from retouch.edit._delivery import deliver
    from retouch.edit._drift import drift as measure
    from retouch.edit.base import down, rule

    model = _model(args)
    facts = [g[0] for g in _suite(args, "same-4")]
    low, high = rule(0.13, model.anatomy), rule(0.26, model.anatomy)
    rows = {}
    for block in range(low, high + 1):
        moment = stats.collect(model, [down(block)])[down(block)].mean
        rows[block] = deliver(model, facts, block, moment=moment).to_dict()
    _save(out, {"delivery": rows, "drift": measure(model, facts[:40]).to_dict()})


def landscape(args: argparse.Namespace, job: dict[str, Any], out: Path) -> None:
    """Compare gradients, sharpness and tolerance of joint and least-norm values, and what they predict."""
    import torch

    from retouch.edit import rose
    from retouch.edit._landscape import landscape as measure
    from retouch.edit.contexts import contexts_for
    from retouch.edit.rows import grouped, problems

    model = _model(args)
    facts = [f for g in _suite(args, "same-4")[: args.subjects] for f in g]
    found = {}
    for name in ("minnorm", "joint"):
        method = _method(f"rose:integrate={name}", 0)
        rows = problems(model, facts, contexts_for(model, method.contexts, 0), "subject")
        block = method.blocks_of(model)[-1]
        values = method.values(model, rows, grouped(facts), block)
        delta = torch.stack([v.delta for v in values])
        found[name] = measure(model, facts, block, delta=delta, settings=rose.Rose(contexts="plain")).to_dict()
    _save(out, found)


def shortcut(args: argparse.Namespace, job: dict[str, Any], out: Path) -> None:
    """Measure the shortcut index before edits and after rome, rets and top."""
    from retouch.change import apply
    from retouch.edit._shortcut import shortcut as measure

    model, facts = _model(args), _suite(args, args.split)[:60]
    found: dict[str, Any] = {"before": [measure(model, [f]).to_dict() for f in facts]}
    for spec in ("rome", "rets", "top"):
        changes = _method(spec, 0).plan_each(model, [[f] for f in facts])
        found[spec] = [measure(apply(model, c), [f]).to_dict() for f, c in zip(facts, changes)]
    _save(out, found)


def certify(args: argparse.Namespace, job: dict[str, Any], out: Path) -> None:
    """Check the certificate: how often does harm on fresh prompts exceed what was certified?"""
    import random

    from retouch.bound import certify as certificate
    from retouch.change import apply
    from retouch.edit.constraints import for_facts
    from retouch.measure import next_logp
    from retouch.tokens import Text

    model, facts = _model(args), _suite(args, args.split)
    changes = _method("rome", 0).plan_each(model, [[f] for f in facts])
    rows = []
    for number, (fact, change) in enumerate(zip(facts, changes)):
        prompts = [Text(c.prompt) for c in for_facts([fact], n=640, half="certify", seed=number)]
        before = next_logp(model, prompts).argmax(1)
        changed = (next_logp(apply(model, change), prompts).argmax(1) != before).double().tolist()
        random.Random(number).shuffle(changed)
        held, fresh = changed[: len(changed) // 2], changed[len(changed) // 2 :]
        made = certificate(held, 0.05, confidence=0.95, method="hoeffding_bentkus")
        rows.append({"bound": made.upper, "mean": made.mean, "fresh": sum(fresh) / len(fresh), "n": len(held)})
    above = [r["fresh"] > r["bound"] for r in rows]
    _save(out, {"runs": len(rows), "exceeded": sum(above) / len(above), "rows": rows})


def undo(args: argparse.Namespace, job: dict[str, Any], out: Path) -> None:
    """Apply 100 edits, undo them in a random order, and compare every weight bit by bit."""
    import random

    import torch

    from retouch.ledger import Ledger

    model, facts = _model(args), _suite(args, args.split)[:100]
    changes = _method("rome", 0).plan_each(model, [[f] for f in facts])
    ledger = Ledger(model)
    for change in changes:
        ledger = ledger.apply(change)
    order = list(range(1, len(changes) + 1))
    random.Random(0).shuffle(order)
    half = order[: len(order) // 2]
    for number in half:
        ledger = ledger.undo(number)
    fresh = Ledger(model)
    for number, change in enumerate(changes, 1):
        if number not in half:
            fresh = fresh.apply(change)
    pairs = list(zip(ledger.model.network.parameters(), fresh.model.network.parameters()))
    same_bits = all(torch.equal(a, b) for a, b in pairs)
    for number in order[len(order) // 2 :]:
        ledger = ledger.undo(number)
    back = all(torch.equal(a, b) for a, b in zip(ledger.model.network.parameters(), model.network.parameters()))
    _save(out, {"edits": len(changes), "weights": len(pairs), "half_equals_never": same_bits, "all_equals_base": back})


def _save(out: Path, data: Any) -> None:
    from retouch import store

    plain = json.loads(json.dumps(data), parse_constant=lambda _: None)  # a null space has no finite bound
    store.write_json_atomic(out, plain)


# ---------------------------------------------------------------- running


def _chosen(args: argparse.Namespace) -> Iterator[str]:
    known = jobs(args.seeds)
    for pattern in args.jobs.split(","):
        found = [n for n in known if fnmatch.fnmatch(n, pattern) or n.startswith(f"{pattern}/")]
        yield from found or [pattern]


def _job(name: str) -> dict[str, Any]:
    """Return a job by name; ``single/SPEC/SEED``, ``same/N/SPEC/SEED`` and ``sequence/BATCH/SPEC`` need not be listed."""
    if name in jobs():
        return jobs()[name]
    kind, *rest = name.split("/")
    if kind == "single" and len(rest) == 2:
        return {"kind": kind, "spec": rest[0], "seed": int(rest[1])}
    if kind == "same" and len(rest) == 3:
        return {"kind": kind, "n": int(rest[0]), "spec": rest[1], "seed": int(rest[2]), "batch": 1}
    if kind == "sequence" and len(rest) == 2:
        return {"kind": kind, "batch": int(rest[0]), "spec": rest[1]}
    raise SystemExit(f"There is no job {name!r}.")


def _file(args: argparse.Namespace, name: str) -> Path:
    return Path(args.out) / "jobs" / f"{name.replace('/', '__').replace(':', '+')}.json"


def run_jobs(args: argparse.Namespace) -> None:
    """Run jobs in several processes, each of which opens the model once and takes the next job that nobody has."""
    names = [n for n in dict.fromkeys(_chosen(args)) if not _file(args, n).is_file()]
    folder = _file(args, "x").parent
    folder.mkdir(parents=True, exist_ok=True)
    for taken in folder.glob("*.taken"):
        taken.unlink()
    command = [sys.executable, "-W", "ignore", __file__, "job", "--name", ",".join(names), *args.passed]
    threads = str(max(1, (os.cpu_count() or 2) // args.workers))
    end = time.monotonic() + args.seconds
    logs = [folder / f"worker-{i}.log" for i in range(args.workers)]
    with ExitStack() as open_files:
        workers = [
            subprocess.Popen(
                command, stderr=open_files.enter_context(log.open("w")), env={**os.environ, "OMP_NUM_THREADS": threads}
            )
            for log in logs
        ]
        while any(w.poll() is None for w in workers) and time.monotonic() < end:
            time.sleep(0.5)
        for worker in workers:
            worker.terminate()
    left = [n for n in names if not _file(args, n).is_file()]
    print(f"{len(names) - len(left)} jobs done, {len(left)} not: {', '.join(left)}", flush=True)


def run_job(args: argparse.Namespace) -> None:
    """Run jobs one after another in this process."""
    for name in args.name.split(","):
        out = _file(args, name)
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            out.with_suffix(".taken").open("x").close()
        except FileExistsError:
            continue
        started, job = time.monotonic(), _job(name)
        try:
            globals()[job["kind"]](args, job, out)
            said = "ok"
        except Exception as error:  # the other jobs go on
            traceback.print_exc()
            said = f"{type(error).__name__}: {str(error)[:200]}"
        _let_go()
        print(f"{name}: {time.monotonic() - started:.0f} s {said}", flush=True)


def _let_go() -> None:
    """Give cached device memory back: other processes share the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


SHOWN = ("efficacy", "paraphrase", "s_specificity", "r_specificity", "score", "r_same", "s_kl", "edit_form", "instruction",
         "all_facts", "all_facts_instruction", "efficacy_strict", "delivered", "perplexity_ratio", "seconds_per_fact")  # fmt: skip


def show(args: argparse.Namespace) -> None:
    """Print what the jobs measured, a line each."""
    for path in sorted((Path(args.out) / "jobs").glob("*.json")):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and "methods" in found:
            for row in found["methods"].values():
                print(path.stem, *(f"{n} {row[n]:.3f}" for n in SHOWN if n in row))


def table(args: argparse.Namespace) -> None:
    """Put all jobs' results into one file and judge the claims."""
    from _claims import judged

    from retouch import store

    found = {n: json.loads(_file(args, n).read_text()) for n in jobs() if _file(args, n).is_file()}
    rows = {n: Path(str(_file(args, n)).removesuffix(".json") + ".rows.json") for n in found}
    store.write_json_atomic(Path(args.json), judged(found, {n: p for n, p in rows.items() if p.is_file()}))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "run", "job", "show", "table"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default=os.environ.get("RETOUCH_DATA", "../shared/data"))
    parser.add_argument("--out", default="claims")
    parser.add_argument("--jobs", default="*")
    parser.add_argument("--name", default="")
    parser.add_argument("--split", default="test")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--generations", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--subjects", type=int, default=30)
    parser.add_argument("--records", type=int, default=0, help="at most so many records, or groups, a job; 0: all")
    parser.add_argument("--sequence", type=int, default=N_SEQUENCE, help="facts of a sequence in batches of one")
    parser.add_argument("--json", default="benchmarks/results/edit_claims.json")
    args = parser.parse_args()
    args.passed = [
        "--model", args.model, "--out", args.out, "--split", args.split, "--generations", str(args.generations),
        "--chunk", str(args.chunk), "--subjects", str(args.subjects), "--sequence", str(args.sequence), "--records", str(args.records),
    ]  # fmt: skip
    {"prepare": prepare, "run": run_jobs, "job": run_job, "show": show, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
