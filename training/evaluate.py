"""Makes images and videos from held-out prompts and reads off their pixels whether they show what the prompt
names.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

import tinydiff
from tinydiff.models.registry import SHIPPED
from training.captions import prompt
from training.reading import judge
from training.scenes import Kind, scenes
from training.sheet import contact_sheet, filmstrip

COUNTS: dict[Kind, int] = {"picture": 200, "pair": 60, "clip": 60}


def evaluate(
    folder: Path,
    sheet: Path,
    counts: dict[Kind, int] = COUNTS,
    seed: int = 7,
    log: Callable[[str], None] = print,
    **fields: Any,
) -> dict[Kind, dict[str, Any]]:
    """Figures of the model in `folder`, and a contact sheet of the first of each kind as the image `sheet`.

    An output is right when every attribute that its prompt names is read off its pixels. `fields` go to
    `tinydiff.generate`. Returns {kind: {count, right, share, wrong: {attribute: times}, seconds, failures}}
    and writes it to `folder / evaluation.json`.
    """
    model = tinydiff.load(str(folder), model_id=SHIPPED)
    figures, shown, texts = {}, [], []
    for kind, count in counts.items():
        wrong: Counter[str] = Counter()
        failures: list[str] = []
        started = time.monotonic()
        for i, scene in enumerate(scenes(seed, kind, count, held_out=True)):
            text, named = prompt(scene, Random(f"{seed} {kind} {i}"))
            frames = tinydiff.generate(
                model, text, seed=i, num_frames=17 if kind == "clip" else 1, **fields
            ).frames[0]
            missed = [name for name, right in judge(named, frames).items() if not right]
            wrong.update(missed)
            if missed:
                failures.append(f"{text} (seed {i}): {', '.join(missed)}")
            if len(shown) < 12 * (len(figures) + 1):
                pictures = [Image.fromarray(frame) for frame in frames]
                shown.append(filmstrip(pictures) if kind == "clip" else pictures[0])
                texts.append(text)
        share = round(1 - len(failures) / count, 4)
        seconds = round((time.monotonic() - started) / count, 3)
        figures[kind] = {
            "count": count,
            "right": count - len(failures),
            "share": share,
            "wrong": dict(wrong.most_common()),
        }
        figures[kind] |= {"seconds": seconds, "failures": failures}
        log(
            f"{kind}: {count - len(failures)} of {count} right ({share:.1%}), wrong {dict(wrong)},"
            f" {seconds} s each"
        )
    (folder / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(shown, texts, 6).save(sheet)
    return figures
