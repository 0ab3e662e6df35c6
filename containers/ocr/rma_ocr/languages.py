"""Names of languages: Tesseract's, which are ISO 639-2 with a suffix for a script; ISO 639-1 is understood too."""

from __future__ import annotations

#: What the model that comes with RapidOCR (PP-OCRv6 small) reads, all of it at once, by ISO 639-1 where there is one.
RAPIDOCR = {
    "af": "afr", "az": "aze", "bs": "bos", "ca": "cat", "cs": "ces", "cy": "cym", "da": "dan", "de": "deu",
    "en": "eng", "es": "spa", "et": "est", "eu": "eus", "fi": "fin", "fr": "fra", "ga": "gle", "gl": "glg",
    "hr": "hrv", "hu": "hun", "id": "ind", "is": "isl", "it": "ita", "ja": "jpn", "ku": "kmr", "la": "lat",
    "lb": "ltz", "lt": "lit", "lv": "lav", "mi": "mri", "ms": "msa", "mt": "mlt", "nl": "nld", "no": "nor",
    "oc": "oci", "pl": "pol", "pt": "por", "qu": "que", "rm": "roh", "ro": "ron", "sk": "slk", "sl": "slv",
    "sq": "sqi", "sv": "swe", "sw": "swa", "tl": "tgl", "tr": "tur", "uz": "uzb", "vi": "vie", "zh": "chi_sim",
    "zh-hans": "chi_sim", "zh-hant": "chi_tra", "sr-latn": "srp_latn",
}  # fmt: skip
#: Further names that Tesseract may have data for.
OTHERS = {
    "ar": "ara", "be": "bel", "bg": "bul", "bn": "ben", "el": "ell", "eo": "epo", "fa": "fas", "gu": "guj",
    "he": "heb", "hi": "hin", "hy": "hye", "ka": "kat", "kk": "kaz", "km": "khm", "kn": "kan", "ko": "kor",
    "lo": "lao", "mk": "mkd", "ml": "mal", "mn": "mon", "mr": "mar", "my": "mya", "nb": "nor", "ne": "nep",
    "nn": "nor", "pa": "pan", "ru": "rus", "si": "sin", "sr": "srp", "ta": "tam", "te": "tel", "tg": "tgk",
    "th": "tha", "uk": "ukr", "ur": "urd", "yi": "yid",
}  # fmt: skip
_SHORT = {**OTHERS, **RAPIDOCR}
MAX_LANGUAGES = 8


def read(value: object) -> tuple[str, ...]:
    """Read names with ``+`` or commas between them; returns them as Tesseract names them, each once."""
    told = value if isinstance(value, str) else ""
    # In a query an unescaped plus is a space.
    words = told.replace("+", " ").replace(",", " ").split()
    names = tuple(dict.fromkeys(_SHORT.get(word.lower(), word) for word in words))
    odd = [name for name in names if not name.replace("_", "").replace("/", "").isalnum() or name.startswith("/")]
    if not 1 <= len(names) <= MAX_LANGUAGES or odd or len(told) > 20 * MAX_LANGUAGES:
        raise ValueError(f"one to {MAX_LANGUAGES} names with + between them are expected, like eng+deu")
    return names
