"""A service as a process, and its wheel, for tests of the process runtime; stdlib only: pip needs no network."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from typing import TYPE_CHECKING

from rma_core.catalog import Limits, ProcessForm
from rma_core.interfaces import ContainerSpec

if TYPE_CHECKING:
    from pathlib import Path

DISTRIBUTION = "rma-tiny"
MODULE = "rma_tiny"

SOURCE = '''
import argparse, http.server, os, signal, socketserver, subprocess, sys, threading, time

MODE = os.environ.get("MODE", "")


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = repr(sorted(os.environ)).encode() if self.path == "/environment" else os.getcwd().encode()
        if self.path.startswith("/variable/"):
            body = os.environ.get(self.path.removeprefix("/variable/"), "").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

    def address_string(self):
        return "somebody"


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class PortServer(http.server.ThreadingHTTPServer):
    allow_reuse_address = False


def leave():
    """Fork twice and become the leader of a session of its own, as daemons do."""
    if os.fork():
        os.wait()
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(os.environ["PIDFILE"] + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(os.environ["PIDFILE"] + ".new", os.environ["PIDFILE"])
    if MODE == "hidden-daemon":
        os.execve("/bin/sleep", ["sleep", "1000"], {})
    while True:
        time.sleep(1)


def grow(pause_s):
    taken = []
    while True:
        taken.append(b"x" * 1_000_000)
        time.sleep(pause_s)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    print(os.environ.get("GREETING", ""))
    print(options.uds or options.port)
    if MODE == "exits":
        sys.exit(3)
    if MODE == "crashes":
        raise RuntimeError("the model file is not there")
    if MODE == "aborts":
        os.abort()
    if MODE == "port-taken":
        raise OSError(98, "Address already in use")
    if MODE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if MODE.endswith("daemon"):
        leave()
    if MODE == "gobbles":
        grow(0)
    if MODE == "bomb":
        for _ in range(40):
            subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True)
    if MODE == "loud":
        for number in range(60_000):
            print(f"line {number} " + "x" * 100)
    if MODE == "hungry":
        # So slowly that the supervisor looks while it is above its limit, and below the addresses that it may have.
        threading.Thread(target=grow, args=(0.05,), daemon=True).start()
    server = UnixServer(options.uds, Answer) if options.uds else PortServer((options.host, options.port), Answer)
    print("ready")
    server.serve_forever()


if __name__ == "__main__":
    main()
'''


def write_wheel(
    folder: Path, *, version: str = "1.0", requires: str = "", module: str = MODULE, source: str = SOURCE
) -> Path:
    """Write the wheel of a service in one module into ``folder``, as a build tool would."""
    info = f"{module}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: {version}\n"
    files = {
        f"{module}.py": source,
        f"{info}/METADATA": metadata + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={_digest(text)},{len(text.encode())}\n" for name, text in files.items())
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(name, text)
    return wheel


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def tiny_spec(
    mode: str = "",
    *,
    distribution: str = DISTRIBUTION,
    limits: Limits | None = None,
    more: dict[str, str] | None = None,
    **env: str,
) -> ContainerSpec:
    """Return the spec of the service in one of its modes."""
    return ContainerSpec(
        worker_id="worker-00000001", name="rma-tiny", service="tiny", image="rma/tiny", image_digest=None, port=8000,
        env={"MODE": mode, **env, **(more or {})}, limits=limits or Limits(), spec_hash="1",
        process=ProcessForm(distribution=distribution, module=MODULE),
    )  # fmt: skip
