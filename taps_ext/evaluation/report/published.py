"""The figures that the paper published, as facts: arXiv 2603.27027, its tables for temperatures 0 and 1.

Its target has 8 billion parameters, its drafters were trained on MathInstruct and ShareGPT. Acceptance length there is
tokens over steps - 1 for most rows, 3 to 5% above the one defined here, and its rows mix depths of 5 and 8 and, for
merged trees, 119 nodes against 60.
"""

from __future__ import annotations

SOURCE = "arXiv 2603.27027"
TASKS = ("mt_bench", "gsm8k", "math500", "svamp")

Row = tuple[float, float, float, float]

EAGLE_2: dict[float, dict[str, Row]] = {
    0.0: {
        "MathInstruct": (2.54, 5.04, 5.28, 4.81),
        "ShareGPT": (3.57, 3.72, 3.81, 3.71),
        "Mixed 35k+35k": (3.37, 4.12, 4.44, 4.16),
        "Mixed 70k+70k": (3.75, 4.68, 4.85, 4.64),
        "Averaged": (2.07, 2.53, 2.57, 2.50),
        "Confidence routed": (3.63, 4.91, 5.25, 4.71),
        "Merged trees": (3.93, 5.32, 5.63, 5.25),
    },
    1.0: {
        "MathInstruct": (2.43, 4.71, 4.61, 4.53),
        "ShareGPT": (3.38, 3.72, 3.43, 3.65),
        "Mixed 35k+35k": (3.10, 4.08, 4.02, 4.03),
        "Mixed 70k+70k": (2.99, 3.76, 3.20, 3.08),
        "Averaged": (2.01, 2.49, 2.42, 2.45),
        "Confidence routed": (3.36, 4.65, 4.62, 4.46),
        "Merged trees": (3.55, 5.01, 4.79, 4.93),
    },
}
HASS: dict[float, dict[str, Row]] = {
    0.0: {
        "MathInstruct": (2.90, 5.02, 5.35, 3.13),
        "ShareGPT": (3.98, 4.09, 3.98, 4.44),
        "Mixed 35k+35k": (3.92, 4.77, 5.02, 4.15),
        "Mixed 70k+70k": (4.13, 5.53, 5.67, 5.38),
        "Averaged": (2.29, 2.80, 3.12, 2.13),
        "Confidence routed": (3.93, 5.01, 5.37, 4.89),
        "Merged trees": (4.05, 5.42, 5.65, 5.31),
    },
    1.0: {
        "MathInstruct": (2.31, 4.75, 4.63, 2.46),
        "ShareGPT": (3.50, 4.03, 3.61, 3.95),
        "Mixed 35k+35k": (3.46, 4.66, 4.47, 4.57),
        "Mixed 70k+70k": (3.17, 4.16, 3.42, 4.01),
        "Averaged": (2.10, 2.78, 2.90, 2.69),
        "Confidence routed": (3.51, 4.72, 4.55, 4.71),
        "Merged trees": (3.76, 5.21, 4.98, 5.05),
    },
}
METHODS = {"eagle": EAGLE_2, "hass": HASS}  # by the beginning of a label
SINGLES = {"math": "MathInstruct", "chat": "ShareGPT", "half": "Mixed 35k+35k", "full": "Mixed 70k+70k"}  # by drafter


def of_label(label: str, temperature: float) -> dict[str, Row]:
    """The rows of the method that a label names, at that temperature; empty if the paper has none."""
    tables = (table for beginning, table in METHODS.items() if label.lower().startswith(beginning))
    return next(tables, {}).get(temperature, {})
