"""What every backend promises (deploy/runtime/backend.py): in native code, and on a GPU's operations in plain torch.

How near each is to the reference is tested in test_cpu_backend.py and test_gpu_backend.py.
"""

import numpy as np
import pytest

from deploy.kernels.gpu.tiles import DECODE_BUCKETS
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backend import NO_TOKEN, Row
from deploy.runtime.sampling import SamplingParams, sample
from tests.deploy.runtime.rows import (
    VOCABULARY,
    assert_equal_forward,
    chain,
    decode_path,
    fill,
    forward_in_chunks,
    forward_in_parts,
    interleaved_trees,
    keep_random_paths,
    path_to,
    random_tree,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny):
    """A model with QK norm and several groups of queries."""
    return tiny.model(tmp_path_factory.mktemp("model"), tiny.config("qwen3"), tiny.Quantized())


@pytest.fixture(scope="module")
def reference(directory):
    return ReferenceBackend(directory)


@pytest.fixture
def backend(open_model, directory):
    return open_model(directory)


@pytest.fixture(scope="module")
def mixed_directory(tmp_path_factory, tiny):
    """The same with layers that quantize their inputs."""
    return tiny.model(tmp_path_factory.mktemp("mixed"), tiny.config("qwen3"), tiny.MIXED)


@pytest.fixture(params=["directory", "mixed_directory"])
def either_backend(request, open_model):
    """Of either model: where a row's surroundings could reach into what it is quantized with."""
    return open_model(request.getfixturevalue(request.param))


def test_a_trees_paths_are_the_paths_decoded_alone(either_backend):
    backend, rng = either_backend, np.random.default_rng(3)
    for length in (0, 30):
        context = rng.integers(0, VOCABULARY, length)
        rows = random_tree(rng, 20, length)
        fill(backend, context)
        logits = backend.forward(rows).logits
        for leaf in range(0, 20, 3):
            path = path_to(rows, leaf)
            alone = decode_path(backend, context, [rows[i].token for i in path], sequence=1)
            np.testing.assert_array_equal(logits[path], alone)


def test_a_row_is_the_same_beside_any_number_of_others(either_backend):
    """A GPU's bucket with its padding included, and beyond the last bucket."""
    backend, rng = either_backend, np.random.default_rng(4)
    context = list(range(20))
    alone = decode_path(backend, context, [7])[0]
    fill(backend, context)
    for count in (*DECODE_BUCKETS, 3, 33, 65):
        others = [Row(int(rng.integers(VOCABULARY)), 20, 0) for _ in range(count - 1)]
        logits = backend.forward([*others, Row(7, 20)], logit_rows=[count - 1]).logits
        np.testing.assert_array_equal(logits[0], alone)


def test_prefill_in_any_chunks_is_the_same(either_backend):
    tokens = np.random.default_rng(5).integers(0, VOCABULARY, 100)
    expected = decode_path(either_backend, [], tokens)
    for sizes in ((100,), (1, 99), (64, 36), (33, 32, 35), (9, 8, 50, 33), (7,) * 14 + (2,)):
        np.testing.assert_array_equal(forward_in_chunks(either_backend, tokens, sizes), expected)


def test_many_sequences_and_trees_share_a_call(backend):
    """More sequences than a GPU's table has at first, and interleaved rows."""
    rng = np.random.default_rng(5)
    lengths = {0: 0, 5: 17, -3: 40, 1 << 40: 33} | {100 + i: i for i in range(9)}
    contexts = {sequence: rng.integers(0, VOCABULARY, length) for sequence, length in lengths.items()}
    for sequence, tokens in contexts.items():
        fill(backend, tokens, sequence)
    rows = interleaved_trees(rng, lengths, 4)
    logits = backend.forward(rows).logits
    for row in range(0, len(rows), 3):
        path = [rows[i].token for i in path_to(rows, row)]
        alone = decode_path(backend, contexts[rows[row].sequence], path, sequence=7777)
        np.testing.assert_array_equal(logits[row], alone[-1])


