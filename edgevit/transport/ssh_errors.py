"""What paramiko, its cryptography or a socket raised, as our errors: none of their own leaves the ``ssh`` files."""

from __future__ import annotations

import socket

import paramiko
from paramiko.auth_strategy import AuthFailure
from paramiko.ber import BERException
from paramiko.buffered_pipe import PipeTimeout
from paramiko.hostkeys import InvalidHostKey
from paramiko.pkey import UnknownKeyType
from paramiko.ssh_exception import IncompatiblePeer, MessageOrderError

from edgevit.errors import DeviceError, EdgevitError, HostKeyError, LoginError, LostLink, Unreachable, UsageError

GONE = (OSError, EOFError, paramiko.SSHException)
"""What any call raises once the other end, or the way to it, is gone."""

# paramiko's exceptions, most specific first: what each is while connecting, and what once connected.
MAPPED: tuple[tuple[type[BaseException], type[EdgevitError], type[EdgevitError]], ...] = (
    (paramiko.BadHostKeyException, HostKeyError, HostKeyError),
    (paramiko.BadAuthenticationType, LoginError, LoginError),
    (paramiko.ssh_exception.PartialAuthentication, LoginError, LoginError),
    (paramiko.PasswordRequiredException, LoginError, LoginError),
    (paramiko.ssh_exception.UnableToAuthenticate, LoginError, LoginError),
    (AuthFailure, LoginError, LoginError),
    (paramiko.AuthenticationException, LoginError, LoginError),
    (paramiko.ChannelException, Unreachable, DeviceError),
    (IncompatiblePeer, Unreachable, LostLink),
    (paramiko.ProxyCommandFailure, Unreachable, LostLink),
    (paramiko.CouldNotCanonicalize, UsageError, UsageError),
    (paramiko.ConfigParseError, UsageError, UsageError),
    (MessageOrderError, Unreachable, LostLink),
    (UnknownKeyType, LoginError, LoginError),
    (paramiko.SFTPError, DeviceError, DeviceError),
    (BERException, LoginError, LoginError),
    (InvalidHostKey, HostKeyError, HostKeyError),
    (PipeTimeout, Unreachable, LostLink),
    (paramiko.ssh_exception.NoValidConnectionsError, Unreachable, LostLink),
    (paramiko.SSHException, Unreachable, LostLink),
    (socket.gaierror, Unreachable, LostLink),
    (TimeoutError, Unreachable, LostLink),
    (EOFError, Unreachable, LostLink),
    (OSError, Unreachable, LostLink),
)


def map_error(error: BaseException, name: str, doing: str, *, connected: bool, hint: str = "") -> EdgevitError:
    """One of ours for anything that paramiko, its cryptography or a socket raised; what is ours already stays as it is."""
    if isinstance(error, EdgevitError):
        return error
    said = str(error).strip() or type(error).__name__
    for foreign, before, after in MAPPED:
        if isinstance(error, foreign):
            return (after if connected else before)(f"{name}: {doing}: {said}", hint=hint)
    # A damaged packet shows as an exception of the cryptography package or a ValueError in the reading thread.
    ours = LostLink if connected else Unreachable
    return ours(f"{name}: {doing}: {type(error).__name__}: {said}", hint=hint)
