"""`/docs`: the API's reference as one HTML page, made from the OpenAPI document. It has no scripts and loads nothing else.

FastAPI's own pages load scripts from a CDN, which a service without internet access cannot reach, and should not trust.
"""

import json
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

router = APIRouter()

METHODS = ("get", "post", "put", "patch", "delete")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
body { color: #1b1f24; background: #fff }
code { font: 14px ui-monospace, monospace; overflow-wrap: anywhere }
summary { cursor: pointer; padding: .3rem 0 }
summary b { display: inline-block; min-width: 4.2rem; font: bold 14px ui-monospace, monospace }
details { border-top: 1px solid #d0d7de; padding-left: .5rem }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-top: 1px solid #eaeef2 }
a { color: #0757ba } .soft { color: #57606a }
@media (prefers-color-scheme: dark) {
  body { color: #e6edf3; background: #0d1117 }
  details, td, th { border-color: #30363d }
  a { color: #6cb6ff } .soft { color: #9198a1 }
}
"""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    f"style-src 'sha256-{b64encode(sha256(STYLE.encode()).digest()).decode()}'"
}


@router.get("/docs", include_in_schema=False)
def reference(request: Request) -> HTMLResponse:
    """Every route and every shape."""
    return HTMLResponse(page(request.app.openapi()), headers=HEADERS)


def page(document: dict[str, Any]) -> str:
    """An OpenAPI 3.1 document as HTML. Everything in the document is shown as text, never as markup."""
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    by_tag: dict[str, list[str]] = {}
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                tag = (item[method].get("tags") or ["other"])[0]
                by_tag.setdefault(tag, []).append(_operation(method, path, item[method]))
    schemas = document.get("components", {}).get("schemas", {})
    key = "<code>Authorization: Bearer tml-...</code> or <code>X-API-Key</code>"
    programs = '<a href="/openapi.json">/openapi.json</a>'
    parts = [
        f"<h1>{title}</h1><p>{escape(info.get('description', ''))}</p>",
        f'<p class="soft">A key is sent as {key}. The same for programs: {programs}.</p>',
        *(f"<h2>{escape(tag)}</h2>{''.join(operations)}" for tag, operations in by_tag.items()),
        "<h2>Shapes</h2>",
        *(_schema(name, schema) for name, schema in sorted(schemas.items())),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{"".join(parts)}</body></html>'


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    said = operation.get("description") or operation.get("summary") or ""
    first, _, rest = said.partition("\n")
    parts = [f"<p>{escape(rest.strip())}</p>" if rest.strip() else ""]
    if parameters := operation.get("parameters"):
        rows = (
            (one["name"] + ("" if one.get("required") else "?"), one["in"], _type(one.get("schema", {})), _said(one))
            for one in parameters
        )
        parts.append(_table(("parameter", "in", "type", ""), rows))
    if body := operation.get("requestBody"):
        parts.append(_table(("body", "type"), _contents(body)))
    answers = ((status, _said(one), kinds) for status, one in operation.get("responses", {}).items() for kinds in [_kinds(one)])
    parts.append(_table(("answer", "", "type"), answers))
    about = f"<summary><b>{method.upper()}</b> <code>{escape(path)}</code> {escape(first)}</summary>"
    return f"<details>{about}{''.join(parts)}</details>"


def _kinds(answer: dict[str, Any]) -> "_Html":
    return _Html("<br>".join(f"{escape(media)} {shape}".rstrip() for media, shape in _contents(answer)))


def _contents(holder: dict[str, Any]) -> Iterator[tuple[str, "_Html"]]:
    for media, content in holder.get("content", {}).items():
        yield media, _type(content.get("schema", {}))


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (field + ("" if field in required else "?"), _type(one), _said(one))
        for field, one in schema.get("properties", {}).items()
    ]
    said = _said(schema)
    about = f'<summary><code id="{escape(name)}">{escape(name)}</code> {escape(said)}</summary>'
    return f"<details>{about}{_table(('field', 'type', ''), rows) if rows else f'<p>{_type(schema)}</p>'}</details>"


def _said(holder: dict[str, Any]) -> str:
    said = " ".join(str(holder.get("description") or holder.get("schema", {}).get("description") or "").split())
    if "default" in holder:
        said += f" (default: {json.dumps(holder['default'], ensure_ascii=False)})"
    return said.strip()


class _Html(str):
    """A string that is already HTML and must not be escaped."""

    __slots__ = ()


def _type(schema: dict[str, Any]) -> _Html:
    """A schema in a few words, with links to the shapes that it names."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return _Html(f'<a href="#{name}">{name}</a>')
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return _Html(" or ".join(map(_type, schema[several])))
    if "const" in schema or "enum" in schema:
        allowed = [schema["const"]] if "const" in schema else schema["enum"]
        return _Html(", ".join(f"<code>{escape(json.dumps(one))}</code>" for one in allowed))
    if schema.get("type") == "array":
        return _Html(f"list of {_type(schema.get('items', {}))}")
    if isinstance(schema.get("additionalProperties"), dict) and schema["additionalProperties"]:
        return _Html(f"object of {_type(schema['additionalProperties'])}")
    return _Html(escape(" ".join(filter(None, (str(schema.get("type", "any")), schema.get("format", ""))))))


def _table(columns: tuple[str, ...], rows: Any) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>" if body else ""


def _cell(cell: object) -> str:
    return str(cell) if isinstance(cell, _Html) else escape(str(cell))
