"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sala.engine.events import EngineStoppedError
from sala.engine.scheduler import QueueFullError
from sala.errors import SalaError, shortened

log = logging.getLogger(__name__)
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}
LONGEST_VALUE = 60


class Problem(Exception):
    """A request that is answered with an error. param: the field that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def body_of(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    # a lone surrogate of somebody's JSON has no UTF-8
    safe = message.encode("utf-8", "backslashreplace").decode()
    return {"error": {"message": safe, "type": kind, "param": param, "code": code}}


def problem_response(problem: Problem) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if problem.status == 401 else {}
    if problem.status in (429, 503):
        headers["Retry-After"] = "1"
    body = body_of(problem.status, problem.message, problem.param, problem.code)
    return JSONResponse(body, problem.status, headers)


def of_error(error: SalaError) -> Problem:
    """Return how an error of ours is answered."""
    if isinstance(error, QueueFullError):
        return Problem(429, str(error))
    if isinstance(error, EngineStoppedError):
        return Problem(503, str(error))
    return Problem(400, str(error))


def install(app: FastAPI) -> None:
    """Answer every error in OpenAI's form."""

    async def problem(request: Request, error: Problem) -> JSONResponse:
        return problem_response(error)

    async def ours(request: Request, error: SalaError) -> JSONResponse:
        return problem_response(of_error(error))

    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem_response(_of_validation(error))

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        expected = {404: "expected a path of /docs", 405: f"expected another method than {request.method}"}
        hint = expected.get(error.status_code, "expected JSON in UTF-8")
        return problem_response(Problem(error.status_code, f"{error.detail}; {hint}"))

    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem_response(Problem(500, f"the server failed: {type(error).__name__}"))

    app.add_exception_handler(Problem, problem)  # type: ignore[arg-type]
    app.add_exception_handler(SalaError, ours)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, unforeseen)


def _of_validation(error: RequestValidationError) -> Problem:
    first = error.errors()[0]
    names = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(names) or None
    if first["type"] == "extra_forbidden":
        return Problem(
            400, f"field {param!r} is not supported by this server; expected it left out", param, "unsupported"
        )
    if first["type"] == "json_invalid":
        return Problem(
            400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}; expected an object"
        )
    if isinstance(first.get("input"), bytes):
        return Problem(400, "the body is not marked as JSON; expected the header Content-Type: application/json")
    value = shortened(repr(first.get("input")), LONGEST_VALUE)
    if first["type"] == "missing":
        return Problem(400, f"field {param!r} is missing; expected it in the body", param)
    return Problem(400, f"{param or 'the body'}: {first['msg']}, got {value}; expected another value", param)
