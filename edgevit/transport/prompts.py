"""What a connection may ask of the person who started it: to trust a host key, or for a secret. Nothing else."""

from __future__ import annotations

import getpass
import sys
import threading
from typing import Protocol


class Prompts(Protocol):
    """Questions to a person. Secrets are handed on to the login and kept nowhere."""

    def trust_host_key(self, question: str) -> bool | None:
        """Show ``question`` (host and fingerprint) and return the answer; None where nobody can be asked."""

    def secret(self, text: str) -> str | None:
        """Ask for a password or passphrase without showing it; None where nobody can be asked or nothing was typed."""


class NoPrompts:
    """For scripts: nobody can be asked."""

    def trust_host_key(self, question: str) -> bool | None:
        return None

    def secret(self, text: str) -> str | None:
        return None


class TerminalPrompts:
    """Asks on the terminal where standard input and standard error are one, else answers like :class:`NoPrompts`."""

    # Several targets connect at once; a person can answer one question at a time.
    _one_at_a_time = threading.Lock()

    def _has_terminal(self) -> bool:
        return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()

    def trust_host_key(self, question: str) -> bool | None:
        if not self._has_terminal():
            return None
        with self._one_at_a_time:
            sys.stderr.write(f"{question}\nTrust this key from now on? [yes/no] ")
            sys.stderr.flush()
            return sys.stdin.readline().strip().lower() == "yes"

    def secret(self, text: str) -> str | None:
        if not self._has_terminal():
            return None
        with self._one_at_a_time:
            try:
                return getpass.getpass(f"{text}: ") or None
            except EOFError:
                return None
