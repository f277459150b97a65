"""Variants of a recipe of train.py, which change one thing each: short runs in one process, a line of JSON in and out.

    python records/ablate.py data/sample runs/ablate.jsonl --base '{"batch": 128, "steps": 422}' < variants.txt
    python records/ablate.py --read runs/ablate*.jsonl             # means over runs with other seeds

The first run is the base, with {}; then each line is added to the base. Keys are options of train.py (lr, norm_lr, decay,
weight_decay, batch, steps, seed, cutoff, hidden, lmax, layers), and
    seconds: about as many steps as fit, for steps       weights: [energy, force, stress] of the loss
    momentum, orthogonal_steps: Muon's                   polar: the coefficients of Polar Express (Amsel et al. 2025)
    momentum_warmup: steps, from 0.85                    normuon: decay of NorMuon's second moments (Li et al. 2025)
    cautious: decay only where it agrees with the step   soap: Adam in Shampoo's basis (Vyas et al. 2024), then Muon
    adam_ends: Adam for one-hot input and readout        huber: eV/atom and eV/A up to which the loss is quadratic
    init: of the initial matrices, times                 float32: no TF32
    energy_first: part of the steps, on energies alone   cutoff_first, batch_first: [value, part of the steps]
A result has the steps, the ms of one, and the three errors on the validation split, of the last weights and of averages.
"""

import argparse
import functools
import json
import sys
import time
from copy import deepcopy
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import kernels
import muon
import train
from data import PackedSet, prefetch, step_indices
from model import Nequix

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
sync = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
MOST_EDGES = 1_000_000 if DEVICE.type == "cuda" else 20_000
AVERAGES = 0.9, 0.97, 0.99, 0.999
OPTIONS = "lr norm_lr decay weight_decay batch seed cutoff hidden lmax layers".split()  # of train.py
KEYS = "steps seconds weights momentum orthogonal_steps polar momentum_warmup normuon cautious soap adam_ends huber"
KEYS = {*OPTIONS, *f"{KEYS} init float32 energy_first cutoff_first batch_first".split()}
POLAR = """8.28721201814563 -23.595886519098837 17.300387312530933 4.107059111542203 -2.9478499167379106 0.5448431082926601
3.9486908534822946 -2.908902115962949 0.5518191394370137 3.3184196573706015 -2.488488024314874 0.51004894012372
2.300652019954817 -1.6689039845747493 0.4188073119525673"""
POLAR = np.array(POLAR.split(), float).reshape(5, 3).tolist()
OLDER = {"vector_lr", "warmup_epochs"}  # keys that only older files have
newton_schulz, paper_loss = muon.orthogonalize, train.batch_loss


