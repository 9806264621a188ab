"""What bench_gpu.py measured, for people: the goals, the table, the last lines of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A promise about one row; `measure` turns the row into the number that must not exceed `limit`."""

    says: str
    shape: dict[str, Any]  # of the row, by its keys
    limit: float
    measure: Callable[[Row, str], float]  # of the row, and "warm" or "cold"


def microseconds(row: Row, state: str) -> float:
    return float(row[f"{state}_us"]["median"])


def times_the_floor(row: Row, state: str) -> float:
    return microseconds(row, state) / float(row[f"{state}_floor_us"])


def floor_or_six_microseconds(row: Row, state: str) -> float:
    """At most 1 when within twice the floor or within 6 microseconds."""
    return min(times_the_floor(row, state) / 2, microseconds(row, state) / 6)


def share_of_plain(row: Row, state: str) -> float:
    """Both from Python: the plain way reads the host, so that it has no graph to replay."""
    return float(row["eager_us"]["median"]) / float(row["plain_us"]["median"])


def _verify(batch: int, sampling: str) -> dict[str, Any]:
    return {"op": "verify_tree", "batch": batch, "nodes": 60, "vocabulary": 128_256, "sampling": sampling}


def _op(op: str, **shape: Any) -> dict[str, Any]:
    return {"op": op, "batch": 1, **shape}


EXPANSION = _op("expand_frontier", vocabulary=128_256)
GOALS = [
    Goal("us", _verify(1, "0"), 15, microseconds),
    Goal("us", _verify(1, "1"), 15, microseconds),
    Goal("us", _verify(1, "0.7, top-p 0.9"), 15, microseconds),
    Goal("x floor", _verify(64, "0"), 2, times_the_floor),
    Goal("x floor", _verify(64, "1"), 4, times_the_floor),
    Goal("us", _op("merge_trees", nodes=60), 8, microseconds),
    Goal("us", _op("ancestor_bits", nodes=60), 4, microseconds),
    Goal("of 2 x floor or 6 us", EXPANSION, 1, floor_or_six_microseconds),
    Goal("of 2 x floor or 6 us", {**EXPANSION, "batch": 64}, 1, floor_or_six_microseconds),
    *(
        Goal("of the plain way, both eager", shape, 0.1, share_of_plain)
        for shape in (
            _verify(1, "0"),
            _verify(1, "1"),
            _verify(64, "1"),
            EXPANSION,
            *(_op(op, nodes=60) for op in ("prune_tree", "merge_trees", "tree_attention_mask", "ancestor_bits")),
            *(_op(op, nodes=60) for op in ("tree_depths", "compact_kv")),
        )
    ),
]


def goals(rows: list[Row]) -> list[Row]:
    """Each goal with what was measured, warm and cold; None where its row is missing."""
    found = []
    for goal in GOALS:
        row = next((row for row in rows if goal.shape.items() <= row.items() and "error" not in row), None)
        entry: Row = {"shape": name_of(goal.shape), "unit": goal.says, "limit": goal.limit}
        for state in ("warm", "cold"):
            entry[state] = _measured(goal, row, state)
        # What a cache holds in part would flatter a share of the memory's speed.
        judged = entry["cold" if goal.measure is times_the_floor else "warm"]
        entry["met"] = None if judged is None else judged <= goal.limit
        found.append(entry)
    return found


def _measured(goal: Goal, row: Row | None, state: str) -> float | None:
    try:
        return None if row is None else float(f"{goal.measure(row, state):.3g}")
    except KeyError:  # a column that this run has not measured
        return None


def name_of(shape: Row) -> str:
    """ "verify_tree B=1 N=60 V=128256 T=1"."""
    letters = {"batch": "B", "nodes": "N", "vocabulary": "V", "sampling": "T"}
    return " ".join([shape["op"], *(f"{letter}={shape[key]}" for key, letter in letters.items() if key in shape)])


