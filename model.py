"""Nequix: the model of "Training a Foundation Model for Materials on a Budget" (Koker, Kotak, Smidt 2025,
arXiv:2508.16067), a simplified NequIP (Batzner et al. 2022) with an equivariant RMSNorm, in plain PyTorch.

    model = load("nequix-mp-1")                                      # released weights, an .nqx file, our checkpoint
    batch = make_batch(numbers, positions, cell, pbc, n_atoms, 6.0)  # data.py: tensors of some structures, joined
    energy, forces, stress = energy_forces_stress(model, batch)

The equations, in the order of this file. h_i: features of atom i; j: its neighbours within the cutoff; r_ij: r_j - r_i;
N: mean number of neighbours; W: matrices that mix the channels of each degree l.

    (1)  B(r)    Bessel functions times a polynomial cutoff                          radial basis
    (2)  Y(u)    real spherical harmonics, l <= 3, of the unit vector u              angular basis
    (3)  m_i  =  1/sqrt(N) sum_j MLP(B(r_ij)) * CG(W1 h_j, Y(u_ij))                  convolution
    (4)  v_i  =  W2 m_i + W3 h_i                                                     skip connection
    (5)  v_i  -> RMSNorm(v_i)                                                        normalization
    (6)  h_i  =  gate(v_i)                                                           nonlinearity
    (7)  E    =  sum_i scale (w h_i) + shift + E0(species of i)                      energy, after the last layer
    (8)  F_i  =  -dE/dr_i,  stress = 1/V dE/dstrain                                  forces and stress

Features are a list with one tensor for each degree l, (A, 2l+1, mul_l). Channels come last, so a linear map is one
matrix product. Only natural parity (0e, 1o, 2e, 3o) occurs, so l names an irrep. Sizes: A atoms, E edges, S structures.

The network runs in the dtype of its weights. Edge vectors, bases, and the sums of energies and forces are always
float64: this costs nothing beside the network and removes most of the rounding error of float32 forces.
"""

import contextlib
import functools
import json
import math
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import one_hot, silu

# ----------------------------------------------------------------------------------------------------------------------
# (1) and (2): radial and angular basis

# MKL picks the code of a function when it is first called. If several threads do that at once, one of them may get code
# with half the digits (github.com/pytorch/pytorch/issues/188792). So call it once here, from one thread.
torch.ones(1, dtype=torch.float64).sin()


def radial_basis(r, cutoff, n_basis, p):
    """Bessel functions times the polynomial cutoff (Gasteiger et al. 2020, eqs. 7 and 8); zero from the cutoff on.

    r: (E,) lengths in A -> (E, n_basis)
    """
    # Copies the official float32 rounding, even in float64. Exact n pi would shift energies by 1e-6 eV/atom.
    n_pi = (torch.arange(1, n_basis + 1, dtype=torch.float32, device=r.device) * math.pi).to(r.dtype)
    bessel = 2 / cutoff * torch.sin(n_pi / cutoff * r[:, None]) / r[:, None]
    x = (r / cutoff).clamp(max=1)
    a, b, c = (p + 1) * (p + 2) / 2, p * (p + 2), p * (p + 1) / 2
    return bessel * (1 - x**p * (a - x * (b - c * x)))[:, None]


def harmonics(u):
    """Real spherical harmonics of unit vectors up to l = 3, in e3nn's order (y is the polar axis) and component
    normalization: the squares of degree l sum to 2l+1.

    u: (E, 3) -> (E, 16)
    """
    x, y, z = u.unbind(1)
    xz, d, r2 = x * z, z * z - x * x, 5 * y * y - 1
    a, b = 17.5**0.5 / 2, 10.5**0.5 / 2
    l1 = [3**0.5 * x, 3**0.5 * y, 3**0.5 * z]
    l2 = [15**0.5 * xz, 15**0.5 * x * y, 5**0.5 * (1.5 * y * y - 0.5), 15**0.5 * y * z, 3.75**0.5 * d]
    l3 = [a * (2 * xz * z + d * x), 105**0.5 * xz * y, b * x * r2, 7**0.5 / 2 * y * (r2 - 2)]
    l3 += [b * z * r2, 26.25**0.5 * d * y, a * (d * z - 2 * xz * x)]
    return torch.stack([torch.ones_like(x), *l1, *l2, *l3], 1)


