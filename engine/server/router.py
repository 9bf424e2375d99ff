"""The router: an ASGI app that passes requests on to replicas."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Sequence

from aiohttp import ClientConnectorError, ClientError, ConnectionTimeoutError
from starlette.types import Message, Receive, Scope, Send

from engine.server.asgi_answer import (
    ClientGone,
    read_body,
    send_answer,
    send_error,
    send_json,
    unless_gone,
)
from engine.server.body_limit import BODILESS
from engine.server.errors import ApiError, as_api_error
from engine.server.passed_on import Answer, is_stream, pass_stream, request_to, whole
from engine.server.prompt_prefixes import NOTHING_KNOWN, Asked, read_asked
from engine.server.refusals import Draining
from engine.server.replica import Replica
from engine.server.router_metrics import merge_pages, router_page
from engine.server.routing import Router, Routing
from engine.server.sse import error_end

# A replica that was started again is there after about so long.
_RETRY_SECONDS = 5
# Below what those who ask wait for: one that hangs must not take the others' figures along.
_METRICS_SECONDS = 2.0
# Stands for the answer of a replica that never got the request.
_UNREACHABLE = Answer(503, (), b"")


class RouterApp:
    """Chooses a replica for each request and passes its answer on as it comes.

    `/health`, `/ping`, `/load`, `/metrics` are the router's own, from all replicas. Everything else
    goes to one of them. A request that a replica did not take goes to the next; one that it took
    and did not finish is answered 502, or its stream ends with an error. Keys and limits are not
    looked at here, but by what stands before it (`ApiKeys`, `BodyLimit`, `limited_protocol`).

    Args:
        replicas: where requests go; by their numbers.
        router: the rule of who gets which.
    """

    def __init__(self, replicas: Sequence[Replica], router: Router) -> None:
        self.replicas = tuple(replicas)
        self.draining = False
        self._routing = Routing(router, len(self.replicas))
        self._open: set[asyncio.Timeout] = set()  # of the requests; they end when drained
        self._idle = asyncio.Event()
        self._idle.set()
        self._own = {
            "/health": self._health,
            "/ping": self._health,
            "/load": self._load,
            "/metrics": self._metrics,
        }

    @property
    def failed(self) -> Exception | None:
        """None: replicas that fail are started again."""
        return None

    @property
    def num_unfinished(self) -> int:
        """How many requests are being passed on."""
        return len(self._open)

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new, and wait until all is finished; whether it was within so long.

        What was not is given up, and its clients are told.
        """
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        finished = not self._open
        for limit in self._open:
            limit.reschedule(0.0)
        return finished

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request over HTTP, as ASGI has it."""
        assert scope["type"] == "http", scope["type"]
        own = self._own.get(scope["path"]) if scope["method"] in ("GET", "HEAD") else None
        try:
            if own is not None:
                await own(send)
            else:
                await self._serve(scope, receive, send)
        except ApiError as error:
            await send_error(send, error)
        except ClientGone:
            pass

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.draining:
            raise as_api_error(Draining("the server finishes what it has and takes nothing new"))
        self._idle.clear()
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._open.add(limit)
                body = b"" if scope["method"] in BODILESS else await read_body(receive)
                blind = self._routing.router == "round_robin"
                asked = NOTHING_KNOWN if blind or not body else read_asked(body)
                await unless_gone(receive, self._forward(scope, body, asked, sending))
        except TimeoutError:
            error = as_api_error(Draining("the server ended before this request did"))
            if not begun:
                raise error from None
            await send({"type": "http.response.body", "body": error_end(error.body)})
        finally:
            self._open.discard(limit)
            if not self._open:
                self._idle.set()

    async def _forward(self, scope: Scope, body: bytes, asked: Asked, send: Send) -> None:
        refusal = _UNREACHABLE
        untried = list(self.replicas)
        while places := [replica.number for replica in untried if replica.ready]:
            replica = self.replicas[self._choose(asked, places)]
            untried.remove(replica)
            with replica.taking(asked):
                refused = await self._try(replica, scope, body, send)
            if refused is None:
                return
            if refused.retry_after < refusal.retry_after or refusal is _UNREACHABLE:
                refusal = refused
        if refusal is _UNREACHABLE:
            raise ApiError(
                503,
                "no replica is ready; those that failed are being started again",
                code="no_replica",
                retry_after_s=_RETRY_SECONDS,
            )
        await send_answer(send, refusal.status, refusal.headers, refusal.body)

    def _choose(self, asked: Asked, places: Sequence[int]) -> int:
        replicas = self.replicas
        return self._routing.choose(
            lambda: [replica.outstanding for replica in replicas],
            (lambda place: replicas[place].sent.known(asked)) if asked.prompts else None,
            places,
        )

    async def _try(self, replica: Replica, scope: Scope, body: bytes, send: Send) -> Answer | None:
        """Have a replica answer; what it says instead if it did not take the request."""
        try:
            async with request_to(replica, scope, body) as response:
                if is_stream(response):
                    if not await pass_stream(response, replica, send, _broken_off(replica)):
                        replica.suspect()
                    return None
                answer = await whole(response, replica)
        except (ClientConnectorError, ConnectionTimeoutError):  # it never got the request
            replica.suspect()
            return _UNREACHABLE
        except (ClientError, TimeoutError, OSError) as error:
            replica.suspect()
            raise _broken_off(replica) from error
        if answer.status == 503:
            replica.suspect()
        # Who tells when to come again has not begun it. An engine that broke down with it does not
        # tell: the next might break down too.
        if answer.status in (429, 503) and answer.retry_after < math.inf:
            return answer
        await send_answer(send, answer.status, answer.headers, answer.body)
        return None

    async def _health(self, send: Send) -> None:
        ready = sum(replica.ready for replica in self.replicas)
        told = "draining" if self.draining else "ok" if ready else "no replica is ready"
        page = {
            "status": told,
            "replicas": [
                {
                    "replica": replica.number,
                    "state": replica.state,
                    "outstanding": replica.outstanding,
                    "restarts": replica.restarts,
                }
                for replica in self.replicas
            ],
        }
        await send_json(send, 200 if told == "ok" else 503, page)

    async def _load(self, send: Send) -> None:
        await send_json(send, 200, {"server_load": sum(r.outstanding for r in self.replicas)})

    async def _metrics(self, send: Send) -> None:
        pages: dict[int, str] = {}

        async def fetch(replica: Replica) -> None:
            with contextlib.suppress(ClientError, TimeoutError, OSError):
                status, page = await replica.get("/metrics", _METRICS_SECONDS)
                if status == 200:
                    pages[replica.number] = page

        # What is not ready may still count: an engine that is stuck, for instance.
        await asyncio.gather(*(fetch(r) for r in self.replicas if r.connected))
        merged = merge_pages(dict(sorted(pages.items())))
        text = merged + router_page(self.replicas)
        kind = b"text/plain; version=0.0.4; charset=utf-8"
        await send_answer(send, 200, [(b"content-type", kind)], text.encode())


def _broken_off(replica: Replica) -> ApiError:
    return ApiError(
        502,
        f"replica {replica.number} broke off before the answer was complete; send the request "
        "again",
        code="replica_failed",
    )
