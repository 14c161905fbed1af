"""The program that runs carry: it only names what is installed everywhere."""

from __future__ import annotations

from pathlib import Path

from .. import __version__

__all__ = ["FILES", "NAME", "VERSION", "write_app"]

NAME, VERSION = "retouch/retouch-edges", __version__
FILES = {
    "pyproject.toml": f"""[project]
name = "retouch-edges"
version = "{VERSION}"
description = "Edges and cloud of retouch fuse."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "retouch"

[tool.flwr.app.components]
serverapp = "retouch_edges:server"
clientapp = "retouch_edges:client"

[tool.flwr.app.config]
retouch-folder = ""
""",
    "retouch_edges.py": '''"""The app that a run carries: it only names what is installed everywhere."""

from retouch.fuse.client_app import app as client
from retouch.fuse.server_app import app as server

__all__ = ["client", "server"]
''',
}


def write_app(folder: Path) -> Path:
    """Write the program to a folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder
