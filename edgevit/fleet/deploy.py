"""Deploying: a plan that says what will happen, then exactly that."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from device_agents import wire
from edgevit.bundle import Bundle
from edgevit.errors import Pinned, UsageError
from edgevit.fleet.agent import Agent, Freed, Have
from edgevit.fleet.inventory import Target, pin_of
from edgevit.fleet.refusals import map_refusal
from edgevit.profile import Profile
from edgevit.progress import Progress
from edgevit.variants import list_variants, require_runnable


@dataclass(frozen=True)
class BlobToSend:
    """``offset`` bytes of it are on the device already: its beginning, or chunks anywhere."""

    sha256: str
    size: int
    offset: int

    @property
    def bytes_left(self) -> int:
        return self.size - self.offset


@dataclass(frozen=True)
class DeployPlan:
    """What a deploy will do on one target, so that ``wanted`` is active. ``activate`` is None where it is already; ``remove``:
    what nothing needs any more after it, None where nothing is to be removed."""

    target: str
    bundle: str
    bundle_name: str
    bundle_version: int
    send: tuple[BlobToSend, ...]
    install: bool
    wanted: wire.Variant
    activate: wire.Variant | None
    active: wire.Variant | None
    policy: str
    allow_older: bool
    remove: Freed | None = None

    @property
    def send_bytes(self) -> int:
        return sum(blob.bytes_left for blob in self.send)

    @property
    def nothing_to_do(self) -> bool:
        removes = self.remove is not None and self.remove.freed_bytes > 0
        return not self.send and not self.install and self.activate is None and not removes

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "bundle": self.bundle,
            "name": self.bundle_name,
            "version": self.bundle_version,
            "send": [{"sha256": b.sha256, "size": b.size, "offset": b.offset} for b in self.send],
            "send_bytes": self.send_bytes,
            "install": self.install,
            "activate": wire.encode(self.activate) if self.activate else None,
            "remove": asdict(self.remove) if self.remove else None,
            "nothing_to_do": self.nothing_to_do,
            "text": self.text(),
        }

    def text(self) -> str:
        """One line for people."""
        what = f"{self.target}: {self.bundle_name} version {self.bundle_version}: "
        if self.nothing_to_do:
            return what + "nothing to do, it is installed and active"
        steps = [f"send {len(self.send)} blobs, {self.send_bytes / 1e6:.1f} MB"] if self.send else ["send nothing"]
        steps += ["install"] if self.install else []
        steps += [f"activate {describe(self.activate)}"] if self.activate else ["keep the active variant"]
        steps += [f"remove {describe_freed(self.remove)}"] if self.remove else []
        return what + ", ".join(steps)


@dataclass(frozen=True)
class DeployOutcome:
    """What a deploy did. ``sent_bytes`` as counted by the device, in ``send_seconds`` with its verification; ``active``: what
    this made active, None where it was before; ``changed`` false where everything was there and active."""

    target: str
    bundle: str
    bundle_name: str
    bundle_version: int
    sent_blobs: int
    sent_bytes: int
    installed: bool
    active: wire.Active | None
    changed: bool
    send_seconds: float = 0.0
    removed: Freed | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "bundle": self.bundle,
            "name": self.bundle_name,
            "version": self.bundle_version,
            "sent_blobs": self.sent_blobs,
            "sent_bytes": self.sent_bytes,
            "installed": self.installed,
            "send_seconds": round(self.send_seconds, 3),
            "active": wire.encode(self.active) if self.active else None,
            "removed": asdict(self.removed) if self.removed else None,
            "changed": self.changed,
            "text": self.text(),
        }

    def text(self) -> str:
        """One line for people."""
        what = f"{self.target}: {self.bundle_name} version {self.bundle_version}"
        if not self.changed:
            return f"{what}: was there and active, verified again; nothing was sent or changed"
        done = f"sent {self.sent_blobs} blobs ({self.sent_bytes / 1e6:.1f} MB), verified on the device"
        return f"{what}: {done}" + (f", {describe(self.active.variant)} is active" if self.active else "")


def describe_freed(freed: Freed) -> str:
    """``2 bundles, 12.3 MB``."""
    bundles = f"{freed.removed_bundles} bundle{'s' if freed.removed_bundles != 1 else ''}"
    return f"{bundles}, {freed.freed_bytes / 1e6:.1f} MB"


def describe(variant: wire.Variant) -> str:
    """``fp32-onnx in onnxruntime (CPUExecutionProvider, 4 threads)``."""
    threads = f"{variant.threads} thread{'s' if variant.threads != 1 else ''}"
    return f"{variant.artifact} in {variant.runtime} ({variant.provider}, {threads})"


def plan_deploy(
    bundle: Bundle,
    target: str,
    facts: wire.Facts,
    have: Have,
    variant: wire.Variant,
    policy: str,
    *,
    allow_older: bool = False,
    remove: Freed | None = None,
) -> DeployPlan:
    """What has to be sent, installed, activated and removed. Pure.

    Raises DeviceRefused, with the code the device would give, where it would refuse before the first byte: ``older-version``,
    ``no-space``; UsageError where ``variant`` is not one of this bundle.
    """
    manifest = bundle.manifest
    if variant.bundle != bundle.digest or manifest.artifact(variant.artifact) is None:
        known = ", ".join(a.name for a in manifest.artifacts)
        raise UsageError(
            f"{describe(variant)} is not in the bundle {manifest.name}; it has {known}", hint="edgevit explain BUNDLE"
        )
    _check_version(target, manifest, facts.active, allow_older)
    missing = set(have.missing)
    send = tuple(
        BlobToSend(blob.sha256, blob.size, min(have.partial.get(blob.sha256, 0), blob.size))
        for blob in manifest.blobs()
        if blob.sha256 in missing
    )
    needed = sum(blob.bytes_left for blob in send) + have.copied_bytes
    if needed > have.free_bytes:
        message = f"{manifest.name} needs {needed:,} bytes, {have.free_bytes:,} are free"
        raise map_refusal(target, wire.Refusal("no-space", message))
    active = facts.active.variant if facts.active else None
    return DeployPlan(
        target=target,
        bundle=bundle.digest,
        bundle_name=manifest.name,
        bundle_version=manifest.version,
        send=send,
        install=bool(send) or all(b.bundle != bundle.digest for b in facts.bundles),
        wanted=variant,
        activate=None if active == variant else variant,
        active=active,
        policy=policy,
        allow_older=allow_older,
        remove=remove,
    )


def check_pin(target: Target, manifest: wire.Manifest) -> None:
    """Raises :class:`Pinned` where the fleet file pins the target to another bundle or version than this."""
    name = pin_of(manifest.name, manifest.version)
    if target.pin not in (None, name):
        raise Pinned(
            f"{target.name} is pinned to {target.pin} in the fleet file, got {name}",
            hint=f"change its pin there, or this once: edgevit deploy BUNDLE {target.name} --despite-pin",
        )


def _check_version(target: str, manifest: wire.Manifest, active: wire.Active | None, allow_older: bool) -> None:
    if active is None or allow_older or active.bundle_name != manifest.name or manifest.version >= active.bundle_version:
        return
    message = f"{manifest.name} has version {manifest.version}, version {active.bundle_version} is active"
    raise map_refusal(target, wire.Refusal("older-version", message))


def apply_plan(plan: DeployPlan, bundle: Bundle, agent: Agent, progress: Progress) -> DeployOutcome:
    """Do what the plan says. Also where nothing has to be sent the device verifies signature and every digest once more."""
    if plan.bundle != bundle.digest:
        raise UsageError(f"the plan is for the bundle {plan.bundle}, not {bundle.digest}", hint="edgevit deploy BUNDLE TARGET")
    began = time.monotonic()
    installed = agent.install(bundle, progress, allow_older=plan.allow_older)
    send_seconds = time.monotonic() - began
    active: wire.Active | None = None
    changed = installed.newly
    if plan.activate is not None:
        activated = agent.activate(plan.activate, plan.policy, allow_older=plan.allow_older)
        active, changed = activated.active, changed or activated.changed
    removed = agent.gc() if plan.remove is not None else None
    return DeployOutcome(
        target=plan.target,
        bundle=plan.bundle,
        bundle_name=plan.bundle_name,
        bundle_version=plan.bundle_version,
        sent_blobs=len(installed.sent_blobs),
        sent_bytes=installed.received_bytes,
        installed=installed.newly,
        active=active,
        changed=changed or bool(removed and removed.freed_bytes),
        send_seconds=send_seconds,
        removed=removed,
    )


def add_earlier_tries(outcome: DeployOutcome, first: DeployPlan, last: DeployPlan, active: wire.Active) -> DeployOutcome:
    """What a deployment did in all, where lost links made it begin anew. ``outcome`` is of the ``last`` plan; what the first
    wanted and the last did not any more was done by a try whose answer was lost. ``active``: as it is now. Pure."""
    came = max(first.send_bytes - last.send_bytes, 0)
    installed = first.install and not last.install
    activated = first.activate is not None and last.activate is None
    return replace(
        outcome,
        sent_blobs=max(outcome.sent_blobs, len(first.send)),
        sent_bytes=outcome.sent_bytes + came,
        installed=outcome.installed or installed,
        active=active if activated else outcome.active,
        changed=outcome.changed or installed or activated or came > 0,
    )


def choose_default_variant(bundle: Bundle, target: str, facts: wire.Facts, profile: Profile) -> wire.Variant:
    """The first artifact of the manifest that a proven runtime of the device runs, in the profile's order of runtimes.

    UsageError naming both sides where the bundle was built for other boards; NotProvisioned or DeviceError where nothing runs.
    """
    check_fits(bundle.manifest, target, profile.name)
    return require_runnable(list_variants(bundle.manifest, bundle.digest, facts, profile), target, facts).variants[0]


def check_fits(manifest: wire.Manifest, target: str, profile: str) -> None:
    """UsageError where no artifact of the bundle was built for the target's kind of board."""
    built_for: Mapping[str, None] = dict.fromkeys(name for artifact in manifest.artifacts for name in artifact.fits)
    if profile not in built_for:
        raise UsageError(
            f"{manifest.name} was built for {', '.join(built_for)}; {target} is a {profile}",
            hint=f"edgevit build … --for {target}",
        )
