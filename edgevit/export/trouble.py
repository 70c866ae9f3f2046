"""What an exporter's exception means, in a line: the tools wrap the reason many times over and print graphs beside it."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

_DATA_DEPENDENT = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "UserErrorType.DYNAMIC_CONTROL_FLOW")
_NO_OPERATOR = re.compile(
    r"No (?:ONNX function|decompositions?).*?for <OpOverload\(op='([\w.:]+)'|No lowering.*?\[?([\w.:]+)\]?"
)
_INSTALLED = re.compile(r"\S*/site-packages/")
"""Where this machine keeps its packages says nothing about the reason."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def explain_failure(error: BaseException, format_: str) -> str:
    """Why a module could not be exported: a decision that hangs on the image's values with the line it stands in, an operator
    that the format does not have, else the innermost reason."""
    chain = list(_chain(error))
    texts = [f"{type(e).__name__}: {_COLOUR.sub('', str(e))}" for e in chain]
    if any(word in text for text in texts for word in (*_DATA_DEPENDENT, "data-dependent")):
        return (
            f"its forward decides by the values of the image{_place(chain)}: data-dependent control flow. A file computes the "
            f"same graph for every image; expected torch.where, or a decision by shapes alone"
        )
    for text in texts:
        found = _NO_OPERATOR.search(text)
        if found:
            return f"{format_} has no operator for {found.group(1) or found.group(2)}"
    lines = [line.strip() for line in texts[-1].splitlines() if line.strip()]
    return _INSTALLED.sub("", lines[0])[:400]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _place(chain: list[BaseException]) -> str:
    """`` at file:line, `code``` of the innermost ``forward`` that is not torch's own, or nothing."""
    for error in reversed(chain):
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if frame.name.startswith("forward") and "/torch/" not in frame.filename.replace("\\", "/"):
                return f" at {frame.filename.rpartition('/')[2]}:{frame.lineno}, `{(frame.line or '').strip()[:120]}`"
    return ""


@contextlib.contextmanager
def quietly() -> Iterator[Any]:
    """The tools print their stages and graphs; what they did is read back from the file instead."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
