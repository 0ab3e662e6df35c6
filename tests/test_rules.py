"""Rules of placement: what a file says, what is wrong with it and where, and that pools under them come to rest."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rma_coordinator.domain.census import NOTHING, Census, Group, Standing
from rma_coordinator.domain.placement import Ruling, place
from rma_coordinator.domain.rules import Machine, Machines, Rule, Rules, read_rules
from rma_core.errors import ValidationProblem
from rma_core.record import read_report
from tests.test_model_placement import LLAMA, model
from tests.test_placement import DOCKER, entry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rma_coordinator.domain.rules import Strategy
    from rma_core.catalog import CatalogEntry
    from rma_core.model_catalog import ModelEntry

SMALL = read_report({"cpu_cores": 4, "ram": "8GB", "storage": "100GB"}, subject="small")
LARGE = read_report({"cpu_cores": 16, "ram": "64GB", "storage": "100GB"}, subject="large")
NEEDS: dict[str, Any] = {"cpu_cores": 1, "memory": "1GB"}
OCR, NOTES, REDIS = (entry(name, tier, **NEEDS) for name, tier in (("ocr", 2), ("notes", 3), ("redis", 3)))

FILE = """\
strategy = "spread"

[services.ocr]
wanted = 3
most = 6
prefer = { labels = { site = "lab" } }

[services.redis]
only = { workers = ["worker-0a1b2c3d"], tiers = [2] }
over = "site"

