"""The chat page in a real browser: headless Chromium, the real server, a scripted model."""

from __future__ import annotations

import os
import re
import shutil

import pytest

# Each is quick, but the browser and the server they share are not.
pytestmark = pytest.mark.slow

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine (apt-get install chromium)", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
expect = playwright.expect
FLAGS = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """``open_page(url, **context options)``; at the end no page may have had an error or loaded from elsewhere."""
    contexts, problems = [], []

    def open_page(url, **options):
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **options})
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if is_policy(message.text) else None)
        page.on(
            "request", lambda request: problems.append(request.url) if is_outside(request.url, url) else None
        )
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def is_policy(text):
    return "Content Security Policy" in text or "violates" in text


def is_outside(requested, url):
    return not requested.startswith((url, "data:", "about:"))


@pytest.fixture
def page(open_page, running):
    return open_page(running.url)


def ask(page, text, *, answers=1):
    page.fill("#text", text)
    page.press("#text", "Enter")
    expect(page.locator(".message.assistant:not([aria-busy])")).to_have_count(answers)


def last_answer(page):
    return page.locator(".message.assistant").last.locator(".body")


def test_a_message_is_sent_and_answered(page, running):
    expect(page.locator("#model")).to_have_text("fake-1")
    expect(page.locator("#send")).to_be_disabled()
    ask(page, "hello there")
    expect(page.locator(".message.user .body")).to_have_text("hello there")
    expect(last_answer(page)).to_have_text("You said: hello there")
    ask(page, "and again", answers=2)
    assert "user: hello there\nassistant: You said: hello there\nuser: and again" in running.model.prompts[-1]
    expect(page.locator(".figures").last).to_contain_text("tokens")


@pytest.mark.slow
def test_the_answer_streams_and_stops_on_the_button_and_on_escape(open_page, start, make_model, wait_until):
    server = start(make_model(seconds_a_token=0.01))
    page = open_page(server.url)
    for count, stop in enumerate(
        (lambda: page.click("#send"), lambda: page.keyboard.press("Escape")), start=1
    ):
        page.fill("#text", "count to 400")
        page.press("#text", "Enter")
        expect(page.locator("#send")).to_have_attribute("aria-label", "Stop")
        expect(last_answer(page)).to_contain_text("1 2 3 4 5")
        assert server.model.num_running == 1, "text is on the screen while the model still writes"
        stop()
        wait_until(lambda: server.model.num_cancelled == count)  # noqa: B023
        expect(page.locator("#send")).to_have_attribute("aria-label", "Send")
        expect(last_answer(page)).to_contain_text("1 2 3 4 5")
        expect(page.locator(".figures").last).to_have_text("stopped")


def test_regenerate_answers_the_last_question_again(page, running):
    ask(page, "hello")
    page.click("[aria-label='Answer again']")
    expect(page.locator(".message.assistant:not([aria-busy])")).to_have_count(1)
    expect(last_answer(page)).to_have_text("You said: hello")
    assert running.model.prompts[0] == running.model.prompts[-1]
    assert len(running.model.prompts) == 2


def test_edit_takes_a_question_back(page, running):
    ask(page, "helo")
    page.hover(".message.user")
    page.click("[aria-label='Edit and ask again']")
    expect(page.locator("#text")).to_have_value("helo")
    expect(page.locator(".message")).to_have_count(0)
    ask(page, "hello")
    assert "helo\n" not in running.model.prompts[-1]


def test_copying_an_answer_and_a_code_block(open_page, running):
    page = open_page(running.url, permissions=["clipboard-read", "clipboard-write"])
    ask(page, "markdown")
    page.click("[aria-label='Copy the code']")
    expect(page.locator("#status")).to_have_text("Copied")
    code = 'def greet(name):\n    return f"<b>Hello</b>, {name}!"'
    assert page.evaluate("navigator.clipboard.readText()") == code
    page.locator(".message.assistant").get_by_label("Copy", exact=True).click()
    page.wait_for_function(
        "navigator.clipboard.readText().then((text) => text.startsWith('Here is **bold**'))"
    )


