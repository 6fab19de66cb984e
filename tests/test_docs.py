"""The code on the documentation's pages runs as it stands, and docstrings can be read line by line."""

from __future__ import annotations

import ast
import re
from contextlib import chdir, redirect_stdout
from io import StringIO
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.sources import ROOT
from tinydiff.io.images import read_image

PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}


def blocks(text: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Page -> (the directory it ran in, what it printed). The blocks of a page run in order."""
    done = {}
    for name, text in PAGES.items():
        folder, printed, names = tmp_path_factory.mktemp(name), StringIO(), {}
        with (
            chdir(folder),
            redirect_stdout(printed),
            torch.enable_grad(),
        ):  # gradients on, as outside the tests
            for number, block in enumerate(blocks(text)):
                exec(compile(block, f"{name}.md, block {number}", "exec"), names)
        done[name] = (folder, printed.getvalue())
    return done


def test_blocks_are_found():
    assert blocks("a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny\n```\n") == ["x = 1\n", "y\n"]
    assert len(blocks(PAGES["library"])) == 3


def test_every_page_runs(ran):
    assert set(ran) == set(PAGES)


def test_the_pure_functions_make_the_librarys_image_in_thirty_lines(ran):
    folder, printed = ran["library"]
    first, again = read_image(folder / "circle.png"), read_image(folder / "again.png")
    assert first.shape == (128, 128, 3) and np.array_equal(first, again)
    assert "(17, 128, 128, 3) (42,)" in printed and "height | height: 100 is not a multiple of 16" in printed
    lines = [
        line
        for line in blocks(PAGES["library"])[-1].splitlines()
        if line and not line.startswith(("#", "import", "from"))
    ]
    assert len(lines) <= 30


def test_the_family_on_the_page_is_evaluated(ran):
    assert ran["add-a-family"][1] == "(2, 15, 8)\n"


def test_every_test_that_a_page_names_is_there():
    named = {
        name
        for page in (ROOT / "docs").glob("*.md")
        for name in re.findall(r"`(tests/\S+\.py::\w+)`", page.read_text())
    }
    assert len(named) >= 10
    for path, test in (name.split("::") for name in named):
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path} has no {test}"


def test_no_page_says_a_sentence_twice_in_its_prose():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "tinydiff/shapes/README.md"):
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        paragraphs = [part.strip() for part in prose.split("\n\n") if len(part.strip()) > 80]
        assert len(paragraphs) == len(set(paragraphs)), page.name


def test_the_glossary_has_at_most_twenty_words_and_each_is_used():
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    lines = page.partition("## Glossary")[2].partition("\n## ")[0].splitlines()
    words = [line.split("|")[1].split("(")[0].strip() for line in lines if line.startswith("| ")][1:]
    code = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "tinydiff").rglob("*.py")).lower()
    assert 15 < len(words) <= 20
    assert [word for word in words if len(re.findall(rf"\b{word.replace(' ', '.')}", code)) < 3] == []


def test_every_function_that_the_architecture_page_names_is_there():
    page, package = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), ROOT / "tinydiff"
    names = re.findall(r"`((?:\w+/)*\w+)\.(\w+)`", page)
    files = {(at, name): package / f"{at}.py" for at, name in names if "/" in at and name not in ("py", "md")}
    assert len(files) > 4
    for (at, name), file in files.items():
        assert re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")), f"{at}.{name}"


DEFINED = ast.FunctionDef | ast.ClassDef


def public(module: ast.Module) -> list[tuple[str, ast.AST]]:
    """The module itself, its public functions and classes, and their public methods."""
    top = [("module", module), *((n.name, n) for n in module.body if isinstance(n, DEFINED))]
    shown = [(name, n) for name, n in top if name[0] != "_"]
    return shown + [
        (f"{name}.{m.name}", m)
        for name, n in shown
        if isinstance(n, ast.ClassDef)
        for m in n.body
        if isinstance(m, ast.FunctionDef) and m.name[0] != "_"
    ]


def faults(source: str) -> list[str]:
    """What has no docstring, or one whose first sentence runs on to the second line."""
    described = [(name, n, ast.get_docstring(n)) for name, n in public(ast.parse(source))]
    absent = [name for name, n, text in described if text is None and isinstance(n, ast.FunctionDef)]
    absent = [name for name in absent if "." not in name]  # a method may be its protocol's or its base's
    return absent + [name for name, _, text in described if text and text.splitlines()[0][-1] not in ".:?!"]


def test_every_public_function_says_in_its_first_line_what_it_is():
    files = sorted((ROOT / "tinydiff").rglob("*.py"))
    found = chain.from_iterable(
        (f"{file.relative_to(ROOT)}: {name}" for name in faults(file.read_text(encoding="utf-8")))
        for file in files
    )
    assert list(found) == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def f():\n    return 1", "f"),
        ('def f():\n    """A sentence that runs\n    on."""', "f"),
        (
            'class A:\n    """A."""\n\n    def f(self):\n        """A sentence that\n        runs on."""',
            "A.f",
        ),
        ('"""A module whose sentence\nruns on."""', "module"),
    ],
)
def test_a_docstring_that_does_not_is_found(source, name):
    assert faults(source) == [name]
