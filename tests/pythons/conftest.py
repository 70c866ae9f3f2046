from __future__ import annotations

import os

import pytest

from scripts.pythons import REQUIREMENTS, is_ready


@pytest.fixture(params=list(REQUIREMENTS))
def version(request: pytest.FixtureRequest) -> str:
    """Each Python that a device may have, ``3.8`` and on."""
    if not is_ready(request.param):
        why = f"no environment for Python {request.param}: python scripts/pythons.py {request.param}"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    return str(request.param)
