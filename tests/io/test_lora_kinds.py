"""The kinds of adapters: a file that LyCORIS or peft writes changes a weight as they merge it, in float64."""

import json

import peft
import pytest
import torch
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import load_file
from torch import nn

from tests.io.lora_files import equal, randn, read
from tinydiff.io.lora import Component, measured
from tinydiff.keymap import KeyMap, fused, joined
from tinydiff.parallel.plan import Row
from tinydiff.records import UserError

LINEAR, CONV = (12, 8), (12, 8, 2, 2)


def double(module):
    """The module in float64, every parameter drawn anew."""
    module = module.double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = 0.5 * randn(*parameter.shape, seed=seed + 7)
    return module


def component(shape, **more):
    rows = [Row("layer.weight", shape), Row("layer.bias", shape[:1])]
    rows += [Row(name.replace("_", ".", 1), each) for name, each in more.items()]
    return Component("dit", {row.name: row for row in rows})


def layer(shape):
    out, into, *kernel = shape
    return double(nn.Conv2d(into, out, tuple(kernel)) if kernel else nn.Linear(into, out))


LYCORIS = {
    "LoRA": (LoConModule, {"lora_dim": 4, "alpha": 2.0}, "LoRA", 4, 0.5),
    "LoRA, rank-stabilised": (LoConModule, {"lora_dim": 4, "alpha": 2.0, "rs_lora": True}, "LoRA", 4, 1.0),
    "LoRA with a core": (LoConModule, {"lora_dim": 4, "alpha": 2.0, "use_tucker": True}, "LoRA", 4, 0.5),
    "DoRA of rows": (
        LoConModule,
        {"lora_dim": 4, "alpha": 2.0, "weight_decompose": True, "wd_on_out": True},
        "DoRA",
        4,
        0.5,
    ),
    "DoRA of columns": (
        LoConModule,
        {"lora_dim": 4, "alpha": 2.0, "weight_decompose": True, "wd_on_out": False},
        "DoRA",
        4,
        0.5,
    ),
    "LoHa": (LohaModule, {"lora_dim": 4, "alpha": 2.0}, "LoHa", 4, 0.5),
    "LoHa with a core": (LohaModule, {"lora_dim": 4, "alpha": 2.0, "use_tucker": True}, "LoHa", 4, 0.5),
    "LoHa, DoRA": (
        LohaModule,
        {"lora_dim": 4, "alpha": 2.0, "weight_decompose": True},
        "DoRA of LoHa",
        4,
        0.5,
    ),
    "LoKr, full": (LokrModule, {"lora_dim": 100, "alpha": 2.0, "factor": 2}, "LoKr", None, 1.0),
    "LoKr, one product": (LokrModule, {"lora_dim": 1, "alpha": 0.5, "factor": 2}, "LoKr", 1, 0.5),
    "LoKr, two products": (
        LokrModule,
        {"lora_dim": 1, "alpha": 0.5, "factor": -1, "decompose_both": True},
        "LoKr",
        1,
        0.5,
    ),
    "LoKr with a core": (
        LokrModule,
        {"lora_dim": 1, "alpha": 0.5, "factor": 2, "use_tucker": True},
        "LoKr",
        1,
        0.5,
    ),
    "LoKr, DoRA": (
        LokrModule,
        {"lora_dim": 1, "alpha": 0.5, "factor": 2, "weight_decompose": True},
        "DoRA of LoKr",
        1,
        0.5,
    ),
    "OFT": (DiagOFTModule, {"lora_dim": 4}, "OFT", None, 1.0),
    "OFT, limited": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.05}, "OFT", None, 1.0),
    "OFT, rescaled": (DiagOFTModule, {"lora_dim": 4, "rescaled": True}, "OFT", None, 1.0),
}
"""Name -> (LyCORIS' module, its options, our word for the kind, rank, scale)."""


def trained(make, name, base, options):
    """(LyCORIS' module on a layer with random parameters, the weight that it merges).

    Its merging of LoHa and LoKr multiplies by the scale twice, its forward pass once: the latter counts. Its
    OFT knows float32 alone.
    """
    theirs = make(name, base, 1.0, **options)
    alpha = theirs.state_dict().get("alpha")
    theirs = double(theirs)
    if alpha is not None:
        theirs.alpha = alpha
    with torch.no_grad():
        if make is DiagOFTModule:
            base.float()
            merged, _ = theirs.float().get_merged_weight(1.0)
            base.double()
        elif make is LoConModule:
            merged, _ = theirs.get_merged_weight(1.0)
        else:
            merged = base.weight + theirs.get_weight(base.weight.shape)
            merged = theirs.apply_weight_decompose(merged) if theirs.wd else merged
    tensors = {key: x.detach().clone().contiguous() for key, x in theirs.state_dict().items()}
    return tensors, merged.double().reshape(base.weight.shape)


