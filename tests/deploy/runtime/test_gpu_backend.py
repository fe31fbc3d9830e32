"""The GPU backend's logic, its operations in plain torch on CPU tensors: against the reference, and against itself."""

import json

import numpy as np
import pytest
import torch

from deploy.formats.architectures import linear_layers
from deploy.formats.errors import FormatError
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backend import Forward, Row
from deploy.runtime.gpu_backend import GpuBackend
from deploy.runtime.gpu_inputs import BUCKETS
from deploy.runtime.sampling import SamplingParams, sample
from tests.deploy.runtime.gpu_rows import (
    VOCABULARY,
    assert_near,
    chain,
    decode_path,
    fill,
    path_to,
    random_tree,
    torch_device,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny):
    """A model with QK norm and several groups of queries."""
    return tiny.model(tmp_path_factory.mktemp("model"), tiny.config("qwen3"), tiny.Quantized())


@pytest.fixture(scope="module")
def reference(directory):
    return ReferenceBackend(directory, activations="bf16")


@pytest.fixture
def backend(directory):
    return GpuBackend.open(directory, torch_device())


def assert_equal_forward(found, expected):
    np.testing.assert_array_equal(found.logits, expected.logits)
    assert sorted(found.taps) == sorted(expected.taps)
    for layer, values in expected.taps.items():
        np.testing.assert_array_equal(found.taps[layer], values)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = [
    ("llama", {}, (4, 32, "asymmetric")),
    ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}, (4, 32, "minimum")),
    ("llama", {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 384}, (4, 128, "symmetric")),
    ("qwen2", {"tie_word_embeddings": False}, (8, 32, "asymmetric")),
    ("qwen2", {"num_key_value_heads": 1, "head_dim": 48, "num_attention_heads": 2}, (4, 32, "minimum")),
    ("qwen3", {"head_dim": 32}, (4, 32, "symmetric")),
    ("qwen3", {"hidden_size": 64, "head_dim": 80, "num_attention_heads": 10, "num_key_value_heads": 2}, None),
    ("mistral", {"num_key_value_heads": 6, "tie_word_embeddings": False}, (4, 32, "asymmetric")),
    ("mistral", {"head_dim": 128, "num_attention_heads": 5, "num_key_value_heads": 1}, None),
]


# float16 is finer than the `bf16` form: it is compared with unrounded inputs
@pytest.mark.parametrize(("dtype", "form"), [(torch.bfloat16, "bf16"), (torch.float16, "float32")], ids=str)
@pytest.mark.parametrize(("model_type", "changes", "packing"), MODELS)
def test_logits_and_taps_are_near_the_references(tmp_path, tiny, model_type, changes, packing, dtype, form):
    config = tiny.config(model_type, **changes)
    path = tiny.model(tmp_path / "m", config, packing and tiny.Quantized(*packing), seed=5)
    backend, reference = GpuBackend.open(path, torch_device(dtype)), ReferenceBackend(path, activations=form)
    tokens = np.random.default_rng(1).integers(0, config["vocab_size"], 75)
    num_clear = 0
    for begin, end in ((0, 41), (41, 42), (42, 75)):
        rows = chain(tokens[begin:end], begin)
        found, expected = (each.forward(rows, taps=(0, 1, 2)) for each in (backend, reference))
        num_clear += assert_near(found.logits, expected.logits)
        for layer, values in expected.taps.items():
            assert np.abs(found.taps[layer] - values).max() <= 0.25 * values.std()
        for each in (backend, reference):
            each.keep(0, range(len(rows)))
    assert num_clear > 20


def test_a_tree_is_near_the_references(backend, reference):
    rng = np.random.default_rng(2)
    for count, length in ((1, 0), (7, 3), (40, 31), (25, 64)):
        tokens = rng.integers(0, VOCABULARY, length)
        rows = random_tree(rng, count, length)
        found = []
        for each in (backend, reference):
            fill(each, tokens)
            found.append(each.forward(rows).logits)
        assert_near(*found)
    reference.reset(0)


