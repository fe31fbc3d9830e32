"""Rows to give to any backend, and what is said of what comes back."""

import numpy as np

from deploy.runtime.backend import Forward, Row

VOCABULARY = 263
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = [
    ("llama", {}, (4, 32, "asymmetric")),
    ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}, (4, 32, "minimum")),
    ("llama", {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 384}, (4, 128, "symmetric")),
    ("qwen2", {"tie_word_embeddings": False}, (8, 32, "asymmetric")),
    ("qwen2", {"num_key_value_heads": 1, "head_dim": 48, "num_attention_heads": 2}, (8, 32, "minimum")),
    ("qwen2", {"num_key_value_heads": 1, "head_dim": 48, "num_attention_heads": 2}, (4, 32, "minimum")),
    ("qwen3", {"head_dim": 32}, (4, 32, "symmetric")),
    ("qwen3", {"hidden_size": 64, "head_dim": 80, "num_attention_heads": 10, "num_key_value_heads": 2}, None),
    ("mistral", {"num_key_value_heads": 6, "tie_word_embeddings": False}, (4, 32, "asymmetric")),
    ("mistral", {"head_dim": 128, "num_attention_heads": 5, "num_key_value_heads": 1}, None),
]
"""(model type, what its config changes, packing or None for plain weights): every architecture and packing."""


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
        rows.append(Row(int(rng.integers(VOCABULARY)), position, sequence, -1 if parent < 0 else parent + offset))
    return rows


def interleaved_trees(rng, lengths, count):
    """Rows of a tree of `count` behind each sequence, mixed; lengths: sequence → what its cache holds."""
    rows = []
    for sequence, length in lengths.items():
        rows += random_tree(rng, count, length, sequence, len(rows))
    order = sorted(rng.permutation(len(rows)).tolist(), key=lambda i: rows[i].position)  # parents still first
    place = {old: new for new, old in enumerate(order)}
    return [
        Row(rows[i].token, rows[i].position, rows[i].sequence, place[rows[i].parent] if rows[i].parent >= 0 else -1)
        for i in order
    ]


def path_to(rows, index):
    path = []
    while index >= 0:
        path.insert(0, index)
        index = rows[index].parent
    return path


def keep_random_paths(backend, rng, length=100):
    """Rounds of random trees, of which chains and branches are kept; the tokens that they leave."""
    tokens = []
    backend.reset(0)
    while len(tokens) < length:
        rows = random_tree(rng, 12, len(tokens))
        path = path_to(rows, int(rng.integers(12)))
        path = path[: int(rng.integers(len(path) + 1))]
        backend.forward(rows, logit_rows=[])
        backend.keep(0, path)
        tokens += [rows[i].token for i in path]
        assert backend.length(0) == len(tokens)
    return tokens


def forward_in_chunks(backend, tokens, sizes):
    """Logits of a text that is computed and kept in chunks."""
    backend.reset(0)
    logits, begin = [], 0
    for size in sizes:
        logits.append(backend.forward(chain(tokens[begin : begin + size], begin)).logits)
        backend.keep(0, range(size))
        begin += size
    return np.concatenate(logits)


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


def assert_equal_forward(found, expected):
    np.testing.assert_array_equal(found.logits, expected.logits)
    assert sorted(found.taps) == sorted(expected.taps)
    for layer, values in expected.taps.items():
        np.testing.assert_array_equal(found.taps[layer], values)
