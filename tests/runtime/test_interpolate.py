"""Frame interpolation: files, which frames are made, scene cuts, and the option from the call to the file."""

import json
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tinydiff
from tests.models.test_interpolators import VERSIONS, reference
from tinydiff.config import NoProgress, SamplingOptions
from tinydiff.models import interpolators
from tinydiff.models.upscalers import Compact, spec, working_bytes
from tinydiff.parallel.cost import Machine
from tinydiff.parallel.layout import Layout
from tinydiff.records import Frames, Interpolation, Output, Upscaling, UserError
from tinydiff.runtime import estimate, interpolate, memory, network_file, postprocess, upscale
from tinydiff.runtime.clock import Clock

CPU = torch.device("cpu")
CONFIG = VERSIONS["4.22"][0]
NOISE = np.random.default_rng(0).integers(100, 150, (3, 21, 29, 3), dtype=np.uint8)


def still(path, config=CONFIG):
    """A file of a network without motion: its flows are 0, and its mask takes half of either frame."""
    torch.save({f"module.{row.name}": torch.zeros(row.shape) for row in interpolators.spec(config)}, path)
    return path


def loaded(path, scale=1.0, compiled=False):
    return interpolate.load(path, CPU, scale, compiled)


def made(net, frames, exp=1, threshold=1.0):
    asked = Interpolation(None, exp, 1.0, threshold)
    return np.stack(list(interpolate.interpolated(net, frames, asked)))


@pytest.mark.parametrize("version", ["4.6", "4.22", "4.25-lite"])
@pytest.mark.parametrize("extension", [".pkl", ".pth", ".safetensors"])
def test_a_file_is_read_and_its_network_runs(version, extension, tmp_path):
    module, path = reference(version), tmp_path / f"flownet{extension}"
    weights = {f"module.{name}": weight.float() for name, weight in module.state_dict().items()}
    weights["module.teacher.conv0.0.0.weight"] = torch.zeros(2, 2)
    save_file(weights, path) if extension == ".safetensors" else torch.save(weights, path)
    assert interpolate.read(path) == VERSIONS[version][0]
    frames = made(loaded(path), NOISE[:2])
    first, second = torch.from_numpy(NOISE[:2, None]).permute(0, 1, 4, 2, 3).double() / 255
    with torch.no_grad():
        expected = module(first, second, torch.tensor([0.5], dtype=torch.float64), 1.0)
    expected = (expected * 255).round().clamp(0, 255)[0].permute(1, 2, 0).numpy()
    assert np.abs(frames[1].astype(int) - expected).max() <= 1  # float32 here
    assert np.array_equal(frames[::2], NOISE[:2])


@pytest.mark.parametrize("exp", [1, 2, 3])
def test_each_frame_becomes_two_to_the_power_of_exp(exp, tmp_path):
    """The given frames stay where they were in time; the last is repeated, so the duration stays."""
    factor = 2**exp
    frames = made(loaded(still(tmp_path / "flownet.pkl")), NOISE, exp)
    assert len(frames) == 3 * factor and np.array_equal(frames[::factor], NOISE)
    for index in range(2):
        middle = (NOISE[index].astype(int) + NOISE[index + 1]) / 2
        for between in frames[index * factor + 1 : (index + 1) * factor]:
            assert np.abs(between - middle).max() <= 0.5
    assert all(np.array_equal(frame, NOISE[2]) for frame in frames[2 * factor :])


def test_the_time_of_each_frame_reaches_the_network():
    """A network that answers with the time it is asked for."""
    net = interpolate.Interpolator(
        CONFIG,
        CPU,
        lambda x: interpolators.Frame(x, x[:, :0]),
        lambda a, b, time: torch.lerp(a.pixels, b.pixels, time[:, None, None, None]),
    )
    pair = np.stack([np.full((2, 3, 3), level, np.uint8) for level in (0, 80)])
    assert made(net, pair, 3)[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50, 60, 70] + [80] * 8


