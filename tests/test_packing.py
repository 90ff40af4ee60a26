"""Windows over documents, compared with their definition token by token."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from cem import lm
from cem.lm.packing import write_documents


@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=12),
    context=st.integers(2, 14),
)
def test_windows_are_as_they_are_defined(tmp_path_factory, lengths, context):
    root = tmp_path_factory.mktemp("shard") / "side"
    documents = [np.arange(100 * i, 100 * i + n, dtype=np.uint16) for i, n in enumerate(lengths)]
    write_documents(root, documents)
    windows = lm.Packed(root, context=context, fill=7777)
    stream = [(token, place) for d in documents for place, token in enumerate(d.tolist())]
    predicted = []
    for k, item in enumerate(windows):
        assert {v.dtype for v in item.values()} == {torch.int64}
        assert {v.shape for v in item.values()} == {(context,)}
        ids, labels, positions = (item[n].tolist() for n in ("input_ids", "labels", "position_ids"))
        piece = stream[k * (context - 1) :][:context]
        assert ids == [token for token, _ in piece] + [7777] * (context - len(piece))
        for t, (token, place) in enumerate(piece):
            # As far back as the document and the window reach.
            assert positions[t] == min(place, t)
            assert labels[t] == (-100 if t == 0 or place == 0 else token)
        assert set(labels[len(piece) :]) <= {-100}
        predicted += [label for label in labels if label != -100]
    assert predicted == [token for token, place in stream if place > 0]
    assert len(predicted) == windows.predicted
    assert k + 1 == len(windows)


def packed(tmp_path, context=8):
    write_documents(tmp_path / "side", [np.arange(i, 40, dtype=np.uint16) for i in range(30)])
    return lm.Packed(tmp_path / "side", context=context, fill=0)


def test_windows_are_maps_of_a_file(tmp_path):
    windows = packed(tmp_path)
    assert isinstance(windows.tokens, np.memmap) and isinstance(windows.starts, np.memmap)
    pickled = pickle.dumps(windows)
    assert len(pickled) < 500
    assert pickle.loads(pickled)[5]["labels"].equal(windows[5]["labels"])
    assert windows[-1]["labels"].equal(windows[len(windows) - 1]["labels"])
    with pytest.raises(IndexError, match=f"there are {len(windows)} windows: got index"):
        windows[len(windows)]
    with pytest.raises(ValueError, match="one to predict: got `context=1`; type `context=256`"):
        packed(tmp_path / "other", context=1)
    batch = next(iter(DataLoader(windows, batch_size=4)))
    assert batch["position_ids"].shape == (4, 8)


def test_transformers_keeps_packed_documents_apart(tmp_path):
    transformers = pytest.importorskip("transformers")

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval()
    random = np.random.default_rng(0)
    documents = [random.integers(50, size=n).astype(np.uint16) for n in (7, 3, 9)]
    write_documents(tmp_path / "side", documents)
    [item] = lm.Packed(tmp_path / "side", context=24, fill=0)
    with torch.no_grad():
        together = model(**{k: v[None] for k, v in item.items()}, use_cache=False)
        alone = [model(torch.tensor(d.astype(np.int64))[None]).logits[0] for d in documents]
    torch.testing.assert_close(together.logits[0, :19], torch.cat(alone), rtol=0, atol=1e-12)
    losses = [
        torch.nn.functional.cross_entropy(a[:-1], torch.tensor(d[1:].astype(np.int64)))
        for a, d in zip(alone, documents, strict=True)
    ]
    expected = (6 * losses[0] + 2 * losses[1] + 8 * losses[2]) / 16
    # transformers takes its loss in float32
    assert together.loss.item() == pytest.approx(expected.item(), rel=1e-6)
