"""The native backend against the reference: logits, taps and tokens, bit for bit."""

import json
import time

import numpy as np
import pytest

from deploy.formats.errors import FormatError
from deploy.kernels.cpu.library import PHASES
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backend import Forward, Row
from deploy.runtime.cpu_backend import CpuBackend
from deploy.runtime.sampling import SamplingParams, sample

VOCABULARY = 263


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny):
    """A model with QK norm and several groups of queries."""
    return tiny.model(tmp_path_factory.mktemp("model"), tiny.config("qwen3"), tiny.Quantized())


@pytest.fixture(scope="module")
def reference(directory):
    return ReferenceBackend(directory)


def chain(tokens, start=0, sequence=0):
    return [Row(int(token), start + i, sequence, i - 1) for i, token in enumerate(tokens)]


def fill(backend, tokens, sequence=0):
    """Make `tokens` what the sequence's cache holds."""
    backend.reset(sequence)
    if len(tokens):
        backend.forward(chain(tokens, sequence=sequence), logit_rows=[])
        backend.keep(sequence, range(len(tokens)))


def decode_path(backend, context, path, sequence=0):
    """Logits after each token of `path`, fed one by one behind `context`."""
    fill(backend, context, sequence)
    logits = []
    for i, token in enumerate(path):
        logits.append(backend.forward([Row(int(token), len(context) + i, sequence)]).logits[0])
        backend.keep(sequence, [0])
    return np.array(logits)


def random_tree(rng, count, start, sequence=0, offset=0):
    """Rows of a random tree, some of them roots; parents are indices into the whole call."""
    rows = []
    for i in range(count):
        parent = int(rng.integers(-1, i)) if i else -1
        position = start if parent < 0 else rows[parent].position + 1
        rows.append(
            Row(int(rng.integers(VOCABULARY)), position, sequence, -1 if parent < 0 else parent + offset)
        )  # fmt: skip
    return rows


def path_to(rows, index):
    path = []
    while index >= 0:
        path.insert(0, index)
        index = rows[index].parent
    return path


def assert_equal_forward(found, expected):
    np.testing.assert_array_equal(found.logits, expected.logits)
    assert sorted(found.taps) == sorted(expected.taps)
    for layer, values in expected.taps.items():
        np.testing.assert_array_equal(found.taps[layer], values)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "changes", "packing"),
    [
        ("llama", {}, (4, 32, "asymmetric")),
        ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}, (4, 32, "minimum")),
        ("llama", {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 384}, (4, 128, "symmetric")),
        ("qwen2", {"tie_word_embeddings": False}, (8, 32, "asymmetric")),
        ("qwen2", {"num_key_value_heads": 1, "head_dim": 48, "num_attention_heads": 2}, (8, 32, "minimum")),
        ("qwen3", {"head_dim": 32}, (4, 32, "symmetric")),
        ("qwen3", {"hidden_size": 64, "head_dim": 80, "num_attention_heads": 10, "num_key_value_heads": 2}, None),
        ("mistral", {"num_key_value_heads": 6, "tie_word_embeddings": False}, (4, 32, "asymmetric")),
        ("mistral", {"head_dim": 128, "num_attention_heads": 5, "num_key_value_heads": 1}, None),
    ],
)
def test_logits_and_taps_are_the_references(isa, tmp_path, tiny, model_type, changes, packing):
    config = tiny.config(model_type, **changes)
    path = tiny.model(tmp_path / "m", config, packing and tiny.Quantized(*packing), seed=5)
    backend, reference = CpuBackend(path, threads=2), ReferenceBackend(path)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config["vocab_size"], 75)
    for begin, end in ((0, 41), (41, 42), (42, 75)):
        rows = [Row(int(t), begin + i, 0, i - 1) for i, t in enumerate(tokens[begin:end])]
        assert_equal_forward(backend.forward(rows, taps=(0, 1, 2)), reference.forward(rows, taps=(0, 1, 2)))
        backend.keep(0, range(len(rows)))
        reference.keep(0, range(len(rows)))


