"""The agent as a service of its owner's system: a unit of systemd (Linux) or a job of launchd (macOS).

Either starts the agent with the machine and again when it fails, as the owner of its state folder, and with no code of
installed packages before it (`rma_core.bare`).
"""

from __future__ import annotations

import hashlib
import os
import platform
import plistlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from rma_core import bare
from rma_core.errors import NotSupported, StartFailed, UsageProblem
from rma_core.settings import FILE_VARIABLE, default_home

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: What of the environment goes along: where things are. Anything else may be a secret, or only this shell's.
KEPT = ("PATH", FILE_VARIABLE, "DOCKER_HOST", "CONTAINER_HOST", "SSL_CERT_FILE", "SSL_CERT_DIR")
#: Who wrote a unit: only such are replaced and removed.
WRITTEN = "Written by `rma agent install`; `rma agent uninstall` takes it away."
#: Seconds before a failed agent is started anew; from systemd 254 on more each time, up to the most.
RESTART_S, RESTART_MOST_S, RESTART_STEPS, STEPS_SINCE = 30, 600, 5, 254
#: How an agent ends that would end so again: wrong settings, no membership any more.
FINAL_CODES = (2, 4, 5)
#: Seconds for one command of a service manager; stopping waits for tasks besides.
COMMAND_S = 30.0
#: Seconds that a stopped agent gets beside what its settings give running tasks.
STOP_S = 60.0

SYSTEMD, LAUNCHD = "systemd", "launchd"
#: There where the machine was started by systemd.
SYSTEMD_RUNS = Path("/run/systemd/system")


class Job(NamedTuple):
    """What is to run: the state folder, its owner, the whole command line, variables, and seconds to finish tasks."""

    home: Path
    user: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    drain_s: float

    @property
    def usual(self) -> bool:
        """Whether its state folder is the one that commands go by where none is named."""
        return self.home == Path(default_home()).absolute()

    @property
    def name(self) -> str:
        """What the service is called: the usual state folder's has the plain name."""
        if self.usual:
            return "rma-agent"
        return f"rma-agent-{hashlib.sha256(os.fsencode(self.home)).hexdigest()[:8]}"


class Manager(Protocol):
    """What starts services: ``file`` is the one that it reads, ``log`` the command that shows what the agent says."""

    name: str
    file: Path
    log: str

    def text(self) -> bytes:
        """Return what the file should say."""

    def start(self) -> str:
        """Start what the file says, now and with the machine; return what the owner should know. Raises StartFailed."""

    def stop(self) -> None:
        """Stop it, and start it no more. Raises StartFailed."""

    def running(self) -> bool:
        """Whether it runs, or is about to again."""


def job(home: Path, arguments: Sequence[str], environment: Mapping[str, str], *, drain_s: float) -> Job:
    """Return the job that is `rma agent` with these arguments. Raises UsageProblem for what cannot be one."""
    home = home.absolute()
    command = tuple(bare.command("agent", "--home", str(home), *arguments))
    kept = {name: environment[name] for name in KEPT if environment.get(name)}
    if FILE_VARIABLE in kept:
        kept[FILE_VARIABLE] = str(Path(kept[FILE_VARIABLE]).expanduser().absolute())
    for value in (*command, *kept.values()):
        if re.search(r"[\x00-\x1f\x7f]", value):
            raise UsageProblem(f"{value!r} has a character that cannot stand in a service's file")
    return Job(home, _owner(home), command, kept, drain_s)


def manager_of(work: Job) -> Manager:
    """Return what starts services here. Raises NotSupported, with what to do."""
    system = platform.system()
    if system == "Darwin":
        return Launchd(work)
    if system == "Linux" and SYSTEMD_RUNS.is_dir():
        return Systemd(work)
    why = "systemd does not run here" if system == "Linux" else f"RMA knows no service manager of {system}"
    raise NotSupported(why, hints=(f"have this run when the machine starts:  {spelled(work.command)}",))


def install(manager: Manager) -> str:
    """Write the service's file and start it; return what the owner should know. Raises StartFailed, UsageProblem."""
    _ours(manager.file)
    try:
        manager.file.parent.mkdir(parents=True, exist_ok=True)
        manager.file.write_bytes(manager.text())
    except OSError as error:
        raise StartFailed(f"{manager.file} cannot be written: {error.strerror or error}") from None
    return manager.start()


