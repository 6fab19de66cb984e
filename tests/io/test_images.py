import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

from tinydiff.io import given
from tinydiff.io.images import IMAGE_EXTENSIONS, encode_image, read_image, read_image_parameters, resize
from tinydiff.records import UserError

PARAMETERS = {
    "prompt": 'a "red" circle, größe 円 🎨',
    "seed": 7,
    "guidance_scale": 5.0,
    "size": [8, 6],
    "negative_prompt": None,
}


def picture(height=12, width=20) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height=48, width=64) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, 255 - x * 255 // width], -1).astype(np.uint8)


def png(pixels: Image.Image, format="PNG", **options) -> bytes:
    out = io.BytesIO()
    pixels.save(out, format, **options)
    return out.getvalue()


@pytest.mark.parametrize("extension", IMAGE_EXTENSIONS)
@pytest.mark.parametrize("quality", [None, 100])
def test_round_trip_of_pixels_and_parameters(tmp_path, extension, quality):
    path = tmp_path / f"a{extension}"
    pixels = smooth()
    path.write_bytes(encode_image(pixels, extension, quality, PARAMETERS))
    error = np.abs(read_image(path).astype(int) - pixels).max()
    assert error <= (0 if extension == ".png" or (extension == ".webp" and quality == 100) else 12)
    assert read_image_parameters(path) == PARAMETERS
    assert Image.open(path).format == {".png": "PNG", ".webp": "WEBP"}.get(extension, "JPEG")


@pytest.mark.parametrize("extension", [".jpg", ".webp"])
def test_quality_orders_sizes(extension):
    sizes = [len(encode_image(picture(64, 64), extension, quality)) for quality in (10, 50, 90)]
    assert sizes == sorted(set(sizes))


def test_png_text_is_the_json_other_programs_read(tmp_path):
    (tmp_path / "a.png").write_bytes(encode_image(picture(), ".png", None, PARAMETERS))
    assert json.loads(Image.open(tmp_path / "a.png").text["parameters"]) == PARAMETERS


def test_no_parameters(tmp_path):
    for extension in IMAGE_EXTENSIONS:
        path = tmp_path / f"a{extension}"
        path.write_bytes(encode_image(picture(), extension))
        assert read_image_parameters(path) == {}
    foreign = png(Image.new("RGB", (2, 2)), "JPEG", comment=b"made by another program")
    (tmp_path / "foreign.jpg").write_bytes(foreign)
    assert read_image_parameters(tmp_path / "foreign.jpg") == {}


@pytest.mark.parametrize("extension", IMAGE_EXTENSIONS)
def test_very_long_prompts_never_cost_the_image(tmp_path, extension):
    parameters = {**PARAMETERS, "prompt": "円" * 100_000}
    path = tmp_path / f"a{extension}"
    path.write_bytes(encode_image(picture(), extension, None, parameters))
    read = read_image_parameters(path)
    assert read["seed"] == 7
    if extension in (".png", ".webp"):
        assert read == parameters
    else:
        assert read["prompt"] == "円" * 4096 + "..."


