"""The model card: ``README.md`` with the front matter that the hub reads. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftlab.assets import RELEASES
from peftlab.experiment.schema import Experiment
from peftlab.experiment.store import dump_yaml
from peftlab.exporting.report import ExportReport, Format
from peftlab.models.embedded import embedded_models
from peftlab.results.record import Record
from peftlab.tasks import TASK_KINDS
from peftlab.tasks.embedded import EMBEDDED_DATASETS

PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForCausalLM": "text-generation",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FENCE = "```"


def write_card(
    folder: Path,
    experiment: Experiment,
    record: Record,
    report: ExportReport,
    base_kwargs: Mapping[str, Any],
) -> None:
    """Write ``README.md``: base, data, method, metrics, proof, and how to load the folder.

    Args:
        base_kwargs: of the ``from_pretrained`` that builds an adapter's base, as plain data.
    """
    text = "\n".join(
        [
            "---",
            dump_yaml(_front_matter(experiment, report.format)).rstrip(),
            "---",
            "",
            f"# {experiment.model.model_name_or_path} on {experiment.task} by {experiment.recipe}",
            "",
            *_origin(experiment),
            "",
            *_method(experiment, record),
            "",
            *_metrics(record),
            "",
            *_loading(experiment, report.format, base_kwargs),
            "",
            *_proof(report),
            "",
        ]
    )
    (folder / "README.md").write_text(text, encoding="utf-8", newline="\n")


def base_name(experiment: Experiment) -> str:
    """What an adapter calls its base: the embedded name, the hub id or the absolute folder.

    The cache folder of an embedded model is no name: it differs from machine to machine.
    """
    name = experiment.model.model_name_or_path
    is_folder = name not in embedded_models() and Path(name).expanduser().is_dir()
    return str(Path(name).expanduser().resolve()) if is_folder else name


def _auto_class(experiment: Experiment) -> str:
    return TASK_KINDS.get(experiment.kind).traits.auto_class


def _front_matter(experiment: Experiment, kind: Format) -> dict[str, Any]:
    name = experiment.model.model_name_or_path
    embedded = embedded_models().get(name)
    base = embedded.source.split()[0] if embedded else base_name(experiment)
    pipeline = PIPELINES.get(_auto_class(experiment))
    return {
        "library_name": "peft" if kind == "adapter" else "transformers",
        **({"base_model": base} if _HUB_ID.fullmatch(base) else {}),
        **({"license": embedded.licence.lower()} if embedded else {}),
        **({"pipeline_tag": pipeline} if pipeline else {}),
        "tags": ["peftlab", experiment.method.kind],
    }


def _origin(experiment: Experiment) -> list[str]:
    model, data = experiment.model, experiment.data
    name = model.model_name_or_path
    lines = []
    if embedded := embedded_models().get(name):
        lines.append(f"- Base model: `{name}`, {embedded.summary}")
        lines.append(f"  Source: {embedded.source}. Licence: {embedded.licence}.")
    else:
        revision = f", revision `{model.revision}`" if model.revision else ""
        lines.append(f"- Base model: `{name}`{revision}. Its licence holds for this model too.")
    if dataset := EMBEDDED_DATASETS.get(data.dataset or ""):
        vader = RELEASES["vader"]
        lines.append(f"- Data: `{data.dataset}`, {dataset.summary}.")
        lines.append(f"  Source: {vader.credit} Licence: {vader.licence}.")
    elif data.dataset is not None:
        lines.append(f"- Data: the data set `{data.dataset}`.")
    else:
        files = [file for file in (data.train, data.validation, data.test) if file is not None]
        lines.append(f"- Data: {', '.join(f'`{Path(file).name}`' for file in files)}.")
    return lines


def _method(experiment: Experiment, record: Record) -> list[str]:
    method, optim, train = experiment.method, experiment.optim, experiment.train
    settings = method.model_dump(mode="json", exclude={"kind"}, exclude_none=True)
    budget = f"{train.max_steps} steps" if train.max_steps else f"{train.num_train_epochs:g} epochs"
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    lines = [
        "## Training",
        "",
        f"- Method: `{method.kind}`" + "".join(f", `{k}: {v}`" for k, v in settings.items()),
        (
            f"- Optimizer: `{optim.optim}`, learning rate {optim.learning_rate:g}, "
            f"{budget} (batches of {batch} a process)"
        ),
        f"- Numbers: {_precision(experiment)}",
        f"- Run: `{record.identity[:12]}`, seed {record.seed}",
    ]
    if record.params is not None:
        lines.append(f"- Parameters: {record.params.peft_line}")
    if record.train_rows is not None:
        lines.append(f"- Rows: {record.train_rows:,} for training")
    if record.command:
        lines += ["", f"{_FENCE}sh", record.command, _FENCE]
    return lines


def _precision(experiment: Experiment) -> str:
    precision = experiment.precision
    mixed = precision.mixed_precision
    parts = [f"weights in {precision.dtype}"]
    parts += [f"arithmetic in {mixed}"] if mixed != "no" else []
    parts += [f"base quantised to {precision.quantization}"] if precision.quantization else []
    return ", ".join(parts)


def _metrics(record: Record) -> list[str]:
    rows = f" on {record.test_rows:,} test rows" if record.test_rows is not None else ""
    lines = [f"## Results{rows}", "", "| metric | value |", "| --- | --- |"]
    for name, value in record.metrics.items():
        lines.append(f"| {name} | {'–' if value is None else f'{value:.4g}'} |")
    if record.majority_baseline is not None:
        constant = f"{record.metric}, always the same answer"
        lines.append(f"| {constant} | {record.majority_baseline:.4g} |")
    return lines


def _loading(experiment: Experiment, form: Format, base_kwargs: Mapping[str, Any]) -> list[str]:
    auto = _auto_class(experiment)
    lines = ["## How to load it", "", f"{_FENCE}python"]
    lines += (
        _load_adapter(experiment, auto, base_kwargs) if form == "adapter" else _load_merged(auto)
    )
    return [*lines, *_use(experiment, auto), _FENCE]


def _load_merged(auto: str) -> list[str]:
    return [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        'folder = "."  # the path of this folder',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {auto}.from_pretrained(folder).eval()",
    ]


def _load_adapter(experiment: Experiment, auto: str, base_kwargs: Mapping[str, Any]) -> list[str]:
    name = base_name(experiment)
    embedded = name in embedded_models()
    arguments = dict(base_kwargs)
    quantization = arguments.pop("quantization_config", None)
    lines = ["from peft import PeftModel"]
    libraries = [auto, "AutoTokenizer"] + (["BitsAndBytesConfig"] if quantization else [])
    lines.append(f"from transformers import {', '.join(libraries)}")
    if embedded:
        lines += ["", "from peftlab.models.embedded import embedded_path"]
    source = f"embedded_path({name!r})" if embedded else repr(name)
    lines += [
        "",
        'folder = "."  # the path of this folder',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"base = {auto}.from_pretrained(",
        f"    {source},",
        *(f"    {key}={value!r}," for key, value in arguments.items()),
    ]
    if quantization:
        settings = ", ".join(f"{key}={value!r}" for key, value in quantization.items())
        lines.append(f"    quantization_config=BitsAndBytesConfig({settings}),")
    return [*lines, ")", "model = PeftModel.from_pretrained(base, folder).eval()"]


_TO_DEVICE = "inputs = inputs.to(model.device)"


def _use(experiment: Experiment, auto: str) -> list[str]:
    data: Any = experiment.data
    if auto != "AutoModelForCausalLM":
        pair = ', "and its second part"' if data.text_pair is not None else ""
        lines = [
            (
                f'inputs = tokenizer("a text"{pair}, truncation=True, '
                f'max_length={experiment.train.max_length}, return_tensors="pt")'
            ),
            _TO_DEVICE,
            "output = model(**inputs).logits[0]",
        ]
        if experiment.kind == "classification":
            return [*lines, "print(model.config.id2label[output.argmax().item()])"]
        return [*lines, "print(output.item())"]
    if data.messages is not None:
        chat = '[{"role": "user", "content": "a question"}]'
        lines = [
            (
                f"prompt = tokenizer.apply_chat_template({chat}, tokenize=False, "
                "add_generation_prompt=True)"
            ),
            'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
        ]
    else:
        prompt = str(data.prompt)
        shown = re.sub(r"(?<!\{)\{[^{}]+\}", "a text", prompt) if "{" in prompt else "a text"
        lines = [f"prompt = {shown!r}", 'inputs = tokenizer(prompt, return_tensors="pt")']
    lines.append(_TO_DEVICE)
    tokens = data.max_new_tokens or 20
    return [
        *lines,
        (
            f'generated = model.generate(input_ids=inputs["input_ids"], '
            f'attention_mask=inputs["attention_mask"], max_new_tokens={tokens}, do_sample=False)'
        ),
        (
            'print(tokenizer.decode(generated[0, inputs["input_ids"].shape[1]:], '
            "skip_special_tokens=True))"
        ),
    ]


def _proof(report: ExportReport) -> list[str]:
    with_what = "PEFT" if report.format == "adapter" else "plain transformers"
    said = (
        f"Reloaded from disk with {with_what} in a fresh process and compared with the trained "
        f"model on {report.rows} validation rows ({report.logits:,} logits): the largest "
        f"difference is {report.largest_logit_difference:.3g}, where rounding explains "
        f"{report.tolerance:.3g}."
    )
    if report.agreement_of_predictions is not None:
        said += f" Agreement of predictions: {report.agreement_of_predictions:.4g}."
    if report.generated_rows is not None:
        said += f" Equal completions: {report.generated_equal} of {report.generated_rows}."
    details = "Details and the hash of every file are in `merge_report.json`."
    return ["## Proof", "", said, details]
