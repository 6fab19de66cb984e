"""Any pipeline that diffusers loads, as a model: read before its weights, loaded, and called for one output.

The only module that a request passes through which imports diffusers. It comes with the extra `diffusers`.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch

from tinydiff import config, paths
from tinydiff.config import ModelOptions
from tinydiff.io.hub import read_json
from tinydiff.models import registry
from tinydiff.models.registry import ReleasedModel
from tinydiff.records import Request, UserError, check_known, nearest, shown
from tinydiff.runtime import foreign_placement, loras
from tinydiff.runtime.blueprint import DTYPES, SHIPPED, Blueprint, Model, here
from tinydiff.runtime.continuous import short_of_memory
from tinydiff.runtime.foreign import Foreign

log = logging.getLogger(__name__)

INSTALL = "`pip install 'tinydiff[diffusers]'` adds diffusers, which runs many more pipelines"
TAKEN = frozenset(
    """
    model_path revision trust_remote_code variant component_paths lora_path lora_nickname lora_scale
    lora_weight_name lora_merge_mode dit_precision vae_precision text_encoder_precisions
    image_encoder_precision component_precisions upscaling_model_path
    frame_interpolation_model_path vae_tiling vae_slicing
    performance_mode dit_cpu_offload text_encoder_cpu_offload image_encoder_cpu_offload vae_cpu_offload
    cpu_offload_components dit_layerwise_offload layerwise_offload_components component_residency
    dit_offload_prefetch_size pin_cpu_memory enable_torch_compile backend pipeline_class_name
    diffusers_attention_backend cache_dit_config
    """.split()
)
"""Model options that have an effect on a pipeline of diffusers."""
DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")
"""What pipelines call their denoising networks."""
OUTPUTS = ("frames", "images", "videos", "video", "image", "sample")
"""What pipelines call what they make."""


def installed() -> bool:
    return find_spec("diffusers") is not None


def _library() -> Any:
    """The package diffusers. Raises UserError where it is not installed."""
    if not installed():
        raise UserError("backend", f"backend: 'diffusers' is not installed; {INSTALL}")
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    return diffusers


@contextmanager
def _explained(field: str, doing: str) -> Iterator[None]:
    """Mistakes that diffusers finds, as one sentence."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError, AttributeError) as error:
        log.debug("", exc_info=error)
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = str(error).strip() or type(error).__name__
        raise UserError(field, f"{field}: diffusers cannot {doing}: {said}") from error


def read(options: ModelOptions) -> Blueprint:
    """What is known of a pipeline and its model before any weight is read. Raises UserError."""
    defaults = ModelOptions()
    for entry in fields(ModelOptions):
        value = getattr(options, entry.name)
        if entry.name not in TAKEN and value != getattr(defaults, entry.name):
            message = f"{shown(value)} is for tinydiff's own code; --backend diffusers does not take it"
            raise UserError(entry.name, f"{entry.name}: {message}")
    library = _library()
    directory = _directory(library, options)
    index = _index(directory, options)
    pipeline = _pipeline_class(library, directory, index, options)
    arguments = dict(list(inspect.signature(pipeline.__call__).parameters.items())[1:])
    named = {n: each for n, each in arguments.items() if each.kind is not each.VAR_KEYWORD}
    own = not pipeline.__module__.startswith("diffusers.")  # diffusers' classes take **kwargs and drop them
    precisions = _precisions(index, options)
    for name in options.component_paths:
        check_known("component_paths", name, list(components_of(index)))
    foreign_placement.check(options)
    foreign = Foreign(
        library="diffusers",
        version=library.__version__,
        pipeline=pipeline,
        directory=directory,
        options=options,
        arguments={n: None if each.default is each.empty else each.default for n, each in named.items()},
        needed=tuple(n for n, each in named.items() if each.default is each.empty),
        open=own and len(named) < len(arguments),
        precisions=precisions,
        adapters=loras.chosen(options),
    )
    return Blueprint(
        _row(foreign, options.model_path),
        named=True,
        nets={},
        tokenizers={},
        scheduler={},
        options={},
        compiled=options.enable_torch_compile,
        tiling=bool(options.vae_tiling),
        variant=options.variant,
        upscaling_model_path=options.upscaling_model_path,
        frame_interpolation_model_path=options.frame_interpolation_model_path,
        foreign=foreign,
    )


