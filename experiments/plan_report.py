"""Writes the tables of docs/scaling.md: every case is a run of `experiments.plan` in a process of its own.

python -m experiments.plan_report [--cases=NAME,...] [--limit=600]

What is known of a case is kept in a file beside the page, so that the command goes on where it stopped; a case that
is named is done again. What does not finish in time, or what the compiler refuses, is said in the table.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments import process
from grpo_jax.telemetry import write_atomically

__all__ = ["CASES", "OPTIONS", "WEAK", "Case", "options_table", "table", "weak_table", "written"]

_ROOT = pathlib.Path(__file__).parents[1]
_GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A run that is planned."""

    model: str
    topology: str
    flags: str  # further ones, as on a command line
    programs: str = "train,reference,sampler"

    @property
    def command(self) -> list[str]:
        """Flags of `experiments.plan`."""
        return [
            f"--model={self.model}",
            f"--topology={self.topology}",
            f"--programs={self.programs}",
            *self.flags.split(),
        ]


def _case(model: str, topology: str, mesh: str, prompts: int, microbatches: int, more: str = "") -> Case:
    attention = "" if topology.startswith("h") else "--policy.attention=splash"
    axes = " ".join(f"--mesh.{axis}" for axis in mesh.split())
    sizes = f"--rollout.prompts={prompts} --update.microbatches={microbatches}"
    return Case(model=model, topology=topology, flags=f"{axes} {sizes} {attention} {more}")


CASES = {
    "0.5B on one v5e": _case("qwen2.5-0.5b", "v5e:1x1", "", 32, 64),
    "8B on 64 v5e": _case("llama-3-8b", "v5e:8x8", "fsdp=16 tensor=4", 64, 32),
    "8B on 64 v5e by fsdp": _case("llama-3-8b", "v5e:8x8", "fsdp=64", 256, 32),
    "8B on 2 x 64 v5e": _case("llama-3-8b", "v5e:8x8", "data=2 fsdp=16 tensor=4", 128, 32, "--slices=2"),
    "8B on 64 v5p": _case("llama-3-8b", "v5p:4x4x4", "data=2 fsdp=32", 256, 8),
    "8B on 16 v6e": _case("llama-3-8b", "v6e:4x4", "fsdp=8 tensor=2", 64, 32),
    "8B on 8 H100": _case("llama-3-8b", "h100:8", "fsdp=8", 32, 32),
    "8B on 8 H200": _case("llama-3-8b", "h200:8", "fsdp=8", 32, 32),
    "70B on 512 v5p": _case("llama-3-70b", "v5p:8x8x8", "fsdp=128 tensor=4", 256, 16),
    "70B on 256 v5e": _case("llama-3-70b", "v5e:16x16", "fsdp=32 tensor=8", 64, 16, "--policy.sampler_dtype=int8"),
}


def _weak(chips: int, topology: str, mesh: str, more: str = "") -> Case:
    return dataclasses.replace(_case("llama-3-8b", topology, mesh, chips, 8, more), programs="train")


_SIZES = {4: "v5p:2x2x1", 16: "v5p:2x2x4", 64: "v5p:4x4x4", 256: "v5p:4x8x8", 512: "v5p:8x8x8"}
WEAK = {
    **{f"{n} chips: data={n // 4} fsdp=4": _weak(n, t, f"data={n // 4} fsdp=4") for n, t in _SIZES.items()},
    **{f"{n} chips: data={n // 16} fsdp=16": _weak(n, _SIZES[n], f"data={n // 16} fsdp=16") for n in (64, 512)},
    "64 chips: data=2 fsdp=32": _weak(64, _SIZES[64], "data=2 fsdp=32"),
    "2 x 64 chips: data=32 fsdp=4": _weak(128, _SIZES[64], "data=32 fsdp=4", "--slices=2"),
    **{f"{n} chips: fsdp={n}": _weak(n, t, f"fsdp={n}") for n, t in _SIZES.items() if n > 4},
}  # fmt: skip


def _option(flags: str) -> Case:
    return dataclasses.replace(_case("llama-3-8b", "v6e:4x4", "fsdp=8 tensor=2", 64, 32, flags), programs="train")


