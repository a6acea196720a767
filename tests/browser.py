"""A headless Chromium for tests of pages, and what is checked on every page."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--force-prefers-reduced-motion",
)  # fmt: skip

FAULTS = """
const faults = [];
const isShown = (e) => e.checkVisibility({ visibilityProperty: true });
const nameOf = (e) => [e.getAttribute("aria-label"), e.title, e.textContent.trim(),
  ...[...(e.labels ?? [])].map((l) => l.textContent.trim()),
  ...(e.getAttribute("aria-labelledby") ?? "").split(" ").map((id) => document.getElementById(id)?.textContent ?? "")]
  .find(Boolean);
const seen = new Set();
for (const e of document.querySelectorAll("[id]")) {
  if (seen.has(e.id)) faults.push(`the id ${e.id} is there twice`);
  seen.add(e.id);
}
for (const e of document.querySelectorAll("button, a, input, select, textarea, [role=region], dialog, progress")) {
  if (!nameOf(e)) faults.push(`${e.outerHTML.slice(0, 80)} has no name`);
}
for (const e of document.querySelectorAll("input, select, textarea")) {
  const labels = [...(e.labels ?? [])].some((l) => l.textContent.trim());
  if (!labels && !e.getAttribute("aria-label")) faults.push(`${e.id || e.outerHTML.slice(0, 80)} has no label`);
}
for (const e of document.querySelectorAll("[aria-labelledby], [aria-describedby]")) {
  for (const id of (e.getAttribute("aria-labelledby") ?? e.getAttribute("aria-describedby")).split(" ")) {
    if (isShown(e) && !document.getElementById(id)) faults.push(`${id} names nothing`);
  }
}
if (document.querySelectorAll("main").length !== 1) faults.push("there is not one main");
if (document.documentElement.lang !== "en") faults.push("no language");
const levels = [...document.querySelectorAll("h1, h2, h3")].filter(isShown).map((e) => Number(e.tagName[1]));
if (levels.filter((l) => l === 1).length !== 1) faults.push("there is not one h1");
if (document.documentElement.scrollWidth > innerWidth) faults.push(`it scrolls sideways: ${innerWidth}`);

const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const over = (top, below) => {
  const alpha = top[3] ?? 1;
  return [0, 1, 2].map((i) => top[i] * alpha + below[i] * (1 - alpha));
};
const canvas = parse(getComputedStyle(document.body).backgroundColor);
const backOf = (e) => {
  const stack = [];
  for (let at = e; at; at = at.parentElement) stack.push(parse(getComputedStyle(at).backgroundColor));
  return stack.reverse().reduce((below, top) => over(top, below), canvas);
};
const luminance = (rgb) => {
  const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const e = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !isShown(e) || e.closest("option, :disabled, .unseen, .skip")) continue;
  const back = backOf(e);
  const [light, dark] = [luminance(over(parse(getComputedStyle(e).color), back)), luminance(back)].sort((a, b) => b - a);
  const ratio = (light + 0.05) / (dark + 0.05);
  if (ratio < 4.5) faults.push(`contrast ${ratio.toFixed(2)} of "${walker.currentNode.data.trim().slice(0, 30)}"`);
}
return faults;
"""
"""Collects what keeps people off a page: elements without names, sideways scrolling, text of too little contrast (WCAG
1.4.3: 4.5 to 1)."""


@contextmanager
def chromium(folder: Path) -> Iterator[Any]:
    """A driver of a browser with an empty profile, downloads going to `folder`. Skips where there is no browser."""
    pytest.importorskip("selenium", reason="pip install selenium")
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("install chromium and its chromedriver (Debian: chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield running
    finally:
        running.quit()


class Page:
    """A page in the browser, with the few things that tests do to it."""

    def __init__(self, driver: Any, url: str):
        self.driver, self.url = driver, url

    def open(self, view: str = "ask", width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """Load a view anew, with nothing kept of earlier visits."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(f"{self.url}/#{view}")
        self.driver.execute_script("localStorage.clear(); sessionStorage.clear()")
        self.driver.refresh()
        return self

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        """The first element that fits, as soon as one does."""
        return self.until(lambda: (self.all(selector) or [None])[0], selector)

    def text(self, selector: str) -> str:
        """All text of an element, shown or not."""
        return self.one(selector).get_property("textContent")

    def until(self, condition: Callable[[], Any], what: str = "", timeout_s: float = 30.0) -> Any:
        """What the condition gives as soon as it is true; elements that are replaced meanwhile are looked for again."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            try:
                if found := condition():
                    return found
            except StaleElementReferenceException:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not within {timeout_s} s: {what or condition}")

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def faults(self) -> list[str]:
        """What is wrong with what is shown (`FAULTS`)."""
        return self.script(FAULTS)

    def complaints(self) -> list[str]:
        """What the browser has logged since the last call: errors of scripts, refused calls, breaches of the policy."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
