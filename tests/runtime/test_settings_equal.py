"""Every family with other settings of its scheduler and its guidance than the released ones: the reference's
latents, or one sentence.

A row changes the scheduler's file of a tiny directory, or what is asked, runs diffusers' pipeline and
tinydiff from one start, and compares the latents after every step. A setting that is not reproduced is
refused; none is read as something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.z_image import pipeline_z_image

from tests.parity import close, draw
from tests.runtime import folders, qwen_folders
from tests.runtime import test_ernie_pipelines as ernie
from tests.runtime import test_flux2_pipelines as flux2
from tests.runtime import test_flux_pipelines as flux
from tests.runtime import test_ovis_pipelines as ovis
from tests.runtime import test_sd3_pipelines as sd3
from tests.runtime import test_z_image_pipelines as z_image
from tests.runtime.compare import exact, widened
from tinydiff.config import ModelOptions, SamplingOptions
from tinydiff.records import Request, UserError
from tinydiff.runtime import blueprint, pipeline
from tinydiff.runtime.admit import admit

PROMPT, STEPS, NEGATIVE = "A red circle", 3, {"negative_prompt": "blurry, left of"}


OPTIONS = {entry.name for entry in fields(SamplingOptions)}


@dataclass(frozen=True)
class Family:
    """How the reference's pipeline is built, and the latents that it is given: as tokens, as an image's [1,
    C, H, W], or as a clip's.
    """

    build: Callable[[Path], Any]
    size: tuple[int, int]
    form: str = "tokens"
    given: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments, of the reference and, where it has the option, of tinydiff."""
    model_id: str | None = None


FAMILIES = {
    "Wan": Family(
        lambda folder: folders.build(folders.VARIANTS["T2V"], folder), (32, 48), "clip",
        NEGATIVE | {"num_frames": 5, "guidance_scale": 4.0},
    ),
    "FLUX.1": Family(flux.build, (12, 20)),
    "FLUX.1 schnell": Family(lambda folder: flux.build(folder, guided=False), (12, 20),
    given={"max_sequence_length": 256}),
    "FLUX.2 dev": Family(flux2.dev, (64, 96), "image"),
    "FLUX.2 klein": Family(
        lambda folder: flux2.klein(folder, False), (64, 96), "image",
        model_id="FLUX.2-klein-base-4B",
    ),
    "Ovis": Family(ovis.build, (12, 20)),
    "Qwen-Image": Family(lambda folder: qwen_folders.build(diffusers.QwenImagePipeline, folder), (64, 96),
    given=NEGATIVE),
    "Z-Image": Family(z_image.build, (12, 20), "image", {"guidance_scale": 2.0}),
    "SD3": Family(lambda folder: sd3.build("3.5 medium", folder), (12, 20), "image"),
    "ERNIE": Family(ernie.build, (64, 96), "image"),
}  # fmt: skip


class Made(NamedTuple):
    """Latents of every step, tinydiff's and the reference's, then the images of both."""

    ours: list[torch.Tensor]
    theirs: list[torch.Tensor]
    frames: np.ndarray
    images: np.ndarray


