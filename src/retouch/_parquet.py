"""Read a Parquet file as named columns, with the errors that people need; the package is optional."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import UserError, absent

__all__ = ["parquet_columns"]


def parquet_columns(path: Path, otherwise: str) -> tuple[dict[str, list[Any]], int]:
    """Return the columns by name, and how many rows there are.

    Args:
        path: The file.
        otherwise: The formats that need no further package, for the message.

    Raises:
        UserError: The file is missing, empty or no Parquet, or the package that reads it is not installed.
    """
    try:
        parquet, arrow = import_module("pyarrow.parquet"), import_module("pyarrow")
    except ImportError as error:
        raise UserError(
            f"Reading {path.name} needs the package pyarrow: pip install pyarrow. Or save it as {otherwise}."
        ) from error
    if not path.is_file():
        raise absent(path)
    try:
        table = parquet.ParquetFile(path).read()
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path.name} cannot be read as Parquet: {error}") from error
    if not table.num_rows:
        raise UserError(f"{path.name} is empty.")
    return {name: _plain(column, arrow) for name, column in zip(table.column_names, table.columns)}, table.num_rows


def _plain(column: Any, arrow: Any) -> list[Any]:
    kind = column.type
    if arrow.types.is_timestamp(kind) and kind.unit == "ns":  # what pandas writes; Python's times end at microseconds
        column = column.cast(arrow.timestamp("us", kind.tz), safe=False)
    values: list[Any] = column.to_pylist()
    return values
