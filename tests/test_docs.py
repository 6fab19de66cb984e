"""The code on the documentation's pages runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.sources import ROOT
from tinydiff.io.images import read_image

PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(text: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_blocks_are_found():
    assert blocks("a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny\n```\n") == ["x = 1\n", "y\n"]
    assert any(blocks(page.read_text(encoding="utf-8")) for page in PAGES)


def run(page: Path) -> None:
    """Every block after the one before it."""
    names: dict[str, object] = {}
    with torch.enable_grad():  # as outside the tests
        for number, block in enumerate(blocks(page.read_text(encoding="utf-8"))):
            exec(compile(block, f"{page.name} block {number}", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "library"], ids=lambda page: page.stem)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


def test_the_pure_functions_make_the_librarys_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(ROOT / "docs" / "library.md")
    first, again = read_image(tmp_path / "circle.png"), read_image(tmp_path / "again.png")
    assert first.shape == (128, 128, 3) and np.array_equal(first, again)
    shown = capsys.readouterr().out
    assert "(17, 128, 128, 3) (42,)" in shown and "height | height: 100 is not a multiple of 32" in shown
    longest = max(blocks((ROOT / "docs" / "library.md").read_text(encoding="utf-8")), key=len)
    assert len([line for line in longest.splitlines() if line and not line.startswith(("#", "import", "from"))]) <= 30
