"""The layout of the source: allowed imports, no circles, no dangerous calls, everything packaged."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.toys import ROOT

#: each package with its folders and root modules from the ground up: a part imports itself and earlier parts only
LAYERS = {
    "core": ("",),
    "teacher_cache": ("engines", "options", "store", "build", "audit", "serve"),
    "distill": ("losses", "options", "rows", "batches", "objectives", "live", "student", "run", "training"),
    "evaluate": ("metrics", "options", "inputs", "answers", "report", "views", "merge", "judge", "evaluation"),
    "pipelines": ("process", "bridges", "commands", "flags", "recipe", "planning", "reproduce", "cli"),
}
#: what each package may import of the others
BELOW = {
    "core": (),
    "teacher_cache": ("dpkd.core",),
    "distill": ("dpkd.core", "dpkd.teacher_cache"),
    "evaluate": ("dpkd.core", "dpkd.teacher_cache.engines"),
    "pipelines": ("dpkd.core", "dpkd.teacher_cache", "dpkd.distill", "dpkd.evaluate"),
}


def _sources() -> dict[str, Path]:
    files = {}
    for package in LAYERS:
        for file in sorted((ROOT / package).rglob("*.py")):
            files[".".join(("dpkd", *file.relative_to(ROOT).with_suffix("").parts))] = file
    assert len(files) > 100, "the source was not found"
    return files


SOURCES = _sources()


def _imports(module: str) -> set[str]:
    """Modules of dpkd that `module` imports anywhere in its text, those under TYPE_CHECKING included."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "dpkd":
                found.add(_module_of(name))
    return found - {module}


def _module_of(name: str) -> str:
    while name not in SOURCES and f"{name}.__init__" not in SOURCES:
        name, _, rest = name.rpartition(".")
        assert rest, "a name of dpkd that no file defines"
    return name if name in SOURCES else f"{name}.__init__"


IMPORTS = {module: _imports(module) for module in SOURCES}


def _edges() -> Iterator[tuple[str, str]]:
    for module, imported in IMPORTS.items():
        if module.count(".") == 2 and module.endswith(".__init__"):
            continue  # a package's own exports
        for other in sorted(imported):
            yield module, other


def test_packages_import_only_packages_below_them() -> None:
    wrong = []
    for module, other in _edges():
        package = module.split(".")[1]
        allowed = (f"dpkd.{package}", *BELOW[package])
        if not any(other == name or other.startswith(f"{name}.") for name in allowed):
            wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_folders_import_only_folders_below_them() -> None:
    wrong = []
    for module, other in _edges():
        package, part = module.split(".")[1:3]
        other_package, other_part = other.split(".")[1:3]
        layers = LAYERS[package]
        if package == "core" or package != other_package or "__init__" in (part, other_part):
            continue
        assert part in layers, f"{package}/{part} has no layer"
        if layers.index(other_part) > layers.index(part):
            wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_there_are_no_import_circles() -> None:
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(IMPORTS[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            circle = []
            while not circle or circle[-1] != module:
                circle.append(stack.pop())
            if len(circle) > 1:
                circles.append(" <-> ".join(sorted(circle)))

    for module in SOURCES:
        if module not in index:
            visit(module)
    assert not circles, "\n".join(circles)


def test_folders_are_small_enough_to_read() -> None:
    sizes: dict[Path, int] = {}
    for file in SOURCES.values():
        sizes[file.parent] = sizes.get(file.parent, 0) + 1
    assert not {folder: size for folder, size in sizes.items() if size > 16}


def test_evaluate_knows_no_cache_and_no_loss() -> None:
    below = [module for module in IMPORTS if module.startswith("dpkd.evaluate")]
    assert len(below) > 30
    for module in below:
        assert not {name for name in IMPORTS[module] if ".store." in name or ".distill." in name}, module


@pytest.mark.parametrize("package", LAYERS)
def test_no_pickle_and_no_remote_code(package: str) -> None:
    files = [file for module, file in SOURCES.items() if module.split(".")[1] == package]
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        for danger in ("import pickle", "torch.load(", "torch.save(", "trust_remote_code=True", "shell=True"):
            assert danger not in text, f"{file}: {danger}"


def test_every_folder_is_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {module.removesuffix(".__init__").rpartition(".")[0] for module in SOURCES if module[-8:] != "__init__"}
    folders |= {module.removesuffix(".__init__") for module in SOURCES if module.endswith(".__init__")}
    assert folders <= listed
