"""The fused kernels against plain torch in float64. On a GPU: python -m pytest -s test_kernels.py

Without one, the generated algebra alone is checked, compiled as C++ for the CPU.
"""

import ctypes
import math
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

import kernels
import model as nequix
from calc import NequixCalculator
from model import Nequix, energy_forces_stress, fused_kernels, torch_conv
from test_data import batch_of
from test_model import SHARED, needs_shared, to
from train import loss_and_gradient

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda")


def distance(a, b):
    """Relative, in the Frobenius norm."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


HOST = """
#define DEV static
#define EACH(i, n) for (int i = 0; i < (n); i++)
#define SH 16
#define SH4 4
struct Pair { float v[2]; };
static Pair load2(const float* p, int) { return {p[0], p[1]}; }
const int D1 = %d, NP = %d, OUT = %d, OCTETS = 1;
%s
typedef float X[2][D1], S[SH], W[2][NP], O[2][OUT];
extern "C" void run(float** p) {
  X &x = *(X*)p[0], &xd = *(X*)p[1], &gx = *(X*)p[8], &gx2 = *(X*)p[11];
  S &s = *(S*)p[2], &sd = *(S*)p[3], &gs = *(S*)p[9];
  W &w = *(W*)p[4], &wd = *(W*)p[5], &gw = *(W*)p[10], &gw2 = *(W*)p[12], &gwd2 = *(W*)p[13], &gw3 = *(W*)p[14], &gwd3 = *(W*)p[15];
  message(*(O*)p[16], x, s, w);
  tangent(*(O*)p[17], x, xd, s, sd, w, wd);
  EACH(c, 2) EACH(i, NP) { gw[c][i] = gw2[c][i] = w[c][i]; gwd2[c][i] = wd[c][i]; }
  message_back(gx, gs, x, s, gw, p[6], 1);
  dual_back(gx2, x, xd, s, sd, gw2, gwd2, p[6], p[7], 1);
  O g, h;
  load_gy(g, p[6], 1);
  load_gy(h, p[7], 1);
  dual_weights(gw3, gwd3, x, xd, s, sd, g, h);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("l1", [0, 1, 2, 3])
def test_generated_algebra(l1, tmp_path):
    """Two channels of one edge: message, tangent and all their gradients, against autograd in float64."""
    paths = [(l3, l2, nequix.clebsch_gordan(l1, l2, l3)) for l3, a, l2 in nequix.paths(3, 3, 3) if a == l1]
    sizes = [2 * l3 + 1 for l3, _, _ in paths]
    starts = np.cumsum([0, *sizes]).tolist()
    couplings = [kernels.Coupling(i, l1, l2, l3, cg.numpy(), o, 2 * o, 2) for i, ((l3, l2, cg), o) in enumerate(zip(paths, starts))]
    names = "message tangent message_back dual_back weights".split()
    functions = "\n".join(getattr(kernels, f"generate_{n}")(couplings) for n in names)
    d, n, out = 2 * l1 + 1, len(paths), starts[-1]
    (tmp_path / "host.cpp").write_text(HOST % (d, n, out, functions))
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", tmp_path / "host.so", tmp_path / "host.cpp"], check=True)

    torch.manual_seed(l1)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float32)
    inputs = [randn(2, d), randn(2, d), randn(16), randn(16), randn(2, n), randn(2, n), randn(out, 2), randn(out, 2)]
    results = [torch.zeros(s) for s in [(2, d), (16,), (2, n), (2, d), *[(2, n)] * 4, (2, out), (2, out)]]
    tensors = inputs + results
    pointers = (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])
    ctypes.CDLL(str(tmp_path / "host.so")).run(pointers)

    x, xd, s, sd, w, wd, g, h = (t.double().requires_grad_() for t in inputs)
    message = lambda x, s, w: torch.cat(
        [torch.einsum("c,ci,ijk,j->ck", w[:, i], x, cg, s[l2 * l2 : (l2 + 1) ** 2]) for i, (_, l2, cg) in enumerate(paths)], 1
    )
    y, yd = message(x, s, w), message(xd, s, w) + message(x, sd, w) + message(x, s, wd)
    first = torch.autograd.grad((y * g.T).sum(), (x, s, w), retain_graph=True)
    both = torch.autograd.grad((y * g.T).sum() + (yd * h.T).sum(), (x, w, wd))
    gx, gs, gw, gx2, gw2, gwd2, gw3, gwd3, out, out_d = results
    for a, b in zip((out, out_d, gx, gs, gw, gx2, gw2, gwd2, gw3, gwd3), (y, yd, *first, *both, *both[1:])):
        assert distance(a, b) < 1e-6


