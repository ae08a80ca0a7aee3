"""How fast pyode is: pytest-benchmark suites (bench_*.py), and one table of ratios (python -m benchmarks)."""
