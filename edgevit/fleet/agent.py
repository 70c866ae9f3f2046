"""What can be asked of the agent on a device: one method per command, its answers decoded strictly into values."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from device_agents import wire
from edgevit.agentpack import BOOTSTRAP, LAUNCHER, agent_pyz
from edgevit.errors import DeviceError, DeviceRefused, LostLink
from edgevit.fleet.conversation import END_S, SILENCE_S, Conversation, Message, OnMessage, check_start
from edgevit.fleet.upload import UPLOAD_CHUNK, Stages, Upload
from edgevit.progress import Progress, Quiet
from edgevit.results.sound import verify_sound
from edgevit.transport.base import Channel, Transport

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from edgevit.bundle import Bundle

UNDER_THE_LOCK = ("install", "activate", "rollback", "gc", "uninstall", "unprovision")
"""Commands that tell the device whose lock they work under."""


@dataclass(frozen=True)
class Have:
    """Which blobs a device lacks, how many bytes of each need not be sent, and its free space in bytes. Of those bytes it would
    copy ``copied_bytes`` from other blobs: they take space there."""

    missing: tuple[str, ...]
    partial: dict[str, int]
    free_bytes: int
    copied_bytes: int = 0


@dataclass(frozen=True)
class Installed:
    """``newly`` is false where the bundle was there already and verified. Bytes of blobs as sent by this call."""

    bundle: str
    newly: bool
    received_bytes: int
    sent_blobs: tuple[str, ...]


@dataclass(frozen=True)
class Provisioned:
    """``made`` is false where the very environment was there already. Bytes of wheels as sent by this call."""

    made: bool
    received_bytes: int


@dataclass(frozen=True)
class Activated:
    active: wire.Active
    changed: bool


@dataclass(frozen=True)
class LockAnswer:
    """Whether the lock was ``taken``; ``lock`` as it is now, the holder's where it was not; ``taken_from``: whose it was."""

    taken: bool
    lock: wire.OperatorLock
    taken_from: wire.OperatorLock | None


@dataclass(frozen=True)
class WaitingRun:
    run_id: str
    state: str


@dataclass(frozen=True)
class Freed:
    removed_bundles: int
    removed_blobs: int
    freed_bytes: int


F = TypeVar("F")


