"""The diagonal beside a form takes up what the cut of the form left over, where positions turn."""

from dataclasses import replace

import pytest
import torch
from test_compression import DIM, TIGHT, TOKENS, layer_of, states

from cem.compression import Inputs, compress
from cem.compression.forms import read
from cem.compression.levels import operator_norms
from cem.compression.truncation import cut

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("uses", ["tied", "scores"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_diagonal_takes_up_lost_scores_that_turn(uses, causal):
    """Least squares over every pair of tokens, stacked; centred for each query where values are not tied."""
    forms, x = read(layer_of("rotary_diagonal_plus_low_rank")), states()
    forms, seen = replace(forms, uses=uses), Inputs(x, causal=causal)
    found = cut(forms, (2, 0, 4), seen)
    assert found.kept is not None and found.ranks == (2, 0, 4)
    bare = replace(found, diagonal=forms.diagonal).padded(forms)
    lost = (forms.scores(seen) - bare.scores(seen))[:, :, 0] / forms.scale
    for a in range(3):
        own = torch.arange(4 * a, 4 * a + 4)
        rows, values = [], []
        for text, scores in zip(x, lost[:, a], strict=True):
            for t in range(TOKENS):
                context = text[: t + 1] if causal else text
                row = text[t, own] * context[:, own]
                value = scores[t, : len(context)]
                if uses == "scores":
                    row, value = row - row.mean(0), value - value.mean()
                rows.append(row / len(context) ** 0.5)
                values.append(value / len(context) ** 0.5)
        rows, values = torch.cat(rows), torch.cat(values)
        moved = found.diagonal[a] - forms.diagonal[a]
        best = torch.linalg.lstsq(rows, values[:, None], driver="gelsd").solution[:, 0]
        torch.testing.assert_close(moved[own], best, rtol=0, atol=1e-9)
        assert not moved[[n for n in range(DIM) if n not in own]].any()
        if a == 2:
            assert moved.abs().max() < 1e-9, "nothing was lost"
        else:
            assert (values - rows @ best).square().sum() < 0.99 * values.square().sum()


def test_a_turning_diagonal_stays_without_data_and_its_move_is_in_the_bound():
    layer = layer_of("rotary_diagonal_plus_low_rank")
    forms, seen = read(layer), Inputs(states())
    assert torch.equal(cut(forms, (2, 2, 2)).diagonal, forms.diagonal)
    found = cut(forms, (2, 2, 2), seen)
    still = replace(found, diagonal=forms.diagonal)
    more = operator_norms(forms, found.padded(forms)) - operator_norms(forms, still.padded(forms))
    largest = forms.scale * (found.diagonal - forms.diagonal).abs().amax(1)
    torch.testing.assert_close(more[:, 0], largest, **TIGHT)
    _, done = compress(layer, 2, seen)
    assert done.calibrated.violations == done.bounds(3 * states(8)).violations == (0, 0, 0)