@functools.lru_cache
def clebsch_gordan(l1, l2, l3):
    """Coupling of degrees l1 and l2 to l3, (2l1+1, 2l2+1, 2l3+1), float64: e3nn's `wigner_3j` times sqrt(2 l3 + 1).

    For natural parity (l1 + l2 + l3 even) these are integrals of three harmonics over the sphere, up to normalization.
    The quadrature is exact: 8 Gauss-Legendre points in y and 16 angles around it, for polynomials up to degree 9.
    """
    y, w = map(torch.from_numpy, np.polynomial.legendre.leggauss(8))
    phi = torch.arange(16, dtype=torch.float64) * (math.pi / 8)
    rho = (1 - y * y).sqrt()
    u = torch.stack(torch.broadcast_tensors(rho * phi.sin()[:, None], y, rho * phi.cos()[:, None]), -1).reshape(-1, 3)
    sh = harmonics(u).split([1, 3, 5, 7], 1)
    cg = torch.einsum("p,pi,pj,pk->ijk", w.repeat(16), sh[l1], sh[l2], sh[l3])
    cg[cg.abs() < 1e-9] = 0
    return cg * math.sqrt(2 * l3 + 1) / cg.norm()


# ----------------------------------------------------------------------------------------------------------------------
# (3): convolution. conv(x, sh, hidden, w3, senders, row_ptr) -> (A, sum over l of (2l+1) mul_mid_l)
#
#   out[i] = sum over edges e with receiver i of  (hidden_e w3) * CG(x[sender_e], sh_e)
#
#   x        (A, sum (2l+1) mul_l)  features, in l, m, channel order          senders  (E,)   int64
#   sh       (E, (lmax+1)^2)        spherical harmonics                       row_ptr  (A+1,) int64: edges are sorted by
#   hidden   (E, 64)                last hidden layer of the radial MLP                receiver; row_ptr[i]:row_ptr[i+1]
#   w3       (64, W)                its output layer: one weight a path and channel    are those of receiver i
#
# The output has the same order. Its channels at degree l are the paths into l, sorted by input l, then SH l. Here is
# the reference in plain torch, at the end of this file OpenEquivariance's. The fused kernels of kernels.py replace
# more: the whole network.


def paths(l_in, lmax, l_out):
    """The (l3, l1, l2) from features up to l_in, with SH up to lmax, to features up to l_out, in weight order."""
    return [
        (l3, l1, l2)
        for l3 in range(l_out + 1)
        for l1 in range(l_in + 1)
        for l2 in range(lmax + 1)
        if abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == 0
    ]


@functools.lru_cache
@torch.inference_mode(False)  # cached: must not be an inference tensor, training reuses it
def torch_conv(muls, lmax, l_out, dtype, device):
    """The convolution for features of `muls` channels, in plain torch; differentiable any number of times."""
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
        receivers = torch.repeat_interleave(row_ptr.diff(), output_size=n_edges)
        x = [xl.view(n_atoms, 2 * l + 1, -1)[senders] for l, xl in enumerate(split_degrees(x, muls))]  # (E, 2l+1, mul)
        weights = (hidden @ w3).split([muls[l1] * len(l2s) for (_, l1), l2s in groups.items()], 1)
        messages = [[] for _ in range(l_out + 1)]
        for w, ((l3, l1), l2s) in zip(weights, groups.items()):
            m = (sh @ cg[l3, l1]).view(n_edges, len(l2s) * (2 * l3 + 1), 2 * l1 + 1) @ x[l1]
            m = m.view(n_edges, len(l2s), 2 * l3 + 1, muls[l1]) * w.view(n_edges, len(l2s), 1, muls[l1])
            messages[l3].append(m.transpose(1, 2).flatten(2))  # (E, 2l3+1, len(l2) mul)
        out = [torch.cat(m, 2).flatten(1) for m in messages]
        return torch.cat([m.new_zeros(n_atoms, m.shape[1]).index_add(0, receivers, m) for m in out], 1)

    return conv


def split_degrees(x, muls):
    return x.split([(2 * l + 1) * mul for l, mul in enumerate(muls)], 1)


# ----------------------------------------------------------------------------------------------------------------------
# (3) to (6): a layer


