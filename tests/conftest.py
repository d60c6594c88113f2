"""Fixtures that all tests may use. Tests never talk to a model hub: it is switched off."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run side by side; tiny tensors gain nothing from threads, which then wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What one run keeps of a frozen trunk shall not be found by the next: not in the user's cache.
if "PEFTLAB_TRUNK_CACHE" not in os.environ:
    os.environ["PEFTLAB_TRUNK_CACHE"] = tempfile.mkdtemp(prefix="peftlab-trunk-")
    atexit.register(shutil.rmtree, os.environ["PEFTLAB_TRUNK_CACHE"], ignore_errors=True)

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def device_of_its_own() -> Iterator[None]:
    """Accelerate decides once a process between CPU and GPU: no test decides for the next."""
    yield
    if (accelerate := sys.modules.get("accelerate.state")) is not None:
        accelerate.PartialState._reset_state()


@pytest.fixture(scope="session")
def bert_tiny() -> str:
    """The folder of the embedded BERT-Tiny; downloaded into the user's cache the first time."""
    from peftlab.models.embedded import embedded_path

    return str(embedded_path("bert-tiny"))
