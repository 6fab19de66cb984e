"""The stages of the training, a step or two of each, from nothing to a directory that makes an image."""

from pathlib import Path

import pytest
import torch

import tinydiff
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.models.registry import SHIPPED
from tinydiff.ops.weights import Weights
from training import autoencoder, denoiser, pool, tokenizer
from training.card import card, stages
from training.denoiser import Length, Share
from training.evaluate import evaluate
from training.export import export
from training.scenes import held_out, render, scenes

MIX: dict = {"picture": Share(2, 4, 1), "pair": Share(2, 3, 1), "clip": Share(2, 2, 1, 2.0)}
SHAPES = Path(tinydiff.__file__).parent / "shapes"


def moments(run, stage):
    """What a stage's autoencoder codes an image as."""
    params = torch.load(run / f"{stage}.pt")["average"]
    return wan_vae.moments(autoencoder.C, Weights(params), render(scenes(3, "picture", 1)))


@pytest.mark.slow
def test_the_stages_make_a_model(tmp_path, monkeypatch):
    """Batches of the autoencoder are cut to one image or video: on a CPU they are nearly all of the time."""
    run, folder, lines = tmp_path / "run", tmp_path / "model", []
    whole = autoencoder._batches
    monkeypatch.setattr(autoencoder, "_batches", lambda *asked: [x[:1] for x in whole(*asked)])
    run.mkdir()
    tokenizer.save(run / "tokenizer")
    with torch.enable_grad():
        for stage in autoencoder.STAGES:
            autoencoder.train(stage, run, 2, log=lines.append)
        words = run / "tokenizer" / "tokenizer.json"
        for steps in (1, 3):  # the second goes on where the first stopped
            assert denoiser.train(
                run,
                Length(steps),
                words,
                lambda words: denoiser.scratch(run, words, 1),
                MIX,
                log=lines.append,
            )
    assert torch.load(run / "denoiser.pt")["step"] == 3
    assert all("nan" not in line for line in lines) and any(
        "clip" in line for line in lines if line.startswith("denoiser step 3 (100%)")
    )

    before, after, last = (moments(run, stage) for stage in autoencoder.STAGES)
    assert torch.equal(before, after) and torch.equal(
        after, last
    )  # what the denoiser learns from does not move

    assert export(run, folder) <= 8_000_000
    figures = evaluate(
        folder, run / "sheet.png", {"picture": 2, "clip": 1}, log=lines.append, num_inference_steps=1
    )
    assert [found["count"] for found in figures.values()] == [2, 1] and (
        run / "sheet.png"
    ).stat().st_size > 1000
    assert "| images of one shape | 2 |" in card(run, folder)
    made = tinydiff.generate(
        tinydiff.load(str(folder), model_id=SHIPPED), "a red circle", num_inference_steps=2
    )
    assert made.images[0].shape == (128, 128, 3)


def train(run, length, lines, **more):
    """Train the shipped model on, a little of each kind; whether the whole is done."""
    run.mkdir(exist_ok=True)
    with torch.enable_grad():
        words = SHAPES / "tokenizer" / "tokenizer.json"
        return denoiser.train(
            run, length, words, lambda words: denoiser.resumed(SHAPES), MIX, log=lines.append, **more
        )


def test_a_finished_model_is_trained_on(tmp_path):
    """Two steps in one call, and in two calls: the same weights, from those of the directory."""
    begun, lines = denoiser.finished(SHAPES), []
    assert train(tmp_path / "whole", Length(2), lines)
    train(tmp_path / "parts", Length(1), lines)
    kept = torch.load(tmp_path / "parts" / "denoiser.pt")
    assert (
        kept["step"] == 1 and set(kept["params"]) == set(begun) and not any("probe" in name for name in begun)
    )
    train(tmp_path / "parts", Length(2), lines)
    whole, parts = (torch.load(tmp_path / run / "denoiser.pt") for run in ("whole", "parts"))
    far = [(whole["params"][name] - begun[name]).abs().max().item() for name in begun]
    assert 0 < max(far) < 1e-3, "a warm-up's first steps are small"
    assert whole["statistics"][0].tolist() == denoiser.normalisation(SHAPES)[0].tolist()
    # The schedule of one step in all is not that of two, and so its first step is another size.
    assert parts["step"] == 2 and all(
        torch.load(tmp_path / "parts" / f"pool-{kind}.pt").shape[0] > 0 for kind in MIX
    )

    folder = tmp_path / "model"
    assert export(tmp_path / "whole", folder, SHAPES) <= 8_000_000
    for part in ("vae/diffusion_pytorch_model.safetensors", "vae/config.json", "tokenizer/tokenizer.json"):
        assert (folder / part).read_bytes() == (SHAPES / part).read_bytes(), f"{part} stays what it was"
    again = denoiser.finished(folder)
    assert all((again[name] - whole["average"][name]).abs().max() < 2e-3 for name in again)


def test_a_piece_carries_its_state(tmp_path):
    run, lines = tmp_path / "run", []
    assert not train(run, Length(3, piece=0.0), lines), "no time, no step"
    assert not (run / "denoiser.pt").exists() and lines == []


def test_the_rate_warms_up_and_ends_in_a_cosine():
    found = [
        denoiser.rate_factor(step, done)
        for step, done in ((0, 0.0), (24, 0.1), (49, 0.2), (500, 0.79), (600, 0.9), (700, 1.0))
    ]
    assert found == pytest.approx([1 / 50, 0.5, 1.0, 1.0, 0.51, 0.02])


def test_a_length_is_in_steps_or_in_minutes():
    assert (Length(steps=4).done(1, 99.0), Length(minutes=10).done(10**6, 2.5)) == (0.25, 0.25)


def test_a_pool_is_the_same_however_it_grew():
    code = pool.coder(pool.exported(SHAPES))
    for kind, frames in (("picture", 1), ("clip", 5)):
        whole = pool.grown(pool.Pool(), kind, 3, 1, code)
        parts = pool.grown(pool.grown(pool.Pool(), kind, 1, 1, code), kind, 3, 1, code)
        assert whole.scenes == parts.scenes and not any(held_out(scene) for scene in whole.scenes)
        assert (
            whole.latents.shape == (3, 16, frames, 16, 16)
            and (whole.latents - parts.latents).abs().max() < 2e-3
        )


def test_stills_are_coded_as_the_whole_autoencoder_codes_them():
    made = scenes(3, "picture", 2)
    params = pool.exported(SHAPES)
    whole = wan_vae.moments(autoencoder.C, Weights(params), render(made))[:, : autoencoder.C.z_dim]
    assert (pool.coder(params)(made) - whole).abs().max() < 5e-3 * whole.abs().max()


def test_a_card_keeps_the_stages_of_the_model_that_was_trained_on(tmp_path):
    rows = stages((SHAPES / "README.md").read_text())
    assert (
        rows[0] == "| autoencoder on images | 6400 | squares around contours, then whole images |"
        and len(rows) >= 3
    )
    torch.save({"step": 7}, tmp_path / "denoiser.pt")
    assert stages(card(tmp_path, SHAPES, rows)) == [
        *rows,
        "| denoiser and text encoder | 7 | flow matching, one prompt in ten empty |",
    ]
