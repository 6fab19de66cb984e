"""What a tiny denoiser and its reference are asked, at one time and with texts of one length."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tinydiff.entries import EntryDict
from tinydiff.ops.network import Config
from tinydiff.parallel.plan import Plan

PLAN = Plan()
TIME = torch.tensor([640.0])
WORDS = 7


class Asked(NamedTuple):
    """One evaluation, put to both sides."""

    tokens: Tensor
    inputs: dict[str, Tensor]
    """Of the family's `hoist`."""
    reference_inputs: EntryDict
    """The reference's keyword arguments."""
    answer: Callable[[Config], Tensor] = lambda output: output.sample
    """What the reference returns -> the velocity of each token."""
    answered: int | None = None
    """Tokens that it answers; pads follow among ours."""
    kinds: tuple[int, ...] = ()
    """How many tokens of each kind, where there are several."""
