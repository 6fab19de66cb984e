"""Files in other layouts give the very weights that diffusers' converters make of them.

Random weights of a network with few blocks and narrow columns are written in a layout by our table read backwards,
and converted by the reference's code: what comes must be the weights, bit for bit. Columns are cut to two,
because the reference's converters know the widths of the released models by heart.
"""

from dataclasses import replace

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import save_file

from tests.models.test_released import COMPONENTS, class_of, config_of
from tinydiff.io.weights import exported, load_weights
from tinydiff.keymap import KeyMap, stored_rows
from tinydiff.models import ernie, flux, flux2, sd3, wan, z_image
from tinydiff.models.classes import RECORDS
from tinydiff.models.layouts.recognise import LAYOUTS, config_from, recognise

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")


def layout_of(class_name, name):
    (found,) = [each for each in LAYOUTS if (each.class_name, each.name) == (class_name, name)]
    return found


def narrow(rows):
    """The rows with two columns at most."""
    return [replace(row, shape=(*row.shape[:1], *(min(2, size) for size in row.shape[1:]))) for row in rows]


def draw(rows):
    generator = torch.Generator().manual_seed(3)
    return {row.name: torch.randn(row.shape, generator=generator) for row in rows}


def same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


FLUX = flux.Config(num_layers=2, num_single_layers=2)
SD3 = sd3.Config(num_layers=3, num_attention_heads=2, caption_projection_dim=128, pos_embed_max_size=4)
WAN = wan.Config(num_attention_heads=1, ffn_dim=24, num_layers=2, text_dim=20)
CONVERTED = {
    "FLUX.1-schnell": (flux, "original", FLUX, theirs.convert_flux_transformer_checkpoint_to_diffusers),
    "FLUX.1-dev": (
        flux, "original", replace(FLUX, guidance_embeds=True), theirs.convert_flux_transformer_checkpoint_to_diffusers
    ),
    "FLUX.1 Fill": (
        flux, "original", replace(FLUX, guidance_embeds=True, in_channels=384, out_channels=64),
        theirs.convert_flux_transformer_checkpoint_to_diffusers,
    ),
    "FLUX.2 klein": (
        flux2, "original", flux2.Config(num_layers=2, num_single_layers=2, num_attention_heads=1, guidance_embeds=False),
        theirs.convert_flux2_transformer_checkpoint_to_diffusers,
    ),
    "FLUX.2 dev": (
        flux2, "original", flux2.Config(num_layers=2, num_single_layers=2, num_attention_heads=1),
        theirs.convert_flux2_transformer_checkpoint_to_diffusers,
    ),
    "SD3 medium": (sd3, "original", SD3, theirs.convert_sd3_transformer_checkpoint_to_diffusers),
    "SD3.5 medium": (
        sd3, "original", replace(SD3, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
        theirs.convert_sd3_transformer_checkpoint_to_diffusers,
    ),
    "Z-Image": (
        z_image, "comfyui", z_image.Config(dim=128, n_layers=2, n_refiner_layers=1, n_heads=1, n_kv_heads=1),
        theirs.convert_z_image_transformer_checkpoint_to_diffusers,
    ),
    "ERNIE-Image": (
        ernie, "diffusers", ernie.Config(hidden_size=128, num_attention_heads=1, num_layers=2, ffn_hidden_size=24),
        theirs.convert_ernie_image_transformer_checkpoint_to_diffusers,
    ),
    "Wan T2V": (wan, "original", WAN, theirs.convert_wan_transformer_to_diffusers),
    "Wan I2V": (
        wan, "original", replace(WAN, in_channels=36, image_dim=12, added_kv_proj_dim=128),
        theirs.convert_wan_transformer_to_diffusers,
    ),
}  # fmt: skip
"""Name -> (family, layout, config, the reference's converter)."""


def class_name_of(family):
    return next(name for name, record in RECORDS.items() if record is family.FAMILY)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_file_gives_what_the_reference_makes_of_it(tmp_path, name):
    family, layout, c, convert = CONVERTED[name]
    rows = narrow(family.spec(c))
    weights = draw(rows)
    lines = layout_of(class_name_of(family), layout).lines(c)
    stored = exported(weights, rows, KeyMap(lines))
    same(convert(dict(stored)), weights)
    for prefix in PREFIXES:
        keys = KeyMap(lines, prefix)
        save_file(exported(weights, rows, keys), tmp_path / "one.safetensors")
        same(load_weights(tmp_path / "one.safetensors", rows, torch.float32, keys=keys), weights)


RELEASED = [
    (name, part)
    for name, part in COMPONENTS
    if any(each.class_name == class_of(name, part) for each in LAYOUTS)
]


@pytest.mark.parametrize(("name", "part"), RELEASED, ids=lambda value: value.split("/")[-1])
def test_every_released_model_is_recognised_in_every_layout(name, part):
    """From keys and shapes alone, and its config has the shapes of the released one."""
    class_name, c = class_of(name, part), config_of(name, part)
    record = RECORDS[class_name]
    rows = list(record.spec(c))
    for layout in LAYOUTS:
        if RECORDS[layout.class_name] is record and layout.class_name == class_name:
            for prefix in PREFIXES if record.role == "dit" else ("",):
                shapes = stored_rows(KeyMap(layout.lines(c), prefix), rows)
                (found,) = recognise(shapes)
                assert (found.class_name, found.layout.name, found.prefix) == (
                    class_name,
                    layout.name,
                    prefix,
                )
                assert name in found.models
                mine = config_from(class_name, found.entries)
                assert {row.name: row.shape for row in record.spec(mine)} == {
                    row.name: row.shape for row in rows
                }
