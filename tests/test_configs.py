"""The presets in configs/: each is short, parses, and says more than the model's own defaults."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from benchmarks import presets
from tests.runtime.folders import released
from tests.sources import ROOT
from tinydiff import cli, config
from tinydiff.models.recipe import refined
from tinydiff.models.registry import find
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, estimate, memory, pipeline
from tinydiff.runtime.admit import admit

PRESETS = {path.stem: path for path in sorted((ROOT / "configs").glob("*"))}


@pytest.fixture(autouse=True)
def given_files(tmp_path, monkeypatch):
    """What a preset leaves to the user."""
    monkeypatch.chdir(tmp_path)
    for name in ("person.png", "speech.wav"):
        (tmp_path / name).touch()


def options(name: str) -> config.Options:
    return config.parse(["--config", str(PRESETS[name])])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_short_and_says_something(name):
    assert len(PRESETS[name].read_text().splitlines()) <= 20
    preset = options(name)
    assert len(preset.sampling.prompt) == 1 and preset.refusals == preset.ignored == ()
    assert find(preset.model.model_path) is not None
    plain = config.options({"model_path": preset.model.model_path, "prompt": preset.sampling.prompt})
    told = preset.model, preset.parallel, preset.sampling.audio_path
    assert told != (plain.model, plain.parallel, None)


def test_several_gpus_is_the_documented_example():
    assert options("several-gpus").parallel == config.ParallelOptions(
        num_gpus=2, sp_degree=2, tp_size=1, vae_sp=True
    )


def test_few_steps_are_those_of_the_distilled_model():
    preset = options("few-steps")
    row = find(preset.model.model_path)
    assert row is not None and row.steps == preset.sampling.num_inference_steps == 3
    assert row.dmd_timesteps == preset.sampling.dmd_denoising_steps == (1000, 757, 522)
    assert preset.model.enable_torch_compile


def test_low_memory_is_what_plan_recommends(capsys):
    preset = options("low-memory")
    command = [preset.model.model_path, "--num-gpus", "2", "--vram", "24", "--json"]
    assert cli.main(["plan", *command]) == 0
    report = json.loads(capsys.readouterr().out)
    first = report["layouts"][0]
    assert report["recommended"] == first["layout"] and first["fits"]
    assert config.parse(["--num-gpus", "2", *first["options"].split()]).parallel == preset.parallel


def test_presets_with_a_lora_name_a_file_and_what_it_changes():
    turbo, lightning = options("flux2-turbo"), options("wan2.2-lightning")
    assert len(turbo.sampling.sigmas) == 8 and len(turbo.model.lora_path) == 1
    assert lightning.model.lora_target == ("transformer", "transformer_2")
    for preset in (turbo, lightning):
        assert len(preset.model.lora_path) == len(preset.model.lora_weight_name)


def test_ltx2_in_two_stages_takes_the_published_noise_levels_as_they_are(tmp_path):
    """What the preset asks for, on the released configs: 8 and 3 steps, no guidance and no shift."""
    preset = options("ltx2-two-stage")
    folder = released("Lightricks/LTX-2", tmp_path)
    (folder / "latent_upsampler").mkdir()
    (folder / "latent_upsampler" / "config.json").write_text("{}")
    [lora] = preset.model.lora_path
    assert lora.startswith("Lightricks/LTX-2:") and lora.endswith("-distilled-lora-384.safetensors")
    (tmp_path / "lora.safetensors").touch()
    where = {"component_paths": {"spatial_upsampler": str(folder)}, "lora_path": (str(tmp_path),)}
    plan = blueprint.read(replace(preset.model, model_path=str(folder), **where))
    [request] = admit(plan, preset.sampling)
    assert request.guidance.scale == 1 and request.refinement is not None
    assert request.refinement.sigmas == plan.row.refine_sigmas == (0.909375, 0.725, 0.421875)
    for asked in (request, refined(request, request.refinement)):
        sigmas = torch.tensor(asked.schedule.sigmas, dtype=torch.float64)
        assert torch.allclose(pipeline.solver_table(plan, asked).sigmas.double(), sigmas, atol=1e-7)
    with pytest.raises(
        UserError, match=r"width: 1568 is not a multiple of 64, .* the nearest: 1536 and 1600"
    ):
        admit(plan, replace(preset.sampling, width=1568))


@pytest.mark.parametrize("card", presets.CARDS)
def test_the_preset_of_a_gpu_is_the_plans_and_fits(card):
    assert presets.path(card).read_text() == presets.text(card), "run benchmarks/presets.py"
    preset, (subject, plan) = options(f"gpu-{card}gb").model, presets.planned(card)
    names = ("component_residency", "layerwise_resident_layers", "vae_tiling")
    asked = estimate.blueprint_of(preset.model_path, {name: getattr(preset, name) for name in names})
    where = {name: net.residency for name, net in asked.nets.items()}
    held = memory.choose(memory.footprints(subject), card, "manual", where, tiling=asked.tiling)
    assert held.fits and (held.peak, held.moved, held.tiles) == (plan.peak, plan.moved, plan.tiles)
    assert f"`configs/gpu-{card}gb.yaml`" in (ROOT / "docs" / "memory.md").read_text()


def test_there_is_a_preset_for_every_size_of_gpu():
    assert {name for name in PRESETS if name.startswith("gpu-")} == {f"gpu-{n}gb" for n in presets.CARDS}
    assert list(presets.CARDS) == [8, 12, 16, 24, 48, 80]


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("model", ["Qwen/Qwen-Image", "Qwen/Qwen-Image-Edit"])
def test_lightning_resolves_to_the_cards_schedule(model, steps, tmp_path):
    """What the preset asks for, on the released configs: no guidance, and a shift of 3 at any size."""
    kind = model.rpartition("/")[2].lower()
    preset = options(f"{kind}-lightning-{steps}")
    assert preset.model.model_path == model
    [file] = preset.model.lora_weight_name
    assert f"-{steps}steps-" in file and ("Edit" in file) == ("Edit" in model)
    (tmp_path / file).touch()
    where = {"model_path": str(released(model, tmp_path)), "lora_path": (str(tmp_path),)}
    plan = blueprint.read(replace(preset.model, enable_torch_compile=False, **where))
    assert [each.file for each in plan.adapters] == [tmp_path / file]
    Image.new("RGB", (64, 64)).save(tmp_path / "input.png")
    given = (str(tmp_path / "input.png"),) if "Edit" in model else ()
    [request] = admit(plan, replace(preset.sampling, image_path=given))
    assert request.guidance.scale == 1 and request.schedule.steps == steps
    grid = [at / steps for at in range(steps, 0, -1)]
    shifted = torch.tensor([3 * s / (1 + 2 * s) for s in grid])
    assert torch.allclose(pipeline.solver_table(plan, request).timesteps.float(), 1000 * shifted)
