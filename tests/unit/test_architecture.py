"""The walls of the house: who may import whom, and what a wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"device_agents.wire", "device_agents.verify", "device_agents.sshsig", "device_agents.verdict", "device_agents.errors"}
ON_DEVICE = {"numpy", "onnxruntime", "ai_edge_litert", "tflite_runtime", "PIL", "device_agents"}


def imports(path: Path) -> set[str]:
    """Every module a file imports when it runs, with the names of ``from package import module`` spelled out."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    skipped = {id(child) for block in for_types for statement in block.body for child in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            if node.module in ("device_agents", "edgevit"):
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_the_host_imports_only_what_is_shared_with_the_device() -> None:
    for path in (ROOT / "edgevit").rglob("*.py"):
        used = {m for m in imports(path) if m.startswith("device_agents.")}
        assert used <= SHARED, f"{path.relative_to(ROOT)} imports {sorted(used - SHARED)}"


def test_the_device_imports_the_standard_library_numpy_and_a_runtime() -> None:
    for path in (ROOT / "device_agents").rglob("*.py"):
        outside = {m.split(".")[0] for m in imports(path)} - set(sys.stdlib_module_names) - ON_DEVICE
        assert not outside, f"{path.relative_to(ROOT)} imports {sorted(outside)}"


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        (
            "paramiko",
            {
                f"transport/{name}.py"
                for name in ("ssh", "ssh_connect", "ssh_connection", "ssh_errors", "ssh_login", "sshconfig")
            },
        ),
        ("sqlalchemy", {f"results/{name}.py" for name in ("engine", "rows", "schema", "store")}),
    ],
)
def test_a_foreign_library_has_one_door(module: str, allowed: set[str]) -> None:
    users = {
        path.relative_to(ROOT / "edgevit").as_posix()
        for path in (ROOT / "edgevit").rglob("*.py")
        if any(m.split(".")[0] == module for m in imports(path))
    }
    assert users and users <= allowed


def test_only_the_commands_end_the_process() -> None:
    for path in (ROOT / "edgevit").rglob("*.py"):
        calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        assert path.parent.name == "cli" or "sys.exit" not in calls, path


def test_a_wheel_installed_elsewhere_lists_profiles_and_benches_local(tmp_path: Path, home: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True, timeout=240
    )
    (wheel,) = tmp_path.glob("edgevit-*.whl")
    place = tmp_path / "elsewhere"
    # The libraries come from this environment; edgevit and device_agents must come from the wheel.
    venv.create(place, with_pip=False)
    site = next(place.glob("lib/python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=240
    )
    libraries = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "zz-libraries.pth").write_text(libraries + "\n")
    python = place / "bin" / "python"

    def run(*argv: str) -> str:
        done = subprocess.run([str(python), *argv], capture_output=True, text=True, cwd=tmp_path, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import edgevit, device_agents; print(edgevit.__file__, device_agents.__file__)").count(str(site)) == 2
    assert "raspberry-pi-5" in run("-m", "edgevit", "profiles")
    run("-m", "edgevit", "key", "make")
    from tests.support.agent_bundle import Signer, make_bundle

    bundle = make_bundle(Signer(home / "config" / "signing_key")).write(tmp_path / "bundle")
    assert "tiny-onnx-fp32" in run("-m", "edgevit", "bench", str(bundle), "local", "--plan", "quick")
