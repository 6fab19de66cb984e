"""Pipelines of several loops, and outputs of several kinds of latents, with the shipped model's network.

A recipe made for this test divides a video's latents into two kinds, the first frame and the others, whose
tokens side by side are those of the whole video. So an output of two kinds must be the video, to the bit.
"""

from dataclasses import replace

import numpy
import pytest
import torch

from tinydiff import config
from tinydiff.config import NoProgress
from tinydiff.models.recipe import Latents, LoopInputs, Stage
from tinydiff.ops.patch import patchify, unpatchify
from tinydiff.parallel.plan import Group, Plan
from tinydiff.records import Guidance, Schedule, Sound
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit
from tinydiff.runtime.continuous import Continuous, make_slot
from tinydiff.sampling import loop, noise

ASKED = {
    "prompt": "a red circle",
    "num_frames": 5,
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "seed": 5,
}
FINE = Schedule(steps=2, sigmas=(0.6, 0.3))


@pytest.fixture(scope="module")
def plain():
    return blueprint.load(blueprint.read(config.ModelOptions()))


def with_recipe(model, recipe):
    """The model with another recipe in place of its own, which is passed to it."""
    net = model.denoiser
    name = model.blueprint.row.pipeline
    own = net.family.pipelines[name]
    family = replace(
        net.family, pipelines={name: lambda c, context, request: recipe(c, context, request, own)}
    )
    return replace(model, nets={**model.nets, "transformer": replace(net, family=family)})


def request_of(model):
    [request] = admit(model.blueprint, config.options(ASKED).sampling)
    return replace(request, output=replace(request.output, sound=True))


def as_sound(latents):
    return Sound(latents.flatten(2)[0].T.numpy(), 24000)


def divided(c, inputs):
    """The inputs with the first latent frame and the others as two kinds."""
    [whole] = inputs.latents
    channels, frames, height, width = whole.size

    def kind(frames, decode=None):
        return Latents(
            size=(channels, frames, height, width),
            pack=lambda x: patchify(x, c.patch_size),
            unpack=lambda x: unpatchify(x, c.patch_size, (frames, height, width)),
            decode=decode,
        )

    return replace(inputs, latents=(kind(1), kind(frames - 1, as_sound)))


def two_kinds(c, context, request, own):
    return divided(c, own(c, context, request))


def two_stages(c, context, request, own):
    """Half the size, then the whole size from what was made, with a schedule of its own and no guidance."""
    half = replace(request, output=replace(request.output, height=32, width=32))
    fine = replace(request, schedule=FINE, guidance=Guidance())
    coarse, inputs = own(c, context, half), divided(c, own(c, context, fine))
    return Stage(half, divided(c, coarse)), Stage(
        fine, inputs, lambda before, kinds: replace(inputs, start=inputs.pack(larger(kinds)))
    )


def larger(kinds):
    return [torch.nn.functional.interpolate(x, scale_factor=(1, 2, 2)) for x in kinds]


def test_kinds_of_latents_are_one_tensor_in_the_loop(plain):
    model = with_recipe(plain, two_kinds)
    request = request_of(model)
    told, whole = pipeline.condition(model, request), pipeline.condition(plain, request)
    kinds = told.stages[0].inputs.latents
    assert [kind.tokens for kind in kinds] == [
        x.shape[1]
        for x in (
            kinds[0].pack(torch.zeros(1, *kinds[0].size)),
            kinds[1].pack(torch.zeros(1, *kinds[1].size)),
        )
    ]
    drawn = noise.drawn(5, [(1, *kind.size) for kind in kinds])
    [video] = whole.stages[0].inputs.unpack(told.stages[0].inputs.pack(drawn))
    assert torch.equal(video, torch.cat(drawn, 2))
    *_, got = pipeline.denoise(model, told, 5)
    *_, want = pipeline.denoise(plain, whole, 5, [video])
    assert torch.equal(got, want)
    [latents] = whole.stages[0].inputs.unpack(want)
    made = pipeline.finish(model, request, told.stages[-1].inputs, got)
    assert torch.equal(made.latents, latents[:, :, :1]) and made.frames.shape[0] == 1
    assert made.sound is not None and made.sound.rate == 24000
    assert numpy.array_equal(made.sound.samples, as_sound(latents[:, :, 1:]).samples)


