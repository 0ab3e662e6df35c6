"""Build the images of the services in this folder: ``make images``, or ``python containers/build.py --help``.

Each folder with a Dockerfile becomes the image that its catalog entry names. What the image installs is downloaded
here first, as wheels for the Python and the platform of the base image, into ``wheels/`` of a copy of the folder. So
the build itself needs no network, and nothing of this machine's package configuration can get into the image. A
Dockerfile that fetches something else itself gets one, unless ``--network`` says otherwise. Services that need a GPU
stand on images of many gigabytes and are built only when they are named. ``--gpu`` makes the build of a service for
that kind of GPU, with packages from the ``--index`` of whoever makes those.
Names of images go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
#: Seconds for one step (a base image pulled, wheels downloaded, a build); a slow line and a large image fit in.
STEP_S = 3600.0
#: Not copied into the build context.
NOT_COPIED = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "build", "dist", "wheels", "tests")
#: Run in the base image: which wheels it can install.
ASK = """import json, platform, sys
print(json.dumps([*sys.version_info[:2], platform.machine(), *platform.libc_ver()]))"""
#: The oldest glibc 2.x that wheels are made for.
OLDEST_GLIBC = 5
#: Before wheels were named by glibc's version they had names of their own.
OLD_PLATFORMS = {5: "manylinux1", 12: "manylinux2010", 17: "manylinux2014"}


class BuildProblem(Exception):
    """An image could not be built; the sentence says why."""


class Target(NamedTuple):
    """What wheels must fit: the base image's Python, machine and glibc 2.x."""

    python: tuple[int, int]
    machine: str
    glibc: int

    def pip_arguments(self) -> list[str]:
        """How pip is told to choose for another machine than its own."""
        major, minor = self.python
        platforms = [f"manylinux_2_{number}_{self.machine}" for number in range(self.glibc, OLDEST_GLIBC - 1, -1)]
        platforms += [f"{name}_{self.machine}" for number, name in OLD_PLATFORMS.items() if number <= self.glibc]
        return [
            "--only-binary=:all:",
            "--implementation=cp",
            f"--python-version={major}.{minor}",
            *(f"--abi={abi}" for abi in (f"cp{major}{minor}", "abi3", "none")),
            *(f"--platform={platform}" for platform in platforms),
        ]


class Gpu(NamedTuple):
    """What a build for one kind of GPU stands on: an image with its libraries, and which package is another one."""

    base: str
    package: str = "xllamacpp"


#: Their Python is installed by the Dockerfile, where they have none.
GPUS = {
    "cuda": Gpu("docker.io/nvidia/cuda:12.8.1-runtime-ubuntu24.04"),
    "rocm": Gpu("docker.io/rocm/dev-ubuntu-24.04:6.4.1"),
    "vulkan": Gpu("docker.io/library/ubuntu:24.04"),
}
#: What Python there is in all of these once it was installed.
GPU_TARGET = ((3, 12), "x86_64", 39)


def build(folder: Path, *, engine: str, base: str, network: str, gpu: str = "", index: str = "") -> str:
    """Build one service's image; returns its name."""
    entry = catalog(folder)
    name = str(entry["gpu_images"][gpu] if gpu else entry["image"])
    dockerfile = folder / "Dockerfile"
    base = base or (GPUS[gpu].base if gpu else default_base(dockerfile))
    network = network or ("default" if gpu else default_network(dockerfile))
    with tempfile.TemporaryDirectory(prefix="rma-image-") as temporary:
        context = Path(temporary) / folder.name
        shutil.copytree(folder, context, ignore=NOT_COPIED)
        if (folder / "pyproject.toml").exists():
            step(f"{name}: which Python is in {base}")
            target = Target(*GPU_TARGET) if gpu else target_of(engine, base)
            fetch_wheels(folder, context / "wheels", target, package=GPUS[gpu].package if gpu else "", index=index)
        step(f"{name}: {engine} build")
        told = [f"--build-arg=BASE={base}", *([f"--build-arg=GPU={gpu}"] if gpu else [])]
        run(engine, "build", f"--network={network}", *told, f"--tag={name}", str(context))
    return name


def catalog(folder: Path) -> dict[str, Any]:
    """The service's entry in the catalog, which names its image."""
    return tomllib.loads((folder / "catalog.toml").read_text(encoding="utf-8"))


def is_large(folder: Path) -> bool:
    """Whether it is built only when it is named: what needs a GPU stands on images of many gigabytes."""
    needs = catalog(folder).get("needs", {})
    return bool(needs.get("gpu_api") or needs.get("gpu_memory"))


