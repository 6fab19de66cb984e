"""The shipped model's images in one loop: what they are beside others, who goes first, and what an error
leaves.
"""

import gc
import time
import weakref

import pytest
import torch

from tinydiff import config
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit
from tinydiff.runtime.background import Background
from tinydiff.runtime.continuous import Continuous, make_slot
from tinydiff.runtime.step_times import StepTimes
from tinydiff.sampling.compile import graph_count

BOUND = 2e-4
"""How far an image's tokens, of deviation about 1, may lie from those of the same image alone: the kernels
of larger matrices add in another order."""


@pytest.fixture(scope="module")
def model():
    return blueprint.load(blueprint.read(config.ModelOptions()))


def slots_for(model, job="a", priority=0, owner="", **fields):
    [request] = admit(
        model.blueprint,
        config.options({"prompt": "a red circle", "num_inference_steps": 4, **fields}).sampling,
    )
    conditioning = pipeline.condition(model, request)
    return [
        make_slot(model, request, conditioning, job, i, priority, owner=owner)
        for i in range(len(request.seeds))
    ]


class EveryImage(StepTimes):
    """All images run together, whatever was measured."""

    def batch_size(self, kind, waiting):
        return min(waiting, self._limits.get(kind, waiting))


def loop_of(model, step_times=StepTimes):
    return Continuous(step_times())


def run(loop, arrivals=()):
    """Run steps until no image is left: (the jobs in the order in which their images ended, the batch sizes).

    arrivals: (step, slots) to add on the way.
    """
    left, sizes, waiting = [], [], list(arrivals)
    for step in range(200):
        for one in [s for at, slots in waiting if at == step for s in slots]:
            loop.add(one)
        if not loop.slots:
            break
        stepped = loop.step()
        assert stepped.error is None
        sizes.append(len(stepped.slots))
        left += [one.job for one in stepped.done]
    return left, sizes


def alone(model, loop=None, **fields):
    loop, [one] = loop or loop_of(model), slots_for(model, **fields)
    loop.add(one)
    run(loop)
    return one.to_image_tokens(one.denoising.state.x)


def test_an_image_does_not_depend_on_its_batch(model):
    asked = [
        {"seed": 1, "prompt": "a green star", "num_inference_steps": 6, "guidance_scale": 2.5},
        {
            "seed": 2,
            "prompt": "a large blue square on a white background",
            "num_inference_steps": 3,
            "guidance_scale": 4.0,
        },
        {"seed": 3, "prompt": "ring", "num_inference_steps": 8, "guidance_scale": 1.5, "flow_shift": 2.0},
    ]
    loop, slots = (
        loop_of(model, EveryImage),
        [slots_for(model, job=str(i), **fields)[0] for i, fields in enumerate(asked)],
    )
    _, sizes = run(loop, [(0, slots[:1]), (1, slots[1:])])
    assert max(sizes) == 3
    for one, fields in zip(slots, asked, strict=True):
        assert (one.to_image_tokens(one.denoising.state.x) - alone(model, **fields)).abs().max() < BOUND


def test_videos_and_images_take_turns(model):
    loop = loop_of(model)
    [clip] = slots_for(model, "clip", num_frames=17, num_inference_steps=3)
    left, sizes = run(loop, [(0, [clip, *slots_for(model, "picture", num_inference_steps=3)])])
    assert left == ["picture", "clip"] and set(sizes) == {1}


def test_higher_priority_goes_first(model):
    loop = loop_of(model)
    left, _ = run(
        loop, [(0, slots_for(model, "low", num_frames=5)), (1, slots_for(model, "high", priority=1))]
    )
    assert left == ["high", "low"]


def test_an_image_of_another_key_joins_at_once_and_is_what_it_is_alone(model, monkeypatch):
    """One of the four that go on together pauses for it, between two of its steps, and loses nothing."""
    monkeypatch.setattr("tinydiff.runtime.continuous.MAX_CALL_SECONDS", 0.0)  # one step at a time
    loop = loop_of(model, EveryImage)
    loop.max_batch = 4
    large, [small] = (
        slots_for(model, "large", owner="a", num_outputs_per_prompt=4),
        slots_for(model, "small", owner="b", seed=7),
    )
    left, sizes = run(loop, [(0, large), (1, [small])])
    assert left == ["large"] * 3 + ["small", "large"]
    assert sizes == [
        4,
        4,
        4,
        4,
        2,
        1,
        1,
    ]  # the fifth is the last of its 4 steps, and the second of the one that paused
    for one, seed in [(small, 7), *zip(large, (42, 43, 44, 45), strict=True)]:
        assert (one.to_image_tokens(one.denoising.state.x) - alone(model, seed=seed)).abs().max() < BOUND


