"""The global state of torch: default dtype and device, autocast, modes and numeric switches.

A program may set it for its own purposes, and it would change the image of a seed. So everything that
computes runs in `default_torch_state`, where torch is as in a fresh process. Afterwards the program's state
is restored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """One setting of the process.

    fresh: the values it may have in a process that never set it; `write` gets the first.
    """

    read: Callable[[], Any]
    write: Callable[[Any], None]
    fresh: tuple[Any, ...]


_backends: Any = torch.backends


def _attribute(owner: object, name: str, *fresh: object) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value), fresh)


def _kernel(name: str) -> Setting:
    """Whether scaled dot product attention may choose this kernel."""
    cuda = torch.backends.cuda
    return Setting(getattr(cuda, f"{name}_sdp_enabled"), getattr(cuda, f"enable_{name}_sdp"), (True,))


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _matmul() -> tuple[str, str, str]:
    """(float32 precision in general, of CUDA, of the CPU).

    The first is "" where the others contradict it, for which torch raises an error.
    """
    single = _backends.cuda.matmul.fp32_precision, _backends.mkldnn.matmul.fp32_precision
    try:
        return torch.get_float32_matmul_precision(), *single
    except RuntimeError:
        return "", *single


def _set_matmul(precisions: tuple[str, str, str]) -> None:
    common, *single = precisions
    if common:
        torch.set_float32_matmul_precision(common)  # which sets the others too
    _backends.cuda.matmul.fp32_precision, _backends.mkldnn.matmul.fp32_precision = single


_matmuls = _backends.cuda.matmul
SETTINGS = (
    Setting(torch.get_default_dtype, torch.set_default_dtype, (torch.float32,)),
    Setting(
        _deterministic,
        lambda on: torch.use_deterministic_algorithms(on[0], warn_only=on[1]),
        ((False, False),),
    ),
    _attribute(_backends, "fp32_precision", "none"),  # before those that follow it where they are not set
    _attribute(_backends.cudnn, "fp32_precision", "none"),
    _attribute(_backends.cudnn.conv, "fp32_precision", "tf32"),
    _attribute(_backends.mkldnn.conv, "fp32_precision", "ieee", "none"),
    Setting(
        _matmul, _set_matmul, tuple(("highest", a, b) for a in ("ieee", "none") for b in ("ieee", "none"))
    ),
    _attribute(_matmuls, "allow_bf16_reduced_precision_reduction", True),
    _attribute(_matmuls, "allow_fp16_reduced_precision_reduction", True),
    _attribute(_matmuls, "allow_fp16_accumulation", False),
    _attribute(_backends.cudnn, "enabled", True),
    _attribute(_backends.cudnn, "benchmark", False),
    _attribute(_backends.cudnn, "deterministic", False),
    _attribute(_backends.mkldnn, "enabled", True),
    *map(_kernel, ("flash", "mem_efficient", "math", "cudnn")),
)
"""Everything that can change a value. Determinism is included: with it torch refuses operations, and nothing
here needs it.
"""


class _Shared:
    """The settings of the process, for all threads that are in `default_torch_state` at a time: the first
    thread makes them fresh, the last restores them.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: list[tuple[Setting, Any]] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = []
                for setting in SETTINGS:
                    if (value := setting.read()) not in setting.fresh:
                        self._before.append((setting, value))
                        setting.write(setting.fresh[0])
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for setting, value in reversed(self._before):
                    setting.write(value)


_shared = _Shared()
_KINDS = ("cpu", "cuda", "xpu", "mps")
"""Devices for which autocast may be on."""


@contextmanager
def default_torch_state() -> Generator[None]:
    """torch as in a fresh process, without gradients.

    Settings of a thread change for this thread, the others for the process.
    """
    with ExitStack() as stack:
        stack.enter_context(_shared)
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.no_grad())
        yield
