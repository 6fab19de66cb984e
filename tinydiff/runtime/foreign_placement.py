"""Where the networks of another library's pipeline live: our offload options, by that library's own means."""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch

from tinydiff.config import ModelOptions
from tinydiff.records import UserError, check_known
from tinydiff.runtime.foreign import Untyped

log = logging.getLogger(__name__)

GROUPS = {
    "dit": ("transformer", "unet", "prior", "decoder"),
    "text_encoder": ("text_encoder",),
    "image_encoder": ("image_encoder",),
    "vae": ("vae",),
}
"""Group -> how the names of its components begin."""


def check(options: ModelOptions) -> None:
    """Raises UserError for two kinds of offloading at once, of which a pipeline can have one."""
    if _asks(options, "component-offload") and _asks(options, "layerwise-offload"):
        message = "diffusers offloads whole components or their layers, not both; give one kind"
        raise UserError("dit_layerwise_offload", f"dit_layerwise_offload: {message}")


def place(pipe: Untyped, options: ModelOptions, device: torch.device, components: Collection[str]) -> None:
    """Move a pipeline to the device, or let it come there part by part where the options ask for that."""
    whole = _chosen(options, "component-offload", components)
    layers = _chosen(options, "layerwise-offload", components)
    needed = "enable_group_offload" if layers else "enable_model_cpu_offload"
    if device.type != "cpu" and (whole or layers) and not hasattr(pipe, needed):
        field = "dit_layerwise_offload" if layers else "dit_cpu_offload"
        raise UserError(field, f"{field}: {type(pipe).__name__} cannot be offloaded")
    if device.type == "cpu":
        if whole or layers:
            log.info("offloading has no effect: there is no GPU, so all weights are in the host's memory")
        pipe.to(device)
    elif layers:
        pipe.enable_group_offload(
            onload_device=device,
            offload_type="block_level",
            num_blocks_per_group=max(1, int(options.dit_offload_prefetch_size or 1)),
            use_stream=options.pin_cpu_memory is not False,
            exclude_modules=[name for name in components if name not in layers],
        )
    elif whole:
        pipe._exclude_from_cpu_offload = [name for name in components if name not in whole]
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)


def _asks(options: ModelOptions, mode: str) -> list[str]:
    """The components and groups that the options offload in one way."""
    asked = [name for name, chosen in options.component_residency.items() if chosen == mode]
    if mode == "layerwise-offload":
        asked += ["dit"] * bool(options.dit_layerwise_offload)
        return [*asked, *options.layerwise_offload_components]
    if options.performance_mode == "memory" and not _asks(options, "layerwise-offload"):
        asked.append("all")
    flags = {name: getattr(options, f"{name}_cpu_offload") for name in GROUPS}
    return [*asked, *(name for name, on in flags.items() if on), *options.cpu_offload_components]


def _chosen(options: ModelOptions, mode: str, components: Collection[str]) -> set[str]:
    found: set[str] = set()
    for name in _asks(options, mode):
        if name in ("all", "none", "default"):
            found |= set(components) if name != "none" else set()
        elif name in GROUPS:
            found |= {each for each in components if each.startswith(GROUPS[name])}
        else:
            check_known("cpu_offload_components", name, components)
            found.add(name)
    return found
