"""Compiled dynamics: func traced to a graph, written out as C++ around the solver's loop, and a solve one native call."""
