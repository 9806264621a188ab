"""Generate requests about small tables (domain tables): written in several forms, sorted, summed, changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from .wording import as_messages

Item = TypeVar("Item")
Row = tuple[str, tuple[int, ...]]  # a name, and a number a column


@dataclass(frozen=True)
class Subject:
    """What tables can be about. All words fit any sentence of their kind."""

    plural: str
    singular: str
    names: tuple[str, ...]
    columns: tuple[tuple[str, int], ...]  # what is counted, and the largest number


SUBJECTS = (
    Subject(
        *("fruits", "fruit"),
        (
            "apple",
            "banana",
            "cherry",
            "date",
            "fig",
            "grape",
            "kiwi",
            "lemon",
            "mango",
            "orange",
            "peach",
            "pear",
            "quince",
        ),
        (("price", 9), ("boxes", 40), ("weight", 90)),
    ),
    Subject(
        *("cities", "city"),
        ("Arden", "Belmor", "Corvale", "Dunholm", "Estray", "Fenwick", "Galdor", "Harrow", "Inver", "Jorvik", "Kelso"),
        (("rain", 99), ("sun", 60), ("bridges", 30)),
    ),
    Subject(
        *("tools", "tool"),
        (
            "axe",
            "brush",
            "chisel",
            "drill",
            "file",
            "hammer",
            "ladder",
            "mallet",
            "nail",
            "plane",
            "rake",
            "saw",
            "wrench",
        ),
        (("stock", 80), ("price", 50), ("orders", 20)),
    ),
    Subject(
        *("teams", "team"),
        ("Badgers", "Comets", "Eagles", "Foxes", "Herons", "Kites", "Lynxes", "Moths", "Otters", "Ravens", "Stoats"),
        (("won", 20), ("lost", 20), ("goals", 70)),
    ),
    Subject(
        *("books", "book"),
        ("Ashes", "Bread", "Clouds", "Dust", "Echo", "Frost", "Glass", "Ivory", "Lanterns", "Mirrors", "Rust", "Tides"),
        (("pages", 600), ("copies", 50), ("chapters", 40)),
    ),
    Subject(
        *("rooms", "room"),
        (
            "attic",
            "bath",
            "cellar",
            "den",
            "foyer",
            "gallery",
            "hall",
            "kitchen",
            "lounge",
            "nursery",
            "office",
            "porch",
        ),
        (("chairs", 30), ("windows", 9), ("lamps", 12)),
    ),
    Subject(
        *("courses", "course"),
        ("art", "biology", "civics", "drama", "ethics", "French", "geology", "history", "logic", "music", "physics"),
        (("hours", 60), ("students", 90), ("tests", 8)),
    ),
    Subject(
        *("trains", "train"),
        ("Amber", "Breeze", "Cobalt", "Dawn", "Falcon", "Gale", "Harbour", "Meadow", "Orion", "Pilot", "Summit"),
        (("stops", 25), ("seats", 400), ("minutes", 180)),
    ),
)
FORMS = ("markdown", "commas", "bullets", "numbers")
ASKED = {
    "markdown": ("as a Markdown table", "as a table", "in a Markdown table"),
    "commas": ("as comma-separated rows", "as CSV", "with commas"),
    "bullets": ("as a bullet list", "with a dash for each", "as a list"),
    "numbers": ("as a numbered list", "numbered from 1", "with numbers"),
}
SUM = "sum"  # the name of the column of sums
GREETINGS = ("", "", "", "Here it is:\n", "Sure:\n", "Of course.\n", "Done:\n", "Here you are:\n")


@dataclass(frozen=True)
class Table:
    """Rows of a name and numbers."""

    subject: Subject
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def written(self, form: str) -> str:
        """The table in one of `FORMS`."""
        head = (self.subject.singular, *self.columns)
        cells = [(name, *map(str, numbers)) for name, numbers in self.rows]
        if form == "markdown":
            return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells))
        if form == "commas":
            return "\n".join(",".join(line) for line in (head, *cells))
        lines = [f"{name}: {self.counted(numbers)}" for name, numbers in self.rows]
        return "\n".join(f"- {line}" if form == "bullets" else f"{i}. {line}" for i, line in enumerate(lines, 1))

    def counted(self, numbers: Sequence[int]) -> str:
        """A row's numbers with what they count; where the last, the sum, is not given, without it."""
        return ", ".join(f"{column} {number}" for column, number in zip(self.columns, numbers, strict=False))

    def column(self, name: str) -> list[int]:
        """The numbers of one column."""
        index = self.columns.index(name)
        return [numbers[index] for _, numbers in self.rows]


