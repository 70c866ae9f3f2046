"""Every error edgevit raises on the host, in one tree.

::

    EdgevitError                     what, got, expected, where; ``hint`` is the next command to type     exit 1
    ├── UsageError                   wrong use or configuration                                           exit 2
    │   ├── ConfigError              every problem of a YAML file at once, with file and line
    │   ├── UnknownName              no such model, profile, recipe or target; did-you-mean
    │   ├── Pinned                   the fleet file pins the target to another version
    │   ├── MissingExtra             an optional part of the installation is absent
    │   ├── ModelError               weights missing, truncated, foreign; a factory that does not deliver a model
    │   └── DataError                no, unreadable or mislabelled images
    ├── BuildError                   compression or export did not do what the recipe says                exit 1
    │   ├── ExportError              an exporter failed, fell back, or wrote another file than asked
    │   └── ParityError              the artifact disagrees with the module it was exported from
    ├── BundleError                  a bundle that is damaged, unsigned, or signed by a stranger           exit 1
    ├── StoreError                   the results database                                                  exit 1
    ├── NoChoice                     measurements that leave no variant to choose                          exit 1
    ├── GateFailed                   a new version that a roll-out's gate did not let stay                 exit 1
    └── DeviceError                  a device was unreachable or refused                                   exit 3
        ├── Unreachable              no route, no answer in time, name not found
        ├── HostKeyError             unknown, changed or revoked host key
        ├── LoginError               no key or password was accepted
        ├── LostLink                 the connection ended before the answer did
        ├── NotProvisioned           the device has no Python, runtime or signers yet
        └── DeviceRefused            the agent said no; ``code`` is the agent's own

``cli/`` alone turns these into exit codes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class EdgevitError(Exception):
    """The root. ``str(error)`` is the message; ``hint`` is the next command to type, or empty."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(EdgevitError):
    """Wrong use or configuration."""


class ConfigError(UsageError):
    """A configuration file with problems; ``problems`` holds one ``file:line: …`` each, all of them."""

    def __init__(self, problems: Sequence[str], *, hint: str = "") -> None:
        super().__init__("\n".join(problems), hint=hint)
        self.problems = tuple(problems)


class UnknownName(UsageError):
    """No such thing; the nearest known names are offered."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, hint: str = "") -> None:
        names = list(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        tail = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(sorted(names)[:20]) or 'none'}"
        super().__init__(f"no {kind} named {name!r}{tail}", hint=hint)


class Pinned(UsageError):
    """The fleet file pins the target to another bundle or version."""


class MissingExtra(UsageError):
    """An optional part of the installation is absent."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed; it comes with the extra {extra!r}", hint=f"pip install 'edgevit[{extra}]'")
        self.extra = extra


class ModelError(UsageError):
    """Weights missing, truncated or foreign; a factory that does not deliver a model."""


class DataError(UsageError):
    """No, unreadable or mislabelled images."""


class BuildError(EdgevitError):
    """Compression or export did not do what the recipe says."""


class ExportError(BuildError):
    """An exporter failed, fell back, or wrote another file than was asked for."""


class ParityError(BuildError):
    """An artifact disagrees with the module it was exported from."""


class BundleError(EdgevitError):
    """A bundle that is damaged, unsigned, or signed by a stranger."""


class StoreError(EdgevitError):
    """The results database."""


class NoChoice(EdgevitError):
    """What was measured leaves no variant to choose."""


class GateFailed(EdgevitError):
    """A gate of a roll-out did not hold, or could not be judged."""


class DeviceError(EdgevitError):
    """A device was unreachable or refused."""


class Unreachable(DeviceError):
    """No route, no answer in time, or the name was not found."""


class HostKeyError(DeviceError):
    """The host key is unknown, changed or revoked."""


class LoginError(DeviceError):
    """No key or password was accepted."""


class LostLink(DeviceError):
    """The connection ended before the answer did."""


class NotProvisioned(DeviceError):
    """The device has no Python, runtime or signers yet."""


class DeviceRefused(DeviceError):
    """The agent said no; ``code`` is the agent's own."""

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code
