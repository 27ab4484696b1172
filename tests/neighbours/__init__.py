"""A package, because pytest would otherwise confuse its `conftest.py` with the one above."""
