"""Is a model a sane potential? Real crystals, their atoms and cells perturbed, against the predictions of another model.

    python records/perturbed.py runs/fast/seed0/model.pt --reference nequix-mp-1 [--n 100] [--data data/sample]

Frames of the validation split, atoms moved by normal noise and cells strained. Printed for each strength: mean |difference| of energy
changes (perturbed less unperturbed), forces and stresses; the mean of what is to be predicted; and the correlation of forces.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from ase import Atoms

sys.path.insert(0, str(Path(__file__).parent.parent))
from calc import NequixCalculator
from data import VAL, PackedSet


def perturbed(atoms, noise, strain, rng):
    """noise: A, of each coordinate; strain: of each component of a symmetric tensor; both normal."""
    new, e = atoms.copy(), strain * rng.normal(size=(3, 3))
    new.set_cell(atoms.cell @ (np.eye(3) + (e + e.T) / 2), scale_atoms=True)
    new.positions += noise * rng.normal(size=new.positions.shape)
    return new


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights")
    p.add_argument("--reference", default="nequix-mp-1")
    p.add_argument("--data", default="data/sample")
    p.add_argument("--n", type=int, default=100, help="frames (default: 100)")
    a = p.parse_args()
    try:
        packed = PackedSet(a.data)
        model, reference = NequixCalculator(a.weights), NequixCalculator(a.reference)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    known = set(model.model.config["atomic_numbers"]) & set(reference.model.config["atomic_numbers"])
    frames = []
    for k in np.random.default_rng(0).permutation(packed.indices(VAL)):
        atoms = slice(*packed.offsets[k : k + 2])
        numbers, positions, cell = packed.numbers[atoms], packed.arrays["positions"][atoms], packed.arrays["cell"][k]
        if known.issuperset(numbers.tolist()) and packed.arrays["pbc"][k].all():
            frames.append(Atoms(numbers, positions.double().numpy(), cell=cell.double().numpy(), pbc=True))
    frames = frames[: a.n]
    if not frames:
        sys.exit(f"error: no validation frame of {a.data} is a crystal of elements that both models know")
    n = np.array([len(f) for f in frames])
    print(
        f"{a.weights} against {a.reference}: {len(frames)} validation frames of {a.data}, {n.mean():.1f} atoms a frame"
    )
    print(f"{'noise':>8}{'strain':>8}{'energy change':>22}{'forces':>20}{'correlation':>13}{'stress':>20}")
    print(f"{'A':>8}{'':8}{'meV/atom':>22}{'meV/A':>20}{'of forces':>13}{'meV/A^3':>20}")
    before = [c.predict(frames) for c in (model, reference)]
    for noise, strain in ((0.0, 0.0), (0.03, 0.01), (0.1, 0.03), (0.2, 0.05)):
        rng = np.random.default_rng(1)
        moved = [perturbed(f, noise, strain, rng) for f in frames]
        after = [c.predict(moved) for c in (model, reference)]
        change = [np.array([y["energy"] - x["energy"] for x, y in zip(*pair)]) / n for pair in zip(before, after)]
        forces = [np.concatenate([r["forces"].ravel() for r in results]) for results in after]
        stress = [np.concatenate([r["stress"] for r in results]) for results in after]
        pairs = (1000 * np.array([np.abs(x - y).mean(), np.abs(y).mean()]) for x, y in (change, forces, stress))
        e, f, s = (f"{error:.1f} of {size:.1f}" for error, size in pairs)
        print(f"{noise:8}{strain:8}{e:>22}{f:>20}{np.corrcoef(*forces)[0, 1]:13.3f}{s:>20}", flush=True)


if __name__ == "__main__":
    main()
