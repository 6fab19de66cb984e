"""LoRA files as diffusers' own converters of LoRA files read them, and adapters as its models merge them.

Where a converter is wrong, by the converter of whole weights or by the trainer, the test says so.
"""

import functools

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs

from tests.io.lora_files import (
    added,
    deltas,
    dotted,
    equal,
    factors,
    kohya,
    network,
    product,
    randn,
    read,
    stored,
)
from tests.models.test_layouts import narrow
from tinydiff.io.lora import Component
from tinydiff.keymap import AS_IS, KeyMap
from tinydiff.models import flux
from tinydiff.models.layouts.flux import LINES
from tinydiff.models.layouts.recognise import key_maps


def converted(convert, tensors, component):
    """Row -> what diffusers adds, by the factors that its converter returns."""
    found = convert({key: tensor.clone() for key, tensor in tensors.items()})
    out = {}
    for key, a in found.items():
        if ".lora_A." in key:
            name = key.removeprefix("transformer.").replace(".lora_A.weight", ".weight")
            out[name] = product(a, found[key.replace("lora_A", "lora_B")], component.rows[name].shape)
        elif key.endswith(".lora_B.bias"):
            out[key.removeprefix("transformer.").replace(".lora_B.bias", ".bias")] = found[key]
    return out


def layers(family, keep):
    """(component, pairs of the layers of the original layout that are kept)."""
    component, keys, _ = network(family)
    return component, {
        module: pair for module, pair in factors(stored(component, keys)).items() if keep(module)
    }


@functools.cache
def whole_flux():
    """FLUX.1 with all its blocks, which some converters take for granted: (component, key map)."""
    c = flux.Config(guidance_embeds=True)
    component = Component("dit", {row.name: row for row in narrow(flux.spec(c))}, key_maps(flux.FAMILY, c))
    return component, KeyMap(LINES)


def both(tmp_path, component, tensors, convert, known=()):
    """Ours and theirs, without the layers whose conversion is known to be wrong."""
    ours = added(component, read(tmp_path, tensors, component).targets["transformer"])
    other = converted(convert, tensors, component)
    equal(
        {k: v for k, v in ours.items() if k not in known}, {k: v for k, v in other.items() if k not in known}
    )
    return ours


BLOCKS = ("double_blocks", "single_blocks")


def test_kohya_of_flux(tmp_path):
    component, pairs = layers("FLUX.1-dev", lambda name: name.startswith(BLOCKS))
    both(tmp_path, component, kohya(pairs), theirs._convert_kohya_flux_lora_to_diffusers)


def test_kohya_of_flux_with_other_layers(tmp_path):
    """diffusers leaves out the alpha of the last layers (its factors are those of alpha = rank)."""
    component, pairs = layers("FLUX.1-dev", lambda name: True)
    tensors = {k: torch.tensor(2.0) if k.endswith("alpha") else v for k, v in kohya(pairs).items()}
    both(tmp_path, component, tensors, theirs._convert_kohya_flux_lora_to_diffusers)


def test_a_block_diagonal_fused_layer_of_kohya(tmp_path):
    """sd-scripts' split_qkv: diffusers takes the blocks apart, which is the same product."""
    component, pairs = layers("FLUX.1-dev", lambda name: name.endswith("0.img_attn.qkv"))
    (module,) = pairs
    b = torch.block_diag(*(randn(3072, 2, seed=seed) for seed in range(3)))
    tensors = kohya({module: (randn(6, 2), b)})
    tensors = {key: torch.tensor(3.0) if key.endswith("alpha") else x for key, x in tensors.items()}
    ours = both(tmp_path, component, tensors, theirs._convert_kohya_flux_lora_to_diffusers)
    assert len(ours) == 3


