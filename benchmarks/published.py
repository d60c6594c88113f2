"""Figures that papers print, beside what peftlab plans for the papers' own settings.

    python benchmarks/published.py [--only TEXT] [--write docs/published-figures.md]

The figures and their settings are in ``published.yaml``. Models are built from their public sizes
and nothing is downloaded. Every plan runs in a process of its own, so memory stays that of one
plan. Without --write the page is printed.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.config import Config, load_yaml
from peftlab.errors import UserError
from peftlab.files import write_text
from peftlab.planning.schema import Device, Plan, PlannedMemory

DATA = Path(__file__).with_suffix(".yaml")
DECODERS = ("gpt2", "llama")
"""Model types that are planned as language models, the others as classifiers."""
HEAD = """# Published figures, planned

What papers say of parameters, files and memory, beside what peftlab plans for the settings they
name. Models are built from their public sizes, without weights. Every number under "planned" is
that of a plan, whose recipe, overrides, micro-batch and device are in the last column; "arithmetic"
is a second opinion in closed form, and says where a figure does not follow from the paper's own
settings. M, MB, GB and TB are decimal. A peak is the plan's live peak on one device, on CUDA with
cuBLAS's workspaces and the slack of blocks. "within" and "outside" stand beside bounds and ranges,
"rounds to it" beside numbers that agree to the last printed digit.

```
{command}
```
"""


class Setting(Config):
    """One plan, of a micro-batch of one example.

    Args:
        model: of ``Figures.models``.
        set: overrides, as ``--set`` takes them.
    """

    model: str
    recipe: str
    set: tuple[str, ...] = ()
    seq_len: int = 16
    device: Device = "cpu"

    def __str__(self) -> str:
        return f"`{' '.join((self.recipe, *self.set))}`, 1 × {self.seq_len}, {self.device}"


class Figure(Config):
    """A published figure.

    Args:
        published: as printed, with its unit; see ``Published.parse``.
        quantity: the name in ``QUANTITIES`` of what it is compared with.
        why: the arithmetic, with the plan's own GB in braces; see ``parts``.
    """

    what: str
    where: str
    published: str
    quantity: str
    plan: Setting
    why: str


class Paper(Config):
    """A source; ``read`` says in what form its figures were read."""

    title: str
    read: str
    figures: tuple[Figure, ...]


class Figures(Config):
    """The data file: config keys by model, and the papers."""

    models: Mapping[str, Mapping[str, Any]]
    papers: tuple[Paper, ...]


def load() -> Figures:
    return Figures.model_validate_json(json.dumps(load_yaml(DATA).data))


def weights_and_states(plan: Plan) -> int:
    return plan.memory.weights_bytes + plan.memory.optimizer_bytes


def model_states(plan: Plan) -> int:
    """What a step holds besides activations."""
    return weights_and_states(plan) + plan.memory.gradients_bytes


def base_parameters(plan: Plan) -> int:
    """Without adapter and trained head; PEFT's frozen original of the head is still in it."""
    return plan.params.total - plan.params.head - plan.params.adapter


QUANTITIES: Mapping[str, Callable[[Plan], float]] = {
    "adapter": lambda plan: plan.params.adapter,
    "base_trainable": lambda plan: plan.params.base_trainable,
    "adapter_share": lambda plan: plan.params.adapter / base_parameters(plan),
    "base_trainable_share": lambda plan: plan.params.base_trainable / base_parameters(plan),
    "saved": lambda plan: plan.saved_bytes,
    "peak": lambda plan: plan.memory.peak_bytes,
    "gradients": lambda plan: plan.memory.gradients_bytes,
    "model_states": model_states,
    "weights_and_states": weights_and_states,
    "states_a_parameter": lambda plan: model_states(plan) / plan.params.total,
    # There are no gradients yet.
    "forward": lambda plan: plan.marks.forward_end_bytes - plan.marks.start_bytes,
    # PEFT keeps the adapter of a quantised base in fp32.
    "frozen_weights": lambda plan: plan.memory.weights_bytes - 4 * plan.params.adapter,
}
SIZES = tuple(name.removesuffix("_bytes") for name in PlannedMemory.model_fields)
_SCALES = {"M": 1e6, "%": 0.01, "MB": 1e6, "GB": 1e9, "TB": 1e12, "bytes": 1.0}