def uninstall(manager: Manager) -> None:
    """Stop the service and remove its file. Raises StartFailed, UsageProblem where there is none of ours."""
    if not _ours(manager.file):
        raise UsageProblem(f"no agent is installed: there is no {manager.file}")
    manager.stop()
    manager.file.unlink(missing_ok=True)


def spelled(command: Sequence[str]) -> str:
    """Return a command line as the owner's shell takes it."""
    return subprocess.list2cmdline(command) if sys.platform == "win32" else shlex.join(command)


class Systemd:
    """A unit: of the machine where root installs it, who names its user in it; else of the user's own manager."""

    name = SYSTEMD

    def __init__(self, work: Job) -> None:
        self._job = work
        self._of_machine = _user_number() == 0
        self._unit = f"{work.name}.service"
        own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"
        self.file = (Path("/etc/systemd/system") if self._of_machine else own) / self._unit
        self.log = f"journalctl {'' if self._of_machine else '--user '}--unit {self._unit} --follow"

    def text(self) -> bytes:
        """Return the unit."""
        # Podman without root needs setuid helpers: no NoNewPrivileges. The agent makes its own children harmless.
        work = self._job
        target = ("multi-user" if self._of_machine else "default") + ".target"
        lines = [
            f"# {WRITTEN}",
            "[Unit]",
            f"Description=RMA agent ({str(work.home).replace('%', '%%')})",
            *(["Wants=network-online.target", "After=network-online.target"] if self._of_machine else []),
            "StartLimitIntervalSec=0",
            "",
            "[Service]",
            f"ExecStart={' '.join(map(_quoted_word, work.command))}",
            *(f"Environment={_quoted(f'{name}={value}')}" for name, value in work.environment.items()),
            *([f"User={work.user}"] if self._of_machine else []),
            "UMask=0077",
            "Restart=on-failure",
            f"RestartSec={RESTART_S}",
            *steps(_version()),
            f"RestartPreventExitStatus={' '.join(map(str, FINAL_CODES))}",
            "KillMode=mixed",
            f"TimeoutStopSec={work.drain_s + STOP_S:.0f}",
            "",
            "[Install]",
            f"WantedBy={target}",
        ]
        return "".join(f"{line}\n" for line in lines).encode()

    def start(self) -> str:
        """Start the unit, now and with the machine; return what keeps it from the latter. Raises StartFailed."""
        self._call("daemon-reload")
        self._call("enable", self._unit)
        self._call("restart", self._unit, within_s=COMMAND_S + self._job.drain_s + STOP_S)
        if self._of_machine:
            return ""
        lingers = _run(["loginctl", "enable-linger"], self._environment())
        if lingers.returncode == 0:
            return ""
        return f"It starts when you log in; for a start with the machine:  sudo loginctl enable-linger {self._job.user}"

    def stop(self) -> None:
        """Stop the unit, and start it no more. Raises StartFailed."""
        self._call("disable", "--now", self._unit, within_s=COMMAND_S + self._job.drain_s + STOP_S)

    def running(self) -> bool:
        """Whether the unit is active, or waits for its next start."""
        asked = _run([*self._systemctl(), "is-active", self._unit], self._environment())
        return asked.stdout.strip() in ("active", "activating", "reloading", "deactivating")

    def _systemctl(self) -> list[str]:
        return ["systemctl", *([] if self._of_machine else ["--user"]), "--no-ask-password"]

    def _environment(self) -> dict[str, str]:
        # A shell that came by `su` or `ssh -T` may not know where its user's manager listens.
        usual = f"/run/user/{_user_number()}"
        named = {} if self._of_machine or not Path(usual).is_dir() else {"XDG_RUNTIME_DIR": usual}
        return {**named, **os.environ}

    def _call(self, *arguments: str, within_s: float = COMMAND_S) -> None:
        _check([*self._systemctl(), *arguments], self._environment(), within_s)


