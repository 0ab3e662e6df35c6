"""What readers produce (a `Document` of blocks), and what a client gets (`Notes`)."""

from __future__ import annotations

from typing import Literal

import msgspec

BlockKind = Literal["heading", "paragraph", "item", "code", "contents", "table"]
Row = list[str]


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a document in reading order; ``level`` is a heading's, 1 is the highest; pages count from 1."""

    kind: BlockKind
    text: str = ""
    level: int = 0
    page: int | None = None
    rows: list[Row] = []


class Heading(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the outline."""

    level: int
    title: str
    page: int | None = None


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table; of merged cells the first has the text and the others are empty; all rows are of one length."""

    page: int | None = None
    rows: list[Row]


class Properties(msgspec.Struct, frozen=True, kw_only=True):
    """What a document says about itself; times are RFC 3339 where the document's could be understood."""

    title: str | None = None
    author: str | None = None
    subject: str | None = None
    keywords: list[str] = []
    created: str | None = None
    modified: str | None = None
    language: str | None = None
    pages: int | None = None


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """What a reader found; ``outline`` is the document's own where it has one, else it comes from its headings."""

    blocks: list[Block]
    properties: Properties = Properties()
    outline: list[Heading] = []
    warnings: list[str] = []


class Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the document; ``pages`` is null where a format has none, ``language`` is an ISO 639-1 code."""

    media_type: str
    filename: str | None
    title: str | None
    author: str | None
    subject: str | None
    keywords: list[str]
    created: str | None
    modified: str | None
    language: str | None
    pages: int | None
    characters: int
    words: int
    bytes: int


class PageSpan(msgspec.Struct, frozen=True, kw_only=True):
    """Where a page's text begins and ends: offsets into ``text``, in characters."""

    page: int
    start: int
    end: int


class KeyPhrase(msgspec.Struct, frozen=True, kw_only=True):
    """A phrase as the document writes it; the best one's score is 1."""

    phrase: str
    score: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The most telling sentences, word for word and in the document's order, alone and as one string."""

    text: str
    sentences: list[str]


class Notes(msgspec.Struct, frozen=True, kw_only=True):
    """The answer; parts that were not asked for are left out."""

    text: str | msgspec.UnsetType = msgspec.UNSET
    pages: list[PageSpan] | msgspec.UnsetType = msgspec.UNSET
    outline: list[Heading] | msgspec.UnsetType = msgspec.UNSET
    tables: list[Table] | msgspec.UnsetType = msgspec.UNSET
    metadata: Metadata | msgspec.UnsetType = msgspec.UNSET
    key_phrases: list[KeyPhrase] | msgspec.UnsetType = msgspec.UNSET
    summary: Summary | msgspec.UnsetType = msgspec.UNSET
    warnings: list[str]