[models."llama3.1:8b"]
wanted = 2
"""


# -- the file ----------------------------------------------------------------------------------------------------------


def read(text: str) -> Rules:
    return read_rules(text, entries=(OCR, NOTES, REDIS, LLAMA), models=(model("llama3.1:8b"),), subject="rules.toml")


def test_a_file_says_how_many_of_what_on_which_machines() -> None:
    rules = read(FILE)
    assert rules.strategy == "spread"
    assert rules.of("ocr") == Rule(wanted=3, most=6, prefer=Machines(labels={"site": "lab"}))
    assert rules.of("redis") == Rule(only=Machines(workers=("worker-0a1b2c3d",), tiers=(2,)), over="site")
    assert rules.of("llm", "llama3.1:8b") == Rule(wanted=2)
    assert rules.of("notes") == Rule()
    assert read("") == Rules()


def test_a_models_own_table_stands_in_place_of_its_services() -> None:
    rules = read('[services.llm]\nover = "site"\n[models."llama3.1:8b"]\nwanted = 2\n')
    assert rules.of("llm", "another") == Rule(over="site")
    assert rules.of("llm", "llama3.1:8b") == Rule(wanted=2)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (('"spread"', '"even"'), "line 1, strategy: is fill, spread or pack"),
        (("wanted = 3", "wanted = -3"), "line 4, services.ocr.wanted: Expected `int` >= 0"),
        (("wanted = 3", "wanted = 7"), "line 5, services.ocr.most: is less than the 7 that are wanted"),
        (("most = 6", "mots = 6"), "line 5, services.ocr.mots: is unknown; there are wanted, most, prefer, only,"),
        (("labels =", "label ="), "line 6, services.ocr.prefer.label: is unknown; there are workers, tiers, labels"),
        (('"lab"', "3"), "line 6, services.ocr.prefer.labels.site: Expected `str`"),
        (('{ labels = { site = "lab" } }', "{}"), "line 6, services.ocr.prefer: names no machines: it needs workers"),
        (
            ("services.redis", "services.radish"),
            "line 8, services.radish: the pool has no such service; there are llm,",
        ),
        (("services.redis", "service.redis"), "line 8, service: is unknown; there are strategy, services, models"),
        (("8b", "70b"), 'line 12, models["llama3.1:70b"]: the pool has no such model; there are llama3.1:8b'),
        (
            ("services.redis", "services.llm]\nmost = 2\n[services.redis"),
            "line 8, services.llm: llm serves models: say",
        ),
        (("[services.ocr]", "services = 3"), "line 3, services: has a table for each: [services.NAME]"),
        (("[services.ocr]", "[services.ocr"), "line 3: expected ']'"),
    ],
)
def test_everything_wrong_is_said_with_the_line_that_it_stands_on(change: tuple[str, str], problem: str) -> None:
    text = FILE.replace(*change)
    assert text != FILE
    if change[1] == "services = 3":
        text = text.split("\n\n[services.redis]", maxsplit=1)[0].replace("wanted", "# ").replace("most", "# ")
        text = text.replace("prefer", "# ")
    with pytest.raises(ValidationProblem, match=r"rules\.toml") as caught:
        read(text)
    assert any(str(one).startswith(problem) for one in caught.value.problems), str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("wanted = " + "9" * 5000, "Exceeds the limit"),
        ("[services.ocr]\nonly = " + "[" * 5000, "is nested too deeply"),
        ("a." * 5000 + "a = 1", "line 1: has more than 200 dots"),
        ("[services]\nocr = 1", "line 2, services.ocr: is a table: [services.ocr]"),
    ],
)
def test_what_would_cost_a_parser_dearly_is_refused_in_a_word(text: str, problem: str) -> None:
    with pytest.raises(ValidationProblem) as caught:
        read(text)
    assert problem in str(caught.value)


def test_of_thousands_of_problems_some_are_told() -> None:
    with pytest.raises(ValidationProblem) as caught:
        read("\n".join(f"key{number} = 1" for number in range(10_000)))
    assert [str(one).partition(":")[0] for one in caught.value.problems] == [
        f"line {number + 1}, key{number}" for number in range(20)
    ]


def test_what_a_pool_has_no_more_is_named_but_no_reason_to_lose_the_rest() -> None:
    rules = read_rules('[services.gone]\nwanted = 2\n[models."old:1b"]\n[services.ocr]\nwanted = 2\n')
    assert rules.unknown((OCR,), ()) == ["gone", "old:1b"]
    assert [one.wanted for one in rules.entries((OCR, NOTES))] == [2, 1]


def test_a_service_of_models_that_is_not_wanted_is_placed_with_none_of_them() -> None:
    for text, wanted in (("[services.llm]\nwanted = 0\n", 0), ('[models."llama3.1:8b"]\nwanted = 5\n', 5)):
        [found] = read(text).wanted_models((model("llama3.1:8b"),))
        assert found.wanted == wanted


# -- a pool under rules ------------------------------------------------------------------------------------------------


class OnPaper:
    """A pool's machines, placed one after the other as a pool does: each leaves the counts while it is looked at."""

    def __init__(self, rules: Rules, catalog: Sequence[CatalogEntry], models: Sequence[ModelEntry] = ()) -> None:
        self.rules, self.catalog = rules, rules.entries(catalog)
        self.models = rules.wanted_models(models)
        self.machines: dict[str, tuple[Any, int, Mapping[str, str]]] = {}
        self.runs: dict[str, tuple[str, ...]] = {}
        self.reasons: dict[str, dict[str, str]] = {}
        self._stands: dict[str, Standing] = {}
        self._census = Census()

    def join(self, name: str, *, report: Any = SMALL, tier: int = 2, **labels: str) -> None:
        self.machines[name] = report, tier, labels
        self.look(name)

    def leave(self, name: str) -> None:
        del self.machines[name], self.runs[name]
        self._census.remove(self._stands.pop(name))

    def look(self, name: str, *, counted: bool = False) -> bool:
        """Choose a machine's services again; say whether anything of it changed."""
        report, tier, labels = self.machines[name]
        was = self.runs.get(name, ()), self._stands.get(name, NOTHING)
        counts = Counter(lane for other, lanes in self.runs.items() if other != name for lane in lanes)
        self._census.remove(was[1])
        ruling = Ruling(self.rules, Machine(worker_id=name, labels=labels), self._census, counted)
        about: dict[str, Any] = {"models": self.models, "pool": counts, "current": was[0], "runtimes": (DOCKER,)}
        found = place(self.catalog, report, tier, ruling=ruling, **about)
        self._census.add(found.standing)
        self.runs[name] = tuple(one.lane for one in found.assignments)
        self._stands[name], self.reasons[name] = found.standing, found.reasons
        return was != (self.runs[name], found.standing)

    def count(self) -> None:
        """Find out who has room for what, where rules ask for that; nobody takes anything."""
        for name in self.machines if self.rules.governing else ():
            self.look(name, counted=True)

    def settle(self) -> int:
        """Look at all machines until nothing changes; return how many rounds that took."""
        for number in range(1, 50):
            changed = {name for name in self.machines if self.look(name)}
            if not changed:
                return number
        raise AssertionError(f"it never comes to rest: {self.runs}")

    def who(self, service: str) -> list[str]:
        return [name for name, lanes in self.runs.items() if service in lanes]