def test_convolution_refuses_other_tensors():
    k = SimpleNamespace(x_dim=4, sh_dim=1, width=64, w_dim=4)
    row_ptr, senders = torch.tensor([0, 1, 2]), torch.tensor([1, 0])
    with pytest.raises(ValueError, match="x should be .2, 4. float32 on CUDA"):
        kernels.Conv.apply(k, torch.zeros(2, 4), torch.zeros(2, 1), torch.zeros(2, 64), torch.zeros(64, 4), senders, row_ptr)


SHAPES = [  # channels of x, lmax, channels of the result: the three of the paper's model, then others
    ((128, 64, 32, 32), 3, (128, 64, 32, 32)),
    ((89,), 3, (128, 64, 32, 32)),
    ((128, 64, 32, 32), 3, (128,)),
    ((64, 32), 1, (64, 32)),
    ((16, 8, 24), 2, (16, 8, 24)),
    ((5, 3, 2, 1), 3, (4, 6, 2, 1)),
    ((12,), 0, (7,)),
]


@needs_cuda
@pytest.mark.parametrize("exact", [True, False], ids=["float32", "tf32"])
@pytest.mark.parametrize("muls, lmax, muls_out", SHAPES)
def test_kernels(muls, lmax, muls_out, exact):
    torch.manual_seed(0)
    k = fused_kernels(muls, muls_out, lmax, 64, exact, True, CUDA)
    n = 50
    counts = torch.randint(0, 60, (n,))
    counts[:3] = torch.tensor([0, 1, 300])
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(CUDA)
    e = int(counts.sum())
    senders = torch.randint(0, n, (e,), device=CUDA)
    randn = lambda *shape: torch.randn(*shape, device=CUDA)
    x, sh, rd, w3 = randn(2, n, k.x_dim), randn(2, e, k.sh_dim), randn(e), randn(64, k.w_dim) / 8
    hidden, gy = randn(2, e, 64), randn(2, n, k.y_dim)

    # Reference: values and tangents, the tangent as what it is, a sum of three convolutions
    conv = torch_conv(muls, lmax, len(muls_out) - 1, torch.float64, CUDA)
    X, S, H, W = (t.double().requires_grad_() for t in (x, sh, hidden, w3))
    y = conv(X[0], S[0], H[0], W, senders, row_ptr)
    yd = conv(X[1], S[0], H[0], W, senders, row_ptr) + conv(X[0], S[1], H[0], W, senders, row_ptr)
    yd = yd + conv(X[0], S[0], H[1] * rd.double()[:, None], W, senders, row_ptr)
    first = torch.autograd.grad(y, (X, S, H), gy[0].double(), retain_graph=True)
    both = torch.autograd.grad((y * gy[0].double()).sum() + (yd * gy[1].double()).sum(), (X, S, H, W), retain_graph=True)

    stored = k.stored(hidden)
    edges = sh[0], stored[0], w3, senders, row_ptr
    tangents = dict(xd=x[1], shd=sh[1], slope=stored[1], rd=rd)
    error = {}
    error["y"] = distance(k.forward("forward_false", torch.full_like(gy[0], torch.nan), x[0], *edges), y)
    error["yd"] = distance(k.forward("forward_true", torch.full_like(gy[0], torch.nan), x[0], *edges, **tangents), yd)
    gx, gsh, gr = torch.zeros_like(x[0]), torch.zeros_like(sh[0]), torch.zeros_like(rd)
    k.backward(0, x[0], *edges, gy[0], slope=stored[1], gx=gx, gsh=gsh, gr=gr)
    error["0 x"], error["0 sh"] = distance(gx, first[0][0]), distance(gsh, first[1][0])
    error["0 r"] = distance(gr, (first[2][0] * H[1]).sum(1).detach())
    leaves = [v.clone().requires_grad_() for v in (x[0], sh[0], hidden[0], w3)]
    out = kernels.Conv.apply(k, *leaves, senders, row_ptr)
    expected = [first[0][0], first[1][0], first[2][0], torch.autograd.grad(y, W, gy[0].double(), retain_graph=True)[0]]
    for name, a, b in zip(("1 x", "1 sh", "1 h", "1 w"), torch.autograd.grad(out, leaves, gy[0]), expected):
        error[name] = distance(a, b)
    gx, gh = torch.zeros_like(x[0]), torch.zeros_like(hidden)
    k.backward(2, x[0], *edges, gy[0], gyd=gy[1], gx=gx, gh=gh, gslope=gh[1], **tangents)
    error["2 x"], error["2 h"] = distance(gx, both[0][0]), distance(gh, both[2])
    gw = k.weight_grad(x[0], sh[0], stored[0], senders, row_ptr, gy[0], gyd=gy[1], **tangents)
    error["2 w"] = distance(gw, both[3])
    print({name: f"{v:.1e}" for name, v in error.items()})
    assert max(error.values()) < (1e-6 if exact else 1e-3)