def test_a_trees_paths_are_the_paths_decoded_alone(backend):
    rng = np.random.default_rng(3)
    for length in (0, 30):
        context = rng.integers(0, VOCABULARY, length)
        rows = random_tree(rng, 20, length)
        fill(backend, context)
        logits = backend.forward(rows).logits
        for leaf in range(0, 20, 3):
            path = path_to(rows, leaf)
            alone = decode_path(backend, context, [rows[i].token for i in path], sequence=1)
            np.testing.assert_array_equal(logits[path], alone)


def test_a_row_is_the_same_in_every_bucket(backend):
    """Its own bucket's padding included, and beyond the last bucket."""
    context, rng = list(range(20)), np.random.default_rng(4)
    alone = decode_path(backend, context, [7])[0]
    fill(backend, context)
    for count in (*BUCKETS, 3, 33, 65):
        others = [Row(int(rng.integers(VOCABULARY)), 20, 0) for _ in range(count - 1)]
        logits = backend.forward([*others, Row(7, 20)], logit_rows=[count - 1]).logits
        np.testing.assert_array_equal(logits[0], alone)


def test_many_sequences_and_trees_share_a_call(backend):
    """More sequences than the slot table has at first, and interleaved rows."""
    rng = np.random.default_rng(5)
    lengths = {0: 0, 5: 17, -3: 40, 1 << 40: 33} | {100 + i: i for i in range(9)}
    contexts = {sequence: rng.integers(0, VOCABULARY, length) for sequence, length in lengths.items()}
    rows = []
    for sequence, tokens in contexts.items():
        fill(backend, tokens, sequence)
        rows += random_tree(rng, 4, len(tokens), sequence, len(rows))
    order = sorted(range(len(rows)), key=lambda i: rows[i].position)  # parents still first
    place = {old: new for new, old in enumerate(order)}
    mixed = [
        Row(rows[i].token, rows[i].position, rows[i].sequence, place[rows[i].parent] if rows[i].parent >= 0 else -1)
        for i in order
    ]
    logits = backend.forward(mixed).logits
    for row in range(0, len(rows), 3):
        path = [rows[i].token for i in path_to(rows, row)]
        alone = decode_path(backend, contexts[rows[row].sequence], path, sequence=7777)
        np.testing.assert_array_equal(logits[place[row]], alone[-1])


def test_prefill_in_any_chunks_is_the_same(backend):
    tokens = np.random.default_rng(6).integers(0, VOCABULARY, 100)
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
    """Hundreds of rows in one call, two sequences, one of them a tree; slots and table grow on the way."""
    path = tiny.model(tmp_path / "m", tiny.config(max_position_embeddings=800, num_hidden_layers=1), tiny.Quantized())
    backend, rng = GpuBackend.open(path, torch_device()), np.random.default_rng(7)
    tokens = rng.integers(0, VOCABULARY, 540)
    rows = [*chain(tokens), *random_tree(rng, 90, 0, sequence=1, offset=540)]
    wanted = [629, 3, 539, 3, 550, 128]
    together = backend.forward(rows, taps=[1], logit_rows=wanted)
    whole = backend.forward(rows, taps=[1])
    np.testing.assert_array_equal(together.logits, whole.logits[wanted])
    np.testing.assert_array_equal(together.taps[1], whole.taps[1])
    np.testing.assert_array_equal(together.logits[2], decode_path(backend, tokens[:-1], tokens[-1:], 7)[0])
    last = path_to(rows, 629)
    np.testing.assert_array_equal(together.logits[0], decode_path(backend, [], [rows[i].token for i in last], 8)[-1])


def test_logits_come_in_the_order_that_is_asked_for(backend):
    """In a bucket, and beyond the last one."""
    for count in (5, 70):
        rows = chain(range(count))
        whole = backend.forward(rows).logits
        for wanted in (range(count - 1, -1, -1), [3, 1, 1], range(2, count), []):
            np.testing.assert_array_equal(backend.forward(rows, logit_rows=list(wanted)).logits, whole[list(wanted)])