def test_mixed_packings_in_one_model_are_the_references(isa, tmp_path, tiny):
    """Plain layers beside packed ones: what one file's layers share is not assumed."""
    path = tiny.model(tmp_path / "plain", tiny.config("llama"), None)
    rows = chain(range(20))
    assert_equal_forward(CpuBackend(path).forward(rows), ReferenceBackend(path).forward(rows))


def test_a_random_tree_is_the_references(isa, directory, reference):
    backend, rng = CpuBackend(directory, threads=2), np.random.default_rng(2)
    for count, length in ((1, 0), (7, 3), (40, 31), (25, 64), (33, 70)):
        tokens = rng.integers(0, VOCABULARY, length)
        fill(backend, tokens)
        fill(reference, tokens)
        rows = random_tree(rng, count, length)
        assert_equal_forward(backend.forward(rows, taps=[1]), reference.forward(rows, taps=[1]))


def test_a_trees_paths_are_the_paths_decoded_alone(isa, directory):
    backend, rng = CpuBackend(directory, threads=2), np.random.default_rng(3)
    context = rng.integers(0, VOCABULARY, 30)
    rows = random_tree(rng, 20, 30)
    fill(backend, context)
    logits = backend.forward(rows).logits
    for leaf in range(0, 20, 3):
        path = path_to(rows, leaf)
        alone = decode_path(backend, context, [rows[i].token for i in path], sequence=1)
        np.testing.assert_array_equal(logits[path], alone)


def test_many_sequences_and_trees_share_a_call(isa, directory, reference):
    rng = np.random.default_rng(4)
    backend = CpuBackend(directory, threads=2)
    lengths = {0: 0, 5: 17, -3: 40, 1 << 40: 33}
    for sequence, length in lengths.items():
        tokens = rng.integers(0, VOCABULARY, length)
        fill(backend, tokens, sequence)
        fill(reference, tokens, sequence)
    rows = []
    for sequence, length in lengths.items():
        rows += random_tree(rng, 9, length, sequence, len(rows))
    order = rng.permutation(len(rows)).tolist()
    order.sort(key=lambda i: rows[i].position)  # interleaved, parents still first
    place = {old: new for new, old in enumerate(order)}
    mixed = [
        Row(rows[i].token, rows[i].position, rows[i].sequence, place[rows[i].parent] if rows[i].parent >= 0 else -1)
        for i in order
    ]
    assert_equal_forward(backend.forward(mixed), reference.forward(mixed))
    for sequence in lengths:
        reference.reset(sequence)


def test_prefill_in_any_chunks_is_the_same(isa, directory):
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, VOCABULARY, 100)
    backend = CpuBackend(directory, threads=2)
    expected = decode_path(backend, [], tokens)
    for sizes in ((100,), (1, 99), (64, 36), (33, 32, 35), (7,) * 14 + (2,)):
        backend.reset(0)
        logits, begin = [], 0
        for size in sizes:
            logits.append(backend.forward(chain(tokens[begin : begin + size], begin)).logits)
            backend.keep(0, range(size))
            begin += size
        np.testing.assert_array_equal(np.concatenate(logits), expected)


def test_more_rows_than_one_pass_takes_are_the_same(tmp_path, tiny):
    """Hundreds of rows in one call, two sequences, one of them a tree."""
    path = tiny.model(tmp_path / "m", tiny.config(max_position_embeddings=600, num_hidden_layers=1), tiny.Quantized())
    backend, rng = CpuBackend(path, threads=2), np.random.default_rng(6)
    tokens = rng.integers(0, VOCABULARY, 300)
    rows = [*chain(tokens), *random_tree(rng, 150, 0, sequence=1, offset=300)]
    wanted = [449, 3, 299, 3, 310, 128]
    together = backend.forward(rows, logit_rows=wanted)
    np.testing.assert_array_equal(together.logits, backend.forward(rows).logits[wanted])
    np.testing.assert_array_equal(together.logits[2], decode_path(backend, tokens[:-1], tokens[-1:], 7)[0])
    last = path_to(rows, 449)
    np.testing.assert_array_equal(together.logits[0], decode_path(backend, [], [rows[i].token for i in last], 8)[-1])


