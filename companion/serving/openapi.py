"""The OpenAPI document of the server, complete: schemas of bodies, refusals, the token. Chapter 6.

The routes read their bodies themselves (see :func:`companion.serving.protocols.routes.post`), so
FastAPI knows nothing of these; each route brings the schema of its body with what that needs, and
here they go where references look for them.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from companion.errors import DataError

#: paths that answer without a token: probes, which have none, and pages, as a browser that opens
#: one sends none. They say nothing of the model (but its version, which stands in every header).
OPEN = frozenset({"/livez", "/readyz", "/", "/page.css", "/page.js", "/docs"})


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document of an app; made once.

    Raises
    ------
    DataError
        If two routes have different schemas of one name.
    """
    if app.openapi_schema is not None:
        return app.openapi_schema
    made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    schemas: dict[str, Any] = made.setdefault("components", {}).setdefault("schemas", {})
    made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in made["paths"].items():
        for operation in operations.values():
            # FastAPI's own is the name of the function
            operation["summary"] = operation["description"].partition("\n")[0].rstrip(".")
            if path not in OPEN:
                operation["security"] = [{}, {"token": []}]
                operation["responses"]["401"] = {
                    "description": "The server was started with a token, and it was not sent."
                }
            for content in operation.get("requestBody", {}).get("content", {}).values():
                _lift(content, schemas)
    app.openapi_schema = made
    return made


def _lift(content: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Move the schema of a body, and those that it needs, to the document's shared ones."""
    own = dict(content["schema"])
    found = {**own.pop("$defs", {}), own["title"]: own}
    for name, schema in found.items():
        if schemas.setdefault(name, schema) != schema:
            raise DataError(f"two routes have different schemas {name!r}", "rename one model")
    content["schema"] = {"$ref": f"#/components/schemas/{own['title']}"}
