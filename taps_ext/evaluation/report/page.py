"""index.html: the whole report as one file that asks the network for nothing, light or dark as the screen is."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

from .pictures import BLUE, BROWN, GRID, INK, PAPER, PURPLE, QUIET, Picture
from .sections import Section
from .tables import as_html

LONG_TABLE = 24  # rows; longer ones are folded away
SWAPPED = {INK: "var(--ink)", QUIET: "var(--quiet)", GRID: "var(--grid)", PAPER: "var(--paper)"}
SWAPPED |= {BLUE: "var(--blue)", BROWN: "var(--brown)", PURPLE: "var(--purple)"}  # too dark on dark paper

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #5d6673; --grid: #e2e5ea; --paper: #fefefe;
  --shade: #f5f6f8; --link: #0b63a5; --blue: #0072b2; --brown: #7f5f17;
  --purple: #7a3fb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --quiet: #9aa4b2; --grid: #363d47; --paper: #15181d;
  --shade: #1d2127; --link: #6cb6ff; --blue: #3d9ad6; --brown: #c3a15a;
  --purple: #b58ae0; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
.frame { max-width: 84rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; display: grid;
  grid-template-columns: 13rem minmax(0, 1fr); gap: 0 3rem; }
header { grid-column: 1 / -1; margin-bottom: 2rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em; }
h2 { font-size: 1.35rem; margin: 0 0 .5rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 0; }
header p, section > p { max-width: 46rem; margin: 0 0 1rem; color: var(--quiet); }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0 0; padding: 0; list-style: none; }
.tiles li { flex: 1 1 12rem; background: var(--shade); border-radius: .6rem; padding: .8rem 1rem; }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--quiet); font-size: .85rem; line-height: 1.4; display: block; }
nav { position: sticky; top: 1.5rem; align-self: start; max-height: calc(100vh - 3rem); overflow: auto; }
nav ol { list-style: none; margin: 0; padding: 0; border-left: 2px solid var(--grid); }
nav a { display: block; padding: .22rem 0 .22rem .9rem; font-size: .88rem; color: var(--quiet); }
nav a:hover { color: var(--ink); }
section { margin: 0 0 3.2rem; }
figure { margin: 1.6rem 0; }
figcaption p { margin: .15rem 0 0; color: var(--quiet); font-size: .85rem; max-width: 56rem; }
.picture .scroll svg { display: block; max-width: 100%; height: auto; }
.scroll { overflow-x: auto; margin-top: .6rem; }
.table .scroll { border: 1px solid var(--grid); border-radius: .5rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .86rem; font-variant-numeric: tabular-nums;
  min-width: 100%; }
th, td { padding: .38rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid);
  vertical-align: top; line-height: 1.35; }
thead th { background: var(--shade); font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 5.5rem; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 500; }
wbr { display: none; }
.text { text-align: left; }
td.text { white-space: normal; min-width: 7rem; max-width: 26rem; overflow-wrap: anywhere; }
th:first-child { position: sticky; left: 0; z-index: 1; background: var(--paper); text-align: left;
  border-right: 1px solid var(--grid); }
thead th:first-child { background: var(--shade); }
tbody tr:hover > * { background: var(--shade); }
td small { display: block; color: var(--quiet); font-size: .75rem; }
details summary { cursor: pointer; color: var(--link); font-size: .9rem; margin: .8rem 0; }
@media (max-width: 60rem) {
  .frame { grid-template-columns: minmax(0, 1fr); padding: 1.5rem 1rem 3rem; }
  nav { position: static; max-height: none; margin-bottom: 2rem; }
  nav ol { border: 0; display: flex; flex-wrap: wrap; gap: .3rem 1rem; }
  nav a { padding: .1rem 0; }
  h1 { font-size: 1.5rem; }
  .picture .scroll svg { max-width: none; }
  tbody th:first-child { min-width: 7.5rem; max-width: 9.5rem; white-space: normal; overflow-wrap: break-word; }
  wbr { display: inline; }
  th, td { padding: .35rem .5rem; }
  td.text { min-width: 0; overflow-wrap: break-word; }
  thead th { min-width: 0; }
}
@media print { nav { display: none; } .frame { display: block; } figure { break-inside: avoid; } }
"""


def page(
    title: str, lead: str, tiles: Sequence[tuple[str, str]], sections: Sequence[Section], svgs: Mapping[str, str]
) -> str:
    """The page's text; `svgs` holds each picture's drawing by its name."""
    links = "\n".join(f'<li><a href="#{one.name}">{html.escape(one.title)}</a></li>' for one in sections)
    told = "\n".join(f"<li><b>{html.escape(value)}</b><span>{html.escape(words)}</span></li>" for value, words in tiles)
    body = "\n".join(_section(one, svgs) for one in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<div class="frame">
<header>
<h1>{html.escape(title)}</h1>
<p>{html.escape(lead)}</p>
<ul class="tiles">
{told}
</ul>
</header>
<nav aria-label="Sections"><ol>
{links}
</ol></nav>
<main>
{body}
</main>
</div>
</body>
</html>
"""


def _section(section: Section, svgs: Mapping[str, str]) -> str:
    """Its pictures first: they say what the tables hold."""
    pictures = "\n".join(_picture(picture, svgs[picture.name]) for picture in section.pictures)
    tables = "\n".join(_folded(as_html(table), len(table.rows)) for table in section.tables)
    return (
        f'<section id="{section.name}">\n<h2>{html.escape(section.title)}</h2>\n<p>{html.escape(section.text)}</p>\n'
        f"{pictures}\n{tables}\n</section>"
    )


def _folded(table: str, num_rows: int) -> str:
    if num_rows <= LONG_TABLE:
        return table
    title = re.search("<h3>(.*?)</h3>", table)
    return f"<details><summary>{title[1] if title else 'Table'} ({num_rows} rows)</summary>\n{table}\n</details>"


def _picture(picture: Picture, svg: str) -> str:
    return (
        f'<figure class="picture">\n<figcaption><h3>{html.escape(picture.title)}</h3>'
        f"<p>{html.escape(picture.caption)}</p></figcaption>\n"
        f'<div class="scroll" tabindex="0">{inline(svg, picture.name, picture.title)}</div>\n</figure>'
    )


def inline(svg: str, name: str, title: str) -> str:
    """An SVG file's text as an element of the page: ids of its own, and the page's colours for ink and paper."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in SWAPPED.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
