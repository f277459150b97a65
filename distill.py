"""Distillation: vary known crystal structures, and let released weights label what comes of it. A training set in minutes.

    python distill.py                                            # 1.58 M frames, as many as MPtrj has, -> data/taught
    python distill.py STRUCTURES... --frames 500000 --out data/mine

STRUCTURES are files that ASE reads, zips of them, or packed sets (their training frames); no label of theirs is used. All are
used equally often, to within one: a file that is given twice counts twice. A set has chains of four frames of the same atoms.
The first is a structure: in a fifth of the chains with elements exchanged for neighbours in their groups; repeated to a random
size; strained, rattled, at times compressed. For each of the other three, atoms take a step along their forces, and the cell
along its stress, as in a relaxation. A frame with a force above 20 eV/A, or two atoms nearer than half the sum of covalent
radii, is kept, but not for training. A material, that is a reduced formula, is on one side of the split; 5% validate. Formulas
of records/held_out.txt, and half of WBM's if it is among STRUCTURES, are in no frame: models can be tested on them.

The same command resumes a killed run, which loses 512 frames at most. A set has the same hash on other machines, unless a force
is 20 eV/A to the last digits, so that training can be resumed there: it is that of structures, teacher, split, numpy, VERSION.
"""

import argparse
import hashlib
import math
import re
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from ase.data import chemical_symbols, covalent_radii
from tqdm import tqdm

import data
from calc import NequixCalculator, check
from data import EXCLUDED, PER_ATOM, TRAIN, VAL, PackedSet, make_batch
from eval_discovery import WBM
from model import energy_forces_stress

VERSION, LENGTH, BLOCK = 2, 4, 128  # of the frames that this script makes; frames in a chain; chains in a block
MAX_FORCE, NEAREST = 20.0, 0.5  # eV/A; in sums of covalent radii
STEP, CELL_STEP = 0.02, 0.3  # downhill: A per eV/A, 0.1 A at most; strain per eV/A^3, 0.02 at most
GROUPS = """Li Na K Rb Cs, Be Mg Ca Sr Ba, Sc Y Lu, La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu, Ac Th Pa U Np Pu, Ti Zr Hf,
V Nb Ta, Cr Mo W, Mn Tc Re, Fe Ru Os, Co Rh Ir, Ni Pd Pt, Cu Ag Au, Zn Cd Hg, B Al Ga In Tl, C Si Ge Sn Pb, N P As Sb Bi,
O S Se Te, F Cl Br I"""
draw = lambda formula: int(hashlib.sha256(formula.encode()).hexdigest(), 16) % 1000  # always the same

# ----------------------------------------------------------------------------------------------------------------------
# Structures, the first frames made of them, labels, the set


def read(source, elements):
    """(id, numbers, positions, cell, pbc) of the structures of a job of `data.over_frames`, or of a packed set; (name, what is
    wrong) of those that cannot be used; the number of all."""
    packed, rows, problems = isinstance(source, PackedSet), [], []
    frames = ((source.name(i), source.atoms(i)) for i in source.indices(TRAIN)) if packed else data.parse(source)
    for name, atoms in frames:
        try:
            check(atoms, elements)
            id = str(atoms.info.get("material_id", name)).encode()
            rows.append((id, atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc))
        except ValueError as e:
            problems.append((name, str(e)))
    return rows, problems, len(rows) + len(problems)


def read_structures(paths, elements):
    """The usable structures of files and packed sets, joined as in a packed set, to 1e-5 A, since more digits can vary between
    machines; with counts, (S, 119), of each element, and reduced formulas, (S,). Raises ValueError if there is none."""
    files = [f for f in paths if not Path(f).is_dir()]
    found = [read(PackedSet(f), elements) for f in paths if Path(f).is_dir()]
    if files:
        found += data.over_frames(partial(read, elements=elements), files, "reading structures")
    rows, problems = (list(chain.from_iterable(x)) for x in list(zip(*found))[:2])
    data.tell(problems, "left out")
    if not rows:
        raise ValueError(f"no usable structure in {', '.join(map(str, paths))}")
    ids, numbers, positions, cell, pbc = zip(*rows)
    s = dict(ids=np.array(ids), numbers=np.concatenate(numbers), pbc=np.stack(pbc))
    s |= dict(positions=np.round(np.concatenate(positions), 5) + 0.0, cell=np.round(np.stack(cell), 5) + 0.0)
    s["offsets"] = offsets = np.cumsum([0, *map(len, numbers)])
    counts = data.composition(s["numbers"], offsets).astype(np.uint16)
    return s | dict(counts=counts, formula=np.array(formulas(counts)))


