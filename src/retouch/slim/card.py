"""The card of a slim model: what it costs, what it answers, what is proved, how it is opened, what it cannot do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..change import versions
from ..report import Table, mark, mark_table
from .points import USUAL_TOKENS

if TYPE_CHECKING:
    from .api import Slim

__all__ = ["card", "exits_table", "measured", "sentences", "sizes_table"]

_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_SPLITS = {
    "test": "test rows, which chose nothing",
    "calib": "calibration rows, which chose the threshold too",
    "valid": "validation rows, which chose the state of the weights too",
}


def card(slim: Slim, command: str = "") -> str:
    """Write the ``README.md`` of a slim model's folder: Markdown with the header that model hubs read.

    Args:
        slim: The model, measured.
        command: The command that made it, after those that its record names; empty leaves it out.
    """
    parts = [
        _header(slim),
        f"# {mark(_title(slim))}",
        mark(_summary(slim)),
        *_section("Size and cost", sizes_table(slim)),
        *_section("Quality", _quality_table(slim), measured(slim)),
        *_section("Exits", exits_table(slim), _exits_caption(slim)),
        "## Threshold",
        *map(mark, sentences(slim)),
        "## How to open it",
        _OPEN_PAIRS if slim.classifier.pairs else _OPEN,
        "## How it was made",
        _made(slim, command),
        "## Limits",
        "\n".join(f"- {mark(limit)}" for limit in _limits(slim)),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, table: Table, caption: str = "") -> list[str]:
    return [f"## {title}", "\n".join(mark_table(table)), *([mark(caption)] if caption else [])]


# ---------------------------------------------------------------- the header


def _header(slim: Slim) -> str:
    """Write the header; what is quoted as in JSON is quoted as YAML has it, too."""
    task = slim.record["task"]
    source, kind = str(slim.record["source"]), "text-classification"  # the hub files regressions there as well
    lines = ["library_name: transformers", f"pipeline_tag: {kind}", f"tags: [retouch, slim, early-exit, {kind}]"]
    if _HUB.fullmatch(source) and not Path(source).exists():
        lines.append(f"base_model: {_quoted(source)}")
    metric = {"type": task["metric"], "value": round(slim.point.quality, 4), "name": f"{task['metric']}, early exits"}
    data = {"name": task["name"], "type": task["name"], "split": slim.measured_on}
    result = {"task": {"type": kind}, "dataset": data, "metrics": [metric]}
    lines += [f"metrics: [{task['metric']}]", "model-index:"]
    lines += [f"- {_quoted({'name': _title(slim), 'results': [result]})}"]
    return "\n".join(["---", *lines, "---"])


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=True)


# ---------------------------------------------------------------- the tables


def _title(slim: Slim) -> str:
    return f"{slim.record['source']}, made slim for {slim.record['task']['name']}"


def _times(ratio: float) -> str:
    return f"1/{1 / ratio:.3g}" if ratio > 0 else "0"


def _summary(slim: Slim) -> str:
    kept = f" ({slim.point.quality_kept:.1%} of it)" if slim.quality_base > 0 else ""
    return (
        f"{_times(slim.plan.params_ratio)} of the parameters and {_times(slim.point.flops_ratio)} of the FLOPs of the "
        f"original, with {len(_exits(slim))} exits after {slim.classifier.network.size.blocks} blocks. "
        f"{slim.record['task']['metric'].capitalize()} is {slim.point.quality:.4g}, the original's "
        f"{slim.quality_base:.4g}{kept}."
    )


def _exits(slim: Slim) -> tuple[int, ...]:
    exits: tuple[int, ...] = slim.classifier.network.widths.exits
    return exits


def sizes_table(slim: Slim) -> Table:
    """Return what was cut, and what it costs now."""
    from .widths import base_cost, cost

    network, size = slim.classifier.network, slim.plan.size
    n = sum(p.numel() for p in network.parameters())
    widths, last = network.widths, network.size.blocks - 1
    flops = cost(network.size, widths, USUAL_TOKENS, last), base_cost(size, USUAL_TOKENS)
    usual = slim.flops_ratio_128
    rows = (
        ("parameters", f"{round(n / slim.plan.params_ratio):,}", f"{n:,}", _times(slim.plan.params_ratio)),
        ("FLOPs a text, measured mean", "1", f"{slim.point.flops_ratio:.4f}", _times(slim.point.flops_ratio)),
        (f"FLOPs, every text {USUAL_TOKENS} tokens", "1", f"{usual:.4f}", _times(usual)),
        (f"MFLOPs, {USUAL_TOKENS} tokens, all blocks", f"{flops[1] / 1e6:,.0f}", f"{flops[0] / 1e6:,.0f}",
         _times(flops[0] / flops[1])),
        ("blocks", str(size.blocks), str(network.size.blocks), ""),
        ("blocks that ran, mean", str(size.blocks), f"{slim.point.exit_layer:.2f}", ""),
        ("attention heads a block", str(size.heads), _each(widths.heads), ""),
        ("MLP neurons a block", str(size.d_ff), _each(widths.d_ff), ""),
        ("rank of the word embedding", "full", str(widths.rank or "full"), ""),
    )  # fmt: skip
    return Table("Size and cost", ("", "original", "slim", "share"), rows)


def _each(widths: tuple[int, ...]) -> str:
    return str(widths[0]) if len(set(widths)) == 1 else ", ".join(map(str, widths))


def _quality_table(slim: Slim) -> Table:
    never, at = slim.curve[0], slim.point
    rows = [("original", slim.quality_base, None, 1.0), ("slim, all blocks", never.quality, never.quality_kept, never.flops_ratio)]  # fmt: skip
    rows.append(("slim, leaving early", at.quality, at.quality_kept, at.flops_ratio))
    if slim.quality_base <= 0:  # there is no share of nothing
        rows = [(name, found, None, flops) for name, found, _, flops in rows]
    columns = "", str(slim.record["task"]["metric"]), "of the original's", "FLOPs"
    return Table("Quality", columns, tuple((a, b, None if c is None else f"{c:.1%}", d) for a, b, c, d in rows))


def exits_table(slim: Slim) -> Table:
    """Return who leaves at each exit, and how many of them are answered right."""
    rows = ((f"block {l}", f"{share:.1%}", slim.point.quality_at[l]) for l, share in slim.point.leaves.items())
    return Table("Exits", ("exit after", "leave there", "right there"), tuple(rows))


def _exits_caption(slim: Slim) -> str:
    n = len(slim.point.leaves)
    return f"Blocks count from 0. {n} exits are asked: that is how finely a text's cost can follow its difficulty."


# ---------------------------------------------------------------- the sentences


def measured(slim: Slim) -> str:
    """Say on what it was measured."""
    rows: Mapping[str, int] = slim.record["task"].get("recipe", {}).get("rows", {})
    n = f"{rows[slim.measured_on]:,} " if slim.measured_on in rows else ""
    return f"Measured on {n}{_SPLITS[slim.measured_on]}; data: {slim.record['task']['name']}."


def sentences(slim: Slim) -> list[str]:
    """Say which threshold was chosen, what is proved about it, and what is not."""
    if slim.threshold is None:
        return ["No limit was asked for that would choose a threshold: nobody leaves early. All blocks run."]
    found = slim.threshold
    rule = f"rule {slim.rule.name}" + (", a temperature for each exit" if slim.rule.temperatures else "")
    if found.reachable and found.saved == 0:
        told = ["The threshold is 0: nobody leaves early."]
    elif found.reachable:
        told = [f"A text leaves at the first exit whose uncertainty is below {found.saved:.6g} ({rule})."]
    else:
        told = ["What was asked does not hold, so the saved threshold is 0: nobody leaves early."]
    told += found.sentences()
    if found.certificate is None:
        told.append("No limit of harm was asked for, so no harm is certified.")
    if found.certificate is not None and "recalibrated_on" in slim.record:
        told.append("Harm is measured against the slim model itself at full depth: the original was not at hand.")
    return told + ([] if slim.likeness is None else [slim.likeness.sentence()])


_OPEN = """```python
import retouch.slim  # registers the model with the Auto classes
from transformers import pipeline

classify = pipeline("text-classification", model="FOLDER")
print(classify(["a text", "another one"], truncation=True))
```

