"""Text of a model as Markdown that can do nothing but look good.

Streamlit escapes HTML by itself (`unsafe_allow_html` is never used here), but a Markdown image is loaded by the browser
without being asked, and its address may carry what was said in the chat to somebody else's server; a link may say one
thing and lead to another. So of Markdown there stay paragraphs, headings, lists, tables, quotes, bold and italic, code;
square brackets, which every image, link, footnote and colour directive needs, `<`, `$` and `~` are shown as they are
written. An address that is written out stays one that can be clicked, and leads where it says.

Code blocks are cut out here and shown by a widget of their own, so nothing hangs on two parsers agreeing on where code
begins.

中文：把模型的文字安全地显示为 Markdown：不含 HTML、图片、伪装链接。
"""

import re
from typing import NamedTuple

FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([\w+#.-]*)[ \t]*")
# One code span inside a line. Next to other backticks it is left to be shown as it is written.
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
ACTIVE = re.compile(r"[\\`\[\]<$~]")
LINE_END = re.compile(r"(?<=\S)[ \t]*\n(?=[ \t]*\S)")
# Left out, or shown as a replacement character: control characters, and those that turn the direction of writing.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Part(NamedTuple):
    """A piece of an answer. language: None for prose in safe Markdown, else the name behind the fence, often empty."""

    text: str
    language: str | None = None


def visible(text: str) -> str:
    """Control characters and lone surrogates, which no browser takes, as U+FFFD."""
    return CONTROL.sub("\ufffd", text.encode("utf-8", "replace").decode("utf-8"))


def parts(text: str) -> list[Part]:
    """The answer as prose and code blocks in their order; a block that never closes reaches to the end."""
    found: list[Part] = []
    lines: list[str] = []
    fence, language = "", ""

    def close(kind: str | None) -> None:
        body = "\n".join(lines)
        if kind is not None or body.strip():
            found.append(Part(body if kind is not None else safe_markdown(body.strip("\n")), kind))
        lines.clear()

    for line in visible(text).split("\n"):
        match = FENCE.fullmatch(line)
        if not fence and match:
            close(None)
            fence, language = match[1], match[2]
        elif fence and match and match[1].startswith(fence) and not match[2]:
            close(language)
            fence = ""
        else:
            lines.append(line)
    close(language if fence else None)
    return found


def safe_markdown(prose: str) -> str:
    """Markdown that shows this prose, without images, links in disguise, HTML, formulas or directives."""
    pieces, at = [], 0
    for span in SPAN.finditer(prose):
        if "](" in span[1]:  # a table cuts its cells before it looks for code: this could become an image there
            continue
        pieces += [escape(prose[at : span.start()]), span[0]]
        at = span.end()
    text = "".join([*pieces, escape(prose[at:])])
    return LINE_END.sub("  \n", text)  # a line break stays a line break


def escape(text: str) -> str:
    return ACTIVE.sub(r"\\\g<0>", text)