def linear(xs, weights):
    """Mix channels, degree by degree. Weights have unit variance: 1/sqrt(fan_in) is part of the forward."""
    return [x @ (w * w.shape[0] ** -0.5) for x, w in zip(xs, weights)]


def randn(*shape):
    return nn.Parameter(torch.randn(*shape))


class Layer(nn.Module):
    """Features of `muls_in` channels -> features of `muls_out` channels."""

    def __init__(self, muls_in, muls_out, config):
        super().__init__()
        self.muls_in, self.muls_out, self.lmax = tuple(muls_in), tuple(muls_out), config["lmax"]
        self.avg_n_neighbors = config["avg_n_neighbors"]
        mid = [0] * len(muls_out)
        for l3, l1, _ in paths(len(muls_in) - 1, self.lmax, len(muls_out) - 1):
            mid[l3] += muls_in[l1]
        self.muls_mid = tuple(mid)
        self.channels = (muls_out[0] + sum(muls_out[1:]), *muls_out[1:])  # before the gate: one more 0e for each l > 0

        sizes = [config["n_basis"], *[config["radial_size"]] * config["radial_layers"]]
        self.radial = nn.ParameterList(randn(i, o) for i, o in zip(sizes, [*sizes[1:], sum(mid)]))
        for i, w in enumerate(self.radial):  # the variance 4/fan_in makes up for SiLU, which the last layer has not
            w.data *= math.sqrt((4 if i < len(self.radial) - 1 else 1) / w.shape[0])
        self.linear_1 = nn.ParameterList(randn(m, m) for m in muls_in)
        self.linear_2 = nn.ParameterList(randn(i, o) for i, o in zip(mid, self.channels))
        self.skip = nn.ParameterList(randn(i, o) for i, o in zip(muls_in, self.channels))
        self.norm = nn.ParameterList(nn.Parameter(torch.ones(m)) for m in self.channels) if config["norm"] else None

    def forward(self, hs, sh, basis, senders, row_ptr, make_conv):
        hidden, (*inner, w3) = basis, self.radial
        for w in inner:
            hidden = silu(hidden @ w)  # (E, 64)
        conv = make_conv(self.muls_in, self.lmax, len(self.muls_out) - 1, sh.dtype, sh.device)
        x = torch.cat([x.flatten(1) for x in linear(hs, self.linear_1)], 1)
        x = conv(x, sh, hidden, w3 * self.avg_n_neighbors**-0.5, senders, row_ptr)  # (3)
        x = [m.reshape(len(m), 2 * l + 1, -1) for l, m in enumerate(split_degrees(x, self.muls_mid))]
        x, skip = linear(x, self.linear_2), linear(hs, self.skip)
        x = [a + skip[l] if l < len(skip) else a for l, a in enumerate(x)]  # (4)
        if self.norm is not None:
            x = rms_norm(x, self.norm)  # (5)
        return gate(x, self.muls_out[0])  # (6)


def rms_norm(xs, weights):
    """Equivariant RMSNorm without centring, one weight for each channel.

    As in the official code, and the released weights need it so: sum over channels, mean over degrees, degree l
    weighted by 1/(2l+1)^2. (The norm of eSEN, on which it is based, averages over channels.)
    """
    square = sum(x.square().sum((1, 2)) / (2 * l + 1) ** 2 for l, x in enumerate(xs)) / len(xs)  # (A,)
    inverse = torch.rsqrt(square + 1e-12)[:, None, None]
    return [x * inverse * w for x, w in zip(xs, weights)]


# 1 / sqrt(E[silu(z)^2]) for a unit normal z, on e3nn-jax' grid of 1,000,001 normal quantiles. The released weights need
# this value: the one that e3nn samples for torch differs in the third digit.
SILU_NORM = 1.6765620560798837


def gate(xs, n_scalars):
    """SiLU of the scalars; the other channels times SiLU of one extra scalar each (Weiler et al. 2018)."""
    act = SILU_NORM * silu(xs[0])
    scalars, *gates = act.split([n_scalars, *[x.shape[2] for x in xs[1:]]], 2)
    return [scalars, *[x * g for x, g in zip(xs[1:], gates)]]


# ----------------------------------------------------------------------------------------------------------------------
# (7): the network


