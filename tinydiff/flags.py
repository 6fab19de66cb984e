"""The spelling of options: SGLang Diffusion's names and forms, from a command line or a file, as one flat
dict of tinydiff's names.

Dashes and underscores are alike. An option that tinydiff has keeps its value for `config.py` to read; the
long tail that it does not have is here as two tables, so that every flag of SGLang is known, and none is
taken without effect or a word.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from tinydiff import paths, unsupported
from tinydiff.records import LONGEST, UserError, nearest, shown
from tinydiff.values import of_python, read

_words = str.split

ALIASES = {
    "precision": "dit_precision", "num_outputs": "num_outputs_per_prompt", "image_paths": "image_path", "sp_size": "sp_degree",
    "mode": "performance_mode", "prompt_file_path": "prompt_path", "pipeline": "pipeline_class_name", "dp_size": "data_parallel_size",
    "dp": "data_parallel_size", "layerwise_offload_modules": "layerwise_offload_components", "window_size": "spectrum_window_size",
    "flex_window": "spectrum_flex_window", "vae_config.use_tiling": "vae_tiling",
}  # fmt: skip

SIZES = {"720p": (720, 1280), "1080p": (1080, 1920), "2k": (1440, 2560), "4k": (2160, 3840)}
"""Size shorthands: (height, width)."""

SPELLINGS = (*ALIASES, *SIZES, "prompt_path", "output_file_path", "no_save_output")
"""Names that stand for others."""

COMPONENTS = (
    "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder", "vae", "tokenizer", "tokenizer_2",
    "tokenizer_3", "image_processor", "scheduler", "audio_vae", "vocoder", "connectors", "spatial_upsampler", "condition_image_encoder",
)  # fmt: skip
"""What `--<component>-path` may name; which of them a model has, its model_index.json says."""

MAPS = ("component_paths", "component_attention_backends", "component_precisions")
"""Options that hold a value per component: `a=x,b=y`, a JSON object, or `--name.a x`."""

SERVER = _words("""
    host port http_graceful_shutdown_timeout enable_metrics strict_ports webui webui_port input_save_path served_model_name
    uvicorn_access_log_exclude_prefixes log_requests log_requests_level log_requests_format log_requests_target enable_cache_report
    warmup_resolutions warmup_num_frames warmup_steps warmup_sampling_params batching_mode batching_max_size batching_delay_ms
    batching_config enable_batching_metrics sleep_on_idle async_output_save scheduler_port scheduler_rpc_timeout
    disable_conditioning_cache conditioning_cache_max_size_mb disagg_role disagg_timeout disagg_downstream_wait_timeout
    disagg_dispatch_policy disagg_instance_id disagg_max_slots_per_instance disagg_transfer_redundancy disagg_role_device
    disagg_transfer_backend disagg_transfer_pool_size disagg_transfer_pin_memory disagg_p2p_hostname disagg_ib_device disagg_server_addr
    encoder_urls prompt_encoder_urls image_encoder_urls denoiser_urls decoder_urls encoder_tp denoiser_tp denoiser_sp denoiser_ulysses
    denoiser_ring decoder_sp
    api_key api_key_file admin_api_key cors_origin public_url state_dir state_url unfinished lease output_lifetime output_limit max_queue
    max_body max_input_pixels max_pixels max_outputs allow_url_inputs idle_unload http_threads log_format
""")
"""Flags of a server: `generate` ignores them and says so."""


def tokens(argv: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Split a command line into (name, values): `--name a b` gives [a, b], `--name=a` gives [a], and `--name`
    alone gives True.

    A value begins with "--" only after an equals sign. Raises UserError for a word that belongs to no flag.
    """
    if argv and not argv[0].startswith("--"):
        word = shown(argv[0])
        raise UserError(
            "prompt", f"prompt: unexpected {word}; every value follows its flag, as in --prompt {word}"
        )
    starts = [i for i, word in enumerate(argv) if word.startswith("--")]
    for start, stop in zip(starts, [*starts[1:], len(argv)], strict=False):
        name, equals, value = argv[start][2:].partition("=")
        values = ([value] if equals else []) + list(argv[start + 1 : stop])
        yield name, values or True


def collect(
    pairs: Iterable[tuple[str, Any]],
    known: Iterable[str],
    dashes: bool = False,
    several: Collection[str] = (),
) -> dict[str, Any]:
    """Bring one source's (name, value) pairs to tinydiff's names: aliases, shorthands and per-component forms
    are resolved. What is None is not given.

    known: the names of the options. dashes: whether to speak of flags or of keys. The last of a repeated name
    counts, but of the names in `several` all do. Raises UserError for an unknown name, with the nearest one,
    and for two spellings of one option.
    """
    known = [*known, *MAPS]
    found: dict[str, Any] = {}
    spelled: dict[str, str] = {}

    def show(name: str) -> str:
        return f"--{name.replace('_', '-')}" if dashes else name

    for spelling, value in pairs:
        given = spelling[:LONGEST].replace("-", "_")
        if not _exists(given, known):
            names = [
                *known,
                *SPELLINGS,
                *(f"{component}_path" for component in COMPONENTS),
                *SERVER,
                *unsupported.OPTIONS,
            ]
            hint = nearest(show(given), [show(n) for n in names])
            raise UserError(given, f"{show(given)}: no such {'flag' if dashes else 'key'}{hint}")
        for name, part, meant in () if value is None else _meanings(given, value, known):
            key = name if part is None else f"{name}.{part}"
            if spelled.setdefault(key, given) != given:
                raise UserError(name, f"{name}: give either {show(spelled[key])} or {show(given)}, not both")
            if part is not None:  # "" is a component's name too, of none that exists
                found.setdefault(name, {})[part] = meant
            elif name in several and name in found:
                found[name] = [*_listed(found[name]), *_listed(meant)]
            else:
                found[name] = meant
    return found


