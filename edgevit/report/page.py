"""One self-contained HTML page of results: works offline, in light and dark, on a phone.

The page is drawn from one JSON document inside it, by the scripts of ``web`` with Observable Plot and d3, all embedded. Nothing
is fetched: the content security policy allows those scripts by their hashes, inline styles, and no network (a served page may
ask its own server alone). Text of others (names of models, targets, artifacts) is escaped here or set as text, never as HTML.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from device_agents.wire import Run
from edgevit.outputs import write_whole
from edgevit.report.page_answer import in_words
from edgevit.report.page_data import Shown, page_data
from edgevit.results.stats import Judge, summarize_all

SCRIPTS = (
    "base", "answers", "table", "tradeoff", "latency", "time", "inside", "accuracy", "fleet", "verdicts", "main",
)  # fmt: skip


def write_page(runs: Sequence[Run], path: Path, judge: Judge | None = None) -> None:
    """Write the page of ``runs`` to ``path``, whole or not at all. UsageError where it cannot be written."""
    write_whole(path, render_page(runs, judge))


def render_page(runs: Sequence[Run], judge: Judge | None = None) -> str:
    """The page of ``runs`` as text."""
    return render_data(page_data(Shown(summarize_all(runs, judge), runs, len(runs))))


def render_data(data: dict[str, Any]) -> str:
    """The document of :func:`~edgevit.report.page_data.page_data` as a page. Pure but for the files of this package."""
    parts = {
        **_fixed(live=bool(data["live"])),
        "TITLE": escape(data["title"]),
        "LEAD": escape(data["lead"]),
        "WORDS": "".join(f"<p>{escape(in_words(card))}</p>" for card in data["answers"]) or "<p>There are no measurements.</p>",
        "FOOT": escape(f"Written by edgevit on {data['written']}."),
        "DATA": script_json(data),
    }
    # One pass, so that a name such as @@DATA@@ inside a value stays what it is.
    return re.sub(r"@@([A-Z0-9]+)@@", lambda m: parts.get(m[1], m[0]), _file("web/page.html"))


@functools.cache
def policy(live: bool) -> str:
    """The content security policy of a page. Plot writes style attributes, so inline styles are allowed; scripts only by their
    hash; pictures only from the page; a page that is ``live`` may ask its own server."""
    digests = (hashlib.sha256(script.encode()).digest() for script in _scripts().values())
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    asks = " connect-src 'self';" if live else ""
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:;{asks} "
        "base-uri 'none'; form-action 'none'"
    )


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("\u2028", "\\u2028")


def _fixed(live: bool) -> dict[str, str]:
    return {
        **_scripts(),
        "CSP": escape(policy(live)),
        "CSS": _file("web/page.css"),
        "LICENCES": escape("\n\n".join(f"{n}\n{_file(f'vendor/{n}.LICENSE')}" for n in ("d3", "plot"))),
    }


@functools.cache
def _scripts() -> dict[str, str]:
    own = "\n".join(_file(f"web/{name}.js") for name in SCRIPTS)
    return {
        "D3": _file("vendor/d3.min.js"),
        "PLOT": _file("vendor/plot.min.js"),
        "JS": f'(() => {{\n"use strict";\n{own}}})();\n',
    }


def _file(name: str) -> str:
    return (resources.files("edgevit.report") / name).read_text("utf-8")
