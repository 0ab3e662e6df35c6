"""The status page in a real browser: it shows the pool, keeps the key to itself, and obeys its own policy."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

from tests.needs import need
from tests.pools import NO_ENGINE, pool

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

#: Milliseconds of the page's own time: its data is fetched and drawn within them.
BUDGET_MS = 5000
#: Without these Chromium tries to reach its maker's servers all the time.
QUIET = (
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
    *("--no-first-run", "--no-sandbox", "--disable-gpu", "--headless"),
)


def browse(url: str, profile: Path) -> tuple[str, str]:
    """Return the page as it stands after a while, and what the browser's console said."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    options = (f"--user-data-dir={profile}", f"--virtual-time-budget={BUDGET_MS}", "--enable-logging=stderr", "--v=0")
    done = subprocess.run(
        [program, *QUIET, *options, "--dump-dom", url], capture_output=True, text=True, timeout=90, check=True
    )
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, console


def test_the_page_shows_the_pool_to_who_has_a_key_and_a_form_to_who_has_none(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    need("chromium")
    (tmp_path / "catalog").mkdir()
    env = {**NO_ENGINE, "RMA_CATALOG": str(tmp_path / "catalog")}
    with pool(tmp_path_factory.mktemp("page"), "--port", "0", env=env) as made:
        [worker] = made.workers()
        page, console = browse(f"{made.url}/#key={made.key}", tmp_path / "with")
        assert worker["worker_id"] in page
        assert worker["tier_reason"] in page.replace("&amp;", "&")
        assert re.search(r"Updated \d+ s ago", page)
        assert made.key not in page
        assert console == ""
        page, console = browse(made.url, tmp_path / "without")
        assert "A key is needed" in page
        assert worker["worker_id"] not in page
        assert console == ""
        page, _ = browse(f"{made.url}/#key=rmaa_wrong", tmp_path / "wrong")
        assert "mistyped or cut off" in page
        page, console = browse(f"{made.url}/docs", tmp_path / "docs")
        assert "POST /api/worker/register" in page
        assert console == ""
