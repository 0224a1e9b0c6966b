"""The interactive parts of the book: simulations, quizzes, sortable tables. They ask for nothing from elsewhere."""

from quip.interactive.component import Component
from quip.interactive.incoherence import incoherence_lab
from quip.interactive.memory import memory_wall
from quip.interactive.perplexity import PUBLISHED, perplexity_chart
from quip.interactive.quizzes import question, quiz, right, wrong
from quip.interactive.tables import sortable_table

__all__ = [
    "PUBLISHED",
    "Component",
    "incoherence_lab",
    "memory_wall",
    "perplexity_chart",
    "question",
    "quiz",
    "right",
    "sortable_table",
    "wrong",
]
