"""How pictures of a report are drawn: matplotlib that becomes small, accessible, inline SVG.

Equal input gives equal bytes. Text stays text and takes the colour of the page (``currentColor``), so a picture reads
on white and on black. Every user's text is taken literally. `_plots` draws with what is here.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import re
import threading
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import UserError

__all__ = ["Picture", "clean", "need", "shown"]

WIDTH = 700
"""Width of every picture in units of its view box; at that width in pixels the text is 12 pixels high."""

INK = "#767677"  # stands for the page's text colour; odd on purpose, so that nothing else is replaced with it
BLUE, RED = "#0072b2", "#d55e00"
COLOURS = (BLUE, RED, "#009e73", "#b65f94", "#a67c00", INK)  # Okabe and Ito; three darkened to show on white too
_STYLE = {
    "font.size": 12, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "grid.color": INK, "grid.alpha": 0.25, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.borderpad": 0, "legend.columnspacing": 1.5,
    "hatch.color": "#ffffff", "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "retouch", "figure.dpi": 72,
}  # fmt: skip
_TAGS = {
    "svg",
    "g",
    "path",
    "pattern",
    "text",
    "tspan",
    "use",
    "defs",
    "clipPath",
    "rect",
    "circle",
    "line",
    "title",
    "desc",
}
_UNSAFE = re.compile(r"url\s*\((?!\s*#)|\\|@import|expression\s*\(", re.IGNORECASE)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
_LOCK = threading.RLock()  # matplotlib's style is global for the time of one drawing


@dataclass(frozen=True)
class Picture:
    """Hold one drawing of a report.

    Args:
        title: A sentence that says what is seen.
        svg: The drawing as one ``<svg>`` element that can stand inside a page.
        caption: How to read it; also its text for those who do not see it.

    Raises:
        ValueError: `svg` is not XML, or holds a script, a style sheet or a link to the outside.
    """

    title: str
    svg: str
    caption: str

    def __post_init__(self) -> None:
        try:
            root = ET.fromstring(self.svg)
        except ET.ParseError as error:
            raise ValueError(
                f"The picture {self.title!r} is not XML: {error}. Make it with a plot_ function."
            ) from error
        for element in root.iter():
            _check_inert(element, self.title)


def _check_inert(element: ET.Element, title: str) -> None:
    tag = _local(element.tag)
    bad = [tag] if tag not in _TAGS else []
    for name, value in element.attrib.items():
        link = _local(name) in {"href", "src"} and not value.startswith("#")
        if _local(name).lower().startswith("on") or link or _UNSAFE.search(value):
            bad.append(f"{tag} {_local(name)}={value!r}")
    if bad:
        raise ValueError(f"The picture {title!r} may only draw; it holds {bad[0]}. Make it with a plot_ function.")


def need(module: str) -> Any:
    """Import a module of the extra ``plot``.

    Raises:
        UserError: It is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"Reports with pictures need {module.partition('.')[0]}, which cannot be imported ({error}). "
            "Install it with: pip install 'retouch[plot]'"
        ) from error


def clean(text: object) -> str:
    r"""Put a text on one line, without the characters that steer a terminal or break XML.

    Example:
        >>> clean("Paris\n\x1b[31mLyon")
        'Paris �[31mLyon'
    """
    return _CONTROL.sub(lambda found: " " if found[0] in "\t\n\r\x0b\x0c\u2028\u2029" else "\ufffd", str(text))


def shown(value: object, digits: int = 4) -> str:
    """Write a value for people: thousands are grouped, floats have `digits` significant digits, nothing is a dash.

    Example:
        >>> shown(50257), shown(0.123456), shown(None), shown(True)
        ('50,257', '0.1235', '–', 'yes')
    """
    if hasattr(value, "tolist"):  # numpy or torch
        value = value.tolist()
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return clean(value)
    return f"{value:,.0f}" if 10**digits <= abs(value) < 1e15 else f"{value:.{digits}g}"


