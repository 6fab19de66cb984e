"""Chat templates of a tokenizer directory, rendered as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tinydiff.entries import Entries
from tinydiff.io.hub import read_json
from tinydiff.records import UserError

Turns = Sequence[Mapping[str, str]]
"""The turns of a chat, each with `role` and `content`."""


def template(directory: Path) -> Callable[[Turns], str] | None:
    """A function from turns to text, without the prompt for an answer; None if there is no template.

    The template is `chat_template.jinja`, else `chat_template` in tokenizer_config.json. The function raises
    UserError if it cannot be rendered.
    """
    path, config = directory / "chat_template.jinja", _read(directory / "tokenizer_config.json")
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((each["template"] for each in source if each.get("name") == "default"), None)
    if source is None:
        return None
    tokens = {**_read(directory / "special_tokens_map.json"), **config}
    named = {
        name: token if isinstance(token, str) else token["content"]
        for name, token in tokens.items()
        if _is_token(name, token)
    }

    def render(turns: Turns) -> str:
        return _rendered(
            source, directory, {**named, "messages": list(turns), "add_generation_prompt": False}
        )

    return render


def _read(path: Path) -> Entries:
    return read_json(path) if path.is_file() else {}


def _is_token(name: str, token: object) -> bool:
    return name.endswith("_token") and (
        isinstance(token, str) or (isinstance(token, Mapping) and "content" in token)
    )


def _rendered(source: str, directory: Path, values: Entries) -> str:
    """The template rendered in Jinja's sandbox: it comes with the weights and may be malicious."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    engine = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    engine.filters["tojson"] = lambda value, **form: json.dumps(value, ensure_ascii=False, **form)
    engine.globals["raise_exception"] = refuse
    try:
        return engine.from_string(source).render(**values)
    except (TemplateError, TypeError, ValueError) as error:
        message = f"the chat template in {str(directory)!r} cannot be rendered ({error})"
        raise UserError("model_path", f"model_path: {message}") from error
