"""Interactive parts as HTML: what they say without a script, escaping, and what they refuse."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quip.errors import QuipError
from quip.incoherence import mu_weights
from quip.interactive import (
    PUBLISHED,
    incoherence_lab,
    memory_wall,
    perplexity_chart,
    question,
    quiz,
    right,
    sortable_table,
    wrong,
)
from quip.interactive.component import asset, inline, to_json
from quip.interactive.incoherence import outlier_matrix, turned, two_bit_error
from quip.interactive.memory import cache_bytes

GPUS = {"T4": (16, 320), "H200": (141, 4800)}
VOID = {"br", "input", "meta"}


class Reader(HTMLParser):
    """Text of the page without scripts and styles, tags that are open, and addresses."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.open, self.addresses, self.tags = "", [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:  # a paragraph or a cell may end without a tag of its own
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data


def two_questions():
    return quiz(
        question("Is *μ* of `W` < 1?", wrong("yes", "Because of <b>."), right("no", "It is ≥ 1.")),
        question("Which?", right("x_{1}", "x"), wrong("y", "y"), right("z^{2}", "z")),
    )


MADE = {
    "memory": lambda: memory_wall(GPUS),
    "incoherence": incoherence_lab,
    "perplexity": lambda: perplexity_chart(PUBLISHED, caption="a < b"),
    "table": lambda: sortable_table([{"a": 1}, {"a": None}], ["a"], caption="one & two", filters=["a"]),
    "quiz": two_questions,
}
each_kind = pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())


@each_kind
def test_the_same_arguments_give_the_same_output(make):
    # Stored outputs are compared with those of a fresh run.
    assert make()._repr_html_() == make()._repr_html_()
    assert len(repr(make())) < 60


@each_kind
def test_html_is_closed_and_asks_for_nothing(make):
    html = make()._repr_html_()
    reader = Reader(html)
    assert reader.open == []
    assert reader.addresses == []
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|fetch\(|XMLHttp", html)
    assert len(html.encode()) < 20_000


@each_kind
def test_no_script_closes_itself(make):
    html = make()._repr_html_()
    assert html.count("</script>") == html.count("<script")


@pytest.mark.parametrize("kind", MADE)
def test_each_kind_has_a_script_and_a_style(kind):
    assert asset(f"{kind}.js").startswith("const ") and "const start = (root) =>" in asset(f"{kind}.js")
    assert f".quip-{kind}" in asset(f"{kind}.css")
    assert not re.search(r"^\s*//|/\*", asset(f"{kind}.js") + asset(f"{kind}.css"), re.MULTILINE)


def test_markup():
    assert inline("*μ*_{H} of `x_{1}`, n^{1.5}") == "<em>μ</em><sub>H</sub> of <code>x_{1}</code>, n<sup>1.5</sup>"
    assert inline("*a_{1} b*") == "<em>a<sub>1</sub> b</em>"


@given(st.text())
def test_markup_escapes_everything_else(text):
    html = re.sub(r"</?(code|em|sub|sup)>", "", inline(text))
    assert "<" not in html and ">" not in html and '"' not in html


@given(
    st.recursive(st.none() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_data_stand_safely_in_a_script(data):
    text = to_json(data)
    assert "<" not in text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# Quiz


def test_a_quiz_says_everything_without_a_script():
    text = Reader(two_questions()._repr_html_()).text
    for part in ("Is μ of W < 1?", "yes", "No. Because of <b>.", "Right. It is ≥ 1.", "x1", "Right. z"):
        assert part in text
    assert "<details><summary>" in two_questions()._repr_html_()  # and folded up, without `open`


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quiz(), "at least one question"),
        (lambda: question("Q?", right("a", "b")), "at least two choices"),
        (lambda: question("Q?", wrong("a", "b"), wrong("c", "d")), "one of them right"),
        (lambda: question("Q?", wrong("a", "b"), right("a", "d")), "same choice twice"),
        (lambda: question("Q?", wrong("a", ""), right("b", "d")), "must all be texts"),
        (lambda: question(" ", wrong("a", "c"), right("b", "d")), "must all be texts"),
        (lambda: question("Q?", wrong("a", None), right("b", "d")), "must all be texts"),
    ],
)
def test_quizzes_refuse(make, message):
    with pytest.raises(QuipError, match=message):
        make()


# Table


def test_a_table_is_a_table_without_a_script():
    rows = [{"m": "a<b", "x": -0.5}, {"m": "c", "x": float("nan")}, {"m": "d", "x": 1234.56}, {"m": "e"}]
    html = sortable_table(rows, {"m": "*M*", "x": "X"}, caption="c")._repr_html_()
    assert '<th scope=row>a&lt;b</th><td class=n data-v="-0.5">−0.5</td>' in html
    assert html.count("<td class=n>–</td>") == 2
    assert 'data-v="1234.56">1235</td>' in html
    assert "<th scope=col><em>M</em></th><th scope=col class=n>X</th>" in html
    assert "<caption>c</caption>" in html


