"""Time the calculator, relaxations, training steps, and the energy drift of molecular dynamics.

    python bench_speed.py --weights nequix-mp-1                                # ms an ASE step, silicon and diamond
    python bench_speed.py --weights nequix-mp-1 --relax wbm.extxyz --n 2000    # structures/s against ASE one by one
    python bench_speed.py --weights nequix-mp-1 --nve                          # meV/atom/ps, float32 and float64
    python bench_speed.py --train data/random1k --tf32 --batches 64 256 1024   # structures/s and memory of training

An ASE step is what molecular dynamics pays: new positions, neighbour list, energy, forces and stress, back in numpy.
"""

import argparse
import itertools
import sys
import time

import ase.io
import numpy as np
import torch
from ase import units
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE

from calc import NequixCalculator
from data import TRAIN, PackedSet, prefetch
from model import Nequix
from muon import Muon
from train import Replay, label_counts


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def crystal(symbol, n):
    """A cubic supercell of about n atoms of the diamond structure."""
    return bulk(symbol, cubic=True) * max(round((n / 8) ** (1 / 3)), 1)


def warm(atoms, kelvin=300):
    """Velocities of twice the temperature: from rest in a perfect crystal, half of it goes into the potential energy."""
    sigma = np.sqrt(2 * units.kB * kelvin * atoms.get_masses())[:, None]
    momenta = sigma * np.random.default_rng(0).normal(size=(len(atoms), 3))
    atoms.set_momenta(momenta - momenta.mean(0))


def ase_steps(calc, symbols, sizes, steps):
    """Velocity Verlet at 300 K, 1 fs; and apart: making the list, seeing that it is complete, the model."""
    columns = "atoms edges/list ms/step median lists rebuild_ms locate_ms model_ms atoms/s memory_GiB".split()
    print(f"{'':5}" + "".join(f"{c:>11}" for c in columns))
    for symbol, n in itertools.product(symbols, sizes):
        atoms = crystal(symbol, n)
        atoms.calc, calc.listed, calc.replay = calc, None, None
        warm(atoms)
        md = VelocityVerlet(atoms, 1 * units.fs)
        if calc.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(calc.device)
        try:
            md.run(min(steps, 10))  # kernels are built
            times, lists, made = [], 0, calc.listed
            for _ in range(steps):
                start = clock(calc.device)
                md.run(1)
                times.append(clock(calc.device) - start)
                lists, made = lists + (calc.listed is not made), calc.listed
            parts, repeat = [], min(steps, 10)
            for part in ("rebuild", "locate", "model"):
                start = clock(calc.device)
                for _ in range(repeat):
                    if part == "rebuild":
                        calc.listed = None
                    if part != "model":
                        place = calc.locate(atoms)
                    else:
                        calc.evaluate(place, again=True)
                parts.append((clock(calc.device) - start) * 1000 / repeat)
        except (torch.cuda.OutOfMemoryError, ValueError) as e:
            print(f"{symbol:5}{len(atoms):11} does not fit: {str(e).splitlines()[0][:90]}")
            continue
        memory = torch.cuda.max_memory_allocated(calc.device) / 2**30 if calc.device.type == "cuda" else 0
        parts = [f"{p:11.3f}" for p in (1000 * np.mean(times), 1000 * np.median(times), lists, *parts)]
        rate = f"{1000 * len(atoms) / float(parts[-1]):11.0f}{memory:11.3f}"
        print(f"{symbol:5}{len(atoms):11}{len(calc.listed[0].senders):11}" + "".join(parts) + rate, flush=True)


def relaxations(calc, path, n, fmax, steps, n_ase):
    """Throughput of relax on the first n structures of a file; ASE's FIRE one by one on n_ase of them, evenly spread."""
    structures = list(itertools.islice(ase.io.iread(path, ":"), n))
    for _ in calc.relax(structures[:8], fmax, 3):  # kernels are built, the memory is measured
        pass
    start, results = clock(calc.device), {}
    for i, atoms, energy, converged, taken, error in calc.relax(structures, fmax, steps):
        results[i] = energy, converged, taken, error
    seconds = clock(calc.device) - start
    converged, failed = sum(r[1] for r in results.values()), sum(r[3] is not None for r in results.values())
    taken = sum(r[2] for r in results.values())
    size = sum(map(len, structures)) / len(structures)
    print(f"{len(structures)} structures, {size:.1f} atoms on average, of {path}: fmax {fmax} eV/A, at most {steps} steps")
    print(f"relax: {seconds:.1f} s, {len(structures) / seconds:.2f} structures/s, {taken / seconds:.0f} steps/s; ", end="")
    print(f"converged {converged / len(structures):.2%}, failed {failed}; batches of {calc.max_edges} edges")

    picks = np.unique(np.linspace(0, len(structures) - 1, n_ase).astype(int))
    start, apart, same = clock(calc.device), [], 0
    for i in picks:
        atoms = structures[i].copy()
        atoms.calc = calc
        done = FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax, steps)
        apart.append(1000 * abs(atoms.get_potential_energy() - results[i][0]) / len(atoms))
        same += done == results[i][1]
    one_by_one = (clock(calc.device) - start) / len(picks)
    faster = one_by_one * len(structures) / seconds
    print(f"ASE one by one, {len(picks)} of them: {1 / one_by_one:.3f} structures/s; relax is {faster:.1f} times faster")
    print(f"energies differ by {np.median(apart):.4f} meV/atom (median), {max(apart):.4f} (most); converged alike: {same}")