def test_keeping_a_path_leaves_what_decoding_it_would_have_left(backend):
    """Rounds of random trees, of which chains and branches are kept."""
    rng = np.random.default_rng(8)
    tokens = []
    while len(tokens) < 100:
        rows = random_tree(rng, 12, len(tokens))
        path = path_to(rows, int(rng.integers(12)))
        path = path[: int(rng.integers(len(path) + 1))]
        backend.forward(rows, logit_rows=[])
        backend.keep(0, path)
        tokens += [rows[i].token for i in path]
        assert backend.length(0) == len(tokens)
    probe = backend.forward([Row(1, len(tokens))]).logits
    np.testing.assert_array_equal(probe, decode_path(backend, tokens, [1], sequence=9))


def test_a_branch_that_is_taken_back_and_taken_otherwise_leaves_no_trace(backend):
    fill(backend, [5, 6, 7])
    for tokens in ([8, 9], [10, 11]):
        backend.forward([Row(1, 3), Row(tokens[0], 3), Row(tokens[1], 4, 0, 1)])
        backend.keep(0, [1, 2])  # beside the chain that row 0 begins
        if tokens[0] == 8:
            backend.truncate(0, 3)
    probe = backend.forward([Row(12, 5)]).logits
    np.testing.assert_array_equal(probe, decode_path(backend, [5, 6, 7, 10, 11], [12], 1))


def test_slots_are_used_again(backend):
    """What is dropped, truncated or reset is free; so caches stay small."""
    fill(backend, range(60))
    before = backend.cache_bytes
    for i in range(25):
        backend.forward([Row(token, 60) for token in range(40)], logit_rows=[])
        backend.truncate(0, 60)
        fill(backend, range(50), 1 + i)
        backend.reset(1 + i)
    assert backend.cache_bytes == before


def test_truncating_leaves_what_was_there_before(backend):
    fill(backend, range(80))
    backend.truncate(0, 37)
    assert backend.length(0) == 37
    np.testing.assert_array_equal(backend.forward([Row(9, 37)]).logits, decode_path(backend, range(37), [9], 1))
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


def test_calls_that_continue_are_one_call(backend):
    """Trees of two sequences, cut anywhere; a path over several calls is kept."""
    rng = np.random.default_rng(14)
    fill(backend, range(40), 0)
    fill(backend, range(9), 1)
    rows = random_tree(rng, 30, 40)
    rows += random_tree(rng, 20, 9, sequence=1, offset=30)
    expected = backend.forward(rows, taps=[1, 2])
    for ends in ([7, 8, 29, 50], [30, 50], range(1, 51)):
        assert_equal_forward(forward_in_parts(backend, rows, ends, [1, 2]), expected)
    path = path_to(rows, 29)
    backend.keep(0, path)
    probe = backend.forward([Row(7, 40 + len(path))]).logits[0]
    alone = decode_path(backend, [*range(40), *(rows[i].token for i in path)], [7], 3)
    np.testing.assert_array_equal(probe, alone[0])


def test_a_branch_over_more_calls_than_a_bucket_has_ancestors(backend):
    fill(backend, [1])
    rows = [Row(2, 1), *chain(range(3, 90), 1)]
    rows[1:] = [Row(row.token, row.position, 0, row.parent + 1 if row.parent >= 0 else -1) for row in rows[1:]]
    whole = backend.forward(rows).logits
    np.testing.assert_array_equal(forward_in_parts(backend, rows, range(1, len(rows) + 1)).logits, whole)


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
def test_a_trimmed_head_gives_columns_of_the_whole_and_ids_of_the_target(tmp_path, tiny, tied):
    path = tiny.model(tmp_path / "m", tiny.config(tie_word_embeddings=tied), tiny.Quantized())
    ids = np.sort(np.random.default_rng(10).choice(VOCABULARY, 90, replace=False))
    whole, trimmed = GpuBackend.open(path, torch_device()), GpuBackend.open(path, torch_device(), head_ids=ids)
    rows = chain([3, 100, 262, 7])
    logits = whole.forward(rows).logits
    np.testing.assert_array_equal(trimmed.forward(rows).logits, logits[:, ids])
    assert trimmed.forward_tokens(rows, SamplingParams()).tokens == ids[logits[:, ids].argmax(axis=1)].tolist()
    assert set(trimmed.forward_tokens(rows, SamplingParams(5.0, seed=1)).tokens) <= set(ids.tolist())
    for bad in ([], [3, 3], [5, 4], [-1, 4], [VOCABULARY]):
        with pytest.raises(ValueError, match="head_ids must ascend"):
            GpuBackend.open(path, torch_device(), head_ids=bad)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [Row(VOCABULARY, 0)],
        [Row(0, 1)],
        [Row(0, 0), Row(0, 2, 0, 0)],
        [Row(0, 0), Row(0, 1, 1, 0)],
        [Row(0, 0, 0, 0)],
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
    with pytest.raises(ValueError, match=r"row 0 does not follow row -1 .* sequence 77"):
        backend.keep(77, [0])
    backend.keep(77, [])


