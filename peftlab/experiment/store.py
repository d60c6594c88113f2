"""``experiment.yaml``: the resolved experiment in its run folder. No torch here."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftlab.config import display_path, load_yaml
from peftlab.errors import ConfigError, Problem, RunFolderError, UnknownNameError
from peftlab.experiment.schema import Experiment
from peftlab.files import write_text

EXPERIMENT = "experiment.yaml"


def dump_yaml(data: Any) -> str:
    """Plain data as block-style YAML 1.2."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def write_experiment(folder: Path, experiment: Experiment, identity: str) -> None:
    """Write the experiment and its identity, atomically."""
    content = json.loads(experiment.model_dump_json())
    header = "# The resolved experiment of this run. Written by peftlab; do not edit.\n"
    write_text(folder / EXPERIMENT, header + dump_yaml({"identity": identity, **content}))


def read_experiment(folder: Path) -> tuple[Experiment, str]:
    """The experiment and its identity.

    Raises:
        RunFolderError: this is no run folder, or its experiment cannot be read.
    """
    path = folder / EXPERIMENT
    if not path.is_file():
        raise RunFolderError(
            Problem(display_path(folder), f"is no run folder: it has no {EXPERIMENT}.")
        )
    try:
        data = dict(load_yaml(path).data)
        identity = str(data.pop("identity"))
        return Experiment.parse(data), identity
    except (ConfigError, UnknownNameError, ValidationError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise RunFolderError(
            Problem(display_path(path), f"holds no experiment that can be read: {first}.")
        ) from None
