"""LoRA files that are broken, of another kind or of another model: one sentence each, nothing executed."""

import json
import os
import pickle
import random
import re

import pytest
import torch
from safetensors.torch import save_file

from tests.io.lora_files import dotted, factors, network, randn, read, stored
from tinydiff.io.lora import Component, read_adapter
from tinydiff.parallel.plan import Row
from tinydiff.records import UserError

NETWORK = Component(
    "dit", {name: Row(name, shape) for name, shape in (("layer.weight", (12, 8)), ("other.weight", (6, 8)))}
)
A, B = "transformer.layer.lora_A.weight", "transformer.layer.lora_B.weight"
GOOD = {A: randn(4, 8), B: randn(12, 4)}
EMPTY = {A: randn(0, 8), B: randn(12, 0)}


def refused(words, *args, **options):
    with pytest.raises(UserError, match=words) as caught:
        read(*args, **options)
    assert caught.value.field == "lora_path"
    assert "\n" not in str(caught.value)


NAN = torch.tensor(float("nan"))
BAD = {
    "no A": ({B: GOOD[B]}, "layer has half a pair only: lora_B .lora_up. without lora_A .lora_down."),
    "no B": ({A: GOOD[A]}, "layer has half a pair only: lora_A .lora_down. without lora_B .lora_up."),
    "no second factor": (
        {"transformer.layer.lokr_w1": randn(2, 2)},
        "layer has half a pair only: .*without lokr_w2_a",
    ),
    "NaN": ({A: GOOD[A] * NAN, B: GOOD[B]}, f"has values that are not numbers in {A}"),
    "infinite": ({A: GOOD[A] / 0, B: GOOD[B]}, f"has values that are not numbers in {A}"),
    "alpha of NaN": (
        GOOD | {"transformer.layer.alpha": NAN},
        "has a scale that is not a number in transformer.layer.alpha",
    ),
    "alpha of two": (GOOD | {"transformer.layer.alpha": randn(2)}, r"alpha of layer has the shape \(2,\)"),
    "alpha alone": (
        {"transformer.layer.alpha": torch.tensor(1.0)},
        "layer has only alpha, which change nothing",
    ),
    "no directions": (EMPTY, f"has no values in {A}"),
    "shapes": (
        {
            "transformer.layer.hada_w1_a": randn(12, 2),
            "transformer.layer.hada_w1_b": randn(2, 8),
            "transformer.layer.hada_w2_a": randn(12, 3),
            "transformer.layer.hada_w2_b": randn(2, 8),
        },
        r"layer has factors whose shapes do not fit each other: .*hada_w2_a \(12, 3\)",
    ),
    "parts of two kinds": (
        GOOD | {"transformer.layer.rescale": randn(12)},
        "layer has rescale, which does not belong to a layer of the kind LoRA",
    ),
    "two ranks": ({A: GOOD[A], B: randn(12, 3)}, "layer has factors of two ranks, 4 and 3"),
    "narrower": (
        {A: randn(4, 7), B: GOOD[B]},
        r"lora_A \(lora_down\) of shape \(4, 7\), which does not fit the model's \(12, 8\)",
    ),
    "shorter": ({A: GOOD[A], B: randn(9, 4)}, r"lora_B \(lora_up\) of shape \(9, 4\), which does not fit"),
    "GLoRA": (
        {f"lycoris_layer.{name}.weight": randn(4, 4) for name in ("a1", "a2", "b1", "b2")},
        "of the kind GLoRA, which is not supported",
    ),
    "BOFT": ({"lycoris_layer.oft_blocks": randn(2, 3, 4, 4)}, "of the kind BOFT, which is not supported"),
    "BOFT of peft": (
        {"transformer.layer.boft_R.default": randn(2, 6)},
        "of the kind PEFT's BOFT, which is not supported",
    ),
    "OFT of OneTrainer": (
        {"transformer.layer.oft_R.weight": randn(2, 6), "transformer.layer.oft_R.scaled_oft": randn(1)},
        "of the kind OneTrainer's scaled OFT, which is not supported",
    ),
    "integers": (
        GOOD | {A: torch.ones(GOOD[A].shape, dtype=torch.int8)},
        "has values of torch.int8 in .*lora_A.weight, not floating-point numbers",
    ),
    "OFT of another width": (
        {"transformer.layer.oft_R.weight": randn(3, 6)},
        r"has oft_R of shape \(3, 6\), which does not fit the model's 8 columns",
    ),
    "a bias that is not there": (
        GOOD | {"transformer.layer.diff_b": randn(12)},
        "changes a bias, which the model's layer does not have",
    ),
    "DoRA alone": (
        {"transformer.layer.dora_scale": randn(12)},
        "has lengths of rows .DoRA. without a change",
    ),
    "DoRA of another width": (
        GOOD | {"transformer.layer.dora_scale": randn(5, 1)},
        "has DoRA's lengths of shape",
    ),
    "wider": (
        GOOD | {"transformer.layer.reshape_weight": torch.tensor([12, 16])},
        "reads 16 values where the model's layer reads 8: this is a control LoRA, which needs",
    ),
    "wider without saying so": (
        {"transformer.layer.lora_A.weight": randn(4, 16), "transformer.layer.lora_B.weight": randn(12, 4)},
        "reads 16 values where the model's layer reads 8: .* control LoRA, .*, and the model takes none",
    ),
    "of another shape altogether": (
        GOOD | {"transformer.layer.reshape_weight": torch.tensor([14, 16])},
        r"widens a weight to \(14, 16\), and the model's is \(12, 8\)",
    ),
    "another size": ({"transformer.layer.diff": randn(5, 5)}, "has a full difference of shape"),
    "weights": (
        {"transformer.layer.weight": randn(12, 8)},
        "1 of 1 keys match no weight .transformer.layer.weight.$",
    ),
}
"""Name -> (tensors, the sentence)."""


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_make_no_adapter(tmp_path, name):
    tensors, words = BAD[name]
    refused(words, tmp_path, tensors, NETWORK)


