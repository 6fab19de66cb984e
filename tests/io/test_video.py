from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from tinydiff.io import palette
from tinydiff.io.images import read_image_parameters
from tinydiff.io.video import CODECS, check_encoder, read_video_parameters, write_video
from tinydiff.records import UserError

PARAMETERS = {"prompt": "größe 円 🎨", "seed": 7, "fps": 16.0}


def clip(frames=9, height=48, width=64) -> np.ndarray:
    """A yellow square that moves right over a gradient."""
    y, x = np.mgrid[:height, :width]
    video = np.stack([np.stack([x * 2, y * 2, 200 - x * 2], -1)] * frames).astype(np.uint8)
    for index in range(frames):
        video[index, 10:26, 4 * index : 4 * index + 16] = (250, 220, 10)
    return video


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return stream, stream.codec_context, np.stack(frames)


def test_mp4_is_what_every_player_takes(tmp_path):
    path, frames = tmp_path / "a", clip()
    write_video(path, frames, ".mp4", 16, parameters=PARAMETERS)
    stream, context, decoded = decode(path)
    assert (context.name, context.pix_fmt, context.profile) == ("h264", "yuv420p", "High")
    assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (
        1,
        1,
        1,
        1,
    )
    assert stream.average_rate == 16 and stream.frames == 9 and decoded.shape == frames.shape
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    assert read_video_parameters(path) == PARAMETERS
    assert np.abs(decoded.astype(int) - frames).mean() < 5


def test_webm_is_vp9(tmp_path):
    path, frames = tmp_path / "a", clip()
    write_video(path, frames, ".webm", 24, parameters=PARAMETERS)
    stream, context, decoded = decode(path)
    assert (context.name, context.pix_fmt, context.colorspace, context.color_range) == (
        "vp9",
        "yuv420p",
        1,
        1,
    )
    assert stream.average_rate == 24 and decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 5
    assert read_video_parameters(path) == PARAMETERS


@pytest.mark.parametrize("extension", [".mp4", ".webm"])
@pytest.mark.parametrize(
    "color, luma",
    [((255, 0, 0), 63), ((0, 255, 0), 173), ((0, 0, 255), 32), ((255, 255, 255), 235), ((0, 0, 0), 16)],
)
def test_bt709_matrix_in_limited_range(tmp_path, extension, color, luma):
    """The pixels are converted by the matrix that the tags promise: luma of pure colours from BT.709 itself
    (BT.601 gives red 82).
    """
    write_video(tmp_path / "a", np.full((2, 32, 32, 3), color, np.uint8), extension, 16)
    with av.open(str(tmp_path / "a")) as container:
        plane = next(container.decode(video=0)).to_ndarray()[:32]
    assert np.abs(plane.astype(int) - luma).max() <= 2


@pytest.mark.parametrize("extension", [".mp4", ".webm"])
@pytest.mark.parametrize("height, width", [(47, 63), (48, 63), (47, 64)])
def test_odd_sizes_are_padded_by_repeating_the_edge(tmp_path, extension, height, width):
    frames = clip(3, height, width)
    write_video(tmp_path / "a", frames, extension, 16, quality=95)
    _, _, decoded = decode(tmp_path / "a")
    assert decoded.shape == (3, 48, 64, 3)
    padded = np.pad(frames, ((0, 0), (0, 48 - height), (0, 64 - width), (0, 0)), mode="edge")
    assert np.abs(decoded.astype(int) - padded).mean() < 4


@pytest.mark.parametrize("extension", [".mp4", ".webm"])
def test_quality_orders_sizes_and_best_still_plays(tmp_path, extension):
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    sizes = []
    for quality in (0, 35, 90, 100):
        write_video(tmp_path / "a", noise, extension, 16, quality)
        sizes.append((tmp_path / "a").stat().st_size)
    assert sizes == sorted(set(sizes))
    _, context, _ = decode(tmp_path / "a")
    assert context.pix_fmt == "yuv420p" and "4:4:4" not in str(context.profile)


def test_crf_of_quality():
    assert [CODECS[".mp4"].crf(quality) for quality in (0, 35, 50, 55, 65, 90, 100)] == [
        51,
        33,
        26,
        23,
        18,
        5,
        1,
    ]
    assert [CODECS[".webm"].crf(quality) for quality in (0, 50, 100)] == [63, 32, 0]


