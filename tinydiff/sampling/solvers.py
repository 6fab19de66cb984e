"""Solvers as tables of coefficients.

Every solver here is linear in the latents, the predictions and fresh noise.

Step i of any solver, with v_i the guided velocity predicted at x_i and x0_i = x_i - sigma_i v_i the clean
latents it implies, is

    x_{i+1} = a_i x_i + c_i v_i + b1_i x0_{i-1} + b2_i x0_{i-2} + n_i noise_i

A table is computed once, on the CPU in float64; the loop gathers rows and adds. Sources: diffusers 0.42.1
(Euler, UniPC; arXiv 2302.04867), FastVideo (DMD; arXiv 2405.14867). Shape letters: S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinydiff import entries
from tinydiff.ops.host import integers
from tinydiff.records import UserError, nearest
from tinydiff.sampling.sigmas import (
    TRAIN_STEPS,
    below_one,
    exponential_shift,
    linear_shift,
    scheduler_grid,
    static_shift,
    stretch_to_terminal,
    train_grid,
    unipc_grid,
    with_zero,
)


class Table(NamedTuple):
    """One row per step, each column a CPU tensor [S], float64 but for `expert`."""

    timesteps: Tensor
    """The model's input, in units of the training schedule (0 to 1000)."""
    sigmas: Tensor
    """Noise level of x_i."""
    a: Tensor
    """Coefficient of the latents x_i."""
    c: Tensor
    """Coefficient of the prediction v_i."""
    b1: Tensor
    """Coefficient of the previous step's clean latents."""
    b2: Tensor
    """Coefficient of the clean latents before those."""
    n: Tensor
    """Coefficient of fresh noise."""
    guidance: Tensor
    """Guidance scale."""
    expert: Tensor
    """Index of the network that runs, int64."""

    @property
    def steps(self) -> int:
        return self.timesteps.shape[0]

    @property
    def renoises(self) -> bool:
        """Whether any step adds fresh noise."""
        return bool((self.n != 0).any())


def _table(timesteps: Tensor, sigmas: Tensor, a: Tensor, c: Tensor, **columns: Tensor) -> Table:
    zero, one = torch.zeros(a.shape, dtype=torch.float64), torch.ones(a.shape, dtype=torch.float64)
    rest = {"b1": zero, "b2": zero, "n": zero, "guidance": one, "expert": zero.long()} | columns
    return Table(timesteps.double(), sigmas, a, c, **rest)


def flow_euler(sigmas: Tensor, timesteps: Tensor | None = None) -> Table:
    """Euler on the flow: x + (sigma' - sigma) v.

    sigmas: [S + 1], with the end. timesteps: by default sigma * 1000.
    """
    timesteps = sigmas[:-1] * TRAIN_STEPS if timesteps is None else timesteps
    s = sigmas.double()
    return _table(timesteps, s[:-1], torch.ones_like(s[1:]), s[1:] - s[:-1])


def renoise(sigmas: Tensor, timesteps: Tensor | None = None) -> Table:
    """Predict the clean latents, then add fresh noise up to the next level: (1 - sigma') x0 + sigma' noise.
    sigmas [S + 1].
    """
    timesteps = sigmas[:-1] * TRAIN_STEPS if timesteps is None else timesteps
    s = sigmas.double()
    return _table(timesteps, s[:-1], 1 - s[1:], -(1 - s[1:]) * s[:-1], n=s[1:])


def dmd(timesteps: Sequence[float] = (1000, 757, 522), shift: float = 8.0) -> Table:
    """Distribution matching distillation: each step renoises to the next timestep.

    The sigma of a timestep is the one whose training timestep is nearest.

    Raises UserError where a timestep is outside 0 to 1000 or the timesteps do not decrease.
    """
    shown = torch.tensor(timesteps, dtype=torch.float64)
    falls = bool((shown.diff() < 0).all())
    if len(shown) == 0 or not falls or shown.max() > TRAIN_STEPS or shown.min() < 0:
        raise UserError(
            "dmd_denoising_steps",
            f"dmd_denoising_steps is {list(timesteps)}; its values must fall strictly, between 1000 and 0",
        )
    grid = train_grid(shift)
    index = ((grid * TRAIN_STEPS).double() - shown[:, None]).abs().argmin(1)
    return renoise(with_zero(grid[index]), shown)


