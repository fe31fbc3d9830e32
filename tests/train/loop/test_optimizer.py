"""AdamW and Muon: which parameters each updates, how, and that a state is all they need to go on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from train.loop.model_state import load_trained_state, trained_state
from train.loop.optimizer import Optimizer, orthogonalize

TOKENS = torch.arange(7)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(7, 4)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4, bias=False)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.frozen = nn.Parameter(torch.rand(4, 4), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.lm_head(self.down(self.up(self.embed_tokens(ids)).tanh()))
        return hidden


def learn(model: Model, optimizer: Optimizer, learning_rate: float = 0.1) -> None:
    optimizer.zero_grad()
    (model(TOKENS) ** 2).sum().backward()
    optimizer.step(learning_rate)


def make(kind: str, weight_decay: float = 0.1) -> tuple[Model, Optimizer]:
    model = Model()
    return model, Optimizer(model, kind, betas=(0.9, 0.95), weight_decay=weight_decay)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_model_and_optimizer_go_on_from_their_states(kind: str) -> None:
    (one, first), (other, second) = make(kind), make(kind)
    learn(one, first)
    load_trained_state(other, trained_state(one))
    second.load_state(first.state())
    learn(one, first)
    learn(other, second)
    assert all(torch.equal(tensor, trained_state(other)[name]) for name, tensor in trained_state(one).items())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_trained_parameter_learns_and_no_other(kind: str) -> None:
    model, optimizer = make(kind)
    before = {name: value.clone() for name, value in model.named_parameters()}
    learn(model, optimizer)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == before.keys() - {"frozen"}


def test_muon_is_for_matrices_between_layers() -> None:
    _, adamw = make("adamw")
    model, muon = make("muon")
    for optimizer in (adamw, muon):
        learn(model, optimizer)
    assert {name for name in adamw.state() if name.endswith("momentum")} == set()
    assert {name.partition(":")[0] for name in muon.state() if name.endswith("momentum")} == {
        "up.weight",
        "down.weight",
    }
    assert {name.partition(":")[0] for name in muon.state() if name.endswith("exp_avg")} == {
        "embed_tokens.weight",
        "up.bias",
        "lm_head.weight",
    }


@pytest.mark.parametrize("shape", [(2, 5, 9), (1, 9, 5), (3, 4, 4)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    matrices = torch.randn(shape)
    found = orthogonalize(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inside = left.mT @ found @ right.mT
    values = inside.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(inside, torch.diag_embed(values), atol=1e-3, rtol=0)
    assert torch.allclose(orthogonalize(matrices.bfloat16()).float(), found, atol=0.05)


def test_updates_are_torchs_own() -> None:
    """Over several steps with gradients of their own, so that momentum shows."""
    model, optimizer = make("muon", weight_decay=0.3)
    peer = Model()
    matrices = ("up.weight", "down.weight")
    theirs = torch.optim.Muon(
        [peer.get_parameter(name) for name in matrices], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        torch.manual_seed(step)
        for name in matrices:
            gradient = torch.randn(model.get_parameter(name).shape)
            model.get_parameter(name).grad, peer.get_parameter(name).grad = gradient, gradient.clone()
        optimizer.step(0.1)
        theirs.step()
    for name in matrices:  # torch multiplies in bfloat16
        torch.testing.assert_close(model.get_parameter(name), peer.get_parameter(name), atol=3e-3, rtol=0)


def test_muon_multiplies_in_the_type_that_it_is_given() -> None:
    updated = []
    for dtype in (torch.float32, torch.bfloat16):
        model = Model()
        learn(model, Optimizer(model, "muon", betas=(0.9, 0.95), weight_decay=0.0, dtype=dtype))
        updated.append(model.up.weight.detach())
    assert not torch.equal(*updated)
    torch.testing.assert_close(*updated, atol=2e-3, rtol=0)


def test_muons_updates_have_orthogonal_directions_and_adamws_size() -> None:
    model, optimizer = make("muon", weight_decay=0.0)
    before = model.up.weight.detach().clone()
    learn(model, optimizer, learning_rate=0.1)
    update = model.up.weight.detach() - before
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.5 * singular.max()  # five Newton-Schulz steps come as near as this
    assert update.square().mean().sqrt() == pytest.approx(0.2 * 0.1, rel=0.4)


def test_a_matrix_decays_under_either_and_a_vector_under_none() -> None:
    for kind in ("adamw", "muon"):
        (plain, without), (decayed, with_decay) = make(kind, weight_decay=0.0), make(kind, weight_decay=0.5)
        learn(plain, without)
        learn(decayed, with_decay)
        initial = Model()
        for name in ("up.weight", "lm_head.weight"):
            shrunk = plain.get_parameter(name) - 0.1 * 0.5 * initial.get_parameter(name)
            torch.testing.assert_close(decayed.get_parameter(name), shrunk)
        assert torch.equal(plain.up.bias, decayed.up.bias)
