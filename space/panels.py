# SPDX-License-Identifier: Apache-2.0
"""What the page shows of an answer, as HTML. All text that a visitor or the model wrote is escaped."""

from html import escape
from itertools import groupby

from team import Answer

Members = list[dict[str, str]]

CSS = """
.answer, .bars { margin-top: 1.5rem; } /* below the box's label */
.answer { min-height: 4.5rem; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer .run { border-bottom: 3px solid var(--analyst); padding-bottom: 1px; }
.answer .run sup { font-size: .68em; font-weight: 600; margin-right: .25em; opacity: .85; }
.note { font-size: .85em; margin-top: .6rem; opacity: .9; }
.bars { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr 3.2rem; gap: .35rem .7rem; align-items: center; }
.bars .bar { background: color-mix(in srgb, currentColor 12%, transparent); border-radius: 4px; height: .9rem; }
.bars .bar div { background: var(--analyst, #2a78d6); border-radius: 4px; height: 100%; }
.bars .percent { text-align: right; font-variant-numeric: tabular-nums; }
.layers { overflow-x: auto; }
.layers table { border-collapse: collapse; width: 100%; font-size: .8em; }
.layers th { text-align: left; font-weight: 500; padding: 2px 6px; white-space: nowrap; }
.layers td { padding: 2px; text-align: center; font-variant-numeric: tabular-nums;
  background: color-mix(in srgb, var(--analyst) var(--share), transparent); }
"""


def answer_html(answer: Answer, members: Members, *, done: bool = False) -> str:
    """The answer; once it is complete, each run of tokens underlined in the colour of the analyst that carried it."""
    if answer.tokens:
        runs = [
            (members[carrier], "".join(piece for piece, _ in pieces))
            for carrier, pieces in groupby(answer.tokens, key=lambda token: token[1])
        ]
        body = "".join(
            f'<span class="run" style="--analyst: {escape(member["color"])}" title="{escape(member["title"])}">'
            f"<sup>{escape(member['title'].split()[0])}</sup>{escape(text)}</span>"
            for member, text in runs
        )
    else:
        body = escape(answer.text)
    html = f'<div class="answer" aria-live="polite">{body}</div>'
    if answer.foreign_numbers:
        numbers = ", ".join(map(escape, answer.foreign_numbers))
        html += f'<p class="note"><strong>Not in your text:</strong> {numbers}. Do not rely on these figures.</p>'
    if done:
        html += '<p class="note">Written by an AI. Not financial advice.</p>'
    return html


def _bars(rows: list[tuple[str, float, str]]) -> str:
    cells = "".join(
        f'<span>{escape(title)}</span><div class="bar"><div style="width: {share:.1%}; {style}"></div></div>'
        f'<span class="percent">{share:.0%}</span>'
        for title, share, style in rows
    )
    return f'<div class="bars">{cells}</div>'


def shares_html(shares: list[float], members: Members) -> str:
    """Each analyst's share as a bar."""
    return _bars(
        [
            (member["title"], share, f"--analyst: {escape(member['color'])}")
            for member, share in zip(members, shares, strict=True)
        ]
    )


def probabilities_html(probabilities: dict[str, float]) -> str:
    """Each label's probability as a bar."""
    return _bars([(label, share, "") for label, share in probabilities.items()])


def layers_html(layers: list[list[float]], members: Members) -> str:
    """The shares [layers, analysts] as a table, one row an analyst."""
    head = "".join(f'<th scope="col">{place}</th>' for place in range(len(layers)))
    rows = "".join(
        f'<tr style="--analyst: {escape(member["color"])}"><th scope="row">{escape(member["title"])}</th>'
        + "".join(f'<td style="--share: {layer[place] * 70:.0f}%">{layer[place] * 100:.0f}</td>' for layer in layers)
        + "</tr>"
        for place, member in enumerate(members)
    )
    return (
        '<div class="layers" tabindex="0" role="region" aria-label="Share of each analyst in each layer, in percent"><table>'
        f'<thead><tr><th scope="col">layer</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
