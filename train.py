"""Train Nequix: one script, one loop, one clock. A CPU, one GPU and many GPUs take the same steps.

    python train.py                                                    # data/mptrj if it is packed, else data/sample
    torchrun --nproc_per_node=2 train.py --data data/mptrj --tf32      # the same batch, shared by two GPUs
    python train.py --init nequix-mp-1 --data data/mine --lr 5e-3 --epochs 10                 # fine-tuning

The defaults are Table A.1 of the paper. The same command resumes a run from its last checkpoint: bit for bit on a CPU,
to rounding on CUDA. In --out: log.txt (sources, machine, errors), log.csv (the numbers), model.pt (averaged weights),
curve.png, state.pt (the checkpoint).
"""

import argparse
import contextlib
import functools
import hashlib
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections import deque
from copy import deepcopy
from datetime import timedelta
from itertools import islice
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import model as nequix
from data import PackedSet, deal, prefetch, step_indices
from model import Nequix, dense_products, energy_forces_stress
from muon import Muon

# ----------------------------------------------------------------------------------------------------------------------
# Hyper-parameters

# For the mini track. A step of Muon has a fixed size, set by --lr; 460 steps must take the weights far from the start.
FAST = dict(hidden="64x0e+32x1o+32x2e", lmax=2, cutoff=5.0, epochs=13.0, batch=128, lr=0.1, norm_lr=2.0, decay="linear")
FAST |= dict(weight_decay=0.1, ema=0.9, force_weight=10.0)
ARCHITECTURE = "hidden lmax layers cutoff".split()
FREE = "data out recipe conv device max_edges eval_every save_every".split()  # may differ on resuming


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("data and results").add_argument
    add("--data", default="", help="packed set (default: data/mptrj if it is there, else data/sample, fetched once)")
    add("--out", default="", help="folder of the run (default: runs/ and the name of the set)")

    add = p.add_argument_group("model").add_argument
    add("--init", default="", metavar="WEIGHTS", help=f"fine-tune these: {nequix.WEIGHTS_HELP}")
    add("--hidden", default="128x0e+64x1o+32x2e+32x3o", help="irreps of the hidden features")
    add("--lmax", default=3, type=int, help="highest degree of the spherical harmonics")
    add("--layers", default=4, type=int, help="message-passing layers")
    add("--cutoff", default=6.0, type=float, help="cutoff radius, A")
    add("--no-norm", action="store_true", help="leave out the RMSNorm")

    add = p.add_argument_group("optimization").add_argument
    add("--recipe", default="paper", choices=["paper", "fast"], help="other defaults: fast is for the mini track")
    add("--epochs", default=100.0, type=float, help="passes over the training frames")
    add("--steps", default=0, type=int, help="number of steps, in place of --epochs")
    add("--batch", default=256, type=int, help="structures in a step, on all ranks together")
    add("--optimizer", default="muon", choices=["muon", "adamw"], help="muon takes Adam for the weights of norms")
    add("--lr", default=0.01, type=float, help="peak learning rate")
    add("--norm-lr", default=1.0, type=float, help="learning rate of the weights of norms, in units of --lr")
    add("--decay", default="cosine", choices=["cosine", "linear"], help="of --lr to 1e-6, after 0.1 epoch of warm-up")
    add("--weight-decay", default=1e-3, type=float, help="decay of the matrices, times the learning rate")
    add("--grad-clip", default=100.0, type=float, help="largest norm of the gradient")
    add("--ema", default=0.999, type=float, help="decay of the averaged weights, at most (1+t)/(10+t)")
    add("--energy-weight", default=20.0, type=float, help="weight of the mean |dE|/atom in the loss, eV")
    add("--force-weight", default=20.0, type=float, help="weight of the mean length of dF, eV/A")
    add("--stress-weight", default=5.0, type=float, help="weight of the mean |component of d stress|, eV/A^3")
    add("--seed", default=0, type=int, help="seed of the initial weights and the order of the data")

    group = p.add_argument_group("machine")
    nequix.add_options(group, "device precision conv")
    add = group.add_argument
    add("--max-edges", default=0, type=int, help="edges in a micro-batch (default: by the free memory)")
    add("--eval-every", default=0, type=int, help="steps between validations (default: an epoch, or less)")
    add("--save-every", default=60.0, type=float, help="seconds between checkpoints")

    for action in p._actions:
        if action.default not in (None, "", 0, False, argparse.SUPPRESS) and "default" not in action.help:
            action.help += " (default: %(default)s)"
    if p.parse_known_args(argv)[0].recipe == "fast":
        p.set_defaults(**FAST)
    a = p.parse_args(argv)
    for name, value in vars(a).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, (int, float)) and not 0 <= value < (1 if name == "ema" else math.inf):
            p.error(f"{flag} {value} is out of range")
        if value == 0 and name in "batch lr norm_lr layers cutoff epochs grad_clip".split():
            p.error(f"{flag} must be positive")
        if a.init and name in [*ARCHITECTURE, "no_norm"]:
            if value != p.get_default(name):
                p.error(f"--init takes the architecture from the weights: leave {flag} out")
            setattr(a, name, None)
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

    With the paper's weights: 20 mean |dE|/n + 20 mean |dF| (length of the vector) + 5 mean |d stress| (components).
    """
    de, _, df, _, ds, _ = differences(batch, predicted)
    sums = de.abs().sum(), torch.linalg.vector_norm(df, dim=1).sum(), ds.abs().sum()
    return sum(w * s / n for w, s, n in zip(weights, sums, counts))


def label_counts(packed, indices):
    """What the loss of `indices` is divided by, (3,): structures with energy, atoms with forces, stress components."""
    forces = packed.n_atoms[indices][packed.has_forces[indices]].sum()
    counts = packed.has_energy[indices].sum(), forces, 9 * packed.has_stress[indices].sum()
    return np.maximum(counts, 1.0)


def loss_and_gradient(model, batch, weights, counts):
    """This batch's share of the loss, and its gradient by the model's parameters, a list.

    Forces and stress are linear in g = dE/dvector. So the gradient of the loss L(E, g) by the weights is that of the
    sum over atoms of (dL/dE) E, plus D: the derivative of the energy along the direction dL/dg of the edge vectors. The
    fused kernels compute D forward, as a tangent, so no double backward is needed. The other convolutions need one.
    """
    params = list(model.parameters())
    with torch.enable_grad(), dense_products(model.tf32):
        if model.chosen_conv() != "fused":
            loss = batch_loss(batch, energy_forces_stress(model, batch, create_graph=True), weights, counts)
            return loss.detach(), torch.autograd.grad(loss, params)
        import kernels

        vectors = batch.vectors.detach().requires_grad_()
        energy, kept = kernels.atom_energies(model, batch.numbers, vectors, batch.senders, batch.row_ptr, keep=True)
        (g,) = torch.autograd.grad(energy.sum() + 0 * vectors.sum(), vectors)  # there may be no edges
        energy, g = energy.detach().requires_grad_(), g.requires_grad_()
        loss = batch_loss(batch, nequix.assemble(model, batch, energy, g), weights, counts)
        by_energy, direction = torch.autograd.grad(loss, (energy, g))
        # In units of the direction's largest component, tangents have a size that suits float16.
        largest = torch.cat([direction.abs().flatten(), direction.new_full((1,), 1e-30)]).max()
        unit = torch.exp2(torch.floor(torch.log2(largest)))  # a power of two: nothing is rounded
        energy, derivative = kernels.energy_tangent(model, batch.vectors, direction / unit, kept)
        grads = torch.autograd.grad((by_energy / unit) @ energy.double() + derivative.sum(), params)
        torch._foreach_mul_(grads, unit.float())
        return loss.detach(), grads


@torch.no_grad()
def evaluate(model, packed, indices, max_edges, rank=0, ranks=1):
    """The three MAEs: energy, mean over structures of |dE|/n, meV/atom; forces, mean over all components of all atoms,
    meV/A (exact: the official code averages batch by batch); stress, mean over structures of the nine |d stress|/n,
    meV/A^3/atom. And the same for the E0s alone with zero forces and stress. Shared among ranks, exact sums."""
    total = torch.zeros(9, dtype=torch.float64, device=packed.device)
    mine = deal(indices, packed.n_edges, ranks)[rank]
    pieces = packed.pieces(mine, max_edges)
    for batch in prefetch(packed, tqdm(pieces, "validation", leave=False, disable=None if rank == 0 else True)):
        n = batch.n_atoms[:, None, None]
        e0 = model.e0[model.species[batch.numbers]]
        e0 = e0.new_zeros(len(batch.cell)).index_add(0, batch.structure, e0)
        baseline = e0, torch.zeros_like(batch.forces), torch.zeros_like(batch.stress)
        de, has_e, df, has_f, ds, has_s = differences(batch, energy_forces_stress(model, batch))
        de0, _, df0, _, ds0, _ = differences(batch, baseline)
        sums = de.abs(), df.abs(), ds.abs() / n, has_e, has_f, has_s, de0.abs(), df0.abs(), ds0.abs() / n
        total += torch.stack([x.sum() for x in sums])
    if ranks > 1:
        dist.all_reduce(total)
    errors, n, baseline = total.cpu().view(3, 3)
    return (1000 * errors / n).tolist(), (1000 * baseline / n).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# A step


class Trainer:
    """A model, a copy of it with averaged weights (`ema`), its optimizer, and the training step.

    loss_weights: of energy, forces and stress. grad_clip: largest norm of the gradient. ema_decay: of the average.
    """

    def __init__(self, model, optimizer, loss_weights, grad_clip=100.0, ema_decay=0.999):
        self.model, self.optimizer, self.loss_weights = model, optimizer, loss_weights
        self.grad_clip, self.ema_decay = grad_clip, ema_decay
        self.ema = deepcopy(model).requires_grad_(False)
        self.params, self.averages = list(model.parameters()), list(self.ema.parameters())
        # All gradients lie in one flat tensor, which is all-reduced as it is. Its last element is the loss.
        self.flat = self.params[0].new_zeros(sum(p.numel() for p in self.params) + 1)
        for p, g in zip(self.params, self.flat[:-1].split([p.numel() for p in self.params])):
            p.grad = g.view_as(p)
        self.accumulate = self.accumulator()

    def accumulator(self):
        """`add_gradient`; with the fused kernels as a CUDA graph."""
        if self.model.chosen_conv() != "fused":
            return self.add_gradient
        import kernels

        return kernels.Replay(self.add_gradient, self.flat)

    def add_gradient(self, batch, counts):
        loss, grads = loss_and_gradient(self.model, batch, self.loss_weights, counts)
        torch._foreach_add_([p.grad for p in self.params], grads)
        self.flat[-1] += loss

    @torch.no_grad()
    def step(self, batches, counts, lr, t, before_update=None):
        """Step number t, with learning rate lr, on the micro-batches of this rank. counts: `label_counts` of all ranks.

        Returns the loss, a scalar tensor, NaN if the gradient is not finite; or None if the GPU's memory does not
        suffice, and then nothing has changed. before_update(loss) is called when the loss of the weights is known,
        before they are updated. But for that, nothing here waits for the GPU.
        """
        self.flat.zero_()
        try:
            for batch in batches:
                self.accumulate(batch, counts)  # the gradient, and the loss
        except torch.cuda.OutOfMemoryError:
            self.accumulate = self.accumulator()  # frees the memory of the graph
            return None
        if dist.is_initialized():
            dist.all_reduce(self.flat)  # the sum over ranks
        gradient, loss = self.flat[:-1], self.flat[-1]
        norm = torch.linalg.vector_norm(gradient)
        loss = loss + 0 * norm  # NaN if the gradient is not finite
        if before_update:
            before_update(loss)
        gradient *= (self.grad_clip / (norm + 1e-6)).clamp(max=1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        with dense_products(self.model.tf32):
            self.optimizer.step()
        torch._foreach_lerp_(self.averages, self.params, 1 - min(self.ema_decay, (1 + t) / (10 + t)))
        return loss


# ----------------------------------------------------------------------------------------------------------------------
# Setup


def default_data():
    for folder in ("data/mptrj", "data/sample"):
        if (Path(folder) / "meta.json").exists():
            return folder
    data.fetch_sample("data/sample")
    return "data/sample"


def edges_that_fit(model, device):
    """Edges of a micro-batch: 0.7 of the free memory, over the bytes that an edge takes in the paper's network.
    Training halves them when memory runs out."""
    if device.type == "cpu":
        return 20_000
    size = dict(fused=9_000, oeq=60_000, torch=450_000)[model.chosen_conv()]
    return max(int(torch.cuda.mem_get_info(device)[0] * 0.7 / size), 10_000)


def learning_rate(step, total, warmup, peak, decay="cosine"):
    """Linear warm-up from 0.2 of the peak, then down to 1e-6 at step `total`, along a line or a cosine (that is
    optax.warmup_cosine_decay_schedule)."""
    if step < warmup:
        return peak * (0.2 + 0.8 * step / warmup)
    x = min((step - warmup) / max(total - warmup, 1), 1)
    return 1e-6 + (peak - 1e-6) * (0.5 * (1 + math.cos(math.pi * x)) if decay == "cosine" else 1 - x)


def make_optimizer(model, a):
    matrices, norms = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    groups = [dict(params=matrices, weight_decay=a.weight_decay)]
    groups += [dict(params=norms, weight_decay=0.0, lr_scale=a.norm_lr)] if norms else []
    return Muon(groups, lr=a.lr) if a.optimizer == "muon" else torch.optim.AdamW(groups, lr=a.lr)


def trouble(losses):
    """(index, what is wrong) for the last losses, a list; or None."""
    for k, loss in enumerate(losses):
        if not math.isfinite(loss):
            return k, "is not finite"
    if len(losses) >= 200 and min(losses[-100:]) > 10 * median(losses[:-100]):
        return len(losses) - 1, "has been over ten times its running median for 100 steps"


def elements(packed, indices):
    """Atomic numbers, sorted, of all atoms of the frames `indices`."""
    of_frame = np.isin(np.arange(len(packed.n_atoms)), indices)
    return np.unique(packed.numbers[np.repeat(of_frame, packed.n_atoms)]).tolist()


def known_frames(packed, indices, known):
    """Those of the frames `indices` whose elements are all `known`, and the sorted atomic numbers of other elements."""
    strange = np.logical_or.reduceat(~np.isin(packed.numbers, known), packed.offsets[:-1])[indices]
    return indices[~strange], sorted({*elements(packed, indices)} - {*known})


def read_state(path, fixed, total, sources_sha256):
    """The checkpoint of a run with the settings `fixed`, or None. Raises ValueError if it can't be resumed."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        differ = [f"{k}: {v} -> {fixed[k]}" for k, v in state["fixed"].items() if fixed.get(k, v) != v]
    except Exception as e:
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path} can't be read ({why}): remove {path.parent} to start anew") from None
    if differ:
        raise ValueError(f"{path.parent} holds a run with other settings ({'; '.join(differ)}): choose another --out")
    if state["step"] == total and state["sources_sha256"] != sources_sha256:
        raise ValueError(f"{path.parent} holds a run that ended with other sources: choose another --out")
    return state


