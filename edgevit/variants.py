"""Which variants (artifact × runtime × provider × threads) of a bundle a device can run, and why not the others. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from device_agents.wire import RUNTIMES_OF_FORMAT, Artifact, Facts, Manifest, Variant
from edgevit.errors import DeviceError, NotProvisioned, UsageError
from edgevit.profile import Profile


@dataclass(frozen=True)
class LeftOut:
    """An artifact that cannot run on the device, and the reason for people. ``other_board``: it was built for other boards."""

    artifact: str
    reason: str
    other_board: bool = False


@dataclass(frozen=True)
class Runnable:
    """``variants`` in order of preference: the manifest's artifacts in their order, each with its runtimes and providers in the
    profile's order."""

    variants: tuple[Variant, ...]
    left_out: tuple[LeftOut, ...]


def list_variants(
    manifest: Manifest, digest: str, facts: Facts, profile: Profile, *, threads: Sequence[int] = (), every: bool = False
) -> Runnable:
    """The variants of one bundle on one device.

    For each artifact the best runtime and provider of the profile that is *proven* on the device, at the profile's default
    thread count (or each of ``threads``); with ``every`` all proven runtimes, providers and the profile's thread counts. A
    thread count above the device's cores is an error where asked for and left out otherwise.
    """
    for count in threads:
        if not 1 <= count <= facts.cpu_count:
            raise UsageError(
                f"--threads {count}: {facts.hostname} has {facts.cpu_count} cores",
                hint=f"give --threads 1 to {facts.cpu_count}, or none for what the profile says",
            )
    if threads:
        counts = tuple(threads)
    elif every:
        counts = tuple(t for t in profile.threads.value if t <= facts.cpu_count)
    else:
        counts = (min(profile.default_threads, facts.cpu_count),)
    variants: list[Variant] = []
    left_out: list[LeftOut] = []
    for artifact in manifest.artifacts:
        pairs, reason = _proven_pairs(artifact, facts, profile)
        if not pairs:
            left_out.append(LeftOut(artifact.name, reason, profile.name not in artifact.fits))
        for runtime, provider in pairs if every else pairs[:1]:
            variants += [Variant(digest, artifact.name, runtime, provider, count) for count in counts]
    return Runnable(tuple(variants), tuple(left_out))


def _proven_pairs(artifact: Artifact, facts: Facts, profile: Profile) -> tuple[list[tuple[str, str]], str]:
    """(runtime, provider) pairs proven on the device in the profile's order, and why there is none."""
    if profile.name not in artifact.fits:
        return [], f"built for {', '.join(artifact.fits)}, not for {profile.name}"
    here = {r.runtime: r for r in facts.runtimes}
    pairs: list[tuple[str, str]] = []
    reasons: list[str] = []
    for option in profile.options(facts.machine):
        if option.runtime not in RUNTIMES_OF_FORMAT[artifact.format]:
            continue
        if artifact.scheme in option.refuses:
            reasons.append(f"{option.runtime} is known to run {artifact.scheme} wrongly")
        elif option.runtime not in here:
            why = facts.absent.get(option.runtime, "")
            reasons.append(f"{option.runtime} is not on the device" + (f" ({why})" if why else ""))
        else:
            proven = {p.name: p for p in here[option.runtime].providers}
            for name in option.providers:
                if name in proven and proven[name].proven:
                    pairs.append((option.runtime, name))
                elif name in proven:
                    reasons.append(f"{option.runtime}'s {name} did not pass an inference: {proven[name].detail}")
            if not any(runtime == option.runtime for runtime, _ in pairs):
                reasons.append(f"{option.runtime} offers none of {', '.join(option.providers)}")
    return pairs, "; ".join(reasons) or f"no runtime of {profile.name} reads {artifact.format} on {facts.machine}"


def require_runnable(found: Runnable, target: str, facts: Facts) -> Runnable:
    """``found`` itself if anything runs; else what is missing and the command that brings it."""
    if found.variants:
        return found
    reasons = "; ".join(f"{left.artifact}: {left.reason}" for left in found.left_out)
    if not facts.runtimes:
        raise NotProvisioned(f"{target} has no inference runtime: {reasons}", hint=f"edgevit target provision {target}")
    rebuild = all(left.other_board for left in found.left_out)
    hint = f"edgevit build … --for {target}" if rebuild else f"edgevit target probe {target}"
    raise DeviceError(f"nothing in this bundle runs on {target}: {reasons}", hint=hint)


def name_variant(variant: Variant) -> str:
    """As ``--select`` takes it: ``artifact:runtime:provider:threads``."""
    return f"{variant.artifact}:{variant.runtime}:{variant.provider}:{variant.threads}"


def find_variant(found: Runnable, wanted: str) -> Variant:
    """The variant a person named: an artifact, or ``artifact:runtime``, ``artifact:runtime:provider``,
    ``artifact:runtime:provider:threads``."""
    parts = wanted.split(":")
    for variant in found.variants:
        have = [variant.artifact, variant.runtime, variant.provider, str(variant.threads)]
        if len(parts) <= len(have) and have[: len(parts)] == parts:
            return variant
    reason = next((f" ({left.reason})" for left in found.left_out if left.artifact == parts[0]), "")
    known = ", ".join(name_variant(v) for v in found.variants)
    raise UsageError(f"no variant {wanted!r} on this device{reason}; there are {known}")
