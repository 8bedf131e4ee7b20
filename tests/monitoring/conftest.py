"""What the tests of the monitor share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from chromium import browser as browser
from served import client as open_client


@pytest.fixture
def client() -> Callable[[str], Any]:
    """A client for a URL."""
    return open_client
