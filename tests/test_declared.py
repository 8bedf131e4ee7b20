"""Whatever the package imports is declared: a dependency, or of an extra if it is imported late."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: extras that a user of the package installs, in contrast to those of the course and of its tests
EXTRAS = ("serve", "judge", "peft", "deepspeed", "corpus")
#: rooms, and files, that nobody enters without their extra, which they may import at once
ROOMS = {"serving": "serve", "scoring/corpus.py": "corpus"}
#: files that run in the environment of another program, and what that has
ELSEWHERE = {"rl/verl.py": {"verl", "aiohttp"}}


def normal(name: str) -> str:
    """A distribution's name as package indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names_of(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in requirements}


def imports_of(tree: ast.Module) -> dict[str, bool]:
    """Top-level package -> whether importing the module imports it."""
    found: dict[str, bool] = {}
    late = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        or (isinstance(function, ast.If) and "TYPE_CHECKING" in ast.unparse(function.test))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        for name in names:
            package = name.split(".")[0]
            if package not in sys.stdlib_module_names:
                found[package] = found.get(package, False) or node not in late
    return found


def test_every_import_is_declared():
    dependencies = names_of(PROJECT["dependencies"])
    optional = names_of(
        [line for name in EXTRAS for line in PROJECT["optional-dependencies"][name]]
    )
    providers = packages_distributions()
    missing, seen = [], set()
    for path in sorted((ROOT / "companion").rglob("*.py")):
        file = path.relative_to(ROOT / "companion")
        room = ROOMS.get(file.parts[0], ROOMS.get(file.as_posix()))
        own = names_of(PROJECT["optional-dependencies"][room]) if room else set()
        for package, at_once in imports_of(ast.parse(path.read_text(encoding="utf-8"))).items():
            if package == "companion":
                continue
            declared = dependencies | (own if at_once else optional)
            declared |= ELSEWHERE.get(path.relative_to(ROOT / "companion").as_posix(), set())
            provided_by = {normal(name) for name in providers.get(package, [package])}
            seen |= provided_by
            if not provided_by & declared:
                missing.append(f"{path.relative_to(ROOT)}: {package}")
    assert missing == []
    assert dependencies - seen == set(), "declared, and imported nowhere"


def test_imports_are_told_apart():
    tree = ast.parse(
        "import json, torch.nn\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    import jax\ntry:\n    import numpy\nexcept ImportError:\n    pass\n"
        "def f():\n    import peft\n    import torch\nfrom . import x\n"
    )
    assert imports_of(tree) == {"torch": True, "numpy": True, "jax": False, "peft": False}
