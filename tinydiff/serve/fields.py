"""The fields of a request: for each its range, how it is read, and its description in OpenAPI.

Every field has an effect or is an error. OpenAI's fields that mean nothing to a diffusion model are accepted
at the values that ask for nothing. Every sampling option of `tinydiff generate` is a field of the same name,
at top level or inside `extra_body`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields as fields_of
from typing import Any, NamedTuple

from tinydiff import config, flags, unsupported, values
from tinydiff.config import OutputOptions, SamplingOptions
from tinydiff.records import UserError, brief, nearest
from tinydiff.serve import schemas
from tinydiff.serve.jobs import Kind
from tinydiff.serve.schemas import Schema

MOST_IMAGES = 16
MOST_IMAGE_BYTES = 50 * 2**20
MOST_PROMPT = 32_000
"""Characters of a prompt."""
MOST_WORD = 512
"""Characters of any other string."""
MOST_OUTPUTS = 10_000
"""Outputs that --max-outputs may allow one request."""
MOST_SECONDS = 3600
MOST_LISTED = 10_000
"""Values of a list."""

STEPS_OF_QUALITY = {"low": 0.5, "medium": 0.75, "high": 1.0, "hd": 1.0, "xhigh": 1.5, "max": 2.0}
"""`quality` -> factor on the model's own number of steps. "auto" and "standard" keep that number."""

Reader = Callable[[str, Any, bool], Any]
"""(field, value, whether the value is of a form, where numbers are strings) -> the checked value.

Raises UserError.
"""


class Field(NamedTuple):
    """A field that is no option of `generate`: how its value is checked, and the schema of the same rule."""

    read: Reader
    schema: Schema


def mistake(name: str, value: object, wanted: str) -> UserError:
    """The error of a value that is not what is wanted."""
    return UserError(name, f"{name}: {show(value)} is not {wanted}")


def show(value: object) -> str:
    """A value as messages show it."""
    if isinstance(value, bytes):
        return "a file"
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "null"}[value]
    return brief(value)


def read_string(name: str, value: object, most: int = MOST_WORD) -> str:
    """A string of at most `most` characters. Raises UserError."""
    if not isinstance(value, str):
        raise mistake(name, value, "a string")
    if len(value) > most:
        raise UserError(name, f"{name}: has {len(value):,} characters; at most {most:,} are allowed")
    return value


def read_boolean(name: str, value: object, in_form: bool) -> bool:
    """A boolean, or in a form the word for one. Raises UserError."""
    if in_form and isinstance(value, str):
        value = {"true": True, "false": False}.get(value[:8].lower(), value)
    if not isinstance(value, bool):
        raise mistake(name, value, "true or false")
    return value


def _string(description: str) -> Field:
    def read(name: str, value: object, in_form: bool) -> str:
        return read_string(name, value)

    return Field(read, schemas.string(description, maxLength=MOST_WORD))


def _integer(description: str, least: int, most: int) -> Field:
    def read(name: str, value: object, in_form: bool) -> int:
        if in_form and isinstance(value, str) and re.fullmatch("-?[0-9]{1,18}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise mistake(name, value, "an integer")
        if not least <= value <= most:
            raise UserError(name, f"{name}: {show(value)} must be from {least} to {most}")
        return value

    return Field(read, schemas.integer(description, least, most))


def _boolean(description: str) -> Field:
    return Field(read_boolean, schemas.boolean(description))


def _choice(description: str, *choices: str, **aliases: str) -> Field:
    def read(name: str, value: Any, in_form: bool) -> str:
        word = aliases.get(value, value) if isinstance(value, str) else value
        if word not in choices:
            hint = nearest(value, choices) if isinstance(value, str) else ""
            raise UserError(name, f"{name}: {show(value)} is not one of {', '.join(choices)}{hint}")
        return word

    return Field(read, schemas.choice(description, *choices))


_SIZE = "auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4}"


def _read_size(name: str, value: object, in_form: bool) -> str:
    if not isinstance(value, str) or not re.fullmatch(_SIZE, value):
        message = f'{name}: {show(value)} must be "auto" or WIDTHxHEIGHT in pixels, such as "1024x768"'
        raise UserError(name, message)
    return value


def _read_seconds(name: str, value: object, in_form: bool) -> float:
    """A number, or a string with one, as OpenAI has it."""
    if isinstance(value, str) and not NUMBERS.fullmatch(value):
        raise mistake(name, value, 'a number of seconds, such as "4"')
    return values.within_limits(name, float, value, {"above": 0, "most": MOST_SECONDS})


_SECONDS: Schema = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0, "maximum": MOST_SECONDS},
        {"type": "string", "pattern": "^[1-9][0-9]{0,2}$"},
    ],
    "description": "Length of the video in seconds, rounded to a number of frames that the model can make.",
}
_FACTORS = ", ".join(f"{name} {factor:g}" for name, factor in STEPS_OF_QUALITY.items())
_SIZE_HELP = "Width and height in pixels as WIDTHxHEIGHT, or auto; the same as the fields width and height."

