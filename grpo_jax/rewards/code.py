"""Rewards of code: a completion's Python runs against tests in a sandbox, and what it returns is compared here.

A test is one of

    {"call": "add", "args": [1, 2], "result": 3}     literals; "kwargs" too
    "assert add(1, 2) == 3"                          the same, as MBPP has it: one call, literals alone
    "check(add)"                                     HumanEval's, where the column `setup` defines a `check(candidate)`
                                                     that is nothing but such assertions
    {"stdin": "1 2\n", "stdout": "3\n"}              the program is a main program

A program never sees what is expected of it, and so it can print, patch, compare or claim what it likes: only computing
the answer scores. Three things it can still do. What the prompt shows of the tests it can repeat, so keep some
hidden. All calls of a problem are made in one process, which is fast; a program can count them and keep state from one
to the next. And it can read what `sandbox.py` says can be read. Other assertions would have to run beside the
program, which can then patch whatever they use: they are refused, unless `allow_asserts` accepts that.
"""

import ast
import dataclasses
import functools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.rewards import Item, Judged, RewardError
from grpo_jax.rewards.literals import encode, matches
from grpo_jax.rewards.sandbox import Job, ProgramLimits, Ran, Sandbox, SandboxError, call

__all__ = ["CodeConfig", "CodeReward", "extract_code"]

_LOG = logging.getLogger(__name__)
_FENCE = re.compile(
    r"^[ ]{0,3}```[ ]*(?:python|py)[0-9]*[ ]*\n(.*?)(?:^[ ]{0,3}```|\Z)", re.DOTALL | re.MULTILINE | re.I
)
_SHAPES = (
    'expected {"call": name, "args": [...], "result": ...} with literals, {"stdin": text, "stdout": text}, or '
    "`assert name(literals) == literal`"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeConfig(ProgramLimits):
    """How programs are judged, and what each may use."""

    score: str = "all"  # all: 1 where every test passes, else 0; fraction: the share of tests that pass
    on_failure: str = "error"  # if the sandbox itself fails twice: error (the run stops) or none (no reward; counted)
    workers: int = 0  # programs at a time; 0: one a core
    allow_asserts: bool = False  # run assertions of other shapes beside the program, which can then cheat
    allow_weak: bool = False  # go on where the sandbox cannot keep programs from network or files

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in _SCORES:
            raise ValueError(f"score={self.score!r} must be one of {', '.join(_SCORES)}.")
        if self.on_failure not in ("error", "none"):
            raise ValueError(f"on_failure={self.on_failure!r} must be one of error, none.")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must be 1 or more, or 0 for one a core.")

    @property
    def limits(self) -> ProgramLimits:
        """Of each program."""
        return ProgramLimits(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ProgramLimits)})


_SCORES: Mapping[str, Callable[[Sequence[bool]], float]] = {
    "all": lambda passed: float(all(passed)),
    "fraction": lambda passed: sum(passed) / len(passed),
}


def extract_code(text: str) -> str:
    """The last ```python block of a completion, else the whole text."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


# Tests ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Test:
    """What a program is asked, in the sandbox, and what is expected, which stays here."""

    call: Mapping[str, Any] | None = None
    stdin: str = ""
    expected: Any = None

    @property
    def claims(self) -> bool:
        """An assertion: the program's side says whether it held."""
        return self.call is not None and "assert" in self.call


def _reachable(expected: Any) -> Any:
    """What is expected, where some answer of a program is equal to it; else ValueError."""
    if not matches(expected, encode(expected)):
        raise ValueError("nothing equals what is expected: NaN is not even itself")
    return expected


def _check_entries(test: Mapping[Any, Any], wanted: Mapping[str, Any]) -> None:
    """ValueError, naming the entry that is not there, of another type than wanted, or that nobody reads."""
    for name, kinds in wanted.items():
        if name not in test:
            raise ValueError(f"it has no {name!r}")
        if not isinstance(test[name], kinds):
            raise ValueError(f"its {name!r} is of type {type(test[name]).__name__}")
    if more := test.keys() - wanted.keys():
        raise ValueError(f"nobody reads its {', '.join(sorted(map(repr, more)))}")


def _from_entries(test: Mapping[Any, Any]) -> _Test:
    """A call or a main program; or ValueError."""
    if "call" in test:
        test = {"kwargs": {}, **test}
        _check_entries(test, {"call": str, "args": list | tuple, "kwargs": Mapping, "result": object})
        if not test["call"].isidentifier():
            raise ValueError(f"its 'call' is {test['call']!r}, which is no name of a function")
        return _Test(call=call(test["call"], *test["args"], **test["kwargs"]), expected=_reachable(test["result"]))
    _check_entries(test, {"stdin": str, "stdout": str})
    return _Test(stdin=test["stdin"], expected=_lines(test["stdout"]))


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"{ast.unparse(node)} is no literal") from None