def polar_express(x, steps=5, eps=1e-8):
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) * 1.01 + eps)
    for a, b, c in POLAR[:steps]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Variant(muon.Muon):
    """Muon with what `v` asks for; Adam takes the matrices `ends` too."""

    def __init__(self, params, ends, v, **options):
        mine = [p for p in params if p.ndim == 2 and not any(p is e for e in ends)]
        rest = [p for p in params if not any(p is m for m in mine)]
        rest = dict(params=rest, use_muon=False, lr_scale=v["norm_lr"], weight_decay=0.0)
        super().__init__([dict(params=mine), rest], **options)
        self.v, self.decay = v, self.param_groups[0]["weight_decay"]
        if v.get("cautious"):
            self.param_groups[0]["weight_decay"] = 0.0

    def orthogonal(self, group, flat):
        v, params = self.v, group["params"]
        if v.get("soap"):
            flat = self.soap(group, flat)
        flat = super().orthogonal(group, flat)
        updates = [u.view_as(p) for u, p in zip(flat.split([p.numel() for p in params]), params)]
        if v.get("normuon"):
            updates = self.by_row(group, updates, v["normuon"])
        if v.get("cautious"):
            for p, u in zip(params, updates):
                p -= group["lr"] * self.decay * p * (u * p > 0)
        return torch.cat([u.flatten() for u in updates])

    def by_row(self, group, updates, beta):
        """Each output's part of an update over its root mean square, all to the norm that they had."""
        mean = torch.cat([u.square().mean(0) for u in updates])
        mean = self.moment(group, "rows", mean, beta) / (1 - beta ** group["t"])
        scaled = [u / (m.sqrt() + 1e-10) for u, m in zip(updates, mean.split([u.shape[1] for u in updates]))]
        return [s * (u.norm() / (s.norm() + 1e-10)) for s, u in zip(scaled, updates)]

    def soap(self, group, ahead):
        """Adam's division in the eigenvectors of the moments of G G^T and G^T G, which a QR iteration follows."""
        out, sizes = [], [p.numel() for p in group["params"]]
        for p, m in zip(group["params"], ahead.split(sizes)):
            state, m, g = self.state[p], m.view_as(p), p.grad
            if "q" not in state:
                eye = lambda n: torch.eye(n, device=p.device) if n <= 256 else None  # a wide side stays as it is
                state.update(
                    q=[eye(n) for n in p.shape], moments=[None if q is None else q * 0 for q in map(eye, p.shape)]
                )
                state["square"] = torch.zeros_like(p)
            for k, gram in enumerate((g @ g.T, g.T @ g) if p.shape[1] <= 256 else (g @ g.T,)):
                if state["q"][k] is not None:
                    state["moments"][k].lerp_(gram, 0.05)
                    if group["t"] % 10 == 1:
                        state["q"][k] = torch.linalg.qr(state["moments"][k] @ state["q"][k])[0]
            left, right = (q if q is not None else torch.eye(n, device=p.device) for q, n in zip(state["q"], p.shape))
            turned = lambda x: left.T @ x @ right
            state["square"].lerp_(turned(g).square(), 0.05)
            out.append((left @ (turned(m) / (state["square"].sqrt() + 1e-8)) @ right.T).flatten())
        return torch.cat(out)


def huber_loss(delta, batch, predicted, weights, counts):
    """train.batch_loss, quadratic below delta, of the same slope above."""
    de, _, df, _, ds, _ = train.differences(batch, predicted)
    soft = lambda x: torch.where(x < delta, x * x / (2 * delta) + delta / 2, x).sum()
    sums = soft(de.abs()), soft((df.square().sum(1) + 1e-30).sqrt()), ds.abs().sum()
    return sum(w * s / n for w, s, n in zip(weights, sums, counts))


def learning_rate(v, step, total, warmup):
    """train.learning_rate, or warm-up, stable and decay."""
    if v["decay"] != "wsd":
        return train.learning_rate(step, total, warmup, v["lr"], v["decay"])
    return (
        train.learning_rate(step, total, warmup, v["lr"], "linear")
        if step < warmup
        else v["lr"] * min(1, 2.5 * (1 - step / total))
    )


@functools.lru_cache
def packed_set(path, cutoff):
    return PackedSet(path, cutoff, DEVICE)


class Stage:
    """Steps with one batch size, one cutoff and one set of loss weights."""

    def __init__(self, path, v, trainer, **changed):
        v = v | changed
        self.packed, self.batch, self.cutoff, self.weights, self.seed = (
            packed_set(path, v["cutoff"]),
            v["batch"],
            v["cutoff"],
            v["weights"],
            v["seed"],
        )
        self.frames, self.trainer = self.packed.indices(data.TRAIN), trainer
        self.accumulate = trainer.add_gradient
        if trainer.model.chosen_conv() == "fused":  # its CUDA graph keeps the loss weights: one for each stage
            self.accumulate = kernels.Replay(trainer.add_gradient, trainer.flat)

    def begin(self):
        self.trainer.model.config["cutoff"], self.trainer.loss_weights = self.cutoff, self.weights
        self.trainer.accumulate = self.accumulate

    def pieces(self, step):
        frames = step_indices(self.frames, self.batch, self.seed, step)
        return self.packed.pieces(frames, MOST_EDGES)

    def build(self):
        """Capture graphs with room for the largest of the first batches, outside the clock."""
        self.begin()
        some = [p for step in range(50) for p in self.pieces(step)]
        for n in (self.packed.n_atoms, self.packed.n_edges):
            with torch.no_grad():
                self.accumulate(self.packed.batch(max(some, key=lambda p: n[p].sum())), np.ones(3))


