"""Reads the fields of a request's body: sampling options, members of the answer, and input images."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, NamedTuple, get_type_hints

from tinydiff import flags, unsupported, values
from tinydiff.config import OutputOptions, SamplingOptions
from tinydiff.entries import Entries, EntryDict
from tinydiff.records import UserError, nearest
from tinydiff.serve.body import parse_json
from tinydiff.serve.errors import Refusal
from tinydiff.serve.fields import (
    ENCODING,
    GIVEN,
    INERT,
    INPUT_IMAGES,
    MOST_IMAGE_BYTES,
    MOST_IMAGES,
    MOST_LISTED,
    MOST_PROMPT,
    NESTED,
    NOT_OF_REQUESTS,
    NUMBERS,
    OPTIONS,
    OWN,
    SAMPLING,
    STEPS_OF_QUALITY,
    mistake,
    names,
    read_boolean,
    read_string,
    show,
)
from tinydiff.serve.jobs import Kind

_HINTS = {**get_type_hints(SamplingOptions), **get_type_hints(OutputOptions)}


class FileId(NamedTuple):
    """The id of an image that is a file of the server."""

    id: str


ImageSource = str | bytes | FileId
"""An input image: a data URI or a URL, the bytes of a file, or the id of a file of the server."""


class RequestFields(NamedTuple):
    """The fields of a request."""

    options: EntryDict
    """Sampling and encoding options, by the names of `tinydiff generate`."""
    answer: EntryDict
    """The fields of `fields.OWN`; and `spelled`: option -> the client's name of it, where they differ."""
    images: dict[str, tuple[ImageSource, ...]]
    """"image_path", "mask_path" or "audio_path" -> input files."""


def read_fields(body: Entries, kind: Kind, form: bool = False) -> RequestFields:
    """Read the fields of a body. form: it is a form, where numbers are strings. null means "not given".

    Without a seed the request gets a random one. Raises UserError, and Refusal for an unknown field.
    """
    options: EntryDict = {}
    answer: EntryDict = {}
    images: dict[str, tuple[ImageSource, ...]] = {}
    spelled: dict[str, str] = {}

    def claim(name: str, option: str) -> None:
        if spelled.setdefault(option, name) != name:
            raise UserError(name, f"{name}: give either {spelled[option]} or {name}, not both")

    for name, value, in_form in _entries(body, form):
        option = flags.ALIASES.get(name, name)
        if value is None and _is_known(name, kind):
            continue
        if name in OWN[kind]:
            answer[name] = OWN[kind][name].read(name, value, in_form)
        elif (path := INPUT_IMAGES[kind].get(name, option)) in GIVEN:
            claim(name, path)
            images[path] = tuple(_sources(name, value))
        elif name in flags.SIZES:
            if read_boolean(name, value, in_form):
                claim(name, "height")
                claim(name, "width")
                options["height"], options["width"] = flags.SIZES[name]
        elif option in SAMPLING + ENCODING:
            claim(name, option)
            options[option] = _option(name, option, value, in_form)
        else:
            _refuse(name, value, kind)

    if answer.get("size", "auto") != "auto":
        for name, number in zip(("width", "height"), answer["size"].split("x"), strict=True):
            claim("size", name)
            options[name] = int(number)
    if "n" in answer:
        claim("n", "num_outputs_per_prompt")
        options["num_outputs_per_prompt"] = answer["n"]
    if "seconds" in answer:
        claim("seconds", "num_frames")
    if answer.get("quality") in STEPS_OF_QUALITY:
        claim("quality", "num_inference_steps")
    options.setdefault("seed", [secrets.randbelow(2**32)])
    answer["spelled"] = {option: name for option, name in spelled.items() if option != name}
    _check_together(answer, images)
    return RequestFields(options, answer, images)


def _is_known(name: str, kind: Kind) -> bool:
    return name in names(kind) or name in flags.ALIASES or name in flags.SIZES or name in unsupported.OPTIONS


