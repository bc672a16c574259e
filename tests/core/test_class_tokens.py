"""Class ids as the tokens of a prompt, under what conditioning nodes do to prompts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qandc_core.diffusion.classes import NO_CLASS, class_tokens, is_classes, read_classes

IDS = st.lists(st.integers(0, 999), min_size=1, max_size=20)


@given(IDS)
def test_ids_come_back(ids):
    tokens = class_tokens(ids)
    assert is_classes(tokens) and tokens.dtype == torch.float32 and tokens.shape == (1, len(ids), 3)
    assert read_classes(tokens, 1000).tolist() == ids


@given(IDS, IDS)
def test_appended_tokens_are_a_longer_list(first, second):
    joined = torch.cat([class_tokens(first), class_tokens([NO_CLASS]), class_tokens(second)], dim=1)
    assert read_classes(joined, 1000).tolist() == [*first, 1000, *second]


@given(IDS)
def test_zeros_are_no_class(ids):
    assert read_classes(torch.zeros_like(class_tokens(ids)), 1000).tolist() == [1000] * len(ids)
    assert read_classes(class_tokens([NO_CLASS]), 10).tolist() == [10]


def test_a_batch_of_conditionings_gives_each_image_its_own():
    both = torch.cat([class_tokens([3]), class_tokens([7])])
    assert read_classes(both, 10).tolist() == [3, 7]
    lists = torch.cat([class_tokens([1, 2, 3]), class_tokens([4, 5, 6])])
    assert read_classes(lists, 10).tolist() == [1, 5, 3, 4, 2, 6]
    assert read_classes(lists.roll((-1, -1), dims=(0, 1)), 10).tolist() == [5, 3, 4, 2, 6, 1]


@given(st.integers(0, 999), st.integers(0, 100))
def test_a_class_averaged_with_itself_stays(label, percent):
    weight = percent / 100
    mixed = torch.mul(class_tokens([label]), weight) + torch.mul(class_tokens([label]), 1 - weight)
    assert read_classes(mixed, 1000).tolist() == [label]


@given(st.integers(0, 999), st.integers(0, 999), st.integers(1, 99))
def test_a_mean_of_two_classes_is_refused_whatever_its_ids(first, second, percent):
    weight = percent / 100
    mixed = class_tokens([first]) * weight + class_tokens([second]) * (1 - weight)
    # 99 % of a class next to another is the class
    if first != second and abs(first - second) * min(weight, 1 - weight) > 0.011:
        with pytest.raises(ValueError, match="whole classes"):
            read_classes(mixed, 1000)


@pytest.mark.parametrize(
    "tokens, message",
    [
        (class_tokens([3]) * 0.5, "mixes or scales some"),
        (class_tokens([3]) * 2, "mixes or scales some"),
        (class_tokens([3]) + class_tokens([NO_CLASS]) * 0.5 + 0.1, "mixes or scales some"),
        (torch.full((1, 2, 3), float("nan")), "mixes or scales some"),
        (torch.randn(1, 77, 768), "generates classes, not text"),
        (torch.zeros(1, 77, 768), "generates classes, not text"),
        (torch.randn(1, 768), "generates classes, not text"),
        (class_tokens([10, 12]), "class id 12 is out of range"),
    ],
)
def test_others_are_refused_in_a_sentence(tokens, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_classes(tokens, 10)
    assert str(caught.value).endswith(".")