PARTS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_mid.weight",
    "lora_B.bias",
    "alpha",
    "dora_scale",
    "diff",
    "diff_b",
    "lora_magnitude_vector",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "oft_blocks",
    "rescale",
    "w_norm",
    "set_weight",
    "reshape_weight",
)
RIGHT = {
    "alpha": (),
    "dora_scale": (12, 1),
    "lora_magnitude_vector": (12,),
    "diff": (12, 8),
    "set_weight": (12, 8),
}
SHAPES = ((), (1,), (12,), (4, 8), (12, 4), (12, 8), (2, 2), (4, 4, 4), (2, 4, 2, 2), (0, 8), (4, 0))


@pytest.mark.parametrize("seed", range(3))
def test_parts_of_any_shape_are_one_sentence_or_an_adapter(tmp_path, seed):
    """Whatever is taken can be applied."""
    draw, made = random.Random(seed), 0
    for _ in range(200):
        parts = draw.sample(PARTS, draw.randint(1, 3))
        for group in (PARTS[:2], PARTS[9:13], ("lokr_w1", "lokr_w2"), ("lokr_w1_a", "lokr_w1_b", "lokr_w2")):
            if draw.random() < 0.25:
                parts = [*group, *parts[:1]]
        tensors = GOOD if draw.random() < 0.4 else {}
        shapes = [
            RIGHT[part] if part in RIGHT and draw.random() < 0.6 else draw.choice(SHAPES) for part in parts
        ]
        tensors = tensors | {
            f"transformer.layer.{part}": randn(*shape) for part, shape in zip(parts, shapes, strict=True)
        }
        try:
            differences = read(tmp_path, tensors, NETWORK).targets["transformer"]
        except UserError as error:
            assert error.field == "lora_path" and "\n" not in str(error)
            continue
        for name, each in differences.items():
            made += 1
            assert each.apply(randn(*NETWORK.rows[name].shape), 0.5).shape == NETWORK.rows[name].shape
    assert made > 0


