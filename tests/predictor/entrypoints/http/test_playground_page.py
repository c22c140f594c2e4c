"""The page in headless Chromium, on a desktop and on a phone."""

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any, cast

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, ViewportSize, expect, sync_playwright

from tests.predictor import servers
from tests.predictor.servers import HANG_SECONDS, InProcessServer

CHROMIUM = shutil.which("chromium")
DESKTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessServer]:
    """A server that requires a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("team:secret-key-of-the-team\n")
    with servers.in_process(model_name="playground-page-keys", keys=keys) as running:
        yield running


@pytest.fixture(scope="module")
def browser(server: InProcessServer, keyed: InProcessServer) -> Iterator[Browser]:
    # Playwright runs an event loop in this thread, in which no server can start.
    del server, keyed
    with sync_playwright() as playwright:
        # Debian's own; root cannot use its sandbox.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: InProcessServer, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page at the demo model's server; nothing else may be requested, and nothing may be logged as an error."""
    context = browser.new_context(viewport=cast("ViewportSize", getattr(request, "param", DESKTOP)))
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(HANG_SECONDS * 1000)
    expect.set_options(timeout=HANG_SECONDS * 1000)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("request", lambda sent: faults.append(sent.url) if not sent.url.startswith((server.url, "data:")) else None)
    page.goto(server.url)
    expect(page.get_by_role("status")).to_have_text("ready")
    yield page
    context.close()
    server.hold.open()
    server.wait_until_idle()
    assert faults == getattr(page, "expected_faults", [])


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def body_of(request: Request) -> Any:
    body = request.post_data_json
    assert body
    return body


def wait_for_end(page: Page) -> None:
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


@pytest.mark.parametrize("page", [DESKTOP, PHONE], indirect=True, ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_answers_shows_figures_and_is_accessible(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    ask(page, "What is 17 + 25?")
    answer = page.locator("article.assistant")
    expect(answer.locator(".figures")).to_have_text(
        re.compile(r"14 \+ \d+ tokens · first token \d+ ms · [\d.]+ tokens/s · stop")
    )
    expect(answer.locator(".content")).to_contain_text("42")
    expect(page.locator("#facts")).to_contain_text("context tokens")
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
    # No part is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("page", [DESKTOP, PHONE], indirect=True, ids=["desktop", "phone"])
def test_page_newest_answer_is_visible_above_the_form(page: Page) -> None:
    for number, text in enumerate(["What is 17 + 25?", "Who are you?", "What is 1 + 2?", "Who are you?"], start=1):
        ask(page, text)
        expect(page.locator(".assistant .figures")).to_have_count(number)
        wait_for_end(page)
    answer = page.locator("article").last.bounding_box()
    form = page.locator("#composer").bounding_box()
    assert answer
    assert form
    assert answer["y"] + answer["height"] <= form["y"]
    assert answer["y"] >= 0


def test_page_shows_a_models_text_as_text(page: Page) -> None:
    hostile = '<img src=x onerror="document.title=1"><script>document.title=2</script><b>bold</b>'
    call = {"index": 0, "id": "1", "function": {"name": hostile, "arguments": hostile}}
    deltas = [{"content": hostile, "reasoning_content": hostile}, {"tool_calls": [call]}]
    events = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
    stream = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=stream))
    ask(page, hostile)
    wait_for_end(page)
    for shown in (".user .content", ".assistant .content", ".assistant .reasoning .text", ".call h3", ".call pre"):
        assert page.locator(shown).first.text_content() == hostile
    assert page.locator("#messages img, #messages script, #messages b").count() == 0
    assert page.title() == "demo"


def test_page_stops_an_answer_and_generates_it_again(page: Page, server: InProcessServer) -> None:
    server.hold.close(after=3)
    ask(page, "What is 17 + 25?")
    expect(page.locator(".assistant .content")).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.locator(".assistant .figures")).to_contain_text("stopped")
    server.hold.open()
    server.wait_until_idle()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".assistant .content")).to_contain_text("42")
    assert page.locator("article").count() == 2
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0