# What the pictures share.


def draw(title: str, caption: str, height: float, paint: Callable[[Any], None]) -> Picture:
    """Draw on an empty figure, `WIDTH` by `height`, and return what became of it."""
    style, figures = need("matplotlib.style"), need("matplotlib.figure")
    buffer = io.StringIO()
    with _LOCK, style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")  # the reader's fonts draw the text, not matplotlib's
        figure = figures.Figure(figsize=(WIDTH / 72, height / 72))
        paint(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Picture(title, _inline(buffer.getvalue(), title, caption), caption)


def _inline(raw: str, title: str, caption: str) -> str:
    """Make of a file an element that can stand in a page beside others of its kind."""
    source = ET.fromstring(raw)
    prefix = "p" + hashlib.sha256((title + raw).encode()).hexdigest()[:10] + "-"
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', raw))
    root = _bare(source, prefix, used)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {
        "xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria-labelledby": f"{prefix}title {prefix}desc",
        "color": INK, "font-family": "system-ui, sans-serif", "stroke-linejoin": "round",
    }  # fmt: skip
    for place, (tag, text) in enumerate((("title", title), ("desc", caption))):
        element = ET.Element(tag, id=prefix + tag)
        element.text = clean(text)
        root.insert(place, element)
    return ET.tostring(root, encoding="unicode")


def _bare(source: ET.Element, prefix: str, used: set[str]) -> ET.Element:
    """Copy an element without namespaces, metadata, style sheets and names that nothing refers to."""
    copy = ET.Element(_local(source.tag))
    for name, value in source.attrib.items():
        if name != "id":
            value = re.sub(r"font-family:[^;]*;? ?", "", value).replace(INK, "currentColor")
            copy.set(_local(name), value.replace("url(#", f"url(#{prefix}"))
        elif value in used:
            copy.set(name, prefix + value)
    if "href" in copy.attrib:
        copy.set("href", "#" + prefix + copy.attrib["href"].removeprefix("#"))
    copy.text = source.text if source.text and source.text.strip() else None
    copy.extend(_bare(e, prefix, used) for e in source if _local(e.tag) not in {"metadata", "style"})
    return copy


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def axes_at(figure: Any, left: float, right: float, top: float, bottom: float) -> Any:
    """Add axes that leave these margins, in units of the view box."""
    height = figure.get_figheight() * 72
    return figure.add_axes(
        (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - top - bottom) / height)
    )


def axes_of_rows(figure: Any, names: list[str], right: float) -> Any:
    """Add axes with one named row for each name, from the top."""
    axes = axes_at(figure, margin(names), right, 34, 52)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    return axes


def beside(axes: Any, row: float, text: str) -> None:
    """Write a text to the right of a row."""
    axes.annotate(text, (1.0, row), (8, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                  annotation_clip=False)  # fmt: skip


def log_x(axes: Any, low: float, high: float) -> None:
    """Make the horizontal axis logarithmic, with numbers in full."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")


def legend(axes: Any, handles: list[Any], names: list[str], columns: int = 4) -> None:
    """Put the legend above the axes, on the left."""
    labels = ["\u200b" + short(n, 24) for n in names]  # matplotlib leaves out what begins with an underscore
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=columns, borderaxespad=0)


def short(text: str, columns: int = 34) -> str:
    """Shorten a text in its middle to a number of terminal columns, so that it fits its margin."""
    text = clean(text).strip()
    if _columns(text) <= columns:
        return text
    head, tail = text[:columns], text[-columns:]
    while _columns(head) > 0.6 * columns:
        head = head[:-1]
    while _columns(tail) > columns - 1 - _columns(head):
        tail = tail[1:]
    return head.rstrip() + "…" + tail.lstrip()


def _columns(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def margin(names: list[str]) -> float:
    """Give the room that the names of rows need, in units of the view box."""
    return 20 + 6.8 * max(map(_columns, names))
