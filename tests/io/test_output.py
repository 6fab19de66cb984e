import errno
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinydiff.io import atomic, output, parameters
from tinydiff.io.output import (
    FRAMES,
    Encoding,
    Target,
    check_writable,
    plan_encoding,
    plan_target,
    read_parameters,
    save,
)
from tinydiff.records import UserError

NOON = datetime(2026, 1, 2, 12, 30, 5)
PARAMETERS = {"prompt": "größe 円", "seed": 7}


def frames(count=1, height=32, width=48) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def name(file_name, video=False, **options) -> str:
    target = plan_target("out", file_name, video=video, now=NOON, **options)
    return f"{target.stem}|{target.extension}"


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize(
    "file_name, video, expected",
    [
        ("a.png", False, "a|.png"),
        ("a.JPG", False, "a|.JPG"),
        ("a.b.webp", False, "a.b|.webp"),
        ("plain", False, "plain|.png"),
        ("v1.5", False, "v1.5|.png"),
        (".png", False, ".png|.png"),
        ("a.mp4", True, "a|.mp4"),
        ("a.GIF", True, "a|.GIF"),
        ("take", True, "take|/"),
        ("take.1/", True, "take.1|/"),
        ("single/", False, "single|/"),
    ],
)
def test_the_extension_decides(file_name, video, expected):
    assert name(file_name, video) == expected


def test_default_names():
    assert name(None, prompt="A large, RED circle!", seed=42) == "a-large-red-circle-42-20260102-123005|.png"
    assert name(None, True, prompt="../../etc/passwd\0") == "etc-passwd-0-20260102-123005|.mp4"
    assert name(None, prompt="  ") == "untitled-0-20260102-123005|.png"
    stem = plan_target("out", None, video=False, prompt="円" * 300, now=NOON).stem
    assert stem.startswith("円" * 26 + "-0-") and len(stem.encode()) < 120


@pytest.mark.parametrize(
    "file_name, video, reason",
    [
        ("a.mp4", False, "this request makes an image"),
        ("a.png", True, "this request makes a video"),
        ("a.pngg", False, r"'\.pngg' is not a known extension.*did you mean '\.png'"),
        (
            "a.avi",
            True,
            r"'\.avi' is not a known extension; a video may be \.mp4, \.webm, \.gif or a name ending in /",
        ),
        ("sub/a.png", False, "without '/'"),
        ("../a.png", False, "without '/'"),
        ("", False, "a file name"),
        ("/", True, "a file name"),
        ("..", False, "a file name"),
        ("a\0.png", False, "a file name"),
        ("円" * 70 + ".png", False, "1 to 200 bytes"),
    ],
)
def test_names_refused(file_name, video, reason):
    with pytest.raises(UserError, match=reason) as caught:
        name(file_name, video)
    assert caught.value.field == "output_file_name"


def test_several_outputs_are_numbered():
    target = Target(Path("out"), "a", ".png")
    assert [target.path(index, 3).name for index in range(3)] == ["a_0.png", "a_1.png", "a_2.png"]
    assert target.path(0, 1).name == "a.png"
    assert Target(Path("out"), "a", FRAMES).path(1, 2) == Path("out/a_1")


def plan(extension, **options) -> Encoding:
    return plan_encoding(Target(Path("out"), "a", extension), **options)


def test_encoding_options():
    assert plan(".mp4") == Encoding(16.0, None, "fast")
    names = ("maximum", "high", "medium", "low", "default")
    assert [plan(".mp4", output_quality=quality).quality for quality in names] == [100, 90, 55, 35, None]
    assert plan(".jpg", output_compression=42).quality == 42
    assert plan(".MP4", x264_preset="slow", fps=23.976) == Encoding(23.976, None, "slow")
    assert plan(".png", output_quality="high").quality == 90  # lossless: met


