"""tyro's part: a command line in one spelling becomes frozen records, and records become help.

`flags` has given every option its own name and written it as `--name=JSON`, once. So tyro chooses the
command, fills its record over the defaults (those of a config file, if there is one) and renders help and
completions. Values are read by `values`, as those of files, programs and requests are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, dataclass, is_dataclass, replace
from functools import cache, partial
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from tinydiff import values
from tinydiff.records import UserError

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

Record = TypeVar("Record")
Normalise = Callable[[Sequence[str]], tuple[Any, list[str]]]
"""The words of a command -> (its record with defaults, the words in one spelling). Raises UserError."""


@dataclass(frozen=True)
class Command:
    """One command. epilogue: what follows its options in the help."""

    record: type
    description: str
    normalise: Normalise
    run: Callable[[Any], int]
    epilogue: str = ""


class _Mistake(Exception):
    """Carries a UserError through tyro, which would print a ValueError in a box of its own."""


def words(record: type, entries: Mapping[str, object]) -> list[str]:
    """Options of a record as words of a command line, each once, its value in JSON.

    JSON keeps several values, values that begin with a dash and maps in one word.
    """
    loose = [entry.name for entry, _ in values.options_of(record) if values.is_positional(entry)]
    flags = {name: "" if name in loose else f"--{name.replace('_', '-')}=" for name in entries}
    return [f"{flags[name]}{json.dumps(value)}" for name, value in entries.items()]


def read(record: type[Record], defaults: Record, normal: Sequence[str]) -> Record:
    """The record of a command line in one spelling; what it leaves out is as in `defaults`.
    Raises UserError.
    """
    return _cli(record, normal, default=defaults)


def chosen(commands: Mapping[str, Command], argv: Sequence[str]) -> Any:
    """The record of the command that `argv` chooses. Raises UserError."""
    name, *rest = argv
    defaults, normal = commands[name].normalise(rest)
    return _cli(_union(commands, {name: defaults}), [name, *normal])


def show(commands: Mapping[str, Command], about: str, argv: Sequence[str]) -> None:
    """Print the help or the completions that `argv`, in tyro's own words, asks for."""
    with suppress(SystemExit):
        _cli(_union(commands, {}), argv, description=about)


def _union(commands: Mapping[str, Command], defaults: Mapping[str, object]) -> Any:
    """The type of every command's record. defaults: of the chosen command."""
    import tyro

    def member(name: str, command: Command) -> Any:
        default = defaults.get(name, command.record())
        about = tyro.conf.subcommand(name, default=default, description=command.description)
        return Annotated[command.record, about]

    return Union[tuple(member(*each) for each in commands.items())]  # noqa: UP007


def _cli(kind: Any, argv: Sequence[str], **more: Any) -> Any:
    import tyro

    conf = tyro.conf
    markers = (conf.OmitArgPrefixes, conf.OmitSubcommandPrefixes, conf.FlagConversionOff)
    try:
        return tyro.cli(kind, args=argv, prog="tinydiff", config=markers, registry=_registry(), **more)
    except _Mistake as mistake:
        raise mistake.args[0] from mistake


@cache
def _registry() -> ConstructorRegistry:
    """How tyro sees our records; it leaves all other types as they are."""
    from tyro.constructors import ConstructorRegistry

    registry = ConstructorRegistry()
    registry.struct_rule(_structure)
    return registry


def _structure(about: StructTypeInfo) -> StructConstructorSpec | None:
    from tyro.constructors import StructConstructorSpec, StructFieldSpec

    record = about.type
    if not (isinstance(record, type) and is_dataclass(record)) or record.__module__.startswith("tyro."):
        return None
    defaults = about.default if isinstance(about.default, record) else record()

    def make(**chosen: Any) -> Any:
        return _overridden(defaults, chosen)

    make.__doc__ = record.__doc__  # the head of its box in the help
    fields = (
        StructFieldSpec(
            entry.name,
            _typed(entry, kind),
            getattr(defaults, entry.name),
            lambda name=entry.name: values.descriptions(record).get(name),
        )
        for entry, kind in values.options_of(record)
    )
    return StructConstructorSpec(make, tuple(fields))


def _overridden(defaults: Any, chosen: dict[str, object]) -> Any:
    """`defaults` with the given fields; a map is added to that of `defaults`."""
    for name, value in chosen.items():
        if isinstance(value, dict):
            chosen[name] = {**getattr(defaults, name), **value}
    return replace(defaults, **chosen)


@cache
def _typed(entry: Field[Any], kind: Any) -> Any:
    """The type of a field as tyro is to see it: a record as it is, any other read by `values`."""
    from tyro.conf import Positional, arg
    from tyro.constructors import PrimitiveConstructorSpec

    if is_dataclass(kind):
        return kind
    loose = values.is_positional(entry)
    place = entry.name.upper() if loose else _placeholder(kind)
    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar=place,
        instance_from_str=partial(_value, entry, kind),
        is_instance=lambda value: True,
        str_from_instance=_default_text,
    )
    # `values` checks the type. tyro would check the default too, with a library that takes longer to import
    # than the help takes to print.
    typed = Annotated[object, spec, arg(metavar=place, help_behavior_hint=_default_hint)]
    return Positional[typed] if loose else typed


def _value(entry: Field[Any], kind: Any, normal: list[str]) -> Any:
    try:
        return values.within_limits(entry.name, kind, json.loads(normal[0]), entry.metadata)
    except UserError as error:
        raise _Mistake(error) from error


def _default_text(value: Any) -> list[str]:
    """A default as the help shows it."""
    if value is None or value == "" or isinstance(value, Mapping):
        return []
    return [str(each) for each in value] if isinstance(value, tuple) else [json.dumps(value).strip('"')]


def _default_hint(default: str) -> str:
    return f"(default: {default})" if default else ""


def _placeholder(kind: Any) -> str:
    """What stands for an option's value in the help."""
    origin, inner = get_origin(kind), [k for k in get_args(kind) if k is not NoneType]
    if origin is Literal:
        return "|".join(get_args(kind))
    if origin is tuple:
        return f"{_placeholder(inner[0])} ..."
    if origin in (Union, UnionType):
        return _placeholder(inner[0])
    return "NAME=..." if origin else {bool: "[true|false]", str: "TEXT", int: "N", float: "X"}[kind]
