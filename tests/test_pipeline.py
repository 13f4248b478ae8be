"""The stages one after another on a tiny model: files, figures, refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages.base.manifest import read_manifest
from stages.baseline import baseline
from stages.evaluate import evaluate
from stages.fetch import fetch
from stages.generate import generate
from stages.merge import merge
from stages.prepare import prepare
from stages.report import report
from stages.show import show
from stages.tokenize import tokenize
from stages.train import train
from tests.support.tiny import write_llama

STAGES = (fetch, prepare, tokenize, baseline, train, merge, evaluate, generate, report)


def run(*stages: Any) -> None:
    for stage in stages or STAGES:
        stage()


def read(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def digests(*folders: str) -> dict[str, str]:
    files = [path for folder in folders for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_input_gives_the_same_bytes(project: Path) -> None:
    made = ("data/prepared", "data/tokens", "artifacts/adapter", "artifacts/merged", "artifacts/evaluate",
            "artifacts/samples", "artifacts/metrics", "artifacts/plots", "artifacts/baseline", "artifacts/details",
            "artifacts/report")  # fmt: skip
    run()
    first = digests(*made)
    run()
    assert len(first) > 20
    assert digests(*made) == first


def test_every_row_is_accounted_for(project: Path) -> None:
    run(fetch, prepare, tokenize)
    ledger = read("artifacts/details/prepare.json")
    assert ledger["all"]["rows_in"] == 40
    tokens = read("artifacts/details/tokenize.json")
    for figures in (ledger, tokens):
        for part in figures.values():
            dropped = sum(count for name, count in part.items() if name.startswith("dropped_"))
            assert part["rows_in"] == part["rows_used"] + dropped
    assert {name: tokens[name]["rows_in"] for name in tokens} == {name: ledger[name]["rows_used"] for name in ledger}


def test_evaluate_scores_base_and_adapter_on_the_same_tokens(project: Path) -> None:
    import pyarrow.parquet as pq

    run(fetch, prepare, tokenize)
    train(overrides=["train.iters=60", "train.learning_rate=0.01"])
    run(baseline, merge, evaluate)
    numbers = read("artifacts/details/evaluate.json")
    scores = {name: numbers["models"][name]["loss"]["value"] for name in ("base", "adapter", "merged")}
    assert scores["adapter"] < scores["base"]
    assert scores["merged"] == pytest.approx(scores["adapter"], abs=1e-3)
    assert numbers["tokens"] == read("artifacts/details/tokenize.json")["test"]["trained_tokens"]
    table = pq.read_table("artifacts/evaluate/rows.parquet").to_pydict()
    assert scores["base"] == pytest.approx(sum(table["base_loss"]) / numbers["tokens"], abs=1e-4)


def test_show_prints_the_sentence_and_the_reports_path(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    capsys.readouterr()
    show()
    shown = capsys.readouterr().out
    assert f"{read('artifacts/details/evaluate.json')['sentence']}\n" in shown
    assert "artifacts/report/index.html" in shown


def test_the_merged_directory_opens_in_mlx_lm_and_transformers(project: Path) -> None:
    from mlx_lm.utils import load
    from transformers import AutoConfig, AutoTokenizer

    run()
    model, tokenizer = load("artifacts/merged")
    assert model.args.model_type == AutoConfig.from_pretrained("artifacts/merged").model_type == "llama"
    assert tokenizer.encode("가") == AutoTokenizer.from_pretrained("artifacts/merged").encode("가")
    assert read("artifacts/details/merge.json")["mean_divergence"] == 0.0


def test_a_chat_template_of_the_users_own_goes_with_the_merged_model(project: Path) -> None:
    from transformers import AutoTokenizer

    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|end|>{% endfor %}"
    run(fetch, prepare, tokenize, train)
    merge(overrides=[f"tokenize.chat_template={json.dumps(template)}"])
    tokenizer = AutoTokenizer.from_pretrained("artifacts/merged")
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "user: hi<|end|>"


def test_a_merge_that_loses_the_adapter_fails_and_leaves_the_old_one(project: Path) -> None:
    write_llama(project / "packed", quantize=True, dtype="float16")
    sources = ["model.source=packed"]
    fetch(overrides=sources)
    run(prepare, tokenize)
    train(overrides=["train.learning_rate=0.01", "train.iters=30"])
    merge()
    before = digests("artifacts/merged")
    with pytest.raises(ValueError, match=r"% of the adapter's effect survives .* set merge.dequantize to true"):
        merge(overrides=["merge.dequantize=false", "merge.min_survival=1.0"])
    with pytest.raises(ValueError, match=r"% of the adapter's effect survives .* take more bits"):
        merge(overrides=["merge.quantize={bits: 2, group_size: 64}", "merge.min_survival=0.999"])
    assert digests("artifacts/merged") == before


def test_the_baseline_depends_on_no_adapter_and_keeps_what_evaluate_computes_again(project: Path) -> None:
    """Where the layers are cut in two, and whether their states are kept, changes no byte."""
    run(fetch, prepare, tokenize)
    found = []
    for overrides in (["lora.layers=2"], ["lora.layers=1"], ["lora.targets=[nothing]"], ["model.cache_frozen=off"]):
        baseline(overrides=overrides)
        found.append(digests("artifacts/baseline"))
    assert found == found[:1] * 4
    shutil.rmtree("artifacts/cache")
    baseline()
    (states,) = Path("artifacts/cache").rglob("states.bin")
    run(train, merge)
    before = states.stat().st_size
    evaluate()
    assert states.stat().st_size == before > 0


def test_the_sum_of_adapters_merges_and_another_bases_is_refused(project: Path) -> None:
    run(fetch, prepare, tokenize)
    train(out=Path("one"), overrides=["seed=1"])
    train(out=Path("two"), overrides=["seed=2", "lora.targets=[q_proj]"])
    parts = "[{path: one, weight: 0.5}, {path: two, weight: 2}]"
    merge(overrides=[f"merge.adapters={parts}"])
    assert read("artifacts/details/merge.json")["survival"] == 1.0
    path = Path("two/adapter_config.json")
    content = read(str(path))
    content["lorabuild"]["base"] = "0" * 64
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"two/adapter_config\.json: trained on another base model"):
        merge(overrides=[f"merge.adapters={parts}"])


def test_another_tokenizer_is_refused(project: Path, tiny_llama: Path) -> None:
    run(fetch, prepare, tokenize)
    other = Path(shutil.copytree(tiny_llama, project / "other"))
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace("<|pad|>", "<|PAD|>"), encoding="utf-8")
    fetch(overrides=["model.source=other"])
    with pytest.raises(ValueError, match=r"train.parquet: made with another base model's tokenizer"):
        train()


def test_a_base_that_changed_since_fetch_is_refused(project: Path, tiny_llama: Path) -> None:
    own = Path(shutil.copytree(tiny_llama, project / "own"))
    fetch(overrides=["model.source=own"])
    run(prepare, tokenize)
    weights = own / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"model.safetensors differs from the base model"):
        train()
    assert not Path("artifacts/adapter").exists()


@pytest.mark.parametrize(
    "stage", [prepare, tokenize, baseline, train, evaluate, merge, generate, report], ids=lambda stage: stage.__name__
)
def test_no_stage_replaces_a_folder_that_is_not_its_own(project: Path, stage: Any) -> None:
    run()
    (project / "mine").mkdir()
    (project / "mine" / "thesis.odt").write_text("years of work")
    with pytest.raises(ValueError, match=r"--out mine holds thesis.odt, which this stage did not make"):
        stage(out=Path("mine"))
    assert (project / "mine" / "thesis.odt").read_text() == "years of work"


def test_the_manifest_names_no_path_of_this_machine(project: Path, tiny_llama: Path) -> None:
    run(fetch)
    text = Path("artifacts/base.json").read_text(encoding="utf-8")
    assert str(tiny_llama.parent) not in text
    assert read_manifest(Path("artifacts/base.json")).source == f"directory:{tiny_llama.name}"


def test_samples_hold_both_models_answers_to_every_prompt(project: Path) -> None:
    Path("data/prompts.jsonl").write_text('{"question": "하나?"}\n{"prompt": "raw "}\n', encoding="utf-8")
    run()
    samples = [
        json.loads(line) for line in Path("artifacts/samples/samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [sample["prompt"] for sample in samples] == ["### 질문:\n하나?\n\n### 답변:\n", "raw "]
    assert all(set(sample) == {"prompt", "base", "merged"} for sample in samples)
    markdown = Path("artifacts/samples/samples.md").read_text(encoding="utf-8")
    assert all(sample["prompt"].strip() in markdown for sample in samples)


def test_a_prompt_streams_to_the_terminal_and_writes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    before = digests("artifacts/samples")
    capsys.readouterr()
    generate(prompt="하나?")
    assert capsys.readouterr().out.endswith("\n")
    assert digests("artifacts/samples") == before


@pytest.mark.parametrize(
    ("override", "what"),
    [("generate.max_tokens=2", "max_tokens"), ("generate.temperature=5.0", "temperature"), ("generate.seed=7", "seed")],
)
def test_generation_follows_its_parameters(project: Path, override: str, what: str) -> None:
    run()
    overrides = [override] if what != "seed" else ["generate.temperature=5.0", "generate.seed=7"]
    if what == "seed":
        generate(overrides=["generate.temperature=5.0"])
    before = digests("artifacts/samples")
    generate(overrides=overrides)
    assert digests("artifacts/samples") != before


@pytest.mark.parametrize("stage", [tokenize, train, evaluate, merge, generate], ids=lambda stage: stage.__name__)
def test_a_stage_without_its_input_says_what_makes_it(project: Path, stage: Any) -> None:
    with pytest.raises(ValueError, match=r"no (such file|merged model); make it with: python -m stages\.\w+"):
        stage()
    assert not Path("artifacts").exists() and not Path("data/tokens").exists()


@pytest.mark.parametrize(
    "override",
    ["lora.rank=2", "lora.alpha=1", "lora.dropout=0.5", "lora.targets=[q_proj]", "lora.layers=1", "train.iters=3",
     "lora.type=dora", "lora.rank_stabilized=true", "lora.layers=all", "lora.layers=[0, 2]",
     "train.batch_size=2", "train.grad_accumulation=2", "train.optimizer=lion", "train.betas=[0.5, 0.9]",
     "train.weight_decay=9.0", "train.learning_rate=0.1", "train.schedule=constant", "train.warmup_steps=0",
     "train.max_grad_norm=0.0001", "seed=3", "model.dtype=bfloat16"],
)  # fmt: skip
def test_each_training_parameter_shapes_the_adapter(project: Path, override: str) -> None:
    run(fetch, prepare, tokenize)
    train(overrides=["train.learning_rate=0.01"])
    before = digests("artifacts/adapter")
    train(overrides=["train.learning_rate=0.01", override])
    assert digests("artifacts/adapter") != before


def test_the_final_learning_rate_is_where_a_schedule_ends(project: Path) -> None:
    run(fetch, prepare, tokenize)
    train(overrides=["train.schedule=linear"])
    before = digests("artifacts/adapter")
    train(overrides=["train.schedule=linear", "train.final_learning_rate=0.0009"])
    assert digests("artifacts/adapter") != before


def test_the_best_adapter_is_kept_and_its_step_told(project: Path) -> None:
    run(fetch, prepare, tokenize)
    options = [
        "train.learning_rate=100.0",
        "train.schedule=constant",
        "train.iters=30",
        "train.steps_per_eval=2",
        "train.val_batches=-1",
    ]
    train(overrides=[*options, "train.keep=best"])
    metrics = read("artifacts/details/train.json")
    assert metrics["kept_step"] < metrics["steps"] == 30
    train(overrides=[*options, "train.keep=best", "train.patience=2"])
    assert read("artifacts/details/train.json")["steps"] < 30
    assert read("artifacts/details/train.json")["stopped_early"] == 1


def test_training_starts_from_an_earlier_adapter(project: Path) -> None:
    run(fetch, prepare, tokenize)
    train(overrides=["train.learning_rate=0.01", "train.iters=40"])
    shutil.copytree("artifacts/adapter", "earlier")
    reached = read("artifacts/details/train.json")["valid_loss"]
    train(overrides=["train.init_adapter=earlier"])
    assert read("artifacts/details/train.json")["valid_loss_before"] == reached
    with pytest.raises(ValueError, match=r"lora.rank is 4 there and 2 here; set lora.rank to 4"):
        train(overrides=["train.init_adapter=earlier", "lora.rank=2"])
    with pytest.raises(ValueError, match=r"nowhere/adapter_config.json: no such file"):
        train(overrides=["train.init_adapter=nowhere"])


def test_recomputing_activations_changes_no_byte(project: Path) -> None:
    run(fetch, prepare, tokenize, train)
    before = digests("artifacts/adapter")
    train(overrides=["train.grad_checkpoint=true"])
    assert digests("artifacts/adapter") == before


def test_how_often_it_saves_changes_no_byte(project: Path) -> None:
    made = ("artifacts/adapter", "artifacts/metrics", "artifacts/plots")
    run(fetch, prepare, tokenize, train)
    before = digests(*made)
    train(overrides=["runtime.steps_per_save=1"])
    assert digests(*made) == before
    assert list(Path("artifacts/checkpoints").iterdir()) == []


def test_reports_and_validations_shape_the_curves_alone(project: Path) -> None:
    run(fetch, prepare, tokenize, train)
    adapter, curves = digests("artifacts/adapter"), digests("artifacts/plots")
    del curves["artifacts/plots/lengths.csv"]  # of tokenize
    train(overrides=["train.steps_per_report=1", "train.steps_per_eval=1", "train.val_batches=1"])
    assert digests("artifacts/adapter") == adapter
    changed = digests("artifacts/plots")
    assert all(changed[path] != curves[path] for path in curves)


def test_epochs_count_passes_over_the_rows(project: Path) -> None:
    run(fetch, prepare, tokenize)
    train(overrides=["train.iters=null", "train.epochs=2"])
    metrics = read("artifacts/details/train.json")
    assert metrics["epochs"] == 2.0
    assert metrics["trained_tokens"] == 2 * read("artifacts/details/tokenize.json")["train"]["trained_tokens"]


def test_timing_is_written_apart_from_the_metrics(project: Path) -> None:
    run(fetch, prepare, tokenize, train)
    timing = read("artifacts/timing/train.json")
    assert timing["seconds"] > timing["seconds_to_first_update"] > 0
    assert timing["tokens_per_second"] > 0 and len(timing["tokens_per_second_by_epoch"]) == 1
    assert timing["peak_memory_bytes"] > 50e6  # Python and MLX alone take as much
    assert timing["padded_share"] == read("artifacts/details/train.json")["padded_share"]
    train(overrides=["train.iters=null", "train.epochs=3"])
    assert len(read("artifacts/timing/train.json")["tokens_per_second_by_epoch"]) == 3
    run(baseline, merge, evaluate)
    rates = read("artifacts/timing/baseline.json") | read("artifacts/timing/evaluate.json")
    assert set(rates) == {f"{name}_tokens_per_second" for name in ("base", "adapter", "merged")}
    assert min(rates.values()) > 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], False),
        (["lora.targets=[embed_tokens]"], True),
        (["lora.targets=[embed_tokens]", "train.fused_loss=false"], False),
    ],
)
def test_train_says_what_keeps_the_fused_loss_away(
    project: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: bool
) -> None:
    run(fetch, prepare, tokenize)
    train(overrides=["train.iters=1", *overrides])
    assert ("train.fused_loss is not used: the head itself is trained" in capsys.readouterr().out) == said


def test_epochs_of_batches_by_tokens_see_every_row(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(fetch, prepare, tokenize)
    train(overrides=["train.iters=null", "train.epochs=2", "train.batch_size=null", "train.batch_tokens=300"])
    figures = read("artifacts/details/train.json")
    assert figures["epochs"] == 2
    assert f" {figures['steps']} updates of 300 tokens at most, " in capsys.readouterr().out
    assert figures["trained_tokens"] == 2 * read("artifacts/details/tokenize.json")["train"]["trained_tokens"]


@pytest.mark.parametrize(("wanted", "said"), [("on", True), ("auto", False), ("off", False)])
def test_train_says_what_keeps_it_from_compiling(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wanted: str, said: bool
) -> None:
    run(fetch, prepare, tokenize)
    monkeypatch.setattr("stages.training.step.why_not_compiled", lambda: "there is no compiler")
    monkeypatch.setattr("stages.training.step.on_cpu", lambda: True)
    train(overrides=["train.iters=1", f"train.compile={wanted}"])
    assert ("train.compile is not used: there is no compiler" in capsys.readouterr().out) == said
