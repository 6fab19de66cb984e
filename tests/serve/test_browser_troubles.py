"""The page in a real Chromium where something goes wrong: no server, a full one, no memory, two tabs, a
removal that was a mistake.
"""

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.serve.chromium import choose, go, made_picture, put, says, settled, unreachable, until
from tests.serve.fake import picture
from tests.serve.internet import send, serving


def make(browser, prompt="a star", **fields):
    """Ask for an image and wait until it is in the gallery."""
    before = len(browser.find_elements(By.CSS_SELECTOR, ".card img"))
    for name, value in {"prompt": prompt, **fields}.items():
        put(browser, name, value)
    go(browser)
    WebDriverWait(browser, 90).until(lambda _: len(cards(browser)) > before)


def cards(browser):
    return browser.find_elements(By.CSS_SELECTOR, ".card img")


def kept(browser):
    """What the browser remembers of what was made."""
    return browser.execute_script("return Object.keys(localStorage).filter((name) => name.includes('item-'))")


@pytest.fixture
def blind(browser):
    """The browser forbids pages its storage, as it does where cookies are blocked."""
    forbid = (
        "Object.defineProperty(window, '{}', {{ get() {{ throw new DOMException('', 'SecurityError'); }} }});"
    )
    script = forbid.format("localStorage") + forbid.format("sessionStorage")
    [added] = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script}).values()
    yield
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": added})


def test_start_from_this(serve, browser):
    made = serve({"image_use": "start"})
    make(browser, seed="5")
    for again in ("at once", "after a reload"):
        until(browser, "#restart").click()
        until(browser, "#canvas")
        put(browser, "prompt", f"a star, {again}")
        go(browser)
        settled(
            lambda again=again: any(job.fields["prompt"].endswith(again) for job in made.scheduler.submitted)
        )
        assert made.scheduler.submitted[-1].inputs["image_path"], "the image that was made is given"
        until(browser, "#viewer[data-status=completed]")
        browser.refresh()
        until(browser, "#form[data-ready]")
        until(browser, "#viewer[data-status=completed] .media img")


def test_start_from_an_image_in_another_storage_says_what_to_do(serve, browser, monkeypatch):
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
        made = serve({"image_use": "start"})
        make(browser)
        [output] = made.store.get(made.scheduler.submitted[0].id).outputs
        made.files.moved(output.file, f"{elsewhere}/b/a.png")
        browser.refresh()
        until(browser, "#viewer[data-status=completed] .media img")
        browser.find_element(By.ID, "restart").click()
        says(browser, "#given .hint.error", "lies in another storage")


def test_a_server_that_goes_is_reported_at_once_and_found_again(serve, browser):
    made = serve()
    says(browser, "#state", "ready")
    put(browser, "prompt", "a star")
    with unreachable(browser):
        go(browser)
        says(browser, "#state", "the server does not answer")
        assert browser.find_element(By.ID, "caption").text == "the server does not answer"
        assert (
            browser.find_element(By.ID, "news")
            .get_property("textContent")
            .endswith("the server does not answer")
        )
        until(browser, "#again")
    browser.find_element(By.ID, "again").click()
    says(browser, "#state", "ready")
    assert not browser.find_element(By.ID, "again").is_displayed() and not made.scheduler.submitted
    until(browser, "#retry").click()
    made_picture(browser)
    assert [job.fields["prompt"] for job in made.scheduler.submitted] == ["a star"]


def test_the_gallery_outlives_a_server_that_does_not_answer(serve, browser):
    serve()
    make(browser, "first", seed="3")
    make(browser, "second", seed="4")
    known = kept(browser)
    forms = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": FAILING})
    try:
        browser.refresh()
        until(browser, "#form[data-ready]")
        WebDriverWait(browser, 90).until(lambda _: browser.execute_script("return window.failed") >= 2)
        assert len(browser.find_elements(By.CSS_SELECTOR, ".card")) == 2 and sorted(kept(browser)) == sorted(
            known
        )
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", forms)
    browser.execute_script("window.fetch = window.whole")
    WebDriverWait(browser, 90).until(lambda _: len(cards(browser)) == 2)
    assert made_picture(browser)[0, 0, 0] == 4 * 37 % 256


FAILING = """
window.whole = window.fetch;
window.failed = 0;
window.fetch = (path, options) => String(path).includes("content?")
  ? (window.failed += 1, Promise.reject(new TypeError("Failed to fetch"))) : window.whole(path, options);
"""


def test_what_the_server_no_longer_has_leaves_the_gallery(serve, browser):
    made = serve()
    make(browser, "first")
    make(browser, "second")
    made.forget(made.store.get(made.scheduler.submitted[0].id))
    browser.refresh()
    until(browser, "#form[data-ready]")
    WebDriverWait(browser, 90).until(
        lambda _: len(browser.find_elements(By.CSS_SELECTOR, ".card")) == 1 and len(kept(browser)) == 1
    )


def test_two_tabs_have_one_gallery(serve, browser):
    serve()
    address, first = browser.current_url, browser.current_window_handle
    browser.switch_to.new_window("tab")
    try:
        browser.get(address)
        until(browser, "#form[data-ready]")
        make(browser, "from the second tab")
        browser.switch_to.window(first)
        WebDriverWait(browser, 90).until(lambda _: len(cards(browser)) == 1)
        make(browser, "from the first tab")
        assert len(kept(browser)) == 2
        browser.refresh()
        until(browser, "#form[data-ready]")
        WebDriverWait(browser, 90).until(lambda _: len(cards(browser)) == 2)
        names = [
            each.accessible_name.partition(",")[0] for each in browser.find_elements(By.CSS_SELECTOR, ".card")
        ]
        assert names == ["from the first tab", "from the second tab"]
        browser.find_elements(By.CSS_SELECTOR, ".card")[0].click()
        until(browser, "#remove").click()
    finally:
        for handle in browser.window_handles:
            if handle != first:
                browser.switch_to.window(handle)
                WebDriverWait(browser, 90).until(
                    lambda _: len(browser.find_elements(By.CSS_SELECTOR, ".card")) == 1
                )
                browser.close()
        browser.switch_to.window(first)