def formulas(counts):
    """Reduced formulas, in the order of atomic numbers ("O3Fe2"), of the atoms of each element (S, 119)."""
    counts = counts // np.gcd.reduce(counts, axis=1)[:, None]
    return ["".join(f"{chemical_symbols[z]}{n if n > 1 else ''}" for z, n in enumerate(row) if n) for row in counts]


def neighbours(elements):
    """Of each element those above and below it in its group, (119, 2); itself where `elements` has no such."""
    table = np.repeat(np.arange(119)[:, None], 2, 1)
    for group in GROUPS.split(","):
        column = [z for z in map(chemical_symbols.index, group.split()) if z in elements]
        table[column[1:], 0], table[column[:-1], 1] = column[:-1], column[1:]
    return table


def vary(s, of, others, held_out, rng):
    """The first frames of the chains of structures `of` (S,), as arrays that `data.make_batch` takes, and their split."""
    counts, elements = s["counts"][of], np.arange(119)
    some = (rng.random((len(of), 1)) < 0.25) & (rng.random((len(of), 119)) < 0.5)
    becomes = np.where(some, others[elements, rng.integers(2, size=some.shape)], elements)
    exchanged, (c, z) = np.zeros_like(counts), counts.nonzero()
    np.add.at(exchanged, (c, becomes[c, z]), counts[c, z])
    formula = formulas(exchanged)
    held = np.array([f in held_out for f in formula])
    becomes[held] = elements
    formula = np.where(held, s["formula"][of], formula)

    size = np.exp(rng.normal(np.log(20), 0.95, len(of))).clip(1, 400)  # atoms, much as in MPtrj
    n_cell, length = np.diff(s["offsets"])[of], np.where(s["pbc"], np.linalg.norm(s["cell"], axis=2), np.inf)[of]
    repeats, growing = np.ones((len(of), 3), int), np.flatnonzero(s["pbc"][of].any(1))
    while len(growing):  # along the shortest vector, up to the size
        more = repeats[growing]
        more[np.arange(len(growing)), (length[growing] * more).argmin(1)] += 1
        growing, more = (x[n_cell[growing] * more.prod(1) <= size[growing]] for x in (growing, more))
        repeats[growing] = more

    n = n_cell * repeats.prod(1)
    at = np.repeat(np.arange(len(of)), n)  # the chain of each atom
    image, k = np.divmod(np.arange(len(at)) - np.repeat(np.cumsum(n) - n, n), n_cell[at])
    atom, (_, b, c) = s["offsets"][of][at] + k, repeats[at].T
    shift = np.stack([image // (b * c), image // c % b, image % c], 1)
    positions = s["positions"][atom] + np.einsum("ai,aij->aj", shift, s["cell"][of][at])
    numbers = becomes[at, s["numbers"][atom]]

    radius = lambda z: np.bincount(at, covalent_radii[z], len(of)) / n
    scale = radius(numbers) / radius(s["numbers"][atom])  # other elements take other room
    scale *= np.where(rng.random(len(of)) < 0.1, rng.uniform(0.92, 1.03, len(of)), 1)  # at times compressed
    strain = rng.normal(size=(len(of), 3, 3)) * (0.05 * rng.random(len(of)) ** 3)[:, None, None]
    stretch = scale[:, None, None] * (np.eye(3) + (strain + strain.swapaxes(1, 2)) / 2)
    rattle = (0.2 * rng.random(len(of)) ** 6)[at, None] * rng.normal(size=positions.shape)  # A: most by very little
    positions = np.einsum("ai,aij->aj", positions, stretch[at]) + rattle
    cell = s["cell"][of] * repeats[:, :, None] @ stretch
    arrays = dict(numbers=numbers, positions=np.float32(positions), cell=np.float32(cell), pbc=s["pbc"][of], n_atoms=n)
    split = np.array([VAL if draw(f) % 20 == 0 else TRAIN for f in formula])
    return {k: torch.from_numpy(v) for k, v in arrays.items()}, split


def label(model, batch):
    """The frames of the chains that begin with `batch`, as arrays (LENGTH, A or S, ...) named and typed as in a packed set; with
    n_atoms and, (LENGTH, S) bool, what excludes a frame: too_strong forces, too_near atoms."""
    frames, radii = [], torch.from_numpy(covalent_radii).to(batch.positions)[batch.numbers]
    extreme = lambda x, index, how, none: torch.full_like(batch.energy, none).scatter_reduce(0, index, x, how)
    for k in range(LENGTH):
        batch.energy, batch.forces, batch.stress = energy_forces_stress(model, batch)
        f = {name: getattr(batch, name).float() for name in ("positions", "cell", "forces", "stress")}
        f |= dict(numbers=batch.numbers.byte(), pbc=batch.pbc, n_atoms=batch.n_atoms, energy=batch.energy)
        force, of = torch.linalg.vector_norm(batch.forces, dim=1, keepdim=True), batch.structure[batch.receivers]
        distance = batch.vectors.norm(dim=1) / (radii[batch.senders] + radii[batch.receivers])
        f["too_strong"] = ~(extreme(force[:, 0], batch.structure, "amax", 0) <= MAX_FORCE)  # or not a number
        f["too_near"] = extreme(distance, of, "amin", torch.inf) < NEAREST
        frames.append(f | dict(n_edges=torch.bincount(of, minlength=len(batch.cell)).int()))
        if k < LENGTH - 1:
            move = (batch.forces * (0.1 / force).clamp(max=STEP)).nan_to_num(0)
            strain = (CELL_STEP * batch.stress).clamp(-0.02, 0.02).nan_to_num(0)
            stretch = torch.eye(3, device=strain.device) - strain
            positions = torch.einsum("ai,aij->aj", batch.positions + move, stretch[batch.structure])
            system = positions.float(), (batch.cell @ stretch).float(), batch.pbc, batch.n_atoms
            batch = make_batch(batch.numbers, *system, model.config["cutoff"])
    return {name: torch.stack([f[name] for f in frames]).cpu().numpy() for name in frames[0]}


def distill(structures, weights, n_frames, out, held_out, device):
    """Make the packed set `out`, or go on with it. Raises ValueError or OSError with a one-line reason."""
    calc, out = NequixCalculator(weights, device), Path(out)
    elements = calc.model.config["atomic_numbers"]
    s, others = read_structures(structures, elements), neighbours(elements)
    wbm = (f for f, id in zip(s["formula"], s["ids"]) if re.search(rb"(^|[:/])wbm-\d+-\d+", id))
    held_out = {f for f in wbm if draw(f) < 500}.union(held_out)
    if not (free := [k for k, f in enumerate(s["formula"]) if f not in held_out]):
        raise ValueError("all structures are held out")
    print(f"usable structures: {len(s['ids'])}, not held out: {len(free)}")
    of = np.resize(np.random.default_rng(0).permutation(free), math.ceil(n_frames / LENGTH))  # a chain's structure
    made_of = hashlib.sha256(f"{VERSION} {calc.fingerprint()} {np.__version__} {sorted(held_out)}".encode())
    made_of.update(b"".join(s[k].tobytes() for k in ("numbers", "positions", "cell", "pbc", "offsets")) + of.tobytes())
    folder = out.with_name(f"{out.name}.part-{made_of.hexdigest()[:8]}")
    folder.mkdir(parents=True, exist_ok=True)
    threads = 2 if calc.device.type == "cuda" else 1  # the GPU works for one while the other prepares
    files = {b: folder / f"{b}.npz" for b in range(0, len(of), BLOCK)}
    bar = tqdm(desc=f"labelling {out}", total=LENGTH * len(of), unit="frame", disable=None)

    def make_block(b):
        """Write the frames of a block of chains, the first ones first, in pieces that fit the memory (100 edges an atom)."""
        which = of[b : b + BLOCK]
        if zipfile.is_zipfile(files[b]):  # whole
            return bar.update(LENGTH * len(which))
        a, split = vary(s, which, others, held_out, np.random.default_rng([1, b]))
        n = a["n_atoms"].numpy()
        first, parts = np.append(0, n.cumsum()), []
        for piece in data.micro_batches(np.arange(len(n)), n, 100 * n, np.inf, calc.max_edges / threads):
            lo, hi = piece[0], piece[-1] + 1
            system = (v[first[lo] : first[hi]] if k in PER_ATOM else v[lo:hi] for k, v in a.items())
            parts.append(label(calc.model, make_batch(*system, calc.cutoff, calc.device)))
            bar.update(LENGTH * len(piece))
        f = {k: np.concatenate([p[k] for p in parts], 1).reshape(-1, *parts[0][k].shape[2:]) for k in parts[0]}
        ids = [b"%b %d.%d" % (s["ids"][i], b + c, k) for k in range(LENGTH) for c, i in enumerate(which)]
        split = np.where(f["too_strong"] | f["too_near"], EXCLUDED, np.tile(split, LENGTH))
        np.savez(part := folder / f"{b}.tmp.npz", ids=np.array(ids), split=split.astype(np.uint8), **f)
        part.rename(files[b])

    pool = ThreadPoolExecutor(threads)
    try:
        make_block(min(files, key=lambda b: files[b].exists()))  # alone: torch fails if two threads are its first users
        bar.reset()
        list(pool.map(make_block, files))
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()

    a = {k: np.concatenate([np.load(f)[k] for f in files.values()]) for k in np.load(files[0])}
    a["offsets"] = np.cumsum(np.append(0, a["n_atoms"]))
    made_of.update(a["numbers"].tobytes() + a["split"].tobytes())
    counts = dict(zip(("train", "val", "test", "excluded"), np.bincount(a["split"], minlength=4).tolist()))
    counts |= {f"({k})": int(a[k.replace(" ", "_")].sum()) for k in ("too strong", "too near")}
    if not (counts["train"] and counts["val"]):
        raise ValueError(f"nothing to train on or to validate on ({counts}): give structures of more materials")
    source = f"{', '.join(map(str, structures))}, varied; distilled: labels by {weights} ({calc.fingerprint()})"
    data.write_set(out, a, dict(source=source, cutoff=calc.cutoff, counts=counts, data_sha256=made_of.hexdigest()))
    shutil.rmtree(folder)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("structures", nargs="*", metavar="STRUCTURES", help="default: those of WBM and sample, fetched")
    p.add_argument("--weights", default="nequix-mp-1", help="the teacher: a released name, an .nqx file or a model.pt")
    p.add_argument("--frames", type=int, default=1_580_000, help="number of frames, a multiple of 4 (default: 1580000)")
    p.add_argument("--out", default="data/taught", help="folder of the packed set (default: data/taught)")
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    a = p.parse_args()
    try:
        if a.frames < 1 or Path(a.out).exists():
            raise ValueError(f"{a.out} exists: choose another --out" if a.frames > 0 else "--frames must be positive")
        if not a.structures and not Path("data/sample").exists():
            data.fetch_sample()
        a.structures = a.structures or [data.fetch_figshare(*WBM["structures"]), "data/sample"]
        held_out = (Path(__file__).parent / "records/held_out.txt").read_text().split()
        distill(a.structures, a.weights, a.frames, a.out, held_out, a.device)
    except (ValueError, OSError, zipfile.BadZipFile) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")


if __name__ == "__main__":
    main()
