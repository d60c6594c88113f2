"""Every recipe on a BERT and a Llama, exported, reloaded and proved; and what must be refused."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peftlab.errors import ExportMismatchError, IncompatibleError, NotMergeableError, UserError
from peftlab.experiment.library import find, names
from peftlab.exporting import export, proof, reload, verb
from peftlab.exporting.report import REPORT, folder_hashes
from peftlab.methods import METHODS
from peftlab.run import Request, train

pytestmark = [
    # PEFT 0.21 asks a property that transformers 5.23 renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
RECIPES = tuple(names("methods"))
SHAPES = ("bert", "llama", "llama-lm")
IMPOSSIBLE = {("llama", "bitfit"), ("llama-lm", "bitfit"), ("llama-lm", "head-only")}
"""No biases in a Llama, no task head on a language model."""
POSSIBLE = [(s, r) for s in SHAPES for r in RECIPES if (s, r) not in IMPOSSIBLE]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def forms(recipe: str) -> list[str]:
    """The formats that a recipe's method can be exported in."""
    traits = METHODS.get(find("methods", recipe).layer.data["method"]["kind"]).traits
    return ["merged"] * traits.mergeable + ["adapter"] * traits.is_peft


def run_card(folder: Path, capsys) -> str:
    """What the code in a folder's model card prints."""
    (code,) = BLOCK.findall((folder / "README.md").read_text())
    capsys.readouterr()
    exec(code.replace('folder = "."', f"folder = {str(folder)!r}"), {})
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize(("shape", "recipe"), POSSIBLE)
def test_every_recipe_exports_and_predicts_the_same(lab, shape, recipe):
    assert forms(recipe)
    for form in forms(recipe):
        result = lab.export(shape, recipe, form)
        report = result.report
        assert report.verdict == "same"
        assert report.rows == 12
        assert report.largest_logit_difference <= report.tolerance
        assert report.files == folder_hashes(result.folder)
        there = {path.name for path in result.folder.iterdir()}
        assert {"README.md", REPORT, "tokenizer.json", "tokenizer_config.json"} <= there
        adapter = {"adapter_config.json", "adapter_model.safetensors"}
        model = {"config.json", "model.safetensors"}
        assert there & (adapter | model) == (model if form == "merged" else adapter)


@pytest.mark.parametrize(("shape", "recipe"), sorted(IMPOSSIBLE))
def test_what_is_not_exported_cannot_be_trained(lab, shape, recipe):
    with pytest.raises(IncompatibleError):
        lab.run(shape, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_all_exports_load_without_our_code_in_a_fresh_process(lab, form):
    for shape, recipe in POSSIBLE:
        if form in forms(recipe):
            lab.export(shape, recipe, form)
    kept = lab.requests[form]
    assert kept
    # The script refuses to answer where peftlab, or for merged models peft, was imported.
    proof.run_reload([folder / "request.json" for folder in kept])
    for folder in kept:
        here = load_file(folder / "outputs.safetensors")
        fresh = load_file(folder / "fresh.safetensors")
        assert set(here) == set(fresh)
        for name, tensor in here.items():
            # A 4-bit product does not add in the same order in each process.
            torch.testing.assert_close(fresh[name], tensor, rtol=0, atol=1e-5, msg=folder.name)


def test_the_reload_refuses_to_prove_anything_beside_our_code(tmp_path):
    (tmp_path / "none.json").write_text("[]")
    script = "import peftlab, runpy, sys; sys.argv = sys.argv[1:]; "
    script += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", script, str(Path(reload.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "peftlab was imported" in done.stderr


def test_tied_embeddings_and_generation_settings_survive(lab):
    for recipe in ("full", "lora", "freeze-embeddings", "qlora"):
        folder = lab.export("llama-lm", recipe, "merged").folder
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.tie_word_embeddings
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.generation_config.eos_token_id == 3
        assert not hasattr(model.config, "quantization_config")


def test_labels_go_with_the_model(lab):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        lab.export("llama", "lora", "merged").folder
    )
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.pad_token_id == 0


@pytest.mark.parametrize(
    ("shape", "recipe", "form"),
    [
        ("bert", "full", "merged"),
        ("llama", "lora", "adapter"),
        ("llama-lm", "lora", "merged"),
        ("llama-lm", "ptuning-v2", "adapter"),
        ("bert", "qlora", "adapter"),
    ],
)
def test_the_code_in_the_model_card_works(lab, shape, recipe, form, capsys):
    printed = run_card(lab.export(shape, recipe, form).folder, capsys)
    if shape != "llama-lm":
        assert printed in ("bad", "good")


