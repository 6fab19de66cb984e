"""`tinydiff doctor`: the parity of every family here and now, faults found where they sit, and what the
command says.
"""

import builtins
import json
import re
import sys

import pytest
import torch

from tests.models.test_released import ALONE, MODELS, class_of, config_of
from tests.sources import ROOT
from tests.test_floors import loaded
from tinydiff import cli, doctor
from tinydiff.models import registry
from tinydiff.parity import models, reference
from tinydiff.parity.denoisers import DENOISERS
from tinydiff.parity.models import GROUPS
from tinydiff.parity.reference import BOUND, compared, first_difference, prepared

CASES = models.cases()
FAULTS = [
    ("FLUX.1, guidance", "time_text_embed.guidance_embedder.linear_2.weight", "time"),
    ("FLUX.1, guidance", "context_embedder.bias", "text"),
    ("FLUX.1, guidance", "x_embedder.weight", "image"),
    ("FLUX.1, guidance", "transformer_blocks.1.ff_context.net.2.weight", "transformer_blocks.1"),
    ("FLUX.1, guidance", "single_transformer_blocks.0.attn.norm_k.weight", "single_transformer_blocks.0"),
    ("FLUX.1, guidance", "norm_out.linear.bias", "last"),
    ("Wan, text", "condition_embedder.text_embedder.linear_1.weight", "text"),
    ("Wan, text", "blocks.1.attn2.to_k.weight", "blocks.1"),
    ("Z-Image", "cap_pad_token", "text"),
    ("Z-Image", "noise_refiner.0.attention.to_v.weight", "noise_refiner.0"),
    ("Z-Image", "layers.1.feed_forward.w3.weight", "layers.1"),
    ("Qwen-Image, references at timestep 0", "transformer_blocks.1.img_mod.1.weight", "transformer_blocks.1"),
    ("FLUX.2, references", "single_stream_modulation.linear.weight", "single_transformer_blocks.0"),
    ("SD3, norms and dual attention", "transformer_blocks.2.attn.add_v_proj.weight", "transformer_blocks.2"),
    ("ERNIE-Image", "layers.0.mlp.linear_fc2.weight", "layers.0"),
    ("CLIP-G", "text_model.encoder.layers.1.mlp.fc1.weight", "layers.1"),
    ("CLIP-G", "text_projection.weight", "pooled"),
    ("Qwen3", "layers.0.self_attn.q_norm.weight", "layers.0"),
    ("FLUX.2 autoencoder", "bn.running_mean", "encode"),
    ("FLUX.2 autoencoder", "post_quant_conv.bias", "decode"),
]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(models, "_stages", models._stages.__wrapped__)  # nothing is kept between tests


@pytest.fixture(scope="module")
def values():
    """What is compared -> (the reference's values, the weights), each made once."""
    made = {}

    def get(what):
        if what not in made:
            made[what] = prepared(CASES[what][1]())
        return made[what]

    return get


def stages(values, what, **changed):
    """The stages of a comparison with some of our weights changed."""
    expected, weights = values(what)
    return list(compared(CASES[what][1](), expected, weights | changed))


@pytest.mark.parametrize("what", CASES)
def test_every_network_equals_the_installed_reference_at_every_stage(values, what):
    found = stages(values, what)
    assert [stage for stage in found if not stage.error <= BOUND] == []
    assert [stage.name for stage in found] == ["weights", *values(what)[0]]
    if what in DENOISERS:
        d = DENOISERS[what]
        image = [] if d.image is None else ["image"]
        blocks = [at for _, at in d.family.blocks(d.config)]
        text = [] if d.text is None else ["text"]
        assert [stage.name for stage in found] == ["weights", "time", *text, *image, *blocks, "last"]


@pytest.mark.parametrize(("what", "weight", "stage"), FAULTS)
def test_a_broken_weight_is_found_where_it_works(values, what, weight, stage):
    first = first_difference(stages(values, what, **{weight: values(what)[1][weight] * 1.001}))
    assert first is not None and first.name == stage and BOUND < first.error < 0.1


