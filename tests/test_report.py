"""Reports: escaped, accessible, alone in their file, equal for equal input, and complete at any width."""

from __future__ import annotations

import functools
import io
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from retouch import report as r
from retouch._pictures import COLOURS, clean, shown
from retouch._sheet import Sheet
from retouch.errors import StoreError

HOSTILE = "<script>alert('x')</script>\"&amp;{{ 7*7 }}{% raw %}]]>-->\x1b[31m\x00$a_b$ \u202e"
VOID = {"meta", "br", "link", "img", "input", "hr"}
SVG = "{http://www.w3.org/2000/svg}"


def drawn(text: str = "Lyon") -> tuple[r.Picture, ...]:
    return (
        r.plot_ranks([text, "東京 → 大阪", "_under"], [2417, 88, 1], [1, 3, 1]),
        r.plot_drift({text: [0.0, 1e-9, 0.003, 0.2, math.inf], "none": []}, 0.05),
        r.plot_drift({"alone": [0.001]}),
        r.plot_where({"blocks.3.mlp.down": 0.01, "blocks.4.mlp.down": 0.02, "blocks.3.mlp.up": 0.005, text: 0.001}, 12),
        r.plot_curve([0, 1, 2], {text: [3.0, 1.0, math.nan], "_b": [1.0, 2.0, 3.0]}, text, "loss in nats"),
        r.plot_curve([1, 10, 1000], {"score": [1.0, 0.5, 1e-5]}, "facts", "score"),
        r.plot_bars(
            {"score": {text: 0.9, "rome": 0.8}, "seconds_per_fact": {text: 3.0, "rome": None}, text: {"rome": -1}}
        ),
    )


pictures = functools.cache(drawn)


def sample(text: str = "Lyon") -> r.Report:
    return r.Report(
        title=text,
        summary=f"One {text}.",
        model=text,
        tables=(
            r.Table(text, ("fact", text, "rank"), ((text, None, 50257), ("b", True, np.int64(3))), caption=text),
            r.Table("Harm", ("measure", "value"), (("KL", 0.0312), ("bound", 1.5))),
        ),
        pictures=pictures(text),
        numbers={text: [1, 2.5, math.nan], "array": np.array([[1, 2]]), "path": Path("a")},
        notes=(text,),
        environment={"retouch": text},
    )