def test_markdown_becomes_elements_and_html_stays_text(page):
    ask(page, "markdown")
    body = last_answer(page)
    expect(body.locator("strong")).to_have_text("bold")
    expect(body.locator("em")).to_have_text("italic")
    expect(body.locator("p > code")).to_have_text("code")
    expect(body.locator("pre code")).to_contain_text("<b>Hello</b>")
    expect(body.locator("ol > li")).to_have_text(["one", "two"])
    expect(body.locator("ul > li").first).to_have_text('<img src=x onerror="alert(1)">')
    assert body.locator("img, script, b").count() == 0
    links = body.locator("a")
    expect(links).to_have_count(1)
    expect(links).to_have_attribute("href", "https://example.com")
    expect(links).to_have_attribute("rel", re.compile("noopener"))
    expect(body).to_contain_text("[a trap](javascript:alert(1))")


MARKDOWN_CASES = {
    "2 * 3 * 4 and snake_case_name": "<p>2 * 3 * 4 and snake_case_name</p>",
    "**a *b* c** ~~d~~ _e_": "<p><strong>a <em>b</em> c</strong> <s>d</s> <em>e</em></p>",
    "`` a`b `` \\*c\\*": "<p><code>a`b</code> *c*</p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# A\n### B #": "<h3>A</h3><h5>B</h5>",
    "- a\n  - b\n- c": "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>",
    "3. a\n4. b\n\ntext": '<ol start="3"><li>a</li><li>b</li></ol><p>text</p>',
    "> a\n> b": "<blockquote><p>a<br>b</p></blockquote>",
    "a\n***\nb": "<p>a</p><hr><p>b</p>",
    "|a|b|\n|:-|-:|\n|1|2|": (
        '<div class="table" tabindex="0" role="region" aria-label="Table"><table><thead><tr>'
        '<th class="align-start">a</th><th class="align-end">b</th></tr></thead><tbody><tr>'
        '<td class="align-start">1</td><td class="align-end">2</td></tr></tbody></table></div>'
    ),
    "see https://a.example/x_(y).": (
        '<p>see <a href="https://a.example/x_(y" target="_blank" rel="noopener noreferrer nofollow">'
        "https://a.example/x_(y</a>).</p>"
    ),
    "<script>alert(1)</script> &amp;": "<p>&lt;script&gt;alert(1)&lt;/script&gt; &amp;amp;</p>",
    "[x](javascript:alert(1)) [y](data:text/html,1)": "<p>[x](javascript:alert(1)) [y](data:text/html,1)</p>",
    "![alt](https://a.example/i.png)": (
        '<p><a href="https://a.example/i.png" target="_blank" rel="noopener noreferrer nofollow">alt</a></p>'
    ),
    "**unclosed `and [more](": "<p>**unclosed `and [more](</p>",
    "- a\n```\ncode": "<ul><li>a</li></ul><pre>code</pre>",
}


def test_markdown_case_by_case(page):
    script = """async (cases) => {
        const { render, element } = await import("/static/markdown.js");
        return cases.map((text) => {
            const box = document.createElement("div");
            // Streaming must end at the same page as rendering at once.
            const codeBlock = (code) => element("pre", {}, code);
            for (let end = 1; end <= text.length; end += 1) render(box, text.slice(0, end), codeBlock);
            return box.innerHTML;
        });
    }"""
    assert page.evaluate(script, list(MARKDOWN_CASES)) == list(MARKDOWN_CASES.values())


def test_a_long_hostile_answer_does_not_freeze_the_page(page):
    script = """async (texts) => {
        const { render, element } = await import("/static/markdown.js");
        const began = performance.now();
        for (const text of texts) render(document.createElement("div"), text, (code) => element("pre", {}, code));
        return performance.now() - began;
    }"""
    hostile = ["`" * 5000, "*a " * 5000, "[" * 5000, "> " * 2000, "- " * 2000, "|" * 5000 + "\\n|-|"]
    hostile += ["_" * 5000, "~~a " * 3000, "# " * 5000, "1. " * 2000]
    assert page.evaluate(script, hostile) < 3000


