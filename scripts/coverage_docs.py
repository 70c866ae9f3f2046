"""Write docs/coverage.md from docs/coverage.json; ``--check`` fails where it lags.

python scripts/coverage_docs.py RUN.json…   take over the rows of `edgevit coverage --json`, later files last, and write the
                                            page
python scripts/coverage_docs.py             write the page
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA = ROOT / "docs" / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"
KEPT = ("family", "kind", "model", "format", "scheme", "parameters", "macs", "bytes", "integer_layers", "min_cosine", "stage")

HEAD = """# Which families can be exported

Every transformer and hybrid family of timm that classifies, by its smallest member, to ONNX and TFLite, in float and in dynamic
int8. Made by `edgevit coverage --json` and `python scripts/coverage_docs.py`; `edgevit coverage FAMILY` repeats a line.

Weights are drawn at random, since nothing here is about accuracy, and drawn so that every part of a model takes part: an
initialisation leaves LayerScale at 1e-5 and position biases at zero, and a file that computes them wrongly would agree.
BatchNorms get the statistics of the images. A model whose logits do not tell the images apart would be a failure of its own.
The gates are those of a build (`edgevit/export/parity.py`), over 8 synthetic images; a float and an int8 file come from one
conversion, of the module with its norms folded exactly, held against the module before that.

A figure is the smallest cosine between the file's logits and the module's. A failure is named below the table.
"""


def merged(paths: list[Path]) -> dict[str, Any]:
    """The kept document with the rows of ``paths`` put in the place of those for the same family, format and scheme."""
    from edgevit.coverage.families import FAMILIES

    document: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {"rows": []}
    rows = {(r["family"], r["format"], r["scheme"]): r for r in document["rows"]}
    for path in paths:
        run = json.loads(path.read_text(encoding="utf-8"))
        document["tools"] = {k: v for k, v in run["tools"].items() if k != "edgevit"}
        for row in run["rows"]:
            kept = {key: row[key] for key in KEPT if row[key] not in ("", 0, None)}
            if row["min_cosine"] is not None:
                kept["min_cosine"] = round(row["min_cosine"], 6)
            if row["reason"]:
                kept["reason"] = re.sub(r"\S*/site-packages/", "", row["reason"])
            rows[row["family"], row["format"], row["scheme"]] = kept
    order = {family.name: i for i, family in enumerate(FAMILIES)}
    document["rows"] = sorted(
        (r for r in rows.values() if r["family"] in order), key=lambda r: (order[r["family"]], r["format"], r["scheme"])
    )
    return document


def page(document: dict[str, Any]) -> str:
    """The whole page."""
    from edgevit.coverage.cells import Row
    from edgevit.coverage.families import FAMILIES, NOT_CLASSIFIERS
    from edgevit.report.coverage_view import CELLS, shares

    rows = [Row(**r) for r in document["rows"]]
    known = {(r.family, r.format, r.scheme): r for r in rows}
    lines = [HEAD]
    lines += [f"- {line}" for line in shares(rows)]
    tools = ", ".join(f"{k} {v}" for k, v in sorted(document["tools"].items()))
    lines += ["", f"With {tools}.", ""]
    titles = ["family", "smallest member", "kind", "M parameters", "M MACs", *(f"{f} {s}" for f, s in CELLS)]
    lines += [f"| {' | '.join(titles)} |", f"|{'---|' * 3}{'---:|' * (len(titles) - 3)}"]
    for family in FAMILIES:
        found = [known.get((family.name, *cell)) for cell in CELLS]
        sized = next((r for r in found if r is not None and r.parameters), None)
        cells = ["not run" if r is None else "**failed**" if not r.passed else f"{r.min_cosine:.5f}" for r in found]
        sizes = [f"{sized.parameters / 1e6:.1f}", f"{sized.macs / 1e6:,.0f}"] if sized else ["–", "–"]
        lines.append(f"| {' | '.join([family.name, f'`{family.member}`', family.kind, *sizes, *cells])} |")
    failed = [r for r in rows if not r.passed]
    if failed:
        lines += ["", "## Failures", ""]
        lines += [f"- **{r.family}**, {r.format} {r.scheme}, {r.stage}: {' '.join(r.reason.split())}" for r in failed]
    lines += ["", "## Left out", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in NOT_CLASSIFIERS.items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    if "--check" in argv:
        lags = PAGE.read_text(encoding="utf-8") != page(json.loads(DATA.read_text(encoding="utf-8")))
        if lags:
            print(f"{PAGE.name} is not what {DATA.name} says; run python scripts/coverage_docs.py", file=sys.stderr)
        return int(lags)
    document = merged([Path(a) for a in argv])
    DATA.write_text(json.dumps(document, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(document), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
