"""Records made by hand, for every test of this folder."""

from tests.records import make_cell

__all__ = ["make_cell"]
