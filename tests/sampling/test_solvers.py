"""Solver tables against the reference schedulers, stepped in float64 on random predictions (any prediction
exercises every coefficient).

The references store their sigmas in float32 and step in the dtype they are given, so "as stored" upcasts
those sigmas unchanged; "exact" puts sigmas computed by the same formula in float64 into the reference.
"""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from tinydiff.records import UserError
from tinydiff.sampling import sigmas, solvers

UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _float64():
    # The reference makes some of its constants in the default dtype.
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(config):
    fields = {name: value for name, value in config.items() if name != "_class_name"}
    return {
        "UniPCMultistepScheduler": UniPCMultistepScheduler,
        "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler,
    }[config["_class_name"]](**fields)


def randn(*shape):
    return torch.randn(shape, generator=GENERATOR)


def run_table(table, x, predictions):
    h1 = h2 = torch.zeros_like(x)
    trajectory = []
    for i, v in enumerate(predictions):
        clean = x - table.sigmas[i] * v
        x, h1, h2 = table.a[i] * x + table.c[i] * v + table.b1[i] * h1 + table.b2[i] * h2, clean, h1
        trajectory.append(x)
    return torch.stack(trajectory)


def run_unipc(scheduler, x, predictions):
    trajectory = []
    for t, v in zip(scheduler.timesteps, predictions, strict=True):
        x = scheduler.step(v, t, x, return_dict=False)[0]
        trajectory.append(x)
    return torch.stack(trajectory)


def assert_close(got, want, tolerance=1e-12):
    assert got.isfinite().all()
    scale = want.abs().amax(dim=tuple(range(1, want.ndim)), keepdim=True)
    assert ((got - want).abs() / scale).max() < tolerance


@pytest.mark.parametrize("steps", range(1, 61))
def test_unipc_equals_diffusers_as_stored(steps):
    scheduler = build(UNIPC)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    table = solvers.from_scheduler_config(UNIPC, steps)
    assert torch.equal(table.sigmas, scheduler.sigmas[:-1])
    assert torch.equal(table.timesteps, scheduler.timesteps.double())
    x, predictions = randn(1, 2, 3), randn(steps, 1, 2, 3)
    assert_close(run_table(table, x, predictions), run_unipc(scheduler, x, predictions))


@pytest.mark.parametrize("steps", [*range(1, 61, 7), 60])
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
def test_unipc_equals_diffusers_exact(steps, shift):
    scheduler = build(UNIPC | {"flow_shift": shift})
    scheduler.set_timesteps(steps)
    grid = np.linspace(1, 1 / 1000, steps + 1)[:-1]
    grid = shift * grid / (1 + (shift - 1) * grid)
    grid[0] -= 1e-6
    scheduler.sigmas = torch.from_numpy(np.append(grid, 0.0))
    ours = sigmas.with_zero(sigmas.below_one(sigmas.static_shift(sigmas.unipc_grid(steps), shift)))
    assert torch.allclose(ours, scheduler.sigmas, rtol=1e-14, atol=0)
    table = solvers.unipc(scheduler.sigmas)
    assert torch.equal(table.timesteps, scheduler.timesteps.double())
    x, predictions = randn(1, 2, 3), randn(steps, 1, 2, 3)
    assert_close(run_table(table, x, predictions), run_unipc(scheduler, x, predictions))


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 7.5, 12.0])
def test_unipc_timesteps_truncate_as_diffusers(shift):
    scheduler = build(UNIPC | {"flow_shift": shift})
    for steps in range(1, 101):
        scheduler.set_timesteps(steps)
        assert (
            solvers.from_scheduler_config(UNIPC | {"flow_shift": shift}, steps).timesteps.tolist()
            == scheduler.timesteps.tolist()
        )


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_unipc_dynamic_shift_and_terminal(kind):
    config = UNIPC | {"use_dynamic_shifting": True, "time_shift_type": kind, "shift_terminal": 0.05}
    scheduler = build(config)
    scheduler.set_timesteps(9, mu=0.8)
    table = solvers.from_scheduler_config(config, 9, mu=0.8)
    assert torch.equal(table.sigmas, scheduler.sigmas[:-1].double())
    scheduler.sigmas = scheduler.sigmas.double()
    x, predictions = randn(1, 2, 3), randn(9, 1, 2, 3)
    assert_close(run_table(table, x, predictions), run_unipc(scheduler, x, predictions))


