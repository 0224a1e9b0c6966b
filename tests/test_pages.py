"""The built book as a reader's browser shows it, without a network: `make pages` builds it and runs these tests.

They need Chromium: the program named by QUIP_CHROMIUM, or one that is installed; without one they are skipped.
"""

import functools
import html.parser
import http.server
import importlib
import inspect
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import CHROMIUM

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "_build" / "html"
PAGES = sorted(path.relative_to(BOOK).as_posix() for path in BOOK.rglob("*.html") if "_static" not in path.parts)
PAGES = [page for page in PAGES if page != "index.html"]  # sends its reader on to the introduction
OPTIONS = [
    "--no-sandbox",  # containers that run as root have none; the pages are our own
    "--disable-gpu",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing but our own server is there
]
PATIENCE = 180_000  # ms; the longest pages take seconds, and a busy machine many times that
HEAVY = 300_000  # bytes of a figure

pytestmark = [
    pytest.mark.pages,
    pytest.mark.skipif(not PAGES, reason="the book is not built: make pages"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed, and QUIP_CHROMIUM names none"),
]


class QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):  # a browser hangs up whenever it likes
        pass


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    with QuietServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=BOOK)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS, timeout=PATIENCE)
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        context.set_default_timeout(PATIENCE)
        yield context
        browser.close()


class Reader:
    """A page, opened, and what went wrong on the way: requests to elsewhere, and what the console says."""

    def __init__(self, browser, address: str, name: str):
        self.address, self.name = address, name
        self.outside, self.failed, self.console = [], [], []
        self.page = browser.new_page()
        self.page.on("request", lambda request: self.outside.append(request.url) if self.leaves(request.url) else None)
        self.page.on("response", lambda r: self.failed.append(r.url) if r.status >= 400 else None)
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("console", lambda m: self.console.append(m.text) if m.type in ("error", "warning") else None)
        self.page.goto(address + name)
        self.page.wait_for_load_state("networkidle")
        self.page.evaluate("() => window.MathJax?.startup.promise")

    def leaves(self, url: str) -> bool:
        return not url.startswith((self.address, "data:", "blob:"))


@pytest.fixture(scope="module", params=PAGES)
def reader(request, address, browser):
    reader = Reader(browser, address, request.param)
    yield reader
    reader.page.close()


def test_nothing_is_fetched_from_elsewhere_and_nothing_complains(reader):
    reader.page.emulate_media(color_scheme="dark")
    reader.page.emulate_media(color_scheme="light")
    assert (reader.outside, reader.failed, reader.console) == ([], [], [])


def test_title_description_and_icon(reader):
    assert re.search(r"quip|QuIP", reader.page.title())
    icon = reader.page.locator("link[rel~=icon]").get_attribute("href")
    assert (BOOK / reader.name).parent.joinpath(icon.partition("?")[0]).is_file()
    if reader.name.startswith("book/"):
        assert len(reader.page.locator("meta[name=description]").get_attribute("content")) > 40


FORMULAS = """() => {
  const formulas = [...document.querySelectorAll('.math.notranslate')];
  return {
    unrendered: formulas.filter(f => !f.querySelector('mjx-container')).map(f => f.textContent),
    errors: [...document.querySelectorAll('mjx-merror, [data-mjx-error]')].map(e => e.textContent),
    empty: formulas.filter(f => f.getBoundingClientRect().width == 0 && f.offsetParent).map(f => f.outerHTML),
  };
}"""
PROSE = """() => {
  const article = document.querySelector('article')?.cloneNode(true);
  article?.querySelectorAll('pre, code, mjx-container, script, style, .quip').forEach(e => e.remove());
  return article ? article.textContent : '';
}"""


def test_mathematics_and_markup_are_rendered(reader):
    assert reader.page.evaluate(FORMULAS) == {"unrendered": [], "errors": [], "empty": []}
    prose = reader.page.evaluate(PROSE)
    assert not re.findall(r".{0,30}\d [%×].{0,30}", prose), "the line may break there"
    assert not re.findall(r".{0,30}(?:\$\$|\\\(|\\\[|:::|\{[a-z:]+\}`|\bTODO\b).{0,30}", prose)


