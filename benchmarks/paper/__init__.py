"""What only the paper asks of an evaluation: comparisons, the sweep of averages, signals, budgets, published figures.

    PYTHONPATH=benchmarks python -m paper RESULTS... --output DIRECTORY

writes the report of `taps-ext report` with these sections. RESULTS are what that command takes; the report.json of such
a report, with signals.json beside it, gives the same report again.
"""
