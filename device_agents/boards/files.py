"""Reading the small files a kernel shows its sensors in."""

from __future__ import annotations

from pathlib import Path
from typing import Optional


def read_text(path: Path, max_bytes: int = 65_536) -> Optional[str]:
    """A small file of the kernel's, stripped of white space and NULs; None where it cannot be read."""
    try:
        with open(str(path), "rb") as f:
            return f.read(max_bytes).decode("utf-8", "replace").strip("\0 \n\t")
    except OSError:
        return None


def read_number(path: Path) -> Optional[float]:
    """A file that holds one number; None where it cannot be read or holds something else."""
    text = read_text(path)
    try:
        return float(text) if text else None
    except ValueError:
        return None
