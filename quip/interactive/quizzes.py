"""Questions with choices, each of which is explained when it is chosen."""

from __future__ import annotations

from typing import NamedTuple

from quip.errors import QuipError
from quip.interactive.component import Component, inline


class Choice(NamedTuple):
    """An answer to choose, whether it is right, and why it is or is not."""

    text: str
    is_right: bool
    why: str


class Question(NamedTuple):
    """A question and its choices in order; there may be several right ones, all to be found."""

    text: str
    choices: tuple[Choice, ...]


def right(text: str, why: str) -> Choice:
    """A right answer."""
    return Choice(text, True, why)


def wrong(text: str, why: str) -> Choice:
    """A wrong answer: `why` says what is tempting about it, and where it fails."""
    return Choice(text, False, why)


def question(text: str, *choices: Choice) -> Question:
    """A question with its `right` and `wrong` choices.

    Raises `QuipError` for fewer than two, for none that is right, and for an empty text.
    """
    parts = [text, *(part for choice in choices for part in (choice.text, choice.why))]
    if not all(isinstance(part, str) and part.strip() for part in parts):
        raise QuipError(f"question {text!r}: the question, its choices and their explanations must all be texts")
    if len(choices) < 2 or not any(choice.is_right for choice in choices):
        raise QuipError(f"question {text!r} needs at least two choices, one of them right")
    if len({choice.text for choice in choices}) < len(choices):
        raise QuipError(f"question {text!r} has the same choice twice")
    return Question(text, choices)


def quiz(*questions: Question) -> Component:
    """The quiz at the end of a chapter: the last value of a notebook's cell.

    All texts may have the markup of `inline`. A question with one right choice takes one, with several any number; a
    choice is explained at once. Where no script runs, the answers are folded up below each question. Raises
    `QuipError` without questions.
    """
    if not questions:
        raise QuipError("a quiz needs at least one question")
    items = "\n".join(question_html(*item) for item in questions)
    return Component("quiz", f"quiz of {len(questions)} questions", f"<ol class=questions>\n{items}\n</ol>")


def question_html(text: str, choices: tuple[Choice, ...]) -> str:
    """A list item: question, choices and, folded up, which of them are right and why."""
    options = "\n".join(f"<li>{inline(choice.text)}</li>" for choice in choices)
    reasons = "\n".join(
        f"<li{' data-right' if choice.is_right else ''}><strong>{'Right.' if choice.is_right else 'No.'}</strong> "
        f"{inline(choice.why)}</li>"
        for choice in choices
    )
    return (
        f"<li class=question><p>{inline(text)}</p>\n<ol type=A>\n{options}\n</ol>\n"
        f"<details><summary>Answer</summary>\n<ol type=A>\n{reasons}\n</ol></details></li>"
    )
