"""A page on which a person says which of two segments is better.

It is served to this machine alone. What a page of somebody else's asks for (by another name of this machine,
from another origin, without the token) is refused, and of what is sent at most a kilobyte is read.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import struct
import sys
import threading
import zlib
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from flowpolicy.data.zarr_reading import open_store
from flowpolicy.errors import ConfigError, DataError, FlowPolicyError
from flowpolicy.evaluation.video import frame_timing
from flowpolicy.preferences.labels import Answers
from flowpolicy.preferences.pairs import FRAME, Pairs, read_pairs
from flowpolicy.ranges import between
from flowpolicy.settings import Settings

logger = logging.getLogger(__name__)
HOST = "127.0.0.1"
LONGEST_BODY = 1024
PATIENCE_S = 10.0
"""For a request that does not go on."""
_CLIP = re.compile(r"/clip/(\d{1,9})/(left|right)")


@dataclass(frozen=True)
class LabelConfig(Settings):
    """What is labelled, and where.

    Attributes:
        pairs: store of pairs with frames.
        port: of 127.0.0.1; 0 takes a free one.
    """

    pairs: str
    port: Annotated[int, between(0, 65535)] = 0


class LabelPage(ThreadingHTTPServer):
    """The server of a store's page; answers are on disk before they are acknowledged.

    Args:
        config: which store, and where.

    Raises:
        DataError: the store is not usable, has no frames, or is being labelled on another page.
        FlowPolicyError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, config: LabelConfig) -> None:
        store, port = config.pairs, config.port
        self.pairs: Pairs = read_pairs(store)
        self.answers = Answers(store, self.pairs)
        with open_store(store) as opened:
            if FRAME not in opened.arrays:
                raise DataError(f"{store} has no frames to show; collect pairs with video=true.")
            self._frames: Any = opened.read(FRAME)
        self.stride, self.fps = frame_timing(float(self.pairs.demos.attributes["fps"]))
        self.token, self.lock = secrets.token_urlsafe(16), threading.Lock()
        self._alone = FileLock(f"{self.answers.path}.lock", timeout=0)
        try:
            self._alone.acquire()
        except Timeout as error:
            raise DataError(f"{store} is being labelled on another page; use that one.") from error
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise FlowPolicyError(f"Port {port} of {HOST} is not free; choose another port.") from error

    def server_close(self) -> None:
        """No more answers are taken."""
        super().server_close()
        self._alone.release()
        Path(self._alone.lock_file).unlink(missing_ok=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone away is nobody's concern."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """Of the page."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def clip(self, pair: int, side: str) -> NDArray[np.uint8]:
        """Frames ``(n, H, W, 3)`` of a segment."""
        rows = self.pairs.rows(2 * pair + (side == "right"))
        frames: NDArray[np.uint8] = self._frames[rows][:: self.stride]
        return frames


class _Handler(BaseHTTPRequestHandler):
    server: LabelPage
    timeout = PATIENCE_S
    server_version, sys_version = "flowpolicy", ""

    def do_GET(self) -> None:
        """The page, what has been answered, or a clip."""
        clip = _CLIP.fullmatch(self.path)
        if not self._is_ours():
            self._refuse(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            self._send_page()
        elif self.path == "/state":
            with self.server.lock:
                state = {"pairs": len(self.server.pairs), "fps": self.server.fps}
                content = json.dumps({**state, "answers": self.server.answers.given}).encode()
            self._send(content, "application/json")
        elif clip is not None and int(clip[1]) < len(self.server.pairs):
            frames = self.server.clip(int(clip[1]), clip[2])
            image = png(frames.reshape(-1, *frames.shape[2:]))
            self._send(image, "image/png", {"X-Frames": str(len(frames))})
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """An answer: ``{"pair": 3, "answer": "left"}``."""
        length = self.headers.get("Content-Length", "")
        token = self.headers.get("X-Token", "")
        if not self._is_ours() or not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.FORBIDDEN)
        elif self.path != "/answer":
            self._refuse(HTTPStatus.NOT_FOUND)
        elif not re.fullmatch(r"\d{1,9}", length) or int(length) > LONGEST_BODY:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            try:
                content = json.loads(self.rfile.read(int(length)))
                pair, answer = content["pair"], content["answer"]
                if type(pair) is not int or type(answer) is not str:
                    raise TypeError
            except (ValueError, TypeError, KeyError, RecursionError):
                self._refuse(HTTPStatus.BAD_REQUEST)
                return
            self._answer(pair, answer)

    def _answer(self, pair: int, answer: str) -> None:
        try:
            with self.server.lock:
                self.server.answers.answer(pair, answer)
        except ConfigError:
            self._refuse(HTTPStatus.BAD_REQUEST)
        except FlowPolicyError as error:  # a full disk: the person is told
            self._send(str(error).encode(), "text/plain", status=HTTPStatus.INTERNAL_SERVER_ERROR)
        else:
            self._send(b"{}", "application/json")

    def _is_ours(self) -> bool:
        """Whether the browser means this server, by its own name, and no page of another origin asks."""
        port = self.server.server_address[1]
        hosts = (f"{HOST}:{port}", f"localhost:{port}")
        origin = self.headers.get("Origin")
        return self.headers.get("Host") in hosts and origin in (None, *(f"http://{host}" for host in hosts))

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        text = text.replace("@NONCE@", nonce).replace("@TOKEN@", self.server.token)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self._send(text.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def _send(
        self,
        content: bytes,
        kind: str,
        headers: dict[str, str] | None = None,
        status: HTTPStatus = HTTPStatus.OK,
    ) -> None:
        self.send_response(status)
        fixed = {
            "Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
        }  # fmt: skip
        for name, value in {**fixed, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True
        self._send(status.phrase.encode(), "text/plain", status=status)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is said of requests."""


def png(image: NDArray[np.uint8]) -> bytes:
    """An image ``(H, W, 3)`` as a PNG file."""
    height, width = image.shape[:2]

    def part(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    # Each row is stored as its difference to the one above (filter 2), which a picture has little of.
    lines = np.diff(image.reshape(height, width * 3), axis=0, prepend=np.zeros((1, width * 3), np.uint8))
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), lines], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = part(b"IHDR", header) + part(b"IDAT", zlib.compress(filtered.tobytes(), 1)) + part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content