@pytest.mark.parametrize(
    "extension, options, field, reason",
    [
        (".mp4", {"output_quality": "hihg"}, "output_quality", "did you mean 'high'"),
        (".mp4", {"output_compression": 101}, "output_compression", "from 0 to 100"),
        (".mp4", {"output_compression": -1}, "output_compression", "from 0 to 100"),
        (".mp4", {"output_compression": 5, "output_quality": "low"}, "output_compression", "not both"),
        (".gif", {"output_quality": "low"}, "output_quality", "no quality"),
        (".gif", {"output_compression": 5}, "output_compression", "no quality"),
        (".webm", {"x264_preset": "fast"}, "x264_preset", r"applies to \.mp4 only"),
        (".mp4", {"x264_preset": "fsat"}, "x264_preset", "did you mean 'fast'"),
        (".mp4", {"fps": 0}, "fps", "above 0"),
        (".mp4", {"fps": float("nan")}, "fps", "above 0"),
        (".gif", {"fps": 60}, "fps", "at most 50 in a GIF"),
    ],
)
def test_encoding_refused(extension, options, field, reason):
    with pytest.raises(UserError, match=reason) as caught:
        plan(extension, **options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "extension", [".png", ".jpg", ".jpeg", ".webp", ".PNG", ".mp4", ".webm", ".gif", FRAMES]
)
def test_every_format_is_saved_whole_with_its_parameters(tmp_path, extension):
    directory = tmp_path / "made" / "on the way"
    count = 1 if extension.lower() in output.IMAGE_EXTENSIONS else 3
    path = save(Target(directory, "a", extension), frames(count), Encoding(), PARAMETERS)
    assert path == directory / ("a" if extension == FRAMES else f"a{extension}")
    assert read_parameters(path) == PARAMETERS
    if extension == FRAMES:
        assert listing(directory) == ["a", "a/00000.png", "a/00001.png", "a/00002.png"]
        decoded = np.stack([np.asarray(Image.open(file)) for file in sorted(path.iterdir())])
        assert np.array_equal(decoded, frames(3))
    else:
        assert listing(directory) == [path.name]


@pytest.mark.parametrize("extension", [".png", FRAMES])
def test_nothing_is_overwritten(tmp_path, extension):
    target = Target(tmp_path, "a", extension)
    paths = [save(target, frames(), Encoding(), {"seed": seed}) for seed in range(3)]
    suffix = "" if extension == FRAMES else extension
    assert [path.name for path in paths] == [f"a{suffix}", f"a-1{suffix}", f"a-2{suffix}"]
    assert [read_parameters(path)["seed"] for path in paths] == [0, 1, 2]


def test_a_dotted_directory_keeps_its_name_when_numbered(tmp_path):
    target = Target(tmp_path, "v1.5", FRAMES)
    assert [save(target, frames(), Encoding()).name for _ in range(2)] == ["v1.5", "v1.5-1"]


def test_processes_racing_for_one_name_all_keep_their_file(tmp_path):
    code = (
        "import sys, numpy; from pathlib import Path; from tinydiff.io.output import *\n"
        "frames = numpy.zeros((1, 8, 8, 3), 'uint8')\n"
        "target = Target(Path(sys.argv[1]), 'a', '.png')\n"
        "for _ in range(10): save(target, frames, Encoding(), {'who': sys.argv[2]})"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(who)]) for who in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert (
        sorted(read_parameters(path)["who"] for path in tmp_path.iterdir())
        == ["0"] * 10 + ["1"] * 10 + ["2"] * 10
    )


def test_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    target = Target(tmp_path, "a", ".png")
    assert [save(target, frames(), Encoding(), PARAMETERS).name for _ in range(2)] == ["a.png", "a-1.png"]
    assert listing(tmp_path) == ["a-1.png", "a.png"] and read_parameters(tmp_path / "a.png") == PARAMETERS


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_while_flushing(tmp_path, monkeypatch, code):
    def full(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(UserError, match=r"output_path: cannot write '.*a\.png': the disk is full") as caught:
        save(Target(tmp_path, "a", ".png"), frames(), Encoding())
    assert caught.value.field == "output_path" and listing(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize("extension", [".png", ".jpg", ".webp", ".mp4", ".webm", ".gif", FRAMES])
def test_no_room_for_the_file(tmp_path, extension):
    """A real refusal of the system while bytes are written: no file of this process may exceed 20 kB."""
    code = (
        "import sys, resource, numpy; from pathlib import Path; from tinydiff.io.output import *\n"
        "from tinydiff.records import UserError\n"
        "shape = (int(sys.argv[3]), 192, 192, 3)\n"
        "frames = numpy.random.default_rng(0).integers(0, 256, shape, dtype='uint8')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: save(Target(Path(sys.argv[1]), 'a', sys.argv[2]), frames, Encoding())\n"
        "except UserError as error: print(error); sys.exit(2)"
    )
    count = "1" if extension in output.IMAGE_EXTENSIONS else "4"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), extension, count], capture_output=True, text=True
    )
    assert run.returncode == 2, run.stdout + run.stderr
    assert "the disk is full" in run.stdout and run.stdout.count("\n") == 1
    assert listing(tmp_path) == []