def _from_assert(node: ast.stmt, function: str | None = None) -> _Test:
    """`assert name(literals) == literal`; `function`: what the name `candidate` stands for.

    Raises:
      ValueError: it has another shape.
    """
    match node:
        case ast.Assert(
            test=ast.Compare(left=ast.Call(func=ast.Name(id=name)) as made, ops=[ast.Eq()], comparators=[right])
        ):
            if any(keyword.arg is None for keyword in made.keywords):
                raise ValueError("arguments behind **")
            named = {str(keyword.arg): _literal(keyword.value) for keyword in made.keywords}
            asked = call(function or name, *map(_literal, made.args), **named)
            return _Test(call=asked, expected=_reachable(_literal(right)))
    raise ValueError("another shape")


def _statements(text: str) -> list[ast.stmt]:
    """Of a program; SyntaxError also of what the parser takes, and the compiler does not."""
    tree = ast.parse(text)
    compile(tree, "<unknown>", "exec")
    return tree.body


@functools.lru_cache(maxsize=1 << 16)
def _from_text(test: str, setup: str) -> tuple[_Test, ...]:
    """A statement as tests, all of which must hold; or ValueError."""
    statements = _statements(test)
    if len(statements) != 1:
        raise ValueError(f"{len(statements)} statements, where one is expected")
    (statement,) = statements
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Name(id=checker), args=[ast.Name(id=function)], keywords=[])):
            return _from_checker(setup, checker, function)
    return (_from_assert(statement),)


def _from_checker(setup: str, checker: str, function: str) -> tuple[_Test, ...]:
    for node in ast.parse(setup).body:
        if isinstance(node, ast.FunctionDef) and node.name == checker and len(node.args.args) == 1:
            candidate, tests = node.args.args[0].arg, []
            for statement in node.body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    continue  # a text about it
                match statement:
                    case ast.Assert(test=ast.Constant(value=True)):
                        continue  # HumanEval: assert True, "This prints if this assert fails ..."
                    case ast.Assert(test=ast.Compare(left=ast.Call(func=ast.Name(id=name)))) if name == candidate:
                        tests.append(_from_assert(statement, function))
                    case _:
                        raise ValueError("another shape")
            if tests:
                return tuple(tests)
    raise ValueError(f"no {checker} of assertions in the setup")


@functools.lru_cache(maxsize=1 << 12)
def _wrong_with(setup: str) -> str:
    """Why a setup cannot be used; empty where it can."""
    try:
        body = _statements(setup)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        return f"is no Python ({error})"
    if any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in body):
        return "imports from __future__, and it comes after the program, where that is no Python"
    return ""


@functools.lru_cache(maxsize=1 << 12)
def _only_imports(setup: str) -> bool:
    """Whether a setup holds nothing but imports: it may go to the program's side, for it tells nothing."""
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(setup).body)


def _described(test: Any) -> str:
    return repr(test)[:200]


# Judging --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Question:
    """What one completion is judged by: runs of its program, with the tests that each decides."""

    jobs: tuple[Job, ...]
    tests: tuple[tuple[_Test, ...], ...]  # of each job


