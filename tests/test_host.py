"""The plugin host: what is installed, decided by name, imported apart, and said in words when it does not fit."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import pytest

from rma_core import ContainerRuntime, PolicyInput, RuntimeHealth, TierDecision
from rma_core.errors import PluginConflict, PluginInvalid, RMAError, RuntimeAbsent
from rma_core.hookspecs import HOOK_VERSION
from rma_core.host import BUILT_IN, Kind, Plugins, bind, hookimpl
from rma_core.offers import MAX_OBJECTS
from tests.plugin_files import distribute

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from rma_core.models.worker import PluginReport

POLICY = """
from rma_core import TierDecision, hookimpl

class Policy:
    summary = "one tier for all"
    def __init__(self, name): self.name = name
    def decide(self, asked): return TierDecision(tier=3, reason="for all")

@hookimpl
def rma_tier_policies(config):
    yield Policy(config.get("name", "{name}"))
"""
#: What is imported where the host runs: a runtime.
RUNTIME = """
from rma_core import ContainerRuntime, hookimpl

def _nothing(self, *args): ...

@hookimpl
def rma_container_runtimes(config):
    members = dict.fromkeys(ContainerRuntime.__abstractmethods__, _nothing)
    members |= {"name": config.get("name", "{name}"), "isolated": True}
    yield type("Runtime", (ContainerRuntime,), members)()
"""


class Policy:
    """A tier policy that fits."""

    summary = "everyone is tier 3"

    def __init__(self, name: str) -> None:
        self.name = name

    def decide(self, asked: PolicyInput) -> TierDecision:
        return TierDecision(tier=3, reason="everyone is")


class Offers:
    """A plugin, as an object, whose hook returns what it was made with."""

    RMA_HOOK_VERSION = HOOK_VERSION

    def __init__(self, result: object) -> None:
        self.result = result

    @hookimpl
    def rma_tier_policies(self, config: dict[str, object]) -> object:
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a distribution for one test; its modules are forgotten at the end."""
    monkeypatch.setattr(sys, "modules", sys.modules.copy())

    def installed(distribution: str, group: str, points: Mapping[str, str], **modules: str) -> None:
        folder = distribute(tmp_path / distribution, distribution, {group: points}, version="1.2", modules=modules)
        monkeypatch.syspath_prepend(str(folder))

    return installed


def discovered(name: str, plugins: Plugins) -> PluginReport:
    (report,) = [r for r in plugins.reports() if r.name == name]
    return report


def registered(plugin: object, kind: Kind = "policy") -> tuple[Plugins, PluginReport]:
    plugins = Plugins()
    plugins.register(plugin, name="mine", kind=kind, distribution="my-plugin", version="0.1")
    plugins.policies()
    return plugins, plugins.reports()[0]


def test_an_installed_plugin_is_found_imported_and_used(install: Callable[..., None]) -> None:
    install(
        "rma-runtime-fair", "rma.runtimes", {"fair": "fair_runtime"}, fair_runtime=RUNTIME.replace("{name}", "fair")
    )
    plugins = Plugins.discover(kinds=["runtime"])
    report = discovered("fair", plugins)
    assert (report.state, report.distribution, report.version, report.kind) == (
        "active",
        "rma-runtime-fair",
        "1.2",
        "runtime",
    )
    assert report.import_seconds is not None
    assert set(plugins.runtimes()) >= {"fair"}
    assert "other" in plugins.runtimes({"fair": {"name": "other"}})


def test_a_policy_that_is_not_built_in_is_never_imported_here(install: Callable[..., None]) -> None:
    install("rma-policy-fair", "rma.policies", {"fair": "fair_policy"}, fair_policy="raise SystemExit('imported')")
    plugins = Plugins.discover(strict=True)
    assert discovered("fair", plugins).state == "active"
    assert "fair" not in plugins.policies()
    assert [one.name for one in plugins.policy_plugins()] == ["fair"]
    assert "fair_policy" not in sys.modules


