"""Images to test with, made without any registry: ``python tests/base_image.py [--engine docker|podman] [NAME …]``.

``rma-test/base:bookworm`` is a small Debian 12 with Python, as a base for the services' images. debootstrap makes it
from the packages apt is set up for on this machine (root, 40 s), and keeps it in ``$XDG_CACHE_HOME/rma-tests``.
``rma-test/base-tesseract:bookworm`` is the same with Tesseract, so that the image of `ocr` is built without a network.
``rma-test/busybox`` is one static program of 2 MB whose httpd answers ``/health`` on port 8000, for everything that
needs a container and not what is in it. None says where its packages came from. Standard library only.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BASE = "rma-test/base:bookworm"
BASE_TESSERACT = "rma-test/base-tesseract:bookworm"
BUSYBOX = "rma-test/busybox:latest"
#: The release of BASE.
RELEASE = "bookworm"
#: What BASE has beyond the smallest Debian, and what BASE_TESSERACT has beyond BASE.
PACKAGES = ("ca-certificates", "python3", "python3-venv")
TESSERACT_PACKAGES = ("tesseract-ocr", "tesseract-ocr-eng", "tesseract-ocr-osd")
#: Seconds for debootstrap; 40 are usual.
DEBOOTSTRAP_S = 900.0
#: Seconds for anything else.
CALL_S = 300.0
#: Left out: caches and lists (they name the mirror), documents and translations (a third of all), and what an engine
#: mounts itself.
LEFT_OUT = (
    "./dev/*",
    "./etc/apt/sources.list",
    "./etc/hostname",
    "./etc/resolv.conf",
    "./proc/*",
    "./sys/*",
    "./tmp/*",
    "./usr/share/doc/*",
    "./usr/share/locale/*",
    "./usr/share/man/*",
    "./var/cache/apt/*",
    "./var/lib/apt/lists/*",
    "./var/log/*",
)
BUSYBOX_APPLETS = ("cat", "echo", "httpd", "id", "kill", "ls", "mkdir", "ps", "sh", "sleep", "touch", "wget")
#: As first process of a container httpd itself is deaf to SIGTERM, and every stop would take ten seconds.
BUSYBOX_COMMAND = "trap 'exit 0' TERM; httpd -f -p 8000 -h /www & wait"
BUSYBOX_CHANGES = ("EXPOSE 8000", f'CMD ["/bin/sh", "-c", "{BUSYBOX_COMMAND}"]')


class ImageProblem(Exception):
    """An image could not be made; the sentence says why."""


def ensure(name: str, engine: Sequence[str] = ("docker",)) -> str:
    """Make the image unless the engine has it; ``engine`` is the client's command. Returns the name."""
    known = subprocess.run([*engine, "image", "inspect", name], capture_output=True, check=False, timeout=CALL_S)
    if known.returncode != 0:
        with MAKERS[name]().open("rb") as tarball:
            changes = [f"--change={change}" for change in CHANGES[name]]
            _call([*engine, "import", *changes, "-", name], stdin=tarball.fileno())
    return name


def base_tarball(packages: Sequence[str] = PACKAGES) -> Path:
    """BASE (or one with other packages) as a tarball, from the cache or newly made."""
    kept = cache() / f"base-{RELEASE}-{os.uname().machine}-{'-'.join(packages)}.tar.gz"
    if not kept.exists():
        _progress(f"debootstrap {RELEASE} with {', '.join(packages)}: about 40 s")
        with tempfile.TemporaryDirectory(prefix="rma-base-") as folder:
            _debootstrap(Path(folder), packages)
            _pack(Path(folder), kept)
    return kept


def tesseract_tarball() -> Path:
    """BASE_TESSERACT as a tarball, from the cache or newly made."""
    return base_tarball((*PACKAGES, *TESSERACT_PACKAGES))


def busybox_tarball() -> Path:
    """BUSYBOX as a tarball, newly made: that takes no time."""
    kept = cache() / "busybox.tar"
    program = shutil.which("busybox")
    if program is None:
        raise ImageProblem("busybox is not installed (Debian: apt-get install busybox-static)")
    making = kept.with_suffix(f".{os.getpid()}")
    with tarfile.open(making, "w") as tar:
        _add(tar, "bin/busybox", Path(program).read_bytes(), mode=0o755)
        _add(tar, "www/health", b"ok\n")
        _add(tar, "etc/passwd", b"root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
        for folder in ("tmp", "proc", "sys", "dev"):
            _add(tar, folder, None, mode=0o1777 if folder == "tmp" else 0o755)
        for applet in BUSYBOX_APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    making.replace(kept)
    return kept


def cache() -> Path:
    """Where tarballs are kept from one run to the next."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rma-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


#: What makes each image.
MAKERS = {BASE: base_tarball, BASE_TESSERACT: tesseract_tarball, BUSYBOX: busybox_tarball}
#: What each image says beyond its files.
CHANGES: dict[str, tuple[str, ...]] = {
    BASE: ('CMD ["/bin/bash"]',),
    BASE_TESSERACT: ('CMD ["/bin/bash"]',),
    BUSYBOX: BUSYBOX_CHANGES,
}


def _debootstrap(folder: Path, packages: Sequence[str]) -> None:
    if shutil.which("debootstrap") is None:
        raise ImageProblem("debootstrap is not installed (Debian: apt-get install debootstrap)")
    if os.geteuid() != 0:
        raise ImageProblem("debootstrap needs root")
    # Where packages come from is the machine's business: asked at run time, written nowhere.
    targets = _call(["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)"]).decode().splitlines()
    mirrors = [line.split()[1] for line in targets if line.startswith(f"{RELEASE} ")]
    if not mirrors:
        raise ImageProblem(f"apt has no {RELEASE} among its sources here")
    include = f"--include={','.join(packages)}"
    _call(["debootstrap", "--variant=minbase", include, RELEASE, str(folder), mirrors[0]], limit_s=DEBOOTSTRAP_S)


def _pack(folder: Path, kept: Path) -> None:
    making = kept.with_suffix(f".{os.getpid()}")
    excluded = [f"--exclude={pattern}" for pattern in LEFT_OUT]
    flags = ["--numeric-owner", "--use-compress-program=gzip -1", "--wildcards"]
    _call(["tar", "-C", str(folder), *flags, *excluded, "-cf", str(making), "."])
    making.replace(kept)


def _add(tar: tarfile.TarFile, name: str, content: bytes | None, *, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.mode = mode
    entry.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
    entry.size = len(content or b"")
    tar.addfile(entry, io.BytesIO(content or b""))


def _call(command: Sequence[str], *, stdin: int = subprocess.DEVNULL, limit_s: float = CALL_S) -> bytes:
    done = subprocess.run(command, stdin=stdin, capture_output=True, check=False, timeout=limit_s)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise ImageProblem(f"{command[0]}: {' / '.join(said[-3:])}")
    return done.stdout


def _progress(what: str) -> None:
    print(f"base_image: {what}", file=sys.stderr, flush=True)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(MAKERS)}; all of them when none is given"
    )
    parser.add_argument("--engine", choices=("docker", "podman"), default="docker")
    options = parser.parse_args()
    try:
        for name in options.names or [BUSYBOX, BASE, BASE_TESSERACT]:
            began = time.monotonic()
            print(ensure(name, [options.engine]))
            _progress(f"{name} is there after {time.monotonic() - began:.0f} s")
    except (ImageProblem, KeyError) as problem:
        print(f"base_image: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
