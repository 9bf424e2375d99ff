"""Replicas' processes: started, watched, started again, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from engine.errors import ConfigError, EngineError, EnvironmentLacks
from engine.server.replica import Replica
from engine.server.replica_main import Arguments, error_line, read_error
from engine.server.replica_process import Launch, Patience
from engine.server.replica_shares import divide_cores, neighbouring_cores, shares_of
from engine.server.run_router import ReplicaFleet
from tests.engine.server.fake_replicas import run, until

FAKE = str(Path(__file__).with_name("fake_replica_main.py"))
QUICK = Patience(
    start=20.0, poll=0.02, health_every=0.05, unwell=0.3, stop=0.3, restart=0.05, most_restart=0.2
)


def launch(do: str = "serve") -> Launch:
    return Launch(Arguments(config={"do": do}, limits={}), command=(sys.executable, FAKE))


@contextlib.asynccontextmanager
async def started(
    folder: Path, *launches: Launch, patience: Patience = QUICK
) -> AsyncIterator[tuple[ReplicaFleet, list[str]]]:
    said: list[str] = []
    fleet = ReplicaFleet(launches, folder, patience=patience, say=said.append)
    try:
        await fleet.start()
        yield fleet, said
    finally:
        await fleet.close()
        assert list(folder.iterdir()) == []
        assert all(process.pid is None for process in fleet.processes)


async def pid_of(replica: Replica, path: str = "/pid") -> int:
    status, text = await replica.get(path, 10.0)
    assert status == 200
    return int(json.loads(text))


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_killed_replica_is_started_again_and_others_go_on(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path, launch(), launch()) as (fleet, said):
            first, second = fleet.replicas
            assert first.ready
            assert second.ready
            assert first.sent._most == 10  # as many blocks as its cache holds
            slow = asyncio.ensure_future(pid_of(second, "/slow"))
            pids = [await pid_of(replica) for replica in fleet.replicas]
            assert pids == [process.pid for process in fleet.processes]
            os.kill(pids[0], signal.SIGKILL)
            await until(lambda: not first.ready)
            assert second.ready
            await until(lambda: first.ready)
            assert first.restarts == 1
            assert await pid_of(first) != pids[0]
            assert await slow == pids[1]
            assert "replica 0: here I am" in said
            assert any("replica 0 was killed by SIGKILL, perhaps" in text for text in said)

    run(test)


def test_what_was_sent_to_an_earlier_life_is_forgotten(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path, launch()) as (fleet, _):
            replica = fleet.replicas[0]
            replica.sent._names[b"x"] = None
            os.kill(await pid_of(replica), signal.SIGKILL)
            await until(lambda: replica.restarts == 1 and replica.ready)
            assert len(replica.sent) == 0

    run(test)


@pytest.mark.parametrize(
    ("do", "kind", "text"),
    [
        ("refuse", ConfigError, "replica 0 cannot serve: max_num_seqs=0 is too few"),
        (
            "crash",
            EngineError,
            r"replica 0 ended with exit status 7 \(last: the last words\)",
        ),
        ("never", EngineError, "replica 0 was not healthy after 1 s"),
    ],
)
def test_one_that_never_serves_ends_all(
    tmp_path: Path, do: str, kind: type[Exception], text: str
) -> None:
    async def test() -> None:
        patience = Patience(start=1.0 if do == "never" else 20.0, poll=0.02, stop=0.3)
        # Beside one that would serve, but for the test of what is slow to do so.
        launches = [launch(do)] if do == "never" else [launch(do), launch()]
        async with started(tmp_path, *launches, patience=patience) as (fleet, _):
            assert type(fleet.failure) is kind
            with pytest.raises(kind, match=text):
                raise fleet.failure

    run(test)


def test_one_that_stays_unwell_is_started_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path, launch()) as (fleet, said):
            replica = fleet.replicas[0]
            pid = await pid_of(replica)
            await replica.get("/sick", 10.0)
            await until(lambda: replica.state == "unwell")
            await until(lambda: replica.ready)
            assert gone(pid)
            assert replica.restarts == 1
            assert any("was not healthy for 0.3 s" in text for text in said)

    run(test)


def test_one_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    """As when there are too many processes or open files for a while."""
    program, sockets = tmp_path / "program", tmp_path / "sockets"
    program.symlink_to(sys.executable)
    sockets.mkdir()
    fragile = Launch(launch().arguments, command=(str(program), FAKE))

    async def test() -> None:
        async with started(sockets, fragile) as (fleet, said):
            replica = fleet.replicas[0]
            pid = await pid_of(replica)
            program.unlink()
            os.kill(pid, signal.SIGKILL)
            await until(lambda: any("cannot be started: No such file" in text for text in said))
            assert not replica.ready
            program.symlink_to(sys.executable)
            await until(lambda: replica.ready)
            program.unlink()
        async with started(sockets, fragile) as (fleet, _):
            assert type(fleet.failure) is EnvironmentLacks

    run(test)


def test_one_that_talks_without_end_is_listened_to(tmp_path: Path) -> None:
    """Else it would wait for ever to be read."""

    async def test() -> None:
        async with started(tmp_path, launch("talk")) as (fleet, _):
            assert fleet.replicas[0].ready

    run(test)


def test_the_wait_for_a_new_start_grows(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path, launch()) as (fleet, said):
            replica = fleet.replicas[0]
            for restarts in range(1, 5):
                os.kill(await pid_of(replica), signal.SIGKILL)
                await until(lambda n=restarts: replica.restarts == n and replica.ready)  # type: ignore[misc]
            waits = [text.rsplit(" in ")[-1] for text in said if "started again" in text]
            assert waits == ["0.05 s", "0.1 s", "0.2 s", "0.2 s"]

    run(test)


def test_one_that_does_not_end_is_killed(tmp_path: Path) -> None:
    async def test() -> None:
        async with started(tmp_path, launch("stubborn")) as (fleet, _):
            pid = await pid_of(fleet.replicas[0])
            await fleet.close()
            assert gone(pid)

    run(test)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_start_that_is_given_up_leaves_nothing(tmp_path: Path, cancelled: bool) -> None:
    async def test() -> None:
        fleet = ReplicaFleet([launch(), launch("never")], tmp_path, patience=QUICK)
        starting = asyncio.ensure_future(fleet.start())
        await until(lambda: fleet.replicas[0].ready)
        pids = [process.pid for process in fleet.processes]
        if cancelled:
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
        else:
            await fleet.close()
            assert not await starting
            assert fleet.failure is None
        await fleet.close()
        assert all(pid is not None and gone(pid) for pid in pids)
        assert list(tmp_path.iterdir()) == []

    run(test)


def test_replicas_end_with_the_router_however_it_ends(tmp_path: Path) -> None:
    """Not even a killed router leaves engines behind, which would hold the device."""
    code = (
        "import asyncio, sys\nfrom pathlib import Path\n"
        "from tests.engine.server.test_replica_processes import ReplicaFleet, launch\n"
        "async def main():\n"
        "    fleet = ReplicaFleet([launch(), launch('stubborn')], Path(sys.argv[1]))\n"
        "    await fleet.start()\n"
        "    print(*(process.pid for process in fleet.processes), flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )

    async def test() -> None:
        router = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, str(tmp_path), stdout=asyncio.subprocess.PIPE
        )
        assert router.stdout is not None
        pids = [int(pid) for pid in (await router.stdout.readline()).split()]
        assert len(pids) == 2
        assert not any(gone(pid) for pid in pids)
        router.kill()
        await router.wait()
        await until(lambda: all(gone(pid) for pid in pids))

    run(test)


def test_why_a_replica_cannot_serve_keeps_its_kind() -> None:
    error = read_error(error_line(ConfigError("max_model_len=9 is too long")))
    assert type(error) is ConfigError
    assert str(error) == "max_model_len=9 is too long"
    assert type(read_error(error_line(ValueError("x\ny")))) is EngineError
    for line in ("", "Loading", "[]", '{"a": 1}', "7"):
        assert read_error(line) is None


def test_a_real_replica_says_why_it_cannot_serve(tmp_path: Path) -> None:
    arguments = Arguments(config={"block_size": 7}, limits={})

    async def test() -> None:
        async with started(tmp_path, Launch(arguments), patience=Patience()) as (fleet, _):
            assert type(fleet.failure) is ConfigError
            assert str(fleet.failure).startswith("replica 0 cannot serve: block_size=7 is not one")

    run(test)


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("count", [1, 2, 4, 7, 64])
def test_cores_are_divided_alike(count: int, replicas: int) -> None:
    cores = list(range(100, 100 + count))
    parts = divide_cores(cores, replicas)
    assert len(parts) == replicas
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    if replicas <= count:
        assert [core for part in parts for core in part] == cores


def test_the_machine_is_divided() -> None:
    from engine.config import EngineConfig
    from engine.cpu_cache_budget import cpu_cache_budget

    assert sorted(neighbouring_cores()) == sorted(os.sched_getaffinity(0))
    shares = shares_of(EngineConfig(device="cpu"), 2)
    taken = sum(share.config.kv_cache_memory_bytes or 0 for share in shares)
    assert 0.5 * cpu_cache_budget() < taken <= 4 << 30
    assert {core for share in shares for core in share.cores} == os.sched_getaffinity(0)
    given = shares_of(EngineConfig(device="cpu", kv_cache_memory_bytes=1 << 20), 2)
    assert [share.config.kv_cache_memory_bytes for share in given] == [1 << 20] * 2


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.config import EngineConfig

    monkeypatch.setattr("engine.server.replica_shares.visible_gpus", lambda: ["3", "GPU-a", "5"])
    shares = shares_of(EngineConfig(), 3)
    assert [share.gpus for share in shares] == [("3",), ("GPU-a",), ("5",)]
    assert all(share.cores == () for share in shares)
    with pytest.raises(EnvironmentLacks, match="2 replicas of tensor_parallel_size=2 need 4 GPUs"):
        shares_of(EngineConfig(tensor_parallel_size=2), 2)