def test_threads_change_nothing(isa, directory):
    rng = np.random.default_rng(7)
    rows = random_tree(rng, 29, 0)
    results = [CpuBackend(directory, threads=threads).forward(rows, taps=[0, 2]) for threads in (1, 2, 3)]
    assert_equal_forward(results[1], results[0])
    assert_equal_forward(results[2], results[0])


def test_keeping_a_path_leaves_what_decoding_it_would_have_left(directory, reference):
    backend, rng = CpuBackend(directory, threads=2), np.random.default_rng(8)
    tokens = []
    backend.reset(0)
    reference.reset(0)
    while len(tokens) < 100:
        rows = random_tree(rng, 12, len(tokens))
        path = path_to(rows, int(rng.integers(12)))
        path = path[: int(rng.integers(len(path) + 1))]
        for each in (backend, reference):
            each.forward(rows, logit_rows=[])
            each.keep(0, path)
        tokens += [rows[i].token for i in path]
        assert backend.length(0) == reference.length(0) == len(tokens)
    probe = [Row(1, len(tokens))]
    assert_equal_forward(backend.forward(probe), reference.forward(probe))
    np.testing.assert_array_equal(backend.forward(probe).logits, decode_path(backend, tokens, [1], sequence=9))
    reference.reset(0)


def test_rows_that_are_not_kept_leave_no_trace(directory):
    backend = CpuBackend(directory)
    fill(backend, [5, 6, 7])
    before = backend.forward([Row(8, 3)]).logits
    backend.forward(chain([9, 10, 11], 3))
    backend.keep(0, [])
    np.testing.assert_array_equal(backend.forward([Row(8, 3)]).logits, before)
    assert backend.length(0) == 3


def test_truncating_leaves_what_was_there_before(directory, reference):
    backend = CpuBackend(directory)
    tokens = list(range(80))
    fill(backend, tokens)
    backend.truncate(0, 37)
    assert backend.length(0) == 37
    np.testing.assert_array_equal(backend.forward([Row(9, 37)]).logits, decode_path(backend, tokens[:37], [9], 1))
    penalized = SamplingParams(repetition_penalty=3.0)
    fill(reference, tokens[:37])
    row = [Row(9, 37)]
    assert backend.forward_tokens(row, penalized) == reference.forward_tokens(row, penalized)
    backend.truncate(0, 0)
    backend.truncate(55, 0)
    for sequence, length in ((0, 1), (0, -1), (55, 3)):
        with pytest.raises(ValueError, match="truncate to"):
            backend.truncate(sequence, length)
    backend.forward([Row(1, 0)])
    backend.truncate(0, 0)
    with pytest.raises(ValueError, match="row 0 does not follow"):
        backend.keep(0, [0])
    reference.reset(0)


def test_reset_forgets_a_sequence_and_no_other(directory):
    backend = CpuBackend(directory)
    fill(backend, [5, 6], 0)
    fill(backend, [7, 8, 9], 1)
    backend.reset(0)
    backend.reset(12)
    assert (backend.length(0), backend.length(1), backend.length(2)) == (0, 3, 0)
    np.testing.assert_array_equal(backend.forward([Row(5, 0)]).logits, decode_path(backend, [], [5], 3))


def forward_in_parts(backend, rows, ends, taps=()):
    """Calls that continue each other; their logits and taps, joined."""
    found, begin = [], 0
    for end in ends:
        found.append(backend.forward(rows[begin:end], taps, continues=begin > 0))
        begin = end
    return Forward(
        np.concatenate([part.logits for part in found]),
        {layer: np.concatenate([part.taps[layer] for part in found]) for layer in taps},
    )