def test_weights_that_differ_in_name_or_shape_and_values_that_are_no_numbers(values):
    expected, weights = values("FLUX.1")
    other = {
        ("proj_in.bias" if name == "proj_out.bias" else name): tensor for name, tensor in weights.items()
    }
    first = next(compared(CASES["FLUX.1"][1](), expected, other))
    assert (first.name, first.error) == ("weights", float("inf"))
    assert first.note == "proj_in.bias: ours None, the reference's (8,)"
    first = next(compared(CASES["FLUX.1"][1](), expected, weights | {"proj_out.bias": torch.zeros(9)}))
    assert first.note == "proj_out.bias: ours (8,), the reference's (9,)"
    first = first_difference(
        stages(values, "FLUX.1", **{"x_embedder.bias": weights["x_embedder.bias"] * torch.nan})
    )
    assert first is not None and (first.name, first.note) == ("image", "values that are no numbers")
    assert (
        reference.distance(torch.ones(2, 3), torch.ones(2, 4))[1]
        == "shapes differ: ours (2, 3), the reference's (2, 4)"
    )


def test_a_reference_of_another_version_is_a_difference(monkeypatch):
    """Whatever it raises ends the comparison, and is said."""
    changed = CASES["FLUX.1"][1]()._replace(theirs=lambda module: module(tokens=1))
    last = reference.stages(changed)[-1]
    assert (
        last.name == "running"
        and last.error == float("inf")
        and last.note.startswith("TypeError: ")
        and "tokens" in last.note
    )


# --- which comparisons stand for a model


def test_every_released_model_is_compared_in_all_its_parts():
    names = [name for group in GROUPS for name in group.names]
    assert len(set(names)) == len(names)
    assert set(names) == {row.name.rpartition("/")[2] for row in registry.MODELS} | {ALONE.rpartition("/")[2]}
    for row in registry.MODELS:
        (group,) = models.chosen(row.name)
        assert group.family == row.family
    encoders = {"Qwen3Model": "Qwen3", "Qwen3ForCausalLM": "Qwen3",
                "Mistral3ForConditionalGeneration": "Mistral",
                "Mistral3Model": "Ministral 3", "Gemma3ForConditionalGeneration": "Gemma 3",
                "Gemma4UnifiedForConditionalGeneration": "Gemma 4",
                "Qwen2_5_VLForConditionalGeneration": "Qwen2.5",
                "LlavaForConditionalGeneration": "Llama"}  # fmt: skip
    for name in MODELS:
        (group,) = models.chosen(name)
        released = set(MODELS[name]["components"]) - {"transformer_2", "pe"}
        if group.family == "wan_s2v":  # a class in no library
            released -= {"transformer"}
        assert group.parts.keys() - {"vision"} == released
        for component in released:
            kind, what = class_of(name, component), group.parts[component]
            assert what == encoders[kind] if kind in encoders else CASES[what][0] == kind or name == ALONE


def _switches(c):
    """The fields of a config that are no measures: what is on, off, named or absent."""
    measures = ("pooled_projection_dim", "axes_lens", "out_channels", "latents_mean", "latents_std")
    chosen = {name: value for name, value in vars(c).items() if name not in measures}
    kept = {name: value for name, value in chosen.items() if isinstance(value, bool | str)}
    return kept | {
        name: bool(value) for name, value in chosen.items() if value is None or isinstance(value, tuple)
    }


@pytest.mark.parametrize("name", [name for name in MODELS if "transformer" in models.chosen(name)[0].parts])
def test_the_tiny_denoiser_has_the_released_ones_switches(name):
    (group,) = models.chosen(name)
    ours, released = (
        _switches(DENOISERS[group.parts["transformer"]].config),
        _switches(config_of(name, "transformer")),
    )
    both = ours.keys() & released.keys()
    assert both >= {
        field
        for field, value in released.items()
        if isinstance(value, bool) and value and field != "added_kv_proj_dim"
    }
    assert {field: ours[field] for field in both} == {field: released[field] for field in both}


# --- the command


