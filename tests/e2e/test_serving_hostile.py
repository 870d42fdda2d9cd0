"""Whatever is sent, the answer is a 4xx in our form without a word of the machine, and the next request is answered."""

from __future__ import annotations

import base64
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import httpx
import numpy as np
import pytest
from PIL import Image
from toy_service import Running

LIMIT_PX = 1_000_000  # of the service that the tests share


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says it has that size, with whatever data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(kind: str, size: tuple[int, int] = (40, 30), **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    content = BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
BOMB = png(30_000, 30_000, zlib.compress(bytes(30_000 * 90), 9))  # 2.7 GB if it were decoded
HUGE_TIFF = saved("TIFF", (2000, 1000), compression="tiff_deflate")
PICTURES = {
    "bomb beyond Pillow's own limit": (BOMB, "image_too_large"),
    "bomb of zeros within it": (png(9_000, 9_000, zlib.compress(bytes(27_001 * 9_000), 9)), "image_too_large"),
    "as many pixels as an int32 holds": (png(2**31 - 1, 2**31 - 1), "image_too_large"),
    "large TIFF": (HUGE_TIFF, "image_too_large"),
    "large GIF": (saved("GIF", (2000, 1000)), "image_too_large"),
    "truncated PNG": (saved("PNG")[:-60], "broken_image"),
    "truncated JPEG": (saved("JPEG")[:-300], "broken_image"),
    "JPEG cut in its header": (saved("JPEG")[:300], None),
    "truncated WebP": (saved("WEBP")[:60], None),
    "PNG of no data": (png(10, 10), "broken_image"),
    "empty": (b"", "unsupported_image"),
    "SVG": (SVG, "unsupported_image"),
    "HTML": (b"<!DOCTYPE html><img src=x onerror=alert(1)>", "unsupported_image"),
    "PDF": (b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj", "unsupported_image"),
    "EPS, which would run a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported_image"),
    "ICO": (saved("ICO"), "unsupported_image"),
    "PPM": (saved("PPM"), "unsupported_image"),
    "a PNG's first bytes before SVG": (b"\x89PNG\r\n\x1a\n" + SVG, None),
    "zip": (b"PK\x03\x04" + bytes(100), "unsupported_image"),
    "noise": (np.random.default_rng(1).bytes(5000), "unsupported_image"),
}


@pytest.fixture(scope="module")
def http(service):
    with httpx.Client(base_url=service.url, trust_env=False, timeout=30) as http:
        yield http


def assert_refused(answer: httpx.Response, code: str | None = None) -> None:
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"code", "message"} and (code is None or error["code"] == code), error
    for leak in ("Traceback", "site-packages", "/tmp", "/home", ".py"):
        assert leak not in error["message"]


def assert_still_answers(http: httpx.Client, toy_models) -> None:
    assert http.post("/v1/caption", json={"images": [toy_models.base64(0)], "max_new_tokens": 3}).status_code == 200


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_is_none_or_too_large(name, http, toy_models):
    content, code = PICTURES[name]
    text = base64.b64encode(content).decode()
    assert_refused(http.post("/v1/caption", json={"images": [text]}), code)
    for asked in ("match", "embed/image", "search", "attention", "ask"):
        extra = {"match": {"texts": ["a"]}, "ask": {"questions": ["a"]}}.get(asked, {})
        assert_refused(http.post(f"/v1/{asked}", json={"images": [text], **extra}), code)
    good = ("cat.png", toy_models.content(0), "image/png")
    files = [("images", good), ("images", ("../../etc/cat.png", content, "image/png"))]
    assert_refused(http.post("/v1/caption", files=files), code)
    assert_still_answers(http, toy_models)


def test_every_format_that_is_promised_is_read(http):
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        asked = {"images": [base64.b64encode(saved(kind)).decode()], "max_new_tokens": 3}
        assert http.post("/v1/caption", json=asked).status_code == 200, kind


