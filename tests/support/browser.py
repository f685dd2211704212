"""A headless Chromium, controlled through a pipe by the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 30


def find() -> str | None:
    """The program, if one is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


_WITH_PIPES = """
import os, sys
pipes = [os.dup(int(descriptor)) for descriptor in sys.argv[1:3]]
for wanted, pipe in enumerate(pipes, 3):  # the browser reads from 3 and writes to 4
    os.dup2(pipe, wanted)
    os.set_inheritable(wanted, True)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer = b""
        self._last = 0
        target = self.send("Target.createTarget", session=None, url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", session=None, targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")

    def send(self, method: str, session: str | None = "", **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        return self._wait(lambda answer: answer.get("id") == self._last)["result"]  # type: ignore[no-any-return]

    def _wait(self, wanted: Any) -> dict[str, Any]:
        while True:
            while b"\0" not in self._buffer:
                chunk = os.read(self._answers, 1 << 16)
                assert chunk, "the browser ended"
                self._buffer += chunk
            text, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(text)
            assert "error" not in answer, answer
            if wanted(answer):
                found: dict[str, Any] = answer
                return found

    def open(self, page: Path, width: int, height: int, scheme: str = "light") -> None:
        """Show a file in a window of this size."""
        size: dict[str, Any] = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=page.as_uri())
        self._wait(lambda answer: answer.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path, width: float = 0, height: float = 0) -> None:
        """The whole page as PNG, or its upper left part."""
        clip: dict[str, Any] = {"clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}} if width else {}
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True, **clip)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def start(program: str, profile: Path) -> Iterator[Browser]:
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [sys.executable, "-c", _WITH_PIPES, str(to_browser), str(from_browser), program, *options],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Browser(commands, answers)
    finally:
        os.close(commands)
        process.terminate()
        process.wait(PATIENCE)
        os.close(answers)
