"""A service for the page. The browser is that of all tests (tests/conftest.py).

WUERSTCHEN_PAGE_URL names a running service to test the page of; tests that steer the service are then
skipped.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

_skipped_for_browser = 0


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