FLOAT32 = {"OFT": 1e-5}
"""Kinds that LyCORIS computes in float32 -> its rounding."""


@pytest.mark.parametrize("shape", [LINEAR, CONV], ids=["linear", "convolution"])
@pytest.mark.parametrize("kind", LYCORIS)
def test_a_kind_of_lycoris(tmp_path, kind, shape):
    make, options, word, rank, scale = LYCORIS[kind]
    base = layer(shape)
    tensors, merged = trained(make, "lycoris_layer", base, options)
    tensors = {f"lycoris_layer.{key}": x for key, x in tensors.items()}
    adapter = read(tmp_path, tensors, component(shape))
    assert (adapter.kinds, adapter.ranks) == ((word,), () if rank is None else (rank,))
    assert adapter.scales == pytest.approx((scale,))
    difference = adapter.targets["transformer"]["layer.weight"]
    weight = base.weight.detach()
    equal({"weight": difference.apply(weight, 1.0)}, {"weight": merged}, FLOAT32.get(word, 1e-10))
    assert torch.equal(difference.apply(weight, 0.0), weight)
    assert (merged - weight).abs().max() > 0.02


def test_norms_of_lycoris(tmp_path):
    norm = double(nn.LayerNorm(8))
    theirs = double(NormModule("lycoris_norm", norm, 1.0))
    tensors = {f"lycoris_norm.{name}": x.detach().clone() for name, x in theirs.state_dict().items()}
    rows = {name: Row(name, (8,)) for name in ("norm.weight", "norm.bias")}
    adapter = read(tmp_path, tensors, Component("dit", rows))
    found = {
        name: each.apply(torch.zeros(8).double(), 0.5)
        for name, each in adapter.targets["transformer"].items()
    }
    equal(found, {"norm.weight": 0.5 * theirs.w_norm.detach(), "norm.bias": 0.5 * theirs.b_norm.detach()})


class Net(nn.Module):
    """A network with one layer."""

    def __init__(self, one):
        super().__init__()
        self.layer = one


def oft(side=4, **options):
    return peft.OFTConfig(oft_block_size=side, target_modules=["layer"], **options)


PEFT = {
    "LoRA": (peft.LoraConfig(r=4, lora_alpha=2, target_modules=["layer"]), "LoRA"),
    "rank-stabilised": (
        peft.LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=["layer"]),
        "LoRA",
    ),
    "patterns": (
        peft.LoraConfig(
            r=4, lora_alpha=2, rank_pattern={"lay.r": 3}, alpha_pattern={"la.*": 6}, target_modules=["layer"]
        ),
        "LoRA",
    ),
    "DoRA": (peft.LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=["layer"]), "DoRA"),
    "bias of the factor": (
        peft.LoraConfig(r=4, lora_alpha=2, lora_bias=True, target_modules=["layer"]),
        "LoRA",
    ),
    "LoHa": (peft.LoHaConfig(r=4, alpha=2, target_modules=["layer"]), "LoHa"),
    "LoHa with a core": (
        peft.LoHaConfig(r=4, alpha=2, use_effective_conv2d=True, target_modules=["layer"]),
        "LoHa",
    ),
    "LoKr": (peft.LoKrConfig(r=1, alpha=3, target_modules=["layer"]), "LoKr"),
    "LoKr, full": (peft.LoKrConfig(r=40, alpha=20, target_modules=["layer"]), "LoKr"),
    "LoKr with a core": (
        peft.LoKrConfig(
            r=1, alpha=3, use_effective_conv2d=True, decompose_both=True, target_modules=["layer"]
        ),
        "LoKr",
    ),
    "OFT": (oft(), "OFT"),
    "OFT, a longer series": (oft(num_cayley_neumann_terms=7), "OFT"),
    "OFT, a short series": (oft(num_cayley_neumann_terms=3), "OFT"),
    "OFT, two terms": (oft(num_cayley_neumann_terms=2), "OFT"),
    "OFT, exact": (oft(use_cayley_neumann=False), "OFT"),
    "OFT, one block for all": (oft(block_share=True), "OFT"),
    # The reference rounds this limit to float32: with 4 or 16 blocks it is exact.
    "OFT, limited": (oft(side=2, coft=True, eps=0.25), "OFT"),
}


