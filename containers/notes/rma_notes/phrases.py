"""Key phrases: runs of content words, ranked by C-value (Frantzi, Ananiadou and Mima, 2000)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

from rma_notes.language import WORD, Stemmer, stop_words
from rma_notes.records import KeyPhrase

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

MAX_WORDS = 4
#: C-value's log2 of a phrase's words, with a little for single ones, which it leaves out.
LENGTH_WEIGHTS = {1: 0.1, 2: 1.0, 3: 1.3, 4: 1.5}
#: Phrases of a document's common words are its topic: the power of their mean frequency that counts.
COMMON_WORDS = 0.25
#: How much a phrase gains by standing in a heading or the title, and by standing early.
HEADING_GAIN, EARLY_GAIN = 0.6, 0.4
#: Longer runs of content words are lists and names of files; their parts still count.
MAX_RUN = 8
MIN_LETTERS = 3
_PIECES = re.compile(r"[^\w\s'’&/-]+|\s[-–—/&]\s|\n")  # noqa: RUF001 - the marks that books use
_CJK_RUN = re.compile(r"[\u30a0-\u30ff\u4e00-\u9fff]{2,}")
_CJK_LANGUAGES = frozenset(["zh", "ja"])
_Key = tuple[str, ...]


class _Candidate(NamedTuple):
    key: _Key
    words: tuple[str, ...]
    at: int


def key_phrases(texts: Sequence[str], *, headings: Sequence[str], language: str | None, limit: int) -> list[KeyPhrase]:
    """Return up to ``limit`` phrases of ``texts``, the best first; those in ``headings`` count more."""
    if not limit:
        return []
    finder = _Finder(language)
    found = [c for at, text in enumerate([*headings, *texts]) for c in finder.candidates(text, at)]
    if not found:
        return []
    in_headings = {c.key for text in headings for c in finder.candidates(text, 0)}
    scores = _scores(found, in_headings)
    best = _without_nested(sorted(scores, key=lambda key: (-scores[key], key)), scores, limit)
    surfaces = _surfaces(found, set(best))
    top = scores[best[0]] or 1.0
    return [KeyPhrase(phrase=surfaces[key], score=round(scores[key] / top, 4)) for key in best]


class _Finder:
    """Finds the phrases of a text, with their words brought to a common form."""

    def __init__(self, language: str | None) -> None:
        self._cjk = language in _CJK_LANGUAGES
        self._stop = stop_words(language)
        self._stem = Stemmer(language)

    def candidates(self, text: str, at: int) -> Iterator[_Candidate]:
        """Yield every run of one to four content words; ``at`` is the number of the text."""
        for run in self._runs(text):
            stems = [self._stem(word) for word in run]
            for start in range(len(run)):
                for end in range(start + 1, min(start + MAX_WORDS, len(run)) + 1):
                    yield _Candidate(tuple(stems[start:end]), tuple(run[start:end]), at)

    def _runs(self, text: str) -> Iterator[list[str]]:
        if self._cjk:
            yield from ([piece] for piece in self._cjk_pieces(text))
            return
        for piece in _PIECES.split(text):
            run: list[str] = []
            for token in piece.split():
                word = token.strip("'’&/-")  # noqa: RUF001 - as above
                if self._is_content(word):
                    run.append(word)
                elif run:
                    yield run[:MAX_RUN]
                    run = []
            if run:
                yield run[:MAX_RUN]

    def _is_content(self, word: str) -> bool:
        lower = word.lower()
        long_enough = len(word) >= MIN_LETTERS or (len(word) > 1 and word.isupper())
        whole = WORD.fullmatch(word) is not None and sum(map(str.isalpha, word)) * 2 > len(word)
        return whole and long_enough and lower not in self._stop and "_" not in word

    def _cjk_pieces(self, text: str) -> Iterator[str]:
        """Yield runs of Chinese or Japanese characters without the words that carry no topic."""
        for run in _CJK_RUN.findall(text):
            for piece in re.split("|".join(map(re.escape, self._cjk_stops())), run):
                if 2 <= len(piece) <= MAX_RUN:  # noqa: PLR2004 - one character is rarely a word
                    yield piece

    def _cjk_stops(self) -> list[str]:
        return sorted((word for word in self._stop if word.isalpha() and not word.isascii()), key=len, reverse=True)


def _scores(found: Sequence[_Candidate], in_headings: set[_Key]) -> dict[_Key, float]:
    frequency = Counter(candidate.key for candidate in found)
    first: dict[_Key, int] = {}
    for candidate in found:
        first.setdefault(candidate.key, candidate.at)
    last = max(candidate.at for candidate in found) or 1
    once_is_enough = len(found) < 400  # noqa: PLR2004 - a short text says hardly anything twice
    kept = {
        key: count
        for key, count in frequency.items()
        if count > 1 or key in in_headings or (once_is_enough and _is_alone(key, frequency))
    }
    containers = _containers(kept)
    scores: dict[_Key, float] = {}
    for key, count in kept.items():
        around = containers.get(key, [])
        nested = sum(around) / len(around) if around else 0.0
        c_value = LENGTH_WEIGHTS[len(key)] * (count - nested)
        weight = (sum(frequency[(word,)] for word in key) / len(key)) ** COMMON_WORDS
        early = 1 + EARLY_GAIN * (1 - first[key] / last)
        scores[key] = c_value * weight * early * (1 + HEADING_GAIN * (key in in_headings))
    return {key: score for key, score in scores.items() if score > 0}


def _is_alone(key: _Key, frequency: Counter[_Key]) -> bool:
    """Whether a phrase that occurs once is no accident around a shorter one that occurs more often."""
    parts = {key[i:j] for i in range(len(key)) for j in range(i + 2, len(key) + 1)} - {key}
    return len(key) < MAX_WORDS and not any(frequency[part] > 1 for part in parts)


def _containers(frequency: dict[_Key, int]) -> dict[_Key, list[int]]:
    """Return for each phrase how often each longer phrase that holds it occurs."""
    containers: dict[_Key, list[int]] = defaultdict(list)
    for key, count in frequency.items():
        inner = {key[i:j] for i in range(len(key)) for j in range(i + 1, len(key) + 1)} - {key}
        for part in inner:
            containers[part].append(count)
    return containers


def _without_nested(ranked: Iterable[_Key], scores: dict[_Key, float], limit: int) -> list[_Key]:
    """Keep the best phrases of which none is a part of another."""
    best: list[_Key] = []
    for key in ranked:
        if len(best) >= limit:
            break
        if not any(_overlaps(key, other) for other in best) and len(set(key)) == len(key):
            best.append(key)
    return best or sorted(scores)[:1]


def _overlaps(key: _Key, other: _Key) -> bool:
    shorter, longer = sorted((key, other), key=len)
    return any(longer[i : i + len(shorter)] == shorter for i in range(len(longer) - len(shorter) + 1))


def _surfaces(found: Sequence[_Candidate], wanted: set[_Key]) -> dict[_Key, str]:
    """Return how each phrase is written most often."""
    forms: dict[_Key, Counter[str]] = defaultdict(Counter)
    for candidate in found:
        if candidate.key in wanted:
            forms[candidate.key][" ".join(candidate.words)] += 1
    return {key: _commonest(forms[key]) for key in wanted}


def _commonest(forms: Counter[str]) -> str:
    lowered = Counter[str]()
    for form, count in forms.items():
        lowered[form.lower()] += count
    chosen = max(lowered, key=lambda form: (lowered[form], form))
    spellings = {form: count for form, count in forms.items() if form.lower() == chosen}
    return max(spellings, key=lambda form: (spellings[form], form.islower(), form))
