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

    def answer(self, tokens, count, ends):
        """Greedy decoding: {"tokens", "prefill_s", "decode_s"}."""
        return self.speculate(tokens, count, ends, lambda text, room: [])

    def speculate(self, tokens, count, ends, draft):
        """Greedy decoding where draft(text, room) proposes what follows; rows are verified in one call, as llama.cpp's
        own speculative example does."""
        self.forget(0)
        begin = time.perf_counter()
        for start in range(0, len(tokens), 512):
            self.forward(tokens[start : start + 512], start, want_all=False)
        text = [*tokens, int(self.logits(-1).argmax())]
        prefilled, rounds, drafted = time.perf_counter(), 0, 0
        limit = len(tokens) + count
        while len(text) < limit and text[-1] not in ends:
            proposed = draft(text, limit - len(text) - 1)
            self.forget(len(text) - 1)
            self.forward([text[-1], *proposed], len(text) - 1)
            rounds, drafted = rounds + 1, drafted + len(proposed)
            for i in range(len(proposed) + 1):
                text.append(int(self.logits(i).argmax()))
                if text[-1] in ends or i == len(proposed) or text[-1] != proposed[i]:
                    break
        spent = time.perf_counter() - prefilled
        answer = text[len(tokens) :]
        return {
            "tokens": answer,
            "prefill_s": prefilled - begin,
            "decode_s": spent,
            "rounds": rounds,
            "drafted": drafted,
        }

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


class NgramDrafts:
    """What followed the last occurrence of the text's last n tokens, for the largest n of 4, 3, 2 that occurred."""

    def __init__(self, num_drafted):
        self.num_drafted, self.followers, self.num_read = num_drafted, {}, 1

    def __call__(self, text, room):
        for place in range(self.num_read, len(text)):
            for length in (4, 3, 2):
                if place >= length:
                    self.followers[tuple(text[place - length : place])] = place
        self.num_read = len(text)
        for length in (4, 3, 2):
            place = self.followers.get(tuple(text[-length:]))
            if place is not None:
                return text[place : place + min(self.num_drafted, room)]
        return []


class ModelDrafts:
    """Greedy tokens of a smaller model, as long as it is sure enough of each."""

    def __init__(self, model, num_drafted, p_min):
        self.model, self.num_drafted, self.p_min = model, num_drafted, p_min
        self.cached = []

    def __call__(self, text, room):
        shared = next((i for i, (a, b) in enumerate(zip(self.cached, text, strict=False)) if a != b), len(self.cached))
        shared = min(shared, len(text) - 1)
        self.model.forget(shared)
        self.cached, pending, drafted = text[:shared], text[shared:], []
        while len(drafted) < min(self.num_drafted, room):
            for start in range(0, len(pending), 512):
                part = pending[start : start + 512]
                self.model.forward(part, len(self.cached), want_all=False)
                self.cached = self.cached + part
            logits = self.model.logits(-1)
            best = int(logits.argmax())
            if self.p_min > 0 and 1.0 / float(np.exp(logits - logits[best]).sum()) < self.p_min:
                break
            drafted.append(best)
            pending = [best]
        return drafted


def to_q4_0(source: str, out: str, threads: int) -> None:
    how = lib.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize, how.nthread = lib.LLAMA_FTYPE_MOSTLY_Q4_0, True, threads
    if lib.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(how)) != 0:
        raise SystemExit(f"llama.cpp cannot make a Q4_0 file of {source}")


def main() -> None:
    lib.llama_log_set(_silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    peer = drafter = None
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        if name == "quantize":
            answer = to_q4_0(**command)
        elif name == "open":
            peer, answer = Peer(**command), lib.llama_print_system_info().decode()
        elif name == "open_drafter":
            drafter, answer = Peer(**command), None
        elif name == "answer_by_ngrams":
            answer = peer.speculate(draft=NgramDrafts(command.pop("num_drafted")), **command)
        elif name == "answer_by_model":
            drafts = ModelDrafts(drafter, command.pop("num_drafted"), command.pop("p_min"))
            drafter.forget(0)
            answer = peer.speculate(draft=drafts, **command)
        else:
            answer = getattr(peer, name)(**command)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
