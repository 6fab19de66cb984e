"""The page in a real Chromium, over a real server whose scheduler makes plain-coloured images."""

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.serve.chromium import choose, give_picture, go, made_picture, put, screen, settled, until
from tests.serve.fake import picture
from tests.serve.internet import send, serving
from tinydiff.serve.jobs import Failure


def test_types_a_prompt_and_sees_the_image(serve, browser):
    made = serve()
    put(browser, "prompt", "a large yellow star")
    put(browser, "seed", "5")
    put(browser, "width", "64")
    put(browser, "height", "32")
    go(browser)
    seen = made_picture(browser)
    assert seen.shape == (32, 64, 4) and (seen == [5 * 37 % 256, 5 * 91 % 256, 120, 255]).all()
    fields = made.scheduler.submitted[0].fields
    assert (fields["prompt"], fields["seed"], fields["width"]) == ("a large yellow star", [5], 64)
    assert "seed 5" in browser.find_element(By.ID, "facts").text


def test_the_form_begins_with_what_the_model_does(serve, browser):
    made = serve()
    row = made.blueprint.row
    said = {
        name: browser.find_element(By.NAME, name).get_property("value")
        for name in ("width", "height", "num_inference_steps")
    }
    assert said == {"width": str(row.width), "height": str(row.height), "num_inference_steps": str(row.steps)}
    assert browser.find_element(By.ID, "model").text == made.name
    choose(browser, "video")
    assert browser.find_element(By.NAME, "num_frames").get_property("value") == str(row.video_frames)


def test_progress_and_previews_are_shown(serve, browser):
    made = serve()
    made.scheduler.steps, made.scheduler.step_seconds = 8, 0.25
    put(browser, "prompt", "a star")
    go(browser)
    # in one go: the next preview takes its place
    width = "return document.querySelector('#viewer .media img.preview')?.naturalWidth"
    WebDriverWait(browser, 90, 0.03).until(lambda _: browser.execute_script(width) == 128)
    assert 0 < float(browser.find_element(By.ID, "progress").get_property("value")) < 1
    assert "of 8" in browser.find_element(By.ID, "caption").text
    made_picture(browser)


def test_cancel_stops_the_job_and_the_next_one_is_made(serve, browser):
    made = serve()
    made.scheduler.steps, made.scheduler.step_seconds = 1000, 0.02
    put(browser, "prompt", "never")
    go(browser)
    settled(lambda: made.store.counts().get("in_progress"))
    until(browser, "#viewer[data-status=in_progress] #cancel").click()
    settled(lambda: not made.store.counts().get("in_progress"))
    job = made.store.get(made.scheduler.submitted[0].id)
    assert job is None or job.error.code == "cancelled"
    assert not browser.find_elements(By.CSS_SELECTOR, "#queue li")
    made.scheduler.steps = 2
    go(browser)
    made_picture(browser)


def test_what_waits_stands_in_the_queue(serve, browser):
    made = serve()
    made.scheduler.gate.clear()
    for prompt in ("first", "second", "third"):
        put(browser, "prompt", prompt)
        go(browser)
        settled(
            lambda prompt=prompt: (
                made.scheduler.submitted and made.scheduler.submitted[-1].fields["prompt"] == prompt
            )
        )
    WebDriverWait(browser, 90).until(lambda _: "done in about" in browser.find_element(By.ID, "queue").text)
    rows = [row.text.split("\n")[0] for row in browser.find_elements(By.CSS_SELECTOR, "#queue li")]
    assert rows == ["first", "second", "third"]
    browser.find_element(By.CSS_SELECTOR, "#queue li:nth-child(2) .drop-job").click()
    settled(lambda: made.store.counts().get("queued") == 1)
    made.scheduler.gate.set()
    WebDriverWait(browser, 90).until(
        lambda _: len(browser.find_elements(By.CSS_SELECTOR, ".gallery img")) == 2
    )
    assert not browser.find_element(By.ID, "queue-box").is_displayed()


def test_what_is_being_made_is_looked_at(serve, browser):
    made = serve()
    made.scheduler.steps, made.scheduler.step_seconds = 4, 1.0
    for prompt in ("first", "second"):
        put(browser, "prompt", prompt)
        go(browser)
    WebDriverWait(browser, 90, 0.03).until(lambda _: "of 4" in browser.find_element(By.ID, "caption").text)
    assert browser.execute_script("return document.querySelectorAll('.gallery li').length") == 0
    WebDriverWait(browser, 90, 0.03).until(lambda _: browser.find_element(By.ID, "caption").text == "first")
    WebDriverWait(browser, 90, 0.03).until(lambda _: "of 4" in browser.find_element(By.ID, "caption").text)
    until(browser, ".card img").click()
    WebDriverWait(browser, 90, 0.03).until(
        lambda _: len(browser.find_elements(By.CSS_SELECTOR, ".card img")) == 2
    )
    assert browser.find_element(By.ID, "caption").text == "first", "who looks at something else is left there"


