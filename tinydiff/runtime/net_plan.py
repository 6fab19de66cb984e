"""One network of a model before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from tinydiff.io.sources import Component
from tinydiff.keymap import KeyMap
from tinydiff.models.family import Config, Record
from tinydiff.parallel.plan import Plan
from tinydiff.residency import Kind, Residency

R_co = TypeVar("R_co", bound=Record, covariant=True)


def here() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Described(Protocol):
    """A network before or after its weights are loaded."""

    @property
    def family(self) -> Record: ...

    @property
    def config(self) -> Config: ...


@dataclass(frozen=True)
class NetPlan(Generic[R_co]):
    """One network before its weights are loaded. family: its record."""

    name: str
    family: R_co
    component: Component
    config: Config
    asked_dtype: torch.dtype | None
    """The type that the options name; None: that of its role on this device."""
    plan: Plan
    attention_option: str = "attention_backend"
    """The option that sets its attention backend."""
    residency: Residency = Residency()  # noqa: RUF009 (frozen)
    """Where its weights live."""
    excluded: frozenset[Kind] = frozenset()
    """Residencies that an option rules out."""

    @property
    def absent(self) -> bool:
        """Whether some of its weights will not be on the device all the time."""
        return self.residency.kind != "resident"

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: if not asked, float32 on the CPU and for autoencoders and image encoders."""
        if self.asked_dtype is not None:
            return self.asked_dtype
        wide = self.family.role in ("vae", "image_encoder") or here().type == "cpu"
        return torch.float32 if wide else torch.bfloat16

    @property
    def keys(self) -> KeyMap:
        """The key map of its files."""
        return (self.component.keys or self.family.keys)(self.config)