def pool_of(rules: str, machines: Mapping[str, Mapping[str, Any]], *catalog: CatalogEntry) -> OnPaper:
    pool = OnPaper(read(rules), catalog or (OCR, NOTES, REDIS))
    for name, about in machines.items():
        pool.join(name, **about)
    pool.settle()
    return pool


FIVE: dict[str, dict[str, Any]] = {f"m{number}": {"site": "lab" if number > 2 else "attic"} for number in range(5)}


def test_no_more_copies_than_the_most_even_on_machines_that_a_service_is_meant_for() -> None:
    pool = pool_of("[services.ocr]\nmost = 2\n", FIVE)
    assert pool.who("ocr") == ["m0", "m1"]
    assert pool.reasons["m4"]["ocr"] == "the pool runs as many copies as it may (2)"
    pool.leave("m0")
    pool.settle()
    assert pool.who("ocr") == ["m1", "m2"]


def test_a_preferred_machine_that_joins_late_takes_a_copy_over_and_there_are_never_fewer() -> None:
    pool = pool_of(
        "[services.ocr]\nmost = 2\nprefer = { labels = { site = 'lab' } }\n[services.notes]\nwanted = 0\n", {}
    )
    for number in range(3):
        pool.join(f"attic{number}", site="attic")
    pool.settle()
    assert pool.who("ocr") == ["attic0"], "others get what is wanted, and no more"
    pool.join("lab0", site="lab")
    pool.join("lab1", site="lab")
    assert len(pool.who("ocr")) >= 2
    pool.settle()
    assert pool.who("ocr") == ["lab0", "lab1"]


def test_only_some_machines_may_have_a_service_and_the_others_are_told() -> None:
    pool = pool_of("[services.redis]\nwanted = 9\nonly = { labels = { site = 'lab' }, workers = ['m3', 'm0'] }\n", FIVE)
    assert pool.who("redis") == ["m3"]
    assert pool.reasons["m1"]["redis"] == "it is kept to m3, m0 with site = lab"


def test_copies_are_shared_out_over_the_values_of_a_label() -> None:
    attic: dict[str, dict[str, Any]] = {f"a{number}": {"site": "attic"} for number in range(4)}
    machines = attic | {"l0": {"site": "lab"}, "l1": {"site": "lab"}, "x": {}}
    pool = OnPaper(read("[services.redis]\nwanted = 3\nover = 'site'\n"), (REDIS,))
    for name, about in machines.items():
        pool.join(name, **about)
    first = pool.who("redis")
    assert len(first) == 3, "who comes first takes it: the others are not there yet"
    for name in first:
        pool.leave(name)
    for name in ("a8", "a9"):
        pool.join(name, site="attic")
    pool.settle()
    sites = Counter(dict(pool.machines[name][2]).get("site", "") for name in pool.who("redis"))
    assert sites == {"attic": 1, "lab": 1, "": 1}


