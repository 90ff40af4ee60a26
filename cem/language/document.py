"""Steps of mathematics as text, as LaTeX and as a page of HTML.

A step holds sentences (with formulas inside), aligned formulas, tables and code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape, unescape
from textwrap import fill, indent
from xml.etree import ElementTree

from sympy import Expr

from .notation import latex, text

WIDTH = 96


@dataclass(frozen=True)
class Math:
    """A formula in LaTeX and in plain text."""

    latex: str
    text: str

    @classmethod
    def of(cls, expression: Expr) -> Math:
        return cls(latex(expression), text(expression))


Part = str | Math
Sentence = Sequence[Part]


@dataclass(frozen=True)
class Paragraph:
    parts: Sentence


@dataclass(frozen=True)
class Formula:
    """``left = right``; further terms of the right side stand below the first."""

    left: Math
    right: tuple[Math, ...]
    note: str = ""


@dataclass(frozen=True)
class Formulas:
    """Formulas aligned at their equal signs."""

    rows: tuple[Formula, ...]


@dataclass(frozen=True)
class Table:
    header: tuple[str, ...]
    rows: tuple[tuple[Sentence, ...], ...]


@dataclass(frozen=True)
class Code:
    text: str


Block = Paragraph | Formulas | Table | Code


@dataclass(frozen=True)
class Step:
    """One step of a derivation: a title, and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


def paragraph(*parts: Part) -> Paragraph:
    """A sentence of strings and formulas."""
    return Paragraph(parts)


def _plain(parts: Sentence) -> str:
    return "".join(part.text if isinstance(part, Math) else part for part in parts)


def as_text(title: str, steps: Iterable[Step]) -> str:
    """The steps for a terminal."""
    lines = [title, "=" * len(title)]
    for number, step in enumerate(steps, 1):
        lines += ["", f"{number}. {step.title}"]
        for block in step.blocks:
            lines += ["", *_block_as_text(block)]
    return "\n".join(lines) + "\n"


def _block_as_text(block: Block) -> list[str]:
    match block:
        case Paragraph(parts):
            return [indent(fill(_plain(parts), WIDTH - 3), "   ")]
        case Formulas(rows):
            width = max(len(row.left.text) for row in rows)
            lines = []
            for row in rows:
                note = f"    ({row.note})" if row.note else ""
                lines.append(f"   {row.left.text:>{width}} = {row.right[0].text}{note}")
                lines += [f"   {'':>{width}}   {term.text}" for term in row.right[1:]]
            return lines
        case Table(header, rows):
            cells = [[_plain(cell) for cell in row] for row in rows]
            if any(header):
                cells = [list(header), *cells]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            return [
                "   "
                + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
                for row in cells
            ]
        case Code(code):
            return [indent(code.rstrip(), "   ")]


_LATEX_MARKS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "&": r"\&", "%": r"\%",
    "#": r"\#", "$": r"\$", "^": r"\^{}", "~": r"\textasciitilde{}",
    "×": r"$\times$", "·": r"$\cdot$",
}  # fmt: skip


def _latex_parts(parts: Sentence) -> str:
    return "".join(
        f"${part.latex}$"
        if isinstance(part, Math)
        else "".join(_LATEX_MARKS.get(mark, mark) for mark in part)
        for part in parts
    )


def as_latex(title: str, steps: Iterable[Step]) -> str:
    """The steps as a fragment of LaTeX; it needs amsmath."""
    lines = [rf"\subsection*{{{_latex_parts([title])}}}"]
    for number, step in enumerate(steps, 1):
        lines += ["", rf"\paragraph{{{number}. {_latex_parts([step.title])}.}}"]
        for block in step.blocks:
            lines += ["", *_block_as_latex(block)]
    return "\n".join(lines) + "\n"


