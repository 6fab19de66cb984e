"""The memory plan is applied at load: the same image wherever components live, explicit options hold in every
mode, and each component's choice is told with its reason.
"""

from __future__ import annotations

import logging
import random

import pytest
import torch

import tinydiff
from tests.runtime.test_memory import OPTIONS
from tinydiff import config
from tinydiff.models import registry
from tinydiff.records import UserError
from tinydiff.residency import Residency, resolve
from tinydiff.runtime import backends, blueprint, estimate, fit, memory, offload

SMALL = {"height": 64, "width": 64, "num_inference_steps": 2}
HOST = 10**12
ROOMY = 10**13


def kinds(plan):
    return {name: net.residency.kind for name, net in plan.nets.items()}


def peak_of(options):
    """Bytes of the shipped model's plan, and the same with all components on the device."""
    plan = blueprint.read(config.options(options).model)
    found = fit.planned(plan, (), ROOMY)
    return found.peak, int(memory.RESERVED * 1e9)


def test_a_device_with_room_keeps_all_and_a_cpu_is_asked_nothing():
    plan = blueprint.read(config.ModelOptions())
    assert fit.free_bytes(torch.device("cpu")) is None and fit.fitted(plan, (), None) is plan
    assert set(kinds(fit.fitted(plan, (), ROOMY)).values()) == {"resident"}


def test_less_memory_than_all_components_need_moves_some_and_the_image_is_the_same():
    plan = blueprint.read(config.ModelOptions())
    peak, reserved = peak_of({})
    less = fit.fitted(plan, (), reserved + peak - 1, HOST)
    least = fit.fitted(plan, (), reserved, HOST)
    assert "resident" not in kinds(least).values() and set(kinds(less).values()) != {"resident"}
    whole = tinydiff.generate(tinydiff.load(), "a red circle", **SMALL)
    for each in (less, least):
        made = tinydiff.generate(blueprint.load(each), "a red circle", **SMALL)
        assert all(torch.equal(a, b) for a, b in zip(made.latents, whole.latents, strict=True))
        assert (made.frames[0] == whole.frames[0]).all()


def test_what_loads_a_model_asks_for_the_free_memory(monkeypatch):
    peak, reserved = peak_of({})
    monkeypatch.setattr(fit, "free_bytes", lambda device: reserved + peak - 1)
    assert set(kinds(tinydiff.load().blueprint).values()) != {"resident"}
    assert set(kinds(tinydiff.load(performance_mode="speed").blueprint).values()) == {"resident"}
    assert set(kinds(tinydiff.load(performance_mode="manual").blueprint).values()) == {"resident"}
    only = tinydiff.load(performance_mode="manual", vae_cpu_offload=True).blueprint
    assert kinds(only) == {"transformer": "resident", "text_encoder": "resident", "vae": "offloaded"}


def test_the_plan_is_that_of_the_largest_request():
    plan = blueprint.read(config.ModelOptions())
    small, large = (
        estimate.request_without_images(plan, config.SamplingOptions(height=side, width=side))
        for side in (64, 512)
    )
    peaks = [fit.planned(plan, asked, ROOMY).peak for asked in ([small], [large], [small, large])]
    assert peaks[0] < peaks[1] == peaks[2]


def test_one_line_for_each_component_says_the_choice_and_its_reason(caplog):
    caplog.set_level(logging.INFO, "tinydiff")
    plan = estimate.blueprint_of("FLUX.1-dev")
    options = config.options({"vae_cpu_offload": True, "dit_precision": "bf16"}).model
    plan = blueprint.from_components(estimate._checkpoint("FLUX.1-dev"), options)
    fit.fitted(plan, (), 24 * 10**9, HOST)
    said = {line.partition(":")[0]: line for line in caplog.messages}
    assert set(said) == set(plan.nets)
    assert said["vae"] == "vae: moved in for its stage (vae_cpu_offload asks for it)"
    assert "blocks streamed (with all on the GPU " in said["text_encoder_2"]
    assert said["text_encoder_2"].endswith("there is room for 23.0 GB)")


