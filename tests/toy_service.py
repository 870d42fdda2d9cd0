"""A toy model of each stage and an index, served by the real command in a process of its own."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from helpers import randomise
from toy_language import toy_tokenizer, toy_transformers_model
from toy_run import toy_config, write_toy_data

import qformers
from qformers.models.config import LanguageConfig
from qformers.search.indexing import index_folder
from qformers.training.loop import train

COMMAND = "import sys, torch; torch.set_num_threads(1); from qformers.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class ToyModels:
    """Folders of a run of stage 1, of one of stage 2 and of an index of the first one's, and the pictures."""

    folder: Path

    @property
    def matcher(self) -> Path:
        return self.folder / "stage1"

    @property
    def speaker(self) -> Path:
        return self.folder / "stage2"

    @property
    def index(self) -> Path:
        return self.folder / "index"

    def picture(self, number: int) -> Path:
        return self.folder / f"{number}.png"

    def content(self, number: int) -> bytes:
        return self.picture(number).read_bytes()

    def base64(self, number: int) -> str:
        return base64.b64encode(self.content(number)).decode()

    @property
    def arguments(self) -> list[str]:
        return ["--model", str(self.speaker), str(self.matcher), "--index", str(self.index)]


def make_toy_models(folder: Path) -> ToyModels:
    """Both stages trained for a few steps, and the index."""
    write_toy_data(folder)
    toy_transformers_model("gpt2", seed=4).save_pretrained(folder / "gpt2")
    toy_tokenizer(folder / "gpt2")
    train(toy_config(folder, folder / "stage1", steps=4, precision="fp32"))
    stage2 = {"stage": 2, "start": str(folder / "stage1"), "language": LanguageConfig(path=str(folder / "gpt2"))}
    run = train(toy_config(folder, folder / "stage2_run", steps=4, precision="fp32", **stage2))
    speaker = qformers.load(run.model)
    for part in (speaker.model.qformer, speaker.model.get_submodule("language_projection")):
        randomise(part, std=0.5)  # a few steps leave what it says the same for every picture
    speaker.save_pretrained(folder / "stage2")
    index_folder(folder, str(folder / "stage1"), folder / "index")
    return ToyModels(folder)


@dataclass
class Running:
    """`qformers serve` on a free port, from when it listens until the end of the `with`."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Running:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **self.environment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "serve", *self.arguments, "--port", "0"],
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self.process.stderr is not None
        self.log: list[str] = []
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"serving (http://\S+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.log))
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self._reader.start()
        return self

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()