def test_exif_orientation_is_applied(tmp_path):
    pixels = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: rotate 90 degrees clockwise to view
    (tmp_path / "a.png").write_bytes(png(Image.fromarray(pixels), exif=exif))
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(pixels, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(tmp_path, mode):
    if mode == "P":
        image = Image.new("P", (4, 3), 0)
        image.putpalette([200, 0, 0, 0, 0, 0])
        data = png(image, transparency=0)
    else:
        data = png(Image.new(mode, (4, 3), (9, 9, 9, 0) if mode == "RGBA" else (9, 0)))
    (tmp_path / "a.png").write_bytes(data)
    assert (read_image(tmp_path / "a.png") == 255).all()


def test_half_transparent_red_is_pink(tmp_path):
    (tmp_path / "a.png").write_bytes(png(Image.new("RGBA", (2, 2), (255, 0, 0, 128))))
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == [255, 127, 127]


def test_alpha_is_kept_where_it_is_wanted(tmp_path):
    pixels = np.random.default_rng(4).integers(0, 256, (6, 8, 4), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(png(Image.fromarray(pixels)))
    assert np.array_equal(read_image(tmp_path / "a.png", with_alpha=True), pixels)
    (tmp_path / "b.png").write_bytes(png(Image.fromarray(pixels[..., :3])))
    assert (
        read_image(tmp_path / "b.png", with_alpha=True) == np.dstack([pixels[..., :3], np.full((6, 8), 255)])
    ).all()
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8)
    (tmp_path / "c.png").write_bytes(png(deep))
    assert np.array_equal(read_image(tmp_path / "c.png", with_alpha=True)[..., 2], pixels[..., 0])
    assert resize(pixels, 3, 5).shape == (3, 5, 4)


def test_grey_16_bit_cmyk_and_animation(tmp_path):
    deep = Image.fromarray(np.array([[0, 256 * 100, 65535]], dtype=np.uint16))
    (tmp_path / "deep").write_bytes(png(deep))
    assert read_image(tmp_path / "deep").tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    (tmp_path / "grey").write_bytes(png(Image.new("L", (1, 1), 77)))
    assert read_image(tmp_path / "grey").tolist() == [[[77] * 3]]
    (tmp_path / "cmyk").write_bytes(png(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    assert (read_image(tmp_path / "cmyk") == 255).all()
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    (tmp_path / "moving").write_bytes(png(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert read_image(tmp_path / "moving")[0, 0].tolist() == [255, 0, 0]


def test_data_uri_and_url(tmp_path):
    pixels = picture()
    data = png(Image.fromarray(pixels))
    for head in ("data:image/png;base64,", "DATA:;base64,"):
        assert np.array_equal(read_image(head + base64.b64encode(data).decode()), pixels)
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if "/a.png" in self.path else 404)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert np.array_equal(read_image(f"{address}/a.png"), pixels)
        for url in ("/ü b/a.png?q=ä |&x=%20#part", "/%C3%BC/a.png"):
            assert np.array_equal(read_image(address.replace("http", "HTTP") + url), pixels)
        assert asked == ["/a.png", "/%C3%BC%20b/a.png?q=%C3%A4%20%7C&x=%20", "/%C3%BC/a.png"]
        with pytest.raises(UserError, match="cannot be read"):
            read_image(f"{address}/other.png")
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(UserError, match="cannot be read"):
        read_image(f"{address}/a.png")


def test_refused_sources(tmp_path, monkeypatch):
    good = png(Image.fromarray(picture()))
    files = {"text": b"hello", "empty": b"", "cut": good[: len(good) // 2]}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="is not an image") as caught:
            read_image(tmp_path / name)
        assert (
            caught.value.field == "image_path" and name in str(caught.value) and "\n" not in str(caught.value)
        )
    with pytest.raises(UserError, match="does not exist"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(UserError, match="cannot be read"):
        read_image(tmp_path)
    for url in (
        "data:no comma",
        "http:///a.png",
        "http://[::1/a.png",
        "http://host:port/a.png",
        f"http://{'ü' * 80}/",
    ):
        with pytest.raises(UserError, match="cannot be read") as caught:
            read_image(url)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        read_image(f"file://{tmp_path}/text")  # an address scheme that would read this machine
    monkeypatch.setattr(given, "MOST_BYTES", 10)
    with pytest.raises(UserError, match="is larger than"):
        read_image("data:image/png;base64," + base64.b64encode(good).decode())


def test_decompression_bomb(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(Image.fromarray(picture())))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(UserError, match="too large an image"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("method", ["lanczos", "bicubic"])
def test_resize_is_pillows(method):
    pixels = picture()
    expected = Image.fromarray(pixels).resize(
        (7, 5), {"lanczos": Image.LANCZOS, "bicubic": Image.BICUBIC}[method]
    )
    assert np.array_equal(resize(pixels, 5, 7, method), np.asarray(expected))
