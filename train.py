"""Train Nequix. One script, one loop, one clock; the same step on a CPU, one GPU or many.

    python train.py                                                     # data/mptrj if it is packed, else data/sample
    torchrun --nproc_per_node=2 train.py --data data/mptrj --tf32       # the same global batch, dealt to two GPUs
    python train.py --validate nequix-mp-1 --data data/mptrj --frames 200
    python train.py --init nequix-mp-1 --refit-e0 --data data/mine --lr 5e-3 --epochs 10     # fine-tuning

Rerunning a command resumes its run exactly; Ctrl-C and SIGTERM save first. The defaults are Table A.1 of the paper, with
Muon in the form of optax, which trained nequix-mp-1. Results: --out/log.txt, model.pt (EMA weights), curve.png.
"""

import argparse
import functools
import hashlib
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import kernels
import model as nequix
from data import Batch, PackedSet, deal, micro_batches, prefetch, step_indices
from model import Nequix, energy_forces_stress
from muon import Muon

# ----------------------------------------------------------------------------------------------------------------------
# Hyper-parameters


def arg(default, help, **kwargs):
    return field(default=default, metadata=dict(help=help, **kwargs))


@dataclass
class Args:
    data: str = arg("", "packed set (default: data/mptrj if packed, else data/sample, fetched if absent)")
    out: str = arg("", "folder of the run (default: runs/ and the name of the set)")
    recipe: str = arg(
        "paper",
        "defaults of what follows: Table A.1 of the paper, or those for the mini track",
        choices=["paper", "fast"],
    )
    # model
    init: str = arg(
        "", "start from these weights, their architecture and statistics: a name or a file", metavar="WEIGHTS"
    )
    refit_e0: bool = arg(False, "with --init: fit the atoms' energies to the training frames first")
    hidden: str = arg("128x0e+64x1o+32x2e+32x3o", "irreps of the hidden features")
    lmax: int = arg(3, "highest degree of the spherical harmonics")
    layers: int = arg(4, "message-passing layers")
    cutoff: float = arg(6.0, "A")
    n_basis: int = arg(8, "Bessel functions")
    radial_size: int = arg(64, "width of the radial MLP")
    radial_layers: int = arg(2, "hidden layers of the radial MLP")
    no_norm: bool = arg(False, "leave the equivariant RMSNorm out")
    # optimization
    epochs: float = arg(100.0, "passes over the training frames")
    steps: int = arg(0, "steps, instead of --epochs")
    batch: int = arg(256, "structures a step, over all ranks")
    optimizer: str = arg("muon", "optimizer", choices=["muon", "adamw"])
    lr: float = arg(0.01, "peak learning rate")
    vector_lr: float = arg(1.0, "times --lr: of the norms' weights, which Muon leaves to Adam")
    decay: str = arg("cosine", "of the learning rate, to 1e-6", choices=["cosine", "linear"])
    weight_decay: float = arg(1e-3, "of the weight matrices; multiplies the learning rate")
    warmup_epochs: float = arg(0.1, "linear warm-up, from 0.2 of the peak")
    grad_clip: float = arg(100.0, "largest norm of the gradient")
    ema: float = arg(0.999, "decay of the averaged weights")
    energy_weight: float = arg(20.0, "of the mean |dE|/atom, eV")
    force_weight: float = arg(20.0, "of the mean |dF|, the length of the vector, eV/A")
    stress_weight: float = arg(5.0, "of the mean |d stress| component, eV/A^3")
    seed: int = arg(0, "of the weights and the order of the data")
    dtype: str = arg("float32", "of the network", choices=["float32", "float64"])
    # how it runs; none of these changes the result but by rounding
    tf32: bool = arg(False, "TensorFloat32 for dense products on CUDA")
    conv: str = arg("auto", "convolution", choices=["auto", "torch", "oeq", "fused"])
    device: str = arg("", "where (default: cuda if there is one)", choices=["cpu", "cuda"])
    max_edges: int = arg(0, "edges in a micro-batch (default: from the free memory)")
    eval_every: int = arg(0, "steps between validations (default: one an epoch, at least 10 in all)")
    save_every: int = arg(200, "steps between checkpoints")
    # instead of training
    validate: str = arg("", "print the errors of these weights on the validation split, and leave", metavar="WEIGHTS")
    frames: int = arg(0, "with --validate: so many frames only")
    test: bool = arg(False, "with --validate: on the test split, once a record is chosen")


BASELINE = "E0s, zero forces and stress: {:.2f} meV/atom, {:.2f} meV/A, {:.3f} meV/A^3/atom"
FREE = (
    "data out recipe conv device max_edges eval_every save_every validate frames test".split()
)  # may change between resumptions

