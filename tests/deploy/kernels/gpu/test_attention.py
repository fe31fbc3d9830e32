from dataclasses import replace

import numpy as np
import pytest
import torch

from deploy.kernels.gpu import attention as module
from deploy.kernels.gpu.attention import attention, attention_reference, config_for
from deploy.kernels.reference.attention import attend

SHAPES = [(9, 3, 64), (12, 2, 128), (4, 4, 32), (6, 2, 16), (2, 1, 80)]
MAX_LENGTH, NUM_SLOTS = 112, 250
SMALL_PARTS = {head_dim: replace(config_for(head_dim), part=64) for _, _, head_dim in SHAPES}


class Text:
    """Sequences of random keys and values, their slots strewn over the cache, and rows to attend from."""

    def __init__(self, shape, device, seed=0, num_sequences=2):
        self.heads, self.kv_heads, self.head_dim = shape
        self.device, self.rng = device, np.random.default_rng(seed)
        size = (2, NUM_SLOTS, self.kv_heads, self.head_dim)
        self.k, self.v = (self.tensor(cache, torch.float16) for cache in self.rng.standard_normal(size))
        slots = self.rng.permutation(NUM_SLOTS)
        self.slot_table = slots[: num_sequences * MAX_LENGTH].reshape(num_sequences, MAX_LENGTH)
        self.free = slots[num_sequences * MAX_LENGTH :].tolist()
        self.rows = []  # (query, sequence, cached length, slots of ancestors and itself)

    def tensor(self, values, dtype=torch.int32):
        return torch.from_numpy(np.asarray(values)).to(self.device, dtype)

    def add(self, sequence, cached, parent=None):
        """A row behind `cached` positions, or behind row `parent` of this call; returns its index."""
        query = self.rng.standard_normal((self.heads, self.head_dim)).astype(np.float16)
        before = [] if parent is None else self.rows[parent][3]
        self.rows.append((query, sequence, cached, [*before, self.free.pop()]))
        return len(self.rows) - 1

    def arguments(self, rows=None, width=None):
        rows = self.rows if rows is None else rows
        width = width or max(len(own) for *_, own in rows)
        queries, sequences, cached, own = zip(*rows, strict=True)
        ancestors = [slots + [-1] * (width - len(slots)) for slots in own]
        q = self.tensor(np.stack(queries), torch.float16)
        tables = (self.tensor(x) for x in (self.slot_table, sequences, cached, ancestors))
        return q, self.k, self.v, *tables

    def alone(self, index):
        """Arguments for row `index` with its ancestors in the cache: what decoding it behind its path computes."""
        query, sequence, cached, own = self.rows[index]
        slot_table = self.slot_table.copy()
        slot_table[sequence, cached : cached + len(own) - 1] = own[:-1]
        arguments = self.arguments([(query, sequence, cached + len(own) - 1, own[-1:])])
        return *arguments[:3], self.tensor(slot_table), *arguments[4:]


def tree(text):
    """Two sequences: a tree across the border of a block and a part, a chain from nothing, rows alone."""
    root = text.add(0, 62)
    first, _ = text.add(0, 62, root), text.add(0, 62, root)
    second = text.add(0, 62, first)
    text.add(0, 62, second)
    third = text.add(1, 0, text.add(1, 0))
    text.add(1, 0, third)
    text.add(1, 31)
    text.add(1, 100)
    return text


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_near_its_definition(device, shape):
    text = tree(Text(shape, device))
    arguments = text.arguments()
    ours = attention(*arguments, config=SMALL_PARTS[shape[2]])
    torch.testing.assert_close(ours, attention_reference(*arguments), rtol=2e-3, atol=1e-3)


