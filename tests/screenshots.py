"""Screenshots of a page, light, dark and as a phone shows it, to look at: ``python -m tests.screenshots PAGE OUT``.

It needs ``pip install playwright`` and a Chromium, by default /usr/bin/chromium (``$CHROMIUM``). It fails where the
page asks for anything but itself, reports an error, or is wider than the screen.
"""

import os
import sys
from pathlib import Path

VIEWS = {
    "light": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "device_scale_factor": 2},
    "phone-dark": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "device_scale_factor": 2},
}


def take(page_file: Path, folder: Path) -> list[Path]:
    """Write a PNG of the whole page in each of ``VIEWS``; return their paths."""
    from playwright.sync_api import sync_playwright

    address = page_file.resolve().as_uri()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"))
        for name, view in VIEWS.items():
            page = browser.new_context(**view).new_page()
            asked, said = [], []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("console", lambda message, said=said: said.append(message.text))
            page.goto(address)
            strange = [url[:80] for url in asked if url != address and not url.startswith("data:")]
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            if strange or said or wide > 0:
                raise SystemExit(f"{name}: requests {strange}, messages {said}, {wide} pixels too wide")
            written.append(folder / f"{page_file.stem}-{name}.png")
            page.screenshot(path=written[-1], full_page=True)
        browser.close()
    return written


if __name__ == "__main__":
    for path in take(Path(sys.argv[1]), Path(sys.argv[2])):
        print(path)
