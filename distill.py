"""Distillation: vary known crystal structures, and let released weights label what comes of it. A training set in minutes.

    python distill.py                                            # 1.58 M frames, as many as MPtrj has, -> data/taught
    python distill.py STRUCTURES... --frames 500000 --out data/mine

STRUCTURES are files that ASE reads, zips of them, or packed sets (their training frames); no label of theirs is used. Each is
used equally often: a file that is given twice counts twice. The set consists of chains of four frames of the same atoms. The
first is a structure: in a quarter of the chains with elements exchanged for neighbours in their groups; repeated to a random
size; strained, rattled, at times compressed. For each of the other three, atoms take a step along their forces, and the cell
along its stress, as in a relaxation. Excluded, and counted, are frames with a force above 20 eV/A or two atoms nearer than
half the sum of their covalent radii. A material, that is a reduced formula, is on one side of the split; 5% validate. No
frame has a formula of records/held_out.txt, or of a fixed half of WBM's, so that models can be tested on these.

The same command resumes a killed run. The hash of a set is that of its structures, teacher, VERSION and split. It is the same
on other machines, whose labels differ in the last digits, so that a training run can be resumed there.
"""

import argparse
import contextlib
import hashlib
import math
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from ase.data import chemical_symbols, covalent_radii
from tqdm import tqdm

import data
from calc import NequixCalculator
from data import EXCLUDED, PER_ATOM, TRAIN, VAL, PackedSet, make_batch
from eval_discovery import WBM
from model import energy_forces_stress

VERSION, LENGTH, BLOCK = 1, 4, 128  # raise it if other frames are made; frames of a chain; chains made together
LARGEST, MAX_FORCE, NEAREST = 400, 20.0, 0.5  # atoms; eV/A; in sums of covalent radii
STEP, CELL_STEP = 0.02, 0.3  # downhill: A per eV/A, 0.1 A at most; strain per eV/A^3, 0.02 at most
GROUPS = """Li Na K Rb Cs, Be Mg Ca Sr Ba, Sc Y Lu, La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu, Ac Th Pa U Np Pu, Ti Zr Hf,
V Nb Ta, Cr Mo W, Mn Tc Re, Fe Ru Os, Co Rh Ir, Ni Pd Pt, Cu Ag Au, Zn Cd Hg, B Al Ga In Tl, C Si Ge Sn Pb, N P As Sb Bi,
O S Se Te, F Cl Br I"""
draw = lambda formula: int(hashlib.sha256(formula.encode()).hexdigest(), 16) % 1000  # the same for a formula, always

# ----------------------------------------------------------------------------------------------------------------------
# Structures, and the first frames made of them


def read_job(job):
    """(name, numbers, positions, cell, pbc) of each sound structure of a job of `data.over_frames`; the number of all."""
    out, n = [], 0
    for n, (name, atoms) in enumerate(data.parse(job), 1):
        with contextlib.suppress(ValueError):
            data.check_geometry(atoms)
            name = str(atoms.info.get("material_id", name)).encode()
            out.append((name, atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc))
    return out, n


def read_structures(paths, elements):
    """The usable structures of files and packed sets, joined: arrays as in a packed set, the atoms of each element, `counts`
    (S, 119), and the reduced formula, `formula` (S,). Raises ValueError if there is none."""
    rows, files = [], [path for path in paths if not Path(path).is_dir()]
    for p in (PackedSet(path) for path in paths if Path(path).is_dir()):
        numbers, positions, cell, pbc = (p.arrays[k].numpy() for k in "numbers positions cell pbc".split())
        atoms = {i: slice(*p.offsets[i : i + 2]) for i in p.indices(TRAIN)}
        rows += [(p.ids[i], numbers[a], positions[a], cell[i], pbc[i]) for i, a in atoms.items()]
    n_read, known = len(rows), np.isin(np.arange(119), elements)
    for found, n in data.over_frames(read_job, files, "reading structures") if files else ():
        rows += found
        n_read += n
    rows = [r for r in rows if len(r[1]) <= LARGEST and known[r[1]].all()]
    print(f"{len(rows)} of {n_read} structures are sound, of elements of the teacher and {LARGEST} atoms at most")
    if not rows:
        raise ValueError(f"no usable structure in {', '.join(map(str, paths))}")
    names, numbers, positions, cell, pbc = zip(*rows)
    s = dict(ids=np.array(names), cell=np.stack(cell).astype(float), pbc=np.stack(pbc), numbers=np.concatenate(numbers))
    s |= dict(positions=np.concatenate(positions).astype(float), offsets=np.cumsum([0, *map(len, numbers)]))
    s["counts"] = data.composition(s["numbers"], s["offsets"]).astype(np.uint16)
    return s | dict(formula=np.array(formulas(s["counts"])))


def formulas(counts):
    """Reduced formulas, in the order of atomic numbers ("O3Fe2"), of the atoms of each element (S, 119)."""
    counts = counts // np.gcd.reduce(counts, axis=1)[:, None]
    return ["".join(f"{chemical_symbols[z]}{n if n > 1 else ''}" for z, n in enumerate(row) if n) for row in counts]