def unipc(sigmas: Tensor, timesteps: Tensor | None = None) -> Table:
    """UniPC of order 2, B(h) = e^h - 1, on clean latents.

    Every step but the first is corrected, and the last step has order 1.

    sigmas [S + 1] in (0, 1), falling, the last 0; timesteps default to sigma * 1000 truncated to integers.

    The corrector replaces x_i by y_i, which shares all but its second-order terms with the predictor that
    made x_i. So y_i = x_i + (a combination of x0_i, x0_{i-1}, x0_{i-2}), and the next predictor is linear in
    y_i, x0_i and x0_{i-1}: the corrected latents need not be kept.
    """
    timesteps = (sigmas[:-1] * TRAIN_STEPS).long() if timesteps is None else timesteps
    s = sigmas.double()
    alpha, log_snr = 1 - s, torch.log1p(-s) - torch.log(s)
    steps = s.shape[0] - 1
    rows, correction = list[Tensor](), (0.0, 0.0, 0.0)
    for i in range(steps):
        kept = s[i + 1] / s[i]
        h = log_snr[i + 1] - log_snr[i]
        decay = torch.expm1(-h)
        second = 0 < i < steps - 1
        # The predictor: kept y - alpha decay x0_i - alpha decay / 2 (x0_{i-1} - x0_i) / ratio.
        ratio = (log_snr[i - 1] - log_snr[i]) / h if second else torch.ones_like(h)
        slope = -alpha[i + 1] * decay / (2 * ratio) if second else torch.zeros_like(h)
        clean = kept * correction[0] - alpha[i + 1] * decay - slope
        rows.append(
            torch.stack([kept + clean, -s[i] * clean, kept * correction[1] + slope, kept * correction[2]])
        )
        if i + 1 < steps:
            correction = _correction(h, ratio, second, alpha[i + 1] * decay)
    a, c, b1, b2 = torch.stack(rows).unbind(1)
    return _table(timesteps, s[:-1], a, c, b1=b1, b2=b2)