def test_in_fp32_it_is_near_the_page_on_numerics(device):
    text = tree(Text(SHAPES[0], device))
    arguments = text.arguments()
    out = torch.empty(arguments[0].shape, dtype=torch.float32, device=device)
    attention(*arguments, out=out)
    paths = np.zeros((len(text.rows), MAX_LENGTH + 8), dtype=np.int64)
    lengths = np.zeros(len(text.rows), dtype=np.int64)
    for row, (_, sequence, cached, own) in enumerate(text.rows):
        path = [*text.slot_table[sequence, :cached], *own]
        paths[row, : len(path)], lengths[row] = path, len(path)
    queries = np.stack([row[0] for row in text.rows]).astype(np.float32)
    expected = attend(queries, text.k.cpu().numpy(), text.v.cpu().numpy(), paths, lengths)
    assert np.abs(out.cpu().numpy().reshape(expected.shape) - expected).max() < 5e-4


@pytest.mark.parametrize(("shape", "is_split"), [(SHAPES[0], True), (SHAPES[0], False), (SHAPES[1], True)])
def test_a_row_of_a_tree_equals_the_row_decoded_behind_its_path_bit_for_bit(device, shape, is_split, monkeypatch):
    if not is_split:
        monkeypatch.setattr(module, "MAX_ROWS_SPLIT", 0)
    text = tree(Text(shape, device))
    together = attention(*text.arguments(), config=SMALL_PARTS[shape[2]])
    for index in range(len(text.rows)):
        assert torch.equal(attention(*text.alone(index), config=SMALL_PARTS[shape[2]])[0], together[index])


def test_merging_in_a_second_kernel_and_at_once_are_the_same_bits(device, monkeypatch):
    arguments = tree(Text(SHAPES[0], device)).arguments()
    in_two = attention(*arguments, config=SMALL_PARTS[64])
    monkeypatch.setattr(module, "MAX_ROWS_SPLIT", 0)
    assert torch.equal(attention(*arguments, config=SMALL_PARTS[64]), in_two)


def test_parts_differ_from_the_whole_by_rounding_alone(device):
    arguments = tree(Text(SHAPES[0], device)).arguments()
    whole, parts = attention(*arguments), attention(*arguments, config=SMALL_PARTS[64])
    assert not torch.equal(whole, parts)
    torch.testing.assert_close(whole, parts, rtol=2e-3, atol=1e-3)


def test_a_path_within_the_first_part_does_not_notice_parts(device):
    text = Text(SHAPES[0], device)
    text.add(0, 63)
    arguments = text.arguments()
    assert torch.equal(attention(*arguments), attention(*arguments, config=SMALL_PARTS[64]))


def test_a_row_is_the_same_whatever_is_beside_it(device):
    text = tree(Text(SHAPES[0], device))
    together = attention(*text.arguments())
    for index, row in enumerate(text.rows):
        assert torch.equal(attention(*text.arguments([row], width=9))[0], together[index])


def test_a_row_is_the_same_in_prefill_and_in_a_bucket(device, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS_SPLIT", 8)
    text, row = Text(SHAPES[4], device), None
    for _ in range(11):
        row = text.add(0, 60, row)
    together = attention(*text.arguments(), config=SMALL_PARTS[80])
    for index in (0, 4, 10):
        alone = text.arguments([text.rows[index]])
        assert torch.equal(attention(*alone, config=SMALL_PARTS[80])[0], together[index])


def test_a_padding_row_gives_zeros_and_disturbs_no_other(device):
    text = tree(Text(SHAPES[0], device))
    expected = attention(*text.arguments())
    padding = (np.full((9, 64), np.nan, dtype=np.float16), 0, 77, [])
    padded = attention(*text.arguments([padding, *text.rows, padding]))
    assert torch.equal(padded[1:-1], expected)
    assert not padded[0].any()
    assert not padded[-1].any()


def test_large_scores_do_not_overflow(device):
    text = Text(SHAPES[2], device)
    text.add(0, 40)
    q, *rest = text.arguments()
    torch.testing.assert_close(attention(q * 300, *rest), attention_reference(q * 300, *rest), rtol=2e-3, atol=1e-3)


def test_a_head_larger_than_the_table_is_refused():
    with pytest.raises(ValueError, match="head_dim=512"):
        config_for(512)