def test_preset_and_uneven_rate(tmp_path):
    for preset in ("ultrafast", "slow"):
        write_video(tmp_path / preset, clip(20), ".mp4", 23.976, 60, preset)
    assert (tmp_path / "ultrafast").read_bytes() != (tmp_path / "slow").read_bytes()
    stream, _, _ = decode(tmp_path / "slow")
    assert stream.average_rate == Fraction("23.976")


@pytest.mark.parametrize("fps", [8, 16, 24, 50])
def test_gif_keeps_frames_colours_and_length(tmp_path, fps):
    path, frames = tmp_path / "a", clip(12)
    write_video(path, frames, ".gif", fps, parameters=PARAMETERS)
    with Image.open(path) as gif:
        assert (gif.format, gif.n_frames, gif.info["loop"]) == ("GIF", 12, 0)
        decoded, total = [], 0
        for index in range(12):
            gif.seek(index)
            decoded.append(np.asarray(gif.convert("RGB")))
            total += gif.info["duration"]
    assert abs(total - 12_000 / fps) <= 5
    assert np.abs(np.stack(decoded).astype(int) - frames).mean() < 10
    assert read_image_parameters(path) == PARAMETERS


def test_single_frame_videos(tmp_path):
    for extension in (".mp4", ".webm", ".gif"):
        write_video(tmp_path / "a", clip(1), extension, 16)
        assert decode(tmp_path / "a")[2].shape == (1, 48, 64, 3)


def test_missing_encoder_is_named_before_any_work(monkeypatch):
    for extension in (".mp4", ".webm", ".gif", ".png"):
        check_encoder(extension)
    monkeypatch.setattr(av, "codecs_available", {"libvpx-vp9"})
    with pytest.raises(UserError, match="no libx264"):
        check_encoder(".mp4")
    check_encoder(".webm")


def shown(path, fps: int) -> np.ndarray:
    """What a GIF shows at each frame's time; Pillow stores frames that are alike once, for longer."""
    frames = []
    with Image.open(path) as gif:
        for index in range(getattr(gif, "n_frames", 1)):
            gif.seek(index)
            frames += [np.asarray(gif.convert("RGB"))] * round(gif.info["duration"] * fps / 1000)
    return np.stack(frames)


BLUE = (20, 40, 250)


@pytest.mark.parametrize("count, begins", [(33, 5), (33, 32), (200, 101)])
@pytest.mark.parametrize("many", [False, True])
def test_gif_keeps_what_is_seen_for_a_moment(tmp_path, count, begins, many):
    """A small square in up to three frames, over one colour and over a gradient of thousands."""
    y, x = np.mgrid[:48, :64]
    ground = np.stack([x * 4, y * 5, 200 - x], -1) if many else np.full((48, 64, 3), (200, 180, 40))
    frames = np.stack([ground] * count).astype(np.uint8)
    frames[begins : begins + 3, 20:25, 20:25] = BLUE
    write_video(tmp_path / "a", frames, ".gif", 10)
    decoded = shown(tmp_path / "a", 10)
    assert decoded.shape == frames.shape
    assert (decoded[begins : begins + 3, 20:25, 20:25] == BLUE).all()
    error = np.abs(decoded.astype(int) - frames)
    assert error.mean() < 4 and error.max() < 40 if many else error.max() == 0


def test_gif_of_up_to_256_colours_is_exact(tmp_path):
    colours = np.random.default_rng(2).permutation(1 << 24)[:257]
    frames = (
        np.stack([colours >> 16, colours >> 8 & 255, colours & 255], -1)
        .astype(np.uint8)[:, None, None]
        .repeat(4, 1)
        .repeat(4, 2)
    )
    write_video(tmp_path / "a", frames[:256], ".gif", 10)
    assert np.array_equal(shown(tmp_path / "a", 10), frames[:256])
    write_video(tmp_path / "a", frames, ".gif", 10)
    assert np.abs(shown(tmp_path / "a", 10).astype(int) - frames).max() < 24


def test_a_palette_is_made_frame_by_frame():
    """Of an iterator that hands out one array again and again, which is overwritten in between."""
    frame, rng = np.empty((16, 16, 3), dtype=np.uint8), np.random.default_rng(0)

    def frames(count=20):
        for _ in range(count):
            frame[:] = rng.integers(0, 256, frame.shape)
            yield frame

    assert palette.of_many(frames()).shape == (256, 3) and palette.few(frames()) is None

    def two():
        for level in (3, 250):
            frame[:] = level
            yield frame

    assert palette.of_many(two()).tolist() == [[3] * 3, [250] * 3]
    assert palette.few(two()).tolist() == [0x030303, 0xFAFAFA]
