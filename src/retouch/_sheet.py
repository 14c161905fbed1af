"""Tables on a terminal: whole at any width. What does not fit side by side becomes one small block a row.

Widths are chosen here, because a console that has to narrow a table crops the columns at its right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._pictures import clean, shown

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Sheet", "is_number", "numeric"]

_WORD = 24
"""A word longer than this, in characters, may be broken."""
_GAP = 3
"""Characters between two columns: a space, the rule or a space, a space."""


@dataclass(frozen=True)
class Sheet:
    """A table that takes another shape where the console is narrow.

    Args:
        columns: Their names.
        rows: Cells, as many a row as there are columns.
        ruled: Draw rules between the columns.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    ruled: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [[shown(cell) for cell in row] for row in self.rows]
        sizes = [_size(clean(name), [row[i] for row in cells]) for i, name in enumerate(self.columns)]
        widths = _shared(sizes, options.max_width - _GAP * (len(sizes) - 1))
        yield from [self._grid(cells, widths)] if widths else self._blocks(cells)

    def _grid(self, cells: list[list[str]], widths: list[int]) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        style = box.HEAVY_HEAD if self.ruled else box.SIMPLE_HEAD
        grid = Table(box=style, pad_edge=False, show_edge=False, header_style="bold")
        for name, width, right in zip(self.columns, widths, numeric(self.columns, self.rows)):
            grid.add_column(Text(clean(name)), justify="right" if right else "left", overflow="fold", width=width)
        for row in cells:
            grid.add_row(*map(Text, row))
        return grid

    def _blocks(self, cells: list[list[str]]) -> list[Any]:
        from rich.text import Text

        lines = []
        for row in cells:
            for i, (name, cell) in enumerate(zip(self.columns, row)):
                indent, style = ("  ", "") if i else ("", "bold")
                lines.append(Text.assemble((f"{indent}{clean(name)} ", "dim"), cell, style=style, overflow="fold"))
        return lines


def numeric(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[bool]:
    """Tell which columns hold numbers only, to set them flush right."""
    found = zip(*rows) if rows else [() for _ in columns]
    return [any(map(is_number, cells)) and all(c is None or is_number(c) for c in cells) for cells in found]


def is_number(cell: Any) -> bool:
    """Tell whether a cell is one number, of this language, NumPy or PyTorch."""
    value = cell.tolist() if hasattr(cell, "tolist") else cell
    return isinstance(value, int | float) and not isinstance(value, bool)


def _size(name: str, cells: list[str]) -> tuple[int, int]:
    """Return a column's least width, at which no short word breaks, and the width that it would like."""
    from rich.cells import cell_len

    words = (min(cell_len(word), _WORD) for text in (name, *cells) for word in text.split())
    return max(words, default=1), max(map(cell_len, (name, *cells)), default=1) or 1


def _shared(sizes: list[tuple[int, int]], room: int) -> list[int]:
    """Share the room among columns, evenly among those that want more; nothing where not even the least fits."""
    widths = [least for least, _ in sizes]
    spare = room - sum(widths)
    if spare < 0:
        return []
    while spare and (wanting := [i for i, (_, whole) in enumerate(sizes) if widths[i] < whole]):
        each = max(1, spare // len(wanting))
        for i in wanting[:spare]:
            more = min(each, sizes[i][1] - widths[i])
            widths[i], spare = widths[i] + more, spare - more
    return widths