def test_a_model_is_shown_stage_by_stage(capsys):
    assert cli.main(["doctor", "--parity", "Tongyi-MAI/Z-Image-Turbo"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^tinydiff \S+, torch \S+, diffusers \S+, transformers \S+, Python \S+; float64", out)
    assert "\nZ-Image, Z-Image-Turbo\n  transformer      Z-Image (ZImageTransformer2DModel): equal, " in out
    assert re.search(r"\n    layers\.1 +\d\.\de-1\d\n    last +\d\.\de-1\d\n  text_encoder", out)
    assert "Ovis" not in out


def test_a_difference_is_named_and_the_command_fails(capsys, monkeypatch):
    """A family that drifted: GELU itself for its tanh approximation, in single blocks only."""
    from tinydiff.models import flux, joint

    def drifted(c, plan, w, streams, request, shared):
        return joint.single_block(
            plan, w, streams, request, shared, c.attention_head_dim, torch.nn.functional.gelu
        )

    monkeypatch.setattr(flux, "single", drifted)
    assert cli.main(["doctor", "--parity", "FLUX.1-schnell"]) == 1
    out = capsys.readouterr().out
    assert "FLUX.1 (FluxTransformer2DModel): DIFFERS, first at single_transformer_blocks.0: " in out
    assert "KL autoencoder (AutoencoderKL): equal" in out
    assert cli.main(["doctor", "--parity", "FLUX.1-schnell", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (group,) = report["groups"]
    assert [part["equal"] for part in group["components"]] == [False, True, True, True]
    assert report["bound"] == BOUND and group["components"][0]["stages"][-1]["error"] > 1e-6


def test_the_page_is_what_the_command_prints(values, capsys, monkeypatch):
    """Without versions and digits of rounding. The references' values are those of the tests above."""
    monkeypatch.setattr(models, "_stages", lambda what: stages(values, what))

    def stable(page):
        return re.sub(r"Measured with .*", "", re.sub(r"\b\de[+-]\d\d\b", "", page))

    assert cli.main(["doctor", "--parity", "--markdown"]) == 0
    page = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    assert stable(capsys.readouterr().out) == stable(page)
    errors = [
        float(error)
        for error in re.findall(r"\| (\S+) \|$", page, re.MULTILINE)
        if "e" in error and error[0].isdigit()
    ]
    assert len(errors) > 50 and max(errors) <= BOUND


def test_doctor_alone_says_what_is_here(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert (
        f"torch {torch.__version__}" in out
        and "\ncpu: " in out
        and "\n  attention in fp32: sdpa" in out
        and "C++ compiler: " in out
    )
    assert cli.main(["doctor", "--json"]) == 0
    here = json.loads(capsys.readouterr().out)
    assert (
        here == doctor.machine()
        and "math" in here["attention"]["cpu"]["bf16"]
        and "cudnn" not in here["attention"]["cpu"]["fp32"]
    )


def test_help_needs_no_torch(capsys):
    assert cli.main(["doctor", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "With --parity: a model or a family" in shown and "--markdown [true|false]" in shown
    code = "from tinydiff import cli\nimport os, sys\nsys.stdout = open(os.devnull, 'w')\n"
    code += "cli.main(['doctor', '-h'])\nsys.stdout = sys.__stdout__"
    assert not loaded(code, "torch")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["--parity", "FLUX.1-shnell"],
            "'FLUX.1-shnell' is neither a model nor a family that is compared; "
            "did you mean 'FLUX.1-schnell'?",
        ),
        (["--markdown"], "doctor: --markdown needs --parity"),
        (["--json", "--markdown", "--parity"], "doctor: give either --json or --markdown, not both"),
        (["--jsn"], "--jsn: no such flag; did you mean '--json'?"),
    ],
)
def test_mistakes(capsys, argv, sentence):
    assert cli.main(["doctor", *argv]) == 2
    assert sentence in capsys.readouterr().err


def test_without_the_libraries_it_says_how_to_get_them(capsys, monkeypatch):
    found = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.partition(".")[0] == "diffusers":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(builtins, "__import__", absent)
    assert cli.main(["doctor", "--parity", "flux"]) == 2
    said = "tinydiff: error: parity: diffusers, the reference, is not installed; "
    said += "pip install 'tinydiff[diffusers]'\n"
    assert capsys.readouterr().err == said