@pytest.mark.parametrize(("threshold", "blended"), [(0.15, False), (0.3, True), (1.0, True)])
def test_scene_cuts_are_not_blended(threshold, blended, tmp_path):
    """The second half is brighter by 51 of 255, a mean difference of 0.2."""
    dark, light = np.full((1, 40, 50, 3), 40, np.uint8), np.full((1, 40, 50, 3), 91, np.uint8)
    video = np.concatenate([dark, dark, light, light])
    frames = made(loaded(still(tmp_path / "flownet.pkl")), video, 1, threshold)[:, 0, 0, 0].tolist()
    assert frames[:3] == [40, 40, 40] and frames[4:] == [91, 91, 91, 91]
    assert frames[3] in ((65, 66) if blended else (40,))


def test_motion_of_small_things_is_no_cut(tmp_path):
    """A checkerboard that moves by one pixel differs everywhere, and yet nowhere at 32x32 pixels."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    frames = np.stack([board, 255 - board]).astype(np.uint8)[..., None].repeat(3, -1)
    assert abs(made(loaded(still(tmp_path / "flownet.pkl")), frames, 1, 0.15)[1].mean() - 127.5) < 1


# --- streaming


def output(tmp_path, **given):
    return Output(
        21, 29, 3, fps=8, interpolation=Interpolation(still(tmp_path / "f.pkl"), 1, 1.0, 1.0), **given
    )


class Told(NoProgress):
    def __init__(self):
        self.stages, self.done = [], []

    def on_stage(self, name):
        self.stages.append(name)

    def on_step(self, done, total):
        self.done.append((done, total))


def upscaling(tmp_path):
    torch.manual_seed(0)
    weights = {row.name: torch.randn(row.shape) * 0.1 for row in spec(Compact(5, 1, 2))}
    torch.save(weights, tmp_path / "up.pth")
    return Upscaling(tmp_path / "up.pth", 2)


def test_interpolated_frames_are_then_enlarged_one_by_one(tmp_path):
    """A decoded frame is asked for only when those before it are finished."""
    model, told = tinydiff.load(), Told()
    asked, taken = output(tmp_path, upscaling=upscaling(tmp_path)), []

    class Watched(np.ndarray):
        def __iter__(self):
            for index in range(len(self)):
                taken.append(index)
                yield np.asarray(self[index])

    frames = postprocess.processed(model.blueprint, asked, NOISE.view(Watched), Clock(told))
    assert isinstance(frames, Frames) and frames.shape == (6, 42, 58, 3) and taken == []
    seen = []
    for frame in frames:
        seen.append((frame, len(taken)))
    assert [count for _, count in seen] == [1, 2, 2, 3, 3, 3]
    upscaler = upscale.load(asked.upscaling.model, CPU)
    plain = made(loaded(asked.interpolation.model), NOISE)
    for (frame, _), small in zip(seen, plain, strict=True):
        assert np.array_equal(frame, upscale.enlarge(upscaler, small, 2))
    assert told.stages == ["interpolation and upscale"] and told.done == [(n, 6) for n in range(1, 7)]
    assert set(frames.seconds) == {"interpolation", "upscale"}


@pytest.mark.parametrize("name", ["interpolation", "upscaling"])
def test_each_has_a_stage_of_its_own(name, tmp_path):
    asked, told = output(tmp_path, upscaling=upscaling(tmp_path)), Told()
    other = {"interpolation": "upscaling", "upscaling": "interpolation"}[name]
    asked = replace(asked, **{other: None})
    frames = postprocess.processed(tinydiff.load().blueprint, asked, NOISE, Clock(told)).array()
    stage = {"upscaling": "upscale"}.get(name, name)
    assert told.stages == [stage] and list(frames.shape) == [asked.saved_frames, *asked.saved_size, 3]


def test_a_pipeline_that_turns_out_to_make_one_frame_is_reported(tmp_path):
    with pytest.raises(UserError, match="enable_frame_interpolation: one frame has none after it"):
        postprocess.processed(tinydiff.load().blueprint, output(tmp_path), NOISE[:1], Clock(NoProgress()))


def test_nothing_asked_for_changes_nothing():
    assert postprocess.processed(tinydiff.load().blueprint, Output(21, 29, 3), NOISE, None) is NOISE


def test_one_graph_per_size_is_compiled_and_kept(tmp_path, monkeypatch):
    compile, counted = torch.compile, []

    def backend(graph, inputs):
        counted.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda fn, **given: compile(fn, **{**given, "backend": backend}))
    interpolate.load.cache_clear()
    net = loaded(still(tmp_path / "flownet.pkl"), compiled=True)
    eager = loaded(tmp_path / "flownet.pkl")
    wide = np.concatenate([NOISE] * 2, 2)
    for frames, graphs in ((NOISE, 1), (wide, 2), (NOISE, 2), (wide[:, :10], 2)):
        assert np.array_equal(made(net, frames, 2), made(eager, frames, 2))
        assert len(counted) == graphs
    interpolate.load.cache_clear()


# --- from the call to the file


ASKED = {"num_inference_steps": 1, "seed": 3, "num_frames": 5, "fps": 8, "enable_frame_interpolation": True}


def test_a_video_gets_more_frames_and_keeps_its_duration(tmp_path):
    from tinydiff.cli import main

    path = still(tmp_path / "flownet.pkl")
    words = ["generate", "--prompt", "a red circle", "--output-path", str(tmp_path), "--seed", "3"]
    words += ["--num-inference-steps", "1", "--num-frames", "5", "--fps", "8"]
    words += ["--enable-frame-interpolation", "--frame-interpolation-exp", "2"]
    words += ["--frame-interpolation-model-path", str(path), "--frame-interpolation-scale", "2"]
    assert main([*words, "--output-file-name", "a.mp4", "--perf-dump-path", str(tmp_path / "p.json")]) == 0
    with av.open(str(tmp_path / "a.mp4")) as file:
        [stream] = file.streams.video
        assert stream.average_rate == 32 and sum(1 for _ in file.decode(stream)) == 20
        assert Fraction(stream.duration) * stream.time_base == Fraction(5, 8)
    assert "interpolation" in json.dumps(json.loads((tmp_path / "p.json").read_text()))


def test_the_library_returns_them_all(tmp_path):
    model = tinydiff.load(frame_interpolation_model_path=str(still(tmp_path / "flownet.pkl")))
    result = tinydiff.generate(model, "a red circle", **ASKED, frame_interpolation_scene_threshold=1)
    assert result.frames[0].shape[0] == 10 and result.parameters["num_frames"] == 5
    assert result.parameters["frame_interpolation_exp"] == 1 and result.seconds["interpolation"] > 0
    assert np.array_equal(result.frames[0], made(loaded(tmp_path / "flownet.pkl"), result.frames[0][::2]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_frames": 1}, "enable_frame_interpolation: one frame has none after it"),
        ({"frame_interpolation_exp": 0}, r"frame_interpolation_exp: 0 must be at least 1"),
        ({"frame_interpolation_exp": 9}, r"frame_interpolation_exp: 9 must be at least 1 and at most 8"),
        ({"frame_interpolation_exp": 8}, r"exp: 8 makes 2048 frames per second of 8; 1000 are the most"),
        ({"frame_interpolation_scale": 0.3}, r"scale: 0\.3 is not one of 0\.25, 0\.5, 1, 2, 4"),
        (
            {"frame_interpolation_scale": 8.0},
            r"frame_interpolation_scale: 8\.0 must be at least 0\.25 and at most 4",
        ),
        (
            {"frame_interpolation_scene_threshold": 2.0},
            "scene_threshold: 2.0 must be at least 0 and at most 1",
        ),
        (
            {"enable_frame_interpolation": False, "frame_interpolation_exp": 2},
            "frame_interpolation_exp: 2 has no effect without enable_frame_interpolation",
        ),
        (
            {"enable_frame_interpolation": False, "frame_interpolation_scene_threshold": 0.0},
            "threshold: 0.0 has no effect without enable_frame_interpolation",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(options, sentence, tmp_path):
    model = tinydiff.load(frame_interpolation_model_path=str(still(tmp_path / "flownet.pkl")))
    with pytest.raises(UserError, match=sentence):
        tinydiff.generate(model, "a red circle", **{**ASKED, **options})


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (
            {"conv.weight": torch.zeros(2)},
            r"no IFNet of RIFE 4\.5 to 4\.26; its weights begin with conv\.weight",
        ),
        (
            {
                "module.block0.convblock.0.0.weight": torch.zeros(1),
                "module.block3.lastconv.weight": torch.zeros(1),
            },
            r"it is one of RIFE 4\.0 to 4\.4",
        ),
    ],
)
def test_a_file_of_another_network_is_refused_before_anything_is_made(weights, sentence, tmp_path):
    torch.save(weights, tmp_path / "flownet.pkl")
    model = tinydiff.load(frame_interpolation_model_path=str(tmp_path))
    with pytest.raises(UserError, match=r"^frame_interpolation_model_path: .*" + sentence):
        tinydiff.generate(model, "a red circle", **ASKED)


def test_a_file_that_asks_to_run_code_is_not_read(tmp_path):
    torch.save({"weight": print}, tmp_path / "flownet.pkl")
    with pytest.raises(
        UserError, match=r"^frame_interpolation_model_path: .*nothing in a pickle is ever run"
    ):
        interpolate.read(tmp_path / "flownet.pkl")


def test_without_a_model_file_the_sentence_says_where_to_get_one(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    interpolate.locate.cache_clear()
    with pytest.raises(
        UserError, match=r"^frame_interpolation_model_path: name a model file .*Practical-RIFE"
    ):
        interpolate.locate(None)


@pytest.mark.parametrize("path", ["nothing.pkl", "a b:c"])
def test_a_path_that_names_nothing(path):
    with pytest.raises(UserError, match="is not a file, and not a file of a hub repository"):
        interpolate.locate(path)


def test_a_hub_id_alone_stands_for_the_published_file(monkeypatch, tmp_path):
    monkeypatch.setattr(network_file.hub, "file", lambda text, field: tmp_path / text)
    assert network_file.located("a/b", "f", "a/b:c", "flownet.pkl") == tmp_path / "a/b:flownet.pkl"
    assert network_file.located("a/b:c", "f", "a/b:c", "flownet.pkl") == tmp_path / "a/b:c"


def test_a_directory_without_the_file(tmp_path):
    with pytest.raises(UserError, match=r"has no file flownet\.pkl"):
        interpolate.locate(str(tmp_path))


# --- memory


def test_both_are_in_the_plan_of_memory(tmp_path):
    """They stay on the device, and the plan makes room for them by moving others."""
    paths = {"frame_interpolation_model_path": str(still(tmp_path / "flownet.pkl"))}
    paths["upscaling_model_path"] = str(upscaling(tmp_path).model)
    sampling = SamplingOptions(enable_frame_interpolation=True, enable_upscaling=True, num_frames=81)
    model = "Wan2.1-T2V-1.3B-Diffusers"
    subject = estimate.subject(model, sampling, 1, 2, paths)
    plain = estimate.subject(model, replace(sampling, **{name: False for name in postprocess.FURTHER}), 1, 2)
    *others, added, enlarged = memory.footprints(subject)
    assert tuple(others) == memory.footprints(plain) and (added.name, enlarged.name) == (
        "interpolation",
        "upscale",
    )
    assert added.weights == 4 * sum(row.numel for row in interpolators.spec(CONFIG))
    assert added.working == interpolators.working_bytes(CONFIG, 480, 832)
    assert enlarged.working == working_bytes(Compact(5, 1, 2), 262, 262) + 3 * 3 * 4 * 480 * 832 * 4
    for mode in ("auto", "memory", "speed"):
        where = memory.choose(memory.footprints(subject), 12, mode).where
        assert where["interpolation"].kind == where["upscale"].kind == "resident"
    layout = estimate.estimate(subject, Layout(), 12, Machine(400.0, 300.0, 25.0, 8))
    without = estimate.estimate(plain, Layout(), 12, Machine(400.0, 300.0, 25.0, 8))
    assert layout.weights - without.weights == added.weights + enlarged.weights


def test_plan_takes_the_options(tmp_path, capsys):
    from tinydiff.cli import main

    words = ["plan", "Wan2.1-T2V-1.3B-Diffusers", "--vram", "24", "--enable-frame-interpolation"]
    words += ["--frame-interpolation-model-path", str(still(tmp_path / "flownet.pkl"))]
    assert main(words) == 0
    assert "interpolation" in capsys.readouterr().out
