# SPDX-License-Identifier: Apache-2.0
"""What the page shows of an answer, as HTML. All text that a visitor or the model wrote is escaped."""

from collections import Counter
from collections.abc import Iterator
from difflib import SequenceMatcher
from html import escape
from itertools import groupby

from team import NUMBER, Answer

Members = list[dict[str, str]]

CSS = """
.answer, .bars { margin-top: 1.5rem; } /* below the box's label */
.answer { min-height: 4.5rem; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer .run { border-bottom: 3px solid var(--analyst); padding-bottom: 1px; }
.answer .run sup { font-size: .68em; font-weight: 600; margin-right: .25em; opacity: .85; }
.given { text-decoration: underline dotted; text-underline-offset: 3px; }
.foreign { background: color-mix(in srgb, #d33 22%, transparent); text-decoration: underline wavy #d33; }
.other { background: color-mix(in srgb, currentColor 14%, transparent); border-radius: 3px; }
.earlier { opacity: .85; border-left: 3px solid color-mix(in srgb, currentColor 25%, transparent); padding-left: .8rem; }
.earlier p { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem; margin-top: 1.5rem; }
.columns h4 { margin: 0 0 .3rem; border-bottom: 3px solid var(--analyst, currentColor); }
.columns p { overflow-wrap: anywhere; white-space: pre-wrap; }
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


# In the visitor's browser: a link that fills the question in, and the record as a file.
LINK = """question => {
  const url = new URL(window.location); url.searchParams.set('q', question); history.replaceState(null, '', url);
  navigator.clipboard?.writeText(url.href);
}"""
DOWNLOAD = """record => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([record || '{}'], {type: 'application/json'}));
  link.download = 'finteamexperts-answer.json'; link.click(); URL.revokeObjectURL(link.href);
}"""


def answer_html(answer: Answer, members: Members, *, done: bool = False) -> str:
    """The answer; once it is complete, each run of words underlined in the colour of the analyst that carried it."""
    figures = [(found.start(), found.end(), found.group()) for found in NUMBER.finditer(answer.text)] if done else []
    kinds = [(low, high, "foreign" if number in answer.foreign_numbers else "given") for low, high, number in figures]
    if answer.tokens:
        body, start = "", 0
        for carrier, pieces in groupby(words(answer.tokens), key=lambda word: word[1]):
            member, text = members[carrier], "".join(piece for piece, _ in pieces)
            body += (
                f'<span class="run" style="--analyst: {escape(member["color"])}" title="{escape(member["title"])}">'
                f"<sup>{escape(member['title'].split()[0])}</sup>{_marked(text, start, kinds)}</span>"
            )
            start += len(text)
    else:
        body = _marked(answer.text, 0, kinds)
    html = f'<div class="answer" aria-live="polite">{body}</div>'
    if answer.foreign_numbers:
        numbers = ", ".join(map(escape, answer.foreign_numbers))
        html += f'<p class="note"><strong>Not in your text:</strong> {numbers}. Do not rely on these figures.</p>'
    if done:
        html += '<p class="note">Written by an AI. Not financial advice.</p>'
    return html


def words(tokens: list[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """The words of an answer, each with the space before it and the analyst that carried most of its letters."""
    parts: list[list[tuple[str, int]]] = []
    for piece, carrier in tokens:
        word = "".join(earlier for earlier, _ in parts[-1]) if parts else ""
        if not parts or (word.strip() and (piece[:1].isspace() or word[-1:].isspace())):  # a space alone is no word
            parts.append([])
        parts[-1].append((piece, carrier))
    for part in parts:
        letters: Counter[int] = Counter()
        for piece, carrier in part:
            letters[carrier] += len(piece.strip())
        yield "".join(piece for piece, _ in part), letters.most_common(1)[0][0]


def _marked(text: str, start: int, kinds: list[tuple[int, int, str]]) -> str:
    """The text, which begins at `start` of the answer, with the answer's figures (from, to, class) marked."""
    html, at = "", start
    for low, high, kind in kinds:
        low, high = max(low, at), min(high, start + len(text))
        if low < high:
            html += f'{escape(text[at - start : low - start])}<span class="{kind}">{escape(text[low - start : high - start])}</span>'
            at = high
    return html + escape(text[at - start :])


def earlier_html(turns: list[dict[str, str]]) -> str:
    """The turns of a conversation so far."""
    speakers = {"user": "You", "assistant": "The team"}
    lines = "".join(f"<p><strong>{speakers[turn['role']]}:</strong> {escape(turn['content'])}</p>" for turn in turns)
    return f'<div class="earlier">{lines}</div>' if turns else ""


def columns_html(answers: list[tuple[str, str, str]]) -> str:
    """Answers side by side, each as (title, colour, text); words that the first one does not have are marked."""
    first, cells = answers[0][2].split(), ""
    for title, color, text in answers:
        words, body = text.split(), []
        for what, _, _, low, high in SequenceMatcher(None, first, words, autojunk=False).get_opcodes():
            part = escape(" ".join(words[low:high]))
            body.append(part if what == "equal" or not part else f'<span class="other">{part}</span>')
        own = f' style="--analyst: {escape(color)}"' if color else ""
        cells += f"<div><h4{own}>{escape(title)}</h4><p>{' '.join(filter(None, body))}</p></div>"
    return f'<div class="columns">{cells}</div>'


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
