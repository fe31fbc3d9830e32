import numpy as np
import pytest
import torch

from deploy.kernels.gpu.sampling import candidates, candidates_reference, sample
from deploy.kernels.gpu.sampling_rows import SamplingRows
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.sampling import sample as numpy_sample

VOCAB = 2500  # three blocks, the last one short
SCORE_TOLERANCE = 1e-5

MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=0.7, top_k=5, seed=2**64 - 1),
    SamplingParams(temperature=1.3, top_p=0.9, seed=8),
    SamplingParams(temperature=1.0, min_p=0.05, seed=9),
    SamplingParams(temperature=0.9, top_k=40, top_p=0.8, min_p=0.02, repetition_penalty=1.3, seed=10),
    SamplingParams(repetition_penalty=1.5),
    SamplingParams(top_k=3, top_p=0.4),
]


class Call:
    """Random logits for some rows, paths of different lengths, and how each row is sampled."""

    def __init__(self, params, device, seed=0, vocab=VOCAB):
        rng = np.random.default_rng(seed)
        self.params, rows = params, len(params)
        self.values = (4 * rng.standard_normal((rows, vocab))).astype(np.float32)
        self.positions = rng.integers(0, 9000, rows).tolist()
        self.indices = rng.integers(0, 2**63, rows).tolist()
        self.paths = [rng.integers(0, vocab, rng.integers(0, 30)).tolist() for _ in range(rows)]
        # Tokens that a penalty must not look at lie behind each path.
        table = rng.integers(0, vocab, (rows, 30))
        for row, path in enumerate(self.paths):
            table[row, : len(path)] = path
            self.values[row, path] += 5  # so that the penalty decides
        self.logits = torch.from_numpy(self.values).to(device)
        self.rows = SamplingRows.of(params, self.indices, self.positions, device)
        self.path = (
            torch.from_numpy(table).to(device, torch.int32),
            torch.tensor([len(path) for path in self.paths], dtype=torch.int32, device=device),
        )

    def expected(self):
        return [
            numpy_sample(self.values[row], how, position=self.positions[row], path=path, sample_index=index)
            for row, (how, path, index) in enumerate(zip(self.params, self.paths, self.indices, strict=True))
        ]


@pytest.mark.parametrize("seed", range(2))
def test_rows_of_all_kinds_in_one_call_get_the_tokens_of_the_definition(device, seed):
    call = Call(MIXED, device, seed)
    assert sample(call.logits, call.rows, *call.path).tolist() == call.expected()


@pytest.mark.parametrize("how", MIXED)
def test_a_row_alone_gets_the_same_token(device, how):
    call = Call([how], device, seed=5)
    assert sample(call.logits, call.rows, *call.path).tolist() == call.expected()


def test_many_draws_of_one_row_are_those_of_the_definition(device):
    call = Call([SamplingParams(temperature=1.0, seed=seed) for seed in range(40)], device, vocab=300)
    assert sample(call.logits, call.rows).tolist() == call.expected()


@pytest.mark.parametrize("num_rows", [1, 3, 7])
def test_greedy_ties_go_to_the_lower_id(device, num_rows):
    logits = torch.zeros(num_rows, VOCAB, device=device)
    logits[:, [2499, 1030, 1029, 2047]] = 3.0
    rows = SamplingRows.of([SamplingParams()] * num_rows, [0] * num_rows, range(num_rows), device)
    assert sample(logits, rows).tolist() == [1029] * num_rows


def test_ties_at_the_edge_of_top_k_go_to_the_lower_id(device):
    logits = torch.tensor([[1.0, 1.0, 2.0, 1.0]], device=device)
    rows = SamplingRows.of([SamplingParams(temperature=1.0, top_k=2)], [0], [0], device)
    tokens, _ = candidates(logits, rows, 4)
    assert sorted(tokens[0].tolist()) == [-1, -1, 0, 2]


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.999])
def test_top_p_over_several_blocks_leaves_the_tokens_of_the_definition(device, top_p):
    call = Call([SamplingParams(temperature=3.0, top_p=top_p, seed=4)] * 3, device)
    assert sample(call.logits, call.rows).tolist() == call.expected()


@pytest.mark.parametrize("count", [1, 16])
def test_candidates_are_those_of_the_definition_and_scores_near(device, count):
    call = Call(MIXED, device, seed=count)
    tokens, scores = candidates(call.logits, call.rows, count, *call.path)
    expected_tokens, expected_scores = candidates_reference(call.logits, call.rows, count, *call.path)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=SCORE_TOLERANCE)
    assert (scores <= 0).all()
    assert torch.equal(tokens[:, 0], sample(call.logits, call.rows, *call.path))


def test_a_trimmed_vocabulary_has_the_noise_of_the_ids_and_a_path_that_it_may_not_know(device):
    call = Call(MIXED, device, seed=6)
    ids = torch.from_numpy(np.sort(np.random.default_rng(6).choice(9000, VOCAB, replace=False))).to(device)
    path_tokens, path_length = call.path
    known = ids[path_tokens.long()].to(torch.int32)
    known[:, ::3] += 1  # most are not in the vocabulary
    tokens, scores = candidates(call.logits, call.rows, 3, known, path_length, ids)
    expected_tokens, expected_scores = candidates_reference(call.logits, call.rows, 3, known, path_length, ids)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=SCORE_TOLERANCE)


def test_tokens_and_scores_are_the_same_whatever_is_beside_a_row(device):
    call = Call(MIXED, device, seed=7)
    together = candidates(call.logits, call.rows, 4, *call.path)
    for row in range(len(MIXED)):
        one = slice(row, row + 1)
        rows = SamplingRows.of(MIXED[one], call.indices[one], call.positions[one], device)
        alone = candidates(call.logits[one], rows, 4, *(x[one] for x in call.path))
        assert torch.equal(alone[0][0], together[0][row])
        assert torch.equal(alone[1][0], together[1][row])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_give_no_token_to_their_row_alone(device, value):
    call = Call([SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9)], device)
    expected = call.expected()
    for row in range(2):
        logits = call.logits.clone()
        logits[row, 1777] = value
        tokens = sample(logits, call.rows).tolist()
        assert tokens[row] == -1
        assert tokens[1 - row] == expected[1 - row]


def test_a_penalty_without_paths_is_refused(device):
    call = Call([SamplingParams(repetition_penalty=1.2)], device)
    with pytest.raises(ValueError, match="path_tokens"):
        sample(call.logits, call.rows)