@pytest.mark.parametrize("shape", [LINEAR, CONV], ids=["linear", "convolution"])
@pytest.mark.parametrize("kind", PEFT)
def test_a_kind_of_peft(tmp_path, kind, shape):
    """As peft saves it: the scale stands in adapter_config.json beside the file."""
    config, word = PEFT[kind]
    base = layer(shape)
    before = {"layer.weight": base.weight.detach().clone(), "layer.bias": base.bias.detach().clone()}
    model = peft.get_peft_model(Net(base), config)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        parameter.data = parameter.data.double()
        if "base_layer" not in name:
            parameter.data = 0.5 * randn(*parameter.shape, seed=seed + 30)
    model.save_pretrained(tmp_path)
    adapter = read_saved(tmp_path, component(shape))
    assert adapter.kinds == (word,)
    with torch.no_grad():
        merged = model.merge_and_unload().state_dict()
    differences = adapter.targets["transformer"]
    found = {name: each.apply(before[name], 1.0) for name, each in differences.items()}
    assert found.keys() == ({"layer.weight", "layer.bias"} if "bias" in kind else {"layer.weight"})
    equal(found, {name: merged[name] for name in found})
    assert (found["layer.weight"] - before["layer.weight"]).abs().max() > 0.02


def test_oft_of_a_fused_layer_turns_every_part(tmp_path):
    """Its blocks are of columns, so each part has the rows that the whole would have."""
    weight, triangles = randn(12, 8), 0.3 * randn(2, 6, seed=1)
    whole = read(tmp_path, {"transformer.layer.oft_R.weight": triangles}, component(LINEAR))
    merged = whole.targets["transformer"]["layer.weight"].apply(weight, 1.0)
    differences = read(tmp_path, {"diffusion_model.qkv.oft_R.weight": triangles}, FUSED).targets[
        "transformer"
    ]
    parts = dict(zip("qkv", weight.chunk(3), strict=True))
    found = {name: differences[f"{name}.weight"].apply(part, 1.0) for name, part in parts.items()}
    equal(found, dict(zip("qkv", merged.chunk(3), strict=True)))


def read_saved(directory, network):
    tensors = load_file(directory / "adapter_model.safetensors")
    return read(directory, tensors, network)


PAIR = {
    "transformer.layer.lora_A.weight": randn(4, 8),
    "transformer.layer.lora_B.weight": randn(12, 4, seed=1),
}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"transformer.r": 4, "transformer.lora_alpha": 8}, 2.0),
        ({"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": True}, 4.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"layer": 2}}, 0.5),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_scale_of_the_metadata_of_diffusers(tmp_path, config, scale):
    adapter = read(tmp_path, PAIR, component(LINEAR), {"lora_adapter_metadata": json.dumps(config)})
    assert adapter.scales == (scale,)


def test_which_scale_counts(tmp_path):
    """A tensor's, then a configuration's, then one for all layers, then the caller's, then 1."""
    alpha = {"transformer.layer.alpha": torch.tensor([2.0])}
    config = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})}
    one = {"network_alpha": "12"}
    network = component(LINEAR)
    assert read(tmp_path, PAIR | alpha, network, config | one, alpha=16).scales == (0.5,)
    assert read(tmp_path, PAIR, network, config | one, alpha=16).scales == (2.0,)
    assert read(tmp_path, PAIR, network, one, alpha=16).scales == (3.0,)
    assert read(tmp_path, PAIR, network, alpha=16).scales == (4.0,)
    assert read(tmp_path, PAIR, network).scales == (1.0,)


def test_biases_norms_and_whole_weights(tmp_path):
    """What distilled models have beside low-rank factors; a replaced weight is reached at strength 1."""
    network = component(LINEAR, norm_weight=(8,), blocks_0=(5,))
    rows = network.rows | {"blocks.0.modulation": Row("blocks.0.modulation", (1, 6, 4))}
    network = Component("dit", rows)
    diff, bias, norm, modulation = randn(12, 8), randn(12), randn(8), randn(1, 6, 4)
    tensors = {
        "diffusion_model.layer.diff_b": bias,
        "diffusion_model.norm.diff": norm,
        "diffusion_model.blocks.0.diff_m": modulation,
    }
    adapter = read(tmp_path, tensors | {"diffusion_model.layer.diff": diff}, network)
    assert (adapter.kinds, adapter.ranks) == (("full difference",), ())
    found = {
        name: each.apply(torch.ones(rows[name].shape).double(), 0.5)
        for name, each in adapter.targets["transformer"].items()
    }
    expected = {
        "layer.weight": diff,
        "layer.bias": bias,
        "norm.weight": norm,
        "blocks.0.modulation": modulation,
    }
    equal(found, {name: 1 + 0.5 * each for name, each in expected.items()})
    adapter = read(tmp_path, {"diffusion_model.layer.set_weight": diff}, network)
    difference, ones = adapter.targets["transformer"]["layer.weight"], torch.ones(12, 8).double()
    equal({"a": difference.apply(ones, 1.0)}, {"a": diff})
    equal({"a": difference.apply(ones, 0.25)}, {"a": 0.75 + 0.25 * diff})


