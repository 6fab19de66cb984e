"""Options of residency on the shipped model: the same bits, one record per component, mistakes in one
sentence.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tinydiff
from tinydiff import config
from tinydiff.ops.store import Berth
from tinydiff.parallel.plan import Group, Plan
from tinydiff.records import UserError
from tinydiff.residency import Residency
from tinydiff.runtime import blueprint, offload

SMALL = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def resident():
    return tinydiff.generate(tinydiff.load(), "a red circle", **SMALL)


def residencies(**options):
    plan = blueprint.read(config.options(options).model)
    return {name: net.residency for name, net in plan.nets.items()}


CHOICES = {
    "streamed": {"dit_layerwise_offload": True},
    "streamed, three at once, a third resident": {
        "dit_layerwise_offload": True,
        "dit_offload_prefetch_size": 2,
        "dit_layerwise_resident_layers": 0.3,
        "dit_layerwise_residency_policy": "strided",
    },
    "all streamed": {"layerwise_offload_components": ["all"]},
    "all offloaded": {"cpu_offload_components": ["all"]},
    "each in its own way": {
        "text_encoder_cpu_offload": True,
        "vae_cpu_offload": True,
        "dit_layerwise_offload": True,
        "pin_cpu_memory": False,
    },
    "in bfloat16 from a float32 file": {"dit_layerwise_offload": True, "dit_precision": "bf16"},
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_shipped_model_gives_the_same_bits(case, resident):
    options = CHOICES[case]
    if "dit_precision" in options:
        resident = tinydiff.generate(tinydiff.load(dit_precision="bf16"), "a red circle", **SMALL)
    model = tinydiff.load(**options)
    for _ in range(2):
        made = tinydiff.generate(model, "a red circle", **SMALL)
        assert torch.equal(made.latents[0], resident.latents[0])
        assert np.array_equal(made.frames[0], resident.frames[0])


def test_weights_that_are_left_in_their_file_take_no_memory():
    streamed = tinydiff.load(dit_layerwise_offload=True).denoiser
    there = {name for name, x in streamed.weights.items() if not x.is_meta}
    blocks = tuple(f"{prefix}." for _, prefix in streamed.family.blocks(streamed.config))
    assert there == {name for name in streamed.weights if not name.startswith(blocks)} and there
    offloaded = tinydiff.load(dit_cpu_offload=True).denoiser
    assert all(x.is_meta for x in offloaded.weights.values())


def test_each_component_has_one_residency():
    assert set(residencies().values()) == {Residency()}
    assert residencies(dit_layerwise_offload=True, vae_cpu_offload=True) == {
        "transformer": Residency("streamed", option="dit_layerwise_offload"),
        "text_encoder": Residency(),
        "vae": Residency("offloaded", option="vae_cpu_offload"),
    }
    exact = {"all": "component-offload", "dit": "layerwise-offload", "vae": "resident"}
    assert {name: each.kind for name, each in residencies(component_residency=exact).items()} == {
        "transformer": "streamed",
        "text_encoder": "offloaded",
        "vae": "resident",
    }
    default = residencies(layerwise_offload_modules=["default"])
    assert {name: each.kind for name, each in default.items()} == {
        "transformer": "resident",
        "text_encoder": "streamed",
        "vae": "streamed",
    }
    assert set(residencies(cpu_offload_components=["none"]).values()) == {Residency()}


def test_shares_of_blocks_and_zero_count_blocks():
    blocks = len(list(tinydiff.load().denoiser.family.blocks(tinydiff.load().denoiser.config)))
    found = residencies(
        dit_layerwise_offload=True, dit_offload_prefetch_size=0, dit_layerwise_resident_layers=0.5
    )["transformer"]
    assert (found.prefetch, found.resident_blocks) == (1, -(-blocks // 2))
    assert found.streams(blocks) == list(range(-(-blocks // 2), blocks))
    assert replace(found, resident_blocks=2, policy="strided").streams(6) == [1, 2, 4, 5]


BAD = [
    (
        {"dit_cpu_offload": True, "dit_layerwise_offload": True},
        "dit_cpu_offload",
        "offloaded by dit_cpu_offload and streamed by dit_layerwise_offload",
    ),
    (
        {"vae_cpu_offload": False, "cpu_offload_components": ["vae"]},
        "cpu_offload_components",
        "offloaded by cpu_offload_components and not offloaded by vae_cpu_offload",
    ),
    (
        {"cpu_offload_components": ["none"], "vae_cpu_offload": True},
        "vae_cpu_offload",
        "not offloaded by cpu_offload_components",
    ),
    (
        {"component_residency": {"dit": "resident"}, "dit_cpu_offload": True},
        "dit_cpu_offload",
        "resident by component_residency (dit)",
    ),
    ({"component_residency": {"dit": "layerwise_offload"}}, "component_residency.dit", "did you mean"),
    (
        {"component_residency": {"transfomer": "resident"}},
        "component_residency",
        "did you mean 'transformer'",
    ),
    (
        {"layerwise_offload_components": ["transformr"]},
        "layerwise_offload_components",
        "did you mean 'transformer'",
    ),
    ({"cpu_offload_components": ["none", "vae"]}, "cpu_offload_components", "none cannot stand beside"),
    ({"image_encoder_cpu_offload": True}, "image_encoder_cpu_offload", "the model has no image encoder"),
    (
        {"dit_layerwise_offload": True, "dit_offload_prefetch_size": 999},
        "dit_offload_prefetch_size",
        "the number of blocks of transformer",
    ),
    (
        {"dit_layerwise_offload": True, "dit_layerwise_resident_layers": 1.5},
        "dit_layerwise_resident_layers",
        "neither a whole number of blocks nor a share",
    ),
    (
        {"dit_offload_prefetch_size": 2},
        "dit_offload_prefetch_size",
        "not streamed by block; add dit_layerwise_offload",
    ),
    (
        {"layerwise_prefetch_size": {"vae": 1}},
        "layerwise_prefetch_size",
        "not streamed by block; add layerwise_offload_components",
    ),
]


@pytest.mark.parametrize(("options", "field", "words"), BAD)
def test_a_mistake_is_one_sentence(options, field, words):
    with pytest.raises(UserError) as caught:
        residencies(**options)
    assert caught.value.field == field and words in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sharded_network_is_not_streamed():
    plan = blueprint.read(config.options({"dit_layerwise_offload": True}).model)
    shard = Plan(groups=(("shard", Group("x", 2, 0)),))
    with pytest.raises(UserError, match="sharded by use_fsdp_inference; leave one of them out") as caught:
        offload.store(plan.denoiser, shard, torch.device("cpu"), None, True, Berth())
    assert caught.value.field == "dit_layerwise_offload"


def test_an_adapter_is_not_merged_into_weights_that_stay_as_they_are_stored(tmp_path):
    model = tinydiff.load()
    name = next(
        name
        for name, x in model.denoiser.weights.items()
        if name.startswith("blocks.0.") and name.endswith("weight") and x.ndim == 2
    )
    weight, stem = model.denoiser.weights[name], name.removesuffix(".weight")
    draw = torch.Generator().manual_seed(0)
    pair = {
        f"transformer.{stem}.lora_A.weight": torch.randn(4, weight.shape[1], generator=draw),
        f"transformer.{stem}.lora_B.weight": torch.randn(weight.shape[0], 4, generator=draw),
    }
    save_file(pair, tmp_path / "adapter.safetensors")
    path = str(tmp_path / "adapter.safetensors")
    made = [
        tinydiff.generate(
            tinydiff.load(lora_path=path, lora_merge_mode=mode, **given), "a red circle", **SMALL
        )
        for mode, given in (
            ("dynamic", {}),
            ("dynamic", {"dit_layerwise_offload": True}),
            ("auto", {"dit_cpu_offload": True}),
        )
    ]
    assert torch.equal(made[0].latents[0], made[1].latents[0])
    assert torch.equal(made[0].latents[0], made[2].latents[0])
    with pytest.raises(UserError, match="the weights of transformer are offloaded") as caught:
        tinydiff.load(lora_path=path, lora_merge_mode="merge", dit_layerwise_offload=True)
    assert caught.value.field == "lora_merge_mode"


def test_compiling_a_streamed_network_says_what_runs_instead(caplog, monkeypatch):
    monkeypatch.setattr("tinydiff.runtime.blueprint._check_compiler", lambda: None)
    with caplog.at_level("INFO"):
        residencies(dit_layerwise_offload=True, enable_torch_compile=True)
    assert "transformer is streamed: torch's loop operator needs all weights on the device" in caplog.text
