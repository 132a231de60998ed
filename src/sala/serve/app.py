"""The routes."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

import sala
from sala.errors import SalaError
from sala.serve import problem
from sala.serve.gate import App, Gate
from sala.serve.metrics import Metrics
from sala.serve.problem import Problem, body_of, of_error
from sala.serve.schema import ChatCompletion, Completion, Detokenize, Generate, Tokenize
from sala.serve.service import Service

PAGE = Path(__file__).parent / "page"
# nothing that intermediaries keep or collect before they pass it on
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
# of nginx, when a client has left; nobody reads it
LEFT = 499
# the page loads what this server has, and nothing else
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
ERROR = {
    "description": "An error in OpenAI's form.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
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
        }
    },
}
RESPONSES: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 401, 404, 408, 413, 429, 500, 503, 504), ERROR)
TEXT_BODY = {"requestBody": {"required": True, "content": {"text/plain": {"schema": {"type": "string"}}}}}
Result = TypeVar("Result")


def create_app(service: Service) -> App:
    """Return the ASGI application of a service whose engine runs; when it ends, the engine finishes what it has."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.stop, True, 30.0)

    app = FastAPI(title="sala", version=sala.__version__, lifespan=lifespan, responses=RESPONSES)
    problem.install(app)
    metrics = Metrics(service.engine)
    _add_openai(app, service)
    _add_tokens(app, service)
    _add_documents(app, service)
    _add_rest(app, service, metrics)
    return Gate(app, service.settings, metrics)  # type: ignore[arg-type]


def _add_openai(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatCompletion, request: Request) -> Response:
        return await _answer(service, body, await service.chat_asking(body), request)

    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Response:
        return await _answer(service, body, await service.completion_asking(body), request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.settings.name:
            raise Problem(
                404, f"no model {name!r} here; expected {service.settings.name!r}", "model", "model_not_found"
            )
        return _model(service)


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: Tokenize) -> dict[str, Any]:
        prompts = service.prompts
        if body.messages is not None:
            prompt = await asyncio.to_thread(prompts.of_messages, body.messages, body.tools, body.chat_template_kwargs)
        else:
            prompt = await asyncio.to_thread(prompts.of_text, body.prompt or "")
        return {"tokens": prompt.ids, "count": len(prompt.ids), "max_model_len": service.settings.max_length}

    @app.post("/detokenize")
    async def detokenize(body: Detokenize) -> dict[str, Any]:
        if body.tokens and max(body.tokens) >= service.prompts.vocab_size:
            raise Problem(400, f"token id {max(body.tokens)}; expected 0 to {service.prompts.vocab_size - 1}", "tokens")
        return {"prompt": await asyncio.to_thread(service.prompts.text, body.tokens)}


def _add_documents(app: FastAPI, service: Service) -> None:
    documents, settings = service.documents, service.settings

    @app.get("/documents")
    async def listed() -> dict[str, Any]:
        return {"documents": documents.list(), "kept": documents.folder is not None}

    @app.put("/documents/{name}", openapi_extra=TEXT_BODY)
    async def put(name: str, request: Request) -> dict[str, Any]:
        content = await request.body()
        return (await asyncio.to_thread(documents.put, name, content)).to_dict()

    @app.get("/documents/{name}")
    async def get(name: str) -> Response:
        return PlainTextResponse(documents.get(name).text)

    @app.delete("/documents/{name}")
    async def delete(name: str) -> dict[str, Any]:
        await asyncio.to_thread(documents.delete, name)
        return {"deleted": name}

    @app.post("/documents/{name}/read")
    async def read(name: str) -> Response:
        kept = documents.get(name)

        async def lines() -> AsyncIterator[str]:
            reading = documents.read(
                kept,
                request_s=settings.request_s,
                keep_alive_s=settings.keep_alive_s,
                max_length=settings.max_length,
            )
            try:
                async with aclosing(reading):
                    async for progress in reading:
                        yield f"data: {json.dumps(progress)}\n\n" if progress else ": keep-alive\n\n"
            except (Problem, SalaError) as failure:
                problem = of_error(failure) if isinstance(failure, SalaError) else failure
                error = body_of(problem.status, problem.message, problem.param, problem.code)
                yield f"data: {json.dumps(error)}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream", headers=STREAM_HEADERS)


def _add_rest(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        if not service.engine.is_alive:
            raise Problem(503, "the engine has stopped; expected a restart")
        return JSONResponse({"status": "ok"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": sala.__version__}

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(await asyncio.to_thread(metrics.text), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status")
    async def status() -> dict[str, Any]:
        found = await asyncio.to_thread(service.engine.status)
        return {name: getattr(found, name) for name in found.__slots__}

    for path, file in (("/", "page.html"), ("/page.css", "page.css"), ("/page.js", "page.js")):
        app.get(path, include_in_schema=False)(_file(PAGE / file))


def _file(path: Path) -> Any:
    async def page() -> Response:
        return FileResponse(path, headers=PAGE_HEADERS)

    return page


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "sala",
        "max_model_len": service.settings.max_length,
        "chat": service.prompts.has_chat,
    }


async def _answer(service: Service, body: Generate, asking: Any, request: Request) -> Response:
    choices = service.new_choices(body, asking)
    request.state.note = {"choices": len(asking), "prompt_tokens": len(asking[0].prompt.ids), "user": body.user}
    if body.stream:
        stream = service.stream(body, asking, choices)
        await anext(stream)
        return StreamingResponse(stream, media_type="text/event-stream", headers=STREAM_HEADERS)
    reply = await _unless_left(request, service.whole(body, asking, choices))
    return Response(status_code=LEFT) if reply is None else JSONResponse(reply)


async def _unless_left(request: Request, work: Awaitable[Result]) -> Result | None:
    """Return what work results in; None when the client leaves before, and the work is cancelled."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        return None
    finally:
        for each in (task, watch):
            if not each.done():
                each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
