"""The settings of a request's step cache, and the loop's part of it.

The settings have the names of SGLang and of the package cache-dit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from tinydiff import environment
from tinydiff.config import SamplingOptions
from tinydiff.models.family import Denoiser
from tinydiff.records import StepCache, UserError, brief, nearest
from tinydiff.runtime.blueprint import Blueprint
from tinydiff.sampling import step_cache

FIELD = "cache_dit_params"
NAMES = {
    "fn": "first_blocks",
    "fn_compute_blocks": "first_blocks",
    "warmup": "warmup",
    "max_warmup_steps": "warmup",
    "rdt": "threshold",
    "residual_diff_threshold": "threshold",
    "mc": "most",
    "max_continuous_cached_steps": "most",
}
"""Setting, in lower case -> field of `StepCache`."""
OFF = {"bn": 0, "bn_compute_blocks": 0, "taylorseer": 0, "enable_taylorseer": 0, "dmd": 0, "enable_dmd": 0}
"""Settings of cache-dit that only diffusers' pipelines have, and the value that turns them off."""


def settled(blueprint: Blueprint, sampling: SamplingOptions) -> StepCache | None:
    """The step cache that a request asks for, else the one that the environment switches on.

    None: every step runs every block. Raises UserError for settings that the model cannot have.
    """
    asked, wanted = sampling.cache_dit_params, sampling.enable_cache_dit
    if wanted is False and asked:
        raise UserError(FIELD, f"{FIELD}: these are settings of a step cache, and enable_cache_dit is false")
    default = environment.cache_dit()
    if wanted is False or not (wanted or asked or default):
        return None
    cache = _read({**(default or {}), **asked})
    for name, net in blueprint.nets.items():
        if isinstance(net.family, Denoiser):
            _check(blueprint, name, len(net.family.blocks(net.config)), cache)
    return cache


def _read(settings: Mapping[str, object]) -> StepCache:
    values: dict[str, float] = {}
    for name, value in settings.items():
        key = name.lower().replace("-", "_")
        if key in OFF or key in _DETAILS:
            if key in OFF and value:
                message = f"{name} is for --backend diffusers; a step cache of tinydiff takes {_known()}"
                raise UserError(FIELD, f"{FIELD}: {message}")
            continue
        if key not in NAMES:
            raise UserError(FIELD, f"{FIELD}: {brief(name)} is none of {_known()}{nearest(key, NAMES)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(FIELD, f"{FIELD}: {name} is {brief(value)}; give a number")
        values[NAMES[key]] = value
    whole = {name: _whole(name, value) for name, value in values.items() if name != "threshold"}
    threshold = values.get("threshold", StepCache.threshold)
    if not 0 <= threshold <= 1:
        raise UserError(FIELD, f"{FIELD}: rdt is {threshold:g}; allowed is 0 to 1")
    return StepCache(**whole, threshold=threshold)


_DETAILS = ("ts_order", "taylorseer_order", "dmd_history", "dmd_rank", "dmd_ridge", "dmd_svd_precision")
"""Settings that count only with one of `OFF`."""


def _known() -> str:
    return "Fn, warmup, rdt and mc"


def _whole(name: str, value: float) -> int:
    short, least = {"first_blocks": ("Fn", 1), "warmup": ("warmup", 0), "most": ("mc", -1)}[name]
    if value != int(value) or not least <= value <= 1000:
        unlimited = ", and -1 sets no limit" if short == "mc" else ""
        message = f"{short} is {value:g}; allowed are the integers from {max(0, least)} to 1000{unlimited}"
        raise UserError(FIELD, f"{FIELD}: {message}")
    return int(value)


def _check(blueprint: Blueprint, name: str, blocks: int, cache: StepCache) -> None:
    """Raises UserError where the denoiser has too few blocks for the step cache."""
    if cache.first_blocks >= blocks:
        message = f"Fn is {cache.first_blocks}; the {name} of {blueprint.row.name} has {blocks} blocks"
        raise UserError(FIELD, f"{FIELD}: {message}, and one at least must be left to be reused")


def limits(cache: StepCache | None, device: torch.device | str) -> step_cache.Limits | None:
    """The settings as tensors, which the loop reads."""
    if cache is None:
        return None
    most = cache.most if cache.most >= 0 else 2**31
    return step_cache.Limits(
        torch.tensor(cache.threshold, device=device),
        torch.tensor(cache.warmup, device=device),
        torch.tensor(most, device=device),
    )
