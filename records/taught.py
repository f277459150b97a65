"""What a packed set holds, beside DFT frames of MPtrj; and a packed set as a zip of extxyz files, as MPtrj is distributed.

python records/taught.py makeup data/taught data/sample      # of sample: validation and test frames, random ones of MPtrj
python records/taught.py zip data/taught --frames 300000 --out data/rehearsal.zip
"""

import argparse
import functools
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import ase.io
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import EXCLUDED, TEST, VAL, PackedSet

open_set = functools.lru_cache(PackedSet)
POINTS = [1, 5, 25, 50, 75, 95, 99, 100]  # percentiles


def makeup(path, splits):
    """Sizes, elements, forces and stress of the frames of a set that are in `splits`."""
    p = PackedSet(path)
    frames = np.flatnonzero(np.isin(p.split, splits))
    atoms = np.repeat(np.isin(np.arange(len(p.split)), frames), p.n_atoms)
    forces = np.linalg.norm(p.arrays["forces"].numpy()[atoms], axis=1)
    offsets = np.append(0, np.cumsum(p.n_atoms[frames]))
    pressure = -np.trace(p.arrays["stress"].numpy()[frames], axis1=1, axis2=2) / 3
    count = np.bincount(p.numbers[atoms], minlength=119) / atoms.sum()
    print(f"{path}: {len(frames)} frames, {atoms.sum()} atoms, {p.n_atoms[frames].mean():.1f} atoms a frame, ", end="")
    print(f"{(p.n_edges / p.n_atoms)[frames].mean():.1f} neighbours within {p.cutoff} A")
    print(
        f"{np.sum(count > 0)} elements: "
        + ", ".join(f"{chemical_symbols[z]} {count[z]:.1%}" for z in np.argsort(-count)[:12])
    )
    print(f"root mean square of a force component {np.sqrt(np.square(forces, dtype=float).mean() / 3):.3f} eV/A")
    rows = {"atoms": p.n_atoms[frames], "force, eV/A": forces, "pressure, eV/A^3": pressure[np.isfinite(pressure)]}
    rows |= {"largest force of a frame, eV/A": np.maximum.reduceat(forces, offsets[:-1])}
    print(f"{'percentile':32}" + "".join(f"{q:10}" for q in POINTS))
    for name, x in rows.items():
        print(f"{name:32}" + "".join(f"{v:10.4f}" for v in np.percentile(x, POINTS)))


def text_of(frames, path):
    """Frames of a set as the text of an extxyz file, with MPtrj's names for what a frame is."""
    p, f = open_set(path), StringIO()
    a = {k: v.numpy() for k, v in p.arrays.items()}
    for i in frames:
        at = slice(*p.offsets[i : i + 2])
        atoms = p.atoms(i)
        atoms.info |= dict(mp_id=f"mp-{frames[0]}", task_id=f"mp-{frames[0]}", calc_id=0, ionic_step=i - frames[0])
        stress = None if np.isnan(a["stress"][i]).any() else a["stress"][i][[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        atoms.calc = SinglePointCalculator(atoms, energy=a["energy"][i], forces=a["forces"][at], stress=stress)
        ase.io.write(f, atoms, "extxyz")
    return f"mptrj/mp-{frames[0]}.extxyz", f.getvalue()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["makeup", "zip"])
    p.add_argument("sets", nargs="+")
    p.add_argument("--frames", type=int, default=300_000, help="in the zip, at most (default: 300000)")
    p.add_argument("--out", default="data/rehearsal.zip", help="the zip (default: data/rehearsal.zip)")
    a = p.parse_args()
    if a.what == "makeup":
        for path in a.sets:
            makeup(path, (VAL, TEST) if Path(path).name == "sample" else [s for s in range(4) if s != EXCLUDED])
        return
    frames = np.flatnonzero(PackedSet(a.sets[0]).split != EXCLUDED)[: a.frames]
    frames = np.array_split(frames, -(-len(frames) // 10))  # about as many a material as MPtrj has
    with zipfile.ZipFile(a.out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as f:
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            work = pool.map(functools.partial(text_of, path=a.sets[0]), frames, chunksize=50)
            for name, text in tqdm(work, a.out, len(frames), unit="file", disable=None):
                f.writestr(name, text)


if __name__ == "__main__":
    main()
