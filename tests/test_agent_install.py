"""`rma agent install`: with a real systemd, started for the test; launchd's file as far as it can be read here."""

from __future__ import annotations

import json
import os
import platform
import plistlib
import pwd
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rma_core import bare
from rma_core.agent import installing
from rma_core.agent.state import StateFolder, WorkerRecord
from rma_core.errors import NotSupported, StartFailed, UsageProblem
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

    def told(*arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = system.run(machine.python, "-m", "rma_core", *arguments, env=env, check=False)
        assert code in (None, done.returncode), done.stdout + done.stderr
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

        # What does not work does not take the place of what does.
        settings = home / "rma.toml"
        settings.write_text('attach = ["http://elsewhere.example"]\n', encoding="utf-8")
        assert "so that is taken back" in told("agent", "install", "--log-json", code=1).stderr
        settings.unlink()
        until(lambda: told("status", "--json", code=None).returncode == 0, within_s=90, what="the one before runs")
        assert command_of(system, unit) == installed["command"]

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
        told("agent", "install", "--runtime", "process")
        assert f"takes it away:  rma agent uninstall --home {shlex.quote(str(home))}" in told("leave", "--yes").stderr
        assert system.show(unit, "ActiveState") == "inactive"
        told("agent", "uninstall")
        assert not system.active(unit)
        assert "no agent is installed" in told("agent", "uninstall", code=2).stderr


def test_systemd_takes_every_word_as_it_is_meant(system: System, tmp_path: Path) -> None:
    home = tmp_path / "home"
    joined(home)
    out = tmp_path / "out"
    program = f"import json, os, sys; json.dump([sys.argv[1:], os.environ['PATH']], open({str(out)!r}, 'w'))"
    job = installing.job(home, [], {"PATH": "/bin:" + ":".join(WORDS)})
    job = job._replace(command=(sys.executable, "-c", program, *WORDS))
    unit = installing.Systemd(job)
    system.run("sh", "-c", 'printf %s "$1" > "$2"', "sh", unit.text().decode(), str(unit.file))
    system.run("systemctl", "start", unit.file.name)
    until(out.exists, within_s=20, what="it runs")
    until(lambda: system.show(unit.file.name, "ActiveState") == "inactive", within_s=20, what="it has run")
    assert json.loads(out.read_text(encoding="utf-8")) == [list(WORDS), job.environment["PATH"]]


def test_an_agent_that_ends_at_once_is_not_left_installed(system: System, tmp_path: Path) -> None:
    home = tmp_path / "home"
    joined(home)
    (home / "rma.toml").write_text('attach = ["http://elsewhere.example"]\n', encoding="utf-8")
    done = system.run(*rma("agent", "install", "--json"), env=environment(home, NO_ENGINE), check=False)
    assert done.returncode == 1
    refused = json.loads(done.stdout)["error"]
    assert (refused["code"], "so that is taken back" in refused["message"]) == ("start_failed", True)
    [unit] = re.findall(r"journalctl --unit (rma-agent-\w+\.service)", " ".join(refused["hints"]))
    assert system.show(unit, "LoadState") == "not-found"
    assert unit not in system.run("systemctl", "list-units", "--all", "--plain").stdout


def test_what_systemd_refuses_is_not_left_installed(system: System, tmp_path: Path) -> None:
    job = installing.job(tmp_path, [], {})._replace(command=("/nowhere/python",))
    unit = installing.Systemd(job)
    write = f"""
import sys; sys.path.insert(0, {str(Path(installing.__file__).parents[2])!r})
from pathlib import Path
from rma_core import bare
from rma_core.agent import installing
job = installing.job(Path({str(tmp_path)!r}), [], {{}})._replace(command=("/nowhere/python",))
try:
    installing.install(installing.Systemd(job), lambda: None)
except installing.StartFailed as error:
    print(error)
"""
    said = system.run(sys.executable, "-c", write).stdout
    assert "restart rma-agent-" in said
    assert system.run("test", "-e", str(unit.file), check=False).returncode == 1
    assert system.show(unit.file.name, "LoadState") == "not-found"


def test_what_is_wrong_with_settings_keeps_nobody_from_stopping_it(system: System, tmp_path: Path) -> None:
    home = tmp_path / "home"
    joined(home)
    env = environment(home)
    shown = json.loads(system.run(*rma("agent", "install", "--print", "--json"), env=env).stdout)
    system.run("sh", "-c", 'printf %s "$1" > "$2"', "sh", shown["text"], shown["file"])
    (home / "rma.toml").write_text("no_such_setting = 1\n", encoding="utf-8")
    told = json.loads(system.run(*rma("agent", "uninstall", "--json"), env=env).stdout)
    assert told == {name: shown[name] for name in ("manager", "service", "file")}
    assert system.run("test", "-e", shown["file"], check=False).returncode == 1


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
    job = installing.job(tmp_path, ["--runtime=docker"], {})
    for system, why in (("Linux", "systemd does not run here"), ("Windows", "no service manager of Windows")):
        monkeypatch.setattr(platform, "system", lambda system=system: system)
        with pytest.raises(NotSupported, match=why) as refused:
            installing.manager_of(job)
        assert installing.spelled(job.command) in refused.value.hints[0]


def test_launchd_is_given_a_property_list_that_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    job = installing.job(tmp_path, [f"--model={WORDS[0]}"], {"PATH": "/opt/bin", "SECRET": "x"})
    manager = installing.manager_of(job)
    assert manager.file.name == f"org.rma.{job.name}.plist"
    text = manager.text()
    assert installing.WRITTEN.encode() in text
    told = plistlib.loads(text)
    assert told["ProgramArguments"] == list(job.command)
    assert told["EnvironmentVariables"] == {"PATH": "/opt/bin"}
    assert (told["RunAtLoad"], told["KeepAlive"]) == (True, {"SuccessfulExit": False})
    assert (told["ExitTimeOut"], told["Umask"], told["ThrottleInterval"]) == (3660, 0o077, 60)


def test_newer_systemds_wait_longer_each_time() -> None:
    assert installing.steps(252) == []
    assert installing.steps(254) == ["RestartSteps=5", "RestartMaxDelaySec=900"]


UNIT = """\
# Written by `rma agent install`; `rma agent uninstall` takes it away.
[Unit]
Description=RMA agent ({home}/50%%)
{network}StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={command}
Environment="PATH=/bin"
Environment="CUDA_VISIBLE_DEVICES=1"
Environment="RMA_CONFIG={here}/own.toml"
Environment="https_proxy=http://proxy.example"
UMask=0077
Restart=on-failure
RestartSec=60
KillMode=process
TimeoutStopSec=3660

[Install]
WantedBy={target}.target
"""


@pytest.mark.parametrize("of_machine", [False, True])
def test_a_unit_says_all_that_it_should_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_machine: bool
) -> None:
    monkeypatch.setattr(installing, "_user_number", lambda: 0 if of_machine else 1000)
    monkeypatch.setattr(installing, "_version", lambda: 252)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "50%"
    home.mkdir()
    given = {"PATH": "/bin", "RMA_CONFIG": "own.toml", "SSH_AUTH_SOCK": "/x", "CUDA_VISIBLE_DEVICES": "1"}
    given |= {"https_proxy": "http://proxy.example", "HTTP_PROXY": "http://me:secret@proxy.example"}
    unit = installing.Systemd(installing.job(Path("50%"), ["--insecure-http"], given))
    own = Path(pwd.getpwuid(os.geteuid()).pw_dir)
    assert unit.file.parent == (Path("/etc/systemd/system") if of_machine else own / ".config/systemd/user")
    program = [
        sys.executable,
        "-I",
        "-S",
        "-X",
        "utf8",
        str(Path(bare.__file__)),
        "agent",
        "--home",
        f"{tmp_path}/50%%",
    ]
    assert unit.text().decode() == UNIT.format(
        home=tmp_path,
        here=tmp_path,
        network="Wants=network-online.target\nAfter=network-online.target\n" if of_machine else "",
        command=" ".join(f'"{word}"' for word in [*program, "--insecure-http"]),
        target="multi-user" if of_machine else "default",
    )


