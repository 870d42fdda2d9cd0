"""What every test stands on: shapes and types are checked, one thread a worker, repeatable examples."""

from __future__ import annotations

import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Installed before any module of the package is imported, and never lifted.
install_import_hook("qformers", "typechecking.checked")

torch.set_num_threads(1)  # pytest-xdist runs one worker a core

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")