class Agent:
    """The agent under ``root`` on one device. Each call is one process there; the agent itself is sent where it is absent.

    All methods raise LostLink, Unreachable, NotProvisioned or DeviceRefused; a plain DeviceError: it is defective.
    """

    def __init__(
        self,
        transport: Transport,
        python: str = "python3",
        root: str = "~/.edgevit",
        open_again: Callable[[], Agent] | None = None,
    ) -> None:
        self.transport = transport
        self.python = python
        self.root = root
        self._open_again = open_again
        self.operator = ""
        """The token of the lock that this agent's commands work under; empty: of none."""
        self.max_rate_mbit: float | None = None
        """What uploads keep to, in 10⁶ bits a second; None: no limit."""
        self.sent_agent = False
        """Whether this device lacked this host's agent and was sent it."""

    @property
    def name(self) -> str:
        return self.transport.name

    def reopen(self) -> Agent:
        """A new agent over a new connection to the same device; this one is closed. LostLink where nobody said how."""
        if self._open_again is None:
            raise LostLink(f"{self.name}: the connection is gone and cannot be made again from here")
        self.close()
        again = self._open_again()
        again.max_rate_mbit, again.operator = self.max_rate_mbit, self.operator
        return again

    def close(self) -> None:
        self.transport.close()

    # ---- commands ----

    def probe(self, quick: bool = False, anew: bool = False) -> wire.Facts:
        """What the device is today. ``quick``: only runtimes that were proven before; ``anew``: each proven by an inference,
        whatever is remembered of it, unless a job is being measured there."""
        value = self._call("probe", ["--quick"] * quick + ["--anew"] * anew)
        return self._decode(wire.Facts, value, "facts")

    def have(self, blobs: Iterable[wire.Blob], chunk_index: bytes = b"") -> Have:
        """Which of ``blobs`` are not on the device, and what of them lies there in chunks that ``chunk_index`` tells of."""
        payload: Message = {"blobs": [wire.encode(b) for b in blobs]}
        if chunk_index:
            payload["chunks"] = base64.b64encode(chunk_index).decode("ascii")
        value = self._call("have", payload=payload)
        partial = self.field(value, "partial", dict)
        return Have(
            tuple(str(s) for s in self.field(value, "missing", list)),
            {str(k): int(v) for k, v in partial.items() if isinstance(v, int)},
            self.field(value, "free_bytes", int),
            self.field(value, "copied_bytes", int),
        )

    def install(self, bundle: Bundle, progress: Progress | None = None, *, allow_older: bool = False) -> Installed:
        """Send what the device lacks of ``bundle``; it verifies signature and digests itself before the bundle appears.
        ``allow_older``: also where a newer version of it is active; to activate it then is another matter."""
        request = {
            "manifest": base64.b64encode(bundle.manifest_bytes).decode("ascii"),
            "signature": base64.b64encode(bundle.signature).decode("ascii"),
            "allow_older": allow_older,
        }
        files = {blob: bundle.blob_path(blob.sha256) for blob in bundle.manifest.blobs()}
        whole = "" if bundle.manifest.chunks else ", whole: the bundle has no chunk index, build it again to have one"
        upload = Upload(self, "install", request, files, bundle.manifest.name + whole, progress or Quiet())
        value = upload.run()
        if value.get("bundle") != bundle.digest:
            raise self.defect(f"it installed {str(value.get('bundle'))[:80]!r}, not {bundle.digest}")
        installed, received = self.field(value, "installed", bool), self.field(value, "received_bytes", int)
        return Installed(bundle.digest, installed, received, upload.sent)

    def activate(self, variant: wire.Variant, policy: str, *, allow_older: bool = False) -> Activated:
        """Make ``variant`` what applications on the device load; everything is verified there once more first."""
        payload = {"variant": wire.encode(variant), "policy": policy, "allow_older": allow_older}
        value = self._call("activate", payload=payload)
        return Activated(
            self._decode(wire.Active, self.field(value, "active", dict), "active"), self.field(value, "changed", bool)
        )

    def rollback(self, undo: str = "") -> wire.Active:
        """Activate what was active before. ``undo``: only where what is active was activated at this very time, as the device
        wrote it; else nothing is changed, so it may be asked for again. Returns what is active then."""
        value = self._call("rollback", ["--undo", undo] if undo else [])
        return self._decode(wire.Active, self.field(value, "active", dict), "active")

    def take_lock(self, owner: str, what: str, token: str, seconds: float, over: str = "") -> LockAnswer:
        """Take the lock of operators for ``seconds``, or renew one's own; ``over``: the token of a holder known to be gone."""
        payload = {"owner": owner, "what": what, "token": token, "seconds": seconds, "over": over}
        value = self._call("operator-take", payload=payload)
        lock = self._decode(wire.OperatorLock, self.field(value, "lock", dict), "lock")
        before = value.get("from")
        taken_from = None if before is None else self._decode(wire.OperatorLock, before, "lock")
        return LockAnswer(self.field(value, "taken", bool), lock, taken_from)

    def release_lock(self, token: str) -> bool:
        """Give the lock back; False where it was not this token's any more."""
        return self.field(self._call("operator-release", ["--operator", token]), "released", bool)

    def foresee_gc(self, bundle: Bundle) -> Freed:
        """What :meth:`gc` would remove once ``bundle`` is active."""
        manifest = base64.b64encode(bundle.manifest_bytes).decode("ascii")
        return self._freed(self._call("foresee-gc", payload={"manifest": manifest}))

    def submit(self, job: wire.Job) -> bool:
        """Queue ``job``; False where its ``run_id`` was known already. Harmless to repeat."""
        value = self._call("submit", payload=wire.encode(job), limit=wire.MAX_JOB_BYTES)
        if value.get("run_id") != job.run_id:
            raise self.defect(f"submit answered for the run {str(value.get('run_id'))[:80]!r}, not {job.run_id!r}")
        return self.field(value, "queued", bool)

    def follow(self, run_id: str, progress: Progress | None = None) -> wire.Run:
        """Wait for a run and bring it home. It stays on the device until :meth:`ack`. DeviceRefused ``run-damaged`` where it is
        no run that can be read here, or its figures contradict themselves."""
        with Stages(progress or Quiet(), f"{self.name}: ") as stages:
            value = self._call("follow", [run_id], on_message=stages, limit=wire.MAX_RUN_BYTES)
        try:
            run = wire.decode(wire.Run, value, "run")
            verify_sound(run)
        except wire.WireError as e:
            # The agent passes a result on as it lies there: no fault of its own, and none of the other results.
            message = (
                f"{self.name}: run {run_id} cannot be read: a newer edgevit wrote it, or the device's disk damaged it ({e})"
            )
            hint = f"pip install --upgrade edgevit; if it is damaged, on {self.name}: rm {self.root}/spool/{run_id}.run"
            raise DeviceRefused("run-damaged", message, hint=hint) from e
        if run.job.run_id != run_id:
            raise self.defect(f"follow answered with the run {run.job.run_id!r}, not {run_id!r}")
        return run

    def ack(self, run_id: str) -> bool:
        """Say that the run is safe here; False where that was said before."""
        return self.field(self._call("ack", [run_id]), "acknowledged", bool)

    def cancel(self, run_id: str) -> bool:
        """Ask for the end of a run that is queued or running; False where it is done already."""
        return self.field(self._call("cancel", [run_id]), "cancelled", bool)

    def install_daemon(
        self,
        *,
        kind: str,
        user: str | None,
        groups: Sequence[str],
        devices: Sequence[str],
        quota_mb: int | None,
        progress: Progress | None = None,
    ) -> tuple[wire.DaemonStatus, bool]:
        """Keep a server running there as a systemd unit: (its status, whether it is sandboxed). Harmless to repeat."""
        request = {"kind": kind, "user": user, "groups": list(groups), "devices": list(devices), "quota_mb": quota_mb}
        with Stages(progress or Quiet(), f"{self.name}: ") as stages:
            value = dict(self._call("daemon-install", payload=request, on_message=stages))
        sandboxed = self.field(value, "sandboxed", bool)
        del value["sandboxed"]
        return self._decode(wire.DaemonStatus, value, "daemon status"), sandboxed

    def daemon_status(self) -> wire.DaemonStatus:
        """The daemon of this device now."""
        return self._decode(wire.DaemonStatus, self._call("daemon-status"), "daemon status")

    def daemon_logs(self, lines: int) -> tuple[list[str], list[str]]:
        """The last lines of the daemon's log, and of the log that all its servers write."""
        value = self._call("daemon-logs", [str(lines)])
        daemon, server = (self.field(value, key, list) for key in ("daemon", "server"))
        return [str(line) for line in daemon], [str(line) for line in server]

    def remove_daemon(self) -> bool:
        """Stop the daemon and remove its unit; False where there was none."""
        return self.field(self._call("daemon-remove"), "removed", bool)

    def waiting(self) -> tuple[WaitingRun, ...]:
        """Runs that were not acknowledged: queued, running or done."""
        found = []
        for entry in self.field(self._call("waiting"), "runs", list):
            if not isinstance(entry, dict) or entry.get("state") not in ("queued", "running", "done"):
                raise self.defect("waiting answered with an entry that is no run")
            found.append(WaitingRun(self.field(entry, "run_id", str), str(entry["state"])))
        return tuple(found)

    def resume(self) -> bool:
        """See to it that what is queued there is worked: whether that took a new server. A daemon needs no such word."""
        return self.field(self._call("resume"), "begun", bool)

    def allow(self, lines: Sequence[str], *, replace: bool = False) -> int:
        """Let the keys in these allowed_signers lines sign for the device; returns how many may now."""
        return self.field(self._call("allow", payload={"lines": list(lines), "replace": replace}), "signers", int)

    def revoke(self, fingerprints: Sequence[str]) -> tuple[int, int]:
        """Take the keys with these fingerprints (``SHA256:…``) out of the device's allowed signers: (how many lines went, how
        many are left)."""
        value = self._call("allow", payload={"lines": [], "replace": False, "revoke": list(fingerprints)})
        return self.field(value, "removed", int), self.field(value, "signers", int)

    def signers(self) -> tuple[str, ...]:
        """The device's allowed_signers lines."""
        return tuple(str(line) for line in self.field(self._call("signers"), "lines", list))

    def predict(self, pixels: np.ndarray[Any, Any], variant: wire.Variant | None = None) -> list[list[dict[str, Any]]]:
        """The five best classes for each image, uint8 (count, height, width, 3); ``variant`` None: the active one."""
        import io

        import numpy as np

        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(pixels), allow_pickle=False)
        data = buffer.getvalue()
        header = {"variant": wire.encode(variant), "count": len(pixels), "bytes": len(data)}
        value = self._call("predict", payload=header, data=data)
        found = self.field(value, "predictions", list)
        if len(found) != len(pixels):
            raise self.defect(f"predict answered for {len(found)} images, not {len(pixels)}")
        return found

    def provision(
        self, request: wire.EnvironmentRequest, files: Mapping[str, Path], progress: Progress | None = None
    ) -> Provisioned:
        """Make the device's private Python environment of these wheels; ``files`` holds each by its SHA-256."""
        blobs = {wire.Blob(w.sha256, w.size): files[w.sha256] for w in request.wheels}
        upload = Upload(self, "provision", wire.encode(request), blobs, "wheels", progress or Quiet())
        value = upload.run()
        return Provisioned(self.field(value, "made", bool), self.field(value, "received_bytes", int))

    def unprovision(self) -> None:
        """Remove the agent's whole folder from the device."""
        self._call("unprovision")

    def gc(self) -> Freed:
        """Remove bundles and blobs that neither the active nor the previous nor the newest bundle needs."""
        return self._freed(self._call("gc"))

    def uninstall(self, bundles: Sequence[str]) -> Freed:
        """Remove the bundles of these digests, and the blobs that only they have; what is active, previous or queued stays."""
        return self._freed(self._call("uninstall", payload={"bundles": list(bundles)}))

    def _freed(self, value: Message) -> Freed:
        return Freed(*(self.field(value, key, int) for key in ("removed_bundles", "removed_blobs", "freed_bytes")))

    # ---- one conversation ----

    def _call(
        self,
        command: str,
        arguments: Sequence[str] = (),
        *,
        payload: Any = None,
        data: bytes = b"",
        on_message: OnMessage | None = None,
        limit: int = wire.MAX_RUN_BYTES,
    ) -> Message:
        head = b"" if payload is None else json.dumps(payload, separators=(",", ":"), allow_nan=False).encode("utf-8") + b"\n"
        said = head + data

        def send(channel: Channel, _conversation: Conversation) -> None:
            for start in range(0, len(said), UPLOAD_CHUNK):
                channel.write(said[start : start + UPLOAD_CHUNK])
            channel.close_input()

        return self.converse(command, arguments, send, on_message, limit)

    def converse(
        self,
        command: str,
        arguments: Sequence[str],
        send: Callable[[Channel, Conversation], None],
        on_message: OnMessage | None = None,
        limit: int = wire.MAX_RUN_BYTES,
    ) -> Message:
        """Start ``command``, send, read to its result; uploads the agent once where the device has none or another."""
        pack = agent_pyz()
        if self.operator and command in UNDER_THE_LOCK:
            arguments = [*arguments, "--operator", self.operator]
        for attempt in (1, 2):
            argv = [self.python, "-c", LAUNCHER, pack.sha256, self.root, command, *arguments]
            channel = self.transport.open(argv)
            try:
                value = Conversation(self.name, command, channel, on_message, limit).run(send)
            finally:
                channel.close()
            if value is not None:
                return value
            if attempt == 1:
                self._bootstrap()
        raise self.defect(f"the agent was sent, but {self.root} does not hold it")

    def _bootstrap(self) -> None:
        """Send the agent itself."""
        pack = agent_pyz()
        channel = self.transport.open([self.python, "-c", BOOTSTRAP, pack.sha256, str(len(pack.data)), self.root])
        try:
            lost: LostLink | None = None
            try:
                channel.write(pack.data)
                channel.close_input()
            except LostLink as e:
                lost = e
            said = channel.read_line(SILENCE_S)
            status = channel.wait(END_S)
            if status == 0 and said == b"ok" and lost is None:
                self.sent_agent = True
                return
            check_start(self.name, status, said, channel.error_text())
            tail = channel.error_text().strip()[-1000:]
            raise DeviceError(
                f"{self.name}: the agent could not be stored in {self.root}: exit status {status}: {tail or 'it said nothing'}",
                hint=f"ssh to {self.name}, and look at: df -h ~; ls -ld {self.root}",
            )
        finally:
            channel.close()

    # ---- strictness ----

    def _decode(self, kind: type[wire.T], value: Any, what: str) -> wire.T:
        try:
            return wire.decode(kind, value, what)
        except wire.WireError as e:
            raise self.defect(f"it sent what is not a {what}: {e}") from e

    def field(self, value: Message, key: str, kind: type[F]) -> F:
        """``value[key]``, which must be of this type: else the agent is defective."""
        found = value.get(key)
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise self.defect(f"it answered without {key!r} of the type {kind.__name__}: {str(value)[:200]}")
        return found

    def defect(self, message: str) -> DeviceError:
        """An answer that no right agent gives, as an error to raise."""
        return DeviceError(f"{self.name}: the agent is defective: {message}", hint=f"edgevit target probe {self.name}")
