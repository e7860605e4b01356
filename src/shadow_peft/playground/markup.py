"""Answers and opinions as HTML. A difference is never shown by its colour alone: it has a sign and words, too."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from shadow_peft.playground.comparison import NAMES, Answer, Opinion

TITLES = {
    "base": ("Base", "without the adapter"),
    "attached": ("Attached", "base with its shadow"),
    "detached": ("Detached", "the shadow alone"),
    "drafted": ("Drafted", "the shadow drafts, the base verifies"),
}

SIGNS = {"\n": "⏎", "\t": "⇥", " ": "␣"}

CSS = """
.answers { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0.75rem; }
@media (min-width: 40rem) { .answers { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (min-width: 64rem) { .answers { grid-template-columns: repeat(4, minmax(0, 1fr)); } }
.answers article { border: 1px solid var(--border-color-primary); border-radius: 0.5rem; padding: 0.75rem; min-width: 0; }
.answers h3, .opinions h3 { margin: 0; font-size: 1rem; }
.answers p, .opinions p { margin: 0.25rem 0; font-size: 0.875rem; color: var(--body-text-color); }
.answers .text, .opinions .text {
  margin: 0.5rem 0; padding: 0.5rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-family: ui-monospace, monospace; font-size: 0.875rem;
  color: var(--body-text-color); background: var(--background-fill-secondary);
}
.opinions .text { line-height: 2.4; }
.opinions mark {
  color: #3d2b00; background: #ffe08a; border: 1px solid #8a6100; border-radius: 0.25rem;
  padding: 0.1rem 0.25rem; margin: 0 0.1rem; white-space: pre-wrap;
}
.opinions mark small { color: #3d2b00; font-style: italic; }
.opinions .scroll { overflow-x: auto; }
.opinions table { border-collapse: collapse; font-size: 0.875rem; color: var(--body-text-color); }
.opinions th, .opinions td { padding: 0.2rem 0.75rem; text-align: left; }
.opinions tr { border-bottom: 1px solid var(--border-color-primary); }
.opinions td code { white-space: pre; }
.opinions summary { cursor: pointer; padding: 0.5rem 0; color: var(--body-text-color); }
"""


def answers_html(answers: Sequence[Answer]) -> str:
    """The answers beside each other; one that is not there yet says so."""
    found = {answer.name: answer for answer in answers}
    return f'<div class="answers">{"".join(_article(name, found.get(name)) for name in NAMES)}</div>'


def _article(name: str, answer: Answer | None) -> str:
    title, what = TITLES[name]
    head = f'<article id="answer-{name}"><h3>{title}</h3><p>{what}</p>'
    if answer is None:
        return f"{head}<p>waiting</p></article>"
    if answer.problem is not None:
        return f"{head}<p>no answer: {escape(answer.problem)}</p></article>"
    speed = f"{answer.tokens_per_second:.1f} tokens/s"
    count = f"{_counted(len(answer.ids), 'token')} in {_counted(answer.base_passes or 0, 'pass', 'passes')} of the base"
    text = f'<div class="text">{escape(answer.text)}</div>'
    return f"{head}{text}<p><strong>{speed}</strong>, {count}</p></article>"


def opinions_html(opinions: Sequence[Opinion]) -> str:
    """The attached answer with a mark where the shadow would go on in another way, and all opinions as a table."""
    differing = sum(not opinion.agrees for opinion in opinions)
    what = f"The shadow differs from the adapted base at {differing} of {_counted(len(opinions), 'token')}. " + (
        "A mark shows the token that was written, then ≠ and what the shadow would have written." if differing else ""
    )
    text = "".join(_marked(opinion) for opinion in opinions)
    rows = "".join(_row(number, opinion) for number, opinion in enumerate(opinions, 1))
    head = "".join(
        f'<th scope="col">{title}</th>'
        for title in ("#", "written", "base would", "shadow would", "p of written, base", "p of written, shadow", "")
    )
    return (
        f'<section class="opinions"><h3>Where the opinions differ</h3><p>{what}</p><div class="text">{text}</div>'
        f"<details><summary>Every token as a table</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="Every token as a table">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details></section>"
    )


def _marked(opinion: Opinion) -> str:
    token = opinion.token
    if opinion.agrees:
        return escape(token)
    written = escape(token) if token.strip() and token.isprintable() else _shown(token)
    breaks = "\n" * token.count("\n")  # shown in the mark, and made behind it
    return f"<mark>{written}<small> ≠ {_shown(opinion.shadow.token)}</small></mark>{breaks}"


def _row(number: int, opinion: Opinion) -> str:
    cells = [f"<code>{_shown(token)}</code>" for token in (opinion.token, opinion.base.token, opinion.shadow.token)] + [
        f"{p:.1%}" for p in (opinion.base.of_written, opinion.shadow.of_written)
    ]
    cells.append("same" if opinion.agrees else "≠ differs")
    return f'<tr><th scope="row">{number}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _shown(token: str) -> str:
    """A token with whitespace and control characters made visible."""
    visible = [SIGNS.get(c) or (c if c.isprintable() else f"\\x{ord(c):02x}") for c in token]
    return escape("".join(visible) or "(nothing)")


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
