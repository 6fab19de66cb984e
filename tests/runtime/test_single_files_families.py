"""Every component of each image family as one file in the authors' and in diffusers' layout, in the place of
the model's own: the same latents to the bit.
"""

from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import tinydiff
from tests.runtime import (
    qwen_folders,
    test_flux2_pipelines,
    test_flux_pipelines,
    test_sd3_pipelines,
    test_z_image_pipelines,
)
from tinydiff.io.weights import exported
from tinydiff.models.classes import TOWERS
from tinydiff.models.encoders import decoder_lm
from tinydiff.models.layouts.recognise import layouts_of

FAMILIES = {
    "FLUX.1": test_flux_pipelines.build,
    "FLUX.2": lambda folder: test_flux2_pipelines.klein(folder, True),
    "Qwen-Image": lambda folder: qwen_folders.build(diffusers.QwenImagePipeline, folder),
    "Z-Image": test_z_image_pipelines.build,
    "SD3": lambda folder: test_sd3_pipelines.build("3.5 medium", folder),
}
PREFIXES = {"dit": "model.diffusion_model.", "vae": "first_stage_model."}
OTHERS = {
    "FLUX.1": {"transformer", "vae", "text_encoder"},
    "FLUX.2": {"transformer", "vae"},
    "Qwen-Image": {"vae"},
    "Z-Image": {"transformer", "vae"},
    "SD3": {"transformer", "vae", "text_encoder", "text_encoder_2"},
}
"""Components whose authors have another layout than diffusers or transformers."""


def latents(model):
    """With weights at addresses of one alignment, on which the last bits of a product depend."""
    nets = {
        name: replace(net, weights={row: x.clone() for row, x in net.weights.items()})
        for name, net in model.nets.items()
    }
    model = replace(model, nets=nets)
    fields = {"height": 32, "width": 48, "num_inference_steps": 2, "seed": 3}
    return tinydiff.generate(model, "A red circle", **fields).latents[0]


def files(model, folder, usual):
    """Component -> a file of it in another layout, or in the usual one, below the prefix that files have."""
    for name in model.blueprint.nets:
        net = model.nets[name]
        own = net.family.keys(net.config)
        found = [each for each in layouts_of(net.family) if (each.keys(net.config) == own) == usual]
        if found and net.family not in (decoder_lm.FAMILY, *TOWERS.values()):  # of which not all is loaded
            keys = found[0].keys(net.config, "" if usual else PREFIXES.get(net.family.role, ""))
            weights = exported(net.weights, net.family.spec(net.config), keys)
            path = folder / f"{name}-{usual}.safetensors"
            save_file({key: x.contiguous() for key, x in weights.items()}, path)
            yield name, str(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_in_the_place_of_components(family, tmp_path):
    FAMILIES[family](tmp_path / "model")
    model = tinydiff.load(str(tmp_path / "model"))
    base = latents(model)
    for usual in (False, True):
        paths = dict(files(model, tmp_path, usual))
        assert usual or paths.keys() >= OTHERS[family]
        again = tinydiff.load(str(tmp_path / "model"), component_paths=paths)
        for name, net in model.nets.items():
            assert all(torch.equal(again.nets[name].weights[row], x) for row, x in net.weights.items())
        assert torch.equal(latents(again), base)
