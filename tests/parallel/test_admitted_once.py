"""Several ranks, one admission: the first rank reads what a request names, and all get the same request."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.parallel.pool import on_ranks
from tinydiff import config
from tinydiff.parallel.layout import Layout
from tinydiff.parallel.ranks import everyone, make_ranks, once
from tinydiff.records import UserError
from tinydiff.runtime import blueprint, launch, library, net_plan
from tinydiff.runtime.generate import read

ASKED = {"prompt": "a red circle", "height": 32, "width": 32, "num_inference_steps": 2, "num_gpus": 2}


def settled(folder, fields):
    """What this rank gets to make and how it is shared, or the mistake that it is told."""
    options = config.options(ASKED | {"output_path": folder} | fields)
    try:
        work, layout = once(everyone(), lambda: launch.admit_with_layout(options, read(options), 2))
    except UserError as error:
        return error.field, str(error)
    [request], [(target, _)] = work.requests, work.destinations
    return request.text.prompt, [image.tobytes() for image in request.images.originals], str(target), layout


def test_one_rank_downloads_and_all_get_the_same(image_server, tmp_path):
    url, downloads = image_server
    first, second = on_ranks(2, settled, str(tmp_path), {"image_path": url})
    assert first == second and first[1] and first[3].size == 2
    assert downloads == ["/image.png"]


def test_a_mistake_is_reported_to_all(image_server, tmp_path):
    url, downloads = image_server
    said = on_ranks(2, settled, str(tmp_path), {"image_path": [url, url]})
    assert said[0] == said[1] and said[0][0] == "image_path" and "2 images are given" in said[0][1]
    said = on_ranks(2, settled, str(tmp_path), {"image_path": url.replace("image", "missing")})
    assert said[0] == said[1] and said[0][0] == "image_path" and "Not Found" in said[0][1]
    assert downloads == ["/missing.png"]


def program(url):
    """A program's own generation on ranks that share a model."""
    model = blueprint.load(blueprint.read(config.options({}).model), make_ranks(Layout(ulysses=2), 60))
    fields = {name: value for name, value in ASKED.items() if name not in ("prompt", "num_gpus")}
    return library.generate(model, "a red circle", fields | {"image_path": url, "num_frames": 1}).frames[0]


def test_a_program_on_two_ranks_downloads_once_too(image_server):
    url, downloads = image_server
    first, second = on_ranks(2, program, url)
    assert first.shape == (1, 32, 32, 3) and (first == second).all()
    assert downloads == ["/image.png"]


def test_one_process_calls_once_itself():
    assert once(blueprint.ALONE, lambda: 3) == 3
    with pytest.raises(UserError, match="no"):
        once(blueprint.ALONE, lambda: (_ for _ in ()).throw(UserError("a", "no")))


def test_reading_a_model_asks_no_device(monkeypatch):
    def forbidden(*given, **options):
        raise AssertionError("a device is asked")

    for name in ("is_available", "device_count", "current_device", "init"):
        monkeypatch.setattr(f"torch.cuda.{name}", forbidden)
    options = config.options({"prompt": "a red circle", "dit_precision": "bf16"})
    plan = read(options)
    assert plan.denoiser.asked_dtype is torch.bfloat16 and plan.autoencoder.asked_dtype is None
    monkeypatch.setattr(net_plan, "here", lambda: torch.device("cuda"))
    assert plan.nets["text_encoder"].dtype is torch.bfloat16
    assert plan.autoencoder.dtype is torch.float32 and plan.denoiser.dtype is torch.bfloat16
    assert replace(plan.denoiser, asked_dtype=None).dtype is torch.bfloat16
