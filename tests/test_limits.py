"""Limits of cgroups and containers, on trees as real systems show them, and on a cgroup of this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.builtin import limits
from tests.needs import need

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

GIB = 2**30
V1_NONE = "9223372036854771712"
CONTAINER = "8c2f7c1e9a0b"
V2_MOUNT = "29 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def _tree(root: Path, files: Mapping[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n" if not str(text).endswith("\n") else str(text))
    return root


def _v1(path: str, *, mounted: str = "/", cgroup_path: str | None = None) -> dict[str, object]:
    """Return mounts and membership of a version 1 machine; ``cgroup_path`` is what the process is told."""
    groups = {"cpu": "cpu,cpuacct", "memory": "memory", "cpuset": "cpuset", "pids": "pids"}
    told = cgroup_path or path
    return {
        "proc/self/cgroup": "".join(f"{n}:{names}:{told}\n" for n, names in enumerate(groups.values(), 2))
        + f"1:name=systemd:{told}\n",
        "proc/self/mountinfo": "".join(
            f"{30 + n} 31 0:{n} {mounted} /sys/fs/cgroup/{names} ro,nosuid master:{n} - cgroup cgroup rw,{names}\n"
            for n, names in enumerate(groups.values())
        ),
    }


def test_docker_on_version_1_shows_only_its_own_part_of_each_hierarchy(tmp_path: Path) -> None:
    path = f"/docker/{CONTAINER}"
    root = _tree(
        tmp_path,
        _v1(path, mounted=path)
        | {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 4 * GIB,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 3 * GIB,
            "sys/fs/cgroup/memory/memory.stat": f"cache 5\ntotal_inactive_file {GIB}\n",
            "sys/fs/cgroup/cpuset/cpuset.cpus": "0-63",
            "sys/fs/cgroup/pids/pids.max": "512",
        },
    )
    assert limits.read(root) == limits.CgroupLimits(2.0, frozenset(range(64)), 4 * GIB, 2 * GIB, 512)


def test_docker_on_version_2_has_a_namespace_of_its_own(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cpu.max": "50000 100000",
            "sys/fs/cgroup/memory.max": GIB,
            "sys/fs/cgroup/memory.high": "max",
            "sys/fs/cgroup/memory.current": GIB // 2,
            "sys/fs/cgroup/memory.stat": "inactive_file 0\n",
            "sys/fs/cgroup/cpuset.cpus.effective": "0-1,8",
            "sys/fs/cgroup/pids.max": "max",
        },
    )
    assert limits.read(root) == limits.CgroupLimits(0.5, frozenset({0, 1, 8}), GIB, GIB // 2, None)


def test_a_systemd_service_is_limited_by_the_slice_above_it(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/machine.slice"
    root = _tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/machine.slice/machine-rma.slice/rma-agent.service\n",
            "proc/self/mountinfo": V2_MOUNT,
            f"{base}/memory.max": 2 * GIB,
            f"{base}/memory.current": 2 * GIB,
            f"{base}/cpu.max": "max 100000",
            f"{base}/machine-rma.slice/cpu.max": "250000 100000",
            f"{base}/machine-rma.slice/rma-agent.service/cpu.max": "max 100000",
            f"{base}/machine-rma.slice/rma-agent.service/memory.max": 8 * GIB,
            f"{base}/machine-rma.slice/rma-agent.service/memory.high": 3 * GIB,
        },
    )
    found = limits.read(root)
    assert (found.cpus, found.memory_bytes, found.available_bytes) == (2.5, 2 * GIB, 0)


def test_rootless_podman_is_found_below_the_users_slice(tmp_path: Path) -> None:
    path = "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-8c2f.scope/container"
    root = _tree(
        tmp_path,
        {
            "proc/self/cgroup": f"0::{path}\n",
            "proc/self/mountinfo": V2_MOUNT,
            f"sys/fs/cgroup{path}/cgroup.procs": "1",
            f"sys/fs/cgroup{Path(path).parent}/memory.max": 3 * GIB,
            "sys/fs/cgroup/user.slice/cpuset.cpus.effective": "0-3",
        },
    )
    found = limits.read(root)
    assert (found.memory_bytes, found.available_bytes, found.cpus) == (3 * GIB, 3 * GIB, None)
    assert found.cpuset == frozenset(range(4))


def test_a_kubernetes_pod_limits_its_containers_from_above(tmp_path: Path) -> None:
    path = "/kubepods/burstable/pod1f/8c2f"
    root = _tree(
        tmp_path,
        _v1(path)
        | {
            f"sys/fs/cgroup/memory{path}/memory.limit_in_bytes": V1_NONE,
            "sys/fs/cgroup/memory/kubepods/burstable/pod1f/memory.limit_in_bytes": GIB,
            f"sys/fs/cgroup/cpu,cpuacct{path}/cpu.cfs_quota_us": "-1",
            f"sys/fs/cgroup/cpu,cpuacct{path}/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/kubepods/burstable/pod1f/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu,cpuacct/kubepods/burstable/pod1f/cpu.cfs_period_us": "100000",
        },
    )
    found = limits.read(root)
    assert (found.cpus, found.memory_bytes) == (1.5, GIB)


def test_version_1_tells_of_an_ancestor_that_is_not_mounted(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        _v1("/kubepods/pod1f/8c2f", mounted="/kubepods/pod1f/8c2f")
        | {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NONE,
            "sys/fs/cgroup/memory/memory.stat": f"hierarchical_memory_limit {GIB}\n",
        },
    )
    assert limits.read(root).memory_bytes == GIB


def test_a_path_in_the_hosts_words_falls_back_to_what_is_mounted(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        _v1("/", mounted="/", cgroup_path=f"/docker/{CONTAINER}")
        | {"sys/fs/cgroup/memory/memory.limit_in_bytes": 2 * GIB},
    )
    assert limits.read(root).memory_bytes == 2 * GIB


def test_docker_in_docker_climbs_out_of_its_own_namespace(tmp_path: Path) -> None:
    mount = V2_MOUNT.replace("0:26 / ", "0:26 /../.. ")
    root = _tree(
        tmp_path,
        {"proc/self/cgroup": "0::/", "proc/self/mountinfo": mount, "sys/fs/cgroup/memory.max": GIB},
    )
    assert limits.read(root).memory_bytes == GIB


def test_an_lxc_container_is_limited_by_its_payload(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/lxc.payload.box/system.slice/rma.service",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/lxc.payload.box/memory.max": 6 * GIB,
            "sys/fs/cgroup/lxc.payload.box/cpuset.cpus.effective": "4-7",
            "sys/fs/cgroup/lxc.payload.box/system.slice/rma.service/cpuset.cpus.effective": "4-5",
        },
    )
    found = limits.read(root)
    assert (found.memory_bytes, found.cpuset) == (6 * GIB, frozenset({4, 5}))


def test_a_hybrid_machine_is_limited_by_version_1_while_version_2_has_no_controllers(tmp_path: Path) -> None:
    files = _v1("/rma")
    files["proc/self/cgroup"] = f"{files['proc/self/cgroup']}0::/rma\n"
    unified = V2_MOUNT.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    files["proc/self/mountinfo"] = f"{files['proc/self/mountinfo']}{unified}"
    root = _tree(
        tmp_path,
        files
        | {
            "sys/fs/cgroup/unified/rma/cgroup.procs": "1",
            "sys/fs/cgroup/memory/rma/memory.limit_in_bytes": 4 * GIB,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NONE,
        },
    )
    assert limits.read(root).memory_bytes == 4 * GIB


def test_a_machine_without_cgroups_has_no_limits(tmp_path: Path) -> None:
    assert limits.read(tmp_path) == limits.CgroupLimits()


def test_contradicting_cpusets_say_nothing(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cpuset.cpus.effective": "0-3",
            "sys/fs/cgroup/a/cpuset.cpus.effective": "8",
        },
    )
    assert limits.read(root).cpuset is None


@pytest.mark.parametrize("text", ["", "x", "-3", "0-99999999999", "1-y"])
def test_a_strange_list_of_cpus_is_empty(text: str) -> None:
    assert limits.cpu_list(text) == frozenset()


@given(st.dictionaries(st.sampled_from(["cpu.max", "memory.max", "memory.stat", "cpuset.cpus"]), st.text(max_size=40)))
def test_no_text_in_the_files_makes_reading_fail(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, str]
) -> None:
    root = tmp_path_factory.mktemp("machine")
    _tree(root, {"proc/self/cgroup": "0::/\n\n::\nx", "proc/self/mountinfo": V2_MOUNT + "\n - \nx - cgroup2\n"})
    folder = root / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    found = limits.read(root)
    assert found.memory_bytes is None or found.memory_bytes >= 0


@contextlib.contextmanager
def _cgroup(controller: str, **files: str) -> Iterator[Path]:
    """Make a real cgroup with limits and remove it again."""
    base = Path("/sys/fs/cgroup") / controller
    folder = base / f"rma-test-{os.getpid()}"
    folder.mkdir()
    try:
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)
        yield folder
    finally:
        folder.rmdir()


def _detect_inside(*folders: Path) -> str:
    """Run the detector in a child that has moved into the cgroups, and return what it prints."""
    code = (
        "import os, sys\n"
        "for folder in sys.argv[1:]: open(folder + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "from rma_core.builtin.host_detector import rma_detect_devices\n"
        "found = {d.id: d for d in rma_detect_devices({}).devices}\n"
        "print(found['cpu'].attributes['granted_cpus'], found['cpu'].attributes['cores'],"
        " found['memory'].memory_bytes, found['memory'].attributes['available_bytes'] < found['memory'].memory_bytes,"
        " found['host'].attributes['limited_by'], sep='|')\n"
    )
    command = [sys.executable, "-c", code, *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def test_a_real_cgroup_of_version_1_makes_a_small_machine_of_this_one() -> None:
    need("cgroup-v1")
    with (
        _cgroup("memory", memory__limit_in_bytes=str(512 * 2**20)) as memory,
        _cgroup("cpu", cpu__cfs_quota_us="50000") as cpu,
    ):
        granted, cores, total, less, sentence = _detect_inside(memory, cpu).split("|")
    assert (granted, cores, total, less) == ("0.5", "1", str(512 * 2**20), "True")
    assert sentence.startswith("the cgroup or container this runs in grants 0.5 of ")
    assert sentence.endswith("GiB of memory")
