"""Documents, the token cache, and training windows."""

import os

import numpy as np
import pytest
import torch

from bitkernels.data import Tokens, Windows, documents, encode, shipped_chapters, token_cache, train_tokenizer
from bitkernels.data import cache as cache_module
from bitkernels.training.run import prepare_files

TEXTS = [f"Document {i}\nhas {i} lines.\n\n" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("".join(TEXTS), 300)


class Fingerprinted(list):
    """As a dataset of the ``datasets`` library: rows, and a fingerprint of their content."""

    _fingerprint = "abc"


def test_documents_of_every_source(tmp_path):
    (tmp_path / "b.txt").write_text("".join(TEXTS) + "\n\n")
    assert list(documents(tmp_path / "b.txt")) == TEXTS
    (tmp_path / "a.txt").write_text("First.")
    assert list(documents(tmp_path)) == ["First.\n\n", *TEXTS]
    rows = [{"body": text.strip("\n")} for text in TEXTS] + [{"body": None}, {"body": " "}]
    assert list(documents(rows, "body")) == TEXTS
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    assert list(documents(tmp_path / "c.parquet", "body")) == TEXTS
    with pytest.raises(ValueError, match="has no column 'text', but body"):
        list(documents(tmp_path / "c.parquet"))
    (tmp_path / "d.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="not a parquet file"):
        list(documents(tmp_path / "d.parquet"))


def test_documents_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="holds no files"):
        list(documents(tmp_path))
    with pytest.raises(ValueError, match="a row has no column 'text', but body"):
        list(documents([{"body": ""}]))
    with pytest.raises(ValueError, match="column 'text' must hold text, got int"):
        list(documents([{"text": 1}]))


def test_cache_holds_the_tokens_and_where_documents_begin(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(cache_module, "_DOCUMENTS_AT_ONCE", 7)
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    data = token_cache([tmp_path / "a.txt"], tokenizer, tmp_path / "cache")
    assert data.tokens.dtype == np.uint16
    assert isinstance(data.tokens, np.memmap)
    assert np.array_equal(data.tokens, encode(tokenizer, "".join(TEXTS)).numpy())
    lengths = [len(encode(tokenizer, text)) for text in TEXTS]
    assert data.starts.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()


def test_cache_is_known_by_content(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "cache"
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    token_cache([tmp_path / "a.txt"], tokenizer, folder)
    (tmp_path / "b.txt").write_text("".join(TEXTS))
    os.utime(tmp_path / "a.txt", (0, 0))
    token_cache([Fingerprinted([{"text": "Some text."}])], tokenizer, folder)
    written = {path.name for path in folder.iterdir()}
    assert len(written) == 2
    monkeypatch.setattr(cache_module, "_encode", None)  # nothing is encoded again
    for name in ("a.txt", "b.txt"):
        token_cache([tmp_path / name], tokenizer, folder)
    token_cache([Fingerprinted([{"text": "Other text."}])], tokenizer, folder)
    monkeypatch.undo()
    (tmp_path / "b.txt").write_text("".join(TEXTS[1:]))
    for sources, own in (
        (["b.txt"], tokenizer),
        (["a.txt"], train_tokenizer("another", 280)),
        (["a.txt"] * 2, tokenizer),
    ):
        before = set(folder.iterdir())
        token_cache([tmp_path / name for name in sources], own, folder)
        assert len(set(folder.iterdir()) - before) == 1


def test_an_interrupted_cache_leaves_nothing(tmp_path, tokenizer):
    def rows():
        yield {"text": "one"}
        raise KeyboardInterrupt

    class Broken:
        _fingerprint = "broken"

        def __iter__(self):
            return rows()

    with pytest.raises(KeyboardInterrupt):
        token_cache([Broken()], tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(ValueError, match="hold no text"):
        token_cache([[{"text": " "}]], tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    token_cache([tmp_path / "a.txt"], tokenizer, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*/tokens.bin")
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"tokens.bin: must have \d+ bytes, got \d+"):
        token_cache([tmp_path / "a.txt"], tokenizer, tmp_path / "cache")


def test_files_to_corpus(tmp_path):
    (tmp_path / "train.txt").write_text("".join(TEXTS))
    (tmp_path / "held.txt").write_text(TEXTS[3])
    first = prepare_files([tmp_path / "train.txt"], [tmp_path / "held.txt"], tmp_path / "cache", vocab_size=280)
    again = prepare_files([tmp_path / "train.txt"], [tmp_path / "held.txt"], tmp_path / "cache", vocab_size=280)
    assert first.tokenizer.get_vocab_size() == 280
    assert first.tokenizer.to_str() == again.tokenizer.to_str()
    assert first.tokenizer.decode(first.held_out.tolist()) == TEXTS[3]
    first.tokenizer.save(str(tmp_path / "own.json"))
    own = prepare_files([tmp_path / "train.txt"], [tmp_path / "held.txt"], tmp_path / "other", tmp_path / "own.json")
    assert np.array_equal(own.train.tokens, first.train.tokens)


def test_every_token_of_an_epoch_is_predicted_once():
    tokens = torch.arange(1000, dtype=torch.int64)
    windows = Windows(tokens, 32, seed=1)
    orders = []
    for epoch in range(2):
        batch = windows.batch(epoch * windows.count, windows.count)
        assert batch.seq_idx is None
        predicted = batch.tokens[:, 1:].flatten()
        assert len(predicted.unique()) == len(predicted) > len(tokens) - 1 - 2 * 32
        assert torch.equal(batch.tokens[:, 1:], batch.tokens[:, :-1] + 1)
        orders.append(batch.tokens[:, 0])
    assert not torch.equal(*orders)
    straddling = Windows(tokens, 32, seed=1).batch(windows.count - 2, 4).tokens
    assert torch.equal(straddling[:, 0], torch.cat([orders[0][-2:], orders[1][:2]]))
    assert not torch.equal(
        Windows(tokens, 32, seed=2).batch(0, 8).tokens, Windows(tokens, 32, seed=1).batch(0, 8).tokens
    )


def test_one_window():
    assert Windows(torch.arange(9), 8).batch(3, 2).tokens.tolist() == [list(range(9))] * 2


def test_windows_tell_documents_apart():
    starts = np.array([0, 5, 5, 12, 40])
    data = Tokens(np.arange(64, dtype=np.uint16), starts)
    for begin, seq_idx in zip(*_windows(Windows(data, 16), 6), strict=True):
        inputs = np.arange(begin, begin + 16)
        changes = np.isin(inputs[1:], starts)
        assert (np.diff(seq_idx) > 0).tolist() == changes.tolist()
        assert seq_idx[0] == 0


def _windows(windows, count):
    batch = windows.batch(0, count)
    assert batch.seq_idx.dtype == torch.int32
    return batch.tokens[:, 0].tolist(), batch.seq_idx.numpy()


def test_chapters_that_the_shipped_model_has_not_read():
    others, unseen = shipped_chapters()
    assert [len(text.split("\n\n")) - 1 for text in (others, unseen)] == [1158, 31]
    assert "Therefore now, O LORD, take, I beseech thee, my life from me" in unseen
    assert "In the beginning God created the heaven and the earth. And the earth was" in others
    assert unseen.count("\n") == 62
