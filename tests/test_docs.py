"""README.md and docs/ are true: every snippet runs, everything there is has its place, nothing is made up."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING, Any

import click
import msgspec
import pytest

import rma_coordinator
import rma_core
from docs import generate
from rma_coordinator.api.routes import ROUTES
from rma_coordinator.certificate import own_pair
from rma_coordinator.domain.rules import read_rules
from rma_core import catalog, hookspecs, model_catalog
from rma_core.models.strict import convert
from rma_core.policy_file import read_policy
from rma_core.settings import AgentSettings, CoordinatorSettings, describe, load_settings
from tests.needs import need
from tests.ports import free_port
from tests.snippets import LANGUAGES, PAGES, ROOT, Pool, Sandbox, Snippet, missing, snippets, steps

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REFERENCE = ROOT / "docs" / "reference"
#: Everything people read: the pages, the reference, and what stands beside the code.
READ = (*PAGES, *sorted(REFERENCE.glob("*.md")), ROOT / "CHANGELOG.md")
PROJECTS = (ROOT / "pyproject.toml", *sorted(ROOT.glob("*/pyproject.toml")), *sorted(ROOT.glob("*/*/pyproject.toml")))


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """One `rma up`, as on the first page, started when it is first needed."""
    yield from running(tmp_path_factory.mktemp("up"), lan=False)


@pytest.fixture(scope="module")
def up_lan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """One `rma up --lan` for all other pages."""
    yield from running(tmp_path_factory.mktemp("up-lan"), lan=True)


def running(folder: Path, *, lan: bool) -> Iterator[Pool]:
    need("pypi")
    with contextlib.closing(Pool(folder, lan=lan)) as pool:
        yield pool


# -- every snippet -----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_snippet_of_a_page_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    found = snippets(page)
    for snippet in found:
        if snippet.needs:
            need(snippet.needs)
    pool: Pool | None = None
    if any(map(needs_pool, found)):
        pool = request.getfixturevalue("up" if page.name == "README.md" else "up_lan")
    sandbox = Sandbox(tmp_path, replaced=pool.replaced() if pool else {})
    namespace: dict[str, Any] = {"__name__": page.stem}
    with contextlib.closing(sandbox):
        for snippet in found:
            try:
                run(snippet, sandbox, pool, namespace)
            except Exception as error:
                error.add_note(f"in the snippet at {snippet.place}")
                raise


def needs_pool(snippet: Snippet) -> bool:
    """Whether a snippet is about a pool that runs: by its words, or by the made-up addresses in it."""
    made_up = ("192.168.1.20", "127.0.0.1:8080", "_YOUR_")
    of_a_pool = {"pool", "up", "notes"} & set(snippet.words)
    return snippet.language != "text" and bool(of_a_pool or any(word in snippet.text for word in made_up))


def run(snippet: Snippet, sandbox: Sandbox, pool: Pool | None, namespace: dict[str, Any]) -> None:
    """Do with a snippet what its first word says."""
    if snippet.file:
        path = sandbox.path(snippet.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        before = f"{path.read_text(encoding='utf-8')}\n" if "more" in snippet.words else ""
        path.write_text(before + snippet.text, encoding="utf-8")
    if snippet.language == "python" and not snippet.is_part:
        exec(compile(sandbox.command(snippet.text), snippet.place, "exec"), namespace)
    elif snippet.language == "toml":
        read_toml(snippet, sandbox)
    elif snippet.language == "json":
        json.loads(snippet.text)
    elif snippet.language == "console":
        run_console(snippet, sandbox, pool)


def read_toml(snippet: Snippet, sandbox: Sandbox) -> None:
    table = tomllib.loads(snippet.text)
    if "catalog" in snippet.words:
        convert(table, catalog.CatalogEntry, subject=snippet.place)
    if "model" in snippet.words:
        convert(table, model_catalog.ModelEntry, subject=snippet.place)
    if "rules" in snippet.words:
        read_rules(snippet.text, subject=snippet.place)
    if "policy" in snippet.words:
        read_policy(snippet.text, name="snippet", subject=snippet.place)
    if "settings" in snippet.words:
        path = sandbox.path("settings-of-a-snippet.toml")
        path.write_text(snippet.text, encoding="utf-8")
        for kind, other in ((AgentSettings, CoordinatorSettings), (CoordinatorSettings, AgentSettings)):
            load_settings(kind, flags={}, environment={}, file=path, known=(other,))


def run_console(snippet: Snippet, sandbox: Sandbox, pool: Pool | None) -> None:
    words = set(snippet.words)
    if "stops" in words:
        sandbox.close()
    commands = steps(snippet.text)
    for number, (command, documented) in enumerate(commands, 1):
        if "up" in words:
            assert pool is not None
            wanted = missing([sandbox.command(line) for line in documented], pool.printed)
            assert not wanted, f"`rma up` did not print {wanted!r} (or not in that order), but:\n{pool.printed}"
            continue
        machine = pool.machine if pool and "pool" in words else sandbox
        if pool and "pool" in words:
            machine.replaced = sandbox.replaced
        if "terminal" in words and number == len(commands):
            machine.run_in_terminal(command, documented, stays="stays" in words)
        else:
            machine.run(command, documented, fails="fails" in words and number == len(commands), real="real" in words)


@pytest.mark.parametrize("page", READ, ids=name)
def test_every_fence_says_what_it_is(page: Path) -> None:
    unknown = [f"{s.place}: {s.language or 'nothing'}" for s in snippets(page) if s.language not in LANGUAGES]
    assert not unknown
    fences = [line for line in page.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("```")]
    assert len(fences) == 2 * len(snippets(page)), f"{name(page)} has a fence that is indented or never closed"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_is_not_run_does_not_look_as_if_it_were(page: Path) -> None:
    assert not [s.place for s in snippets(page) if s.language == "text" and re.search(r"^\$ ", s.text, re.MULTILINE)]


def test_the_comparison_finds_a_line_that_was_not_printed() -> None:
    printed = "\x1b[1mworker-1234abcd\x1b[0m   ● healthy\n ───── \nload 0%\n"
    assert missing(["worker-… ● healthy", "load …"], printed) == ""
    assert missing(["load …", "worker-… ● healthy"], printed) == "worker-… ● healthy"
    assert missing(["worker-… ● offline"], printed) == "worker-… ● offline"


@pytest.fixture
def nginx(up: Pool, tmp_path: Path) -> Iterator[Sandbox]:
    """A machine that reaches the pool through nginx, set up as docs/admins.md says, at ``https://pool.example``."""
    need("nginx")
    block = next(s.text for s in snippets(ROOT / "docs" / "admins.md") if s.text.startswith("server {"))
    pair = own_pair(tmp_path / "tls", names=["localhost"])
    port = free_port()
    for written, meant in (
        ("443 ssl", f"127.0.0.1:{port} ssl"),
        ("/etc/ssl/pool.pem", str(pair.cert)),
        ("/etc/ssl/pool.key", str(pair.key)),
        ("http://127.0.0.1:8080", up.url),
    ):
        assert written in block
        block = block.replace(written, meant)
    folders = "".join(f"{kind}_temp_path {tmp_path};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    head = f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}}"
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(f"{head} http {{ access_log off; {folders} {block} }}", encoding="utf-8")
    replaced = {**up.replaced(), "https://pool.example": f"https://localhost:{port}"}
    machine = Sandbox(tmp_path / "machine", replaced=replaced, more={"SSL_CERT_FILE": str(pair.cert)})
    process = subprocess.Popen(["nginx", "-c", configuration, "-p", tmp_path])
    try:
        with contextlib.closing(machine):
            yield machine
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.timeout(300)
def test_the_nginx_snippet_carries_workers_and_clients(nginx: Sandbox) -> None:
    command = "rma join https://pool.example rmaj_YOUR_TOKEN --yes"
    nginx.run_in_terminal(command, ["… registered with the coordinator"], stays=True)
    nginx.run("until rma status | grep -q channel; do sleep 0.2; done; rma status", ["… connection: channel"])
    asked = (
        "rma infer notes 'Pools lend machines.' -o include=text --coordinator https://pool.example --key rmac_YOUR_KEY"
    )
    nginx.run(asked, ['{"text":"Pools lend machines."…'])


# -- the reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", sorted(generate.pages()))
def test_the_reference_is_what_the_code_says(page: str) -> None:
    on_disk = (REFERENCE / page).read_text(encoding="utf-8") if (REFERENCE / page).exists() else ""
    assert on_disk == generate.pages()[page], "run `make docs`"


def test_the_reference_has_no_page_that_nothing_writes() -> None:
    assert {path.name for path in REFERENCE.glob("*.md")} == set(generate.pages())


def test_every_hook_is_documented_with_its_exact_arguments() -> None:
    authors = (ROOT / "docs" / "plugin-authors.md").read_text(encoding="utf-8")
    for group, hook in hookspecs.GROUPS.items():
        code = getattr(hookspecs, hook).__code__
        call = f"{hook}({', '.join(code.co_varnames[: code.co_argcount])})"
        assert call in authors, f"docs/plugin-authors.md does not show {call}"
        assert group in authors, f"docs/plugin-authors.md does not name {group}"
        assert hook in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_command_and_option_is_in_the_reference() -> None:
    page = (REFERENCE / "commands.md").read_text(encoding="utf-8")
    sections = {part.partition("`")[0]: part for part in page.split("\n## `")[1:]}
    commands = dict(generate.walk())
    assert set(sections) == set(commands)
    for full_name, command in commands.items():
        options = [o for p in command.params if isinstance(p, click.Option) and not p.hidden for o in p.opts]
        assert not [option for option in options if option not in sections[full_name]], full_name


@pytest.mark.parametrize("kind", [AgentSettings, CoordinatorSettings])
def test_every_setting_is_in_the_reference(kind: type[AgentSettings | CoordinatorSettings]) -> None:
    page = (REFERENCE / "settings.md").read_text(encoding="utf-8")
    assert not [info.name for info in describe(kind) if f"| `{info.name}` |" not in page or info.sentence not in page]


def test_every_http_call_is_in_the_reference() -> None:
    page = (REFERENCE / "http.md").read_text(encoding="utf-8")
    assert not [route for route in ROUTES if f"| `{route.method} {route.path}` | {route.access} |" not in page]


@pytest.mark.parametrize("kind", [catalog.CatalogEntry, catalog.Needs, catalog.Limits, catalog.ProcessForm])
def test_every_field_of_a_catalog_entry_is_in_the_admins_page(kind: type[msgspec.Struct]) -> None:
    page = (ROOT / "docs" / "admins.md").read_text(encoding="utf-8")
    prefix = {catalog.Needs: "needs.", catalog.Limits: "limits.", catalog.ProcessForm: "process."}.get(kind, "")
    fields = [field.name for field in msgspec.structs.fields(kind)]
    assert not [field for field in fields if f"`{prefix}{field}" not in page]


def test_the_generator_can_check_without_writing() -> None:
    command = [sys.executable, "docs/generate.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


# -- the house ---------------------------------------------------------------------------------------------------------


def test_all_distributions_carry_one_version() -> None:
    versions = {name(path): tomllib.loads(path.read_text(encoding="utf-8"))["project"]["version"] for path in PROJECTS}
    versions |= {"rma_core": rma_core.__version__, "rma_coordinator": rma_coordinator.__version__}
    assert set(versions.values()) == {rma_core.__version__}, versions


def test_the_changelog_has_an_unreleased_part_with_hooks() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased = text.split("\n## ")[1]
    assert unreleased.startswith("[Unreleased]")
    assert "### Hooks" in unreleased


@pytest.mark.parametrize("page", READ, ids=name)
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        file, _, heading = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (heading and heading not in headings(target)):
            broken.append(link)
    assert not broken


def headings(page: Path) -> set[str]:
    """Return the anchors that a page's headings have on the forges."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", READ, ids=name)
def test_no_page_names_a_place_on_the_authors_machine(page: Path) -> None:
    places = r"(?<![\w.~])/(?:work|farm|home/\w|Users/\w|root)\b"
    hosts = r"py[p]i\.org|pythonhost[e]d|index-url|registry\.npm[j]s"
    forbidden = re.compile(f"{places}|{hosts}", re.IGNORECASE)
    text = page.read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if forbidden.search(line)]
