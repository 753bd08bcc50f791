"""The explorer in a real browser: a server of its own, a browser, and pages that remember what they asked for
and complained of.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import pytest
from conditions import APP, ROOT, SHIPPED
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Dialog,
    Locator,
    Page,
    TimeoutError,
    ViewportSize,
    sync_playwright,
)

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
SHOTS = ROOT / "build" / "screenshots"
WAIT = 60_000
"""milliseconds that a page may take on a busy machine"""
TITLES = {
    "overview": "Overview",
    "transmission": "Transmission",
    "rows": "Data and screen",
    "row": "Row",
    "representations": "Representations",
    "parameters": "Parameters",
    "gradients": "Gradients",
    "live": "Live model",
    "detection": "Detection",
    "compare": "Compare",
    "report": "Report",
    "jobs": "Jobs",
    "methods": "Methods",
}
"""name of every page → its heading"""


class Server(NamedTuple):
    """A server of the explorer and the folder of runs that it shows."""

    url: str
    runs: Path
    process: subprocess.Popen[bytes]

    def at(self, page: str, **asked: str) -> str:
        """The address of a page."""
        query = "&".join(f"{name}={value}" for name, value in asked.items())
        return f"{self.url}/{'' if page == 'overview' else page}" + (f"?{query}" if query else "")


def folder_of_runs(folder: Path) -> Path:
    """A folder that holds a copy of the run that comes with the explorer."""
    shutil.copytree(SHIPPED, folder / "runs" / "demo")
    return folder / "runs"


@contextmanager
def serving(runs: Path) -> Iterator[Server]:
    """A server over a folder of runs; it has ended when the block has."""
    with _serving([str(APP / "serve.py")], APP / "main.py", runs) as server:
        yield server


@contextmanager
def serving_page(script: str, folder: Path) -> Iterator[Server]:
    """A server of one page: the floor to how fast any page can be."""
    (folder / "page.py").write_text(script)
    with _serving(["-m", "streamlit"], folder / "page.py", folder / "none") as server:
        yield server


@contextmanager
def _serving(streamlit: list[str], script: Path, runs: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        *streamlit,
        "run",
        str(script),
        "--server.port",
        str(port),
        "--server.fileWatcherType",
        "none",
    ]
    with (runs.parent / f"server-{port}.log").open("wb") as log:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [*command, "--", str(runs)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: is_healthy(url) or process.poll() is not None)
        assert process.poll() is None, (runs.parent / f"server-{port}.log").read_text()
        yield Server(url, runs, process)
    finally:
        process.kill()
        process.wait()


def is_healthy(url: str) -> bool:
    """Whether a server answers there."""
    try:
        with urlopen(f"{url}/_stcore/health", timeout=5) as answer:
            return answer.status == 200
    except (URLError, ConnectionError, TimeoutError):
        return False


def until(true: Callable[[], Any], *, seconds: float = 120) -> float:
    """How long it took until something was so."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < seconds, "it took too long"
        time.sleep(0.1)
    return time.monotonic() - started


@contextmanager
def launched() -> Iterator[Browser]:
    """Debian's chromium, or whatever `chromium` is on the PATH."""
    if not Path(CHROMIUM).is_file():
        pytest.skip("there is no chromium: `apt install chromium`")
    with sync_playwright() as player:
        opened = player.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@contextmanager