# Of the mini track: Muon moves a weight by a part of --lr a step, and 460 steps must take it away from its unit variance.
FAST = dict(
    hidden="64x0e+32x1o+32x2e",
    lmax=2,
    cutoff=5.0,
    epochs=13.0,
    batch=128,
    lr=0.1,
    vector_lr=2.0,
    decay="linear",
    weight_decay=0.1,
    ema=0.9,
    force_weight=10.0,
)
ARCHITECTURE = "hidden lmax layers cutoff n_basis radial_size radial_layers".split()


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Args):
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, default=f.default)
        help = dict(f.metadata)
        if f.type is not bool and f.default not in ("", 0):
            help["help"] += f" (default: {f.default})"
        p.add_argument("--" + f.name.replace("_", "-"), **kind, **help)
    if p.parse_known_args(argv)[0].recipe == "fast":
        p.set_defaults(**FAST)
    a = Args(**vars(p.parse_args(argv)))
    for (
        name
    ) in "batch lr vector_lr layers cutoff n_basis radial_size radial_layers epochs save_every grad_clip".split():
        if not 0 < getattr(a, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {getattr(a, name)}")
    if a.refit_e0 and not a.init:
        raise ValueError("--refit-e0 needs --init")
    for name in ("test", "frames"):
        if getattr(a, name) and not a.validate:
            raise ValueError(f"--{name} needs --validate")
    if not 0 <= a.ema < 1:
        raise ValueError(f"--ema must be at least 0 and below 1, not {a.ema}")
    for name in [*ARCHITECTURE, "no_norm"]:
        if a.init and getattr(a, name) != p.get_default(name):
            raise ValueError(f"--init takes the architecture from the weights: leave --{name.replace('_', '-')} out")
    for name in "steps max_edges eval_every frames seed weight_decay warmup_epochs energy_weight force_weight stress_weight".split():
        if not 0 <= getattr(a, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(a, name)}")
    return a


# ----------------------------------------------------------------------------------------------------------------------
# Loss and errors


def differences(batch, predicted):
    """dE/n (S,), dF (A, 3), d stress (S, 3, 3) against the labels, and where each label exists; 0 elsewhere."""
    out = []
    for p, label in zip(predicted, (batch.energy, batch.forces, batch.stress)):
        there = torch.isfinite(label)
        out += [torch.where(there, p - label, 0), there]
    out[0] = out[0] / batch.n_atoms
    return out


def batch_loss(batch, predicted, weights, counts):
    """This batch's share of the loss: sums over its structures, divided by the counts of the whole step.

    20 mean |dE|/n + 20 mean |dF| (length of the vector) + 5 mean |d stress| (components).
    """
    de, _, df, _, ds, _ = differences(batch, predicted)
    sums = de.abs().sum(), torch.linalg.vector_norm(df, dim=1).sum(), ds.abs().sum()
    return sum(w * s / n for w, s, n in zip(weights, sums, counts))


def loss_and_gradient(model, batch, weights, counts):
    """This batch's share of the loss, whose gradient is added to the weights'.

    Forces and stress are linear in g = dE/dvector, so the gradient of the loss L(E, g) by the weights is that of
    sum_atoms (dL/dE) E + D, where D is the derivative of the energy along the edge vectors' direction dL/dg. With fused
    kernels D is computed forward, as a tangent, and nothing is differentiated twice; elsewhere autograd does that.
    """
    if model.chosen_conv() != "fused":
        loss = batch_loss(batch, energy_forces_stress(model, batch, create_graph=True), weights, counts)
        loss.backward(inputs=list(model.parameters()))
        return loss.detach()
    vectors = batch.vectors.detach().requires_grad_()
    energy, state = model.fused(batch.numbers, vectors, batch.senders, batch.row_ptr, keep=True)
    (g,) = torch.autograd.grad(energy.sum() + 0 * vectors.sum(), vectors)
    energy, g = energy.detach().requires_grad_(), g.requires_grad_()
    loss = batch_loss(batch, nequix.assemble(model, batch, energy, g), weights, counts)
    by_energy, direction = torch.autograd.grad(loss, (energy, g))
    # In units of the direction's largest component: the tangents are then of an order that suits float16.
    largest = torch.cat([direction.abs().flatten(), direction.new_full((1,), 1e-30)]).max()
    unit = torch.exp2(torch.floor(torch.log2(largest)))  # a power of two: nothing is rounded
    energy, derivative = model.fused_tangent(batch.vectors, direction / unit, state)
    params = list(model.parameters())
    grads = torch.autograd.grad((by_energy / unit) @ energy.double() + derivative.sum(), params)
    torch._foreach_mul_(grads, unit.float())
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    torch._foreach_add_([p.grad for p in params], grads)
    return loss.detach()


class Padded:
    """A Batch with room for more than it has, to which others are copied; it has the tensors that loss_and_gradient reads. Atoms
    beyond theirs have no edges and belong to the last structure, which like all structures beyond theirs has no labels;
    edges beyond theirs are outside row_ptr: whatever they are, they count for nothing."""

    FIELDS = "numbers cell pbc n_atoms structure senders receivers row_ptr vectors energy forces stress".split()

    def __init__(self, batch, room):
        """room: atoms, edges and structures"""
        atoms, edges, structures = room
        rows = dict.fromkeys(self.FIELDS, structures) | dict.fromkeys(("senders", "receivers", "vectors"), edges)
        rows |= dict.fromkeys(("numbers", "structure", "forces"), atoms) | dict(row_ptr=atoms + 1)
        first = {k: getattr(batch, k)[:1] for k in self.FIELDS}
        self.batch = Batch(
            positions=None, shifts=None, **{k: t.repeat(rows[k], *[1] * (t.ndim - 1)) for k, t in first.items()}
        )
        self.fill(batch)

    def fill(self, batch):
        """False if there is no room."""
        b, a, e, s = self.batch, len(batch.numbers), len(batch.senders), len(batch.cell)
        if a > len(b.numbers) or e > len(b.senders) or s >= len(b.cell):
            return False
        new = [getattr(batch, k) for k in self.FIELDS]
        torch._foreach_copy_([getattr(b, k)[: len(t)] for k, t in zip(self.FIELDS, new)], new)
        b.row_ptr[a + 1 :], b.structure[a:] = e, len(b.cell) - 1
        b.energy[s:], b.forces[a:], b.stress[s:] = torch.nan, torch.nan, torch.nan
        return True


class Replay:
    """`loss_and_gradient` of one batch after another. With fused kernels on CUDA a graph of it is captured, with room for a tenth
    more than the largest batch so far, and is then one launch in place of a thousand. Above MOST edges the GPU is at work for
    longer than Python launches, and the graph's memory, which is its own, would be in the way."""

    MOST = 1_000_000

    def __init__(self, model, weights):
        self.model, self.weights, self.padded, self.room = model, weights, None, (0, 0, 0)
        for p in model.parameters():  # where the graph adds to
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    def __call__(self, batch, counts):
        cuda = batch.vectors.device.type == "cuda"
        if not cuda or self.model.chosen_conv() != "fused" or not 0 < len(batch.senders) <= self.MOST:
            return loss_and_gradient(self.model, batch, self.weights, counts)
        if not (self.padded and self.padded.fill(batch)):
            self.padded = self.graph = self.loss = None  # frees its memory
            sizes = len(batch.numbers), len(batch.senders), len(batch.cell)
            self.room = tuple(max(old, n + n // 10 + 1) for old, n in zip(self.room, sizes))
            padded, self.counts = Padded(batch, self.room), batch.energy.new_ones(3)
            run = functools.partial(loss_and_gradient, self.model, padded.batch, self.weights, self.counts)
            grads = [p.grad for p in self.model.parameters()]
            before = [g.clone() for g in grads]
            self.graph, self.loss = kernels.capture(run, batch.vectors.device)
            torch._foreach_copy_(grads, before)
            self.padded = padded
        self.counts.copy_(torch.from_numpy(counts), non_blocking=True)
        self.graph.replay()
        return self.loss


def label_counts(packed, indices):
    """Structures with an energy, atoms with forces, stress components, (3,): what the loss of `indices` is divided by."""
    forces = packed.n_atoms[indices][packed.has_forces[indices]].sum()
    counts = packed.has_energy[indices].sum(), forces, 9 * packed.has_stress[indices].sum()
    return np.maximum(counts, 1.0)


@torch.no_grad()
def evaluate(model, packed, indices, max_edges, rank=0, ranks=1):
    """The three MAEs: energy, mean over structures of |dE|/n, meV/atom; forces, mean over all components of all atoms,
    meV/A (exact: the official code averages batch by batch); stress, mean over structures of the nine |d stress|/n,
    meV/A^3/atom. With them, the same with zero forces and stress and the E0s alone. Sharded over ranks, exact sums."""
    total = torch.zeros(9, dtype=torch.float64, device=packed.device)
    mine = deal(indices, packed.n_edges, ranks)[rank]
    pieces = micro_batches(mine, packed.n_atoms, packed.n_edges, max_edges, max_edges)
    for batch in prefetch(packed, tqdm(pieces, "validation", leave=False, disable=None if rank == 0 else True)):
        de, has_e, df, has_f, ds, has_s = differences(batch, energy_forces_stress(model, batch))
        e0 = model.e0[model.species[batch.numbers]]
        e0 = e0.new_zeros(len(batch.cell)).index_add(0, batch.structure, e0)
        n = batch.n_atoms[:, None, None]
        e_base = torch.where(has_e, batch.energy - e0, 0) / batch.n_atoms
        base = e_base, torch.where(has_f, batch.forces, 0), torch.where(has_s, batch.stress, 0) / n
        total[:3] += torch.stack([x.abs().sum() for x in (de, df, ds / n)])
        total[3:6] += torch.stack([x.sum() for x in (has_e, has_f, has_s)])
        total[6:] += torch.stack([x.abs().sum() for x in base])
    if ranks > 1:
        dist.all_reduce(total)
    total = total.cpu()
    return (1000 * total[:3] / total[3:6]).tolist(), (1000 * total[6:] / total[3:6]).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Setup


def default_data():
    if (Path("data/mptrj") / "meta.json").exists():
        return "data/mptrj"
    if not (Path("data/sample") / "meta.json").exists():
        data.fetch_sample("data/sample")
    return "data/sample"


def default_max_edges(model, device):
    """Edges of a micro-batch whose double backward fits the free memory: about 12 copies of what an edge carries."""
    if device.type == "cpu":
        return 20_000
    floats = 0
    for layer in model.layers:
        w = layer.radial[-1].shape[1]
        messages = sum((2 * l + 1) * m for l, m in enumerate(layer.muls_mid))
        floats += dict(torch=w + 2 * messages, oeq=w, fused=45)[model.chosen_conv()]
    return max(int(torch.cuda.mem_get_info(device)[0] * 0.7 / (12 * 4 * floats)), 10_000)


def learning_rate(step, total, warmup, peak, decay="cosine"):
    """From 0.2 of the peak up, linear, then to 1e-6 at `total` along a cosine (optax.warmup_cosine_decay_schedule) or a line."""
    if step < warmup:
        return peak * (0.2 + 0.8 * step / warmup)
    x = min((step - warmup) / max(total - warmup, 1), 1)
    return 1e-6 + (peak - 1e-6) * (0.5 * (1 + math.cos(math.pi * x)) if decay == "cosine" else 1 - x)


def make_optimizer(params, a):
    if a.optimizer == "muon":
        return Muon(params, lr=a.lr, weight_decay=a.weight_decay)
    groups = [
        dict(params=[p for p in params if p.ndim == n], weight_decay=w) for n, w in ((2, a.weight_decay), (1, 0.0))
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=a.lr)


def trouble(losses):
    """What is wrong with the last losses, or None."""
    if not math.isfinite(losses[-1]):
        return "is not finite"
    if len(losses) >= 200 and min(losses[-100:]) > 10 * statistics.median(losses[:-100]):
        return "has been over ten times its running median for 100 steps"
    return None


def save_state(path, **state):
    """The file appears whole or not at all, also when the machine goes down."""
    with open(f"{path}.tmp", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def draw_curve(path, history, targets):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    units = "energy MAE (meV/atom)", "force MAE (meV/A)", "stress MAE (meV/A$^3$/atom)"
    for k, (axis, unit) in enumerate(zip(axes, units)):
        axis.semilogy([h[0] for h in history], [h[1][k] for h in history], "o-", ms=3)
        axis.axhline(targets[k], color="0.6", ls="--", lw=1, label="E0s, zero forces and stress")
        axis.set(xlabel="step", ylabel=unit)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def sources():
    """The text of all scripts that a run depends on, and its sha256."""
    here = Path(__file__).parent
    text = "".join(
        f"{'=' * 40} {f}\n{(here / f).read_text()}\n" for f in "train.py model.py kernels.py muon.py data.py".split()
    )
    return text, hashlib.sha256(text.encode()).hexdigest()


def run_header(a, packed, device, ranks, model):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    smi = ""
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    text, sha256 = sources()
    return (
        f"{text}{'=' * 40} run\n{time.strftime('%Y-%m-%d %H:%M:%S %z')}\n{smi}sources: sha256 {sha256}\n"
        f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}\n"
        f"{ranks} x {name}, convolution: {model.chosen_conv()}\n"
        f"data {packed.path}: sha256 {packed.meta['data_sha256']}, {packed.meta['counts']}\n"
        f"{asdict(a)}\n{sum(p.numel() for p in model.parameters())} weights\n"
    )


@torch.no_grad()
def refitted_e0(model, packed, indices, max_edges, rank, ranks):
    """The model's E0s plus their least-squares fit, of least norm, to what energy it leaves of the frames `indices`: elements
    that are not there keep theirs. (species,) eV, the same on all ranks."""
    indices = indices[packed.has_energy[indices]]
    n = len(model.e0)
    xx_xy = torch.zeros(n, n + 1, dtype=torch.float64, device=packed.device)
    pieces = micro_batches(
        deal(indices, packed.n_edges, ranks)[rank], packed.n_atoms, packed.n_edges, max_edges, max_edges
    )
    for batch in prefetch(packed, tqdm(pieces, "fitting E0s", leave=False, disable=None if rank == 0 else True)):
        key = batch.structure * n + model.species[batch.numbers]
        x = torch.bincount(key, minlength=n * len(batch.cell)).view(-1, n).double()  # composition
        energy = (
            model(batch.numbers, batch.vectors, batch.senders, batch.row_ptr) + model.e0[model.species[batch.numbers]]
        )
        y = batch.energy.index_add(0, batch.structure, -energy)
        xx_xy += x.T @ torch.cat([x, y[:, None]], 1)
    if ranks > 1:
        dist.all_reduce(xx_xy)
    xx_xy = xx_xy.cpu().numpy()
    return model.e0 + torch.from_numpy(np.linalg.lstsq(xx_xy[:, :n], xx_xy[:, n], rcond=None)[0]).to(model.e0)


def leave_now(status=1):
    """Without the end of other threads and of connections, which would abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def watch_next_rank(rank, ranks):
    """From here on this process ends, with a line, when the next rank is gone, for which its GPU would wait and not tell. Returns
    what to call when all ranks leave. (Gloo notices a closed connection. Each rank listens to one, and goes with it.)"""
    following, group = (rank + 1) % ranks, dist.new_group(backend="gloo", timeout=timedelta(days=1000))

    def watch():
        try:
            dist.recv(torch.zeros(1), following, group)
        except RuntimeError:
            time.sleep(3)  # this rank may be about to leave with a better reason
            gone = f"error on rank {rank}: rank {following} is gone; the same command goes on from the last checkpoint"
            print(gone, file=sys.stderr)
            leave_now()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def leave():
        dist.barrier()  # torchrun ends the others when one leaves: not before the last checkpoint is written
        dist.send(torch.zeros(1), (rank - 1) % ranks, group)
        thread.join()
        dist.destroy_process_group()

    return leave


# ----------------------------------------------------------------------------------------------------------------------
# Validation of given weights


def check_elements(model, packed, indices):
    atoms = np.repeat(np.isin(np.arange(len(packed.n_atoms)), indices), packed.n_atoms)
    unknown = set(np.unique(packed.numbers[atoms]).tolist()) - set(model.config["atomic_numbers"])
    if unknown:
        raise ValueError(f"{packed.path} has elements that the model lacks: atomic numbers {sorted(unknown)}")


@torch.no_grad()
def validate_weights(a, device, dtype):
    """Errors of a checkpoint on a packed set, and the usual suspects if they are large: E0s, units, the stress sign."""
    model = nequix.load(a.validate, device, dtype, a.conv)
    packed = PackedSet(a.data, model.config["cutoff"], device)
    split = "test" if a.test else "validation"
    indices = packed.indices(data.TEST if a.test else data.VAL)
    indices = np.sort(np.random.RandomState(0).permutation(indices)[: a.frames or None])
    if len(indices) == 0:
        raise ValueError(f"{a.data} has no {split} frames")
    check_elements(model, packed, indices)
    max_edges = a.max_edges or default_max_edges(model, device)
    (e, f, s), base = evaluate(model, packed, indices, max_edges)
    print(f"{a.validate} on {len(indices)} {split} frames of {a.data}:")
    print(f"energy MAE {e:.2f} meV/atom, force MAE {f:.2f} meV/A, stress MAE {s:.3f} meV/A^3/atom")
    print(f"(E0s alone, zero forces, zero stress: {base[0]:.2f}, {base[1]:.2f}, {base[2]:.3f})")

    ours = packed.meta["statistics"]
    ours = dict(zip(ours["atomic_numbers"], ours["atom_energies"]))
    theirs = dict(zip(model.config["atomic_numbers"], model.e0.tolist()))
    frames = (data.composition(packed.numbers, packed.offsets)[packed.split == data.TRAIN] > 0).sum(0)
    gap = {z: ours[z] - theirs[z] for z in ours if z in theirs and frames[z] >= 20}  # fits to a few frames say nothing
    if gap:
        worst = sorted(gap, key=lambda z: -abs(gap[z]))[:5]
        mean = statistics.fmean(map(abs, gap.values()))
        print(f"E0s, those of the set less those of the weights, over {len(gap)} elements in 20 frames or more:")
        print(f"  mean |difference| {mean:.3f} eV; largest: " + ", ".join(f"Z={z} {gap[z]:+.3f} eV" for z in worst))
    products = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in prefetch(packed, micro_batches(indices, packed.n_atoms, packed.n_edges, max_edges, max_edges)):
        _, forces, stress = energy_forces_stress(model, batch)
        for k, (p, label) in enumerate(((forces, batch.forces), (stress, batch.stress))):
            there = torch.isfinite(p) & torch.isfinite(label)
            products[2 * k : 2 * k + 2] += torch.stack([(p * label)[there].sum(), p.square()[there].sum()])
    slope = products[::2] / products[1::2]
    print(f"labels = slope x prediction: forces {slope[0]:.3f}, stress {slope[1]:.3f}")
    print("  about 1: same units and sign; stress -1: the other sign; 160: GPa; 1602: kbar, not eV/A^3")


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(a, device, dtype, rank, ranks):
    leave = watch_next_rank(rank, ranks) if ranks > 1 else lambda: None
    model = nequix.load(a.init, device, dtype, a.conv).requires_grad_() if a.init else None
    packed = PackedSet(a.data, model.config["cutoff"] if a.init else a.cutoff, device)
    train_frames, val_frames = packed.indices(data.TRAIN), packed.indices(data.VAL)
    if len(val_frames) == 0:
        raise ValueError(f"{a.data} has no validation frames")
    steps_per_epoch = len(train_frames) / a.batch
    total = a.steps or max(round(a.epochs * steps_per_epoch), 1)
    eval_every = a.eval_every or max(min(round(steps_per_epoch), total // 10), 1)
    out = Path(a.out or f"runs/{Path(a.data).name}")

    # Model, averaged weights, optimizer. All gradients lie in one flat tensor, which is all-reduced as it is; its last
    # two elements carry the loss and whether a rank was told to stop.
    torch.manual_seed(a.seed)
    if a.init:
        check_elements(model, packed, np.append(train_frames, val_frames))
    else:
        stats = packed.meta["statistics"] if a.cutoff == packed.meta["cutoff"] else packed.statistics()
        config = {**stats, **{k: getattr(a, k) for k in ARCHITECTURE}, "norm": not a.no_norm}
        model = Nequix(config, a.conv).to(device, dtype)
    ema_model = deepcopy(model).requires_grad_(False)
    params, ema_params = list(model.parameters()), list(ema_model.parameters())
    sizes = [p.numel() for p in params]
    flat = torch.zeros(sum(sizes) + 2, dtype=dtype, device=device)
    for p, g in zip(params, flat[:-2].split(sizes)):
        p.grad = g.view_as(p)
    optimizer = make_optimizer(params, a)
    max_edges = a.max_edges or default_max_edges(model, device)
    weights = a.energy_weight, a.force_weight, a.stress_weight
    replay = Replay(model, weights)

    # Resume. Nothing is drawn at random after the initial weights; the position in the data is the step.
    step, train_s, gpu_h, history, losses = 0, 0.0, 0.0, [], deque(maxlen=1000)
    fixed = {k: v for k, v in asdict(a).items() if k not in FREE} | {"data_sha256": packed.meta["data_sha256"]}
    (_, sources_sha256), edited = sources(), False
    state_file, previous_file, resumed = out / "state.pt", out / "state.previous.pt", False
    if previous_file.exists() and not state_file.exists() and rank == 0:  # killed between the two renames of save()
        os.replace(previous_file, state_file)
    if ranks > 1:
        dist.barrier()
    if state_file.exists():
        try:
            state = torch.load(
                state_file, map_location="cpu", weights_only=True
            )  # load_state_dict() moves what must move
            differ = [f"{k}: {state['fixed'].get(k)} -> {v}" for k, v in fixed.items() if state["fixed"].get(k) != v]
        except Exception as e:
            why = (str(e) or type(e).__name__).splitlines()[0]
            then = (
                f"remove it to go on from {previous_file}" if previous_file.exists() else f"remove {out} to start anew"
            )
            raise ValueError(f"{state_file} can't be read ({why}): {then}") from None
        if differ:
            raise ValueError(f"{out} holds a run with other settings ({'; '.join(differ)}): choose another --out")
        model.load_state_dict(state["model"])
        ema_model.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, train_s, gpu_h, history = (state[k] for k in ("step", "train_s", "gpu_h", "history"))
        resumed, edited = True, state.get("sources_sha256") != sources_sha256
        if edited and step == total:
            raise ValueError(f"{out} holds a run that ended with other sources: choose another --out")
        losses.extend(state["losses"])
    if ranks > 1:
        extremes = torch.tensor([step, -step], device=device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        if extremes.sum() != 0:
            raise ValueError(f"the ranks find different checkpoints: {out} must be one folder, which all hosts see")
    if a.refit_e0:
        e0 = state["e0"] if resumed else refitted_e0(model, packed, train_frames, max_edges, rank, ranks)
        for m in (model, ema_model):
            m.e0.copy_(e0)
            m.config["atom_energies"] = e0.tolist()
    out.mkdir(parents=True, exist_ok=True)

    def log(text, screen=True):
        if rank == 0:
            with open(out / "log.txt", "a") as f:
                f.write(text + "\n")
            if screen:
                tqdm.write(text, file=sys.stdout)

    def save():
        """False if the last loss is suspect: the checkpoint before is kept."""
        suspect = len(losses) >= 200 and losses[-1] > 10 * statistics.median(losses)
        if rank == 0 and not suspect:
            numbers = dict(step=step, train_s=train_s, gpu_h=gpu_h, history=history, losses=list(losses))
            parts = dict(
                model=model.state_dict(), ema=ema_model.state_dict(), optimizer=optimizer.state_dict(), e0=model.e0
            )
            if state_file.exists():
                os.replace(state_file, previous_file)
            save_state(state_file, fixed=fixed, sources_sha256=sources_sha256, **parts, **numbers)
        return not suspect

    def stop_clock():
        """Book the time since `start`, and start anew."""
        nonlocal train_s, gpu_h, start
        sync()
        now = time.perf_counter()
        train_s, gpu_h = train_s + now - start, gpu_h + (now - start) * ranks / 3600 * (device.type == "cuda")
        start = now

    def sync():
        if device.type == "cuda":
            torch.cuda.synchronize()

    log(run_header(a, packed, device, ranks, model), screen=False)
    if resumed:
        log(f"resumed at step {step} of {total}" + edited * ", with other sources than before: see above")
    else:
        log(
            f"{len(train_frames)} training and {len(val_frames)} validation frames; {total} steps of {a.batch}; {ranks} rank(s)"
        )

    def validate():
        mae, base = evaluate(ema_model, packed, val_frames, max_edges // 2, rank, ranks)  # the graph keeps its memory
        text = f"step={step}/{total} energy={mae[0]:.2f} meV/atom forces={mae[1]:.2f} meV/A stress={mae[2]:.3f} meV/A^3/atom"
        if history:
            rate = (step - history[-1][0]) * a.batch / (train_s - history[-1][2])
            memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0
            loss = statistics.fmean(list(losses)[history[-1][0] - step :])
            text += f" loss={loss:.3f} train_s={train_s:.1f} gpu_h={gpu_h:.4f} rate={rate:.1f} structures/s"
            text += f" memory={memory:.2f} GiB"
        else:
            log(BASELINE.format(*base))
        history.append([step, mae, train_s, base])
        log(text)

    # The micro-batches of this rank, step by step from `first`
    def pieces_of(s):
        mine = deal(step_indices(train_frames, a.batch, a.seed, s), packed.n_edges, ranks)[rank]
        return micro_batches(mine, packed.n_atoms, packed.n_edges, max_edges, max_edges)

    def batches_from(first):
        return prefetch(packed, (p for s in range(first, total) for p in pieces_of(s)))

    def check(result, done, s):
        """Was a rank told to stop? Raises ValueError on a loss that is not finite, or has exploded: no checkpoint is
        written after such a step."""
        if done:
            done.synchronize()
        loss, asked, norm = result.tolist()
        losses.append(loss if math.isfinite(norm) else math.nan)
        if why := trouble(list(losses)):
            if rank == 0 and state_file.exists():
                if torch.load(state_file, map_location="cpu", weights_only=True)["step"] >= s:
                    # These are the weights of this loss: back to those before.
                    os.replace(previous_file, state_file) if previous_file.exists() else state_file.unlink()
            ids = " ".join(packed.name(i) for i in step_indices(train_frames, a.batch, a.seed, s))
            last = f"the last good checkpoint is {state_file}" if state_file.exists() else "there is no checkpoint yet"
            raise ValueError(f"the loss {why} at step {s} ({loss}); {last}; frames: {ids}")
        return asked > 0

    # Ctrl-C and SIGTERM finish the step, save, and leave; another one five seconds later leaves at once. (torchrun passes
    # on what its workers may have got already.)
    told = []

    def on_signal(number, frame):
        if told and time.monotonic() - told[0][1] > 5:
            raise KeyboardInterrupt
        told.append((number, time.monotonic()))

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    # Warm-up outside the clock: kernels are built, a graph gets the room of the next steps, and the gradient is thrown away.
    if step < total:
        pieces = pieces_of(step)[:1]
        if device.type == "cuda":
            soon = [
                p
                for s in range(step, min(step + 1000, total))
                for p in pieces_of(s)
                if packed.n_edges[p].sum() <= Replay.MOST
            ]
            if soon:
                pieces = [max(soon, key=lambda p: n[p].sum()) for n in (packed.n_atoms, packed.n_edges)]
        try:
            for piece in pieces:
                replay(packed.batch(piece), np.ones(3))
        except torch.cuda.OutOfMemoryError:  # the first step will deal with it
            replay = Replay(model, weights)
        flat.zero_()
    if not history:
        validate()

    bar = tqdm(total=total, initial=step, unit="step", disable=None if rank == 0 else True)
    batches, pending, stop = batches_from(step), None, False
    sync()
    start = time.perf_counter()
    while step < total and not stop:
        counts = label_counts(packed, step_indices(train_frames, a.batch, a.seed, step))
        fits = True
        try:
            for _ in pieces_of(step):
                flat[-2] += replay(next(batches), counts)
        except torch.cuda.OutOfMemoryError:
            fits = False
        if not fits:  # outside the handler, which holds on to the failed graph: the step again, in smaller pieces
            max_edges, replay = max_edges // 2, Replay(model, weights)
            flat.zero_()
            torch.cuda.empty_cache()
            if max_edges < 1000:
                raise ValueError("out of GPU memory even with micro-batches of 2000 edges: a smaller model?")
            log(f"out of memory at step {step}: micro-batches of {max_edges} edges from here")
            batches = batches_from(step)
            continue
        flat[-1].fill_(len(told))  # `flat[-1] = ...` would wait for the GPU
        if ranks > 1:
            dist.all_reduce(flat)
        grad = flat[:-2]
        norm = torch.linalg.vector_norm(grad)
        # Read one step late, so that the GPU need not wait for it.
        result = torch.cat([flat[-2:], norm[None]]).to("cpu", non_blocking=True)
        done = torch.cuda.Event() if device.type == "cuda" else None
        if done:
            done.record()
        grad *= (a.grad_clip / (norm + 1e-6)).clamp(max=1)
        rate = learning_rate(step, total, a.warmup_epochs * steps_per_epoch, a.lr, a.decay)
        for group in optimizer.param_groups:
            group["lr"] = rate * (a.vector_lr if group.get("kind") == "adam" else 1)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema_params, params, 1 - min(a.ema, (1 + step) / (10 + step)))
        flat.zero_()
        step += 1
        bar.update()

        validating, saving = (step % n == 0 or step == total for n in (eval_every, a.save_every))
        if pending is not None:
            stop = check(*pending)
        pending = result, done, step - 1
        if validating or saving or stop:  # the weights are kept: look at the last loss first
            stop, pending = check(*pending) or stop, None
        if validating:
            stop_clock()
            validate()
            if rank == 0:
                nequix.save(out / "model.pt", ema_model)
            sync()
            start = time.perf_counter()
        if saving or stop:
            stop_clock()
            saved = save()
    bar.close()
    if stop and step < total:
        where = f"saved to {state_file}" if saved else "its loss is suspect: not saved, an older checkpoint is kept"
        log(f"stopped at step {step} of {total}, {where}; the same command goes on")
        leave()
        sys.exit(128 + (told[0][0] if told else signal.SIGTERM))

    _, mae, _, base = history[-1]
    if rank == 0:
        draw_curve(out / "curve.png", history, base)
        log(BASELINE.format(*base))
    log(
        f"final step={step} energy_mae_mev_atom={mae[0]:.4f} force_mae_mev_A={mae[1]:.4f} "
        f"stress_mae_mev_A3_atom={mae[2]:.5f} train_s={train_s:.2f} gpu_h={gpu_h:.5f}"
    )
    leave()


def main():
    rank = 0
    try:
        a = parse_args()
        ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        device = torch.device(a.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError("--device cuda: torch sees no CUDA device")
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if device.index >= torch.cuda.device_count():
                raise ValueError(f"more processes than the {torch.cuda.device_count()} GPUs of this machine")
            torch.cuda.set_device(device)
        if ranks > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        torch.set_float32_matmul_precision("high" if a.tf32 else "highest")
        if not a.data:
            if rank == 0:
                default_data()
            if ranks > 1:  # on a slow line it takes a while
                dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(hours=2)))
            a.data = default_data()
            if rank == 0:
                print(f"data: {a.data}")
        dtype = getattr(torch, a.dtype)
        if a.validate:
            if rank == 0:
                validate_weights(a, device, dtype)
        else:
            train(a, device, dtype, rank, ranks)
    except (ValueError, OSError) as e:
        print(f"error: {e}" if rank == 0 else f"error on rank {rank}: {e}", file=sys.stderr)
        leave_now()
    except KeyboardInterrupt:
        leave_now(130)
    except RuntimeError:
        time.sleep(10 * dist.is_initialized())  # if another rank is gone, watch_next_rank says so, and ends this one
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
