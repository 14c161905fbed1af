"""Lets the page's tests use what makes tiny models, recommenders and adapters for the verbs' own tests."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / verb) for verb in ("slim", "recommend", "fuse")]