def test_a_key_that_asks_for_many_forms_has_no_more_of_the_device(model):
    """Every step takes a second; no image is done while it is looked at."""
    loop, steps = loop_of(model), {"a": 0, "b": 0}
    clock = iter(range(1000))
    for size in (64, 80, 96):
        loop.add(slots_for(model, f"a{size}", owner="a", height=size, width=64, num_inference_steps=30)[0])
    loop.add(slots_for(model, "b", owner="b", height=128, width=64, num_inference_steps=30)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinydiff.runtime.continuous.time.perf_counter", lambda: next(clock))
        for _ in range(24):
            stepped = loop.step()
            steps[stepped.slots[0].owner] += stepped.steps
    assert steps == {"a": 12, "b": 12}


def test_an_image_that_is_taken_out_is_not_finished(model):
    loop = loop_of(model)
    for one in (*slots_for(model, "stays"), *slots_for(model, "goes")):
        loop.add(one)
    loop.step()
    loop.leave("goes")
    assert run(loop)[0] == ["stays"]


def broken_above(loop, most, error):
    """Steps of more than `most` images fail."""
    whole = loop.slots[0].denoising.denoise

    def denoise(network, state, *rest):
        if state.x.shape[0] > most:
            raise error
        return whole(network, state, *rest)

    for one in loop.slots:
        one.denoising = one.denoising._replace(denoise=denoise)


def test_a_batch_too_large_for_memory_goes_on_in_smaller_ones(model):
    loop = loop_of(model, EveryImage)
    for one in slots_for(model, num_outputs_per_prompt=4):
        loop.add(one)
    broken_above(loop, 2, torch.OutOfMemoryError("CUDA out of memory"))
    left, sizes = run(loop)
    assert left == ["a"] * 4 and sizes[:3] == [4, 3, 2]


def test_an_image_that_fails_alone_is_handed_back_with_its_error(model):
    loop = loop_of(model)
    for one in slots_for(model):
        loop.add(one)
    broken_above(loop, 0, MemoryError("no more"))
    stepped = loop.step()
    assert isinstance(stepped.error, MemoryError) and not loop.slots


def test_clean_tokens_on_the_way_are_those_of_the_last_step(model):
    loop, slots = loop_of(model, EveryImage), slots_for(model, num_outputs_per_prompt=2)
    for one in slots:
        loop.add(one)
    loop.step()
    for one in slots:
        clean, at = loop.clean(one), loop.steps_done(one)
        assert at == 1 and clean.shape == one.denoising.state.x.shape
    assert not torch.equal(loop.clean(slots[0]), loop.clean(slots[1]))


def test_the_loop_halts_where_an_image_is_looked_at(model):
    """Steps of a moment go together, but for those that someone wants to see."""
    [request] = admit(
        model.blueprint, config.options({"prompt": "a red circle", "num_inference_steps": 10}).sampling
    )
    one = make_slot(model, request, pipeline.condition(model, request), "a", 0, previews=3)
    assert one.preview_steps == (3, 5, 8)
    loop, seen = loop_of(model), []
    loop.step_times.record((one.denoising.state.x.shape[1], len(one.denoising.network.branches)), 1, 1e-6)
    loop.add(one)
    while loop.slots:
        loop.step()
        seen.append(loop.steps_done(one))
    assert set(one.preview_steps) <= set(seen)


def test_images_of_one_structure_share_a_graph(model):
    """Another one has fresh noise, fixed tokens or a step cache."""
    [one], [other] = slots_for(model), slots_for(model, num_inference_steps=3)
    background, image = Background(beside=False), one.denoising
    for each in (image, image, other.denoising):
        assert background.best(compiled, each) is compiled
        assert background.progress() == (1, 1)
    for count, field in enumerate(("noise", "fixed", "limits"), 2):
        background.best(compiled, image._replace(inputs=image.inputs._replace(**{field: ()})))
        assert background.progress() == (count, count)


def compiled(*_):
    raise AssertionError("only its place is asked for")


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_what_is_compiled_beside_serves_all_that_comes_after():
    """Forms are made eagerly until their graph is ready; then nothing compiles again: sizes, steps, guidance,
    company. A server does the same in tests/serve/test_server.py.
    """
    model = blueprint.load(blueprint.read(config.ModelOptions(enable_torch_compile=True)))
    loop = loop_of(model, EveryImage)
    for count in (1, 2):
        for one in slots_for(model, num_outputs_per_prompt=count, num_inference_steps=2):
            loop.add(one)
        run(loop)
    eager = alone(model, loop, seed=5, num_inference_steps=3)
    deadline = time.monotonic() + 900
    while loop.background.progress() != (2, 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    made = graph_count()
    compiled = alone(model, loop, seed=5, num_inference_steps=3)
    for one in [
        one
        for k in range(5)
        for one in slots_for(model, f"image {k}", seed=k, num_inference_steps=2 + k, guidance_scale=1.5 + k)
    ]:
        loop.add(one)
    for one in slots_for(model, "wide", height=96, width=160, num_outputs_per_prompt=3):
        loop.add(one)
    run(loop)
    assert graph_count() == made
    assert (compiled - eager).abs().max() < BOUND


def test_the_last_image_that_leaves_holds_nothing(model):
    loop, [one] = loop_of(model), slots_for(model)
    loop.add(one)
    loop.step()
    state = weakref.ref(loop._batch[1].joined.state.x)
    loop.leave("a")
    del one
    gc.collect()
    assert state() is None
