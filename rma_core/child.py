"""The program a detector runs in: started by path, with a request on stdin, it answers with one line of JSON.

It makes itself harmless before anything of the plugin is imported, and ends without waiting for threads or exit
handlers that a driver has left.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

    #: What is done with a plugin: takes the request, and the answer that it fills.
    Use = Callable[[dict[str, Any], dict[str, Any]], None]

#: Past its deadline the child ends itself by a kernel timer, in case its parent has died and cannot kill it.
ORPHAN_S = 2.0
#: Shortly before its deadline it writes down where it is: the parent quotes that, and kills it.
WHERE_SHARE = 0.9
#: When this process had come so far, on its own clock.
_STARTED = time.perf_counter()


def main() -> NoReturn:
    """Read the request (where to look for modules, then JSON), use the plugin, answer, end."""
    path, _, asked = sys.stdin.buffer.read().partition(b"\n")
    answer_to = move_stdio()
    sys.path[:] = map(os.fsdecode, path.split(b"\0"))
    import msgspec

    request: dict[str, Any] = msgspec.json.decode(asked)
    _restrain(request["deadline_s"])
    answer = answer_of(request)
    with contextlib.suppress(OSError):
        write(answer_to, answer + b"\n")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(0)


def move_stdio() -> int:
    """Take the answer's pipe away from stdout, which becomes stderr, and close stdin; return the pipe."""
    answer_to = os.dup(1)
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return answer_to


def _restrain(deadline_s: float) -> None:
    """No core dumps, no crash dialogs, and an end by itself."""
    no_crash_reports()
    end_after(deadline_s + ORPHAN_S)


def no_crash_reports() -> None:
    """Crash without a core dump and without a dialog."""
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.kernel32.SetErrorMode(0x8003)
    else:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # When memory runs out, this is what can be spared first. Only Linux has it.
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:  # noqa: PTH123 - quick
            score.write("1000")


def end_after(seconds: float) -> None:
    """Have the kernel end this process then, where it can; 0 takes that back."""
    if sys.platform != "win32":
        import signal

        signal.setitimer(signal.ITIMER_REAL, seconds)


def answer_of(request: dict[str, Any]) -> bytes:
    """Use the plugin, as a detector or as the request says, and return its answer, whatever happens."""
    import faulthandler

    import msgspec

    from rma_core.errors import DetectionError, PluginInvalid
    from rma_core.host import describe, load

    answer: dict[str, Any] = {"outcome": "failed", "import_seconds": 0.0}
    try:
        use: Use = load(request["use"]) if "use" in request else detect  # type: ignore[assignment]  # ours
        if "bounds" in request:
            from rma_core.confinement import confine

            paths = request["bounds"].items()
            confine(**{name: [os.fsdecode(path.encode("latin-1")) for path in found] for name, found in paths})
        # A thread does this, and one that was there before would not be confined.
        left_s = request["deadline_s"] * WHERE_SHARE - (time.perf_counter() - _STARTED)
        faulthandler.dump_traceback_later(max(0.01, left_s), exit=False)
        use(request, answer)
        return msgspec.json.encode(answer)
    except PluginInvalid as error:
        answer |= {"outcome": "invalid", "reason": str(error)}
    except DetectionError as error:
        answer |= {"outcome": "unusable" if answer["outcome"] == "unusable" else "declined", "reason": str(error)}
    except BaseException as error:  # noqa: BLE001 - isolation boundary: a detector may raise anything, SystemExit too
        import traceback

        traceback.print_exc()
        with contextlib.suppress(Exception):
            answer["reason"] = describe(error)
    # Whatever cannot be written is in what the plugin gave.
    answer |= {"detection": None, "given": []}
    reason = str(answer.get("reason", "an exception that cannot be shown"))[:2000]
    answer["reason"] = reason.encode(errors="replace").decode()
    return msgspec.json.encode(answer)


def imported(request: dict[str, Any], answer: dict[str, Any], group: str) -> Callable[[dict[str, object]], object]:
    """Import the plugin and return its hook of ``group``; ``answer`` says how far it came."""
    from rma_core.deprecations import used_by
    from rma_core.host import bind, load

    started = time.perf_counter()
    try:
        plugin = load(request["value"])
    finally:
        answer["import_seconds"] = time.perf_counter() - started
    answer["deprecated"] = used_by(plugin)
    answer["outcome"] = "invalid"
    hook = bind(plugin, group)
    answer["outcome"] = "raised"
    return hook


def detect(request: dict[str, Any], answer: dict[str, Any]) -> None:
    """Import the detector and call it; ``answer`` always says how far it came."""
    call(imported(request, answer, "rma.detectors"), request, answer)


def call(hook: Callable[[dict[str, object]], object], request: dict[str, Any], answer: dict[str, Any]) -> None:
    """Call a detector's hook and put what it says into ``answer``."""
    import msgspec

    detection = hook(request["config"])
    answer["outcome"] = "unusable"
    _check(detection)
    answer["detection"] = msgspec.Raw(msgspec.json.encode(detection))
    answer["outcome"] = "answered"


def _check(detection: object) -> None:
    from rma_core.errors import DetectionError
    from rma_core.models.hardware import MAX_DEVICES, Detection

    if detection is None:
        raise DetectionError("returned nothing: return Detection.undetected(reason) when there is nothing to find")
    if not isinstance(detection, Detection):
        what = type(detection).__name__
        raise DetectionError(f"returned a {what}: return Detection.healthy(devices), .undetected(…) or .unhealthy(…)")
    if len(detection.devices) > MAX_DEVICES:
        raise DetectionError(f"returned {len(detection.devices):,} devices, and at most {MAX_DEVICES:,} are taken")


def write(descriptor: int, data: bytes) -> None:
    """Write all of it."""
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    main()
