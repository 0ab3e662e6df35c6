"""The OpenAPI document, made from the route table: what each call takes, and every status it answers with."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from rma_coordinator.api.problems import STATUS_WORDS
from rma_coordinator.api.routes import OPENAI, ROUTES
from rma_coordinator.api.v1.access import covers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rma_coordinator.api.routes import Parameter, Route

#: Nothing stands in an answer with this status.
NO_CONTENT = 204


#: Answers of services are theirs: whatever status and type they have.
SERVICE = "*/*"

PROBLEM = {
    "type": "object",
    "description": "RFC 9457",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "hints": {"type": "array", "items": {"type": "string"}},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["where", "what"],
                "properties": {"where": {"type": "string"}, "what": {"type": "string"}},
            },
        },
    },
}

#: How failures are written under /v1.
OPENAI_ERROR = {
    "type": "object",
    "description": "OpenAI's error object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(version: str, issuer: str) -> dict[str, Any]:
    """Return the OpenAPI document."""
    structs = {kind for route in ROUTES for kind in (route.takes, route.gives) if isinstance(kind, type)}
    _, components = msgspec.json.schema_components(
        sorted(structs, key=lambda kind: kind.__name__), ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "RMA coordinator",
            "version": version,
            "description": f"A pool of volunteers' machines ({issuer}).",
        },
        "paths": paths,
        "components": {
            "schemas": {**components, "Problem": PROBLEM, "OpenAIError": OPENAI_ERROR},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(route),
        "summary": route.summary,
        "responses": _responses(route),
    }
    if parameters := [*_in_path(route), *_named(route.query, "query"), *_named(route.headers, "header")]:
        operation["parameters"] = parameters
    if route.access != "open":
        operation["security"] = [{"bearer": []}]
        operation["description"] = f"Needs: {route.access}."
    if route.takes is not None:
        operation["requestBody"] = {"required": isinstance(route.takes, type), **_content(route.takes)}
    return operation


def _operation_id(route: Route) -> str:
    """Return a name that no other call has: the method and the path, in words."""
    return "_".join([route.method.lower(), *re.findall(r"\w+", route.path)])


def _in_path(route: Route) -> list[dict[str, Any]]:
    names = re.findall(r"\{(\w+)\}", route.path)
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]


def _named(parameters: Mapping[str, Parameter], where: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": where, "description": one.words, "required": one.required, "schema": dict(one.form)}
        for name, one in parameters.items()
    ]


def _responses(route: Route) -> dict[str, Any]:
    """Return every status with what comes with it; a service's answer may have any other."""
    found = {str(status): _good(route, status) for status in (route.status, *route.also)}
    for status in sorted(_failures(route)):
        found[str(status)] = {"description": STATUS_WORDS[status][0], "content": _problem(route)}
    if route.gives == SERVICE:
        found["default"] = {"description": "what the service answered", "content": {SERVICE: {}}}
    return found


def _good(route: Route, status: int) -> dict[str, Any]:
    if status == NO_CONTENT:
        return {"description": "nothing to tell"}
    if status == route.status:
        return {"description": "done", **_content(route.gives)}
    return {"description": "done", **_content("object" if route.gives == SERVICE else route.gives)}


def _problem(route: Route) -> dict[str, Any]:
    if covers(route.path):
        return {"application/json": {"schema": {"$ref": "#/components/schemas/OpenAIError"}}}
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    # A status may be the service's own, and then so is what comes with it.
    return {**problem, SERVICE: {}} if route.gives == SERVICE else problem


def _failures(route: Route) -> set[int]:
    found = {*route.fails}
    if route.access != "open":
        found.add(401)
    if ":" in route.access or route.access in ("infer", "join"):
        found.add(403)
    if "{" in route.path:
        found.add(404)
    if route.query or route.headers or route.takes is not None:
        found.add(400)
    if route.takes is not None:
        found |= {408, 413, 415}
    return found


def _content(kind: type[msgspec.Struct] | str | None) -> dict[str, Any]:
    if kind is None:
        return {}
    if kind == OPENAI:
        return {"content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}}
    if isinstance(kind, str):
        return {"content": {"application/json": {"schema": {"type": "object"}}} if kind == "object" else {kind: {}}}
    return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}}