def test_calls_that_continue_are_one_call(isa, directory):
    """Trees of two sequences, cut anywhere."""
    rng = np.random.default_rng(14)
    backend = CpuBackend(directory, threads=2)
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


def test_a_path_over_several_calls_is_kept(directory):
    backend, rng = CpuBackend(directory, threads=2), np.random.default_rng(15)
    tokens = list(range(33))
    fill(backend, tokens)
    rows = random_tree(rng, 25, 33)
    forward_in_parts(backend, rows, [3, 11, 25])
    path = path_to(rows, 24)
    backend.keep(0, path)
    tokens += [rows[i].token for i in path]
    assert backend.length(0) == len(tokens)
    probe = backend.forward([Row(7, len(tokens))]).logits[0]
    np.testing.assert_array_equal(probe, decode_path(backend, tokens, [7], 1)[0])


def test_rows_that_were_kept_or_dropped_are_followed_no_more(directory):
    backend = CpuBackend(directory)
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


def test_a_penalty_follows_a_path_over_several_calls(isa, directory):
    backend = CpuBackend(directory)
    fill(backend, [5, 6])
    rows, how = chain([7, 8, 9], 2), SamplingParams(repetition_penalty=50.0)
    expected = backend.forward_tokens(rows, how).tokens
    found = []
    for i, row in enumerate(rows):
        found += backend.forward_tokens([row], how, continues=i > 0).tokens
    assert found == expected


def test_only_the_rows_asked_for_get_logits(directory):
    backend = CpuBackend(directory)
    rows = chain(range(10))
    whole = backend.forward(rows)
    some = backend.forward(rows, taps=[2], logit_rows=[7, 0, 7])
    np.testing.assert_array_equal(some.logits, whole.logits[[7, 0, 7]])
    assert some.taps[2].shape == (10, backend.shape.hidden_size)
    assert backend.forward(rows, logit_rows=[]).logits.shape == (0, VOCABULARY)


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.9}, {"temperature": 1.1, "top_k": 20, "top_p": 0.9}, {"repetition_penalty": 1.8}],
    ids=str,
)
def test_tokens_are_the_references_samples(isa, directory, reference, params):
    """Along each row's own path, the cache included."""
    backend, rng = CpuBackend(directory, threads=2), np.random.default_rng(9)
    context = rng.integers(0, VOCABULARY, 12).tolist()
    fill(backend, context)
    rows = random_tree(rng, 18, 12)
    how = [SamplingParams(**params, seed=i) for i in range(18)]
    chosen = backend.forward_tokens(rows, how, [1], sample_index=list(range(18)))
    forward = backend.forward(rows, [1])
    np.testing.assert_array_equal(chosen.taps[1], forward.taps[1])
    for i, token in enumerate(chosen.tokens):
        path = context + [rows[j].token for j in path_to(rows, i)]
        expected = sample(forward.logits[i], how[i], position=len(path), path=path, sample_index=i)
        assert token == expected
    last = backend.forward_tokens(rows, how[17], token_rows=[17], sample_index=17)
    assert last.tokens == chosen.tokens[17:]


