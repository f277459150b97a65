"""The same displaced supercells one at a time through ASE, after eval_phonon.py kappa has written their forces to OUT.

PYTHONPATH=. python records/2026-11-23_phonons/ase_one_by_one.py STRUCTURES WEIGHTS OUT ID...
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from ase import Atoms

import eval_phonon
from calc import NequixCalculator

structures, weights, out, *ids = sys.argv[1:]
materials, settings = eval_phonon.read_kappa(structures), json.loads(Path(out, "settings.json").read_text())
calc, seconds, cells, apart = NequixCalculator(weights), 0.0, 0, 0.0
for k in ids:
    with np.load(Path(out, "forces", f"{k}.npz")) as f:
        x = dict(f)
    relaxed = Atoms(x["numbers"], x["positions"], cell=x["cell"], pbc=True)
    for name, (numbers, cell, positions) in eval_phonon.supercells(materials[k], relaxed, settings).items():
        for d, at in enumerate(positions):
            atoms = Atoms(numbers, at, cell=cell, pbc=True)
            atoms.calc = calc
            start = time.perf_counter()
            forces = atoms.get_forces()
            seconds += time.perf_counter() - start
            apart, cells = max(apart, np.abs(forces - x[name][d]).max()), cells + 1
print(
    f"{len(ids)} materials, {cells} cells one by one: {seconds:.2f} s, {3600 * len(ids) / seconds:.0f} materials an hour; ",
    end="",
)
print(f"forces differ from those of the batches by {apart:.1e} eV/A at most")