OPTIONS = {
    "as 8B on 16 v6e": _option(""),
    "--policy.remat=dots": _option("--policy.remat=dots"),
    "--policy.remat=none": _option("--policy.remat=none"),
    "--update.microbatches=64": _option("--update.microbatches=64"),
    "--loss.kl_coef=0": _option("--loss.kl_coef=0"),
    "--lora.rank=16": _option("--lora.rank=16"),
    "--lora.rank=16 --lora.base_dtype=bfloat16": _option("--lora.rank=16 --lora.base_dtype=bfloat16"),
    "--optimizer.kind=adafactor": _option("--optimizer.kind=adafactor"),
    "--optimizer.offload": _option("--optimizer.offload"),
}


def planned(case: Case, limit: float) -> dict[str, Any]:
    """What `experiments.plan` says of a case, as far as it came; `stopped` says why it came no further."""
    environment = {**os.environ, "JAX_OPTIMIZATION_LEVEL": "O0"}
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch, "plan.json")
        command = [sys.executable, "-m", "experiments.plan", *case.command, f"--json={path}"]
        try:
            done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=limit)
            stopped = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        except subprocess.TimeoutExpired:
            stopped = f"not compiled within {limit:.0f} s"
        result = json.loads(path.read_text()) if path.exists() else {"programs": {}}
    return {**result, "command": case.command, "stopped": stopped}


def _program(result: Mapping[str, Any], name: str) -> str:
    said = result["programs"].get(name) or result["programs"].get("sampler" if name in ("start", "decode") else "")
    if said is None:
        return result["stopped"] or "-"
    if "total" in said:
        return f"{said['total'] / _GB:.1f}" + ("" if said["fits"] else " **too much**")
    if "too_large" in said:
        used = said["too_large"].get("used")
        return "**too much**" if used is None else f"**{used / _GB:.1f} without the rest, too much**"
    return f"refused: {said['error'][:120]}"


def _asked(command: list[str]) -> str:
    """Prompts a step, microbatches, and in what the sampler computes."""
    flags = dict(flag.removeprefix("--").split("=") for flag in command)
    sampler = flags.get("policy.sampler_dtype", "bfloat16")
    return f"{flags['rollout.prompts']}; {flags['update.microbatches']}; {sampler}"