def _exists(given: str, known: Collection[str]) -> bool:
    """Whether `given` is a spelling of some option."""
    return (
        any(given in names for names in (known, SPELLINGS, SERVER, unsupported.OPTIONS))
        or _is_map(given)
        or _component(given) is not None
    )


def _is_map(given: str) -> bool:
    return given.partition(".")[0] in (*MAPS, *unsupported.MAPS)


def _component(given: str) -> str | None:
    """The component of `vae_path` and its like."""
    return next(
        (
            c
            for c in COMPONENTS
            if given.startswith(c + "_") and given.removeprefix(c + "_") in _PER_COMPONENT
        ),
        None,
    )


def _meanings(given: str, value: Any, known: Collection[str]) -> Iterator[tuple[str, str | None, Any]]:
    """What one flag says, as (option, component, value)."""
    if given in ALIASES:
        yield from _meanings(ALIASES[given], value, known)
    elif given in SIZES:
        if read(given, bool, value):
            yield from (("height", None, SIZES[given][0]), ("width", None, SIZES[given][1]))
    elif given == "no_save_output":
        yield "save_output", None, not read(given, bool, value)
    elif given == "output_file_path":
        folder, slash, file = one_text(given, value).rstrip("/").rpartition("/")
        frames = "/" if one_text(given, value).endswith("/") else ""
        yield from (("output_path", None, folder or slash or "."), ("output_file_name", None, file + frames))
    elif given == "prompt_path":
        yield "prompt", None, _lines(one_text(given, value))
    elif _is_map(given):
        name, _, part = given.partition(".")
        yield from [(name, part, value)] if part else ((name, *pair) for pair in _pairs(name, value))
    elif given not in known and (component := _component(given)):
        yield _PER_COMPONENT[given.removeprefix(component + "_")], component, value
    else:
        yield given, None, value


_PER_COMPONENT = {
    "path": "component_paths", "weights_path": "component_weights_paths", "quantization": "component_quantizations",
}  # fmt: skip


def refusal(name: str, value: Any) -> str | None:
    """The sentence that refuses an unsupported option; None where `value` turns its feature off."""
    feature, off = unsupported.OPTIONS[name]
    value = of_python(value)
    parts = value.values() if name in unsupported.MAPS else [value]
    if all(_plain(_said(part)) in (*off, "") for part in parts):
        return None
    return f"{name}: {shown(_said(value))} cannot be used; {unsupported.said(feature)}"


def _plain(text: str) -> str:
    """Lower case, and one spelling for each number."""
    with suppress(ValueError):
        return f"{float(text):g}"
    return text.lower()


def _said(value: Any) -> str:
    """A value as the user wrote it, the beginning of a long one."""
    if isinstance(value, Mapping):
        return ",".join(f"{part}={_words_of(inner)}" for part, inner in islice(value.items(), LONGEST))
    return _words_of(value)


def _words_of(value: Any) -> str:
    return " ".join(map(_word, value[:LONGEST])) if isinstance(value, list | tuple) else _word(value)


def _word(value: Any) -> str:
    return value[: LONGEST + 1] if isinstance(value, str) else shown(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def one_text(name: str, value: Any) -> str:
    """The text of an option that takes one. Raises UserError for none and for several."""
    words = _listed(value)
    if len(words) != 1 or not isinstance(words[0], str):
        raise UserError(
            name, f"{name}: takes one text and was given {'none' if value is True else shown(words)}"
        )
    return words[0]


def _lines(path: str) -> list[str]:
    """The prompts of a text file, one a line."""
    if not path.lower().endswith(".txt"):
        raise UserError("prompt_path", f"prompt_path: {path!r} must be a .txt file with one prompt a line")
    lines = paths.lines(paths.read_text(path, "prompt_path"))
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError("prompt_path", f"prompt_path: {path!r} holds no prompt")
    return prompts


def _pairs(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The (component, value) pairs of a map: a mapping, a JSON object, or `a=x,b=y`."""
    if isinstance(value, Mapping):
        yield from ((_word(key), inner) for key, inner in value.items())
        return
    text = ",".join(word if isinstance(word, str) else shown(word) for word in _listed(value))
    if text.lstrip().startswith("{"):
        try:
            yield from json.loads(text).items()
            return
        except (ValueError, RecursionError) as error:
            raise UserError(name, f"{name}: {shown(text)} is not a JSON object") from error
    for pair in text.split(","):
        key, equals, inner = (part.strip() for part in pair.partition("="))
        if not (key and equals and inner):
            raise UserError(
                name, f"{name}: {shown(text)} must be pairs such as transformer=sdpa,text_encoder=math"
            )
        yield key, inner