def _entries(body: Entries, form: bool) -> Iterator[tuple[str, Any, bool]]:
    """(name, value, whether it is of a form) of the body and of the objects of NESTED, each name once."""
    seen: set[str] = set()
    for name, value in body.items():
        inner = [(name, value, form)]
        if name in NESTED:
            in_form = form and not isinstance(value, str)
            value = parse_json(value, name) if isinstance(value, str) else value
            if not isinstance(value, dict | None):
                raise mistake(name, value, "an object of names and values, or a string with one in JSON")
            inner = [(key, each, in_form) for key, each in (value or {}).items()]
        for key, each, in_form in inner:
            if key in seen:
                raise UserError(key, f"{key}: is given twice, at top level and inside {name}")
            seen.add(key)
            yield key, each, in_form


def _option(name: str, option: str, value: Any, in_form: bool) -> Any:
    """A sampling or encoding option. In JSON a number must be a number, and a string a string."""
    if isinstance(value, str) and len(value) > MOST_PROMPT:
        read_string(name, value, MOST_PROMPT)
    if option in ("prompt", "negative_prompt"):
        return read_string(name, value, MOST_PROMPT)
    if option in ("loras", "refine_loras"):
        is_json = isinstance(value, str) and in_form and value
        return dict(_loras(name, parse_json(value, name) if is_json else value, in_form))
    if option == "cache_dit_params":
        value = parse_json(value, name) if isinstance(value, str) and in_form and value else value
        numbers = isinstance(value, dict) and all(
            isinstance(each, int | float) and not isinstance(each, bool) for each in value.values()
        )
        if not numbers or len(value) > MOST_LISTED:
            raise mistake(name, value, 'an object of numbers, such as {"rdt": 0.12}')
        return value
    if option == "diffusers_kwargs":
        value = parse_json(value, name) if isinstance(value, str) and in_form and value else value
        if not isinstance(value, dict) or len(value) > MOST_LISTED:
            raise mistake(name, value, "an object of arguments and their values")
        return {key: each for key, each in value.items() if each is not None}
    hint = str(_HINTS[option])
    if "bool" in hint:
        return read_boolean(name, value, in_form)
    several, numbers = hint.startswith("tuple"), "int" in hint or "float" in hint
    number = "a number" if "float" in hint else "an integer"
    if in_form and several and isinstance(value, str) and value.startswith("["):
        value, in_form = parse_json(value, name), False
    each = value if isinstance(value, list) and several else [value]
    if len(each) > MOST_LISTED:
        raise UserError(name, f"{name}: has {len(each):,} values; at most {MOST_LISTED:,} are allowed")
    for one in each:
        wrong_type = isinstance(one, str) == (numbers and not in_form)
        if isinstance(one, dict | list | bytes | bool | None) or wrong_type:
            wanted = number if numbers else "a string"
            raise mistake(name, one, f"{wanted}{' or a list of them' if several else ''}")
    if in_form and numbers and not all(NUMBERS.fullmatch(one) for one in each if isinstance(one, str)):
        raise mistake(name, value, number)
    limits = OPTIONS[option].__dataclass_fields__[option].metadata
    return values.within_limits(name, _HINTS[option], value, limits)


def _loras(name: str, value: Any, in_form: bool) -> Iterator[tuple[str, float]]:
    """(adapter, strength) of {"style": 0.8}, of ["style"] and of [{"name": "style", "scale": 0.8}]."""
    pairs = list(value.items()) if isinstance(value, dict) else value or []
    if not isinstance(pairs, list) or len(pairs) > MOST_LISTED:
        raise mistake(name, value, f"an object of adapters and strengths, or a list of at most {MOST_LISTED}")
    seen: set[str] = set()
    for item in pairs:
        match item:
            case str() as adapter:
                strength: Any = 1.0
            case (str() as adapter, strength):
                pass
            case {"name": str() as adapter, **rest} if rest.keys() <= {"scale"}:
                strength = rest.get("scale", 1.0)
            case _:
                raise mistake(name, item, 'an adapter, such as {"name": "style", "scale": 0.8}')
        if in_form and isinstance(strength, str) and NUMBERS.fullmatch(strength):
            strength = values.within_limits(f"{name}.{adapter}"[:80], float, strength, {})
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not abs(strength) <= 100:
            raise mistake(f"{name}.{adapter}"[:80], strength, "a number from -100 to 100")
        if adapter in seen:
            raise UserError(name, f"{name}: {adapter[:80]!r} is given twice")
        seen.add(adapter)
        yield adapter, float(strength)


