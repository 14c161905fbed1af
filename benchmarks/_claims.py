"""What the jobs of edit_claims.py say about each claim: numbers, intervals, and a verdict that follows from a rule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retouch.edit.score import harmonic, paired, read_rows

CLASSIC = ("efficacy", "paraphrase", "s_specificity", "r_specificity")
FEWEST = 20
"""Subjects below which an interval says too little for a verdict."""
KEPT = (
    *CLASSIC, "score", "efficacy_strict", "paraphrase_strict", "s_specificity_strict", "r_specificity_mean", "r_gold",
    "r_same", "s_same", "r_kl", "s_kl", "edit_form", "instruction", "gap", "all_facts", "all_facts_instruction", "fluency",
    "perplexity_ratio", "delivered", "margin_nats", "share_of_weight", "seconds_per_fact",
)  # fmt: skip

Row = Mapping[str, float]


def judged(found: Mapping[str, Any], rows: Mapping[str, Path]) -> dict[str, Any]:
    """Return all measurements and every claim that they cover.

    Args:
        found: By job its result.
        rows: By job the file of its records.
    """
    kept = _Kept(found, rows)
    first = next(r for r in found.values() if "model" in r)
    claims = [c for c in (make(kept) for make in CLAIMS) if c]
    return {
        "verb": "edit",
        "model": first["model"],
        "environment": {k: v for k, v in first["environment"].items() if k != "settings"},
        "measured": {n: _short(r) for n, r in found.items() if "methods" in r},
        "other": {n: r for n, r in found.items() if n in ("undo",)} | _certified(found) | _curves(found),
        "claims": claims,
    }


def _short(result: Mapping[str, Any]) -> dict[str, Any]:
    (numbers,) = result["methods"].values()
    shown = {k: round(numbers[k], 4) for n in KEPT for k in (n, f"{n}_low", f"{n}_high") if k in numbers}
    (settings,) = result["environment"]["settings"].values()
    return {"n": result["n"], "seed": result["seed"], **shown, "settings": settings}


def _certified(found: Mapping[str, Any]) -> dict[str, Any]:
    made = found.get("certify")
    return {"certify": {k: v for k, v in made.items() if k != "rows"}} if made else {}


def _curves(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"curves": {n: r["curves"] for n, r in found.items() if "curves" in r}}


class _Kept:
    """The records of the jobs; several seeds of one method are averaged record by record."""

    def __init__(self, found: Mapping[str, Any], rows: Mapping[str, Path]) -> None:
        self.found, self.files = found, rows

    def rows(self, prefix: str) -> list[dict[str, float]]:
        """Return a method's records, e.g. of ``single/rome``, averaged over its seeds."""
        seeds = [next(iter(read_rows(p).values())) for n, p in self.files.items() if n.rpartition("/")[0] == prefix]
        return [{k: float(np.mean([r[k] for r in same])) for k in same[0]} for same in zip(*seeds)]

    def subjects(self, prefix: str) -> list[str]:
        path = next(p for n, p in self.files.items() if n.rpartition("/")[0] == prefix)
        return [r["subject"] for r in sorted(json.loads(path.read_text()), key=lambda r: r["number"])]

    def has(self, *prefixes: str) -> bool:
        return all(any(n.rpartition("/")[0] == p for n in self.files) for p in prefixes)

    def mean(self, prefix: str, metric: str) -> float:
        return float(np.mean([r[metric] for r in self.rows(prefix) if metric in r]))

    def compare(self, one: str, two: str, metric: str) -> dict[str, float]:
        found = paired(self.rows(one), self.rows(two), self.subjects(one), metric)
        return {k: round(v, 4) for k, v in found.items()}

    def score(self, prefix: str) -> tuple[float, float, float]:
        """Return the score with a bootstrap interval over subjects."""
        rows = self.rows(prefix)
        values = np.array([[r.get(n, np.nan) for n in CLASSIC] for r in rows])
        subjects = np.unique(self.subjects(prefix), return_inverse=True)[1]
        members = [np.flatnonzero(subjects == s) for s in range(subjects.max() + 1)]
        draw = np.random.default_rng(0)
        draws = []
        for _ in range(1000):
            picked = np.concatenate([members[i] for i in draw.integers(0, len(members), len(members))])
            draws.append(harmonic(np.nanmean(values[picked], 0).tolist()))
        low, high = np.quantile(draws, [0.025, 0.975])
        return harmonic(np.nanmean(values, 0).tolist()), float(low), float(high)


