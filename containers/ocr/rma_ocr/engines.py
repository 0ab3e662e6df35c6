"""Which engine reads a document: the one that was asked for, or the one that knows its languages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rma_ocr import rapid, tesseract
from rma_service.problems import BadOptions

if TYPE_CHECKING:
    from rma_ocr.options import Options
    from rma_ocr.records import EngineName

#: What Tesseract reads where no language is named, if it has data for it.
DEFAULT_LANGUAGE = "eng"


def described() -> dict[str, Any]:
    """Return every engine there is here, with its version and languages."""
    described: dict[str, Any] = {"rapidocr": {"version": rapid.engine_version(), "languages": rapid.LANGUAGES}}
    if found := tesseract.installed():
        described["tesseract"] = {"version": found.version, "languages": found.languages}
    return described


def chosen(options: Options) -> tuple[EngineName, tuple[str, ...]]:
    """Return the engine and the languages it is told; raises BadOptions, which says what there is."""
    found = tesseract.installed()
    has: dict[EngineName, tuple[str, ...]] = {"rapidocr": rapid.LANGUAGES}
    if found is not None:
        has["tesseract"] = found.languages
    if options.engine == "tesseract" and found is None:
        raise BadOptions({"engine": "Tesseract is not installed on the worker that answered; rapidocr is"})
    names: tuple[EngineName, ...] = ("rapidocr", "tesseract")
    for name in names:
        wanted = options.engine in ("auto", name)
        if wanted and name in has and not set(options.languages) - set(has[name]):
            return name, options.languages or _default(name, has[name])
    raise BadOptions(
        {"languages": "; ".join(_lacks(name, has[name], options) for name in has if options.engine in ("auto", name))}
    )


def _default(name: EngineName, languages: tuple[str, ...]) -> tuple[str, ...]:
    """Return what an engine is told where the client names nothing; RapidOCR reads all of its languages at once."""
    if name == "rapidocr":
        return ()
    return (DEFAULT_LANGUAGE,) if DEFAULT_LANGUAGE in languages else languages[:1]


def _lacks(name: EngineName, languages: tuple[str, ...], options: Options) -> str:
    missing = [language for language in options.languages if language not in languages]
    return f"{name} cannot read {', '.join(missing)}; it reads {', '.join(languages)}"