def test_more_pinned_memory_than_the_machine_has_stays_in_files_unless_it_is_asked_for(caplog):
    caplog.set_level(logging.INFO, "tinydiff")
    checkpoint = estimate._checkpoint("FLUX.1-dev")
    for asked, want in ((None, False), (True, True), (False, False)):
        plan = blueprint.from_components(checkpoint, config.ModelOptions(pin_cpu_memory=asked))
        assert fit.fitted(plan, (), 24 * 10**9, 10**9).pinned is want
    assert sum("pinned memory has no room" in line for line in caplog.messages) == 1
    plan = blueprint.from_components(checkpoint, config.ModelOptions())
    assert fit.fitted(plan, (), 24 * 10**9, HOST).pinned is True


def test_what_cannot_fit_is_warned_of(caplog):
    plan = estimate.blueprint_of("Wan2.1-T2V-14B-Diffusers")
    fit.fitted(plan, (), 4 * 10**9, HOST)
    [said] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "GB are needed, and there is room for 3.0 GB" in said


def test_merged_adapters_keep_the_denoiser_on_the_device():
    plan = blueprint.read(config.ModelOptions(lora_merge_mode="merge"))
    _, reserved = peak_of({})
    found = kinds(fit.fitted(plan, (), reserved, HOST))
    assert found["transformer"] == "resident" and found["vae"] != "resident"


MORE = OPTIONS | {
    "performance_mode": ("auto", "speed", "memory", "manual"),
    "pin_cpu_memory": (True, False),
    "lora_merge_mode": ("merge", "dynamic"),
    "layerwise_resident_layers": ({"transformer": 1}, {"vae": 0.5}),
    "dit_offload_prefetch_size": (0, 1),
    "dit_layerwise_residency_policy": ("strided",),
}
PARALLEL = {"tp_size": (1, 2), "ulysses_degree": (1, 2), "use_fsdp_inference": (True, False)}


def test_no_combination_of_options_changes_an_explicit_one():
    draw, kept, refused = random.Random(2), 0, 0
    plain = blueprint.read(config.ModelOptions())
    roles = {name: net.family.role for name, net in plain.nets.items()}
    counts = {name: len(offload.blocks(net)) for name, net in plain.nets.items()}
    peak, reserved = peak_of({})
    for _ in range(120):
        both = MORE | PARALLEL
        names = draw.sample(sorted(both), draw.randrange(1, 6))
        given = config.options({name: draw.choice(both[name]) for name in names})
        try:
            want = resolve(given.model, roles, counts)
            plan = blueprint.read(given.model)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).startswith(f"{error.field}: ")
            continue
        kept += 1
        before = given
        made = fit.fitted(plan, (), reserved + draw.choice([0, peak - 1, peak]), HOST)
        assert given == before
        for name, where in want.items():
            if where.option:
                assert made.nets[name].residency == where
                continue
            if given.model.performance_mode in ("speed", "manual"):
                assert made.nets[name].residency == Residency()
            assert made.nets[name].residency.kind not in plan.nets[name].excluded
        if given.model.pin_cpu_memory is not None:
            assert made.pinned is given.model.pin_cpu_memory
        merges = given.model.lora_merge_mode == "merge"
        if merges and not want["transformer"].option:
            assert made.nets["transformer"].residency.kind == "resident"
    assert kept > 30 and refused > 20


@pytest.mark.parametrize("name", [row.name for row in registry.MODELS])
def test_the_plan_names_every_component_of_every_model(name):
    plan = estimate.blueprint_of(name)
    assert set(fit.planned(plan, (), 24 * 10**9).where) == set(plan.nets)


def test_several_ranks_keep_what_their_layout_says(monkeypatch):
    from tinydiff.parallel.layout import Layout

    class Two:
        layout = Layout(tp=2)

    monkeypatch.setattr(fit, "free_bytes", lambda device: 1)
    monkeypatch.setattr(backends.blueprints, "load", lambda plan, ranks, merge: plan)
    plan = blueprint.read(config.ModelOptions())
    assert backends.NATIVE.load(plan, Two()) is plan
    assert set(kinds(backends.NATIVE.load(plan)).values()) != {"resident"}
