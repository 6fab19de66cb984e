"""Out of memory, a request runs again, once, on a model that has loaded again with less on the device.

Memory is free for that only when nothing holds the old weights. So a program's model, which the program
holds, becomes the smaller one in place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TypeVar

from tinydiff.records import Request
from tinydiff.runtime import blueprint as blueprints
from tinydiff.runtime import fit
from tinydiff.runtime.blueprint import Blueprint, Model
from tinydiff.runtime.shortage import give_memory_back, short_of_memory

log = logging.getLogger(__name__)
T = TypeVar("T")


def run(model: Model, request: Request, make: Callable[[Model], T], alone: bool) -> T:
    """`make(model)`; out of memory, once more with less of the model on the device.

    alone: whether this process alone makes the request. Raises UserError where nothing fits.
    """
    if not model.nets and model.pipe is None:  # it was to be loaded again, and that failed
        load(model, model.blueprint)
    try:
        return make(model)
    except Exception as error:
        if not short_of_memory(error) or not alone:
            raise
        log.debug("", exc_info=error)
    give_memory_back()  # when the error, which holds tensors, is gone
    plan = model.blueprint
    smaller = fit.stepped_down(plan)
    if smaller is None:
        raise fit.refusal(plan, request, fit.free_bytes(plan.device))
    log.warning("out of memory: it runs again with less on the device (%s)", ", ".join(moved(plan, smaller)))
    load(model, smaller)
    try:
        return make(model)
    except Exception as error:
        if not short_of_memory(error):
            raise
        raise fit.refusal(smaller, request, fit.free_bytes(smaller.device)) from error


def moved(before: Blueprint, after: Blueprint) -> list[str]:
    """The components whose residency differs."""
    return [name for name, net in after.nets.items() if net.residency != before.nets[name].residency]


def load(model: Model, smaller: Blueprint) -> None:
    """Let a model be loaded again, in place. Its weights leave before the others come.

    Where loading fails, its weights are gone and the next request loads them.
    """
    _become(model, replace(model, blueprint=smaller, nets={}))
    give_memory_back()
    _become(model, blueprints.load(smaller))


def _become(model: Model, other: Model) -> None:
    for entry in fields(Model):
        object.__setattr__(model, entry.name, getattr(other, entry.name))