def run(path, v):
    """The result of the variant `v`, whose keys are complete."""
    torch.manual_seed(v["seed"])
    packed = packed_set(path, v["cutoff"])
    stats = packed.meta["statistics"] if v["cutoff"] == packed.meta["cutoff"] else packed.statistics()
    config = {**stats, **{k: v[k] for k in ("hidden", "lmax", "layers", "cutoff")}}
    model = Nequix(config, tf32=not v.get("float32")).to(DEVICE)
    params = list(model.parameters())
    ends = [model.readout[0], *model.layers[0].linear_1, *model.layers[0].skip] if v.get("adam_ends") else []
    torch._foreach_mul_([p.data for p in params if p.ndim == 2], v.get("init", 1.0))
    start = [p.detach().clone() for p in params]
    muon.orthogonalize = polar_express if v.get("polar") else newton_schulz
    train.batch_loss = functools.partial(huber_loss, v["huber"]) if v.get("huber") else paper_loss
    options = dict(weight_decay=v["weight_decay"], momentum=v.get("momentum", 0.95), steps=v.get("orthogonal_steps", 5))
    optimizer = functools.partial(Variant, params, ends, v, **options)
    trainer = train.Trainer(model, optimizer(), v["weights"], ema_decay=AVERAGES[0])
    averages = [trainer.ema, *(deepcopy(trainer.ema) for _ in AVERAGES[1:])]

    # Stages: (part of the steps at which it ends, Stage). One thing at a time.
    stages = [(1, Stage(path, v, trainer))]
    if "energy_first" in v:
        stages.insert(0, (v["energy_first"], Stage(path, v, trainer, weights=[v["weights"][0], 0.0, 0.0])))
    for key in ("cutoff", "batch"):
        if key + "_first" in v:
            value, part = v[key + "_first"]
            stages.insert(0, (part, Stage(path, v, trainer, **{key: value})))
    for _, stage in stages:
        stage.build()

    def steps(total):
        """All of a run, step by step."""
        step = 0
        for part, stage in stages:
            stage.begin()
            end = total if part == 1 else round(part * total)
            # The data go on about where the stage before has left them.
            ahead = 0 if len(stages) == 1 else -(-step * stages[0][1].batch // stage.batch) - step
            batches = prefetch(stage.packed, (p for s in range(step, end) for p in stage.pieces(s + ahead)))
            while step < end:
                frames = step_indices(stage.frames, stage.batch, v["seed"], step + ahead)
                counts, pieces = train.label_counts(stage.packed, frames), stage.pieces(step + ahead)
                if "momentum_warmup" in v:
                    warm = min(step / v["momentum_warmup"], 1)
                    trainer.optimizer.param_groups[0]["momentum"] = 0.85 + (options["momentum"] - 0.85) * warm
                lr = learning_rate(v, step, total, 0.1 * len(stage.frames) / stage.batch)
                if trainer.step(islice(batches, len(pieces)), counts, lr, step) is None:
                    raise RuntimeError("out of GPU memory")
                for decay, average in zip(AVERAGES[1:], averages[1:]):
                    rate = 1 - min(decay, (1 + step) / (10 + step))
                    torch._foreach_lerp_(list(average.parameters()), [p.data for p in params], rate)
                step += 1
                yield step

    total = v.get("steps")
    if "seconds" in v:  # ms of a step: of the second half of 40, after which all is as before
        for step in steps(40):
            if step == 20:
                sync()
                began = time.perf_counter()
        sync()
        total = round(v["seconds"] / (time.perf_counter() - began) * 20)
        for m in (model, *averages):
            torch._foreach_copy_([p.data for p in m.parameters()], start)
        trainer.optimizer = optimizer()
    sync()
    began = time.perf_counter()
    for _ in tqdm(steps(total), total=total, leave=False, disable=None):
        pass
    sync()
    seconds = time.perf_counter() - began
    for m in (model, *averages):
        m.config["cutoff"] = v["cutoff"]
    val = packed.indices(data.VAL)
    errors = lambda m: [round(x, 3) for x in train.evaluate(m, packed, val, MOST_EDGES // 2)[0]]
    errors = {"last": errors(model), **{str(d): errors(m) for d, m in zip(AVERAGES, averages)}}
    return dict(steps=total, ms=round(1000 * seconds / total, 2), seconds=round(seconds, 2), **errors)


def fast_recipe():
    recipe = train.parse_args(["--recipe", "fast"])
    weights = [recipe.energy_weight, recipe.force_weight, recipe.stress_weight]
    return {k: getattr(recipe, k) for k in OPTIONS} | dict(weights=weights)


def table(files, average):
    """A line for each variant of these files, whose bases differ in their seeds alone: runs, mean and sigma of each error of
    the weights averaged so, or "last"."""
    bases, results = [], {}
    for file in files:
        for line in map(json.loads, Path(file).read_text().splitlines()):
            if "base" in line:  # and again, where another run was added to the file
                base = line["base"]
                bases.append(base | dict(seed=None, device=line["device"], data=line["data"]))
            elif average in line:
                changes = {k: v for k, v in line.items() if k in OLDER | KEYS - {"seconds"} and v != base.get(k)}
                results.setdefault(json.dumps(changes), []).append(line[average])
    if any(b != bases[0] for b in bases):
        raise ValueError("runs with different bases: a table for each")
    head = f"{'runs':>4}{'energy, meV/atom':>20}{'forces, meV/A':>20}{'stress, meV/A^3/atom':>24}  changed"
    text = [json.dumps(bases[0]), head]
    for changes, errors in results.items():
        mean, sigma = np.mean(errors, 0), np.std(errors, 0, ddof=1) if len(errors) > 1 else [np.nan] * 3
        e, f, s = (f"{m:.{k}f} ({d:.{k}f})" for m, d, k in zip(mean, sigma, (1, 1, 3)))
        text.append(f"{len(errors):4}{e:>20}{f:>20}{s:>24}  {changes}")
    return "\n".join(text)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", nargs="?")
    p.add_argument("out", nargs="?", type=Path)
    p.add_argument("--read", nargs="+", type=Path, help="train nothing: a table of what is there")
    averages = ["last", *map(str, AVERAGES)]
    p.add_argument("--average", default="0.9", choices=averages, help="with --read: of which weights (default: 0.9)")
    p.add_argument("--base", type=json.loads, default={}, help="of all runs, beside what --recipe fast has")
    p.add_argument("--budget", type=float, default=np.inf, help="s after which no run begins")
    a = p.parse_args()
    base, variants = fast_recipe() | a.base, [{}]
    try:
        if a.read:
            return print(table(a.read, a.average))
        if a.out is None:
            p.error("DATA and OUT are needed, or --read")
        variants += [json.loads(line) for line in sys.stdin if line.strip()]
        if unknown := set().union(base, *variants) - KEYS:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        if not {"steps", "seconds"} & base.keys():
            raise ValueError("--base needs steps or seconds")
        packed_set(a.data, base["cutoff"])
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    with open(a.out, "a") as f:
        about = dict(base=base, data=a.data, device=name, torch=torch.__version__, sources=train.sources()[1])
        print(json.dumps(about), file=f, flush=True)
        for changes in variants:
            if time.perf_counter() - began > a.budget:
                break
            try:
                result = run(a.data, base | changes)
            except (RuntimeError, ValueError) as e:
                result = dict(error=str(e).splitlines()[0])
            print(json.dumps(changes | result), file=f, flush=True)
            print(changes, result, flush=True)
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