def _claim(who: str, claim: str, rule: str, holds: bool, numbers: Any) -> dict[str, Any]:
    return {"who": who, "claim": claim, "rule": rule, "holds": bool(holds), "numbers": numbers}


def rets(k: _Kept) -> dict[str, Any] | None:
    """RETS against rome and memit."""
    if not k.has("single/rets", "single/rome", "single/memit"):
        return None
    numbers = {
        other: {m: k.compare("single/rets", f"single/{other}", m) for m in ("r_specificity", "r_same", *CLASSIC[:3])}
        for other in ("rome", "memit")
    }
    efficacy = k.mean("single/rets", "efficacy")
    holds = efficacy >= 0.95 and all(
        n["r_specificity"]["relative"] >= 0.3 and n["r_specificity"]["low"] > 0 for n in numbers.values()
    )
    buys = min(n["s_specificity"]["difference"] for n in numbers.values()) < -0.05
    return _claim(
        "RETS", "R-specificity over rome and memit by 30 % or more at efficacy of at least 0.95",
        "relative gain at least 0.3, interval above 0, efficacy at least 0.95; 'buys' if S-specificity falls by more than 0.05",
        holds, {"efficacy": efficacy, "buys": buys, **numbers},
    )  # fmt: skip


def rets_constraint(k: _Kept) -> dict[str, Any] | None:
    """RETS with and without its subject constraint."""
    if not k.has("single/rets", "single/rets:subject_weight=0"):
        return None
    found = k.compare("single/rets", "single/rets:subject_weight=0", "s_specificity")
    return _claim("RETS", "the subject constraint is needed", "S-specificity falls without it", found["low"] > 0, found)


def top_balance(k: _Kept) -> dict[str, Any] | None:
    """TOP's score against all others."""
    names = [
        n
        for n in ("ft_l", "ft_m", "rome", "memit", "emmet", "alphaedit", "rets", "rose", "top")
        if k.has(f"single/{n}")
    ]
    if "top" not in names or len(names) < 3:
        return None
    scores = {n: [round(v, 4) for v in k.score(f"single/{n}")] for n in names}
    best = max((s[0] for n, s in scores.items() if n != "top"))
    return _claim(
        "TOP",
        "the best harmonic score of all single-edit methods",
        "its score above every other's",
        scores["top"][0] > best,
        scores,
    )


def shortcut(k: _Kept) -> dict[str, Any] | None:
    """The shortcut index before and after."""
    if "shortcut" not in k.found:
        return None
    found = {n: [x["index"] for x in xs] for n, xs in k.found["shortcut"].items()}
    both = [i for i in range(len(found["rome"])) if found["rome"][i] is not None and found["top"][i] is not None]
    if len(both) < FEWEST:
        return None
    rows = [[{"x": found[n][i]} for i in both] for n in ("top", "rome")]
    difference = paired(rows[0], rows[1], [str(i) for i in both], "x")
    means = {
        n: float(np.mean([x for x in xs if x is not None])) for n, xs in found.items() if any(x is not None for x in xs)
    }
    counts = {n: sum(x is not None for x in xs) for n, xs in found.items()}
    return _claim("TOP", "TOP removes the shortcut", "its index below rome's, interval below 0", difference["high"] < 0,
                  {"mean": means, "n": counts, "top - rome": difference})  # fmt: skip


def merging(k: _Kept) -> dict[str, Any] | None:
    """MEMIT and MEMIT-Merge on several facts of a subject."""
    ns = [n for n in (2, 4, 8) if k.has(f"same/{n}/memit", f"same/{n}/memit_merge")]
    if not ns:
        return None
    numbers = {
        n: {
            m: {
                x: round(k.mean(f"same/{n}/{m}", x), 4)
                for x in ("efficacy", "efficacy_strict", "edit_form", "all_facts", "delivered")
            }
            for m in ("memit", "memit_merge")
        }
        | {"merge - memit, strict": k.compare(f"same/{n}/memit_merge", f"same/{n}/memit", "efficacy_strict")}
        for n in ns
    }
    holds = all(v["merge - memit, strict"]["low"] > 0 for v in numbers.values())
    return _claim(
        "MEMIT-Merge",
        "several facts of a subject break memit, merging repairs it",
        "strict efficacy above memit's at every n",
        holds,
        numbers,
    )


