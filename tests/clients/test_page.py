"""The page at / and /docs in a real Chromium, in front of real models: answers are those of stock transformers."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.clients.loopback import Loopback, loopback
from tests.serving.test_chat import CHATML, KINDS, save
from tpray.config import DEMO_DIR, AccessConfig
from tpray.serving.access import Access
from tpray.serving.keys import KeyRing, parse

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `clients` is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.xdist_group("page"),  # one browser, one server of the demo
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: `make chromium` as root, or install it"),
]

FIRST = "The company HuggingFace is based in New York City"
SECOND = "HuggingFace's headquarters are situated in Manhattan"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def demo() -> Iterator[Loopback]:
    with loopback() as server:
        yield server


@contextmanager
def opened(browser: Any, url: str, path: str = "/", refused: bool = False, **context: Any) -> Iterator[Any]:
    """A page of its own. Its console must stay empty, and it must ask nobody but ``url``.

    refused: the server refuses requests, which a browser's console says.
    """
    within = browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | context)
    within.set_default_timeout(20_000)
    page, said, asked = within.new_page(), [], []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url + path)
    try:
        yield page
    finally:
        within.close()
    if refused:
        said = [each for each in said if "Failed to load resource" not in each]
    assert said == []
    assert [each for each in asked if not each.startswith((f"{url}/", "data:"))] == []


def bars(page: Any) -> list[tuple[str, float, float]]:
    """Of each bar of the answer its name, its figure, and the share of its length that is filled."""
    page.wait_for_selector("#ask:not([aria-busy])")
    page.wait_for_selector("#answer li, #answer .error")
    assert page.query_selector("#answer .error") is None, page.text_content("#answer")
    found = page.eval_on_selector_all(
        "#answer li",
        """rows => rows.map(row => {
            const [name, figure] = [".name", ".figure"].map(each => row.querySelector(each).textContent);
            const [track, fill] = [".track", ".fill"].map(each => row.querySelector(each).getBoundingClientRect());
            return [name, Number(figure), fill.width / track.width];
        })""",
    )
    return [(name, figure, share) for name, figure, share in found]


def probabilities(directory: Path, *inputs: str, **chat: Any) -> dict[str, float]:
    """What stock transformers gives a text, a pair or a conversation, by label."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    made = {"return_tensors": "pt", "return_dict": True}
    rows = tokenizer.apply_chat_template(chat["messages"], **made) if chat else tokenizer(*inputs, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**rows).logits[0]
    values = torch.sigmoid(logits) if len(logits) == 1 else torch.softmax(logits, 0)
    return {model.config.id2label[i]: value for i, value in enumerate(values.tolist())}


def test_a_pair_is_answered_as_transformers_does(browser: Any, demo: Loopback) -> None:
    """By a click on an example, and by what is typed; and what the page gives to copy asks the same."""
    with opened(browser, demo.url) as page:
        page.get_by_role("button", name="A paraphrase").click()
        stock = sorted(probabilities(DEMO_DIR, FIRST, SECOND).items(), key=lambda each: -each[1])
        shown = bars(page)
        assert [name for name, _, _ in shown] == [label for label, _ in stock]
        for (_, figure, share), (_, expected) in zip(shown, stock, strict=True):
            assert figure == pytest.approx(expected, abs=6e-5)
            assert share == pytest.approx(expected, abs=0.01)
        timing = page.text_content("#answer .timing")
        assert "26 tokens" in timing
        assert "computing" in timing

        page.get_by_label("First text").fill('Where is "it"? C\'est là.\n')
        page.get_by_label("Second text").fill("")
        page.get_by_label("Raw scores").check()
        page.get_by_label("Second text").fill("There")
        page.get_by_role("button", name="Ask").click()
        page.wait_for_selector("#answer .track", state="detached")
        page.get_by_text("The request, to copy").click()
        expected = httpx.post(
            f"{demo.url}/predict", json={"inputs": ['Where is "it"? C\'est là.\n', "There"], "raw_scores": True}
        ).json()
        raw = page.eval_on_selector_all("#answer .figure", "rows => rows.map(row => Number(row.textContent))")
        assert raw == pytest.approx([each["score"] for each in expected], abs=1e-4)
        assert json.loads(output("sh", "-c", page.text_content("#curl"))) == expected
        assert ast.literal_eval(output(sys.executable, "-c", page.text_content("#python"))) == expected

        cut = page.get_by_label("Cut what is too long")
        assert cut.is_checked()  # as the server does without it
        assert "truncate" not in page.text_content("#curl")
        cut.uncheck()
        assert '"truncate":false' in page.text_content("#curl")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_works_by_keyboard(browser: Any, demo: Loopback) -> None:
    """In the order in which it is read; all that takes the focus has a name."""
    with opened(browser, demo.url) as page:
        page.wait_for_selector("#examples button")
        names = []
        for _ in range(10):
            page.keyboard.press("Tab")
            names.append(
                page.evaluate(
                    """() => { const at = document.activeElement;
                    return (at.labels?.[0]?.textContent ?? at.getAttribute("aria-label") ?? at.textContent).trim(); }"""
                )
            )
        assert names == [
            "API", "A pair", "A paraphrase", "None", "First text", "Second text", "Raw scores", "Cut what is too long",
            "Ask", "The request, to copy",
        ]  # fmt: skip
        page.get_by_label("First text").focus()
        page.keyboard.press("Control+a")
        page.keyboard.type("apples")
        page.keyboard.press("Control+Enter")
        assert bars(page)[0][0] == "not_paraphrase"
        page.get_by_role("radio", name="A pair").focus()
        page.keyboard.press("ArrowRight")
        page.get_by_label("Query", exact=True).focus()
        page.keyboard.press("Enter")
        assert len(bars(page)) == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(scheme: str, browser: Any, demo: Loopback) -> None:
    """Nothing is wider than 375 pixels; text stands out from its ground as WCAG 2.2 (1.4.3) asks, in both schemes."""
    with opened(browser, demo.url, viewport={"width": 375, "height": 740}, color_scheme=scheme) as page:
        page.wait_for_selector("#phases li")
        page.get_by_role("button", name="A paraphrase").click()
        bars(page)
        page.get_by_text("The request, to copy").click()
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(246, 247, 249)"
        assert dark == (scheme == "dark")
        faint = page.evaluate(
            """() => {
            const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
            const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(c => linear(c / 255));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
            const says = at => [...at.childNodes].some(c => c.nodeType === 3 && c.data.trim());
            const ground = at => { const colour = getComputedStyle(at).backgroundColor;
                return colour.startsWith("rgba(0, 0, 0, 0") ? ground(at.parentElement) : colour; };
            return [...document.querySelectorAll("body *")]
                .filter(at => says(at) && at.getClientRects().length)
                .map(at => { const pair = [light(getComputedStyle(at).color), light(ground(at))].sort((a, b) => b - a);
                    return [at.textContent.slice(0, 30), (pair[0] + 0.05) / (pair[1] + 0.05)]; })
                .filter(([, contrast]) => contrast < 4.5); }"""
        )
        assert faint == []