def sources():
    """The text of the scripts that a run depends on, and its sha256."""
    here, names = Path(__file__).parent, "train.py model.py kernels.py muon.py data.py".split()
    text = "".join(f"{'=' * 40} {f}\n{(here / f).read_text()}\n" for f in names)
    return text, hashlib.sha256(text.encode()).hexdigest()


def run_header(a, packed, model, ranks, written):
    """What it takes to reproduce a run: sources, if they are not `written` yet, machine, versions, data, settings."""
    (text, sha256), machine = sources(), platform.processor() or platform.machine()
    if f"sources: sha256 {sha256}" in written:
        text = ""
    if packed.device.type == "cuda":
        machine = torch.cuda.get_device_name(packed.device)
        with contextlib.suppress(FileNotFoundError):
            text += subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    versions = f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    return (
        f"{text}{'=' * 40} run\n{time.strftime('%Y-%m-%d %H:%M:%S %z')}\nsources: sha256 {sha256}\n{versions}\n"
        f"{ranks} x {machine}, precision: {model.precision}, convolution: {model.chosen_conv()}\n"
        f"data {packed.path}: sha256 {packed.meta['data_sha256']}, {packed.meta['counts']}\n{vars(a)}\n"
        f"{sum(p.numel() for p in model.parameters())} weights"
    )


