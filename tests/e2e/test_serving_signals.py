"""Ended under load: SIGTERM loses no request that has come in, SIGKILL leaves nobody waiting."""

from __future__ import annotations

import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
from toy_service import Running

LONG = {"max_new_tokens": 40, "min_new_tokens": 40, "num_beams": 4}


def post(url: str, body: dict, seconds: float = 60) -> httpx.Response | Exception:
    """The answer, whole; or how the connection ended."""
    try:
        return httpx.post(f"{url}/v1/caption", json=body, timeout=seconds, trust_env=False)
    except httpx.HTTPError as error:
        return error


def in_flight(url: str) -> int:
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    return int(float(next(line for line in lines if line.startswith("qformers_requests_in_flight ")).split()[1]))


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def test_sigterm_finishes_what_has_come_in(toy_models, requests=24):
    """Those in flight are all answered; whoever comes later is answered 503, or finds the door shut."""
    body = {"images": [toy_models.base64(n) for n in range(16)], **LONG}
    with Running(["--model", str(toy_models.speaker), "--max_batch", "16"]) as running, ThreadPoolExecutor(40) as many:
        expected = post(running.url, body).json()
        early = [many.submit(post, running.url, body) for _ in range(requests)]
        streamed = many.submit(read_stream, running.url, toy_models.base64(0))
        wait_until(lambda: in_flight(running.url) == requests + 1)
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{running.url}/readyz", trust_env=False).status_code == 503)
        late = []
        while running.process.poll() is None and len(late) < 500:
            late.append(post(running.url, {"images": [toy_models.base64(0)]}))
            time.sleep(0.02)
        assert [answer.result().json() for answer in early] == [expected] * requests
        assert streamed.result().endswith("data: [DONE]\n\n")
        assert running.process.wait(30) == 0
        turned_away = [answer for answer in late if isinstance(answer, httpx.Response)]
        assert turned_away
        for answer in turned_away:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
            assert answer.headers["retry-after"] and answer.headers["connection"] == "close"
        assert all(isinstance(answer, httpx.Response | httpx.NetworkError) for answer in late), late


def read_stream(url: str, picture: str) -> str:
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    asked = {"model": "stage2", "messages": [{"role": "user", "content": [part]}], "stream": True, "max_tokens": 40}
    return httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60, trust_env=False).text


def test_sigkill_leaves_nobody_waiting_and_the_port_free(toy_models):
    body = {"images": [toy_models.base64(n) for n in range(16)], **LONG}
    with Running(["--model", str(toy_models.speaker)]) as running, ThreadPoolExecutor(12) as many:
        waiting = [many.submit(post, running.url, body) for _ in range(12)]
        wait_until(lambda: in_flight(running.url) > 6)
        running.process.kill()
        killed = time.monotonic()
        answers = [answer.result() for answer in waiting]
        assert time.monotonic() - killed < 10
        assert running.process.wait(10) == -signal.SIGKILL
        assert all(isinstance(answer, httpx.NetworkError | httpx.RemoteProtocolError) or answer.status_code == 200
                   for answer in answers)  # fmt: skip
        assert any(isinstance(answer, Exception) for answer in answers)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", running.port))