def test_unexpected_failure_leaves_nothing(tmp_path, monkeypatch):
    def broken(path, *_):
        path.write_bytes(b"half")
        raise RuntimeError("encoder bug")

    monkeypatch.setattr(output, "write_video", broken)
    with pytest.raises(RuntimeError):
        save(Target(tmp_path, "a", ".mp4"), frames(2), Encoding())
    assert listing(tmp_path) == []


def test_writable_directories_are_proven_without_a_trace(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "not" / "yet")
    assert listing(tmp_path) == []


def test_directories_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be a directory") as caught:
            check_writable(directory)
        assert caught.value.field == "output_path" and str(directory) in str(caught.value)
    if Path("/proc/version").exists():
        with pytest.raises(UserError, match="cannot be written"):
            check_writable(Path("/proc/nowhere"))
        with pytest.raises(UserError, match="cannot write"):
            save(Target(Path("/proc/nowhere"), "a", ".png"), frames(), Encoding())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser writes everywhere")
def test_read_only_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="permission denied"):
        check_writable(tmp_path)


@pytest.mark.parametrize("wrong", [frames()[0], frames().astype(np.float32), frames()[..., :1]])
def test_frames_of_another_kind_are_a_programming_error(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W, 3 or 4\]"):
        save(Target(tmp_path, "a", ".png"), wrong, Encoding())


def test_import_is_light():
    heavy = "('torch', 'numpy', 'PIL', 'av')"
    code = f"import sys, tinydiff.io.output; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("extension", [".png", ".webp"])
def test_layers_keep_their_alpha(tmp_path, extension):
    layer = np.random.default_rng(2).integers(0, 256, (1, 32, 48, 4), dtype=np.uint8)
    path = save(Target(tmp_path, "a", extension), layer, Encoding(quality=100), PARAMETERS)
    with Image.open(path) as opened:
        assert opened.mode == "RGBA" and np.array_equal(
            np.asarray(opened), layer[0]
        )  # also the colours of what cannot be seen
    assert read_parameters(path) == PARAMETERS


def test_layers_as_a_directory(tmp_path):
    layers = np.random.default_rng(2).integers(0, 256, (3, 32, 48, 4), dtype=np.uint8)
    path = save(Target(tmp_path, "a", FRAMES), layers, Encoding(), PARAMETERS)
    read = [np.asarray(Image.open(path / f"{i:05d}.png")) for i in range(3)]
    assert np.array_equal(read, layers) and read_parameters(path) == PARAMETERS


def test_formats_without_alpha_take_no_layers(tmp_path):
    for extension in (".jpg", ".mp4", ".gif"):
        with pytest.raises(ValueError, match=r"frames are uint8 \[T, H, W, 3\]"):
            save(Target(tmp_path, "a", extension), np.zeros((1, 32, 48, 4), dtype=np.uint8), Encoding())
    assert (
        name("a.webp", with_alpha=True) == "a|.webp"
        and name("a", with_alpha=True) == "a|.png"
        and name("a/", with_alpha=True) == "a|/"
    )
    with pytest.raises(
        UserError, match=r"'a\.JPG': layers have alpha, so they may be \.png, \.webp or a name ending in /"
    ) as caught:
        name("a.JPG", with_alpha=True)
    assert caught.value.field == "output_file_name" and listing(tmp_path) == []


ODD_NAMES = [
    "run:1",
    "http:",
    "pipe:1",
    "concat:a|b",
    "-y",
    "a%d",
    "file:x",
    "~",
    "a b\n円",
    "\udcff",
    "crypto+file:x",
    "a'\"$`",
]


@pytest.mark.parametrize("extension", [".mp4", ".webm", ".gif", ".png", ".jpg", ".webp", FRAMES])
def test_a_directory_and_a_file_may_have_any_name(tmp_path, monkeypatch, extension):
    """Also relative ones, which FFmpeg would take for protocols, and its patterns."""
    monkeypatch.chdir(tmp_path)
    count = 1 if extension in output.IMAGE_EXTENSIONS else 2
    for odd in ODD_NAMES:
        target = Target(Path(odd), odd, extension)
        check_writable(target.directory, target.path(0, 1).name)
        path = save(target, frames(count), Encoding(), {"seed": 7})
        assert path.exists() and read_parameters(path) == {"seed": 7}
    assert len(list(tmp_path.iterdir())) == len(ODD_NAMES)