@pytest.mark.parametrize("tied", [True, False])
def test_a_trimmed_head_gives_columns_of_the_whole_and_ids_of_the_target(isa, tmp_path, tiny, tied):
    path = tiny.model(tmp_path / "m", tiny.config(tie_word_embeddings=tied), tiny.Quantized())
    ids = np.sort(np.random.default_rng(10).choice(VOCABULARY, 90, replace=False))
    whole, trimmed = CpuBackend(path), CpuBackend(path, head_ids=ids)
    rows = chain([3, 100, 262, 7])
    logits = whole.forward(rows).logits
    np.testing.assert_array_equal(trimmed.forward(rows).logits, logits[:, ids])
    assert trimmed.forward_tokens(rows, SamplingParams()).tokens == ids[logits[:, ids].argmax(axis=1)].tolist()
    for bad in ([], [3, 3], [5, 4], [-1, 4], [VOCABULARY]):
        with pytest.raises(ValueError, match="head_ids must ascend"):
            CpuBackend(path, head_ids=bad)


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
def test_rows_that_do_not_fit_are_refused_as_by_the_reference(directory, reference, rows):
    backend = CpuBackend(directory)
    reference.reset(0)
    with pytest.raises(ValueError) as expected:
        reference.forward(rows)
    with pytest.raises(ValueError) as found:
        backend.forward(rows)
    assert str(found.value) == str(expected.value)


def test_paths_that_do_not_fit_are_refused_as_by_the_reference(directory, reference):
    backend = CpuBackend(directory)
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


def test_what_is_asked_for_must_be_there(directory):
    backend = CpuBackend(directory)
    with pytest.raises(ValueError, match=r"taps=\[3\]: layer 3"):
        backend.forward([Row(0, 0)], taps=[3])
    with pytest.raises(ValueError, match=r"logit_rows=\[1\]: there are 1 rows"):
        backend.forward([Row(0, 0)], logit_rows=[1])
    with pytest.raises(ValueError, match="2 rows need as many entries"):
        backend.forward_tokens(chain([1, 2]), [SamplingParams()])
    with pytest.raises(ValueError, match="threads=0"):
        CpuBackend(directory, threads=0)


def test_sizes_that_the_sums_do_not_fit_are_refused(tmp_path, tiny):
    path = tiny.model(tmp_path / "m", tiny.config(hidden_size=80), None)
    with pytest.raises(ValueError, match="hidden_size=80 is not a multiple of 32"):
        CpuBackend(path)


def test_a_weight_that_is_not_finite_names_its_layer(tmp_path, tiny):
    path = tiny.model(tmp_path / "m", tiny.config(), None)
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin = header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0] + 8 + int.from_bytes(data[:8], "little")
    data[begin : begin + 2] = b"\x80\x7f"  # infinity in bfloat16
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj.*not finite"):
        CpuBackend(path)


def test_shards_load_like_one_file(tmp_path, tiny):
    from deploy.formats.safetensors_file import BFloat16, SafetensorsFile, write_safetensors

    path = tiny.model(tmp_path / "m", tiny.config(), tiny.Quantized())
    rows = chain([1, 2, 3])
    expected = CpuBackend(path).forward(rows).logits
    with SafetensorsFile(path / "model.safetensors") as file:
        names = file.names()
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for part, chosen in parts.items():
            tensors = {n: BFloat16(file.array(n)) if file.dtype(n) == "BF16" else file.array(n) for n in chosen}
            write_safetensors(path / part, tensors)
    index = {"weight_map": {name: part for part, chosen in parts.items() for name in chosen}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").unlink()
    np.testing.assert_array_equal(CpuBackend(path).forward(rows).logits, expected)


def test_phases_are_timed_only_when_asked_for_and_change_nothing(directory):
    backend, rows, times = CpuBackend(directory), chain([5, 6, 7]), {}
    expected = backend.forward_tokens(rows, SamplingParams(temperature=1.0, seed=3)).tokens
    begin = time.perf_counter()
    with backend.phase_times(times):
        assert backend.forward_tokens(rows, SamplingParams(temperature=1.0, seed=3)).tokens == expected
    whole = time.perf_counter() - begin
    assert set(times) == set(PHASES)
    assert all(times[name] > 0 for name in ("qkv", "attention", "output", "mlp", "head", "sampling"))
    assert times["quantize"] == 0  # three rows: within the linear layers' phases
    assert 0 < sum(times.values()) < whole
    before = dict(times)
    backend.forward_tokens(rows, SamplingParams())
    with backend.phase_times(times):
        pass
    assert times == before
