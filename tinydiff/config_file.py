"""Config files: JSON or YAML, whose keys are the options' names. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tinydiff import paths
from tinydiff.records import UserError, shown

MOST_TEXT = 1_000_000
"""Characters of a config file."""


def entries_of(path: str) -> Iterator[tuple[str, Any]]:
    """The (key, value) pairs of a JSON or YAML file of flat keys; `pipeline_config`, `vae_config` and
    `dit_config` may be nested.

    A null means "not given". Raises UserError for a file that is missing, unreadable or neither format, and
    for a key that stands twice.
    """
    text = paths.read_text(path, "config")
    if len(text) > MOST_TEXT:
        raise UserError("config", f"config: {shown(path)} has more than {MOST_TEXT} characters")
    entries = _parsed(path, text)
    if not isinstance(entries, dict):
        kind = "nothing" if entries is None else f"a {type(entries).__name__}"
        raise UserError(
            "config",
            f"config: {shown(path)} holds {kind}; it must hold keys and values, such as `num_frames: 17`",
        )
    for name, value in entries.items():
        if name in ("pipeline_config", "vae_config", "dit_config") and isinstance(value, dict):
            prefix = "" if name == "pipeline_config" else f"{name}."
            yield from ((f"{prefix}{key}", inner) for key, inner in value.items())
        else:
            yield str(name), value


def _parsed(path: str, text: str) -> Any:
    """What a JSON or YAML text holds. Raises UserError."""
    import yaml

    try:
        return _of_json(text) if text.lstrip().startswith(("{", "[", '"')) else _of_yaml(text)
    except RecursionError as error:
        raise UserError("config", f"config: {shown(path)} is nested too deeply") from error
    except KeyError as error:
        raise UserError(
            "config", f"config: {shown(path)} has the key {shown(error.args[0])} twice"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # also a date or a number that cannot be
        place = getattr(error, "problem_mark", None)
        where = f" (YAML stops at line {place.line + 1})" if place else ""
        raise UserError("config", f"config: {shown(path)} is neither JSON nor YAML{where}") from error


def _of_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except ValueError:  # YAML begins like this too
        return _of_yaml(text)


def _of_yaml(text: str) -> Any:
    import yaml

    def check(node: Any) -> None:
        if isinstance(node, yaml.MappingNode):
            _once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            for _, inner in node.value:
                check(inner)

    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    check(node)
    return None if node is None else loader.construct_document(node)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of these pairs. Raises KeyError for a key that stands twice."""
    made = {}
    for key, value in pairs:
        if key in made:
            raise KeyError(key)
        made[key] = value
    return made
