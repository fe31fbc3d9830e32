import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from deploy.formats.model_dir import ModelDirectory
from deploy.kernels.reference import model as model_module
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backend import Row

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def chain(tokens, start=0, sequence=0):
    return [Row(int(token), start + i, sequence, i - 1) for i, token in enumerate(tokens)]


def decode_one_by_one(backend, tokens, sequence=0):
    """Logits of each token, fed singly."""
    backend.reset(sequence)
    logits = []
    for position, token in enumerate(tokens):
        logits.append(backend.forward([Row(int(token), position, sequence)]).logits[0])
        backend.keep(sequence, [0])
    return np.array(logits)


@pytest.fixture(scope="module")
def backend(tmp_path_factory, tiny):
    directory = tiny.model(tmp_path_factory.mktemp("model"), tiny.config("qwen3"), tiny.Quantized())
    return ReferenceBackend(directory)


def transformers_model(tiny, directory, model_type, **changes):
    """A model of theirs with nothing left at its initial zero or one, saved; and itself."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[model_type](**tiny.config(model_type, **changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.08
            parameter.add_(torch.randn_like(parameter) * spread)
            assert "bias" not in name or model_type == "qwen2"
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {"head_dim": 32}),
        ("mistral", {"num_key_value_heads": 6, "tie_word_embeddings": False}),
    ],
)
def test_logits_are_those_of_transformers(tmp_path, tiny, model_type, changes):
    theirs = transformers_model(tiny, tmp_path, model_type, **changes)
    tokens = np.random.default_rng(0).integers(0, 263, 70)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)[None]).logits[0].numpy()
    scale = np.abs(expected).max()
    # Unrounded inputs leave the 16-bit cache as the only difference; then 16 bits, then 8.
    for activations, tolerance in (("float32", 2e-3), ("bf16", 3e-2), ("int8", 8e-2)):
        ours = ReferenceBackend(tmp_path, activations=activations).forward(chain(tokens)).logits
        assert np.abs(ours - expected).max() < tolerance * scale


def test_taps_are_what_enters_the_layers(tmp_path, tiny):
    theirs = transformers_model(tiny, tmp_path, "llama")
    tokens = np.random.default_rng(0).integers(0, 263, 9)
    with torch.no_grad():
        hidden = theirs.model(torch.from_numpy(tokens)[None], output_hidden_states=True).hidden_states
    ours = ReferenceBackend(tmp_path, activations="float32").forward(chain(tokens), taps=(0, 1, 2)).taps
    assert ours[0].shape == (9, 96)
    for layer in (0, 1):  # their last entry is behind the final norm
        assert np.allclose(ours[layer], hidden[layer][0].numpy(), atol=2e-3 * float(hidden[layer].abs().max()))
    assert not np.array_equal(ours[1], ours[2])


def test_prefill_equals_decoding_one_by_one_bit_for_bit(backend):
    tokens = np.random.default_rng(1).integers(0, 263, 75)
    backend.reset(0)
    whole = backend.forward(chain(tokens)).logits
    assert np.array_equal(whole, decode_one_by_one(backend, tokens))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
@settings(max_examples=10, deadline=None)
def test_any_chunking_of_the_prefill_gives_the_same_bits(backend, sizes):
    tokens = np.random.default_rng(2).integers(0, 263, sum(sizes))[:120]
    backend.reset(0)
    whole = backend.forward(chain(tokens)).logits
    backend.reset(0)
    parts, position = [], 0
    for size in sizes:
        part = tokens[position : position + size]
        if len(part) == 0:
            break
        parts.append(backend.forward(chain(part, position)).logits)
        backend.keep(0, range(len(part)))
        position += len(part)
    assert np.array_equal(np.concatenate(parts), whole)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_tree_rows_equal_their_path_decoded_alone_bit_for_bit(backend, seed):
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 263, int(rng.integers(1, 40)))
    rows, paths = [], []
    for index in range(12):
        parent = int(rng.integers(-1, index))
        before = paths[parent] if parent >= 0 else []
        token = int(rng.integers(0, 263))
        rows.append(Row(token, len(prompt) + len(before), 0, parent))
        paths.append([*before, index])
    backend.reset(0)
    backend.forward(chain(prompt))
    backend.keep(0, range(len(prompt)))
    tree = backend.forward(rows).logits
    for index in rng.choice(12, 4, replace=False):
        tokens = [*prompt, *(rows[i].token for i in paths[index])]
        assert np.array_equal(decode_one_by_one(backend, tokens)[-1], tree[index])


def test_sequences_in_one_call_do_not_touch_each_other(backend, monkeypatch):
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, 263, n) for n in (11, 30, 1)]
    alone = [decode_one_by_one(backend, text) for text in texts]
    mixed, where = [], []
    cursors = [0, 0, 0]
    last = [-1, -1, -1]
    while any(c < len(t) for c, t in zip(cursors, texts, strict=True)):
        sequence = int(rng.choice([s for s in range(3) if cursors[s] < len(texts[s])]))
        where.append((sequence, cursors[sequence]))
        mixed.append(Row(int(texts[sequence][cursors[sequence]]), cursors[sequence], sequence + 5, last[sequence]))
        last[sequence] = len(mixed) - 1
        cursors[sequence] += 1
    monkeypatch.setattr(model_module, "ROWS_AT_ONCE", 7)
    logits = backend.forward(mixed).logits
    for row, (sequence, position) in enumerate(where):
        assert np.array_equal(logits[row], alone[sequence][position])
    for sequence in (5, 6, 7):
        backend.reset(sequence)


def test_kept_paths_continue_and_dropped_rows_leave_no_trace(backend):
    tokens = [5, 9, 33, 71, 8]
    expected = decode_one_by_one(backend, tokens)
    backend.reset(0)
    # 5 → {100, 9 → {7, 33}}: keep 5, 9, 33, whose cache slots are not neighbours.
    tree = [Row(5, 0), Row(100, 1, 0, 0), Row(9, 1, 0, 0), Row(7, 2, 0, 2), Row(33, 2, 0, 2)]
    logits = backend.forward(tree).logits
    assert np.array_equal(logits[[0, 2, 4]], expected[:3])
    backend.keep(0, [0, 2, 4])
    assert backend.length(0) == 3
    assert np.array_equal(backend.forward(chain(tokens[3:], 3)).logits, expected[3:])
    # Not kept: the next forward starts from the same three tokens.
    assert backend.length(0) == 3
    assert np.array_equal(backend.forward(chain(tokens[3:], 3)).logits, expected[3:])


def test_logits_only_where_asked(backend):
    backend.reset(0)
    tokens = [4, 5, 6, 7]
    whole = backend.forward(chain(tokens)).logits
    assert np.array_equal(backend.forward(chain(tokens), logit_rows=[3, 1]).logits, whole[[3, 1]])
    assert backend.forward(chain(tokens), logit_rows=[]).logits.shape == (0, 263)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "at least one row"),
        ([Row(263, 0)], "token=263"),
        ([Row(-1, 0)], "token=-1"),
        ([Row(1, 1)], "position=1"),
        ([Row(1, 0), Row(1, 1, 0, 1)], "parent=1"),
        ([Row(1, 0), Row(1, 2, 0, 0)], "position=2"),
        ([Row(1, 0), Row(1, 1, 1, 0)], "another sequence"),
        (chain(range(129)), "context of 128"),
    ],
)
def test_rows_that_do_not_fit_are_refused(backend, rows, reason):
    backend.reset(0)
    with pytest.raises(ValueError, match=reason):
        backend.forward(rows)


def test_only_a_path_of_the_last_call_can_be_kept(backend):
    backend.reset(0)
    backend.forward([Row(1, 0), Row(2, 1, 0, 0), Row(3, 1, 0, 0)])
    for path in ([1], [0, 2, 1], [0, 9]):
        with pytest.raises(ValueError, match="keep"):
            backend.keep(0, path)
    with pytest.raises(ValueError, match="sequence 77"):
        backend.keep(77, [0])


@pytest.mark.parametrize(
    ("arguments", "reason"), [({"taps": [3]}, "layer 3"), ({"logit_rows": [1]}, "there are 1 rows")]
)
def test_requests_that_do_not_fit_are_refused(backend, arguments, reason):
    backend.reset(0)
    with pytest.raises(ValueError, match=reason):
        backend.forward([Row(1, 0)], **arguments)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"intermediate_size": 168}, "intermediate_size=168"), ({"head_dim": 8, "num_attention_heads": 12}, "head_dim=8")],
)
def test_shapes_without_whole_groups_and_lanes_are_refused(tmp_path, tiny, changes, reason):
    directory = tiny.model(tmp_path / "m", tiny.config(**changes))
    with pytest.raises(ValueError, match=reason):
        ReferenceBackend(directory)


def test_an_unknown_activation_type_is_refused(tmp_path, tiny):
    directory = ModelDirectory.open(tiny.model(tmp_path / "m", tiny.config()))
    with pytest.raises(ValueError, match="fp8"):
        ReferenceBackend(directory, activations="fp8")