def default_base(dockerfile: Path) -> str:
    """What the Dockerfile stands on unless told otherwise."""
    found = re.search(r"^ARG\s+BASE=(\S+)", dockerfile.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise BuildProblem(f"{dockerfile} has no `ARG BASE=image` line; give one with --base (make: BASE=image)")
    return found[1]


def default_network(dockerfile: Path) -> str:
    """The network of a build: none, unless it installs packages of the base's own system, or pulls a model."""
    text = dockerfile.read_text(encoding="utf-8")
    return "default" if "apt-get" in text or "ollama pull" in text else "none"


def target_of(engine: str, base: str) -> Target:
    """Ask the base image, which is pulled if it is not there."""
    said = run(engine, "run", "--rm", "--network=none", "--entrypoint=python3", base, "-c", ASK, capture=True)
    major, minor, machine, libc, libc_version = json.loads(said)
    if libc != "glibc":
        raise BuildProblem(f"{base} has no glibc: take a base image of Debian or its kin")
    return Target((major, minor), machine, int(libc_version.split(".")[1]))


def fetch_wheels(folder: Path, wheels: Path, target: Target, *, package: str = "", index: str = "") -> None:
    """The service's own wheel, and all it needs as pinned in its requirements.txt; ``package`` from ``index``."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    step(f"{folder.name}: wheels for Python {target.python[0]}.{target.python[1]} on {target.machine}")
    run(*pip, "wheel", "--quiet", "--no-deps", f"--wheel-dir={wheels}", str(folder))
    pinned = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    apart = [line for line in pinned if package and line.startswith(f"{package}==")]
    rest = wheels / "requirements.txt"
    rest.write_text("\n".join(line for line in pinned if line not in apart), encoding="utf-8")
    download = (*pip, "download", "--quiet", f"--dest={wheels}", *target.pip_arguments())
    run(*download, f"--requirement={rest}")
    if apart:
        run(*download, "--no-deps", f"--index-url={index}", *apart)
    rest.unlink()


def push(name: str, prefix: str, engine: str) -> str:
    """Push an image under another prefix; returns its name there."""
    there = f"{prefix.rstrip('/')}/{name.rsplit('/', 1)[1]}"
    # Docker takes a registry on loopback without TLS by itself, Podman has to be told.
    plain = engine == "podman" and re.match(r"(127\.|localhost[:/])", prefix)
    step(f"push {there}")
    run(engine, "tag", name, there)
    run(engine, "push", *(["--tls-verify=false"] if plain else []), there)
    return there


def run(*command: str, capture: bool = False) -> str:
    """Run a command with its output on stderr, or returned; raises when it fails."""
    output = subprocess.PIPE if capture else sys.stderr
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, text=True, timeout=STEP_S, check=False)
    except FileNotFoundError as error:
        raise BuildProblem(f"{command[0]} is not installed") from error
    if done.returncode != 0:
        raise BuildProblem(f"`{' '.join(command[:4])} …` ended with {done.returncode}; its words are above")
    return done.stdout or ""


def step(what: str) -> None:
    """Say what comes next, and when."""
    print(f"[{time.strftime('%H:%M:%S')}] {what}", file=sys.stderr, flush=True)


def main() -> int:
    """The command."""
    folders = {path.parent.name: path.parent for path in sorted(HERE.glob("*/Dockerfile"))}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "services",
        nargs="*",
        metavar="SERVICE",
        help=f"of {', '.join(folders) or 'none'}; if none, all that need no GPU",
    )
    parser.add_argument("--gpu", choices=tuple(GPUS), default="", help="the build for that kind of GPU (llama-cpp)")
    parser.add_argument("--index", default="", metavar="URL", help="package index that has llama.cpp for that GPU")
    parser.add_argument("--engine", choices=("docker", "podman"), default="docker")
    parser.add_argument("--base", default="", help="base image (default: what each Dockerfile says)")
    parser.add_argument("--push", default="", metavar="PREFIX", help="push too, as PREFIX/<service>-worker:<version>")
    parser.add_argument(
        "--network", default="", help="network of the build itself (default: none, where it needs none)"
    )
    options = parser.parse_args()
    if unknown := set(options.services) - set(folders):
        parser.error(f"no Dockerfile for {', '.join(sorted(unknown))}; there are {', '.join(folders)}")
    services = options.services or [name for name, folder in folders.items() if not is_large(folder)]
    if options.gpu and not options.index:
        parser.error("--gpu needs the --index of the packages for it, see containers/llama-cpp/README.md")
    if options.gpu and any("gpu_images" not in catalog(folders[name]) for name in services):
        parser.error("--gpu is for services that have builds for GPUs: name one, such as llama-cpp")
    try:
        for service in services:
            name = build(
                folders[service], engine=options.engine, base=options.base, network=options.network,
                gpu=options.gpu, index=options.index,
            )  # fmt: skip
            print(name)
            if options.push:
                print(push(name, options.push, options.engine))
    except BuildProblem as problem:
        print(f"build: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
