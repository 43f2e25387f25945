"""The README's example runs as it stands there, and learns; what documentation names is there."""

import pathlib
import re

import numpy as np

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_learns():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:1]
    namespace: dict = {"history": []}
    exec(code + "    history.append(float(rewards.mean()))\n", namespace)
    history = namespace["history"]
    assert len(history) == 50
    assert np.mean(history[-5:]) > np.mean(history[:5]) + 0.15


def test_commands_that_the_readme_names_exist():
    for module in re.findall(r"python -m (experiments\.\w+)", README):
        assert (pathlib.Path(__file__).parent.parent / (module.replace(".", "/") + ".py")).exists(), module


def test_tests_that_the_documentation_names_exist():
    root = pathlib.Path(__file__).parent.parent
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", "".join(path.read_text() for path in (root / "docs").glob("*.md")))
    assert len(named) > 20
    missing = [f"{file}::{test}" for file, test in named if f"\ndef {test}(" not in (root / file).read_text()]
    assert not missing
