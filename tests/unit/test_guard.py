"""The guard around a slow application: time limits, clients that leave, and what is counted."""

from __future__ import annotations

import asyncio
import json

from qformers.serving.config import ServeConfig
from qformers.serving.guard import Guard
from qformers.serving.metrics import Metrics


class Slow:
    """An application that answers after so long, and knows when it was given up."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.given_up = 0

    async def __call__(self, scope, receive, send) -> None:
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


async def ask(guard: Guard, leaves_after: float = 60, body: bytes = b"{}") -> tuple[int | None, bytes]:
    """Status and body of what is answered to a POST."""
    sent: list[dict] = []
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if given:
            return given.pop()
        await asyncio.sleep(leaves_after)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": "/v1/caption", "query_string": b"", "headers": headers}
    await guard(scope, receive, send)
    return sent[0]["status"] if sent else None, b"".join(message.get("body", b"") for message in sent)


def guarded(app, **settings) -> Guard:
    return Guard(app, ServeConfig(**settings), Metrics())


def code(answer: tuple[int | None, bytes]) -> tuple[int | None, str]:
    return answer[0], json.loads(answer[1])["error"]["code"]


def test_past_the_limit_it_is_504_and_the_work_is_given_up():
    app = Slow(30)
    guard = guarded(app, time_limit_seconds=0.05)
    assert code(asyncio.run(ask(guard))) == (504, "timed_out")
    assert (app.given_up, guard.in_flight) == (1, 0)


def test_a_client_that_leaves_frees_its_place():
    app = Slow(30)
    guard = guarded(app)
    assert asyncio.run(ask(guard, leaves_after=0.05)) == (None, b"")
    assert (app.given_up, guard.in_flight) == (1, 0)
    assert b'status="499"' in guard.metrics.text()


def test_more_than_there_is_room_for_are_busy_and_draining_takes_nobody():
    guard = guarded(Slow(0.1), max_requests=3)

    async def many():
        answers = await asyncio.gather(*(ask(guard) for _ in range(5)))
        assert guard.idle.is_set()
        guard.draining = True
        return answers, await ask(guard)

    answers, late = asyncio.run(many())
    assert [status for status, _ in answers] == [200, 200, 200, 503, 503]
    assert code(answers[4]) == (503, "busy") and code(late) == (503, "draining")


def test_what_fails_inside_tells_nothing_of_it(caplog):
    async def broken(scope, receive, send):
        raise KeyError("/secret/path")

    status, body = asyncio.run(ask(guarded(broken)))
    assert (status, json.loads(body)["error"]["code"]) == (500, "internal")
    assert b"secret" not in body and "secret" in caplog.text