def test_documents_are_ranked(browser: Any, make_checkpoint: Callable[..., Path]) -> None:
    directory = make_checkpoint("bert", num_labels=1, num_hidden_layers=1)
    documents = ["a train to Berlin", "the firm is in Paris", "good morning"]
    with loopback(directory) as server, opened(browser, server.url) as page:
        page.get_by_label("Query", exact=True).fill("where is the firm")
        page.get_by_label("Documents, one a line").fill("\n\n".join(documents))
        page.get_by_role("button", name="Ask").click()
        stock = {each: probabilities(directory, "where is the firm", each)["LABEL_0"] for each in documents}
        shown = bars(page)
        assert [name for name, _, _ in shown] == sorted(documents, key=lambda each: -stock[each])
        for name, figure, share in shown:
            assert figure == pytest.approx(stock[name], abs=6e-5)
            assert share == pytest.approx(stock[name], abs=0.01)


def test_a_conversation_is_scored(browser: Any, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A reward model's: messages are added and removed."""
    directory = tmp_path / "m"
    save(
        make_checkpoint("qwen2", vocab_size=320, num_labels=1, num_hidden_layers=1),
        directory,
        CHATML,
        KINDS["qwen2"][1],
    )
    with loopback(directory) as server, opened(browser, server.url) as page:
        page.get_by_role("button", name="Add a message").click()
        page.get_by_label("Message", exact=True).last.fill("thanks")
        page.get_by_label("Remove this message").nth(1).click()
        page.get_by_role("button", name="Ask").click()
        ((label, figure, _),) = bars(page)
        messages = [{"role": "user", "content": "How do I boil an egg?"}, {"role": "user", "content": "thanks"}]
        assert figure == pytest.approx(probabilities(directory, messages=messages)[label], abs=6e-5)


HTML = '<img src=x onerror="alert(1)"><script>alert(2)</script>'


@pytest.mark.slow
def test_entities_are_marked_and_labels_are_no_html(browser: Any, make_checkpoint: Callable[..., Path]) -> None:
    """As the pipeline finds them; labels and texts that are HTML are shown as they are."""
    from transformers import pipeline

    labels = {0: HTML, 1: f"2 {HTML}"}
    directory = make_checkpoint(
        "bert", architectures=["ForTokenClassification"], id2label=labels, label2id={labels[0]: 0, labels[1]: 1},
        num_labels=2, num_hidden_layers=1,
    )  # fmt: skip
    text = f"🙂 the firm {HTML} is in Paris"
    with loopback(directory) as server, opened(browser, server.url) as page:
        page.get_by_label("Text", exact=True).fill(text)
        page.get_by_role("button", name="Ask").click()
        stock = pipeline("token-classification", str(directory), aggregation_strategy="simple", dtype=torch.float32)(
            text
        )
        assert bars(page)[0][0].endswith(HTML)
        assert page.text_content(".marked small") == stock[0]["entity_group"]
        assert [figure for _, figure, _ in bars(page)] == pytest.approx([each["score"] for each in stock], abs=6e-5)
        marked = page.eval_on_selector_all(".marked mark", "marks => marks.map(mark => mark.firstChild.data)")
        assert marked == [text[each["start"] : each["end"]] for each in stock]
        assert page.query_selector("#answer img, #answer script") is None


def test_errors_are_the_servers_own_sentence(browser: Any, make_checkpoint: Callable[..., Path]) -> None:
    """As text, with what the user has sent in it; and labels are text too."""
    labels = {0: HTML, 1: "b"}
    directory = make_checkpoint("bert", id2label=labels, label2id={HTML: 0, "b": 1}, num_labels=2, num_hidden_layers=1)
    with loopback(directory) as server, opened(browser, server.url, refused=True) as page:
        page.get_by_role("radio", name="A text").check()
        page.get_by_label("Text", exact=True).fill("word " * 300)
        page.get_by_label("Cut what is too long").uncheck()
        page.get_by_role("button", name="Ask").click()
        asked = {"inputs": "word " * 300, "truncate": False}
        said = httpx.post(f"{server.url}/predict", json=asked).json()["error"]
        assert page.text_content("#answer .error") == said
        page.get_by_label("Text", exact=True).fill(HTML)
        page.get_by_role("button", name="Ask").click()
        assert HTML in [name for name, _, _ in bars(page)]
        assert page.query_selector("#answer img, #answer script, #facts img") is None
        page.route("**/predict", lambda route: route.fulfill(status=424, json={"error": HTML, "error_type": "Backend"}))
        page.get_by_role("button", name="Ask").click()
        page.wait_for_selector("#answer .error")
        assert page.text_content("#answer .error") == HTML
        page.unroute("**/predict")


def without_streams(app: Any) -> Any:
    """An application that passes no streams on, as one of several models."""

    async def passing(scope: Any, receive: Any, send: Any) -> None:
        await app(scope | {"path": "/absent"} if scope["path"] == "/info/stream" else scope, receive, send)

    return passing


@pytest.mark.slow
def test_where_there_is_no_stream_the_page_asks_again_and_again(browser: Any) -> None:
    with loopback(wrap=without_streams) as server, opened(browser, server.url, refused=True) as page:
        for _ in range(6):  # the figure is of the last ten seconds, and a slow machine may see it late
            page.get_by_role("button", name="A paraphrase").click()
            page.wait_for_timeout(3000)
            if page.locator("#figures dd").first.text_content() != "0":
                break
        else:
            raise AssertionError("nothing was shown of what the group does")
        assert page.get_attribute("#state", "data-state") == "ready"


def test_a_key_is_asked_for_and_sent(browser: Any) -> None:
    key = "right-" * 6
    access = Access(AccessConfig(), KeyRing(parse([f"alice: {key}"], "this test")))
    with loopback(access=access) as server, opened(browser, server.url, refused=True) as page:
        said = httpx.get(f"{server.url}/info", headers={"authorization": "Bearer wrong"}).json()["error"]
        page.get_by_label("Key").fill("wrong")
        page.get_by_role("button", name="Use it").click()
        playwright.expect(page.locator("#key-said")).to_have_text(said)
        page.get_by_label("Key").fill(key)
        page.keyboard.press("Enter")
        page.get_by_role("button", name="A paraphrase").click()
        assert bars(page)[0][0] == "paraphrase"
        page.wait_for_selector("#state[data-state=ready]")
        assert "Bearer $TPRAY_API_KEY" in page.text_content("#curl")
        assert key not in page.content()
        page.goto(f"{server.url}/docs")
        page.wait_for_selector("text=/predict")


def test_the_panel_follows_the_load(browser: Any, demo: Loopback) -> None:
    def figure(name: str) -> str:
        return str(page.locator(f"#figures div:has(dt:text-is('{name}')) dd").text_content())

    def load() -> None:
        with httpx.Client() as http:
            for _ in range(60):
                http.post(f"{demo.url}/predict", json={"inputs": [["a b", "c"]] * 8})

    with opened(browser, demo.url) as page:
        page.wait_for_selector("#figures dd")
        before = page.get_attribute("#plot polyline", "points")
        with ThreadPoolExecutor(2) as pool:
            sent = [pool.submit(load) for _ in range(2)]
        assert not any(each.exception() for each in sent)
        playwright.expect(page.locator("#figures dd").first).not_to_have_text("0")
        assert float(figure("Texts a second").replace(",", "")) > 1
        assert figure("Time of a step").endswith(" ms")
        assert page.get_attribute("#plot polyline", "points") != before
        waits = page.locator("#ranks tbody tr td:last-child")
        playwright.expect(waits).to_have_text([re.compile(r"^\d+ %$")] * 2)
        assert "load" in page.locator("#phases .name").all_text_contents()
        assert "this server's only one" in page.text_content("#whose")


def test_docs_show_the_routes_and_try_them_out(browser: Any, demo: Loopback) -> None:
    with opened(browser, demo.url, "/docs") as page:
        page.locator("#operations-default-predict_predict_post").click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        body = page.locator(".live-responses-table .response-col_description .highlight-code").first
        body.wait_for()
        assert "paraphrase" in body.text_content()
