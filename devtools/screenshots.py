"""Take the pictures of the page to talk to the model: `python -m devtools.screenshots FOLDER`.

Needs Debian's chromium. The predictor serves the demo model, which is published on its volume only after the first
picture, so that the page shows the state of a load.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from devtools import processes
from devtools.paths import DEMO_MODEL

REFERENCE = "hf://demo/arithmetic"
DESKTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}
QUESTIONS = ("What is 17 + 25?", "Please subtract 22 from 75.", "Who are you?")
WAIT_MS = 120_000


def main() -> int:
    """Take the pictures and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m devtools.screenshots", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the PNGs are written")
    folder: Path = parser.parse_args().folder
    chromium = shutil.which("chromium")
    if chromium is None:
        print("error: chromium is not installed. Debian: apt-get install chromium", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    take(folder, chromium)
    return 0


def take(folder: Path, chromium: str) -> None:
    """Take all pictures with the browser whose program is `chromium`."""
    expect.set_options(timeout=WAIT_MS)
    with ExitStack() as stack:
        volume = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        flags = ["--model_dir", str(volume), "--model_reference", REFERENCE, "--snapshot_wait_seconds", "600"]
        flags += ["--log_level", "WARNING"]
        server = stack.enter_context(
            processes.predictor(flags, model_name="arithmetic", port=processes.free_port(), until="live")
        )
        playwright = stack.enter_context(sync_playwright())
        # Root cannot use chromium's sandbox.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        with open_page(browser, server.url, DESKTOP, "light") as page:
            expect(page.get_by_role("status")).to_contain_text("waiting for the snapshot")
            page.screenshot(path=folder / "playground-loading.png")
            with processes.local_hub({"demo/arithmetic": DEMO_MODEL}) as hub:
                processes.initialize(REFERENCE, volume, hub)
            expect(page.get_by_role("status")).to_have_text("ready")
            chat(page)
            page.screenshot(path=folder / "playground.png")
        with open_page(browser, server.url, DESKTOP, "dark") as page:
            chat(page)
            page.screenshot(path=folder / "playground-dark.png")
        with open_page(browser, server.url, PHONE, "light") as page:
            chat(page)
            page.screenshot(path=folder / "playground-phone.png")
        browser.close()


@contextmanager
def open_page(browser: Browser, url: str, size: ViewportSize, scheme: Literal["light", "dark"]) -> Iterator[Page]:
    """Open the page in a window of this size."""
    context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.goto(url)
    yield page
    context.close()


def chat(page: Page) -> None:
    """Send the questions, and wait for each answer."""
    expect(page.get_by_role("status")).to_have_text("ready")
    for number, question in enumerate(QUESTIONS, start=1):
        page.get_by_label("Message", exact=True).fill(question)
        page.keyboard.press("Enter")
        expect(page.locator("article.assistant .figures")).to_have_count(number)
        expect(page.locator("article.assistant .figures").last).to_be_visible()


if __name__ == "__main__":
    sys.exit(main())