def test_xlabs(tmp_path):
    component, pairs = layers(
        "FLUX.1-dev", lambda name: "double" in name and name.endswith(("attn.qkv", "attn.proj"))
    )
    tensors = {}
    for module, (a, b) in pairs.items():
        block, stream, part = module.rsplit(".", 2)
        stem = f"{block}.processor.{part}_lora{1 if 'img' in stream else 2}"
        tensors |= {f"{stem}.down.weight": a, f"{stem}.up.weight": b}
    for block in range(2):
        for part, rows, columns in (("qkv", 9216, 2), ("proj", 3072, 2)):
            stem = f"single_blocks.{block}.processor.{part}_lora"
            tensors |= {
                f"{stem}.down.weight": randn(2, columns),
                f"{stem}.up.weight": randn(rows, 2, seed=block),
            }
    both(tmp_path, component, tensors, theirs._convert_xlabs_flux_lora_to_diffusers)
    assert read(tmp_path, tensors, component).layout == "XLabs"


def test_black_forest_labs_control(tmp_path):
    """Biases of the factors, and norms that take the place of the model's.

    diffusers swaps the halves of both factors of the last modulation, which must be those of lora_B alone.
    """
    component, keys = whole_flux()
    shapes = stored(component, keys)
    tensors = dotted(factors(shapes), "", alpha=False)
    for i, (key, shape) in enumerate(shapes.items()):
        if key.endswith(".bias"):
            tensors[key.replace(".bias", ".lora_B.bias")] = randn(*shape, seed=i)
        elif key.endswith("_norm.scale"):
            tensors[key] = randn(*shape, seed=i)
    adapter = read(tmp_path, tensors, component)
    assert adapter.layout == "BFL"
    assert adapter.kinds == ("LoRA", "replaced weight")
    ours = added(component, adapter.targets["transformer"])
    norms = theirs._convert_bfl_flux_control_lora_to_diffusers({key: x.clone() for key, x in tensors.items()})
    other = converted(theirs._convert_bfl_flux_control_lora_to_diffusers, tensors, component)
    other |= {
        k.removeprefix("transformer."): x for k, x in norms.items() if ".norm_" in k and ".lora" not in k
    }
    a, b = (
        tensors["final_layer.adaLN_modulation.1.lora_A.weight"],
        tensors["final_layer.adaLN_modulation.1.lora_B.weight"],
    )
    other["norm_out.linear.weight"] = theirs.swap_scale_shift(b @ a)
    equal(ours, other)


def test_fal_kontext(tmp_path):
    component, keys = whole_flux()
    wanted = (*BLOCKS, "final_layer.linear")
    pairs = {k: v for k, v in factors(stored(component, keys)).items() if k.startswith(wanted)}
    tensors = dotted(pairs, "base_model.model.", alpha=False)
    both(
        tmp_path,
        component,
        tensors,
        theirs._convert_fal_kontext_lora_to_diffusers,
        {"norm_out.linear.weight"},
    )


def test_flux2_of_ai_toolkit(tmp_path):
    """diffusers does not swap the halves of the last modulation, which its converter of weights does."""
    component, pairs = layers("FLUX.2 dev", lambda name: True)
    tensors = dotted(pairs, alpha=False)
    both(
        tmp_path,
        component,
        tensors,
        theirs._convert_non_diffusers_flux2_lora_to_diffusers,
        {"norm_out.linear.weight"},
    )


def test_kohya_of_flux2(tmp_path):
    component, pairs = layers("FLUX.2 dev", lambda name: name.startswith(BLOCKS))
    both(tmp_path, component, kohya(pairs), theirs._convert_kohya_flux2_lora_to_diffusers)


@pytest.mark.parametrize("form", ["musubi", "ComfyUI", "Lightning"])
def test_qwen(tmp_path, form):
    component, pairs = layers("Qwen-Image", lambda name: name.startswith("transformer_blocks"))
    tensors = {
        "musubi": lambda: kohya(pairs),
        "ComfyUI": lambda: dotted(pairs),
        "Lightning": lambda: dotted(pairs, "", ("lora_down", "lora_up")),
    }[form]()
    both(tmp_path, component, tensors, theirs._convert_non_diffusers_qwen_lora_to_diffusers)


@pytest.mark.parametrize("form", ["musubi", "ComfyUI"])
def test_z_image(tmp_path, form):
    component, _, _ = network("Z-Image")
    pairs = {
        name: pair
        for name, pair in factors(stored(component)).items()
        if "attention" in name or "feed" in name
    }
    tensors = kohya(pairs) if form == "musubi" else dotted(pairs)
    both(tmp_path, component, tensors, theirs._convert_non_diffusers_z_image_lora_to_diffusers)


