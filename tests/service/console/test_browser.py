"""What a real browser does with the pages: keys, forms, and nothing that its policy would block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.console.chromium import PROGRAM, Chromium
from tests.service.console.test_now import SCREENS
from tests.service.running import Running

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="chromium is not installed (apt-get install chromium)")
TOKEN = "a-token-of-twenty-four-chars"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def test_hits_are_judged_with_one_key(chromium: Chromium, served: Running) -> None:
    chromium.events.clear()
    chromium.open(f"{served.url}/console/search?q=vector&k=2")
    chromium.value("document.querySelector('.hit').focus()")
    chromium.press("r")
    chromium.wait("document.querySelector('#relevant-1').ariaPressed === 'true'")
    assert chromium.value("document.activeElement.id") == "hit-2"
    chromium.press("n")
    chromium.wait("document.querySelector('#not_relevant-2').ariaPressed === 'true'")
    chromium.wait("document.querySelector('#said').innerText.startsWith('Hit 2')")
    kept = list(served.live.feedback_log.queries())[-1]
    assert [action for action, *_ in kept.events] == ["relevant", "not_relevant"]
    assert chromium.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
def test_every_screen_loads_with_nothing_blocked(chromium: Chromium, served: Running, dark: bool) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    chromium.call("Emulation.setEmulatedMedia", features=[scheme])
    for path in SCREENS:
        chromium.events.clear()
        chromium.open(f"{served.url}{path}")
        assert chromium.complaints() == [], path
        assert chromium.value("typeof htmx") == "object"
        ground = chromium.value("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(18, 22, 28)") == dark
        assert chromium.value("document.documentElement.scrollWidth <= innerWidth"), path


def test_signing_in_by_keyboard_without_scripts(tmp_path: Path, index) -> None:
    running = Running(index, token=TOKEN)
    try:
        with Chromium(tmp_path / "profile") as browser:
            browser.call("Emulation.setScriptExecutionDisabled", value=True)
            browser.open(f"{running.url}/")
            browser.call("Input.insertText", text=TOKEN)  # the field has the focus
            browser.press("Enter")
            browser.wait("document.title.startsWith('Now')")
            browser.open(f"{running.url}/console/search?q=vector")
            browser.value("document.querySelector('#relevant-1').click()")
            browser.wait("document.title.startsWith('Judged')")
            assert browser.value("document.cookie") == ""  # no script may read it
    finally:
        running.stop()


def test_after_a_swap_one_click_rolls_back(chromium: Chromium, served: Running, minilm_encoder, quick_builds) -> None:
    served.live.swap(served.live.build(minilm_encoder))
    chromium.events.clear()
    chromium.open(f"{served.url}/")
    chromium.value("document.querySelector('#watching button').click()")
    chromium.wait("location.pathname === '/console/lineage' && document.readyState === 'complete'")
    assert served.live.status()["live"]["id"] == 1
    assert "the previous generation is live again" in chromium.value("document.body.innerText")
    assert chromium.complaints() == []
