"""``python -m edgevit``."""

from edgevit.cli import main

main()
