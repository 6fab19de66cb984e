"""The floors of ARCHITECTURE.md: a module imports only from floors below, and the words load no torch."""

import re
import subprocess
import sys

import pytest

from tests.sources import PACKAGE, ROOT, imports, modules, starts

WORDS = (
    "records",
    "entries",
    "paths",
    "values",
    "flags",
    "command_line",
    "unsupported",
    "config_file",
    "config",
    "environment",
    "keymap",
    "residency",
    "parallel.plan",
    "parallel.layout",
    "parallel.placements",
    "version",
)
HOUSE = {
    "words": (0, tuple(f"tinydiff.{name}" for name in WORDS)),
    "maths": (1, ("tinydiff.ops", "tinydiff.parallel")),
    "nets": (2, ("tinydiff.models",)),
    "engine": (3, ("tinydiff.sampling",)),
    "files": (3, ("tinydiff.io",)),
    "joints": (4, ("tinydiff.runtime",)),
    "faces": (
        5,
        tuple(
            f"tinydiff.{name}"
            for name in (
                "cli",
                "progress",
                "printing",
                "doctor",
                "advise",
                "weight_plan",
                "describe",
                "parity",
                "serve",
                "bench",
                "__main__",
            )
        ),
    ),
}
"""Room: (floor, what is in it). The package itself, its `__init__.py`, is a face."""

APART = {("engine", "nets"), ("files", "nets")}
"""Rooms that must not import one below them."""

LAZY = [
    "tinydiff",
    *(
        f"tinydiff.{name}"
        for name in (
            "cli",
            "doctor",
            "config",
            "values",
            "flags",
            "command_line",
            "config_file",
            "records",
            "models.registry",
        )
    ),
]
LAZY += [
    "tinydiff.advise",
    "tinydiff.weight_plan",
    "tinydiff.describe",
    "tinydiff.parallel.cost",
    "tinydiff.parallel.plan",
    "tinydiff.parallel.layout",
    "tinydiff.parallel.placements",
    "tinydiff.runtime.launch",
]
LAZY += [
    f"tinydiff.serve.{name}" for name in ("server", "app", "store", "files", "storage", "events", "warmup")
]
"""Modules that run without torch."""


def room(name):
    """The room of a module, or of a name in it: the longest prefix in the house tells. What is left are the
    package's own names.
    """
    found = [
        (len(prefix), room)
        for room, (_, prefixes) in HOUSE.items()
        for prefix in prefixes
        if starts(name, prefix)
    ]
    return max(found, default=(0, "faces"))[1]


def broken(module, source):
    """What a module imports against the rules, as sentences."""
    here = room(module)
    for name, line, _ in imports(source, module):
        if name == "?":
            yield f"{module}:{line} hides what it imports"
        if not starts(name, "tinydiff"):
            continue
        there = room(name)
        if (here, there) in APART or (there != here and HOUSE[there][0] >= HOUSE[here][0]):
            yield f"{module}:{line} ({here}) imports {name} ({there})"


def circles(sources):
    """Groups of modules that import each other, directly or through others, as sorted lists.

    An import for types alone counts too: whoever reads one of the modules has to read the other.
    """
    targets = {
        module: {_module_of(name, sources) for name, _, _ in imports(source, module)} - {module, None}
        for module, source in sources.items()
    }
    reached = {module: _reached(module, targets) for module in targets}
    groups = {
        tuple(sorted({module, *(other for other in reached[module] if module in reached[other])}))
        for module in targets
    }
    return sorted(list(group) for group in groups if len(group) > 1)


def _module_of(name, sources):
    """The module that an imported name is, or lies in."""
    parts = name.split(".")
    prefixes = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in sources), None)