def parse_hidden(text):
    """ "128x0e+64x1o+32x2e+32x3o" -> [128, 64, 32, 32]. Raises ValueError for anything but l = 0, 1, ... in order."""
    muls, _, irreps = zip(*(term.strip().partition("x") for term in text.split("+")))
    if irreps != ("0e", "1o", "2e", "3o")[: len(irreps)] or not all(m.isdigit() and int(m) for m in muls):
        raise ValueError(f'hidden irreps are "128x0e+64x1o+32x2e+32x3o" or a shorter list like it, not "{text}"')
    return [int(m) for m in muls]


class Nequix(nn.Module):
    """The network.

    config: atomic_numbers (the species, in order) and atom_energies (E0, eV, one for each); avg_n_neighbors, scale
    (eV/A) and shift (eV), as from `PackedSet.statistics()`; and the keys of DEFAULTS. conv: as in `choose_conv`. tf32:
    dense products on CUDA in TF32. Raises ValueError for a bad configuration.
    """

    DEFAULTS = dict(cutoff=6.0, hidden="128x0e+64x1o+32x2e+32x3o", lmax=3, layers=4)  # Table A.1; the cutoff in A
    DEFAULTS |= dict(n_basis=8, radial_size=64, radial_layers=2, polynomial_p=6.0, norm=True)

    def __init__(self, config, conv="auto", tf32=False):
        super().__init__()
        self.config = config = {**self.DEFAULTS, **config}
        self.conv, self.tf32 = conv, tf32
        hidden = parse_hidden(config["hidden"])
        if not len(hidden) - 1 <= config["lmax"] <= 3:
            raise ValueError(f"lmax {config['lmax']} must lie between the highest hidden l, {len(hidden) - 1}, and 3")
        if config["layers"] < 1 or config["cutoff"] <= 0:
            raise ValueError("layers and cutoff must be positive")
        n_species = len(config["atomic_numbers"])
        if len(config["atom_energies"]) != n_species or not all(0 < z < 119 for z in config["atomic_numbers"]):
            raise ValueError("a model needs an energy for each of its atomic numbers, and these between 1 and 118")
        muls = [[n_species], *[hidden] * (config["layers"] - 1), hidden[:1]]  # the last layer keeps scalars only
        self.layers = nn.ModuleList(Layer(i, o, config) for i, o in zip(muls, muls[1:]))
        self.readout = nn.ParameterList([randn(hidden[0], 1)])
        species = torch.full((119,), -1)
        species[config["atomic_numbers"]] = torch.arange(n_species)
        self.register_buffer("species", species, persistent=False)  # atomic number -> index
        self.register_buffer("e0", torch.tensor(config["atom_energies"], dtype=torch.float64), persistent=False)

    def _apply(self, fn, recurse=True):
        e0 = self.e0
        super()._apply(fn, recurse)
        self.e0 = e0.to(self.e0.device)  # E0s stay in float64
        return self

    @property
    def precision(self):
        """ "float64", "tf32" or "float32" """
        return "float64" if self.readout[0].dtype == torch.float64 else "tf32" if self.tf32 else "float32"

    def chosen_conv(self):
        return choose_conv(self.conv, self.e0.device, self.readout[0].dtype, self.config)

    def forward(self, numbers, vectors, senders, row_ptr):
        """Energy of each atom, eV, (A,) float64, without E0.

        numbers: (A,) atomic numbers; vectors: (E, 3) r_sender - r_receiver, A, float64; senders, row_ptr: as in a conv.
        With the fused kernels (the default on CUDA) it can be differentiated once, by the vectors only: for gradients
        of the weights use train.loss_and_gradient.
        """
        config, conv = self.config, self.chosen_conv()
        with dense_products(self.tf32):
            if conv == "fused":
                import kernels

                return kernels.atom_energies(self, numbers, vectors, senders, row_ptr)[0]
            dtype = self.readout[0].dtype
            r = torch.linalg.vector_norm(vectors, dim=1)
            basis = radial_basis(r, config["cutoff"], config["n_basis"], config["polynomial_p"]).to(dtype)  # (E, 8)
            sh = harmonics(vectors / r[:, None])[:, : (config["lmax"] + 1) ** 2].to(dtype)  # (E, 16)
            hs = [one_hot(self.species[numbers], len(self.e0)).to(dtype)[:, None]]  # (A, 1, species)
            for layer in self.layers:
                hs = layer(hs, sh, basis, senders, row_ptr, {"torch": torch_conv, "oeq": oeq_conv}[conv])
            return config["scale"] * linear(hs, self.readout)[0].flatten().double() + config["shift"]


