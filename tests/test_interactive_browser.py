"""Interactive parts in headless Chromium, worked as a reader works them. Skipped where there is no browser."""

import html
import json
import re
import subprocess

import numpy as np
import pytest
import torch
from conftest import CHROMIUM

from quip.incoherence import KroneckerTransform, haar_orthogonal
from quip.interactive import (
    incoherence_lab,
    memory_wall,
    perplexity_chart,
    question,
    quiz,
    right,
    sortable_table,
    wrong,
)
from quip.interactive.component import asset
from quip.interactive.incoherence import WEIGHT_SEED, outlier_matrix, turned, two_bit_error
from quip.interactive.memory import cache_bytes

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=5000",
    "--window-size=700,900",
    "--dump-dom",
]

# What the scripts below use: `all` and `one` find elements, `set` moves a slider, `frame` waits until a page is drawn.
HELPERS = """
const all = (selector) => [...document.querySelectorAll(selector)];
const one = (selector) => document.querySelector(selector);
const texts = (selector) => all(selector).map((element) => element.textContent);
const set = (element, value) => {
  element.value = value;
  element.dispatchEvent(new Event("input", { bubbles: true }));
};
const frame = () => new Promise((done) => setTimeout(done, 100));
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
"""
PAGE = """<!doctype html><meta charset=utf-8><script>%s</script><body>%s<script>
const run = async () => {%s};
run().catch((error) => errors.push(`${error}`)).then((value) => {
  const textContent = JSON.stringify({ value, errors });
  document.body.append(Object.assign(document.createElement("pre"), { id: "result", textContent }));
});
</script>"""


