"""Contract suites that third parties run against what they ship; importing them needs no test framework.

`rma plugins check` runs those that need nothing but the plugin, `rma_core.testing.pytest_plugin` the same in pytest.
"""

from __future__ import annotations

from rma_core.deprecations import PluginDeprecation
from rma_core.testing.detectors import DetectorCase, detector_contract
from rma_core.testing.policies import PolicyCase, policy_contract
from rma_core.testing.runtime_offers import OfferCase, offer_contract
from rma_core.testing.runtimes import RuntimeCase, adoption_contract, isolation_contract, runtime_contract
from rma_core.testing.watching import NotReached

__all__ = [
    "DetectorCase",
    "NotReached",
    "OfferCase",
    "PluginDeprecation",
    "PolicyCase",
    "RuntimeCase",
    "adoption_contract",
    "detector_contract",
    "isolation_contract",
    "offer_contract",
    "policy_contract",
    "runtime_contract",
]
