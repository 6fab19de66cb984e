"""What the options of a model set on a loaded pipeline of another library."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from tinydiff import environment, paths
from tinydiff.config import ModelOptions
from tinydiff.records import UserError
from tinydiff.runtime.foreign import Foreign, Untyped

log = logging.getLogger(__name__)

DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")
"""What pipelines call their denoising networks."""


@contextmanager
def explained(field: str, doing: str) -> Generator[None]:
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


def denoisers(pipe: Untyped) -> Iterator[tuple[str, Untyped]]:
    """The pipeline's denoising networks, by name."""
    for name in DENOISERS:
        if hasattr(net := getattr(pipe, name, None), "forward"):
            yield name, net


def set_vae(pipe: Untyped, options: ModelOptions) -> None:
    """Set tiling and slicing of the autoencoder as the options ask. Raises UserError."""
    vae = getattr(pipe, "vae", None)
    for option, method in (("vae_tiling", "enable_tiling"), ("vae_slicing", "enable_slicing")):
        if getattr(options, option):
            if not hasattr(vae, method):
                message = f"the autoencoder of {type(pipe).__name__} has no {option.removeprefix('vae_')}"
                raise UserError(option, f"{option}: {message}")
            with explained(option, f"use {option}"):
                getattr(vae, method)()


def set_attention(pipe: Untyped, backend: str | None) -> None:
    """Let every denoiser use an attention backend of diffusers."""
    field = "diffusers_attention_backend"
    for name, net in () if backend is None else denoisers(pipe):
        if not hasattr(net, "set_attention_backend"):
            raise UserError(field, f"{field}: the {name} is a {type(net).__name__}, which has but one")
        with explained(field, f"use the attention backend {backend!r} here"):
            net.set_attention_backend(backend)
            processors = [getattr(each, "processor", None) for each in net.modules()]
            if any(hasattr(each, "_attention_backend") for each in processors):
                continue
            if backend == "xformers":  # networks whose attention is older than backends
                net.enable_xformers_memory_efficient_attention()
            elif backend != "native":
                raise UserError(field, f"{field}: the attention of the {name} can be native or xformers only")


def set_cache(pipe: Untyped, file: str | None) -> None:
    """Switch on the package cache-dit, with the settings of a file, else those of the environment."""
    settings = environment.cache_dit()
    if file is None and settings is None:
        return
    field = "cache_dit_config"
    if find_spec("cache_dit") is None:
        message = "the package cache-dit is not installed; `pip install cache-dit` adds it"
        raise UserError(field, f"{field}: {message}")
    cache_dit: Untyped = importlib.import_module("cache_dit")
    with explained(field, "cache the steps of this pipeline"):
        told = {"cache_config": settings} if file is None else str(paths.path(file, field))
        cache_dit.enable_cache(pipe, **cache_dit.load_configs(told))


def load_loras(pipe: Untyped, foreign: Foreign) -> None:
    """Load the adapters that the options name. Raises UserError."""
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
        with explained("lora_path", f"load the adapter {each.source!r}"):
            pipe.load_lora_weights(str(each.file.parent), weight_name=each.file.name, adapter_name=each.name)
    with explained("lora_path", "use the adapters"):
        pipe.set_adapters([each.name for each in adapters], [each.strength for each in adapters])
        if foreign.options.lora_merge_mode == "merge":
            pipe.fuse_lora(adapter_names=[each.name for each in adapters])
            pipe.unload_lora_weights()


def compile_blocks(pipe: Untyped) -> None:
    """Compile each kind of repeated block of the denoisers, or the whole where a class names none."""
    for _, net in denoisers(pipe):
        with explained("enable_torch_compile", "compile the denoiser"):
            if getattr(net, "_repeated_blocks", None):
                net.compile_repeated_blocks()
            else:
                net.compile()
