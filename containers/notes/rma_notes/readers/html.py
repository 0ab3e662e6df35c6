"""HTML: its main text, without navigation and what else stands around it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lxml import etree  # type: ignore[import-untyped]  # it ships no annotations

from rma_notes.cleaning import clean_line, clean_lines
from rma_notes.language import word_set
from rma_notes.readers import plain
from rma_notes.records import Block, Document, Properties
from rma_service.problems import CorruptDocument

if TYPE_CHECKING:
    from collections.abc import Iterator

_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w-]+)", re.IGNORECASE)
_XML_ENCODING = re.compile(r"^\s*<\?xml[^>]*\?>")
_NEVER = word_set(
    """
    script style noscript template iframe object embed applet svg canvas audio video map head link meta base
    button select option input textarea dialog nav aside menu frameset noframes
    """
)
_ROLES = word_set(
    """
    navigation banner contentinfo search complementary dialog menu menubar toolbar alertdialog
    """
)
_AROUND = re.compile(
    r"(?:^|[\s_-])(?:nav(?:bar|igation)?|menu|side-?bar|breadcrumbs?|cookies?|footer|masthead|pager|pagination|share|sharing|"
    r"social|related(?:-posts)?|advert(?:isement)?s?|ads?|newsletter|skip-?links?|toc-?toggle|edit-?section|mw-editsection|"
    r"headerlink|noprint|sr-only|visually-hidden)(?:$|[\s_-])",
    re.IGNORECASE,
)
#: What a name suggests counts as surroundings only if so much of its text is links, or it is short.
_LINK_SHARE, _SHORT = 0.4, 200
_BLOCKS = word_set(
    """
    address article blockquote body center dd details div dl dt fieldset figcaption figure footer form h1 h2 h3
    h4 h5 h6 header hgroup hr html legend li main ol p pre section summary table tbody td tfoot th thead tr ul
    caption
    """
)
_HEADING = re.compile(r"h[1-6]")
#: The main part has at least this share of the body's text, or it is not the main part.
_MAIN_SHARE = 0.3
_MAX_SPAN = 100
_PILCROW = re.compile(r"\s*[¶#§]$")


def read(data: bytes, *, charset: str | None = None) -> Document:
    """Return the page's main text; raises CorruptDocument where there is no markup in it."""
    if charset is None and (told := _META_CHARSET.search(data[:4096])):
        charset = told[1].decode("ascii")
    text, warnings = plain.decode(data, charset=charset)
    root = _parsed(text)
    if root is None:
        raise CorruptDocument("there is no HTML in this that can be read")
    properties = _properties(root)
    blocks = _without_doubled_title(list(_walk(_main(root))))
    return Document(blocks=blocks, properties=properties, warnings=warnings)


def blocks_of(fragment: str) -> Iterator[Block]:
    """Yield the blocks of a piece of HTML."""
    root = _parsed(fragment)
    if root is not None:
        yield from _walk(root)


def _parsed(text: str) -> Any | None:  # noqa: ANN401 - lxml ships no annotations
    data = clean_lines(_XML_ENCODING.sub("", text)).encode()
    parser = etree.HTMLParser(encoding="utf-8", no_network=True, remove_comments=True, remove_pis=True, huge_tree=False)
    try:
        return etree.fromstring(data, parser)
    except (etree.ParserError, etree.XMLSyntaxError):
        return None


def _text_of(node: Any) -> str:  # noqa: ANN401 - as above
    return clean_line(" ".join(node.itertext()))


def _length(node: Any) -> int:  # noqa: ANN401 - as above
    return sum(len(piece.strip()) for piece in node.itertext())


def _properties(root: Any) -> Properties:  # noqa: ANN401 - as above
    told: dict[str, str] = {}
    for meta in root.iter("meta"):
        name = (meta.get("property") or meta.get("name") or "").lower()
        if name and meta.get("content"):
            told.setdefault(name, clean_line(meta.get("content")))
    title = root.find(".//title")
    heading = root.find(".//h1")
    language = (root.get("lang") or root.get("{http://www.w3.org/XML/1998/namespace}lang") or "")[:2].lower()
    return Properties(
        title=told.get("og:title")
        or (_text_of(title) if title is not None else "")
        or (_text_of(heading) if heading is not None else "")
        or None,
        author=told.get("author") or told.get("article:author") or told.get("dc.creator"),
        subject=told.get("description") or told.get("og:description"),
        keywords=[word.strip() for word in told.get("keywords", "").split(",") if word.strip()],
        created=told.get("article:published_time") or told.get("date") or told.get("dcterms.created"),
        modified=told.get("article:modified_time") or told.get("last-modified") or told.get("dcterms.modified"),
        language=language or None,
    )


def _main(root: Any) -> Any:  # noqa: ANN401 - as above
    """Strip what stands around the text, and return the element that holds the text."""
    for node in list(root.iter()):
        if isinstance(node.tag, str) and node.getparent() is not None and _is_around(node):
            _drop(node)
    body = root.find("body")
    body = root if body is None else body
    whole = _length(body)
    articles = root.findall(".//article")
    for found in [
        *root.findall(".//main"),
        *root.findall(".//*[@role='main']"),
        *(articles if len(articles) == 1 else []),
    ]:
        if _length(found) >= _MAIN_SHARE * whole:
            return found
    return body


def _drop(node: Any) -> None:  # noqa: ANN401 - as above
    """Remove an element, but not the text that follows it."""
    parent, tail = node.getparent(), node.tail or ""
    before = node.getprevious()
    if before is None:
        parent.text = (parent.text or "") + tail
    else:
        before.tail = (before.tail or "") + tail
    parent.remove(node)


