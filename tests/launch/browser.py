"""Headless Chromium over its DevTools protocol, with nothing but the standard library, for tests.

with Browser() as page:
    page.open(path)
    assert page.run("document.title") == "..."
    assert not page.problems
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--disable-dev-shm-usage"),
)


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


class Browser:
    """One page. problems: errors of its console, exceptions of its scripts, what it tried to load besides itself."""

    def __init__(self, width: int = 1280, height: int = 1600) -> None:
        self.problems: list[str] = []
        self._number, self._session, self._address = 0, None, ""
        self._profile = tempfile.mkdtemp(prefix="braid-browser-")
        theirs, self._to = os.pipe()
        self._from, ours = os.pipe()
        size = f"--window-size={width},{height}"
        command = [str(chromium()), *QUIET, size, "--remote-debugging-pipe", f"--user-data-dir={self._profile}"]

        # The browser reads from descriptor 3 and writes to 4. High copies first: either pipe may lie on 3 or 4.
        def arrange() -> None:
            read, write = os.dup2(theirs, 60), os.dup2(ours, 61)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self._process = subprocess.Popen(
            command, preexec_fn=arrange, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(ours)
        self._buffer = b""

    def __enter__(self) -> "Browser":
        target = self._ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._ask(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, path: Path) -> None:
        """Loads a file and waits until it has run."""
        self._address = path.resolve().as_uri()
        self._ask("Page.navigate", {"url": self._address})
        for _ in range(2000):
            if self.run("document.readyState") == "complete" and self.run("location.href") == self._address:
                return
            time.sleep(0.01)
        raise AssertionError(f"{path} did not load")

    def run(self, script: str) -> Any:
        """The value of an expression, evaluated in the page."""
        asked = {"expression": script, "returnByValue": True, "awaitPromise": True}
        answer = self._ask("Runtime.evaluate", asked)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float) -> None:
        """kind: mouseMoved, mousePressed or mouseReleased, at a place of the window."""
        pressed = kind != "mouseMoved"
        event = {"type": kind, "x": x, "y": y, "button": "left" if pressed else "none", "clickCount": int(pressed)}
        self._ask("Input.dispatchMouseEvent", event)

    def _ask(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters or {}}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._from, 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, found = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(found["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.problems.append(str(found["args"]))
        elif method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(found["entry"]))
        elif method == "Network.requestWillBeSent" and found["request"]["url"] not in (self._address, "about:blank"):
            self.problems.append(f"loads {found['request']['url']}")