@contextlib.contextmanager
def dense_products(tf32):
    """Dense float32 products on CUDA in TF32, or exact. torch has one switch for the whole process. It is set for a
    block only, so that the precision of a model is its own."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("high" if before == "tf32" else "highest")


# ----------------------------------------------------------------------------------------------------------------------
# (8): forces and stress


@torch.inference_mode(False)  # forces are derivatives, whatever mode the caller is in
def energy_forces_stress(model, batch, create_graph=False):
    """E (S,) eV, F = -dE/dr (A, 3) eV/A, stress = (1/V) dE/dstrain (S, 3, 3) eV/A^3 (positive: tensile; NaN where the
    cell is not periodic in three directions); all float64.

    The energy depends on positions and cell through the edge vectors alone, so one backward gives everything: sums of
    dE/dvector over the edges of an atom, and of the products vector x dE/dvector over those of a structure.
    create_graph: keep the graph, to train on forces and stress. Raises ValueError if that is asked of the fused
    kernels.
    """
    if create_graph and model.chosen_conv() == "fused":
        raise ValueError("the fused kernels have no second derivative: use conv='torch' or train.loss_and_gradient")
    # What was made in inference mode takes part in no derivative, but its copy does.
    batch = replace(batch, **{k: t.clone() for k, t in vars(batch).items() if t is not None and t.is_inference()})
    vectors = batch.vectors.detach().requires_grad_()
    with torch.enable_grad(), dense_products(model.tf32):
        atom_energy = model(batch.numbers, vectors, batch.senders, batch.row_ptr)
        total = atom_energy.sum()
        if not len(vectors):  # no edges: keep `vectors` in the graph so that grad() works
            total = total + vectors.sum()
        (g,) = torch.autograd.grad(total, vectors, create_graph=create_graph)
    if not create_graph:
        atom_energy = atom_energy.detach()
    return assemble(model, batch, atom_energy, g)


def assemble(model, batch, atom_energy, g):
    """Energies, forces and stresses from the energies of the atoms (A,) and g = dE/dvector (E, 3)."""
    n_atoms, n_structures = len(batch.numbers), len(batch.cell)
    energy = atom_energy + model.e0[model.species[batch.numbers]]
    energy = g.new_zeros(n_structures).index_add(0, batch.structure, energy)
    forces = g.new_zeros(n_atoms, 3).index_add(0, batch.receivers, g).index_add(0, batch.senders, g, alpha=-1)
    virial = (batch.vectors[:, :, None] * g[:, None, :]).flatten(1)  # (E, 9)
    # Sums over atoms first, then over structures: fewer atomics hit one address.
    virial = g.new_zeros(n_atoms, 9).index_add(0, batch.receivers, virial)
    virial = g.new_zeros(n_structures, 9).index_add(0, batch.structure, virial)
    virial = virial.view(-1, 3, 3)
    periodic = batch.pbc.all(1)
    a, b, c = batch.cell.unbind(1)
    volume = torch.where(periodic, (a * torch.linalg.cross(b, c)).sum(1).abs(), 1)[:, None, None]
    stress = torch.where(periodic[:, None, None], (virial + virial.mT) / (2 * volume), torch.nan)
    return energy, forces, stress


# ----------------------------------------------------------------------------------------------------------------------
# Files

PRECISIONS = {"float32": (torch.float32, False), "tf32": (torch.float32, True), "float64": (torch.float64, False)}
RELEASE, LATER = "7c2854de8e754b1a60274c7d9d2e014989ed632e", "9c852a9c4cce69ae5e75bc5a2cf670be21ff8c28"
RELEASED = {  # name: commit of github.com/atomicarchitects/nequix, sha256
    "nequix-mp-1": (RELEASE, "1647af8e627e1afa11e2bfadeab0797326513a521afd7dd01606a96f56783eee"),
    "nequix-mp-1-pft": (RELEASE, "a88aeaed71fd447572dc57af21d469207d7737b85a6dbb66f8c38156f175c5f1"),
    "nequix-oam-1": (LATER, "6a43475eaeb32a7a049f36c1306d78aa1e7a17e8af37aeda7901c8fec0ca845c"),
}
WEIGHTS_HELP = f"{', '.join(RELEASED)} (fetched on first use), an .nqx file, or a model.pt of train.py"


def add_options(p, names="weights device precision conv"):
    """Add these of the options that scripts share to p, an argument parser or a group of one."""
    add, default = p.add_argument, "(default: %(default)s)"
    if "weights" in names:
        add("--weights", default="nequix-mp-1", help=f"{WEIGHTS_HELP} {default}")
    if "device" in names:
        add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    if "precision" in names:
        add("--precision", choices=list(PRECISIONS), default="float32", help=f"arithmetic of the network {default}")
        add("--tf32", dest="precision", action="store_const", const="tf32", help="short for --precision tf32")
    if "conv" in names:
        what = "convolution: fused CUDA kernels, OpenEquivariance or plain torch; auto: the fastest that works here"
        add("--conv", choices=["auto", "fused", "oeq", "torch"], default="auto", help=f"{what} {default}")


def save(path, model):
    """Write weights and configuration. The file appears whole or not at all."""
    data = {"format": "modded-nequix", "config": model.config, "weights": model.state_dict()}
    torch.save(data, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def released(name):
    """Path of released weights in the user's cache, downloaded if they are not there. Raises OSError."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modded-nequix" / f"{name}.nqx"
    commit, sha256 = RELEASED[name]
    url = f"https://github.com/atomicarchitects/nequix/raw/{commit}/models/{name}.nqx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # writes beside the path, checks the hash, then renames
            torch.hub.download_url_to_file(url, str(path), sha256)
        except (OSError, RuntimeError) as e:
            raise OSError(f"cannot fetch {name} ({e}): get {url} on a machine with network, put it at {path}") from None
    return path