def rose(k: _Kept) -> dict[str, Any] | None:
    """RoSE's instruction recall."""
    ns = [n for n in (1, 2, 4, 8) if k.has(f"same/{n}/memit", f"same/{n}/memit_merge", f"same/{n}/rose")]
    if 4 not in ns:
        return None
    numbers = {
        n: {m: {x: round(k.mean(f"same/{n}/{m}", x), 4) for x in ("instruction", "edit_form", "gap", "all_facts", "all_facts_instruction")} for m in ("memit", "memit_merge", "rose")}
        | {f"rose - {m}": k.compare(f"same/{n}/rose", f"same/{n}/{m}", "instruction") for m in ("memit", "memit_merge")}
        for n in ns
    }  # fmt: skip
    four = numbers[4]
    holds = (
        four["rose - memit"]["relative"] >= 0.5
        and four["rose - memit_merge"]["low"] > 0
        and four["rose"]["all_facts"] >= 0.9
    )
    return _claim(
        "RoSE",
        "instruction recall at n = 4 at least 1.5 times memit's and above memit_merge's, all facts at least 0.9",
        "as stated",
        holds,
        numbers,
    )


def corners(k: _Kept) -> dict[str, Any] | None:
    """Four corners: integration and metric."""
    names = {"minnorm x identity": "rose", "minnorm x covariance": "rose:metric=covariance", "joint x identity": "rose:integrate=joint",
             "joint x covariance": "rose:integrate=joint:metric=covariance"}  # fmt: skip
    if not k.has(*(f"same/4/{s}" for s in names.values())):
        return None
    rows = {c: k.rows(f"same/4/{s}") for c, s in names.items()}
    subjects = k.subjects("same/4/rose")
    numbers: dict[str, Any] = {c: {x: round(k.mean(f"same/4/{s}", x), 4) for x in ("instruction", "edit_form", "all_facts", "efficacy_strict", "r_specificity", "s_specificity")} for c, s in names.items()}  # fmt: skip
    effects = {}
    for effect, (ones, twos) in {
        "minnorm - joint": (("minnorm x identity", "minnorm x covariance"), ("joint x identity", "joint x covariance")),
        "identity - covariance": (
            ("minnorm x identity", "joint x identity"),
            ("minnorm x covariance", "joint x covariance"),
        ),
    }.items():
        halves = [
            [{"x": float(np.mean([rows[c][i]["instruction"] for c in cs]))} for i in range(len(subjects))]
            for cs in (ones, twos)
        ]
        effects[effect] = {n: round(v, 4) for n, v in paired(halves[0], halves[1], subjects, "x").items()}
    holds = all(e["low"] > 0 for e in effects.values())
    return _claim(
        "RoSE",
        "both pathologies matter: joint optimisation and the covariance metric",
        "both main effects on instruction recall above 0",
        holds,
        numbers | {"effects": effects},
    )


def trap(k: _Kept) -> dict[str, Any] | None:
    """The covariance trap against the drift law."""
    if "drift" not in k.found:
        return None
    blocks = k.found["drift"]["delivery"]
    numbers = {b: {m: {x: round(r[x], 4) for x in ("off", "expected", "amplification")} for m, r in d["rows"].items()} | {"predicted": d["predicted"], "observed": d["observed"], "pairs": d["n_keys"] * d["n_texts"][0]} for b, d in blocks.items()}  # fmt: skip
    worse = all(
        d["rows"][m]["off"] > d["rows"]["identity"]["off"]
        for d in blocks.values()
        for m in ("covariance", "nullspace")
        if m in d["rows"]
    )
    best = all(d["observed"] == "drift" for d in blocks.values())
    right = sum(d["predicted"] == d["observed"] for d in blocks.values()) / len(blocks)
    return _claim("RoSE", "covariance and null space deliver worse under drift than identity; the drift metric best; the diagnostic predicts which",
                  "at every edited block", worse and best and right == 1, {"worse": worse, "drift_best": best, "predicted_right": right, "blocks": numbers})  # fmt: skip


