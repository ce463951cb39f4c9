"""The page in headless Chromium: typing, sliding and drawing change picture and report; nothing leaves for elsewhere or stays behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .browser import CHROMIUM, FLAGS, serve

pytest.importorskip("gradio", reason="pip install 'hf_dp_xattn[app]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install 'hf_dp_xattn[dev]'")

PROMPT = (
    "a small zebra cross in the centre, jukebox background"  # two words that the page itself does not have
)
WORDS = (b"zebra", b"jukebox")
PATIENCE = 240_000.0  # ms; a busy machine is slow, not wrong
# everything that the page could keep in this browser
STORED = """async () => {
  const done = (request) => new Promise((yes, no) => { request.onsuccess = () => yes(request.result); request.onerror = no; });
  let found = JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href, await caches.keys()]);
  for (const {name, version} of await indexedDB.databases()) {
    const db = await done(indexedDB.open(name, version));
    for (const store of db.objectStoreNames) found += JSON.stringify(await done(db.transaction(store).objectStore(store).getAll()));
  }
  return found;
}"""


class Page:
    """What a visitor does and sees."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def text(self, name: str) -> str:
        return str(self.page.locator(f"#dpx-{name}").inner_text())

    def picture(self) -> str:
        """The protected one."""
        return str(self.page.locator("#dpx-pictures .dpx-pair img").nth(1).get_attribute("src"))

    def wait(self, name: str, text: str) -> None:
        sync_api.expect(self.page.locator(f"#dpx-{name}")).to_contain_text(text, timeout=PATIENCE)

    def drag(self, to: int, *, drop: bool = True) -> None:
        """The slider's thumb to a position 0..7."""
        box = self.page.locator("#dpx-epsilon input[type=range]").bounding_box()
        assert box is not None
        y, at = box["y"] + box["height"] / 2, lambda i: box["x"] + 8 + (box["width"] - 16) * i / 7
        self.page.mouse.move(at(5), y)
        self.page.mouse.down()
        self.page.mouse.move(at(to), y, steps=4)
        if drop:
            self.page.mouse.up()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_a_visit(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []
    complaints: list[str] = []
    with serve(tmp_path) as (address, log, temporary), sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        tab.set_default_timeout(PATIENCE)
        tab.on("request", lambda r: asked.append((r.method, r.url)))
        tab.on("pageerror", lambda e: complaints.append(str(e)))
        tab.goto(address)
        visit = Page(tab)

        visit.wait("spent", "in 1 release")  # the example's prompt, drawn when the page opens
        example = visit.picture()
        assert "(16, 1e-05)-differentially private" in visit.text("report")

        tab.locator("#dpx-prompt textarea").fill(PROMPT)
        tab.locator("#dpx-draw").click()
        tab.wait_for_function(
            f"document.querySelectorAll('#dpx-pictures .dpx-pair img')[1].src != '{example}'"
        )
        visit.wait("spent", "ε = 16")
        assert "in 1 release" in visit.text("spent")  # another prompt is another context
        first = visit.picture()

        visit.drag(2, drop=False)  # the plan follows the thumb, and nothing is spent
        visit.wait("plan", "ε = 2")
        assert "in 1 release" in visit.text("spent") and visit.picture() == first
        tab.mouse.up()
        visit.wait("spent", "in 2 releases")
        assert "ε = 18" in visit.text("spent") and "Released once and charged: ε = 2" in visit.text("status")
        assert "(2, 1e-05)-differentially private" in visit.text("report")
        second = visit.picture()
        assert second not in (first, example)

        tab.locator("#dpx-epsilon input[type=range]").focus()
        for _ in range(3):  # with the keys: back to 16, then draw
            tab.keyboard.press("ArrowRight")
        visit.wait("plan", "ε = 16")
        assert visit.picture() == second
        tab.locator("#dpx-draw").click()
        visit.wait("status", "Nothing was charged")
        assert visit.picture() == first and "ε = 18" in visit.text("spent")

        tab.locator("#dpx-reset").click()
        visit.wait("spent", "in 1 release")

        tab.set_viewport_size({"width": 400, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400  # nothing to scroll sideways
        stored = tab.evaluate(STORED)
        browser.close()

    assert not complaints
    assert all(url.startswith((f"{address}/", "data:", "blob:")) for _, url in asked), asked
    kept = {"urls": repr(asked).encode(), "browser": stored.encode(), "log": log.read_bytes()}
    kept |= {str(f): f.read_bytes() for f in temporary.rglob("*") if f.is_file()}
    for where, content in kept.items():
        assert not any(word in content.lower() for word in WORDS), where
    assert not [f for f in kept if f.endswith((".png", ".webp", ".jpg"))]
