"""What every test stands on: shapes and types are checked, one thread a worker, repeatable examples."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from multiprocessing import forkserver

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Installed before any module of the package is imported, and never lifted.
install_import_hook("qformers", "typechecking.checked")

torch.set_num_threads(1)  # pytest-xdist runs one worker a core

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def forking() -> None:
    """A server for multiprocessing's "forkserver" that has imported everything: that is most of starting a process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server looks nowhere else
        multiprocessing.set_forkserver_preload(["step_worker", "run_worker"])
        forkserver.ensure_running()


@pytest.fixture(scope="session")
def toy_models(tmp_path_factory):
    """A toy model of each stage and an index (`toy_service.ToyModels`)."""
    from toy_service import make_toy_models

    return make_toy_models(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder in which the documentation's commands and the examples find what they name (`toy_docs`)."""
    from toy_docs import write_runs, write_world

    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        write_world(folder)
        write_runs()
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of that folder, which is the current one."""
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def service(toy_models):
    """Those, served by a process of its own (`toy_service.Running`)."""
    from toy_service import Running

    with Running([*toy_models.arguments, "--max_pixels", "1000000"]) as running:
        yield running
