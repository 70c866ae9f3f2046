"""What the agent raises: one class, whose ``code`` the host maps to its own errors."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from device_agents import wire

REFUSAL_CODES = (
    "no-python", "no-numpy", "no-runtime", "no-ssh-keygen", "no-signers", "bad-signature", "unknown-signer",
    "bad-manifest", "bad-chunks", "newer-schema", "agent-too-old", "older-version", "digest-mismatch", "no-space", "io-error",
    "not-installed", "blob-missing", "blob-damaged", "no-such-artifact", "does-not-fit", "provider-missing",
    "provider-mismatch", "scheme-refused", "runtime-too-old", "golden-mismatch", "bad-job", "no-such-run", "worker-timeout",
    "worker-died", "worker-memory", "worker-failed", "no-profiler", "busy", "interrupted", "bad-request", "no-previous",
    "no-active", "run-damaged", "no-systemd", "needs-root", "no-daemon", "no-pillow", "bad-image",
    "locked",
)  # fmt: skip
"""Every code a refusal can carry. Stable: hosts of other versions know them."""


class Refused(Exception):
    """The agent does not do what was asked. ``str(error)`` says what, got, expected; ``hint`` what to do about it."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        if code not in REFUSAL_CODES:
            raise ValueError("{!r} is not a refusal code".format(code))
        super().__init__(message)
        self.code = code
        self.hint = hint

    def to_wire(self) -> wire.Refusal:
        """The same as it crosses the wire: control characters made visible, over-long texts cut at the declared limits."""
        from device_agents import wire  # a daemon waits for months without it

        return wire.Refusal(code=self.code, message=printable(str(self))[:20_000], hint=printable(self.hint)[:4_000])


class Cancelled(Exception):
    """Somebody asked for the end of the run at work."""


def printable(text: str) -> str:
    """``text`` as wire texts may hold it: control characters and lone surrogates replaced."""
    return "".join(
        c if c in "\n\t" or (ord(c) >= 32 and not 0xD800 <= ord(c) <= 0xDFFF) else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def refuse_os_error(error: OSError, doing: str) -> Refused:
    """An operating system error as a refusal: ``no-space`` where the disk or quota is full, else ``io-error``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Refused("no-space", "{}: {}".format(doing, error), "edgevit target prune TARGET, or make room on the device")
    return Refused("io-error", "{}: {}".format(doing, error))
