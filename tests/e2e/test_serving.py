"""The running service says what the Python API says: alone, to many at once, and to clients that others wrote."""

from __future__ import annotations

import http.client
import json
import random
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

import qformers
from qformers.errors import QFormersError
from qformers.serving.client import Client, ServiceRefused

TEXTS = ["a red square", "the picture of a dark blue line", "circle"]
TOLERANCE = {"abs": 1e-5}
SHORT = {"max_new_tokens": 6, "min_new_tokens": 3}


@pytest.fixture(scope="module")
def client(service):
    with Client(service.url) as client:
        yield client


@pytest.fixture(scope="module")
def speaker(toy_models):
    return qformers.load(toy_models.speaker)


@pytest.fixture(scope="module")
def matcher(toy_models):
    return qformers.load(toy_models.matcher)


@pytest.fixture(scope="module")
def index(toy_models, matcher):
    return qformers.Index.open(toy_models.index, matcher)


def test_every_answer_is_the_python_apis(client, toy_models, speaker, matcher, index):
    pictures = [toy_models.picture(number) for number in range(3)]
    assert client.caption(pictures, **SHORT) == speaker.caption(pictures, **SHORT)
    prompted = {"prompt": "a photo of", "num_beams": 3, "num_return_sequences": 2, **SHORT}
    assert client.caption(pictures, **prompted) == speaker.caption(pictures, **prompted)
    assert client.ask(pictures, TEXTS, **SHORT) == speaker.ask(pictures, TEXTS, **SHORT)
    assert client.ask(pictures[0], TEXTS) == speaker.ask(pictures[0], TEXTS)
    assert client.ask(pictures, TEXTS[0], num_beams=1) == speaker.ask(pictures, TEXTS[0], num_beams=1)
    for row, picture in zip(client.match(pictures, TEXTS), pictures, strict=True):
        assert row == pytest.approx(matcher.match(picture, TEXTS).tolist(), **TOLERANCE)
    features = matcher.encode_image(matcher.preprocess(pictures)).features
    assert client.embed_images(pictures)[1][1] == pytest.approx(features[1, 1].tolist(), **TOLERANCE)
    assert client.embed_texts(TEXTS)[2] == pytest.approx(matcher.encode_text(TEXTS).features[2].tolist(), **TOLERANCE)
    for options in ({"text": TEXTS[0], "rerank": 5}, {"image": pictures[0]}, {"text": TEXTS[1], "image": pictures[1]}):
        hits, expected = client.search(k=6, **options), index.search(k=6, **options)
        assert [hit["path"] for hit in hits] == [hit.path for hit in expected]
        assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in expected], **TOLERANCE)
    for text in (None, TEXTS[0]):
        [maps] = client.attention(pictures[0], text)[2:3]
        assert maps[1] == pytest.approx(matcher.attention(pictures[0], text)[-1][2][1].tolist(), **TOLERANCE)
    looked = client.attention(pictures[0], speaker=True)
    assert looked[3][0] == pytest.approx(speaker.attention(pictures[0])[-1][3][0].tolist(), **TOLERANCE)


def test_32_concurrent_mixed_requests_get_the_same_answers(client, toy_models, service):
    """Each is asked alone first; then all at once, several times over."""
    pictures = [toy_models.picture(number) for number in range(8)]
    questions = [
        *(lambda n=n: client.caption(pictures[n], **SHORT) for n in range(8)),
        *(lambda n=n: client.caption(pictures[n], prompt="the red", num_beams=2, **SHORT) for n in range(4)),
        *(lambda n=n: client.ask(pictures[n], TEXTS[n % 3], **SHORT) for n in range(8)),
        *(lambda n=n: client.match(pictures[n], TEXTS[: 1 + n % 3]) for n in range(4)),
        *(lambda n=n: client.embed_images(pictures[n : n + 2]) for n in range(3)),
        *(lambda n=n: client.search(TEXTS[n], k=4, rerank=4) for n in range(3)),
        *(lambda n=n: client.attention(pictures[n], TEXTS[n]) for n in range(2)),
    ]
    assert len(questions) == 32
    alone = [question() for question in questions]
    assert len({*alone[0], *alone[1], *alone[2], *alone[3]}) > 1  # it sees the pictures
    batches = counted(client, "qformers_batch_rows_count")
    with ThreadPoolExecutor(32) as many:
        for seed in range(3):
            order = random.Random(seed).sample(range(32), 32)
            answers = dict(zip(order, many.map(lambda n: questions[n](), order), strict=True))
            for number, expected in enumerate(alone):
                assert_same(answers[number], expected)
    assert counted(client, "qformers_batch_rows_count") - batches < 3 * 32  # they did share


