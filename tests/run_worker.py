"""One process of a training run of `e2e/test_scaling.py`. A module of its own: a forked process imports it by name."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from qformers.errors import QFormersError
from qformers.training import loop
from qformers.training.config import TrainConfig
from qformers.training.logging import RunLog


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def enter(rank: int, processes: int, port: int, output: Path) -> None:
    """What a launcher tells its processes, and stderr in a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(output.with_name(f"{output.name}_{rank}.err"), os.O_CREAT | os.O_WRONLY), 2)


def run(rank: int, processes: int, port: int, config: TrainConfig) -> None:
    """Train, and note how much of the frozen weights this process held."""
    output = Path(config.output)
    enter(rank, processes, port, output)
    gather = loop.whole_state

    def noted(model):
        sharded = [weights for weights in model.parameters() if isinstance(weights, DTensor)]
        held, whole = sum(weights.to_local().numel() for weights in sharded), sum(w.numel() for w in sharded)
        output.with_name(f"{output.name}_{rank}.held").write_text(f"{held} {whole}")
        return gather(model)

    loop.whole_state = noted
    loop.train(config)


def run_and_stop(rank: int, processes: int, port: int, config: TrainConfig, sent: signal.Signals | None) -> None:
    """Train, but process 1 sends itself a signal in step 3, or hangs there. The other says why it ended."""
    enter(rank, processes, port, Path(config.output))
    if rank == 1:
        advance = RunLog.advance

        def advance_and_stop(self, step):
            advance(self, step)
            if step == 3 and sent is None:
                time.sleep(3600)
            elif step == 3:
                os.kill(os.getpid(), sent)

        RunLog.advance = advance_and_stop
    try:
        loop.train(config)
    except QFormersError as error:
        sys.exit(f"{type(error).__name__}: {error}")
