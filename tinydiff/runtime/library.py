"""What library users call: the options of the command line, without writing files."""

from __future__ import annotations

from dataclasses import fields as fields_of
from functools import partial

from tinydiff import config, environment, flags
from tinydiff.entries import Entries
from tinydiff.parallel import layout
from tinydiff.parallel.ranks import Ranks, make_ranks, meet, once
from tinydiff.records import Result, UserError, nearest
from tinydiff.runtime import backends, blueprint, launch, step_down
from tinydiff.runtime.blueprint import Model
from tinydiff.runtime.settings import guidance_of
from tinydiff.runtime.torch_state import default_torch_state


def load(model_path: str | None, options: Entries) -> Model:
    """See `tinydiff.load`."""
    named = dict(options) if model_path is None else {**options, "model_path": model_path}
    _only(named, config.ModelOptions, config.ParallelOptions)
    parsed = config.options(named)
    with default_torch_state():
        plan = backends.read(parsed.model)
        return backends.of(plan).load(plan, _ranks(parsed.parallel, plan))


def _ranks(asked: config.ParallelOptions, plan: blueprint.Blueprint) -> Ranks | None:
    """This process among the ranks that torchrun started, where `asked` makes them share the model.

    Raises UserError without torchrun.
    """
    named = [each.name for each in fields_of(asked) if getattr(asked, each.name) != each.default]
    place = environment.under_torchrun()
    if not named or (count := layout.count(asked, place and place.size)) == 1:
        return None
    if place is None:
        raise UserError(
            named[0],
            f"{named[0]}: a Python program runs as one rank; start it with torchrun, or use the command line",
        )
    if asked.data_parallel_size not in (None, 1):
        message = (
            f"{asked.data_parallel_size} replicas are for the command line only; a Python program "
            "gives each its own prompts"
        )
        raise UserError("data_parallel_size", f"data_parallel_size: {message}")
    launch.check_devices(plan, place.local_size)
    guided = (
        asked.enable_cfg_parallel
        or asked.cfg_parallel_size == 2
        or guidance_of(plan, config.SamplingOptions())[0] > 1
    )
    chosen, why = layout.choose(asked, count, launch.denoiser_heads(plan), guided)
    launch.check_divides(plan, chosen)
    if place.rank == 0:
        launch.log.info("%s", why)
    timeout, device = asked.dist_timeout or launch.TIMEOUT, plan.device.type
    meet(timeout, device)
    return make_ranks(chosen, timeout, device)


def generate(
    model: Model, prompt: object, fields: Entries, progress: config.Progress | None = None
) -> Result:
    """See `tinydiff.generate`."""
    if not isinstance(prompt, str):
        raise UserError(
            "prompt", f"prompt: must be one string, not a {type(prompt).__name__}; call once for each prompt"
        )
    _only(fields, config.SamplingOptions)
    sampling = config.options({**fields, "prompt": prompt}).sampling
    with default_torch_state():
        backend = backends.of(model.blueprint)
        [request] = once(model.replica, lambda: backend.admit(model.blueprint, sampling))
        make = partial(backend.run, request=request, progress=progress or config.NoProgress())
        return step_down.run(model, request, make, alone=model.replica.size == 1)


def _only(names_given: Entries, *records: type) -> None:
    """Every name is a field of these records, or that of a single component, such as vae_path."""
    names = {field.name for record in records for field in fields_of(record)}
    for name in names_given:
        if name not in names and flags.per_component(name) not in names:
            raise UserError(
                name,
                f"{name}: unknown option; the options are {', '.join(sorted(names))}{nearest(name, names)}",
            )