@pytest.mark.parametrize("is_mixed", [False, True])
def test_more_rows_than_one_pass_takes_are_the_same(open_model, tmp_path, tiny, is_mixed):
    """Hundreds of rows in one call, two sequences, one of them a tree; caches grow on the way."""
    packing = tiny.MIXED if is_mixed else tiny.Quantized()
    path = tiny.model(tmp_path / "m", tiny.config(max_position_embeddings=800), packing)
    backend, rng = open_model(path), np.random.default_rng(7)
    tokens = rng.integers(0, VOCABULARY, 540)
    rows = [*chain(tokens), *random_tree(rng, 90, 0, sequence=1, offset=540)]
    wanted = [629, 3, 539, 3, 550, 128]
    together = backend.forward(rows, taps=[1], logit_rows=wanted)
    whole = backend.forward(rows, taps=[1])
    np.testing.assert_array_equal(together.logits, whole.logits[wanted])
    np.testing.assert_array_equal(together.taps[1], whole.taps[1])
    np.testing.assert_array_equal(together.logits[2], decode_path(backend, tokens[:-1], tokens[-1:], 7)[0])
    np.testing.assert_array_equal(together.logits[5], decode_path(backend, tokens[:128], tokens[128:129], 7)[0])
    last = path_to(rows, 629)
    np.testing.assert_array_equal(together.logits[0], decode_path(backend, [], [rows[i].token for i in last], 8)[-1])


def test_only_the_rows_asked_for_get_logits_in_their_order(backend):
    """Of few rows, and of more than a GPU's last bucket holds; states of all rows all the same."""
    for count in (5, 70):
        rows = chain(range(count))
        whole = backend.forward(rows, taps=[2])
        for wanted in (range(count - 1, -1, -1), [3, 1, 1], [4, 0, 4], range(2, count), []):
            some = backend.forward(rows, taps=[2], logit_rows=list(wanted))
            np.testing.assert_array_equal(some.logits, whole.logits[list(wanted)])
            np.testing.assert_array_equal(some.taps[2], whole.taps[2])
        assert whole.taps[2].shape == (count, backend.shape.hidden_size)
        assert some.logits.shape == (0, VOCABULARY)


def test_keeping_a_path_leaves_what_decoding_it_would_have_left(backend):
    tokens = keep_random_paths(backend, np.random.default_rng(8))
    probe = backend.forward([Row(1, len(tokens))]).logits
    np.testing.assert_array_equal(probe, decode_path(backend, tokens, [1], sequence=9))


def test_rows_that_are_not_kept_leave_no_trace(backend):
    fill(backend, [5, 6, 7])
    before = backend.forward([Row(8, 3)]).logits
    backend.forward(chain([9, 10, 11], 3))
    backend.keep(0, [])
    np.testing.assert_array_equal(backend.forward([Row(8, 3)]).logits, before)
    assert backend.length(0) == 3


def test_a_branch_that_is_taken_back_and_taken_otherwise_leaves_no_trace(backend):
    fill(backend, [5, 6, 7])
    for tokens in ([8, 9], [10, 11]):
        backend.forward([Row(1, 3), Row(tokens[0], 3), Row(tokens[1], 4, 0, 1)])
        backend.keep(0, [1, 2])  # beside the chain that row 0 begins
        if tokens[0] == 8:
            backend.truncate(0, 3)
    probe = backend.forward([Row(12, 5)]).logits
    np.testing.assert_array_equal(probe, decode_path(backend, [5, 6, 7, 10, 11], [12], 1))


def test_truncating_leaves_what_was_there_before(backend):
    fill(backend, range(80))
    backend.truncate(0, 37)
    assert backend.length(0) == 37
    row, penalized = [Row(9, 37)], SamplingParams(repetition_penalty=3.0)
    (logits,) = backend.forward(row).logits
    np.testing.assert_array_equal(logits, decode_path(backend, range(37), [9], 1)[0])
    expected = sample(logits, penalized, position=38, path=[*range(37), 9])
    assert backend.forward_tokens(row, penalized).tokens == [expected]


def test_a_sequence_is_truncated_to_no_more_than_it_has(backend):
    fill(backend, range(37))
    backend.truncate(0, 0)
    backend.truncate(55, 0)
    for sequence, length in ((0, 1), (0, -1), (55, 3)):
        with pytest.raises(ValueError, match="truncate to"):
            backend.truncate(sequence, length)
    backend.forward([Row(1, 0)])
    backend.truncate(0, 0)
    with pytest.raises(ValueError, match="row 0 does not follow"):
        backend.keep(0, [0])


def test_reset_forgets_a_sequence_and_no_other(backend):
    fill(backend, [5, 6], 0)
    fill(backend, [7, 8, 9], 1)
    backend.reset(0)
    backend.reset(12)
    assert (backend.length(0), backend.length(1), backend.length(2)) == (0, 3, 0)
    np.testing.assert_array_equal(backend.forward([Row(5, 0)]).logits, decode_path(backend, [], [5], 3))