def test_page_new_chat_forgets_the_answer_that_it_ends(page: Page, server: InProcessServer) -> None:
    server.hold.close(after=3)
    ask(page, "What is 17 + 25?")
    expect(page.locator(".assistant .content")).not_to_be_empty()
    page.get_by_role("button", name="New chat").click()
    wait_for_end(page)
    server.hold.open()
    server.wait_until_idle()
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Who are you?")
    assert body_of(sent.value)["messages"] == [{"role": "user", "content": "Who are you?"}]
    wait_for_end(page)


def test_page_sends_sampling_system_prompt_and_schema(page: Page) -> None:
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Maximum tokens").fill("7")
    page.get_by_label("Seed").fill("3")
    page.get_by_text("Structured output").click()
    page.get_by_role("group").filter(has_text="JSON schema").get_by_role("button", name="Insert an example").click()
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "What is 17 + 25?")
    body = body_of(sent.value)
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 17 + 25?"},
    ]
    assert (body["max_tokens"], body["seed"], "temperature" in body) == (7, 3, False)
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["answer", "confidence"]
    wait_for_end(page)
    expect(page.locator(".assistant .figures")).to_contain_text("length")


def test_page_names_malformed_json_and_sends_nothing(page: Page, server: InProcessServer) -> None:
    page.get_by_text("Tools", exact=True).click()
    page.get_by_label("Functions, as JSON").fill("[{")
    count = server.metric("requests_total", status="200")
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("Functions, as JSON: ")
    assert server.metric("requests_total", status="200") == count


def test_page_calls_a_tool_and_sends_its_result(page: Page) -> None:
    page.get_by_text("Tools", exact=True).click()
    page.get_by_role("group").filter(has_text="Functions").get_by_role("button", name="Insert an example").click()
    ask(page, "What is the weather in Ulm?")
    wait_for_end(page)
    expect(page.locator(".call h3")).to_have_text("weather")
    expect(page.locator(".call pre")).to_have_text(re.compile(r'\{"\w+": "\w+"\}'))
    page.get_by_label("Result").fill('{"temperature": 21}')
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Send results").click()
    _, assistant, tool = body_of(sent.value)["messages"]
    assert tool == {"role": "tool", "tool_call_id": assistant["tool_calls"][0]["id"], "content": '{"temperature": 21}'}
    wait_for_end(page)


@pytest.mark.parametrize(("language", "text"), [("curl", "curl -s "), ("Python", "urllib"), ("OpenAI SDK", "OpenAI(")])
def test_page_copies_code_without_a_key(page: Page, server: InProcessServer, language: str, text: str) -> None:
    page.get_by_text("Code for this chat").click()
    page.get_by_label("Language").select_option(label=language)
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert text in copied
    assert server.url in copied


def test_page_shows_why_a_request_was_refused(page: Page) -> None:
    page.get_by_label("Top p").fill("7")
    page.expected_faults = ["Failed to load resource: the server responded with a status of 400 (Bad Request)"]  # type: ignore[attr-defined]
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("top_p")


def test_page_says_that_a_key_is_wrong(browser: Browser, keyed: InProcessServer) -> None:
    page = browser.new_page()
    page.goto(keyed.url)
    page.get_by_label("API key").fill("another-key")
    page.get_by_role("button", name="Use").click()
    expect(page.get_by_role("alert")).to_contain_text("401: ")
    expect(page.get_by_label("API key")).to_be_visible()
    page.close()


def test_page_asks_for_the_key_and_keeps_it_in_the_tab(browser: Browser, keyed: InProcessServer) -> None:
    page = browser.new_page()
    page.goto(keyed.url)
    page.get_by_label("API key").fill("secret-key-of-the-team")
    page.get_by_role("button", name="Use").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("playground-page-keys")
    expect(page.get_by_label("API key")).to_be_hidden()
    page.get_by_text("Code for this chat").click()
    expect(page.locator("#code")).to_contain_text("$API_KEY")
    expect(page.locator("#code")).not_to_contain_text("secret-key")
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("playground-page-keys")
    page.close()