def _block_as_latex(block: Block) -> list[str]:
    match block:
        case Paragraph(parts):
            return [_latex_parts(parts)]
        case Formulas(rows):
            lines = []
            for row in rows:
                note = rf" &&\text{{({_latex_parts([row.note])})}}" if row.note else ""
                lines.append(f"  {row.left.latex} &= {row.right[0].latex}{note}")
                lines += [rf"  &\quad {term.latex}" for term in row.right[1:]]
            return [r"\begin{align*}", " \\\\\n".join(lines), r"\end{align*}"]
        case Table(header, rows):
            head = [[[title] for title in header]] if any(header) else []
            body = [" & ".join(map(_latex_parts, row)) + r" \\" for row in (*head, *rows)]
            if head:
                body[0] += r" \hline"
            columns = "l" * len(header)
            return [rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"]
        case Code(code):
            return [r"\begin{verbatim}", code.rstrip(), r"\end{verbatim}"]


STYLE = """
:root { color-scheme: light dark; --ink: #1c1b19; --paper: #fffdf8; --soft: #6d675d;
  --rule: #ddd6c8; --well: #f6f1e6; --accent: #8a3b12; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e3d8; --paper: #191816; --soft: #a39b8c;
  --rule: #3a362f; --well: #23211d; --accent: #e39a6b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.6 "Source Serif 4", "Iowan Old Style", Charter, Palatino, Georgia, serif; }
main { max-width: 48rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; counter-reset: step; }
header { border-bottom: 1px solid var(--rule); margin-bottom: 2.2rem; padding-bottom: 1.2rem; }
h1 { font-size: 1.9rem; font-weight: 600; line-height: 1.2; margin: 0 0 .3rem; }
header p { color: var(--soft); margin: 0; font-style: italic; }
h2 { font-size: 1.12rem; font-weight: 600; margin: 2.4rem 0 .6rem; counter-increment: step; }
h2::before { content: counter(step); color: var(--accent); margin-right: .75em;
  font-variant-numeric: tabular-nums; }
p { margin: .6rem 0; }
.formulas { overflow-x: auto; overflow-y: hidden; margin: .8rem 0; padding: .25rem 0; }
.formulas table { border-collapse: collapse; margin: 0 auto; }
.formulas td { padding: .32rem .18em; vertical-align: middle; white-space: nowrap; }
.formulas math { font-size: 1.08em; }
.formulas.long math { font-size: .92em; }
.formulas td.left { text-align: right; }
.formulas td.note { color: var(--soft); font-size: .84rem; font-style: italic; padding-left: 2em; }
math { font-family: "Latin Modern Math", "STIX Two Math", "Cambria Math", math, serif; }
table.list { border-collapse: collapse; width: 100%; font-size: .93rem; margin: 1.1rem 0; }
table.list th { text-align: left; font-weight: 600; color: var(--soft); font-size: .8rem;
  letter-spacing: .04em; border-bottom: 1px solid var(--ink); padding: .3rem .8rem .3rem 0; }
table.list td { border-bottom: 1px solid var(--rule); padding: .38rem .8rem .38rem 0;
  vertical-align: baseline; }
table.list td:first-child { white-space: nowrap; }
pre { background: var(--well); border: 1px solid var(--rule); border-radius: 4px; overflow-x: auto;
  padding: .9rem 1.1rem; font: .8rem/1.55 "JetBrains Mono", Menlo, Consolas, monospace; }
@media print { body { font-size: 11pt; } main { padding: 0; } }
"""


def _mathml(formula: Math, display: bool = False) -> str:
    # Imported here: only pages need it.
    from latex2mathml.converter import convert_to_element

    tree = convert_to_element(formula.latex)
    tree.set("displaystyle", str(display).lower())
    for node in tree.iter():
        node.text = unescape(node.text or "")
    for node in tree.iter():
        if display and node.tag == "msub" and node[0].text == "∑":
            node.tag = "munder"
    for row in list(tree.iter("mrow")):
        _space_out(row)
    if formula.latex[:2] in ("+ ", "- "):
        # A sign that continues the line above stands between two terms.
        next(tree.iter("mo")).set("form", "infix")
    return ElementTree.tostring(tree, encoding="unicode")


def _space_out(row: ElementTree.Element) -> None:
    """Thin spaces around functions and brackets, which TeX adds by itself and MathML does not."""
    for place, node in reversed(list(enumerate(row))):
        name = node if node.tag in ("mi", "mo") else node[0] if len(node) else node
        if name.tag == "mo" and (name.text or "").isalpha():
            name.tag = "mi"
        is_function = name.tag == "mi" and len(name.text or "") > 1
        previous = row[place - 1] if place else None
        opens = previous is None or previous.tag in ("mo", "munder")
        closes = previous is not None and previous.tag == "mrow" and node.tag != "mo"
        if (is_function and not opens) or closes and previous[-1].get("form") == "postfix":
            row.insert(place, ElementTree.Element("mspace", width="0.167em"))


def _html_parts(parts: Sentence) -> str:
    return "".join(_mathml(p) if isinstance(p, Math) else escape(p) for p in parts)


def as_html(title: str, subtitle: str, steps: Iterable[Step]) -> str:
    """The steps as one page without scripts, links or fonts to load."""
    body = "\n".join(_step_as_html(step) for step in steps)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>
{body}
</main>
</body>
</html>
"""


def _step_as_html(step: Step) -> str:
    blocks = "\n".join(map(_block_as_html, step.blocks))
    return f"<section>\n<h2>{escape(step.title)}</h2>\n{blocks}\n</section>"


def _block_as_html(block: Block) -> str:
    match block:
        case Paragraph(parts):
            return f"<p>{_html_parts(parts)}</p>"
        case Formulas(rows):
            shown = []
            equals = _mathml(Math("=", "="))
            for row in rows:
                note = f'<td class="note">{escape(row.note)}</td>' if row.note else ""
                cells = f'<td class="left">{_mathml(row.left, True)}</td><td>{equals}</td>'
                shown.append(f"<tr>{cells}<td>{_mathml(row.right[0], True)}</td>{note}</tr>")
                for term in row.right[1:]:
                    shown.append(f"<tr><td></td><td></td><td>{_mathml(term, True)}</td></tr>")
            width = max(len(row.left.text) + len(row.right[0].text) for row in rows)
            kind = "formulas long" if width > 100 else "formulas"
            return f'<div class="{kind}"><table>' + "\n".join(shown) + "</table></div>"
        case Table(header, rows):
            head = "".join(f"<th>{escape(title)}</th>" for title in header)
            body = "\n".join(
                "<tr>" + "".join(f"<td>{_html_parts(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            )
            head = f"<tr>{head}</tr>\n" if any(header) else ""
            return f'<table class="list">\n{head}{body}\n</table>'
        case Code(code):
            return f"<pre><code>{escape(code.rstrip())}</code></pre>"