SHARED: dict[str, Field] = {
    "model": _string("The model; without it, the model that this server serves."),
    "size": Field(_read_size, schemas.string(_SIZE_HELP, pattern=f"^({_SIZE})$")),
    "quality": _choice(
        f"Number of denoising steps, as a factor on the model's own: {_FACTORS}; auto and standard keep it.",
        "auto",
        "standard",
        *STEPS_OF_QUALITY,
    ),
    "n": _integer(
        "Number of outputs; the same as num_outputs_per_prompt. /v1/models has the server's limit.",
        1,
        MOST_OUTPUTS,
    ),
    "user": _string("An identifier of the end user, repeated in the answer."),
    "safety_identifier": _string(
        "An identifier of the end user, repeated in the answer; OpenAI's newer name."
    ),
    "priority": _integer("Jobs of higher priority run first. Above 0 needs the admin key.", -10, 10),
}
"""Fields of both images and videos."""

OWN: dict[Kind, dict[str, Field]] = {
    "image": {
        **SHARED,
        "background": _choice(
            "Background of the images: transparent only with a model that makes layers, else opaque.",
            "auto",
            "opaque",
            "transparent",
        ),
        "output_format": _choice("Format of the image files.", "png", "webp", "jpeg", jpg="jpeg"),
        "response_format": _choice(
            "How the answer carries an image: in base64, or as a URL that is valid for a limited time.",
            "b64_json",
            "url",
        ),
        "stream": _boolean("Answer with server-sent events."),
        "partial_images": _integer("Number of previews that a stream sends while the image is made.", 0, 3),
        "progress": _boolean("Send progress events in a stream: step, total, queue_position, eta_s."),
    },
    "video": {
        **SHARED,
        "seconds": Field(_read_seconds, _SECONDS),
        "output_format": _choice("Format of the video files.", "mp4", "webm", "gif"),
    },
}
"""Fields that are no options of `generate`."""

INPUT_IMAGES: dict[Kind, dict[str, str]] = {
    "image": {"image": "image_path", "images": "image_path", "url": "image_path", "mask": "mask_path"},
    "video": {
        "input_reference": "image_path",
        "image": "image_path",
        "images": "image_path",
        "reference_url": "image_path",
        "audio_path": "audio_path",
    },
}
"""Fields with input images, or a sound -> the option of `generate`, which is a field too."""

INERT: dict[str, tuple[tuple[Any, ...], str]] = {
    "moderation": (("auto", "low"), "this server does not moderate"),
    "input_fidelity": (("low",), "use strength with a model that starts from the input image"),
    "style": ((), "describe the style in the prompt"),
    "complexity": ((), "use num_inference_steps"),
    "frame_count": ((1,), "request an animation as a video at /v1/videos"),
    "frame_duration_ms": ((), "request an animation as a video at /v1/videos, with fps"),
    "svg": ((), "images are made of pixels"),
    "markup": ((), "use mask to mark the area to inpaint"),
    "enhance_prompt": ((False, "false"), unsupported.sentence("prompt rewriting by another model")),
}
"""OpenAI's and SGLang's fields that do nothing here: the values that are accepted, and why no others are."""