def write_history(out, history):
    """log.csv and curve.png: history has [step, MAEs, s, MAEs of the E0s] and, after the first, mean loss and GPU-hours."""
    from matplotlib.figure import Figure

    rows = ["step,energy_mev_atom,force_mev_A,stress_mev_A3_atom,train_s,loss,gpu_h"]
    rows += [",".join(f"{x:.9g}" for x in (h[0], *h[1], h[2], *h[4:])) for h in history]
    (out / "log.csv").write_text("\n".join(rows) + "\n")
    figure = Figure(figsize=(15, 3.5), layout="constrained")
    *axes, last = figure.subplots(1, 4)
    units = "energy MAE (meV/atom)", "force MAE (meV/A)", "stress MAE (meV/A$^3$/atom)"
    for k, (axis, unit) in enumerate(zip(axes, units)):
        axis.semilogy([h[0] for h in history], [h[1][k] for h in history], "o-", ms=3)
        axis.axhline(history[-1][3][k], color="0.6", ls="--", lw=1, label="E0s, zero forces and stress")
        axis.set(xlabel="step", ylabel=unit)
    axes[0].legend()
    last.semilogy([h[0] for h in history if len(h) > 4], [h[4] for h in history if len(h) > 4], "o-", ms=3)
    last.set(xlabel="step", ylabel="training loss")
    figure.savefig(out / "curve.png", dpi=120)


