"""`rma agent install`: with a real systemd, started for the test; launchd's file as far as it can be read here."""

from __future__ import annotations

import json
import platform
import plistlib
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rma_core.agent import installing
from rma_core.agent.state import StateFolder, WorkerRecord
from rma_core.errors import NotSupported, UsageProblem
from tests.needs import need
from tests.pools import NO_ENGINE, Running, environment, pool, rma, until
from tests.real_systemd import System, systemd
from tests.test_bare import machine_in

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Words that a unit's file could take for something else.
WORDS = (
    'a "b"', "it's", "$HOME", "${HOME}", "%h", "%%", "\\n", "back\\", " lead", "trail ", "a;b", ";", "#no", "é ü", "{}",
    "-x", "@y", "+z", "!w", ":v", "", "a=b", "'", '"', "\\x41", "$$", "*", "~",
)  # fmt: skip


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    need("systemd")
    with systemd(tmp_path / "system") as started:
        yield started


def command_of(system: System, unit: str) -> list[str]:
    """Return the command line that runs for a unit."""
    pid = system.show(unit, "MainPID")
    return system.run("cat", f"/proc/{pid}/cmdline").stdout.split("\0")[:-1]


def joined(home: Path) -> None:
    """Make a state folder as `rma join` leaves it."""
    folder = StateFolder(home)
    folder.prepare()
    folder.save_record(WorkerRecord(worker_id="worker-00000001", coordinator_url="http://127.0.0.1:9"))


