"""Makes the shipped model from nothing: `python -m training.train RUN FOLDER`.

Stages, each resumed from its file in RUN when interrupted: the autoencoder on pictures, its memory on clips, its decoder alone, the
denoiser with its text encoder on both; then FOLDER is written and evaluated. Runs on the CPU; hours on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training import autoencoder, denoiser, tokenizer
from training.card import card
from training.evaluate import evaluate
from training.export import export
from training.scenes import Kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the checkpoints and the log")
    parser.add_argument("folder", type=Path, help="folder to write the model into")
    parser.add_argument("--picture-steps", type=int, default=6400, help="steps of the autoencoder on pictures")
    parser.add_argument("--clip-steps", type=int, default=1600, help="steps of the autoencoder on clips")
    parser.add_argument("--polish-steps", type=int, default=3000, help="steps of the decoder alone")
    parser.add_argument("--steps", type=int, default=9000, help="steps of the denoiser")
    parser.add_argument("--clips-from", type=int, default=1000, help="step of the denoiser from which it learns clips too")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    run: Path = arguments.run
    run.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        print(line, flush=True)
        with (run / "log.txt").open("a") as file:
            file.write(line + "\n")

    tokenizer.save(run / "tokenizer")
    autoencoder.train("pictures", run, arguments.picture_steps, arguments.seed, log, arguments.device)
    autoencoder.train("clips", run, arguments.clip_steps, arguments.seed, log, arguments.device)
    autoencoder.train("polish", run, arguments.polish_steps, arguments.seed, log, arguments.device)
    counts: dict[Kind, int] = {"picture": 24000, "pair": 12000, "clip": 3500}
    batches: dict[Kind, int] = {"picture": 48, "pair": 20, "clip": 12}
    words = run / "tokenizer" / "tokenizer.json"
    denoiser.train(run, arguments.steps, words, counts, batches, arguments.clips_from, arguments.seed, log, arguments.device)
    log(f"{export(run, arguments.folder)} bytes of weights in {arguments.folder}")
    with torch.no_grad():
        evaluate(arguments.folder, run / "sheet.png", log=log)
    (arguments.folder / "README.md").write_text(card(run, arguments.folder))


if __name__ == "__main__":
    main()
