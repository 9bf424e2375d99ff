"""The router against replicas that are none: who gets what, and what becomes of failures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from yarl import URL

from engine.server.limits import ServerLimits
from engine.server.prompt_prefixes import BLOCK_BYTES
from engine.server.router import RouterApp
from engine.server.routing import SPARE_REQUESTS, Router
from tests.engine.server.fake_replicas import FakeReplica, fleet, run, until

PATH = "/v1/completions"


def routed(
    folder: Path,
    count: int = 2,
    router: Router = "least_loaded",
    limits: ServerLimits | None = None,
    keys: tuple[str, ...] = (),
) -> contextlib.AbstractAsyncContextManager[tuple[list[FakeReplica], RouterApp, ClientSession]]:
    return fleet(folder, count, router, limits or ServerLimits(), keys)


async def ask(client: ClientSession, **fields: Any) -> tuple[int, Any]:
    async with client.post(PATH, json=fields) as response:
        return response.status, json.loads(await response.read())


def test_requests_and_answers_pass_unchanged(tmp_path: Path) -> None:
    async def test() -> None:
        async with routed(tmp_path) as (fakes, _, client):
            path = "/v1/a%2Fb/%C3%A9?x=1%202&y="
            headers = {"X-Request-Id": "7", "Authorization": "Bearer secret", "X-Odd": "é"}
            url = URL(str(client._base_url).rstrip("/") + path, encoded=True)
            async with client.put(url, json={"prompt": "é"}, headers=headers) as response:
                assert response.status == 200
                assert (await response.json())["path"] == path
                assert response.headers["x-replica"] == "0"
                assert len(response.headers.getall("Date")) == 1
            got = fakes[0].headers[0]
            assert fakes[0].seen == [{"prompt": "é"}]
            assert got["x-request-id"] == "7"
            assert not {"authorization", "x-odd"} & got.keys()  # keys go no further
            async with client.get("/v1/models") as response:
                assert (await response.json())["by"] == 1

    run(test)


def test_events_come_one_by_one(tmp_path: Path) -> None:
    async def test() -> None:
        async with routed(tmp_path, 1) as (fakes, app, client):
            body = {"do": "stream", "stream": True, "pieces": 3, "pause": 0.2}
            async with client.post(PATH, json=body) as response:
                assert await response.content.readuntil(b"\n\n") == b"data: 0\n\n"
                assert fakes[0].running == 1  # which is still at it
                assert app.replicas[0].outstanding == 1
                assert await response.content.read() == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
            await until(lambda: app.replicas[0].outstanding == 0)

    run(test)


@pytest.mark.parametrize("do", ["stream", "hold"])
def test_a_client_that_leaves_is_given_up_by_the_replica(tmp_path: Path, do: str) -> None:
    async def test() -> None:
        async with routed(tmp_path, 1) as (fakes, app, client):
            body = {"do": do, "pieces": 10_000, "pause": 0.01}
            request = asyncio.ensure_future(client.post(PATH, json=body))
            await until(lambda: fakes[0].running == 1)
            if do == "stream":
                (await request).close()
            else:
                request.cancel()
            await until(lambda: fakes[0].running == 0)
            assert fakes[0].left == 1
            await until(lambda: not app.num_unfinished and not app.replicas[0].outstanding)

    run(test)


def test_who_dies_before_it_answers_is_a_502_and_others_go_on(tmp_path: Path) -> None:
    async def test() -> None:
        async with routed(tmp_path) as (fakes, app, client):
            holding = asyncio.ensure_future(ask(client, do="hold"))
            await until(lambda: fakes[0].running == 1)
            status, answer = await ask(client, do="die")
            assert status == 502
            assert "replica 1 broke off" in answer["error"]["message"]
            assert app.replicas[1].suspected.is_set()
            assert len(fakes[0].seen) == 1  # what may have killed one is not sent to the next
            fakes[0].release.set()
            assert (await holding)[0] == 200

    run(test)


def test_a_stream_that_breaks_off_ends_with_an_error_and_no_half_event(tmp_path: Path) -> None:
    async def test() -> None:
        async with routed(tmp_path, 1) as (_, app, client):
            async with client.post(PATH, json={"do": "die", "stream": True}) as response:
                events = (await response.content.read()).split(b"\n\n")
            assert events[:2] == [b"data: 0", b"data: 1"]
            error = json.loads(events[2].removeprefix(b"data: "))["error"]
            assert error["code"] == "replica_failed"
            assert events[3:] == [b"data: [DONE]", b""]
            assert app.replicas[0].suspected.is_set()

    run(test)


def test_who_cannot_be_reached_is_passed_over(tmp_path: Path) -> None:
    async def test() -> None:
        async with routed(tmp_path) as (fakes, app, client):
            fakes[0].socket.unlink()
            assert await ask(client) == (200, {"by": 1, "path": PATH})
            assert app.replicas[0].suspected.is_set()
            fakes[1].socket.unlink()
            await fakes[1].replica.connect(fakes[1].socket)  # no connection is left open
            status, answer = await ask(client)
            assert (status, answer["error"]["code"]) == (503, "no_replica")

    run(test)


def test_who_is_full_is_passed_over_until_all_are(tmp_path: Path) -> None:
    async def test() -> None:
        async with routed(tmp_path, 3) as (fakes, app, client):
            fakes[0].status = 429
            fakes[1].status = 503
            assert (await ask(client))[1]["by"] == 2
            assert not app.replicas[0].suspected.is_set()
            assert app.replicas[1].suspected.is_set()
            fakes[2].status = 429
            async with client.post(PATH, json={}) as response:
                assert response.status == 429
                assert response.headers["Retry-After"] == "5"  # the soonest of 7, 6 and 5
            assert sum(replica.outstanding for replica in app.replicas) == 0

    run(test)


def test_what_may_have_broken_an_engine_is_not_sent_to_the_next(tmp_path: Path) -> None:
    async def test() -> None:
        async with routed(tmp_path) as (fakes, app, client):
            async with client.post(PATH, json={"do": "fail"}) as response:
                assert response.status == 503
                assert "Retry-After" not in response.headers
            assert [len(fake.seen) for fake in fakes] == [1, 0]
            assert app.replicas[0].suspected.is_set()

    run(test)


def test_without_a_ready_replica_it_is_unwell_and_says_when_to_come_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with routed(tmp_path) as (fakes, _, client):
            async with client.get("/health") as response:
                assert response.status == 200
                states = [r["state"] for r in (await response.json())["replicas"]]
                assert states == ["ready", "ready"]
            fakes[0].replica.state = "down"
            async with client.get("/health") as response:
                assert response.status == 200
            for _ in range(3):
                assert (await ask(client))[1]["by"] == 1
            fakes[1].replica.state = "unwell"
            async with client.get("/ping") as response:
                assert response.status == 503
            async with client.post(PATH, json={}) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) > 0

    run(test)


def test_draining_finishes_what_runs_and_takes_nothing_new(tmp_path: Path) -> None:
    async def test() -> None:
        async with routed(tmp_path, 1) as (fakes, app, client):
            holding = asyncio.ensure_future(ask(client, do="hold"))
            await until(lambda: fakes[0].running == 1)
            draining = asyncio.ensure_future(app.drain(10))
            await until(lambda: app.draining)
            status, answer = await ask(client)
            assert (status, answer["error"]["code"]) == (503, "server_draining")
            async with client.get("/health") as response:
                assert response.status == 503
            fakes[0].release.set()
            assert await draining
            assert (await holding)[0] == 200

    run(test)


def test_what_does_not_end_in_time_is_given_up_and_told_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with routed(tmp_path, 1) as (fakes, app, client):
            holding = asyncio.ensure_future(ask(client, do="hold"))
            body = {"do": "stream", "pieces": 10_000, "pause": 0.01}
            async with client.post(PATH, json=body) as response:
                assert await response.content.readuntil(b"\n\n") == b"data: 0\n\n"
                await until(lambda: fakes[0].running == 2)
                assert not await app.drain(0.05)
                *_, last, done, rest = (await response.content.read()).split(b"\n\n")
            assert (done, rest) == (b"data: [DONE]", b"")
            told = json.loads(last.removeprefix(b"data: "))["error"]
            assert told["code"] == "server_draining"
            status, answer = await holding
            assert (status, answer["error"]["code"]) == (503, "server_draining")
            await until(lambda: fakes[0].left == 2 and not app.num_unfinished)
            await until(lambda: app.replicas[0].outstanding == 0)
            assert not app.replicas[0].failures

    run(test)


def test_bodies_have_limits(tmp_path: Path) -> None:
    limits = ServerLimits(max_body_bytes=1000, read_timeout_s=0.2)

    async def pieces(pause: float) -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100
            await asyncio.sleep(pause)

    async def test() -> None:
        async with routed(tmp_path, limits=limits) as (fakes, app, client):
            assert (await ask(client, x="y" * 1000))[0] == 413
            async with client.post(PATH, data=pieces(0)) as response:  # no length is told
                assert response.status == 413
            async with client.post(PATH, data=pieces(1)) as response:
                assert response.status == 408
            assert not any(fake.seen for fake in fakes)
            await until(lambda: app.num_unfinished == 0)
            assert (await ask(client, x="y" * 900))[0] == 200

    run(test)


def test_a_key_opens_and_goes_no_further(tmp_path: Path) -> None:
    async def test() -> None:
        async with routed(tmp_path, keys=("k1", "k2")) as (fakes, _, client):
            status, answer = await ask(client)
            assert (status, answer["error"]["type"]) == (401, "authentication_error")
            assert not fakes[0].seen
            async with client.post(PATH, headers={"Authorization": "Bearer k2"}) as response:
                assert response.status == 200
            assert "authorization" not in fakes[0].headers[0]
            for path in ("/health", "/metrics", "/load"):
                async with client.get(path) as response:
                    assert response.status == 200

    run(test)


def test_who_does_not_read_is_left(tmp_path: Path) -> None:
    """A client that reads nothing would otherwise hold its request for ever."""

    async def test() -> None:
        async with routed(tmp_path, 1, limits=ServerLimits(write_timeout_s=0.3)) as (
            fakes,
            app,
            client,
        ):
            url = URL(str(client._base_url))
            _reader, writer = await asyncio.open_connection(url.host, url.port, limit=1024)
            body = json.dumps({"do": "stream", "pieces": 10_000, "padding": 1 << 16}).encode()
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            try:
                await until(lambda: fakes[0].running == 1)
                await until(lambda: fakes[0].running == 0 and app.num_unfinished == 0)
                assert fakes[0].left == 1
            finally:
                writer.close()

    run(test)


def test_equal_beginnings_meet_until_it_gets_too_much(tmp_path: Path) -> None:
    shared = "s" * (4 * BLOCK_BYTES)

    async def test() -> None:
        async with routed(tmp_path, 3, "prefix_aware") as (fakes, app, client):
            held = []
            for number in range(SPARE_REQUESTS + 2):
                prompt = f"{shared}{number}"
                held.append(asyncio.ensure_future(ask(client, do="hold", prompt=prompt)))
                await until(lambda n=number: sum(len(f.seen) for f in fakes) == n + 1)  # type: ignore[misc]
            assert [len(fake.seen) for fake in fakes] == [SPARE_REQUESTS + 1, 1, 0]
            # Somebody else's prompt goes where least is to be done.
            other = asyncio.ensure_future(ask(client, do="hold", prompt="t" * 999))
            await until(lambda: len(fakes[2].seen) == 1)
            for fake in fakes:
                fake.release.set()
            await asyncio.gather(*held, other)
            # Both that were sent the beginning are as good; a longer match is better.
            assert (await ask(client, prompt="t" * 500))[1]["by"] == 2
            assert (await ask(client, prompt=shared))[1]["by"] in (0, 1)
            assert sum(replica.outstanding for replica in app.replicas) == 0

    run(test)


def test_hundreds_of_streams_with_random_departures_leave_nothing(tmp_path: Path) -> None:
    """Whoever stays gets every event, and of whoever leaves nothing is left."""
    random.seed(3)

    async def test() -> None:
        async with routed(tmp_path, 3) as (fakes, app, client):
            seats = asyncio.Semaphore(150)
            whole: Counter[bool] = Counter()

            async def one(pieces: int, leaves_after: int | None) -> None:
                body = {"do": "stream", "pieces": pieces, "pause": 0.001}
                async with seats, client.post(PATH, json=body) as response:
                    if leaves_after is not None:
                        for _ in range(leaves_after):
                            await response.content.readuntil(b"\n\n")
                        response.close()
                        return
                    events = (await response.content.read()).split(b"\n\n")
                    expected = [*(b"data: %d" % i for i in range(pieces)), b"data: [DONE]", b""]
                    whole[events == expected] += 1

            departures = [random.choice([None, 0, 1, 4]) for _ in range(400)]
            await asyncio.gather(*(one(6, leaves) for leaves in departures))
            assert whole == {True: departures.count(None)}
            await until(lambda: app.num_unfinished == 0 and not any(f.running for f in fakes))
            await until(lambda: not any(replica.outstanding for replica in app.replicas))
            assert sum(replica.requests for replica in app.replicas) == 400
            assert sum(replica.failures for replica in app.replicas) == 0

    run(test)


def test_metrics_of_all_are_one_page(tmp_path: Path) -> None:
    async def test() -> None:
        async with routed(tmp_path) as (fakes, _, client):
            for fake in fakes:
                fake.page = (
                    "# HELP vllm:num_requests_running Running.\n"
                    "# TYPE vllm:num_requests_running gauge\n"
                    f'vllm:num_requests_running{{engine="0"}} {fake.number + 3}\n'
                )
            async with client.get("/metrics") as response:
                text = await response.text()
            assert 'vllm:num_requests_running{replica="0",engine="0"} 3\n' in text
            assert 'vllm:num_requests_running{replica="1",engine="0"} 4\n' in text
            assert text.count("# TYPE vllm:num_requests_running") == 1
            assert 'autotune:router_replica_up{replica="1"} 1\n' in text

    run(test)
