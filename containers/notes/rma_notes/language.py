"""Which language a text is in, told by its script and its commonest words; and those words."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import snowballstemmer  # type: ignore[import-untyped]  # it ships no annotations
import stopwordsiso


def word_set(text: str) -> frozenset[str]:
    """Return the words of ``text`` as a set."""
    return frozenset(text.split())


WORD = re.compile(r"[^\W\d_](?:[\w'’-]*\w)?")  # noqa: RUF001 - the apostrophe that books use
#: More of a text tells no more about its language.
SAMPLE_CHARACTERS = 20_000
#: Fewer hits say nothing; below this share of all words it is a list of names, or code.
MIN_HITS, MIN_SHARE = 3, 0.08
_LATIN = ["en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "no", "fi", "pl", "cs", "sk", "hu", "ro", "tr", "id"]
_CYRILLIC = ["ru", "uk", "bg"]
#: Function words have few letters; long entries in the lists are topics that got in.
_SHORT = 5
_SCRIPTS = {
    "ja": re.compile(r"[\u3040-\u30ff]"),
    "ko": re.compile(r"[\uac00-\ud7af]"),
    "zh": re.compile(r"[\u4e00-\u9fff]"),
    "th": re.compile(r"[\u0e00-\u0e7f]"),
    "ar": re.compile(r"[\u0600-\u06ff]"),
    "he": re.compile(r"[\u0590-\u05ff]"),
    "hi": re.compile(r"[\u0900-\u097f]"),
    "el": re.compile(r"[\u0370-\u03ff]"),
    "hy": re.compile(r"[\u0530-\u058f]"),
}
_SCRIPT_SHARE = 0.15
_CYRILLIC_LETTER = re.compile(r"[\u0400-\u04ff]")
_STEMMERS = {
    "ar": "arabic", "da": "danish", "de": "german", "el": "greek", "en": "english", "es": "spanish", "fi": "finnish",
    "fr": "french", "hi": "hindi", "hu": "hungarian", "hy": "armenian", "id": "indonesian", "it": "italian",
    "nl": "dutch", "no": "norwegian", "pl": "polish", "pt": "portuguese", "ro": "romanian", "ru": "russian",
    "sv": "swedish", "tr": "turkish",
}  # fmt: skip
#: The English list has nouns that phrases are made of ("operating system", "line number"); these stay words.
_ENGLISH_CONTENT = word_set(
    """
    act area areas backing bill bottom case cases cause changes clear computer contains copy cost date detail
    differ end ends face faces fact facts fill find finds fire front full fully general group grouped
    grouping groups help high higher home homepage html index info information interest interested interesting
    interests keep keeps large largely line long member members million move name
    needs net network new newer number numbers office old older open opened opening opens order ordered
    ordering orders page pages part parted parting parts place places point pointed pointing points present
    presented presenting presents primarily problem problems ran research result results resulting right room
    rooms run section sections sensible serious side sides site small smaller state states system systems test
    text top turn turned turning turns volume web websites work worked working works world year
    years young younger
    """
)
_ENGLISH_VERBS = word_set(
    """
    allows apply applied based called consider considered contain contained create created define defined
    describe described describes different example examples existing following follows given gives include
    included includes including make makes may must need needed note obtain obtained please possible provide
    provided provides return returned returns see set sets several shown similar specific specified specify
    support supported supports typically use used useful user-defined uses using various via want etc fig figure
    table section chapter page available additionally respectively within without according corresponding e.g
    i.e
    """
)


def detect(text: str) -> str | None:
    """Return the ISO 639-1 code of the language of ``text``, None where it does not tell."""
    sample = text[:SAMPLE_CHARACTERS]
    letters = sum(map(str.isalpha, sample)) or 1
    for code, pattern in _SCRIPTS.items():
        if len(pattern.findall(sample)) / letters > _SCRIPT_SHARE:
            return code
    cyrillic = len(_CYRILLIC_LETTER.findall(sample)) / letters > 1 / 2
    words = Counter(WORD.findall(sample.lower()))
    total = sum(words.values())
    hits = {code: _weight(words, code) for code in (_CYRILLIC if cyrillic else _LATIN)}
    best = max(hits, key=lambda code: hits[code])
    known = sum(count for word, count in words.items() if word in _function_words(best))
    return best if known >= MIN_HITS and known / total >= MIN_SHARE else None


def _weight(words: Counter[str], code: str) -> float:
    """Return how often words of ``code`` occur; a word that several languages have counts less."""
    own = _function_words(code)
    return sum(count / _sharers(word) for word, count in words.items() if word in own)


@cache
def _function_words(code: str) -> frozenset[str]:
    return frozenset(word for word in stopwordsiso.stopwords(code) if len(word) <= _SHORT and word.isalpha())


@cache
def _sharers(word: str) -> int:
    return sum(word in _function_words(code) for code in _LATIN + _CYRILLIC)


@cache
def stop_words(code: str | None) -> frozenset[str]:
    """Return the words of a language that carry no topic; English ones where the language is not known."""
    code = code if code and stopwordsiso.has_lang(code) else "en"
    words = frozenset(stopwordsiso.stopwords(code))
    return (words - _ENGLISH_CONTENT) | _ENGLISH_VERBS if code == "en" else words


class Stemmer:
    """Brings the forms of a word together ("worker", "workers"), as far as there are rules for its language."""

    def __init__(self, code: str | None) -> None:
        """Take the rules of the language ``code``."""
        name = _STEMMERS.get(code or "")
        self._stem = cache(snowballstemmer.stemmer(name).stemWord) if name else str

    def __call__(self, word: str) -> str:
        """Return what all forms of ``word`` have in common."""
        return str(self._stem(word.lower()))
