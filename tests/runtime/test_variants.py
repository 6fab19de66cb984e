"""Folders that diffusers itself saved as variants and in shards: the same weights as of the
plain directory.
"""

import json

import pytest
import torch

from tests.runtime.folders import VARIANTS, build
from tinydiff.config import ModelOptions, parse
from tinydiff.records import UserError
from tinydiff.runtime import blueprint

SHARD = "4KB"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    pipe = build(VARIANTS["T2V"], tmp_path_factory.mktemp("plain") / "model")
    for name in ("transformer", "vae", "text_encoder"):
        getattr(pipe, name).half().float()
    return pipe


@pytest.fixture(scope="module")
def plain(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    pipe.save_pretrained(folder)
    return folder


def weights(folder, **options):
    model = blueprint.load(blueprint.read(ModelOptions(model_path=str(folder), **options)))
    return {(name, key): tensor for name, net in model.nets.items() for key, tensor in net.weights.items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(
    "saved", [{"variant": "fp16"}, {"variant": "fp16", "max_shard_size": SHARD}, {"max_shard_size": SHARD}]
)
def test_what_diffusers_saves_loads(saved, variant, pipe, plain, tmp_path):
    pipe.save_pretrained(tmp_path / "model", **saved)
    names = {path.name for path in (tmp_path / "model" / "transformer").iterdir()}
    assert ("diffusion_pytorch_model.safetensors" in names) == (saved == {})
    if variant is not None and "variant" not in saved:
        with pytest.raises(UserError, match=r"variant: no component of .* has weights of the variant 'fp16'"):
            weights(tmp_path / "model", variant=variant)
    else:
        assert same(weights(tmp_path / "model", variant=variant), weights(plain))


def test_a_variant_beside_the_plain_weights_is_chosen_by_name(pipe, plain, tmp_path):
    """The text encoder has none, so its plain weights are read."""
    pipe.save_pretrained(tmp_path / "model")
    for name in ("transformer", "vae"):
        network = getattr(pipe, name)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(2)
        network.save_pretrained(tmp_path / "model" / name, variant="fp16", max_shard_size=SHARD)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.div_(2)
    usual = weights(plain)
    assert same(weights(tmp_path / "model"), usual)
    doubled = {key: value if key[0] == "text_encoder" else 2 * value for key, value in usual.items()}
    assert same(weights(tmp_path / "model", variant="fp16"), doubled)


def test_a_variant_takes_a_components_place(pipe, plain, tmp_path):
    pipe.vae.save_pretrained(tmp_path / "vae", variant="bf16", max_shard_size=SHARD)
    assert same(
        weights(plain, component_paths={"vae": str(tmp_path / "vae")}, variant="bf16"), weights(plain)
    )


def test_the_option(tmp_path):
    assert parse(["--variant", "fp16"]).model.variant == "fp16"
    (tmp_path / "config.json").write_text(json.dumps({"variant": "bf16"}))
    assert parse(["--config", str(tmp_path / "config.json")]).model.variant == "bf16"