def _verdict(result: Mapping[str, Any]) -> str:
    programs = result["programs"].values()
    totals = [said["total"] for said in programs if "total" in said]
    if too_large := [said["too_large"] for said in programs if "too_large" in said]:
        over = [said["used"] - said["limit"] for said in too_large if said.get("used")]
        return f"no, {max(over) / _GB:.1f} too much at least" if over else "no"
    if not totals:
        return "unknown"
    room = (result["memory"] - max(totals)) / _GB
    asked = [said for said in ("train", "start", "decode") if said not in result["programs"]]
    return ("yes" if room >= 0 else "no") + f", {room:.1f} left" + (f" ({', '.join(asked)} unknown)" if asked else "")


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The cases that are known, as Markdown: memory, then floors."""
    lines = [
        "| case | mesh; prompts a step; microbatches; sampler | parameters, reference, optimizer | sampler: weights, "
        "caches | update: gradients, activations | update | reference | prefill | decoding | fits (GB of a device) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    floors = [
        "| case | TFLOP | GB read | GB sent | compute | memory | links | between slices | at best | limited by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    costs = ["| case | seconds (GB here) to compile: update | reference | prefill and decoding |", "|---|---|---|---|"]
    for name, result in results.items():
        if "held" not in result:
            lines.append(f"| {name} | {result['stopped']} |" + " |" * 8)
            continue
        held, sampled = result["held"], result["sampled"]
        mesh = " ".join(f"{axis}={size}" for axis, size in result["mesh"].items() if size > 1) or "one"
        caches = sampled["caches of prompts"] + sampled["caches of completions"]
        always, updated = (", ".join(f"{size / _GB:.2f}" for size in of.values()) for of in (held, result["updated"]))
        lines.append(
            f"| {name} | {mesh}; {_asked(result['command'])} | {always} | "
            f"{sampled['sampler weights'] / _GB:.2f}, {caches / _GB:.2f} | {updated} | "
            + " | ".join(_program(result, program) for program in ("train", "reference", "start", "decode"))
            + f" | {_verdict(result)} |"
        )
        work = result["work"].values()
        kinds = ("compute", "memory", "interconnect", "network")
        each = [sum(part["milliseconds"].get(kind, 0.0) for part in work) for kind in kinds]
        parts = {part: max(said["milliseconds"].values()) for part, said in result["work"].items()}
        slowest = max(parts, key=lambda part: parts[part])
        floors.append(
            f"| {name} | {sum(part['flop'] for part in work) / 1e12:.1f} | "
            f"{sum(sum(part['memory'].values()) for part in work) / _GB:.1f} | "
            f"{sum(sum(part['interconnect'].values()) for part in work) / _GB:.2f} | "
            + " | ".join(f"{ms / 1e3:.2f} s" if ms else "-" for ms in each)
            + f" | {sum(parts.values()) / 1e3:.2f} s | {slowest}, by {result['work'][slowest]['bottleneck']} |"
        )
        cost = lambda program, result=result: (
            f"{said['seconds']:.0f} ({said['peak_rss'] / _GB:.1f})"
            if (said := result["programs"].get(program))
            else "-"
        )
        costs.append(f"| {name} | {cost('train')} | {cost('reference')} | {cost('decode')} |")
    return "\n".join([*lines, "", *floors, "", *costs])


def weak_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The train step at fixed work a chip, as Markdown."""
    lines = [
        "| 8 completions a chip | arguments, GB | temporaries, GB | GB sent, as compiled | GB sent, by formulas | "
        "TFLOP | seconds to compile |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, result in results.items():
        said = result["programs"].get("train", {})
        if "total" not in said:
            lines.append(f"| {name} | {_program(result, 'train')} |" + " |" * 5)
            continue
        work = result["work"]["update"]
        slow = sum(work.get("network", {}).values())
        to_slices = lambda size, slow=slow: f" and {size / _GB:.2f} to slices" if slow else ""
        lines.append(
            f"| {name} | {said['arguments'] / _GB:.2f} | {said['temporaries'] / _GB:.2f} | "
            f"{said['sent'] / _GB:.1f}{to_slices(said.get('sent_to_slices', 0.0))} | "
            f"{sum(work['interconnect'].values()) / _GB:.1f}{to_slices(slow)} | {work['flop'] / 1e12:.1f} | "
            f"{said['seconds']:.0f} |"
        )
    return "\n".join(lines)


def options_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What options that save memory save, of the train step, as Markdown."""
    lines = [
        "| with | parameters, reference, optimizer | update: arguments | temporaries | GB of a device in all |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        said = result["programs"].get("train", {})
        if "total" not in said:
            lines.append(f"| `{name}` | {_program(result, 'train')} |" + " |" * 3)
            continue
        held = ", ".join(f"{size / _GB:.2f}" for size in result["held"].values())
        of = " | ".join(f"{said[part] / _GB:.2f}" for part in ("arguments", "temporaries", "total"))
        lines.append(f"| `{name}` | {held} | {of} |")
    return "\n".join(lines)


def written(page: str, name: str, text: str) -> str:
    """The page with this text between the marks of that name.

    Raises:
      ValueError: it has no such marks.
    """
    begin, end = f"<!-- {name}: python -m experiments.plan_report -->", f"<!-- end of {name} -->"
    if begin not in page or end not in page:
        raise ValueError(f"the page needs the marks {begin} and {end}.")
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}"


def main(argv: list[str]) -> None:
    """Does what is not known by its command, or what is named, and writes the page."""
    process.no_arguments(argv)
    page, kept, every = (
        pathlib.Path(PAGE.value),
        pathlib.Path(PAGE.value).with_suffix(".json"),
        {**CASES, **OPTIONS, **WEAK},
    )
    known = json.loads(kept.read_text()) if kept.exists() else {}
    if unknown := {*NAMED.value} - {*every}:
        sys.exit(f"error: --cases={','.join(sorted(unknown))} must be among {'; '.join(every)}.")
    done = {name: result["command"] for name, result in known.items()}
    for name in NAMED.value or [name for name, case in every.items() if done.get(name) != case.command]:
        print(f"{name}: {' '.join(every[name].command)}", flush=True)
        known[name] = planned(every[name], LIMIT.value)
        kept.write_text(json.dumps({name: known[name] for name in every if name in known}, indent=1) + "\n")
    of = lambda cases: {name: known[name] for name in cases if name in known}
    text = written(page.read_text(), "cases", table(of(CASES)))
    text = written(text, "options", options_table(of(OPTIONS)))
    write_atomically(page, written(text, "weak scaling", weak_table(of(WEAK))))


if __name__ == "__main__":
    PAGE = flags.DEFINE_string("page", str(_ROOT / "docs/scaling.md"), "The page; results are kept beside it, as JSON.")
    NAMED = flags.DEFINE_list(
        "cases", [], "Cases that are done, again where they are known; empty: all that are not, as they are now."
    )
    LIMIT = flags.DEFINE_float("limit", 600.0, "Seconds that a case may take.")
    process.command(main)
