"""Draw one real decode step of the embedded models: `python docs/step_picture.py` writes docs/step.svg.

The step's tree is the union of what both drafters proposed; `proposers` says which of them put a node there, so that
each drafter's own tree can be read from it. Only the best nodes are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import taps_ext as taps
from taps_ext import tiny

OUTPUT = Path(__file__).parent / "step.svg"
PROMPT, STEP = 3, 8  # of the prompts of chat; of its events. Math and chat agree there at first, then they part
DRAWN = 6  # best nodes per drafter, besides those of the accepted path

WIDTH, COLUMN, ROW, HEIGHT, LEFT = 960, 158, 50, 38, 84
INK, PALE, EDGE, ACCEPTED = "#1f2328", "#6e7781", "#afb8c1", "#1a7f37"
FILLS = {"math": "#b6d4fe", "chat": "#ffd3a1"}
STROKES = {"math": "#2563c9", "chat": "#c2620a"}
SPELLED = {"\n": "\u21b5", "<|end|>": "end"}  # tokens that have no letters to show


@dataclass(frozen=True)
class Node:
    """A node of the union: its index is its place in a list, a parent comes before its children."""

    text: str
    parent: int
    depth: int
    score: float
    proposers: frozenset[str]
    is_accepted: bool


@dataclass(frozen=True)
class Step:
    """A decode step: the line of text before it, its tree, the target's bonus token, and all text that it gained."""

    before: str
    nodes: list[Node]
    bonus: str
    gained: str

    def drawn(self, drafter: str | None = None) -> list[int]:
        """Return the nodes to draw, of one drafter or of the union; a drawn node's parent is drawn too."""
        if drafter is None:
            return sorted({index for name in FILLS for index in self.drawn(name)})
        deepest = max(node.depth for node in self.nodes if node.is_accepted)
        own = [i for i, node in enumerate(self.nodes) if drafter in node.proposers and 1 <= node.depth <= deepest]
        best = sorted(own, key=lambda i: -self.nodes[i].score)[:DRAWN]
        return [0, *sorted({*best, *(i for i in own if self.nodes[i].is_accepted)})]

    @property
    def num_accepted(self) -> int:
        """Count the accepted nodes; the root is no draft."""
        return sum(node.is_accepted for node in self.nodes[1:])


def real_step() -> Step:
    """Decode a held-out prompt with the merged composition, greedily, and return one of its steps."""
    target: Any
    tokenizer: Any
    target, tokenizer = tiny.load_target()
    drafters = taps.load_drafters(tiny.drafter_paths(), target)
    decoder = taps.SpeculativeDecoder(target, drafters, "merged", shape=taps.TreeShape())
    chat = tiny.prompts("chat", PROMPT + 1)[PROMPT]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    *earlier, event = islice(decoder.stream(**inputs, max_new_tokens=96), STEP + 1)
    before = [token for one in earlier for token in one.new_tokens[0]]
    nodes = _nodes(event, list(drafters), tokenizer)
    new = event.new_tokens[0]
    return Step(
        tokenizer.decode(before).splitlines()[-1], nodes, _spell(tokenizer, new[-1]), tokenizer.decode(new).strip()
    )


def _nodes(event: Any, names: Sequence[str], tokenizer: Any) -> list[Node]:
    """Read the event's tree, root included."""
    tree, count = event.tree, int(event.tree.num_nodes[0])
    path, nodes = set(event.path[0].tolist()), list[Node]()
    columns = (values[0, :count].tolist() for values in (tree.tokens, tree.parents, tree.scores, tree.proposers))
    for index, (token, parent, score, bits) in enumerate(zip(*columns, strict=True)):
        proposers = frozenset(name for bit, name in enumerate(names) if bits >> bit & 1)
        depth = nodes[parent].depth + 1 if index else 0
        nodes.append(Node(_spell(tokenizer, token), parent, depth, score, proposers, index in path))
    return nodes


def _spell(tokenizer: Any, token: int) -> str:
    text: str = tokenizer.decode([token])
    return SPELLED.get(text, text.strip())


