"""Every failure that RMA expects, as one tree; anything outside it is a bug and keeps its traceback.

RMAError
├── UsageProblem             the call itself is wrong (exit 2)
├── ValidationProblem        data from outside does not fit; names every problem at once
├── SettingProblem           a setting cannot be used
├── DetectionError           a detector knows why it cannot look
├── PluginError              a plugin cannot be used
│   ├── PluginConflict       two plugins give the same name
│   └── PluginInvalid        an implementation does not fit its hook
├── RuntimeFailure           a container runtime could not do what was asked
│   ├── RuntimeAbsent        the engine is not there, is down, or refuses this user
│   ├── ImageMissing         nobody has that image (no retry helps)
│   ├── ImagePullFailed      the pull broke off (a retry may help)
│   ├── ModelMissing         a model's file cannot be had, or is another one (no retry helps)
│   ├── DownloadFailed       the download of a model's file broke off (a retry may help)
│   ├── OutOfSpace           the disk is full
│   ├── PortTaken            the address is in use
│   ├── StartFailed          created but would not run
│   └── NotSupported         this runtime cannot do that
├── ConsentRefused           the machine's owner has not agreed to this
├── AgentAbsent              no agent runs on this machine with that state folder
├── Bug                      what a person is told of a failure that nobody expected
└── CoordinatorError         what a coordinator, or the way to it, answered
    ├── CoordinatorUnreachable   (exit 7)
    ├── NotAuthenticated         (exit 4)
    ├── Forbidden                (exit 5)
    ├── NotFound                 (exit 6)
    ├── Refused                  the request is wrong (exit 1)
    └── TryLater                 (exit 75)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class RMAError(Exception):
    """An expected failure with a sentence for the person and hints on what to do.

    ``code`` is a stable, machine-readable name; ``exit_code`` is what the command line ends with.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hints: Iterable[str] = ()) -> None:
        """Keep the sentence and the hints, in the order they should be tried."""
        super().__init__(message)
        self.message = message
        self.hints = tuple(hints)

    def __str__(self) -> str:
        """The sentence alone; hints are shown by whoever talks to the person."""
        return self.message


class UsageProblem(RMAError):
    """The call itself is wrong: an unknown word, two options that exclude each other."""

    code = "usage"
    exit_code = 2


class Problem(NamedTuple):
    """One thing wrong with data from outside: where (a path such as ``$.devices[2].id``) and what."""

    where: str
    what: str

    def __str__(self) -> str:
        """``where: what``."""
        return f"{self.where}: {self.what}"


class ValidationProblem(RMAError):
    """Data from outside does not fit; ``problems`` names every one of them."""

    code = "invalid"

    def __init__(self, subject: str, problems: Iterable[Problem], *, hints: Iterable[str] = ()) -> None:
        """Name what was checked (``subject``) and everything wrong with it."""
        self.subject = subject
        self.problems = tuple(problems)
        super().__init__(f"{subject}: " + "; ".join(map(str, self.problems)), hints=hints)


class SettingProblem(RMAError):
    """A setting cannot be used as it is given."""

    code = "setting"
    exit_code = 2


class DetectionError(RMAError):
    """A detector knows why it cannot look; raise it with a sentence the machine's owner can act on."""

    code = "detection"


class PluginError(RMAError):
    """A plugin cannot be used; the sentence names the plugin and its distribution."""

    code = "plugin"


class PluginConflict(PluginError):
    """Two plugins give the same name; the sentence names both distributions."""

    code = "plugin_conflict"


class PluginInvalid(PluginError):
    """A hook implementation does not fit its specification; the sentence says what to change."""

    code = "plugin_invalid"


class PluginInstallFailed(PluginError):
    """A plugin could not be fetched or unpacked; nothing has changed."""

    code = "plugin_install"


class RuntimeFailure(RMAError):
    """A container runtime could not do what was asked of it."""

    code = "runtime"


class RuntimeAbsent(RuntimeFailure):
    """The engine is not installed, is not running, or does not let this user in."""

    code = "runtime_absent"


class ImageMissing(RuntimeFailure):
    """Neither this engine nor a registry it may ask has the image; trying again does not help."""

    code = "image_missing"


class ImagePullFailed(RuntimeFailure):
    """A pull broke off; trying again later may help."""

    code = "image_pull_failed"


class ModelMissing(RuntimeFailure):
    """The file of a model cannot be had from where it should be, or is another one; trying again does not help."""

    code = "model_missing"


class DownloadFailed(RuntimeFailure):
    """The download of a model's file broke off, or did not go on; trying again later may help."""

    code = "download_failed"


class OutOfSpace(RuntimeFailure):
    """The disk the runtime writes to is full."""

    code = "out_of_space"


class PortTaken(RuntimeFailure):
    """The address to listen on is in use by something else."""

    code = "port_taken"


class StartFailed(RuntimeFailure):
    """The container or process was made but does not run; the sentence carries its last words."""

    code = "start_failed"


class NotSupported(RuntimeFailure):
    """This runtime, on this machine, cannot do what was asked."""

    code = "not_supported"


class ConsentRefused(RMAError):
    """The owner of the machine has not agreed to this service, image or runtime."""

    code = "consent"


class AgentAbsent(RMAError):
    """No agent runs on this machine with that state folder."""

    code = "no_agent"


class Bug(RMAError):
    """A failure that nobody expected, as a person is told of it; its traceback is there for who asks."""

    code = "bug"


class CoordinatorError(RMAError):
    """What a coordinator, or the way to it, answered."""

    code = "coordinator"


class CoordinatorUnreachable(CoordinatorError):
    """No coordinator answers at the address: name, network, TLS, or nobody there."""

    code = "unreachable"
    exit_code = 7


class NotAuthenticated(CoordinatorError):
    """The credential is missing, malformed, expired or unknown."""

    code = "not_authenticated"
    exit_code = 4


class Forbidden(CoordinatorError):
    """The credential is good, but does not open this."""

    code = "forbidden"
    exit_code = 5


class NotFound(CoordinatorError):
    """There is nothing of that name."""

    code = "not_found"
    exit_code = 6


class Refused(CoordinatorError):
    """The coordinator understood the request and will not do it as it is."""

    code = "refused"


class PlanChanged(Refused):
    """What was agreed to is not what it would come to now: machines came, went or changed meanwhile."""

    code = "plan_changed"


class TryLater(CoordinatorError):
    """Not now; ``retry_after_s`` says when it is worth trying again, when that is known."""

    code = "try_later"
    exit_code = 75

    def __init__(self, message: str, *, retry_after_s: float | None = None, hints: Iterable[str] = ()) -> None:
        """Keep the sentence, the hints and the wait in seconds."""
        super().__init__(message, hints=hints)
        self.retry_after_s = retry_after_s