BASELINE = "E0s, zero forces and stress: {:.2f} meV/atom, {:.2f} meV/A, {:.3f} meV/A^3/atom"


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(a, device, rank, ranks, told=()):
    """told: signals that the process has got; when there is one, the run is saved and left."""
    model = nequix.load(a.init, device, a.precision, a.conv).requires_grad_() if a.init else None
    packed = PackedSet(a.data, model.config["cutoff"] if a.init else a.cutoff, device)
    train_frames, val_frames = packed.indices(data.TRAIN), packed.indices(data.VAL)
    # The model has only elements that it is trained on, and is validated on them: the weights of others would be random.
    known = model.config["atomic_numbers"] if a.init else elements(packed, train_frames)
    if unknown := known_frames(packed, train_frames, known)[1]:
        raise ValueError(f"{a.data} has elements that the model lacks: atomic numbers {unknown}")
    val_frames, others = known_frames(packed, val_frames, known)
    if len(val_frames) == 0:
        which = " of elements that the model is trained on" * bool(others)
        raise ValueError(f"{a.data} has no validation frames{which}")
    steps_per_epoch = len(train_frames) / a.batch
    total = a.steps or max(round(a.epochs * steps_per_epoch), 1)
    eval_every = a.eval_every or max(min(round(steps_per_epoch), total // 10), 1)
    out = Path(a.out or f"runs/{Path(a.data).name}")

    # Nothing is drawn at random but the initial weights and the order of the data, which is a function of the step.
    torch.manual_seed(a.seed)
    if not a.init:
        dtype, tf32 = nequix.PRECISIONS[a.precision]
        statistics = packed.meta["statistics"] if a.cutoff == packed.meta["cutoff"] else packed.statistics()
        e0 = dict(zip(statistics["atomic_numbers"], statistics["atom_energies"]))
        config = statistics | dict(atomic_numbers=known, atom_energies=[e0[z] for z in known], norm=not a.no_norm)
        config |= {k: getattr(a, k) for k in ARCHITECTURE}
        model = Nequix(config, a.conv, tf32).to(device, dtype)
    weights = a.energy_weight, a.force_weight, a.stress_weight
    trainer = Trainer(model, make_optimizer(model, a), weights, a.grad_clip, a.ema)
    max_edges = a.max_edges or edges_that_fit(model, device)

    # Resume. Rank 0 reads the checkpoint for all.
    step, train_s, gpu_h, history = 0, 0.0, 0.0, []
    losses = deque(maxlen=1000)  # of the last steps, tensors on the device: read at checkpoints only
    parts = dict(model=model, ema=trainer.ema, optimizer=trainer.optimizer)
    fixed = {k: v for k, v in vars(a).items() if k not in FREE}
    fixed |= {"data_sha256": packed.meta["data_sha256"], "E0s": round(sum(model.config["atom_energies"]), 3)}
    state_file, sources_sha256 = out / "state.pt", sources()[1]
    box = [read_state(state_file, fixed, total, sources_sha256) if rank == 0 else None]
    if ranks > 1:
        dist.broadcast_object_list(box, 0)
    if state := box[0]:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        losses.extend(state["losses"].to(device))
        step, train_s, gpu_h, history = (state[k] for k in ("step", "train_s", "gpu_h", "history"))
    out.mkdir(parents=True, exist_ok=True)

    def log(text, screen=True):
        if rank == 0:
            with open(out / "log.txt", "a") as f:
                f.write(text + "\n")
            if screen:
                tqdm.write(text, file=sys.stdout)

    def stop_clock():
        """Add the time since `start`, and start anew."""
        nonlocal train_s, gpu_h, start
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        train_s, gpu_h = train_s + now - start, gpu_h + (now - start) * ranks / 3600 * (device.type == "cuda")
        start = now

    def last_losses(*current):
        """Of up to 1,000 steps before `step`, and perhaps the current one. Raises ValueError if they are in trouble."""
        last = torch.stack([*losses, *current]).tolist()
        if found := trouble(last):
            s = step + len(current) - len(last) + found[0]
            ids = " ".join(packed.name(i) for i in step_indices(train_frames, a.batch, a.seed, s))
            where = f"the last good checkpoint is {state_file}" if state_file.exists() else "there is no checkpoint yet"
            raise ValueError(f"the loss {found[1]} at step {s} ({last[found[0]]}); {where}; frames: {ids}")
        bar.set_postfix_str(f"loss {last[-1]:.3f}")
        return last

    def save(*current):
        """Write a checkpoint; within a step when the loss of the weights is known, before they are updated."""
        nonlocal saved, saved_at
        last, saved_at = last_losses(*current), time.monotonic()
        if current and len(last) >= 200 and last[-1] > 10 * median(last):
            return  # suspect: keep the checkpoint before
        stop_clock()
        numbers = dict(step=step, train_s=train_s, gpu_h=gpu_h, history=history)
        states = dict(losses=torch.tensor(last[: len(losses)]), **{k: part.state_dict() for k, part in parts.items()})
        with open(f"{state_file}.tmp", "wb") as f:  # state.pt is whole or not there, even if the machine goes down
            torch.save(dict(fixed=fixed, sources_sha256=sources_sha256, **numbers, **states), f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f.name, state_file)
        saved = step

    def validate():
        half = max_edges // 2  # the CUDA graph of the step still holds its memory
        mae, baseline = evaluate(trainer.ema, packed, val_frames, half, rank, ranks)
        errors = f"energy={mae[0]:.2f} meV/atom forces={mae[1]:.2f} meV/A stress={mae[2]:.3f} meV/A^3/atom"
        text = f"step={step}/{total} {errors}"
        history.append([step, mae, train_s, baseline])
        if step:
            rate = (step - history[-2][0]) * a.batch / (train_s - history[-2][2])
            loss = fmean(last_losses()[history[-2][0] - step :])
            history[-1] += [loss, gpu_h]
            text += f" loss={loss:.3f} train_s={train_s:.1f} rate={rate:.1f} structures/s"
            if device.type == "cuda":
                text += f" gpu_h={gpu_h:.4f} memory={torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
            if rank == 0:
                nequix.save(out / "model.pt", trainer.ema)
                write_history(out, history)
        else:
            log(BASELINE.format(*baseline))
        log(text)

    @functools.lru_cache(8)
    def pieces_of(s, max_edges):
        """The micro-batches of this rank in step s."""
        mine = deal(step_indices(train_frames, a.batch, a.seed, s), packed.n_edges, ranks)[rank]
        return packed.pieces(mine, max_edges)

    def batches_from(first):
        return prefetch(packed, (p for s in range(first, total) for p in pieces_of(s, max_edges)))

    log_file = out / "log.txt"
    log(run_header(a, packed, model, ranks, log_file.read_text() if log_file.exists() else ""), screen=False)
    if state:
        edited = ", with other sources than before: see above" * (state["sources_sha256"] != sources_sha256)
        log(f"resumed at step {step} of {total}{edited}")
    else:
        if others:
            log(f"validation leaves out frames with elements that are not trained on: atomic numbers {others}")
        frames = f"training frames: {len(train_frames)}, to validate on: {len(val_frames)}"
        log(f"{frames}; {total} steps of {a.batch}; {ranks} rank(s)")

    # Warm-up, outside the clock: kernels are compiled; a CUDA graph is captured with room for the next 1,000 steps.
    if device.type == "cuda" and step < total:
        from kernels import Replay

        soon = [p for s in range(step, min(step + 1000, total)) for p in pieces_of(s, max_edges)]
        soon = [p for p in soon if packed.n_edges[p].sum() <= Replay.MOST] or soon[:1]
        with contextlib.suppress(torch.cuda.OutOfMemoryError), torch.no_grad():  # the first step will halve them
            for n in (packed.n_atoms, packed.n_edges):
                trainer.accumulate(packed.batch(max(soon, key=lambda p: n[p].sum())), np.ones(3))
    if device.type == "cpu" and step < total and rank == 0:
        piece = pieces_of(step, max_edges)[0]
        for some in (piece[:1], piece):  # the first call sets things up
            began = time.perf_counter()
            trainer.accumulate(packed.batch(some), np.ones(3))
        seconds = (time.perf_counter() - began) / max(packed.n_edges[piece].sum(), 1)  # an edge
        seconds *= packed.n_edges[train_frames].mean() * a.batch / ranks
        left = timedelta(seconds=round((total - step) * seconds))
        small = "; the README's first command trains a model that suits a CPU" * (left > timedelta(hours=1))
        log(f"on this CPU about {seconds:.3g} s a step, {left} in all{small}")
    if not history:
        validate()

    bar = tqdm(total=total, initial=step, unit="step", disable=None if rank == 0 else True)
    batches, saved, saved_at = batches_from(step), step, time.monotonic()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    while step < total:
        leaving = bool(told)
        counts = label_counts(packed, step_indices(train_frames, a.batch, a.seed, step))
        lr = learning_rate(step, total, 0.1 * steps_per_epoch, a.lr, a.decay)
        due = rank == 0 and (leaving or time.monotonic() >= saved_at + a.save_every)
        loss = trainer.step(islice(batches, len(pieces_of(step, max_edges))), counts, lr, step, save if due else None)
        if loss is None:
            max_edges //= 2
            torch.cuda.empty_cache()
            if max_edges < 1000:
                raise ValueError(f"out of GPU memory with micro-batches of {2 * max_edges} edges: try a smaller model")
            print(f"rank {rank}: out of memory at step {step}: micro-batches of {max_edges} edges from here")
            batches = batches_from(step)
            continue
        if leaving:
            log(f"interrupted; the same command goes on from step {saved} of {total}")
            raise KeyboardInterrupt
        losses.append(loss)
        step += 1
        bar.update()
        if step % eval_every == 0 or step == total:
            stop_clock()
            validate()
            start = time.perf_counter()
    bar.close()
    _, mae, _, baseline, *_ = history[-1]
    if rank == 0:
        if saved < step:
            save()
        print(f"in {out.resolve()}: model.pt (averaged weights), log.txt, log.csv, curve.png, state.pt (to resume)")
    log(BASELINE.format(*baseline))
    log(
        f"final step={step} energy_mae_mev_atom={mae[0]:.4f} force_mae_mev_A={mae[1]:.4f} "
        f"stress_mae_mev_A3_atom={mae[2]:.5f} train_s={train_s:.2f} gpu_h={gpu_h:.5f}"
    )


def main():
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    a = parse_args()
    told = []

    def on_signal(number, frame):
        if told and time.monotonic() > told[0] + 5:  # torchrun may pass on at once what its workers have got already
            raise KeyboardInterrupt
        told.append(time.monotonic())

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        device = torch.device(a.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if device.index >= torch.cuda.device_count():
                raise ValueError(f"--device cuda: {device.index + 1} processes, {torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(device)
        if ranks > 1:  # a lost rank ends the others: on one host by torchrun, on several by this timeout
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
        if not a.data:
            if rank == 0:
                print(f"data: {Path(default_data()).resolve()}")  # fetched if it is not there
            if ranks > 1:
                dist.barrier()
            a.data = default_data()
        train(a, device, rank, ranks, told if rank == 0 else ())  # others wait for rank 0, which saves
        status = 0
    except (ValueError, OSError) as e:
        print(f"error: {e}" if rank == 0 else f"error on rank {rank}: {e}", file=sys.stderr)
        status = 1
    except (KeyboardInterrupt, RuntimeError):
        if not told:
            raise
        status = 130
    if status or ranks > 1:  # without waiting for other ranks and threads, whose end may abort a process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
