"""``python -m retouch``."""

from retouch.cli import main

main()
