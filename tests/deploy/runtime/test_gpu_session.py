"""Sessions on the GPU backend, its operations in plain torch: every mode says what plain decoding says."""

import json

import numpy as np
import pytest

from deploy.cli import run
from deploy.formats.bundle import Bundle
from deploy.runtime import costs
from deploy.runtime.generation import GenerationOptions, Request
from deploy.runtime.gpu_backend import GpuBackend
from deploy.runtime.gpu_eagle import GpuEagle
from deploy.runtime.machine import describe_device
from deploy.runtime.modes import DrafterFactory, DraftOptions, available_modes
from deploy.runtime.sampling import SamplingParams
from deploy.runtime.session import Session
from tests.deploy.runtime.gpu_devices import pretend_gpu, torch_device

IDS = np.arange(0, 263, 3)
SAMPLING = [SamplingParams(), SamplingParams(0.9, top_p=0.95, repetition_penalty=1.1, seed=4)]
MODES = {
    "lookup": DraftOptions(),
    "chain": DraftOptions(depth=4),
    "eagle": DraftOptions(depth=4),
    "eagle-tree": DraftOptions(depth=4, width=3, num_nodes=9),
    "opt-tree": DraftOptions(depth=5, width=4, num_nodes=12),
    "cascade": DraftOptions(depth=3, width=2, num_nodes=5, min_draft_length=5),
    "cascade-lookup": DraftOptions(min_draft_length=4),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tiny):
    return Bundle.open(tiny.finish_hierarchy(tiny.hierarchy(tmp_path_factory.mktemp("bundles") / "b", IDS)))


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    pretend_gpu(monkeypatch, torch_device())
    monkeypatch.setattr(costs, "REPEATS", 1)


@pytest.fixture(scope="module")
def expected(bundle):
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend_gpu(monkeypatch, torch_device())
        session = Session.open(bundle, backend="gpu")
    prompt = session.encode_raw("One and one and one and")
    return {sampling: session.generate(prompt, GenerationOptions(14, sampling)).token_ids for sampling in SAMPLING}


@pytest.mark.parametrize("mode", MODES)
def test_a_modes_answers_are_plain_decodings(bundle, expected, mode):
    session = Session.open(bundle, mode=mode, drafts=MODES[mode], backend="gpu")
    assert isinstance(session.backend, GpuBackend)
    prompt = session.encode_raw("One and one and one and")
    for sampling in SAMPLING:
        found = session.generate(prompt, GenerationOptions(14, sampling))
        assert found.token_ids == expected[sampling]


def test_mode_auto_measures_and_answers_the_same(bundle, expected):
    session = Session.open(bundle, mode="auto", backend="auto")
    prompt = session.encode_raw("One and one and one and")
    assert session.generate(prompt, GenerationOptions(14, SAMPLING[0])).token_ids == expected[SAMPLING[0]]


def test_models_beside_the_target_are_on_the_gpu_too(bundle):
    target = Session.open(bundle, backend="gpu").backend
    factory = DrafterFactory(bundle, target, "gpu", None)
    assert isinstance(factory.language_model("intermediate"), GpuBackend)
    assert isinstance(factory.head("eagle-intermediate"), GpuEagle)
    assert set(MODES) < set(available_modes(bundle))


def test_many_requests_share_forwards(bundle):
    session = Session.open(bundle, backend="gpu")
    requests = [
        Request(session.encode_raw(text), GenerationOptions(6 + index, SamplingParams(index / 2, seed=index)))
        for index, text in enumerate(("Once", "Twice upon", "x" * 50, "y"))
    ]
    alone = [session.generate(request.prompt, request.options).token_ids for request in requests]
    found = dict(session.generate_many(requests, num_sequences=3))
    assert [found[index].token_ids for index in range(len(requests))] == alone


def test_costs_are_kept_for_the_gpu_and_at_the_edges_of_its_buckets(bundle):
    target = Session.open(bundle, backend="gpu").backend
    assert describe_device(target)["gpu"] == "none"
    counts = costs.measure_rows(target, context=16)
    assert list(counts) == [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64]


def test_the_command_line_takes_a_device(bundle, capsys):
    def generate(*more):
        arguments = ["generate", str(bundle.path), "-p", "Hi", "-n", "6", "--json", "--mode", "plain", *more]
        code = run(arguments)
        captured = capsys.readouterr()
        return code, captured

    gpu, auto = (json.loads(generate("--device", device)[1].out) for device in ("gpu", "auto"))
    assert gpu["token_ids"] == auto["token_ids"]
    assert generate("--device", "cpu")[0] == 0
    code, captured = generate("--device", "gpu", "--backend", "reference-int8")
    assert code == 2
    assert "--device gpu and --backend reference-int8 exclude each other" in captured.err
    assert generate("--device", "tpu")[0] == 2
