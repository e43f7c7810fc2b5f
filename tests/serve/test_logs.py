"""Clients cannot fill the log."""

import asyncio
import logging
import socket

from wuerstchen.serve import logs
from wuerstchen.serve.logs import LogLimit


def record(message, *values, error=None):
    info = None if error is None else (type(error), error, None)
    return logging.LogRecord("x", logging.WARNING, "", 0, message, values, info)


def test_a_few_records_of_a_kind_pass_and_the_rest_are_counted():
    """A million malformed requests wrote a million lines."""
    now = 0.0
    limit = LogLimit(lambda: now)
    passed = sum(limit.filter(record("bad %s", number)) for number in range(1000))
    assert passed == logs.LINES
    assert limit.filter(record("another"))
    now = logs.SECONDS + 1
    again = record("bad %s", 1)
    assert limit.filter(again)
    assert again.getMessage() == "bad 1 (995 similar lines were dropped)"
    assert sum(limit.filter(record("bad %s", number)) for number in range(1000)) == logs.LINES - 1


def test_the_number_of_kinds_is_limited():
    """With more kinds than are tracked, all records passed, because their counts restarted."""
    now = 0.0
    limit = LogLimit(lambda: now)
    passed = sum(limit.filter(record(f"kind {number}")) for number in range(5000))
    assert passed == logs.KINDS + logs.LINES
    assert len(limit._kinds) <= 1001
    now = logs.SECONDS + 1
    assert sum(limit.filter(record(f"kind {number}")) for number in range(5000)) == passed
    assert len(limit._kinds) <= 1001


def raised(kind, text=""):
    try:
        raise kind(text)
    except kind as error:
        return error


def grouped(error):
    try:
        raise BaseExceptionGroup("tasks", [error])
    except BaseExceptionGroup as group:
        return group


def raised_elsewhere(kind, text=""):
    try:
        raise kind(text)
    except kind as error:
        return error


def test_one_error_does_not_hide_another():
    """uvicorn logs all exceptions with the same message, so five provoked ones hid a real one."""
    limit = LogLimit(lambda: 0.0)

    def passes(error):
        return limit.filter(record("Exception in ASGI application\n", error=error))

    assert sum(passes(raised(ValueError, str(number))) for number in range(100)) == logs.LINES
    for other in (raised(KeyError), raised_elsewhere(ValueError), grouped(raised(TypeError))):
        assert passes(other)
    assert sum(passes(grouped(raised(KeyError))) for _ in range(100)) == logs.LINES - 1
    assert passes(ValueError())  # raised nowhere


def test_only_the_first_line_defines_a_kind():
    """asyncio's records contain the task's name on a later line, and it differs every time."""
    limit = LogLimit(lambda: 0.0)
    lines = (f"Task exception was never retrieved\nfuture: <Task Task-{number}>" for number in range(100))
    assert sum(limit.filter(record(line, error=raised(ValueError))) for line in lines) == logs.LINES


def test_requests_cancelled_by_the_shutdown_are_not_logged():
    limit = LogLimit()
    assert not limit.filter(record("failed", error=asyncio.CancelledError()))
    assert limit.filter(record("failed", error=ValueError()))


def test_malformed_requests_write_few_lines(serve, caplog, monkeypatch):
    for name in ("uvicorn.error", "asyncio", "wuerstchen.serve"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "filters", [])
        caplog.set_level(logging.WARNING, name)  # another server in this process may have set it
    for name in ("uvicorn", "uvicorn.error"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    logs.set_up_logs()
    logs.set_up_logs()
    assert len(logging.getLogger("uvicorn.error").filters) == 1
    running = serve()
    for _ in range(30):
        with socket.create_connection(running.listening.getsockname(), timeout=20) as connection:
            connection.sendall(b"\x00nonsense\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
    upgrade = {"connection": "upgrade", "upgrade": "websocket"}
    for _ in range(30):
        assert running.http.get("/healthz", headers=upgrade).status_code == 200
    assert sum("Invalid HTTP" in line for line in caplog.messages) == logs.LINES
    assert sum("WebSocket" in line for line in caplog.messages) <= logs.LINES
