"""Compiled dynamics: func traced to a graph, written out as C++ around the loop, and a solve one native call."""