def test_a_browser_that_forbids_its_memory(serve, browser, blind):
    serve(api_key=("right",), open=False)
    until(browser, "dialog[open] #key").send_keys("right\n")
    until(browser, "#form[data-ready]")
    make(browser)
    made_picture(browser)
    browser.find_element(By.ID, "theme").click()
    assert browser.execute_script("return document.documentElement.dataset.theme") in ("light", "dark")


def test_a_full_memory_loses_the_page_nothing(serve, browser):
    serve()
    browser.execute_script("localStorage.setItem('other', 'x'.repeat(5 * 2 ** 20 - 40 - 'other'.length))")
    try:
        make(browser, "a" * 100)
        made_picture(browser)
    finally:
        browser.execute_script("localStorage.removeItem('other')")


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_full_queue_is_waited_out(serve, browser, kind):
    made = serve()
    made.scheduler.busy = 1.0
    choose(browser, kind)
    put(browser, "prompt", "a star")
    go(browser)
    says(browser, "#caption", "the server is busy; trying again in 1.0 s")
    assert not made.scheduler.submitted
    made.scheduler.busy = None
    until(browser, "#viewer[data-status=completed]")
    assert len(made.scheduler.submitted) == 1


def test_waiting_for_a_full_queue_can_be_cancelled(serve, browser):
    made = serve()
    made.scheduler.busy = 3600.0
    put(browser, "prompt", "a star")
    go(browser)
    says(browser, "#caption", "trying again in 60 min")
    browser.find_element(By.ID, "cancel").click()
    WebDriverWait(browser, 90).until(lambda _: not browser.find_elements(By.CSS_SELECTOR, "#queue li"))
    assert not made.scheduler.submitted


def test_a_video_is_followed_again_when_the_server_is_back(serve, browser):
    made = serve()
    made.scheduler.gate.clear()
    choose(browser, "video")
    put(browser, "prompt", "a square moving right")
    go(browser)
    says(browser, "#caption", "starting")
    with unreachable(browser):
        says(browser, "#state", "the server does not answer")
        made.scheduler.gate.set()
    until(browser, "#viewer[data-status=completed] video")
    assert len(made.scheduler.submitted) == 1


def leaving(browser):
    """Whether the browser would ask before it leaves the page."""
    return browser.execute_script(
        "const e = new Event('beforeunload', { cancelable: true }); dispatchEvent(e); return "
        "e.defaultPrevented"
    )


def test_leaving_the_page_asks_where_that_would_cancel(serve, browser):
    made = serve()
    assert not leaving(browser)
    made.scheduler.gate.clear()
    put(browser, "prompt", "a star")
    go(browser)
    settled(lambda: made.scheduler.submitted)
    assert leaving(browser)
    made.scheduler.gate.set()
    made_picture(browser)
    assert not leaving(browser)
    made.scheduler.gate.clear()
    choose(browser, "video")
    go(browser)
    settled(lambda: len(made.scheduler.submitted) == 2)
    says(browser, "#caption", "starting")
    assert not leaving(browser), "a video is made whoever looks"
    made.scheduler.gate.set()
    until(browser, "#viewer[data-status=completed] video")


def test_an_empty_prompt_asks_first(serve, browser):
    made = serve()
    go(browser)
    dialog = until(browser, "#sure")
    assert "no prompt" in dialog.text and browser.switch_to.active_element.text == "Write a prompt"
    browser.switch_to.active_element.click()
    assert browser.switch_to.active_element.get_attribute("id") == "prompt" and not made.scheduler.submitted
    go(browser)
    until(browser, "#sure button[value=yes]").click()
    made_picture(browser)
    assert made.scheduler.submitted[0].fields["prompt"] == ""


def test_a_removal_can_be_undone(serve, browser):
    made = serve()
    for prompt in ("first", "second"):
        make(browser, prompt)
    ids = {job.fields["prompt"]: job.id for job in made.scheduler.submitted}

    def shown():
        return [
            each.accessible_name.partition(",")[0] for each in browser.find_elements(By.CSS_SELECTOR, ".card")
        ]

    browser.find_elements(By.CSS_SELECTOR, ".card")[1].click()
    says(browser, "#caption", "first")
    browser.find_element(By.ID, "remove").click()
    assert shown() == ["second"] and len(kept(browser)) == 1
    until(browser, "#undo-removal").click()
    assert (
        shown() == ["second", "first"]
        and len(kept(browser)) == 2
        and not browser.find_element(By.ID, "removed").is_displayed()
    )
    assert browser.find_element(By.ID, "caption").text == "first" and made.store.get(ids["first"]) is not None
    browser.find_element(By.ID, "remove").click()
    until(browser, "#undo-removal")
    assert made.store.get(ids["first"]) is not None, "it can still be undone"
    browser.find_element(By.ID, "remove").click()  # another one: the first is now gone for good
    settled(lambda: made.store.get(ids["first"]) is None)
    assert made.store.get(ids["second"]) is not None
    browser.refresh()  # a page that is left can undo nothing
    settled(lambda: made.store.get(ids["second"]) is None)
    until(browser, "#form[data-ready]")
    assert shown() == [] == kept(browser)
