"""Nequix: the model of "Training a Foundation Model for Materials on a Budget" (Koker, Kotak, Smidt 2025,
arXiv:2508.16067), a simplified NequIP (Batzner et al. 2022) with an equivariant RMSNorm, in plain PyTorch.

    model = load("nequix-mp-1")                                 # released weights by name; .nqx files; our checkpoints
    energy, forces, stress = energy_forces_stress(model, batch)   # a Batch of data.py

Reads top to bottom as the paper does: radial basis, spherical harmonics, convolution, layer, model, derivatives, files.

Features are a list with one tensor per degree l, (A, 2l+1, mul_l): channels are last, so every linear map is one matrix
product. Only natural parity (0e, 1o, 2e, 3o) occurs, so l names an irrep. Sizes: A atoms, E edges, S structures.
The network runs in the dtype of its weights; edge vectors, radial basis, harmonics and the sums of energies and forces are
float64 always: it costs nothing beside the network and takes most of the rounding error out of float32 forces.
"""

import functools
import hashlib
import http.client
import json
import math
import os
import re
import urllib.request
import zipfile

import numpy as np
import torch
from torch import nn
from torch.nn.functional import one_hot, silu

import kernels
from kernels import SILU_NORM

# ----------------------------------------------------------------------------------------------------------------------
# Edge embedding

# MKL chooses the code of a function when it is first called. If several threads do that at once, one of them may get code for
# half the digits (github.com/pytorch/pytorch/issues/188792): so one does it here.
torch.ones(1, dtype=torch.float64).sin()


def radial_basis(r, cutoff, n_basis, p):
    """Bessel functions times the polynomial cutoff (Gasteiger et al. 2020, eqs. 7 and 8), both zero from the cutoff on.

    r: (E,) lengths in A -> (E, n_basis)
    """
    # n pi is rounded to float32 as in the official code, also for float64: the exact value is 1e-6 eV/atom away from it.
    n_pi = (torch.arange(1, n_basis + 1, dtype=torch.float32, device=r.device) * math.pi).to(r.dtype)
    bessel = 2 / cutoff * torch.sin(n_pi / cutoff * r[:, None]) / r[:, None]
    x = (r / cutoff).clamp(max=1)
    a, b, c = (p + 1) * (p + 2) / 2, p * (p + 2), p * (p + 1) / 2
    return bessel * (1 - x**p * (a - x * (b - c * x)))[:, None]


def harmonics(u):
    """Real spherical harmonics of unit vectors up to l = 3, in e3nn's order (y is the polar axis) and component
    normalisation: the squares of degree l sum to 2l+1.

    u: (P, 3) -> (P, 16)
    """
    x, y, z = u.unbind(1)
    xz, d, r2 = x * z, z * z - x * x, 5 * y * y - 1
    a, b = 17.5**0.5 / 2, 10.5**0.5 / 2
    l1 = [3**0.5 * x, 3**0.5 * y, 3**0.5 * z]
    l2 = [15**0.5 * xz, 15**0.5 * x * y, 5**0.5 * (1.5 * y * y - 0.5), 15**0.5 * y * z, 3.75**0.5 * d]
    l3 = [a * (2 * xz * z + d * x), 105**0.5 * xz * y, b * x * r2, 7**0.5 / 2 * y * (r2 - 2)]
    l3 += [b * z * r2, 26.25**0.5 * d * y, a * (d * z - 2 * xz * x)]
    return torch.stack([torch.ones_like(x), *l1, *l2, *l3], 1)


def monomials(u):
    """1, u, u u, u u u: (P, 40)."""
    uu = (u[:, :, None] * u[:, None, :]).flatten(1)
    uuu = (uu[:, :, None] * u[:, None, :]).flatten(1)
    return torch.cat([torch.ones_like(u[:, :1]), u, uu, uuu], 1)