class Launchd:
    """A job of launchd: of the machine where root installs it, who names its user in it; else of the user's session."""

    name = LAUNCHD

    def __init__(self, work: Job) -> None:
        self._job = work
        self._of_machine = _user_number() == 0
        self._label = f"org.rma.{work.name}"
        folder = Path("/Library/LaunchDaemons") if self._of_machine else Path.home() / "Library" / "LaunchAgents"
        self.file = folder / f"{self._label}.plist"
        self.log = ""

    def text(self) -> bytes:
        """Return the property list."""
        work = self._job
        keys = {
            "Label": self._label,
            "ProgramArguments": list(work.command),
            "EnvironmentVariables": dict(work.environment),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": RESTART_S,
            "ExitTimeOut": round(work.drain_s + STOP_S),
            "Umask": 0o077,
            **({"UserName": work.user} if self._of_machine else {}),
        }
        first, _, rest = plistlib.dumps(keys, sort_keys=False).partition(b"\n")
        return first + f"\n<!-- {WRITTEN} -->\n".encode() + rest

    def start(self) -> str:
        """Load the job anew. Raises StartFailed."""
        if self.running():
            self.stop()
        _check(["launchctl", "bootstrap", self._domain, str(self.file)], os.environ, COMMAND_S)
        return "" if self._of_machine else "It starts when you log in."

    def stop(self) -> None:
        """Unload the job. Raises StartFailed."""
        within_s = COMMAND_S + self._job.drain_s + STOP_S
        _check(["launchctl", "bootout", f"{self._domain}/{self._label}"], os.environ, within_s)

    def running(self) -> bool:
        """Whether the job is loaded."""
        return _run(["launchctl", "print", f"{self._domain}/{self._label}"], os.environ).returncode == 0

    @property
    def _domain(self) -> str:
        return "system" if self._of_machine else f"gui/{_user_number()}"


def _user_number() -> int:
    if sys.platform == "win32":
        return 0
    else:  # noqa: RET505 - mypy knows platforms by their branches
        return os.geteuid()


def _owner(home: Path) -> str:
    """Return the name of the user whose state folder it is, or nothing where there is none."""
    if sys.platform == "win32" or not home.exists():
        return ""
    else:  # noqa: RET505 - the same
        import pwd

        try:
            return pwd.getpwuid(home.stat().st_uid).pw_name
        except (OSError, KeyError) as error:
            raise UsageProblem(f"nobody can be found whose folder {home} is ({error})") from None


def _ours(file: Path) -> bool:
    """Whether the file is there. Raises UsageProblem where somebody else wrote it, StartFailed."""
    try:
        there = file.read_bytes()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StartFailed(f"{file} cannot be read: {error.strerror or error}") from None
    if WRITTEN.encode() not in there:
        raise UsageProblem(f"{file} was not written by `rma agent install`", hints=("move it away first",))
    return True


def _quoted(value: str) -> str:
    """Return one word of a list in a unit: no escapes, no specifiers."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _quoted_word(value: str) -> str:
    """Return one word of a unit's command line, where variables are put in for names after a dollar, too."""
    return _quoted(value).replace("$", "$$")


def _version() -> int:
    """Return systemd's version, 0 where it does not tell."""
    found = re.match(r"systemd (\d+)", _run(["systemctl", "--version"], os.environ).stdout)
    return int(found[1]) if found else 0


def steps(version: int) -> list[str]:
    """Return what makes a systemd of this version wait longer before each further start."""
    if version < STEPS_SINCE:
        return []
    return [f"RestartSteps={RESTART_STEPS}", f"RestartMaxDelaySec={RESTART_MOST_S}"]


def _run(
    command: Sequence[str], environment: Mapping[str, str], within_s: float = COMMAND_S
) -> subprocess.CompletedProcess[str]:
    """Run a service manager's command; one that cannot be had has failed."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=within_s,
            check=False,
            env=dict(environment),
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"it did not end within {within_s:.0f} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", error.strerror or str(error))


def _check(command: Sequence[str], environment: Mapping[str, str], within_s: float) -> None:
    """Run a service manager's command. Raises StartFailed with its words."""
    done = _run(command, environment, within_s)
    if done.returncode != 0:
        words = " ".join((done.stderr or done.stdout).split()) or f"ended with {done.returncode}"
        raise StartFailed(f"`{' '.join(command[:4])}` failed: {words[:500]}")
