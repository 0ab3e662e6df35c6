"""The agent's state folder: the device key, what was agreed with which coordinator, and the lock on both.

The folder is 0700 and its files 0600. A file is replaced as a whole (temporary file, fsync, rename, fsync of the
folder), so that a power cut leaves the old one or the new one. On Windows the profile's own permissions protect it.
"""

from __future__ import annotations

import os
import stat
import sys
from typing import IO, TYPE_CHECKING

import msgspec

from rma_core import own_files
from rma_core.agent.consent import Consent
from rma_core.agent.keys import DeviceKey
from rma_core.errors import SettingProblem, ValidationProblem
from rma_core.models.strict import decode
from rma_core.models.worker import WorkerId

if TYPE_CHECKING:
    from pathlib import Path

KEY_FILE = "device.key"
RECORD_FILE = "worker.json"
LOCK_FILE = "agent.lock"
#: There while the owner wants the machine back for now.
PAUSE_FILE = "paused.json"
#: Where downloaded files of models lie.
MODELS_FOLDER = "models"
#: Nothing the agent keeps is larger; more is a broken or foreign file.
MAX_FILE_BYTES = 1024 * 1024


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whom this machine works for: ``certificate`` is the pinned one (PEM), empty for a publicly trusted one."""

    worker_id: WorkerId
    coordinator_url: str
    certificate: str = ""
    insecure_http: bool = False
    consent: Consent = msgspec.field(default_factory=Consent)


class StateFolder:
    """One agent's folder; nothing in it is read or written before `prepare`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[bytes] | None = None

    def prepare(self) -> None:
        """Make the folder, or close one that others can read. Raises SettingProblem."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._close()
        except OSError as error:
            raise SettingProblem(
                f"the state folder {self.path} cannot be used: {error.strerror or error}",
                hints=("RMA_HOME names another one",),
            ) from None

    def check_owner(self) -> None:
        """Raise SettingProblem where the folder is another user's: not even its settings are to be gone by."""
        if sys.platform != "win32" and self.path.exists() and self.path.stat().st_uid != os.geteuid():
            raise SettingProblem(
                f"the state folder {self.path} belongs to another user", hints=("RMA_HOME names another one",)
            )

    def _close(self) -> None:
        if sys.platform != "win32":
            self.check_owner()
            if stat.S_IMODE(self.path.stat().st_mode) & 0o077:
                self.path.chmod(0o700)

    def lock(self) -> None:
        """Claim the folder for this process, until `unlock` or its end. Raises SettingProblem when it is taken."""
        handle = (self.path / LOCK_FILE).open("a+b")
        if not _claim(handle):
            handle.seek(0)
            pid = handle.read(32).decode(errors="replace").strip()
            handle.close()
            who = f" (process {pid})" if pid else ""
            raise SettingProblem(
                f"another agent{who} already runs with the state folder {self.path}",
                hints=("`rma status` shows it", "RMA_HOME gives a second agent a folder of its own"),
            )
        handle.truncate(0)
        handle.write(str(os.getpid()).encode())
        handle.flush()
        self._lock = handle

    def unlock(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def load_key(self) -> DeviceKey | None:
        """Return the device key, or ``None`` before enrolment. Raises SettingProblem for one that others can read."""
        path = self.path / KEY_FILE
        data = self._read(path)
        if data is None:
            return None
        if sys.platform != "win32" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise SettingProblem(
                f"the device key {path} can be read by others, so it may have been copied",
                hints=(f"if that cannot be: chmod 600 {path}", "otherwise: `rma leave`, then join again"),
            )
        return DeviceKey.from_pem(data)

    def save_key(self, key: DeviceKey) -> None:
        """Keep a new device key."""
        self.write(KEY_FILE, key.to_pem())

    def load_record(self) -> WorkerRecord | None:
        """Return whom this machine works for, or ``None`` before enrolment. Raises SettingProblem."""
        path = self.path / RECORD_FILE
        data = self._read(path)
        if data is None:
            return None
        try:
            return decode(data, WorkerRecord, subject=str(path))
        except ValidationProblem as error:
            raise SettingProblem(str(error), hints=(f"remove {path} and join again",)) from None

    def save_record(self, record: WorkerRecord) -> None:
        """Keep whom this machine works for."""
        self.write(RECORD_FILE, msgspec.json.format(msgspec.json.encode(record), indent=1))

    def forget(self) -> None:
        """Remove key, record and pause: this machine is nobody's worker any more."""
        for name in (RECORD_FILE, KEY_FILE, PAUSE_FILE):
            (self.path / name).unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Replace one file as a whole, readable by its owner only. Raises SettingProblem."""
        try:
            own_files.replace(self.path / name, data)
        except OSError as error:
            raise SettingProblem(f"{self.path / name} cannot be written: {error.strerror or error}") from None

    def read(self, name: str) -> bytes | None:
        """Return one file of the folder, ``None`` where it is not there. Raises SettingProblem."""
        return self._read(self.path / name)

    def remove(self, name: str) -> None:
        """Remove one file of the folder; one that is not there is no error."""
        (self.path / name).unlink(missing_ok=True)

    def _read(self, path: Path) -> bytes | None:
        try:
            with path.open("rb") as handle:
                data = handle.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SettingProblem(f"{path} cannot be read: {error.strerror or error}") from None
        if len(data) > MAX_FILE_BYTES:
            raise SettingProblem(f"{path} is larger than anything the agent keeps")
        return data


def _claim(handle: IO[bytes]) -> bool:
    """Lock an open file without waiting; the lock dies with the process."""
    try:
        if sys.platform == "win32":
            import msvcrt

            # A byte far behind the end, so that the process id at the start stays readable for the other agent.
            handle.seek(MAX_FILE_BYTES)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
