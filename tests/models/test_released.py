"""Every released Wan and FastWan model: the spec rows are the released weights, and one evaluation costs what the reference's costs.

`tests/data/released` has a file per repository (model_index, scheduler and component configs as released, parameter counts of the
weight files) and a file of keys and shapes per kind of component, `{0..39}` and `{0,2}` standing for numbers. The keys are those of
the reference classes built from the released configs. Wan2.2-S2V is not here: its files have another layout and are not supported.
"""

import functools
import itertools
import json
import re
from dataclasses import asdict, fields, replace
from math import prod
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from tests.parity import shapes
from tinydiff.models import registry, wan
from tinydiff.models.autoencoders import wan as autoencoder
from tinydiff.models.encoders import clip_vision, t5
from tinydiff.ops.weights import Weights
from tinydiff.parallel.plan import Plan

RELEASED = Path(__file__).parents[1] / "data" / "released"
MODELS = {path.stem.replace("__", "/"): json.loads(path.read_text()) for path in sorted(RELEASED.glob("*__*.json"))}
FAMILIES = {"WanTransformer3DModel": wan, "AutoencoderKLWan": autoencoder, "UMT5EncoderModel": t5, "CLIPVisionModel": clip_vision}
COMPONENTS = [(name, component) for name, model in MODELS.items() for component in model["components"]]
LATENT_STRIDES = {16: (4, 8), 48: (4, 16)}


def _numbers(group):
    for part in group.split(","):
        first, _, last = part.partition("..")
        yield from range(int(first), int(last or first) + 1)


@functools.cache
def released_keys(kind):
    """Key to shape, from the collapsed file: `a.{0..1}.b` is `a.0.b` and `a.1.b`."""
    table = {}
    for name, shape in json.loads((RELEASED / f"keys_{kind}.json").read_text()).items():
        pieces = re.split(r"\{([^}]*)\}", name)
        choices = [[piece] if i % 2 == 0 else map(str, _numbers(piece)) for i, piece in enumerate(pieces)]
        for parts in itertools.product(*choices):
            key = "".join(parts)
            assert key not in table, f"{key} is listed twice"
            table[key] = tuple(shape)
    return table


def config_of(kind, stored):
    """The family's Config of a released config.json. A network knows every field; an encoder those that bear on its numbers."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items() if not name.startswith("_")}
    if kind in ("UMT5EncoderModel", "CLIPVisionModel"):
        known = {field.name for field in fields(FAMILIES[kind].Config)}
        values = {name: value for name, value in values.items() if name in known}
    return FAMILIES[kind].Config(**values)


def test_the_nine_models_are_here():
    assert len(MODELS) == 9 and sum("transformer_2" in model["components"] for model in MODELS.values()) == 2
    assert {name for name in MODELS} == {row.name for row in registry.MODELS if row.name != registry.SHIPPED}


@pytest.mark.parametrize(("name", "component"), COMPONENTS, ids=lambda value: value.split("/")[-1])
def test_the_spec_is_the_released_weights(name, component):
    released = MODELS[name]["components"][component]
    kind = MODELS[name]["model_index"][component][1]
    rows = list(FAMILIES[kind].spec(config_of(kind, released["config"])))
    keys = released_keys(released["keys"])
    if kind == "CLIPVisionModel":  # listed as transformers 5 names them; released files have the prefix
        keys = {clip_vision.row_name(key): shape for key, shape in keys.items()}
    assert shapes(rows) == keys
    assert {row.name for row in rows if row.optional} == ({"encoder.embed_tokens.weight"} if kind == "UMT5EncoderModel" else set())
    assert sum(row.numel for row in rows if not row.optional) == released["parameters"]


@pytest.mark.parametrize("name", MODELS)
def test_every_component_with_weights_is_known(name):
    model = MODELS[name]
    listed = {key: value[1] for key, value in model["model_index"].items() if isinstance(value, list) and value[1] is not None}
    assert {key for key, kind in listed.items() if kind in FAMILIES} == set(model["components"])
    assert set(listed.values()) - set(FAMILIES) <= {"UniPCMultistepScheduler", "T5TokenizerFast", "T5Tokenizer", "CLIPImageProcessor"}
    assert model["scheduler"]["_class_name"] == listed["scheduler"]
    if "image_processor" in model:
        read = model["image_processor"]
        assert (tuple(read["image_mean"]), tuple(read["image_std"])) == (clip_vision.MEAN, clip_vision.STD)
        assert read["size"] == {"shortest_edge": 224} and read["resample"] == 3 and read["rescale_factor"] == 1 / 255


@pytest.mark.parametrize("name", MODELS)
def test_the_registry_tells_the_released_model(name):
    row, model = registry.named(name), MODELS[name]
    networks = {key: value for key, value in model["components"].items() if key.startswith("transformer")}
    config = networks["transformer"]["config"]
    assert row.params == sum(network["parameters"] for network in networks.values())
    assert (row.layers, row.heads, row.in_channels) == (config["num_layers"], config["num_attention_heads"], config["in_channels"])
    assert (row.pipeline, row.experts) == (model["model_index"]["_class_name"], len(networks))
    assert row.boundary_ratio == model["model_index"].get("boundary_ratio")
    assert row.expand_timesteps == model["model_index"].get("expand_timesteps", False)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_one_evaluation_costs_what_the_reference_costs(name, layers):
    """Floating point operations at the model's default size, counted on the meta device, nothing hoisted.

    Both counts are linear in the number of layers, so that equality at one and at three is equality at all.
    """
    row = registry.named(name)
    c = replace(config_of("WanTransformer3DModel", MODELS[name]["components"]["transformer"]["config"]), num_layers=layers)
    time, space = LATENT_STRIDES[c.out_channels]
    size = ((row.num_frames - 1) // time + 1, row.height // space, row.width // space)
    with torch.device("meta"):
        reference = WanTransformer3DModel(**asdict(c))
        text, t = torch.empty(1, row.text_tokens, c.text_dim), torch.empty(1)
        image = None if c.image_dim is None else torch.empty(1, clip_vision.Config().tokens, c.image_dim)
        with FlopCounterMode(display=False) as theirs:
            reference(torch.empty(1, c.in_channels, *size), t, text, image)
        positions = wan.positions(c, size, "meta")
        inputs = {"text": text, "positions": positions} | ({} if image is None else {"image": image})
        weights = {weight.name: torch.empty(weight.shape) for weight in wan.spec(c)}
        tokens = torch.empty(1, len(positions), c.in_channels * prod(c.patch_size))
        with FlopCounterMode(display=False) as ours:
            wan.predict(c, Plan(), Weights(weights), tokens, t, inputs)
    assert ours.get_total_flops() == theirs.get_total_flops() > 1e12
