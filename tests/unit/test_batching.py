"""The batcher: who shares a call, who is spared, who is dropped."""

from __future__ import annotations

import asyncio
import threading

import pytest

from qformers.serving.batching import Batcher
from qformers.serving.metrics import Metrics


def run(scenario, window_seconds=0.05, max_rows=8):
    """`scenario(batcher)` beside a working batcher."""

    async def whole():
        batcher = Batcher(window_seconds, max_rows, Metrics())
        worker = asyncio.create_task(batcher.work())
        try:
            return await asyncio.wait_for(scenario(batcher), 20)
        finally:
            worker.cancel()
            batcher.close()

    return asyncio.run(whole())


class Doubling:
    """A model that doubles numbers, refuses 13, and remembers the batches it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, rows: list[int]) -> list[int]:
        self.batches.append(list(rows))
        self.go_on.wait(10)
        if 13 in rows:
            raise ValueError("13")
        return [2 * row for row in rows]


def test_what_comes_within_the_window_shares_a_call_and_everyone_gets_its_own():
    model = Doubling()
    answers = run(lambda batcher: asyncio.gather(*(batcher.submit("k", model, [n, n + 100]) for n in range(4))))
    assert answers == [[2 * n, 2 * n + 200] for n in range(4)]
    assert model.batches == [[0, 100, 1, 101, 2, 102, 3, 103]]


def test_a_batch_holds_one_key_and_at_most_so_many_rows():
    model = Doubling()

    async def scenario(batcher):
        jobs = [batcher.submit(n % 2, model, [n]) for n in range(12)]
        return await asyncio.gather(*jobs, batcher.submit("large", model, list(range(20, 40))))

    answers = run(scenario, max_rows=4)
    assert answers[:12] == [[2 * n] for n in range(12)] and answers[12] == [2 * n for n in range(20, 40)]
    assert sorted(map(sorted, model.batches[:-1])) == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10], [9, 11]]
    assert model.batches[-1] == list(range(20, 40))


def test_what_fails_does_not_fail_what_shares_its_batch():
    model = Doubling()

    async def scenario(batcher):
        return await asyncio.gather(*(batcher.submit("k", model, [n]) for n in (1, 13, 2)), return_exceptions=True)

    one, unlucky, two = run(scenario)
    assert (one, two) == ([2], [4])
    assert isinstance(unlucky, ValueError)


def test_what_is_given_up_while_it_waits_is_never_run():
    model = Doubling()

    async def scenario(batcher):
        model.go_on.clear()
        first = asyncio.create_task(batcher.submit("k", model, [1]))
        while not model.batches:
            await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(batcher.submit("k", model, [n])) for n in (2, 3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        model.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        return [await first, await waiting[1]]

    assert run(scenario) == [[2], [6]]
    assert model.batches == [[1], [3]]


def test_given_up_while_it_runs_it_disturbs_nobody():
    model = Doubling()

    async def scenario(batcher):
        model.go_on.clear()
        tasks = [asyncio.create_task(batcher.submit("k", model, [n])) for n in (1, 2)]
        while not model.batches:
            await asyncio.sleep(0.01)
        tasks[0].cancel()
        await asyncio.sleep(0)
        model.go_on.set()
        return await tasks[1], await batcher.submit("k", model, [5])

    assert run(scenario) == ([4], [10])


def test_while_the_model_works_others_gather():
    model = Doubling()

    async def scenario(batcher):
        model.go_on.clear()
        tasks = [asyncio.create_task(batcher.submit("k", model, [0]))]
        while not model.batches:
            await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(batcher.submit("k", model, [n])) for n in (1, 2, 3)]
        await asyncio.sleep(0.02)
        model.go_on.set()
        return await asyncio.gather(*tasks)

    assert run(scenario, window_seconds=0.0) == [[0], [2], [4], [6]]
    assert model.batches == [[0], [1, 2, 3]]


def test_clients_that_were_answered_together_meet_again_and_one_alone_does_not_wait():
    model = Doubling()

    async def client(batcher, number, pause):
        for _ in range(3):
            await batcher.submit("k", model, [number])
            await asyncio.sleep(pause)

    async def scenario(batcher):
        await asyncio.gather(*(client(batcher, n, 0.005 * n) for n in range(4)))
        for number in range(50, 53):
            await batcher.submit("k", model, [number])

    run(scenario, window_seconds=5.0, max_rows=4)  # a window waited out would be past the limit of 20 s
    assert [len(batch) for batch in model.batches[:3]] == [4, 4, 4]
