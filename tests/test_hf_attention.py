"""What transformers expects of the attention of any model: kernels, documents, masks.

tests/README.md says which check of the common suites of transformers each of these stands for.
"""

import pytest
import torch

pytest.importorskip("transformers")

from language_models import BLOCKS, UNCACHED, blocks, model, tokens

from cem.hf import CEMConfig, CEMForCausalLM


@pytest.mark.parametrize("padded", ["left", "right", None])
@blocks
def test_eager_and_sdpa_are_the_same(block, padded):
    # Llama's eager softmax is float32 in some versions of transformers.
    dtype, atol = (torch.float32, 1e-5) if block is BLOCKS["llama"] else (torch.float64, 1e-10)
    its, mask = model(block, dtype=dtype), torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[0, :3] = 0
        mask = mask.flip(1) if padded == "right" else mask
    inputs = {"input_ids": tokens(), "attention_mask": mask if padded else None}
    assert its.config._attn_implementation == "sdpa"
    first = its(**inputs).logits[mask.bool()]
    its.set_attn_implementation("eager")
    assert its.config._attn_implementation == "eager"
    assert torch.allclose(its(**inputs).logits[mask.bool()], first, rtol=0, atol=atol)


def test_attention_is_chosen_in_every_way(tmp_path):
    model("llama").save_pretrained(tmp_path)
    for name in ("eager", "sdpa"):
        its = CEMForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert its.config._attn_implementation == name
        assert its.model.layers[0].parts["attention"].module.config._attn_implementation == name
        assert CEMConfig(attn_implementation=name)._attn_implementation == name
    its.set_attn_implementation("eager")
    assert its.model.layers[0].parts["attention"].module.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2", "foo"])
def test_other_kernels_are_refused(name):
    its = model()
    with pytest.raises((ValueError, ImportError), match="support|not supported|Flash"):
        its.set_attn_implementation(name)
    assert its.config._attn_implementation == "sdpa"
    assert its(tokens()).logits.isfinite().all()


@blocks
def test_documents_in_one_row_are_apart(block):
    """Whether a cache is made, as a plain call does, or not."""
    its, ids = model(block), tokens(1, 11)
    places = torch.cat([torch.arange(4), torch.arange(7)])[None]
    alone = torch.cat([its(ids[:, :4]).logits, its(ids[:, 4:]).logits], 1)
    for use_cache in (None, True, False):
        packed = its(ids, position_ids=places, use_cache=use_cache).logits
        assert torch.allclose(packed, alone, rtol=0, atol=1e-5 if block is UNCACHED else 1e-12)


@blocks
def test_a_mask_of_pairs(block):
    """Three endings of one beginning, side by side."""
    its = model(block)
    ids = torch.tensor([[10, 11, 12, 13], [10, 11, 12, 14], [10, 11, 12, 15]])
    alone = its(ids).logits[:, -1]
    seen = torch.ones(6, 6).tril()
    seen[4, 3] = seen[5, 3] = seen[5, 4] = 0
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    mask = mask.masked_fill(seen == 0, torch.finfo(torch.float64).min)
    together = its(
        torch.tensor([[10, 11, 12, 13, 14, 15]]),
        attention_mask=mask,
        position_ids=torch.tensor([[0, 1, 2, 3, 3, 3]]),
    )
    expected = 1e-5 if block is UNCACHED else 1e-10
    assert torch.allclose(together.logits[0, -3:], alone, rtol=0, atol=expected)
