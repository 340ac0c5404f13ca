"""A real browser for tests of pages.

Needs the package ``playwright`` and Chromium: the one that Playwright installs, or one of the system. As root on Debian
the system's package is installed where there is none, so that continuous integration always looks.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

SYSTEM_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def launch(starter: "playwright.Playwright") -> "playwright.Browser":
    """Starts Chromium; skips the test where there is none."""
    own = Path(starter.chromium.executable_path)
    path = str(own) if own.is_file() else find_system_browser() or (install_chromium() and find_system_browser())
    if not path:
        pytest.skip("no Chromium was found: `playwright install chromium`, or install the system's package chromium")
    # Its sandbox does not work for root, as which containers run; the page is our own.
    return starter.chromium.launch(executable_path=path, args=["--no-sandbox"])


def find_system_browser() -> str | None:
    return next(filter(None, map(shutil.which, SYSTEM_BROWSERS)), None)


def install_chromium() -> bool:
    """Installs the package where that needs nobody's permission; whether it did."""
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists() or shutil.which("apt-get") is None:
        return False
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=60", "install", "chromium"]
    for words in (install, ["apt-get", "update"], install):  # the lists may be missing, or old
        done = subprocess.run(words, env=environment, capture_output=True, timeout=400, check=False)
        if words is install and done.returncode == 0:
            return True
    return False


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as starter:
        browser = launch(starter)
        yield browser
        browser.close()
