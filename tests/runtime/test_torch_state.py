"""The image of a seed does not depend on what a program has set in torch, and the program finds its settings
as they were.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

import numpy
import pytest
import torch

import tinydiff
from tests.compiling import traced_by_dynamo
from tinydiff import config
from tinydiff.config import NoProgress
from tinydiff.records import UserError
from tinydiff.runtime import torch_state
from tinydiff.runtime.background import Background
from tinydiff.runtime.generate import generate
from tinydiff.runtime.torch_state import default_torch_state
from tinydiff.sampling.compile import graph_count

ASKED = {
    "prompt": "a red circle",
    "height": 32,
    "width": 64,
    "num_frames": 5,
    "num_inference_steps": 2,
    "seed": 3,
}
BACKENDS = torch.backends


def state():
    """What a program can ask torch about its state."""

    def told(read):
        try:
            return read()
        except RuntimeError as error:
            return str(error)

    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "autocast": [
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
        ],
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "precision": [
            told(read)
            for read in (torch.get_float32_matmul_precision, lambda: BACKENDS.cuda.matmul.allow_tf32)
        ],
        "precisions": [
            each.fp32_precision
            for each in (
                BACKENDS,
                BACKENDS.cudnn,
                BACKENDS.cudnn.conv,
                BACKENDS.cuda.matmul,
                BACKENDS.mkldnn.matmul,
                BACKENDS.mkldnn.conv,
            )
        ],
        "cudnn": [getattr(BACKENDS.cudnn, name) for name in ("enabled", "benchmark", "deterministic")],
        "reduced": [
            getattr(BACKENDS.cuda.matmul, f"allow_{kind}_reduced_precision_reduction")
            for kind in ("bf16", "fp16")
        ],
        "mkldnn": BACKENDS.mkldnn.enabled,
        "kernels": [
            getattr(BACKENDS.cuda, f"{name}_sdp_enabled")()
            for name in ("flash", "mem_efficient", "math", "cudnn")
        ],
        "seed": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
    }


@contextmanager
def set_by(write, value, fresh):
    write(value)
    try:
        yield
    finally:
        write(fresh)


def assigned(owner, name, value):
    return lambda: set_by(lambda each: setattr(owner, name, each), value, getattr(owner, name))


@contextmanager
def several():
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


SET = {
    "float64": lambda: set_by(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: set_by(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device meta": lambda: set_by(torch.set_default_device, "meta", None),
    "device cpu": lambda: set_by(torch.set_default_device, "cpu", None),
    "in device meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "deterministic": lambda: set_by(torch.use_deterministic_algorithms, True, False),
    "medium": lambda: set_by(torch.set_float32_matmul_precision, "medium", "highest"),
    "high": lambda: set_by(torch.set_float32_matmul_precision, "high", "highest"),
    "tf32": assigned(BACKENDS.cuda.matmul, "allow_tf32", True),
    "no tf32": assigned(BACKENDS.cudnn, "allow_tf32", False),
    "all tf32": assigned(BACKENDS, "fp32_precision", "tf32"),
    "bf16 on the cpu": assigned(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    "reduced": assigned(BACKENDS.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    "benchmark": assigned(BACKENDS.cudnn, "benchmark", True),
    "one kernel": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "no mkldnn": assigned(BACKENDS.mkldnn, "enabled", False),
    "a seed": lambda: set_by(torch.manual_seed, 5, 0),
    "several": several,
}


@pytest.fixture(scope="module")
def model():
    return tinydiff.load()


@pytest.fixture(scope="module")
def wanted(model):
    return tinydiff.generate(model, **ASKED)


def same(made, wanted):
    assert made.latents[0].dtype == wanted.latents[0].dtype == torch.float32
    assert torch.equal(made.latents[0], wanted.latents[0])
    assert numpy.array_equal(made.frames[0], wanted.frames[0])
    assert made.parameters == wanted.parameters


@pytest.mark.parametrize("name", SET)
def test_the_image_of_a_seed_does_not_depend_on_it(name, model, wanted):
    with SET[name]():
        before = state()
        made = tinydiff.generate(model, **ASKED)
        assert state() == before
    same(made, wanted)


@pytest.mark.parametrize("name", SET)
def test_a_model_does_not_depend_on_where_it_was_loaded(name, wanted):
    with SET[name]():
        before = state()
        model = tinydiff.load()
        assert state() == before
    assert not any(x.is_inference() for x in model.nets["vae"].w.flat.values())
    same(tinydiff.generate(model, **ASKED), wanted)


def test_parameters_say_in_which_types_it_ran(wanted):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = tinydiff.generate(tinydiff.load(dit_precision="bf16"), **ASKED)
    assert wanted.parameters["precision"] == {"transformer": "fp32", "vae": "fp32", "text_encoder": "fp32"}
    assert low.parameters["precision"] == {"transformer": "bf16", "vae": "fp32", "text_encoder": "fp32"}


def test_the_state_is_as_before_after_an_error(model):
    class Failing(NoProgress):
        def on_step(self, done, total):
            raise OSError("the display is gone")

    with several():
        before = state()
        with pytest.raises(OSError, match="gone"):
            tinydiff.generate(model, **ASKED, progress=Failing())
        with pytest.raises(UserError):
            tinydiff.generate(model, **ASKED | {"height": 100})
        with pytest.raises(UserError):
            tinydiff.load("/nowhere/at/all")
        assert state() == before


def test_the_command_line_in_a_program(wanted, tmp_path):
    options = config.options(ASKED | {"output_path": str(tmp_path), "return_frames": True})
    with several():
        before = state()
        [made] = generate(options, NoProgress())
        assert state() == before
    same(made, wanted)


def test_threads_share_what_belongs_to_the_process(model, wanted):
    """The first that ends does not bring the program's type back while another computes."""
    met, going, made = threading.Barrier(2), threading.Event(), {}

    class Watcher(NoProgress):
        def __init__(self, name):
            self.name = name

        def on_step(self, done, total):
            if done == 1:
                met.wait(60)  # both are in the middle of it
                if self.name == "last":
                    going.wait(60)

    def run(name):
        made[name] = tinydiff.generate(model, **ASKED, progress=Watcher(name))

    with SET["float64"]():
        before = state()
        threads = {name: threading.Thread(target=run, args=(name,)) for name in ("first", "last")}
        for thread in threads.values():
            thread.start()
        threads["first"].join()
        assert torch.get_default_dtype() == torch.float32
        going.set()
        threads["last"].join()
        assert state() == before
    same(made["first"], wanted)
    same(made["last"], wanted)


