"""The running service: what batching gives at a concurrency of 16, and what memory 5,000 requests take.

    python benchmarks/serving.py throughput --model runs/demo/captioner_t5 --images runs/demo/data/images
    python benchmarks/serving.py memory --model runs/demo/captioner_t5 runs/demo/run

Throughput: two services of the same model in turn, one with batches of one. Every picture is new to both, features
are not kept, and the captions must be the same. Memory: captions, questions, matches, streams and hostile requests from
8 clients; resident memory is what the service itself reports.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from statistics import median, quantiles

import httpx
import numpy as np
from PIL import Image

from qformers.serving.client import Client, ServiceRefused

CONCURRENCY, REQUESTS, REPETITIONS = 16, 64, 5
ALL_REQUESTS, CLIENTS, SAMPLE_EVERY = 5000, 8, 250
PICTURES, KEPT_BYTES = 1000, 100_000  # more pictures than features that are kept


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """A service on a free port; its address."""
    command = [str(Path(sys.executable).with_name("qformers")), "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := re.search(r"serving (http://\S+)", line)))
        with ThreadPoolExecutor(1) as reader:
            reader.submit(lambda: [None for _ in process.stderr])
            try:
                yield url
            finally:
                process.terminate()


def throughput(models: list[str], images: Path) -> dict[str, object]:
    """Captions a second and latencies, batched and one at a time, in turn."""
    pictures = [path.read_bytes() for path in sorted(images.glob("held-out-scene-*"))[:REQUESTS]]
    common = ["--model", *models, "--kept_features_bytes", "0"]
    one_at_a_time = ["--max_batch", "1", "--batch_window_seconds", "0"]
    rows: dict[str, list[dict[str, float]]] = {"batched": [], "one_at_a_time": []}
    with serving(*common) as batched, serving(*common, *one_at_a_time) as alone:
        urls = {"batched": batched, "one_at_a_time": alone}
        said = {name: ask_all(url, pictures)[0] for name, url in urls.items()}  # warms up too
        different = sum(one != other for one, other in zip(*said.values(), strict=True))
        for _ in range(REPETITIONS):
            for name, url in urls.items():
                before = cpu_seconds(url)
                _, seconds, latencies = ask_all(url, pictures)
                cuts, cpu = quantiles(latencies, n=20), cpu_seconds(url) - before
                rate = {"per_second": len(pictures) / seconds, "cpu_seconds_per_caption": cpu / len(pictures)}
                rows[name].append({**rate, "p50": cuts[9], "p95": cuts[18]})
        with Client(alone) as client:
            quiet = [timed(lambda picture=picture: client.caption(picture)) for picture in pictures[:16]]
    ratios = [one["per_second"] / other["per_second"] for one, other in zip(*rows.values(), strict=True)]
    cpu = [
        other["cpu_seconds_per_caption"] / one["cpu_seconds_per_caption"]
        for one, other in zip(*rows.values(), strict=True)
    ]
    return {
        "cpu_ratio": {"median": median(cpu), "min": min(cpu), "max": max(cpu)},  # beside other work the steadier one
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "captions_that_differ": different,
        "distinct_captions": len(set(said["batched"])),
        **{name: {key: median(row[key] for row in of) for key in of[0]} for name, of in rows.items()},
        "latency_of_a_single_client": median(quiet),
        "concurrency": CONCURRENCY,
        "requests": len(pictures),
        "repetitions": REPETITIONS,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }


def ask_all(url: str, pictures: list[bytes]) -> tuple[list[str], float, list[float]]:
    """The captions, the seconds that all took together, and the seconds of each."""
    with Client(url) as client, ThreadPoolExecutor(CONCURRENCY) as many:
        latencies = [0.0] * len(pictures)

        def ask(number: int) -> str:
            start = time.perf_counter()
            [caption] = client.caption(pictures[number])
            latencies[number] = time.perf_counter() - start
            return caption

        start = time.perf_counter()
        captions = list(many.map(ask, range(len(pictures))))
        return captions, time.perf_counter() - start, latencies


def cpu_seconds(url: str) -> float:
    """Processor time that the service has taken, by its own account."""
    with Client(url) as client:
        return metric(client, "process_cpu_seconds_total")


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory(models: list[str]) -> dict[str, object]:
    """Resident bytes of the service over ALL_REQUESTS requests of every kind."""
    samples: list[dict[str, float]] = []
    with (
        serving("--model", *models, "--kept_features_bytes", str(KEPT_BYTES)) as url,
        Client(url) as client,
        ThreadPoolExecutor(CLIENTS) as many,
    ):
        counts: dict[str, int] = {}
        for start in range(0, ALL_REQUESTS, SAMPLE_EVERY):
            for outcome in many.map(lambda number: ask_anything(client, number), range(start, start + SAMPLE_EVERY)):
                counts[outcome] = counts.get(outcome, 0) + 1
            samples.append(
                {"requests": start + SAMPLE_EVERY, "resident_mb": metric(client, "process_resident_memory_bytes") / 1e6}
            )
            print(samples[-1], file=sys.stderr)
    return {"outcomes": counts, "samples": samples, "largest_mb": max(sample["resident_mb"] for sample in samples)}


def ask_anything(client: Client, number: int) -> str:
    """One request, and how it went: always the same for the same number."""
    draw = random.Random(number)
    picture = random_picture(number % PICTURES)
    hostile = [picture[: len(picture) // 2], b"%PDF-1.7", b"<svg/>", bomb()]
    kinds: dict[str, Callable[[], object]] = {
        "caption": lambda: client.caption([picture, random_picture(number // 2 % PICTURES)], max_new_tokens=8),
        "ask": lambda: client.ask(picture, "what is it?", max_new_tokens=8),
        "match": lambda: client.match(picture, ["a cat", "a red car on the grass"]),
        "embed": lambda: client.embed_images(picture),
        "attention": lambda: client.attention(picture, "a cat"),
        "stream": lambda: stream(client, picture),
        "hostile": lambda: client.caption(draw.choice(hostile)),
        "too long": lambda: client.ask(picture, "why " * 2500),
        "impatient": lambda: leave_early(str(client._http.base_url), picture),
    }
    kind = draw.choices(list(kinds), weights=[30, 12, 15, 8, 8, 8, 11, 3, 5])[0]
    try:
        kinds[kind]()
        return f"{kind}: answered"
    except ServiceRefused as refused:
        return f"{kind}: {refused.code}"


@cache
def random_picture(number: int) -> bytes:
    """A small PNG, one of PICTURES."""
    pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    content = BytesIO()
    Image.fromarray(pixels).resize((320, 240)).save(content, "PNG")
    return content.getvalue()


@cache
def bomb() -> bytes:
    """A picture within Pillow's limit and over the service's."""
    content = BytesIO()
    Image.new("1", (9000, 9000)).save(content, "PNG")
    return content.getvalue()


def stream(client: Client, picture: bytes) -> None:
    """A streamed answer, read to its end."""
    name = next(model["id"] for model in client.models() if "caption" in model["does"])
    url = {"url": f"data:image/png;base64,{base64.b64encode(picture).decode()}"}
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]
    asked = {"model": name, "messages": messages, "stream": True, "max_tokens": 8}
    answer = client._http.post("/v1/chat/completions", json=asked)
    assert answer.text.endswith("data: [DONE]\n\n"), answer.text


def leave_early(url: str, picture: bytes) -> None:
    """Ask, and hang up before the answer."""
    try:
        asked = {"images": [base64.b64encode(picture).decode()], "max_new_tokens": 30, "num_beams": 4}
        httpx.post(f"{url}/v1/caption", json=asked, timeout=0.05, trust_env=False)
    except httpx.TimeoutException:
        pass


def metric(client: Client, name: str) -> float:
    """A number of `/metrics`."""
    lines = client._http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("throughput", "memory"))
    parser.add_argument("--model", nargs="+", required=True, help="as of `qformers serve`")
    parser.add_argument("--images", type=Path, help="of the demo, for throughput")
    parser.add_argument("--output", type=Path, help="file to write the result to as well")
    options = parser.parse_args()
    result = memory(options.model) if options.what == "memory" else throughput(options.model, options.images)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