def _directory(library: Any, options: ModelOptions) -> Path:
    """The model's directory; what diffusers needs of a hub id is downloaded."""
    if options.model_path == registry.SHIPPED:
        return SHIPPED
    path = paths.path(options.model_path, "model_path")
    if (kind := paths.kind(path)) == "directory":
        return path
    if kind == "file":
        message = f"{str(path)!r} is a file; --backend diffusers takes a directory or a hub id"
        raise UserError("model_path", f"model_path: {message}")
    with _explained("model_path", f"fetch {options.model_path!r}"):
        return Path(
            library.DiffusionPipeline.download(
                options.model_path,
                revision=options.revision,
                variant=options.variant,
                trust_remote_code=options.trust_remote_code,
            )
        )


def _index(directory: Path, options: ModelOptions) -> dict[str, Any]:
    file = directory / "model_index.json"
    if not file.is_file():
        message = f"{options.model_path!r} has no model_index.json, by which diffusers knows a pipeline"
        raise UserError("model_path", f"model_path: {message}")
    return dict(read_json(file))


def components_of(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Component -> (library, class)."""
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {name: (a, b) for name, (a, b) in pairs.items() if name[0] != "_" and isinstance(b, str)}


def _pipeline_class(
    library: Any, directory: Path, index: Mapping[str, Any], options: ModelOptions
) -> type[Any]:
    """The class that runs the model: diffusers' own, or one in the model's code where that is trusted."""
    named, field = index.get("_class_name"), "model_path"
    if options.pipeline_class_name is not None:
        named, field = options.pipeline_class_name, "pipeline_class_name"
    code = [name for name, (module, _) in components_of(index).items() if _brings(directory, name, module)]
    file = f"{named[0]}.py" if isinstance(named, list) else ""
    if not options.trust_remote_code and (file or code):
        what = file or f"the component {code[0]!r}"
        message = f"{options.model_path!r} brings code of its own ({what}), which runs on this machine"
        raise UserError("trust_remote_code", f"trust_remote_code: {message}; the flag allows that")
    if isinstance(named, list):
        from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

        with _explained("model_path", f"load {named[-1]} from {file}"):
            found: Any = get_class_from_dynamic_module(
                str(directory.absolute()), file, class_name=named[-1], trust_remote_code=True
            )
        return found
    found = getattr(library, named, None) if isinstance(named, str) else None
    if not (isinstance(found, type) and issubclass(found, library.DiffusionPipeline)):
        known = [name for name in dir(library) if name.endswith("Pipeline")]
        message = f"diffusers {library.__version__} has no pipeline class {shown(named)}"
        raise UserError(field, f"{field}: {message}{nearest(str(named), known)}")
    return found


def _brings(directory: Path, component: str, module: str | None) -> bool:
    """Whether a component's class is in the model's own code."""
    return bool(module) and (directory / component / f"{module}.py").is_file()


def _precisions(index: Mapping[str, Any], options: ModelOptions) -> dict[str, str]:
    """Component -> its type: as asked, else bf16 on a GPU and fp32 on a CPU."""
    usual = "fp32" if here().type == "cpu" else "bf16"
    parts = [
        name
        for name in components_of(index)
        if not re.match("tokenizer|scheduler|.*_(extractor|processor)", name)
    ]
    encoders = [name for name in parts if name.startswith("text_encoder")]
    if len(options.text_encoder_precisions) > len(encoders):
        message = f"{len(options.text_encoder_precisions)} are given; text encoders: {len(encoders)}"
        raise UserError("text_encoder_precisions", f"text_encoder_precisions: {message}")
    for name in options.component_precisions:
        check_known("component_precisions", name, parts)
    asked = {name: options.dit_precision for name in DENOISERS}
    asked |= {"vae": options.vae_precision, "image_encoder": options.image_encoder_precision}
    asked |= dict(zip(encoders, options.text_encoder_precisions, strict=False))
    asked |= options.component_precisions
    return {name: asked.get(name) or usual for name in parts}


def _row(foreign: Foreign, name: str) -> ReleasedModel:
    """The defaults of a request, as far as the class and the JSON files tell them."""
    told = foreign.arguments
    video = next((each for each in ("num_frames", "video_length") if each in told), None)
    frames = 1 if video is None else told[video] or _entry(foreign, "sample_frames") or 16
    side = _side(foreign)
    takes_image = next((each for each in ("image", "images") if each in told), None)
    return ReleasedModel(
        name,
        foreign.library,
        foreign.class_name,
        height=_whole(told.get("height")) or side,
        width=_whole(told.get("width")) or side,
        steps=_whole(told.get("num_inference_steps")) or 1,
        guidance=float(told.get("guidance_scale") or 1.0),
        params=0,
        shape={},
        num_frames=frames,
        fps=_whole(told.get("fps") or told.get("frame_rate")) or 16,
        text_tokens=_whole(told.get("max_sequence_length")) or 512,
        size_multiple=8,
        frame_multiple=1,
        images=(0, 0) if takes_image is None else (int(takes_image in foreign.needed), 16),
        image_use="references",
    )


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int | float) else 0


def _entry(foreign: Foreign, name: str) -> Any:
    """An entry of the denoiser's config.json."""
    files = (foreign.directory / each / "config.json" for each in DENOISERS)
    return next((read_json(file).get(name) for file in files if file.is_file()), None)


def _side(foreign: Foreign) -> int:
    """The side of an image of the size that the denoiser was made for."""
    sample = _entry(foreign, "sample_size")
    file = foreign.directory / "vae" / "config.json"
    levels = read_json(file).get("block_out_channels") if file.is_file() else None
    if not isinstance(sample, int):
        return 1024
    return sample * (2 ** (len(levels) - 1) if isinstance(levels, list) else 1)


def load(
    blueprint: Blueprint, ranks: Any = None, merge_adapters: bool = False, requests: Sequence[Any] = ()
) -> Model:
    """Load the pipeline and set what the options ask for. Raises UserError."""
    foreign = blueprint.foreign
    assert foreign is not None
    options, directory = foreign.options, foreign.directory
    index = _index(directory, options)
    types = {name: DTYPES[each] for name, each in foreign.precisions.items()}
    others = {
        name: _component(*components_of(index)[name], path, types.get(name), f"{name}_path")
        for name, path in options.component_paths.items()
    }
    with _explained("model_path", f"load {options.model_path!r}"):
        pipe = foreign.pipeline.from_pretrained(
            str(directory.absolute()),
            dtype=types,
            variant=options.variant,
            trust_remote_code=options.trust_remote_code,
            **others,
        )
    _set_vae(pipe, options)
    _load_loras(pipe, foreign)
    _set_attention(pipe, options.diffusers_attention_backend)
    _set_cache(pipe, options.cache_dit_config)
    foreign_placement.place(pipe, options, here(), tuple(foreign.precisions))
    if options.enable_torch_compile:
        _compile(pipe)
    return Model(blueprint, {}, {}, pipe=pipe)


def _component(library: str, class_name: str, path: str, dtype: Any, option: str) -> Any:
    """The component at a path, of the class that its own config names, else of the listed one."""
    from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

    place = paths.path(path, option)
    kind, stored = paths.kind(place), place / "config.json"
    entries = read_json(stored) if kind == "directory" and stored.is_file() else {}
    names = (entries.get("_class_name"), *(entries.get("architectures") or ()), class_name)
    named = next(name for name in names if name)
    with _explained(option, f"load {path!r} as a {named}"):
        found: Any = simple_get_class_obj(library, named)
        more = {"dtype": dtype} if hasattr(found, "forward") else {}
        if kind == "file":
            return found.from_single_file(str(place), **more)
        return found.from_pretrained(path if kind != "directory" else str(place), **more)


def _denoisers(pipe: Any) -> Iterator[tuple[str, Any]]:
    for name in DENOISERS:
        if hasattr(net := getattr(pipe, name, None), "forward"):
            yield name, net


def _set_vae(pipe: Any, options: ModelOptions) -> None:
    vae = getattr(pipe, "vae", None)
    for option, method in (("vae_tiling", "enable_tiling"), ("vae_slicing", "enable_slicing")):
        if getattr(options, option):
            if not hasattr(vae, method):
                message = f"the autoencoder of {type(pipe).__name__} has no {option.removeprefix('vae_')}"
                raise UserError(option, f"{option}: {message}")
            with _explained(option, f"use {option}"):
                getattr(vae, method)()


def _set_attention(pipe: Any, backend: str | None) -> None:
    """Let every denoiser use an attention backend of diffusers."""
    field = "diffusers_attention_backend"
    for name, net in () if backend is None else _denoisers(pipe):
        if not hasattr(net, "set_attention_backend"):
            raise UserError(field, f"{field}: the {name} is a {type(net).__name__}, which has but one")
        with _explained(field, f"use the attention backend {backend!r} here"):
            net.set_attention_backend(backend)
            processors = [getattr(each, "processor", None) for each in net.modules()]
            if any(hasattr(each, "_attention_backend") for each in processors):
                continue
            if backend == "xformers":  # networks whose attention is older than backends
                net.enable_xformers_memory_efficient_attention()
            elif backend != "native":
                raise UserError(field, f"{field}: the attention of the {name} can be native or xformers only")


def _set_cache(pipe: Any, file: str | None) -> None:
    """Switch on the package cache-dit, with the settings of a file, else those of the environment."""
    settings = config.cache_dit()
    if file is None and settings is None:
        return
    field = "cache_dit_config"
    if find_spec("cache_dit") is None:
        message = "the package cache-dit is not installed; `pip install cache-dit` adds it"
        raise UserError(field, f"{field}: {message}")
    cache_dit: Any = importlib.import_module("cache_dit")
    with _explained(field, "cache the steps of this pipeline"):
        told = {"cache_config": settings} if file is None else str(paths.path(file, field))
        cache_dit.enable_cache(pipe, **cache_dit.load_configs(told))


def _load_loras(pipe: Any, foreign: Foreign) -> None:
    adapters = foreign.adapters
    if not adapters:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError("lora_path", f"lora_path: {type(pipe).__name__} takes no LoRA adapters")
    if find_spec("peft") is None:
        raise UserError(
            "lora_path", "lora_path: diffusers needs the package peft; `pip install peft` adds it"
        )
    for each in adapters:
        with _explained("lora_path", f"load the adapter {each.source!r}"):
            pipe.load_lora_weights(str(each.file.parent), weight_name=each.file.name, adapter_name=each.name)
    with _explained("lora_path", "use the adapters"):
        pipe.set_adapters([each.name for each in adapters], [each.strength for each in adapters])
        if foreign.options.lora_merge_mode == "merge":
            pipe.fuse_lora(adapter_names=[each.name for each in adapters])
            pipe.unload_lora_weights()


def _compile(pipe: Any) -> None:
    """Compile each kind of repeated block of the denoisers, or the whole where a class names none."""
    for _, net in _denoisers(pipe):
        with _explained("enable_torch_compile", "compile the denoiser"):
            if getattr(net, "_repeated_blocks", None):
                net.compile_repeated_blocks()
            else:
                net.compile()


class StepBar:
    """Stands in for the progress bar of a pipeline, which it moves after each step; told to `on_step`."""

    def __init__(
        self, on_step: Callable[[int, int], None], iterable: Iterable[Any] = (), total: int | None = None
    ) -> None:
        self._on_step, self._iterable = on_step, iterable
        self._done, self._total = 0, len(list(iterable)) if total is None else total

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        for each in self._iterable:
            yield each
            self.update()

    def update(self, count: int = 1) -> None:
        self._done += count
        self._on_step(self._done, self._total)

    def close(self) -> None: ...

    def set_postfix(self, *_: object, **__: object) -> None: ...


def call(
    model: Model, request: Request, seed: int, on_step: Callable[[int, int], None]
) -> tuple[numpy.ndarray, dict[str, Any]]:
    """(frames uint8 [frames, height, width, 3], values that the pipeline tells) of one seed.

    on_step(done, total) is called after each step; what it raises ends the call. Raises UserError for
    arguments that the pipeline refuses.
    """
    pipe, foreign = model.pipe, model.blueprint.foreign
    assert foreign is not None
    arguments = {name: _as_images(value) for name, value in request.arguments.items()}
    ours = {"generator": torch.Generator("cpu").manual_seed(seed), "output_type": "np"}
    arguments |= {name: value for name, value in ours.items() if name in foreign.arguments}
    if foreign.adapters and foreign.options.lora_merge_mode != "merge":
        strengths = foreign.strengths(request.loras)
        pipe.set_adapters(list(strengths), list(strengths.values()))
    pipe.progress_bar = lambda iterable=(), total=None: StepBar(on_step, iterable, total)
    try:
        made = pipe(**arguments)
    except (ValueError, TypeError, AssertionError) as error:
        log.debug("", exc_info=error)
        said = str(error).strip() or type(error).__name__
        named = (name for name in request.arguments if re.search(rf"\b{name}\b", said))
        field = next(named, "prompt" if "prompt" in request.arguments else "diffusers_kwargs")
        message = f"{foreign.class_name} refuses the request: {said}"
        raise UserError(field, f"{field}: {message}") from error
    except (RuntimeError, ArithmeticError, LookupError, AttributeError, ImportError) as error:
        if short_of_memory(error):
            raise
        log.debug("", exc_info=error)
        message = f"{foreign.class_name} failed: {type(error).__name__}: {error}"
        raise UserError("model_path", f"model_path: {message}") from error
    told = {name: getattr(pipe, name, None) for name in ("guidance_scale",) if name in foreign.arguments}
    return _frames(made), {name: value for name, value in told.items() if value is not None}


def _as_images(value: Any) -> Any:
    """Arrays as PIL images, which every pipeline takes."""
    from PIL import Image

    if isinstance(value, numpy.ndarray):
        return Image.fromarray(value)
    return [_as_images(each) for each in value] if isinstance(value, tuple) else value


def _frames(made: Any) -> numpy.ndarray:
    """The frames of an output of a pipeline, uint8 [frames, height, width, 3]."""
    value = next((getattr(made, name) for name in OUTPUTS if getattr(made, name, None) is not None), made)
    if value is made and isinstance(made, tuple):
        value = made[0]
    frames = _array(value)
    frames = frames[0] if frames.ndim == 5 else frames[None] if frames.ndim == 3 else frames
    if frames.dtype != numpy.uint8:
        frames = (frames.astype(numpy.float32) * 255).round().clip(0, 255).astype(numpy.uint8)
    return frames.repeat(3, -1) if frames.shape[-1] == 1 else frames[..., :3]


def _array(value: Any) -> numpy.ndarray:
    """Arrays, tensors with channels before height and width, and PIL images, or lists of them, as an array
    with channels last.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().float().cpu().movedim(-3, -1).numpy()
    if isinstance(value, Sequence):
        return numpy.stack([_array(each) for each in value])
    return numpy.asarray(value.convert("RGB") if hasattr(value, "convert") else value)
