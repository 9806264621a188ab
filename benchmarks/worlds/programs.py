"""Generate requests for small Python programs (domain code): loops over lists, counting loops and little classes.

Every program runs, and a comment beside a call says what it prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, TypeVar

from .wording import as_messages, capital

Item = TypeVar("Item")

# --- what the programs are combined from: subjects, kinds of loops; tests, changes and keys of an item

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


# --- programs and conversations


@dataclass(frozen=True)
class Program:
    """What a conversation is about, in any of its versions."""

    name: str
    task: str
    parameter: str  # of a function; empty: it is a class, whose lines are complete
    types: tuple[str, str]  # of the parameter and of what comes back
    lines: tuple[str, ...]  # below the head
    short: str  # the body as one expression; empty: there is none
    story: str  # how it works
    calls: tuple[str, ...]  # statements with {name}; the last one is an expression
    has_docstring: bool = False
    has_hints: bool = False
    is_short: bool = False

    def code(self) -> str:
        """The text of the program."""
        docstring = (f'    """{capital(self.task)}."""',) if self.has_docstring else ()
        if not self.parameter:
            return "\n".join((f"class {self.name}:", *docstring, *self.lines))
        taken, returned = self.types
        head = f"{self.parameter}: {taken}) -> {returned}:" if self.has_hints else f"{self.parameter}):"
        body = (f"    return {self.short}",) if self.is_short else self.lines
        return "\n".join((f"def {self.name}({head}", *docstring, *body))

    def example(self) -> str:
        """Lines that use the program; the last one says what it prints, which is found by running it."""
        *statements, expression = (call.format(name=self.name) for call in self.calls)
        space: dict[str, Any] = {}
        exec("\n".join((self.code(), *statements)), space)
        return "\n".join((*statements, f"print({expression})  # {eval(expression, space)}"))


class Programmer:
    """One conversation in the making."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        make = self.pick((self.list_loop, self.list_loop, self.list_loop, self.counting_loop, self.small_class))
        self.program = make()

    def pick(self, options: Sequence[Item]) -> Item:
        return self.rng.choice(options)

    def list_loop(self) -> Program:
        """A function of a list of numbers or words."""
        is_verbal = self.rng.random() < 0.45
        kind = self.pick(KINDS[1:] if is_verbal else KINDS)  # words are not added up
        bank, (xs, x) = (VERBAL, self.pick(WORDS)) if is_verbal else (NUMERIC, self.pick(NUMBERS))
        words = {"xs": xs, "x": x, "type": "str" if is_verbal else "int", **self.small_values(is_verbal)}
        for names, options in ((("which", "test"), "tests"), (("made", "item"), "changes"), (("key", "by"), "keys")):
            words |= {name: text.format(**words) for name, text in zip(names, self.pick(bank[options]), strict=True)}
        words |= {"which": f" {words['which']}", "acc": self.pick(kind.kept or ("",))}
        return Program(
            name=self.pick(kind.names).format(**words),
            task=kind.task.format(**words),
            parameter=xs,
            types=(f"list[{words['type']}]", kind.returns.format(**words)),
            lines=tuple(self.loop(kind, words)),
            short=kind.short.format(**words),
            story=f"It looks at each {x} in turn. If {words['test']}, it {kind.told.format(**words)}. "
            f"At the end it returns {kind.result.format(**words)}.",
            calls=(f"{{name}}([{self.samples(is_verbal)}])",),
        )

    def loop(self, kind: Kind, words: dict[str, str]) -> Iterator[str]:
        """The body of a function of a list, in one of two ways to leave out what does not count."""
        if kind.start:
            yield f"    {kind.start.format(**words)}{self.pick(REMARKS)}"
        yield "    for {x} in {xs}:".format(**words)
        if self.rng.random() < 0.7:
            yield "        if {test}:".format(**words)
            yield f"            {kind.body.format(**words)}"
        else:
            yield "        if not {test}:".format(**words)
            yield "            continue"
            yield f"        {kind.body.format(**words)}"
        yield f"    return {kind.result.format(**words)}"

    def small_values(self, is_verbal: bool) -> dict[str, str]:
        """Numbers n < m, a small one k, and a letter c, for the tests and changes."""
        n, k = self.rng.randint(2, 60), self.rng.randint(2, 6 if is_verbal else 9)
        return {"n": str(n), "m": str(n + self.rng.randint(3, 30)), "k": str(k), "c": self.pick("abdeghilmnorstuw")}

    def samples(self, is_verbal: bool) -> str:
        """The items of a list of three to five."""
        count = self.rng.randint(3, 5)
        if is_verbal:
            return ", ".join(f'"{word}"' for word in self.rng.sample(SAMPLES, count))
        return ", ".join(str(self.rng.randint(1, 80)) for _ in range(count))

    def counting_loop(self) -> Program:
        """A function of a number that counts the rounds of a loop."""
        limit, amount = self.rng.randint(2, 90), self.rng.randint(2, 9)
        counter = self.pick(("steps", "rounds", "turns"))
        verb, change, test, until = self.pick(
            (
                (f"divided by {amount}", f"n //= {amount}", f"n > {limit}", f"at most {limit}"),
                (f"reduced by {amount}", f"n -= {amount}", f"n > {limit}", f"at most {limit}"),
                (f"multiplied by {amount}", f"n *= {amount}", f"n < {limit * 10}", f"at least {limit * 10}"),
                (f"raised by {amount}", f"n += {amount}", f"n < {limit * 10}", f"at least {limit * 10}"),
            )
        )
        return Program(
            name=self.pick((f"count_{counter}", f"num_{counter}", f"{counter}_needed")),
            task=f"counts how often n is {verb} until it is {until}",
            parameter="n",
            types=("int", "int"),
            lines=(f"    {counter} = 0", f"    while {test}:", f"        {change}", f"        {counter} += 1")
            + (f"    return {counter}",),
            short="",
            story=f"As long as {test}, it runs {change} and adds 1 to {counter}. Then n is {until}.",
            calls=(f"{{name}}({self.rng.randint(1, 300)})",),
        )

    def small_class(self) -> Program:
        """A class with a number, and two methods that change it."""
        name, field, more, less = self.pick(CLASSES)
        first, cost = self.rng.randint(0, 30), self.pick(("amount", "n", "size"))
        taken = self.rng.randint(1, first + 9)
        lines = [f"    def __init__(self, {field}={first}):", f"        self.{field} = {field}", ""]
        lines += [f"    def {more}(self, {cost}):", f"        self.{field} += {cost}", ""]
        lines += [f"    def {less}(self, {cost}):"]
        guard, rule = self.pick(
            (
                ((), ""),
                (
                    (f"        if {cost} > self.{field}:", f'            raise ValueError("not enough {field}")'),
                    "checked",
                ),
                ((f"        {cost} = min({cost}, self.{field})",), "cut"),
            )
        )
        lines += [*guard, f"        self.{field} -= {cost}"]
        variable, told = (
            name.lower(),
            {"": "", "checked": ", with an error if it is too much", "cut": ", never below 0"},
        )
        return Program(
            name=name,
            task=f"has {field}, {first} at first, with {more} and {less}{told[rule]}",
            parameter="",
            types=("", ""),
            lines=tuple(lines),
            short="",
            story=f"It keeps {field} in self.{field}. {capital(more)} adds {cost} to it and {less} takes {cost} away"
            f"{told[rule]}.",
            calls=(f"{variable} = {{name}}()", f"{variable}.{more}({self.rng.randint(10, 40)})")
            + (f"{variable}.{less}({taken})", f"{variable}.{field}"),
        )

    # ---- turns

    def first_turn(self) -> tuple[str, str]:
        """The request, and the program with what was asked for beside it."""
        program, is_function = self.program, bool(self.program.parameter)
        style = self.pick(FUNCTION_STYLES if is_function else STYLES)
        thing = "function" if is_function else "class"
        request = self.pick(
            (
                f"Write a {thing} {program.name} that {program.task}.",
                f"I need a {thing} that {program.task}. Call it {program.name}.",
                f"In Python, how would you write a {thing} that {program.task}?",
                f"Please write {program.name}, a {thing} that {program.task}.",
                f"{capital(thing)} {program.name}: it {program.task}.",
            )
        )
        self.program = replace(
            program,
            has_docstring=style == "Add a docstring." or self.rng.random() < 0.4,
            has_hints=is_function and (style == "Use type hints." or self.rng.random() < 0.2),
            is_short=bool(program.short) and (style == "One line is enough." or self.rng.random() < 0.2),
        )
        answer = self.pick(OPENINGS) + self.program.code()
        if style == "Show an example." or self.rng.random() < 0.25:
            answer += f"\n\n{self.program.example()}"
        return f"{request} {style}".strip(), answer

    def follow_up(self) -> tuple[str, str]:
        """A later request about the same program."""
        turns = [self.explain, self.call, self.rename]
        if not self.program.has_docstring:
            turns.append(self.document)
        if self.program.short:
            turns.append(self.reshape)
        return self.pick(turns)()

    def explain(self) -> tuple[str, str]:
        question = self.pick(("How does it work?", "What does it do?", "Explain it to me."))
        return question, self.program.story

    def call(self) -> tuple[str, str]:
        question = self.pick(("Show me a call.", "How do I use it?", "What does it print, for example?"))
        return question, self.pick(("", "For example:\n", "Like this:\n")) + self.program.example()

    def rename(self) -> tuple[str, str]:
        first, second = self.pick(("run", "do", "my", "the", "new", "get")), self.pick(("task", "work", "job", "thing"))
        is_function = bool(self.program.parameter)
        new = f"{first}_{second}" if is_function else f"{capital(first)}{capital(second)}"
        self.program = replace(self.program, name=new)
        return self.pick((f"Rename it to {new}.", f"Can you call it {new}?")), self.program.code()

    def document(self) -> tuple[str, str]:
        self.program = replace(self.program, has_docstring=True)
        return self.pick(("Add a docstring.", "Please document it.")), self.program.code()

    def reshape(self) -> tuple[str, str]:
        self.program = replace(self.program, is_short=not self.program.is_short)
        question = "Make it shorter." if self.program.is_short else "Write it with a loop instead."
        return question, self.program.code()


def generate_program_talk(rng: Random) -> list[dict[str, str]]:
    """Chat messages of one to three turns, user first, drawn from `rng` alone."""
    programmer = Programmer(rng)
    turns = [programmer.first_turn()]
    turns += [programmer.follow_up() for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    return as_messages(turns)