@pytest.mark.parametrize("lingers", [True, False])
def test_a_users_own_manager_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lingers: bool) -> None:
    asked_for: list[str] = []

    def run(command: list[str], env: dict[str, str], _: float = 0) -> subprocess.CompletedProcess[str]:
        asked_for.append(" ".join([*command, env.get("XDG_RUNTIME_DIR", "")]))
        return subprocess.CompletedProcess(command, 0 if lingers or command[0] != "loginctl" else 1, "active\n", "")

    monkeypatch.setattr(installing, "_user_number", lambda: 1000)
    monkeypatch.setattr(installing, "_run", run)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/0")
    unit = installing.Systemd(installing.Job(tmp_path))
    hint = unit.start()
    assert ("loginctl enable-linger" in hint) != lingers
    assert unit.runs()
    unit.stop()
    unit.forget()
    name = unit.file.name
    said = ["daemon-reload", "daemon-reload", f"enable {name}", f"restart {name}", f"is-active {name}", f"cat {name}"]
    said += [f"disable --now {name}", "daemon-reload", f"reset-failed {name}"]
    assert asked_for[0] == "loginctl enable-linger /run/user/0"
    assert asked_for[1:] == [f"systemctl --user --no-ask-password {one} /run/user/1000" for one in said]


def test_what_a_users_manager_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = subprocess.CompletedProcess([], 1, "", "Failed to connect\nto bus")
    monkeypatch.setattr(installing, "_user_number", lambda: 1000)
    monkeypatch.setattr(installing, "_run", lambda *_: refused)
    monkeypatch.setattr(installing, "PATIENCE_S", 0.5)
    with pytest.raises(StartFailed, match="daemon-reload` failed: Failed to connect to bus"):
        installing.Systemd(installing.Job(tmp_path)).start()


