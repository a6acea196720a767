"""Errors of the HTTP API in OpenAI's body, {"error": {message, type, param, code}}, and the status of each of ours."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from loracast.errors import (
    AdapterError,
    BaseModelError,
    ConfigError,
    DocumentError,
    HypernetworkError,
    LoracastError,
    NameTakenError,
    NoSuchAdapterError,
)
from loracast.serving.generation import EngineBusy, EngineFailed, EngineStopped

log = logging.getLogger("loracast.serving")
_STATUS: tuple[tuple[int, tuple[type[LoracastError], ...]], ...] = (
    (503, (EngineStopped, EngineFailed)),
    (409, (NameTakenError,)),
    (422, (DocumentError,)),
    (400, (AdapterError, ConfigError, BaseModelError, HypernetworkError)),
)
"""The first that an error is an instance of says its status; any other is 500."""
_TYPES = {403: "permission_error", 429: "rate_limit_error"}


class ApiError(LoracastError):
    """A refusal with a status of its own."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """OpenAI's body of an error."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    """An error as clients see it; one that nobody foresaw is logged, and its message is not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineBusy):
        after = str(math.ceil(error.retry_after_s))
        return ApiError(429, str(error), code="rate_limit_exceeded", **{"Retry-After": after})
    if isinstance(error, NoSuchAdapterError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors(), error.body)
    if isinstance(error, ValidationError):  # of a body that a route checks itself
        return _invalid([{**one, "loc": ("body", *one["loc"])} for one in error.errors()], None)
    for status, kinds in _STATUS:
        if isinstance(error, kinds):
            return ApiError(status, str(error))
    log_failure(error)
    return ApiError(500, "the server failed to answer this; its log says where")


def log_failure(error: BaseException) -> None:
    """Log where an error came from. Its message is left out, since it may hold the text of a document."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{frame.name} ({frame.filename}:{frame.lineno})" for frame in reversed(frames))
    log.error("%s in %s", type(error).__name__, where)


def error_response(error: Exception) -> JSONResponse:
    """The response that tells an error."""
    shown = as_api_error(error)
    return JSONResponse(shown.body(), shown.status, headers=shown.headers)


def add_handlers(app: FastAPI) -> None:
    """Answer every error with OpenAI's body."""

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException):
            is_plain = error.detail == HTTPStatus(error.status_code).phrase
            where = f": {request.method} {request.url.path[:200]}" if is_plain else ""
            error = ApiError(error.status_code, error.detail + where, **error.headers or {})
        return error_response(error)

    for kind in (LoracastError, HTTPException, RequestValidationError, ValidationError):
        app.add_exception_handler(kind, refuse)


def _invalid(faults: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """What a client reads about a body that does not fit the schema: one fault, without the text it sent.

    A field of several types has a fault for each; the type that the client meant is the one that was refused deepest.
    """
    fault = max(faults, key=_depth)
    param = ".".join(str(part)[:64] for part in _place(fault, body))
    if fault["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON")
    if fault["type"] == "extra_forbidden":
        return ApiError(400, f"unrecognized request argument supplied: {param}", param=param)
    message = str(fault["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None)


def _depth(fault: Mapping[str, Any]) -> tuple[int, bool]:
    """How deep in a body a fault lies, and whether the value is of the right type at least."""
    is_length = fault["type"] in ("too_short", "too_long")  # the items of such a list were not looked at
    return len(fault["loc"]) + is_length, not fault["type"].endswith(("_type", "_parsing"))


def _place(fault: Mapping[str, Any], body: Any) -> list[str | int]:
    """The path of a fault in a body, without the names of types that Pydantic puts where a field has several."""
    whence, *path = fault["loc"]
    if whence not in ("body", "query", "path"):
        return [*fault["loc"]]
    if whence != "body" or not isinstance(body, dict | list):
        return path
    place, here = [], body
    for i, part in enumerate(path):
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            here = here[part]
            place.append(part)
        elif fault["type"] == "missing" and i == len(path) - 1:
            place.append(part)
    return place
