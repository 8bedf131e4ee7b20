"""Serve a reward model over HTTP. Chapter 6."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.serving.app import BODIES as BODIES, make_app as make_app
    from companion.serving.engine import Engine as Engine
    from companion.serving.listening import (
        address_of as address_of,
        command_again as command_again,
        keep_serving as keep_serving,
        listen as listen,
        serve as serve,
        tell_ready as tell_ready,
    )
    from companion.serving.opening import (
        Running as Running,
        open_service as open_service,
        running as running,
    )
    from companion.serving.patience import PATIENCE as PATIENCE, Patience as Patience
    from companion.serving.queue import Queue as Queue, QueueFull as QueueFull, Request as Request
    from companion.serving.request_log import RequestLog as RequestLog
    from companion.serving.service import Call as Call, Service as Service
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
