"""The rules about who may import whom, read off the code."""

import ast
import os
import sys
from graphlib import CycleError, TopologicalSorter
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
SHIPPED = [name for name in PACKAGES if name not in ("minicpm_kernels_testing", "ptx_emulator")]
# Core from the ground up: a line may import the lines above it, and nothing on its own line but itself.
CORE_FLOORS = (
    ("errors", "atomic", "cores", "interrupts"),
    ("lfs",),
    ("json_file",),
    ("model", "text"),
    ("formats",),
    ("engines",),
    ("language_model",),
    ("load",),
    ("cli",),
)


def imported_modules(file):
    """Dotted names of all that ``file`` imports, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_imports(package):
    """Each room of a package (a folder, or a file beside the folders) and the rooms it imports."""
    folder, _ = PACKAGES[package]
    names = {entry.stem for entry in folder.iterdir()} - {"__init__", "__main__"}
    rooms = {}
    for file in folder.rglob("*.py"):
        room = file.relative_to(folder).parts[0].removesuffix(".py")
        if room not in names:
            continue
        for module in imported_modules(file):
            parts = module.split(".")
            if parts[0] == package and len(parts) > 1 and parts[1] in names - {room}:
                rooms.setdefault(room, set()).add(parts[1])
    return rooms


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down_only(package):
    folder, allowed = PACKAGES[package]
    files = list(folder.rglob("*.py"))
    assert files
    for file in files:
        ours = {module.split(".")[0] for module in imported_modules(file)} & set(PACKAGES) - {package}
        assert ours <= allowed, f"{file} imports {ours - allowed}"


@pytest.mark.parametrize("package", SHIPPED)
def test_rooms_of_a_package_import_in_no_circle(package):
    rooms = room_imports(package)
    assert rooms, package
    try:
        TopologicalSorter(rooms).prepare()
    except CycleError as error:
        pytest.fail(f"{package}: {' imports '.join(reversed(error.args[1]))}")


def test_rooms_of_core_import_the_floors_below_them():
    floor = {room: number for number, rooms in enumerate(CORE_FLOORS) for room in rooms}
    folder, _ = PACKAGES["minicpm_edge"]
    rooms = {entry.stem for entry in folder.iterdir() if entry.suffix == ".py" or entry.is_dir()}
    assert rooms - {"__init__", "__main__", "__pycache__"} == set(floor)
    for room, imported in room_imports("minicpm_edge").items():
        wrong = {other for other in imported if floor[other] >= floor[room]}
        assert not wrong, f"minicpm_edge.{room} imports {wrong}"


def test_no_file_is_past_the_stop():
    for folder, _ in PACKAGES.values():
        for file in folder.rglob("*.py"):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 600, file


@pytest.mark.skipif("MINICPM_TEST_INSTALLED" not in os.environ, reason="only where the wheel is installed")
def test_the_installed_wheel_is_what_is_tested():
    assert Path(minicpm_edge.__file__).is_relative_to(sys.prefix)
