"""Markdown (CommonMark with tables), and its front matter."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt

from rma_notes.cleaning import clean_line, clean_lines
from rma_notes.readers import html, plain
from rma_notes.records import Block, Document, Properties

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from markdown_it.token import Token

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FIELD = re.compile(r"^([A-Za-z_]+):[ \t]*(.+?)[ \t]*$", re.MULTILINE)
_DATE = re.compile(r"^\d{4}-\d\d(?:-\d\d)?")


def read(data: bytes, *, charset: str | None = None) -> Document:
    """Return the document's blocks; HTML in it is read as HTML."""
    text, warnings = plain.decode(data, charset=charset)
    text = clean_lines(text)
    front = _FRONT_MATTER.match(text)
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text[front.end() :] if front else text)
    return Document(blocks=list(_blocks(tokens)), properties=_properties(front[1] if front else ""), warnings=warnings)


def _properties(front_matter: str) -> Properties:
    fields = {key.lower(): value.strip("\"'") for key, value in _FIELD.findall(front_matter)}
    created, keywords = fields.get("date", ""), fields.get("keywords") or fields.get("tags") or ""
    return Properties(
        title=fields.get("title"),
        author=fields.get("author"),
        subject=fields.get("description") or fields.get("subject"),
        keywords=[word.strip(" \"'") for word in keywords.strip("[]").split(",") if word.strip(" \"'")],
        created=created if _DATE.match(created) else None,
        language=(fields.get("lang") or fields.get("language") or "")[:2].lower() or None,
    )


class _Lists:
    """The lists that are open: bullets, or the number that comes next."""

    def __init__(self) -> None:
        self._open: list[int | None] = []
        self._fresh = False

    def see(self, token: Token) -> None:
        """Follow the beginnings and ends of lists and their items."""
        if token.type == "ordered_list_open":
            self._open.append(int(token.attrGet("start") or 1))
        elif token.type == "bullet_list_open":
            self._open.append(None)
        elif token.type in ("ordered_list_close", "bullet_list_close"):
            self._open.pop()
        elif token.type == "list_item_open":
            self._fresh = True

    def mark(self) -> str | None:
        """Return what stands before the text that comes now, None where it is no item."""
        if not self._open:
            return None
        if not self._fresh:
            return ""
        self._fresh = False
        number = self._open[-1]
        if number is None:
            return "• "
        self._open[-1] = number + 1
        return f"{number}. "


def _blocks(tokens: Sequence[Token]) -> Iterator[Block]:
    lists = _Lists()
    rows: list[list[str]] = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        lists.see(token)
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "table_close":
            yield Block(kind="table", rows=rows)
            rows = []
        elif token.type == "inline" and rows:
            rows[-1].append(clean_line(_text(token)))
        elif token.type == "inline" and before is not None:
            level = int(before.tag[1]) if before.type == "heading_open" else 0
            yield from _block(_text(token), level, lists.mark())
        elif token.type in ("fence", "code_block"):
            yield Block(kind="code", text=token.content.strip("\n"))
        elif token.type == "html_block":
            yield from html.blocks_of(token.content)


def _block(text: str, level: int, mark: str | None) -> Iterator[Block]:
    if not text:
        return
    if level:
        yield Block(kind="heading", text=clean_line(text), level=level)
    elif mark is None:
        yield Block(kind="paragraph", text=text)
    else:
        yield Block(kind="item", text=mark + text)


def _text(token: Token) -> str:
    parts: list[str] = []
    for child in token.children or ():
        if child.type in ("text", "code_inline") or child.type == "image":
            parts.append(child.content)
        elif child.type == "softbreak":
            parts.append(" ")
        elif child.type == "hardbreak" or (child.type == "html_inline" and child.content.startswith("<br")):
            parts.append("\n")
    return "\n".join(filter(None, map(clean_line, "".join(parts).split("\n"))))
