"""What a device refuses, as our errors with the next command to type. The codes are the agent's and stable."""

from __future__ import annotations

from device_agents.wire import Refusal
from edgevit.errors import DeviceError, DeviceRefused, NotProvisioned

NEEDS_PROVISION = frozenset({"no-runtime", "no-numpy", "no-signers", "no-ssh-keygen", "no-python"})

HINTS = {
    "no-runtime": "edgevit target provision {name}",
    "no-numpy": "edgevit target provision {name}",
    "no-signers": "edgevit target provision {name}",
    "no-ssh-keygen": "on the device: sudo apt install openssh-client (8.1 or newer); then edgevit target provision {name}",
    "no-python": "on the device: sudo apt install python3-venv; then edgevit target provision {name}",
    "bad-signature": "edgevit verify BUNDLE; then build or copy it again",
    "unknown-signer": "edgevit key allow {name} (with --sign-key KEY.pub if another's key signed it and you trust it)",
    "bad-manifest": "edgevit verify BUNDLE; then build or copy it again",
    "bad-chunks": "build the bundle again",
    "newer-schema": "pip install --upgrade edgevit",
    "agent-too-old": "pip install --upgrade edgevit",
    "older-version": "edgevit deploy BUNDLE {name} --allow-older, or edgevit rollback {name}",
    "digest-mismatch": "edgevit verify BUNDLE; then deploy again",
    "no-space": "edgevit target prune {name}, or make room there otherwise (df -h); then try again: what arrived is kept",
    "io-error": "look at the device's disk: ssh to {name}, then dmesg | tail",
    "not-installed": "edgevit deploy BUNDLE {name}",
    "blob-missing": "edgevit deploy BUNDLE {name}",
    "blob-damaged": "edgevit deploy BUNDLE {name} sends what is damaged again; then check the device's card",
    "no-such-artifact": "edgevit explain BUNDLE",
    "does-not-fit": "edgevit build … --for {name}",
    "provider-missing": "edgevit target probe {name}",
    "provider-mismatch": "edgevit target probe {name}",
    "scheme-refused": "edgevit build … with a recipe that this runtime runs rightly; edgevit profiles show NAME",
    "runtime-too-old": "edgevit build … --for {name} keeps to what its boards read; or edgevit target provision {name}",
    "golden-mismatch": "edgevit explain BUNDLE; then build it again",
    "bad-job": "edgevit bench BUNDLE {name}",
    "no-such-run": "edgevit collect {name}",
    "worker-timeout": "edgevit bench BUNDLE {name} --plan quick",
    "worker-died": "look at memory and kernel log: ssh to {name}, then dmesg | tail",
    "worker-memory": "edgevit bench BUNDLE {name} --memory-limit MB, or a smaller model",
    "no-profiler": "edgevit bench BUNDLE {name} --profile-ops with an ONNX artifact: ONNX Runtime has a profiler",
    "worker-failed": "edgevit target probe {name}",
    "busy": "wait for the other deployment or measurement to end, then try again",
    "interrupted": "try again: what arrived is kept",
    "no-previous": "edgevit deploy BUNDLE {name}",
    "no-active": "edgevit deploy BUNDLE {name}",
    "bad-request": "edgevit target probe {name}",
    "no-pillow": "edgevit target provision {name} --with-pillow",
    "bad-image": "give a JPEG or PNG file, or an .npy file of uint8 (height, width, 3)",
    "run-damaged": "check the card of {name} (ssh there, then dmesg | tail); then edgevit bench BUNDLE {name}",
    "no-systemd": "start the agent's daemon on {name} by what starts services there",
    "no-daemon": "edgevit target daemon logs {name}",
    "locked": "wait until then; if that operator is gone: the same command with --take-over",
    "needs-root": "type them there (ssh to {name}), then try again",
}


def map_refusal(name: str, refusal: Refusal) -> DeviceError:
    """A refusal → NotProvisioned where something must be installed first, else DeviceRefused with the agent's code."""
    hint = HINTS[refusal.code].format(name=name) if refusal.code in HINTS else refusal.hint
    if refusal.code == "no-systemd" and refusal.hint:
        hint = refusal.hint  # the device knows the line that starts its daemon
    if refusal.code == "no-python" and refusal.hint:
        # The device knows which package of its own Python is missing.
        hint = f"{refusal.hint}; then edgevit target provision {name}"
    message = f"{name} refused ({refusal.code}): {refusal.message}"
    if refusal.code in NEEDS_PROVISION:
        return NotProvisioned(message, hint=hint)
    return DeviceRefused(refusal.code, message, hint=hint)
