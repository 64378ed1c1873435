"""The house's rules about who may import whom, read off the code."""

import ast
import os
import sys
from pathlib import Path

import pytest

import minicpm_edge

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "minicpm_kernels": (ROOT / "kernels" / "minicpm_kernels", set()),
    "minicpm_edge": (ROOT / "minicpm_edge", {"minicpm_kernels"}),
    "minicpm_training": (ROOT / "training" / "minicpm_training", {"minicpm_edge", "minicpm_kernels"}),
    "minicpm_export": (ROOT / "export" / "minicpm_export", {"minicpm_edge", "minicpm_kernels"}),
    "minicpm_serve": (ROOT / "serve" / "minicpm_serve", {"minicpm_edge", "minicpm_kernels"}),
    # Test tools, which no wheel holds: nothing that ships may import them.
    "minicpm_kernels_testing": (
        ROOT / "kernels" / "testing" / "minicpm_kernels_testing",
        {"minicpm_kernels"},
    ),
    "ptx_emulator": (ROOT / "kernels" / "ptx_emulator" / "ptx_emulator", set()),
}


def imported_packages(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down_only(package):
    folder, allowed = PACKAGES[package]
    files = list(folder.rglob("*.py"))
    assert files
    for file in files:
        ours = set(imported_packages(file)) & set(PACKAGES) - {package}
        assert ours <= allowed, f"{file} imports {ours - allowed}"


def test_no_file_is_past_the_stop():
    for folder, _ in PACKAGES.values():
        for file in folder.rglob("*.py"):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 600, file


@pytest.mark.skipif("MINICPM_TEST_INSTALLED" not in os.environ, reason="only where the wheel is installed")
def test_the_installed_wheel_is_what_is_tested():
    assert Path(minicpm_edge.__file__).is_relative_to(sys.prefix)
