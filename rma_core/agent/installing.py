"""The agent as a service of its owner's system: a unit of systemd (Linux) or a job of launchd (macOS).

Either starts the agent with the machine and again when it fails, as the owner of its state folder, and with no start-up
code of installed packages before it (`rma_core.bare`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import plistlib
import re
import shlex
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from rma_core import bare, own_files
from rma_core.errors import NotSupported, StartFailed, UsageProblem
from rma_core.platforms import DEVICE_VARIABLES
from rma_core.settings import FILE_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: What of the environment goes along: where things are, by names that may be relative to where the owner is now, …
PLACES = (FILE_VARIABLE, "SSL_CERT_FILE", "SSL_CERT_DIR")
#: … and what drivers and engines go by. Anything else may be a secret, or only this shell's.
KEPT = ("PATH", "DOCKER_HOST", "DOCKER_CONTEXT", "CONTAINER_HOST", "LD_LIBRARY_PATH", *DEVICE_VARIABLES)
#: The way out, which goes along unless there is a password in it.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy")
#: Who wrote a unit: only such are replaced and removed.
WRITTEN = "Written by `rma agent install`; `rma agent uninstall` takes it away."
#: Seconds before a failed agent is started anew; from systemd 254 on more each time, up to the most.
RESTART_S, RESTART_MOST_S, RESTART_STEPS, STEPS_SINCE = 60, 900, 5, 254
#: Seconds that an agent gets to stop: an hour is the most that settings may give running tasks.
STOP_S = 3660
#: Seconds for one command of a service manager that waits for no agent.
COMMAND_S = 30.0
#: Seconds in which a user's own manager has started, or a job has gone; and how often that is looked for.
PATIENCE_S, LOOK_S = 15.0, 0.25
#: There where the machine was started by systemd.
SYSTEMD_RUNS = Path("/run/systemd/system")


class Job(NamedTuple):
    """What is to run: the state folder, the whole command line, and its environment."""

    home: Path
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}

    @property
    def usual(self) -> bool:
        """Whether its state folder is the one that commands go by where none is named."""
        return self.home == _own_home() / ".rma"

    @property
    def name(self) -> str:
        """What the service is called: the usual state folder's has the plain name."""
        return "rma-agent" if self.usual else f"rma-agent-{hashlib.sha256(os.fsencode(self.home)).hexdigest()[:8]}"


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
        """Stop it, and start it no more; one that it does not know is stopped. Raises StartFailed."""

    def forget(self) -> None:
        """Take in that the file is gone."""

    def runs(self) -> bool:
        """Whether it runs right now."""


def place(home: Path) -> Job:
    """Return the job of a state folder as far as it has a name. Raises UsageProblem where it is not this user's."""
    return Job(_belonging(home.absolute()))


