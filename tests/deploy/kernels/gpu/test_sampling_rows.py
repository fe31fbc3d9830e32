import pytest
import torch

from deploy.kernels.gpu.sampling_rows import SamplingRows
from deploy.runtime.sampling import SamplingParams


def rows(*params):
    return SamplingRows.of(params, [0] * len(params), range(len(params)), torch.device("cpu"))


def test_a_greedy_row_truncates_nothing():
    assert not rows(SamplingParams(top_k=3, top_p=0.5, min_p=0.1)).has_truncation


@pytest.mark.parametrize("values", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_one_row_that_truncates_is_seen(values):
    assert rows(SamplingParams(), SamplingParams(temperature=1.0, **values)).has_truncation


def test_one_row_with_a_penalty_is_seen():
    assert not rows(SamplingParams()).has_penalty
    assert rows(SamplingParams(), SamplingParams(repetition_penalty=1.1)).has_penalty


def test_logits_are_divided_by_the_temperature_or_not_at_all():
    assert rows(SamplingParams(), SamplingParams(temperature=0.5)).divisors.tolist() == [1.0, 0.5]


def test_a_row_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="2 rows of sampling parameters"):
        SamplingRows.of([SamplingParams()] * 2, [0], [1, 2], torch.device("cpu"))