def minima(k: _Kept) -> dict[str, Any] | None:
    """Orthogonal gradients, sharp minima, and what tolerance predicts."""
    if "landscape" not in k.found:
        return None
    found = k.found["landscape"]
    if len(found["minnorm"]["subjects"]) < FEWEST:
        return None
    sharp = {n: [abs(s["sharpness"]) for s in d["subjects"]] for n, d in found.items()}
    rows = [[{"x": float(np.log(v))} for v in sharp[n]] for n in ("joint", "minnorm")]
    ratio = paired(rows[0], rows[1], [str(i) for i in range(len(rows[0]))], "x")
    cosine = float(np.mean([c for s in found["minnorm"]["subjects"] for c in s["cosines_before"]]))
    auc = {n: d.get("aucs", d["auc"]) for n, d in found.items()}
    numbers = {"mean gradient cosine": cosine, "log sharpness, joint - minnorm": ratio, "auc": auc, "n": len(rows[0]),
               "median sharpness": {n: float(np.median(v)) for n, v in sharp.items()}}  # fmt: skip
    return _claim(
        "RoSE",
        "gradients of a subject's facts are nearly orthogonal and joint minima sharper",
        "mean cosine at most 0.3 and joint sharper, interval above 0",
        cosine <= 0.3 and ratio["low"] > 0,
        numbers,
    )


def predicts(k: _Kept) -> dict[str, Any] | None:
    """One inequality predicts success."""
    if "landscape" not in k.found:
        return None
    if len(k.found["landscape"]["minnorm"]["subjects"]) < FEWEST:
        return None
    auc = {n: d["auc"] for n, d in k.found["landscape"].items()}
    return _claim(
        "RoSE",
        "tolerance over drift predicts where the answer stays",
        "AUC at least 0.6",
        all(a is not None and a >= 0.6 for a in auc.values()),
        auc,
    )


def statistics(k: _Kept) -> dict[str, Any] | None:
    """Identity against covariance."""
    pairs = {
        "rome": ("single/rome", "single/rome:metric=covariance"),
        "memit": ("single/memit:metric=identity", "single/memit"),
    }
    numbers = {n: k.compare(a, b, "s_specificity") for n, (a, b) in pairs.items() if k.has(a, b)}
    if not numbers:
        return None
    return _claim(
        "ours",
        "statistics are not needed",
        "S-specificity at most 0.03 lower without",
        all(v["difference"] >= -0.03 for v in numbers.values()),
        numbers,
    )


def bound(k: _Kept) -> dict[str, Any] | None:
    """Certificates on fresh prompts."""
    made = k.found.get("certify")
    if not made or made["runs"] < FEWEST:
        return None
    noise = 1.64 * (0.05 * 0.95 / made["runs"]) ** 0.5
    return _claim(
        "ours",
        "the certified bound holds on fresh prompts",
        "exceeded in at most 5 % of runs, plus noise",
        made["exceeded"] <= 0.05 + noise,
        {"runs": made["runs"], "exceeded": made["exceeded"]},
    )


def exact(k: _Kept) -> dict[str, Any] | None:
    """Undo."""
    made = k.found.get("undo")
    return made and _claim(
        "ours", "undo is exact in any order", "every bit", made["half_equals_never"] and made["all_equals_base"], made
    )


def bounded(k: _Kept) -> dict[str, Any] | None:
    """A limit on drift during the search against the fixed weights."""
    specs = sorted({n.split("/")[1] for n in k.found if n.startswith("bounded/")})
    numbers: dict[str, Any] = {}
    for spec in specs:
        for name in (n for n in k.found if n.startswith(f"bounded/{spec}/")):
            (row,) = k.found[name]["methods"].values()
            numbers.setdefault(spec, {})[name.rpartition("/")[2]] = {
                m: round(row[m], 4) for m in (*CLASSIC, "score", "s_kl", "r_kl", "s_same", "r_same") if m in row
            }
    numbers = {spec: rows for spec, rows in numbers.items() if len(rows) > 1 and "0.0" in rows}
    if not numbers:
        return None  # nothing to compare a limit with
    lower = all(v["s_kl"] <= rows["0.0"]["s_kl"] for rows in numbers.values() for v in rows.values())
    return _claim(
        "ours",
        "a limit on drift during the search lowers the neighbours' drift that is measured",
        "mean KL of neighbours not above the fixed weights'",
        lower,
        numbers,
    )


CLAIMS: Sequence[Any] = (rets, rets_constraint, top_balance, shortcut, merging, rose, corners, trap, minima, predicts, statistics, bound, exact, bounded)  # fmt: skip