def test_what_is_asked_for_must_be_there(backend):
    with pytest.raises(ValueError, match=r"taps=\[3\]: layer 3"):
        backend.forward([Row(0, 0)], taps=[3])
    with pytest.raises(ValueError, match=r"logit_rows=\[1\]: there are 1 rows"):
        backend.forward([Row(0, 0)], logit_rows=[1])
    with pytest.raises(ValueError, match="2 rows need as many entries"):
        backend.forward_tokens(chain([1, 2]), [SamplingParams()])
    assert backend.forward([Row(0, 0)], logit_rows=[]).logits.shape == (0, VOCABULARY)


def test_a_weight_that_is_not_finite_names_its_layer(tmp_path, tiny):
    path = tiny.model(tmp_path / "m", tiny.config(), None)
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    begin = header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0] + start
    data[begin : begin + 2] = b"\x80\x7f"  # infinity in bfloat16
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj.*not finite"):
        GpuBackend.open(path, torch_device())


def test_sizes_that_no_kernel_knows_are_refused(tmp_path, tiny):
    path = tiny.model(tmp_path / "m", tiny.config(head_dim=288, num_attention_heads=1, num_key_value_heads=1), None)
    with pytest.raises(ValueError, match="head_dim=288 is larger than the 256 that the GPU kernels know"):
        GpuBackend.open(path, torch_device())


def test_logits_that_are_not_finite_are_refused(tmp_path, tiny):
    from deploy.formats.safetensors_file import BFloat16, SafetensorsFile, to_bfloat16, write_safetensors

    path = tiny.model(tmp_path / "m", tiny.config(tie_word_embeddings=False), None)
    with SafetensorsFile(path / "model.safetensors") as file:
        tensors = {name: BFloat16(file.array(name).copy()) for name in file.names()}
    tensors["lm_head.weight"] = BFloat16(to_bfloat16(np.full((VOCABULARY, 96), 3e38, np.float32)))
    write_safetensors(path / "model.safetensors", tensors)
    backend = GpuBackend.open(path, torch_device())
    for sampling in (SamplingParams(), SamplingParams(1.0)):
        with pytest.raises(ValueError, match="the logits for position 1 are not finite"):
            backend.forward_tokens([Row(1, 0)], sampling)


def test_weights_and_caches_that_do_not_fit_are_told_with_a_remedy(directory, monkeypatch):
    def full(*_arguments, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    backend = GpuBackend.open(directory, torch_device())
    with monkeypatch.context() as patched:
        patched.setattr("deploy.runtime.gpu_loader.pack_w4", full)
        with pytest.raises(MemoryError, match=r"m.*: its weights do not fit .*--device cpu"):
            GpuBackend.open(directory, torch_device())
        zeros = torch.zeros
        patched.setattr(torch, "zeros", lambda *a, **n: (full if n.get("dtype") == torch.float16 else zeros)(*a, **n))
        with pytest.raises(MemoryError, match=r"a cache of 1024 tokens needs 0\.0 GiB, more than the GPU has left"):
            for sequence in range(6):
                fill(backend, range(100), sequence)


def test_its_weights_have_the_size_that_is_told(directory):
    """4-bit codes, scales, one tied embedding of 16 bits; norms in fp32."""
    backend = GpuBackend.open(directory, torch_device())
    numbers = sum(layer.num_out * layer.num_in for layer in linear_layers(backend.shape))
    ends = VOCABULARY * 96 * 2
    groups = numbers // 32
    assert numbers // 2 + ends < backend.weight_bytes < numbers // 2 + ends + 4 * groups + 10_000
    assert backend.device_facts == {"gpu": "none"}
