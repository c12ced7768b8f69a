"""Headless Chromium over its DevTools pipe: open a page, evaluate JavaScript in it, take a picture of it.

The pipe (file descriptors 3 and 4, JSON closed by a zero byte) needs neither a port nor a library. The commands are
those of https://chromedevtools.github.io/devtools-protocol.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

# Shared memory is small in containers, and root has no sandbox: the pages are our own.
_FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-extensions",
)  # fmt: skip


def find_chromium() -> str | None:
    """The browser's command, or None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class PageError(Exception):
    """The page threw, or the browser refused a command."""


class Chromium:
    """One browser with one page; a context manager. `version` is what the browser calls itself."""

    def __init__(self, command: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        self._pending, self._id = b"", 0
        self.process = subprocess.Popen(
            ["sh", "-c", f'exec "$0" "$@" 3</dev/fd/{commands} 4>/dev/fd/{answers}', command, *_FLAGS,
             f"--user-data-dir={self._profile.name}", "about:blank"],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._session: str | None = None
        self.version: str = self.command("Browser.getVersion")["product"]
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.command("Page.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def command(self, method: str, *, timeout_s: float = 60, **parameters: Any) -> dict[str, Any]:
        """The result of a DevTools command. Raises PageError, TimeoutError."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout_s
        while (answer := self._receive(deadline, method)).get("id") != self._id:
            pass  # an event, which nobody waits for
        if "error" in answer:
            raise PageError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, address: str) -> None:
        """Go to an address, and wait until the document and its modules have been loaded."""
        self.command("Page.navigate", url=address)
        deadline = time.monotonic() + 60
        while self.evaluate("location.href + document.readyState") != f"{address}complete":
            if time.monotonic() > deadline:
                raise TimeoutError(f"{address} was not loaded within 60 s")
            time.sleep(0.05)

    def evaluate(self, script: str, *, timeout_s: float = 60) -> Any:
        """The value of a JavaScript expression, awaited, as JSON. Raises PageError with what it threw."""
        result = self.command(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, timeout_s=timeout_s
        )
        if "exceptionDetails" in result:
            thrown = result["exceptionDetails"].get("exception", {})
            raise PageError(thrown.get("description") or result["exceptionDetails"]["text"])
        return result["result"].get("value")

    def screenshot(self, path: Path, *, width: int, height: int, dark: bool = False) -> None:
        """Write what a window of that size shows as PNG."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.command("Emulation.setEmulatedMedia", features=scheme)
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=width < 600
        )
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))

    def _receive(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._pending:
            readable, _, _ = select.select([self._read], [], [], max(deadline - time.monotonic(), 0))
            if not readable:
                raise TimeoutError(f"Chromium did not answer {method} in time")
            piece = os.read(self._read, 1 << 20)
            if not piece:
                raise PageError(f"Chromium ended with code {self.process.wait()} while it ran {method}")
            self._pending += piece
        message, _, self._pending = self._pending.partition(b"\0")
        result: dict[str, Any] = json.loads(message)
        return result
