"""What the programs are combined from: subjects, kinds of loops, and the tests, changes and keys of an item."""

from __future__ import annotations

from dataclasses import dataclass

NUMBERS = (
    *(("prices", "price"), ("scores", "score"), ("lengths", "length"), ("ages", "age"), ("weights", "weight")),
    *(("values", "value"), ("levels", "level"), ("delays", "delay"), ("costs", "cost"), ("speeds", "speed")),
)
WORDS = (
    *(("names", "name"), ("words", "word"), ("cities", "city"), ("labels", "label"), ("colours", "colour")),
    *(("titles", "title"), ("keys", "key"), ("tags", "tag")),
)
SAMPLES = (
    *("amber", "birch", "cobalt", "delta", "ember", "fig", "gold", "hazel", "iris", "jade", "kelp", "lilac", "maple"),
    *("north", "oak", "plum", "quartz", "reed", "slate", "teal", "umber", "vine", "wheat", "yarrow", "zinc", "ash"),
)
CLASSES = (
    *(("Tank", "level", "fill", "drain"), ("Purse", "coins", "earn", "spend"), ("Shelf", "books", "add", "lend")),
    *(
        ("Battery", "charge", "load", "use"),
        ("Basket", "eggs", "collect", "sell"),
        ("Queue", "people", "join", "leave"),
    ),
    *(("Garage", "cars", "park", "release"), ("Pantry", "jars", "store", "open"), ("Counter", "number", "up", "down")),
)
STYLES = ("", "", "", "Add a docstring.", "Show an example.")
FUNCTION_STYLES = (*STYLES, "Use type hints.", "One line is enough.")
OPENINGS = ("", "", "Here it is:\n", "Sure:\n", "This does it:\n", "Like this:\n")
REMARKS = ("", "", "", "  # start empty", "  # one at a time", "  # so far", "  # nothing yet", "  # in order")


@dataclass(frozen=True)
class Kind:
    """A loop over a list, as templates.

    {x} is one of {xs}; {which} count, by {test}; {item} is made of it, {by} is its {key}, {acc} what is kept.
    """

    task: str  # "a function that ..."
    names: tuple[str, ...]
    start: str  # before the loop; empty: nothing
    body: str
    result: str
    short: str  # the same as one expression; empty: there is none
    told: str  # what becomes of an x that counts
    returns: str  # the type
    kept: tuple[str, ...] = ()  # names for {acc}


KINDS = (
    Kind(
        task="adds up the {xs}{which}",
        names=("add_{xs}", "sum_{xs}", "total_{xs}"),
        start="{acc} = 0",
        body="{acc} += {x}",
        result="{acc}",
        short="sum({x} for {x} in {xs} if {test})",
        told="adds it to {acc}",
        returns="int",
        kept=("total", "result", "amount"),
    ),
    Kind(
        task="counts the {xs}{which}",
        names=("count_{xs}", "num_{xs}"),
        start="{acc} = 0",
        body="{acc} += 1",
        result="{acc}",
        short="len([{x} for {x} in {xs} if {test}])",
        told="adds 1 to {acc}",
        returns="int",
        kept=("count", "found", "hits"),
    ),
    Kind(
        task="takes the {xs}{which} and returns them {made}",
        names=("map_{xs}", "new_{xs}", "change_{xs}"),
        start="{acc} = []",
        body="{acc}.append({item})",
        result="{acc}",
        short="[{item} for {x} in {xs} if {test}]",
        told="appends {item} to {acc}",
        returns="list[{type}]",
        kept=("result", "changed", "output"),
    ),
    Kind(
        task="keeps only the {xs}{which}",
        names=("keep_{xs}", "filter_{xs}", "select_{xs}"),
        start="{acc} = []",
        body="{acc}.append({x})",
        result="{acc}",
        short="[{x} for {x} in {xs} if {test}]",
        told="appends it to {acc}",
        returns="list[{type}]",
        kept=("kept", "result", "chosen"),
    ),
    Kind(
        task="returns the first of the {xs}{which}, or None",
        names=("first_{x}", "find_{x}"),
        start="",
        body="return {x}",
        result="None",
        short="next(({x} for {x} in {xs} if {test}), None)",
        told="returns it at once",
        returns="{type} | None",
    ),
    Kind(
        task="tells whether there are {xs}{which}",
        names=("has_{xs}", "any_{xs}"),
        start="",
        body="return True",
        result="False",
        short="any({test} for {x} in {xs})",
        told="returns True at once",
        returns="bool",
    ),
    Kind(
        task="groups the {xs}{which} by {key}",
        names=("group_{xs}", "{x}_groups"),
        start="{acc} = {{}}",
        body="{acc}.setdefault({by}, []).append({x})",
        result="{acc}",
        short="",
        told="appends it to the group of its {key}",
        returns="dict",
        kept=("groups", "result", "found"),
    ),
)
NUMERIC = {
    "tests": (
        *(("above {n}", "{x} > {n}"), ("below {n}", "{x} < {n}"), ("of at least {n}", "{x} >= {n}")),
        *(("divisible by {k}", "{x} % {k} == 0"), ("that are odd", "{x} % 2 == 1"), ("up to {n}", "{x} <= {n}")),
        ("from {n} to {m}", "{n} <= {x} <= {m}"),
    ),
    "changes": (
        *(("times {k}", "{x} * {k}"), ("plus {k}", "{x} + {k}"), ("minus {k}", "{x} - {k}"), ("squared", "{x} ** 2")),
    ),
    "keys": (("last digit", "{x} % 10"), ("tens", "{x} // 10")),
}
VERBAL = {
    "tests": (
        *(("that start with {c}", '{x}.startswith("{c}")'), ("that end in {c}", '{x}.endswith("{c}")')),
        *(("with the letter {c}", '"{c}" in {x}'), ("longer than {k} letters", "len({x}) > {k}")),
        ("of {k} letters", "len({x}) == {k}"),
    ),
    "changes": (
        *(("in capitals", "{x}.upper()"), ("backwards", "{x}[::-1]"), ("cut to {k} letters", "{x}[:{k}]")),
        ("said twice", "{x} * 2"),
    ),
    "keys": (("length", "len({x})"), ("first letter", "{x}[0]")),
}
