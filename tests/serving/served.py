"""What the tests of the server share: rows that are scored, and a client."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import httpx2

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "before_0_2"


def rows_of(kind: str) -> list[dict[str, Any]]:
    """The rows that a saved model of this kind was tried with."""
    return json.loads((ASSETS / kind / "expected.json").read_text(encoding="utf-8"))["rows"]


def client(url: str, **settings: Any) -> httpx2.Client:
    """A client that waits long, and keeps no connection that a server would wait for."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    return httpx2.Client(base_url=url, timeout=60, limits=limits, **settings)


def seeded() -> random.Random:
    """A generator whose seed stands in what a failed test printed."""
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    return random.Random(seed)
