"""A browser for the session, and a service for its page.

WUERSTCHEN_PAGE_URL names a running service to test the page of; tests that steer the service are then
skipped. WUERSTCHEN_REQUIRE_BROWSER=1 makes a missing browser an error.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

sys.path.insert(0, str(Path(__file__).parent))

_skipped_for_browser = 0


def _find(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """Headless Chromium, or a skip where there is none."""
    chromium, driver = _find("chromium", "chromium-browser", "google-chrome"), _find("chromedriver")
    if chromium is None or driver is None:
        if os.environ.get("WUERSTCHEN_REQUIRE_BROWSER") == "1":
            pytest.fail(
                "chromium and chromedriver are required; on Debian: apt-get install chromium chromium-driver"
            )
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium has none for root
    driver = webdriver.Chrome(options=options, service=Service(driver))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def _running_fake() -> Iterator:
    from fake_service import FakeService

    fake = FakeService()
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def fake(request: pytest.FixtureRequest):
    """The service without a model, to be steered by the test."""
    if os.environ.get("WUERSTCHEN_PAGE_URL"):
        pytest.skip("steers the service, which a real one does not let")
    fake = request.getfixturevalue("_running_fake")
    fake.reset()
    return fake


@pytest.fixture
def service(request: pytest.FixtureRequest) -> str:
    """The address of the service whose page is tested."""
    return os.environ.get("WUERSTCHEN_PAGE_URL") or request.getfixturevalue("fake").url


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _skipped_for_browser
    if report.skipped and "chromedriver is not installed" in str(report.longrepr):
        _skipped_for_browser += 1


def pytest_terminal_summary(terminalreporter) -> None:
    if _skipped_for_browser:
        terminalreporter.write_line(
            f"{_skipped_for_browser} tests of the page skipped: chromium or chromedriver is not installed"
        )
