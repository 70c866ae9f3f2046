"""Whom this operator believes: an allowed-signers file given by name, else the operator's own key."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgevit.errors import UsageError


@contextmanager
def own_signers(given: Path | None) -> Iterator[Path]:
    """The file given, else edgevit's allowed-signers file, else one that holds nothing but the operator's own signing key."""
    from edgevit import signing
    from edgevit.cli.key import principal

    if given is not None:
        if not given.is_file():
            raise UsageError(f"{given}: no such allowed-signers file", hint="edgevit verify BUNDLE believes your own key")
        yield _readable(given)
        return
    kept = signing.default_signers_path()
    if kept.is_file():
        yield _readable(kept)
        return
    key = signing.default_key_path()
    if not key.exists():
        raise UsageError(
            "whose signatures to believe? there is no signing key here and --signers was not given", hint="edgevit key make"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "allowed_signers"
        path.write_text(signing.allowed_signers_line(principal(), signing.public_line(key)) + "\n")
        yield path


def _readable(path: Path) -> Path:
    try:
        path.open("rb").close()
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror or e}", hint=f"ls -l {path}") from e
    return path
