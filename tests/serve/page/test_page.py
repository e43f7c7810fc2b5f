"""The page in headless Chromium."""

import base64
import contextlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from PIL import Image
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import wuerstchen
from wuerstchen.image_files import save_png

FOLDER = Path(wuerstchen.__file__).parent / "serve" / "page"
CONTROLS = {
    "button",
    "link",
    "textbox",
    "spinbutton",
    "combobox",
    "slider",
    "radio",
    "checkbox",
    "progressbar",
}


class Page:
    """The open page, with helpers for tests."""

    def __init__(self, browser, url: str) -> None:
        self.browser = browser
        self.url = url
        self.expected = ["favicon.ico"]  # when tests open an image to leave the page
        """Console messages that are allowed, as regular expressions."""

    def open(self, hash: str = "") -> None:
        self.browser.get(f"{self.url}/{hash}")
        self.until(lambda: self.id("model").text)

    def size(self, width: int, height: int, mobile: bool = False) -> None:
        self.cdp("setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def media(self, **features: str) -> None:
        pairs = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.cdp("setEmulatedMedia", features=pairs)

    def cdp(self, name: str, **arguments) -> dict:
        return self.browser.execute_cdp_cmd(f"Emulation.{name}", arguments)

    @contextlib.contextmanager
    def beginning_with(self, script: str) -> Iterator[None]:
        """Runs a script at the start of every page that is opened in the block."""
        command = "Page.addScriptToEvaluateOnNewDocument"
        added = self.browser.execute_cdp_cmd(command, {"source": script})["identifier"]
        try:
            yield
        finally:
            remove = "Page.removeScriptToEvaluateOnNewDocument"
            self.browser.execute_cdp_cmd(remove, {"identifier": added})

    def id(self, name: str):
        return self.browser.find_element(By.ID, name)

    def all(self, css: str) -> list:
        return [each for each in self.browser.find_elements(By.CSS_SELECTOR, css) if each.is_displayed()]

    def one(self, css: str):
        """Waits for the first visible element, and returns it."""
        return self.until(lambda: next(iter(self.all(css)), None))

    def button(self, text: str, within: str = "body"):
        return self.until(lambda: next((b for b in self.all(f"{within} button") if b.text == text), None))

    def click(self, element) -> None:
        self.script("arguments[0].scrollIntoView({ block: 'center' })", element)
        element.click()

    def script(self, text: str, *arguments):
        return self.browser.execute_script(text, *arguments)

    def until(self, condition, seconds: float = 30):
        wait = WebDriverWait(self.browser, seconds, 0.03, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: condition())

    def type(self, name: str, text: str) -> None:
        field = self.id(name)
        field.clear()
        field.send_keys(text)

    def draw(self, prompt: str | None = None, **fields: str) -> None:
        """Sends the form, and waits for its entry."""
        if prompt is not None:
            self.type("prompt", prompt)
        for name, value in fields.items():
            self.type(name, value)
        before = len(self.all(".entry"))
        self.click(self.id("draw"))
        self.until(lambda: len(self.all(".entry")) == before + 1)

    def draw_refused(self, prompt: str) -> None:
        """Sends the form, and waits for an error."""
        self.type("prompt", prompt)
        self.click(self.id("draw"))
        self.until(lambda: self.id("form-error").is_displayed())

    def drawn(self, entries: int = 1) -> None:
        """Waits until the newest entries have their images."""
        self.until(lambda: all(e.get_attribute("data-state") == "done" for e in self.all(".entry")[:entries]))
        coming = "return document.querySelectorAll('.final:not(.there)').length"
        self.until(lambda: self.script(coming) == 0)

    def values(self, *names: str) -> list[str]:
        return [self.id(name).get_attribute("value") for name in names]

    def overflow(self) -> int:
        """How much wider the page is than the screen."""
        return self.script("return document.documentElement.scrollWidth - window.innerWidth") + self.script(
            "return window.innerWidth - window.screen.width"
        )


@pytest.fixture
def page(browser, service):
    page = Page(browser, service)
    page.size(1280, 900)
    page.media(prefers_color_scheme="light", prefers_reduced_motion="no-preference")
    browser.get(f"{service}/page/icon.svg")
    page.script("sessionStorage.clear(); localStorage.clear()")
    browser.get_log("browser")
    page.open()
    yield page
    # Script errors, and blocked styles and requests, which are otherwise invisible.
    said = [
        entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
    ]
    unexpected = [line for line in said if not any(re.search(each, line) for each in page.expected)]
    assert not unexpected
    asked = page.script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    foreign = [url for url in asked if not url.startswith((f"{page.url}/", "data:"))]
    assert foreign == []


def test_no_inline_code_and_no_html_from_text():
    """A prompt must not become markup, and the page must work with a strict CSP."""
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\s(style|on\w+)\s*=|<style|javascript:|https?://", html)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", html))
    for path in FOLDER.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        bad = re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|\.style\.\w+ =", text
        )
        assert not bad, path.name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path.name


def test_generates_with_previews_and_a_stable_layout(page):
    """Bugs: no images, no previews, or content that moves when images arrive."""
    page.click(page.one(".chip"))
    page.type("count", "2")
    page.id("count").send_keys(Keys.CONTROL, Keys.ENTER)
    page.one(".entry")
    page.until(lambda: len(page.all(".frame")) == 2)
    before = [frame.rect for frame in page.all(".frame")]
    height = page.one(".entry").rect["height"]
    page.drawn()
    assert [frame.rect for frame in page.all(".frame")] == before
    assert page.one(".entry").rect["height"] == pytest.approx(height, abs=2)
    assert page.script("return document.querySelectorAll('.preview').length") == 2
    widths = page.script("return [...document.querySelectorAll('.final')].map(image => image.naturalWidth)")
    assert widths == [256, 256]
    assert page.one(".entry h3").text == page.id("prompt").get_attribute("value")
    links = page.all("a[download]")
    assert len(links) == 2
    assert all(link.get_attribute("download").endswith(".png") for link in links)
    # The random seed is shown, and the next job has another one.
    seed = page.id("seed").get_attribute("value")
    assert f"seed {seed} " in page.one(".meta").text
    page.draw()
    page.drawn()
    assert page.id("seed").get_attribute("value") != seed


@pytest.mark.slow
def test_a_kept_seed_is_used_again(page):
    page.draw("a red apple", seed="7")
    page.draw("a red apple")
    page.drawn(2)
    assert [meta.text.count("seed 7 ") for meta in page.all(".meta")] == [1, 1]
    page.click(page.id("reroll"))
    assert page.id("seed").get_attribute("value") != "7"
    page.click(page.button("New seed", ".entry"))
    page.until(lambda: len(page.all(".entry")) == 3)
    page.drawn(3)
    assert "seed 7 " not in page.one(".meta").text


@pytest.mark.slow
def test_a_draft_keeps_the_seed_of_its_own_job(page, fake):
    """After two jobs, a reload combined the second prompt with the first seed."""

    def seed_of_newest() -> str:
        return page.until(lambda: re.search(r"seed (\d+)", page.one(".meta").text))[1]

    page.draw("a red apple")
    page.drawn()
    first = seed_of_newest()
    assert page.values("prompt", "seed") == ["a red apple", first]
    page.draw("a green car")
    second = seed_of_newest()
    page.until(lambda: page.values("seed") == [second])
    page.open()
    assert page.values("prompt", "seed") == ["a green car", second]
    # The seed is unknown until the service answers.
    fake.hold_answers = True
    page.draw("a blue hat")
    page.open()
    assert page.values("prompt", "seed") == ["a blue hat", ""]
    # A job that is repeated from its entry does not change the form.
    fake.hold_answers = False
    page.draw("a blue hat")
    page.drawn()
    last = page.until(lambda: page.values("seed")[0])
    page.type("prompt", "something else")
    page.click(page.button("New seed", ".entry"))
    page.until(lambda: seed_of_newest() != last)
    assert page.values("prompt", "seed") == ["something else", last]


def test_a_refused_job_keeps_the_seed(page, fake):
    page.expected.append(r"v1/jobs.*429")
    page.draw("a red apple")
    page.drawn()
    (seed,) = page.until(lambda: page.values("seed"))
    fake.refuse = (429, "The queue is full. Try again later.", None)
    page.draw_refused("a red apple")
    assert page.values("seed") == [seed]


def test_screen_readers_hear_stages_but_not_every_step(page, fake):
    """Bugs: a screen reader that reads every step, or none."""
    page.script(
        "window.told = []; new MutationObserver(() => told.push(document.getElementById('live').textContent))"
        ".observe(document.getElementById('live'), { childList: true })"
    )
    fake.steps_until_pause = 5
    page.draw("a red apple")
    page.until(lambda: page.one(".words").text == "Stage C, step 5 of 12")
    bar = page.one("progress")
    assert bar.get_attribute("value") == str(5 / 16)
    assert bar.get_attribute("aria-valuetext") == "Stage C, step 5 of 12"
    assert page.browser.title.startswith("31 %")
    fake.steps_until_pause = None
    page.drawn()
    told = page.script("return told")
    assert len(told) <= 6
    assert told[-1] == "Done: a red apple"
    assert any(text.startswith("Stage C") for text in told)