class Clerk:
    """One conversation in the making. What changes the table gives the clause and the sentence that ask for it."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        subject = self.pick(SUBJECTS)
        columns = rng.sample(subject.columns, self.pick((1, 1, 2, 2, 3)))
        names = rng.sample(subject.names, self.pick((3, 3, 4, 4, 5)))
        rows = tuple((name, tuple(rng.randint(1, most) for _, most in columns)) for name in names)
        self.table = Table(subject, tuple(name for name, _ in columns), rows)
        self.form = self.pick(FORMS)

    def pick(self, options: Sequence[Item]) -> Item:
        return self.rng.choice(options)

    # ---- turns

    def first_turn(self) -> tuple[str, str]:
        """The data, or what to make up, and the first thing that is asked of them."""
        subject, form = self.table.subject, self.pick(ASKED[self.form])
        if self.rng.random() < 0.15:
            columns = " and ".join(self.table.columns)
            return f"Make up {len(self.table.rows)} {subject.plural} with {columns}, {form}.", self.answer()
        data, change = self.data(), ""
        if self.rng.random() < 0.6:
            change = ", " + self.pick(self.changes())()[0]
        request = self.pick(
            (
                f"Write these {subject.plural} {form}{change}:{data}",
                f"{data}\nPlease give me this {form}{change}.",
                f"I have some {subject.plural}:{data}\nCan you write them {form}{change}?",
                f"These are my {subject.plural}:{data}\nI need them {form}{change}.",
            )
        )
        return request.strip(), self.answer()

    def follow_up(self) -> tuple[str, str]:
        """A later turn: another change or form, or a question about what the table says."""
        kind = self.rng.random()
        if kind < 0.45:
            return self.pick((*self.changes(), self.add_row, self.drop_row, self.correct))()[1], self.answer()
        if kind < 0.65:
            self.form = self.pick([form for form in FORMS if form != self.form])
            form = self.pick(ASKED[self.form])
            return self.pick((f"Now {form}, please.", f"Can I have it {form}?")), self.answer()
        return self.pick((self.extreme, self.extreme, self.total, self.lookup, self.count))()

    def answer(self) -> str:
        return self.pick(GREETINGS) + self.table.written(self.form)

    def data(self) -> str:
        """The table as a user writes it, after a colon."""
        if self.rng.random() < 0.35:
            return "\n" + self.table.written(self.pick(("commas", "commas", "bullets", "markdown")))
        separator = self.pick((", ", "; ", " and "))
        return " " + separator.join(f"{name} ({self.table.counted(numbers)})" for name, numbers in self.table.rows)

    # ---- changes

    def changes(self) -> list[Callable[[], tuple[str, str]]]:
        """Those that may come with the first request."""
        can_sum = len(self.table.columns) > 1 and SUM not in self.table.columns
        return [self.sort, self.sort, self.order, self.keep, *([self.add_sums] * 2 if can_sum else ())]

    def sort(self) -> tuple[str, str]:
        """By a column; rows that are equal there stay in their order."""
        column, is_downwards = self.pick(self.table.columns), self.rng.random() < 0.5
        pairs = zip(self.table.column(column), self.table.rows, strict=True)
        self.change(row for _, row in sorted(pairs, key=lambda pair: pair[0], reverse=is_downwards))
        clause = f"sorted by {column}, {'highest' if is_downwards else 'lowest'} first"
        return clause, f"I want it {clause}."

    def order(self) -> tuple[str, str]:
        self.change(sorted(self.table.rows, key=lambda row: row[0].lower()))
        return "in alphabetical order", self.pick(("Put it in alphabetical order.", "Order it by name."))

    def keep(self) -> tuple[str, str]:
        """At least one row."""
        column = self.pick(self.table.columns)
        numbers = self.table.column(column)
        least = self.pick(numbers)
        self.change(row for row, number in zip(self.table.rows, numbers, strict=True) if number >= least)
        clause = f"only those with {column} of at least {least}"
        return clause, f"Keep {clause}."

    def add_sums(self) -> tuple[str, str]:
        rows = tuple((name, (*numbers, sum(numbers))) for name, numbers in self.table.rows)
        self.table = replace(self.table, columns=(*self.table.columns, SUM), rows=rows)
        return "with the sum of each row", self.pick(("Add the sum of each row.", "What are the sums of the rows?"))

    def add_row(self) -> tuple[str, str]:
        """With a name that is not there; its sum too, where there are sums."""
        most = dict(self.table.subject.columns)
        numbers = tuple(self.rng.randint(1, most[column]) for column in self.table.columns if column != SUM)
        name = self.pick(sorted({*self.table.subject.names} - {name for name, _ in self.table.rows}))
        request = f"Add {name} with {self.table.counted(numbers)}."
        self.change((*self.table.rows, (name, (*numbers, sum(numbers)) if SUM in self.table.columns else numbers)))
        return "", request

    def drop_row(self) -> tuple[str, str]:
        gone = self.pick(self.table.rows)
        if len(self.table.rows) > 1:
            self.change(row for row in self.table.rows if row != gone)
            return "", self.pick((f"Remove {gone[0]}.", f"Leave out {gone[0]}."))
        return self.add_row()

    def correct(self) -> tuple[str, str]:
        """One number becomes another; not where there are sums."""
        if SUM in self.table.columns:
            return self.order()
        (name, numbers), index = self.pick(self.table.rows), self.rng.randrange(len(self.table.columns))
        new = self.rng.randint(1, dict(self.table.subject.columns)[self.table.columns[index]])
        changed = (*numbers[:index], new, *numbers[index + 1 :])
        self.change((row[0], changed) if row[0] == name else row for row in self.table.rows)
        return "", f"The {self.table.columns[index]} of {name} should be {new}."

    def change(self, rows: Iterable[Row]) -> None:
        self.table = replace(self.table, rows=tuple(rows))

    # ---- questions

    def extreme(self) -> tuple[str, str]:
        """The first row with the largest or the smallest number of a column."""
        column, (word, choose) = self.pick(self.table.columns), self.pick((("highest", max), ("lowest", min)))
        numbers = self.table.column(column)
        number = choose(numbers)
        name = self.table.rows[numbers.index(number)][0]
        answer = self.pick((f"{name}, with {number}.", f"{name} has the {word} {column}: {number}."))
        return f"Which {self.table.subject.singular} has the {word} {column}?", answer

    def total(self) -> tuple[str, str]:
        column = self.pick(self.table.columns)
        numbers = self.table.column(column)
        return f"What is the sum of {column}?", f"{' + '.join(map(str, numbers))} = {sum(numbers)}"

    def lookup(self) -> tuple[str, str]:
        (name, numbers), index = self.pick(self.table.rows), self.rng.randrange(len(self.table.columns))
        column = self.table.columns[index]
        answer = self.pick((f"{numbers[index]}.", f"The {column} of {name} is {numbers[index]}."))
        return f"What is the {column} of {name}?", answer

    def count(self) -> tuple[str, str]:
        names = [name for name, _ in self.table.rows]
        subject = self.table.subject
        counted = f"{len(names)} {subject.singular if len(names) == 1 else subject.plural}"
        return (
            f"How many {subject.plural} are there?",
            f"There {'is' if len(names) == 1 else 'are'} {counted}: {', '.join(names)}.",
        )


def generate_table_talk(rng: Random) -> list[dict[str, str]]:
    """Chat messages of one to three turns, user first, drawn from `rng` alone."""
    clerk = Clerk(rng)
    turns = [clerk.first_turn()]
    turns += [clerk.follow_up() for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    return as_messages(turns)
