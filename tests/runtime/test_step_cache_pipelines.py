"""The step cache in whole pipelines: against the package cache-dit on diffusers' pipeline, streamed, and what
a request may ask for.
"""

import cache_dit
import diffusers
import numpy as np
import pytest

from tests.parity import draw
from tests.runtime import compare
from tests.runtime.folders import load
from tests.runtime.qwen_folders import Z, build
from tinydiff import config
from tinydiff.config import SamplingOptions
from tinydiff.models import qwen_image
from tinydiff.records import StepCache, UserError
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit

STEPS, HEIGHT, WIDTH = 12, 64, 96
PROMPT, NEGATIVE = "A red  circle & a Größe 円", "blurry, the left of"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen") / "model"
    return build(diffusers.QwenImagePipeline, path), load(path)


def request(model, **fields):
    more = {"negative_prompt": NEGATIVE, "height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS}
    return compare.request_for(model, prompt=PROMPT, **more | fields)


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_tokens_after_every_step_equal_those_of_cache_dit(qwen, scale):
    pipe, model = qwen
    start, counts = draw(1, Z, 1, HEIGHT // 8, WIDTH // 8, seed=9), set()
    for threshold, warmup, most in ((0.03, 2, 2), (0.2, 1, 3), (1.0, 3, 1)):
        settings = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=warmup,
            residual_diff_threshold=threshold,
            max_continuous_cached_steps=most,
            enable_separate_cfg=scale > 1,
            cfg_diff_compute_separate=False,
        )
        cache_dit.enable_cache(pipe, cache_config=settings)
        try:
            theirs, _ = compare.recorded(
                pipe,
                prompt=PROMPT,
                negative_prompt=NEGATIVE,
                num_inference_steps=STEPS,
                height=HEIGHT,
                width=WIDTH,
                true_cfg_scale=scale,
                latents=qwen_image.patchify(start, (1, 2, 2)),
            )
            summary = cache_dit.summary(pipe, logging=False)[0]
        finally:
            cache_dit.disable_cache(pipe)
        asked = request(
            model,
            guidance_scale=scale,
            cache_dit_params={"Fn": 1, "rdt": threshold, "warmup": warmup, "mc": most},
        )
        conditioning = pipeline.condition(model, asked)
        ours = list(pipeline.denoise(model, conditioning, 0, [start]))
        compare.same_steps(ours, theirs)
        counts.add(len(summary.cached_steps))
    assert len(counts) > 1, "the settings should differ in how many steps they reuse"


def test_streamed_blocks_give_the_same():
    """Blocks that are left out are not fetched either."""
    frames = []
    for streamed in (False, True):
        model = blueprint.load(blueprint.read(config.ModelOptions(dit_layerwise_offload=streamed)))
        [asked] = admit(
            model.blueprint, SamplingOptions(prompt=("a red circle",), num_frames=1, enable_cache_dit=True)
        )
        made = pipeline.run(model, asked, config.NoProgress())
        assert made.parameters["enable_cache_dit"] is True
        assert made.parameters["cache_dit_params"] == {"Fn": 1, "warmup": 4, "rdt": 0.24, "mc": 3}
        frames.append(made.frames[0])
    assert np.array_equal(*frames)


# --- what a request may ask for


def settled(model, **fields):
    [asked] = admit(model.blueprint, SamplingOptions(prompt=("a fox",), height=64, width=64, **fields))
    return asked.step_cache


def test_settings_have_the_names_of_sglang_and_of_cache_dit(qwen):
    _, model = qwen
    assert settled(model) is None
    assert settled(model, enable_cache_dit=True) == StepCache(1, 4, 0.24, 3)
    assert settled(model, cache_dit_params={"rdt": 0.1, "mc": -1, "warmup": 0}) == StepCache(1, 0, 0.1, -1)
    long = {"max_warmup_steps": 2, "residual_diff_threshold": 1, "Fn_compute_blocks": 1}
    assert settled(model, cache_dit_params=long) == StepCache(1, 2, 1, 3)


def test_the_environment_switches_it_on_and_a_request_off(qwen, monkeypatch):
    _, model = qwen
    monkeypatch.setenv("SGLANG_CACHE_DIT_ENABLED", "true")
    monkeypatch.setenv("SGLANG_CACHE_DIT_RDT", "0.5")
    assert settled(model) == StepCache(threshold=0.5)
    assert settled(model, cache_dit_params={"rdt": 0.1}) == StepCache(threshold=0.1)
    assert settled(model, enable_cache_dit=False) is None
    monkeypatch.setenv("SGLANG_CACHE_DIT_TAYLORSEER", "true")
    with pytest.raises(UserError, match="enable_taylorseer is for --backend diffusers"):
        settled(model)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"warmups": 1}, r"'warmups' is none of Fn, warmup, rdt and mc; did you mean 'warmup'\?"),
        (
            {"Fn": 2},
            "Fn is 2; the transformer of Qwen/Qwen-Image has 2 blocks, and one at least must",
        ),
        ({"Fn": 0}, "Fn is 0; allowed are the integers from 1 to 1000"),
        ({"mc": 0.5}, "mc is 0.5; allowed are the integers from 0 to 1000, and -1 sets no limit"),
        ({"rdt": 1.5}, "rdt is 1.5; allowed is 0 to 1"),
        ({"Bn": 2}, "Bn is for --backend diffusers"),
        ({"warmup": True}, "warmup is True; give a number"),
    ],
)
def test_a_mistake_is_one_sentence(qwen, fields, said):
    with pytest.raises(UserError, match=f"^cache_dit_params: {said}"):
        settled(qwen[1], cache_dit_params=fields)


def test_settings_without_the_cache_are_a_contradiction(qwen):
    with pytest.raises(UserError, match=r"^cache_dit_params: .* and enable_cache_dit is false"):
        settled(qwen[1], enable_cache_dit=False, cache_dit_params={"rdt": 0.1})
