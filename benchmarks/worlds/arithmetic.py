"""Generate arithmetic word problems (domain math) with right worked solutions: an opening and up to three events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

Item = TypeVar("Item")

NAMES = (
    *("Ada", "Ben", "Carla", "Dmitri", "Elena", "Farid", "Grace", "Hugo", "Imani", "Jonas", "Keiko", "Liam", "Mina"),
    *("Noor", "Oscar", "Priya", "Quinn", "Rosa", "Sven", "Tara", "Umar", "Vera", "Wes", "Ximena", "Yusuf", "Zoe"),
)
GOODS = (
    *(("apples", "crates"), ("marbles", "jars"), ("stamps", "albums"), ("tiles", "stacks"), ("roses", "bunches")),
    *(("pencils", "boxes"), ("cookies", "trays"), ("buttons", "tins"), ("seeds", "packets"), ("bricks", "pallets")),
    *(("candles", "cartons"), ("shells", "buckets"), ("lemons", "baskets"), ("beads", "strings"), ("books", "shelves")),
    *(("chairs", "rows"), ("tickets", "rolls"), ("muffins", "racks"), ("screws", "drawers"), ("posters", "tubes")),
)
PLACES = ("a market", "the school fair", "a workshop", "the library", "a bakery", "the harbour", "a farm", "the club")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
REQUESTS = (
    "",
    "",
    "",
    "Show the steps.",
    "Number the steps.",
    "Keep it short.",
    "Explain each step.",
    "Check the result.",
)


@dataclass(frozen=True)
class Step:
    """One line of a solution: `left operator right = result`, what it stands for, and the words around it."""

    left: int
    operator: str
    right: int
    result: int
    reason: str
    label: str

    @property
    def equation(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.result}"


@dataclass(frozen=True)
class Problem:
    """A question, its worked solution as text and as steps, and the answer."""

    question: str
    solution: str
    steps: tuple[Step, ...]
    answer: int


@dataclass
class Story:
    """The problem while it is being told: the sentences so far and the number that they add up to."""

    rng: Random
    name: str
    things: str
    containers: str
    value: int = 0
    sentences: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    question: str = ""

    def pick(self, options: Sequence[Item]) -> Item:
        return self.rng.choice(options)

    def say(self, *forms: str) -> None:
        self.sentences.append(self.pick(forms))

    def work(
        self, operator: str, right: int, reasons: Sequence[str], labels: Sequence[str], left: int | None = None
    ) -> None:
        """Apply one operation to the running value (or to `left`) and remember it as a step."""
        left = self.value if left is None else left
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[operator]
        self.steps.append(Step(left, operator, right, result, self.pick(reasons), self.pick(labels)))
        self.value = result

    def ask(self, *forms: str) -> None:
        self.question = self.pick(forms)


def generate_problem(rng: Random) -> Problem:
    """A problem of one to four steps, drawn from `rng` alone."""
    things, containers = rng.choice(GOODS)
    story = Story(rng, rng.choice(NAMES), things, containers)
    rng.choice(OPENINGS)(story)
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3)) if story.steps else rng.choice((1, 2, 2, 3))):
        _choose_event(story)(story)
        if story.question:
            break
    if not story.question:
        story.ask(
            f"How many {story.things} are there now?",
            f"How many {story.things} does {story.name} have at the end?",
            f"What is the final number of {story.things}?",
        )
    request = rng.choice(REQUESTS)
    question = " ".join([*story.sentences, story.question, request]).strip()
    return Problem(question, _solution(story, request), tuple(story.steps), story.value)


def _choose_event(story: Story) -> Callable[[Story], None]:
    options = [event for event, lowest, highest in EVENTS if lowest <= story.value <= highest]
    return story.pick(options)


def _count(s: Story) -> None:
    s.value = s.rng.randint(24, 480)
    place = s.pick(PLACES)
    s.say(
        f"{s.name} has {s.value} {s.things}.",
        f"There are {s.value} {s.things} at {place}.",
        f"{s.name} brings {s.value} {s.things} to {place}.",
        f"At {place}, {s.name} counts {s.value} {s.things}.",
    )


def _packs(s: Story) -> None:
    packs, each = s.rng.randint(3, 29), s.rng.randint(3, 12)
    s.say(
        f"{s.name} buys {packs} {s.containers} with {each} {s.things} in each.",
        f"{packs} {s.containers} of {s.things} arrive at {s.pick(PLACES)}, and each holds {each} {s.things}.",
        f"{s.name} fills {packs} {s.containers}. Every one of the {s.containers} takes {each} {s.things}.",
    )
    reasons = (
        f"Each of the {packs} {s.containers} holds {each} {s.things}",
        f"There are {packs} equal groups of {each}",
    )
    s.work("*", each, reasons, (f"{s.things} in all {s.containers}", f"all {s.things}"), left=packs)


def _two_days(s: Story) -> None:
    first, second = s.rng.randint(18, 290), s.rng.randint(17, 190)
    start = s.rng.randrange(7)
    day, later = DAYS[start], DAYS[(start + s.rng.randint(1, 3)) % 7]
    s.say(
        f"{s.name} collects {first} {s.things} on {day} and {second} on {later}.",
        f"On {day} {s.name} makes {first} {s.things}. On {later} another {second} are made.",
        f"{s.name} sorts {first} {s.things} on {day}, then {second} more {s.things} on {later}.",
    )
    s.work(
        "+",
        second,
        (f"Put {day} and {later} together", "Both days count"),
        (f"both days of {s.things}", "total"),
        left=first,
    )


def _friend(s: Story) -> None:
    own, gap = s.rng.randint(35, 260), s.rng.randint(6, 34)
    friend = s.pick([name for name in NAMES if name != s.name])
    more = s.rng.random() < 0.5
    word, operator = ("more", "+") if more else ("fewer", "-")
    s.say(
        f"{s.name} has {own} {s.things}. {friend} has {gap} {word} than {s.name}.",
        f"{friend} owns {gap} {word} {s.things} than {s.name}, who owns {own}.",
    )
    s.work(
        operator,
        gap,
        (f"{friend} has {gap} {word} than {own}", f"First find the {s.things} of {friend}"),
        (friend,),
        left=own,
    )
    if s.rng.random() < 0.6:
        s.say(f"They put all their {s.things} together.", "The two share everything they have.")
        s.work("+", own, (f"Add the {s.things} of {s.name}", "Together they have both amounts"), ("together", "both"))
    else:
        s.say(f"Only the {s.things} of {friend} matter here.", f"{s.name} then leaves, and {friend} stays.")
        s.name = friend


def _daily(s: Story) -> None:
    rate, days = s.rng.randint(4, 38), s.rng.randint(3, 9)
    s.say(
        f"{s.name} makes {rate} {s.things} a day for {days} days.",
        f"For {days} days, {s.name} sells {rate} {s.things} every day.",
        f"A machine at {s.pick(PLACES)} finishes {rate} {s.things} each hour and runs for {days} hours.",
    )
    s.work(
        "*",
        days,
        (f"{rate} {s.things}, {days} times over", f"The same {rate} come again {days} times"),
        ("all of them",),
        left=rate,
    )


def _gain(s: Story) -> None:
    extra = s.rng.randint(8, 165)
    s.say(
        f"Then {s.name} finds {extra} more {s.things}.",
        f"A neighbour adds {extra} {s.things}.",
        f"Later {extra} {s.things} are delivered.",
        f"{s.name} gets another {extra} as a gift.",
    )
    s.work(
        "+",
        extra,
        (f"{extra} more come in", f"Add the {extra} new {s.things}"),
        ("after the gift", f"with the new {s.things}"),
    )


def _loss(s: Story) -> None:
    gone = s.rng.randint(5, max(6, min(160, s.value * 3 // 4)))
    s.say(
        f"{s.name} gives away {gone} of them.",
        f"Sadly {gone} {s.things} are broken.",
        f"{s.name} sells {gone} {s.things}.",
        f"After that, {gone} {s.things} get lost.",
    )
    s.work(
        "-", gone, (f"{gone} of them are gone", f"Take away {gone} {s.things}"), ("what is left", f"{s.things} left")
    )


def _times(s: Story) -> None:
    word, factor = s.pick((("doubles", 2), ("triples", 3), ("makes four times", 4)))
    s.say(
        f"By the next week the number of {s.things} is {factor} times as large.",
        f"A helper {word} the number of {s.things}." if factor < 4 else f"A helper {word} as many {s.things} of it.",
    )
    s.work(
        "*",
        factor,
        (f"The number grows {factor} times", f"Take it {factor} times"),
        ("after the growth", "the larger number"),
    )


def _half(s: Story) -> None:
    part = s.pick([n for n in (2, 3, 4, 5, 6) if s.value % n == 0] or [1])
    if part == 1:
        _gain(s)
        return
    name = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 6: "a sixth"}[part]
    s.say(f"Only {name} of the {s.things} can be used.", f"{s.name} keeps {name} of them and returns the rest.")
    s.work(
        "/",
        part,
        (f"To find {name}, divide by {part}", f"{name.capitalize()} means one part of {part}"),
        ("the part kept",),
    )


def _share(s: Story) -> None:
    group = s.pick([n for n in range(3, 13) if s.value % n == 0] or [1])
    if group == 1:
        _loss(s)
        return
    who = s.pick(("friends", "teams", "families", "classes", "visitors"))
    s.say(f"The {s.things} are shared equally among {group} {who}.", f"{group} {who} split all the {s.things} evenly.")
    s.work(
        "/",
        group,
        (f"Each of the {group} {who} gets the same", f"Share the {s.things} in {group} equal parts"),
        ("each share",),
    )
    s.ask(f"How many {s.things} does each of the {who} get?", "How large is one share?")


def _sell(s: Story) -> None:
    price = s.rng.randint(2, 9)
    s.say(f"Each one is sold for {price} dollars.", f"{s.name} sells all the {s.things} at {price} dollars each.")
    s.work(
        "*",
        price,
        (f"Every one brings {price} dollars", f"Multiply the {s.things} by the price of {price} dollars"),
        ("money",),
    )
    s.things = "dollars"
    if s.rng.random() < 0.5:
        cost = s.rng.randint(7, max(8, min(95, s.value // 2)))
        s.say(f"The stand costs {cost} dollars.", f"{s.name} pays {cost} dollars for the trip.")
        s.work("-", cost, (f"Pay the {cost} dollars", "The cost comes off"), ("money kept", "money left"))
        s.ask("How much money is left?", f"How many dollars does {s.name} keep?")
    else:
        s.ask("How much money is that?", f"How many dollars does {s.name} earn?")


def _goal(s: Story) -> None:
    goal = s.value + s.rng.randint(12, 210)
    s.say(f"The goal is {goal} {s.things}.", f"{s.name} needs {goal} {s.things} in total.")
    s.work(
        "-",
        s.value,
        (f"The goal is {goal}, so look at the gap", "Subtract what is already there"),
        ("still missing",),
        left=goal,
    )
    s.ask(f"How many {s.things} are still missing?", f"How many more {s.things} does {s.name} need?")


OPENINGS: tuple[Callable[[Story], None], ...] = (_count, _packs, _packs, _two_days, _friend, _daily)
EVENTS: tuple[tuple[Callable[[Story], None], int, int], ...] = (
    *((_gain, 1, 2000), (_gain, 1, 2000), (_loss, 12, 9999), (_loss, 12, 9999)),
    *((_times, 2, 300), (_half, 12, 9999), (_share, 12, 9999), (_sell, 4, 400), (_goal, 10, 9999)),
)


def _solution(story: Story, request: str) -> str:
    style = {"Number the steps.": _numbered, "Keep it short.": _brief, "Explain each step.": _prose}.get(request)
    lines = (style or story.pick((_numbered, _brief, _prose, _prose, _aligned)))(story)
    last = story.steps[-1]
    if request == "Check the result.":
        lines += "\n" + _check(last)
    unit = story.things
    ending = story.pick(
        (f"The answer is {story.value}.", f"Answer: {story.value} {unit}", f"So the answer is {story.value} {unit}.")
    )
    return f"{lines}\n{ending}"


def _numbered(story: Story) -> str:
    return "\n".join(f"Step {i}: {s.reason}. {_shown(story, s)}" for i, s in enumerate(story.steps, 1))


def _brief(story: Story) -> str:
    return "\n".join(step.equation for step in story.steps)


def _prose(story: Story) -> str:
    parts = []
    for index, step in enumerate(story.steps):
        lead = story.pick(("First", "To begin") if index == 0 else ("Then", "Next", "After that"))
        tail = story.pick(("", f" That is {step.label}.", f" This gives {step.result}."))
        parts.append(f"{lead}: {step.reason}. {_shown(story, step)}.{tail}")
    return " ".join(parts)


def _aligned(story: Story) -> str:
    return "\n".join(f"{step.label}: {_shown(story, step)}" for step in story.steps)


def _shown(story: Story, step: Step) -> str:
    """The equation, at times with the tens and ones worked out between its two sides."""
    tens = step.left - step.left % 10
    if step.operator != "*" or step.left <= 12 or step.left % 10 == 0 or story.rng.random() < 0.4:
        return step.equation
    ones = step.left - tens
    return f"{step.left} * {step.right} = {tens * step.right} + {ones * step.right} = {step.result}"


def _check(step: Step) -> str:
    inverse = {"+": "-", "-": "+", "*": "/", "/": "*"}[step.operator]
    return f"Check: {step.result} {inverse} {step.right} = {step.left}."
