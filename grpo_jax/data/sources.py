"""Sources of prompts: pure functions of a cursor, so that nothing iterates and nothing is rewound."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Prompt", "Source"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model reads, and the columns that rewards read."""

    text: str
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Source = Callable[[int], Prompt]  # the prompt at a cursor; the same every time it is asked for