@pytest.mark.slow
def test_several_jobs_at_once_and_cancel(page, fake):
    """Bugs: jobs that are sent one after the other, or a cancel that ends another job."""
    fake.hold_queue = True
    for prompt in ("one", "two", "three", "four", "five"):  # more than the page streams at a time
        page.draw(prompt)
    assert [words.text for words in page.all(".words")] == ["Waiting, position 1 in the queue"] * 5
    page.click(page.all(".running button")[1])
    page.until(lambda: page.all(".entry")[1].get_attribute("data-state") == "cancelled")
    assert [job.cancelled for job in fake.jobs.values()] == [False, False, False, True, False]
    assert "Cancelled" in page.all(".entry")[1].text
    fake.hold_queue = False
    page.until(lambda: [e.get_attribute("data-state") for e in page.all(".entry")].count("done") == 4)


def test_a_cancelled_job_can_be_repeated(page, fake):
    fake.steps_until_pause = 3
    page.draw("a red apple", seed="5")
    page.button("Cancel", ".entry").send_keys(Keys.ENTER)
    page.until(lambda: page.one(".entry").get_attribute("data-state") == "cancelled")
    fake.steps_until_pause = None
    assert page.browser.switch_to.active_element.text == "Try again"  # the focus is not lost
    page.browser.switch_to.active_element.send_keys(Keys.ENTER)
    page.until(lambda: len(page.all(".entry")) == 2)
    page.drawn()
    assert "seed 5 " in page.one(".meta").text


@pytest.mark.slow
def test_the_session_survives_a_reload(page):
    """Images and settings were lost on reload."""
    page.draw("a green car", seed="11", negative="rain")
    page.drawn()
    page.type("prompt", "something else")
    page.open()
    page.drawn()
    assert page.one(".entry h3").text == "a green car"
    assert page.values("prompt") == ["something else"]  # the draft too
    page.click(page.button("Use settings", ".entry"))
    assert page.values("prompt", "negative", "seed") == ["a green car", "rain", "11"]
    assert page.script("return document.querySelector('[name=seeds]:checked').value") == "keep"


@pytest.mark.slow
def test_a_running_job_continues_after_a_reload(page, fake):
    fake.steps_until_pause = 6
    page.draw("a green car")
    page.until(lambda: "step 6" in page.one(".words").text)
    page.open()
    page.until(lambda: "step 6" in page.one(".words").text)
    fake.steps_until_pause = None
    page.drawn()


@pytest.mark.slow
def test_removing_can_be_undone(page):
    page.draw("one")
    page.draw("two")
    page.drawn(2)
    page.click(page.one(".entry header button"))
    assert [h.text for h in page.all(".entry h3")] == ["one"]
    page.click(page.button("Undo"))
    assert [h.text for h in page.all(".entry h3")] == ["two", "one"]
    page.click(page.id("clear"))
    assert page.all(".entry") == []
    page.click(page.button("Undo"))
    assert [h.text for h in page.all(".entry h3")] == ["two", "one"]


def test_expired_images_are_explained(page, fake):
    """After an hour, the page showed broken images."""
    page.expected.append("404")
    page.draw("a green car", seed="3")
    page.drawn()
    fake.forget_images()
    page.open()
    page.until(lambda: "No longer available" in page.one(".frame").text)
    page.click(page.button("Generate again", ".entry"))
    page.until(lambda: len(page.all(".entry")) == 2)
    page.drawn()
    assert "seed 3 " in page.one(".meta").text


def test_a_link_restores_settings_and_starts_nothing(page):
    page.draw("a green car & a dog #1, 100 % «ä»", seed="11", negative="rain", count="2")
    page.drawn()
    page.script("navigator.clipboard.writeText = async text => { window.copied = text; }")
    page.click(page.button("Copy link", ".entry"))
    link = page.until(lambda: page.script("return window.copied"))
    page.script("sessionStorage.clear()")
    page.browser.get(f"{page.url}/page/icon.svg")
    page.browser.get(link)
    page.until(lambda: page.values("prompt") == ["a green car & a dog #1, 100 % «ä»"])
    assert page.values("negative", "seed", "count") == ["rain", "11", "2"]
    assert page.all(".entry") == []
    assert "Settings restored" in page.id("toast").text
    assert "#" not in page.browser.current_url  # a reload would undo later changes


@pytest.mark.slow
def test_a_link_without_a_clipboard_is_shown(page):
    """Without TLS there is no clipboard, and the button did nothing."""
    page.draw("a green car")
    page.drawn()
    page.script("navigator.clipboard.writeText = async () => { throw new Error('not allowed'); }")
    page.click(page.button("Copy link", ".entry"))
    assert "#prompt=a+green+car" in page.one("#toast-link").get_attribute("value")


def test_a_hostile_link_is_validated(page):
    """It has markup, values beyond the service's limits, and names of built-in JavaScript properties."""
    evil = {
        "prompt": "<img src=x onerror=\"document.title='hit'\"><script>1</script>\u0000",
        "negative": "x" * 5000,
        "width": "99999999",
        "height": "256",
        "seed": "-1",
        "guidance": "1e9",
        "count": "99999",
        "prior_sampler": "evil",
        "prior_steps": "0x10",
        "__proto__": "x",
        "constructor": "x",
        "image": "data:text/html,x",
    }
    page.browser.get(f"{page.url}/page/icon.svg")
    page.open("#" + urlencode(evil))
    page.until(lambda: page.values("prompt")[0].startswith("<img src=x onerror="))
    assert page.values("negative", "seed", "guidance", "count", "prior_sampler", "prior_steps") == [
        "", "", "", "1", "", "",
    ]  # fmt: skip
    assert page.id("size").get_attribute("value") == "256x256"
    said = page.id("toast").text
    assert all(
        name in said for name in ("Ignored", "negative prompt", "width", "seed", "guidance", "sampler")
    )
    page.draw()
    page.drawn()
    assert page.one(".entry h3").text.startswith("<img src=x onerror=")
    assert page.script("return document.querySelectorAll('img[src=x], main script').length") == 0
    assert "hit" not in page.browser.title


@pytest.mark.parametrize(
    "hash",
    [
        "#%E0%A4%A",
        pytest.param("#=&=&&", marks=pytest.mark.slow),
        pytest.param("#images", marks=pytest.mark.slow),
        pytest.param("#prompt=" + "a" * 200_000, marks=pytest.mark.slow),
        "#kind=evil&seed=1",
    ],
)
def test_broken_links_leave_a_working_page(page, hash):
    page.browser.get(f"{page.url}/page/icon.svg")
    page.open(hash)
    page.draw("a red apple")
    page.drawn()


def test_a_hostile_history_is_ignored(page):
    """Another page of the same origin, or an older version of this one, may have stored it."""
    part = {"id": "x", "state": "done", "settings": {"prompt": "fine"}, "total": 1, "images": []}
    image = {"index": 0, "seed": 1, "prompt": "p", "width": 256, "height": 256}
    stored = [
        None, 7, {}, {"parts": 3}, {"parts": [None]}, {"parts": [{**part, "state": "evil"}]},
        {"parts": [{**part, "images": [{**image, "url": "javascript:x"}], "settings": {"prompt": []}}]},
        {"parts": [{**part, "images": [{**image, "url": "https://evil.example/v1/images/../../x.png?y"}]}]},
        {"parts": [part]},
    ]  # fmt: skip
    page.script("sessionStorage.setItem('wuerstchen.history', arguments[0])", json.dumps(stored))
    page.open()
    assert len(page.all(".entry")) == 3
    assert page.script("return document.querySelectorAll('.final, .entry a').length") == 0
    page.script("sessionStorage.setItem('wuerstchen.history', '{')")
    page.open()
    assert page.all(".entry") == []


def test_errors_of_the_service_are_shown_next_to_their_field(page):
    """The field may be in a collapsed section."""
    page.expected.append(r"v1/jobs.*400")
    page.click(page.one("#more summary"))
    page.type("prompt", "a red apple")
    page.type("prior_steps", "5000")
    page.script("document.getElementById('more').open = false")
    page.click(page.id("draw"))
    error = page.one("#prior_steps-error")
    assert "5000" in error.text or "steps" in error.text
    field = page.id("prior_steps")
    assert field.get_attribute("aria-invalid") == "true"
    assert "prior_steps-error" in field.get_attribute("aria-describedby")
    assert page.browser.switch_to.active_element == field
    assert page.all(".entry") == []
    field.clear()
    field.send_keys("9")
    assert not error.is_displayed()
    page.draw()
    page.drawn()