@dataclass(frozen=True)
class Both:
    """A family's two sides, made once; the directory's scheduler is changed for each row."""

    family: Family
    folder: Path
    pipe: Any
    model: Any
    own: Mapping[str, Any]
    """The scheduler that the directory was saved with."""

    def scheduled(self, config: Mapping[str, Any], reference: bool = True) -> Both:
        """Both sides with this scheduler, or tinydiff's alone."""
        if reference:
            self.pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(dict(config))
        (self.folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        read = blueprint.read(ModelOptions(model_path=str(self.folder), model_id=self.family.model_id))
        return replace(self, model=replace(self.model, blueprint=read))

    def given(self, given: Mapping[str, Any]) -> dict[str, Any]:
        height, width = self.family.size
        return {"height": height, "width": width, "num_inference_steps": STEPS} | self.family.given | given

    def request(self, given: Mapping[str, Any]) -> Request:
        options = {name: value for name, value in self.given(given).items() if name in OPTIONS}
        [request] = admit(self.model.blueprint, SamplingOptions(**{"prompt": (PROMPT,)} | options))
        return request

    def run(self, given: Mapping[str, Any], prompt: str = PROMPT, seed: int = 9) -> Made:
        """Both sides, with these arguments and one start."""
        request = self.request(given | {"prompt": (prompt,)})
        told = pipeline.condition(self.model, request)
        start = draw(1, *told.stages[0].inputs.latents[0].size, seed=seed)
        latents = {
            "tokens": lambda: told.stages[0].inputs.latents[0].pack(start),
            "image": lambda: start[:, :, 0],
            "clip": lambda: start,
        }[self.family.form]()
        theirs = []
        with exact(self.pipe):
            made = self.pipe(
                prompt=prompt, **self.given(given), latents=latents, output_type="np",
                callback_on_step_end=lambda pipe, i, t, kept: theirs.append(kept["latents"]) or {},
            )  # fmt: skip
        tokens = list(pipeline.denoise(self.model, told, 0, [start]))
        assert len(tokens) == len(theirs) == request.schedule.steps
        ours = [
            x if y.ndim == 3 else told.stages[0].inputs.latents[0].unpack(x).reshape(y.shape)
            for x, y in zip(tokens, theirs, strict=True)
        ]
        frames = pipeline.decode(
            self.model, request.output, told.stages[0].inputs.latents[0].unpack(tokens[-1])
        )
        return Made(ours, theirs, frames, made.frames[0] if self.family.form == "clip" else made.images)

    def compare(self, given: Mapping[str, Any], prompt: str = PROMPT) -> None:
        """The latents of every step."""
        made = self.run(given, prompt)
        for got, wanted in zip(made.ours, made.theirs, strict=True):
            close(got, wanted)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    made: dict[str, Both] = {}

    def get(name: str) -> Both:
        if name not in made:
            folder = tmp_path_factory.mktemp("family") / "model"
            pipe = FAMILIES[name].build(folder)
            model = folders.load(folder, model_id=FAMILIES[name].model_id)
            made[name] = Both(FAMILIES[name], folder, pipe, model, model.blueprint.scheduler)
        return made[name]

    return get


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    widened(monkeypatch, pipeline_z_image)


def euler(**entries):
    return {"_class_name": "FlowMatchEulerDiscreteScheduler"} | entries


def unipc(**entries):
    return {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    } | entries


POINTS = {"base_shift": 0.3, "max_shift": 1.4, "base_image_seq_len": 10, "max_image_seq_len": 99}
SCHEDULERS = {
    "a shift": euler(shift=4.2),
    "by size": euler(use_dynamic_shifting=True),
    "by size, between other points": euler(use_dynamic_shifting=True, **POINTS),
    "by size, linearly": euler(use_dynamic_shifting=True, time_shift_type="linear", **POINTS),
    "a terminal": euler(shift=2.0, shift_terminal=0.1),
    "by size to a terminal": euler(use_dynamic_shifting=True, shift_terminal=0.1),
    "no entries": euler(),
    "UniPC": unipc(flow_shift=2.4),
    "UniPC by size": unipc(use_dynamic_shifting=True),
    "UniPC to a terminal": unipc(flow_shift=2.4, shift_terminal=0.1),
    "UniPC, what flows do not read": unipc(timestep_spacing="trailing", steps_offset=1, beta_start=0.1),
}
REFUSED = {
    "inverted": euler(invert_sigmas=True),
    "Karras": euler(use_karras_sigmas=True),
    "exponential": euler(use_exponential_sigmas=True),
    "beta": euler(use_beta_sigmas=True),
    "another training schedule": euler(num_train_timesteps=500),
    "UniPC, order 3": unipc(solver_order=3),
    "UniPC, bh1": unipc(solver_type="bh1"),
    "UniPC, no lower order at the end": unipc(lower_order_final=False),
    "UniPC, no corrector": unipc(disable_corrector=[1]),
    "UniPC, smallest sigma last": unipc(final_sigmas_type="sigma_min"),
    "UniPC, Karras": unipc(use_karras_sigmas=True),
    "UniPC, noise as prediction": unipc(predict_x0=False),
    "UniPC, epsilon": unipc(prediction_type="epsilon"),
    "UniPC, thresholding": unipc(thresholding=True),
}
BY_SIZE = {name for name in SCHEDULERS if "by size" in name}
IMPOSSIBLE = {
    "Wan": BY_SIZE,  # the pipeline hands its scheduler no shift
    "ERNIE": BY_SIZE
    | {name for name in SCHEDULERS if "UniPC" in name},  # nor does this; and UniPC cannot read its grid
    "Z-Image": {name for name in SCHEDULERS if "UniPC" in name},  # UniPC cannot read its grid
}
"""Schedulers with which the reference's own pipeline ends in an error."""
ROWS = [
    (name, scheduler)
    for name in FAMILIES
    for scheduler in SCHEDULERS
    if scheduler not in IMPOSSIBLE.get(name, ())
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheduler"), ROWS)
def test_another_scheduler_gives_the_references_latents(name, scheduler, both):
    both(name).scheduled(SCHEDULERS[scheduler]).compare({})


@pytest.mark.parametrize("scheduler", REFUSED)
def test_a_scheduler_that_is_not_reproduced_is_refused(scheduler, both):
    for name in FAMILIES:
        with pytest.raises(UserError) as caught:
            both(name).scheduled(REFUSED[scheduler], reference=False).request({})
        changed = [field for field in REFUSED[scheduler] if caught.value.field == f"scheduler.{field}"]
        assert changed and changed[0] in str(caught.value) and "\n" not in str(caught.value)


EMPTY = {"negative_prompt": ""}
SCALES = [{"guidance_scale": scale} for scale in (0.5, 1.0, 3.0)]
TRUE = [{"true_cfg_scale": scale} for scale in (0.5, 1.0, 2.6)]
GUIDANCE = {
    "Wan": [scale | negative for scale in SCALES for negative in ({}, EMPTY)],
    "FLUX.1": [*SCALES, *TRUE, {"true_cfg_scale": 2.6} | EMPTY, {"true_cfg_scale": 2.6} | NEGATIVE],
    "FLUX.1 schnell": [
        *SCALES,
        *TRUE,
        SCALES[-1] | NEGATIVE,
        TRUE[0] | NEGATIVE,
        TRUE[1] | EMPTY,
        TRUE[2] | EMPTY,
    ],
    "FLUX.2 dev": SCALES,
    "FLUX.2 klein": SCALES,
    "Ovis": [scale | negative for scale in SCALES for negative in ({}, NEGATIVE)],
    "Qwen-Image": [scale | negative for scale in TRUE for negative in ({}, EMPTY)],
    "Z-Image": [{"guidance_scale": 0.0} | NEGATIVE]
    + [scale | negative for scale in SCALES for negative in ({}, EMPTY, NEGATIVE)],
    "SD3": [scale | negative for scale in SCALES for negative in ({}, NEGATIVE)],
    "ERNIE": [scale | negative for scale in SCALES for negative in ({}, NEGATIVE)],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_is_read_as_the_reference_reads_it(name, both):
    """On, off, below 1, with a negative prompt, an empty one, none."""
    here = both(name).scheduled(euler(shift=3.0))
    for given in GUIDANCE[name]:
        here.compare(given)


HELD_OUT = [
    (1, "", {"num_inference_steps": 2}),
    (2, "a yellow star, left of 円 & <b>", {"num_inference_steps": 5}),
    (3, "x " * 300, {}),
]
"""Starts, prompts and steps that no other test has."""


@pytest.mark.parametrize("name", FAMILIES)
def test_released_settings_give_the_references_images(name, both):
    """To one level, with the scheduler that each family is released with; texts that are cut, the other way
    round in height and width.
    """
    here = both(name).scheduled(both(name).own)
    height, width = here.family.size
    for seed, prompt, given in HELD_OUT:
        turned = {"height": width, "width": height} if seed == 2 else {}
        made = here.run(given | turned, prompt, seed)
        assert abs(made.frames - (made.images * 255).round()).max() <= 1 and made.images.std() > 0.02


@pytest.mark.parametrize("name", ["FLUX.1", "SD3", "ERNIE"])
def test_texts_are_cut_where_the_tokenizers_files_say(name, both):
    """As the pipelines cut: for CLIP after the first tokenizer's length."""
    here, length = both(name).scheduled(euler(shift=3.0)), 9
    path = here.folder / "tokenizer" / "tokenizer_config.json"
    whole, kept = path.read_text(), here.pipe.tokenizer.model_max_length
    try:
        folders.edit(path, model_max_length=length)
        here.pipe.tokenizer.model_max_length = here.pipe.tokenizer_max_length = length
        model = folders.load(here.folder, model_id=here.family.model_id)
        replace(here, model=model).compare({}, "a red circle and a blue star " * 3)
    finally:
        path.write_text(whole)
        here.pipe.tokenizer.model_max_length = here.pipe.tokenizer_max_length = kept