def visiting(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens visits, each a visitor of its own, and closes them at the end."""
    contexts: list[BrowserContext] = []

    def opened(
        server: Server, page: str | None = "overview", *, dark: bool = False, width: int = 1280, **asked: str
    ) -> Visit:
        size: ViewportSize = {"width": width, "height": 900}
        contexts.append(
            browser.new_context(
                viewport=size, color_scheme="dark" if dark else "light", accept_downloads=True
            )
        )
        visitor = Visit(server, contexts[-1].new_page())
        return visitor if page is None else visitor.go(page, **asked)

    yield opened
    for context in contexts:
        context.close()


class Visit:
    """One visitor with one page open."""

    def __init__(self, server: Server, page: Page) -> None:
        self.server, self.page = server, page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        page.set_default_timeout(WAIT)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", self._opened)
        page.context.on("request", lambda request: self.requests.append(request.url))

    def _opened(self, dialog: Dialog) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def _heard(self, message: ConsoleMessage) -> None:
        known = (
            "/_stcore/" in message.location.get("url", "") and "404" in message.text
        )  # looked for below the page's own path first
        if message.type == "error" and not known:
            self.complaints.append(f"{message.text} {message.location.get('url', '')}")

    def go(self, page: str, **asked: str) -> Visit:
        """Open a page by its address, as a link does."""
        return self.see(page, **asked).settle()

    def see(self, page: str, **asked: str) -> Visit:
        """Open a page by its address and wait for its heading alone."""
        self.page.goto(self.server.at(page, **asked))
        self.page.get_by_role("heading", level=1, name=TITLES[page], exact=True).wait_for()
        return self

    def turn(self, page: str) -> Visit:
        """Go to a page by the menu."""
        self.page.locator(
            f'[data-testid="stSidebarNavLink"][href$="/{"" if page == "overview" else page}"]'
        ).click()
        return self.arrive(page)

    def tab(self, name: str) -> Visit:
        """Open a tab of the page."""
        self.page.get_by_role("tab", name=name, exact=True).click()
        return self.until_asked(tab=name)

    def tabs(self) -> list[str]:
        """The page's tabs."""
        return [each.inner_text() for each in self.page.get_by_role("tab").all()]

    def arrive(self, page: str) -> Visit:
        """Wait until a page is there in full."""
        self.page.get_by_role("heading", level=1, name=TITLES[page], exact=True).wait_for()
        return self.settle()

    def settle(self) -> Visit:
        """Wait until nothing runs; what an action changes is waited for before."""
        self.page.wait_for_selector("#ready", state="attached")
        self.page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]')
        return self

    def wait(self, words: str) -> Visit:
        """Wait for words on the page."""
        self.page.get_by_text(words).first.wait_for(state="visible")
        return self.settle()

    def press(self, key: str) -> Visit:
        """Press a key with the focus on nothing."""
        self.page.evaluate("document.activeElement && document.activeElement.blur()")
        self.page.keyboard.press(key)
        return self

    def click(self, name: str) -> Visit:
        """Click a button."""
        self.page.get_by_role("button", name=name).first.click()
        return self

    def said(self) -> str:
        """All text of the page."""
        return self.page.get_by_test_id("stMain").inner_text()

    def counts(self) -> tuple[int, int, int]:
        """All, filtered and selected rows, as the bar has them."""
        told = re.search(r"All ([\d,]+) rows \| Filtered ([\d,]+) \| Selected ([\d,]+)", self.said())
        assert told, "the bar is not there"
        return tuple(int(one.replace(",", "")) for one in told.groups())  # type: ignore[return-value]

    def control(self, label: str) -> str:
        """What a control of the side bar shows."""
        return (
            self.page.get_by_test_id("stSidebar")
            .get_by_role("combobox", name=label, exact=True)
            .input_value()
        )

    def choose(self, label: str, option: str, number: int = 0) -> Visit:
        """Choose in a list, whether of the side bar or of the page; of several with that label in that
        one.
        """
        box = self.page.get_by_role("combobox", name=label, exact=True).nth(number)
        box.scroll_into_view_if_needed()
        for _ in range(5):  # a page that is drawn anew at this moment closes the list
            box.locator("xpath=..").get_by_role("button", name="Open").click()
            with suppress(TimeoutError):
                self.page.get_by_role("option", name=option, exact=True).click(timeout=3000)
                return self
            self.page.keyboard.press("Escape")
        raise AssertionError(f"{label} offers no {option}")

    def asked(self) -> dict[str, str]:
        """What stands in the address bar."""
        return {name: values[0] for name, values in parse_qs(urlsplit(self.page.url).query).items()}

    def until_asked(self, **wanted: str | None) -> Visit:
        """Wait until the address bar holds that (None: holds it no more)."""
        until(
            lambda: (
                self.page.wait_for_timeout(50),
                all(self.asked().get(name) == value for name, value in wanted.items()),
            )[1]
        )
        return self.settle()

    def chart(self, title: str) -> Locator:
        """A chart by the beginning of what it says of itself."""
        found = self.page.locator(f'[data-testid="stVegaLiteChart"][aria-label^="{title}"]')
        found.scroll_into_view_if_needed()
        found.locator("svg, canvas").first.wait_for()
        return found

    def brush(self, title: str) -> Visit:
        """Drag over the left half of a chart's marks."""
        box = self.chart(title).bounding_box()
        assert box
        x, y = box["x"], box["y"]
        self.page.mouse.move(x + box["width"] * 0.05, y + box["height"] * 0.05)
        self.page.mouse.down()
        self.page.mouse.move(x + box["width"] * 0.3, y + box["height"] * 0.5, steps=4)
        self.page.mouse.move(x + box["width"] * 0.5, y + box["height"] * 0.75, steps=4)
        self.page.mouse.up()
        return self

    def download(self, name: str) -> bytes:
        """What a button gives."""
        with self.page.expect_download() as got:
            self.click(name)
        return Path(got.value.path()).read_bytes()

    def tall(self, most: int = 6000) -> None:
        """Make the window as high as the page, so that a screenshot holds all of it."""
        size = self.page.viewport_size
        assert size
        high = self.page.get_by_test_id("stMain").evaluate("main => main.scrollHeight")
        self.page.set_viewport_size({"width": size["width"], "height": min(most, int(high) + 20)})
        self.page.wait_for_timeout(700)  # charts below the window are drawn when it grows
        self.settle()

    def shoot(self, name: str) -> None:
        """Keep a screenshot."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.tall()
        self.page.screenshot(path=SHOTS / f"{name}.png")

    def is_clean(self) -> bool:
        """No complaint, no dialog, no request to anywhere else."""
        strangers = [
            url
            for url in self.requests
            if urlsplit(url).scheme not in ("data", "blob", "about") and not is_ours(url, self.server)
        ]
        assert not self.complaints, self.complaints
        assert not self.dialogs, self.dialogs
        assert not strangers, strangers
        return True


def is_ours(url: str, server: Server) -> bool:
    """Whether an address is of this server."""
    return urlsplit(url).netloc == urlsplit(server.url).netloc
