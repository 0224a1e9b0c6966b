"""The interactive parts of the book: simulations, quizzes, sortable tables. They ask for nothing from elsewhere."""

from quip.interactive.component import Component
from quip.interactive.perplexity import PUBLISHED, perplexity_chart
from quip.interactive.tables import sortable_table

__all__ = ["PUBLISHED", "Component", "perplexity_chart", "sortable_table"]