def batch_on(device, structures):
    """With random labels; no stress where there is none."""
    b = to(batch_of(structures, 6.0), device)
    g = torch.Generator().manual_seed(1)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(device)
    b.energy, b.forces, b.stress = rand(len(b.cell)), rand(len(b.numbers), 3), rand(len(b.cell), 3, 3)
    b.stress[~b.pbc.all(1)] = torch.nan
    return b


def structures():
    rng, out = np.random.default_rng(0), [bulk("Si"), bulk("NaCl", "rocksalt", 5.6) * (2, 1, 1), bulk("Fe") * (2, 2, 2)]
    out += [molecule("C2H6"), molecule("H2O")]
    for a in out:
        a.rattle(0.1, rng=rng)
    return out


class Reference(kernels.Kernels):
    """What the CUDA kernels compute, by plain torch on the CPU: for the step that is built of them."""

    n_sm = exact = 1

    def __init__(self, muls, muls_out, lmax, width, exact, norm, device):
        self.muls, self.muls_out, self.norm, self.width = muls, muls_out, norm, width
        self.channels = [muls_out[0] + sum(muls_out[1:]), *muls_out[1:]]
        self.f_dim, self.n_weights = sum((2 * l + 1) * m for l, m in enumerate(muls_out)), sum(self.channels)
        ps = nequix.paths(len(muls) - 1, lmax, len(muls_out) - 1)
        self.x_dim = sum((2 * l + 1) * m for l, m in enumerate(muls))
        self.y_dim = sum((2 * l3 + 1) * muls[l1] for l3, l1, _ in ps)
        self.conv = torch_conv(muls, lmax, len(muls_out) - 1, torch.float32, "cpu")

    def both(self, x, sh, hidden, w3, senders, row_ptr, xd, shd, slope, rd, **_):
        conv = lambda x, s, h: self.conv(x, s, h, w3, senders, row_ptr)
        return conv(x, sh, hidden), conv(xd, sh, hidden) + conv(x, shd, hidden) + conv(x, sh, slope * rd[:, None])

    def forward(self, name, out, *edges, **tangents):
        return out.copy_(self.both(*edges, **tangents)[1] if tangents else self.conv(*edges))

    def backward(self, mode, x, sh, hidden, w3, senders, row_ptr, gy, gx=None, **t):
        leaves = [v.detach().requires_grad_() for v in (x, sh, hidden, t["slope"])]
        with torch.enable_grad():
            if mode == 0:
                ga, gs, gh = torch.autograd.grad(self.conv(*leaves[:3], w3, senders, row_ptr), leaves[:3], gy)
                t["gsh"].add_(gs)
                t["gr"].add_((gh * t["slope"]).sum(1))
            else:
                y, yd = self.both(*leaves[:3], w3, senders, row_ptr, **{**t, "slope": leaves[3]})
                ga, gh, gslope = torch.autograd.grad((y * gy[: len(x)]).sum() + (yd * t["gyd"]).sum(), [leaves[0], *leaves[2:]])
                t["gh"][0].add_(gh)
                t["gslope"].add_(gslope)
        if gx is not None:
            gx[: len(x)].add_(ga)

    def weight_grad(self, x, sh, hidden, senders, row_ptr, gy, gyd, **tangents):
        columns = sum(self.muls[l1] for _, l1, _ in nequix.paths(len(self.muls) - 1, math.isqrt(sh.shape[1]) - 1, len(self.muls_out) - 1))
        with torch.enable_grad():
            w3 = torch.zeros(self.width, columns, requires_grad=True)
            y, yd = self.both(x, sh, hidden, w3, senders, row_ptr, **tangents)
            return torch.autograd.grad((y * gy[: len(x)]).sum() + (yd * gyd).sum(), w3)[0]

    def dual_silu(self, z, last):
        return torch.stack(torch.func.jvp(torch.nn.functional.silu, (z[0],), (z[1],)))

    def dual_silu_back(self, z, grad):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return torch.autograd.grad(self.dual_silu(z, False), z, grad)[0]

    def launch(self, name, grid, arguments, *_, v, w, out, n_atoms, vd=None, outd=None, g=None, gd=None, gw=None):
        def norm_gate(v, w):
            xs = [x.view(n_atoms, 2 * l + 1, -1) for l, x in enumerate(nequix.split_degrees(v, self.channels))]
            xs = nequix.rms_norm(xs, w.split(self.channels)) if self.norm else xs
            return torch.cat([x.flatten(1) for x in nequix.gate(xs, self.muls_out[0])], 1)

        def dual(v, vd, w):
            return torch.stack(torch.func.jvp(lambda v: norm_gate(v, w), (v,), (vd,)))

        v = v[:n_atoms]
        if g is None:
            out[:n_atoms] = norm_gate(v, w)
            if vd is not None:
                outd.copy_(dual(v, vd, w)[1])
            return
        with torch.enable_grad():
            v, w = v.detach().requires_grad_(), w.detach().requires_grad_()
            gw.zero_()
            if vd is None:
                grads = torch.autograd.grad(norm_gate(v, w), (v, w), g[:n_atoms], allow_unused=True)
                out[:n_atoms], gw[0] = grads[0], grads[1] if self.norm else 0
            else:
                vd = vd.detach().requires_grad_()
                grads = torch.autograd.grad(dual(v, vd, w), (v, vd, w), torch.stack([g[:n_atoms], gd]), allow_unused=True)
                out[:n_atoms], outd[:], gw[0] = grads[0], grads[1], grads[2] if self.norm else 0