def test_names_are_checked_where_they_will_be(tmp_path):
    for directory, name, reason in (
        (tmp_path / ("a" * 300), "a.png", "file name too long"),
        (tmp_path / "new" / ("a" * 300) / "b", "a.png", "file name too long"),
        (tmp_path, "a" * 300, "file name too long"),
        (tmp_path, "a/b.png", "no such file or directory"),
        (tmp_path / "a\0", "a.png", "null"),
        (tmp_path, "\ud800.png", "surrogates not allowed"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            check_writable(directory, name)
        assert caught.value.field == "output_path" and "\n" not in str(caught.value)
    (tmp_path / "loop").symlink_to(tmp_path / "nowhere" / "deeper")
    with pytest.raises(UserError, match="cannot be a directory") as caught:
        check_writable(tmp_path / "loop" / "a", field="perf_dump_path")
    assert caught.value.field == "perf_dump_path"
    check_writable(tmp_path / "new" / ".." / "other", "a.png")
    assert listing(tmp_path) == ["loop"]


def test_file_names_that_the_system_cannot_spell():
    with pytest.raises(UserError, match="a file name of 1 to 200 bytes"):
        name("\ud800.png")
    assert name("\udcff.png") == "\udcff|.png"
    with pytest.raises(UserError, match="a file name of 1 to 200 bytes"):
        name("\udcff" * 200 + ".png")


def test_a_default_name_is_one_that_the_system_can_spell(monkeypatch):
    assert name(None, prompt="\ud800 a \udcff b") == "a-b-0-20260102-123005|.png"
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "latin-1")
    assert name(None, prompt="円 größe") == "größe-0-20260102-123005|.png"
    assert name(None, prompt="円") == "untitled-0-20260102-123005|.png"


@pytest.mark.parametrize("extension, most", [*output.LONGEST_SIDE.items(), (".MP4", 16_384)])
def test_sizes_that_a_format_cannot_hold_are_refused_before_any_step(tmp_path, extension, most):
    target = Target(tmp_path, "a", extension)
    output.check_size(target, most, most)
    for field, size in (("height", (most + 1, 16)), ("width", (16, most + 1))):
        with pytest.raises(
            UserError,
            match=rf"{most + 1} is more than the {most} pixels that {extension.lower()} allows; choose \.",
        ) as caught:
            output.check_size(target, *size)
        assert caught.value.field == field
    strip = np.zeros((1, 2, most, 3), dtype=np.uint8)
    assert read_parameters(save(target, strip, Encoding(preset="ultrafast"), {"seed": 7})) == {"seed": 7}


def test_formats_without_a_limit():
    for extension in (".png", ".webm", FRAMES):
        output.check_size(Target(Path("out"), "a", extension), 65_536, 65_536)


@pytest.mark.parametrize("extension", [".png", ".jpg", ".webp", ".mp4", ".webm", ".gif", FRAMES])
def test_parameters_with_half_a_character_are_saved(tmp_path, extension):
    told = {"prompt": "円 \ud800 \udcff", "seed": 7}
    count = 1 if extension in output.IMAGE_EXTENSIONS else 2
    assert read_parameters(save(Target(tmp_path, "a", extension), frames(count), Encoding(), told)) == told


@pytest.mark.parametrize(
    "text", [b"ffconcat version 1.0\nfile other.mp4\n", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n"]
)
def test_lists_of_other_files_are_not_followed(tmp_path, text):
    """FFmpeg knows formats by their bytes, and some name other files."""
    save(Target(tmp_path, "other", ".mp4"), frames(2), Encoding(), {"seed": 7})
    (tmp_path / "a.mp4").write_bytes(text)
    with pytest.raises(ValueError, match="Invalid data"):
        read_parameters(tmp_path / "a.mp4")


@pytest.mark.parametrize("text", ["5", "[1]", "null", "[" * 100_000, "words"])
def test_texts_of_other_programs_are_no_parameters(text):
    assert parameters.read(text) == parameters.read(text.encode()) == {}