def test_a_plugin_is_blocked_by_name_before_it_is_imported(install: Callable[..., None]) -> None:
    install("evil", "rma.runtimes", {"evil": "evil_runtime"}, evil_runtime="raise SystemExit('imported')")
    for options in ({"blocked": frozenset({"evil"})}, {"only": frozenset({"process"})}):
        report = discovered("evil", Plugins.discover(kinds=["runtime"], strict=True, **options))  # type: ignore[arg-type]
        assert (report.state, report.import_seconds) == ("blocked", None)
        assert "RMA_" in report.reason
    assert "evil_runtime" not in sys.modules


def test_a_plugin_waits_for_approval_where_that_is_required(install: Callable[..., None]) -> None:
    install("new", "rma.policies", {"fresh": "fresh_policy"}, fresh_policy=POLICY.replace("{name}", "fresh"))

    def state(*approved: str) -> str:
        plugins = Plugins.discover(kinds=["policy"], approval_required=True, approved=frozenset(approved))
        assert {r.state for r in plugins.reports() if r.distribution == BUILT_IN} == {"active"}
        return discovered("fresh", plugins).state

    assert (state(), state("fresh"), state("*")) == ("unapproved", "active", "active")
    assert discovered("fresh", Plugins.discover(kinds=["policy"])).state == "active"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import nothing_there", "module 'nothing_there' is not installed here"),
        ("raise ValueError('broken')", "cannot be imported: ValueError: broken"),
        ("raise SystemExit(2)", "cannot be imported: SystemExit: 2"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_failed_and_the_others_go_on(
    install: Callable[..., None], source: str, reason: str
) -> None:
    install("broken", "rma.runtimes", {"broken": "broken_runtime"}, broken_runtime=source)
    install("fine", "rma.runtimes", {"fine": "fine_runtime"}, fine_runtime=RUNTIME.replace("{name}", "fine"))
    plugins = Plugins.discover(kinds=["runtime"])
    report = discovered("broken", plugins)
    assert report.state == "failed"
    assert reason in report.reason
    assert "fine" in plugins.runtimes()


def test_strict_mode_raises_what_a_plugin_raises(install: Callable[..., None]) -> None:
    install("broken", "rma.runtimes", {"broken": "broken_runtime"}, broken_runtime="raise ValueError('broken')")
    with pytest.raises(ValueError, match="broken"):
        Plugins.discover(kinds=["runtime"], strict=True)


def test_two_plugins_of_one_name_are_both_refused_and_both_named(install: Callable[..., None]) -> None:
    for maker in ("first", "second"):
        install(maker, "rma.policies", {"fair": f"fair_{maker}"}, **{f"fair_{maker}": "raise SystemExit('imported')"})
    plugins = Plugins.discover(kinds=["policy"])
    twins = [r for r in plugins.reports() if r.name == "fair"]
    assert [r.state for r in twins] == ["invalid", "invalid"]
    assert {r.distribution for r in twins} == {"first", "second"}
    assert "first 1.2 and second 1.2; none of them is used" in twins[0].reason
    assert "fair_first" not in sys.modules
    assert "fair" not in plugins.policies()
    with pytest.raises(PluginConflict):
        Plugins.discover(kinds=["policy"], strict=True)


def test_a_name_that_a_built_in_plugin_has_is_refused_too(install: Callable[..., None]) -> None:
    install("usurper", "rma.detectors", {"host": "usurper_host"})
    plugins = Plugins.discover(kinds=["detector"])
    assert {r.state for r in plugins.reports() if r.name == "host"} == {"invalid"}
    assert "host" not in {d.name for d in plugins.detectors()}


def test_two_policies_of_one_name_disable_both_plugins_and_name_them() -> None:
    plugins = Plugins()
    for name in ("a", "b", "c"):
        offer = [Policy("fair" if name != "c" else "other")]
        plugins.register(Offers(offer), name=name, kind="policy", distribution=f"from-{name}", version="1")
    assert set(plugins.policies()) == {"other"}
    assert [r.state for r in plugins.reports()] == ["invalid", "invalid", "active"]
    assert "policy 'fair' is given 2 times, by from-a 1 and from-b 1" in plugins.reports()[0].reason


def test_a_conflict_ends_when_its_cause_does() -> None:
    plugins, offers = Plugins(), Offers([Policy("fair")])
    plugins.register(Offers([Policy("fair")]), name="a", kind="policy")
    plugins.register(offers, name="b", kind="policy")
    assert plugins.policies() == {}
    offers.result = None
    assert set(plugins.policies()) == {"fair"}
    assert {r.state for r in plugins.reports()} == {"active"}


def test_one_unreadable_distribution_hides_no_other(install: Callable[..., None], tmp_path: Path) -> None:
    install("torn", "rma.policies", {"torn": "torn_policy"})
    (tmp_path / "torn" / "torn-1.2.dist-info" / "entry_points.txt").write_text("[rma.policies]\nno equals sign\n")
    install("fine", "rma.policies", {"fine": "fine_policy"}, fine_policy=POLICY.replace("{name}", "fine"))
    assert discovered("fine", Plugins.discover(kinds=["policy"])).state == "active"


def test_an_unapproved_plugin_with_a_built_in_name_changes_nothing(install: Callable[..., None]) -> None:
    install("usurper", "rma.detectors", {"host": "usurper_host"})
    plugins = Plugins.discover(kinds=["detector"], approval_required=True)
    plugins.note("detector", "host", state="active")
    assert {(r.distribution, r.state) for r in plugins.reports() if r.name == "host"} == {
        (BUILT_IN, "active"),
        ("usurper", "unapproved"),
    }
    assert [d.distribution for d in plugins.detectors() if d.name == "host"] == [BUILT_IN]


def test_nothing_of_a_detector_is_imported_here(install: Callable[..., None]) -> None:
    install("hardware", "rma.detectors", {"radar": "radar_detector"}, radar_detector="raise SystemExit('imported')")
    plugins = Plugins.discover(kinds=["detector"], strict=True)
    assert "radar" in {d.name for d in plugins.detectors()}
    assert "radar_detector" not in sys.modules


def test_built_in_plugins_come_first_whatever_the_names(install: Callable[..., None]) -> None:
    install("aaa", "rma.detectors", {"aaa": "aaa_detector"})
    assert Plugins.discover(kinds=["detector"]).detectors()[0].distribution == BUILT_IN


async def _is_async(config: object) -> None: ...
async def _generates(config: object) -> object:
    yield None


def _plain(config: object) -> None: ...
def _nothing() -> None: ...
def _newer(config: object, context: object) -> None: ...
def _newer_with_default(config: object, context: object = None) -> None: ...
def _defaulted(config: object = None) -> None: ...
def _keyword_only(*, config: object) -> None: ...
def _star(*config: object) -> None: ...
def _double_star(**config: object) -> None: ...


class Module:
    """A module made of functions, each marked unless its name ends in ``unmarked``."""

    def __init__(self, **functions: Callable[..., object]) -> None:
        for name, function in functions.items():
            marked = not name.endswith("_unmarked")
            setattr(self, name.removesuffix("_unmarked"), _marked(function) if marked else function)


def _marked(function: Callable[..., object]) -> Callable[..., object]:
    import types

    if not isinstance(function, types.FunctionType):
        return function
    return hookimpl(types.FunctionType(function.__code__, globals(), argdefs=function.__defaults__))


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        ({"rma_tier_policies": _is_async}, "is `async def`; hooks are plain functions: write `def rma_tier_policies"),
        ({"rma_tier_policies": _generates}, "is `async def`"),
        ({"rma_tier_policy": _plain}, "there is no such hook; did you mean rma_tier_policies?"),
        ({"rma_fly": _plain}, "there is no such hook; the hooks are rma_detect_devices, "),
        ({"rma_tier_policies": _newer}, "asks for 'context', which this rma-core does not give: it is rma_tier_pol"),
        ({"rma_tier_policies": _defaulted}, "'config' has a default, which would never be used"),
        ({"rma_tier_policies": _keyword_only}, "'config' is keyword-only and would never be filled"),
        ({"rma_tier_policies": _star}, "takes *config"),
        ({"rma_tier_policies": _double_star}, "takes **config"),
        ({"rma_detect_devices": _plain}, "move that function to a module with an entry point in rma.detectors"),
        ({"rma_tier_policies": _plain, "rma_detect_devices": _plain}, "entry point is in rma.policies, where rma_tier"),
        ({"rma_tier_policies_unmarked": _plain}, "rma_tier_policies is not marked: put @hookimpl"),
        ({"rma_tier_policys_unmarked": _plain}, "has a function rma_tier_policys, but no such hook exists; did you me"),
        ({}, "has no function rma_tier_policies marked with @hookimpl"),
    ],
)
def test_a_function_that_does_not_fit_its_hook_is_refused_with_what_to_do(
    functions: dict[str, Callable[..., object]], words: str
) -> None:
    _, report = registered(Module(**functions))
    assert report.state == "invalid"
    assert words in report.reason


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (HOOK_VERSION, ""),
        (
            HOOK_VERSION + 1,
            f"for version {HOOK_VERSION + 1} of RMA's hooks, and this rma-core has version {HOOK_VERSION}",
        ),
        (0, "update the plugin"),
        ("1", "RMA_HOOK_VERSION is '1': write a whole number"),
        (True, "write a whole number"),
    ],
)
def test_a_plugin_for_other_hooks_is_refused_before_its_functions_are_looked_at(version: object, words: str) -> None:
    module = Module(rma_tier_policies=_newer if words else _plain)
    module.RMA_HOOK_VERSION = version  # type: ignore[attr-defined]  # as a module's own
    _, report = registered(module)
    assert report.state == ("invalid" if words else "active")
    assert words in report.reason


