"""The least-squares fits between two tables, and how their error is measured."""

from __future__ import annotations

import pytest
import torch

from shadow_peft.backbone import projection
from shadow_peft.backbone.projection import fit_embedding_map, fit_projection, reconstruction


def tables(rows: int = 500, condition: float = 1e3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    large, small = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (24, 10))
    return large * torch.logspace(0, -float(torch.tensor(condition).log10()), 24, dtype=torch.float64), small


@pytest.mark.parametrize("chunk", [7, 500, 4096])
@pytest.mark.parametrize("condition", [1.0, 1e5])
def test_the_fit_is_the_least_squares_solution(chunk: int, condition: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "CHUNK", chunk)
    large, small = tables(condition=condition)
    expected = torch.linalg.lstsq(large, small).solution
    found = fit_projection(large, small)
    assert float((found - expected).norm() / expected.norm()) < 1e-8
    error = reconstruction(large, small, found)
    residual, centred = large @ expected - small, small - small.mean(0)
    assert error.relative_error == pytest.approx(float(residual.norm() / small.norm()), rel=1e-10)
    explained = 1 - float(residual.square().sum() / centred.square().sum())
    assert error.explained_variance == pytest.approx(explained, abs=1e-10)


def test_a_head_that_can_be_reproduced_is(monkeypatch: pytest.MonkeyPatch) -> None:
    large, _ = tables()
    p = torch.randn(24, 10, dtype=torch.float64)
    error = reconstruction(large, large @ p, fit_projection(large, large @ p))
    assert error.relative_error < 1e-9
    assert error.explained_variance == pytest.approx(1.0)


def test_padding_behind_the_tokens_is_left_out() -> None:
    large, small = tables()
    padded = torch.cat([small[:480], 1e6 * torch.ones(40, 10, dtype=torch.float64)])
    assert torch.equal(fit_projection(large, padded, 480), fit_projection(large[:480], small[:480]))
    assert reconstruction(large, padded, fit_projection(large, padded, 480), 480).relative_error < 1
    assert torch.equal(fit_projection(large, small[:400]), fit_projection(large[:400], small[:400]))


def test_more_columns_than_rows_give_the_solution_of_least_norm() -> None:
    large, small = tables(rows=16, condition=1.0)
    torch.testing.assert_close(fit_projection(large, small), torch.linalg.pinv(large) @ small, rtol=1e-6, atol=1e-9)


def test_half_precision_tables_are_fitted_in_float64() -> None:
    large, small = (table.to(torch.bfloat16) for table in tables(condition=1.0))
    torch.testing.assert_close(fit_projection(large, small), fit_projection(large.double(), small.double()), rtol=0, atol=0)
    assert fit_embedding_map(large, small).dtype == torch.bfloat16
