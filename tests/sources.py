"""Reading the package's source without running it: which modules there are, what each imports, which dotted
names it says.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tinydiff"


class Import(NamedTuple):
    """One imported name in full, `a.b.c` for `from a.b import c`. typing_only: under `if TYPE_CHECKING`, so
    never executed.
    """

    name: str
    line: int
    typing_only: bool


def module_name(path: Path, root: Path = ROOT) -> str:
    """`tinydiff/io/hub.py` -> `tinydiff.io.hub`; a package's `__init__.py` bears the package's name."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def modules() -> dict[str, str]:
    """Name to source of every module of the package."""
    return {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str, module: str = "", is_package: bool = False) -> Iterator[Import]:
    """Every import of a module, those inside functions too. A relative one is resolved against `module`.

    A bare `import tinydiff` stands for what is then read from it, as `tinydiff.__version__`. `import_module`
    and `__import__` hide what they import: with a literal name they count as an import of it, otherwise of
    "?".
    """
    tree = ast.parse(source)
    guarded = {id(n) for block in ast.walk(tree) if _is_typing_guard(block) for n in _under(block.body)}
    for node in ast.walk(tree):
        typing_only = id(node) in guarded
        for name in _imported(node, tree, module.split(".") if is_package else module.split(".")[:-1]):
            yield Import(name, node.lineno, typing_only)


def _under(statements: list[ast.stmt]) -> Iterator[ast.AST]:
    for statement in statements:
        yield from ast.walk(statement)


def _is_typing_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imported(node: ast.AST, tree: ast.Module, package: list[str]) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{source}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
        for alias in node.names:
            reads = set() if "." in alias.name else _read_from(tree, alias.asname or alias.name)
            yield from sorted(f"{alias.name}.{attribute}" for attribute in reads) or [alias.name]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "__import__",
        "import_module",
        "importlib.import_module",
    ):
        literal = node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
        yield node.args[0].value if literal else "?"


def _read_from(tree: ast.Module, name: str) -> set[str]:
    """Attributes read directly from the variable `name`."""
    found = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    )
    return {node.attr for node in found if node.value.id == name}


@cache
def said(source: str) -> set[str]:
    """Every dotted name that a module imports or reads, in full: `import os as system; system.environ` says
    `os.environ`.
    """
    tree = ast.parse(source)
    full: dict[str, str] = {}
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name if alias.asname else alias.name.partition(".")[0]
                full[alias.asname or root] = root
                names.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                full[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                names.add(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            root, dot, rest = ast.unparse(node).partition(".")
            if root in full:
                names.add(full[root] + dot + rest)
    return names


def starts(name: str, prefix: str) -> bool:
    """Whether a dotted name is `prefix` or lies below it; a prefix that ends in an underscore also starts
    longer words.
    """
    return name == prefix or name.startswith(prefix if prefix.endswith("_") else f"{prefix}.")
