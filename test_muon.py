"""Muon against a naive loop over matrices, written from optax.contrib.muon 0.2.5, and its stacks against the shapes."""

import copy
import time

import pytest
import torch

from muon import Muon, orthogonalize

SHAPES = [
    (8, 64),
    (64, 64),
    (64, 356),
    (89, 89),
    (89, 32),
    (352, 64),
    (128, 1),
    (256, 256),
    (32, 32),
    (32, 32),
    (64,),
    (5,),
]


def naive_update(g, state, t, lr, decay, param):
    """One matrix or vector at a time, in the order of optax: moving average, bias correction, Nesterov, orthogonalize."""
    beta = 0.95 if g.ndim == 2 else 0.9
    state["mu"] = beta * state.get("mu", 0) + (1 - beta) * g
    hat = beta * state["mu"] / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
    if g.ndim == 1:
        state["nu"] = 0.999 * state.get("nu", 0) + 0.001 * g * g
        return param - lr * hat / ((state["nu"] / (1 - 0.999**t)).sqrt() + 1e-8)
    x = hat.T if hat.shape[0] > hat.shape[1] else hat
    x = x / (x.norm() + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if hat.shape[0] > hat.shape[1] else x
    return param - lr * (x * max(1, g.shape[1] / g.shape[0]) ** 0.5 + decay * param)


def test_steps_equal_the_naive_loop():
    torch.manual_seed(0)
    expected = [torch.randn(s, dtype=torch.float64) for s in SHAPES]
    params = [torch.nn.Parameter(p.clone()) for p in expected]
    states = [{} for _ in SHAPES]
    optimizer = Muon(params, lr=0.01, weight_decay=1e-3)
    for t in range(1, 6):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / t
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        if t == 3:  # state survives a round trip
            saved = optimizer.state_dict()
            optimizer = Muon(params, lr=1.0, weight_decay=1e-3)
            optimizer.load_state_dict(saved)
        expected = [naive_update(p.grad, s, t, 0.01 / t, 1e-3, e) for p, s, e in zip(params, states, expected)]
    for p, e in zip(params, expected):
        torch.testing.assert_close(p.data, e, rtol=0, atol=1e-13)


def test_orthogonalize_moves_singular_values_to_one():
    torch.manual_seed(0)
    s = torch.linalg.svdvals(orthogonalize(torch.randn(4, 32, 96, dtype=torch.float64)))
    assert s.min() > 0.6 and s.max() < 1.3


def test_every_parameter_in_exactly_one_group():
    matrix, cube = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="matrix or a vector"):
        Muon([matrix, cube])
    with pytest.raises(ValueError, match="once"):
        Muon([matrix, matrix])
    frozen = torch.nn.Parameter(torch.ones(3, 4), requires_grad=False)
    copy.deepcopy(Muon([matrix, frozen], weight_decay=0.1)).step()
    assert (frozen == 1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_time_of_a_step_on_the_full_model():
    from model import Nequix

    torch.manual_seed(0)
    config = dict(atomic_numbers=list(range(1, 90)), atom_energies=[0.0] * 89, avg_n_neighbors=57, scale=1, shift=0)
    params = list(Nequix(config).cuda().parameters())
    cpu = [torch.nn.Parameter(p.detach().cpu().double()) for p in params]
    optimizer, reference = Muon(params, weight_decay=1e-3), Muon(cpu, weight_decay=1e-3)
    times = []
    for _ in range(30):
        for p, q in zip(params, cpu):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.float().cuda()
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        reference.step()
    median = 1000 * sorted(times[5:])[12]
    print(f"\nMuon step on {len(params)} parameters: median {median:.2f} ms of 25 ({torch.cuda.get_device_name()})")
    for p, q in zip(params, cpu):
        torch.testing.assert_close(p.data.cpu().double(), q.data, rtol=0, atol=2e-3)
    assert median < 2