def asked(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run an `rma` command on this machine itself."""
    return subprocess.run(
        rma(*arguments), env=environment(home, more), capture_output=True, text=True, timeout=60, check=False
    )


def test_an_installed_agent_works_starts_again_when_it_fails_and_goes_for_good(
    system: System, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    machine = machine_in(tmp_path)
    # The address of its control socket has little room.
    home = tmp_path_factory.mktemp("i") / 'a "$h" %i \\n é'
    env = environment(home, NO_ENGINE)

    def told(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = system.run(machine.python, "-m", "rma_core", *arguments, env=env, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    with pool(tmp_path / "pool", "--port", "0", "--no-agent", env=NO_ENGINE) as made:
        token = made.json("tokens", "create")["token"]
        assert "joined no pool" in told("agent", "install", code=2).stderr
        told("join", made.url, token, "--yes", "--enrol-only", "--runtime", "process")
        said = told("agent", "install", "--runtime", "process", "--json")
        installed = json.loads(said.stdout)
        unit = f"{installed['service']}.service"
        assert Path(installed["file"]).name == unit
        assert "does not have this shell's" not in said.stderr
        running = command_of(system, unit)
        assert running == installed["command"]
        assert running[running.index("--home") + 1 :] == [str(home), "--runtime=process"]
        assert json.loads(told("status", "--json").stdout)["connection"] == "channel"
        assert system.show(unit, "UnitFileState") == "enabled"
        # What an `rma` typed by hand has run is not the agent's.
        ours = ("-m rma_core", "rma_core/child.py", "pip config")
        assert [line for line in machine.lines() if "bare.py" in line or not any(part in line for part in ours)] == []

        # It is started anew when it dies, and not when its owner or the pool ends it.
        first = system.show(unit, "MainPID")
        system.run("kill", "-KILL", first)
        until(lambda: system.show(unit, "ActiveState") == "activating", within_s=20, what="it is to be started anew")
        again = told("agent", "install", "--runtime", "process").stdout
        assert "The agent runs as root, by systemd" in again
        assert f"rma status --home {shlex.quote(str(home))}" in " ".join(again.split())
        told("drain")
        until(lambda: system.show(unit, "ActiveState") == "inactive", within_s=40, what="it ends")
        assert system.show(unit, "Result") == "success"

        agent = Running(rma("agent"), env)
        try:
            agent.wait_for("is registered")
            assert "an agent runs already" in told("agent", "install", code=2).stderr
        finally:
            agent.stop(signal.SIGTERM)
        assert "Its service remains" in told("leave", "--yes").stderr
        told("agent", "uninstall")
        assert not system.active(unit)
        assert "no agent is installed" in told("agent", "uninstall", code=2).stderr


def test_systemd_takes_every_word_as_it_is_meant(system: System, tmp_path: Path) -> None:
    home = tmp_path / "home"
    joined(home)
    out = tmp_path / "out"
    program = f"import json, os, sys; json.dump([sys.argv[1:], os.environ['PATH']], open({str(out)!r}, 'w'))"
    job = installing.job(home, [], {"PATH": "/bin:" + ":".join(WORDS)}, drain_s=0)
    job = job._replace(command=(sys.executable, "-c", program, *WORDS))
    unit = installing.Systemd(job)
    system.run("sh", "-c", 'printf %s "$1" > "$2"', "sh", unit.text().decode(), str(unit.file))
    system.run("systemctl", "start", unit.file.name)
    until(out.exists, within_s=20, what="it runs")
    until(lambda: system.show(unit.file.name, "ActiveState") == "inactive", within_s=20, what="it has run")
    assert json.loads(out.read_text(encoding="utf-8")) == [list(WORDS), job.environment["PATH"]]


def test_a_service_that_ends_at_once_is_said_to(system: System, tmp_path: Path) -> None:
    home = tmp_path / "home"
    joined(home)
    (home / "rma.toml").write_text('attach = ["http://elsewhere.example"]\n', encoding="utf-8")
    done = system.run(*rma("agent", "install", "--json"), env=environment(home, NO_ENGINE), check=False)
    assert done.returncode == 1
    refused = json.loads(done.stdout)["error"]
    assert (refused["code"], "does not answer" in refused["message"]) == ("start_failed", True)
    [unit] = re.findall(r"journalctl --unit (rma-agent-\w+\.service)", " ".join(refused["hints"]))
    # It would fail so again, and is left alone.
    assert system.show(unit, "ActiveState") == "failed"
    assert system.show(unit, "ExecMainStatus") == "2"


def test_a_file_of_somebody_else_is_left_alone(system: System, tmp_path: Path) -> None:
    home = tmp_path / "home"
    joined(home)
    shown = json.loads(system.run(*rma("agent", "install", "--print", "--json"), env=environment(home)).stdout)
    system.run("sh", "-c", 'echo "[Unit]" > "$1"', "sh", shown["file"])
    for command in ("install", "uninstall"):
        done = system.run(*rma("agent", command), env=environment(home), check=False)
        assert done.returncode == 2
        assert "was not written by `rma agent install`" in done.stderr
    assert system.run("cat", shown["file"]).stdout == "[Unit]\n"


def test_without_a_service_manager_the_command_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined(tmp_path)
    monkeypatch.setattr(installing, "SYSTEMD_RUNS", tmp_path / "nothing")
    job = installing.job(tmp_path, ["--runtime=docker"], {}, drain_s=0)
    for system, why in (("Linux", "systemd does not run here"), ("Windows", "no service manager of Windows")):
        monkeypatch.setattr(platform, "system", lambda system=system: system)
        with pytest.raises(NotSupported, match=why) as refused:
            installing.manager_of(job)
        assert installing.spelled(job.command) in refused.value.hints[0]


def test_launchd_is_given_a_property_list_that_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    job = installing.job(tmp_path, [f"--model={WORDS[0]}"], {"PATH": "/opt/bin", "SECRET": "x"}, drain_s=7)
    manager = installing.manager_of(job)
    assert manager.file.name == f"org.rma.{job.name}.plist"
    text = manager.text()
    assert installing.WRITTEN.encode() in text
    told = plistlib.loads(text)
    assert told["ProgramArguments"] == list(job.command)
    assert told["EnvironmentVariables"] == {"PATH": "/opt/bin"}
    assert (told["RunAtLoad"], told["KeepAlive"]) == (True, {"SuccessfulExit": False})
    assert told["ExitTimeOut"] == 67


def test_newer_systemds_wait_longer_each_time() -> None:
    assert installing.steps(252) == []
    assert installing.steps(254) == ["RestartSteps=5", "RestartMaxDelaySec=600"]


def test_what_cannot_stand_in_a_services_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="cannot stand in a service's file"):
        installing.job(tmp_path / "a\nb", [], {}, drain_s=0)
    with pytest.raises(UsageProblem, match="cannot stand in a service's file"):
        installing.job(tmp_path, [], {"PATH": "/bin\x1b"}, drain_s=0)


def test_options_stand_behind_what_they_are_for(tmp_path: Path) -> None:
    for options in (["--home", str(tmp_path)], ["--attach", "http://127.0.0.1:1"], ["--log-json"]):
        done = asked(tmp_path, "agent", *options, "install")
        assert done.returncode == 2
        assert "write the options behind: rma agent install" in done.stderr
    assert "joined no pool" in asked(tmp_path, "agent", "install").stderr


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path) -> None:
    joined(tmp_path)
    for options in (["--attach", "http://elsewhere.example"], ["--model", "x=y#size=3"]):
        done = asked(tmp_path, "agent", "install", *options)
        assert done.returncode == 2, done.stderr


def test_a_shells_settings_that_the_service_will_lack_are_named(system: System, tmp_path: Path) -> None:
    joined(tmp_path / "home")
    more = {"RMA_DRAIN_S": "3", "COORDINATOR_URL": "http://127.0.0.1:9", "RMA_JOIN_TOKEN": "rmaj_secret"}
    env = environment(tmp_path / "home", {**NO_ENGINE, **more})
    done = system.run(*rma("agent", "install", "--print"), env=env)
    assert "does not have this shell's COORDINATOR_URL, RMA_DRAIN_S, RMA_JOIN_TOKEN: write" in done.stderr
    assert 'Environment="DOCKER_HOST=unix:///nonexistent/docker.sock"' in done.stdout
    assert "secret" not in done.stdout
    assert "\nUser=root\n" in done.stdout


def test_models_are_named_by_their_whole_path(tmp_path: Path) -> None:
    need("systemd")
    joined(tmp_path / "home")
    with systemd(tmp_path / "system") as system:
        command = rma("agent", "install", "--print", "--json", "--model", "small=here/x.gguf#slots=1")
        inside = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", str(tmp_path), *command]
        shown = json.loads(system.run(*inside, env=environment(tmp_path / "home")).stdout)
    assert shown["command"][-1] == f"--model=small={tmp_path}/here/x.gguf#context=4096&slots=1"
