"""What a wheel holds: every file of the package that is no module, the small model among them."""

from __future__ import annotations

import tomllib

from tests.sources import PACKAGE, ROOT


def test_a_wheel_holds_every_file_of_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packed = {path for glob in settings["package-data"]["tinydiff"] for path in PACKAGE.glob(glob)}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others - packed == set()
    assert {PACKAGE / "shapes" / "model_index.json", PACKAGE / "serve" / "page" / "index.html"} <= packed