def test_a_rating_is_proved_too(lab, in_process, tmp_path, capsys):
    lines = [
        f"{word} film,{number / 4}" for number, word in enumerate(["bad", "dull", "good"] * 12)
    ]
    (tmp_path / "ratings.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    task = tmp_path / "rating.yaml"
    task.write_text("kind: regression\nmodel: bert-tiny\ndata: {train: ratings.csv}\n")
    run = train(
        str(task),
        "lora",
        model=str(lab.models["bert"]),
        overrides=["train.max_steps=2", "train.max_length=16", "data.max_eval_rows=4"],
        request=Request(root=tmp_path / "runs", progress=False),
    )
    result = export(run.folder, tmp_path / "out")
    assert result.report.agreement_of_predictions is None
    assert result.report.rows == result.report.logits
    assert math.isfinite(float(run_card(result.folder, capsys)))


def test_the_model_card_says_what_it_is(lab):
    run = lab.run("bert", "lora")
    text = (lab.export("bert", "lora", "adapter").folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: peft\npipeline_tag: text-classification\n")
    assert f"| accuracy | {run.record.metrics['accuracy']:.4g} |" in text
    assert run.record.params.peft_line in text
    assert "`r: 8`" in text
    assert "peftlab train …" in text


def test_an_adapter_names_its_base(lab):
    folder = lab.export("bert", "lora", "adapter").folder
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(lab.models["bert"])


def test_half_precision_stays_half_precision(lab, in_process, tmp_path):
    run = lab.run("llama-lm", "lora", "precision.dtype=bfloat16")
    report = export(run.folder, tmp_path / "out").report
    assert report.dtype == "bfloat16"
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_a_tampered_weight_is_found_and_nothing_stays(lab, in_process, tmp_path, monkeypatch):
    write = verb._write_merged

    def tampering(loaded, folder):
        write(loaded, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.3.mlp.down_proj.weight"][0, 0] += 0.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(verb, "_write_merged", tampering)
    with pytest.raises(ExportMismatchError, match="differs from the trained one") as caught:
        export(lab.run("llama", "lora").folder, tmp_path / "new" / "deep" / "out")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_not_a_number_is_found(lab, in_process, tmp_path, monkeypatch):
    write = verb._write_merged

    def breaking(loaded, folder):
        write(loaded, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["score.weight"][1, 0] = float("nan")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(verb, "_write_merged", breaking)
    with pytest.raises(ExportMismatchError, match="not finite"):
        export(lab.run("llama", "lora").folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_load_is_found_and_nothing_stays(lab, tmp_path, monkeypatch):
    write = verb._write_merged

    def losing(loaded, folder):
        write(loaded, folder)
        (folder / "config.json").unlink()

    monkeypatch.setattr(verb, "_write_merged", losing)
    with pytest.raises(ExportMismatchError, match="does not load"):
        export(lab.run("bert", "full").folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_earlier_one(lab, in_process, tmp_path, monkeypatch):
    run, out = lab.run("llama", "lora").folder, tmp_path / "out"
    earlier = export(run, out).report

    def failing(*_):
        raise ExportMismatchError("no")

    monkeypatch.setattr(proof, "run_reload", failing)
    with pytest.raises(ExportMismatchError):
        export(run, out, format="adapter")
    assert folder_hashes(out) == earlier.files
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("recipe", ["ptuning-v2", "ptuning-v2-mlp"])
def test_a_prefix_is_not_merged_and_the_error_offers_the_adapter(lab, recipe, tmp_path):
    with pytest.raises(NotMergeableError, match="no weight of the model can hold") as caught:
        export(lab.run("bert", recipe).folder, tmp_path / "out")
    assert "--format adapter" in str(caught.value)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["full", "freeze-top2"])
def test_a_method_of_the_models_own_weights_has_no_adapter(lab, recipe, tmp_path):
    with pytest.raises(UserError, match="--format merged"):
        export(lab.run("bert", recipe).folder, tmp_path / "out", format="adapter")
    assert list(tmp_path.iterdir()) == []


def test_the_same_export_again_writes_nothing(lab, in_process, tmp_path):
    run, out = lab.run("bert", "lora").folder, tmp_path / "out"
    first = export(run, out)
    written = (out / "model.safetensors").stat().st_mtime_ns
    again = export(run, out)
    assert not first.already_there
    assert again.already_there
    assert again.report == first.report
    assert (out / "model.safetensors").stat().st_mtime_ns == written


def test_an_export_that_was_changed_is_written_again(lab, in_process, tmp_path):
    run, out = lab.run("bert", "lora").folder, tmp_path / "out"
    first = export(run, out)
    (out / "config.json").write_text("{}")
    again = export(run, out)
    assert not again.already_there
    assert again.report.files["config.json"] == first.report.files["config.json"]


def test_what_else_lies_in_the_folder_is_never_replaced(lab, in_process, tmp_path):
    run, out = lab.run("bert", "lora").folder, tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and no export"):
        export(run, out)
    (out / "thesis.tex").unlink()
    export(run, out)
    with pytest.raises(UserError, match="holds the export of another run"):
        export(lab.run("bert", "full").folder, out)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"did not write: thesis\.tex"):
        export(run, out, format="adapter")
    (out / "a file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        export(run, out / "a file")
    assert (out / "thesis.tex").read_text() == "years of work"