def _correction(h: Tensor, ratio: Tensor, second: bool, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Corrected minus predicted latents after a step of length h, as coefficients of (x0_i, x0_{i-1},
    x0_{i-2}) at the new i.

    With d1 = (x0_{i-2} - x0_{i-1}) / ratio and d = x0_i - x0_{i-1} the predictor holds -scale d1 / 2 (second
    order only) and the corrector -scale (rho1 d1 + rho2 d), the rho solving rho1 + rho2 = g1, ratio rho1 +
    rho2 = g2.
    """
    if not second:
        return -scale / 2, scale / 2, torch.zeros_like(scale)
    decay = torch.expm1(-h)
    phi = -decay / h - 1
    g1, g2 = phi / decay, (-phi / h - 0.5) * 2 / decay
    rho1 = (g1 - g2) / (1 - ratio)
    rho2 = g1 - rho1
    d1 = scale * (0.5 - rho1) / ratio
    return -scale * rho2, scale * rho2 - d1, d1


def with_guidance(table: Table, scale: float | Sequence[float]) -> Table:
    """The table with this guidance scale on every step, or one scale per step."""
    scales = torch.as_tensor(scale, dtype=torch.float64)
    if scales.ndim and scales.shape != table.a.shape:
        raise UserError(
            "guidance_scale",
            f"guidance_scale lists {len(scales)} values for {table.steps} steps; give one, or one per step",
        )
    return table._replace(guidance=scales.expand(table.steps).clone())


def with_experts(table: Table, boundary_ratio: float, guidance_2: float | None = None) -> Table:
    """Expert 0 while the timestep is at least boundary_ratio * 1000, expert 1 below.

    guidance_2: the scale of expert 1's steps.
    """
    if not 0 <= boundary_ratio <= 1:
        raise UserError("boundary_ratio", f"boundary_ratio is {boundary_ratio}; it must lie between 0 and 1")
    expert = (table.timesteps < boundary_ratio * TRAIN_STEPS).long()
    guidance = table.guidance if guidance_2 is None else torch.where(expert == 1, guidance_2, table.guidance)
    return table._replace(expert=expert, guidance=guidance)


def since(table: Table, step: int) -> Table:
    """The table from row `step` on, for an image noised to that row's sigma.

    UniPC, which uses earlier steps, restarts there with its lower order, as in diffusers.
    """
    rest = Table(*(column[step:] for column in table))
    if not step or not (table.b1.any() or table.b2.any()):
        return rest
    return unipc(with_zero(rest.sigmas), rest.timesteps)._replace(guidance=rest.guidance, expert=rest.expert)


def segments(table: Table) -> list[tuple[int, int, int]]:
    """Runs of steps with one expert: (expert, start, stop)."""
    experts = integers(table.expert)
    starts = [i for i in range(len(experts)) if i == 0 or experts[i] != experts[i - 1]]
    return [
        (experts[start], start, stop) for start, stop in zip(starts, [*starts[1:], len(experts)], strict=True)
    ]


SHIFT_NAMES = {"FlowMatchEulerDiscreteScheduler": "shift", "UniPCMultistepScheduler": "flow_shift"}
"""What each scheduler class calls its static shift."""

MOST_SHIFT = 100.0
"""A larger dynamic shift, in either direction, leaves no usable schedule."""

_ANY = object()
_SHIFTS = {
    "num_train_timesteps": (TRAIN_STEPS, TRAIN_STEPS),
    "use_dynamic_shifting": (False, _ANY),
    "time_shift_type": ("exponential", _ANY),
    "shift_terminal": (None, _ANY),
    "use_karras_sigmas": (False, False),
    "use_exponential_sigmas": (False, False),
    "use_beta_sigmas": (False, False),
}
_FIELDS: dict[str, dict[str, tuple[Any, Any]]] = {
    "FlowMatchEulerDiscreteScheduler": _SHIFTS
    | {
        "shift": (1.0, _ANY),
        "stochastic_sampling": (False, _ANY),
        "invert_sigmas": (False, False),
        # Read by the families that compute mu of them.
        **dict.fromkeys(("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"), (None, _ANY)),
    },
    "UniPCMultistepScheduler": _SHIFTS
    | {
        "flow_shift": (1.0, _ANY),
        "prediction_type": ("epsilon", "flow_prediction"),
        "use_flow_sigmas": (False, True),
        "solver_order": (2, 2),
        "solver_type": ("bh2", "bh2"),
        "solver_p": (None, None),
        "predict_x0": (True, True),
        "lower_order_final": (True, True),
        "disable_corrector": ([], []),
        "final_sigmas_type": ("zero", "zero"),
        "thresholding": (False, False),
        # Without effect on flow sigmas.
        **dict.fromkeys(
            ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
            (None, _ANY),
        ),
        **dict.fromkeys(("timestep_spacing", "steps_offset", "sigma_min", "sigma_max"), (None, _ANY)),
        **dict.fromkeys(("dynamic_thresholding_ratio", "sample_max_value"), (None, _ANY)),
    },
}
"""Fields of each scheduler class: name -> (diffusers' default, the only supported value or any)."""

_KINDS = {
    **{"shift": float, "flow_shift": float, "shift_terminal": float | None, "time_shift_type": str},
    **dict.fromkeys(("use_dynamic_shifting", "stochastic_sampling"), bool | None),
}
"""Types of the fields that may have any value."""


def check_types(config: Mapping[str, object]) -> None:
    """Raises UserError for a `scheduler_config.json` with a value of a wrong type or out of range."""
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise UserError(
            "scheduler",
            f"scheduler: _class_name is {name!r}; it must be a string, such as "
            "'FlowMatchEulerDiscreteScheduler'",
        )
    for field, kind in _KINDS.items():
        if field in config and field in _FIELDS.get(name, ()):
            try:
                entries.value(
                    field,
                    kind,
                    None if (field, config[field]) == ("shift_terminal", False) else config[field],
                )
            except ValueError as error:
                raise UserError(f"scheduler.{field}", f"scheduler: {error}") from error


def unread(config: Mapping[str, object]) -> list[str]:
    """Fields of a `scheduler_config.json` that its class does not have. diffusers ignores them too."""
    known = _FIELDS.get(str(config.get("_class_name")), config)
    return [field for field in config if field not in known and not field.startswith("_")]


def from_scheduler_config(
    config: Mapping[str, object], steps: int, *, sigmas: Tensor | None = None, mu: float | None = None
) -> Table:
    """The table of a diffusers `scheduler_config.json` for `steps` steps.

    Sigmas are rounded to float32 as diffusers stores them.

    sigmas: the unshifted grid [S] where the pipeline passes one to its scheduler (`sigmas.linear_grid`); None
    is the scheduler's own grid. mu: the dynamic shift, needed where the config says use_dynamic_shifting.
    Guidance is 1 and expert 0 on every row.

    Raises UserError for a class, field or value that is not supported.
    """
    if steps < 1:
        raise UserError("num_inference_steps", f"num_inference_steps is {steps}; it must be at least 1")
    name, get = _check(config)
    if get("use_dynamic_shifting") and (mu is None or not abs(mu) <= MOST_SHIFT):
        wrong = (
            "this model's pipeline gives none"
            if mu is None
            else f"base_shift and max_shift make it {mu:g} here, no shift of a schedule"
        )
        raise UserError(
            "scheduler.use_dynamic_shifting",
            f"use_dynamic_shifting of the {name} is true and asks for a shift; {wrong}",
        )
    if sigmas is not None and sigmas.shape != (steps,):
        raise UserError(
            "sigmas", f"sigmas lists {sigmas.shape[0]} values for {steps} steps; give one per step"
        )
    if name == "UniPCMultistepScheduler":
        grid = below_one(
            _bend(unipc_grid(steps) if sigmas is None else sigmas.double(), get, get("flow_shift"), mu)
        )
        return unipc(with_zero(grid).float(), (grid * TRAIN_STEPS).long())
    if sigmas is None:
        # The scheduler's own grid ends at its lowest training sigma, which is already shifted, and is then
        # shifted again.
        lowest = train_grid(1.0 if get("use_dynamic_shifting") else get("shift"))[-1].item()
        grid = _bend(scheduler_grid(steps, lowest), get, get("shift"), mu)
    else:
        grid = _bend(sigmas.float(), get, get("shift"), mu)
    return (renoise if get("stochastic_sampling") else flow_euler)(with_zero(grid.float()))


def _bend(grid: Tensor, get: Callable[[str], Any], shift: float, mu: float | None) -> Tensor:
    if get("use_dynamic_shifting"):
        dynamic = exponential_shift if get("time_shift_type") == "exponential" else linear_shift
        grid = dynamic(grid, 0.0 if mu is None else mu)
    else:
        grid = static_shift(grid, shift)
    if (
        get("shift_terminal") and len(grid) > 1
    ):  # one step begins and ends at 1, and nothing lies between to be stretched
        return stretch_to_terminal(grid, get("shift_terminal"))
    return grid


def _check(config: Mapping[str, object]) -> tuple[str, Callable[[str], Any]]:
    """The scheduler's class name, and a reader of its fields, after checking that all of them
    are supported.
    """
    name = str(config.get("_class_name", ""))
    if name not in _FIELDS:
        raise UserError(
            "scheduler",
            f"scheduler {name!r} is not supported; supported are "
            f"{', '.join(_FIELDS)}{nearest(name, _FIELDS)}",
        )
    fields = _FIELDS[name]

    def get(field: str) -> Any:
        """null is the default, as false is where the reference asks for a truth value."""
        return fields[field][0] if config.get(field) is None else config[field]

    check_types(config)
    for field, (_, allowed) in fields.items():
        if allowed is not _ANY and get(field) != allowed:
            raise UserError(
                f"scheduler.{field}", f"{field} of {name} is {get(field)!r}; supported is {allowed!r}"
            )
    if (kind := get("time_shift_type")) not in ("exponential", "linear"):
        raise UserError(
            "scheduler.time_shift_type",
            f"time_shift_type is {kind!r}; allowed are 'exponential' and 'linear'",
        )
    return name, get
