"""A finished run's files, as the stages write them: Korean rows, a long answer, code, and hostile text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stages.base.manifest import read_manifest
from stages.params.loading import load_params
from stages.results import answers as scoring
from stages.results import summary
from stages.tables.parquet import write_table
from tests.support.imports import ROOT

# What must be shown as text, wherever it stands.
HOSTILE = (
    "</script><script>document.title = 'broken'</script>",
    "<img src=http://example.org/x.png onerror=\"document.title='broken'\"> & <b>굵게</b>",
    "\x00\x08\x1b[31m빨강\x7f \x85끝",
    "\u202eאבג\u202c والسلام \u2066abc",
    "{{ 7 * 7 }} {% raw %} ${7 * 7} <!-- ]]> -->",
)
_CODE = '```python\ndef 더하기(a: int, b: int) -> int:\n    """두 수의 합."""\n    return a + b  # 4칸 들여쓰기\n```'
_PAIRS = (
    ("물리", "무지개는 왜 생기나요?", "햇빛이 물방울 안에서 꺾이고 되비치면서 색마다 다른 방향으로 나뉘어 보인다."),
    (
        "물리",
        "소리는 진공에서 왜 안 들리나요?",
        "소리는 물질의 떨림이 퍼지는 현상이므로 떨릴 물질이 없으면 전해지지 않는다.",
    ),
    ("화학", "소금물에는 왜 전류가 흐르나요?", "소금이 녹아 생긴 이온들이 자유롭게 움직이며 전하를 나르기 때문이다."),
    ("화학", "촛불을 컵으로 덮으면 왜 꺼지나요?", "컵 안의 산소가 줄어들어 연소가 이어지지 못하기 때문이다."),
    ("역사", "훈민정음은 언제 반포되었나요?", "세종 28년인 1446년에 반포되었다."),
    ("역사", "앙부일구로 어떻게 시각을 알 수 있었나요?", "오목한 면에 드리운 바늘 그림자를 눈금에서 읽었다."),
    ("지구과학", "산호 화석이 나온 지층은 어떤 곳이었을까요?", "산호는 따뜻하고 얕은 바다에 살므로 그런 바다였다."),
    ("지구과학", "사막의 낮과 밤은 왜 기온 차가 큰가요?", "구름이 적어 낮에 빨리 데워지고 밤에 빨리 식는다."),
)
ROWS = 24


def write_run(folder: Path, *, answers: bool = True, slices: bool = True) -> Path:
    """Write the files of a run to a project's folder; without answers or slices, their numbers are null."""
    params = (ROOT / "params.yaml").read_text(encoding="utf-8")
    if slices:
        params = params.replace("slice_by: null", "slice_by: subject").replace("carry: []", "carry: [subject]")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(params, encoding="utf-8")
    (folder / "versions.yaml").write_text("mlx: 0.32.4\njinja2: 3.1.6\n", encoding="utf-8")
    _write_base(folder / "artifacts")
    _write_data(folder / "data")
    _write_evaluation(folder, answers=answers)
    _write_rest(folder / "artifacts")
    return folder


def _write_base(artifacts: Path) -> None:
    digest = hashlib.sha256(b"base").hexdigest()
    base = {
        "source": "smollm2-135m-instruct", "requested": None, "revision": "1.0", "architecture": "llama",
        "dtype": "float16", "quantization": {"group_size": 32, "bits": 4}, "embedding_rows": 49152,
        "files": {"config.json": {"sha256": digest, "size": 626}},
    }  # fmt: skip
    _write_json(artifacts / "base.json", base)


def _write_data(data: Path) -> None:
    for name in (
        "prepared/train.jsonl",
        "prepared/valid.jsonl",
        "prepared/test.jsonl",
        "prompts.jsonl",
        "general.jsonl",
    ):
        _write(data / name, "{}\n")
    for split in ("train", "valid", "test"):
        _write(data / "tokens" / f"{split}.parquet", split)
    source = {"sha256": "24db" * 16, "schema": "question+answer", "not_read": ["level", "<i>태그</i>"]}
    _write_json(
        data / "prepared" / "sources.json", {"rows": {"train": 301}, "sources": {"data/raw/korean.jsonl": source}}
    )


def _write_evaluation(folder: Path, *, answers: bool) -> None:
    artifacts = folder / "artifacts"
    tables = {"rows": _rows(), "answers": _answers() if answers else _answers().slice(0, 0), "general": _general()}
    identity = read_manifest(artifacts / "base.json").identity
    (artifacts / "evaluate").mkdir(parents=True)
    for name, table in tables.items():
        write_table(artifacts / "evaluate" / f"{name}.parquet", table, base=identity)
    numbers = summary.summarize(tables, load_params(folder / "params.yaml").evaluate, max_tokens=64)
    _write_json(artifacts / "details" / "evaluate.json", numbers)