def test_a_wrong_size_and_no_prompt(page):
    page.click(page.id("draw"))
    assert "Enter a prompt" in page.one("#prompt-error").text
    page.expected.append(r"v1/jobs.*400")
    page.type("prompt", "a red apple")
    page.script("const s = document.getElementById('size'); s.value = 'custom';"
                "s.dispatchEvent(new Event('change', { bubbles: true }))")  # fmt: skip
    page.click(page.id("draw"))
    assert "a width and a height" in page.one("#size-error").text
    page.type("width", "251")
    page.type("height", "256")
    page.click(page.id("draw"))
    assert "251" in page.until(lambda: page.one("#size-error").text)
    page.type("width", "192")
    page.draw()
    page.drawn()
    assert page.one(".meta").text.startswith("192 × 256")


def test_a_full_queue_is_reported_at_the_button(page, fake):
    page.expected.append(r"v1/jobs.*429")
    fake.refuse = (429, "The queue is full. Try again later.", None)
    page.type("prompt", "a red apple")
    page.click(page.id("draw"))
    assert page.one("#form-error").text == "The queue is full. Try again later."
    assert page.all(".entry") == []
    assert page.browser.switch_to.active_element == page.id("draw")
    fake.refuse = None
    page.draw()
    assert not page.id("form-error").is_displayed()


@pytest.mark.parametrize("param", ['x"], *', "constructor", "prompts[0].\\", "", "a" * 5000])
def test_an_error_about_an_unknown_field_is_shown(page, fake, param):
    """An error whose field does not exist in the form was not shown at all."""
    page.expected.append(r"v1/jobs.*400")
    fake.refuse = (400, "<b>no</b>", param)
    page.type("prompt", "a red apple")
    page.click(page.id("draw"))
    shown = "prompt-error" if param.startswith("prompts") else "form-error"
    page.until(lambda: page.id(shown).text == "<b>no</b>", 5)


@pytest.mark.slow
def test_overwritten_prompts_can_be_restored(page, fake):
    """An example, a link or an old job replaces a long prompt."""
    page.draw("an old one")
    page.drawn()
    page.type("prompt", "what took me an hour")
    page.type("seed", "5")
    ways = [
        lambda: page.click(page.one(".chip")),
        lambda: page.click(page.button("Use settings", ".entry")),
        lambda: page.script("location.hash = 'prompt=linked&seed=3'"),
    ]
    for overwrite in ways:
        overwrite()
        page.until(lambda: page.values("prompt") != ["what took me an hour"])
        page.click(page.button("Undo"))
        assert page.values("prompt", "seed") == ["what took me an hour", "5"]
        assert page.script("return document.querySelector('[name=seeds]:checked').value") == "keep"
    page.id("prompt").clear()
    page.click(page.one(".chip"))
    assert page.all("#toast-act") == []  # nothing was lost


@pytest.mark.slow
def test_an_error_is_scrolled_into_view_on_a_phone(page, fake):
    """The page had scrolled to images that never came."""
    page.expected.append(r"v1/jobs.*429")
    page.size(390, 700, mobile=True)
    for _ in range(3):
        page.draw("a red apple")
    fake.refuse = (429, "The queue is full. Try again later.", None)
    page.click(page.id("draw"))
    error = page.one("#form-error")
    shown = "const r = arguments[0].getBoundingClientRect(); return r.top >= 0 && r.bottom <= innerHeight"
    page.until(lambda: page.script(shown, error), 3)


def test_a_failed_job_shows_the_reason(page, fake):
    fake.fail_with = "decoder_steps 90 take too long; ask for fewer"
    page.draw("a red apple")
    page.until(lambda: "Stage B steps 90 take too long; ask for fewer" in page.one(".entry").text)
    assert page.all(".frame") == []
    fake.fail_with = None
    page.click(page.button("Try again", ".entry"))
    page.drawn()


def test_notices_of_a_job_are_shown(page, fake):
    """An image whose colour profile is ignored looks wrong, and nothing explained it."""
    fake.notices = ["The colour profile of an image cannot be used.", "Words are lost."]
    page.draw("a cat")
    page.drawn()
    shown = "The colour profile of an image cannot be used. · Words are lost."
    assert [each.text for each in page.all(".entry .error.calm")] == [shown]


def test_a_token_is_requested_and_kept_in_the_tab(page, fake):
    page.expected.append("401")
    fake.token = "right"
    page.browser.get(f"{page.url}/")
    page.one("#token")
    for wrong, said in (("", "Enter a token"), ("wröng", "ASCII"), ("wrong", "does not know")):
        page.type("token-value", wrong)
        page.id("token-value").send_keys(Keys.ENTER)
        page.until(lambda said=said: said in page.id("token-error").text)
    page.type("token-value", "right")
    page.id("token-value").send_keys(Keys.ENTER)
    page.until(lambda: page.id("model").text)
    page.draw("a red apple")
    page.drawn()
    page.open()  # not asked again
    page.drawn()
    # After "Not now", the page says so, and asks again on request.
    fake.token = "another"
    page.browser.get(f"{page.url}/")
    page.click(page.one("#token-cancel"))
    assert "needs a token" in page.one("#banner").text
    page.click(page.id("banner-retry"))
    page.type("token-value", "another")
    page.id("token-value").send_keys(Keys.ENTER)
    page.until(lambda: page.id("model").text)


def test_the_page_survives_a_restart_of_the_service(page, fake):
    """Jobs were lost when the network failed, and settings when the service restarted."""
    page.expected += [
        "ERR_CONNECTION_REFUSED",
        "ERR_INCOMPLETE_CHUNKED_ENCODING",
        "ERR_CONNECTION_RESET",
        "ERR_EMPTY_RESPONSE",
    ]
    fake.steps_until_pause = 4
    page.draw("a red apple")
    page.until(lambda: "step 4" in page.one(".words").text)
    fake.stop()
    page.until(lambda: "is not responding" in page.one("#banner").text)
    page.until(lambda: "Connection lost" in page.one(".words").text)
    page.type("prompt", "a dog")
    page.click(page.id("draw"))
    assert "is not responding" in page.until(lambda: page.one("#form-error").text)
    assert page.values("prompt") == ["a dog"]
    fake.steps_until_pause = None
    fake.start()
    page.until(lambda: not page.id("banner").is_displayed())
    # The fake service keeps its jobs but no longer runs them. The page must learn of it.
    job = next(iter(fake.jobs.values()))
    job.tell("failed", message="the service was restarted; try again")
    page.until(lambda: "the service was restarted" in page.one(".entry").text)
    page.draw()
    page.drawn()


def test_a_job_of_another_instance_ends_with_a_reason(page, fake):
    page.expected.append("404")
    fake.steps_until_pause = 4
    page.draw("a red apple")
    fake.jobs.clear()
    page.open()
    page.until(lambda: "no longer knows this job" in page.one(".entry").text)


def test_event_streams_resume(page, fake):
    fake.drop_streams_after = 4
    fake.step_delay = 0.1
    page.draw("a red apple")
    page.drawn()
    assert fake.resumed_from
    assert fake.resumed_from == sorted(fake.resumed_from, key=int)
    assert all(int(each) > 0 for each in fake.resumed_from)


def test_the_defaults_are_those_of_the_network_that_samples(page, fake):
    """A student's, until the form asks for what it does not support."""
    fake.defaults = {**fake.defaults, "guidance": 1, "prior_steps": 2, "prior_sampler": "few"}
    page.open()

    def shown():
        hints = [page.id(name).get_attribute("placeholder") for name in ("guidance", "prior_steps")]
        return [*hints, page.script("return document.getElementById('prior_sampler').options[0].text")]

    student, full = ["1", "2", "few (default)"], ["4", "12", "dpm (default)"]
    page.until(lambda: shown() == student)
    page.type("negative", "red")
    assert shown() == full
    page.type("negative", " ")
    assert shown() == student
    page.open("#prompt=a&prior_sampler=dpm&guidance=1&prior_steps=12")
    page.until(lambda: page.values("guidance", "prior_steps", "prior_sampler") == ["1", "12", "dpm"])


@pytest.mark.slow
def test_a_reconnection_keeps_the_form(page, fake):
    """Size and sampler were reset to the defaults after a reconnection."""
    page.expected.append("502")
    page.click(page.one("#more summary"))
    chosen = {"size": "384x256", "prior_sampler": "ddpm"}
    for name, value in chosen.items():
        page.click(page.one(f"#{name} option[value='{value}']"))
    fake.proxy = ("/v1/", 502, "Bad Gateway")
    page.draw_refused("a red apple")
    page.until(lambda: page.id("banner").is_displayed())
    fake.proxy = None
    page.until(lambda: not page.id("banner").is_displayed())
    assert page.values(*chosen) == list(chosen.values())