def test_table_formats():
    html = sortable_table([{"k": "a", "x": 22.0}], ["k", "x"], formats={"x": ".2f"})._repr_html_()
    assert ">22.00</td>" in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], ["a"]), "at least one row"),
        (([{"a": 1}], []), "one column"),
        (([{"a": 1}], ["b"]), "column 'b'"),
        (([{"a": 1}, 2], ["a"]), "row 1 of the table is no dict but a int"),
        (([{"a": 1}], ["a"], "", {"b": ".1f"}), "column 'b'"),
        (([{"a": 1}], ["a"], "", {"a": ".1q"}), "format '.1q' does not fit the value 1"),
        (([{"a": 1}], ["a"], "", {}, ["b"]), "no column 'b' to filter by"),
    ],
)
def test_tables_refuse(arguments, message):
    with pytest.raises(QuipError, match=message):
        sortable_table(*arguments)


# Perplexity

ROW = {"model": "m", "parameters": 135e6, "bits": 2, "method": "QuIP", "perplexity": 99.05, "source": "measured"}


def test_a_chart_is_a_table_without_a_script():
    html = perplexity_chart([ROW | {"model": "a<b"}, *PUBLISHED])._repr_html_()
    assert "<tr><td>a&lt;b<td>QuIP<td>2<td>99.05<td>33.8 MB<td>measured\n" in html
    assert "<tr><td>Llama 2 70B<td>OPTQ<td>2<td>123.9<td>17.5 GB<td>Chee et al. 2023\n" in html


def test_published_figures_are_marked_as_such():
    assert {row["source"] for row in PUBLISHED} == {"Chee et al. 2023"}
    assert len({(row["model"], row["bits"], row["method"]) for row in PUBLISHED}) == len(PUBLISHED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": 0}, "row 1 of the chart: 'parameters' must be a number ≥ 1, got 0"),
        ({"parameters": "135M"}, "'parameters'"),
        ({"perplexity": 0.5}, "'perplexity' must be a number ≥ 1"),
        ({"perplexity": float("inf")}, "'perplexity'"),
        ({"bits": True}, "'bits'"),
        ({"source": ""}, "'source' must be a text"),
        ({"model": None}, "'model' must be a text"),
        ({"family": 3}, "'family' must be a text"),
    ],
)
def test_charts_refuse(change, message):
    with pytest.raises(QuipError, match=message):
        perplexity_chart([ROW, ROW | change])


def test_charts_refuse_no_rows_and_other_axes():
    with pytest.raises(QuipError, match="at least one row"):
        perplexity_chart([])
    with pytest.raises(QuipError, match="'size' or 'parameters', not 'bits'"):
        perplexity_chart([ROW], x="bits")


# Memory


def test_memory_wall_without_a_script():
    text = Reader(memory_wall(GPUS)._repr_html_()).text
    assert "70 billion weights of 2 bits take 17.5 GB." in text
    html = memory_wall(GPUS)._repr_html_()
    assert "<td class=n>–</td><td class=n>–</td>" in html  # a T4 does not hold them
    assert "<td class=n>123.5</td><td class=n>274.3</td>" in html


@pytest.mark.parametrize(
    ("weights", "layers", "width", "share"),  # GPT-3, Llama 2 7B, 13B and 70B
    [(175e9, 96, 12288, 1), (6.74e9, 32, 4096, 1), (13e9, 40, 5120, 1), (69e9, 80, 8192, 8)],
)
def test_cache_of_known_models(weights, layers, width, share):
    assert cache_bytes(weights, tokens=10, share=share) == pytest.approx(10 * layers * 2 * width / share * 2, rel=0.04)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "at least one GPU"),
        (({"T4": (16,)},), "GPU 'T4' needs its memory"),
        (({"T4": (16, -1)},), "GPU 'T4'"),
        ((GPUS, 1e6), "number of weights"),
        ((GPUS, 70e9, 17), "bits must be"),
        ((GPUS, 70e9, 2.5), "bits must be"),
    ],
)
def test_memory_wall_refuses(arguments, message):
    with pytest.raises(QuipError, match=message):
        memory_wall(*arguments)


# Incoherence


def test_incoherence_without_a_script():
    text = Reader(incoherence_lab()._repr_html_()).text
    W = outlier_matrix(12, 2, 15)
    for X in (W, turned(W)):
        assert f"{mu_weights(torch.from_numpy(X)):.2f}" in text
        assert f"{two_bit_error(X):.1%}" in text


def test_outliers_are_those_asked_for():
    W = outlier_matrix(lone=7, columns=0, size=40)
    assert (abs(W) == 40).sum() == 7
    plain, heavy = outlier_matrix(0, 0, 30), outlier_matrix(0, 3, 30)
    assert ((abs(heavy / plain - 10) < 1e-9).all(axis=0)).sum() == 3
    assert (heavy == plain).all(axis=0).sum() == 93


def test_error_of_gaussian_weights_is_that_of_four_levels():
    # Evenly spaced levels for a Gaussian: 0.1188 at best (Max 1960); 6144 draws and steps of 1/8 come near it.
    assert two_bit_error(outlier_matrix(0, 0, 1)) == pytest.approx(0.1188, rel=0.05)


@pytest.mark.parametrize("change", [{"lone": 61}, {"lone": -1}, {"columns": 5}, {"size": 0}, {"size": 1.5}])
def test_incoherence_refuses(change):
    with pytest.raises(QuipError, match=f"{next(iter(change))} must be an integer of"):
        incoherence_lab(**change)
