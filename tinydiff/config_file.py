"""Config files: JSON or YAML with the names of options as keys. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tinydiff import paths
from tinydiff.entries import EntryDict
from tinydiff.records import UserError, brief

MOST_TEXT = 1_000_000
"""Most characters of a config file."""


def entries_of(path: str) -> Iterator[tuple[str, Any]]:
    """The (key, value) pairs of a JSON or YAML file.

    Keys are flat, except in `pipeline_config`, `vae_config` and `dit_config`. null means that the option is
    not given. Raises UserError for a file that is missing, unreadable or in neither format, and for a
    repeated key.
    """
    text = paths.read_text(path, "config")
    if len(text) > MOST_TEXT:
        raise UserError("config", f"config: {brief(path)} has more than {MOST_TEXT} characters")
    entries = _parsed(path, text)
    if not isinstance(entries, dict):
        kind = "nothing" if entries is None else f"a {type(entries).__name__}"
        message = f"{brief(path)} holds {kind}; it must hold keys and values, such as `num_frames: 17`"
        raise UserError("config", f"config: {message}")
    for name, value in entries.items():
        if name in ("pipeline_config", "vae_config", "dit_config") and isinstance(value, dict):
            prefix = "" if name == "pipeline_config" else f"{name}."
            yield from ((f"{prefix}{key}", inner) for key, inner in value.items())
        else:
            yield str(name), value


def _parsed(path: str, text: str) -> Any:
    """The value of a JSON or YAML text. Raises UserError."""
    import yaml

    try:
        return _of_json(text) if text.lstrip().startswith(("{", "[", '"')) else _of_yaml(text)
    except RecursionError as error:
        raise UserError("config", f"config: {brief(path)} is nested too deeply") from error
    except KeyError as error:
        key = brief(error.args[0])
        raise UserError("config", f"config: {brief(path)} has the key {key} twice") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date or number
        mark = getattr(error, "problem_mark", None)
        where = f" (YAML error in line {mark.line + 1})" if mark else ""
        raise UserError("config", f"config: {brief(path)} is neither JSON nor YAML{where}") from error


def _of_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except ValueError:  # YAML may begin in the same way
        return _of_yaml(text)


def _of_yaml(text: str) -> Any:
    import yaml

    def check(node: object) -> None:
        if isinstance(node, yaml.MappingNode):
            _unique([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            for _, inner in node.value:
                check(inner)

    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    check(node)
    return None if node is None else loader.construct_document(node)


def _unique(pairs: list[tuple[str, Any]]) -> EntryDict:
    """The pairs as a dict. Raises KeyError for a repeated key."""
    mapping = {}
    for key, value in pairs:
        if key in mapping:
            raise KeyError(key)
        mapping[key] = value
    return mapping
