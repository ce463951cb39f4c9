"""A picture of the page for the docs: `python examples/app/screenshot.py` (needs Chromium and playwright)."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
)
PATIENCE = 300_000.0  # ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "examples" / "app.png")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument(
        "--positions", type=int, nargs="+", default=[2, 6, 4], help="of the slider, drawn in this order"
    )
    args = parser.parse_args()
    from playwright.sync_api import expect, sync_playwright

    command = [sys.executable, "-u", str(ROOT / "examples/app/app.py"), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        address = next(line.split()[1] for line in server.stdout if line.startswith("open "))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=args.chromium, args=FLAGS)
            page = browser.new_page(viewport={"width": args.width, "height": 900}, color_scheme="light")
            page.goto(address)
            spent = page.locator("#dpx-spent")
            expect(spent).to_contain_text("in 1 release", timeout=PATIENCE)
            slider = page.locator("#dpx-epsilon input[type=range]")
            drawn = {5}  # when the page opens
            for position in args.positions:
                slider.fill(str(position))
                page.locator("#dpx-draw").click()
                drawn.add(position)
                expect(spent).to_contain_text(f"in {len(drawn)} release", timeout=PATIENCE)
                expect(page.locator("#dpx-pictures .dpx-strip img")).to_have_count(len(drawn))
            page.mouse.move(0, 0)
            page.wait_for_timeout(1000)  # for the marks of progress to fade
            args.out.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=args.out, full_page=True)
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=60)
    print(args.out)


if __name__ == "__main__":
    main()