@pytest.mark.parametrize(
    ("picture", "code"),
    [
        ("/etc/passwd", "bad_base64"),
        ("../../../etc/passwd", "bad_base64"),
        ("file:///etc/passwd", "remote_image"),
        ("http://169.254.169.254/latest/meta-data", "remote_image"),
        ("HTTPS://example.org/cat.png", "remote_image"),
        ("data:image/png;base64,@@@@", "bad_base64"),
        ("data:image/png,abc", "bad_base64"),
        ("data:", "bad_base64"),
        ("abc", "bad_base64"),
        ("YWJj\u00e9", "bad_base64"),
        ("C:\\windows\\win.ini", "remote_image"),
        ("con\x00.png", "bad_base64"),
        (17, "invalid_request"),
        (None, "invalid_request"),
        ({"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "invalid_request"),
    ],
)
def test_a_picture_that_is_a_name_or_no_base64(picture, code, http, toy_models):
    assert_refused(http.post("/v1/caption", json={"images": [picture]}), code)
    part = {"type": "image_url", "image_url": {"url": picture}}
    chat = {"model": "stage2", "messages": [{"role": "user", "content": [part]}]}
    assert_refused(http.post("/v1/chat/completions", json=chat), code)
    assert_still_answers(http, toy_models)


GOOD = "(a good picture)"
BODIES = {
    "question of 10,000 characters": (
        "/v1/ask",
        '{"images": ["' + GOOD + '"], "questions": ["' + "why " * 2500 + '"]}',
    ),
    "question of 65 parts": ("/v1/ask", '{"images": ["' + GOOD + '"], "questions": [' + ",".join(['"a"'] * 65) + "]}"),
    "NaN": ("/v1/caption", '{"images": ["(a good picture)"], "top_p": NaN}'),
    "infinity": ("/v1/caption", '{"images": ["(a good picture)"], "length_penalty": 1e999}'),
    "minus infinity": ("/v1/caption", '{"images": ["(a good picture)"], "length_penalty": -Infinity}'),
    "a number of a thousand digits": ("/v1/search", '{"text": "a", "k": 1' + "0" * 1000 + "}"),
    "deep": ("/v1/caption", '{"images": ' + "[" * 100_000),
    "half a JSON": ("/v1/caption", '{"images": ["(a good picture)"]'),
    "no JSON": ("/v1/caption", "images=a"),
    "a list": ("/v1/caption", "[]"),
    "nothing": ("/v1/caption", ""),
    "half a surrogate": ("/v1/match", '{"images": ["(a good picture)"], "texts": ["\\ud800"]}'),
    "SQL where none is taken": ("/v1/search", '{"text": "a", "where": "1=1; drop table images"}'),
    "negative k": ("/v1/search", '{"text": "a", "k": -1}'),
    "a rule of their own": ("/v1/search", '{"text": "a", "rule": "__import__"}'),
    "the same key twice, the second wrong": ("/v1/search", '{"k": 1, "text": "a", "k": "x"}'),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_makes_no_sense(name, http, toy_models):
    path, body = BODIES[name]
    body = body.replace(GOOD, toy_models.base64(0))
    assert_refused(http.post(path, content=body, headers={"Content-Type": "application/json"}))
    assert_still_answers(http, toy_models)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/plain", b"{}"),
        ("", b"{}"),
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; name=images\r\n\r\nabc"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: nonsense\r\n\r\nabc\r\n--x--\r\n"),
        ("multipart/form-data; boundary=" + "x" * 300, b"\xff" * 5000),
        ("application/x-www-form-urlencoded", b"images=abc"),
        ("application/json", b"\xff\xfe\x00{"),
        ("application/json; charset=utf-16", '{"text": "a"}'.encode("utf-16")),
    ],
)
def test_a_content_type_that_is_not_the_content(kind, body, http, toy_models):
    assert_refused(http.post("/v1/search", content=body, headers={"Content-Type": kind}))
    assert_still_answers(http, toy_models)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../../etc/passwd", "/v1/%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "/gradio_api/file=/etc/passwd",
        "/file=/etc/passwd", "/gradio_api/upload", "/gradio_api/proxy=http://example.org", "/gradio_api/queue/join",
        "/static/../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/routes.py", "/v1/" + "a" * 5000, "/docs", "/login",
    ],
)  # fmt: skip
def test_an_address_that_is_none(path, http, toy_models):
    for method in ("GET", "POST"):
        assert_refused(http.request(method, path))
    assert_still_answers(http, toy_models)