def test_calls_that_continue_are_one_call(backend):
    """Trees of two sequences, cut anywhere."""
    rng = np.random.default_rng(14)
    fill(backend, range(40), 0)
    fill(backend, range(9), 1)
    rows = random_tree(rng, 30, 40)
    rows += random_tree(rng, 20, 9, sequence=1, offset=30)
    expected = backend.forward(rows, taps=[1, 2])
    for ends in ([7, 8, 29, 50], [30, 50], range(1, 51)):
        assert_equal_forward(forward_in_parts(backend, rows, ends, [1, 2]), expected)
    backend.forward(rows[:40], logit_rows=[])
    last = backend.forward(rows[40:], logit_rows=[9, 0], continues=True)
    np.testing.assert_array_equal(last.logits, expected.logits[[49, 40]])


def test_a_branch_over_more_calls_than_a_bucket_has_ancestors(backend):
    fill(backend, [1])
    rows = [Row(2, 1), *chain(range(3, 90), 1)]
    rows[1:] = [Row(row.token, row.position, 0, row.parent + 1 if row.parent >= 0 else -1) for row in rows[1:]]
    whole = backend.forward(rows).logits
    np.testing.assert_array_equal(forward_in_parts(backend, rows, range(1, len(rows) + 1)).logits, whole)


@pytest.mark.parametrize("ends", [[3, 11, 25], range(1, 26)], ids=["parts", "single rows"])
def test_a_path_over_several_calls_is_kept(backend, ends):
    """Beside another sequence's rows."""
    rng = np.random.default_rng(15)
    tokens = list(range(33))
    fill(backend, tokens)
    rows = random_tree(rng, 25, 33)
    other = random_tree(rng, 20, 0, sequence=1, offset=25)
    forward_in_parts(backend, [*rows, *other], [*ends, 30, 45])
    path = path_to(rows, 24)
    backend.keep(0, path)
    tokens += [rows[i].token for i in path]
    assert backend.length(0) == len(tokens)
    probe = backend.forward([Row(7, len(tokens))]).logits[0]
    np.testing.assert_array_equal(probe, decode_path(backend, tokens, [7], 2)[0])


def test_rows_that_were_kept_or_dropped_are_followed_no_more(backend):
    backend.forward([Row(1, 0, 0), Row(2, 0, 1)])
    backend.keep(0, [0])
    with pytest.raises(ValueError, match=r"rows\[0\]\.parent=0 is neither an earlier row"):
        backend.forward([Row(3, 1, 0, 0)], continues=True)
    assert backend.forward([Row(3, 1, 0), Row(4, 1, 1, 1)], continues=True).logits.shape == (2, VOCABULARY)
    backend.keep(1, [1, 3])
    backend.keep(0, [2])
    assert (backend.length(0), backend.length(1)) == (2, 2)
    backend.forward([Row(5, 2)])
    with pytest.raises(ValueError, match=r"rows\[0\]\.parent=1 is neither"):
        backend.forward([Row(5, 3, 0, 1)], continues=True)
    with pytest.raises(ValueError, match=r"rows\[0\]\.parent=0 belongs to another sequence"):
        backend.forward([Row(5, 3, 1, 0)], continues=True)


def test_a_penalty_follows_a_path_over_several_calls(backend):
    fill(backend, [5, 6])
    rows, how = chain([7, 8, 9], 2), SamplingParams(repetition_penalty=50.0)
    expected = backend.forward_tokens(rows, how).tokens
    found = []
    for i, row in enumerate(rows):
        found += backend.forward_tokens([row], how, continues=i > 0).tokens
    assert found == expected


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.9},
        {"temperature": 1.1, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.7, "min_p": 0.1, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.8},
    ],
    ids=str,
)
def test_tokens_are_samples_of_the_logits(backend, params):
    """Along each row's own path, the cache included; by the sampling of docs/numerics.md."""
    rng = np.random.default_rng(9)
    context = rng.integers(0, VOCABULARY, 12).tolist()
    fill(backend, context)
    rows = random_tree(rng, 18, 12)
    how = [SamplingParams(**params, seed=i) for i in range(18)]
    chosen = backend.forward_tokens(rows, how, [1], sample_index=list(range(18)))
    forward = backend.forward(rows, [1])
    np.testing.assert_array_equal(chosen.taps[1], forward.taps[1])
    for i, token in enumerate(chosen.tokens):
        path = context + [rows[j].token for j in path_to(rows, i)]
        assert token == sample(forward.logits[i], how[i], position=len(path), path=path, sample_index=i)
    last = backend.forward_tokens(rows, how[17], token_rows=[17], sample_index=17)
    assert last.tokens == chosen.tokens[17:]