def drive(folder, parts: str, script: str) -> object:
    """What a script, the body of an async function, returns in a page with these parts."""
    page = folder / "page.html"
    page.write_text(PAGE % (HELPERS, parts, script), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    found = re.search(r'<pre id="result">(.*?)</pre>', run.stdout, re.DOTALL)
    assert found, run.stderr
    result = json.loads(html.unescape(found[1]))
    assert result["errors"] == []
    return result["value"]


@pytest.fixture
def page(tmp_path):
    """Runs a script in a page that shows some components."""
    if CHROMIUM is None:
        pytest.skip("no Chromium")

    def run(*components, script):
        return drive(tmp_path, "\n".join(component._repr_html_() for component in components), script)

    return run


def test_quiz(page):
    made = quiz(
        question("one right?", wrong("a", "not <a>"), right("b", "so b")),
        question("two right?", right("c", "so c"), wrong("d", "not d"), right("e", "so e")),
    )
    seen = page(
        made,
        script="""
        const state = () => [...texts(".why"), one(".quip > .soft").textContent];
        const states = [state()];
        for (const k of [0, 1, 2, 4, 3]) {
          all("input")[k].click();
          states.push(state());
        }
        return [states, all("input").map((input) => input.type), texts("legend"), all("details").length];
        """,
    )
    states, types, legends, folded = seen
    assert states == [
        ["", "", "", "", "", "0 of 2 answered right, 0 at the first try."],
        ["No. not <a>", "", "", "", "", "0 of 2 answered right, 0 at the first try."],
        ["", "Right. so b", "", "", "", "1 of 2 answered right, 0 at the first try."],
        ["", "Right. so b", "Right. so c", "", "", "1 of 2 answered right, 0 at the first try."],
        ["", "Right. so b", "Right. so c", "", "Right. so e", "2 of 2 answered right, 1 at the first try."],
        ["", "Right. so b", "Right. so c", "No. not d", "Right. so e", "2 of 2 answered right, 1 at the first try."],
    ]
    assert types == ["radio"] * 2 + ["checkbox"] * 3
    assert legends == ["one right?", "two right? (2 are right)"]
    assert folded == 0


def test_two_outputs_on_one_page_are_apart(page):
    made = quiz(question("?", wrong("a", "x"), right("b", "y")))
    seen = page(
        made,
        made,
        script="""
        all("input")[1].click();
        all("input")[2].click();
        return [all("input").map((input) => input.checked), texts(".why"), all("fieldset").length];
        """,
    )
    assert seen == [[False, True, True, False], ["", "Right. y", "No. x", ""], 2]


ROWS = [
    {"method": "b", "bits": 10, "loss": 2.5},
    {"method": "a", "bits": 2, "loss": None},
    {"method": "c", "bits": 2, "loss": -1e-6},
    {"method": "a", "bits": 16, "loss": 1e3},
]


def test_table(page):
    seen = page(
        sortable_table(ROWS, ["method", "bits", "loss"], filters=["bits"]),
        script="""
        const rows = () => all("tbody tr").filter((row) => !row.hidden).map((row) => row.textContent);
        const sorts = () => all("thead th").map((header) => header.getAttribute("aria-sort"));
        const states = [rows()];
        for (const k of [0, 0, 1, 2, 2]) {
          all("th button")[k].click();
          states.push([rows(), sorts()]);
        }
        set(one("input"), "A 1");
        states.push([rows(), one("[role=status]").textContent]);
        set(one("input"), "");
        set(one("select"), "2");
        states.push([rows(), [...one("select").options].map((option) => option.text)]);
        all("th button")[1].focus();
        return [states, document.activeElement.tagName];
        """,
    )
    states, focused = seen
    b10, a2, c2, a16 = "b102.5", "a2–", "c2−1e−06", "a161000"
    assert states == [
        [b10, a2, c2, a16],
        [[a2, a16, b10, c2], ["ascending", None, None]],
        [[c2, b10, a2, a16], ["descending", None, None]],
        [[a2, c2, b10, a16], [None, "ascending", None]],
        [[c2, b10, a16, a2], [None, None, "ascending"]],
        [[a16, b10, c2, a2], [None, None, "descending"]],
        [[a16], "1 of 4 rows"],
        [[c2, a2], ["all", "2", "10", "16"]],
    ]
    assert focused == "BUTTON"


def test_memory_wall(page):
    gpus = {"small": (24, 1008), "large": (141, 4800)}
    seen = page(
        memory_wall(gpus),
        script="""
        const cells = () => all("tbody tr").flatMap((row) => [row.cells[2].textContent, row.cells[3].textContent]);
        const [weights, bits, tokens] = all("input[type=range]");
        const shared = one("input[type=checkbox]");
        const states = [cells()];
        set(bits, 16);
        states.push(cells());
        all(".presets button")[1].click();
        states.push(cells());
        set(tokens, 6);
        states.push([cells(), one(".sum").textContent]);
        shared.click();
        states.push([cells(), one(".sum").textContent]);
        set(weights, 12);
        states.push([cells(), one(".sum").textContent]);
        return states;
        """,
    )
    assert seen[0] == ["6.5", "57.6", "123.5", "274.3"]  # as the table without a script
    assert seen[1] == ["–", "–", "1.0", "34.3"]
    assert seen[2] == ["10.0", "72.0", "127.0", "342.9"]  # 7 billion weights of 16 bits
    for (cells, text), share in zip(seen[3:5], (1, 8), strict=True):
        size = 14 + cache_bytes(7e9, 2**15, share) / 1e9
        assert cells[2:] == [f"{141 - size:.1f}", f"{4800 / size:.1f}"]
        assert f"take 14.0 GB, the KV cache another {size - 14:.1f} GB. " in text
    assert seen[5][0] == ["–"] * 4
    assert seen[5][1].startswith("1 trillion weights of 16 bits take 2000 GB") and "No card" in seen[5][1]


def chart_rows():
    row = {"model": "m", "parameters": 1e9, "bits": 16, "method": "unquantized", "perplexity": 10, "source": "measured"}
    return [
        row,
        row | {"bits": 2, "method": "QuIP", "perplexity": 20},
        row | {"bits": 4, "method": "QuIP", "perplexity": 11},
        row | {"bits": 2, "method": "nearest", "perplexity": 1e5},
        row | {"model": "M", "parameters": 3e10, "source": "Somebody", "bits": 2, "method": "QuIP", "perplexity": 12},
        row | {"model": "N", "parameters": 7e10, "source": "Somebody", "bits": 2, "method": "QuIP", "perplexity": 6},
    ]


def test_perplexity_chart(page):
    seen = page(
        perplexity_chart(chart_rows()),
        script="""
        await frame();
        const marks = () => all(".plot path").map((path) => path.getAttribute("fill") === "none");
        const broken = (line) => line.hasAttribute("stroke-dasharray");
        const lines = () => all("polyline").map((line) => [line.points.length, broken(line)]);
        const press = (key) => one(".plot svg").dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        const seen = { size: [marks(), lines()], open: one("details").open };
        press("ArrowRight");
        seen.first = one(".read").textContent;
        press("ArrowLeft");
        seen.last = one(".read").textContent;
        const at = all(".plot path")[3].getBoundingClientRect();
        const where = { clientX: at.x + at.width / 2 + 3, clientY: at.y + at.height / 2, bubbles: true };
        one(".plot svg").dispatchEvent(new PointerEvent("pointermove", where));
        seen.pointed = one(".read").textContent;
        const box = (text) => all("label").find((label) => label.textContent.includes(text)).querySelector("input");
        box("nearest").click();
        seen.without = marks().length;
        box("number of weights").click();
        seen.parameters = lines();
        box("Somebody").click();
        seen.measured = marks();
        for (const text of ["2", "4", "16"]) box(` ${text}`).click();
        seen.nothing = one(".plot").textContent;
        return seen;
        """,
    )
    assert seen["size"] == [[False] * 4 + [True] * 2, [[3, False], [2, False]]]
    assert seen["open"] is False
    assert seen["first"].startswith("m, QuIP, 2 bits: perplexity 20 (1 B weights, 250 MB; measured by this project)")
    assert seen["last"].startswith("N, QuIP, 2 bits: perplexity 6 (70 B weights, 17.5 GB; reported by Somebody, not")
    assert seen["pointed"].startswith("m, nearest, 2 bits: perplexity 100000 ")
    assert seen["without"] == 5
    assert seen["parameters"] == [[2, True]]
    assert seen["measured"] == [False] * 3
    assert seen["nothing"] == "Nothing is switched on."


def test_incoherence(page):
    seen = page(
        incoherence_lab(),
        script="""
        await frame();
        const state = () => [...texts("tbody td"), ...texts("figcaption")];
        const pixels = () => all("canvas").map((canvas) =>
          [...canvas.getContext("2d").getImageData(0, 0, 96, 64).data].reduce((sum, x) => sum + x, 0));
        const states = [state()];
        const [matrix, transform] = all("button");
        const [on, permute] = all("input[type=checkbox]");
        transform.click();
        states.push(state());
        permute.click();
        states.push(state());
        matrix.click();
        set(all("input[type=range]")[2], 30);
        states.push(state());
        const apart = pixels();
        on.click();
        states.push(state());
        return [states, apart, pixels(), texts(".histogram text").length > 6, permute.disabled];
        """,
    )
    states, apart, same, drawn, disabled = seen
    first, second = outlier_matrix(12, 2, 15), outlier_matrix(12, 2, 30, seed=1)
    after = (turned(first), turned(first, 2), turned(first, 2, permute=False), turned(second, 2, permute=False), second)
    for state, W, W_ in zip(states, (first, first, first, second, second), after, strict=True):
        mu = [f"{abs(X).max() / np.sqrt(np.mean(X**2)):.2f}" for X in (W, W_)]
        error = [f"{two_bit_error(X):.1%}" for X in (W, W_)]
        assert state == [*mu, *error, f"W, before: μ = {mu[0]}", f"U W Vᵀ, after: μ = {mu[1]}"]
    assert apart[0] != apart[1]
    assert same[0] == same[1] == apart[0]
    assert drawn and disabled


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Random numbers, Haar matrices and transforms that the script of the simulation makes."""
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    script = f"""
    {asset("incoherence.js")}
    const unit = (n) => Array.from({{ length: n }}, (_, i) => Array.from({{ length: n }}, (_, j) => Number(i === j)));
    const random = generator({WEIGHT_SEED});
    const drawn = {{ permutation: random.permutation(1000), normal: Array.from({{ length: 1000 }}, random.normal) }};
    drawn.haar = haar(24, generator(3));
    for (const [name, permute] of [["permuted", true], ["plain", false]])
      drawn[name] = [64, 96].map((n) => unit(n).map(kronecker(n, 4294967295, permute)));
    return drawn;
    """
    return drive(tmp_path_factory.mktemp("drawn"), "", script)


def test_the_stream_is_numpys(drawn):
    rng = np.random.RandomState(WEIGHT_SEED)
    assert drawn["permutation"] == rng.permutation(1000).tolist()
    np.testing.assert_allclose(drawn["normal"], rng.standard_normal(1000), rtol=1e-14)


def test_haar_matrices_are_those_of_the_chapter(drawn):
    np.testing.assert_allclose(drawn["haar"], haar_orthogonal(24, np.random.RandomState(3)), atol=1e-12)


@pytest.mark.parametrize("name", ["permuted", "plain"])
def test_transforms_keep_norms_and_are_those_of_the_package(drawn, name):
    for transposed, n in zip(drawn[name], (64, 96), strict=True):
        V = np.array(transposed).T  # the script applied it to the unit vectors
        np.testing.assert_allclose(V @ V.T, np.eye(n), atol=1e-13)
        ours = KroneckerTransform(n, 2**32 - 1, torch.float64, permute=name == "permuted")
        np.testing.assert_allclose(V, ours(torch.eye(n, dtype=torch.float64)).T, atol=1e-12)
