"""An extractive summary: the sentences that have most in common with the others (LexRank, Erkan and Radev, 2004)."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

from rma_notes.language import WORD, Stemmer, stop_words
from rma_notes.records import Summary

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The graph of sentences grows with the square of their number; of a longer text the most central ones take part.
MAX_SENTENCES = 500
MIN_WORDS, MAX_WORDS = 6, 60
#: Where nothing is a proper sentence (notes, slides), what has so many words will do.
MIN_WORDS_OF_NOTES = 3
DAMPING, ROUNDS = 0.85, 30
MIN_SIMILARITY = 0.05
#: A sentence this much like a chosen one tells nothing new.
MAX_REPETITION = 0.5
#: What stands first was put there because it matters; the gain falls to a third within so many sentences.
EARLY_GAIN, EARLY_SENTENCES = 0.8, 12
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|cf|vs|etc|al|fig|figs|eq|eqs|sec|ch|no|nos|vol|pp|p|dr|mr|mrs|ms|prof|st|jr|sr|inc|ltd|co|corp|dept|"
    r"approx|resp|ca|bzw|z\.b|d\.h|u\.a|usw|nr|abs|art|ed|eds|ref|tab|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec)"
    r"|\b[A-Z]|\d)\.$",
    re.IGNORECASE,
)
_END = re.compile(r"[.!?。！？]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’」』）]*")  # noqa: RUF001 - marks of other scripts
_NEXT = re.compile(r"\s*(\S)")
_LAST_NUMBER = re.compile(r"\w{2,} \(?\d{2,}\.$")
_LOOK_BACK = 24
_PROSE = re.compile(r"[^\W\d_]|[\s,.'’-]")  # noqa: RUF001 - the apostrophe that books use
_BOILERPLATE = re.compile(
    r"^(?:copyright|permission is|all rights reserved|©|licensed under|"
    r"this (?:document|work|file|program) is (?:licensed|distributed|free)|"
    r"see |keywords?:|figure \d|table \d|isbn|https?:)|free documentation license|without warranty|warranties|"
    r"all rights reserved|terms of (?:the )?\S+ ?(?:public )?licen[cs]e",
    re.IGNORECASE,
)
_LEANS_BACK = re.compile(
    r"^(?:this|these|those|that|it|they|he|she|such|however|but|and|or|so|thus|hence|therefore|moreover|furthermore|"
    r"also|for example|for instance|in addition|again|otherwise|instead|then|here|note that|"
    r"dabei|dies|diese|dieser|sie|er|es)\b",
    re.IGNORECASE,
)
_PROSE_SHARE = 0.85
_CJK = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


class _Sentence(NamedTuple):
    text: str
    place: int
    vector: dict[str, float]


def sentences_of(text: str) -> list[str]:
    """Split a paragraph into sentences; a full stop after an abbreviation, initial or number ends none."""
    sentences: list[str] = []
    start = 0
    for match in _END.finditer(text):
        # Only what stands around the mark is looked at: a text of nothing but marks must not take for ever.
        before, after = text[max(start, match.end() - _LOOK_BACK) : match.end()], _NEXT.match(text, match.end())
        following = after[1] if after else ""
        if following.islower() or (match[0] == "." and _ABBREVIATION.search(before) and not _closes(before, following)):
            continue
        sentences.append(text[start : match.end()].strip())
        start = match.end()
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


def _closes(before: str, following: str) -> bool:
    """Whether a number closes a sentence ("in 1999. The"), rather than count something ("Fig. 3. The")."""
    return bool(_LAST_NUMBER.search(before)) and following.isupper()


def summarize(paragraphs: Sequence[str], *, title: str | None, language: str | None, limit: int) -> Summary:
    """Return the ``limit`` most telling sentences of ``paragraphs``, in their order."""
    if not limit:
        return Summary(text="", sentences=[])
    sentences = _weighted(paragraphs, language)
    chosen = _chosen(sentences, _scores(sentences, _title_words(title, language)), limit)
    texts = [sentence.text for sentence in chosen]
    return Summary(text=" ".join(texts), sentences=texts)


def _title_words(title: str | None, language: str | None) -> set[str]:
    stem, stop = Stemmer(language), stop_words(language)
    return {stem(word) for word in WORD.findall(title or "") if word.lower() not in stop}


def _weighted(paragraphs: Sequence[str], language: str | None) -> list[_Sentence]:
    """Return the sentences that could stand in a summary, each as a vector of tf-idf weights of length one."""
    every = list(dict.fromkeys(s for paragraph in paragraphs for s in sentences_of(paragraph)))
    texts = [s for s in every if _is_prose(s)] or [s for s in every if len(s.split()) >= MIN_WORDS_OF_NOTES]
    stem, stop = Stemmer(language), stop_words(language)
    bags = [Counter(_terms(text, stem, stop)) for text in texts]
    spread = Counter(term for bag in bags for term in bag)
    idf = {term: math.log(1 + len(bags) / count) for term, count in spread.items()}
    sentences = [
        _Sentence(text, place, _unit({term: count * idf[term] for term, count in bag.items()}))
        for place, (text, bag) in enumerate(zip(texts, bags, strict=True))
        if bag
    ]
    return _most_central(sentences)


def _terms(text: str, stem: Stemmer, stop: frozenset[str]) -> list[str]:
    if _CJK.search(text):
        letters = [c for c in text if c.isalpha()]
        return [a + b for a, b in itertools.pairwise(letters)]
    return [stem(word) for word in WORD.findall(text) if word.lower() not in stop]


def _is_prose(text: str) -> bool:
    if _CJK.search(text):
        return 10 <= len(text) <= 200  # noqa: PLR2004 - characters, where words have no spaces between them
    words = text.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS or text[0].islower() or text[-1] not in ".!?”\"'’)":  # noqa: RUF001 - as above
        return False
    return len(_PROSE.findall(text)) / len(text) >= _PROSE_SHARE and not _BOILERPLATE.search(text)


def _unit(vector: dict[str, float]) -> dict[str, float]:
    length = math.sqrt(sum(value * value for value in vector.values())) or 1.0
    return {term: value / length for term, value in vector.items()}


def _dot(a: dict[str, float], b: dict[str, float]) -> float:
    if len(b) < len(a):
        a, b = b, a
    return sum(value * b[term] for term, value in a.items() if term in b)


def _most_central(sentences: list[_Sentence]) -> list[_Sentence]:
    if len(sentences) <= MAX_SENTENCES:
        return sentences
    centre: dict[str, float] = defaultdict(float)
    for sentence in sentences:
        for term, value in sentence.vector.items():
            centre[term] += value
    ranked = sorted(sentences, key=lambda s: (-_dot(s.vector, centre) * _early(s), s.place))
    return sorted(ranked[:MAX_SENTENCES], key=lambda s: s.place)


def _early(sentence: _Sentence) -> float:
    return 1 + EARLY_GAIN * math.exp(-sentence.place / EARLY_SENTENCES)


def _scores(sentences: Sequence[_Sentence], title: set[str]) -> list[float]:
    """Return each sentence's rank in the graph of likeness, with a gain for the title's words and an early place."""
    links: list[list[tuple[int, float]]] = [[] for _ in sentences]
    for i, a in enumerate(sentences):
        for j in range(i):
            likeness = _dot(a.vector, sentences[j].vector)
            if likeness >= MIN_SIMILARITY:
                links[i].append((j, likeness))
                links[j].append((i, likeness))
    out = [sum(weight for _, weight in row) or 1.0 for row in links]
    rank = [1.0] * len(sentences)
    for _ in range(ROUNDS):
        rank = [(1 - DAMPING) + DAMPING * sum(rank[j] * w / out[j] for j, w in row) for row in links]
    return [r * _gain(sentence, title) for r, sentence in zip(rank, sentences, strict=True)]


def _gain(sentence: _Sentence, title: set[str]) -> float:
    shared = len(title & sentence.vector.keys()) / len(title) if title else 0.0
    leans = 0.7 if _LEANS_BACK.match(sentence.text) else 1.0
    return _early(sentence) * (1 + 0.5 * shared) * leans


def _chosen(sentences: Sequence[_Sentence], scores: Sequence[float], limit: int) -> list[_Sentence]:
    chosen: list[_Sentence] = []
    for i in sorted(range(len(sentences)), key=lambda i: (-scores[i], i)):
        if len(chosen) >= limit:
            break
        if all(_dot(sentences[i].vector, other.vector) < MAX_REPETITION for other in chosen):
            chosen.append(sentences[i])
    return sorted(chosen, key=lambda sentence: sentence.place)
