"""What is read from environment variables. No other module reads them. No torch here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinydiff import paths
from tinydiff.entries import EntryDict
from tinydiff.records import UserError, brief
from tinydiff.values import read

CLOUD_STORAGE = (
    "CLOUD_STORAGE_TYPE",
    "S3_BUCKET_NAME",
    "S3_ACCESS_KEY_ID",
    "S3_SECRET_ACCESS_KEY",
    "S3_ENDPOINT_URL",
    "S3_REGION_NAME",
)
"""Environment variables of object storage, each with the prefix TINYDIFF_ or SGLANG_."""


@dataclass(frozen=True)
class LaunchedRank:
    """The rank of this process, and its rank on this machine, as torchrun or `tinydiff generate` set them."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def under_torchrun() -> LaunchedRank | None:
    """This process's rank as the environment says it, None if no launcher started it.

    Raises UserError for a variable with a value that no launcher sets.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not {*names, "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None
    rank, size, local_rank, local_size = (_environment_integer(name) for name in names)
    for name, value, total in (("RANK", rank, size), ("LOCAL_RANK", local_rank, local_size)):
        if not value < total:
            message = (
                f"the environment variable {name} is {value}; of {total} processes the last is {total - 1}"
            )
            raise UserError(name, message)
    if not 0 < _environment_integer("MASTER_PORT") < 2**16:
        raise UserError("MASTER_PORT", "the environment variable MASTER_PORT must be between 1 and 65535")
    return LaunchedRank(rank, size, local_rank, local_size)


def _environment_integer(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        message = (
            f"the environment variable {name} is {brief(text)}; a launcher such as torchrun sets it to an"
        )
        raise UserError(name, f"{message} integer of at least 0; unset it if there is no launcher")
    return int(text)


def overlay_registry() -> EntryDict:
    """Source repository -> its overlay, as the environment says it. Raises UserError.

    TINYDIFF_MODEL_OVERLAY_REGISTRY and SGLANG_DIFFUSION_MODEL_OVERLAY_REGISTRY each hold a JSON object or the
    path of a JSON file. The first wins.
    """
    entries: EntryDict = {}
    for name in ("SGLANG_DIFFUSION_MODEL_OVERLAY_REGISTRY", "TINYDIFF_MODEL_OVERLAY_REGISTRY"):
        text = os.environ.get(name, "").strip()
        if not text:
            continue
        try:
            held = json.loads(text if text.startswith("{") else paths.read_text(text, name))
        except json.JSONDecodeError as error:
            raise UserError(name, f"the environment variable {name} holds no JSON ({error})") from error
        if not isinstance(held, dict):
            message = (
                f"the environment variable {name} holds a JSON {type(held).__name__}; it must be an object"
            )
            raise UserError(name, message)
        entries |= held
    return entries


def cache_root() -> Path:
    """The directory of what is made once and used again.

    It is TINYDIFF_CACHE_ROOT, else SGLANG_DIFFUSION_CACHE_ROOT, else `tinydiff` in XDG_CACHE_HOME or
    ~/.cache.
    """
    for name in ("TINYDIFF_CACHE_ROOT", "SGLANG_DIFFUSION_CACHE_ROOT"):
        if text := os.environ.get(name):
            return paths.path(text, name)
    return paths.path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / "tinydiff"


def use_modelscope() -> bool:
    """Whether repositories come from ModelScope: TINYDIFF_USE_MODELSCOPE, else SGLANG_USE_MODELSCOPE."""
    for name in ("TINYDIFF_USE_MODELSCOPE", "SGLANG_USE_MODELSCOPE"):
        if text := os.environ.get(name, "").strip().lower():
            if text not in ("1", "true", "0", "false"):
                raise UserError(name, f"the environment variable {name} is {brief(text)}; set true or false")
            return text in ("1", "true")
    return False


CACHE_DIT: Mapping[str, tuple[str, Any]] = {
    "FN": ("Fn_compute_blocks", 1),
    "BN": ("Bn_compute_blocks", 0),
    "WARMUP": ("max_warmup_steps", 4),
    "RDT": ("residual_diff_threshold", 0.24),
    "MC": ("max_continuous_cached_steps", 3),
    "TAYLORSEER": ("enable_taylorseer", False),
    "TS_ORDER": ("taylorseer_order", 1),
    "DMD": ("enable_dmd", False),
    "DMD_HISTORY": ("dmd_history", 6),
    "DMD_RANK": ("dmd_rank", 0),
    "DMD_RIDGE": ("dmd_ridge", 1e-8),
    "DMD_SVD_PRECISION": ("dmd_svd_precision", "medium"),
}
"""End of a variable TINYDIFF_CACHE_DIT_... -> the setting of the package cache-dit, and SGLang's default."""


def cache_dit() -> EntryDict | None:
    """The settings of cache-dit from the environment; None where it is not switched on. Raises UserError.

    TINYDIFF_CACHE_DIT_ENABLED, else SGLANG_CACHE_DIT_ENABLED, switches it on. The ends of `CACHE_DIT` in
    place of ENABLED are its settings.
    """
    if not _cache_dit_variable("ENABLED", False):
        return None
    for name in ("SCM_PRESET", "SCM_COMPUTE_BINS", "SCM_CACHE_BINS"):
        if _cache_dit_variable(name, "none").lower() != "none":
            message = "step masks are not passed on; put steps_computation_mask into --cache-dit-config"
            raise UserError(name, f"the environment variable ..._CACHE_DIT_{name}: {message}")
    return {setting: _cache_dit_variable(name, value) for name, (setting, value) in CACHE_DIT.items()}


def _cache_dit_variable(name: str, default: object) -> Any:
    for prefix in ("TINYDIFF", "SGLANG"):
        variable = f"{prefix}_CACHE_DIT_{name}"
        if text := os.environ.get(variable, "").strip():
            kind = type(default)
            return read(variable, kind, {"1": "true", "0": "false"}.get(text, text) if kind is bool else text)
    return default


def keys(name: str) -> tuple[str, ...]:
    """The keys in the environment variable TINYDIFF_<name>, separated by commas."""
    return tuple(word.strip() for word in os.environ.get(f"TINYDIFF_{name}", "").split(",") if word.strip())


def cloud_storage() -> dict[str, str]:
    """The settings of object storage from the environment, without their prefixes; unset ones are left out.

    TINYDIFF_S3_BUCKET_NAME, else SGLANG_S3_BUCKET_NAME, is S3_BUCKET_NAME.
    """
    values = {
        name: os.environ.get(f"TINYDIFF_{name}") or os.environ.get(f"SGLANG_{name}") for name in CLOUD_STORAGE
    }
    return {name: value for name, value in values.items() if value}