def counted(client: Client, name: str) -> float:
    lines = client._http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def assert_same(one, other):
    """Texts exactly, numbers to the last digits of float32."""
    if isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, **TOLERANCE)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


def test_openais_client_gets_a_caption_an_answer_and_a_stream(service, toy_models, speaker):
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0)
    [name] = [model.id for model in client.models.list() if "caption" in model.model_extra["does"]]
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{toy_models.base64(1)}"}}

    def say(*messages, **options):
        return client.chat.completions.create(model=name, messages=list(messages), max_tokens=6, **options)

    shown = {"role": "user", "content": [picture]}
    six = {"max_new_tokens": 6}
    [caption] = speaker.caption(toy_models.picture(1), **six)
    assert say(shown).choices[0].message.content == caption
    question = "the cat sits on"
    [answer] = speaker.ask(toy_models.picture(1), question, num_beams=1, length_penalty=1.0, **six)
    asking = {"role": "user", "content": [{"type": "text", "text": question}, picture]}
    assert say(asking).choices[0].message.content == answer
    pieces = [chunk.choices[0].delta.content or "" for chunk in say(asking, stream=True)]
    assert len(pieces) > 2 and "".join(pieces).strip() == answer
    again = say(asking, {"role": "assistant", "content": answer}, {"role": "user", "content": "and the dog"})
    before = f"Question: {question} Answer: {answer} Question: and the dog Answer:"
    assert again.choices[0].message.content == speaker.caption(toy_models.picture(1), before, **six)[0]
    drawn = [say(shown, temperature=1.5, seed=3).choices[0].message.content for _ in range(2)]
    assert drawn[0] == drawn[1]

    for wrong in ({"stop": ["."]}, {"n": 2}, {"tools": [{"type": "function", "function": {"name": "f"}}]}):
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            say(shown, **wrong)
        assert refused.value.body["code"] == "invalid_request"
    elsewhere = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    with pytest.raises(openai.UnprocessableEntityError, match="not fetched"):
        say({"role": "user", "content": [elsewhere]})
    with pytest.raises(openai.NotFoundError, match=name):
        client.chat.completions.create(model="gpt", messages=[shown])


def test_curl_gets_a_caption_and_a_streamed_answer(service, toy_models, speaker):
    def curl(*arguments: str, body: str | None = None) -> str:
        command = ["curl", "-sS", "--noproxy", "*", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, input=body).stdout

    form = [
        "-F",
        f"images=@{toy_models.picture(0)}",
        "-F",
        f"images=@{toy_models.picture(1)}",
        "-F",
        "max_new_tokens=6",
    ]
    expected = speaker.caption([toy_models.picture(0), toy_models.picture(1)], **SHORT)
    assert json.loads(curl(*form, f"{service.url}/v1/caption"))["captions"] == [[caption] for caption in expected]
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{toy_models.base64(0)}"}}
    asked = {"model": "stage2", "messages": [{"role": "user", "content": [picture]}], "stream": True, "max_tokens": 6}
    [streamed] = speaker.caption(toy_models.picture(0), max_new_tokens=6)
    header = ["-N", "-H", "Content-Type: application/json", "-d", "@-"]
    events = curl(*header, f"{service.url}/v1/chat/completions", body=json.dumps(asked)).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-2]]
    assert "".join(delta.get("content", "") for delta in deltas).strip() == streamed


