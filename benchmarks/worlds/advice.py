"""Generate advice dialogues (domain chat) of one to four turns from topics, tones and sentence skeletons."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from .advice_words import CLOSINGS, EFFORTS, LINKS, SOFTENERS, TONES, TOPICS, WHEN, Topic
from .wording import as_messages, capital

FORMATS = ("", "", "", "Please give me a list.", "Keep it brief.", "Explain why.", "What should I avoid?")


class Adviser:
    """One dialogue in the making: draws phrases of its topic without repeating them until a bank is empty."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.topic: Topic = TOPICS[rng.choice(sorted(TOPICS))]
        self.tone = TONES[rng.choice(sorted(TONES))]
        self.unused: dict[str, list[str]] = {}
        self.last_action = ""

    def pick(self, options: Sequence[str]) -> str:
        return self.rng.choice(options)

    def draw(self, bank: str) -> str:
        """The next phrase of a bank of the topic, such as `actions`, in an order of this dialogue's own."""
        left = self.unused.setdefault(bank, [])
        if not left:
            left.extend(self.rng.sample(getattr(self.topic, bank), len(getattr(self.topic, bank))))
        phrase = left.pop()
        if bank == "actions":
            self.last_action = phrase
        return phrase

    def opening_question(self) -> tuple[str, str]:
        """The first user turn, and the format that it asks for (empty: any)."""
        goal, worry, wish = self.draw("goals"), self.draw("worries"), self.pick(FORMATS)
        question = self.pick(
            (
                f"How can I {goal} when {worry}?",
                f"I want to {goal}, but {worry}. What would you do?",
                f"{capital(worry)}. Is there a way to {goal}?",
                f"Do you have advice for someone who wants to {goal}? {capital(worry)}.",
            )
        )
        return f"{question} {wish}".strip(), wish

    def first_answer(self, wish: str) -> str:
        body = {
            "Please give me a list.": self.bullets,
            "Keep it brief.": self.one_tip,
            "Explain why.": self.paragraph,
            "What should I avoid?": self.warnings,
        }.get(wish) or self.rng.choice((self.bullets, self.paragraph, self.numbered, self.two_phases))
        parts = [self.pick(self.tone)] if self.rng.random() < 0.75 else []
        parts.append(body())
        if self.rng.random() < 0.6:
            parts.append(self.pick(CLOSINGS) if self.rng.random() < 0.6 else self.question_back())
        separator = "\n" if "\n" in parts[-1] or any("\n" in part for part in parts) else " "
        return separator.join(parts)

    def follow_up(self) -> tuple[str, str]:
        """A later user turn about something that was just said, and the answer to it."""
        action, tool, worry = self.last_action or self.draw("actions"), self.draw("tools"), self.draw("worries")
        kind = self.rng.randrange(5)
        if kind == 0:
            return f"Why should I {action}?", self.explanation(action)
        if kind == 1:
            return f"Would {tool} help?", self.tool_verdict(tool)
        if kind == 2:
            return f"I tried to {action}, but {worry}.", self.consolation(worry)
        if kind == 3:
            return self.pick(("How long until I notice anything?", "When will it get easier?")), self.timeline()
        return self.pick(("What is the most common mistake?", "What goes wrong most often?")), self.warnings()

    def tip(self) -> str:
        """One sentence of advice, in one of several skeletons."""
        action, benefit = self.draw("actions"), self.draw("benefits")
        link = self.pick(LINKS)
        return self.pick(
            (
                f"{capital(action)}, {link} {benefit}.",
                f"{self.pick(SOFTENERS)} {action} {self.pick(WHEN)}; it {benefit}.",
                f"{capital(self.pick(WHEN))}, {action}. It {self.pick(EFFORTS)}, but it {benefit}.",
                f"Take {self.draw('tools')} and {action}, {link} {benefit}.",
                f"I would {action} {self.pick(WHEN)}.",
            )
        )

    def one_tip(self) -> str:
        return f"{capital(self.draw('actions'))} {self.pick(WHEN)}, and avoid {self.draw('traps')}."

    def paragraph(self) -> str:
        tips = [self.tip() for _ in range(self.rng.randint(2, 4))]
        if self.rng.random() < 0.5:
            tips.insert(self.rng.randint(1, len(tips)), f"The usual trap is {self.draw('traps')}.")
        return " ".join(tips)

    def bullets(self) -> str:
        lines = []
        for _ in range(self.rng.randint(3, 4)):
            lines.append(f"- {capital(self.draw('actions'))}.")
            if self.rng.random() < 0.35:
                lines.append(f"  * It {self.draw('benefits')}.")
            if self.rng.random() < 0.25:
                lines.append(f"  * Use {self.draw('tools')} for it.")
        return "\n".join(lines)

    def numbered(self) -> str:
        return "\n".join(f"{i}. {self.tip()}" for i in range(1, self.rng.randint(3, 4) + 1))

    def two_phases(self) -> str:
        first, second = self.rng.sample(WHEN, 2)
        return (
            f"{capital(first)}:\n- {capital(self.draw('actions'))}.\n- {capital(self.draw('actions'))}.\n"
            f"{capital(second)}:\n- {capital(self.draw('actions'))}, {self.pick(LINKS)} {self.draw('benefits')}."
        )

    def warnings(self) -> str:
        first, second = self.draw("traps"), self.draw("traps")
        return self.pick(
            (
                f"Avoid {first}. {capital(second)} is nearly as bad. Instead, {self.draw('actions')}.",
                f"The usual trap is {first}, and after that {second}. {self.tip()}",
                f"- {capital(first)}\n- {capital(second)}\nA better habit: {self.draw('actions')}.",
            )
        )

    def question_back(self) -> str:
        return self.pick(
            (
                f"Do you own {self.draw('tools')}?",
                f"Is it mainly that {_mirrored(self.draw('worries'))}?",
                "Which of these fits your day?",
                "How much time do you have each week?",
            )
        )

    def explanation(self, action: str) -> str:
        return (
            f"{self.pick(('Because it', 'Mainly since it', 'In short, it'))} {self.draw('benefits')}. "
            f"When you {action}, it {self.pick(EFFORTS)}, yet it {self.draw('benefits')}. {self.pick(CLOSINGS)}"
        )

    def tool_verdict(self, tool: str) -> str:
        verdict = self.pick(("Yes,", "It can,", "A little,", "Only if you use it daily:", "Not by itself:"))
        return f"{verdict} {tool} {self.pick(EFFORTS)} and {self.draw('benefits')}. {self.tip()}"

    def consolation(self, worry: str) -> str:
        return f"{self.pick(self.tone)} When {_mirrored(worry)}, {self.draw('actions')} instead. {self.tip()}"

    def timeline(self) -> str:
        span = self.pick(("Two weeks", "About a month", "Ten days", "A whole season", "Three or four tries"))
        return f"{span}, as a rule. {self.tip()} {self.pick(CLOSINGS)}"


def generate_dialogue(rng: Random) -> list[dict[str, str]]:
    """Chat messages of one to four turns, user first, drawn from `rng` alone."""
    adviser = Adviser(rng)
    question, wish = adviser.opening_question()
    turns = [(question, adviser.first_answer(wish))]
    turns += [adviser.follow_up() for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    return as_messages(turns)


def _mirrored(clause: str) -> str:
    """The user's words about themselves, said back to them."""
    words = {"I": "you", "me": "you", "my": "your", "myself": "yourself", "am": "are", "was": "were"}
    return " ".join(words.get(word, word) for word in clause.split(" "))
