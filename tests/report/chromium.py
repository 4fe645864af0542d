"""Chromium with a page open, and few words to ask it. Fixtures for tests of the page, skipped where there is none."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from pages import HEADLINE
from pages import mixed as mixed_comparison

from uft.report.page import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
SWITCHES = (
    *("--headless=new", "--no-sandbox", "--no-first-run", "--disable-dev-shm-usage", "--disable-gpu"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--force-device-scale-factor=1", "--hide-scrollbars"),
)
FIRST, SECOND, THIRD = HEADLINE


class Browser:
    def __init__(self, driver, folder: Path):
        self.driver = driver
        self.folder = folder
        self.written: dict[str, Path] = {}
        self.here = ""  # the page that is open, as `reset` may use it

    def open(self, name: str, comparison=None, hash: str = "", width: int = 1280, height: int = 900) -> None:
        if name not in self.written:
            self.written[name] = self.folder / f"{name}.html"
            self.written[name].write_text(render(comparison), encoding="utf-8")
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.get("about:blank")
        self.clear_logs()
        self.driver.get(address := self.written[name].as_uri() + hash)
        # Under load the driver can return before the scripts have run, and what is chosen till then is lost.
        self.until("document.readyState === 'complete' && document.URL.startsWith(arguments[0])", address.split("#")[0])
        self.here = name if (width, height) == (1280, 900) and not hash else ""

    def reset(self, name: str, comparison) -> None:
        if self.here != name:
            return self.open(name, comparison)
        self.clear_logs()
        self.click("#all-runs")
        forms = "form.reset(); form.dispatchEvent(new Event('input', {bubbles: true}))"
        return self.js(f"for (const form of document.forms) {{ {forms} }} scrollTo(0, 0)")

    def clear_logs(self) -> None:
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)

    def js(self, body: str, *values):
        return self.driver.execute_script(body, *values)

    def until(self, condition: str, *values, seconds: float = 60):
        end = time.monotonic() + seconds
        while not (found := self.js(f"return {condition}", *values)):
            assert time.monotonic() < end, condition
            time.sleep(0.05)
        return found

    def click(self, selector: str) -> None:
        self.js("document.querySelector(arguments[0]).click()", selector)

    def choose(self, selector: str, value: str) -> None:
        """As if typed: a value and the event that follows it."""
        change = "const node = document.querySelector(arguments[0]); node.value = arguments[1];"
        event = "node.dispatchEvent(new Event('input', {bubbles: true})); return node.value"
        assert self.js(f"{change} {event}", selector, value) == value, f"{selector} has no {value}"

    def texts(self, selector: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map(n => n.innerText.trim())", selector)

    def chart(self, selector: str, fields: str):
        """Fields of the traces of a chart, once it is drawn with what was asked last."""
        self.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        self.until("document.querySelector(arguments[0])?.closest('[aria-busy]').ariaBusy === 'false'", selector)
        picked = f"document.querySelector(arguments[0]).data.map(trace => JSON.parse(JSON.stringify({fields})))"
        return self.js(f"return {picked}", selector)

    def settle(self) -> None:
        """Several frames: what is in view is drawn one chart a frame."""
        frames = "let n = 12; const next = () => n-- ? requestAnimationFrame(next) : done(); next();"
        self.driver.execute_async_script(f"const done = arguments[0]; {frames}")

    def drag(self, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """With the mouse, between two points of a chart given in its own coordinates."""
        place = """const node = document.querySelector(arguments[0]);
            node.scrollIntoView({block: 'center', behavior: 'instant'});
            const {xaxis, yaxis} = node._fullLayout, box = node.getBoundingClientRect();
            return arguments[1].map(([x, y]) =>
                [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)])"""
        (x0, y0), (x1, y1) = self.js(place, selector, [start, end])
        self.mouse("mouseMoved", x0, y0, 0)
        self.settle()  # a click is one on what the mouse was over before
        self.mouse("mousePressed", x0, y0, 1)
        if start != end:
            self.mouse("mouseMoved", (x0 + x1) / 2, (y0 + y1) / 2, 1)
            self.mouse("mouseMoved", x1, y1, 1)
        self.mouse("mouseReleased", x1, y1, 0)
        self.settle()

    def mouse(self, kind: str, x: float, y: float, buttons: int) -> None:
        event = {"type": kind, "x": x, "y": y, "button": "left", "buttons": buttons, "clickCount": 1}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def shown_runs(self) -> list[str]:
        return self.js(
            "return [...document.querySelectorAll('#run-table tbody tr:not([hidden])')].map(r => r.dataset.run)"
        )

    def hash(self) -> str:
        return self.js("return location.hash")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[test]'")
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in SWITCHES:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Browser(driver, tmp_path_factory.mktemp("pages"))
    driver.quit()


@pytest.fixture(scope="session")
def mixed():
    return mixed_comparison()


@pytest.fixture
def page(browser, mixed):
    """Nine groups in a page as it was opened; it is loaded once, and set back to its start for every test."""
    browser.reset("mixed", mixed)
    return browser


def card(metric: str) -> str:
    return f'.card[data-metric="{metric}"] .chart'


def finished(comparison, group: str):
    return [run for run in comparison["runs"] if run["group"] == group and run["status"] == "finished"]
