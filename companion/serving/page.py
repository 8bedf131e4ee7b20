"""The page at ``/`` and the routes told at ``/docs``: no CDN, no inline script. Chapter 6.

Files of the page lie in ``companion/assets/serve``. What people wrote reaches it as JSON, and its
script shows it as text only.
"""

from __future__ import annotations

import functools
import html
import json
import re
import shlex
from pathlib import Path
from typing import Any, Final

import jinja2
from fastapi import APIRouter, Request
from fastapi.responses import Response

router = APIRouter(include_in_schema=False)

_FOLDER: Final = Path(__file__).parents[1] / "assets" / "serve"
_FILES: Final = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS: Final = {
    # the icon of the page is an empty data: address, so that the browser asks for none
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@functools.cache
def _read(name: str) -> bytes:
    return (_FOLDER / name).read_bytes()


def _serve(path: str) -> None:
    name, kind = _FILES[path]

    @router.get(path, name=name)
    async def file() -> Response:
        return Response(_read(name), media_type=kind, headers=HEADERS)


for _path in _FILES:
    _serve(_path)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """What the routes take and answer, with lines to copy."""
    base = str(request.base_url).rstrip("/")
    page = docs_page(request.app.openapi(), base)
    return Response(page, media_type="text/html", headers=HEADERS)


def _code(text: str) -> str:
    """Escaped text, in which what stands in backticks is code."""
    return re.sub(r"``?([^`]+)``?", r"<code>\1</code>", html.escape(text))


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part]


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _kind(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[1]
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(one) for one in schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(json.dumps(one) for one in schema["enum"])
    if schema.get("type") == "array":
        return (
            f"list of ({inner})" if " " in (inner := _kind(schema["items"])) else f"list of {inner}"
        )
    return str(schema.get("type", "any"))


def _curl(base: str, path: str, method: str, body: Any = None) -> str:
    """A line to copy into a shell."""
    words = ["curl", base + path]
    if body is not None:
        words += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return shlex.join(words)


_TEMPLATES: Final = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_TEMPLATES.filters.update(code=_code, paragraphs=_paragraphs, pretty=_pretty, kind=_kind)
_TEMPLATES.globals.update(curl=_curl)


@functools.lru_cache(maxsize=8)
def _render(document: str, base: str) -> str:
    return _TEMPLATES.get_template("docs.html").render(told=json.loads(document), base=base)


def docs_page(document: dict[str, Any], base: str) -> str:
    """An OpenAPI document as a page.

    Parameters
    ----------
    document : dict
        As :func:`companion.serving.openapi.document` makes it.
    base : str
        The server's address, as whoever reads the page reached it.
    """
    return _render(json.dumps(document), base)
