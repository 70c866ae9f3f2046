"""The commands of docs/study.md, run in order on the study that stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.docs.test_tutorial import ROOT, console_commands


def test_every_command_of_the_study_page_works_in_order(tmp_path: Path, home: Path) -> None:
    page = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    (study,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "small.yaml").write_text(study)
    said = []
    for command in console_commands(page):
        words = shlex.split(command)
        # One pass over the data teaches enough; the page's reader trains all ten.
        own = [*words[1:], "--epochs", "1"] if words[0] == "python" else ["-m", *words]
        done = subprocess.run(
            [sys.executable, *own], cwd=tmp_path, capture_output=True, text=True, timeout=400, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        said.append(done)
    first, second = said[-2:]
    assert "small: 4 cells built, 0 taken from the cache, 4 measured" in first.stderr
    assert "small: 0 cells built, 4 taken from the cache" in second.stderr
    assert max(len(line) for line in first.stdout.splitlines()) <= 100
    for recipe in ("fp32", "int8-dynamic", "merge-int8", "prune-half"):
        assert f"| {recipe} |" in (tmp_path / "small.md").read_text() and recipe in second.stdout