# --- where things stand ----------------------------------------------------------------------------------------------


def layout(nodes: Sequence[Node], drawn: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Return the centre of each drawn node: a column per depth, a row per leaf, the accepted path on top."""
    places: dict[int, tuple[float, float]] = {}
    leaves = 0

    def visit(index: int) -> None:
        nonlocal leaves
        children = [i for i in drawn if i and nodes[i].parent == index]
        row = leaves
        for child in sorted(children, key=lambda i: (not nodes[i].is_accepted, -nodes[i].score)):
            visit(child)
        leaves += not children
        places[index] = (LEFT + COLUMN * nodes[index].depth, ROW * row)

    visit(0)
    return places


def width_of(text: str) -> float:
    """Return the width of a node with this text."""
    return 28 + 13 * max(len(text), 2)


# --- the drawing -----------------------------------------------------------------------------------------------------


def picture(step: Step) -> str:
    """Return the step as SVG: each drafter's tree, then the union with the accepted path."""
    parts = [_text(28, 50, "One decode step: two drafters guess, the target checks", 28, weight="bold")]
    parts.append(_text(28, 90, f"Text so far: \u201c\u2026 {step.before}\u201d", 25))
    top = 142.0
    for title, drafters in (
        *((f"{name} drafter\u2019s tree", (name,)) for name in FILLS),
        ("their union, verified in one forward of the target", tuple(FILLS)),
    ):
        height, body = _panel(step, drafters, top + 42)
        parts += [_swatch(top, drafters), _text(64, top, title, 25, weight="bold"), *body]
        top += height + 66
    won = f"One forward, {step.num_accepted + 1} tokens: \u201c{step.gained}\u201d"
    parts += [_text(28, top, won, 28, ACCEPTED, "bold"), _text(28, top + 38, _caption(step), 21, PALE)]
    return _document(parts, top + 64)


def _caption(step: Step) -> str:
    sizes = [sum(name in node.proposers for node in step.nodes) for name in FILLS]
    each = f"{sizes[0]}" if len(set(sizes)) == 1 else " and ".join(map(str, sizes))
    return f"Only the best nodes are drawn. The drafters grew {each} nodes each; the union has {len(step.nodes)}."


def _document(parts: Sequence[str], height: float) -> str:
    """Wrap the parts in a white card, so that they can be read on any background."""
    gradient = (
        f'<linearGradient id="both"><stop offset="50%" stop-color="{FILLS["math"]}"/>'
        f'<stop offset="50%" stop-color="{FILLS["chat"]}"/></linearGradient>'
        f'<linearGradient id="border"><stop offset="50%" stop-color="{STROKES["math"]}"/>'
        f'<stop offset="50%" stop-color="{STROKES["chat"]}"/></linearGradient>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-family="sans-serif" role="img">'
    )
    title = "<title>A decode step: two draft trees, their union, and the path that the target accepts</title>"
    card = f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2:g}" rx="18" fill="#ffffff" stroke="#d0d7de"/>'
    return "\n".join([head, title, f"<defs>{gradient}</defs>", card, *parts, "</svg>"]) + "\n"


def _panel(step: Step, drafters: tuple[str, ...], top: float) -> tuple[float, list[str]]:
    """Return the height and the parts of a tree: of one drafter, or of the union, where what was rejected is pale."""
    is_union = len(drafters) > 1
    drawn = step.drawn(None if is_union else drafters[0])
    places = {index: (x, y + top) for index, (x, y) in layout(step.nodes, drawn).items()}
    edges = [_edge(step, places, index, is_union) for index in drawn[1:]]
    edges.sort(key=lambda part: ACCEPTED in part)  # thick lines over thin ones
    boxes = [_node(step.nodes[index], places[index], drafters) for index in drawn]
    height = ROW + max(y for _, y in places.values()) - top
    return height, [*edges, *boxes, *(_bonus(step, places) if is_union else ())]


