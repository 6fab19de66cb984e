"""What is said in one place only, and how long and how named a file may be."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from tests.sources import PACKAGE, ROOT, modules, said, starts
from tinydiff.models import registry
from tinydiff.models.classes import RECORDS
from tinydiff.models.family import Denoiser

SINGLE_PLACES = {
    "torch.compile": ("tinydiff.sampling.compile",),
    "torch.compiler": ("tinydiff.sampling.compile",),
    "torch._": ("tinydiff.sampling.compile",),
    "torch.distributed": ("tinydiff.parallel",),
    "os.environ": ("tinydiff.environment",),
    "os.getenv": ("tinydiff.config",),
    "os.putenv": ("tinydiff.config",),
    "diffusers": ("tinydiff.parity", "tinydiff.runtime.diffusers_backend"),
    "transformers": ("tinydiff.parity",),
    "torch.nn.Module": ("tinydiff.parity",),
}
"""Dotted name, with all below it -> the modules or directories that may say it. `torch._` is whatever torch
keeps private.
"""

VAGUE = {"util", "utils", "helper", "helpers", "base", "common", "manager", "misc"}
LONGEST = 600
TREES = ("tinydiff", "training", "benchmarks", "tests")


def misplaced(module, source):
    """(name, rule) for every name that this module must not say."""
    for rule, places in SINGLE_PLACES.items():
        if not any(starts(module, place) for place in places):
            yield from (
                (name, rule) for name in said(source) if starts(name, rule) and not name.endswith("__")
            )


def files():
    return [path for tree in TREES for path in sorted((ROOT / tree).rglob("*.py"))]


def vague(path: Path):
    """The parts of a file's path that say nothing about what is in it."""
    return VAGUE & {part.lower() for part in path.with_suffix("").parts}


def inherited(source):
    """Bases of a module's classes that are its own classes or another module's of this package."""
    tree = ast.parse(source)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    ours = {node.name for node in classes}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or starts(node.module or "", "tinydiff")):
            ours |= {alias.asname or alias.name for alias in node.names}
    bases = [ast.unparse(base) for node in classes for base in node.bases]
    return [base for base in bases if base.partition(".")[0] in ours]


def test_each_thing_is_said_in_its_place():
    assert {
        module: found for module, source in modules().items() if (found := list(misplaced(module, source)))
    } == {}


def test_the_compiler_is_called_where_it_may_be():
    assert "torch.compile" in said(modules()["tinydiff.sampling.compile"])


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.compile(f)",
        "import torch as t\nfast = t.compile",
        "from torch import compile",
        "from torch import compile as fast",
        "import torch\n@torch.compiler.disable\ndef f(): pass",
        "import torch._dynamo",
        "from torch._inductor import config",
        "import torch\ntorch._dynamo.mark_dynamic(x, 0)",
        "import torch.distributed as dist",
        "def f():\n    from torch import distributed",
        "import os\nos.environ['A']",
        "from os import environ",
        "import os as system\nsystem.getenv('A')",
        "import diffusers",
        "def f():\n    from diffusers.models import AutoencoderKLWan",
        "from transformers import T5Tokenizer",
        "from torch import nn\nclass Block(nn.Module): pass",
    ],
)
def test_the_check_finds_what_is_misplaced(source):
    assert list(misplaced("tinydiff.models.wan", source))


def test_the_check_lets_good_sources_pass():
    for module, source in (
        ("tinydiff.environment", "import os\nos.environ.get('A')"),
        ("tinydiff.parallel.mesh", "import torch.distributed as dist\ndist.init_process_group()"),
        (
            "tinydiff.ops.norm",
            "import os, torch\nimport torch.nn.functional as F\nos.path.join('torch.compile')",
        ),
        ("tinydiff.ops.norm", "import torch\ntorch.compiled(torch.__version__)\ndiffusers = 1"),
    ):
        assert list(misplaced(module, source)) == []


def test_no_file_has_a_name_that_says_nothing():
    assert [path for path in files() if vague(path.relative_to(ROOT))] == []
    assert (
        vague(Path("tinydiff/utils/text.py"))
        and vague(Path("tinydiff/base.py"))
        and not vague(Path("tinydiff/database.py"))
    )


def test_no_module_is_longer_than_600_lines():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files()
    }
    assert len(lengths) > 50 and lengths["tinydiff/models/wan.py"] > 100
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_class_of_the_package_inherits_from_another():
    assert {module: bases for module, source in modules().items() if (bases := inherited(source))} == {}
    assert inherited("class A: pass\nclass B(A): pass") == ["A"]
    assert inherited("from tinydiff.models import wan\nclass Config(wan.Config): pass") == ["wan.Config"]
    assert (
        inherited("from typing import NamedTuple\nclass Step(NamedTuple): pass\nclass E(ValueError): pass")
        == []
    )


def test_the_package_is_where_the_tests_look():
    assert (PACKAGE / "__init__.py").is_file()


GENERIC = ("runtime", "serve", "parallel", "sampling", "cli.py", "advise.py", "config.py")
"""What serves every family and may know none."""
COMMON = {"dim", "layers"}
"""Names of config fields that our own records have too."""


def _families_told_apart(source: str, names: set[str]) -> list[str]:
    """Reads of a family's config field, and strings that name a family."""
    families = {row.family for row in registry.MODELS}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Compare):
            literals = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            found += [ast.unparse(node) for value in literals if value in families]
    return found


def test_generic_code_reads_no_field_of_a_familys_config_and_compares_no_familys_name():
    configs = [family.config for family in RECORDS.values() if isinstance(family, Denoiser)]
    names = {f.name for config in configs for f in fields(config)} - COMMON
    assert _families_told_apart("x = net.image_dim\ny = row.family == 'sd3'", names) == [
        "net.image_dim",
        "row.family == 'sd3'",
    ]
    places = [
        path
        for name in GENERIC
        for path in ([PACKAGE / name] if name.endswith(".py") else sorted((PACKAGE / name).glob("*.py")))
    ]
    assert len(places) > 50
    wrong = {str(path): found for path in places if (found := _families_told_apart(path.read_text(), names))}
    assert wrong == {}
