"""The layouts of LoRA files: each changes each family's weights as the reference's converter of weights says.

A product of the file's factors is a weight of the layout in which the file names its layers, so diffusers'
converter of single files says of which weights of the model it is a part.
"""

from functools import cache

import pytest
import torch

from tests.io.lora_files import FAMILIES, added, deltas, equal, factors, network, read, stored
from tinydiff.io.lora import LowRank
from tinydiff.keymap import AS_IS

DOWN_UP = (".lora_down.weight", ".lora_up.weight")
A_B = (".lora_A.weight", ".lora_B.weight")
LAYOUTS = {
    "diffusers": ("own", "transformer.{}", A_B, "diffusers"),
    "diffusers, with a name": (
        "own",
        "transformer.{}",
        (".lora_A.my_style.weight", ".lora_B.my_style.weight"),
        "diffusers",
    ),
    "diffusers, old": ("own", "transformer.{}", ("_lora.down.weight", "_lora.up.weight"), "diffusers"),
    "diffusers, older": (
        "own",
        "unet.{}",
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        "diffusers",
    ),
    "PEFT": ("own", "base_model.model.{}", A_B, "PEFT"),
    "PEFT, a transformer": ("own", "base_model.model.transformer.{}", A_B, "diffusers"),
    "PEFT, original": ("stored", "base_model.model.{}", A_B, "PEFT"),
    "kohya": ("stored", "lora_unet_{_}", DOWN_UP, "kohya"),
    "kohya, own names": ("own", "lora_unet_{_}", DOWN_UP, "kohya"),
    "VideoX-Fun": ("stored", "lora_unet__{_}", DOWN_UP, "VideoX-Fun"),
    "OneTrainer": ("own", "lora_transformer_{_}", DOWN_UP, "OneTrainer"),
    "OneTrainer, dotted": ("own", "transformer.{}", DOWN_UP, "diffusers"),
    "LyCORIS": ("own", "lycoris_{_}", DOWN_UP, "LyCORIS"),
    "ComfyUI": ("stored", "diffusion_model.{}", A_B, "ComfyUI"),
    "ComfyUI, own names": ("own", "diffusion_model.{}", A_B, "ComfyUI"),
    "ComfyUI, a checkpoint's prefix": ("stored", "model.diffusion_model.{}", DOWN_UP, "ComfyUI"),
    "Lightning": ("own", "{}", DOWN_UP, "without a prefix"),
    "DiffSynth": ("own", "{}", (".lora_A.default.weight", ".lora_B.default.weight"), "DiffSynth"),
    "Anime-Z": ("own", "lora_unet_{_}", (".lora.down.weight", ".lora.up.weight"), "kohya"),
}
"""Name -> (whose names of the layers, what stands before, how the factors' keys end, what it is called)."""


@cache
def expected_of(family, names):
    """(network, factors, what they add at half their strength), by our names or stored ones."""
    component, keys, to_rows = network(family)
    keys, to_rows = (keys, to_rows) if names == "stored" else (AS_IS, dict)
    pairs = factors(stored(component, keys))
    return component, pairs, deltas(component, keys, to_rows, pairs, 0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layout_of_a_family(tmp_path, family, layout):
    names, pattern, (down, up), called = LAYOUTS[layout]
    (component, pairs, expected), tensors = expected_of(family, names), {}
    for module, (a, b) in pairs.items():
        stem = pattern.format(module, _=module.replace(".", "_"))
        tensors |= {stem + down: a, stem + up: b, f"{stem}.alpha": torch.tensor(1.0)}
    adapter = read(tmp_path, tensors, component)
    assert adapter.layout == called
    assert (adapter.kinds, adapter.ranks, adapter.scales) == (("LoRA",), (2,), (0.5,))
    equal(added(component, adapter.targets["transformer"]), expected)
    assert all(isinstance(each, LowRank) for each in adapter.targets["transformer"].values())
    half = added(component, adapter.targets["transformer"], 0.5)
    equal(half, {name: 0.5 * delta for name, delta in expected.items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_factors_make_the_difference(tmp_path, family):
    component, keys, to_rows = network(family)
    pairs = factors(stored(component, keys))
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors |= {
            f"diffusion_model.{module}.lora_A.weight": a,
            f"diffusion_model.{module}.lora_B.weight": b,
        }
    adapter = read(tmp_path, tensors, component)
    found = {}
    for name, each in adapter.targets["transformer"].items():
        a, b = each.low_rank()
        found[name] = (b @ a).reshape(component.rows[name].shape)
    equal(found, deltas(component, keys, to_rows, pairs))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_layers_have_one_name(family):
    """A name in one layout never means another layer in another layout."""
    component, _, _ = network(family)
    meant = {}
    for keys in (AS_IS, *component.layouts):
        for name in component.rows:
            match = keys.of_row(name)
            for key in match.keys:
                meant.setdefault(key.replace(".", "_"), set()).add(match.rows)
    assert {key: rows for key, rows in meant.items() if len(rows) > 1} == {}