def _edge(step: Step, places: dict[int, tuple[float, float]], index: int, is_union: bool) -> str:
    node = step.nodes[index]
    is_thick = is_union and node.is_accepted
    start = (places[node.parent][0] + width_of(step.nodes[node.parent].text) / 2, places[node.parent][1])
    end = (places[index][0] - width_of(node.text) / 2, places[index][1])
    return _curve(start, end, ACCEPTED if is_thick else EDGE, 7 if is_thick else 2.5)


def _curve(start: tuple[float, float], end: tuple[float, float], colour: str, width: float, dashes: str = "") -> str:
    (x, y), (u, v) = start, end
    middle = (x + u) / 2
    curve = f"M{x:g} {y:g}C{middle:g} {y:g} {middle:g} {v:g} {u:g} {v:g}"
    return f'<path d="{curve}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashes}/>'


def _node(node: Node, place: tuple[float, float], drafters: tuple[str, ...]) -> str:
    if node.depth == 0:
        return _box(node.text, place, "#57606a", "#57606a", "#ffffff")
    box = _box(node.text, place, *_colours([name for name in drafters if name in node.proposers]))
    if len(drafters) == 1:
        return box
    return box + _tick(place, node.text) if node.is_accepted else f'<g opacity="0.5">{box}</g>'


def _colours(names: Sequence[str]) -> tuple[str, str]:
    """Return fill and border: a drafter's, or half of each."""
    return ("url(#both)", "url(#border)") if len(names) > 1 else (FILLS[names[0]], STROKES[names[0]])


def _bonus(step: Step, places: dict[int, tuple[float, float]]) -> Iterator[str]:
    """Draw the bonus token behind the last accepted node."""
    last = max((index for index in places if step.nodes[index].is_accepted), key=lambda i: step.nodes[i].depth)
    (x, y), place = places[last], (places[last][0] + COLUMN, places[last][1])
    start, end = (x + width_of(step.nodes[last].text) / 2, y), (place[0] - width_of(step.bonus) / 2, y)
    yield _curve(start, end, ACCEPTED, 7, ' stroke-dasharray="9 6"')
    yield _box(step.bonus, place, "#ffffff", ACCEPTED)
    yield _text(place[0], y + 46, "bonus: the", 19, ACCEPTED, anchor="middle")
    yield _text(place[0], y + 68, "target\u2019s own", 19, ACCEPTED, anchor="middle")


def _tick(place: tuple[float, float], text: str) -> str:
    x, y = place[0] + width_of(text) / 2 - 4, place[1] - HEIGHT / 2 + 1
    mark = f"M{x - 6:g} {y:g}l4.5 5 8-9.5"
    return (
        f'<circle cx="{x:g}" cy="{y:g}" r="12" fill="{ACCEPTED}" stroke="#ffffff" stroke-width="2"/>'
        f'<path d="{mark}" fill="none" stroke="#ffffff" stroke-width="3"/>'
    )


def _swatch(top: float, names: Sequence[str]) -> str:
    return _rectangle((40, top - 9), 24, 22, *_colours(names))


def _box(text: str, place: tuple[float, float], fill: str, stroke: str, ink: str = INK) -> str:
    label = _text(place[0], place[1] + 8, text, 24, ink, anchor="middle")
    if text == SPELLED["<|end|>"]:
        label = f'<g font-style="italic">{label}</g>'
    return _rectangle(place, width_of(text), HEIGHT, fill, stroke) + label


def _rectangle(centre: tuple[float, float], width: float, height: float, fill: str, stroke: str) -> str:
    corner = f'x="{centre[0] - width / 2:g}" y="{centre[1] - height / 2:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {corner} rx="{height / 3:.3g}" fill="{fill}" stroke="{stroke}" stroke-width="2"/>'


def _text(
    x: float, y: float, text: str, size: int, ink: str = INK, weight: str = "normal", anchor: str = "start"
) -> str:
    words = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{ink}"'
    return f'<text x="{x:g}" y="{y:g}" {words}>{escape(text, quote=False)}</text>'


if __name__ == "__main__":
    OUTPUT.write_text(picture(real_step()), encoding="utf-8")
