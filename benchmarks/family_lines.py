"""What a family costs in lines: its own file, and what it adds to the tables and tests outside it. Prints the table of
docs/add-a-family.md.

A row of a table is a family's if it names it; a definition beside the table is a family's if only its rows lead there. What several
families share (`models/joint.py`, `models/recipe.py`, the floors below, encoders, autoencoders) is counted for none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from tinydiff.models import registry
from tinydiff.parity.denoisers import DENOISERS
from tinydiff.parity.models import GROUPS
from tinydiff.runtime.blueprint import NETS

ROOT = Path(__file__).parents[1]
FIRST = "wan"
"""Came with the house, so that it tells nothing of adding to it."""

Spans = set[int]
"""Numbers of lines of a file."""


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _span(node: ast.AST) -> Spans:
    return set(range(getattr(node, "lineno", 0), (getattr(node, "end_lineno", None) or 0) + 1))


def _names(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """Name -> the statement at the top of a module that makes it."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else [name for each in targets for name in _names(each)]
        found |= dict.fromkeys(names, node)
    return found


def _reached(node: ast.AST, definitions: Mapping[str, ast.stmt]) -> set[str]:
    """Names of the definitions that a row leads to, directly or by others."""
    seen: set[str] = set()
    waiting = _names(node) & definitions.keys()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting |= (_names(definitions[name]) & definitions.keys()) - seen
    return seen


def table_lines(path: Path, table: str, owners: Iterable[str | None]) -> dict[str, int]:
    """Family -> lines of the rows of a tuple or dict and of what only they use. owners: the family of each row, None for no family's."""
    definitions = _definitions(_tree(path))
    value = getattr(definitions.pop(table), "value", None)
    assert isinstance(value, ast.Tuple | ast.Dict)
    rows: list[ast.expr] = value.values if isinstance(value, ast.Dict) else value.elts
    spans: dict[str, Spans] = {}
    users: dict[str, set[str | None]] = {}
    for row, owner in zip(rows, owners, strict=True):
        if owner is not None:
            spans.setdefault(owner, set()).update(_span(row))
        for name in _reached(row, definitions):
            users.setdefault(name, set()).add(owner)
    for name, families in users.items():
        if len(families) == 1 and (family := families.copy().pop()) is not None:
            spans[family] |= _span(definitions[name])
    return {family: len(lines) for family, lines in spans.items()}


def own_files(family: str) -> list[Path]:
    """The family's file, and modules beside it that no other family imports."""
    folder = ROOT / "tinydiff" / "models"
    families = {row.family for row in registry.MODELS}
    imported: dict[str, set[str]] = {}
    for each in families:
        for node in ast.walk(_tree(folder / f"{each}.py")):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tinydiff.models"):
                names = [alias.name for alias in node.names] if node.module == "tinydiff.models" else [node.module.rpartition(".")[2]]
                for name in names:
                    imported.setdefault(name, set()).add(each)
    shared = {"recipe", "registry", "evaluate", "joint"}
    beside = [name for name, users in imported.items() if users == {family} and name not in shared | families]
    return [folder / f"{family}.py", *(folder / f"{name}.py" for name in sorted(beside) if (folder / f"{name}.py").is_file())]


def test_files(family: str) -> list[Path]:
    """Files of tests that bear the family's name, in full or without what follows the first word."""
    names = {family} | ({family.partition("_")[0]} if family.endswith("_image") and not family.startswith("z_") else set())
    named = re.compile(rf"(test_)?({'|'.join(sorted(names))})(_pipelines|_folders)?\.py")
    return [path for path in sorted((ROOT / "tests").rglob("*.py")) if named.fullmatch(path.name)]


def _code(path: Path) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    prose: Spans = set()
    for node in ast.walk(_tree(path)):
        for statement in getattr(node, "body", []) if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                prose |= _span(statement)
    lines = path.read_text(encoding="utf-8").splitlines()
    return sum(1 for i, line in enumerate(lines, 1) if i not in prose and line.strip() and not line.strip().startswith("#"))


def _nets_owners() -> list[str | None]:
    """The family of each row of NETS; a row that names several classes at once, an encoder's say, is no family's."""
    families = {row.family for row in registry.MODELS}
    value = getattr(_definitions(_tree(ROOT / "tinydiff" / "runtime" / "blueprint.py"))["NETS"], "value", None)
    assert isinstance(value, ast.Dict)
    owners: list[str | None] = []
    for key in value.keys:
        kind = NETS[str(key.value)] if isinstance(key, ast.Constant) else None
        name = "" if kind is None or kind.role != "dit" else _last(kind.module.__name__)
        owners.append(name if name in families else None)
    return owners


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _length(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def main() -> None:
    """Print the table, a family a row, fewest lines first."""
    package = ROOT / "tinydiff"
    rows = table_lines(package / "models" / "registry.py", "MODELS", [row.family for row in registry.MODELS])
    nets = table_lines(package / "runtime" / "blueprint.py", "NETS", _nets_owners())
    denoisers = table_lines(package / "parity" / "denoisers.py", "DENOISERS", [_last(d.family.__name__) for d in DENOISERS.values()])
    groups = table_lines(package / "parity" / "models.py", "GROUPS", [group.family for group in GROUPS])
    families = sorted({row.family for row in registry.MODELS} - {FIRST}, key=lambda family: _length(own_files(family)))
    print("| family | models | its file | of these code | registry | `NETS` | parity cases | tests |")
    print("|---|---|---|---|---|---|---|---|")
    for family in families:
        files = own_files(family)
        names = ", ".join(f"`{path.name}` {_length([path])}" for path in files)
        models = sum(row.family == family for row in registry.MODELS)
        parity = denoisers.get(family, 0) + groups.get(family, 0)
        code = sum(map(_code, files))
        print(f"| {family} | {models} | {names} | {code} | {rows[family]} | {nets[family]} | {parity} | {_length(test_files(family))} |")
    shared = ", ".join(f"`models/{name}.py` {_length([package / 'models' / f'{name}.py'])}" for name in ("joint", "recipe"))
    print(f"\nShared by several and counted for none: {shared}.")


if __name__ == "__main__":
    main()