def raw(port: int, data: bytes, seconds: float = 20) -> bytes:
    """What the service answers to these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


@pytest.mark.parametrize(
    "data",
    [
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: a\r\n" % n for n in range(20_000)) + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00" + bytes(200) + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /v1/caption HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ],
)
def test_what_is_hardly_http(data, http, service, toy_models):
    try:
        answer = raw(service.port, data)
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431")) and b'{"error":{"code":"' in answer.replace(
            b": ", b":"
        )
    except ConnectionResetError:
        pass  # closed while the rest was still being sent
    assert_still_answers(http, toy_models)


def test_a_name_that_points_here_is_not_this_machine(http, toy_models):
    """DNS rebinding, and a page of another site in the same browser."""
    for headers in (
        {"Host": "evil.example:8000"},
        {"Host": "127.0.0.1.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert_refused(http.get("/v1/models", headers=headers), "foreign_host")
    for host in ("localhost", "localhost:99", "127.0.0.1", "[::1]:8000"):
        assert http.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.fixture(scope="module")
def strict(toy_models):
    """Little of everything, and a token."""
    limits = {"max_body_bytes": 100_000, "time_limit_seconds": 3, "max_waiting_bytes": 150_000, "max_requests": 4}
    arguments = ["--model", str(toy_models.speaker), *(str(part) for item in limits.items() for part in item)]
    arguments = [f"--{part}" if part in limits else part for part in arguments]
    with Running(arguments, {"QFORMERS_TOKEN": "open sesame"}) as running:
        yield running


def test_without_the_token_nothing_is_answered(strict):
    with httpx.Client(base_url=strict.url, trust_env=False) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "open sesame"}, {"Cookie": "a=b"}):
            for path in ("/v1/models", "/metrics", "/", "/config", "/?token=wrong"):
                answer = http.get(path, headers=headers)
                assert_refused(answer, "unauthorised")
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert http.get("/healthz").status_code == 200
        right = {"Authorization": "Bearer open sesame", "Host": "models.example"}
        assert http.get("/v1/models", headers=right).status_code == 200
        assert "open sesame" not in "".join(strict.log)


def test_bodies_that_are_too_long_or_too_slow(strict, toy_models):
    token = {"Authorization": "Bearer open sesame"}
    head = b"POST /v1/caption HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer open sesame\r\n"
    with httpx.Client(base_url=strict.url, trust_env=False, headers=token, timeout=30) as http:
        assert_refused(http.post("/v1/caption", content=b"a" * 200_000), "body_too_large")
        assert_refused(http.post("/v1/caption", content=(b"a" * 10_000 for _ in range(20))), "body_too_large")
        announced = raw(strict.port, head + b"Content-Length: 99999999999\r\n\r\n")
        assert announced.startswith(b"HTTP/1.1 413")
        start = time.monotonic()
        slow = raw(strict.port, head + b'Content-Length: 50\r\n\r\n{"ima')
        assert slow.startswith(b"HTTP/1.1 408") and b"too_slow" in slow
        assert time.monotonic() - start < 15
        # Others that send half of what they announce do not keep anyone out.
        waiting = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(3)]
        for connection in waiting:
            connection.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        assert_still_answers(http, toy_models)
        for connection in waiting:
            connection.close()
        assert_still_answers(http, toy_models)


def test_too_many_bytes_waiting_is_busy(strict, toy_models):
    head = b"POST /v1/caption HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer open sesame\r\nConnection: close\r\n"
    head += b"Content-Length: 90000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", strict.port)) as first:
        first.sendall(head + b"a" * 80_000)
        time.sleep(0.3)
        answer = raw(strict.port, head + b"a" * 90_000)
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer.lower()


def test_one_too_many_is_told_to_come_again(strict, toy_models):
    asked = {"images": [toy_models.base64(n) for n in range(16)], "max_new_tokens": 40, "min_new_tokens": 40}
    start = threading.Barrier(12)

    def at_once(number: int) -> httpx.Response:
        start.wait()
        headers = {"Authorization": "Bearer open sesame"}
        return httpx.post(f"{strict.url}/v1/caption", json=asked, headers=headers, timeout=30, trust_env=False)

    with ThreadPoolExecutor(12) as many:
        answers = list(many.map(at_once, range(12)))
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "busy" and int(answer.headers["retry-after"]) >= 1
    again = {"images": asked["images"][:1]}
    headers = {"Authorization": "Bearer open sesame"}
    assert httpx.post(f"{strict.url}/v1/caption", json=again, headers=headers, trust_env=False).status_code == 200


def test_a_header_that_never_ends_is_given_up(strict):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=30) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: ")
        answer = b""
        for _ in range(40):  # a byte now and then does not buy time
            try:
                connection.sendall(b"a")
                connection.settimeout(0.5)
                answer = connection.recv(4096)
                break
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408")
