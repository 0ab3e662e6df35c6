"""RMA's coordinator as a gateway."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from bench import _common, _stub
from bench._stub import Aim


def main() -> int:
    parser = _common.parser(__doc__)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    asked = _common.read_options(given)
    served, loading = _common.split_cores()
    seconds = asked.seconds
    with tempfile.TemporaryDirectory(prefix="rma-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        stub = _stub.build(folder)
        _common.pin(loading)
        direct = stack.enter_context(_stub.backend(stub, folder / "backend", loading))
        (folder / "catalog").mkdir()
        server = stack.enter_context(
            _common.coordinator(
                folder / "home",
                cores=served,
                arguments=("--catalog", str(folder / "catalog"), "--log-level", "warning"),
            )
        )
        stack.enter_context(_stub.workers(stub, server, 16, loading))
        sides = {"alone": Aim(direct.url), "rma": Aim(server.url, server.key, (server.process,))}
        plain = _stub.request(tokens=16)
        for name, aim in sides.items():
            print(name)
            one = _stub.load(stub, "requests", aim, plain, count=1, seconds=min(seconds, 2))
            print(f"  1 connection: p50 {one.p50_us} p99 {one.p99_us} us", one.failures)
            many = _stub.load(stub, "requests", aim, plain, count=32, seconds=seconds)
            print(
                f"  32 connections: {many.per_s:.0f}/s p50 {many.p50_us} p99 {many.p99_us} us",
                many.failures,
                tail(many),
            )
            streamed = _stub.request(tokens=1_000_000, rate=50, stream=True)
            for n in (60, 120, 200, 300, 400, 600):
                some = _stub.load(stub, "streams", aim, streamed, count=n, seconds=seconds, warm_s=2)
                print(
                    f"  {n} streams: {some.per_s:.0f} tokens/s of {n * 50}, late p50 {some.p50_us} p99 {some.p99_us} us",
                    some.failures,
                    tail(some),
                )
    return 0


def tail(x):
    return f"{x.cpu_us():.1f} us CPU each, busy {x.busy():.2f}, waited {x.waited():.2f}" if x.used else ""


if __name__ == "__main__":
    raise SystemExit(main())
