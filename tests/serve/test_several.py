"""A server on several ranks: the same images, one queue, and an end that leaves no process."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import tinydiff
from tinydiff.config import ModelOptions, ParallelOptions
from tinydiff.records import UserError
from tinydiff.runtime import blueprint
from tinydiff.serve import server, several

ASKED = {"prompt": "a red circle", "num_inference_steps": 3, "size": "128x128", "seed": 5}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """(a server on two ranks, its process) ready to answer."""
    words = ["serve", "--num-gpus", "2", "--port", "0", "--state-dir", str(tmp_path_factory.mktemp("state"))]
    words += ["--warmup-steps", "0", "--lora-dir", str(tmp_path_factory.mktemp("loras"))]
    width, layer = 160, "transformer.blocks.0.attn1.to_q"
    pair = {"lora_A": torch.randn(2, width), "lora_B": torch.randn(width, 2)}
    save_file({f"{layer}.{name}.weight": x for name, x in pair.items()}, Path(words[-1], "style.safetensors"))
    with subprocess.Popen(
        [sys.executable, "-m", "tinydiff", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"},
    ) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if " at http://" in line:
                break
        assert said and " at http://" in said[-1], "".join(said)
        yield said[-1].split(" at ")[1].split()[0], process
        process.kill()


def post(address, path="/v1/images/generations", **fields):
    """(status, answer) of a JSON request."""
    data = json.dumps({**ASKED, **fields}).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def image(answer):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))))


@pytest.mark.slow
def test_an_image_is_that_of_one_device(running):
    address, _ = running
    status, answer = post(address)
    assert status == 200
    model = tinydiff.load()
    alone = tinydiff.generate(model, "a red circle", num_inference_steps=3, num_frames=1, seed=5).frames[0][0]
    assert np.abs(image(answer).astype(int) - alone).max() <= 1
    styled = image(post(address, loras={"style": 1.0})[1])
    again = image(post(address)[1])
    assert not np.array_equal(styled, again) and np.array_equal(again, image(answer))


def test_requests_share_the_loop_and_a_mistake_ends_its_own_request_alone(running):
    address, _ = running
    with ThreadPoolExecutor() as pool:
        asked = [{"seed": 6}, {"seed": 7, "guidance_scale": 1}, {"seed": -1}, {"seed": 8, "n": 2}]
        answers = list(pool.map(lambda fields: post(address, **fields), asked))
    assert [status for status, _ in answers] == [200, 200, 400, 200]
    assert len(answers[3][1]["data"]) == 2


def test_the_end_leaves_no_process(running):
    _, process = running
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    process.send_signal(signal.SIGTERM)
    said = process.stdout.read()
    assert process.wait(90) == 0 and "stopping" in said, said
    assert len(ranks) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.fixture(scope="module")
def plan():
    return blueprint.read(ModelOptions())


def test_guidance_gets_ranks_of_its_own_only_where_that_is_asked(plan):
    chosen, why = several.choose_layout(plan, ParallelOptions(num_gpus=2), 2)
    assert (chosen.cfg, chosen.ulysses) == (1, 2) and "ulysses 2" in why
    asked = ParallelOptions(num_gpus=2, enable_cfg_parallel=True)
    assert several.choose_layout(plan, asked, 2)[0].cfg == 2


def test_a_replica_is_a_server_of_its_own(plan):
    asked = ParallelOptions(num_gpus=2, data_parallel_size=2)
    with pytest.raises(UserError, match="data_parallel_size: 2: a server has one replica of the model"):
        several.choose_layout(plan, asked, 2)


def test_options_of_ranks_are_options_of_the_server():
    asked = server.parse(["--num-gpus", "4", "--tp-size", "2", "--sp-degree", "2"])
    assert asked.parallel == ParallelOptions(num_gpus=4, tp_size=2, sp_degree=2)