@pytest.mark.slow
def test_the_page_of_a_proxy_is_not_an_answer(page, fake):
    """With a sign-in page of status 200, jobs disappeared without an error."""
    fake.proxy = ("/v1/", 200, "<!doctype html><title>Sign in</title>")
    page.draw_refused("a red apple")
    assert "is not responding" in page.one("#form-error").text
    page.browser.get(f"{page.url}/")
    assert "is not responding" in page.one("#banner").text
    fake.proxy = None
    page.until(lambda: page.id("model").text)
    fake.steps_until_pause = 3
    page.draw("a red apple")
    page.until(lambda: "step 3" in page.one(".words").text)
    fake.proxy = ("/v1/jobs/", 200, "<!doctype html><title>Sign in</title>")
    page.open()
    page.until(lambda: "Connection lost" in page.one(".words").text)
    fake.proxy = None
    fake.steps_until_pause = None
    page.drawn()


@pytest.mark.parametrize("status", [429, pytest.param(500, marks=pytest.mark.slow), 503])
def test_a_temporary_error_does_not_end_a_job(page, fake, status):
    """The page marked the job as failed while the service continued it."""
    page.expected.append(str(status))
    fake.steps_until_pause = 3
    page.draw("a red apple")
    page.until(lambda: "step 3" in page.one(".words").text)
    error = {"message": "too many requests; try again", "type": "server_error"}
    fake.proxy = ("/v1/jobs/", status, json.dumps({"error": error}))
    page.open()
    page.until(lambda: "Connection lost" in page.one(".words").text)
    fake.proxy = None
    fake.steps_until_pause = None
    page.drawn()


@pytest.mark.slow
def test_images_load_again_after_a_proxy_restarts(page, fake):
    page.expected.append("502")
    page.draw("a red apple")
    page.drawn()
    fake.proxy = ("/v1/images/", 502, "Bad Gateway")
    page.open()
    page.until(lambda: page.script("return document.querySelector('[aria-label=\"Image not available\"]')"))
    fake.proxy = None
    page.drawn()
    assert "No longer available" not in page.one(".entry").text


@pytest.mark.slow
def test_invalid_answers_of_the_service_are_ignored(page, fake):
    """Huge numbers, markup, URLs of other sites, and missing fields."""
    fake.steps_until_pause = 2
    page.draw("a red apple")
    page.until(lambda: "step 2" in page.one(".words").text)
    job = next(iter(fake.jobs.values()))
    evil = "<img src=x onerror=\"document.title='hit'\">"
    image = {"index": 0, "url": "/v1/images/a.png", "seed": 1, "prompt": evil, "width": 256, "height": 256}
    for name, data in [
        ("progress", None),
        ("progress", {"stage": evil, "step": "x", "steps": 2**70, "fraction": "1e400"}),
        ("preview", {}),
        ("preview", {"index": 0, "image": "https://evil.example/x.png"}),
        ("preview", {"index": 0, "image": "data:image/svg+xml;base64,PHN2Zy8+"}),
        ("image", {}),
        ("image", 7),
        ("image", {**image, "index": 2**31}),
        ("image", {**image, "url": "javascript:alert(1)"}),
        ("image", {**image, "url": ["/v1/images/a.png"]}),
        ("unheard of", {"a": 1}),
        ("queued", []),
    ]:
        job.events.append((name, data))
    page.until(lambda: evil in page.one(".words").text)
    assert page.all(".entry .final") == []
    fake.steps_until_pause = None
    page.drawn()
    assert len(page.all(".frame")) == 1
    assert page.script("return document.querySelectorAll('[src=x], [src*=evil]').length") == 0
    fake.hold_queue = True
    for number, message in enumerate((7, {"a": evil}, None), 2):
        page.draw("a red apple")
        page.until(lambda number=number: len(fake.jobs) == number)
        list(fake.jobs.values())[-1].events.append(("failed", {"message": message}))
        page.until(lambda: "The service gave no reason" in page.one(".entry").text)


@pytest.mark.slow
def test_tabs_share_connections(page, fake):
    """A browser opens at most six. The streams of two tabs blocked a third tab."""
    fake.steps_until_pause = 2
    first = page.browser.current_window_handle
    for _ in range(4):
        page.draw("a red apple")
    page.until(lambda: fake.streams == 3)
    page.browser.switch_to.new_window("tab")
    try:
        page.open()
        for _ in range(3):
            page.draw("a green apple")
        page.until(lambda: page.one(".meta").text.count("seed"), 5)
        assert fake.streams == 3
        fake.steps_until_pause = None
        page.drawn(3)
    finally:
        page.browser.close()
        page.browser.switch_to.window(first)
    page.drawn(4)
    page.until(lambda: fake.streams == 0, 5)


TOO_SMALL = """
const controls = "button, select, summary, textarea, a[download], .drop, .segments label, "
  + "input:not([type=radio], [type=file])";
return [...document.querySelectorAll(controls)]
  .filter((each) => each.checkVisibility())
  .map((each) => [each.id || each.className || each.textContent, each.getBoundingClientRect()])
  .filter(([, { width, height }]) => width < 43.5 || height < 43.5)
  .map(([name, { width, height }]) => `${name} ${width} ${height}`);
"""


@pytest.mark.parametrize("width", [320, pytest.param(390, marks=pytest.mark.slow)])
def test_narrow_screens(page, width):
    """No horizontal scrolling, and no controls too small for fingers."""
    page.size(width, 700, mobile=True)
    page.open()
    assert page.overflow() == 0
    page.click(page.one("#more summary"))
    assert page.script(TOO_SMALL) == []
    page.draw("w" * 90, count="2")
    assert page.overflow() == 0
    page.drawn()
    assert page.script(TOO_SMALL) == []
    page.click(page.one("button.frame"))
    page.one("#viewer")
    assert page.overflow() == 0
    assert (
        page.script("const v = document.getElementById('viewer'); return v.scrollWidth - v.clientWidth") == 0
    )
    assert page.script(TOO_SMALL) == []
    page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.click(page.id("compare"))
    page.one("#sides")
    assert (
        page.script("const v = document.getElementById('sides'); return v.scrollWidth - v.clientWidth") == 0
    )
    page.click(page.button("Generate both"))
    page.until(lambda: len(page.all(".entry")) == 2)
    page.drawn(2)
    assert page.overflow() == 0
    # Where the form fills the screen, the new entry is scrolled into view.
    assert page.one(".entry").rect["y"] < page.script("return scrollY + innerHeight")


