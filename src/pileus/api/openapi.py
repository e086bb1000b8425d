"""The description of the API, made from the table of routes and the one declaration of the configuration.

Source: OpenAPI 3.1.0, whose schemas are JSON Schema 2020-12.
"""

from pileus import __version__
from pileus.api import generations
from pileus.config import wire
from pileus.config.model import CoredumpConfig
from pileus.vmm.lifecycle import LIFE, NONE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from pileus.api.routes import Route

    Json = Any

WORDS = {
    200: "Done; the body says more",
    204: "Done",
    400: "The request asks for what is not possible",
    404: "There is no VM",
    409: "The VM's state does not allow it",
    500: "The host refused, or there is a bug in pileus",
}
COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string"}
ANSWERS: "dict[str, Json]" = {
    "Anything": {"type": "object"},
    "Errors": {"type": "array", "items": TEXT, "minItems": 1, "description": "sentences, outermost first"},
    "VmmPingResponse": {
        "type": "object",
        "properties": {
            "build_version": TEXT,
            "version": TEXT,
            "pid": COUNT,
            "features": {"type": "array", "items": TEXT},
        },
        "required": ["build_version", "version", "pid", "features"],
    },
    "VmInfo": {
        "type": "object",
        "properties": {
            "config": {"$ref": "#/components/schemas/VmConfig"},
            "state": {"enum": [state for state in LIFE if state != NONE]},
            "memory_actual_size": COUNT,
            "device_tree": {"type": ["object", "null"]},
            "operation": {
                "type": "object",
                "description": "what takes long and is under way, with bytes done and in total",
                "properties": {"name": TEXT, "done": COUNT, "total": COUNT},
                "required": ["name", "done", "total"],
            },
        },
        "required": ["config", "state"],
    },
    "VmCounters": {
        "type": "object",
        "additionalProperties": {"type": "object", "additionalProperties": COUNT},
    },
}
REQUESTS = {struct.__name__: wire.schema(struct) for struct in (CoredumpConfig,)}  # beside VmConfig


def document(routes: "Iterable[Route]") -> "dict[str, Json]":
    """The whole document, fit for JSON."""
    paths: dict[str, Json] = {}
    for route in routes:
        paths.setdefault(f"/{route.name}", {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pileus",
            "version": __version__,
            "description": "A virtual machine: its configuration, its life",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://localhost/api/v1"}],
        "paths": paths,
        "components": {"schemas": {**generations.schemas(), **REQUESTS, **ANSWERS}},
    }


def _operation(route: "Route") -> "Json":
    responses = {
        "200" if route.response else "204": _response(200 if route.response else 204, route.response)
    }
    responses |= {str(status): _response(status, "Errors") for status in (*route.errors, 500)}
    told: dict[str, Json] = {
        "operationId": route.name,
        "summary": route.help,
        "responses": responses,
    }
    if route.request:
        told["requestBody"] = {"required": True, "content": _content(route.request)}
    return told


def _response(status: int, schema: str) -> "Json":
    told: dict[str, Json] = {"description": WORDS[status]}
    return {**told, "content": _content(schema)} if schema else told


def _content(schema: str) -> "Json":
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