@pytest.mark.slow
def test_history_survives_a_reload_and_can_be_renamed_and_deleted(page):
    ask(page, "first question")
    page.click("#new")
    ask(page, "second question")
    page.reload()
    expect(last_answer(page)).to_have_text("You said: second question")
    names = page.locator(".conversations .name")
    expect(names).to_have_text(["second question", "first question"])
    names.last.click()
    expect(last_answer(page)).to_have_text("You said: first question")

    page.locator(".conversations li").last.hover()
    page.get_by_label("Rename “first question”").click()
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("Renamed")
    page.reload()
    expect(page.locator("#title")).to_have_text("Renamed")

    page.locator(".conversations li").last.hover()
    page.get_by_label("Delete “Renamed”").click()
    expect(names).to_have_text(["second question"])
    page.get_by_role("button", name="Undo").click()
    expect(names).to_have_count(2)
    expect(page.locator("#title")).to_have_text("Renamed")


def test_broken_storage_is_passed_over(page):
    page.evaluate("localStorage.setItem('minicpm-edge/conversation/x', '{broken')")
    page.evaluate("localStorage.setItem('minicpm-edge/conversation/y', '{\"id\": 5}')")
    page.evaluate("localStorage.setItem('minicpm-edge/settings', '7')")
    page.reload()
    ask(page, "hello")
    expect(page.locator(".conversations li")).to_have_count(1)


def test_settings_reach_the_model_and_are_kept(page, running):
    page.click("#settings-open")
    page.fill("#set-system", "Be brief.")
    page.fill("#set-temperature", "0.3")
    expect(page.locator("#range-temperature")).to_have_value("0.3")
    page.fill("#set-max_tokens", "8")
    page.fill("#set-seed", "42")
    page.locator("#range-top_p").fill("0.5")
    page.keyboard.press("Escape")
    page.reload()
    ask(page, "hello")
    params = running.model.params[-1]
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.3, 0.5, 8, 42)
    assert running.model.prompts[-1].startswith("system: Be brief.\nuser: hello")
    expect(page.locator(".figures")).to_contain_text("cut at the limit")
    page.click("#settings-open")
    page.click("#settings-reset")
    expect(page.locator("#set-seed")).to_have_value("")


def test_dark_and_light_follow_the_system_until_chosen(open_page, running):
    page = open_page(running.url, color_scheme="dark")
    theme = page.locator("html")
    expect(theme).to_have_attribute("data-theme", "dark")
    page.emulate_media(color_scheme="light")
    expect(theme).to_have_attribute("data-theme", "light")
    page.click("#theme")  # auto → light
    page.click("#theme")  # light → dark
    expect(theme).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(theme).to_have_attribute("data-theme", "dark")