METADATA = {
    "no number": (
        {"lora_adapter_metadata": '{"transformer.lora_alpha": "big"}'},
        "lora_alpha of layer is 'big', not a number",
    ),
    "no JSON": ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata is not JSON"),
    "no object": ({"lora_adapter_metadata": "[1]"}, "lora_adapter_metadata is not a JSON object"),
    "alpha of all": ({"network_alpha": "x"}, "network_alpha of its metadata is 'x', not a number"),
    "a pattern": (
        {"lora_adapter_metadata": '{"transformer.alpha_pattern": {"(": 1}}'},
        "alpha_pattern '\\(' is no regular expression",
    ),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_is_no_scale(tmp_path, name):
    metadata, words = METADATA[name]
    refused(words, tmp_path, GOOD, NETWORK, metadata)


def test_one_alpha_for_layers_of_two_ranks(tmp_path):
    more = {key.replace("layer", "other"): x for key, x in ((A, randn(2, 8)), (B, randn(6, 2)))}
    refused(
        "has one alpha in its metadata for layers of ranks 2, 4",
        tmp_path,
        GOOD | more,
        NETWORK,
        {"alpha": "4"},
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"lora_alpha": "x"}'])
def test_a_configuration_that_is_none(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    refused("adapter_config.json|lora_alpha of layer is 'x'", tmp_path, GOOD, NETWORK)


def test_a_truncated_file(tmp_path):
    file = tmp_path / "cut.safetensors"
    save_file(GOOD, file)
    data = file.read_bytes()
    for size in (0, 4, 40, len(data) - 8):
        file.write_bytes(data[:size])
        with pytest.raises(UserError, match="is truncated or not a safetensors file"):
            read_adapter(file, {"transformer": NETWORK})
    with pytest.raises(UserError, match="is truncated or not a safetensors file"):
        read_adapter(tmp_path / "missing.safetensors", {"transformer": NETWORK})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the weights"),
        ("<!doctype html>", "is a web page, not the weights"),
    ],
)
def test_what_a_download_left_in_the_place_of_a_file(tmp_path, text, words):
    (tmp_path / "lora.safetensors").write_text(text)
    with pytest.raises(UserError, match=words):
        read_adapter(tmp_path / "lora.safetensors", {"transformer": NETWORK})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_file_that_is_overwritten_in_place_changes_no_adapter(tmp_path, dtype):
    """Whoever reads a mapped file that was cut short is killed."""
    tensors = {name: tensor.to(dtype) for name, tensor in GOOD.items()}
    difference = read(tmp_path, tensors, NETWORK).targets["transformer"]["layer.weight"]
    expected = difference.apply(torch.zeros(12, 8, dtype=torch.float64), 1.0)
    os.truncate(tmp_path / "lora.safetensors", 0)
    assert torch.equal(difference.apply(torch.zeros(12, 8, dtype=torch.float64), 1.0), expected)
    assert expected.abs().min() > 0


def test_an_empty_file_of_weights(tmp_path):
    refused("holds no tensors", tmp_path, {}, NETWORK)