class Page(HTMLParser):
    """Checks nesting, and collects what a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append((self.open[-1] if self.open else "", data))

    def text(self, *tags: str) -> str:
        return " ".join(words for tag, words in self.words if tag in tags)


@pytest.fixture(scope="module")
def hostile_page() -> str:
    return r.to_html(sample(HOSTILE))


def test_page_is_well_formed_and_shows_hostile_text_literally(hostile_page: str) -> None:
    page = Page(hostile_page)
    literal = "<script>alert('x')</script>\"&amp;{{ 7*7 }}{% raw %}]]>-->\ufffd[31m\ufffd$a_b$ \u202e"
    for tag in ("title", "h1", "h3", "figcaption", "strong", "th", "li", "bdi", "desc"):
        assert literal in page.text(tag), tag
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "link", "img", "object", "form", "foreignobject"}
    assert not re.search("[\x00-\x08\x0b-\x1f]", hostile_page)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_page_loads_nothing_from_elsewhere(hostile_page: str) -> None:
    page = Page(hostile_page)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in {"href", "src", "xlink:href", "action"}:
                assert value and value.startswith("#"), (tag, name, value)
            elif not name.startswith("xmlns"):
                assert "//" not in (value or ""), (tag, name, value)
            assert not re.search(r"url\((?!#)", value or "")
    assert "@import" not in hostile_page and "url(" not in page.text("style")
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_page_is_accessible(hostile_page: str) -> None:
    page = Page(hostile_page)
    tags = page.tags
    assert dict(tags[0][1])["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert all(a.get("scope") in {"col", "row"} for tag, a in tags if tag == "th")
    assert sum(tag == "caption" for tag, _ in tags) == sum(tag == "table" for tag, _ in tags) == 2
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = {word for _, a in tags for word in (a.get("aria-labelledby") or "").split()}
    links = {a["href"][1:] for _, a in tags if a.get("href")}  # type: ignore[index]
    assert named and links and named | links <= set(ids)
    assert "prefers-color-scheme: dark" in hostile_page and "@media print" in hostile_page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_has_good_contrast(hostile_page: str, scheme: str) -> None:
    style = Page(hostile_page).text("style")
    themes = re.findall(r":root \{(.*?)\}", style)
    colours = dict(re.findall(r"--(\w+): (#\w+)", themes[scheme == "dark"]))

    def light(code: str) -> float:
        code = code[1:] if len(code) == 7 else "".join(c * 2 for c in code[1:])
        parts = [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        high, low = sorted((light(one), light(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert contrast(colours["ink"], colours["page"]) >= 7
    assert contrast(colours["soft"], colours["page"]) >= 4.5
    assert all(contrast(colour, colours["page"]) >= 3 for colour in COLOURS)


def test_each_picture_is_xml_with_title_and_description() -> None:
    for picture in pictures(HOSTILE):
        root = ET.fromstring(picture.svg)
        assert root.tag == SVG + "svg" and root.get("role") == "img"
        assert root.get("viewBox", "").startswith("0 0 700 ")
        title, desc = root.find(SVG + "title"), root.find(SVG + "desc")
        assert title is not None and desc is not None
        assert root.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
        assert title.text and title.text.endswith(".") and title.text == clean(picture.title)
        assert desc.text == clean(picture.caption)
        assert not root.findall(f".//{SVG}style") and "DejaVu" not in picture.svg
        texts = list(root.iter(SVG + "text"))
        assert texts and all("currentColor" in (e.get("style") or "") for e in texts)


def test_pictures_say_what_they_show() -> None:
    ranks, drift, alone, where, curves, curve, bars = pictures()
    assert ranks.title == "The new answer comes first for 2 of 3 facts after the change; before: 1."
    assert drift.title == "The median neighbour moved by 0.003 nats; 2 of 5 exceed 0.05 nats."
    assert alone.title == "The median neighbour moved by 0.001 nats."
    assert where.title == (
        "The change sits in blocks 3 to 4 of 12 and outside the blocks; the most moved weight is blocks.4.mlp.down, "
        "by 2 % of its norm."
    )
    assert curves.title == "In the end, loss in nats is lowest for Lyon (1) and highest for _b (3)."
    assert curve.title == "Score goes from 1 to 1e-05."
    assert bars.title == "Score is highest for Lyon (0.9) and lowest for rome (0.8)."
    assert words(ranks) >= {"2,417 → 1", "88 → 3", "1 → 1", "Lyon", "東京 → 大阪", "_under", "1,000"}
    assert {"median 0.003", "limit 0.05", "no values"} <= words(drift)
    assert {str(block) for block in range(12)} | {"mlp.down", "mlp.up", "Lyon", "2"} <= words(where)
    assert {"Lyon", "_b", "loss in nats"} <= words(curves)
    assert {"score (logarithmic)", "facts (logarithmic)"} <= words(curve)
    assert {"score", "seconds per fact", "0.9", "–", "Lyon", "rome"} <= words(bars)


def words(picture: r.Picture) -> set[str]:
    return {"".join(e.itertext()).strip().lstrip("\u200b") for e in ET.fromstring(picture.svg).iter(SVG + "text")}


def test_ranks_stand_where_the_logarithm_puts_them() -> None:
    root = ET.fromstring(r.plot_ranks(["a", "b", "c"], [1, 100, 10_000], [1, 1, 1]).svg)
    rings = [float(e.get("x", "nan")) for e in root.iter(SVG + "use") if "d55e00" in (e.get("style") or "")][:3]
    assert rings[2] - rings[1] == pytest.approx(rings[1] - rings[0], rel=1e-4)


def test_many_facts_show_the_worst() -> None:
    n = 200
    picture = r.plot_ranks([f"fact {i}" for i in range(n)], [500] * n, [i + 1 for i in range(n)])
    assert "fact 199" in words(picture) and "fact 160" in words(picture) and "fact 159" not in words(picture)
    assert "comes first for 1 of 200 facts" in picture.title and "worst" in picture.caption


def test_large_groups_are_thinned_and_keep_their_ends() -> None:
    picture = r.plot_drift({"big": [1e-5 * 1.002**i for i in range(5000)]}, limit=0.1)
    root = ET.fromstring(picture.svg)
    marks = [e for e in root.iter(SVG + "use") if re.search("0072b2|d55e00", e.get("style") or "")]
    assert len(marks) == 300 and "thinned" in picture.caption
    assert "390 of 5000" in picture.title  # 1.002**i > 1e4 from i = 4610 on


def test_equal_input_gives_equal_bytes_here_and_in_another_process(hostile_page: str) -> None:
    page = r.to_html(sample())
    assert hostile_page == r.to_html(sample(HOSTILE))
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}; import test_report as t; "
    code += "sys.stdout.buffer.write(t.r.to_html(t.sample()).encode() + b'%r' % ('matplotlib.pyplot' in sys.modules))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert other.stdout.decode() == page + "False"


def test_drawing_ignores_and_keeps_the_callers_style() -> None:
    import matplotlib

    def style() -> dict[str, Any]:
        return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}

    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path", "text.color": "red"}):
        mine = style()
        assert drawn() == pictures()
        assert style() == mine


def test_json_is_strict_and_round_trips() -> None:
    item = sample(HOSTILE)
    plain = r.to_json(item)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["numbers"] == {HOSTILE: [1, 2.5, None], "array": [[1, 2]], "path": "a"}
    assert plain["tables"][0]["rows"] == [[HOSTILE, None, 50257], ["b", True, 3]]
    assert plain["tables"][0]["columns"] == ["fact", HOSTILE, "rank"]
    assert plain["pictures"][0] == {
        "title": sample(HOSTILE).pictures[0].title,
        "caption": sample(HOSTILE).pictures[0].caption,
    }


def printed(item: r.Report, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, markup=True)
    console.print(r.to_terminal(item))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [20, 60, 120])
def test_terminal_holds_all_cells_and_no_steering(width: int) -> None:
    rows = tuple((f"the fact number {i} of Paris [bold]x[/bold]", "Lyon", i * 1000, 0.25, None) for i in range(3))
    columns = ("fact", "target", "rank before the change", "likelihood", "kept")
    item = r.Report("T\x1b[31m", "S.", "gpt2", (r.Table("Facts", columns, rows, "How."),), environment={})
    text = printed(item, width)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width
    joined = "".join(text.split())
    wanted = ["number", "Paris", "Lyon", "1,000", "2,000", "0.25", "–", "likelihood", "[bold]", "How.", "gpt2"]
    assert [w for w in wanted if w not in joined] == []
    assert joined.count("Lyon") == 3


def test_terminal_table_becomes_blocks_where_it_does_not_fit() -> None:
    table = r.Table("Facts", tuple(f"column {i}" for i in range(9)), (tuple(range(9)),))
    item = r.Report("T", "S.", "m", (table,), environment={})
    assert "column 3 3" in printed(item, 40) and "column 3 3" not in printed(item, 140)


WORDS = st.text("abc defg \u6771", min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), WORDS, st.floats(-9, 9)), min_size=1, max_size=8), st.data(), st.integers(20, 110))
def test_no_cell_and_no_column_is_cut_off_at_any_width(cells: list[Any], data: st.DataObject, width: int) -> None:
    columns = tuple(data.draw(WORDS) for _ in cells)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(Sheet(columns, (tuple(cells), tuple(cells)), ruled=data.draw(st.booleans())))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(cell_len, text.splitlines())) <= width
    letters = [c for c in "".join(columns) + 2 * "".join(shown(cell) for cell in cells) if not c.isspace()]
    assert not Counter(letters) - Counter(text)


def test_a_table_shares_the_room_and_breaks_no_short_word() -> None:
    columns = ("weight", "conflict", "share of the norm", "how far a text of many words moves the key")
    rows = (("blocks.3.attention.query", 0.3276, 0.5201, 0.4999),)
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(Sheet(columns, rows))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "blocks.3.attention.query" in text and "0.4999" in text and "conflict" in text


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=2, max_size=5), st.integers(30, 120))
def test_any_text_survives_the_terminal(cells: list[str], width: int) -> None:
    columns = tuple(f"c{i}" for i in range(len(cells)))
    text = printed(r.Report("T", "S.", "m", (r.Table("t", columns, (tuple(cells),)),), environment={}), width)
    left = set("".join(text.split()))
    assert all(set("".join(clean(cell).split())) <= left for cell in cells)


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=80), st.floats(1, 1e6), st.floats(1, 1e6))
def test_any_label_makes_a_valid_picture(label: str, before: float, after: float) -> None:
    root = ET.fromstring(r.plot_ranks([label], [before], [after]).svg)
    inside = (float(e.get("x", "0")) for e in root.iter(SVG + "use"))
    assert all(0 <= x <= 700 for x in inside)


def test_card_is_markdown_that_shows_text_literally() -> None:
    lines = r.model_card(sample("a|b *c* <i> [x](y)\n# d")).splitlines()
    assert lines[:4] == ["---", "library_name: transformers", "tags: [retouch, model-editing]", "---"]
    escaped = r"a\|b \*c\* \<i\> \[x\](y) \# d"
    assert "# " + escaped in lines
    rows = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3, 4}
    assert "| b | yes | 3 |" in rows and "| KL | 0.0312 |" in rows
    assert r"- 1\. not a list" in r.model_card(r.Report("t", "s", "m", notes=("1. not a list",), environment={}))


def test_write_replaces_one_file_in_one_step(tmp_path: Path) -> None:
    item = r.Report("T", "S.", "m", environment={})
    path = tmp_path / "new" / "report.html"
    r.write_html(item, path)
    r.write_html(sample(), path)
    assert path.read_text(encoding="utf-8") == r.to_html(sample())
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(StoreError, match="is a folder"):
        r.write_html(item, path.parent)


def test_environment_is_known_without_being_told() -> None:
    environment = r.Report("T", "S.", "m").environment
    assert {"retouch", "python", "torch"} <= environment.keys()
    assert f"torch {environment['torch']}" in printed(r.Report("T", "S.", "m"), 120)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: r.plot_ranks(["a"], [1], [1, 2]), "as many labels as values, got 1, 1 and 2"),
        (lambda: r.plot_ranks(["a"], [0], [1]), "A rank is at least 1 and finite, got 0"),
        (lambda: r.plot_drift({"a": []}), "Drift needs values"),
        (lambda: r.plot_drift({"a": [1.0]}, 0.0), "a positive limit"),
        (lambda: r.plot_drift({"a": [math.nan]}), "not NaN"),
        (lambda: r.plot_where({}, 2), "finite and not negative"),
        (lambda: r.plot_where({"blocks.2.mlp.down": 0.1}, 2), "Block 2 is not in a model of 2 blocks"),
        (lambda: r.plot_curve([1], {"a": [1.0, 2.0]}, "x", "y"), "'a' has 2 values for 1 places"),
        (lambda: r.plot_curve([1], {"a": [math.nan]}, "x", "y"), "no finite value"),
        (lambda: r.plot_bars({"score": {"rome": None}}), "at least one finite value"),
        (lambda: r.Table("t", ("a", "b"), ((1,),)), "has 2 columns, and its row 0 has 1 cells"),
        (lambda: r.Picture("t", "<svg>", "c"), "is not XML"),
    ],
)
def test_wrong_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    "inside",
    [
        "<script>x</script>",
        "<style>*{}</style>",
        "<foreignObject/>",
        '<g onload="x"/>',
        '<use href="https://example.org/a.svg#b"/>',
        '<rect fill="url(https://example.org/a)"/>',
        '<rect style="fill: u\\72l(https://example.org/a)"/>',
        '<image href="data:image/png;base64,AA"/>',
    ],
)
def test_a_picture_can_only_draw(inside: str) -> None:
    with pytest.raises(ValueError, match="may only draw"):
        r.Picture("t", f'<svg xmlns="http://www.w3.org/2000/svg">{inside}</svg>', "c")


@pytest.mark.parametrize(
    ("module", "call"), [("matplotlib", "r.plot_ranks(['a'], [2], [1])"), ("jinja2", "r.to_html(item)")]
)
def test_missing_extra_says_what_to_install(module: str, call: str) -> None:
    code = f"""
import sys
sys.modules[{module!r}] = None  # an import of it now fails as if it were not there
from retouch import report as r
from retouch.errors import UserError
item = r.Report("T", "S.", "m", environment={{}})
r.to_json(item), r.to_terminal(item), r.model_card(item)
try:
    {call}
except UserError as error:
    sys.stdout.write(str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert module in done.stdout and "pip install 'retouch[plot]'" in done.stdout


def test_import_is_light() -> None:
    code = "import sys, retouch.report; sys.stdout.write(str({'torch', 'matplotlib', 'jinja2', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()"
