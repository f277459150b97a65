"""Muon against a naive loop over matrices, written from optax.contrib.muon 0.2.5, and against torch's own optimizers."""

import copy
import pickle
import timeit

import pytest
import torch
from torch.nn import Embedding, Linear, Parameter, Sequential, Tanh
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from muon import Muon

SHAPES = [(8, 64), (64, 64), (64, 356), (89, 89), (89, 32), (352, 64), (128, 1), (256, 256), (32, 32), (64,), (5,)]


def naive_update(g, state, t, lr, decay, param):
    """One matrix or vector at a time, in the order of optax: moving average, bias correction, Nesterov, orthogonalize."""
    beta = 0.95 if g.ndim == 2 else 0.9
    state["mu"] = beta * state.get("mu", 0) + (1 - beta) * g
    hat = beta * state["mu"] / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
    if g.ndim == 1:
        state["nu"] = 0.999 * state.get("nu", 0) + 0.001 * g * g
        return param - lr * hat / ((state["nu"] / (1 - 0.999**t)).sqrt() + 1e-8)
    x = hat / (hat.norm() + 1e-8)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return param - lr * (x * max(1, g.shape[1] / g.shape[0]) ** 0.5 + decay * param)


def test_steps_equal_the_naive_loop():
    expected, states = [torch.randn(s, dtype=torch.float64) for s in SHAPES], [{} for _ in SHAPES]
    params = [Parameter(e.clone()) for e in expected]
    optimizer = Muon(params[2:], weight_decay=1e-3)
    optimizer.add_param_group(dict(params=params[:2], weight_decay=0.1, lr_scale=2))
    for t in range(1, 6):
        for group in optimizer.param_groups:
            group["lr"] = group.get("lr_scale", 1) * 0.01 / t
        for p in params:
            p.grad = torch.randn_like(p)
        assert optimizer.step(closure=torch.is_grad_enabled) is True  # what the closure returns, under enable_grad
        for i, (p, state) in enumerate(zip(params, states)):
            lr, decay = (0.02 / t, 0.1) if i < 2 else (0.01 / t, 1e-3)
            expected[i] = naive_update(p.grad, state, t, lr, decay, expected[i])
        if t == 2:  # options and state survive a new optimizer, a pickle and a copy
            saved, optimizer = optimizer.state_dict(), Muon([dict(params=params[2:]), dict(params=params[:2])], lr=1.0)
            optimizer.load_state_dict(saved)
            optimizer, params = copy.deepcopy(pickle.loads(pickle.dumps((optimizer, params))))
    torch.testing.assert_close([p.data for p in params], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(64, 40), (40, 64)])
def test_a_step_without_momentum_is_that_of_torch(shape):
    """torch.optim.Muon computes in bfloat16, and its moving average has no bias correction: only momentum 0 compares."""
    ours, theirs = Parameter(torch.zeros(shape)), Parameter(torch.zeros(shape))
    ours.grad = theirs.grad = torch.randn(shape)
    Muon([ours], lr=1.0, momentum=0.0, fan_in_dim=1).step()
    torch.optim.Muon([theirs], lr=1.0, momentum=0.0).step()
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    singular, scale = torch.linalg.svdvals(ours.data), max(1, shape[0] / shape[1]) ** 0.5
    assert singular.min() > 0.6 * scale and singular.max() < 1.3 * scale


@pytest.mark.parametrize("schedule", [lambda o: LambdaLR(o, lambda t: 0.99**t), lambda o: OneCycleLR(o, 0.1, 100)])
def test_an_embedding_and_linear_layers_train_at_the_rates_of_torch(schedule):
    net, x = Sequential(Embedding(10, 8), Linear(8, 32), Tanh(), Linear(32, 1)), torch.arange(10)
    table, *rest = net.named_parameters()
    optimizer = Muon([dict(params=rest, lr=0.02), dict(params=[table], use_muon=False, lr=0.03)], fan_in_dim=1)
    assert [g["param_names"][-1] for g in optimizer.param_groups] == ["3.weight", "3.bias", "0.weight"]
    twin = torch.optim.AdamW([dict(params=[Parameter(torch.ones(3))], lr=lr) for lr in (0.02, 0.02, 0.03)])
    steppers, losses = (optimizer, twin, schedule(optimizer), schedule(twin)), []
    for _ in range(99):
        net.zero_grad()
        losses.append((net(x)[:, 0] - x.sin()).square().mean())
        losses[-1].backward()
        for each in steppers:
            each.step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in twin.param_groups]
    assert losses[-1] < 1e-2 * losses[0]


def test_every_parameter_in_exactly_one_group():
    matrix, unused, frozen, cube = (Parameter(torch.ones(s)) for s in [(3, 4)] * 3 + [(2, 3, 4)])
    for params, message in ([matrix, cube], r"shape \(2, 3, 4\) .* use_muon=False"), ([matrix, matrix], "given once"):
        with pytest.raises(ValueError, match=message):
            Muon(params)
    frozen.requires_grad_(False)
    (matrix.sum() + cube.sum()).backward()
    Muon([dict(params=[matrix, unused, frozen]), dict(params=cube, use_muon=False)], weight_decay=0.1).step()
    assert (matrix < 1).all() and (unused == 1).all() and (frozen == 1).all() and (cube < 1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_time_of_a_step_on_the_gpu():
    cpu = [Parameter(torch.randn(s, dtype=torch.float64)) for s in SHAPES * 6]
    gpu = [Parameter(p.detach().float().cuda()) for p in cpu]
    optimizer, reference = Muon(gpu, weight_decay=1e-3), Muon(cpu, weight_decay=1e-3)
    for _ in range(5):
        for p, q in zip(cpu, gpu):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.float().cuda()
        optimizer.step()
        reference.step()
    torch.testing.assert_close([q.data.cpu().double() for q in gpu], [p.data for p in cpu], rtol=0, atol=2e-3)
    times = timeit.repeat(lambda: [optimizer.step(), torch.cuda.synchronize()], number=1, repeat=25)
    assert sorted(times)[12] < 0.002, f"{1000 * sorted(times)[12]:.2f} ms"