def markdown(result: Row) -> str:
    """All rows as tables, an op after the other."""
    provenance = result["provenance"]
    gpu = provenance.get("gpu") or {"name": "no GPU (a dry run)"}
    lines = [
        f"# The ops on {gpu['name']}, {provenance['date']}",
        "",
        "Microseconds, medians (quartiles). Warm and cold: a call inside a CUDA graph, its input in the L2 cache or",
        "out of it. Floor: the bytes that must move at the speed of a copy, or an empty kernel where that is longer.",
        "Eager: the same call from Python. Plain: the same work in plain PyTorch from Python.",
        "",
        f"A copy moves {result['copy_gb_per_s']} GB/s (read and written); an empty kernel takes "
        f"{result['empty_launch_us']['warm']} us in a graph, {result['empty_launch_us']['cold']} us measured cold.",
        "",
        *_goal_lines(result["goals"]),
    ]
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        lines += ["", f"## {op}", "", HEADER, "|" + "---|" * HEADER.count(" | ") + "---|"]
        lines += [_row_line(row) for row in sorted(_rows_of(op, result), key=_shape_key)]
    return "\n".join(lines) + "\n"


HEADER = (
    "| shape | warm | cold | warm / floor | cold / floor | floor | eager | plain | plain, visited rows | plain / warm |"
    " plain / eager |"
)


def _rows_of(op: str, result: Row) -> list[Row]:
    return [row for row in result["rows"] if row["op"] == op]


def _shape_key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) or 0 for key in ("vocabulary", "nodes", "batch")) + (row.get("sampling") or "",)


def _row_line(row: Row) -> str:
    name = name_of({key: value for key, value in row.items() if value is not None}).removeprefix(row["op"] + " ")
    if "error" in row:
        return f"| {name} | {row['error']} |" + " |" * 9
    if row.get("agrees_with_cpu") is False:
        name += " **differs from the CPU**"
    cells = [name, _spread(row.get("warm_us")), _spread(row.get("cold_us"))]
    cells += [_ratio(row, f"{state}_us", f"{state}_floor_us") for state in ("warm", "cold")]
    cells += [
        _number(row.get("warm_floor_us")),
        *(_median(row, key) for key in ("eager_us", "plain_us", "plain_lazy_us")),
    ]
    cells += [_ratio(row, "plain_us", "warm_us"), _ratio(row, "plain_us", "eager_us")]
    return f"| {' | '.join(cells)} |"


def _value(row: Row, key: str) -> float | None:
    value = row.get(key)
    return value["median"] if isinstance(value, dict) else value


def _median(row: Row, key: str) -> str:
    return _number(_value(row, key))


def _ratio(row: Row, above: str, below: str) -> str:
    over, under = _value(row, above), _value(row, below)
    return "" if over is None or under is None else _number(over / under)


def _spread(value: Row | None) -> str:
    if value is None:
        return ""
    return f"{_number(value['median'])} ({_number(value['lower_quartile'])} - {_number(value['upper_quartile'])})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _goal_lines(found: list[Row]) -> list[str]:
    verdicts = {None: "not measured", True: "met", False: "missed"}
    lines = ["| goal | at most | warm | cold | |", "|---|---|---|---|---|"]
    for goal in found:
        numbers = " | ".join(_number(goal[key]) for key in ("limit", "warm", "cold"))
        lines.append(f"| {goal['shape']}, {goal['unit']} | {numbers} | {verdicts[goal['met']]} |")
    return lines


def summary(result: Row) -> str:
    """The last lines of a run."""
    rows = result["rows"]
    checked = [row["agrees_with_cpu"] for row in rows if "agrees_with_cpu" in row]
    errors = [f"{name_of(row)}: {row['error']}" for row in rows if "error" in row]
    met = [goal["met"] for goal in result["goals"]]
    return "\n".join(
        [
            *_goal_lines(result["goals"]),
            *errors[:10],
            f"{len(rows)} cases, {result['cases_left_out']} left out for time, {len(errors)} errors; "
            f"{sum(checked)} of {len(checked)} checked results agree with the CPU; "
            f"goals: {met.count(True)} met, {met.count(False)} missed, {met.count(None)} not measured",
        ]
    )
