"""Dropout by a keep mask and the stream it is drawn from."""

import math

import numpy as np
import pytest

from refattn.attention import attention, attention_weights
from refattn.checks import OptionError
from refattn.dropout import drop_weights, keep_mask, philox

# Random123's known answers for philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        0xFFFFFFFFFFFFFFFF,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.clause("OWN-DROPOUT2")
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_authors_known_answers(counter, key, words):
    assert tuple(philox(np.asarray([counter], dtype=np.uint32), key)[0].tolist()) == words


@pytest.mark.clause("OWN-DROPOUT2")
def test_an_offset_continues_the_stream():
    whole = keep_mask((24,), seed=5, keep_probability=0.5)
    assert np.array_equal(keep_mask((12,), seed=5, offset=3, keep_probability=0.5), whole[12:])


@pytest.mark.clause("OWN-DROPOUT2")
def test_the_first_word_decides_by_the_floor_of_the_threshold():
    word = KNOWN_ANSWERS[0][2][0]
    assert not keep_mask((1,), seed=0, keep_probability=word / 2**32)[0]
    assert keep_mask((1,), seed=0, keep_probability=(word + 1) / 2**32)[0]
    assert keep_mask((7, 5), seed=3, keep_probability=1.0).all()
    assert not keep_mask((7, 5), seed=3, keep_probability=0.0).any()


@pytest.mark.clause("OWN-DROPOUT2")
def test_the_share_of_kept_elements_is_the_probability():
    kept = int(keep_mask((100_003,), seed=7, keep_probability=0.9).sum())
    sigma = math.sqrt(100_003 * 0.9 * 0.1)
    assert abs(kept - 0.9 * 100_003) < 4 * sigma


@pytest.mark.clause("OWN-DROPOUT2")
@pytest.mark.parametrize(
    "bad",
    [
        {"seed": -1, "keep_probability": 0.5},
        {"seed": 2**64, "keep_probability": 0.5},
        {"seed": 0, "offset": -1, "keep_probability": 0.5},
        {"seed": 0, "keep_probability": 1.5},
        {"seed": 0, "keep_probability": math.nan},
    ],
)
def test_numbers_outside_their_range_are_refused(bad):
    with pytest.raises(OptionError, match="but"):
        keep_mask((3,), **bad)
    with pytest.raises(OptionError, match="negative"):
        keep_mask((-3,), seed=0, keep_probability=0.5)


@pytest.mark.clause("OWN-DROPOUT1")
def test_kept_weights_are_scaled_and_rows_not_renormalised():
    keep = np.asarray([[True, False]])
    assert drop_weights(np.asarray([[0.25, 0.75]]), keep, 0.5).tolist() == [[0.5, 0.0]]


@pytest.mark.clause("OWN-DROPOUT1", "FA1-ALG2")
def test_dropout_acts_on_the_output_but_not_on_the_logsumexp():
    rng = np.random.default_rng(2)
    query, key, value = (rng.normal(size=(1, 3, n, 5)) for n in (7, 11, 11))
    keep = keep_mask((1, 3, 7, 11), seed=9, keep_probability=0.7)
    plain = attention(query, key, value)
    dropped = attention(query, key, value, keep=keep, keep_probability=0.7)
    weights = attention_weights(query, key, value, keep=keep, keep_probability=0.7)
    assert np.array_equal(dropped.logsumexp, plain.logsumexp)
    assert np.array_equal(weights, attention_weights(query, key, value))
    by_hand = np.einsum("bhij,bhjd->bhid", weights * keep / 0.7, value)
    assert np.allclose(dropped.output, by_hand, rtol=1e-14, atol=1e-15)


@pytest.mark.clause("OWN-DROPOUT1")
def test_a_probability_without_a_mask_is_refused():
    x = np.ones((2, 3))
    with pytest.raises(OptionError, match="1 without keep"):
        attention(x, x, x, keep_probability=0.5)