def _reached(module, targets):
    """Modules that `module` imports, directly or through others."""
    found, waiting = set(), [module]
    while waiting:
        new = targets[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def torch_at_run_time(source):
    return [name for name, _, typing_only in imports(source) if starts(name, "torch") and not typing_only]


def loaded(code, name):
    """Whether `name` is loaded after `code` has run in a fresh interpreter."""
    run = [sys.executable, "-c", f"{code}\nimport sys\nprint({name!r} in sys.modules)"]
    return (
        subprocess.run(run, check=True, capture_output=True, text=True, cwd=PACKAGE.parent).stdout.strip()
        == "True"
    )


def test_every_module_has_a_floor_and_is_in_the_diagram():
    placed = {prefix.split(".")[1] for _, prefixes in HOUSE.values() for prefix in prefixes}
    top = {module.split(".")[1] for module in modules() if module != "tinydiff"}
    assert top <= placed
    picture = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("```")[1]
    assert {name for name in top if not re.search(rf"\b{name}\b", picture)} == set()


def test_a_floor_imports_only_from_floors_below():
    found = {module: list(broken(module, source)) for module, source in modules().items()}
    assert len(found) > 25
    assert [sentence for sentences in found.values() for sentence in sentences] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tinydiff.ops.norm", "from tinydiff.models import wan"),
        ("tinydiff.ops.norm", "def f():\n    from tinydiff.sampling.loop import run"),
        ("tinydiff.ops.norm", "from ..models.wan import block"),
        ("tinydiff.parallel.plan", "from tinydiff.parallel import mesh"),
        ("tinydiff.models.wan", "import tinydiff.io.weights as weights"),
        ("tinydiff.sampling.loop", "from tinydiff.io import weights"),
        ("tinydiff.sampling.loop", "import tinydiff.models.wan"),
        ("tinydiff.io.weights", "from tinydiff.sampling.solvers import Table"),
        ("tinydiff.io.weights", "from tinydiff.models.registry import MODELS"),
        ("tinydiff.io.weights", "if TYPE_CHECKING:\n    from tinydiff.runtime.blueprint import Model"),
        ("tinydiff.runtime.pipeline", "import tinydiff\nmodel = tinydiff.load()"),
        ("tinydiff.runtime.pipeline", "from tinydiff import generate"),
        ("tinydiff.runtime.pipeline", "import tinydiff"),
        ("tinydiff.runtime.pipeline", "import tinydiff\nprint(tinydiff.__version__)"),
        ("tinydiff.runtime.pipeline", "import importlib\nimportlib.import_module('tinydiff.cli')"),
        ("tinydiff.runtime.pipeline", "from importlib import import_module\nimport_module(name)"),
        ("tinydiff.records", "from tinydiff.ops.weights import Weights"),
    ],
)
def test_the_check_finds_a_broken_floor(module, source):
    assert len(list(broken(module, source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "tinydiff.runtime.pipeline",
            "from tinydiff import config\nfrom tinydiff.version import __version__",
        ),
        (
            "tinydiff.sampling.loop",
            "from tinydiff.sampling.solvers import Table\nfrom tinydiff.parallel.plan import Plan",
        ),
        ("tinydiff.config", "from tinydiff import flags\nimport json"),
        ("tinydiff.cli", "import tinydiff\ntinydiff.load()\nfrom tinydiff.models import registry"),
    ],
)
def test_the_check_lets_good_imports_pass(module, source):
    assert list(broken(module, source)) == []


def test_no_modules_import_each_other():
    assert circles(modules()) == []


def test_the_check_for_circles_can_fail():
    sources = {
        "p.a": "def f():\n    from p.b import x",
        "p.b": "import p.c",
        "p.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import f",
        "p.d": "from p import a",
    }
    assert circles(sources) == [["p.a", "p.b", "p.c"]]
    assert circles({**sources, "p.c": ""}) == []


def test_the_lowest_floor_imports_no_torch():
    sources = modules()
    inside = ("tinydiff.cli", "tinydiff.doctor", "tinydiff.runtime.launch")  # import it where they need it
    words = [
        module for module in sources if module not in inside and (room(module) == "words" or module in LAZY)
    ]
    assert len(words) >= len(LAZY) - 3
    assert {module: names for module in words if (names := torch_at_run_time(sources[module]))} == {}


def test_the_check_for_torch_can_fail():
    assert torch_at_run_time("def f():\n    from torch import nn") == ["torch.nn"]
    assert (
        torch_at_run_time(
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nelse:\n    import json"
        )
        == []
    )
    assert torch_at_run_time("import torchvision") == []


@pytest.mark.parametrize("module", LAZY)
def test_importing_it_loads_no_torch(module):
    assert not loaded(f"import {module}", "torch")


def test_the_check_for_loaded_modules_can_fail():
    assert loaded("import json", "json.decoder") and not loaded("import json", "wave")
