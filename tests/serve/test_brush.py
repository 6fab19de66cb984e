"""Given images, and the brush that paints a mask over them, in a real Chromium."""

import io

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.serve.chromium import choose, give_picture, go, made_picture, put, settled, until


def mask_of(made):
    """The mask that the last job was given, [H, W]."""
    [file] = made.scheduler.submitted[-1].inputs["mask_path"]
    return np.asarray(Image.open(io.BytesIO(made.files.path(file).read_bytes())).convert("L"))


def test_a_video_begins_with_an_input_image(serve, browser, tmp_path):
    made = serve()
    choose(browser, "video")
    give_picture(browser, tmp_path)
    assert not browser.find_element(By.ID, "brush").is_displayed()
    put(browser, "prompt", "moving left")
    go(browser)
    until(browser, "#viewer[data-status=completed] video")
    assert set(made.scheduler.submitted[0].inputs) == {"image_path"}


def test_the_brush_paints_a_mask(serve, browser, tmp_path):
    made = serve()
    give_picture(browser, tmp_path, width=96, height=64)
    canvas = until(browser, "#canvas")
    width, height = canvas.size["width"], canvas.size["height"]
    assert width / height == pytest.approx(1.5, abs=0.02)
    ActionChains(browser).move_to_element_with_offset(canvas, -width // 4, 0).click_and_hold().move_by_offset(
        width // 2, 0
    ).release().perform()
    put(browser, "prompt", "a red door")
    go(browser)
    made_picture(browser)
    mask = mask_of(made)
    assert mask.shape == (64, 96) and set(np.unique(mask[[0, -1]])) == {0}
    assert (mask[32, 24:72] == 255).all() and (mask[:, :10] == 0).all() and 0.1 < (mask == 255).mean() < 0.4
    assert made.scheduler.submitted[0].fields["strength"] == 1.0


def test_the_brush_erases_and_undoes(serve, browser, tmp_path):
    made = serve()
    give_picture(browser, tmp_path)
    canvas = until(browser, "#canvas")
    put(browser, "prompt", "a door")
    ActionChains(browser).move_to_element(canvas).click().perform()
    browser.find_element(By.ID, "erase").click()
    ActionChains(browser).move_to_element(canvas).click().perform()
    go(browser)
    settled(
        lambda: (
            len(made.scheduler.submitted) == 1
            or "the mask has no white pixel" in browser.find_element(By.ID, "form").text
        )
    )
    assert "the mask has no white pixel" in browser.find_element(By.ID, "given-hint").text
    browser.find_element(By.ID, "undo").click()
    go(browser)
    made_picture(browser)
    assert mask_of(made)[64, 64] == 255
    browser.find_element(By.ID, "undo").click()
    assert not browser.find_element(By.ID, "undo").is_enabled()
    go(browser)
    settled(lambda: len(made.scheduler.submitted) == 2)
    assert made.scheduler.submitted[1].fields["strength"] == 0.6
    assert set(made.scheduler.submitted[1].inputs) == {"image_path"}


def test_the_brush_works_from_the_keyboard(serve, browser, tmp_path):
    made = serve()
    give_picture(browser, tmp_path)
    canvas = until(browser, "#canvas")
    browser.execute_script("arguments[0].focus()", canvas)
    ActionChains(browser).send_keys(Keys.ARROW_LEFT * 3).key_down(" ").send_keys(Keys.ARROW_UP * 2).key_up(
        " "
    ).send_keys(Keys.ARROW_UP).perform()
    put(browser, "prompt", "a door")
    go(browser)
    made_picture(browser)
    mask, row, column = mask_of(made), 64, round(128 * (0.5 - 3 * 0.07))
    assert mask[row, column] == mask[row - 16, column] == 255 and mask[row, 64] == mask[20, column] == 0


def test_a_model_without_images_takes_none(serve, browser):
    serve({"images": (0, 0)})
    for kind in ("video", "image"):
        choose(browser, kind)
        assert not browser.find_element(By.ID, "given").is_displayed()


def test_references_are_shown_and_sent_in_order(serve, browser, tmp_path):
    made = serve({"images": (1, 3), "image_use": "references", "default_video_frames": None})
    for width in (32, 48):
        give_picture(browser, tmp_path, width=width)
    settled(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#images img")) == 2)
    assert not browser.find_element(By.ID, "canvas").is_displayed()
    browser.find_element(By.CSS_SELECTOR, "#images button").click()
    give_picture(browser, tmp_path, width=64)
    settled(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#images img")) == 2)
    put(browser, "prompt", "both")
    go(browser)
    made_picture(browser)
    given = [
        Image.open(made.files.path(file)).width for file in made.scheduler.submitted[0].inputs["image_path"]
    ]
    assert given == [48, 64] and "mask_path" not in made.scheduler.submitted[0].inputs