class Trap:
    """What runs when it is read as a pickle."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return self.mark.touch, ()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_never_executed(tmp_path, zipped):
    file, mark = tmp_path / "lora.bin", tmp_path / "executed"
    if zipped:
        torch.save({"a": Trap(mark)}, file)
    else:
        file.write_bytes(pickle.dumps({"a": Trap(mark)}))
    with pytest.raises(
        UserError, match="is a pickle, which can run code and is never read; convert it to safetensors"
    ):
        read_adapter(file, {"transformer": NETWORK})
    assert not mark.exists()


LOOKS = {
    "FLUX.1-dev": ("FLUX, original names", "Wan T2V"),
    "FLUX.2 dev": ("FLUX.2", "FLUX.1-dev"),
    "SD3.5 medium": ("Stable Diffusion 3, original names", "Qwen-Image"),
    "Wan I2V": ("Wan, original names|Wan from an image, original names", "Z-Image"),
    "Z-Image": ("Z-Image", "FLUX.1-dev"),
    "Qwen-Image": ("Qwen-Image", "SD3.5 medium"),
    "ERNIE-Image": ("ERNIE-Image", "Wan T2V"),
}
"""Family of a LoRA -> (what it looks like, the model that it is given to)."""


@pytest.mark.parametrize("family", LOOKS)
def test_a_lora_of_another_model(tmp_path, family):
    words, other = LOOKS[family]
    component, keys, _ = network(family)
    pairs = factors(stored(component, keys))
    with pytest.raises(UserError, match="does not fit the model") as caught:
        read(tmp_path, dotted(pairs, alpha=False), network(other)[0])
    message = str(caught.value)
    assert re.search(rf"they look like a LoRA for .*({words})|which does not fit the model's", message), (
        message
    )


FOREIGN = {
    "Stable Diffusion 1, 2 or XL": "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
    "Chroma": "diffusion_model.distilled_guidance_layer.in_proj.lora_A.weight",
    "HunyuanVideo": "transformer.double_blocks.0.img_attn_qkv.lora_A.weight",
    "LTX-2": "diffusion_model.transformer_blocks.0.audio_attn1.to_q.lora_A.weight",
    "CLIP": "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "T5": "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
    "a language model": "lora_te_layers_0_self_attn_q_proj.lora_down.weight",
}


@pytest.mark.parametrize("words", FOREIGN)
def test_what_keys_look_like(tmp_path, words):
    key = FOREIGN[words]
    tensors = {key: randn(2, 2)} | {key.replace("0", str(i)): randn(2, 2) for i in range(1, 8)}
    refused(
        f"{len(tensors)} of {len(tensors)} keys match no weight .* they look like a LoRA for {words}$",
        tmp_path,
        tensors,
        NETWORK,
    )


def test_five_keys_are_named(tmp_path):
    tensors = GOOD | {f"transformer.no.{i}.lora_A.weight": randn(2, 2) for i in range(7)}
    names = ", ".join(f"transformer.no.{i}.lora_A.weight" for i in range(5))
    refused(re.escape(f"7 of 9 keys match no weight ({names}, ...)"), tmp_path, tensors, NETWORK)


def test_lenient_reading_returns_what_fits_nothing(tmp_path):
    tensors = GOOD | {f"transformer.no.{i}.lora_A.weight": randn(2, 2) for i in range(7)}
    adapter = read(tmp_path, tensors, NETWORK, lenient=True)
    assert adapter.unmatched == tuple(f"transformer.no.{i}.lora_A.weight" for i in range(7))
    assert adapter.targets["transformer"].keys() == {"layer.weight"}
    only = {key: x for key, x in tensors.items() if ".no." in key}
    refused("7 of 7 keys match no weight", tmp_path, only, NETWORK, lenient=True)


def test_one_layer_twice(tmp_path):
    twice = GOOD | {key.replace("transformer.", "diffusion_model."): x.clone() for key, x in GOOD.items()}
    words = "says the same twice: diffusion_model.layer.lora_A.weight and transformer.layer.lora_A.weight"
    refused(words, tmp_path, twice, NETWORK)


def test_oft_of_an_older_peft(tmp_path):
    """Before 0.18 its series had another last term, and its configuration no version."""
    file = {"transformer.layer.oft_R.weight": randn(2, 6)}
    for config, known in (
        ({"use_cayley_neumann": True}, False),
        ({"use_cayley_neumann": True, "peft_version": "0.17.1"}, False),
        ({"use_cayley_neumann": True, "peft_version": "0.18.0@a1b2"}, True),
        ({"use_cayley_neumann": False}, True),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        if known:
            assert read(tmp_path, file, NETWORK).kinds == ("OFT",)
        else:
            with pytest.raises(UserError, match=r"series of PEFT before 0.18, which is not supported"):
                read(tmp_path, file, NETWORK)
