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
from tinydiff.runtime.continuous import Continuous, sitting
from tinydiff.runtime.pace import Pace
from tinydiff.sampling.compile import graph_count

BOUND = 2e-4
"""How far an image's tokens, of deviation about 1, may lie from those of the same image alone: the kernels
of larger matrices add in another order."""


@pytest.fixture(scope="module")
def model():
    return blueprint.load(blueprint.read(config.ModelOptions()))


def begun(model, owner="a", priority=0, key="", **fields):
    [request] = admit(
        model.blueprint,
        config.options({"prompt": "a red circle", "num_inference_steps": 4, **fields}).sampling,
    )
    conditioning = pipeline.condition(model, request)
    return [
        sitting(model, request, conditioning, owner, i, priority, key=key) for i in range(len(request.seeds))
    ]


class Together(Pace):
    """As many as there are, whatever was measured."""

    def size(self, form, waiting):
        return min(waiting, self._most.get(form, waiting))


def loop_of(model, pace=Pace):
    return Continuous(model.nets["transformer"].family, pace())


def run(loop, arrivals=()):
    """Steps until nothing is left; arrivals: (step, sittings) to add on the way. The owners' order of
    leaving, and batch sizes seen.
    """
    left, sizes, waiting = [], [], list(arrivals)
    for step in range(200):
        for one in [s for at, sittings in waiting if at == step for s in sittings]:
            loop.add(one)
        if not loop.sittings:
            break
        stepped = loop.step()
        assert stepped.error is None
        sizes.append(len(stepped.sittings))
        left += [one.owner for one in stepped.done]
    return left, sizes


def alone(model, loop=None, **fields):
    loop, [one] = loop or loop_of(model), begun(model, **fields)
    loop.add(one)
    run(loop)
    return one.shown(one.seat.state.x)


def test_a_picture_does_not_depend_on_its_company(model):
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
    loop, sittings = (
        loop_of(model, Together),
        [begun(model, owner=str(i), **fields)[0] for i, fields in enumerate(asked)],
    )
    _, sizes = run(loop, [(0, sittings[:1]), (1, sittings[1:])])
    assert max(sizes) == 3
    for one, fields in zip(sittings, asked, strict=True):
        assert (one.shown(one.seat.state.x) - alone(model, **fields)).abs().max() < BOUND


def test_clips_and_pictures_take_turns(model):
    loop = loop_of(model)
    [clip] = begun(model, "clip", num_frames=17, num_inference_steps=3)
    left, sizes = run(loop, [(0, [clip, *begun(model, "picture", num_inference_steps=3)])])
    assert left == ["picture", "clip"] and set(sizes) == {1}


def test_higher_priority_goes_first(model):
    loop = loop_of(model)
    left, _ = run(loop, [(0, begun(model, "low", num_frames=5)), (1, begun(model, "high", priority=1))])
    assert left == ["high", "low"]


