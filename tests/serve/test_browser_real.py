"""The page in a real Chromium, over `tinydiff serve` with the shipped model."""

import numpy as np
import pytest

from tests.serve.chromium import EXPECTED, choose, go, made_picture, put, until
from tests.serve.processes import serving

BLUE = (35, 84, 224)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as one:
        yield one.wait_ready().url


@pytest.fixture
def page(browser, address):
    """The page, ready; afterwards nothing may be in the browser's log."""
    browser.get(address)
    browser.get_log("browser")
    until(browser, "#form[data-ready]")
    yield browser
    wrong = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in wrong if not EXPECTED.search(message)] == []


def test_types_a_prompt_and_sees_what_it_says(page):
    put(page, "prompt", "a large blue circle")
    put(page, "seed", "1")
    put(page, "num_inference_steps", "8")
    go(page)
    seen = made_picture(page)
    assert seen.shape == (128, 128, 4)
    middle = np.median(seen[56:72, 56:72, :3].reshape(-1, 3), axis=0)
    assert np.abs(middle - BLUE).max() < 40
    assert until(page, "#viewer[data-status=completed] .media img").get_property("naturalWidth") == 128


def test_asks_for_a_video_and_plays_it(page):
    choose(page, "video")
    put(page, "prompt", "a large blue circle moving right")
    put(page, "num_frames", "5")
    put(page, "num_inference_steps", "2")
    go(page)
    video = until(page, "#viewer[data-status=completed] video")
    assert page.execute_async_script(
        """
        const [video, done] = arguments;
        const tell = () => done([video.videoWidth, video.duration]);
        video.readyState ? tell() : video.addEventListener("loadedmetadata", tell);
        """,
        video,
    ) == [128, 0.625]