def test_a_second_question_about_a_picture_encodes_nothing(client, toy_models):
    def kept() -> tuple[float, float]:
        return counted(client, 'qformers_kept_features_total{kept="yes"}'), counted(
            client, 'qformers_kept_features_total{kept="no"}'
        )

    picture = toy_models.content(15) + b"\0"  # content that nobody asked about before
    first = client.caption(picture, **SHORT)
    yes, no = kept()
    assert client.caption(picture, **SHORT) == first
    client.ask(picture, "a", **SHORT)
    assert kept() == (yes + 2, no)
    client.match(picture, TEXTS)  # another model
    assert kept()[1] == no + 1


def test_what_is_asked_for_in_vain_is_refused_with_its_code(client, toy_models):
    picture = toy_models.content(0)
    for call, status, code in [
        (lambda: client.caption([picture] * 17), 422, "invalid_request"),
        (lambda: client.ask([picture] * 2, TEXTS), 422, "invalid_request"),
        (lambda: client.caption(picture, max_new_tokens=200), 422, "bad_settings"),  # the toy reads 64 tokens
        (lambda: client.caption(picture, num_beams=1, num_return_sequences=2), 422, "bad_settings"),
        (lambda: client.caption(picture, spirit=1), 422, "invalid_request"),
        (lambda: client.match(picture, " ".join(TEXTS * 9)), 422, "bad_input"),
        (lambda: client.match(picture, ["  "]), 422, "invalid_request"),
        (lambda: client.search(), 422, "bad_settings"),
    ]:
        with pytest.raises(ServiceRefused) as refused:
            call()
        assert (refused.value.status, refused.value.code) == (status, code)


def test_one_bad_request_does_not_spoil_those_it_shares_a_batch_with(client, toy_models):
    """A prompt too long for the model is found only when the batch is generated."""
    picture = toy_models.picture(2)
    expected = client.caption(picture, "the", **SHORT)
    start = threading.Barrier(8)

    def ask(number: int):
        start.wait()
        try:
            return client.caption(picture, "the " * 70 if number == 3 else "the", **SHORT)
        except ServiceRefused as error:
            return error.code

    with ThreadPoolExecutor(8) as many:
        answers = list(many.map(ask, range(8)))
    assert answers == [expected] * 3 + ["bad_settings"] + [expected] * 4


def test_health_readiness_metrics_and_models(service):
    with httpx.Client(base_url=service.url, trust_env=False) as http:
        assert http.get("/healthz").json() == {"status": "ok"}
        assert http.get("/readyz").json() == {"status": "ready"}
        assert "qformers_request_seconds_bucket" in http.get("/metrics").text
        found = http.get("/v1/models").json()
        assert [(model["id"], model["does"]) for model in found["data"]] == [
            ("stage2", ["caption", "ask"]),
            ("stage1", ["match", "embed", "search"]),
        ]
        assert found["index_size"] == 16


def test_nobody_there_is_one_line():
    with Client("http://127.0.0.1:9") as client, pytest.raises(QFormersError, match="no answer"):
        client.models()


def test_the_log_says_who_asked_and_nothing_of_what(service, toy_models):
    body = {"images": [toy_models.base64(3)], "prompt": "a blue bird in the house", **SHORT}
    answer = httpx.post(f"{service.url}/v1/caption", json=body, timeout=60)
    request = answer.headers["x-request-id"]
    until = time.monotonic() + 30
    while not (lines := [line for line in service.log if f'"{request}"' in line]):  # written after the answer left
        assert time.monotonic() < until, "".join(service.log[-5:])
        time.sleep(0.05)
    logged = json.loads(lines[-1])
    assert logged.keys() == {"request", "client", "method", "path", "status", "bytes", "seconds"}
    assert (answer.status_code, logged["status"], logged["path"]) == (200, 200, "/v1/caption")
    assert not any("bird" in line or toy_models.base64(3)[:40] in line for line in service.log)


def test_a_connection_that_was_idle_for_as_long_as_clients_keep_one_is_still_open(service):
    """httpx and openai keep them for 5 seconds: closed here just then, the next request would be lost on its way."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    for pause in (6.0, 0.0):
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"status":"ok"}')
        time.sleep(pause)
    connection.close()
