"""Where and how to connect, as OpenSSH would: ``ssh -G HOST`` decides wherever an OpenSSH client is installed.

paramiko's own reader knows no ``Include`` and only part of ``Match``, so it could connect elsewhere without a word. It is used
only where there is no client, and only when it implements every keyword that the files hold.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevit.errors import UsageError

CONNECT_TIMEOUT_S = 15.0
HOST_FORM = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:%-]*")
USER_FORM = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@$\\+-]*")

# What paramiko's reader gives us and this file uses.
_READ = {
    "host", "match", "hostname", "port", "user", "identityfile", "identitiesonly", "identityagent", "userknownhostsfile",
    "globalknownhostsfile", "hostkeyalias", "proxyjump", "proxycommand", "connecttimeout", "serveraliveinterval",
    "serveralivecountmax", "addressfamily", "bindaddress", "passwordauthentication", "kbdinteractiveauthentication",
    "pubkeyauthentication",
}  # fmt: skip
# What changes neither where we connect nor whom we trust: terminals, forwarding (never used here), sharing, looks.
_WITHOUT_EFFECT = {
    "addkeystoagent", "batchmode", "checkhostip", "clearallforwardings", "compression", "controlmaster", "controlpath",
    "controlpersist", "dynamicforward", "escapechar", "exitonforwardfailure", "fingerprinthash", "forwardagent",
    "forwardx11", "forwardx11timeout", "forwardx11trusted", "gatewayports", "gssapiauthentication",
    "gssapidelegatecredentials", "hashknownhosts", "ipqos", "localcommand", "localforward", "loglevel",
    "numberofpasswordprompts", "permitlocalcommand", "permitremoteopen", "remoteforward", "requesttty", "sendenv",
    "setenv", "stricthostkeychecking", "syslogfacility", "tcpkeepalive", "updatehostkeys", "visualhostkey",
    "xauthlocation", "connectionattempts", "remotecommand", "streamlocalbindmask", "streamlocalbindunlink",
}  # fmt: skip


@dataclass(frozen=True)
class SshSettings:
    """How to reach one host. Times in seconds; empty tuples of algorithms mean "no restriction".

    ``identity_files`` in the order they are tried; ``chosen_key`` is true where a person named the key for this target, so
    that no other is offered. ``jump`` is OpenSSH's ProxyJump text, empty for none; ``proxy_command`` a shell command, expanded.
    """

    host: str
    hostname: str
    port: int
    user: str
    identity_files: tuple[Path, ...] = ()
    identities_only: bool = False
    identity_agent: str = "SSH_AUTH_SOCK"
    chosen_key: bool = False
    known_hosts: tuple[Path, ...] = ()
    revoked_keys: Path | None = None
    host_key_alias: str = ""
    jump: str = ""
    proxy_command: str = ""
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    alive_interval_s: float = 0.0
    address_family: str = "any"
    bind_address: str = ""
    password_allowed: bool = True
    public_key_allowed: bool = True
    ciphers: tuple[str, ...] = ()
    kex: tuple[str, ...] = ()
    macs: tuple[str, ...] = ()
    host_key_types: tuple[str, ...] = ()

    @property
    def known_name(self) -> str:
        """The name that known_hosts files are searched for."""
        return self.host_key_alias or self.hostname

    @property
    def known_port(self) -> int:
        """An alias stands for itself: OpenSSH adds no port to it."""
        return 22 if self.host_key_alias else self.port


def check_host(host: str) -> str:
    """``host`` if it is a host name, an address or an alias of ssh_config; else UsageError (no options, no shell text)."""
    if HOST_FORM.fullmatch(host) is None or len(host) > 255:
        raise UsageError(f"host: got {host[:80]!r}, expected a name or an address", hint="edgevit target add NAME [USER@]HOST")
    return host


def resolve(
    host: str, *, user: str | None = None, port: int | None = None, key: str | None = None, jump: str | None = None
) -> SshSettings:
    """Settings for ``host``; what is given explicitly wins over the configuration.

    Raises UsageError where the configuration cannot be read or, without an OpenSSH client, holds what cannot be followed.
    """
    check_host(host)
    if user is not None and USER_FORM.fullmatch(user) is None:
        raise UsageError(f"user: got {user[:80]!r}, expected a login name")
    client = shutil.which("ssh")
    values = ask_openssh(client, host, user, port) if client else read_without_client(host)
    settings = settings_from(values, host, user=user, port=port)
    return _with_explicit(settings, key, jump)


def _with_explicit(settings: SshSettings, key: str | None, jump: str | None) -> SshSettings:
    from dataclasses import replace

    if key:
        path = Path(key).expanduser()
        if not path.exists() and not path.with_name(path.name + ".pub").exists():
            raise UsageError(f"key of {settings.host}: there is no file {path}", hint=f"ssh-keygen -t ed25519 -f {path}")
        settings = replace(settings, identity_files=(path,), chosen_key=True)
    if jump:
        settings = replace(settings, jump="" if jump == "none" else jump, proxy_command="")
    return settings


def ask_openssh(client: str, host: str, user: str | None = None, port: int | None = None) -> dict[str, list[str]]:
    """``ssh -G``: every keyword's values as OpenSSH resolved them, with ``Include``, ``Match`` and canonical names followed."""
    argv = [client, "-T", "-G"]
    argv += ["-l", user] if user else []
    argv += ["-p", str(port)] if port else []
    try:
        done = subprocess.run([*argv, "--", host], capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
    except subprocess.TimeoutExpired as e:
        raise UsageError(f"ssh -G {host} did not answer within 60 s (a Match exec command?)", hint=f"ssh -G {host}") from e
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip()[-2000:]
        raise UsageError(f"ssh -G {host} failed with status {done.returncode}: {said}", hint=f"ssh -G {host}")
    return parse_ssh_g(done.stdout.decode("utf-8", "surrogateescape"))


def parse_ssh_g(text: str) -> dict[str, list[str]]:
    """``keyword value`` lines → keyword → every value in order."""
    values: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        values.setdefault(key.lower(), []).append(value.strip())
    return values


def settings_from(values: Mapping[str, Sequence[str]], host: str, *, user: str | None, port: int | None) -> SshSettings:
    """Resolved keyword values → SshSettings. Pure, but for ``~`` and the environment that OpenSSH's own texts refer to."""

    def one(key: str, default: str = "") -> str:
        found = values.get(key)
        return default if not found or found[0].lower() == "none" else found[0]

    if one("knownhostscommand"):
        raise UsageError(f"ssh_config for {host}: KnownHostsCommand is not supported", hint="use UserKnownHostsFile")
    login = user or one("user") or getpass.getuser()
    hostname, number = one("hostname", host), port or int(one("port", "22"))
    tokens = {
        "%": "%", "h": hostname, "p": str(number), "r": login, "n": host, "d": str(Path.home()), "u": getpass.getuser(),
        "i": str(os.getuid()), "L": os.uname().nodename.split(".")[0], "l": os.uname().nodename, "k": one("hostkeyalias", host),
    }  # fmt: skip
    known = [p for key in ("userknownhostsfile", "globalknownhostsfile") for p in one(key).split()]
    revoked = one("revokedhostkeys")
    return SshSettings(
        host=host,
        hostname=hostname,
        port=number,
        user=login,
        identity_files=tuple(_path(p, tokens) for p in values.get("identityfile", ()) if p.lower() != "none"),
        identities_only=one("identitiesonly") == "yes",
        identity_agent=_agent(values.get("identityagent", ["SSH_AUTH_SOCK"])[0], tokens),
        known_hosts=tuple(_path(p, tokens) for p in known),
        revoked_keys=_path(revoked, tokens) if revoked else None,
        host_key_alias=one("hostkeyalias"),
        jump=one("proxyjump"),
        proxy_command=_expand(one("proxycommand"), tokens),
        connect_timeout_s=float(one("connecttimeout", "0")) or CONNECT_TIMEOUT_S,
        alive_interval_s=float(one("serveraliveinterval", "0")),
        address_family=one("addressfamily", "any"),
        bind_address=one("bindaddress"),
        password_allowed=one("passwordauthentication", "yes") == "yes" or one("kbdinteractiveauthentication", "yes") == "yes",
        public_key_allowed=one("pubkeyauthentication", "yes") not in ("no", "false"),
        ciphers=_names(one("ciphers")),
        kex=_names(one("kexalgorithms")),
        macs=_names(one("macs")),
        host_key_types=_names(one("hostkeyalgorithms")),
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(n for n in text.split(",") if n)


def _expand(text: str, tokens: Mapping[str, str]) -> str:
    def put(match: re.Match[str]) -> str:
        letter = match.group(1)
        if letter not in tokens:
            raise UsageError(f"ssh_config: %{letter} in {text!r} is not supported", hint="write the value out")
        return tokens[letter]

    return re.sub(r"%(.)", put, text)


def _path(text: str, tokens: Mapping[str, str]) -> Path:
    return Path(os.path.expandvars(_expand(text, tokens).strip('"'))).expanduser()


def _agent(text: str, tokens: Mapping[str, str]) -> str:
    """``none``, ``SSH_AUTH_SOCK`` or the path of an agent's socket."""
    if text in ("none", "SSH_AUTH_SOCK", ""):
        return text or "none"
    if text.startswith("$"):
        return os.environ.get(text.strip("${}"), "none")
    return str(_path(text, tokens))


def read_without_client(host: str, files: Sequence[Path] | None = None) -> dict[str, list[str]]:
    """The configuration files by paramiko's reader, after every keyword in them was found to be one that it follows.

    Raises UsageError naming file and line of the first keyword that it would not follow.
    """
    paths = [Path("~/.ssh/config").expanduser(), Path("/etc/ssh/ssh_config")] if files is None else list(files)
    text = ""
    for path in paths:
        try:
            content = path.read_text("utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"{path}: cannot be read: {e}", hint=f"ls -l {path}") from e
        _check_keywords(content, path)
        # Each file starts outside any Host block.
        text += f"{content}\nHost *\n"
    found = _look_up(text, host)
    home = Path("~/.ssh").expanduser()
    found.setdefault("identityfile", [str(home / f"id_{kind}") for kind in ("rsa", "ecdsa", "ed25519")])
    found.setdefault("userknownhostsfile", [f"{home}/known_hosts {home}/known_hosts2"])
    found.setdefault("globalknownhostsfile", ["/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"])
    return found


def _look_up(text: str, host: str) -> dict[str, list[str]]:
    """By paramiko's reader. UsageError where it gives up."""
    import paramiko

    try:
        found = paramiko.SSHConfig.from_text(text).lookup(host)
    except (paramiko.SSHException, ValueError, KeyError, IndexError) as e:
        raise UsageError(f"ssh_config for {host}: {e}", hint="sudo apt install openssh-client") from e
    values: dict[str, object] = dict(found)
    return {k: list(v) if isinstance(v, list) else ["none" if v is None else str(v)] for k, v in values.items()}


def _check_keywords(content: str, path: Path) -> None:
    for number, raw in enumerate(content.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        keyword, _, value = re.sub(r"\s*=\s*|\s+", " ", line, count=1).partition(" ")
        keyword = keyword.lower()
        if keyword not in _READ | _WITHOUT_EFFECT:
            problem = f"the keyword {keyword!r} can be followed only by OpenSSH itself"
        elif keyword == "match" and set(re.findall(r"[a-z]+", value.lower())) & {"exec", "tagged", "localnetwork", "version"}:
            problem = f"'Match {value}' can be followed only by OpenSSH itself"
        elif keyword == "identityagent" and value.startswith("$"):
            problem = "an IdentityAgent from the environment can be followed only by OpenSSH itself"
        else:
            continue
        raise UsageError(f"{path}:{number}: {problem}, and no ssh client is installed", hint="sudo apt install openssh-client")


def parse_hop(text: str) -> tuple[str | None, str, int | None]:
    """One hop of a ProxyJump list, ``[user@]host[:port]`` or ``ssh://…`` → user, host, port. UsageError for anything else."""
    match = re.fullmatch(r"(?:ssh://)?(?:([^@\s]+)@)?(\[[0-9A-Fa-f:%.]+\]|[^:@\s\[\]]+)(?::(\d{1,5}))?/?", text.strip())
    if match is None:
        raise UsageError(f"jump host: got {text[:80]!r}, expected [USER@]HOST[:PORT]", hint="ssh -J USER@HOST:PORT …")
    user, host, port = match.groups()
    return user, check_host(host.strip("[]")), int(port) if port else None
