"""Headless Chromium, driven over a pipe by its DevTools protocol: what a page does, not only what it says."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")


class Chromium:
    """One page of a browser; for a `with` block."""

    def __init__(self, profile: Path, dark: bool = False, size: tuple[int, int] = (1280, 900)) -> None:
        assert PROGRAM is not None
        reads, its_output = os.pipe()
        its_input, writes = os.pipe()

        def pipes() -> None:  # the protocol's are 3 and 4
            os.dup2(os.dup(its_input), 63), os.dup2(os.dup(its_output), 62)
            os.dup2(63, 3), os.dup2(62, 4)

        words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        words += [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", "--hide-scrollbars"]
        words += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            [PROGRAM, *words, "about:blank"], preexec_fn=pipes, close_fds=False, stdout=quiet, stderr=quiet
        )
        os.close(its_input), os.close(its_output)
        self._reads, self._writes, self._number, self._rest = reads, writes, 0, b""
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for name in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{name}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._reads), os.close(self._writes)

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """Ask the browser, and wait for its answer."""
        self._number += 1
        asked = {"id": self._number, "method": method, "params": values}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._writes, json.dumps(asked).encode() + b"\0")
        while True:
            found = self._next(60)
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]
            self.events.append(found)

    def _next(self, seconds: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._reads], [], [], seconds)[0], "the browser does not answer"
            part = os.read(self._reads, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def open(self, address: str) -> None:
        """Open a page, and wait until it has loaded."""
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, script: str) -> Any:
        """What an expression is in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> None:
        """Wait until an expression is true in the page."""
        deadline = time.monotonic() + seconds
        while not self.value(f"Boolean({script})"):
            assert time.monotonic() < deadline, f"{script} is not true in {self.value('document.body.innerText')}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press and release one key."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        code = {"windowsVirtualKeyCode": {"Enter": 13, "Tab": 9}.get(key, ord(key[0].upper()))}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def complaints(self) -> list[str]:
        """What the browser says is wrong: blocked scripts, failed requests, exceptions."""
        found = []
        for event in self.events:
            if event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] in ("error", "warning"):
                found.append(event["params"]["entry"]["text"])
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(event["params"]["exceptionDetails"]))
        return found

    def picture(self, path: Path, beyond: bool = True) -> None:
        """Save the whole page, or what of it is in view, as a PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=beyond)
        path.write_bytes(base64.b64decode(found["data"]))