ENCODING = ("output_quality", "output_compression", "x264_preset", "save_audio")
GIVEN = ("image_path", "mask_path", "audio_path")
"""Options that name input files. A request has their bytes in place of paths."""
SAMPLING = tuple(entry.name for entry in fields_of(SamplingOptions) if entry.name not in GIVEN)
OPTIONS: dict[str, type] = {
    **dict.fromkeys(SAMPLING, SamplingOptions),
    **dict.fromkeys(ENCODING, OutputOptions),
}
"""Fields that are options of `generate` -> the record that has them."""

NOT_OF_REQUESTS = {
    *config.NAMES,
    *flags.SERVER,
    *flags.MAPS,
    "prompt_path",
    "output_file_path",
    "no_save_output",
    "no_audio",
}
"""Options of `generate` and `serve` that a request cannot set, apart from the fields above."""
NUMBERS = re.compile("-?[.0-9][-+.0-9eE]*(?:[, ]+-?[.0-9][-+.0-9eE]*)*")
"""Numbers in a form. `values` accepts more, as words of a command line: spaces, a plus, infinity."""
NESTED = ("extra_body", "extra_params", "extra_json")
"""Fields whose value is an object of further fields."""


def names(kind: Kind) -> list[str]:
    """Every field that a request of this kind may have."""
    images = [*INPUT_IMAGES[kind], "image_path", *(("mask_path",) if kind == "image" else ())]
    return [*OWN[kind], *SAMPLING, *ENCODING, *images, *INERT, *NESTED]


def option(name: str) -> Schema:
    """The schema of an option of `generate`."""
    return schemas.option(OPTIONS[name], name)


# --- the schema of a body ---


def request_schema(
    kind: Kind, model: str, form: bool, required: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> Schema:
    """The schema of a request's body.

    form: as multipart, where images are files and nothing is null. without: fields that it does not have.
    """
    images = [name for name in INPUT_IMAGES[kind] if name not in ("url", "reference_url")]
    own = {name: field.schema for name, field in OWN[kind].items()}
    own["model"] = schemas.choice(own["model"]["description"], model)
    inert = {
        name: schemas.choice(f"Has no effect: {why}.", *accepted)
        for name, (accepted, why) in INERT.items()
        if accepted
    }
    properties = {
        "prompt": schemas.string("What the image or video shows.", maxLength=MOST_PROMPT),
        **{name: _input_file(name, form) for name in images},
        **own,
        **{name: option(name) for name in OPTIONS if name != "prompt"},
        **inert,
    }
    if not form:
        nested = "More fields of this request; the official Python client sends extra fields at top level."
        properties["extra_body"] = {"type": "object", "description": nested}
    properties = {
        name: schema if form or name in required else schemas.nullable(schema)
        for name, schema in properties.items()
        if name not in without
    }
    return schemas.obj(properties, required, closed=True)


_IMAGE_SOURCE: Schema = {
    "anyOf": [
        schemas.string("A data URI, or a URL if the server was started with --allow-url-inputs."),
        schemas.obj({"image_url": schemas.string("A data URI or a URL.")}, closed=True),
        schemas.obj({"file_id": schemas.string("Id of a file that this server made.")}, closed=True),
    ]
}


def _input_file(name: str, form: bool) -> Schema:
    description = {
        "mask": "The area to inpaint, of the image's size: white or transparent pixels are inpainted.",
        "audio_path": "The sound that a video is made to.",
        "input_reference": "The first frame; for some models also the last frame, or reference images.",
    }.get(name, "The image to start from, or reference images. A form sends several as image[].")
    one = schemas.string("A file.", format="binary") if form else _IMAGE_SOURCE
    several = {"anyOf": [one, {"type": "array", "items": one, "maxItems": MOST_IMAGES}]}
    return {**(one if form or name in ("mask", "audio_path") else several), "description": description}