def _sources(name: str, value: Any) -> Iterator[ImageSource]:
    """The input images of a field: bytes, a string, {"image_url": ...}, {"file_id": ...}, or a list."""
    items = value if isinstance(value, list) else [value]
    heard = name.startswith("audio")
    what, article = ("sound", "a") if heard else ("image", "an")
    single = "one mask" if name.startswith("mask") else "one sound" if heard else ""
    if len(items) > (1 if single else MOST_IMAGES):
        most = single or f"{MOST_IMAGES} images"
        raise UserError(name, f"{name}: has {len(items)} {what}s; at most {most} may be given")
    for item in items:
        if isinstance(item, dict):
            item = _source_of_object(name, item)
        if not isinstance(item, str | bytes | FileId):
            allowed = "a file, a data URI, a URL, or an object with image_url or file_id"
            raise mistake(name, item, f"{article} {what}: {allowed}")
        if isinstance(item, bytes) and len(item) > MOST_IMAGE_BYTES:
            size, most = len(item) / 2**20, MOST_IMAGE_BYTES // 2**20
            raise UserError(
                name,
                f"{name}: {article} {what} has {size:.0f} MiB; at most {most} MiB are allowed",
            )
        yield item


def _source_of_object(name: str, item: EntryDict) -> str | FileId:
    members = {key: value for key, value in item.items() if value is not None}
    [(key, value)] = members.items() if len(members) == 1 else [("", None)]
    if key not in ("image_url", "file_id") or not isinstance(value, str):
        forms = '{"image_url": "..."} or {"file_id": "..."}'
        raise UserError(name, f"{name}: an object with an image must have the form {forms}")
    return FileId(value) if key == "file_id" else value


def _refuse(name: str, value: Any, kind: Kind) -> None:
    """Raise for a field that has no effect, unless its value asks for nothing."""
    if name in INERT:
        accepted, why = INERT[name]
        if any(type(value) is type(each) and value == each for each in accepted):
            return
        only = f"; it may be {' or '.join(map(show, accepted))}" if accepted else ""
        raise UserError(name, f"{name}: {show(value)} is not supported: {why}{only}")
    if name in unsupported.OPTIONS:
        if sentence := flags.refusal(name, value):
            raise UserError(name, sentence)
        return
    if name in NOT_OF_REQUESTS or flags.ALIASES.get(name) in NOT_OF_REQUESTS:
        raise UserError(name, f"{name}: is set when the server is started, not by a request")
    other: Kind = "video" if kind == "image" else "image"
    if name in OWN[other] or name in INPUT_IMAGES[other]:
        route = "/v1/videos" if other == "video" else "/v1/images/generations"
        raise Refusal(400, "unknown_parameter", f"{name}: is a field of {route}, not of this route", name)
    message = f"{name[:80]}: no such field{nearest(name, names(kind))}"
    raise Refusal(400, "unknown_parameter", message, name[:80])


def _check_together(answer: Entries, images: Entries) -> None:
    """Raise UserError for fields that contradict each other."""
    streams = answer.get("stream", False)
    for name in ("partial_images", "progress"):
        if answer.get(name) and not streams:
            raise UserError(name, f"{name}: {show(answer[name])} needs stream=true")
    if streams and answer.get("response_format") == "url":
        message = "response_format: 'url' is not available with stream=true; use 'b64_json'"
        raise UserError("response_format", message)
    if "mask_path" in images and "image_path" not in images:
        raise UserError("mask", "mask: needs an image to inpaint; give it as image")