def test_a_fresh_process_is_left_alone(monkeypatch):
    written = []
    settings = [torch_state.Setting(each.read, written.append, each.fresh) for each in torch_state.SETTINGS]
    monkeypatch.setattr(torch_state, "SETTINGS", settings)
    with default_torch_state():
        assert not torch.is_grad_enabled()
    assert written == []


def test_the_thread_that_compiles(monkeypatch):
    """What `Background` runs in its thread is in a plain state too."""
    seen, done = [], threading.Event()

    def compiled(*_):
        seen.append((torch.get_default_dtype(), torch.is_grad_enabled()))
        done.set()

    class Image:
        network = state = inputs = denoise = None
        step = 0

    monkeypatch.setattr("tinydiff.runtime.background._structure", lambda image: 0)
    with SET["float64"]():
        Background().best(compiled, Image())
        assert done.wait(60)
    assert seen == [(torch.float32, False)]


@pytest.mark.slow
def test_the_compiled_loop_serves_every_state():
    """No state of torch, which Dynamo guards and AOT Autograd reads, compiles the loop again."""
    with traced_by_dynamo("aot_eager"):
        serves_every_state()


def serves_every_state():
    model = tinydiff.load(enable_torch_compile=True)
    first = tinydiff.generate(model, **ASKED)
    graphs = graph_count()
    for name in (
        "float64",
        "autocast",
        "device meta",
        "in device meta",
        "inference mode",
        "gradients",
        "medium",
        "several",
    ):
        with SET[name]():
            before = state()
            made = tinydiff.generate(model, **ASKED)
            assert state() == before
        same(made, first)
    assert graph_count() == graphs