def job(home: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> Job:
    """Return the job that is `rma agent` with these arguments. Raises UsageProblem for what cannot be one."""
    home = place(home).home
    command = tuple(bare.command("agent", "--home", str(home), *arguments))
    named = {name: environment[name] for name in (*KEPT, *PLACES, *PROXIES) if environment.get(name)}
    kept = {name: value for name, value in named.items() if name not in PROXIES or "@" not in value}
    kept |= {name: str(Path(kept[name]).expanduser().absolute()) for name in PLACES if name in kept}
    for value in (*command, *kept.values()):
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", value):
            raise UsageProblem(f"{value!r} has a character that cannot stand in a service's file")
    if "$" in command[0]:
        raise UsageProblem(f"{command[0]} has a $, with which systemd cannot start it: install RMA elsewhere")
    return Job(home, command, kept)


def manager_of(work: Job) -> Manager:
    """Return what starts services here. Raises NotSupported, with what to do."""
    system = platform.system()
    if system == "Darwin":
        return Launchd(work)
    if system == "Linux" and SYSTEMD_RUNS.is_dir():
        return Systemd(work)
    why = "systemd does not run here" if system == "Linux" else f"RMA knows no service manager of {system}"
    do = (f"have this run when the machine starts:  {spelled(work.command)}",) if work.command else ()
    raise NotSupported(why, hints=do)


def install(manager: Manager, works: Callable[[], None]) -> str:
    """Write the service's file, start it, and wait until it ``works``; return what the owner should know.

    What fails is taken back, and what was installed before runs again. Raises StartFailed, UsageProblem.
    """
    before = manager.file.read_bytes() if ours(manager.file) else b""
    try:
        manager.file.parent.mkdir(parents=True, exist_ok=True)
        own_files.replace(manager.file, manager.text())
    except OSError as error:
        raise StartFailed(f"{manager.file} cannot be written: {error.strerror or error}") from None
    try:
        hint = manager.start()
        works()
    except BaseException:
        with contextlib.suppress(StartFailed, OSError):
            if before:
                own_files.replace(manager.file, before)
                manager.start()
            else:
                uninstall(manager)
        raise
    return hint


def uninstall(manager: Manager) -> None:
    """Stop the service and remove its file. Raises StartFailed, UsageProblem where there is none of ours."""
    if not ours(manager.file):
        raise UsageProblem(f"no agent is installed: there is no {manager.file}")
    try:
        manager.stop()
    except StartFailed as error:
        raise StartFailed(f"{error}; {manager.file} is gone, and what runs may go on until the machine stops") from None
    finally:
        manager.file.unlink(missing_ok=True)
        manager.forget()


def ours(file: Path) -> bool:
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


def spelled(command: Sequence[str]) -> str:
    """Return a command line as the owner's shell takes it."""
    return subprocess.list2cmdline(command) if sys.platform == "win32" else shlex.join(command)


class Systemd:
    """A unit: of the machine where root installs it, else of the user's own manager."""

    name = "systemd"

    def __init__(self, work: Job) -> None:
        self._job = work
        self._of_machine = _user_number() == 0
        self._unit = f"{work.name}.service"
        # What a shell says of its configuration's folder, the user's manager does not know.
        folder = Path("/etc") if self._of_machine else _own_home() / ".config"
        self.file = folder / "systemd" / ("system" if self._of_machine else "user") / self._unit
        self.log = f"journalctl {'' if self._of_machine else '--user '}--unit {self._unit}"

    def text(self) -> bytes:
        """Return the unit."""
        # Containers outlive an agent that dies, and the next one takes them over: systemd ends nothing but the agent.
        # Podman without root needs setuid helpers: no NoNewPrivileges. The agent makes its own children harmless.
        work = self._job
        lines = [
            f"# {WRITTEN}",
            "[Unit]",
            f"Description=RMA agent ({str(work.home).replace('%', '%%')})",
            *(["Wants=network-online.target", "After=network-online.target"] if self._of_machine else []),
            "StartLimitIntervalSec=0",
            "",
            "[Service]",
            "Type=exec",
            f"ExecStart={' '.join(map(_quoted_word, work.command))}",
            *(f"Environment={_quoted(f'{name}={value}')}" for name, value in work.environment.items()),
            "UMask=0077",
            "Restart=on-failure",
            f"RestartSec={RESTART_S}",
            *steps(_version()),
            "KillMode=process",
            f"TimeoutStopSec={STOP_S}",
            "",
            "[Install]",
            f"WantedBy={'multi-user' if self._of_machine else 'default'}.target",
        ]
        return "".join(f"{line}\n" for line in lines).encode()

    def start(self) -> str:
        """Start the unit, now and with the machine; return what keeps it from the latter. Raises StartFailed."""
        # Before all else: that also starts the manager of a user who is not logged in.
        lingers = self._of_machine or _run(["loginctl", "enable-linger"], os.environ).returncode == 0
        deadline = time.monotonic() + (0 if self._of_machine else PATIENCE_S)
        while self._run("daemon-reload").returncode != 0 and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        self._call("daemon-reload")
        self._call("enable", self._unit)
        self._call("restart", self._unit, within_s=COMMAND_S + STOP_S)
        return "" if lingers else "It starts when you log in; for a start with the machine:  loginctl enable-linger"

    def stop(self) -> None:
        """Stop the unit, and start it no more. Raises StartFailed."""
        if self._run("cat", self._unit).returncode == 0:
            self._call("disable", "--now", self._unit, within_s=COMMAND_S + STOP_S)

    def forget(self) -> None:
        """Have systemd look at its files again, and not speak of the unit any more."""
        self._run("daemon-reload")
        self._run("reset-failed", self._unit)

    def runs(self) -> bool:
        """Whether the unit is active."""
        return self._run("is-active", self._unit).stdout.strip() in ("active", "deactivating")

    def _run(self, *arguments: str, within_s: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        return _run(self._systemctl(*arguments), self._environment(), within_s)

    def _call(self, *arguments: str, within_s: float = COMMAND_S) -> None:
        _check(self._systemctl(*arguments), self._environment(), within_s)

    def _systemctl(self, *arguments: str) -> list[str]:
        return ["systemctl", *([] if self._of_machine else ["--user"]), "--no-ask-password", *arguments]

    def _environment(self) -> dict[str, str]:
        # A shell that came by `su` or `sudo` may know none, or that of somebody else.
        return {**os.environ, **({} if self._of_machine else {"XDG_RUNTIME_DIR": f"/run/user/{_user_number()}"})}


class Launchd:
    """A job of launchd: of the machine where root installs it, else of the user's session."""

    name = "launchd"

    def __init__(self, work: Job) -> None:
        self._job = work
        self._of_machine = _user_number() == 0
        self._label = f"org.rma.{work.name}"
        folder = Path("/Library/LaunchDaemons") if self._of_machine else _own_home() / "Library" / "LaunchAgents"
        self.file = folder / f"{self._label}.plist"
        self.log = ""

    def text(self) -> bytes:
        """Return the property list."""
        keys = {
            "Label": self._label,
            "ProgramArguments": list(self._job.command),
            "EnvironmentVariables": dict(self._job.environment),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": RESTART_S,
            "ExitTimeOut": STOP_S,
            "Umask": 0o077,
        }
        first, _, rest = plistlib.dumps(keys, sort_keys=False).partition(b"\n")
        return first + f"\n<!-- {WRITTEN} -->\n".encode() + rest

    def start(self) -> str:
        """Load the job anew. Raises StartFailed."""
        self.stop()
        _check(["launchctl", "bootstrap", self._domain, str(self.file)], os.environ, COMMAND_S)
        return "" if self._of_machine else "It starts when you log in."

    def stop(self) -> None:
        """Unload the job, and wait until it is gone. Raises StartFailed."""
        if not self._loaded():
            return
        _check(["launchctl", "bootout", f"{self._domain}/{self._label}"], os.environ, COMMAND_S + STOP_S)
        deadline = time.monotonic() + PATIENCE_S
        while self._loaded() and time.monotonic() < deadline:
            time.sleep(LOOK_S)

    def forget(self) -> None:
        """Do nothing: what is unloaded is forgotten."""

    def runs(self) -> bool:
        """Whether the job runs."""
        return "state = running" in self._asked().stdout

    def _loaded(self) -> bool:
        return self._asked().returncode == 0

    def _asked(self) -> subprocess.CompletedProcess[str]:
        return _run(["launchctl", "print", f"{self._domain}/{self._label}"], os.environ)

    @property
    def _domain(self) -> str:
        return "system" if self._of_machine else f"gui/{_user_number()}"


def _user_number() -> int:
    if sys.platform == "win32":
        return 0
    else:  # noqa: RET505 - mypy knows platforms by their branches
        return os.geteuid()


def _own_home() -> Path:
    """Return the user's home folder, whatever a shell says: it is where service managers look."""
    if sys.platform == "win32":
        return Path.home()
    else:  # noqa: RET505 - the same
        import pwd

        try:
            return Path(pwd.getpwuid(os.geteuid()).pw_dir)
        except KeyError:
            return Path.home()


def _belonging(home: Path) -> Path:
    """Return the state folder, which has to be this user's; root's may not be where anybody else could replace it.

    Raises UsageProblem.
    """
    if sys.platform == "win32" or not home.exists():
        return home
    else:  # noqa: RET505 - the same
        me = os.geteuid()
        if home.stat().st_uid != me:
            raise UsageProblem(
                f"the state folder {home} belongs to another user", hints=("let that user type `rma agent install`",)
            )
        if me != 0:
            return home
        home = home.resolve()
        for number, part in enumerate((home, *home.parents)):
            found = part.stat()
            # In a folder like /tmp nobody can replace what is somebody else's.
            open_to_all = found.st_mode & 0o022 and not (number and found.st_mode & stat.S_ISVTX)
            if found.st_uid != 0 or open_to_all:
                raise UsageProblem(
                    f"{part} can be changed by other users, who could make root run anything in {home}",
                    hints=("give root's agent a folder below /root or /var/lib", "better: a user of its own"),
                )
        return home


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
        raise StartFailed(f"`{spelled(command)}` failed: {words[:500]}")