class CodeReward:
    """The reward function; processes are started at its first call and end with it.

    With columns `tests` (a list; None: does not apply) and, where there are such, `prefix` (text before the
    completion) and `setup` (imports that come after it, or HumanEval's `check`). Whatever a program does is a verdict,
    and one that exceeds a limit passes none of its calls; only what the sandbox itself gets wrong is a failure.
    """

    def __init__(self, config: CodeConfig | None = None, sandbox: Sandbox | None = None):
        """`sandbox`: another reward's, for the same programs judged otherwise.

        Raises:
          RewardError: programs cannot be isolated, see `sandbox.isolation`.
        """
        self.config = c = config or CodeConfig()
        try:
            self._sandbox = sandbox or Sandbox(c.limits, workers=c.workers, allow_weak=c.allow_weak)
        except SandboxError as error:
            raise RewardError(str(error)) from None

    def strict(self) -> "CodeReward":
        """1 where every test passes, else 0, whatever this one gives: what evaluations count."""
        return CodeReward(dataclasses.replace(self.config, score="all"), self._sandbox)

    def close(self) -> None:
        """Ends the processes."""
        self._sandbox.close()

    def check(self, tests: Any, setup: str | None = None) -> None:
        """To be called at start, with the tests of each problem.

        Raises:
          RewardError: naming the test that cannot be judged, and why.
        """
        self._tests(tests, setup or "")

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *,
        tests: Sequence[Any], prefix: Sequence[str | None] | None = None, setup: Sequence[str | None] | None = None,
        **columns: object,
    ) -> Judged:  # fmt: skip
        """1 where a completion passes its tests, else 0, or the share that it passes; None where `tests` is None."""
        del prompts, completion_ids, columns
        nothing = [None] * len(completions)
        rows = zip(completions, tests, prefix or nothing, setup or nothing, strict=True)
        asked = [None if row[1] is None else self._question(*row) for row in rows]
        # A group says the same thing often: what is equal runs once.
        keys = [None if question is None else _key(question) for question in asked]
        different = {key: question for key, question in zip(keys, asked, strict=True) if question is not None}
        verdicts = dict(zip(different, self._sandbox.map(self._judged, list(different.values())), strict=True))
        judged: list[tuple[Item, bool, float]] = [(None, False, 0.0) if k is None else verdicts[k] for k in keys]
        items, failed, seconds = zip(*judged, strict=True) if judged else ((), (), ())
        return Judged(items, failed=failed, seconds=seconds)

    def _tests(self, tests: Any, setup: str) -> list[_Test]:
        if problem := _wrong_with(setup) if isinstance(setup, str) else "is no text":
            raise RewardError(f"the column 'setup' holds {_described(setup)}, which {problem}.")
        if not isinstance(tests, list | tuple) or not tests:
            raise RewardError(
                f"the column 'tests' holds {_described(tests)}; expected a list of one or more tests, for each "
                "completion."
            )
        return [one for test in tests for one in self._test(test, setup)]

    def _test(self, test: Any, setup: str) -> tuple[_Test, ...]:
        try:
            if isinstance(test, Mapping):
                return (_from_entries(test),)
            if isinstance(test, str):
                return _from_text(test, setup)
            raise ValueError(f"it is of type {type(test).__name__}")
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            if not isinstance(test, str):
                raise RewardError(f"the test {_described(test)} cannot be judged: {error}; {_SHAPES}.") from None
            if isinstance(error, SyntaxError):
                raise RewardError(f"the test {_described(test)} is no Python: {error}; {_SHAPES}.") from None
            if self.config.allow_asserts:
                return (_Test(call={"assert": test}),)
            raise RewardError(
                f"the test {_described(test)} is no call with literals compared with a literal ({error}). It would "
                "have to run beside the program, which could make it pass: write it as such calls, leave the problem "
                "out, or accept that with allow_asserts (--code.allow_asserts)."
            ) from None

    def _question(self, completion: str, tests: Any, prefix: str | None, setup: str | None) -> _Question:
        all_tests, setup = self._tests(tests, setup or ""), setup or ""
        calls = tuple(test for test in all_tests if test.call is not None)
        mains = tuple(test for test in all_tests if test.call is None)
        program = (prefix or "") + extract_code(completion)
        behind = program
        # What a setup of imports brings, programs may use. Any other one may hold what is expected (HumanEval's does),
        # and is needed by assertions alone.
        if setup and (any(test.claims for test in calls) or _only_imports(setup)):
            behind = f"{program}\n\n{setup}"
        jobs = [Job(program=behind, calls=tuple(test.call for test in calls))] if calls else []  # type: ignore[misc]
        jobs += [Job(program=program, stdin=test.stdin) for test in mains]
        return _Question(jobs=tuple(jobs), tests=(*((calls,) if calls else ()), *((test,) for test in mains)))

    def _judged(self, question: _Question) -> tuple[Item, bool, float]:
        passed: list[bool] = []
        seconds = 0.0
        for job, tests in zip(question.jobs, question.tests, strict=True):
            try:
                ran = self._sandbox.run(job)
            except SandboxError as error:
                if self.config.on_failure == "error":
                    raise
                _LOG.warning("the sandbox failed, and a program has no verdict: %s", str(error).strip()[-300:])
                return None, True, seconds
            passed += _passed(ran, tests)
            seconds += ran.seconds
            if self.config.score == "all" and not all(passed):
                break
        return _SCORES[self.config.score](passed), False, seconds


def _key(question: _Question) -> str:
    expected = [[repr(test.expected) for test in tests] for tests in question.tests]
    return json.dumps([[dataclasses.asdict(job) for job in question.jobs], expected])


def _passed(ran: Ran, tests: Sequence[_Test]) -> list[bool]:
    """Whether each test of a job passed; all that a program says is hostile."""
    if tests[0].call is None:
        return [ran.ended == "exit" and ran.code == 0 and _lines(ran.stdout) == tests[0].expected]
    said = [*ran.results[: len(tests)], *[("missing", None)] * (len(tests) - len(ran.results))]
    return [
        kind == "returned" and (test.claims or matches(test.expected, value))
        for (kind, value), test in zip(said, tests, strict=True)
    ]


def _lines(text: str | bytes) -> list[str] | None:
    """Lines without the white space at their ends, and without empty ones at the end; None: it is not UTF-8."""
    try:
        lines = [line.rstrip() for line in (text.decode() if isinstance(text, bytes) else text).split("\n")]
    except UnicodeDecodeError:
        return None
    while lines and not lines[-1]:
        lines.pop()
    return lines