def test_rows_may_be_sampled_each_in_its_own_way(backend):
    rows = [Row(token, 0, token) for token in range(1, 7)]
    how = [
        SamplingParams(),
        SamplingParams(1.0, seed=3),
        SamplingParams(repetition_penalty=2.0),
        SamplingParams(0.8, top_k=5, seed=1),
        SamplingParams(1.5, top_p=0.5, repetition_penalty=1.2, seed=(1 << 64) - 1),
        SamplingParams(2.0, min_p=0.2, seed=9),
    ]
    mixed = backend.forward_tokens(rows, how, sample_index=[0, 1, 2, 3, 1 << 33, 5]).tokens
    alone = [
        backend.forward_tokens([row], each, sample_index=index).tokens[0]
        for row, each, index in zip(rows, how, [0, 1, 2, 3, 1 << 33, 5], strict=True)
    ]
    assert mixed == alone


@pytest.mark.parametrize("tied", [True, False])
def test_a_trimmed_head_gives_columns_of_the_whole_and_ids_of_the_target(open_model, tmp_path, tiny, tied):
    path = tiny.model(tmp_path / "m", tiny.config(tie_word_embeddings=tied), tiny.Quantized())
    ids = np.sort(np.random.default_rng(10).choice(VOCABULARY, 90, replace=False))
    whole, trimmed = open_model(path), open_model(path, head_ids=ids)
    rows = chain([3, 100, 262, 7])
    logits = whole.forward(rows).logits
    np.testing.assert_array_equal(trimmed.forward(rows).logits, logits[:, ids])
    assert trimmed.forward_tokens(rows, SamplingParams()).tokens == ids[logits[:, ids].argmax(axis=1)].tolist()
    assert set(trimmed.forward_tokens(rows, SamplingParams(5.0, seed=1)).tokens) <= set(ids.tolist())
    for bad in ([], [3, 3], [5, 4], [-1, 4], [VOCABULARY]):
        with pytest.raises(ValueError, match="head_ids must ascend"):
            open_model(path, head_ids=bad)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [Row(VOCABULARY, 0)],
        [Row(-1, 0)],
        [Row(0, 1)],
        [Row(0, 0), Row(0, 2, 0, 0)],
        [Row(0, 0), Row(0, 1, 1, 0)],
        [Row(0, 0, 0, 0)],
        [Row(0, 0, 0, -2)],
        [Row(0, i, 0, i - 1) for i in range(129)],
    ],
    ids=lambda rows: f"{len(rows)} rows",
)
def test_rows_that_do_not_fit_are_refused_as_by_the_reference(backend, reference, rows):
    messages = []
    for each in (reference, backend):
        each.reset(0)
        with pytest.raises(ValueError) as error:
            each.forward(rows)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_paths_that_do_not_fit_are_refused_as_by_the_reference(backend, reference):
    rows = [Row(1, 0), Row(2, 1, 0, 0), Row(3, 1, 0, 0), Row(4, 0, 1)]
    for path in ([1], [0, 1, 2], [0, 3], [0, 9], [-1], [0, 0]):
        messages = []
        for each in (backend, reference):
            each.reset(0)
            each.reset(1)
            each.forward(rows)
            with pytest.raises(ValueError) as error:
                each.keep(0, path)
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    backend.keep(0, [0, 2])
    with pytest.raises(ValueError, match="row 0 does not follow row -1"):
        backend.keep(0, [0])
    with pytest.raises(ValueError, match=r"row 0 does not follow row -1 .* sequence 77"):
        backend.keep(77, [0])
    backend.keep(77, [])
    backend.keep(1, [3])
    assert (backend.length(0), backend.length(1)) == (2, 1)


def test_what_is_asked_for_must_be_there(backend):
    with pytest.raises(ValueError, match=r"taps=\[3\]: layer 3"):
        backend.forward([Row(0, 0)], taps=[3])
    with pytest.raises(ValueError, match=r"logit_rows=\[1\]: there are 1 rows"):
        backend.forward([Row(0, 0)], logit_rows=[1])
    with pytest.raises(ValueError, match="2 rows need as many entries"):
        backend.forward_tokens(chain([1, 2]), [SamplingParams()])


def test_a_row_whose_logits_are_not_finite_has_no_token(open_model, tmp_path, tiny):
    from deploy.formats.safetensors_file import BFloat16, SafetensorsFile, to_bfloat16, write_safetensors

    path = tiny.model(tmp_path / "m", tiny.config(tie_word_embeddings=False), None)
    with SafetensorsFile(path / "model.safetensors") as file:
        tensors = {name: BFloat16(file.array(name).copy()) for name in file.names()}
    tensors["lm_head.weight"] = BFloat16(to_bfloat16(np.full((VOCABULARY, 96), 3e38, np.float32)))
    write_safetensors(path / "model.safetensors", tensors)
    backend = open_model(path)
    for sampling in (SamplingParams(), SamplingParams(1.0)):
        assert backend.forward_tokens([Row(1, 0)], sampling).tokens == [NO_TOKEN]
