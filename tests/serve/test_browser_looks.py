"""How the page looks and sounds in a real Chromium: what is in line, what fits, what is loaded when, and what
is announced.
"""

from itertools import pairwise

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.serve.chromium import give_picture, go, made_picture, put, screen, until


def box(browser, selector):
    """Where an element is: left, top, right, bottom."""
    script = (
        "const b = document.querySelector(arguments[0]).getBoundingClientRect(); return [b.left, "
        "b.top, b.right, b.bottom]"
    )
    return browser.execute_script(script, selector)


@pytest.mark.parametrize("width", [1366, 1920, 2560])
def test_the_header_is_in_line_with_what_is_below(serve, browser, width):
    serve()
    with screen(browser, width, 1080):
        assert box(browser, ".bar h1")[0] == box(browser, "#form")[0]
        assert box(browser, ".bar nav")[2] == box(browser, ".show")[2]


@pytest.mark.parametrize(("width", "height"), [(390, 844), (360, 640), (412, 915)])
def test_a_square_image_fills_its_frame_on_a_phone(serve, browser, width, height):
    serve()
    with screen(browser, width, height, touch=True):
        put(browser, "prompt", "a star")
        go(browser)
        made_picture(browser)
        inner = browser.execute_script(
            "const { clientWidth: w, clientHeight: h } = document.querySelector('#frame'); return [w, h]"
        )
        shown = browser.execute_script(
            "const { offsetWidth: w, offsetHeight: h } = document.querySelector('.media img'); return [w, h]"
        )
        assert inner == shown and abs(shown[0] - shown[1]) <= 1
        assert (
            box(browser, "#frame")[2] - box(browser, "#frame")[0]
            == box(browser, "#form")[2] - box(browser, "#form")[0]
        )


@pytest.mark.parametrize(("width", "touch"), [(360, True), (390, True), (1366, False), (1920, False)])
def test_the_tools_of_the_brush_are_in_one_row(serve, browser, tmp_path, width, touch):
    serve({"image_use": "start"})
    with screen(browser, width, 800, touch):
        give_picture(browser, tmp_path)
        tools = browser.execute_script(
            "return [...document.querySelectorAll('.tools > *')].map((one) => one.getBoundingClientRect())"
            ".map((b) => [b.left, b.top + b.height / 2, b.right])"
        )
        edge = box(browser, ".tools")[2]
        assert (
            len(tools) == 5
            and max(middle for _, middle, _ in tools) - min(middle for _, middle, _ in tools) < 3
        )
        assert all(right <= edge + 1 for _, _, right in tools)
        assert all(before[2] < after[0] for before, after in pairwise(tools))


def test_a_long_prompt_takes_two_lines_below_the_image(serve, browser):
    serve()
    prompt = "a star with a very long prompt " * 30
    put(browser, "prompt", prompt)
    go(browser)
    made_picture(browser)
    height, line = browser.execute_script(
        "const one = document.querySelector('#caption'); return [one.clientHeight, "
        "parseFloat(getComputedStyle(one).lineHeight)]"
    )
    assert height <= 2 * line + 1 and "seed" in until(browser, "#facts").text
    browser.find_element(By.CSS_SELECTOR, "summary").click()
    assert prompt.strip() in until(browser, "#parameters").text, "the whole of it is among the parameters"


def loaded(browser):
    """The files that the page has fetched: (how many small ones, how many whole ones)."""
    names = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    files = [name for name in names if "/content?" in name]
    return sum("thumbnail" in name for name in files), sum("thumbnail" not in name for name in files)


def test_the_gallery_loads_small_images_when_they_come_near(serve, browser):
    serve()
    for _ in range(2):
        put(browser, "prompt", "stars")
        put(browser, "n", "10")
        before = len(browser.find_elements(By.CSS_SELECTOR, ".card"))
        go(browser)
        WebDriverWait(browser, 90).until(
            lambda _, before=before: len(browser.find_elements(By.CSS_SELECTOR, ".card")) == before + 10
        )
    with screen(browser, 390, 844, touch=True):
        browser.execute_script("scrollTo(0, 0)")
        browser.refresh()
        until(browser, "#viewer[data-status=completed] .media img")
        assert loaded(browser) == (0, 1), "the gallery is below the screen; one image is looked at"
        browser.execute_script("document.querySelector('.card').scrollIntoView()")
        WebDriverWait(browser, 90).until(lambda _: loaded(browser)[0] > 0)
        assert loaded(browser)[0] < 20
        browser.execute_script("scrollTo(0, document.body.scrollHeight)")
        WebDriverWait(browser, 90).until(
            lambda _: len(browser.find_elements(By.CSS_SELECTOR, ".card img")) == 20
        )
        assert loaded(browser) == (19, 1), "of the image that is looked at there is no small one needed"


def test_what_is_announced_is_the_end_and_not_every_step(serve, browser):
    made = serve()
    made.scheduler.steps = 20
    browser.execute_script(
        "window.told = []; new MutationObserver(() => "
        "window.told.push(document.getElementById('news').textContent))"
        ".observe(document.getElementById('news'), { childList: true })"
    )
    put(browser, "prompt", "a star")
    go(browser)
    made_picture(browser)
    assert browser.execute_script("return window.told") == ["finished: a star"]
    live = browser.find_elements(By.CSS_SELECTOR, "[aria-live], [role=status], [role=alert]")
    assert {each.get_attribute("id") for each in live} == {"news", "problem", "removed"}, (
        "nothing else speaks"
    )
