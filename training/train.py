"""Makes the shipped model from nothing, `python -m training.train RUN FOLDER`, or trains it on, `... RUN
Directory --from MODEL --minutes 90`.

Stages, each resumed from its file in RUN when interrupted: the autoencoder on images, its memory on videos,
its decoder alone, the denoiser with its text encoder on all kinds of scenes; then Directory is written and
evaluated. With --from only the last one runs. Hours on two cores; on a GPU that is lent for minutes at a
time, --piece ends a call with its state in RUN, and the next call goes on.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer

from training import autoencoder, denoiser, tokenizer
from training.card import card, stages
from training.evaluate import evaluate
from training.export import export


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the checkpoints and the log")
    parser.add_argument("folder", type=Path, help="folder to write the model into")
    parser.add_argument(
        "--picture-steps", type=int, default=6400, help="steps of the autoencoder on pictures"
    )
    parser.add_argument("--clip-steps", type=int, default=1600, help="steps of the autoencoder on clips")
    parser.add_argument("--polish-steps", type=int, default=3000, help="steps of the decoder alone")
    parser.add_argument("--steps", type=int, default=9000, help="steps of the denoiser")
    parser.add_argument("--minutes", type=float, help="minutes of the denoiser, instead of steps")
    parser.add_argument(
        "--piece",
        type=float,
        default=math.inf,
        help="minutes of that in this call; without an end, nothing is exported",
    )
    parser.add_argument(
        "--from", dest="origin", type=Path, help="a finished model folder whose networks are trained on"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help="a folder whose transformer and text encoder are taken instead of that one's",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    run: Path = arguments.run
    run.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        print(line, flush=True)
        with (run / "log.txt").open("a") as file:
            file.write(line + "\n")

    seed, device, origin = arguments.seed, arguments.device, arguments.origin
    words = (origin or run) / "tokenizer" / "tokenizer.json"
    if origin is None:
        tokenizer.save(run / "tokenizer")
        autoencoder.train("pictures", run, arguments.picture_steps, seed, log, device)
        autoencoder.train("clips", run, arguments.clip_steps, seed, log, device)
        autoencoder.train("polish", run, arguments.polish_steps, seed, log, device)
    length = denoiser.Length(
        None if arguments.minutes else arguments.steps, arguments.minutes, arguments.piece
    )

    def start(words: Tokenizer) -> denoiser.Start:
        return denoiser.resumed(origin, arguments.weights) if origin else denoiser.scratch(run, words, seed)

    if not denoiser.train(run, length, words, start, seed=seed, log=log, device=device):
        return
    log(f"{export(run, arguments.folder, origin)} bytes of weights in {arguments.folder}")
    with torch.no_grad():
        evaluate(arguments.folder, run / "sheet.png", log=log)
    before = stages((origin / "README.md").read_text()) if origin else None
    (arguments.folder / "README.md").write_text(card(run, arguments.folder, before))


if __name__ == "__main__":
    main()
