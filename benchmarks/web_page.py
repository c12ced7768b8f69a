"""examples/web in headless Chromium: a server of it and of bundles, its modules called, its page used."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chromium import Chromium, find_chromium

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "web"
sys.path.insert(0, str(EXAMPLE))
import serve  # noqa: E402

TIMEOUT_S = 600


def missing() -> str | None:
    """What this needs and cannot find, or None."""
    if not (EXAMPLE / "node_modules").is_dir():
        return "the npm packages are not there: npm ci --ignore-scripts --prefix examples/web"
    return None if find_chromium() else "there is no chromium command: apt-get install chromium"


@contextmanager
def open_browser(bundles: Mapping[str, Path]) -> Iterator[Browser]:
    """Bundles by name, served with the example; only where nothing is `missing`."""
    command = find_chromium()
    assert command
    with serve.server(bundles) as server, Chromium(command) as chromium:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Browser(chromium, server)
        finally:
            server.shutdown()


class Browser:
    """Chromium on a server of the example and some bundles."""

    def __init__(self, chromium: Chromium, server: serve.ThreadingHTTPServer) -> None:
        self.chromium, self.server = chromium, server

    def run(self, script: str, bundle: str, *arguments: Any) -> Any:
        """The result of a script on a bundle, in a page with nothing in it and without the memory of the last one."""
        self.chromium.open(f"http://127.0.0.1:{self.server.server_port}/package.json?{time.monotonic_ns()}")
        words = ", ".join(json.dumps(word) for word in (f"{serve.BUNDLES}{bundle}/", *arguments))
        return self.chromium.evaluate(f"{script}({words})", timeout_s=TIMEOUT_S)

    def chat(self, bundle: str, prompts: Mapping[str, list[str]]) -> dict[str, Any]:
        """Type prompts for each adapter ("" is the base) into the page; the figures and answers that it shows.

        Raises RuntimeError with an error that it shows instead.
        """
        self.open(bundle)
        for adapter, texts in prompts.items():
            self._page(f"$('adapter').value = {json.dumps(adapter)}; $('adapter').dispatchEvent(new Event('change'))")
            self._wait()
            for text in texts:
                self.ask(text)
        figures = {name: self._page(f"return $('{name}').textContent") for name in ("load", "memory", "first", "speed")}
        answers = "return [...document.querySelectorAll('.assistant p')].map((each) => each.textContent)"
        return figures | {"answers": self._page(answers)}

    def open(self, bundle: str) -> None:
        """Show the page with a bundle, and wait until it takes input."""
        self.chromium.open(serve.address(self.server, bundle))
        self._wait()

    def personalize(self, rows: str, steps: int, learning_rate: float, *, stop: bool = False) -> dict[str, Any]:
        """Train on rows in the page: the losses that its curve shows, the adapter's file, and what it says at the end.

        With `stop` the button is pressed again once the curve has a point.

        Raises RuntimeError with what it says where it did not train.
        """
        self._page(
            f"const files = new DataTransfer(); files.items.add(new File([{json.dumps(rows)}], 'rows.jsonl'));"
            f"$('personalize').open = true; $('rows').files = files.files; $('steps').value = {steps};"
            f"$('rate').value = {learning_rate}; $('training').requestSubmit()"
        )
        if stop:
            self._wait("$('curve').querySelector('circle')")
            self._page("$('training').requestSubmit()")
        self._wait()
        says: str = self._page("return $('trained').textContent")
        if says.startswith("Not trained"):
            raise RuntimeError(says)
        losses = "[...$('curve').querySelectorAll('title')].map((each) => Number(each.textContent.split(': ')[1]))"
        file = "fetch($('download').href).then((file) => file.arrayBuffer()).then((file) => [...new Uint8Array(file)])"
        return {
            "losses": self._page(f"return {losses}"),
            "file": bytes(self._page(f"return {file}")),
            "says": says,
            "adapter": self._page("return $('adapter').value"),
        }

    def ask(self, text: str) -> str:
        """What the page answers to a prompt, with the adapter that is chosen."""
        self._page(f"$('prompt').value = {json.dumps(text)}; $('composer').requestSubmit()")
        self._wait()
        answer: str = self._page("return [...document.querySelectorAll('.assistant p')].at(-1).textContent")
        return answer

    def take_pictures(self, folder: Path) -> None:
        """What the page shows now: light.png, dark.png, phone.png."""
        folder.mkdir(parents=True, exist_ok=True)
        self.chromium.screenshot(folder / "light.png", width=900, height=720)
        self.chromium.screenshot(folder / "dark.png", width=900, height=720, dark=True)
        self.chromium.screenshot(folder / "phone.png", width=390, height=800, dark=True)

    def _page(self, script: str) -> Any:
        return self.chromium.evaluate(f"(($) => {{ {script} }})((id) => document.getElementById(id))")

    def _wait(self, condition: str = "!$('adapter').disabled") -> None:
        """Wait until something holds; if nothing is said, until the page takes input."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self._page(f"return Boolean({condition})"):
            error = self._page("return document.querySelector('.error')?.textContent")
            if error or time.monotonic() > deadline:
                raise RuntimeError(f"the page does not go on; it says {error!r}")
            time.sleep(0.05)
