"""A wheel, installed in another place, has every module, recipe and data file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.toys import ROOT

PACKAGED = ("core", "teacher_cache", "distill", "evaluate", "pipelines", "recipes", "examples")

IMPORT_ALL = """
import importlib, pathlib, sys
site = pathlib.Path(sys.argv[1])
modules = sorted(path.relative_to(site) for path in (site / "dpkd").rglob("*.py"))
for path in modules:
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(site), module.__file__
print(len(modules))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the installed wheel. It is built from a copy, so the build leaves nothing in the source tree."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in PACKAGED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(source), str(source)]
    subprocess.run(wheels, check=True)
    (wheel,) = source.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    return site


def run(site: Path, *arguments: str) -> str:
    """Standard output of Python with the installed wheel first on its path, in another directory than the clone."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=site, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_of_the_wheel_can_be_imported(site: Path) -> None:
    in_source = [path for name in PACKAGED for path in (ROOT / name).rglob("*.py")]
    assert int(run(site, "-c", IMPORT_ALL, str(site))) == len(in_source) > 100


def test_the_wheel_has_every_data_file(site: Path) -> None:
    for name in PACKAGED:
        files = {
            path.relative_to(ROOT / name)
            for path in (ROOT / name).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert files, name
        missing = [str(path) for path in sorted(files) if not (site / "dpkd" / name / path).is_file()]
        assert not missing, f"{name}: not in the wheel: {missing}"


def test_recipes_of_the_wheel_are_found(site: Path) -> None:
    listed = run(site, "-m", "dpkd.pipelines.cli", "recipes").splitlines()
    assert {"conversation", "quickstart", "rounds"} <= {line.split()[0] for line in listed}
    assert len(listed) == len([*(ROOT / "recipes").rglob("*.toml")])
    assert "dolly/train.jsonl" in run(site, "-m", "dpkd.pipelines.cli", "run", "quickstart", "--dry-run")