@dataclass(frozen=True)
class Published:
    """A printed figure: a number (low and high are equal), a bound or a range."""

    low: float
    high: float
    unit: str
    decimals: int

    @classmethod
    def parse(cls, text: str) -> Published:
        """``"0.3 M"``, ``"> 780 GB"``, ``"0.1–3 %"``."""
        match = re.fullmatch(r"([<>] )?([\d.]+)(?:–([\d.]+))? (\S+)", text)
        if match is None or match[4] not in _SCALES:
            raise ValueError(f"{text!r} is no figure with a unit")
        bound, first, last, unit = match.groups()
        low = 0.0 if bound == "< " else float(first)
        high = float("inf") if bound == "> " else float(last or first)
        return cls(low, high, unit, len(first.partition(".")[2]))

    def show(self, value: float) -> str:
        """``value`` in the published unit, with two digits more."""
        return f"{value / _SCALES[self.unit]:,.{self.decimals + 2}f} {self.unit}"

    def deviation(self, value: float) -> str:
        ours = value / _SCALES[self.unit]
        if self.low != self.high:
            return "within" if self.low < ours < self.high else "**outside**"
        if round(ours, self.decimals) == self.low:
            return "rounds to it"
        percent = 100 * (ours / self.low - 1)
        return f"{percent:+.0f} %" if abs(percent) >= 10 else f"{percent:+.2g} %"


def plan_here(sizes: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """The plan, or the planner's own words why there is none, as JSON has it."""
    warnings.simplefilter("ignore")
    from transformers import AutoConfig

    from peftlab.planning import plan_shape

    config = AutoConfig.for_model(**sizes)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        try:
            plan = plan_shape(
                setting.recipe,
                str(Path(folder, "config.json")),
                task_kind="causal_lm" if config.model_type in DECODERS else "classification",
                batch_size=1,
                seq_len=setting.seq_len,
                overrides=setting.set,
                device=setting.device,
            )
        except UserError as error:
            return {"refused": str(error)}
    return {"plan": plan.model_dump(mode="json")}


def plan_apart(setting: Setting) -> Plan | str:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--plan", setting.model_dump_json()]
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{time.monotonic() - started:6.1f} s  {setting.model}: {setting}", file=sys.stderr)
    found = json.loads(done.stdout)
    return found["refused"] if "refused" in found else Plan.model_validate(found["plan"])


def parts(plan: Plan) -> dict[str, str]:
    """The plan's GB by name, for ``Figure.why``."""
    sizes = dict(zip(SIZES, (size for _, size in plan.memory), strict=True))
    sizes |= {"states": model_states(plan), "reserved": plan.reserved_bytes}
    return {name: f"{size / 1e9:,.1f}" for name, size in sizes.items()}


def row(figure: Figure, plan: Plan | str) -> str:
    published = Published.parse(figure.published)
    ours, deviation = "–", "–"
    if isinstance(plan, str):
        why = f"cannot be planned: {plan}"
    else:
        value = QUANTITIES[figure.quantity](plan)
        ours, deviation = published.show(value), published.deviation(value)
        why = figure.why.format_map(parts(plan))
    cells = (figure.what, figure.where, figure.published, ours, deviation, why, str(figure.plan))
    # A table's cell is one line without bars.
    return f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |"


def page(papers: Iterable[Paper], command: str, planned: Callable[[Setting], Plan | str]) -> str:
    heads = ("figure", "where", "published", "planned", "deviation", "arithmetic", "plan")
    lines = [HEAD.format(command=command)]
    for paper in papers:
        lines += [f"## {paper.title}", "", f"Read: {paper.read}", ""]
        lines += [f"| {' | '.join(heads)} |", "| --- | --- | ---: | ---: | --- | --- | --- |"]
        lines += [row(figure, planned(figure.plan)) for figure in paper.figures]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="papers whose title holds this")
    parser.add_argument("--write", type=Path, help="write the page")
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    figures = load()
    if arguments.plan:
        setting = Setting.model_validate_json(arguments.plan)
        print(json.dumps(plan_here(figures.models[setting.model], setting)))
        return
    papers = [paper for paper in figures.papers if arguments.only.lower() in paper.title.lower()]
    command = "python benchmarks/published.py --write docs/published-figures.md"
    text = page(papers, command, functools.cache(plan_apart))
    if arguments.write:
        write_text(arguments.write, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