def test_where_fewer_may_run_the_crowded_place_gives_up_first() -> None:
    pool = pool_of("[services.redis]\nwanted = 5\nmost = 5\nover = 'site'\n", FIVE, REDIS)
    assert len(pool.who("redis")) == 5
    pool.rules = read("[services.redis]\nwanted = 2\nmost = 2\nover = 'site'\n")
    pool.settle()
    assert [pool.machines[name][2]["site"] for name in pool.who("redis")] == ["attic", "lab"]


EXTRA = entry("extra", **NEEDS)


@pytest.mark.parametrize("order", [("busy", "idle", "half"), ("idle", "half", "busy")])
@pytest.mark.parametrize(("strategy", "who"), [("spread", "idle"), ("pack", "busy"), ("fill", "")])
def test_spread_gives_a_copy_to_who_runs_least_and_pack_to_who_runs_most(
    strategy: str, who: str, order: tuple[str, ...]
) -> None:
    pool = OnPaper(read(f"strategy = '{strategy}'\n"), (OCR, NOTES, REDIS))
    pool.join("busy", report=LARGE, tier=3)
    pool.join("half", report=LARGE, tier=2)
    pool.join("idle", report=LARGE, tier=5)
    pool.settle()
    assert [len(pool.runs[name]) for name in ("busy", "half", "idle")] == [3, 1, 0]
    pool.catalog = (*pool.catalog, EXTRA)
    pool.count()
    for name in order:
        pool.look(name)
    pool.settle()
    assert pool.who("extra") == [who or order[0]]
    if who:
        assert pool.reasons["half"]["extra"] in (
            "left to a machine that comes first",
            "enough copies in the pool (1 running, 1 wanted)",
        )


def test_what_a_policy_prefers_comes_before_what_a_rule_and_a_tier_prefer() -> None:
    lab = Machines(labels={"site": "lab"})
    ruling = Ruling(Rules(services={"redis": Rule(prefer=lab)}), Machine(labels={"site": "lab"}))
    assert order(ruling) == ["redis", "ocr", "notes"]
    machine = ruling.machine._replace(prefers=("notes", "ocr"))
    assert order(ruling._replace(machine=machine)) == ["notes", "ocr", "redis"]


def order(ruling: Ruling) -> list[str]:
    return [one.lane for one in place((OCR, NOTES, REDIS), LARGE, 2, pool={}, ruling=ruling).assignments]


def test_who_runs_something_that_was_not_looked_at_yet_does_not_defer_to_others_for_ever() -> None:
    pool = OnPaper(Rules(), (LLAMA,), [model("old:1b", 20)])
    for name in ("m0", "m1"):
        pool.join(name, report=LARGE)
    pool.settle()
    assert pool.who("llm old:1b") == ["m0", "m1"]
    pool.rules = Rules(models={"x:1b": Rule(wanted=1, most=1, strategy="pack")})
    pool.models = (*pool.models, model("x:1b", 1))
    pool.count()
    pool.settle()
    assert len(pool.who("llm x:1b")) == 1


MODELS = (model("a:1b", 1), model("b:1b", 12))
SITES = st.sampled_from(["lab", "attic", ""])
JOINING = st.tuples(SITES, st.sampled_from([SMALL, LARGE]), st.integers(1, 4))
COUNTS = st.integers(0, 5)


@st.composite
def rule_of(draw: st.DrawFn) -> Rule:
    wanted = draw(st.none() | COUNTS)
    most = draw(st.none() | st.integers(1 if wanted is None else wanted, 6))
    lab = Machines(labels={"site": "lab"})
    return Rule(
        wanted=wanted,
        most=most,
        prefer=draw(st.sampled_from([None, lab, Machines(tiers=(4,))])),
        only=draw(st.sampled_from([None, None, None, lab])),
        strategy=draw(st.sampled_from([None, "fill", "spread", "pack"])),
        over=draw(st.sampled_from(["", "site"])),
    )


