import numpy as np
import torch
import triton
import triton.language as tl

from deploy.kernels.gpu.noise import gumbel_noise, noise_words
from deploy.kernels.gpu.sampling_rows import NUM_WORDS, SamplingRows
from deploy.runtime.sampling import SamplingParams, philox4x32
from deploy.runtime.sampling import gumbel_noise as numpy_noise

ROWS = [(0, 0, 0), (7, 3, 11), (2**31, 2**40 + 5, 2**64 - 1), (8191, 2**32 - 1, 2**63)]  # position, index, seed
TOKENS = 1 << 10


@triton.jit
def _noise_kernel(tokens_ptr, table_ptr, words_ptr, noise_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tokens = tl.load(tokens_ptr + index)
    row_ptr = table_ptr + tl.program_id(0) * NUM_WORDS
    out = tl.program_id(0) * BLOCK + index
    tl.store(words_ptr + out, noise_words(tokens, row_ptr).to(tl.int32, bitcast=True))
    tl.store(noise_ptr + out, gumbel_noise(tokens, row_ptr))


def run(tokens, device):
    positions, indices, seeds = zip(*ROWS, strict=True)
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in seeds]
    table = SamplingRows.of(params, indices, positions, device).table
    words = torch.empty(len(ROWS), TOKENS, dtype=torch.int32, device=device)
    noise = torch.empty(len(ROWS), TOKENS, dtype=torch.float32, device=device)
    on_device = torch.from_numpy(tokens.astype(np.int32)).to(device)
    _noise_kernel[(len(ROWS),)](on_device, table, words, noise, BLOCK=TOKENS, enable_fp_fusion=False)
    return words.cpu().numpy().view(np.uint32), noise.cpu().numpy()


def test_words_and_noise_are_those_of_the_definition_bit_for_bit(device):
    tokens = np.random.default_rng(0).integers(0, 200_000, TOKENS)
    words, noise = run(tokens, device)
    for row, (position, index, seed) in enumerate(ROWS):
        counters = np.empty((TOKENS, 4), dtype=np.uint32)
        counters[:, 0], counters[:, 1:] = tokens >> 2, (position, index & 0xFFFFFFFF, index >> 32)
        blocks = philox4x32(counters, (seed & 0xFFFFFFFF, seed >> 32))
        assert np.array_equal(words[row], blocks[np.arange(TOKENS), tokens & 3])
        expected = numpy_noise(tokens, position=position, sample_index=index, seed=seed)
        assert np.array_equal(noise[row], expected)