def test_several_images_are_all_in_the_gallery(serve, browser):
    serve()
    put(browser, "prompt", "stars")
    put(browser, "seed", "3")
    put(browser, "n", "3")
    go(browser)
    WebDriverWait(browser, 90).until(
        lambda _: len(browser.find_elements(By.CSS_SELECTOR, ".gallery img")) == 3
    )
    cards = browser.find_elements(By.CSS_SELECTOR, ".card")
    assert [card.accessible_name for card in cards] == [f"stars, seed {seed}" for seed in (3, 4, 5)]
    cards[2].click()
    WebDriverWait(browser, 90).until(lambda _: "seed 5" in browser.find_element(By.ID, "facts").text)
    assert made_picture(browser)[0, 0, 0] == 5 * 37


def test_the_gallery_outlives_the_page_and_gives_its_settings_back(serve, browser):
    serve()
    put(browser, "prompt", "a blue ring")
    put(browser, "seed", "11")
    put(browser, "width", "64")
    go(browser)
    made_picture(browser)
    browser.refresh()
    until(browser, "#form[data-ready]")
    card = until(browser, ".card img")
    assert browser.find_element(By.NAME, "prompt").get_property("value") == ""
    card.click()
    assert made_picture(browser)[0, 0, 0] == 11 * 37 % 256
    browser.find_element(By.CSS_SELECTOR, "summary").click()
    told = browser.find_element(By.ID, "parameters").text.split("\n")
    assert told[told.index("seed") + 1] == "11" and told[told.index("width") + 1] == "64"
    browser.find_element(By.ID, "reuse").click()
    said = {
        name: browser.find_element(By.NAME, name).get_property("value")
        for name in ("prompt", "seed", "width")
    }
    assert said == {"prompt": "a blue ring", "seed": "11", "width": "64"}
    browser.find_element(By.ID, "remove").click()
    WebDriverWait(browser, 90).until(lambda _: not browser.find_elements(By.CSS_SELECTOR, ".card"))


def test_a_video_is_made_and_played(serve, browser):
    made = serve()
    choose(browser, "video")
    put(browser, "prompt", "a square moving right")
    put(browser, "seed", "4")
    go(browser)
    video = until(browser, "#viewer[data-status=completed] video")
    WebDriverWait(browser, 90).until(lambda _: video.get_property("videoWidth") == 128)
    WebDriverWait(browser, 90).until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".gallery img"))
    assert made.scheduler.submitted[0].fields["num_frames"] == 17
    browser.refresh()
    until(browser, "#viewer[data-status=completed] video")


def test_what_was_uploaded_is_shown_from_where_it_lies(serve, browser, monkeypatch):
    with serving(lambda handler: send(handler, picture(48, 32), Content_Type="image/png")) as storage:
        elsewhere = f"http://127.0.0.1:{storage.port}"
        for name, value in (
            ("TYPE", "s3"),
            ("BUCKET_NAME", "b"),
            ("ACCESS_KEY_ID", "k"),
            ("SECRET_ACCESS_KEY", "s"),
        ):
            monkeypatch.setenv(f"TINYDIFF_{'CLOUD_STORAGE' if name == 'TYPE' else 'S3'}_{name}", value)
        monkeypatch.setenv("TINYDIFF_S3_ENDPOINT_URL", elsewhere)
        made = serve()
        put(browser, "prompt", "a star")
        go(browser)
        until(browser, ".card img")
        [output] = made.store.get(made.scheduler.submitted[0].id).outputs
        made.files.moved(output.file, f"{elsewhere}/b/a.png")
        browser.refresh()
        image = until(browser, "#viewer[data-status=completed] .media img")
        WebDriverWait(browser, 90).until(lambda _: image.get_property("naturalWidth") == 48)


def test_a_mistake_is_shown_at_its_field(serve, browser):
    made = serve()
    put(browser, "prompt", "a star")
    put(browser, "width", "100")
    go(browser)
    hint = until(browser, ".hint.error")
    field = browser.find_element(By.NAME, "width")
    assert "100 is not a multiple of 16" in hint.text and hint.get_attribute("id") == field.get_attribute(
        "aria-describedby"
    )
    assert field.get_attribute("aria-invalid") == "true" and browser.switch_to.active_element == field
    put(browser, "width", "96")
    go(browser)
    assert made_picture(browser).shape[1] == 96
    assert not browser.find_elements(By.CSS_SELECTOR, ".hint.error") and len(made.scheduler.submitted) == 1


