"""The public surface: exactly these names, found without torch, the same whatever was imported."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import peftlab

PUBLIC = [
    "CompareResult",
    "ExportResult",
    "LoadedRun",
    "PeftlabError",
    "Plan",
    "Request",
    "Run",
    "RunError",
    "UserError",
    "__version__",
    "compare",
    "export",
    "load_run",
    "plan",
    "plan_shape",
    "predict",
    "resolve",
    "train",
]
VERBS = ["compare", "export", "load_run", "plan", "plan_shape", "predict", "resolve", "train"]


def test_the_exported_names() -> None:
    assert sorted(peftlab.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(peftlab))


@pytest.mark.parametrize("name", PUBLIC)
def test_each_is_there_and_documented(name: str) -> None:
    thing = getattr(peftlab, name)
    assert isinstance(thing, str) or thing.__doc__


@pytest.mark.parametrize("name", VERBS)
def test_verbs_stay_functions_when_their_modules_are_imported(name: str) -> None:
    for module in pkgutil.iter_modules(peftlab.__path__):
        if module.name != "__main__":
            importlib.import_module(f"peftlab.{module.name}")
    assert callable(getattr(peftlab, name))
    assert getattr(peftlab, name).__module__.startswith("peftlab.")


def test_no_module_has_a_verbs_name() -> None:
    """Importing a submodule sets an attribute of the package, which would hide the function."""
    modules = {module.name for module in pkgutil.iter_modules(peftlab.__path__)}
    assert not modules & set(PUBLIC)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        peftlab.trian  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(peftlab, "__wrapped__")


@pytest.mark.parametrize(
    "code",
    [
        "import peftlab",
        "import peftlab; peftlab.__version__",
        "from peftlab import train, resolve, Run, UserError",
        "import peftlab; peftlab.resolve('movie-sentiment', 'lora')",
        "import peftlab; [getattr(peftlab, name) for name in peftlab.__all__]",
    ],
)
def test_importing_loads_no_torch(code: str) -> None:
    assert loaded_by(code) == []


@pytest.mark.parametrize(
    "mistake",
    [
        "train('movie-sentiment', 'lroa')",
        "compare('movie-sentiment', ['lora', 'lroa'])",
        "plan('movie-sentiment', 'lroa')",
        "plan_shape('lroa', 'minilm', task_kind='classification', batch_size=1, seq_len=1)",
        "predict('movie-sentiment/lroa', [{}])",
        "export('movie-sentiment/lroa', to='elsewhere')",
    ],
)
def test_a_mistyped_name_is_told_before_torch_is_loaded(mistake: str, tmp_path: Path) -> None:
    code = f"""
import os, peftlab
os.chdir({str(tmp_path)!r})
try:
    peftlab.{mistake}
except peftlab.UserError:
    pass
else:
    raise SystemExit("nothing was raised")
"""
    assert loaded_by(code) == []


def loaded_by(code: str) -> list[str]:
    heavy = ("torch", "peft", "transformers", "accelerate", "datasets")
    check = f"import sys; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split()
