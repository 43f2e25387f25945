"""Programs compiled beside each other, before they are asked for: a compiler keeps one or two cores busy with each."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from jax.stages import Compiled, Lowered

__all__ = ["Lowering", "compile_all"]

Lowering = Callable[[], Lowered]  # traces a jitted function for given shapes and places, and compiles nothing yet
_MOST = 8  # at a time: each takes memory of the host, about 1 GiB for a model of 0.5B parameters


def compile_all(lowerings: Iterable[Lowering]) -> list[Compiled]:
    """Compiles programs, as many at a time as there are cores.

    A jitted function that is called later with arguments of the same shapes and places finds its program compiled.

    Returns:
      What was compiled, in the order given. The first error of any is raised, when all have ended.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(_MOST, cores), thread_name_prefix="compile") as threads:
        return list(threads.map(lambda lowering: lowering().compile(), lowerings))