@pytest.mark.parametrize("function", [_plain, _nothing, _newer_with_default])
def test_a_hook_may_leave_arguments_out_and_give_newer_ones_a_default(function: Callable[..., object]) -> None:
    _, report = registered(Module(rma_tier_policies=function))
    assert (report.state, report.reason) == ("active", "")


def test_wrappers_and_second_implementations_are_refused() -> None:
    class Wrapper:
        @hookimpl(wrapper=True)
        def rma_tier_policies(self, config: object) -> object:
            return (yield)

    class Twice:
        @hookimpl
        def rma_tier_policies(self) -> None: ...

        @hookimpl(specname="rma_tier_policies")
        def again(self) -> None: ...

    with pytest.raises(PluginInvalid, match="is a wrapper"):
        bind(Wrapper(), "rma.policies")
    with pytest.raises(PluginInvalid, match="implements rma_tier_policies twice"):
        bind(Twice(), "rma.policies")


class Nameless(Policy):
    """A policy with a name nobody could type."""

    def __init__(self) -> None:
        super().__init__("Über Policy!")


class AsyncPolicy(Policy):
    """A policy that would have to be awaited."""

    async def decide(self, asked: PolicyInput) -> TierDecision:  # type: ignore[override]
        return super().decide(asked)


def _without_end() -> object:
    while True:
        yield Policy("again")


