"""llama.cpp behind a pipe: one JSON command a line in, one JSON answer a line out.

Runs in an environment of its own that has llama-cpp-python (`pip install llama-cpp-python`, compiled natively); started
by benchmarks.peers, never imported by the project. Between commands it waits without using the processor.
"""

import ctypes
import json
import math
import sys
import time

import llama_cpp as lib
import numpy as np


@lib.llama_log_callback
def _silent(_level, _text, _data):
    pass


class Peer:
    """One model and one context of llama.cpp."""

    def __init__(self, model: str, threads: int, context_length: int):
        self.model = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        params = lib.llama_context_default_params()
        params.n_ctx = context_length
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = 16
        params.kv_unified = True
        self.context = lib.llama_init_from_model(self.model, params)
        self.memory = lib.llama_get_memory(self.context)
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def forward(self, tokens, start, sequences=None, want_all=True, sequence=0):
        """Seconds of one call: tokens in a row in `sequence`, or one at position `start` in each of `sequences`."""
        batch = lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = start + (i if sequences is None else 0)
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence if sequences is None else sequences[i]
            batch.logits[i] = 1 if want_all or i == len(tokens) - 1 else 0
        begin = time.perf_counter()
        status = lib.llama_decode(self.context, batch)
        lib.llama_synchronize(self.context)
        spent = time.perf_counter() - begin
        lib.llama_batch_free(batch)
        if status:
            raise SystemExit(f"llama_decode returned {status}")
        return spent

    def forget(self, start, sequence=0):
        lib.llama_memory_seq_rm(self.memory, sequence, start, -1)

    def fill(self, length, sequence=0):
        self.forget(0, sequence)
        for begin in range(0, length, 512):
            tokens = [100 + i % 1000 for i in range(begin, min(begin + 512, length))]
            self.forward(tokens, begin, want_all=False, sequence=sequence)

    def logits(self, index):
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, index), shape=(self.vocab_size,))

    def rows(self, count, context, repeats):
        times = []
        for _ in range(repeats):
            self.forget(context)
            times.append(self.forward([100 + i for i in range(count)], context) * 1e3)
        return times

    def decode(self, context, steps):
        self.forget(context)
        token, spent = 100, 0.0
        for step in range(steps):
            spent += self.forward([token], context + step)
            begin = time.perf_counter()
            token = int(self.logits(-1).argmax())
            spent += time.perf_counter() - begin
        return steps / spent

    def prefill(self, count, repeats):
        times = []
        for _ in range(repeats):
            self.forget(0)
            times.append(self.forward([100 + i % 1000 for i in range(count)], 0, want_all=False) * 1e3)
        return times

    def together(self, count, context, repeats):
        for sequence in range(count):
            self.fill(context, sequence)
        times = []
        for _ in range(repeats):
            for sequence in range(count):
                self.forget(context, sequence)
            times.append(self.forward([100] * count, context, list(range(count))) * 1e3)
        return times

    def perplexity(self, sequences):
        nll, count = 0.0, 0
        for ids in sequences:
            self.forget(0)
            self.forward(ids, 0)
            for i, target in enumerate(ids[1:]):
                z = self.logits(i).astype(np.float64)
                nll += math.log(np.exp(z - z.max()).sum()) + z.max() - z[target]
                count += 1
        return math.exp(nll / count)


def to_q4_0(source: str, out: str, threads: int) -> None:
    how = lib.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize, how.nthread = lib.LLAMA_FTYPE_MOSTLY_Q4_0, True, threads
    if lib.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(how)) != 0:
        raise SystemExit(f"llama.cpp cannot make a Q4_0 file of {source}")


def main() -> None:
    lib.llama_log_set(_silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    peer = None
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        if name == "quantize":
            answer = to_q4_0(**command)
        elif name == "open":
            peer, answer = Peer(**command), lib.llama_print_system_info().decode()
        else:
            answer = getattr(peer, name)(**command)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
