"""A second machine: a network namespace with one cable to this one, into which no connection can be opened."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING, Literal, NamedTuple

from tests.needs import need

if TYPE_CHECKING:
    from collections.abc import Iterator


class Machine(NamedTuple):
    """A namespace: its name, its own address, the address of this side of the cable, and its interface."""

    name: str
    address: str
    host: str
    interface: str

    def command(self, *words: str) -> list[str]:
        """Return a command line that runs there."""
        return ["ip", "netns", "exec", self.name, *words]

    def cable(self, state: Literal["up", "down"]) -> None:
        """Plug the cable in, or pull it."""
        run(*self.command("ip", "link", "set", self.interface, state))


def run(*words: str) -> None:
    """Run one configuration step; its words are the failure."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


@contextlib.contextmanager
def machine(number: int) -> Iterator[Machine]:
    """Make a second machine whose firewall drops every connection that is opened from outside."""
    need("netns")
    here, there = f"rh{number}-{os.getpid() % 10000}", f"rn{number}-{os.getpid() % 10000}"
    made = Machine(f"rma-m{number}-{os.getpid()}", f"10.231.{number}.2", f"10.231.{number}.1", there)
    run("ip", "netns", "add", made.name)
    try:
        run("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", made.name)
        run("ip", "address", "add", f"{made.host}/30", "dev", here)
        run("ip", "link", "set", here, "up")
        run(*made.command("ip", "address", "add", f"{made.address}/30", "dev", there))
        run(*made.command("ip", "link", "set", there, "up"))
        run(*made.command("ip", "link", "set", "lo", "up"))
        run(*made.command("iptables", "-A", "INPUT", "-i", there, "-p", "tcp", "--syn", "-j", "DROP"))
        yield made
    finally:
        # With its namespace alone the cable would go a little later, and its name would not be free yet.
        subprocess.run(["ip", "link", "delete", here], capture_output=True, timeout=20, check=False)
        run("ip", "netns", "delete", made.name)
