"""A request that runs out of memory runs again with less on the device and gives the same result, or its
error names the size that fits.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

import tinydiff
from benchmarks.peak_error import peaks
from tinydiff import config
from tinydiff.records import UserError
from tinydiff.runtime import autoencoding, blueprint, estimate, fit, generate, memory, pipeline

SMALL = {"prompt": "a red circle", "height": 64, "width": 64, "num_inference_steps": 3, "seed": 5}


def made(**options):
    asked = config.options(SMALL | {"save_output": False, "return_frames": True} | options)
    return generate.generate(asked, config.NoProgress())[0]


def short(times, real, after=0):
    """`real`, but that calls number `after` to `after + times` find no memory."""
    left = {"before": after, "raise": times}

    def fn(*args, **kwargs):
        if left["before"]:
            left["before"] -= 1
        elif left["raise"]:
            left["raise"] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    return fn


@pytest.fixture(scope="module")
def usual():
    return made()


@pytest.mark.parametrize(
    ("where", "name", "after"),
    [(pipeline.loop, "advance", 2), (pipeline, "_conditioned", 0), (pipeline, "decode", 0)],
)
def test_degrade_gives_the_same_result_with_less_on_the_device(
    usual, monkeypatch, caplog, where, name, after
):
    monkeypatch.setattr(where, name, short(1, getattr(where, name), after))
    got = made(on_oom="degrade")
    assert torch.equal(got.latents[0], usual.latents[0])
    assert np.array_equal(got.frames[0], usual.frames[0])
    [said] = [line for line in caplog.messages if "out of memory" in line]
    assert said.endswith("it runs again with less on the device (text_encoder, transformer, vae)")


def test_degrade_steps_down_once(monkeypatch):
    monkeypatch.setattr(pipeline.loop, "advance", short(9, pipeline.loop.advance))
    with pytest.raises(UserError, match="size: 64x64 does not fit into memory; take a smaller size"):
        made()


def test_fail_does_not_step_down_and_names_the_largest_size(monkeypatch, caplog):
    plan = blueprint.read(config.ModelOptions(performance_mode="speed"))
    sizes = (config.SamplingOptions(height=side, width=side) for side in (64, 128))
    asked = [estimate.request_without_images(plan, size) for size in sizes]
    small, large = (fit.planned(plan, [each], 10**13).peak for each in asked)
    between = (small + large) // 2 + int(memory.RESERVED * 1e9)
    monkeypatch.setattr(fit, "free_bytes", lambda device: between)
    monkeypatch.setattr(pipeline.loop, "advance", short(1, pipeline.loop.advance))
    options = {"on_oom": "fail", "performance_mode": "speed", "height": 128, "width": 128}
    with pytest.raises(UserError) as error:
        made(**options)
    said = str(error.value)
    assert said.startswith("size: 128x128 does not fit into memory; the largest that fits is about ")
    width, height = map(int, said.rpartition(" ")[2].split("x"))
    assert width == height and 64 <= width < 128
    assert "runs again" not in caplog.text


def test_explicit_residencies_are_not_stepped_down(monkeypatch):
    monkeypatch.setattr(pipeline.loop, "advance", short(1, pipeline.loop.advance))
    with pytest.raises(UserError, match="does not fit into memory"):
        made(component_residency={"all": "resident"})


def test_another_error_is_not_mistaken_for_it(monkeypatch):
    def broken(*args):
        raise ValueError("broken")

    monkeypatch.setattr(pipeline.loop, "advance", broken)
    with pytest.raises(ValueError, match="broken"):
        made()


def test_an_autoencoder_without_memory_goes_on_in_tiles(monkeypatch, caplog):
    """Two models of the library: nothing is loaded again, and the latents are the same."""
    caplog.set_level(logging.WARNING)
    wide = {"height": 32, "width": 320, "num_inference_steps": 1}
    whole, tiled = tinydiff.load(), tinydiff.load(vae_tiling=True)
    want = tinydiff.generate(tiled, "a star", **wide)
    real = autoencoding.in_tiles_if_short
    for options, falls_back in (({}, True), ({"on_oom": "fail"}, False), ({"vae_tiling": False}, False)):
        model = tinydiff.load(**options)
        monkeypatch.setattr(
            autoencoding, "in_tiles_if_short", lambda model, tile, code: real(model, tile, short(1, code))
        )
        if falls_back:
            got = tinydiff.generate(model, "a star", **wide)
            assert np.array_equal(got.frames[0], want.frames[0])
            assert "it goes on in tiles of 256 pixels" in caplog.text
        else:
            with pytest.raises(UserError, match="size: 320x32 does not fit into memory"):
                tinydiff.generate(model, "a star", **wide)
    assert whole.blueprint.tile is None


def seams(model, side, latents, output):
    """(largest, mean) difference of pixels, of 255, between tiles and the whole image."""
    of = [replace(model, blueprint=replace(model.blueprint, tile=each)) for each in (None, side)]
    whole, tiled = (pipeline.decode(each, output, latents).astype(float) for each in of)
    assert whole.shape == tiled.shape
    return np.abs(whole - tiled).max(), np.abs(whole - tiled).mean()


def test_seams_are_bounded_and_smaller_with_larger_tiles():
    """Of the shipped model: what its image differs by in tiles, in steps of 255."""
    model = tinydiff.load()
    result = tinydiff.generate(model, "a red circle", height=128, width=128, num_inference_steps=4, seed=1)
    asked = config.SamplingOptions(height=128, width=128)
    output = estimate.request_without_images(model.blueprint, asked).output
    latents = result.latents[0][None]
    small, large = (seams(model, side, latents, output) for side in (64, 96))
    assert small[1] <= 0.25 and large[1] <= 0.15 and max(small[0], large[0]) <= 32
    assert seams(model, 128, latents, output) == (0, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vae_tile_size": 100}, "vae_tile_size: 100 is no multiple of 32, four latents of this autoencoder"),
        ({"vae_tile_size": 128, "vae_tiling": False}, "vae_tiling is false; leave one of them out"),
        ({"vae_tile_size": 8}, "vae_tile_size"),
        ({"on_oom": "degrad"}, "on_oom: 'degrad'"),
    ],
)
def test_wrong_tiles_and_words_are_one_sentence(options, words):
    with pytest.raises(UserError, match=words) as error:
        blueprint.read(config.options(options).model)
    assert "\n" not in str(error.value)


def test_a_size_of_tiles_turns_them_on():
    assert blueprint.read(config.options({"vae_tile_size": 128}).model).tile == 128
    assert blueprint.read(config.options({"vae_tiling": True}).model).tile == blueprint.TILE
    assert blueprint.read(config.ModelOptions()).tile is None


@pytest.mark.parametrize("name", ["Wan2.1-T2V-1.3B-Diffusers", "FLUX.1-dev"])
def test_the_plan_tiles_where_nothing_else_fits_and_says_so(name, caplog):
    caplog.set_level(logging.INFO, "tinydiff")
    plan = estimate.blueprint_of(name)
    for vram, tile in ((12, blueprint.TILE if "Wan" in name else None), (400, None)):
        caplog.clear()
        assert fit.fitted(plan, (), vram * 10**9, 10**12).tile == tile
        assert ("runs on tiles of 256 pixels" in caplog.text) == (tile is not None)


def test_a_program_is_told_the_largest_size_that_fits_and_its_model_stays_of_use(monkeypatch):
    model, advance = tinydiff.load(on_oom="fail"), pipeline.loop.advance
    asked = {name: value for name, value in SMALL.items() if name != "prompt"}
    monkeypatch.setattr(pipeline.loop, "advance", short(1, advance))
    monkeypatch.setattr(fit, "free_bytes", lambda device: 1)
    monkeypatch.setattr(fit, "largest", lambda plan, request, free: (32, 32))
    told = "size: 64x64 does not fit into memory; the largest that fits is about 32x32"
    with pytest.raises(UserError, match=told):
        tinydiff.generate(model, SMALL["prompt"], **asked)
    assert tinydiff.generate(model, SMALL["prompt"], **asked).frames


@pytest.mark.parametrize("options", [{}, {"lora_path": ("tinydiff/shapes/loras/purple.safetensors",)}])
def test_a_model_of_a_program_becomes_a_smaller_one_in_place(monkeypatch, caplog, options):
    asked = {name: value for name, value in SMALL.items() if name != "prompt"}
    model, advance = tinydiff.load(**options), pipeline.loop.advance
    want = tinydiff.generate(model, SMALL["prompt"], **asked)
    old = weakref.ref(model.denoiser.weights["proj_out.weight"])
    loads, load = [], blueprint.load
    monkeypatch.setattr(blueprint, "load", lambda plan: (loads.append(old() is None), load(plan))[1])
    monkeypatch.setattr(pipeline.loop, "advance", short(1, advance, after=1))
    for _ in range(2):
        got = tinydiff.generate(model, SMALL["prompt"], **asked)
        assert torch.equal(got.latents[0], want.latents[0]) and np.array_equal(got.frames[0], want.frames[0])
    assert loads == [True], "the old weights are gone before the new ones come, which stay"
    assert {net.residency.kind for net in model.blueprint.nets.values()} <= {"streamed", "offloaded"}
    assert sum("runs again with less on the device" in line for line in caplog.messages) == 1
    monkeypatch.setattr(pipeline.loop, "advance", short(1, advance))
    with pytest.raises(UserError, match="size: 64x64 does not fit into memory"):
        tinydiff.generate(model, SMALL["prompt"], **asked)


def test_a_model_that_could_not_load_again_loads_with_the_next_request(monkeypatch):
    asked = {name: value for name, value in SMALL.items() if name != "prompt"}
    model, load = tinydiff.load(), blueprint.load
    want = tinydiff.generate(model, SMALL["prompt"], **asked)
    monkeypatch.setattr(pipeline.loop, "advance", short(1, pipeline.loop.advance))
    monkeypatch.setattr(blueprint, "load", short(1, load))
    with pytest.raises(torch.OutOfMemoryError):
        tinydiff.generate(model, SMALL["prompt"], **asked)
    got = tinydiff.generate(model, SMALL["prompt"], **asked)
    assert np.array_equal(got.frames[0], want.frames[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("width", "height", "count"), [(64, 64, 1), (64, 64, 4), (128, 128, 1), (128, 128, 4)]
)
def test_the_expected_peak_is_within_a_tenth_of_the_measured_one(precision, width, height, count):
    """Of the shipped model, weights left out: bytes of the tensors that a run holds at a time, on the CPU."""
    stages = peaks(width, height, count, precision)
    expected, measured = (max(each) for each in zip(*stages.values(), strict=True))
    assert expected == pytest.approx(measured, rel=0.1)
    denoising = stages["denoise"]
    assert count > 1 or denoising[0] == pytest.approx(denoising[1], rel=0.1)


def test_the_measured_peak_stands_beside_the_expected_one(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    made()
    assert not [line for line in caplog.messages if line.startswith("peak of memory")], "a CPU counts none"
    plan = blueprint.read(config.ModelOptions())
    [request] = generate.admitted(config.options(SMALL), plan).requests
    peak = fit.expected(plan, [request]).peak
    held = sum(part.weights for part in fit.expected(plan, []).footprints)
    assert held < peak < fit.expected(plan, []).peak, "a smaller image than the default needs less"
    monkeypatch.setattr(fit, "peak_bytes", lambda device: peak * 3 // 2)
    made()
    [line] = [line for line in caplog.messages if line.startswith("peak of memory")]
    assert line == f"peak of memory: {peak * 1.5 / 1e9:.2f} GB, {peak / 1e9:.2f} GB expected (+50%)"
