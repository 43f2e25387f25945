"""Tests, and what several of them share."""

import os
from typing import NoReturn

# Of a process that compiles for TPUs where there are none.
TPU_COMPILER = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def unavailable(what: str) -> NoReturn:
    """Skips a test of what this machine has not got; in CI, where everything has to run, it fails."""
    import pytest  # `tests.chaos` and what it runs have no need of it

    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(f"not to be missing in CI: {what}")
    pytest.skip(what)
