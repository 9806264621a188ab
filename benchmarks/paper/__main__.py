"""Write a report with the paper's sections; see the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import paper
from paper import comparisons, published, signals, sweeps
from taps_ext.evaluation import counts, report


def sections(results: counts.Results, histograms: signals.Histograms) -> list[report.Section]:
    """The report's sections with the paper's before the provenance."""
    views = counts.views(results)
    found = [comparisons.section(views), sweeps.averaging(views), signals.section(results, views, histograms)]
    found += [sweeps.budgets(views), published.section(views)]
    *usual, provenance = report.sections(results)
    return [*usual, *(one for one in found if one.tables), provenance]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m paper", description=paper.__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="as of taps-ext report")
    parser.add_argument("--output", "-o", type=Path, required=True)
    arguments = parser.parse_args()
    report.check_report_output(arguments.output)
    results, histograms = signals.add(counts.read(arguments.results))
    report.write(results, arguments.output, sections(results, histograms))
    (arguments.output / signals.FILE).write_text(signals.to_json(histograms), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"paper: {error}")
