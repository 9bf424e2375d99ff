"""Which class a failure gets, by what engines really write."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.external.failures import classify
from autotune.external.server_log import ServerLog
from autotune.external.table import load_table


@pytest.mark.parametrize(
    ("engine", "line", "kind"),
    [
        ("vllm", "vllm: error: unrecognized arguments: --nope 1", "bad_flag"),
        (
            "vllm",
            "vllm serve: error: argument --max-num-seqs: invalid int value: 'x'",
            "bad_flag",
        ),
        (
            "vllm",
            "(EngineCore pid=7) ERROR 11-21 [core.py:9] torch.OutOfMemoryError: CUDA out of memory."
            " Tried to allocate 2.00 GiB.",
            "device_memory",
        ),
        (
            "vllm",
            "ValueError: To serve at least one request with the model's max seq len (8192), (9.0 "
            "GiB KV cache is needed, which is larger than the available KV cache memory",
            "device_memory",
        ),
        (
            "vllm",
            "ValueError: Available memory on node 0 (3.1/23.6 GiB) on startup is less than desired "
            "CPU memory utilization (0.92, 21.7 GiB).",
            "host_memory",
        ),
        (
            "vllm",
            "  Value error, max_num_batched_tokens (32) must be greater than or equal to "
            "max_num_seqs (64). [type=value_error]",
            "bad_flag",
        ),
        ("vllm", "OSError: [Errno 98] Address already in use", "port_in_use"),
        (
            "vllm",
            "Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting",
            "host_memory",
        ),
        (
            "sglang",
            "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
            "device_memory",
        ),
        ("sglang", "launch_server.py: error: unrecognized arguments: --nope", "bad_flag"),
        (
            "sglang",
            "AssertionError: chunked_prefill_size must be divisible by page_size",
            "bad_flag",
        ),
        ("llamacpp", "error: invalid argument: --nope", "bad_flag"),
        (
            "llamacpp",
            "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 5000.00 MiB on device 0: "
            "cudaMalloc failed: out of memory",
            "device_memory",
        ),
        (
            "llamacpp",
            "ggml_aligned_malloc: insufficient memory (attempted to allocate 36000.00 MB)",
            "host_memory",
        ),
        (
            "llamacpp",
            "main: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 80",
            "port_in_use",
        ),
        (
            "llamacpp",
            "gguf_init_from_file: failed to open GGUF file 'none.gguf'",
            "model_not_found",
        ),
        ("vllm", "RuntimeError: nobody foresaw this", "crash"),
    ],
)
def test_the_class_of_a_line(engine: str, line: str, kind: str) -> None:
    log = ["INFO starting", line, "INFO shutting down"]
    failure = classify("X", load_table(engine).failures, 1, log, on_device=True)
    assert failure.kind == kind
    assert failure.reason.startswith("X")
    assert failure.log_tail == tuple(log)


@pytest.mark.parametrize(
    ("engine", "line"),
    [
        ("vllm", "OSError: [Errno 98] Address already in use"),
        ("vllm", "ValueError: a request has no prompt"),
        ("llamacpp", "common_init: No such file or directory"),
    ],
)
def test_what_has_served_did_not_end_by_its_start(engine: str, line: str) -> None:
    failures = load_table(engine).failures
    started = classify("X", failures, -11, [line], on_device=True)
    assert started.kind != "crash"
    served = classify("X", failures, -11, [line], on_device=True, has_served=True)
    assert (served.kind, served.reason) == ("crash", f"X ended with the signal SIGSEGV: {line}")
    memory = [line, "torch.OutOfMemoryError: CUDA out of memory."]
    if engine == "vllm":
        again = classify("X", failures, 1, memory, on_device=True, has_served=True)
        assert again.kind == "device_memory"


def test_without_a_device_its_memory_is_the_machines() -> None:
    line = "ValueError: No available memory for the cache blocks."
    failures = load_table("vllm").failures
    for on_device, kind in ((True, "device_memory"), (False, "host_memory")):
        assert classify("X", failures, 1, [line], on_device=on_device).kind == kind


def test_a_kill_without_a_word_is_for_memory() -> None:
    failures = load_table("vllm").failures
    for status in (-9, 137):
        failure = classify("vLLM", failures, status, ["INFO"], on_device=True)
        assert failure.kind == "host_memory"
    failure = classify("vLLM", failures, 1, ["INFO"], on_device=True, killed_for_memory=True)
    assert failure.kind == "host_memory"
    assert "kernel killed a process" in failure.reason
    failure = classify("vLLM", failures, -11, [], on_device=True)
    assert (failure.kind, failure.reason) == ("crash", "vLLM ended with the signal SIGSEGV")


def test_a_sentence_is_no_book() -> None:
    line = "ValueError: " + "x" * 5000
    failure = classify("vLLM", load_table("vllm").failures, 1, [line], on_device=False)
    assert len(failure.reason) < 400


def test_a_log_is_read_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"an earlier engine\n")
    log = ServerLog(path)
    assert log.new_lines() == []
    with path.open("ab") as file:
        file.write(b"one\ntw")
        file.flush()
        assert log.new_lines() == ["one"]
        file.write(b"o\r\n\x1b[32mINFO\x1b[0m three\n10%\r100%\rdone\n\xff\n")
        file.flush()
        assert log.new_lines() == ["two", "INFO three", "10%", "100%", "done", "\ufffd"]
    assert log.tail(2) == ["done", "\ufffd"]
    assert "an earlier engine" not in log.tail()


def test_a_flood_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = ServerLog(path)
    path.write_bytes(b"0123456789abcde\n" * (1 << 20))
    assert sum(map(len, log.new_lines())) <= 4 << 20
    assert sum(map(len, log.tail())) <= 512 << 10
    assert log.tail(1) == ["0123456789abcde"]


def test_a_line_without_end_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = ServerLog(path)
    for _ in range(3):
        with path.open("ab") as file:
            file.write(b"x" * (3 << 20))
        assert log.new_lines() == []
    with path.open("ab") as file:
        file.write(b"\n")
    (line,) = log.new_lines()
    assert len(line) <= 4 << 20


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / "none")
    assert log.new_lines() == []
    assert log.tail() == []
