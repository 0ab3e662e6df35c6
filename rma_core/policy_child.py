"""The program that a plugin's tier policies live in: started by path, it says which it has, then answers one by one.

Lines on stdin: where to look for modules, a `Request`, then a `Question` per machine. Lines on the pipe that is stdout
at the start: what `rma_core.child` answers, then an `Answer` per question, each as soon as it is known, so that whoever
asks knows on which machine a policy hangs or dies. It ends with its stdin, and takes along what a policy has started.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rma_core.interfaces import TierPolicy
    from rma_core.policy_process import Answer, Question

#: How it ends where its memory has run out.
OUT_OF_MEMORY = 97
#: Past a deadline it is killed by whoever asks; if that one is gone too, by the kernel after so many seconds more.
ORPHAN_S = 8.0
#: A summary and the words of an exception are cut to this.
CHARACTERS = 1500


def main() -> NoReturn:
    """Say which policies there are, then answer until nobody asks any more."""
    asking = os.fdopen(os.dup(0), "rb")
    path = asking.readline().rstrip(b"\n")
    given = [os.fsdecode(entry) for entry in path.split(b"\0")]
    # A distribution that was installed since whoever asks has started may have put its folder on the path.
    sys.path[:] = given + [entry for entry in sys.path if entry not in given]
    import msgspec

    from rma_core import child

    answer_to = child.move_stdio()
    request: dict[str, Any] = msgspec.json.decode(asking.readline())
    child.no_crash_reports()
    child.end_after(request["deadline_s"] + ORPHAN_S)
    hello = child.answer_of(request)
    _end()
    child.write(answer_to, hello + b"\n")
    policies: dict[str, TierPolicy] = request.get("policies", {})
    if policies:
        from rma_core.policy_process import Question

        read = msgspec.json.Decoder(Question).decode
        for line in asking:
            child.write(answer_to, msgspec.json.encode(_answer(policies, read(line))) + b"\n")
    _leave()


def limit_memory(most: int) -> None:
    """Take no more memory than this for data, where the system has such a limit (Linux)."""
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard == resource.RLIM_INFINITY or hard > most:
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def offer(request: dict[str, Any], answer: dict[str, Any]) -> None:
    """Import the plugin and keep its policies in the request; ``answer`` says how far it came, then their names."""
    from rma_core.child import imported
    from rma_core.errors import PluginInvalid
    from rma_core.offers import offers

    # After it was confined, which has a limit too.
    limit_memory(request["memory_bytes"])
    hook = imported(request, answer, "rma.policies")
    policies: list[TierPolicy] = offers(hook(request["config"]), "rma_tier_policies")
    answer["outcome"] = "invalid"
    named = {policy.name: policy for policy in policies}
    if len(named) < len(policies):
        names = sorted(policy.name for policy in policies)
        raise PluginInvalid(f"rma_tier_policies gives two policies of one name: {', '.join(names)}")
    answer["given"] = [{"name": name, "summary": policy.summary[:CHARACTERS]} for name, policy in named.items()]
    answer["outcome"] = "answered"
    request["policies"] = named


def _answer(policies: dict[str, TierPolicy], question: Question) -> Answer:
    from rma_core.offers import decision
    from rma_core.policy_process import Answer

    _begin(question.deadline_s)
    try:
        found = decision(policies[question.policy].decide(question.asked))
        return Answer(tier=found.tier, reason=found.reason, prefers=found.prefers)
    except MemoryError:
        # Whatever it holds is gone with this process only.
        os._exit(OUT_OF_MEMORY)
    except BaseException as error:  # noqa: BLE001 - isolation boundary: a policy may raise anything, SystemExit too
        return Answer(tier=None, error=words_of(error))
    finally:
        _end()


def words_of(error: BaseException) -> str:
    """Return an exception with its type, in words that can be written."""
    try:
        words = f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - isolation boundary: its text is a stranger's code too
        words = f"{type(error).__name__}, which cannot be shown"
    return words.encode(errors="replace").decode()[:CHARACTERS]


def _begin(deadline_s: float) -> None:
    """From now on time counts: where it is then is written down, and if nobody ends it, the kernel does."""
    from rma_core import child

    faulthandler.dump_traceback_later(deadline_s * child.WHERE_SHARE, exit=False)
    child.end_after(deadline_s + ORPHAN_S)


def _end() -> None:
    from rma_core import child

    child.end_after(0)
    faulthandler.cancel_dump_traceback_later()


def _leave() -> NoReturn:
    """End at once, with everything in this session; threads and exit handlers are not waited for."""
    if sys.platform != "win32" and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main()
