"""A real Chromium for tests of the page, and what one does in it."""

import re
import shutil
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from tests.serve.fake import listening, picture, service

try:
    from selenium import webdriver
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
except ImportError:
    webdriver = None

BROWSERS = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
EXPECTED = re.compile(
    r"responded with a status of 4|/ready - .* status of 503|net::ERR_INTERNET_DISCONNECTED"
)
"""What a browser notes of refusals, and of a server that is out of reach."""


@pytest.fixture(scope="module")
def browser():
    """The browser of a module's tests."""
    if webdriver is None:
        pytest.fail("selenium is not installed: pip install -e '.[test]'")
    path, program = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if path is None or program is None:
        pytest.fail(
            "no Chromium with its chromedriver on this machine: apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = path
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1360,900",
        "--hide-scrollbars",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(program))
    yield driver
    driver.quit()


@pytest.fixture
def serve(browser, tmp_path):
    """serve(...) starts a server, opens its page, and returns the service. Afterwards nothing may be in the
    browser's log.
    """
    with ExitStack() as running:

        def start(row=None, open=True, **options):
            made = service(tmp_path, row, **options)
            browser.get(running.enter_context(listening(made)))
            browser.get_log("browser")
            if open:
                until(browser, "#form[data-ready]")
            return made

        yield start
        wrong = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [message for message in wrong if not EXPECTED.search(message)] == []


@contextmanager
def unreachable(browser):
    """The browser reaches no server for as long as this lasts."""
    conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **conditions})
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False, **conditions})


@contextmanager
def screen(browser, width, height, touch=False):
    """A window of this size; touch: as a phone has it."""
    size = {"width": width, "height": height, "deviceScaleFactor": 2 if touch else 1, "mobile": touch}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def until(browser, selector, seconds=90):
    """The first visible element, as soon as there is one."""
    return WebDriverWait(browser, seconds, 0.03).until(
        lambda _: next(
            (
                element
                for element in browser.find_elements(By.CSS_SELECTOR, selector)
                if element.is_displayed()
            ),
            None,
        )
    )


def says(browser, selector, text, seconds=20):
    """The first visible element that says `text`, as soon as there is one."""
    return WebDriverWait(browser, seconds, 0.03, (StaleElementReferenceException,)).until(
        lambda _: next(
            (
                e
                for e in browser.find_elements(By.CSS_SELECTOR, selector)
                if e.is_displayed() and text in e.text
            ),
            None,
        )
    )


def settled(condition, seconds=90.0):
    """Wait until a condition on this side holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def put(browser, name, text):
    field = browser.find_element(By.NAME, name)
    field.clear()
    field.send_keys(text)


def choose(browser, kind):
    browser.find_element(By.CSS_SELECTOR, f"input[value={kind}] + span").click()


def go(browser):
    browser.find_element(By.ID, "go").click()


def made_picture(browser):
    """The pixels of the image that is looked at, uint8 [H, W, 4]."""
    image = until(browser, "#viewer[data-status=completed] .media img:not(.preview)")
    width, height, *flat = browser.execute_async_script(
        """
        const [image, done] = arguments;
        image.decode().then(() => {
          const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
          const context = canvas.getContext("2d");
          context.drawImage(image, 0, 0);
          const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
          done([canvas.width, canvas.height, ...data]);
        });
        """,
        image,
    )
    return np.array(flat, np.uint8).reshape(height, width, 4)


def give_picture(browser, tmp_path, **more):
    path = tmp_path / f"given-{len(list(tmp_path.iterdir()))}.png"  # the browser reads it when it is sent
    path.write_bytes(picture(**more))
    browser.find_element(By.ID, "image").send_keys(str(path))
    until(browser, "#images img, #canvas")
