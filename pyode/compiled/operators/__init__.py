"""What each ATen operator is in terms of the graph's few kinds of nodes: a table.

Most operators are one formula for each number, and a line in `elementwise.py`; a new one needs no more. Those that only
move numbers need their name, in `table.py`. Formulas are C++ on numbers or vectors of them, with the functions of
csrc/core/vector_math.h.
"""

from . import elementwise, indexing, matrices, reductions
from .table import COUNTS, FILLED, MOVES, OPERATORS, SIZED

__all__ = ["COUNTS", "FILLED", "MOVES", "OPERATORS", "SIZED", "elementwise", "indexing", "matrices", "reductions"]
