"""Foreign text made harmless for the place where it is shown: a terminal, HTML, Markdown, a plot.

Names, descriptions, licences and generated text come from files that somebody else wrote. Each function returns text
that means only itself there. JSON needs none of this: it is written in ASCII.
"""

from __future__ import annotations

import html
import re
import unicodedata

#: Invisible characters that languages need: soft hyphen, joiners, direction marks, signs around Arabic numbers.
_NEEDED = frozenset("\u00ad\u200c\u200d\u200e\u200f\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2")
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(text: object, keep: str = "\n\t") -> str:
    """Text in which control characters, bidirectional overrides and lone surrogates are spelled out (`\\x1b`).

    Args:
        keep: control characters that stay.
    """

    def shown(character: str) -> str:
        if character in keep or character in _NEEDED or unicodedata.category(character) not in _HIDDEN:
            return character
        return ascii(character)[1:-1]

    return "".join(map(shown, str(text)))


def line(text: object) -> str:
    """One line of plain text, for a terminal, a log or a cell of an aligned table."""
    return visible(" ".join(str(text).split()), keep="")


def html_text(text: object) -> str:
    """Text between HTML tags or in a quoted attribute."""
    return html.escape(visible(text))


def markdown_line(text: object) -> str:
    """One line of Markdown, also in a table cell, that shows the text as it is: no markup, HTML, formulas or links."""
    plain = html.escape(line(text), quote=False)
    plain = re.sub(r"([\\`*_{}\[\]|~#$!])", r"\\\1", plain)
    plain = re.sub(r"(?i)(https?|ftp)://|(www)\.|(mailto):", _unlinked, plain)
    plain = plain.replace("@", "&#64;")
    return re.sub(r"^(\d*)([-+=.):])", r"\1\\\2", plain)


def markdown_text(text: object) -> str:
    """Markdown that shows the text with its line breaks."""
    return "  \n".join(markdown_line(part) for part in visible(text).splitlines())


def markdown_code(text: object) -> str:
    """An inline code span."""
    plain = line(text)
    fence = "`" * (_longest_run(plain, "`") + 1)
    space = " " if not plain or plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{space}{plain}{space}{fence}"


def markdown_block(text: object, language: str) -> str:
    """A fenced block, by a fence that the text does not hold."""
    plain = visible(text)
    fence = "`" * max(3, _longest_run(plain, "`") + 1)
    return f"{fence}{language}\n{plain}\n{fence}"


def plot_text(text: object) -> str:
    """A label of matplotlib's without formulas."""
    return line(text).replace("$", r"\$")


def _unlinked(found: re.Match[str]) -> str:
    return found[0].replace(":", "&#58;").replace(".", "&#46;")


def _longest_run(text: str, character: str) -> int:
    return max((len(run) for run in re.findall(f"{re.escape(character)}+", text)), default=0)
