"""Folders written whole or not at all, the cache, and the hashes that name what is in them.

A folder is built beside its place and swapped in by one rename; its ``manifest.json`` holds the size and hash of every
file. A reader therefore finds the old folder or the new one, never a mixture, whenever the writer was stopped. Names
that begin with a dot and the folder's own name (``.NAME.new-*``, ``.NAME.old-*``, ``.NAME.lock``) belong to a writer.
"""

from __future__ import annotations

from .cache import cache_dir, cached
from .files import new_file, write_json_atomic
from .folders import check_folder, recover, write_folder, writing
from .keys import digest_tensor, key, sha256_file
from .manifest import FORMAT, refuse_inside, refuse_place
from .strict_json import parse_json, read_json
from .tensors import load_tensors, save_tensors

__all__ = [
    "FORMAT",
    "cache_dir",
    "cached",
    "check_folder",
    "digest_tensor",
    "key",
    "load_tensors",
    "new_file",
    "parse_json",
    "read_json",
    "recover",
    "refuse_inside",
    "refuse_place",
    "save_tensors",
    "sha256_file",
    "write_folder",
    "write_json_atomic",
    "writing",
]