def _is_around(node: Any) -> bool:  # noqa: ANN401 - as above
    if node.tag in ("html", "body", "main", "article", "h1"):
        return False
    if node.tag in _NEVER and node.tag != "head":
        return True
    if node.get("hidden") is not None or node.get("aria-hidden") == "true" or (node.get("role") or "") in _ROLES:
        return True
    if node.tag in ("header", "footer"):
        inside = any(parent.tag in ("article", "main", "section") for parent in node.iterancestors())
        return not inside and node.find(".//h1") is None
    if "display:none" in (node.get("style") or "").replace(" ", "").lower():
        return True
    return _AROUND.search(f"{node.get('class') or ''} {node.get('id') or ''}") is not None and _is_thin(node)


def _is_thin(node: Any) -> bool:  # noqa: ANN401 - as above
    length = _length(node)
    links = sum(_length(link) for link in node.iter("a"))
    return length <= _SHORT or links >= _LINK_SHARE * length


def _without_doubled_title(blocks: list[Block]) -> list[Block]:
    """Drop a heading that only repeats the one before it."""
    return [
        block
        for before, block in zip([None, *blocks], blocks, strict=False)
        if not (before and block.kind == "heading" and before.kind == "heading" and before.text == block.text)
    ]


class _Walker:
    """Collects the text of a block until it ends."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._lists: list[int | None] = []
        self._mark = ""
        self._item = 0

    def text(self, text: str | None) -> None:
        """Add text to the block at hand."""
        if text:
            self._parts.append(text)

    def begin(self, node: Any) -> None:  # noqa: ANN401 - as above
        """Enter an element: a list, an item, a line break, or what has text of its own."""
        if node.tag in ("ul", "ol"):
            self._lists.append(_first_number(node.get("start")) if node.tag == "ol" else None)
        elif node.tag == "li":
            self._begin_item()
        elif node.tag == "br":
            self.text("\n")
        if node.tag not in _NEVER:
            self.text(node.text)

    def _begin_item(self) -> None:
        number = self._lists[-1] if self._lists else None
        if number is not None:
            self._lists[-1] = number + 1
        self._mark = "• " if number is None else f"{number}. "
        self._item += 1

    def end(self, node: Any) -> None:  # noqa: ANN401 - as above
        """Leave an element."""
        if node.tag in ("ul", "ol") and self._lists:
            self._lists.pop()
        elif node.tag == "li":
            self._item = max(0, self._item - 1)
            self._mark = ""

    def flush(self, node: Any | None) -> Iterator[Block]:  # noqa: ANN401 - as above
        """Yield the block at hand, which ``node`` ends, if there is text in it."""
        text = clean_line("".join(self._parts))
        self._parts.clear()
        if not text:
            return
        tag = node.tag if node is not None else ""
        if _HEADING.fullmatch(tag):
            yield Block(kind="heading", text=_PILCROW.sub("", text), level=int(tag[1]))
        elif self._item or tag == "dd":
            yield Block(kind="item", text=self._mark + text)
            self._mark = ""
        else:
            yield Block(kind="paragraph", text=text)


def _first_number(start: str | None) -> int:
    return int(start) if start and start.isdecimal() and len(start) < 6 else 1  # noqa: PLR2004 - no list is that long


def _walk(root: Any) -> Iterator[Block]:  # noqa: ANN401 - as above
    walker = _Walker()
    walk = etree.iterwalk(root, events=("start", "end"))
    for event, node in walk:
        if not isinstance(node.tag, str):
            continue
        whole = _whole_block(node)
        if event == "start":
            if node.tag in _BLOCKS:
                yield from walker.flush(None)
            if whole is None:
                walker.begin(node)
            else:
                yield from whole
                walk.skip_subtree()
            continue
        if node.tag in _BLOCKS and whole is None:
            yield from walker.flush(node)
        walker.end(node)
        if node is not root:
            walker.text(node.tail)
    yield from walker.flush(None)


def _whole_block(node: Any) -> list[Block] | None:  # noqa: ANN401 - as above
    """Return an element that is taken as a whole (a listing, a table of data), None for any other."""
    if node.tag == "pre":
        text = clean_lines("".join(node.itertext()))
        return [Block(kind="code", text=text)] if text.strip() else []
    if node.tag != "table" or node.find(".//table") is not None or node.find(".//h1") is not None:
        return None
    rows = _table_rows(node)
    if len(rows) < 2 or len(rows[0]) < 2:  # noqa: PLR2004 - less is layout
        return None
    caption = node.find("caption")
    title = [Block(kind="paragraph", text=_text_of(caption))] if caption is not None and _text_of(caption) else []
    return [*title, Block(kind="table", rows=rows)]


def _table_rows(table: Any) -> list[list[str]]:  # noqa: ANN401 - as above
    """Return a table's cells; those that a wide or high cell covers are empty."""
    grid: dict[tuple[int, int], str] = {}
    trs = list(table.iter("tr"))
    for r, tr in enumerate(trs):
        c = 0
        for cell in tr:
            if cell.tag not in ("td", "th"):
                continue
            while (r, c) in grid:
                c += 1
            text = _text_of(cell)
            for i in range(min(_span(cell.get("rowspan")), len(trs) - r)):
                for j in range(_span(cell.get("colspan"))):
                    grid[r + i, c + j] = text if i == j == 0 else ""
            c += 1
    width = max((c for _, c in grid), default=-1) + 1
    rows = [[grid.get((r, c), "") for c in range(width)] for r in range(len(trs))]
    return [row for row in rows if any(row)]


def _span(value: str | None) -> int:
    return min(int(value), _MAX_SPAN) if value and value.isdecimal() and len(value) < 6 and int(value) else 1  # noqa: PLR2004 - no cell is that wide
