"""The stages of the training, a step or two of each, from nothing to a folder that makes a picture."""

import pytest
import torch

import tinydiff
from tinydiff.models.autoencoders import wan as wan_vae
from tinydiff.models.registry import SHIPPED
from tinydiff.ops.weights import Weights
from training import autoencoder, denoiser, tokenizer
from training.card import card
from training.evaluate import evaluate
from training.export import export
from training.scenes import render, scenes

COUNTS = {"picture": 4, "pair": 3, "clip": 2}
BATCHES = {"picture": 2, "pair": 2, "clip": 2}


def moments(run, stage):
    """What a stage's autoencoder codes a picture as."""
    params = torch.load(run / f"{stage}.pt")["average"]
    return wan_vae.moments(autoencoder.C, Weights(params), render(scenes(3, "picture", 1)))


@pytest.mark.slow
def test_the_stages_make_a_model(tmp_path):
    run, folder, lines = tmp_path / "run", tmp_path / "model", []
    run.mkdir()
    tokenizer.save(run / "tokenizer")
    with torch.enable_grad():
        for stage in autoencoder.STAGES:
            autoencoder.train(stage, run, 2, log=lines.append)
        words = run / "tokenizer" / "tokenizer.json"
        for steps in (1, 3):  # the second goes on where the first stopped, and takes clips too
            denoiser.train(run, steps, words, COUNTS, BATCHES, clips_from=1, log=lines.append)
    assert torch.load(run / "denoiser.pt")["step"] == 3
    assert all("nan" not in line for line in lines) and any("clip" in line for line in lines if line.startswith("denoiser step 3/3"))

    before, after, last = (moments(run, stage) for stage in autoencoder.STAGES)
    assert torch.equal(before, after) and torch.equal(after, last)  # what the denoiser learns from does not move

    assert export(run, folder) <= 8_000_000
    figures = evaluate(folder, run / "sheet.png", {"picture": 2, "clip": 1}, log=lines.append, num_inference_steps=1)
    assert [found["count"] for found in figures.values()] == [2, 1] and (run / "sheet.png").stat().st_size > 1000
    assert "| pictures of one shape | 2 |" in card(run, folder)
    made = tinydiff.generate(tinydiff.load(str(folder), model_id=SHIPPED), "a red circle", num_inference_steps=2)
    assert made.images[0].shape == (128, 128, 3)
