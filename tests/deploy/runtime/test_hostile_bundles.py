"""Damaged and hostile bundles, from manifest to native backend: a refusal in a sentence, or a model that runs.

Digests in the manifest are recomputed, so that what lies behind them is what is tested.
"""

import copy
import hashlib
import json
import os
import select
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deploy.formats.safetensors_file import MAX_HEADER_BYTES
from deploy.runtime.backend import Row
from deploy.runtime.cpu_backend import CpuBackend

ROOT = Path(__file__).resolve().parents[3]
SLOWER = 4 if "ASAN_OPTIONS" in os.environ else 1  # a sanitized library; test_sanitizers.py
SECONDS, PEAK_MB = 20 * SLOWER, 700 * SLOWER
WEIGHTS, CONFIG = "target/model.safetensors", "target/config.json"
HOSTILE = (
    0, -1, 1, 3, 15, 16, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 64, 10**400, 0.5, -0.0, 1e-320,
    1e308, float("inf"), float("nan"), "", "x", "F32", "F64", "I8", "\0\n", None, True, [], {}, [0], [1 << 40, 1 << 40],
    {"a": 1}, [[[]]],
)  # fmt: skip


class Worker:
    """The process that opens bundles; started again when it dies."""

    def __init__(self):
        self.start()

    def start(self):
        command = [sys.executable, str(Path(__file__).with_name("hostile_worker.py"))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def stop(self):
        self.process.kill()
        self.process.communicate()

    def outcome(self, directory):
        """What came of it: {"kind", "text", "peak_mb"}."""
        self.process.stdin.write(f"{directory}\n".encode())
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], SECONDS)[0]:
            self.stop()
            self.start()
            return {"kind": "hang", "text": f"no answer in {SECONDS} s", "peak_mb": "0"}
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.start()
            return {"kind": "crash", "text": f"exit status {code}", "peak_mb": "0"}
        return json.loads(line)


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def originals(tmp_path_factory, tiny):
    """Small bundles of every form of weights: name of file → bytes."""
    place = tmp_path_factory.mktemp("originals")
    small = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    made = []
    for index, (config, quantized) in enumerate(
        [
            (tiny.config(**small), tiny.Quantized()),
            (tiny.config("qwen3", **small, tie_word_embeddings=False), tiny.Quantized(form="minimum")),
            (tiny.config("qwen2", **small), tiny.Quantized(8, 32, "symmetric")),
            (tiny.config("mistral", **small), None),
            (tiny.config(**small), tiny.MIXED),
        ]
    ):
        directory = tiny.bundle(place / str(index), tiny.Quantized(form="minimum"))
        tiny.model(directory / "target", config, quantized, seed=index)
        files = {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        made.append(files)
    return made


def write(directory, files):
    """The bundle of `files`, with a manifest whose digests are theirs."""
    for name, data in files.items():
        if name == "manifest.json":
            continue
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    try:
        manifest = json.loads(files["manifest.json"])
        for name, record in manifest["files"].items():
            if name in files:
                record |= {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        data = json.dumps(manifest).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        data = files["manifest.json"]
    (directory / "manifest.json").write_bytes(data)
    return directory


def split(data):
    """Header object and data bytes of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, data, pad=0):
    text = json.dumps(header).encode() + b" " * pad
    return struct.pack("<Q", len(text)) + text + data


def pick(rng, values):
    return values[int(rng.integers(len(values)))]


def places(value, at=()):
    """Every place in a JSON value, as the keys that lead to it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*at, key)
        yield from places(item, (*at, key))


def replace_at_random(rng, value):
    """One place of a JSON value made hostile, removed, or moved elsewhere."""
    *way, last = pick(rng, list(places(value)))
    for key in way:
        value = value[key]
    kind = rng.integers(6)
    if kind == 0:
        del value[last]
    elif kind == 1 and isinstance(value, dict):
        value[pick(rng, ("new", "__metadata__", "lm_head.weight", "model.norm.weight"))] = value.pop(last)
    elif kind == 2 and isinstance(value[last], int) and not isinstance(value[last], bool):
        value[last] += int(pick(rng, (-1, 1, 2, 8, 1 << 31, -(1 << 31), 1 << 62)))
    elif kind == 3 and isinstance(value[last], list):
        value[last] = value[last][::-1]
    else:
        value[last] = copy.deepcopy(pick(rng, HOSTILE))


def change_json(name):
    def change(rng, files):
        value = json.loads(files[name])
        for _ in range(int(rng.integers(1, 3))):
            replace_at_random(rng, value)
        files[name] = json.dumps(value).encode()

    return change


def change_header(rng, files):
    header, data = split(files[WEIGHTS])
    for _ in range(int(rng.integers(1, 3))):
        replace_at_random(rng, header)
    files[WEIGHTS] = join(header, data)


def change_dtype_or_shape(rng, files):
    """Sizes that still tile the file, in another type or shape."""
    header, data = split(files[WEIGHTS])
    entry = header[pick(rng, [name for name in header if name != "__metadata__"])]
    kind = rng.integers(3)
    if kind == 0:
        same = {
            "BF16": ("F16", "I16"),
            "F16": ("BF16", "U16"),
            "I32": ("F32", "U32"),
            "I64": ("F64", "U64"),
            "I8": ("U8", "BOOL"),
        }
        entry["dtype"] = pick(rng, same.get(entry["dtype"], ("I8",)))
    elif kind == 1:
        entry["shape"] = entry["shape"][::-1]
    else:
        entry["shape"] = [1, *entry["shape"]]
    files[WEIGHTS] = join(header, data)


def swap_tensors(rng, files):
    header, data = split(files[WEIGHTS])
    names = [name for name in header if name != "__metadata__"]
    first, second = (pick(rng, names) for _ in range(2))
    header[first], header[second] = header[second], header[first]
    files[WEIGHTS] = join(header, data)


def empty_a_tensor(rng, files):
    """No elements, and the data cut out or left to the others."""
    header, data = split(files[WEIGHTS])
    name = pick(rng, [name for name in header if name != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    header[name] |= {"shape": [0, *header[name]["shape"][1:]], "data_offsets": [begin, begin]}
    for entry in header.values():
        if isinstance(entry.get("data_offsets"), list) and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [at - (end - begin) for at in entry["data_offsets"]]
    files[WEIGHTS] = join(header, data[:begin] + data[end:])


def change_header_length(rng, files):
    length = pick(rng, (0, 1, 7, 8, len(files[WEIGHTS]), 99_999_999, 1 << 31, 1 << 62, (1 << 64) - 1, (1 << 64) - 8))
    files[WEIGHTS] = struct.pack("<Q", length) + files[WEIGHTS][8:]


def misalign(rng, files):
    header, data = split(files[WEIGHTS])
    files[WEIGHTS] = join(header, data, int(rng.integers(1, 8)))


def change_values(rng, files):
    """Codes, scales, zero points, norms of any bits: infinities and NaN among them."""
    header, data = split(files[WEIGHTS])
    data = bytearray(data)
    kind = rng.integers(3)
    entry = header[pick(rng, [name for name in header if name != "__metadata__"])]
    begin, end = entry["data_offsets"]
    if kind == 0:
        data[begin:end] = rng.bytes(end - begin)
    elif kind == 1:
        data[begin:end] = pick(rng, (b"\xff", b"\0", b"\x7f", b"\x80")) * (end - begin)
    else:
        for at in rng.integers(0, len(data), 20):
            data[at] ^= 1 << int(rng.integers(8))
    files[WEIGHTS] = join(header, bytes(data))


def truncate(rng, files):
    name = pick(rng, list(files))
    files[name] = files[name][: int(rng.integers(len(files[name])))]


def flip_bits(rng, files):
    name = pick(rng, [WEIGHTS, WEIGHTS, CONFIG, "tokenizer.json", "tokenizer_config.json", "manifest.json"])
    data = bytearray(files[name])
    reach = min(len(data), 4000) if name == WEIGHTS else len(data)
    for at in rng.integers(0, reach, int(rng.integers(1, 4))):
        data[at] ^= 1 << int(rng.integers(8))
    files[name] = bytes(data)


def append(rng, files):
    name = pick(rng, list(files))
    files[name] += rng.bytes(int(rng.integers(1, 5000)))


def remove(rng, files):
    del files[pick(rng, [name for name in files if name != "manifest.json"])]


def nest_deeply(rng, files):
    name = pick(rng, (CONFIG, "tokenizer_config.json", "tokenizer.json", "manifest.json"))
    files[name] = b"[" * 200_000


CHANGES = (
    truncate, flip_bits, append, remove, nest_deeply, change_header, change_header, change_dtype_or_shape, swap_tensors,
    empty_a_tensor, change_header_length, misalign, change_values, change_values, change_json(CONFIG),
    change_json(CONFIG), change_json("tokenizer_config.json"), change_json("manifest.json"),
)  # fmt: skip


def survive(worker, originals, place, seeds):
    """Outcomes by kind; fails on the first that is neither a refusal nor an answer."""
    kinds = {"answer": 0, "refusal": 0}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        files = dict(originals[seed % len(originals)])
        change = CHANGES[seed // len(originals) % len(CHANGES)]
        change(rng, files)
        found = worker.outcome(write(place / str(seed), files))
        assert found["kind"] in kinds, f"seed {seed}, {change}: {found}"
        assert found["text"].strip(), f"seed {seed}: a refusal without a word"
        assert int(found["peak_mb"]) < PEAK_MB, f"seed {seed}: {found}"
        kinds[found["kind"]] += 1
    return kinds


def test_the_originals_answer(worker, originals, tmp_path):
    for index, files in enumerate(originals):
        assert worker.outcome(write(tmp_path / str(index), files))["kind"] == "answer"


def test_damaged_bundles_are_refused_or_run(worker, originals, tmp_path):
    kinds = survive(worker, originals, tmp_path, range(180))
    assert kinds["refusal"] > kinds["answer"] > 5


@pytest.mark.parametrize("piece", [b"[],", b'{"a":0},', b'"",', b"1.5,"])
def test_a_header_of_millions_of_values_takes_no_gigabytes(worker, originals, tmp_path, piece):
    text = b'{"x":[' + piece * (MAX_HEADER_BYTES // len(piece) - 4) + b"0]}"
    files = {**originals[0], WEIGHTS: struct.pack("<Q", len(text)) + text}
    found = worker.outcome(write(tmp_path, files))
    assert found["kind"] == "refusal"
    assert int(found["peak_mb"]) < PEAK_MB


@pytest.mark.slow
def test_many_damaged_bundles_are_refused_or_run(worker, originals, tmp_path):
    start = int(os.environ.get("FUZZ_SEED", time.time_ns() % (1 << 40)))
    survive(worker, originals, tmp_path, range(start, start + 3000))


def test_unaligned_tensors_give_the_same_tokens(originals, tmp_path):
    """A header of odd length puts every tensor at an odd address."""
    rows = [Row(token, token, 0, token - 1) for token in range(20)]
    for index, files in enumerate(originals):
        before = write(tmp_path / f"{index}", files)
        header, data = split(files[WEIGHTS])
        pad = (1 - len(json.dumps(header))) % 8  # the data begins one byte off
        after = write(tmp_path / f"{index}-odd", {**files, WEIGHTS: join(header, data, pad)})
        expected = CpuBackend(before / "target").forward(rows).logits
        np.testing.assert_array_equal(CpuBackend(after / "target").forward(rows).logits, expected)