SHIFTS = {
    "static": ({"shift": 3.0}, None),
    "none": ({"shift": 1.0}, None),
    "exponential": ({"use_dynamic_shifting": True}, 0.83),
    "exponential terminal": ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 0.83),
    "linear": ({"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": False}, 1.7),
    "static terminal": ({"shift": 5.0, "shift_terminal": 0.1}, None),
}


@pytest.mark.parametrize("handed", [True, False], ids=["grid handed", "own grid"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_euler_equals_diffusers(shift, handed):
    fields, mu = SHIFTS[shift]
    config = EULER | fields
    scheduler = build(config)
    for steps in (2, 3, 4, 8, 20, 28, 50):
        if handed:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        else:
            scheduler.set_timesteps(steps, mu=mu)
        table = solvers.from_scheduler_config(
            config, steps, sigmas=sigmas.linear_grid(steps) if handed else None, mu=mu
        )
        assert torch.equal(table.sigmas, scheduler.sigmas[:-1].double())
        assert torch.equal(table.timesteps, scheduler.timesteps.double())
        x, predictions = randn(2, 5), randn(steps, 2, 5)
        # The reference casts the sample to float32 to step, so its rule is written out here: sample + (sigma'
        # - sigma) v.
        want, sample = [], x
        for i, v in enumerate(predictions):
            sample = sample + scheduler.sigmas.double().diff()[i] * v
            want.append(sample)
        assert_close(run_table(table, x, predictions), torch.stack(want))
        first = scheduler.step(predictions[0], scheduler.timesteps[0], x, return_dict=False)[0]
        assert_close(run_table(table, x, predictions)[:1], first[None], 1e-6)


def test_one_euler_step_removes_all_noise():
    table = solvers.from_scheduler_config(EULER, 1)
    assert (table.sigmas.item(), table.timesteps.item(), table.c.item()) == (1.0, 1000.0, -1.0)


def test_euler_stochastic_equals_diffusers():
    config = EULER | {"stochastic_sampling": True}
    scheduler = build(config)
    scheduler.set_timesteps(5)
    table = solvers.from_scheduler_config(config, 5)
    x, predictions = randn(2, 40), randn(5, 2, 40)
    ours = theirs = x
    first, second = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for i, v in enumerate(predictions):
        theirs = scheduler.step(v, scheduler.timesteps[i], theirs, generator=first, return_dict=False)[0]
        fresh = torch.randn(x.shape, generator=second, dtype=torch.float32)
        ours = table.a[i] * ours + table.c[i] * v + table.n[i] * fresh
    assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize(
    ("shift", "timesteps"), [(8.0, [1000, 757, 522]), (5.0, [1000, 757, 522]), (5.0, [1000, 960, 889, 727])]
)
def test_dmd_equals_fastvideo(shift, timesteps):
    """FastVideo: sigma of the training schedule at the nearest timestep, x0 = x - sigma v, then (1 - sigma')
    x0 + sigma' noise.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    found = [scheduler.sigmas[(scheduler.timesteps - t).abs().argmin()].double() for t in timesteps]
    table = solvers.dmd(timesteps, shift)
    assert table.timesteps.tolist() == timesteps
    x, predictions, fresh = randn(2, 5), randn(len(timesteps), 2, 5), randn(len(timesteps), 2, 5)
    ours = theirs = x
    for i, v in enumerate(predictions):
        theirs = theirs - found[i] * v
        if i + 1 < len(timesteps):
            theirs = (1 - found[i + 1]) * theirs + found[i + 1] * fresh[i]
        ours = table.a[i] * ours + table.c[i] * v + table.n[i] * fresh[i]
    assert_close(ours[None], theirs[None])
    assert table.renoises and table.n[-1] == 0 and table.b1.abs().sum() == 0


@pytest.mark.parametrize("timesteps", [[], [1000, 1000], [500, 700], [1001, 3], [5, -1]])
def test_dmd_refuses_wrong_timesteps(timesteps):
    with pytest.raises(UserError, match="fall strictly") as error:
        solvers.dmd(timesteps)
    assert error.value.field == "dmd_denoising_steps"


def test_tables_are_float64_rows():
    for table in (
        solvers.dmd(),
        solvers.from_scheduler_config(UNIPC, 7),
        solvers.from_scheduler_config(EULER, 7),
    ):
        for name, column in table._asdict().items():
            assert column.shape == (table.steps,) and column.dtype == (
                torch.int64 if name == "expert" else torch.float64
            )
        assert table.guidance.tolist() == [1.0] * table.steps and table.expert.tolist() == [0] * table.steps


def test_guidance_scalar_and_list():
    table = solvers.from_scheduler_config(EULER, 3)
    assert solvers.with_guidance(table, 4.5).guidance.tolist() == [4.5] * 3
    assert solvers.with_guidance(table, [5, 4, 1]).guidance.tolist() == [5, 4, 1]
    with pytest.raises(UserError, match="2 values for 3 steps"):
        solvers.with_guidance(table, [5, 4])


@pytest.mark.parametrize(("boundary", "steps"), [(0.875, 40), (0.9, 40), (0.875, 4)])
def test_experts_switch_where_the_pipeline_does(boundary, steps):
    table = solvers.with_guidance(solvers.from_scheduler_config(UNIPC | {"flow_shift": 5.0}, steps), 4.0)
    table = solvers.with_experts(table, boundary, 3.0)
    want = [0 if t >= boundary * 1000 else 1 for t in table.timesteps.tolist()]
    assert table.expert.tolist() == want and set(want) == {0, 1}
    assert table.guidance.tolist() == [(4.0, 3.0)[expert] for expert in want]
    assert solvers.segments(table) == [(0, 0, want.index(1)), (1, want.index(1), steps)]


def test_one_expert_is_one_segment():
    table = solvers.from_scheduler_config(EULER, 5)
    assert solvers.segments(table) == [(0, 0, 5)]
    assert solvers.segments(solvers.with_experts(table, 0.0)) == [(0, 0, 5)]
    with pytest.raises(UserError, match="between 0 and 1"):
        solvers.with_experts(table, 1.5)


@pytest.mark.parametrize("first", [0, 1, 5, 7])
def test_a_later_start_is_the_references(first):
    """Image to image: the scheduler begins at `first` with the image made noisy to that sigma."""
    scheduler = build(EULER)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8))
    scheduler.sigmas = scheduler.sigmas.double()
    scheduler.set_begin_index(first)
    whole = solvers.with_guidance(
        solvers.from_scheduler_config(EULER, 8, sigmas=sigmas.linear_grid(8)), range(8)
    )
    table = solvers.since(whole, first)
    clean, fresh, predictions = randn(2, 5), randn(2, 5), randn(8 - first, 2, 5)
    theirs = scheduler.scale_noise(clean, scheduler.timesteps[first : first + 1], fresh)
    ours = torch.lerp(clean, fresh, table.sigmas[0])
    assert_close(ours[None], theirs[None])
    want = []
    for i, v in enumerate(predictions, first):  # its rule written out, as in `test_euler_equals_diffusers`
        theirs = theirs + scheduler.sigmas.diff()[i] * v
        want.append(theirs)
    assert_close(run_table(table, ours, predictions), torch.stack(want))
    assert table.steps == 8 - first and table.guidance.tolist() == [*range(first, 8)]
    assert torch.equal(table.timesteps, scheduler.timesteps[first:].double())


def test_a_later_start_keeps_fresh_noise_and_experts():
    whole = solvers.with_experts(solvers.dmd((1000, 757, 522)), 0.6)
    table = solvers.since(whole, 1)
    assert table.renoises and table.n.tolist() == whole.n.tolist()[1:] and table.expert.tolist() == [0, 1]
    assert all(map(torch.equal, solvers.since(whole, 0), whole))


@pytest.mark.parametrize("first", [1, 4, 6, 7])
def test_a_solver_with_a_history_begins_anew(first):
    scheduler = build(UNIPC)
    scheduler.set_timesteps(8)
    scheduler.sigmas = scheduler.sigmas.double()
    scheduler.set_begin_index(first)
    whole = solvers.with_guidance(solvers.from_scheduler_config(UNIPC, 8), range(8))
    table = solvers.since(whole, first)
    x, predictions = randn(1, 2, 3), randn(8 - first, 1, 2, 3)
    want, sample = [], x
    for v, t in zip(predictions, scheduler.timesteps[first:], strict=True):
        sample = scheduler.step(v, t, sample, return_dict=False)[0]
        want.append(sample)
    assert_close(run_table(table, x, predictions), torch.stack(want))
    assert table.guidance.tolist() == [*range(first, 8)]
    assert all(map(torch.equal, solvers.since(whole, 0), whole))


@pytest.mark.parametrize(
    ("config", "field", "says"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteSchedule"},
            "scheduler",
            "did you mean 'FlowMatchEulerDiscreteScheduler'",
        ),
        ({}, "scheduler", "is not supported"),
        (UNIPC | {"solver_order": 3}, "scheduler.solver_order", "supported is 2"),
        (UNIPC | {"prediction_type": "epsilon"}, "scheduler.prediction_type", "'flow_prediction'"),
        ({"_class_name": "UniPCMultistepScheduler"}, "scheduler.prediction_type", "'epsilon'"),
        (UNIPC | {"disable_corrector": [0]}, "scheduler.disable_corrector", r"\[0\]"),
        (EULER | {"shift": None}, "scheduler.shift", "shift is None; it must be a number at least 1e-06"),
        (
            EULER | {"shift_terminal": 1.5},
            "scheduler.shift_terminal",
            "1.5; it must be a number at least 0 and at most 0.999",
        ),
        (
            EULER | {"use_dynamic_shifting": "yes"},
            "scheduler.use_dynamic_shifting",
            "'yes'; it must be true or false",
        ),
        ({"_class_name": ["a"]}, "scheduler", "is not supported"),
        (EULER | {"use_karras_sigmas": True}, "scheduler.use_karras_sigmas", "supported is False"),
        (EULER | {"invert_sigmas": True}, "scheduler.invert_sigmas", "supported is False"),
        (EULER | {"time_shift_type": "cubic"}, "scheduler.time_shift_type", "'cubic'"),
        (EULER | {"use_dynamic_shifting": True}, "scheduler.use_dynamic_shifting", "pipeline gives none"),
    ],
)
def test_config_refusals_name_field_and_value(config, field, says):
    with pytest.raises(UserError, match=says) as error:
        solvers.from_scheduler_config(config, 4)
    assert error.value.field == field


def test_unknown_fields_and_nulls_are_as_the_reference_takes_them():
    config = UNIPC | {"flow_shft": 3.0, "shift": 7.0, "thresholding": None, "solver_p": None}
    assert solvers.unread(config) == ["flow_shft", "shift"] and solvers.unread(UNIPC) == []
    assert all(
        map(torch.equal, solvers.from_scheduler_config(config, 5), solvers.from_scheduler_config(UNIPC, 5))
    )
    config = {name: value for name, value in config.items() if name not in solvers.unread(config)}
    scheduler = build(config)
    scheduler.set_timesteps(5)
    assert_close(solvers.from_scheduler_config(config, 5).sigmas, scheduler.sigmas[:-1].double())


def test_wrong_counts_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        solvers.from_scheduler_config(EULER, 0)
    with pytest.raises(UserError, match="3 values for 4 steps"):
        solvers.from_scheduler_config(EULER, 4, sigmas=sigmas.linear_grid(3))