@torch.inference_mode(False)
def load(path, device="cpu", precision="float32", conv="auto"):
    """A model for inference (its weights take no gradients) from a checkpoint of ours, an official `.nqx` file, or a
    name in RELEASED, which is downloaded once. precision: "float32", "tf32" or "float64".

    Raises OSError if there is no such file, or ValueError with a one-line reason if it is damaged or not supported.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {precision}")
    dtype, tf32 = PRECISIONS[precision]
    if not os.path.isfile(path):
        if str(path) not in RELEASED:
            raise FileNotFoundError(f"no weights at {path}; the released ones are {', '.join(RELEASED)}")
        path = released(str(path))
    with open(path, "rb") as f:
        first = f.read(1)
    if first == b"{":
        model = load_nqx(path)
    elif zipfile.is_zipfile(path):
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(data, dict) or data.get("format") != "modded-nequix":
                raise ValueError("another program's file, or a training state; model.pt holds the weights")
            model = Nequix(data["config"])
            model.load_state_dict(data["weights"])
        except Exception as e:  # torch raises many kinds on a damaged file
            raise ValueError(f"{path} is not a modded-nequix checkpoint: {str(e).splitlines()[0]}") from None
    else:
        raise ValueError(f"{path} is neither a modded-nequix checkpoint nor an .nqx file (empty or damaged?)")
    model.conv, model.tf32 = conv, tf32
    return model.to(device, dtype).requires_grad_(False)


def load_nqx(path):
    """The official format: a line of JSON, then the leaves of the model's tree in order as consecutive .npy arrays: E0,
    then for each layer radial MLP, linear_1, linear_2, skip, norm, then the readout. What follows is ignored."""
    try:
        with open(path, "rb") as f:
            header = json.loads(f.readline())
            if header["index_weights"] or header.get("add_repulsion"):
                raise ValueError("species-indexed weights and pair repulsion are not supported")
            e0 = np.load(f, allow_pickle=False)
            theirs = dict(cutoff="cutoff", hidden="hidden_irreps", lmax="lmax", layers="n_layers", norm="layer_norm")
            theirs |= dict(
                n_basis="radial_basis_size", radial_size="radial_mlp_size", radial_layers="radial_mlp_layers"
            )
            theirs |= {"polynomial_p": "radial_polynomial_p"} | {k: k for k in ("avg_n_neighbors", "scale", "shift")}
            config = {ours: header[name] for ours, name in theirs.items()}
            config["hidden"] = config["hidden"].replace(" ", "")
            config |= dict(atomic_numbers=sorted(header["atomic_numbers"]), atom_energies=e0.astype(float).tolist())
            model = Nequix(config)
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


# ----------------------------------------------------------------------------------------------------------------------
# The choice of a convolution, and that of OpenEquivariance


def choose_conv(kind, device, dtype=torch.float32, config=None):
    """The convolution that runs for networks of `dtype` and `config` (default: the paper's) on `device`; "auto" takes
    the fastest that works. Raises ValueError if the one that was asked for does not work here."""
    if kind not in ("auto", "fused", "oeq", "torch"):
        raise ValueError(f"conv is auto, fused, oeq or torch, not {kind}")
    config = {**Nequix.DEFAULTS, **(config or {})}
    radial_mlp = config["radial_size"], config["radial_layers"]
    for choice in ("fused", "oeq", "torch") if kind == "auto" else (kind,):
        why_not = None
        if choice != "torch" and torch.device(device).type != "cuda":
            why_not = "it needs a CUDA device"
        elif choice == "oeq":
            why_not = oeq_error()
        elif choice == "fused" and torch.cuda.get_device_capability(device) < (8, 0):
            why_not = "it needs a GPU of compute capability 8.0 or newer"
        elif choice == "fused" and (dtype != torch.float32 or radial_mlp != (64, 2)):
            why_not = "it needs float32 or TF32, and a radial MLP of 2 layers of 64"
        elif choice == "fused" and torch.are_deterministic_algorithms_enabled():
            why_not = "its sums have no fixed order, and torch's deterministic algorithms are on"
        if why_not is None:
            return choice
    raise ValueError(f"the convolution {kind} does not work here: {why_not}")


@functools.lru_cache
def oeq_error():
    """None if OpenEquivariance works here, else why not."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    try:
        from openequivariance import BUILT_EXTENSION, BUILT_EXTENSION_ERROR
    except (ImportError, AssertionError) as e:
        return str(e)
    return None if BUILT_EXTENSION else str(BUILT_EXTENSION_ERROR)


@functools.lru_cache
@torch.inference_mode(False)
def oeq_conv(muls, lmax, l_out, dtype, device):
    """OpenEquivariance (Bharadwaj et al. 2025): kernels that gather, multiply and sum without messages in memory."""
    import openequivariance as oeq

    path_list = paths(len(muls) - 1, lmax, l_out)
    irreps = lambda terms: "+".join(f"{mul}x{l}{'eo'[l % 2]}" for mul, l in terms)
    features, spherical = irreps((mul, l) for l, mul in enumerate(muls)), irreps((1, l) for l in range(lmax + 1))
    out_irreps = irreps((muls[l1], l3) for l3, l1, _ in path_list)
    instructions = [(l1, l2, i, "uvu", True) for i, (_, l1, l2) in enumerate(path_list)]
    real = {torch.float32: np.float32, torch.float64: np.float64}[dtype]
    options = dict(shared_weights=False, irrep_dtype=real, weight_dtype=real, layout="ir_mul")
    problem = oeq.TPProblem(features, spherical, out_irreps, instructions, **options)
    kernel = oeq.TensorProductConv(problem, deterministic=False)
    sizes = [(2 * l3 + 1) * muls[l1] for l3, l1, _ in path_list]

    def conv(x, sh, hidden, w3, senders, row_ptr):
        if len(senders) == 0:
            return x.new_zeros(len(x), sum(sizes))
        receivers = torch.repeat_interleave(row_ptr.diff(), output_size=len(senders))
        out = kernel(x, sh, hidden @ w3, receivers, senders).split(sizes, 1)
        out = [o.view(len(x), 2 * l3 + 1, muls[l1]) for o, (l3, l1, _) in zip(out, path_list)]
        by_degree = [[o for o, (l3, _, _) in zip(out, path_list) if l3 == l] for l in range(l_out + 1)]
        return torch.cat([torch.cat(o, 2).flatten(1) for o in by_degree], 1)

    return conv
