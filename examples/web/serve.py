"""Serves this page and bundle folders on this machine, with the two headers that let WebAssembly use threads.

Run: python serve.py BUNDLE [BUNDLE …]        (needs nothing but Python; `npm ci` has fetched node_modules before)

Threads need SharedArrayBuffer, which browsers give only to a page that is isolated from other origins. Whatever serves
a page for real has to send the same two headers (COOP and COEP); without them the page runs on one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

PAGE = Path(__file__).resolve().parent
BUNDLES = "/bundles/"


class Handler(SimpleHTTPRequestHandler):
    """Files of the page's folder, and those of each bundle under /bundles/NAME/."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm",
    }  # fmt: skip

    def __init__(self, *arguments: object, bundles: Mapping[str, Path], **options: object) -> None:
        self.bundles = bundles
        super().__init__(*arguments, **options)

    def translate_path(self, path: str) -> str:
        """A file of the page or of a bundle; `..` never leaves either, which the parent class sees to."""
        name, slash, file = unquote(urlsplit(path).path).removeprefix(BUNDLES).partition("/")
        if path.startswith(BUNDLES) and slash and name in self.bundles:
            self.directory = str(self.bundles[name])
            return super().translate_path(f"/{quote(file)}")
        self.directory = str(PAGE)
        return super().translate_path(path)

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing: the page itself says what it could not load."""


def server(bundles: Mapping[str, Path], port: int = 0) -> ThreadingHTTPServer:
    """A server of bundles by name that listens on this machine alone; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, bundles=bundles))


def address(of: ThreadingHTTPServer, name: str) -> str:
    """The page with a bundle opened."""
    return f"http://127.0.0.1:{of.server_port}/?bundle={quote(f'{BUNDLES}{name}/')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--port", type=int, default=8000)
    flags = parser.parse_args()
    bundles = {folder.resolve().name: folder.resolve() for folder in flags.bundles}
    if len(bundles) < len(flags.bundles):
        parser.error("two bundles have the same name")
    with server(bundles, flags.port) as running:
        for name in bundles:
            print(f"{name}: {address(running, name)}")
        running.serve_forever()


if __name__ == "__main__":
    main()
