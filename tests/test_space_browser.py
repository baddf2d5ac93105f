"""The served page in a real browser: files go in, answers come out."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait
from tiny_model import TINY_TASKS, save_tiny_model

from data_builders.synthetic import SyntheticEcg

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 120
WriteRecord = Callable[..., tuple[Path, SyntheticEcg]]

CHROMIUM, CHROMEDRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and CHROMEDRIVER),
        reason="no Chromium to test with (Debian: apt-get install chromium chromium-driver)",
    ),
]


@pytest.fixture(scope="module")
def page_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real server with a small model."""
    model = save_tiny_model(tmp_path_factory.mktemp("hub"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = {"ECGMOE_MODEL": str(model), "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    settings["PYTHONPATH"] = str(ROOT)  # whether the package is installed or not
    settings["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("uploads"))
    log_path = tmp_path_factory.mktemp("log") / "server.txt"
    with log_path.open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "space/app.py"], cwd=ROOT, env=os.environ | settings, stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + 4 * WAIT_S
            while not answers(url):
                assert server.poll() is None, log_path.read_text()
                assert time.monotonic() < deadline, log_path.read_text()
                time.sleep(0.2)
            yield url
        finally:
            server.terminate()
            server.wait()
    assert "Traceback" not in log_path.read_text()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        "--window-size=1280,1600", f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(CHROMEDRIVER)))
    driver.set_page_load_timeout(WAIT_S)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: WebDriver, page_url: str) -> WebDriver:
    """The page, freshly loaded."""
    browser.get(page_url)
    wait_for(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "input[type=file]"))
    return browser


def wait_for(browser: WebDriver, condition: Callable[[], object]) -> None:
    WebDriverWait(browser, WAIT_S, ignored_exceptions=[Exception]).until(lambda _: condition())


def text_of(browser: WebDriver, element_id: str) -> str:
    return browser.find_element(By.ID, element_id).text


def upload(browser: WebDriver, *paths: Path) -> None:
    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys("\n".join(map(str, paths)))


def width_of(browser: WebDriver, element_id: str) -> int:
    """The width in pixels of the picture in an element, 0 until it is loaded."""
    script = "const i = document.querySelector(`#${arguments[0]} img`); return i && i.complete ? i.naturalWidth : 0"
    return browser.execute_script(script, element_id)


def test_a_wfdb_record_dropped_on_the_page_is_answered(page: WebDriver, write_record: WriteRecord) -> None:
    path, truth = write_record("dropped", sampling_rate=500)
    upload(page, path, path.with_suffix(".dat"))
    wait_for(page, lambda: "years" in text_of(page, "answers"))
    assert all(task in text_of(page, "answers") for task in TINY_TASKS)
    assert f"{len(truth.r_peaks_s)} beats" in text_of(page, "message")
    wait_for(page, lambda: width_of(page, "sheet") > 1000)
    wait_for(page, lambda: width_of(page, "experts") > 1000)


def test_a_bundled_example_is_answered(page: WebDriver) -> None:
    page.find_element(By.CSS_SELECTOR, "#examples input[value=sinus_75bpm]").click()
    wait_for(page, lambda: "years" in text_of(page, "answers"))
    assert "beats in 10 s" in text_of(page, "message")


def test_a_bad_file_is_told_in_words(page: WebDriver, write_record: WriteRecord) -> None:
    path, _ = write_record("alone")
    upload(page, path)
    wait_for(page, lambda: "Not answered." in text_of(page, "message"))
    assert "alone.dat" in text_of(page, "message")


def test_the_page_says_that_it_is_not_a_medical_device(page: WebDriver) -> None:
    assert "not a medical device" in page.find_element(By.TAG_NAME, "body").text


def test_the_page_asks_no_other_server(page: WebDriver, page_url: str) -> None:
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    asked = [name for name in page.execute_script(script) if not name.startswith(("data:", "blob:"))]
    assert asked
    assert [name for name in asked if not name.startswith(page_url)] == []