@pytest.mark.parametrize(
    ("result", "state", "words"),
    [
        (7, "invalid", "returned a int: return a list"),
        ("threshold", "invalid", "returned a str: return a list"),
        (Policy("bare"), "invalid", "returned a Policy: return a list"),
        ([object()], "invalid", "object is no TierPolicy: it needs `name`, `summary` and `decide(asked)`"),
        ([Policy], "invalid", "Policy is a class: return an object made from it"),
        ([Nameless()], "invalid", "is named 'Über Policy!': use lower-case letters"),
        ([AsyncPolicy("later")], "invalid", "has an `async def decide`; policies are plain functions"),
        (_without_end(), "invalid", f"gave more than {MAX_OBJECTS} objects"),
        (RuntimeError("oops"), "failed", "rma_tier_policies: RuntimeError: oops"),
        (RuntimeAbsent("no engine"), "failed", "rma_tier_policies: no engine"),
        (SystemExit(3), "failed", "rma_tier_policies: SystemExit: 3"),
    ],
)
def test_what_a_hook_returns_or_raises_disables_its_plugin_alone(result: object, state: str, words: str) -> None:
    plugins, report = registered(Offers(result))
    assert (report.state, words in report.reason) == (state, True), report.reason
    plugins.register(Offers([Policy("fine")]), name="other", kind="policy")
    assert set(plugins.policies()) == {"fine"}