Line after line, with the exit that each text took:

```sh
echo "a text" | retouch slim FOLDER --predict -
```"""

_OPEN_PAIRS = (
    _OPEN.replace('["a text", "another one"]', '[{"text": "a text", "text_pair": "another one"}]')
    .replace("Line after line,", "Line after line, a tab between the two texts,")
    .replace('echo "a text" |', 'printf "a text\\tanother one\\n" |')
)


def _made(slim: Slim, command: str) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in slim.method.to_dict().items())
    asked = ", ".join(f"{k} {v:.4g}" for k, v in slim.budget.to_dict().items() if isinstance(v, float))
    rows: Mapping[str, int] = slim.record["task"].get("recipe", {}).get("rows", {})
    lines = [f"Method {slim.method.name}: {settings}", f"Asked for: {asked}"]
    lines += [f"Rows: {', '.join(f'{split} {n:,}' for split, n in rows.items())}"] if rows else []
    if chosen := slim.record.get("recalibrated_on"):
        lines.append(f"Threshold chosen anew, without training, on the {chosen['rows']:,} rows of {chosen['file']}")
    if "seconds_training" in slim.record:
        lines.append(
            f"Training took {slim.record['seconds_training']:,.0f} s; finished stages that were at hand took none"
        )
    lines += [" ".join(one) for one in versions().items()]
    shown = "\n".join(f"- {mark(line)}" for line in lines)
    commands = "\n".join([*slim.record.get("commands", ()), *filter(None, [command])])
    return f"{_block(commands)}\n\n{shown}" if commands else shown


def _block(command: str) -> str:
    """Fence a command; a fence longer than any run of backticks in it holds whatever it says."""
    longest = max(map(len, re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{command}\n{fence}"


def _limits(slim: Slim) -> list[str]:
    """Say what a user must not expect."""
    limits = [
        "It answers what its training rows asked, in their language and with their labels, and inherits the original's "
        "mistakes and prejudices.",
        f"Texts are cut to {slim.classifier.max_tokens} tokens.",
        "Thresholds and certificates hold for texts like the calibration rows. For other texts choose the threshold "
        "anew: retouch slim FOLDER --recalibrate --calib ROWS --flops SHARE.",
        "FLOPs are matrix products of each text at its own length. Time falls by less; measure it on your machine.",
    ]
    if slim.measured_on != "test":
        limits.append("There were no test rows: the quality above is that of rows which made a choice, and flatters.")
    silent = [str(l) for l, share in slim.point.leaves.items() if share == 0]
    if silent and slim.threshold is not None:
        limits.append(f"On the measured rows nobody left after block {', '.join(silent)}.")
    if slim.record["task"]["metric"] in ("f1", "mcc", "spearman"):
        limits.append(f"Certificates are about answers, one by one, and not about {slim.record['task']['metric']}.")
    return limits