def test_everything_works_by_keyboard(page):
    """No focus traps, and nothing that only a mouse can reach."""
    page.script("document.activeElement.blur()")

    def keys(*each: str) -> None:
        ActionChains(page.browser).send_keys(*each).perform()

    def tab_to(matches: str, most: int = 40):
        for _ in range(most):
            keys(Keys.TAB)
            if page.script("return document.activeElement.matches(arguments[0])", matches):
                outline = page.script("return getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none"
                return
        raise AssertionError(f"{matches} was not reached")

    keys(Keys.TAB)
    assert page.script("return document.activeElement.className") == "skip"
    tab_to("#prompt")
    keys("a red apple")
    tab_to("#file")
    tab_to("#size")
    tab_to("#seed")
    tab_to("#draw")
    keys(Keys.ENTER)
    page.one(".entry")
    page.drawn()
    page.id("prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: len(page.all(".entry")) == 2)
    page.drawn(2)
    page.script("document.getElementById('compare').focus()")
    tab_to("button.frame")
    keys(Keys.ENTER)
    page.one("#viewer")
    first = page.id("viewer-image").get_attribute("src")
    keys(Keys.ARROW_RIGHT)
    assert page.id("viewer-image").get_attribute("src") != first
    assert page.id("viewer-place").text == "2 of 2"
    keys(Keys.ARROW_RIGHT)  # already at the last image
    keys(Keys.ARROW_LEFT)
    assert page.id("viewer-image").get_attribute("src") == first
    keys(Keys.ESCAPE)
    page.until(lambda: not page.id("viewer").is_displayed())
    assert page.script("return document.activeElement.matches('button.frame')")  # back where it was opened


def test_the_focus_is_never_lost(page, fake, image):
    """When the focused element disappears, the focus must not jump to the top of the page."""

    def focus(element) -> None:
        page.script("arguments[0].focus()", element)

    def press(element, key: str = Keys.ENTER) -> None:
        focus(element)
        ActionChains(page.browser).send_keys(key).perform()

    def focused(matches: str) -> None:
        found = "const e = document.activeElement; return e.matches(arguments[0]) && e.checkVisibility()"
        page.until(lambda: page.script(found, matches), 3)

    focus(page.id("file"))
    page.id("file").send_keys(str(image))
    focused("input[name=mode]:checked")
    page.click(page.id("chosen-remove"))
    for prompt in ("one", "two", "three"):
        page.draw(prompt)
    page.drawn(3)
    # The bar for selected images.
    press(page.one(".tools button"))
    press(page.id("picked-clear"))
    focused("#images")
    for button in page.all(".tools button")[:2]:
        press(button)
    press(page.id("picked-go"))
    page.one("#beside")
    ActionChains(page.browser).send_keys(Keys.ESCAPE).perform()
    focused("#images")
    # To the ends of the viewer, then back with the arrow keys.
    press(page.one("button.frame"))
    first = page.id("viewer-image").get_attribute("src")
    for _ in range(3):
        press(page.id("viewer-on"))
    assert page.id("viewer-place").text == "3 of 3"
    focused("#viewer-on")
    ActionChains(page.browser).send_keys(Keys.ARROW_LEFT).perform()
    assert page.id("viewer-place").text == "2 of 3"
    focus(page.button("Copy link", "#viewer-actions"))
    ActionChains(page.browser).send_keys(Keys.ARROW_LEFT).perform()
    assert page.id("viewer-image").get_attribute("src") == first
    focused("#viewer *")
    ActionChains(page.browser).send_keys(Keys.ESCAPE).perform()
    # Notes and undo.
    press(page.id("clear"))
    focused("#images")
    press(page.button("Undo"))
    focused("#images")


@pytest.mark.slow
def test_a_held_key_starts_one_job(page, fake):
    """Key repeat filled the queue with the same job."""
    page.type("prompt", "a red apple")
    for name, modifiers in (("draw", 0), ("prompt", 2), ("seed", 0)):
        page.script("arguments[0].focus()", page.id(name))
        before = len(fake.jobs)
        for repeated in (False, True, True):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            event = {"type": "keyDown", "autoRepeat": repeated, "modifiers": modifiers, **key}
            page.browser.execute_cdp_cmd("Input.dispatchKeyEvent", event)
            page.until(
                lambda before=before: len(fake.jobs) > before
            )  # the guard against double clicks has ended
            page.until(lambda: "seed" in page.one(".meta").text)
        page.browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyUp", "key": "Enter"})
        page.drawn()
        assert len(fake.jobs) == before + 1, name


@pytest.mark.slow
def test_long_prompts_are_shortened_for_screen_readers(page, fake):
    """A screen reader read thousands of characters at every stage and button."""
    page.script(
        "window.told = []; new MutationObserver(() => told.push(document.getElementById('live').textContent))"
        ".observe(document.getElementById('live'), { childList: true })"
    )
    prompt = "a red apple " * 40
    page.type("prompt", prompt)
    page.draw()
    page.drawn()
    assert all(len(text) < 120 for text in page.script("return told"))
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {*CONTROLS, "region", "image"} - {"textbox"}
    names = [n["name"]["value"] for n in nodes if n.get("role", {}).get("value") in roles and n.get("name")]
    assert max(map(len, names)) < 120
    assert page.script("return document.querySelector('.entry h3').textContent") == prompt


@pytest.mark.parametrize("size", [(390, 844), (320, 256)])
def test_the_focused_field_is_visible(page, size):
    """Fields were hidden behind the sticky button, on phones and at 400 % zoom."""
    page.size(*size)
    page.click(page.one("#more summary"))
    covered = """
    const { left, width, top, bottom } = document.activeElement.getBoundingClientRect();
    return [top + 2, (top + bottom) / 2, bottom - 2].some(
      (y) => !document.activeElement.contains(document.elementFromPoint(left + width / 2, y)));
    """
    page.script("scrollTo(0, 0)")
    page.script("arguments[0].focus({ preventScroll: true })", page.id("count"))
    for _ in range(20):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        name = page.script("return document.activeElement.id")
        if name == "draw":
            break
        if name not in ("", "file"):  # radio buttons and files are hidden behind labels
            assert not page.script(covered), name
    assert name == "draw"


def test_every_control_has_a_name(page):
    """A screen reader must not read just "button"."""

    def nameless() -> list[str]:
        nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        controls = [
            n for n in nodes if not n.get("ignored") and n["role"]["value"] in {*CONTROLS, "image", "dialog"}
        ]
        assert controls
        return [
            f"{n['role']['value']} {n.get('properties')}"
            for n in controls
            if not n.get("name", {}).get("value")
        ]

    page.click(page.one("#more summary"))
    page.draw("a red apple", count="2")
    assert nameless() == []
    page.drawn()
    assert nameless() == []
    page.click(page.one("button.frame"))
    assert nameless() == []
    page.click(page.id("viewer-close"))
    for button in page.all(".tools button")[:2]:
        page.click(button)
    page.click(page.id("picked-go"))
    assert nameless() == []
    page.click(page.id("beside-close"))
    page.click(page.id("compare"))
    assert nameless() == []
    page.click(page.id("sides-close"))
    page.id("file").send_keys(str(FOLDER.parents[1] / "data/sample/noto/1f345.webp"))
    page.one("#chosen")
    assert nameless() == []
    ids = page.script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgba(colour) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}
function luminance(colour) {
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = colour.map((v) => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element) {
  for (; element; element = element.parentElement) {
    const colour = rgba(getComputedStyle(element).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255, 255];
}
const bad = [];
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const text = texts.currentNode.textContent.trim();
  const element = texts.currentNode.parentElement;
  const seen = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  if (!text || !seen || element.closest(".sr, :disabled, noscript")) continue;
  const own = luminance(rgba(getComputedStyle(element).color));
  const [dark, light] = [own, luminance(behind(element))].sort((x, y) => x - y);
  const ratio = (light + 0.05) / (dark + 0.05);
  if (ratio < 4.5) bad.push(`${text.slice(0, 30)} ${ratio.toFixed(2)}`);
}
return bad;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_light_and_dark(page, scheme):
    """Text needs a contrast of 4.5 to 1 (WCAG AA)."""
    page.media(prefers_color_scheme=scheme)
    page.click(page.one("#more summary"))
    page.expected.append(r"v1/jobs.*400")
    page.type("prompt", "a red apple")
    page.type("prior_steps", "5000")
    page.click(page.id("draw"))
    page.one("#prior_steps-error")
    page.type("prior_steps", "5")
    page.draw()
    page.drawn()
    page.click(page.one(".tools button"))
    page.type("prior_steps", "5000")
    page.click(page.id("draw"))
    page.one("#prior_steps-error")
    page.until(lambda: page.script(CONTRAST) == [], 3)
    bright = page.script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", bright)[:3])) > 600) == (scheme == "light")


def test_the_theme_switch_overrides_the_system_and_is_kept(page):
    paper = "return getComputedStyle(document.body).backgroundColor"
    page.media(prefers_color_scheme="light")
    light = page.script(paper)
    page.click(page.id("theme"))
    page.click(page.id("theme"))
    assert page.id("theme").text == "Dark"
    dark = page.script(paper)
    assert dark != light
    page.open()
    assert page.script(paper) == dark
    page.click(page.id("theme"))
    assert page.script(paper) == light


def test_reduced_motion_has_no_animation(page, fake):
    page.media(prefers_reduced_motion="reduce")
    fake.hold_queue = True
    page.draw("a red apple")
    style = "return getComputedStyle(document.querySelector('progress')).animationName"
    assert page.script(style) == "none"
    page.media(prefers_reduced_motion="no-preference")
    assert page.script(style) != "none"


def test_the_page_works_without_storage(page):
    """People who block cookies got a page that did nothing."""
    blocked = """for (const name of ['sessionStorage', 'localStorage'])
        Object.defineProperty(window, name, { get() { throw new DOMException('', 'SecurityError'); } });"""
    with page.beginning_with(blocked):
        page.open()
        page.draw("a red apple")
        page.drawn()
        page.click(page.id("theme"))
        assert page.id("theme").text == "Light"


@pytest.mark.slow
def test_the_page_works_with_a_full_storage(page, fake):
    """The token was not accepted when another page of the host had filled the storage."""
    page.expected.append("401")
    full = "Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError'); };"
    fake.token = "right"
    with page.beginning_with(full):
        page.browser.get(f"{page.url}/")
        page.one("#token")
        page.type("token-value", "right")
        page.id("token-value").send_keys(Keys.ENTER)
        page.until(lambda: page.id("model").text, 5)
        page.draw("a red apple")
        page.drawn()
        page.click(page.id("theme"))
        assert page.id("theme").text == "Light"


def test_forced_colours_show_progress_and_bars(page, fake):
    """Contrast themes of Windows override backgrounds, which hid the progress bar."""
    page.media(forced_colors="active")
    fake.steps_until_pause = 4
    page.draw("a red apple")
    page.until(lambda: "step 4" in page.one(".words").text)
    style = "return getComputedStyle(document.querySelector(arguments[0])).getPropertyValue(arguments[1])"
    assert page.script(style, "progress", "forced-color-adjust") == "none"
    assert page.script(style, ".bar", "border-top-style") == "solid"
    page.media(forced_colors="none")


def test_right_to_left_text(page):
    """A Hebrew prompt must run right to left without changing the direction of the page."""
    page.draw("תפוח אדום")
    page.drawn()
    assert page.script("return getComputedStyle(document.querySelector('.entry h3')).direction") == "rtl"
    assert page.script("return getComputedStyle(document.getElementById('prompt')).direction") == "rtl"
    assert page.script("return getComputedStyle(document.querySelector('.meta')).direction") == "ltr"


DROP = """
const [base64, name, type, how] = arguments;
const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], name, { type }));
const bubbling = { bubbles: true, cancelable: true };
const event = how === "paste"
  ? new ClipboardEvent("paste", { clipboardData: data, ...bubbling })
  : new DragEvent("drop", { dataTransfer: data, ...bubbling });
document.body.dispatchEvent(event);
return event.defaultPrevented;
"""


LORAS = [
    {"name": "dog", "title": "My dog", "trigger_words": ["sks dog", "ohwx"], "licence": "CC0-1.0"},
    {"name": "ink drawings", "title": "", "trigger_words": [], "licence": ""},
]


def choose(page, name: str, value: str) -> None:
    page.click(page.one(f"#{name} option[value='{value}']"))


def slide(page, value: float) -> None:
    page.script(
        "const s = document.getElementById('lora_strength'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input', { bubbles: true }))",
        value,
    )


def test_an_adapter_is_chosen_with_its_strength(page, fake):
    assert not page.id("adapters").is_displayed()  # this service has none
    fake.loras = LORAS
    fake.defaults = {**fake.defaults, "prior_steps": 2, "prior_sampler": "few"}
    page.open()
    page.until(lambda: page.id("adapters").is_displayed())
    assert [option.text for option in page.all("#lora option")] == ["None", "My dog (dog)", "ink drawings"]
    assert not page.id("lora_strength").is_displayed()
    choose(page, "lora", "dog")
    assert page.id("prior_steps").get_attribute("placeholder") == "12"  # a student supports no adapters
    assert page.id("lora_strength-value").text == "1.00"
    page.type("prompt", "a cat")
    for word, expected in (("sks dog", "a cat, sks dog"), ("sks dog", "a cat, sks dog")):
        page.click(page.button(word, "#lora-words"))
        assert page.values("prompt") == [expected]
    slide(page, 0.8)
    page.draw()
    page.drawn()
    body = list(fake.jobs.values())[-1].body
    assert (body["lora"], body["lora_strength"]) == ("dog", 0.8)
    assert "adapter dog · adapter strength 0.8" in page.one(".meta").text
    page.click(page.one("button.frame"))
    assert "Adapter\ndog" in page.id("viewer-settings").text
    page.click(page.id("viewer-close"))
    choose(page, "lora", "ink drawings")
    assert not page.id("lora-words").is_displayed()
    choose(page, "lora", "")
    page.draw("a dog")
    body = list(fake.jobs.values())[-1].body
    assert (body["lora"], body["lora_strength"]) == (None, None)
    page.click(page.button("Use settings", ".entry:nth-child(2)"))
    assert page.values("lora", "lora_strength") == ["dog", "0.8"]


def test_links_and_drafts_keep_the_adapter(page, fake):
    fake.loras = LORAS
    page.open()  # a new hash alone does not load the page again
    page.open("#prompt=a+cat&lora=ink+drawings&lora_strength=1.5")
    page.until(lambda: page.values("lora", "lora_strength") == ["ink drawings", "1.5"])
    page.browser.refresh()
    page.until(lambda: page.values("lora", "lora_strength") == ["ink drawings", "1.5"])
    page.open("#prompt=a+cat&lora=%3Cimg%3E&lora_strength=9")
    page.until(lambda: page.values("prompt") == ["a cat"] and page.values("lora") == [""])
    page.until(lambda: "adapter" in page.id("toast-words").text)
    page.open("#prompt=a+cat&lora_strength=0.5")  # without an adapter there is nothing to scale
    page.until(lambda: page.values("lora", "lora_strength") == ["", "1"])


def test_an_error_about_an_adapter_is_shown_at_its_field(page, fake):
    fake.loras = LORAS
    page.open()
    page.until(lambda: page.id("adapters").is_displayed())
    choose(page, "lora", "dog")
    page.expected.append("400")
    fake.refuse = (400, "lora 'dog' is not available. Use one of 'ink drawings', or omit it.", "lora")
    page.type("prompt", "a cat")
    page.click(page.id("draw"))
    page.until(lambda: page.id("lora-error").is_displayed())
    assert page.id("lora-error").text.startswith("Adapter 'dog' is not available")
    choose(page, "lora", "ink drawings")
    page.until(lambda: not page.id("lora-error").is_displayed(), 5)


def test_two_adapters_are_compared_with_the_same_seed(page, fake):
    fake.loras = LORAS
    page.open()
    page.until(lambda: page.id("adapters").is_displayed())
    page.type("prompt", "a cat")
    choose(page, "lora", "dog")
    page.click(page.id("compare"))
    assert page.values("A-lora", "B-lora", "A-lora_strength") == ["dog", "dog", "1"]
    choose(page, "A-lora", "")
    page.type("B-lora_strength", "0.5")
    page.click(page.button("Generate both", "#sides"))
    page.until(lambda: len(fake.jobs) == 2)
    a, b = (job.body for job in fake.jobs.values())
    assert (a.get("lora"), a.get("lora_strength")) == (None, None)
    assert (b["lora"], b["lora_strength"], b["seed"]) == ("dog", 0.5, a["seed"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_adapter_menu_is_readable_and_fits(page, fake, scheme):
    fake.loras = [LORAS[0] | {"title": "A very long title of an adapter " * 3}]
    page.media(prefers_color_scheme=scheme)
    page.size(360, 800, mobile=True)
    page.open()
    page.until(lambda: page.id("adapters").is_displayed())
    choose(page, "lora", "dog")
    page.until(lambda: page.id("lora_strength").is_displayed())
    assert page.overflow() <= 0
    assert page.script(CONTRAST) == []


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "given.png"
    save_png(
        Image.new("RGB", (96, 64), "teal"), path, {"prompt": "a teal thing", "seed": 77, "prior_steps": 9}
    )
    return path


def test_an_image_can_be_reconstructed_and_varied(page, image):
    page.id("file").send_keys(str(image))
    page.one("#chosen")
    page.click(page.one("#chosen-modes label:nth-of-type(2)"))
    assert not page.id("prompt").is_displayed()
    page.draw()
    page.drawn()
    assert page.one(".entry h3").text == "Reconstruction"
    assert len(page.all(".frame")) == 2  # with the original next to it
    page.click(page.one("#chosen-modes label:nth-of-type(1)"))
    page.script("const s = document.getElementById('strength'); s.value = 0.4;"
                "s.dispatchEvent(new Event('input', { bubbles: true }))")  # fmt: skip
    page.draw("a hill")
    page.drawn()
    assert "strength 0.4" in page.one(".meta").text
    page.click(page.id("chosen-remove"))
    assert not page.id("chosen").is_displayed()
    assert page.browser.switch_to.active_element == page.id("file")


def test_images_are_sent_in_the_documented_format(page, fake, image):
    page.id("file").send_keys(str(image))
    page.one("#chosen")
    page.draw("a hill", count="2")
    page.click(page.one("#chosen-modes label:nth-of-type(2)"))
    page.draw()
    page.drawn(2)
    varied, reconstructed = (job.body for job in fake.jobs.values())
    assert (varied["kind"], varied["prompts"], varied["count"], varied["strength"]) == (
        "generate",
        ["a hill"],
        2,
        0.7,
    )
    assert varied["image"] == f"data:image/png;base64,{encoded(image)}"
    assert set(reconstructed) <= {"kind", "image", "seed", "decoder_steps", "previews"}
    assert reconstructed["kind"] == "reconstruct"


@pytest.mark.slow
def test_large_images_are_shrunk(page, fake, tmp_path):
    """Also converts formats that the service cannot read, and puts transparent images on white."""
    Image.effect_noise((1500, 1100), 90).convert("RGB").save(tmp_path / "large.png")
    Image.new("RGB", (300, 200), "red").save(tmp_path / "old.bmp")
    Image.new("RGBA", (2100, 1000)).save(tmp_path / "wide.png")
    for name in ("large.png", "old.bmp", "wide.png"):
        page.id("file").send_keys(str(tmp_path / name))
        page.one("#chosen")
        page.draw("a hill")
        page.drawn()
        body = list(fake.jobs.values())[-1].body
        assert body["image"].startswith("data:image/jpeg;base64,")
        assert len(body["image"]) < fake.model()["limits"]["upload_bytes"] * 4 / 3 + 100
        page.click(page.id("chosen-remove"))
    sent = Image.open(io.BytesIO(base64.b64decode(body["image"].partition(",")[2])))
    assert sent.size == (1024, 488)
    assert sent.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_dropping_and_pasting(page, image, how):
    assert page.script(DROP, encoded(image), "given.png", "image/png", how)
    page.one("#chosen")
    # wuerstchen saved it: its settings are offered but not applied.
    assert page.values("prompt") == [""]
    page.click(page.button("Use them"))
    assert page.values("prompt", "seed", "prior_steps") == ["a teal thing", "77", "9"]


def test_pasted_text_with_an_image_is_text(page, image):
    """Office programs copy an image along with text. It must not become the init image."""
    with_text = DROP.replace("const bubbling", "data.setData('text/plain', 'a red apple'); const bubbling")
    assert not page.script(with_text, encoded(image), "text.png", "image/png", "paste")
    page.script("return new Promise((resolve) => setTimeout(resolve, 200))")
    assert not page.id("chosen").is_displayed()


def test_settings_after_other_png_chunks_are_found(page, tmp_path, image):
    """A signature can put a hundred kilobytes before the settings."""
    data = image.read_bytes()
    content = b"caBX" + bytes(100_000)
    chunk = len(content[4:]).to_bytes(4, "big") + content + zlib.crc32(content).to_bytes(4, "big")
    signed = tmp_path / "signed.png"
    signed.write_bytes(data[:33] + chunk + data[33:])
    page.id("file").send_keys(str(signed))
    page.click(page.button("Use them"))
    assert page.values("prompt", "seed") == ["a teal thing", "77"]


@pytest.mark.parametrize(
    "settings",
    [
        b"wuerstchen\0{",
        b"wuerstchen\0[1]",
        b'wuerstchen\0{"prompt": {"a": 1}, "__proto__": {"seed": 3}, "seed": 1e400, "width": [256]}',
        b'wuerstchen\0{"prompt": "<img src=x onerror=alert(1)>", "count": 1e9, "prior_sampler": "evil"}',
    ],
)
def test_hostile_settings_in_an_image_are_validated(page, tmp_path, settings):
    """An image from elsewhere must not write anything it likes into the form."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    data, content = buffer.getvalue(), b"tEXt" + settings
    chunk = (len(settings)).to_bytes(4, "big") + content + zlib.crc32(content).to_bytes(4, "big")
    evil = tmp_path / "evil.png"
    evil.write_bytes(data[:33] + chunk + data[33:])
    page.id("file").send_keys(str(evil))
    page.one("#chosen")
    page.until(lambda: page.id("file").get_attribute("value") == "")
    for button in page.all("#toast-act"):
        page.click(button)
        assert page.values("prompt", "count", "seed", "prior_sampler") == [
            "<img src=x onerror=alert(1)>", "1", "", "",
        ]  # fmt: skip
    assert page.script("return document.querySelectorAll('img[src=x]').length") == 0


def test_files_that_are_not_images_are_refused(page, image):
    """A dropped text file made the browser leave the page."""
    assert page.script(DROP, encoded(image), "notes.txt", "text/plain", "drop")
    assert "notes.txt is not an image" in page.one("#image-error").text
    assert page.script(DROP, encoded(FOLDER / "app.js"), "broken.png", "image/png", "drop")
    page.until(lambda: "broken.png cannot be read" in page.id("image-error").text)
    assert not page.id("chosen").is_displayed()


@pytest.mark.parametrize("bad", ["notes.txt", "broken.png"])
def test_an_invalid_image_removes_the_previous_one(page, fake, image, bad):
    """The previous image stayed in use next to an error about another file."""
    page.id("file").send_keys(str(image))
    page.one("#chosen")
    kind = "text/plain" if bad == "notes.txt" else "image/png"
    page.script(DROP, encoded(FOLDER / "app.js"), bad, kind, "drop")
    said = page.until(lambda: page.id("image-error").text)
    assert said.startswith(f"{bad} ")
    assert said.endswith(". The image chosen before was removed.")
    assert not page.id("chosen").is_displayed()
    page.draw("a hill")
    page.drawn()
    (job,) = fake.jobs.values()
    assert "image" not in job.body


SLOW_FIRST = """
const read = window.createImageBitmap;
let calls = 0;
window.createImageBitmap = async (file) => {
  calls += 1;
  if (calls === 1) await new Promise((resolve) => (window.readOn = resolve));
  return read(file);
};
"""


def test_the_last_chosen_image_is_used(page, fake, image, tmp_path):
    """A large file that is read slowly replaced the one that was chosen after it."""
    Image.new("RGB", (64, 64), "red").save(later := tmp_path / "later.png")
    page.script(SLOW_FIRST)
    page.script(DROP, encoded(image), "given.png", "image/png", "drop")
    page.script(DROP, encoded(later), "later.png", "image/png", "drop")
    page.one("#chosen")
    page.script("readOn()")
    page.draw("a hill")
    page.drawn()
    (job,) = fake.jobs.values()
    assert job.body["image"] == f"data:image/png;base64,{encoded(later)}"


@pytest.mark.slow
def test_a_job_waits_for_its_image(page, fake, image):
    """A job that was sent while the file was being read had no image, or the previous one."""
    page.script(SLOW_FIRST)
    page.type("prompt", "a hill")
    page.script(DROP, encoded(image), "given.png", "image/png", "drop")
    page.click(page.id("draw"))
    page.script("return new Promise((resolve) => setTimeout(resolve, 200))")
    assert page.all(".entry") == []
    page.script("readOn()")
    page.one(".entry")
    page.drawn()
    (job,) = fake.jobs.values()
    assert job.body["image"] == f"data:image/png;base64,{encoded(image)}"
    # If the file cannot be read, the job is not sent.
    page.script(SLOW_FIRST)
    page.script(DROP, encoded(FOLDER / "app.js"), "broken.png", "image/png", "drop")
    page.click(page.id("draw"))
    page.script("readOn()")
    page.until(lambda: "broken.png cannot be read" in page.id("image-error").text)
    assert len(page.all(".entry")) == 1


@pytest.mark.slow
def test_starting_from_an_expired_image(page, fake, image):
    """The error page was used as the image, or the previously chosen image was kept."""
    page.expected.append("404")
    page.draw("a red apple")
    page.drawn()
    page.id("file").send_keys(str(image))
    page.one("#chosen")
    page.click(page.one("button.frame"))
    fake.forget_images()
    page.click(page.button("Start from this image"))
    page.until(lambda: "no longer available" in page.id("toast").text)
    assert not page.id("chosen").is_displayed()
    assert page.id("image-error").text == ""


@pytest.mark.slow
def test_the_image_note_of_the_model_is_shown(page, fake, image):
    """The bundled model turns photographs into blobs."""
    fake.image_note = "A photograph comes out as blobs."
    page.open()
    assert not page.id("image-note").is_displayed()
    page.id("file").send_keys(str(image))
    assert page.one("#image-note").text == fake.image_note
    page.click(page.one("#chosen-modes label:nth-of-type(2)"))
    assert page.id("image-note").is_displayed()
    page.click(page.id("chosen-remove"))
    assert not page.id("image-note").is_displayed()


@pytest.mark.slow
def test_a_reconstruction_shows_only_settings_that_it_uses(page, fake, image):
    """It showed Stage C steps and settings of other jobs."""
    page.click(page.one("#more summary"))
    page.type("guidance", "8")
    page.type("prior_steps", "9")
    page.type("decoder_steps", "7")
    page.type("negative", "rain")
    page.id("file").send_keys(str(image))
    page.click(page.one("#chosen-modes label:nth-of-type(2)"))
    page.draw()
    page.drawn()
    assert re.fullmatch(r"256 × 256 · seed \d+ · 7 steps", page.one(".meta").text)
    page.script("navigator.clipboard.writeText = async text => { window.copied = text; }")
    page.click(page.button("Copy link", ".entry"))
    link = page.until(lambda: page.script("return window.copied"))
    assert set(re.findall(r"[#&](\w+)=", link)) == {"kind", "width", "height", "seed", "decoder_steps"}
    page.click(page.one("button.frame"))
    assert [dt.text for dt in page.all("#viewer-settings dt")] == ["Size", "Seed", "Stage B steps"]
    page.click(page.id("viewer-close"))
    # Entries stored by an older page look the same.
    part = {"id": "x", "state": "done", "total": 1, "images": []}
    settings = {"kind": "reconstruct", "prior_steps": 29, "decoder_steps": 10, "guidance": 2, "seed": 3}
    stored = json.dumps([{"parts": [{**part, "settings": settings}]}])
    page.script("sessionStorage.setItem('wuerstchen.history', arguments[0])", stored)
    page.open()
    assert page.one(".meta").text == "seed 3 · 10 steps"


def test_the_original_of_a_reconstruction_is_cropped(page, image):
    """A whole image was shown next to a reconstruction of its middle."""
    page.id("file").send_keys(str(image))
    page.click(page.one("#chosen-modes label:nth-of-type(2)"))
    page.draw()
    page.drawn()
    given = page.one(".given img")
    assert page.script("return getComputedStyle(arguments[0]).objectFit", given) == "cover"
    assert given.rect["width"] == pytest.approx(given.rect["height"], abs=1)
    page.until(lambda: page.one(".given figcaption").text == "Original, cropped to a square")


@pytest.mark.parametrize(
    ("param", "message", "shown"),
    [
        ("prior_steps", "prior_steps must be at most 100, got 500.",
         "Stage C steps must be at most 100, got 500."),
        ("guidance", "guidance is invalid: Input should be less than or equal to 100. See /openapi.json.",
         "Guidance should be less than or equal to 100."),
        pytest.param("prompts", "prompts must have at most 1000 characters, got 1200.",
         "Prompt must have at most 1000 characters, got 1200.", marks=pytest.mark.slow),
        ("prompts.0", "prompts.0 is invalid: Input should be a valid string. See /openapi.json.",
         "Prompt should be a valid string."),
        pytest.param("count", "count must be at most 16, got 99.",
         "Number of images must be at most 16, got 99.", marks=pytest.mark.slow),
        (None, "set prior_steps or decoder_steps lower", "set Stage C steps or Stage B steps lower"),
    ],
)  # fmt: skip
def test_messages_use_the_labels_of_the_page(page, fake, param, message, shown):
    """The service says ``prior_steps``, the page says "Stage C steps"."""
    page.expected.append(r"v1/jobs.*400")
    fake.refuse = (400, message, param)
    page.click(page.one("#more summary"))
    page.type("prompt", "a red apple")
    page.click(page.id("draw"))
    page.until(lambda: page.all(".error"))
    assert {error.text for error in page.all(".error")} == {shown}
    # Without a field, as in a comparison.
    page.script("document.getElementById('compare').click()")
    page.click(page.button("Generate both"))
    page.until(lambda: page.id("form-error").text == shown)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        pytest.param(3600, "1 hour", marks=pytest.mark.slow),
        (7200, "2 hours"),
        pytest.param(900, "15 minutes", marks=pytest.mark.slow),
        (0.5, "1 second"),
    ],
)
def test_the_page_says_how_long_images_are_kept(page, fake, seconds, words):
    """The page promised them until the tab is closed, but the service deleted them."""
    page.expected.append("404")
    fake.result_seconds = seconds
    page.open()
    assert f"keeps images for up to {words}" in page.id("empty").text
    page.draw("a red apple")
    page.drawn()
    assert page.id("feed-head").text.splitlines()[:2] == [
        "This session",
        f"Images are kept for up to {words}",
    ]
    fake.forget_images()
    page.open()
    page.until(lambda: f"kept for up to {words}" in page.one(".frame").text)


def test_a_model_without_an_encoder_accepts_no_images(page, fake, image):
    fake.can = {"generate": True, "reconstruct": False, "variation": False, "preview": False}
    page.open()
    assert not page.id("start").is_displayed()
    page.script(DROP, encoded(image), "given.png", "image/png", "drop")
    assert "does not accept images" in page.one("#image-error").text
    assert page.id("prompt").is_displayed()
    fake.can = {"generate": True, "reconstruct": True, "variation": False, "preview": False}
    page.open()
    page.id("file").send_keys(str(FOLDER.parents[1] / "data/sample/noto/1f345.webp"))
    page.one("#chosen")
    assert [label.text for label in page.all("#chosen-modes label")] == ["Reconstruct"]


@pytest.mark.slow
def test_two_settings_side_by_side(page):
    page.type("prompt", "a red apple")
    page.click(page.id("compare"))
    (guidance,) = page.values("A-guidance")
    page.type("B-guidance", "8")
    page.type("sides-seed", "2x")
    page.click(page.button("Generate both"))
    assert "seed" in page.one("#sides-error").text
    page.type("sides-seed", "21")
    page.click(page.button("Generate both"))
    page.one(".entry.both")
    page.drawn()
    assert "seed 21" in page.one(".entry.both .meta").text
    assert [h4.text.split("\n")[-1] for h4 in page.all(".both h4")] == [f"guidance {guidance}", "guidance 8"]
    a, b = (frame.rect for frame in page.all(".frame"))
    assert a["y"] == b["y"]
    assert a["width"] == b["width"]
    page.open()  # and after a reload
    page.drawn()
    assert len(page.all(".both .frame")) == 2


@pytest.mark.slow
def test_two_selected_images_side_by_side(page):
    page.draw("a red apple", seed="4")
    page.draw("a green apple", seed="4")
    page.drawn(2)
    first, second = page.all(".tools button")
    page.click(first)
    assert first.get_attribute("aria-pressed") == "true"
    assert page.id("picked-go").text == "Try other settings"
    page.click(second)
    page.click(page.id("picked-go"))
    page.one("#beside")
    assert [row.text.split()[0] for row in page.all("#beside tr.differs")] == ["Prompt"]
    assert len(page.all("#beside img")) == 2
    page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.until(lambda: not page.id("beside").is_displayed())
    # One image and other settings.
    page.click(page.all(".tools button")[0])
    page.click(page.id("picked-go"))
    assert page.values("A-prompt", "B-prompt", "sides-seed") == ["a green apple", "a green apple", "4"]


@pytest.mark.slow
def test_the_example_chips_rotate(page):
    shown = [chip.text for chip in page.all(".chip") if chip.text]
    assert len(shown) == 3
    page.click(page.all(".chip")[-1])
    after = [chip.text for chip in page.all(".chip") if chip.text]
    assert after != shown
    page.click(page.all(".chip")[0])
    assert page.values("prompt") == [after[0]]


def test_all_files_of_the_page_are_used_and_present():
    """The page would work in the checkout but not from the wheel."""
    names = {path.name for path in FOLDER.iterdir()}
    texts = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    wanted = set(re.findall(r'(?:href|src)="page/([\w.]+)"', texts["index.html"]))
    wanted |= set(itertools.chain(*(re.findall(r'from "\./([\w.]+)"', text) for text in texts.values())))
    assert wanted <= names
    assert names <= wanted | {"index.html"}


def test_live_mode_redraws_with_the_same_seed_and_cancels_what_it_replaces(page, fake):
    """Bugs: an entry or a seed per letter, a queue of jobs that nobody wants, or a flickering image."""
    page.click(page.id("live-mode"))
    assert not page.all(".entry")  # nothing is sent without a prompt
    page.type("prompt", "a red apple")
    page.one(".entry")
    page.drawn()
    (first,) = fake.jobs.values()  # one job for the whole text
    assert first.settings["count"] == 1
    assert page.values("seed") == [str(first.settings["seed"])]
    fake.steps_until_pause = 5
    page.id("prompt").send_keys(" on")
    page.until(lambda: len(fake.jobs) == 2)
    page.until(lambda: page.one(".words").text == "Stage C, step 5 of 12")
    assert len(page.all(".final.there")) == 1  # the image stays until the next one has loaded
    page.id("prompt").send_keys(" grass")
    page.until(lambda: len(fake.jobs) == 3)
    fake.steps_until_pause = None
    page.until(lambda: page.one(".meta") and list(fake.jobs.values())[1].state == "cancelled")
    page.drawn()
    jobs = list(fake.jobs.values())
    assert [job.state for job in jobs] == ["done", "cancelled", "done"]
    assert {job.settings["seed"] for job in jobs} == {first.settings["seed"]}
    assert [entry.find_element(By.CSS_SELECTOR, "h3").text for entry in page.all(".entry")] == [
        "a red apple on grass"
    ]
    page.until(lambda: page.script("return document.querySelectorAll('.final').length") == 1)
    assert fake.jobs["fake-3"].images[0]["url"] in page.one(".final").get_attribute("src")


def test_the_slider_of_live_mode_redraws_with_its_seed(page, fake):
    """It sets the seed of the form, so the same image can be generated later."""
    assert not page.all("#seed-slider")
    page.type("prompt", "a red apple")
    page.click(page.id("live-mode"))
    page.until(lambda: len(fake.jobs) == 1)
    page.id("seed-slider").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    page.until(lambda: any(job.settings["seed"] == 2 for job in fake.jobs.values()))
    page.drawn()
    assert page.values("seed") == ["2"]
    assert page.script("return document.querySelector('[name=seeds]:checked').value") == "keep"
    assert "seed 2 " in page.one(".meta").text
    # Without live mode changes send nothing, and its entry stays.
    sent = len(fake.jobs)
    page.click(page.id("live-mode"))
    page.id("prompt").send_keys(" pie")
    page.draw()
    page.drawn()
    assert len(fake.jobs) == sent + 1
    assert len(page.all(".entry")) == 2


def test_a_refused_live_job_keeps_the_image(page, fake):
    """Bugs: an entry without an image, or live mode that stops at the first full queue."""
    page.expected.append(r"v1/jobs.*429")
    page.click(page.id("live-mode"))
    page.type("prompt", "a red apple")
    page.one(".entry")
    page.drawn()
    fake.refuse = (429, "The queue is full. Try again later.", None)
    page.id("prompt").send_keys("s")
    page.until(lambda: page.id("form-error").is_displayed())
    assert len(page.all(".final.there")) == 1
    assert page.one(".entry h3").text == "a red apple"
    fake.refuse = None
    page.id("prompt").send_keys(" and pears")
    page.until(lambda: page.one(".entry h3").text == "a red apples and pears")
    page.drawn()
    assert not page.id("form-error").is_displayed()