@pytest.mark.parametrize("result", [None, [], ()])
def test_a_hook_may_give_nothing(result: object) -> None:
    assert registered(Offers(result))[1].state == "active"


def test_a_generator_that_raises_midway_gives_nothing() -> None:
    def broken() -> object:
        yield Policy("early")
        raise RuntimeError("later")

    plugins, report = registered(Offers(broken()))
    assert report.state == "failed"
    assert plugins.policies() == {}


def test_a_runtime_is_used_by_its_own_name_and_must_derive_from_the_interface() -> None:
    class Half(ContainerRuntime):
        name = "half"
        isolated = True

        async def probe(self) -> RuntimeHealth:
            return RuntimeHealth(state="healthy")

    whole = type("Whole", (Half,), dict.fromkeys(ContainerRuntime.__abstractmethods__ - {"probe"}, _plain))
    vague = type("Vague", (whole,), {"isolated": "yes"})

    def runtimes(make: Callable[[], object]) -> tuple[Plugins, dict[str, ContainerRuntime]]:
        class Plugin:
            @hookimpl
            def rma_container_runtimes(self, config: object) -> object:
                return [make()]

        plugins = Plugins()
        plugins.register(Plugin(), name="mine", kind="runtime")
        return plugins, plugins.runtimes()

    assert set(runtimes(whole)[1]) == {"half"}
    for make, words in (
        (Half, "TypeError: Can't instantiate abstract class Half"),
        (object, "object is no ContainerRuntime: derive its class"),
        (vague, "needs `isolated`, True or False"),
    ):
        plugins, found = runtimes(make)
        assert found == {}
        assert words in plugins.reports()[0].reason


def test_each_plugin_gets_a_copy_of_its_own_table() -> None:
    seen: list[dict[str, object]] = []

    class Greedy:
        @hookimpl
        def rma_tier_policies(self, config: dict[str, object]) -> None:
            seen.append(dict(config))
            config.clear()

    plugins = Plugins()
    plugins.register(Greedy(), name="greedy", kind="policy")
    config: dict[str, dict[str, object]] = {"greedy": {"bar": 7}, "other": {"token": "x"}}
    plugins.policies(config)
    assert seen == [{"bar": 7}]
    assert config == {"greedy": {"bar": 7}, "other": {"token": "x"}}


def test_tracing_logs_plugin_arguments_result_and_time(caplog: pytest.LogCaptureFixture) -> None:
    plugins = Plugins(trace=True)
    plugins.register(Offers([Policy("fair")]), name="fair", kind="policy")
    with caplog.at_level(logging.INFO, "rma_core.host"):
        plugins.policies({"fair": {"api_key": "hidden", "bar": 7}})
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("fair.rma_tier_policies(config={'api_key': '…', 'bar': 7}) -> 1 objects in ")


def test_a_change_of_state_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    plugins, offers = Plugins(), Offers(RuntimeError("oops"))
    plugins.register(offers, name="mine", kind="policy")
    with caplog.at_level(logging.INFO, "rma_core.host"):
        for _ in range(3):
            plugins.policies()
        offers.result = []
        plugins.policies()
    assert [getattr(r, "action", "") for r in caplog.records] == ["plugin_failed", "plugin_active"]


def test_every_failure_here_is_one_the_command_line_can_show() -> None:
    assert issubclass(PluginConflict, RMAError)
    assert issubclass(PluginInvalid, RMAError)