def test_a_failed_job_says_why(serve, browser):
    made = serve()
    made.scheduler.fail = lambda job: Failure(
        "insufficient_memory", "the image does not fit into memory; 512 x 512 would"
    )
    put(browser, "prompt", "too large")
    go(browser)
    row = until(browser, "#queue [data-status=failed]")
    assert "512 x 512 would" in row.text and "512 x 512 would" in browser.find_element(By.ID, "caption").text
    row.find_element(By.CSS_SELECTOR, ".drop-job").click()
    WebDriverWait(browser, 90).until(lambda _: not browser.find_elements(By.CSS_SELECTOR, "#queue li"))


def test_a_key_is_asked_for_and_kept_for_this_tab(serve, browser):
    serve(api_key=("right",), open=False)
    for key, said in (("wrong", "stays in this tab"), ("right", "key")):
        WebDriverWait(browser, 90).until(
            lambda _, said=said: said in until(browser, "dialog[open] .hint").text
        )
        browser.find_element(By.ID, "key").send_keys(key, Keys.ENTER)
        if key == "wrong":
            until(browser, "dialog[open] .hint.error")
    until(browser, "#form[data-ready]")
    put(browser, "prompt", "a star")
    go(browser)
    made_picture(browser)
    browser.refresh()
    until(browser, ".card img")
    assert not browser.find_element(By.ID, "key-dialog").is_displayed()
    assert "right" not in browser.execute_script("return JSON.stringify(localStorage)")


def test_the_server_that_is_not_ready_says_how_far_it_is(serve, browser):
    made = serve()
    made.scheduler.phase = "warming"
    browser.refresh()
    assert WebDriverWait(browser, 90).until(
        lambda _: "warming" in (text := browser.find_element(By.ID, "state").text) and text
    )
    made.scheduler.phase = "ready"
    WebDriverWait(browser, 90).until(lambda _: browser.find_element(By.ID, "state").text == "ready")


def test_the_keyboard_alone_makes_an_image(serve, browser):
    serve()
    assert browser.switch_to.active_element == browser.find_element(By.NAME, "prompt")
    browser.switch_to.active_element.send_keys("a star")
    for _ in range(20):
        if browser.switch_to.active_element.get_attribute("id") == "go":
            break
        ActionChains(browser).send_keys(Keys.TAB).perform()
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    made_picture(browser)


def test_every_control_that_is_seen_has_a_name(serve, browser, tmp_path):
    serve()
    give_picture(browser, tmp_path)
    put(browser, "prompt", "a star")
    go(browser)
    made_picture(browser)
    controls = [
        each
        for each in browser.find_elements(
            By.CSS_SELECTOR, "button, input, textarea, a, canvas, progress, summary"
        )
        if each.is_displayed()
    ]
    assert len(controls) > 20
    assert [each.get_attribute("outerHTML") for each in controls if not each.accessible_name] == []


@pytest.mark.parametrize("width", [360, 768, 1360])
def test_the_page_fits_the_window(serve, browser, width):
    serve()
    with screen(browser, width, 780, touch=width < 500):
        put(browser, "prompt", "a star with a very long prompt " * 4)
        go(browser)
        made_picture(browser)
        for address in ("", "docs"):
            if address:
                browser.get(browser.current_url + address)
                until(browser, ".operation")
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_nothing_jumps_while_an_image_is_made(serve, browser):
    made = serve()
    made.scheduler.steps, made.scheduler.step_seconds = 6, 0.05
    browser.execute_script(
        "window.jumps = []; new PerformanceObserver((list) => "
        "window.jumps.push(...list.getEntries().filter((one) => !one.hadRecentInput)"
        ".map((one) => one.value))).observe({type: 'layout-shift', buffered: false})"
    )
    # What follows a key or a click within half a second is not counted, so there is neither.
    browser.execute_script(
        "document.getElementById('prompt').value = 'a star'; document.getElementById('form').requestSubmit()"
    )
    made_picture(browser)
    until(browser, ".card img")
    assert sum(browser.execute_script("return window.jumps")) < 0.1


def test_the_interface_is_drawn(serve, browser):
    serve()
    browser.get(browser.current_url + "docs")
    until(browser, ".operation")
    described = browser.execute_async_script(
        "const done = arguments[0]; fetch('openapi.json').then((a) => a.json()).then((d) => done(d))"
    )
    count = sum(len(methods) for methods in described["paths"].values())
    assert len(browser.find_elements(By.CSS_SELECTOR, ".operation")) == count > 20
    shown = browser.find_element(By.ID, "createImage").text
    assert "num_inference_steps" in shown and "from 1 to 1000" in shown and "curl" in shown