def neighbours(elements):
    """Of each element those above and below it in its group, (119, 2); itself where `elements` has no such."""
    table = np.repeat(np.arange(119)[:, None], 2, 1)
    for group in GROUPS.split(","):
        column = [z for z in map(chemical_symbols.index, group.split()) if z in elements]
        for above, below in zip(column, column[1:]):
            table[below, 0], table[above, 1] = above, below
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

    size = np.exp(rng.normal(np.log(20), 0.95, len(of))).clip(1, LARGEST)
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
    scale *= np.where(rng.random(len(of)) < 0.1, rng.uniform(0.92, 1.03, len(of)), 1)
    strain = rng.normal(size=(len(of), 3, 3)) * (0.05 * rng.random(len(of)) ** 3)[:, None, None]
    stretch = scale[:, None, None] * (np.eye(3) + (strain + strain.swapaxes(1, 2)) / 2)
    rattle = (0.2 * rng.random(len(of)) ** 6)[at, None] * rng.normal(size=positions.shape)  # A
    positions = np.einsum("ai,aij->aj", positions, stretch[at]) + rattle
    cell = s["cell"][of] * repeats[:, :, None] @ stretch
    arrays = dict(numbers=numbers, positions=np.float32(positions), cell=np.float32(cell), pbc=s["pbc"][of], n_atoms=n)
    split = np.array([VAL if draw(f) % 20 == 0 else TRAIN for f in formula])
    return {k: torch.from_numpy(v) for k, v in arrays.items()}, split


# ----------------------------------------------------------------------------------------------------------------------
# Labels, and the set


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
    calc = NequixCalculator(weights, device)
    elements = calc.model.config["atomic_numbers"]
    s, others = read_structures(structures, elements), neighbours(elements)
    held_out = {f for f, id in zip(s["formula"], s["ids"]) if b"wbm-" in id and draw(f) < 500}.union(held_out)
    if not (free := [k for k, f in enumerate(s["formula"]) if f not in held_out]):
        raise ValueError("all structures are held out")
    print(f"{len(free)} structures are not held out")
    of = np.resize(np.random.default_rng(0).permutation(free), math.ceil(n_frames / LENGTH))  # a chain's structure
    made_of = hashlib.sha256(f"{VERSION} {calc.fingerprint()} {np.__version__} {sorted(held_out)}".encode())
    made_of.update(b"".join(s[k].tobytes() for k in ("numbers", "positions", "cell", "pbc", "offsets")) + of.tobytes())
    folder = Path(f"{out}.part-{made_of.hexdigest()[:8]}")
    folder.mkdir(parents=True, exist_ok=True)
    threads = 2 if calc.device.type == "cuda" else 1  # the GPU works for one while the other prepares
    files = {b: folder / f"{b}.npz" for b in range(0, len(of), BLOCK)}

    def make_block(b):
        """Write the frames of a block of chains: all the first ones, all the second ones, and so on."""
        if files[b].exists():
            return
        which = of[b : b + BLOCK]
        a, split = vary(s, which, others, held_out, np.random.default_rng([1, b]))
        n = a["n_atoms"].numpy()
        first, parts = np.append(0, n.cumsum()), []
        most = calc.max_edges / 100 / threads  # atoms: at 100 edges each
        for piece in data.micro_batches(np.arange(len(n)), n, n, most, most):
            lo, hi = piece[0], piece[-1] + 1
            system = (v[first[lo] : first[hi]] if k in PER_ATOM else v[lo:hi] for k, v in a.items())
            parts.append(label(calc.model, make_batch(*system, calc.cutoff, calc.device)))
        f = {k: np.concatenate([p[k] for p in parts], 1).reshape(-1, *parts[0][k].shape[2:]) for k in parts[0]}
        ids = [b"%b %d.%d" % (s["ids"][i], b + c, k) for k in range(LENGTH) for c, i in enumerate(which)]
        split = np.where(f["too_strong"] | f["too_near"], EXCLUDED, np.tile(split, LENGTH))
        np.savez(part := folder / f"{b}.tmp.npz", ids=np.array(ids), split=split.astype(np.uint8), **f)
        part.rename(files[b])  # whole or not there

    for b in [b for b in files if not files[b].exists()][:1]:
        make_block(b)  # alone: torch and CUDA load some code at its first use, which two threads must not do at once
    pool, unit = ThreadPoolExecutor(threads), dict(unit="frame", unit_scale=LENGTH * BLOCK)
    try:
        for _ in tqdm(pool.map(make_block, files), f"labelling {out}", len(files), disable=None, **unit):
            pass
    finally:
        pool.shutdown(cancel_futures=True)

    a = {k: np.concatenate([np.load(f)[k] for f in files.values()]) for k in np.load(files[0])}
    a["offsets"] = np.cumsum(np.append(0, a["n_atoms"]))
    made_of.update(a["numbers"].tobytes() + a["split"].tobytes())
    counts = dict(zip(("train", "val", "test", "excluded"), np.bincount(a["split"], minlength=4).tolist()))
    counts |= {f"({k})": int(a[k.replace(" ", "_")].sum()) for k in ("too strong", "too near")}
    source = f"{', '.join(map(str, structures))}, varied; distilled: labels by {weights} ({calc.fingerprint()})"
    data.write_set(out, a, dict(source=source, cutoff=calc.cutoff, counts=counts, data_sha256=made_of.hexdigest()))
    shutil.rmtree(folder)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("structures", nargs="*", metavar="STRUCTURES", help="default: WBM and sample, which are fetched")
    p.add_argument("--weights", default="nequix-mp-1", help="the teacher: a released name, an .nqx file or a model.pt")
    p.add_argument("--frames", type=int, default=1_580_000, help="how many (default: 1580000)")
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