@pytest.mark.slow
def test_a_phone_of_390_pixels_scrolls_only_down(open_page, running):
    page = open_page(running.url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    wide = "[document.scrollingElement, document.querySelector('#scroll')].some((box) => box.scrollWidth > innerWidth)"
    assert not page.evaluate(wide)
    ask(page, "markdown")
    ask(page, "a" * 300, answers=2)
    assert not page.evaluate(wide)
    small = page.evaluate(
        """[...document.querySelectorAll("button")]
            .filter((button) => button.checkVisibility({ visibilityProperty: true }))
            .map((button) => button.getBoundingClientRect())
            .filter((box) => Math.min(box.width, box.height) < 36).length"""
    )
    assert small == 0, "every button is large enough for a finger"
    page.tap("#sidebar-open")
    expect(page.locator("#sidebar")).to_be_in_viewport()
    page.locator("#new").tap()
    expect(page.locator("#sidebar")).not_to_be_in_viewport()
    expect(page.locator("#empty")).to_be_visible()
    page.tap("#settings-open")
    assert not page.evaluate(wide)
    assert page.evaluate("document.querySelector('#settings').getBoundingClientRect().right <= innerWidth")


def test_everything_works_by_keyboard_alone(page):
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    expect(last_answer(page)).to_contain_text("line two")
    expect(page.locator("#text")).to_have_value("")

    page.reload()
    expect(page.locator("#text")).to_be_focused()
    focused = """(() => {
        const element = document.activeElement;
        const ring = getComputedStyle(element.id === "text" ? element.form : element);
        const shown = ring.outlineStyle !== "none" || element.id === "text" || element === document.body;
        return [element.id || element.ariaLabel || element.textContent, shown];
    })()"""
    seen = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        name, shown = page.evaluate(focused)
        assert shown, f"{name} does not show that it has the focus"
        seen.add(name)
    for name in ("new", "theme", "settings-open", "Copy", "Answer again", "line one"):
        assert name in seen

    page.locator("#settings-open").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).not_to_be_visible()
    expect(page.locator("#settings-open")).to_be_focused()


def test_enter_while_an_input_method_composes_does_not_send(page, running):
    page.fill("#text", "にほん")
    page.evaluate(
        """document.querySelector("#text").dispatchEvent(
            new KeyboardEvent("keydown", { key: "Enter", isComposing: true, bubbles: true, cancelable: true }))"""
    )
    expect(page.locator("#text")).to_have_value("にほん")
    assert not running.model.prompts


def test_a_screen_reader_hears_that_it_answers_and_what(page):
    expect(page.locator("#status")).to_have_role("status")
    ask(page, "hello")
    expect(page.locator("#status")).to_have_text("You said: hello")
    unnamed = page.evaluate(
        """[...document.querySelectorAll("button, input, textarea")]
            .filter((control) => !(control.ariaLabel || control.labels?.length || control.textContent.trim()))
            .map((control) => control.outerHTML)"""
    )
    assert unnamed == []


def test_the_key_is_asked_for_and_kept(open_page, start, make_model):
    server = start(make_model(), api_keys=("right-key",))
    page = open_page(server.url)
    expect(page.locator("#set-key")).to_be_focused()
    page.keyboard.type("right-key")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_text("fake-1")
    page.reload()
    ask(page, "hello")
    expect(last_answer(page)).to_have_text("You said: hello")


def test_a_server_that_goes_away_is_told_and_waited_for(page, running):
    page.clock.install()
    page.route("**/v1/**", lambda route: route.abort())
    page.route("**/health", lambda route: route.abort())
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    expect(page.locator("#notice")).to_contain_text("minicpm-edge serve")
    expect(page.locator(".problem")).to_contain_text("does not answer")
    page.clock.fast_forward(4000)
    expect(page.locator("#notice")).to_be_visible()
    page.unroute_all()
    page.clock.fast_forward(4000)
    expect(page.locator("#notice")).to_be_hidden()
    page.get_by_role("button", name="Try again").click()
    expect(last_answer(page)).to_have_text("You said: hello")


def test_the_servers_own_error_is_shown_and_the_old_answer_kept(page):
    ask(page, "hello")
    refusal = {"error": {"message": "too many are waiting", "code": "overloaded"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=503, json=refusal))
    page.click("[aria-label='Answer again']")
    expect(page.locator(".problem")).to_contain_text("too many are waiting")
    expect(last_answer(page)).to_have_text("You said: hello")


def test_a_conversation_that_outgrows_the_context_goes_on(open_page, start, make_model):
    server = start(make_model(context_length=200))
    page = open_page(server.url)
    for count in range(1, 6):
        ask(page, f"question number {count}", answers=count)
    expect(page.locator("#toast")).to_contain_text("no longer fits")
    assert server.model.prompts[-1].startswith("user: question number")
    assert "number 1" not in server.model.prompts[-1]
