"""Rules of the repository: who imports whom, and that generated files are what the tools generate."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "gradwire_protocol": ROOT / "protos/gradwire_protocol",
    "gradwire": ROOT / "client/gradwire",
    "gradwire_coordinator": ROOT / "coordinator/gradwire_coordinator",
    "gradwire_stage": ROOT / "stage_server/gradwire_stage",
}


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_the_protocol_and_themselves(package):
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    allowed = {package, "gradwire_protocol"}
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported_packages(path)
        if name in PACKAGES and name not in allowed
    }
    assert not wrong


@pytest.mark.parametrize("package", ["gradwire_protocol", "gradwire_coordinator"])
def test_the_coordinator_needs_no_torch(package):
    users = {path.name for path in PACKAGES[package].rglob("*.py") if "torch" in imported_packages(path)}
    assert users <= {"torch_tensors.py"}


def test_regenerating_the_stubs_changes_nothing(tmp_path):
    folder = "gradwire_protocol/v1"
    shutil.copytree(ROOT / "protos" / folder, tmp_path / folder)
    protos = [str(path.relative_to(tmp_path)) for path in sorted((tmp_path / folder).glob("*.proto"))]
    out = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I.", *out, *protos], cwd=tmp_path, check=True)
    for made in (tmp_path / folder).glob("*_pb2*.py*"):
        committed = ROOT / "protos" / folder / made.name
        if made.name.endswith("_grpc.py") and "\nclass " not in made.read_text():
            assert not committed.exists(), f"{made.name} serves nothing"
        else:
            assert committed.read_text() == made.read_text(), f"{made.name} is stale: run `make protos`"


def test_the_readme_prints_the_quickstart_as_it_is():
    """A test of the SDK runs that file: what a newcomer copies works."""
    readme = (ROOT / "README.md").read_text()
    printed = readme.split("```python\n")[1].split("```")[0]
    _, _, code = (ROOT / "examples/quickstart.py").read_text().partition('"""\n\n')
    assert printed == code
