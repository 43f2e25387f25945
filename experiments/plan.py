"""Whether a run will fit, and how fast it can be at best, on machines that are not here.

python -m experiments.plan --model=qwen2.5-0.5b --topology=v5e:4x4 --mesh.fsdp=16 --rollout.prompts=128

Compiles what a run compiles (the train step, the reference's pass, the sampler's prefill and decoding) from shapes
alone, for a TPU topology (libtpu) or NVIDIA GPUs (the CUDA plugin of JAX), on any machine, and prints what each program
needs of a device beside what the run holds meanwhile; then what the step has to compute, read and send by
`grpo_jax.floors`, all completions full, and which of the three takes longest at the rates that the chip's maker
publishes. Nothing is read but config.json, where --model is a directory.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments import chips, footprint, process, runs
from experiments import flags as sections
from experiments.ahead_of_time import PROGRAMS, SECTIONS, Planned, beside, compiled, model_of, sent
from experiments.flags import section
from grpo_jax.models.shapes import SHAPES
from grpo_jax.telemetry import write_atomically

__all__ = ["check", "head", "line", "report"]

_GB = 1e9


def report(
    planned: Planned, chip: chips.Chip, programs: tuple[str, ...], keep: Callable[[dict], None]
) -> dict[str, Any]:
    """Everything that is known, as plain values; `keep` gets what there is after each program."""
    result: dict[str, Any] = {
        "devices": planned.mesh.size,
        "memory": chip.memory,
        "parameters": footprint.parameters(planned.model),
        "held": planned.held,
        "sampled": planned.sampled,
        "updated": planned.updated,
        "plan": dataclasses.asdict(planned.sampler.plan(planned.state.params, planned.config["rollout"].prompts)),
        "work": {
            name: {
                "flop": work.flop, "memory": dict(work.memory), "interconnect": dict(work.interconnect),
                "network": dict(work.network), "milliseconds": work.milliseconds(chip.rates),
                "bottleneck": work.bottleneck(chip.rates),
            }
            for name, work in planned.work().items()
        },
        "programs": {},
    }  # fmt: skip
    keep(result)
    print(
        f"compiling {', '.join(programs)}: minutes, or half of them and some percent more or less memory with "
        "JAX_OPTIMIZATION_LEVEL=O0 in the environment", flush=True,
    )  # fmt: skip
    for name, said, program in compiled(planned, programs):
        if program is not None:
            total = sum(said[part] for part in ("arguments", "temporaries", "outputs", "code")) + beside(name, planned)
            said |= {"total": total, "fits": total <= chip.memory}
            if name == "train":
                said["sent"], said["sent_to_slices"] = sent(program, planned)
        said["peak_rss"] = process.peak_rss()
        result["programs"][name] = said
        print(line(name, said, chip), flush=True)
        keep(result)
    return result


def line(name: str, said: dict[str, Any], chip: chips.Chip) -> str:
    """What a program needs, in words."""
    took = f"compiled in {said['seconds']:.0f} s, with {said['peak_rss'] / _GB:.1f} GB here"
    if "error" in said:
        return f"{name}: does not compile: {said['error'][:500]}"
    if "total" not in said:
        used = said["too_large"].get("used")
        by = "" if used is None else f": {used / _GB:.1f} GB, {(used - said['too_large']['limit']) / _GB:.1f} too many"
        return f"{name}: DOES NOT FIT by itself{by}; {took}"
    room = (chip.memory - said["total"]) / _GB
    verdict = f"fits, {room:.1f} GB are left" if room >= 0 else f"DOES NOT FIT: {-room:.1f} GB too many"
    return (
        f"{name}: {said['total'] / _GB:.2f} GB at its most, {verdict} (arguments {said['arguments'] / _GB:.2f}, "
        f"temporaries {said['temporaries'] / _GB:.2f}, results {said['outputs'] / _GB:.2f}, beside it "
        f"{(said['total'] - sum(said[x] for x in ('arguments', 'temporaries', 'outputs', 'code'))) / _GB:.2f}); {took}"
    )


def head(result: dict[str, Any]) -> str:
    """What is known without a compiler."""
    gb = lambda sizes: ", ".join(f"{name} {size / _GB:.2f}" for name, size in sizes.items())
    plan = result["plan"]
    lines = [
        f"{result['parameters']:,} parameters on {result['devices']} devices of {result['memory'] / _GB:.0f} GB",
        f"GB of a device, always: {gb(result['held'])}",
        f"GB of a device, while it samples {plan['prompts']} prompts at a time, "
        f"{plan['slots'] or 'all'} completions of theirs: {gb(result['sampled'])}",
        f"GB of a device, while it updates, by formulas: {gb(result['updated'])}",
        "",
        f"{'of a step, a device':<12}{'TFLOP':>11}{'GB read':>10}{'GB sent':>10}"
        f"{'compute':>12}{'memory':>12}{'links':>12}   at best, and limited by",
    ]
    total: dict[str, float] = dict.fromkeys(("compute", "memory", "interconnect"), 0.0)
    slow = sum(sum(work["network"].values()) for work in result["work"].values())
    for name, work in result["work"].items():
        ms = work["milliseconds"]
        total = {kind: total[kind] + ms[kind] for kind in total}
        lines.append(
            f"{name:<19} {work['flop'] / 1e12:>10.2f} {sum(work['memory'].values()) / _GB:>9.2f} "
            f"{sum(work['interconnect'].values()) / _GB:>9.2f}"
            + "".join(f" {ms[kind]:>8.1f} ms" for kind in total)
            + f"   {max(ms.values()):.1f} ms, {work['bottleneck']}"
        )
    least = sum(max(work["milliseconds"].values()) for work in result["work"].values())
    lines.append(f"{'step':<50}" + "".join(f" {ms:>8.1f} ms" for ms in total.values()) + f"   {least:.1f} ms")
    if slow:
        ms = sum(work["milliseconds"].get("network", 0.0) for work in result["work"].values())
        lines.append(f"{'from slice to slice':<41}{slow / _GB:>9.2f}{'':>36}{ms:>9.1f} ms over the network")
    return "\n".join(lines)


def check(values: Any, config: dict[str, Any], chip: chips.Chip) -> None:
    """Raises ValueError where what is asked for is not to be had on this chip, before anything is built."""
    if not values.programs or {*values.programs} - {*PROGRAMS}:
        raise ValueError(f"--programs={','.join(values.programs)} must be among {', '.join(PROGRAMS)}.")
    process.check_file("json", values.json)
    kernels = {"cudnn": "needs cuDNN and its GPU"} | ({"splash": "is for TPUs"} if chip.target else {})
    if wrong := kernels.get(config["policy"].attention):
        other = "xla" if chip.target else "splash or xla"
        raise ValueError(
            f"--policy.attention={config['policy'].attention} {wrong}: to plan for {values.topology} give {other}."
        )
    if values.slices > 1 and not chip.rates.network:
        raise ValueError(
            f"--slices={values.slices} of {values.topology}: what goes from slice to slice in a second is not "
            f"published; it is of {', '.join(name for name, c in chips.CHIPS.items() if c.rates.network)}."
        )


def main(argv: list[str]) -> None:
    """Plans, and prints."""
    process.no_arguments(argv)
    values = flags.FLAGS
    try:
        chips.absent()
        config = runs.configured({name: flag.value for name, flag in FLAGS_OF.items()})
        chip, _ = chips.chip_of(values.topology)
        check(values, config, chip)
        model = model_of(values.model, config["policy"])
        devices = chips.devices_of(values.topology, values.slices)
        planned = Planned(model, config, devices, chip.memory)
        if planned.mesh.size != len(devices):
            raise ValueError(
                f"the mesh has {planned.mesh.size} devices, and --topology={values.topology} has {len(devices)}: make "
                "--mesh.data x --mesh.fsdp x --mesh.tensor as many."
            )
        asked = {name: values[name].value for name in ("model", "topology", "slices")} | runs.as_json(config)

        def keep(result: dict[str, Any]) -> None:
            if not result["programs"]:
                print(f"{head(result)}\n", flush=True)
            if values.json:
                write_atomically(pathlib.Path(values.json), json.dumps({**asked, **result}, indent=1) + "\n")

        report(planned, chip, tuple(values.programs), keep)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, f"A Hugging Face directory, or a shape: {', '.join(SHAPES)}.", required=True)
    flags.DEFINE_string(
        "topology", None, f"A chip among {', '.join(chips.CHIPS)}, and how many: v5e:8x8, v5p:4x4x4, h100:8.",
        required=True,
    )  # fmt: skip
    flags.DEFINE_integer("slices", 1, "So many of the topology, joined by a data-centre network (TPUs).", lower_bound=1)
    flags.DEFINE_list("programs", list(PROGRAMS), f"What is compiled, among {', '.join(PROGRAMS)} (start and decode).")
    flags.DEFINE_string("json", "", "A file for everything that is known, written after each program; empty: none.")
    FLAGS_OF = {name: section(name, cls) for name, cls in SECTIONS.items()}
    flags.adopt_module_key_flags(sections)
    process.command(main)
