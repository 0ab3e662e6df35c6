"""Contract suites that third parties run against what they ship; importing them needs no test framework."""

from __future__ import annotations

from rma_core.testing.runtimes import RuntimeCase, adoption_contract, isolation_contract, runtime_contract

__all__ = ["RuntimeCase", "adoption_contract", "isolation_contract", "runtime_contract"]