def test_each_state_folder_has_a_service_of_its_own(tmp_path: Path) -> None:
    usual = Path(pwd.getpwuid(os.geteuid()).pw_dir) / ".rma"
    assert installing.Job(usual).name == "rma-agent"
    names = {installing.Job(tmp_path / str(number)).name for number in range(50)}
    assert len(names) == 50
    assert all(re.fullmatch(r"rma-agent-[0-9a-f]{8}", name) for name in names)


def test_root_runs_no_agent_in_a_folder_that_others_can_replace(tmp_path: Path) -> None:
    need("systemd")
    theirs, open_to_all, link = tmp_path / "theirs", tmp_path / "open", tmp_path / "link"
    for folder in (theirs, open_to_all, open_to_all / "inner", theirs / "inner"):
        folder.mkdir()
    os.chown(theirs, 65534, 65534)
    open_to_all.chmod(0o1777)
    link.symlink_to(open_to_all)
    for home, why in (
        (theirs, "belongs to another user"),
        (theirs / "inner", "can be changed by other users"),
        (open_to_all, "can be changed by other users"),
        (link, "can be changed by other users"),
    ):
        with pytest.raises(UsageProblem, match=why):
            installing.place(home)
    # Of a folder like /tmp nobody can replace what is root's.
    assert installing.place(link / "inner").home == open_to_all / "inner"
    open_to_all.chmod(0o777)
    with pytest.raises(UsageProblem, match="can be changed by other users"):
        installing.place(open_to_all / "inner")
    # Nor are another user's settings read, which may name what would run.
    (theirs / "rma.toml").write_text("no_such_setting = 1\n", encoding="utf-8")
    for command in (["agent", "install"], ["agent", "uninstall"], ["agent"], ["join", "http://127.0.0.1:9", "rmaj_x"]):
        done = asked(theirs, *command)
        assert (done.returncode, "belongs to another user" in done.stderr) == (2, True), done.stderr


def test_what_cannot_stand_in_a_services_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageProblem, match="cannot stand in a service's file"):
        installing.job(tmp_path / "a\nb", [], {})
    with pytest.raises(UsageProblem, match="cannot stand in a service's file"):
        installing.job(tmp_path, [], {"PATH": "/bin\x1b"})
    with pytest.raises(UsageProblem, match="cannot stand in a service's file"):
        installing.job(tmp_path / os.fsdecode(b"\xff"), [], {})
    monkeypatch.setattr(sys, "executable", "/opt/$x/python")
    with pytest.raises(UsageProblem, match="install RMA elsewhere"):
        installing.job(tmp_path, [], {})


def test_options_stand_behind_what_they_are_for(tmp_path: Path) -> None:
    before = (["--home", str(tmp_path)], ["--attach", "http://127.0.0.1:1"], ["--log-json"], ["--json"])
    for options in (*before, ["--until-stdin-ends"]):
        done = asked(tmp_path, "agent", *options, "install")
        assert done.returncode == 2
        assert "write the options behind: rma agent install" in done.stderr + done.stdout
    assert "joined no pool" in asked(tmp_path, "agent", "install").stderr


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path) -> None:
    joined(tmp_path)
    for options in (["--attach", "http://elsewhere.example"], ["--model", "x=y#size=3"]):
        done = asked(tmp_path, "agent", "install", *options)
        assert done.returncode == 2, done.stderr


def test_a_shells_settings_that_the_service_will_lack_are_named(system: System, tmp_path: Path) -> None:
    joined(tmp_path / "home")
    more = {"RMA_DRAIN_S": "3", "COORDINATOR_URL": "http://127.0.0.1:9", "RMA_JOIN_TOKEN": "rmaj_secret"}
    more |= {"HTTPS_PROXY": "http://me:secret@proxy.example"}
    env = environment(tmp_path / "home", {**NO_ENGINE, **more})
    done = system.run(*rma("agent", "install", "--print"), env=env)
    assert "does not have this shell's COORDINATOR_URL, RMA_DRAIN_S, RMA_JOIN_TOKEN: write" in done.stderr
    assert "does not have this shell's HTTPS_PROXY: there is a password in it" in done.stderr
    assert 'Environment="DOCKER_HOST=unix:///nonexistent/docker.sock"' in done.stdout
    assert "secret" not in done.stdout


def test_models_are_named_by_their_whole_path(tmp_path: Path) -> None:
    need("systemd")
    joined(tmp_path / "home")
    with systemd(tmp_path / "system") as system:
        command = rma("agent", "install", "--print", "--json", "--model", "small=here/x.gguf#slots=1")
        inside = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", str(tmp_path), *command]
        shown = json.loads(system.run(*inside, env=environment(tmp_path / "home")).stdout)
    assert shown["command"][-1] == f"--model=small={tmp_path}/here/x.gguf#context=4096&slots=1"
