"""What the report picks to show."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qformers.demo.captions import object_recall
from qformers.demo.run import Stopwatch
from qformers.demo.showcase import most_different


def test_queries_that_look_elsewhere_are_shown_first():
    maps = np.zeros((4, 2, 2), dtype=np.float32)
    maps[0, 0, 0], maps[1, 0, 0], maps[2, 1, 1], maps[3, 0, 1] = 0.9, 0.85, 0.8, 0.1
    assert most_different(maps, 3) == [0, 2, 3]
    assert most_different(maps, 9) == [0, 2, 3, 1]


def test_seconds_of_an_interrupted_phase_add_up(tmp_path):
    path = tmp_path / "seconds.json"
    path.write_text(json.dumps({"train": 100.0}))
    watch = Stopwatch(path)
    with watch.phase("train", "again"):
        pass
    assert 100.0 < json.loads(path.read_text())["train"] < 101.0
    with pytest.raises(KeyboardInterrupt), watch.phase("features", "stopped"):
        raise KeyboardInterrupt
    assert 0.0 < json.loads(path.read_text())["features"] < 1.0


def test_seconds_of_a_phase_that_is_done_again_do_not_add_up(tmp_path):
    path = tmp_path / "seconds.json"
    path.write_text(json.dumps({"baseline": 100.0}))
    with Stopwatch(path).phase("baseline", "again, whole"):
        pass
    assert json.loads(path.read_text())["baseline"] < 1.0


def test_an_object_is_named_by_its_whole_words():
    captions = ["A red Apple above a cathedral", "two dogs", "a hot dog and a cat"]
    objects = [["apple", "cat"], ["dog", "dogs"], ["hot dog", "cat"]]
    assert object_recall(captions, objects) == {"object_recall": 4 / 6, "all_objects": 1 / 3}