def test_an_image_of_another_key_joins_at_once_and_is_what_it_is_alone(model, monkeypatch):
    """One of the four that go on together pauses for it, between two of its steps, and loses nothing."""
    monkeypatch.setattr("tinydiff.runtime.continuous.MOMENT", 0.0)  # one step at a time
    loop = loop_of(model, Together)
    loop.most = 4
    large, [small] = (
        begun(model, "large", key="a", num_outputs_per_prompt=4),
        begun(model, "small", key="b", seed=7),
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
        assert (one.shown(one.seat.state.x) - alone(model, seed=seed)).abs().max() < BOUND


def test_a_key_that_asks_for_many_forms_has_no_more_of_the_device(model):
    """Every step takes a second; no image is done while it is looked at."""
    loop, steps = loop_of(model), {"a": 0, "b": 0}
    clock = iter(range(1000))
    for size in (64, 80, 96):
        loop.add(begun(model, f"a{size}", key="a", height=size, width=64, num_inference_steps=30)[0])
    loop.add(begun(model, "b", key="b", height=128, width=64, num_inference_steps=30)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinydiff.runtime.continuous.time.perf_counter", lambda: next(clock))
        for _ in range(24):
            stepped = loop.step()
            steps[stepped.sittings[0].key] += stepped.made
    assert steps == {"a": 12, "b": 12}


def test_who_is_taken_out_is_not_finished(model):
    loop = loop_of(model)
    for one in (*begun(model, "stays"), *begun(model, "goes")):
        loop.add(one)
    loop.step()
    loop.leave("goes")
    assert run(loop)[0] == ["stays"]


def broken_above(loop, most, error):
    """Steps of more than `most` images fail."""
    whole = loop.sittings[0].seat.denoise

    def denoise(network, state, *rest):
        if state.x.shape[0] > most:
            raise error
        return whole(network, state, *rest)

    for one in loop.sittings:
        one.seat = one.seat._replace(denoise=denoise)


def test_a_batch_too_large_for_memory_goes_on_in_smaller_ones(model):
    loop = loop_of(model, Together)
    for one in begun(model, num_outputs_per_prompt=4):
        loop.add(one)
    broken_above(loop, 2, torch.OutOfMemoryError("CUDA out of memory"))
    left, sizes = run(loop)
    assert left == ["a"] * 4 and sizes[:3] == [4, 3, 2]


def test_a_picture_that_fails_alone_is_handed_back_with_its_error(model):
    loop = loop_of(model)
    for one in begun(model):
        loop.add(one)
    broken_above(loop, 0, MemoryError("no more"))
    stepped = loop.step()
    assert isinstance(stepped.error, MemoryError) and not loop.sittings


def test_clean_tokens_on_the_way_are_those_of_the_last_step(model):
    loop, sittings = loop_of(model, Together), begun(model, num_outputs_per_prompt=2)
    for one in sittings:
        loop.add(one)
    loop.step()
    for one in sittings:
        clean, at = loop.clean(one)
        assert at == 1 and clean.shape == one.seat.state.x.shape
    assert not torch.equal(loop.clean(sittings[0])[0], loop.clean(sittings[1])[0])


def test_the_loop_halts_where_a_picture_is_looked_at(model):
    """Steps of a moment go together, but for those that someone wants to see."""
    [request] = admit(
        model.blueprint, config.options({"prompt": "a red circle", "num_inference_steps": 10}).sampling
    )
    one = sitting(model, request, pipeline.condition(model, request), "a", 0, looks=3)
    assert one.looks == (3, 5, 8)
    loop, seen = loop_of(model), []
    loop.pace.measured((one.seat.state.x.shape[1], len(one.seat.network.branches)), 1, 1e-6)
    loop.add(one)
    while loop.sittings:
        loop.step()
        seen.append(loop.clean(one)[1])
    assert set(one.looks) <= set(seen)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_what_is_compiled_beside_serves_all_that_comes_after():
    """Forms are made eagerly until their graph is ready; then nothing compiles again: sizes, steps, guidance,
    company.
    """
    model = blueprint.load(blueprint.read(config.ModelOptions(enable_torch_compile=True)))
    loop = loop_of(model, Together)
    for count in (1, 2):
        for one in begun(model, num_outputs_per_prompt=count, num_inference_steps=2):
            loop.add(one)
        run(loop)
    eager = alone(model, loop, seed=5, num_inference_steps=3)
    deadline = time.monotonic() + 300
    while loop.background.progress() != (2, 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    made = graph_count()
    compiled = alone(model, loop, seed=5, num_inference_steps=3)
    for one in [
        one
        for k in range(5)
        for one in begun(model, seed=k, num_inference_steps=2 + k, guidance_scale=1.5 + k)
    ]:
        loop.add(one)
    for one in begun(model, height=96, width=160, num_outputs_per_prompt=3):
        loop.add(one)
    run(loop)
    assert graph_count() == made
    assert (compiled - eager).abs().max() < BOUND


def test_the_last_picture_that_leaves_holds_nothing(model):
    loop, [one] = loop_of(model), begun(model)
    loop.add(one)
    loop.step()
    state = weakref.ref(loop._joined[1].whole.state.x)
    loop.leave("a")
    del one
    gc.collect()
    assert state() is None