@settings(max_examples=150)
@given(
    st.lists(JOINING, min_size=1, max_size=9),
    st.dictionaries(st.sampled_from(["ocr", "notes", "redis", "extra"]), rule_of()),
    st.dictionaries(st.sampled_from(["a:1b", "b:1b"]), rule_of()),
    st.sampled_from(["fill", "spread", "pack"]),
    st.data(),
)
def test_whoever_comes_and_goes_a_pool_comes_to_rest_within_its_rules(
    joining: list[tuple[str, Any, int]],
    services: dict[str, Rule],
    models: dict[str, Rule],
    strategy: Any,
    data: st.DataObject,
) -> None:
    rules = Rules(strategy=strategy, services=services, models=models)
    pool = OnPaper(rules, (OCR, NOTES, REDIS, EXTRA, LLAMA), MODELS)
    for number, (site, report, tier) in enumerate(joining):
        pool.join(f"m{number}", report=report, tier=tier, **({"site": site} if site else {}))
        if data.draw(st.booleans()):
            pool.look(data.draw(st.sampled_from(sorted(pool.machines))))
        if len(pool.machines) > 1 and data.draw(st.integers(0, 4)) == 0:
            pool.leave(data.draw(st.sampled_from(sorted(pool.machines))))
    pool.settle()
    lanes = [(one.service, one.wanted, services.get(one.service, Rule())) for one in pool.catalog if one != LLAMA]
    lanes += [(f"llm {one.name}", one.wanted, models.get(one.name, Rule())) for one in pool.models]
    for lane, wanted, rule in lanes:
        who = pool.who(lane)
        assert rule.most is None or len(who) <= rule.most
        if rule.only is not None:
            assert all(pool.machines[name][2].get("site") == "lab" for name in who)
        if len(who) < wanted:
            # Nobody who could take a copy has been left out: each says what it lacks, or that it may not.
            told = {pool.reasons[name][lane] for name in pool.machines if name not in who}
            assert not any("left to" in why or "as it may" in why or "enough" in why for why in told), told


GROUPS = st.builds(Group, st.booleans(), st.sampled_from(["lab", "attic", ""]))
ONE_LANE = st.lists(st.tuples(st.just("x"), GROUPS), max_size=1).map(tuple)
STANDINGS = st.builds(Standing, ONE_LANE, ONE_LANE, st.integers(0, 3))


@given(st.lists(STANDINGS, max_size=12), GROUPS, st.integers(0, 3), st.sampled_from([0, 1, -1]), st.data())
def test_counts_say_the_same_as_a_look_at_every_machine(
    machines: list[Standing], group: Group, runs: int, sign: int, data: st.DataObject
) -> None:
    census, there = Census(), list[Standing]()
    for one in machines:
        census.add(one)
        there.append(one)
        if data.draw(st.integers(0, 2)) == 0:
            census.remove(there.pop(data.draw(st.integers(0, len(there) - 1))))
    having = [of for one in there for _, of in one.has]
    copies = Counter(one.value for one in having)
    assert census.copies("x") == len(having)
    assert census.copies("x", liked=True) == sum(one.liked for one in having)

    def rank(of: Group, much: int) -> tuple[bool, int, int]:
        return not of.liked, copies[of.value], sign * much

    before = [of for one in there for _, of in one.room if rank(of, one.runs) < rank(group, runs)]
    strategies: dict[int, Strategy] = {0: "fill", 1: "spread", -1: "pack"}
    assert census.better("x", group, runs, strategy=strategies[sign]) == len(before)
    copies[group.value] += 1
    same_kind = [one for one in having if one.liked or not group.liked]
    assert census.worse("x", group) == sum(rank(one, 0) > rank(group, 0) for one in same_kind)
    for one in there:
        census.remove(one)
    assert vars(census) == vars(Census())


def test_counts_of_machines_that_are_gone_leave_nothing_behind() -> None:
    pool = pool_of("strategy = 'spread'\n[services.ocr]\nmost = 2\nover = 'site'\n", FIVE)
    for name in FIVE:
        pool.leave(name)
    assert vars(pool._census) == vars(Census())