def nve(weights, device, conv, sizes, picoseconds):
    """Drift of the total energy: a line fitted to it over the run after 0.1 ps."""
    for n, dtype in itertools.product(sizes, ("float32", "float64")):
        atoms = crystal("Si", n)
        atoms.calc = NequixCalculator(weights, device, dtype, conv)
        warm(atoms)
        md, energies = VelocityVerlet(atoms, 1 * units.fs), []
        md.run(100)
        md.attach(lambda: energies.append(1000 * atoms.get_total_energy() / len(atoms)))
        md.run(round(1000 * picoseconds))
        drift = np.polyfit(np.arange(len(energies)) / 1000, energies, 1)[0]
        print(
            f"Si {len(atoms)} atoms, 300 K, {picoseconds} ps, 1 fs, {dtype}: drift {drift:+.5f} meV/atom/ps, "
            f"standard deviation {np.std(energies):.5f} meV/atom"
        )


def training(path, device, conv, batches, steps):
    """Steps as train.py takes them, each batch in one piece: neighbour list, loss, gradient, Muon, averaged weights."""
    packed = PackedSet(path, Nequix.DEFAULTS["cutoff"], device)
    frames, rng = packed.indices(TRAIN), np.random.default_rng(0)
    torch.manual_seed(0)
    model = Nequix(packed.meta["statistics"], conv).to(device)
    params = list(model.parameters())
    averaged, optimizer = [p.detach().clone() for p in params], Muon(params, lr=0.01)
    edges = packed.n_edges[frames].mean()
    print(f"{len(frames)} frames, {packed.n_atoms[frames].mean():.1f} atoms and {edges:.0f} edges on average; intervals of {steps} steps")
    print(f"{'batch':>8}{'ms/step':>30}{'structures/s':>30}{'memory_GiB':>12}")
    for size in batches:
        counts = label_counts(packed, frames) * size / len(frames)
        replay = Replay(model, (20.0, 20.0, 5.0))
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

        def run(n):
            pieces = [np.resize(rng.permutation(frames), size) for _ in range(n)]
            for batch in prefetch(packed, pieces):
                optimizer.zero_grad(set_to_none=False)
                replay(batch, counts)
                optimizer.step()
                torch._foreach_lerp_(averaged, [p.data for p in params], 0.001)

        try:
            run(3)
            times = []
            for _ in range(3):
                start = clock(device)
                run(steps)
                times.append((clock(device) - start) / steps)
        except torch.cuda.OutOfMemoryError:
            print(f"{size:8} does not fit")
            return
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0
        ms, rate = " ".join(f"{1000 * t:.2f}" for t in times), " ".join(f"{size / t:.0f}" for t in times)
        print(f"{size:8}{ms:>30}{rate:>30}{memory:12.2f}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", default="nequix-mp-1", help="a released name, an .nqx file or a model.pt")
    p.add_argument("--sizes", type=int, nargs="+", default=[64, 1000, 8000], help="atoms")
    p.add_argument("--crystals", nargs="+", default=["Si", "C"], choices=["Si", "C"], help="default: both")
    p.add_argument("--steps", type=int, default=100, help="timed ASE steps (default: 100)")
    p.add_argument("--relax", metavar="FILE", help="relax the structures of this file instead")
    p.add_argument("--n", type=int, default=2000, help="with --relax: so many of them (default: 2000)")
    p.add_argument("--n-ase", type=int, default=20, help="with --relax: so many with ASE too (default: 20)")
    p.add_argument("--fmax", type=float, default=0.02, help="eV/A (default: 0.02)")
    p.add_argument("--max-steps", type=int, default=500, help="with --relax (default: 500)")
    p.add_argument("--train", metavar="DATA", help="time training steps on this packed set instead")
    p.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256], help="with --train (default: 64 128 256)")
    p.add_argument("--tf32", action="store_true", help="with --train: TF32 matrix products")
    p.add_argument("--nve", action="store_true", help="print the drift of the energy in NVE instead")
    p.add_argument("--ps", type=float, default=1.0, help="with --nve: so long (default: 1 ps)")
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    p.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="of the network")
    p.add_argument("--conv", choices=["auto", "torch", "oeq", "fused"], default="auto", help="convolution")
    a = p.parse_args()
    try:
        if a.train:
            device = torch.device(a.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            if a.tf32:
                torch.set_float32_matmul_precision("high")
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
            print(f"{name}, torch {torch.__version__}, {a.train}, {'TF32' if a.tf32 else 'float32'}, conv {a.conv}")
            return training(a.train, device, a.conv, a.batches, min(a.steps, 20))
        calc = NequixCalculator(a.weights, a.device, a.dtype, a.conv)
        name = torch.cuda.get_device_name(calc.device) if calc.device.type == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}, {a.weights}, {a.dtype}, conv {a.conv}")
        if a.relax:
            relaxations(calc, a.relax, a.n, a.fmax, a.max_steps, a.n_ase)
        elif a.nve:
            nve(a.weights, a.device, a.conv, a.sizes, a.ps)
        else:
            ase_steps(calc, a.crystals, a.sizes, a.steps)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
