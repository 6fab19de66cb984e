"""The tiny denoisers of the parity table, ready to be evaluated on both sides."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinydiff.models.evaluate import predict
from tinydiff.ops.network import Network
from tinydiff.parity.asked import TIME, Asked
from tinydiff.parity.denoiser_case import Denoiser, case
from tinydiff.parity.denoisers import DENOISERS
from tinydiff.parity.reference import built, doubles, library, randomised


class Tiny(NamedTuple):
    """A tiny denoiser in float64: ours, the reference with the same weights, and what both are asked."""

    network: Network
    flat: dict[str, Tensor]
    reference: nn.Module
    asked: Asked

    def expected(self, **changes: Any) -> Tensor:
        """What the reference answers, without its own roundings. changes: other keyword arguments."""
        with doubles():
            return self.asked.answer(self.reference(**self.asked.reference_inputs | changes))

    def predict(self, flat: dict[str, Tensor] | None = None, **changes: Tensor) -> Tensor:
        """What ours answers. flat: other weights. changes: other inputs."""
        inputs = self.asked.inputs | changes
        y = predict(self.network, self.flat if flat is None else flat, self.asked.tokens, TIME, inputs)
        return y[:, : self.asked.answered]


def tiny(d: str | Denoiser) -> Tiny:
    """A denoiser, or that of this name in the table, with redrawn weights."""
    d = DENOISERS[d] if isinstance(d, str) else d
    both = case(d)
    reference = both.reference()
    state = randomised(reference, 1)
    flat = {name: tensor for key, tensor in state.items() if (name := both.rename(key)) is not None}
    return Tiny(Network(d.family, d.config, dtype=torch.float64), flat, reference, d.ask(d.config))


def in_bfloat16(d: Denoiser) -> tuple[Tensor, Tensor, Tensor]:
    """(ours in bfloat16, the reference's in bfloat16, ours in float64), of the same rounded weights and
    inputs. Weights that the spec keeps in float32 are float32 on both sides.
    """
    made, rename = tiny(d), case(d).rename
    kept = {row.name for row in d.family.spec(d.config) if row.float32}
    rounded = {n: x.to(torch.float32 if n in kept else torch.bfloat16) for n, x in made.flat.items()}
    reference = built(getattr(library("diffusers"), d.reference), d.config).bfloat16()
    reference.load_state_dict(made.reference.state_dict())
    for key, parameter in reference.named_parameters():
        if (name := rename(key)) in kept:
            parameter.data = rounded[name]
    asked = made.asked._replace(
        tokens=made.asked.tokens.bfloat16(),
        inputs={n: x if "positions" in n else _rounded(x) for n, x in made.asked.inputs.items()},
        reference_inputs={name: _rounded(x) for name, x in made.asked.reference_inputs.items()},
    )
    half = made._replace(asked=asked, network=Network(d.family, d.config, dtype=torch.bfloat16))
    wide = asked._replace(tokens=asked.tokens.double(), inputs={n: _wide(x) for n, x in asked.inputs.items()})
    exact = made._replace(asked=wide).predict({name: x.double() for name, x in rounded.items()})
    return half.predict(rounded), asked.answer(reference(**asked.reference_inputs)), exact


def _rounded(x: Any) -> Any:
    """Floating-point tensors in bfloat16, in lists too."""
    if isinstance(x, list):
        return [_rounded(each) for each in x]
    return x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.dtype == torch.bfloat16 else x
