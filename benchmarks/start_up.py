"""Seconds until a fresh process has opened a saved BLIP-2: ours beside transformers, on the same folder.

`seconds_of` also has what comes before: `import qformers` and `qformers --help`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from hugging_face import both_models
from measure import Result, alternate, machine, timed

REPETITIONS = 5
OURS = "from qformers.convert.run import open_model; open_model({folder!r})"
PEER = "from transformers import Blip2ForConditionalGeneration as B; B.from_pretrained({folder!r})"


def run() -> Result:
    """Whole processes in turn. The file is in the page cache for both."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, _ = both_models()
        theirs.save_pretrained(folder)
        del theirs
        opened = alternate(
            lambda: python("-c", OURS.format(folder=folder)),
            lambda: python("-c", PEER.format(folder=folder)),
            REPETITIONS,
        )
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    before = {
        "import qformers": ("-c", "import qformers"),
        "qformers --help": ("-c", "from qformers.cli import main; main()", "--help"),
    }
    return {
        "ratio": opened["ratio"],
        "seconds": opened["seconds"],
        "seconds_of": {
            name: median(timed(lambda: python(*arguments))[0] for _ in range(REPETITIONS))  # noqa: B023, called at once
            for name, arguments in before.items()
        },
        "weights_bytes": size,
        "repetitions": REPETITIONS,
        **machine(torch.float32),
    }


def python(*arguments: str) -> None:
    """A new interpreter, from start to end."""
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