def _rows() -> Any:
    rng = np.random.default_rng(0)
    tokens = rng.integers(60, 240, ROWS)
    base = tokens * rng.normal(1.9, 0.15, ROWS)
    adapter = base - tokens * rng.normal(0.15, 0.12, ROWS)  # some rows get worse
    subjects = [HOSTILE[0] if i >= ROWS - 2 else _PAIRS[i % len(_PAIRS)][0] for i in range(ROWS)]
    return pa.table(
        {
            "id": [f"row{i}" for i in range(ROWS)],
            "source": [f"data/raw/korean.jsonl:{10 + i}" for i in range(ROWS)],
            "group": pa.nulls(ROWS, pa.string()),
            "carried": pa.array([[("subject", name)] for name in subjects], pa.map_(pa.string(), pa.string())),
            "tokens": tokens,
            "bytes": tokens + 40,
            "base_loss": base,
            "base_correct": (tokens * 0.45).astype(int),
            "adapter_loss": adapter,
            "adapter_correct": (tokens * 0.49).astype(int),
            "merged_loss": adapter + 1e-4,
            "merged_correct": (tokens * 0.49).astype(int),
        }
    )


def _answers() -> Any:
    told = []
    for i in range(ROWS):
        _, question, reference = _PAIRS[i % len(_PAIRS)]
        base, tuned = f"{question} {question}", reference[: 12 + 3 * i]
        if i == 2:
            base, tuned = "", (reference + " ") * 12
        if i == 3:
            question, reference, base, tuned = "두 수를 더하는 함수를 파이썬으로 써 주세요.", _CODE, "pass", _CODE
        if i >= ROWS - len(HOSTILE):
            base = tuned = HOSTILE[i - ROWS + len(HOSTILE)]
        told.append((f"### 질문:\n{question}\n\n### 답변:\n", reference, base, tuned))
    prompts, references, bases, tuneds = zip(*told, strict=True)
    table = pa.table(
        {
            "id": [f"row{i}" for i in range(ROWS)],
            "source": [f"data/raw/korean.jsonl:{10 + i}" for i in range(ROWS)],
            "prompt": prompts,
            "reference": references,
            "base": bases,
            "base_tokens": [64] * ROWS,
            "base_stopped": [False] * ROWS,
            "tuned": tuneds,
            "tuned_tokens": [20 + i for i in range(ROWS)],
            "tuned_stopped": [True] * ROWS,
        }
    )
    return scoring.with_answer_scores(table)


def _general() -> Any:
    rng = np.random.default_rng(1)
    tokens = rng.integers(40, 90, 60)
    base = tokens * rng.normal(2.8, 0.3, 60)
    return pa.table(
        {
            "source": [f"data/general.jsonl:{i + 1}" for i in range(60)],
            "language": ["en", "ko"] * 30,
            "tokens": tokens,
            "base_loss": base,
            "adapter_loss": base + tokens * rng.normal(0.01, 0.1, 60),
        }
    )


def _write_rest(artifacts: Path) -> None:
    splits = {"train": 301, "valid": 29, "test": ROWS}
    _write_json(
        artifacts / "details" / "prepare.json", _ledger(splits, dropped_duplicate=3, dropped_bad=0, normalized=2)
    )
    _write_json(
        artifacts / "details" / "tokenize.json", _ledger(splits, dropped_too_long=0, truncated=5, length_p50=266)
    )
    train = {"steps": 40, "loss": 1.66, "valid_loss_before": 1.7, "valid_loss": 1.52, "kept_step": 20}
    _write_json(artifacts / "details" / "train.json", train)
    merge = {
        "rows": 4,
        "tokens": 650,
        "survival": 0.9999,
        "effect": 0.163,
        "mean_divergence": 3e-06,
        "max_divergence": 2e-05,
        "same_choice": 1.0,
        "base_loss": 1.573,
        "adapter_loss": 1.409,
        "merged_loss": 1.409,
    }
    _write_json(artifacts / "details" / "merge.json", merge)
    for stage in ("prepare", "tokenize", "train", "evaluate"):
        _write_json(artifacts / "metrics" / f"{stage}.json", {"rows": 1})
    steps = range(5, 45, 5)
    loss = [f"{step},{1.9 - 0.01 * step + 0.02 * (step % 3):.5f},0.003,0.2\n" for step in steps]
    _write(artifacts / "plots" / "loss.csv", "".join(["step,loss,learning_rate,grad_norm\n", *loss]))
    _write(artifacts / "plots" / "valid_loss.csv", "step,valid_loss\n0,1.70354\n20,1.50994\n40,1.52075\n")
    lengths = [
        f"{9 * (i + 1)},{split},{max(0, count // 12 - abs(i - 28) * count // 90)}\n"
        for split, count in splits.items()
        for i in range(40)
    ]
    _write(artifacts / "plots" / "lengths.csv", "".join(["length,split,rows\n", *lengths]))
    samples = [
        {"prompt": "비가 갠 뒤에 무지개가 보이는 까닭은?", "base": "비가 갠", "merged": "햇빛이 꺾이기 때문이다."}
    ]
    samples += [{"prompt": text, "base": text, "merged": text} for text in HOSTILE]
    _write(artifacts / "samples" / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    for name in ("adapter/adapters.safetensors", "merged/model.safetensors", "baseline/rows.parquet"):
        _write(artifacts / name, name)


def _ledger(splits: dict[str, int], **counts: int) -> dict[str, dict[str, int]]:
    """Rows of each split; what is counted beside them is in train alone."""
    dropped = sum(count for name, count in counts.items() if name.startswith("dropped"))
    none = dict.fromkeys(counts, 0)
    ledger = {split: {"rows_in": rows, "rows_used": rows, **none} for split, rows in splits.items()}
    ledger["train"] |= {"rows_in": splits["train"] + dropped, **counts}
    total = sum(splits.values())
    return ledger | {"all": {"rows_in": total + dropped, "rows_used": total, **counts}}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    _write(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