@pytest.mark.parametrize("norm", [True, False])
def test_a_step_without_double_backward(norm, monkeypatch):
    """The gradient of the loss by tangents against autograd's double backward; plain torch stands in for the kernels."""
    model, batch = random_model(norm, "12x0e+6x1o+4x2e").to("cpu"), batch_on("cpu", structures())
    reference = gradients(model, batch, "torch", torch.float64)
    monkeypatch.setattr(nequix, "fused_kernels", Reference)
    monkeypatch.setattr(nequix, "choose_conv", lambda kind, *_: kind)
    loss, efs, grads = gradients(model, batch, "fused", torch.float32)
    assert abs(loss / reference[0] - 1) < 1e-5
    assert distance(efs[0], reference[1][0]) < 1e-5 and distance(efs[1], reference[1][1]) < 1e-5
    assert distance(torch.cat([g.flatten() for g in grads]), torch.cat([g.flatten() for g in reference[2]])) < 1e-5
    with pytest.raises(ValueError, match="differentiable once"):
        energy_forces_stress(model, batch, create_graph=True)


def random_model(norm=True, hidden="128x0e+64x1o+32x2e+32x3o"):
    torch.manual_seed(2)
    stats = dict(avg_n_neighbors=40.0, scale=0.8, shift=0.1, atomic_numbers=[1, 6, 8, 11, 14, 17, 26], atom_energies=[0.0] * 7)
    model = Nequix({**stats, "norm": norm, "hidden": hidden, "lmax": hidden.count("+")})
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
    return model.to(CUDA if torch.cuda.is_available() else "cpu")


