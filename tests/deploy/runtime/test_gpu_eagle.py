"""EAGLE heads on the GPU backend, its operations in plain torch, near the reference.

What every head does is tested in test_eagle.py.
"""

import pytest

from deploy.kernels.reference.eagle import ReferenceEagle
from deploy.kernels.reference.model import ReferenceBackend
from deploy.runtime.backends import open_head
from deploy.runtime.gpu_backend import GpuBackend
from deploy.runtime.gpu_eagle import GpuEagle
from tests.deploy.runtime.gpu_devices import torch_device
from tests.deploy.runtime.heads import HEADS, LIMITS, SAMPLING, Case


def paths(draft):
    """Path → score of every node."""
    found = []
    for token, parent, score in zip(draft.tokens, draft.parents, draft.scores, strict=True):
        found.append(((*(found[parent][0] if parent >= 0 else ()), token), score))
    return dict(found)


@pytest.mark.parametrize("name", HEADS)
def test_drafts_are_near_the_references(tmp_path, tiny, name):
    """Nearly all nodes are the same, and their scores near.

    A candidate at the edge of top-k or top-p may be another one, with other noise, which moves the scores beside it.
    """
    case = Case(tiny, tmp_path, name)
    reference = ReferenceEagle(case.head, ReferenceBackend(case.model, activations="bf16"))
    head = open_head(case.head, GpuBackend.open(case.model, torch_device()))
    assert isinstance(head, GpuEagle)
    num_same = num_nodes = 0
    for index, (limits, sampling) in enumerate((limits, sampling) for limits in LIMITS for sampling in SAMPLING):
        tokens, features = case.text(1 + index % 13, index)
        expected, found = (
            paths(each.draft(0, tokens, features, limits, sampling, index)) for each in (reference, head)
        )
        both = expected.keys() & found.keys()
        near = [path for path in both if abs(found[path] - expected[path]) < 0.1]
        num_same, num_nodes = num_same + len(near), num_nodes + len(expected)
        assert len(near) == len(both) or sampling.top_k
        assert head.length(0) == reference.length(0)
    assert num_same > 0.9 * num_nodes
