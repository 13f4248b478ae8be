"""How much of an adapter is left: divergences, losses and survival by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from stages.lora import adapter
from stages.merging.agreement import NEGLIGIBLE, Agreement, compare, log_probabilities
from stages.model.load import load_base
from stages.tokens.row import TokenRow
from tests.support.adapters import config, fill
from tests.support.rows import one_by_one, token_row

P, Q, R = ([np.log(np.array([row], np.float32))] for row in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.4, 0.3, 0.3]))


def compared(*, base: list[np.ndarray], adapter: list[np.ndarray], merged: list[np.ndarray]) -> Agreement:
    batch = replace(one_by_one([token_row(0, 3, trained=1)])[0], targets_N=mx.array([0]))
    return compare([batch], base=base, adapter=adapter, merged=merged)


def test_divergences_losses_and_survival_of_known_distributions() -> None:
    found = compared(base=Q, adapter=P, merged=R)
    effect = 0.5 * np.log(2) - 0.25 * np.log(2)
    lost = 0.5 * np.log(0.5 / 0.4) + 0.5 * np.log(0.25 / 0.3)
    assert found.effect == pytest.approx(effect, rel=1e-5)
    assert found.mean_divergence == found.max_divergence == pytest.approx(lost, rel=1e-5)
    assert found.survival == pytest.approx(1 - lost / effect, rel=1e-5)
    assert (found.adapter_loss, found.merged_loss) == pytest.approx((-np.log(0.5), -np.log(0.4)))
    assert found.base_loss == pytest.approx(-np.log(0.25))
    assert found.same_choice == 1.0
    assert compared(base=P, adapter=P, merged=Q).same_choice == 0.0


def test_the_base_itself_is_no_survival_and_what_is_worse_is_less() -> None:
    lost = compared(base=Q, adapter=P, merged=Q)
    assert lost.survival == pytest.approx(0, abs=1e-6)
    assert not lost.is_kept(0.01)
    assert compared(base=R, adapter=P, merged=Q).survival < 0


def test_an_adapter_that_does_nothing_survives_where_the_merged_model_does_nothing_either() -> None:
    assert compared(base=P, adapter=P, merged=P).survival == 1.0
    assert compared(base=P, adapter=P, merged=Q).survival == 0.0


def test_a_loss_too_small_to_matter_is_no_failure() -> None:
    found = compared(base=Q, adapter=P, merged=R)
    tiny = replace(found, effect=NEGLIGIBLE / 2, mean_divergence=NEGLIGIBLE / 4)
    assert tiny.survival == 0.5
    assert tiny.is_kept(0.99)
    assert not replace(tiny, effect=NEGLIGIBLE, mean_divergence=2 * NEGLIGIBLE).is_kept(0.99)


def test_log_probabilities_are_mlx_own(tiny_llama: Path, rows: list[TokenRow]) -> None:
    model = load_base(tiny_llama)[0]
    adapter.attach(model, config(), seed=0)
    fill(model)
    for batch, found in zip(one_by_one(rows), log_probabilities(model, one_by_one(rows)), strict=True):
        logits = model(batch.inputs_BxL).reshape(-1, found.shape[1])[batch.trained_N]
        wanted = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        np.testing.assert_allclose(found, np.array(wanted), atol=1e-4)
