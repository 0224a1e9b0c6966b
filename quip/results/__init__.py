"""Recorded experiments: `python -m quip.results NAME` measures once what the book's figures show."""
