"""Errors of given weights on a packed set, and signs of labels by another convention: E0s, units, sign of the stress.

    python records/validate.py nequix-mp-1 --data data/mptrj --frames 200
    python records/validate.py runs/sample/model.pt --data data/sample --test                # once, for a record
    python records/validate.py nequix-mp-1 --data data/mine --refit-e0 refitted.pt       # then train.py --init

The last one fits the E0s, the energies of isolated atoms, to the model's energy residuals on the training frames: for
data from another functional or with other pseudopotentials. Elements that are not in the data keep theirs.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import model as nequix
from data import PackedSet, composition, prefetch
from train import BASELINE, edges_that_fit, evaluate, known_frames


@torch.no_grad()
def slopes(model, packed, pieces):
    """label / prediction of forces and of stress: of the ratios sum(label p) / sum(p^2) of the frames the median weighted
    by sum(p^2), which neither a wrong frame nor the many at rest can move far."""
    found = [], []
    for batch in prefetch(packed, pieces):
        (_, forces, stress), sizes = nequix.energy_forces_stress(model, batch), batch.n_atoms.tolist()
        frames = zip(forces.split(sizes), batch.forces.split(sizes)), zip(stress, batch.stress)
        for out, pairs in zip(found, frames):
            sums = [((p * label).sum().item(), p.square().sum().item()) for p, label in pairs]
            out += [(a / b, b) for a, b in sums if b > 1e-9 and np.isfinite(a)]
    ratios, weights = zip(*(np.array(sorted(x) or [(np.nan, 1.0)]).T for x in found))
    return [r[np.searchsorted(w.cumsum(), w.sum() / 2)] for r, w in zip(ratios, weights)]


@torch.no_grad()
def refitted_e0(model, packed, indices, max_edges):
    """The model's E0s, eV, plus the least-squares fit, of least norm, to its energy residuals on these frames."""
    pieces = packed.pieces(indices[packed.has_energy[indices]], max_edges)
    if not pieces:
        raise ValueError(f"{packed.path} has no training frame with an energy")
    batches = prefetch(packed, tqdm(pieces, "fitting E0s", leave=False, disable=None))
    left = np.concatenate([(b.energy - nequix.energy_forces_stress(model, b)[0]).cpu() for b in batches])
    counts = composition(packed.numbers, packed.offsets)[np.concatenate(pieces)][:, model.config["atomic_numbers"]]
    counts = counts.astype(float)
    return model.e0.cpu().numpy() + np.linalg.lstsq(counts.T @ counts, counts.T @ left, rcond=None)[0]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", help=nequix.WEIGHTS_HELP)
    p.add_argument("--data", required=True, help="a packed set")
    p.add_argument("--frames", type=int, help="number of frames, drawn at random (default: all)")
    p.add_argument("--test", action="store_true", help="the test split, in place of validation")
    p.add_argument("--refit-e0", metavar="FILE", help="write the weights there, with E0s fitted to the training frames")
    nequix.add_options(p, "device precision")
    a = p.parse_args()
    try:
        device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = nequix.load(a.weights, device, a.precision)
        packed = PackedSet(a.data, model.config["cutoff"], device)
        split, indices = ("test", packed.indices(data.TEST)) if a.test else ("validation", packed.indices(data.VAL))
        known = model.config["atomic_numbers"]
        (indices, others), (train, _) = (known_frames(packed, x, known) for x in (indices, packed.indices(data.TRAIN)))
        if others:
            print(f"left out: {split} frames with elements that the model lacks: atomic numbers {others}")
        indices = np.sort(np.random.RandomState(0).permutation(indices)[: a.frames])
        if len(indices) == 0:
            raise ValueError(f"{a.data} has no {split} frames of elements that the model knows")
        max_edges = edges_that_fit(model, packed.device)
        if a.refit_e0:
            model.config["atom_energies"] = refitted_e0(model, packed, train, max_edges).tolist()
            model.e0.copy_(torch.tensor(model.config["atom_energies"], dtype=torch.float64))
            Path(a.refit_e0).parent.mkdir(parents=True, exist_ok=True)
            nequix.save(a.refit_e0, model)
        (energy, forces, stress), baseline = evaluate(model, packed, indices, max_edges)
        by_force, by_stress = slopes(model, packed, packed.pieces(indices, max_edges))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"{a.refit_e0 or a.weights} on {len(indices)} {split} frames of {a.data}, {model.precision}:")
    print(f"energy MAE {energy:.2f} meV/atom, force MAE {forces:.2f} meV/A, stress MAE {stress:.3f} meV/A^3/atom")
    print(BASELINE.format(*baseline))
    print(f"labels = slope x prediction, median: forces {by_force:.3f}, stress {by_stress:.3f}")
    print("  about 1: same units and sign; stress -1: the other sign; 160: GPa; 1602: kbar, not eV/A^3")
    of_set = dict(zip(*(packed.meta["statistics"][k] for k in ("atomic_numbers", "atom_energies"))))
    of_model = dict(zip(model.config["atomic_numbers"], model.config["atom_energies"]))
    gaps = {z: of_set[z] - of_model[z] for z in of_set.keys() & of_model.keys()}
    worst = ", ".join(f"Z={z} {gaps[z]:+.3f}" for z in sorted(gaps, key=lambda z: -abs(gaps[z]))[:5])
    print(f"E0s of the set minus those of the weights, eV: median {np.median([*gaps.values()]):+.3f}; largest {worst}")


if __name__ == "__main__":
    main()