def gradients(model, batch, conv, dtype):
    model.conv = conv
    model = model.to(dtype).requires_grad_()
    model.zero_grad()
    loss = loss_and_gradient(model, batch, (20.0, 20.0, 500.0), (5, len(batch.numbers), 27))
    efs = [t.detach() for t in energy_forces_stress(model, batch)]
    return loss, efs, [p.grad.clone() for p in model.parameters()]


def compare_gradients(model, exact):
    batch = batch_on(CUDA, structures())
    torch.set_float32_matmul_precision("highest" if exact else "high")
    try:
        loss, efs, grads = gradients(model, batch, "fused", torch.float32)
        torch.set_float32_matmul_precision("highest")
        ref_loss, ref_efs, ref = gradients(model, batch, "torch", torch.float64)
    finally:
        torch.set_float32_matmul_precision("highest")
    names = [n for n, _ in model.named_parameters()]
    errors = {n: distance(a, b) for n, a, b in zip(names, grads, ref)}
    total = distance(torch.cat([g.flatten() for g in grads]), torch.cat([g.flatten() for g in ref]))
    worst = max(errors, key=errors.get)
    force = distance(efs[1], ref_efs[1])
    print(f"gradient {total:.1e}, worst {worst} {errors[worst]:.1e}, loss {abs(loss / ref_loss - 1):.1e}, forces {force:.1e}")
    assert total < (1e-3 if exact else 1e-2) and abs(loss / ref_loss - 1) < (1e-5 if exact else 1e-2)
    assert torch.allclose(efs[0], ref_efs[0], rtol=0, atol=1e-4 if exact else 1e-1)


@needs_cuda
@pytest.mark.parametrize("exact", [True, False], ids=["float32", "tf32"])
@pytest.mark.parametrize("options", [{}, dict(norm=False), dict(hidden="24x0e+12x1o")], ids=str)
def test_loss_gradient_of_random_weights(options, exact):
    compare_gradients(random_model(**options), exact)


@needs_cuda
@needs_shared
@pytest.mark.parametrize("exact", [True, False], ids=["float32", "tf32"])
def test_loss_gradient_of_released_weights(exact):
    compare_gradients(nequix.load(SHARED / "weights/nequix-mp-1.nqx", CUDA), exact)


@needs_cuda
def test_cuda_graph_of_the_calculator(tmp_path):
    """Molecular dynamics far enough to renew the list: every step as a calculator that has seen nothing before gives it."""
    model = random_model()
    model.config["scale"] = 0.05
    nequix.save(tmp_path / "model.pt", model)
    calc = NequixCalculator(tmp_path / "model.pt")
    atoms, rng, lists = bulk("Si", cubic=True) * 2, np.random.default_rng(0), set()
    for step in range(12):
        atoms.positions += rng.normal(size=(len(atoms), 3)) * 0.04
        atoms.set_cell(atoms.cell.array * (1 + 1e-4 * step), scale_atoms=True)
        atoms.calc = NequixCalculator(tmp_path / "model.pt")
        expected = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        atoms.calc = calc
        assert abs(atoms.get_potential_energy() - expected[0]) < 1e-5 * len(atoms)
        assert np.abs(atoms.get_forces() - expected[1]).max() < 1e-5 * np.abs(expected[1]).max()
        assert np.abs(atoms.get_stress() - expected[2]).max() < 1e-5 * np.abs(expected[2]).max()
        lists.add(id(calc.listed[0]))
    assert calc.replay is not None and len(lists) > 1
