"""Names and sizes that are known before anything of the wire is."""

from __future__ import annotations

SHA256_PATTERN = r"[0-9a-f]{64}"
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
MAX_JOB_BYTES = 1024 * 1024
