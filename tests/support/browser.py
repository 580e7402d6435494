"""A real browser without a window: Debian's Chromium, driven by playwright (`make test-browser`)."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest

# The tests may be root's. MLflow shows pages in a sandboxed frame, in which the driver looks only if the page's own
# process holds it.
OPTIONS = ["--no-sandbox", "--disable-features=IsolateSandboxedIframes"]
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def opened(width: int = 1500, height: int = 1000) -> Iterator:
    """An empty page of a browser that has never seen any; skips the test where there is no browser or no driver."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=OPTIONS)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(60_000)
            yield page
        finally:
            browser.close()