# --- fused and split layers

FUSED = Component(
    "dit",
    {f"{name}.weight": Row(f"{name}.weight", (4, 8)) for name in "qkv"}
    | {f"{name}.weight": Row(f"{name}.weight", (6, 8)) for name in "xy"}
    | {"mlp.weight": Row("mlp.weight", (8, 6))},
    (KeyMap((fused("qkv", "q", "k", "v"), fused("xy", "x", "y"), joined(("up", "gate"), "mlp"))),),
)


CUT = [(kind, "qkv") for kind in LYCORIS if "OFT" not in kind]
CUT += [(kind, "xy") for kind in LYCORIS if "OFT" in kind]


@pytest.mark.parametrize(("kind", "names"), CUT)
def test_a_fused_layer_is_cut(tmp_path, kind, names):
    """Every kind of a fused layer gives its parts the rows that the whole would have. A DoRA of columns
    measures them over all parts.
    """
    make, options, word, _, _ = LYCORIS[kind]
    base = layer(LINEAR)
    tensors, merged = trained(make, "lycoris_layer", base, options)
    tensors = {f"diffusion_model.{names}.{key}": x for key, x in tensors.items()}
    parts = dict(zip(names, base.weight.detach().chunk(len(names)), strict=True))
    differences = measured(
        read(tmp_path, tensors, FUSED).targets["transformer"],
        lambda wanted: [
            (f"{name}.weight", part) for name, part in parts.items() if f"{name}.weight" in wanted
        ],
    )
    found = {name: differences[f"{name}.weight"].apply(part, 1.0) for name, part in parts.items()}
    equal(found, dict(zip(names, merged.chunk(len(names)), strict=True)), FLOAT32.get(word, 1e-10))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("OFT", "qkv changes q.weight, and its blocks of 3 rows .* reach over the parts of the fused layer"),
    ],
)
def test_a_fused_layer_that_cannot_be_cut(tmp_path, kind, words):
    make, options, *_ = LYCORIS[kind]
    tensors, _ = trained(make, "lycoris_layer", layer(LINEAR), options)
    with pytest.raises(UserError, match=f"cannot be split: {words}"):
        read(tmp_path, {f"diffusion_model.qkv.{key}": x for key, x in tensors.items()}, FUSED)


def test_two_layers_of_the_file_are_one_of_the_model(tmp_path):
    """The factors stand one below the other, and each has its own scale."""
    tensors, expected = {}, []
    for seed, (name, alpha) in enumerate((("up", 1.0), ("gate", 6.0))):
        a, b = randn(2 + seed, 6, seed=seed), randn(4, 2 + seed, seed=seed + 5)
        tensors |= {f"diffusion_model.{name}.lora_A.weight": a, f"diffusion_model.{name}.lora_B.weight": b}
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(alpha)
        expected.append(alpha / (2 + seed) * (b @ a))
    a, b = read(tmp_path, tensors, FUSED).targets["transformer"]["mlp.weight"].low_rank()
    assert a.shape == (5, 6)
    equal({"mlp": b @ a}, {"mlp": torch.cat(expected)})
    only = {name: x for name, x in tensors.items() if ".gate." in name}
    a, b = read(tmp_path, only, FUSED).targets["transformer"]["mlp.weight"].low_rank()
    equal({"mlp": b @ a}, {"mlp": torch.cat([torch.zeros_like(expected[0]), expected[1]])})


def test_parts_of_a_fused_layer_in_the_file(tmp_path):
    """OneTrainer numbers them."""
    a, b = randn(2, 8), randn(4, 2, seed=1)
    tensors = {"transformer.qkv.1.lora_down.weight": a, "transformer.qkv.1.lora_up.weight": b}
    targets = read(tmp_path, tensors, FUSED).targets["transformer"]
    assert targets.keys() == {"k.weight"}
    equal({"k": targets["k.weight"].apply(torch.zeros(4, 8).double(), 1.0)}, {"k": b @ a})
