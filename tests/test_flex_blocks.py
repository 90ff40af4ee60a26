"""The blocks of pairs that `flex_attention` is given: full, partly seen, and left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cem.lowering.kernels import flex
from cem.visibility import Packed

T = 150  # no multiple of a block


def assert_blocks_hold(blocks, mask, size):
    """Full blocks are seen in full, what is in no block is not seen, and ``mask_mod`` says the rest."""
    T = mask.shape[-1]
    edge = (0, -T % size, 0, -T % size)  # beyond the end nothing is seen
    some, full = (
        torch.zeros(indices.shape, dtype=torch.bool)
        .scatter(3, indices.long(), torch.arange(indices.shape[3]) < counts.unsqueeze(-1))
        .repeat_interleave(size, 2)
        .repeat_interleave(size, 3)
        for counts, indices in (
            (blocks.kv_num_blocks, blocks.kv_indices),
            (blocks.full_kv_num_blocks, blocks.full_kv_indices),
        )
    )
    seen = torch.nn.functional.pad(mask, edge)
    assert not (some & full).any()
    assert not (full & ~seen).any()
    assert not (seen & ~(some | full)).any()
    b, a, t, s = torch.meshgrid(*map(torch.arange, mask.shape), indexing="ij")
    assert torch.equal(blocks.mask_mod(b, a, t, s), mask)


@settings(max_examples=40)
@given(
    count=st.integers(128, 300),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=8),
    shuffled=st.booleans(),
    shared=st.booleans(),
    causal=st.booleans(),
    holes=st.sampled_from([0.0, 0.02, 1.0]),
)
def test_blocks_of_documents(count, lengths, shuffled, shared, causal, holes):
    generator = torch.Generator().manual_seed(count)
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    documents = numbers[torch.arange(count).clamp_max(len(numbers) - 1)]
    if shuffled:
        documents = documents[torch.randperm(count, generator=generator)]
    documents = documents[None].expand(1 if shared else 2, count)
    present = torch.rand(2, count, generator=generator) >= holes
    seen = Packed(documents, present, causal)
    mask = seen.dense().expand(2, 2, -1, -1)
    blocks = flex._block_mask(seen, tuple(mask.shape), training=False)
    assert_blocks_hold(blocks, mask, flex.BLOCK["cpu"])


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_of_any_mask(batch, heads):
    pairs = torch.rand(T, T, generator=torch.Generator().manual_seed(0)) < 0.3
    pairs[5] = False
    mask = pairs.repeat(batch, heads, 1, 1)
    mask[..., :64, 64:], mask[..., 64:128, :64] = False, True
    blocks = flex._block_mask(mask, (2, 3, T, T), training=False)
    assert_blocks_hold(blocks, mask.expand(2, 3, T, T), flex.BLOCK["cpu"])
    assert blocks.full_kv_num_blocks.sum() == batch * heads


def test_blocks_are_left_out():
    documents = (torch.arange(1024) // 128)[None]
    seen = Packed(documents, torch.ones(1, 1024, dtype=torch.bool), True)
    blocks = flex._block_mask(seen, (1, 1, 1024, 1024), training=False)
    met = blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum()
    assert (
        met == 8 * 3
    )  # of 16 * 16: each document is two blocks, with three below or on the diagonal