@functools.lru_cache
@torch.inference_mode(False)  # it is kept for others
def harmonics_of_monomials(device):
    """(40, 16) float64 of least norm: the harmonics as polynomials, one matrix product in place of 60 small kernels."""
    u = torch.nn.functional.normalize(
        torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    return (torch.linalg.pinv(monomials(u)) @ harmonics(u)).to(device)


def spherical_harmonics(u, lmax):
    """u: (E, 3) unit vectors, float64 -> (E, (lmax+1)^2)"""
    return monomials(u) @ harmonics_of_monomials(u.device)[:, : (lmax + 1) ** 2]


@functools.lru_cache
def clebsch_gordan(l1, l2, l3):
    """Coupling of degrees l1 and l2 to l3, (2l1+1, 2l2+1, 2l3+1), float64, e3nn's `wigner_3j` times sqrt(2 l3+1).

    For natural parity (l1+l2+l3 even) these are the integrals of three harmonics over the sphere, up to the norm. The
    quadrature is exact: 8 Gauss-Legendre points in y, 16 angles about it, for a polynomial of degree at most 9.
    """
    y, w = map(torch.from_numpy, np.polynomial.legendre.leggauss(8))
    phi = torch.arange(16, dtype=torch.float64) * (math.pi / 8)
    rho = (1 - y * y).sqrt()
    u = torch.stack(torch.broadcast_tensors(rho * phi.sin()[:, None], y, rho * phi.cos()[:, None]), -1).reshape(-1, 3)
    sh = harmonics(u).split([1, 3, 5, 7], 1)
    c = torch.einsum("p,pi,pj,pk->ijk", w.repeat(16), sh[l1], sh[l2], sh[l3])
    c[c.abs() < 1e-9] = 0
    return c * math.sqrt(2 * l3 + 1) / c.norm()


# ----------------------------------------------------------------------------------------------------------------------
# Convolution: conv(x, sh, hidden, w3, senders, row_ptr) -> (A, sum over l of (2l+1) mul_mid_l)
#
#   out[i] = sum over edges e with receiver i of  (hidden_e w3) * CG(x[sender_e], sh_e)
#
#   x        (A, sum (2l+1) mul_l)  features, in l, m, channel order          senders  (E,)   int64
#   sh       (E, (lmax+1)^2)        spherical harmonics                       row_ptr  (A+1,) int64: edges are sorted by
#   hidden   (E, 64)                last hidden layer of the radial MLP                receiver; row_ptr[i]:row_ptr[i+1]
#   w3       (64, W)                its output layer: one weight a path and channel    are those of receiver i
#
# The output has the same order; its channels at degree l are the paths into l, sorted by input l, then SH l. Everything
# that computes this function may stand in its place: plain torch (the reference), OpenEquivariance, a fused kernel.


def paths(l_in, lmax, l_out):
    """The (l3, l1, l2) from features up to l_in, with SH up to lmax, to features up to l_out, in weight order."""
    return [
        (l3, l1, l2)
        for l3 in range(l_out + 1)
        for l1 in range(l_in + 1)
        for l2 in range(lmax + 1)
        if abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == 0
    ]


def receivers_of(row_ptr, n_edges):
    return torch.repeat_interleave(row_ptr.diff(), output_size=n_edges)


@functools.lru_cache
@torch.inference_mode(False)  # it is kept for others
def make_conv(kind, muls, lmax, l_out, dtype, device):
    """The convolution for features of `muls` channels. kind: "torch", or "oeq" (CUDA, `pip install openequivariance`). What
    "fused" runs is in kernels.py: there norm, gate and radial MLP belong to it, and `Nequix.fused` is built of them."""
    return {"torch": torch_conv, "oeq": oeq_conv}[kind](muls, lmax, l_out, dtype, device)


def torch_conv(muls, lmax, l_out, dtype, device):
    groups = {}  # (l3, l1) -> the l2: they share one batched product
    for l3, l1, l2 in paths(len(muls) - 1, lmax, l_out):
        groups.setdefault((l3, l1), []).append(l2)
    cg = {}  # (l3, l1) -> ((lmax+1)^2, len(l2) (2l3+1) (2l1+1)): SH of an edge -> its matrices acting on x
    for (l3, l1), l2s in groups.items():
        c = torch.zeros((lmax + 1) ** 2, len(l2s), 2 * l3 + 1, 2 * l1 + 1, dtype=torch.float64)
        for i, l2 in enumerate(l2s):
            c[l2**2 : (l2 + 1) ** 2, i] = clebsch_gordan(l1, l2, l3).permute(1, 2, 0)
        cg[l3, l1] = c.flatten(1).to(device, dtype)

    def conv(x, sh, hidden, w3, senders, row_ptr):
        n_atoms, n_edges = len(x), len(senders)
        receivers = receivers_of(row_ptr, n_edges)
        x = [xl.view(n_atoms, 2 * l + 1, -1) for l, xl in enumerate(split_degrees(x, muls))]
        x = [xl[senders] for xl in x]  # (E, 2l+1, mul)
        weights = (hidden @ w3).split([muls[l1] * len(l2s) for (_, l1), l2s in groups.items()], 1)
        messages = [[] for _ in range(l_out + 1)]
        for w, ((l3, l1), l2s) in zip(weights, groups.items()):
            m = (sh @ cg[l3, l1]).view(n_edges, len(l2s) * (2 * l3 + 1), 2 * l1 + 1) @ x[l1]
            m = m.view(n_edges, len(l2s), 2 * l3 + 1, muls[l1]) * w.view(n_edges, len(l2s), 1, muls[l1])
            messages[l3].append(m.transpose(1, 2).flatten(2))  # (E, 2l3+1, len(l2) mul)
        out = [torch.cat(m, 2).flatten(1) for m in messages]
        return torch.cat([m.new_zeros(n_atoms, m.shape[1]).index_add(0, receivers, m) for m in out], 1)

    return conv


def oeq_conv(muls, lmax, l_out, dtype, device):
    """OpenEquivariance (Bharadwaj et al. 2025), whose kernels gather, multiply and sum without per-edge messages."""
    import openequivariance as oeq

    ps = paths(len(muls) - 1, lmax, l_out)
    parity = "eo"
    real = {torch.float32: np.float32, torch.float64: np.float64}[dtype]
    problem = oeq.TPProblem(
        "+".join(f"{mul}x{l}{parity[l % 2]}" for l, mul in enumerate(muls)),
        "+".join(f"1x{l}{parity[l % 2]}" for l in range(lmax + 1)),
        "+".join(f"{muls[l1]}x{l3}{parity[l3 % 2]}" for l3, l1, _ in ps),
        [(l1, l2, i, "uvu", True) for i, (_, l1, l2) in enumerate(ps)],
        shared_weights=False,
        irrep_dtype=real,
        weight_dtype=real,
        layout="ir_mul",
    )
    kernel = oeq.TensorProductConv(problem, deterministic=False)
    sizes = [(2 * l3 + 1) * muls[l1] for l3, l1, _ in ps]

    def conv(x, sh, hidden, w3, senders, row_ptr):
        if len(senders) == 0:
            return x.new_zeros(len(x), sum(sizes))
        out = kernel(x, sh, hidden @ w3, receivers_of(row_ptr, len(senders)), senders).split(sizes, 1)
        out = [o.view(len(x), 2 * l3 + 1, muls[l1]) for o, (l3, l1, _) in zip(out, ps)]
        by_degree = [[o for o, (l3, _, _) in zip(out, ps) if l3 == l] for l in range(l_out + 1)]
        return torch.cat([torch.cat(o, 2).flatten(1) for o in by_degree], 1)

    return conv


@functools.lru_cache
def fused_kernels(muls_in, muls_out, lmax, width, n_basis, exact, norm, device):
    ps = [
        (l3, l1, l2, clebsch_gordan(l1, l2, l3).numpy())
        for l3, l1, l2 in paths(len(muls_in) - 1, lmax, len(muls_out) - 1)
    ]
    return kernels.Kernels(muls_in, muls_out, ps, lmax, width, n_basis, exact, norm, device)


@functools.lru_cache
def oeq_error():
    """None if OpenEquivariance works here, else why not."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        from openequivariance import BUILT_EXTENSION, BUILT_EXTENSION_ERROR
    except (ImportError, AssertionError) as e:
        return str(e)
    return None if BUILT_EXTENSION else str(BUILT_EXTENSION_ERROR)


def choose_conv(kind, device, dtype=torch.float32, config=None):
    """ "auto" -> the fastest convolution that works on `device`, for networks of `dtype` and `config` (default: the paper's).

    The fused kernels have no float64, and their sums no fixed order; where float64 or, of torch, deterministic algorithms are
    wanted, plain torch stands in. Raises ValueError if the one asked for does not work.
    """
    on_cuda = torch.device(device).type == "cuda"
    config = {**Nequix.DEFAULTS, **(config or {})}
    paper = config["radial_size"] == 64 and config["radial_layers"] == 2
    fits = on_cuda and torch.cuda.get_device_capability(device) >= (8, 0) and paper
    if kind in ("auto", "fused") and torch.are_deterministic_algorithms_enabled():
        return "torch"
    if kind == "auto":
        return "fused" if fits and dtype == torch.float32 else "oeq" if on_cuda and oeq_error() is None else "torch"
    if kind == "oeq" and (oeq_error() or not on_cuda):
        raise ValueError(f"--conv oeq does not work here ({oeq_error() or 'the model is not on a CUDA device'})")
    if kind == "fused" and not fits:
        raise ValueError(
            "--conv fused needs a CUDA device of compute capability 8.0 and a radial MLP of 2 layers of 64"
        )
    return "torch" if kind == "fused" and dtype == torch.float64 else kind


# ----------------------------------------------------------------------------------------------------------------------
# Layer


def split_degrees(x, muls):
    return x.split([(2 * l + 1) * mul for l, mul in enumerate(muls)], 1)


def linear(xs, weights):
    """Mix channels, degree by degree. Weights have unit variance: 1/sqrt(fan_in) is part of the forward."""
    return [x @ (w * w.shape[0] ** -0.5) for x, w in zip(xs, weights)]


def randn(*shape):
    return nn.Parameter(torch.randn(*shape))


class Layer(nn.Module):
    """linear_1 -> convolution / sqrt(avg_n_neighbors) -> linear_2 + skip -> RMSNorm -> gate."""

    def __init__(self, muls_in, muls_out, config):
        super().__init__()
        self.muls_in, self.lmax, self.l_out = tuple(muls_in), config["lmax"], len(muls_out) - 1
        self.avg_n_neighbors = config["avg_n_neighbors"]
        mid = [0] * len(muls_out)
        for l3, l1, _ in paths(len(muls_in) - 1, self.lmax, self.l_out):
            mid[l3] += muls_in[l1]
        self.muls_mid, self.muls_out, self.scalars = tuple(mid), tuple(muls_out), muls_out[0]
        muls_out = [muls_out[0] + sum(muls_out[1:]), *muls_out[1:]]  # one gate for each channel with l > 0
        self.channels = tuple(muls_out)

        sizes = [config["n_basis"], *[config["radial_size"]] * config["radial_layers"]]
        self.radial = nn.ParameterList(randn(i, o) for i, o in zip(sizes, [*sizes[1:], sum(mid)]))
        for i, w in enumerate(self.radial):  # the variance 4/fan_in makes up for SiLU; the last layer has none
            w.data *= math.sqrt((4 if i < len(self.radial) - 1 else 1) / w.shape[0])
        self.linear_1 = nn.ParameterList(randn(m, m) for m in muls_in)
        self.linear_2 = nn.ParameterList(randn(i, o) for i, o in zip(mid, muls_out))
        self.skip = nn.ParameterList(randn(i, o) for i, o in zip(muls_in, muls_out))
        self.norm = nn.ParameterList(nn.Parameter(torch.ones(m)) for m in muls_out) if config["norm"] else None

    def fused(self, x, conv, dual):
        """The layer by the operations of kernels.py: flat features, and `conv`, a convolution with all but x in it."""
        own = lambda weights: [
            w if dual else w.detach() for w in weights
        ]  # only the tangent pass has gradients by weights
        y = conv(kernels.Linear.apply(self.muls_in, [self.muls_in], x, *own(self.linear_1)))
        v = kernels.Linear.apply(self.channels, [self.muls_mid, self.muls_in], y, x, *own([*self.linear_2, *self.skip]))
        weights = torch.cat(own(self.norm)) if self.norm is not None else v.new_ones(sum(self.channels))
        return kernels.NormGate.apply(self.kernels(), dual, v, weights)

    def kernels(self):
        exact = torch.get_float32_matmul_precision() == "highest"
        width, n_basis, device = len(self.radial[-1]), len(self.radial[0]), self.radial[0].device
        return fused_kernels(
            self.muls_in, self.muls_out, self.lmax, width, n_basis, exact, self.norm is not None, device
        )

    def forward(self, xs, sh, basis, senders, row_ptr, conv_kind):
        h, (*inner, w3) = basis, self.radial
        for w in inner:
            h = silu(h @ w)  # (E, 64)
        conv = make_conv(conv_kind, self.muls_in, self.lmax, self.l_out, sh.dtype, sh.device)
        x = torch.cat([x.flatten(1) for x in linear(xs, self.linear_1)], 1)
        x = conv(x, sh, h, w3 * self.avg_n_neighbors**-0.5, senders, row_ptr)
        x = [m.reshape(len(m), 2 * l + 1, -1) for l, m in enumerate(split_degrees(x, self.muls_mid))]
        x, skip = linear(x, self.linear_2), linear(xs, self.skip)
        x = [a + skip[l] if l < len(skip) else a for l, a in enumerate(x)]
        if self.norm is not None:
            x = rms_norm(x, self.norm)
        return gate(x, self.scalars)


def rms_norm(xs, weights):
    """Equivariant RMSNorm without centring, one weight a channel.

    As the official code has it, and the released weights need it: each degree is weighted by 1/(2l+1)^2, then the sum
    runs over channels and the mean over degrees. (eSEN's norm, which it follows, averages over channels.)
    """
    square = sum(x.square().sum((1, 2)) / (2 * l + 1) ** 2 for l, x in enumerate(xs)) / len(xs)  # (A,)
    inverse = torch.rsqrt(square + 1e-12)[:, None, None]
    return [x * inverse * w for x, w in zip(xs, weights)]


def gate(xs, n_scalars):
    """Scalars through SiLU; the other channels times SiLU of the scalars that follow (Weiler et al. 2018)."""
    act = SILU_NORM * silu(xs[0])
    scalars, *gates = act.split([n_scalars, *[x.shape[2] for x in xs[1:]]], 2)
    return [scalars, *[x * g for x, g in zip(xs[1:], gates)]]


# ----------------------------------------------------------------------------------------------------------------------
# Model


def parse_hidden(text):
    """ "128x0e+64x1o+32x2e+32x3o" -> [128, 64, 32, 32]. Raises ValueError for anything but l = 0, 1, ... in order."""
    terms = [re.fullmatch(r"(\d+)x(\d)([eo])", t.strip()) for t in text.split("+")]
    if not all(terms) or [int(t[2]) for t in terms] != list(range(len(terms))) or len(terms) > 4:
        raise ValueError(f'hidden irreps are "128x0e+64x1o+32x2e+32x3o" or a shorter such list, not "{text}"')
    if any(t[3] != "eo"[int(t[2]) % 2] or int(t[1]) == 0 for t in terms):
        raise ValueError(f'hidden irreps must have natural parity (0e, 1o, 2e, 3o) and channels, not "{text}"')
    return [int(t[1]) for t in terms]


class Nequix(nn.Module):
    """config: atomic_numbers (the species, in order) and atom_energies (E0, eV, one a species); avg_n_neighbors, scale
    (eV/A), shift (eV), as DataSet statistics of data.py; and the keys of DEFAULTS. Raises ValueError for a bad one."""

    DEFAULTS = dict(
        cutoff=6.0,  # A
        hidden="128x0e+64x1o+32x2e+32x3o",
        lmax=3,
        layers=4,
        n_basis=8,
        radial_size=64,
        radial_layers=2,
        polynomial_p=6.0,
        norm=True,
    )

    def __init__(self, config, conv="auto", tf32=False):
        super().__init__()
        self.tf32 = tf32
        self.config = config = {**self.DEFAULTS, **config}
        self.conv = conv
        hidden = parse_hidden(config["hidden"])
        if not len(hidden) - 1 <= config["lmax"] <= 3:
            raise ValueError(f"lmax {config['lmax']} must lie between the highest hidden l, {len(hidden) - 1}, and 3")
        if config["layers"] < 1 or config["cutoff"] <= 0:
            raise ValueError("layers and cutoff must be positive")
        n_species = len(config["atomic_numbers"])
        if len(config["atom_energies"]) != n_species or not all(0 < z < 119 for z in config["atomic_numbers"]):
            raise ValueError("a model needs an energy for each of its atomic numbers, and these between 1 and 118")
        muls = [[n_species], *[hidden] * (config["layers"] - 1), hidden[:1]]
        self.layers = nn.ModuleList(Layer(i, o, config) for i, o in zip(muls, muls[1:]))
        self.readout = nn.ParameterList([randn(hidden[0], 1)])
        species = torch.full((119,), -1)
        species[config["atomic_numbers"]] = torch.arange(n_species)
        self.register_buffer("species", species, persistent=False)  # atomic number -> index
        self.register_buffer("e0", torch.tensor(config["atom_energies"], dtype=torch.float64), persistent=False)

    def _apply(self, fn, recurse=True):
        e0 = self.e0
        super()._apply(fn, recurse)
        self.e0 = e0.to(self.e0.device)  # reference energies and sums of energies stay in float64
        return self

    @property
    def precision(self):
        return "float64" if self.readout[0].dtype == torch.float64 else "tf32" if self.tf32 else "float32"

    def chosen_conv(self):
        return choose_conv(self.conv, self.e0.device, self.readout[0].dtype, self.config)

    def fused(self, numbers, vectors, senders, row_ptr, keep=False):
        """`forward` by fused kernels, differentiable once, and by the vectors alone; and, to keep, what `fused_tangent` goes
        on from."""
        c, x = self.config, one_hot(self.species[numbers], len(self.e0)).float()
        k = self.layers[0].kernels()
        sh, basis, by_sh, by_r = kernels.Edges.apply(k, vectors, c["cutoff"], c["polynomial_p"])
        gsh, gr = x.new_empty(by_sh.shape), x.new_empty(by_r.shape)
        state = x, sh, basis, senders, row_ptr, []
        for layer in self.layers:
            k, (*inner, w3) = layer.kernels(), [w.detach() for w in layer.radial]
            radial = lambda edges, k=k, inner=inner: k.radial(basis[:, edges].contiguous(), inner)
            hidden = radial(slice(None)) if keep or len(senders) < kernels.PIECE else None
            out = gx = None
            if keep:  # those of `fused_tangent` hold values, then tangents
                n = len(x)
                state[-1].append((hidden, x.new_empty(2 * n, k.shape.y_dim), x.new_zeros(2 * n, k.shape.x_dim)))
                out, gx = state[-1][-1][1][:n], state[-1][-1][2][n:]
            edges = (by_sh, by_r) if layer is self.layers[0] else (None, None)
            tensors = (
                sh,
                radial,
                hidden,
                w3 * layer.avg_n_neighbors**-0.5,
                senders,
                row_ptr,
                out,
                gx,
                gsh,
                gr,
                layer is self.layers[-1],
            )
            x = layer.fused(x, lambda h: kernels.ForceConv.apply(k, h, *edges, *tensors), False)
        energy = x @ (self.readout[0].detach() * len(self.readout[0]) ** -0.5)
        return c["scale"] * energy.flatten().double() + c["shift"], state

    def fused_tangent(self, vectors, vectors_d, state):
        """Energies of the atoms, and their derivative along vectors_d (E, 3), differentiable by the weights."""
        first, sh, basis, senders, row_ptr, saved = state
        geometry = senders, row_ptr, sh, *kernels.edge_tangents(self.layers[0].kernels(), vectors, vectors_d)
        x = torch.cat([first, torch.zeros_like(first)])
        for layer, tensors in zip(self.layers, saved):
            k, (*inner, w3) = layer.kernels(), layer.radial
            w3 = w3 * layer.avg_n_neighbors**-0.5
            x = layer.fused(x, lambda h: kernels.DualConv.apply(k, geometry, basis, *tensors, h, w3, *inner), True)
        energy = self.config["scale"] * (x @ (self.readout[0] * len(self.readout[0]) ** -0.5)).flatten()
        return energy[: len(first)] + self.config["shift"], energy[len(first) :]

    def forward(self, numbers, vectors, senders, row_ptr):
        """Energy of each atom, eV, (A,) float64, without E0.

        numbers: (A,) atomic numbers; vectors: (E, 3) r_sender - r_receiver, A, float64; senders, row_ptr: as in a conv. With fused
        kernels (the default on CUDA) differentiable by the vectors alone; train.loss_and_gradient has the weights' gradients.
        """
        c = self.config
        conv = self.chosen_conv()
        if conv == "fused":
            return self.fused(numbers, vectors, senders, row_ptr)[0]
        dtype = self.readout[0].dtype
        r = torch.linalg.vector_norm(vectors, dim=1)
        basis = radial_basis(r, c["cutoff"], c["n_basis"], c["polynomial_p"]).to(dtype)  # (E, 8)
        sh = spherical_harmonics(vectors / r[:, None], c["lmax"]).to(dtype)  # (E, 16)
        x = [one_hot(self.species[numbers], len(self.e0)).to(dtype)[:, None]]  # (A, 1, species)
        for layer in self.layers:
            x = layer(x, sh, basis, senders, row_ptr, conv)
        energy = linear(x, self.readout)[0].flatten()
        return c["scale"] * energy.double() + c["shift"]


def energy_forces_stress(model, batch, create_graph=False):
    """E (S,) eV, F = -dE/dr (A, 3) eV/A, stress = (1/V) dE/dstrain (S, 3, 3) eV/A^3 (positive: tensile; NaN where the
    cell is not periodic in three directions); all float64.

    The energy depends on positions and cell through the edge vectors alone, so one backward gives all: the sums of
    dE/dvector over the edges of an atom, and of the products vector x dE/dvector over those of a structure.
    create_graph: keep the graph, to train on forces and stress. Raises ValueError if that is asked of the fused kernels.
    """
    if create_graph and model.chosen_conv() == "fused":
        raise ValueError(
            "the fused kernels are differentiable once: take conv torch or oeq, or train.loss_and_gradient"
        )
    vectors = batch.vectors.detach().requires_grad_()
    with torch.enable_grad():
        atom_energy = model(batch.numbers, vectors, batch.senders, batch.row_ptr)
        total = atom_energy.sum()
        if not len(vectors):  # on which it depends all the same
            total = total + vectors.sum()
    (g,) = torch.autograd.grad(total, vectors, create_graph=create_graph)
    if not create_graph:
        atom_energy = atom_energy.detach()
    return assemble(model, batch, atom_energy, g)


def assemble(model, batch, atom_energy, g):
    """Energies, forces and stresses from the atoms' energies and g = dE/dvector (E, 3)."""
    n_atoms, n_structures = len(batch.numbers), len(batch.cell)
    energy = atom_energy + model.e0[model.species[batch.numbers]]
    energy = g.new_zeros(n_structures).index_add(0, batch.structure, energy)
    forces = g.new_zeros(n_atoms, 3).index_add(0, batch.receivers, g).index_add(0, batch.senders, g, alpha=-1)
    virial = (batch.vectors[:, :, None] * g[:, None, :]).flatten(1)  # (E, 9)
    virial = g.new_zeros(n_atoms, 9).index_add(0, batch.receivers, virial)  # first atoms, then structures:
    virial = g.new_zeros(n_structures, 9).index_add(0, batch.structure, virial)  # fewer atomics on one address
    virial = virial.view(-1, 3, 3)
    periodic = batch.pbc.all(1)
    a, b, c = batch.cell.unbind(1)
    volume = torch.where(periodic, (a * torch.linalg.cross(b, c)).sum(1).abs(), 1)[:, None, None]
    stress = torch.where(periodic[:, None, None], (virial + virial.mT) / (2 * volume), torch.nan)
    return energy, forces, stress


# ----------------------------------------------------------------------------------------------------------------------
# Files


def save(path, model):
    """Write weights and configuration; the file appears whole or not at all."""
    data = {"format": "modded-nequix", "config": model.config, "weights": model.state_dict()}
    torch.save(data, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


RELEASED = {  # name: commit of github.com/atomicarchitects/nequix, sha256 of its models/<name>.nqx
    "nequix-mp-1": (
        "7c2854de8e754b1a60274c7d9d2e014989ed632e",
        "1647af8e627e1afa11e2bfadeab0797326513a521afd7dd01606a96f56783eee",
    ),
    "nequix-mp-1-pft": (
        "7c2854de8e754b1a60274c7d9d2e014989ed632e",
        "a88aeaed71fd447572dc57af21d469207d7737b85a6dbb66f8c38156f175c5f1",
    ),
    "nequix-oam-1": (
        "9c852a9c4cce69ae5e75bc5a2cf670be21ff8c28",
        "6a43475eaeb32a7a049f36c1306d78aa1e7a17e8af37aeda7901c8fec0ca845c",
    ),
}


def released(name):
    """The path of released weights in the cache, downloaded if they are not there yet. Raises OSError or ValueError."""
    commit, sha256 = RELEASED[name]
    url = f"https://github.com/atomicarchitects/nequix/raw/{commit}/models/{name}.nqx"
    path = kernels.cache_folder() / f"{name}.nqx"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.tmp")  # several processes may come here at once
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=60) as reply:
                content = reply.read()
            check_sha256(content, sha256, url)
            part.write_bytes(content)
            os.replace(part, path)
        except (OSError, http.client.HTTPException) as e:
            raise OSError(
                f"cannot fetch {name} ({e}): get {url} on a machine with network and put it at {path}"
            ) from None
        finally:
            part.unlink(missing_ok=True)
    check_sha256(path.read_bytes(), sha256, f"{path} (delete it and try again)")
    return path


def check_sha256(content, expected, what):
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"the sha256 should be {expected}, but is {found}: {what}")


PRECISIONS = {"float32": (torch.float32, False), "tf32": (torch.float32, True), "float64": (torch.float64, False)}


def load(path, device="cpu", precision="float32", conv="auto"):
    """A model from our checkpoint, an official `.nqx` file, or a name in RELEASED (downloaded once), in evaluation form
    (no gradients for the weights).

    Raises OSError if there is no such file, or ValueError with a one-line reason for one that is neither, damaged or not
    supported.
    """
    if precision not in PRECISIONS:
        raise ValueError(f'precision is one of {", ".join(PRECISIONS)}, not {precision}')
    dtype, tf32 = PRECISIONS[precision]
    if not os.path.isfile(path):
        if str(path) not in RELEASED:
            raise FileNotFoundError(f"no weights at {path}; the released ones are {', '.join(RELEASED)}")
        path = released(str(path))
    with open(path, "rb") as f:
        first = f.read(1)
    if first == b"{":
        model = load_nqx(path, conv)
    elif zipfile.is_zipfile(path):
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(data, dict) or data.get("format") != "modded-nequix":
                raise ValueError("another program's file, or a training state; model.pt holds the weights")
            model = Nequix(data["config"], conv)
            model.load_state_dict(data["weights"])
        except Exception as e:  # torch raises many kinds on a damaged file
            raise ValueError(f"{path} is not a modded-nequix checkpoint: {str(e).splitlines()[0]}") from None
    else:
        raise ValueError(f"{path} is neither a modded-nequix checkpoint nor an .nqx file (empty or damaged?)")
    model.tf32 = tf32
    return model.to(device, dtype).requires_grad_(False)


def load_nqx(path, conv):
    """The official format: a line of JSON, then the leaves of the model's tree in order as consecutive .npy arrays: E0,
    then by layer radial MLP, linear_1, linear_2, skip, norm, then the readout. What follows is ignored."""
    try:
        with open(path, "rb") as f:
            h = json.loads(f.readline())
            if h["index_weights"] or h.get("add_repulsion"):
                raise ValueError("species-indexed weights and pair repulsion are not supported")
            e0 = np.load(f, allow_pickle=False)
            config = dict(
                cutoff=h["cutoff"],
                hidden=h["hidden_irreps"].replace(" ", ""),
                lmax=h["lmax"],
                layers=h["n_layers"],
                n_basis=h["radial_basis_size"],
                radial_size=h["radial_mlp_size"],
                radial_layers=h["radial_mlp_layers"],
                polynomial_p=h["radial_polynomial_p"],
                norm=h["layer_norm"],
                atomic_numbers=sorted(h["atomic_numbers"]),
                atom_energies=e0.astype(float).tolist(),
                **{k: h[k] for k in ("avg_n_neighbors", "scale", "shift")},
            )
            model = Nequix(config, conv)
            for name, p in model.named_parameters():
                w = np.load(f, allow_pickle=False)
                if w.shape != tuple(p.shape):
                    raise ValueError(f"{name} has shape {w.shape}, not {tuple(p.shape)}")
                p.data = torch.from_numpy(w)
    except KeyError as e:
        raise ValueError(f"{path} is not a Nequix file: its header lacks {e}") from None
    except (ValueError, EOFError, OSError) as e:
        raise ValueError(f"{path} is not a whole Nequix file: {str(e).splitlines()[0]}") from None
    return model
