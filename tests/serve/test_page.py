"""The playground in a real browser: it generates, stops, stays within its policy, and shows hostile text as text."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator

import httpx
import matplotlib.image
import numpy as np
import pytest
from serve.chromium import CHROMIUM, Browser
from serve.conftest import NAME, Served, serving
from serve.synthetic import SyntheticDecoder, say_letters

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")
FACTS = {
    "parameters": 2_320_000_000,
    "dtype": "bfloat16",
    "batch": 1,
    "devices": 2,
    "blocks": 8,
    "program": "avx512bf16",
    "limit_tokens_per_s": 400.0,
}
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\n"
    "```html\n</pre></script><svg onload=alert(1)>\n'\"`${alert(1)}`\n```\n<iframe src=javascript:alert(1)></iframe>"
)


class Script:
    """What the decoder says; the tests change it."""

    text: str | None = None

    def __call__(self, prompt: object) -> list[int]:
        if self.text is None:
            return say_letters([])
        return [*DECODER.tokenizer.encode(self.text), 1]


SCRIPT = Script()
DECODER = SyntheticDecoder(say=SCRIPT, rate=200.0)


@pytest.fixture(scope="module")
def site() -> Iterator[Served]:
    with serving(DECODER, facts=FACTS) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def page(browser: Browser, site: Served) -> Iterator[Browser]:
    SCRIPT.text = None
    browser.open(site.url)
    yield browser
    browser.run("stop()")
    assert browser.problems == []
    assert all(url.startswith((site.url, "data:")) for url in browser.requests)


def answer(page: Browser) -> str:
    return page.run("document.getElementById('output').textContent")


def run_to_the_end(page: Browser) -> None:
    page.run("document.getElementById('run').click()")
    page.wait("!document.getElementById('run').disabled")


def test_the_policy_names_all_that_may_run(site: Served) -> None:
    found = httpx.get(site.url)
    policy = dict(part.split(" ", 1) for part in found.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert "unsafe" not in found.headers["content-security-policy"]
    assert found.text.count("<script>") == found.text.count("<style>") == 1
    assert not re.search(r"\son\w+=|style=|https?://(?!www\.w3\.org)", found.text.partition("<script>")[0])


def test_the_models_name_cannot_leave_its_attribute() -> None:
    evil = '"><script>alert(1)</script>'
    with serving(SyntheticDecoder(), facts={"dtype": evil}) as served:
        assert evil not in httpx.get(served.url).text


@needs_chromium
def test_it_generates_while_one_watches(page: Browser) -> None:
    chips = page.run("document.getElementById('facts').innerText.replaceAll('\\n', ' ')")
    for word in (NAME, "2.32 B", "bfloat16", "batch 1", "2 devices × 8 blocks"):
        assert word in chips
    page.run("document.getElementById('max_tokens').value = 300; document.getElementById('run').click()")
    page.wait("document.getElementById('output').textContent.length > 20")
    early = answer(page)
    page.wait("document.getElementById('rate').textContent !== '–'")
    page.wait("!document.getElementById('run').disabled")
    assert len(answer(page)) > len(early)
    assert page.run("document.getElementById('n-tokens').textContent") == "300"
    assert 100 < float(page.run("document.getElementById('rate').textContent")) <= 210
    assert re.fullmatch(r"\d+ % of 400 tokens/s", page.run("document.getElementById('limit-text').textContent"))
    parts = page.run("[...document.querySelectorAll('#parts tr')].map(row => row.textContent)")
    assert len(parts) == 6 and any("Decoding" in part for part in parts)
    status = page.run("document.getElementById('status').textContent")
    assert status.startswith("Finished: 300 tokens at ")
    pixels = matplotlib.image.imread(io.BytesIO(page.picture()))
    assert pixels.shape[:2] == (900, 1280)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 300  # text, gradients and a sparkline


@needs_chromium
def test_a_model_without_a_template_is_given_code_to_go_on_with(browser: Browser) -> None:
    decoder = SyntheticDecoder(rate=200.0)
    decoder.tokenizer.chat_template = None
    with serving(decoder) as served:
        browser.open(served.url)
        assert browser.run("document.getElementById('prompt').value") == "class Matrix:"
        assert browser.run(
            "document.getElementById('mode-text').checked && document.getElementById('mode-chat').disabled"
        )
        names = browser.run("[...document.querySelectorAll('#examples button')].map(button => button.textContent)")
        assert names == ["Class", "Function", "Test", "Quicksort"]
        for index in range(len(names)):
            browser.run(f"document.querySelectorAll('#examples button')[{index}].click()")
            assert browser.run("document.getElementById('prompt').value").startswith(("class", "def", "import"))
        assert float(browser.run("document.getElementById('temperature').value")) > 0
        run_to_the_end(browser)
        assert answer(browser)
    assert browser.problems == []


@needs_chromium
@pytest.mark.parametrize("how", ["button", "key"])
def test_it_stops(page: Browser, site: Served, how: str) -> None:
    page.run("document.getElementById('prompt').focus()")
    page.press("Enter", 13, modifiers=2)
    page.wait("document.getElementById('output').textContent.length > 10")
    assert site.engine.busy
    if how == "button":
        page.run("document.getElementById('stop').click()")
    else:
        page.press("Escape", 27)
    page.wait("!document.getElementById('run').disabled")
    assert page.run("document.getElementById('status').textContent").startswith("Stopped after")
    end = time.monotonic() + 2
    while site.engine.busy:
        assert time.monotonic() < end
        time.sleep(0.01)


@needs_chromium
@pytest.mark.parametrize("mode", ["chat", "text"])
def test_hostile_completions_are_text(page: Browser, mode: str) -> None:
    SCRIPT.text = HOSTILE
    page.run(f"document.getElementById('mode-{mode}').checked = true; document.getElementById('prompt').value = 'a'")
    run_to_the_end(page)
    shown = answer(page)
    for part in ("<img src=x onerror=", "</pre></script><svg onload=alert(1)>", "<iframe src=javascript:alert(1)>"):
        assert part in shown
    assert page.run("document.querySelectorAll('#output :not(pre, div, span, code)').length") == 0
    assert page.run("document.title") == "jax_mono playground"
    if mode == "chat":
        assert page.run("document.querySelectorAll('#output pre').length") == 1


@needs_chromium
def test_scripts_that_get_in_anyway_do_not_run(browser: Browser, site: Served) -> None:
    browser.open(site.url)
    browser.run(
        "for (const code of ['document.title = \"owned\"']) {"
        " const script = document.createElement('script'); script.textContent = code; document.body.append(script); }"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')"
    )
    assert browser.run("fetch('https://example.org').then(() => 'went out', () => 'refused')") == "refused"
    assert browser.run("document.title") == "jax_mono playground"
    assert any("Content Security Policy" in problem for problem in browser.problems)


@needs_chromium
def test_code_has_colours(page: Browser) -> None:
    SCRIPT.text = (
        'Here is `add`:\n```python\n@cached\ndef add(a, b=1):\n    """Adds."""\n    return a + b  # sum\n```\nDone.'
    )
    page.run("document.getElementById('mode-chat').checked = true")
    run_to_the_end(page)
    spans = page.run("[...document.querySelectorAll('#output pre span')].map(s => [s.className, s.textContent])")
    for pair in (["tok-decor", "@cached"], ["tok-keyword", "def"], ["tok-name", "add"], ["tok-number", "1"]):
        assert pair in spans
    assert ["tok-string", '"""Adds."""'] in spans and ["tok-comment", "# sum"] in spans
    assert answer(page).startswith("Here is add:") and answer(page).endswith("Done.")


@needs_chromium
def test_errors_are_said(page: Browser) -> None:
    page.run("document.getElementById('prompt').value = 'a '.repeat(5000)")
    page.run("document.getElementById('run').click()")
    page.wait("!document.getElementById('alert').hidden")
    assert "context" in page.run("document.getElementById('alert').textContent")
    page.wait("!document.getElementById('run').disabled")
    # The browser itself notes the status; nothing else may be there.
    assert all("400" in problem for problem in page.problems)
    page.problems.clear()


@needs_chromium
def test_shared_as_curl(page: Browser, site: Served) -> None:
    page.run("document.getElementById('prompt').value = \"it's\"; document.getElementById('mode-text').checked = true")
    command = page.run("asCurl(...request(), false)")
    assert command.startswith(f"curl -N '{site.url}/v1/completions'")
    assert "it'\\''s" in command


@needs_chromium
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_on_a_phone(browser: Browser, site: Served, scheme: str) -> None:
    SCRIPT.text = "```python\n" + "x = 1 + " * 40 + "1\n```"
    browser.open(site.url, width=390, height=844, scheme=scheme)
    run_to_the_end(browser)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.run("document.getElementById('run').getBoundingClientRect().height") >= 44
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(11, 14, 19)" if scheme == "dark" else "rgb(244, 246, 248)")
    assert browser.problems == []


@needs_chromium
def test_everything_has_a_name_for_screen_readers(page: Browser) -> None:
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "slider", "radio", "spinbutton", "image", "table", "radiogroup", "link")
    found = [(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node.get("ignored")]
    assert {role for role, _ in found} >= {"button", "textbox", "radio", "main", "status"}
    assert all(name for role, name in found if role in roles), found