def test_z_image_with_every_layer_twice(tmp_path):
    """Fused and split: the split ones count."""
    component, _, _ = network("Z-Image")
    split, tensors = {}, {}
    for name, pair in factors(stored(component)).items():
        if "layers.0.attention" in name:
            split[name] = pair
    for name, (a, b) in split.items():
        dots = name.replace("to_out.0", "to_out.0").replace("to_", "to.") if "out" not in name else name
        tensors |= {f"{dots}.lora.down.weight": a, f"{dots}.lora.up.weight": b}
    qkv, out = randn(384, 2, seed=8), randn(128, 2, seed=9)
    tensors |= {
        "layers.0.attention.qkv.lora.down.weight": randn(2, 2),
        "layers.0.attention.qkv.lora.up.weight": qkv,
    }
    tensors |= {
        "layers.0.attention.out.lora.down.weight": randn(2, 2),
        "layers.0.attention.out.lora.up.weight": out,
    }
    tensors = {f"diffusion_model.{key}": x for key, x in tensors.items()}
    ours = both(tmp_path, component, tensors, theirs._convert_non_diffusers_z_image_lora_to_diffusers)
    assert len(ours) == 4


@pytest.mark.parametrize("family", ["Wan T2V", "Wan I2V", "Wan 5B"])
def test_wan_of_comfyui_and_musubi(tmp_path, family):
    """diffusers knows an alpha of the blocks alone, and of musubi's files the blocks alone."""
    component, pairs = layers(family, lambda name: name.startswith("blocks"))
    both(tmp_path, component, dotted(pairs), theirs._convert_non_diffusers_wan_lora_to_diffusers)
    both(tmp_path, component, kohya(pairs), theirs._convert_musubi_wan_lora_to_diffusers)


def test_wan_of_lightx2v(tmp_path):
    """Differences of biases, norms, the modulation and the head, of which diffusers drops the last three."""
    component, keys, to_rows = network("Wan I2V")
    pairs = {
        name: pair for name, pair in factors(stored(component, keys)).items() if name.startswith("blocks")
    }
    tensors = dotted(pairs, ends=("lora_down", "lora_up"), alpha=False)
    whole = {key: torch.zeros(shape).double() for key, shape in stored(component, keys).items()}
    for i, (key, shape) in enumerate(stored(component, keys).items()):
        name, _, leaf = key.rpartition(".")
        if leaf == "weight" and name in pairs:
            whole[key] = product(*pairs[name], shape)
            continue
        end = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}.get(leaf)
        if end is not None:
            whole[key] = randn(*shape, seed=i)
            tensors[f"diffusion_model.{name}.{end}"] = whole[key]
    adapter = read(tmp_path, tensors, component)
    expected = {name: x for name, x in to_rows(whole).items() if x.any()}
    ours = added(component, adapter.targets["transformer"])
    equal(ours, expected)
    assert {"LoRA", "full difference"} == set(adapter.kinds)
    assert {
        "blocks.0.scale_shift_table",
        "scale_shift_table",
        "proj_out.weight",
        "blocks.1.norm2.bias",
    } <= ours.keys()
    other = converted(theirs._convert_non_diffusers_wan_lora_to_diffusers, _known_to_them(tensors), component)
    equal({name: ours[name] for name in other}, other)


def _known_to_them(tensors):
    return {
        k: x for k, x in tensors.items() if ".blocks." in k and "norm" not in k and not k.endswith("diff_m")
    }


MODELS = ["FLUX.1-dev", "FLUX.2 klein", "SD3.5 medium", "Z-Image", "Qwen-Image", "Wan I2V"]


def test_own_names_are_the_models(tmp_path):
    """A file in diffusers' layout changes the weights of its names."""
    for family in MODELS:
        component, _, _ = network(family)
        pairs = factors(stored(component))
        ours = added(
            component,
            read(tmp_path, dotted(pairs, "transformer.", alpha=False), component).targets["transformer"],
        )
        equal(ours, deltas(component, AS_IS, dict, pairs))
