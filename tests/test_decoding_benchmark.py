"""The oracle of the decoding benchmark is right as often as it is told to be."""

from __future__ import annotations

import pytest
import torch

from benchmarks.decoding.contenders import draft_with_oracle
from shadow_peft.generation import mixin
from tests.test_drafting import DRAFT, LONG
from tests.tiny_models import causal_lm, llama, tokens


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("acceptance", [0.0, 1.0])
def test_the_oracle_is_as_good_as_asked(rows: int, acceptance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ShadowCandidateGenerator", "BatchedDrafting"):
        monkeypatch.setattr(mixin, name, getattr(mixin, name))  # put back afterwards
    model, ids = causal_lm(llama()), tokens(rows, 7)
    written = model.generate(ids, **LONG)
    draft_with_oracle(written, acceptance, seed=0)
    output = model.generate(ids, return_dict_in_generate=True, **LONG, **DRAFT)
    assert torch.equal(output.sequences, written)
    assert output.draft_statistics.drafted > 0
    assert output.draft_statistics.acceptance_rate == acceptance