def by_hand(plain, request):
    """The two stages of `two_stages`, each as a loop of its own."""
    half = replace(request, output=replace(request.output, height=32, width=32))
    fine = replace(request, schedule=FINE, guidance=Guidance())
    first, second = (pipeline.condition(plain, each).stages[0] for each in (half, fine))
    [coarse], [fine_kind] = first.inputs.latents, second.inputs.latents
    shapes = [(1, c, f, h, w) for c, frames, h, w in (coarse.size, fine_kind.size) for f in (1, frames - 1)]
    drawn = noise.drawn(5, shapes)
    *_, tokens = pipeline.denoise(plain, pipeline.Conditioning((first,)), 5, [torch.cat(drawn[:2], 2)])
    clean = fine_kind.pack(
        torch.cat(larger([coarse.unpack(tokens)[:, :, :1], coarse.unpack(tokens)[:, :, 1:]]), 2)
    )
    x = torch.lerp(clean, fine_kind.pack(torch.cat(drawn[2:], 2)), second.table.sigmas[0].item())
    *_, last = loop.run(pipeline.denoiser(plain, second, False), second.table, x, second.experts, chunk=1)
    return last.x


def test_a_stage_starts_from_what_the_stage_before_made(plain):
    model = with_recipe(plain, two_stages)
    request = request_of(model)
    told = pipeline.condition(model, request)
    assert told.steps == 3 + 2 and [len(stage.inputs.branches) for stage in told.stages] == [2, 1]
    steps = list(pipeline.denoise(model, told, 5))
    assert len(steps) == told.steps and [x.shape[1] for x in steps[2:4]] == [
        steps[0].shape[1],
        4 * steps[0].shape[1],
    ]
    assert torch.equal(steps[-1], by_hand(plain, request))


def test_a_result_has_the_sound_and_the_steps_of_all_stages(plain):
    result = pipeline.run(with_recipe(plain, two_stages), request_of(plain), NoProgress())
    [sound] = result.sounds
    assert len(result.step_seconds) == 5 and sound.samples.dtype == numpy.float32
    assert pipeline.run(plain, replace(request_of(plain), schedule=Schedule(1)), NoProgress()).sounds == ()


def test_outputs_of_several_stages_share_the_loop_of_a_server(plain):
    """Each goes on to its next stage by itself, is looked at on its way, and leaves after the last."""
    model = with_recipe(plain, two_stages)
    request = replace(request_of(model), seeds=(5, 6))
    told, together = pipeline.condition(model, request), Continuous()
    slots = [make_slot(model, request, told, "job", i, previews=4) for i in range(2)]
    for slot in slots:
        together.add(slot)
    seen, done = set(), []
    while together.slots:
        done += together.step(2).done
        seen.add(together.steps_done(slots[0]))
    assert done == slots and seen >= {1, 2, 3, 4} and slots[0].preview_steps == (1, 2, 3, 4)
    for slot in slots:
        *_, alone = pipeline.denoise(model, told, slot.seed)
        assert (slot.to_image_tokens(slot.denoising.state.x) - alone).abs().max() < 2e-4


def test_a_stage_that_cannot_begin_ends_its_output_alone(plain):
    def failing(c, context, request, own):
        coarse, fine = two_stages(c, context, request, own)

        def after(before, kinds):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return coarse, replace(fine, after=after)

    model = with_recipe(plain, failing)
    request, together = request_of(model), Continuous()
    bad = make_slot(model, request, pipeline.condition(model, request), "bad", 0)
    good = make_slot(plain, request, pipeline.condition(plain, request), "good", 0)
    together.add(bad), together.add(good)
    stepped = [together.step() for _ in range(20) if together.slots]
    errors = [(step.slots, step.error) for step in stepped if step.error]
    assert [(slots, type(error)) for slots, error in errors] == [((bad,), torch.OutOfMemoryError)]
    assert [slot for step in stepped for slot in step.done] == [good]


def test_one_stage_is_what_a_recipe_of_inputs_alone_says(plain):
    [stage] = pipeline.condition(plain, request_of(plain)).stages
    assert isinstance(stage.inputs, LoopInputs) and stage.stage.after is None
    assert stage.stage.denoisers == ("transformer", "transformer_2") and len(stage.inputs.latents) == 1


def test_all_ranks_of_cfg_run_a_stage_without_guidance(plain):
    """Each rank has its own branch in the guided stage; in the other one it has the only branch, and sends
    nothing.
    """
    model = with_recipe(plain, two_stages)
    net = model.nets["transformer"]
    for rank in (0, 1):
        shared = replace(net, plan=Plan(groups=(("cfg", Group("none", 2, rank)),)))
        split = replace(model, nets={**model.nets, "transformer": shared})
        request = request_of(split)
        told, alone = pipeline.condition(split, request), pipeline.condition(model, request)
        guided, fine = told.stages
        assert len(guided.experts(0).branches) == len(fine.experts(0).branches) == 1
        before = [
            torch.zeros(1, *size) for size in guided.sizes
        ]  # what the first stage made does not matter here
        last = [
            loop.advance(pipeline.begin(each, one, 5, 1, (guided.inputs, before)).denoising, 2).state.x
            for each, one in ((split, told), (model, alone))
        ]
        assert torch.equal(*last)
