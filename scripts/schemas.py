"""Write docs/schema/*.schema.json, the JSON Schemas that editors use for profiles, recipes, studies and fleet files.

python scripts/schemas.py           write them
python scripts/schemas.py --check   exit 1, naming the files, where one is not what the code says
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def schemas() -> dict[str, dict[str, Any]]:
    """File name → schema, from the models themselves."""
    from pydantic import TypeAdapter

    from edgevit.fleet import inventory
    from edgevit.profile import profile_schema
    from edgevit.recipe import recipe_schema
    from edgevit.study.file import study_schema

    # A fleet file names its targets as a mapping or as a list; an editor is told of both.
    fleet: TypeAdapter[Any] = TypeAdapter(inventory._Mapped | inventory._Listed)
    return {"profile": profile_schema(), "recipe": recipe_schema(), "study": study_schema(), "fleet": fleet.json_schema()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    folder = ROOT / "docs" / "schema"
    folder.mkdir(parents=True, exist_ok=True)
    stale = []
    for name, schema in schemas().items():
        path = folder / f"{name}.schema.json"
        document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
        text = json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        if check and (not path.exists() or path.read_text("utf-8") != text):
            stale.append(str(path.relative_to(ROOT)))
        elif not check:
            path.write_text(text, "utf-8")
    if stale:
        print(f"out of step with the code: {', '.join(stale)}; run python scripts/schemas.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
