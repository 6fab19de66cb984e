"""Values of options: what is not given, numbers of other libraries, bounds, and one sentence for whatever is
not a value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy
import pytest
import torch

from tinydiff import config, flags, unsupported, values
from tinydiff.records import UserError, brief

NONE = {
    name: None
    for name in (
        *config.NAMES,
        *flags.SPELLINGS,
        *flags.MAPS,
        *unsupported.OPTIONS,
        "vae_path",
        "precision",
        "720p",
    )
}


def test_none_is_as_if_absent_everywhere(tmp_path: Path):
    assert config.options(NONE) == config.Options()
    assert (
        config.options({"component_paths": {"vae": None}, "component_precisions": {}, "lora_path": None})
        == config.Options()
    )
    (tmp_path / "a.json").write_text(json.dumps(NONE))
    (tmp_path / "a.yaml").write_text(
        "\n".join(f"'{name}': null" for name in NONE) + "\nvae_config: {use_tiling: null}\n"
    )
    for name in ("a.json", "a.yaml"):
        assert config.parse(["--config", str(tmp_path / name)]) == config.Options()
    with pytest.raises(UserError, match=r"^hieght: no such key; did you mean 'height'"):
        config.options({"hieght": None})


def test_an_empty_list_gives_nothing():
    assert config.options({"image_path": [], "prompt": (), "text_encoder_precisions": []}) == config.Options()
    with pytest.raises(UserError, match=r"^seed: takes one value or more and was given none"):
        config.options({"seed": []})


@pytest.mark.parametrize(
    "wrap", [numpy.int64, numpy.uint8, numpy.array, lambda n: numpy.array([n]), torch.tensor]
)
def test_integers_of_numpy_are_integers(wrap):
    sampling = config.options({"seed": wrap(3), "height": wrap(64), "guidance_scale": wrap(2)}).sampling
    assert (sampling.seed, sampling.height, sampling.guidance_scale) == ((3,), 64, 2.0)
    assert [type(number) for number in (*sampling.seed, sampling.height, sampling.guidance_scale)] == [
        int,
        int,
        float,
    ]


def test_other_numbers_and_truths_of_numpy():
    made = config.options(
        {
            "guidance_scale": numpy.float32(2.5),
            "strength": numpy.array(0.5),
            "save_output": numpy.bool_(False),
        }
    )
    assert (made.sampling.guidance_scale, made.sampling.strength, made.output.save_output) == (
        2.5,
        0.5,
        False,
    )
    assert config.options({"seed": numpy.arange(3), "num_outputs": 3}).sampling.seed == (0, 1, 2)
    assert config.options({"seed": range(3), "num_outputs": 3}).sampling.seed == (0, 1, 2)
    assert config.options({"enable_teacache": numpy.bool_(False)}).refusals == ()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("height", numpy.float32(480), "height: 480.0 is not an integer"),
        ("height", numpy.zeros((2, 2)), "height: array("),
        ("height", numpy.arange(2), "height: takes one value and was given 0 1"),
        ("guidance_scale", numpy.float64("nan"), "guidance_scale: nan is not a finite number"),
        ("guidance_scale", 10**400, "guidance_scale: inf is not a finite number"),
        ("guidance_scale", "9" * 401, "has too many digits"),
        ("height", "9" * 5000, "has too many digits"),
        ("height", 10**5000, "height: an integer of more than 200 digits must be at least 1"),
        ("negative_prompt", 10**5000, "negative_prompt: an integer of more than 200 digits is not a string"),
        ("height", "1_0", "height: '1_0' is not an integer"),
        ("height", "٤٨", "height: '٤٨' is not an integer"),
        ("guidance_scale", "1_0.5", "guidance_scale: '1_0.5' is not a number"),
        ("seed", [1, 2**63], "seed: 9223372036854775808 must be at least 0 and at most 9223372036854775807"),
        ("seed", range(10**12), "seed: takes at most 100000 values"),
        ("seed", "1," * 3_000_000, "seed: takes at most 100000 values"),
        ("component_paths", "a=b," * 10, "must be pairs"),
        ("component_paths", "{" * 100_000, "is not a JSON object"),
        ("x" * 100_000, 1, "no such key"),
        ("a\nb", 1, "a b: no such key"),
    ],
    ids=lambda value: brief(value)[:30],
)  # fmt: skip
def test_odd_values_from_a_program(name, value, words):
    with pytest.raises(UserError) as caught:
        config.options({name: value})
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_seed_whose_outputs_would_go_past_the_last_one():
    last = 2**63 - 1
    made = config.options({"seed": last - 1, "num_outputs": 2}).sampling
    assert config.seeds(made, 0) == (last - 1, last)
    assert config.seeds(config.options({"seed": config.seeds(made, 0)[-1]}).sampling, 0) == (last,)
    with pytest.raises(UserError, match=f"^seed: {last} and 2 outputs .* at most {last - 1}"):
        config.options({"seed": last, "num_outputs": 2})


def test_values_of_any_type_stay_as_they_are():
    given = {"guidance": 2.5, "sizes": [1, 2], "mode": {"fast": True}}
    assert values.read("diffusers_kwargs", Mapping[str, object], given) == given
    assert config.options({"prompt": "a", "diffusers_kwargs": given}).sampling.diffusers_kwargs == given