IMAGES = """() => [...document.querySelectorAll('img')].map(image => ({
  source: image.getAttribute('src').slice(0, 80),
  loaded: image.complete && image.naturalWidth > 0,
  alt: image.getAttribute('alt'),
  figure: !!image.closest('article'),
}))"""


def test_images_load_and_have_alternative_text(reader):
    for image in reader.page.evaluate(IMAGES):
        assert image["loaded"], image
        assert image["alt"] is not None, image
        if image["figure"] and reader.name.startswith("book/"):
            assert len(image["alt"]) > 30, f"says too little of what it shows: {image}"


def test_no_figure_is_heavy(reader):
    folder = (BOOK / reader.name).parent
    images = {image["source"] for image in reader.page.evaluate(IMAGES) if not image["source"].startswith("data:")}
    outputs = reader.page.eval_on_selector_all(".cell_output", "outputs => outputs.map(o => o.outerHTML.length)")
    assert max([0, *outputs]) <= HEAVY
    assert not [name for name in images if folder.joinpath(name.partition("?")[0]).stat().st_size > HEAVY]


class Anchors(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.ids = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.ids |= {value for name, value in attrs if name == "id" or (tag == "a" and name == "name")}


@functools.cache
def anchors(path: Path) -> set[str]:
    return Anchors(path.read_text(encoding="utf-8")).ids


def broken(link: str, address: str) -> bool:
    if not link.startswith(address):
        parts = urlsplit(link)
        return parts.scheme not in ("http", "https", "mailto") or not (parts.netloc or parts.path) or " " in link
    page, _, anchor = link.removeprefix(address).partition("#")
    path = BOOK / unquote(page.partition("?")[0])
    path = path / "index.html" if path.is_dir() else path
    return not path.is_file() or bool(anchor and path.suffix == ".html" and unquote(anchor) not in anchors(path))


def test_links_lead_somewhere(reader, address):
    links = reader.page.eval_on_selector_all("a[href]", "links => links.map(a => a.href)")
    assert not sorted({link for link in links if broken(link, address)})


def test_the_reference_leads_to_the_cells(address):
    page = (BOOK / "book" / "api.html").read_text(encoding="utf-8")
    entries = dict(
        re.findall(r'<dt class="sig sig-object py" id="([\w.]+)">(.*?)(?=<dt class="sig|\Z)', page, re.DOTALL)
    )
    exported = [
        path for path in (ROOT / "quip").glob("*.py") if "AUTOGENERATED" in path.read_text(encoding="utf-8")[:300]
    ]
    assert len(exported) > 8
    for path in exported:
        module = importlib.import_module(f"quip.{path.stem}")
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isroutine(value) or inspect.isclass(value):
                cell = f'#source-quip-{path.stem}-{name.replace("_", "-").lower()}"'
                assert cell in entries[f"quip.{path.stem}.{name}"], name


# What reaches beyond the screen, unless it scrolls in a box of its own that does not.
BEYOND = """() => {
  const width = document.documentElement.clientWidth, beyond = e => e.getBoundingClientRect().right > width + 1;
  const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && !e.querySelector('article');
  const boxed = e => { for (e = e.parentElement; e; e = e.parentElement) if (scrolls(e) && !beyond(e)) return true; };
  const found = [...document.querySelectorAll('article, article *')].filter(
    e => e.getBoundingClientRect().width && beyond(e) && !e.closest('mjx-assistive-mml') && !boxed(e));
  return found.map(e => e.outerHTML.slice(0, 120)).slice(0, 5);
}"""


def test_nothing_is_cut_off_on_a_phone(reader):
    reader.page.set_viewport_size({"width": 390, "height": 844})
    try:
        assert reader.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert reader.page.evaluate(BEYOND) == []
    finally:
        reader.page.set_viewport_size({"width": 1280, "height": 900})


# Formulas that take the whole line and have their number beside them, code that is cut off without a sign, and formulas
# within a line that are wider than it.
CUT = """() => {
  const end = e => e.getBoundingClientRect();
  const numbered = [...document.querySelectorAll('article div.math:has(> .eqno)')].filter(e => {
    const box = end(e.querySelector('mjx-container')), formula = end(e.querySelector('mjx-math'));
    return formula.right > box.right + 1 && end(e.querySelector('.eqno')).top < box.bottom - 5;
  });
  const faded = e => parseFloat(getComputedStyle(e).getPropertyValue('--fade')) > 0;
  const sharp = [...document.querySelectorAll('article div.highlight pre')].filter(
    e => CSS.supports('animation-timeline: scroll()') && faded(e) != e.scrollWidth > e.clientWidth);
  const inline = [...document.querySelectorAll('article span.math mjx-container')].filter(
    e => end(e.querySelector('mjx-math')).width > end(e).width + 4);
  return [...numbered, ...sharp, ...inline].map(e => e.textContent.slice(0, 80));
}"""


# Formulas within a line below which a narrow window could show a scroll bar.
BARS = """() => [...document.querySelectorAll('article span.math mjx-container')].filter(e => {
  const style = getComputedStyle(e);
  return style.overflowX == 'auto' && style.scrollbarWidth != 'none';
}).map(e => e.textContent)"""


def test_what_goes_on_beyond_the_edge_says_so_on_a_phone(reader):
    reader.page.set_viewport_size({"width": 390, "height": 844})
    try:
        assert reader.page.evaluate(CUT) == []
        assert reader.page.evaluate(BARS) == []
    finally:
        reader.page.set_viewport_size({"width": 1280, "height": 900})


# Formulas that a screen of usual width cuts off.
CUT_ANYWHERE = """() => [...document.querySelectorAll('article div.math mjx-container')].filter(
  e => e.querySelector('mjx-math').getBoundingClientRect().right > e.getBoundingClientRect().right + 1
).map(e => e.textContent.slice(0, 80))"""


def test_formulas_fit_a_screen(reader):
    assert reader.page.evaluate(CUT_ANYWHERE) == []


# What a mouse can use and the tab key does not stop at.
UNREACHED = """() => {
  const kinds = 'a[href], button, input:not([type=hidden]), select, textarea, summary, [onclick], [role=button]';
  const seen = e => e.checkVisibility({visibilityProperty: true, opacityProperty: true}) && !e.disabled;
  const stops = e => { e.focus(); return e === document.activeElement && e.tabIndex >= 0; };
  const all = [...document.querySelectorAll('article :is(' + kinds + ')')].filter(seen);
  return all.filter(e => !stops(e)).map(e => e.outerHTML.slice(0, 120));
}"""


def test_every_control_is_reached_by_the_tab_key(reader):
    assert reader.page.evaluate(UNREACHED) == []


# The tab key stops, and nothing shows where; or it stops at every formula.
UNSEEN = """async () => {
  const unseen = [...document.querySelectorAll('article mjx-container[tabindex="0"]')];
  const settled = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  for (const button of document.querySelectorAll('article button.toggle-button')) {
    button.focus({focusVisible: true});
    await settled();
    if (getComputedStyle(button).outlineStyle === 'none') unseen.push(button);
  }
  return unseen.map(e => e.outerHTML.slice(0, 120)).slice(0, 5);
}"""


def test_the_tab_key_stops_at_controls_and_shows_where(reader):
    assert reader.page.evaluate(UNSEEN) == []


# A label belongs to the first element in it that can have one, which need not be the slider that was meant.
NAMELESS = """() => [...document.querySelectorAll('article :is(input:not([type=hidden]), select, textarea)')]
  .filter(e => !e.labels?.length && !e.ariaLabel && !e.getAttribute('aria-labelledby')).map(e => e.outerHTML)"""


def test_every_control_has_a_name(reader):
    assert reader.page.evaluate(NAMELESS) == []


def test_sliders_and_folded_answers_answer_to_keys(reader):
    for slider in reader.page.locator("article input[type=range]:enabled").all():
        before = slider.input_value()
        slider.press("ArrowLeft" if before == slider.get_attribute("max") else "ArrowRight")
        assert slider.input_value() != before
    for button in reader.page.locator("article button.toggle-button").all():
        before = button.get_attribute("aria-expanded")
        button.press("Enter")
        assert button.get_attribute("aria-expanded") != before
    assert reader.console == []


def test_search_finds_without_a_network(address, browser):
    reader = Reader(browser, address, "search.html?q=incoherence")
    reader.page.wait_for_selector("ul.search li a", timeout=PATIENCE)
    assert reader.outside == []
    reader.page.close()


def test_the_book_without_a_page_is_its_introduction(address, browser):
    reader = Reader(browser, address, "")
    reader.page.wait_for_url("**/book/intro.html")
    reader.page.close()
