"""Data: DFT frames packed into flat arrays, batches of any size dealt to ranks, neighbour lists of many structures at once.

    python data.py sample                       # 5,217 real DFT frames, fetched with pip, -> data/sample
    python data.py mptrj [--zip FILE]           # MPtrj, 1.58 M frames, -> data/mptrj
    python data.py pack FILE... --out DIR       # any files ASE reads, zips of them included

A packed set is a folder of .npy files, memory-mapped: positions (A, 3) A, numbers (A,), forces (A, 3) eV/A, cell (S, 3, 3) A,
pbc (S, 3), energy (S,) eV, stress (S, 3, 3) eV/A^3 (ASE sign: positive is tensile), offsets (S+1,), ids, split (0 train,
1 validation, 2 test, 3 excluded), n_edges (S,) within 6 A; NaN where a label is missing; and meta.json. A atoms and S
structures in all.
"""

import argparse
import functools
import hashlib
import heapq
import io
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.request
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import kernels

CUTOFF = 6.0  # A, for the stored n_edges
TRAIN, VAL, TEST, EXCLUDED = range(4)

# ----------------------------------------------------------------------------------------------------------------------
# Neighbour list


def complete_cell(cell, pbc):
    """Replace the vectors of non-periodic directions, (S, 3, 3), by unit vectors normal to the others."""
    cell = torch.where(pbc[:, :, None], cell, 0)
    axes = torch.eye(3, dtype=cell.dtype, device=cell.device)
    for k in range(3):
        a, b = cell[:, (k + 1) % 3], cell[:, (k + 2) % 3]
        a_zero, b_zero = (v.square().sum(1, keepdim=True) == 0 for v in (a, b))
        one = torch.where(a_zero, b, a)  # whichever is there; if neither, any axis will do
        one = torch.where(a_zero & b_zero, axes[2], one)
        b = torch.where(a_zero | b_zero, axes[one.abs().argmin(1)], b)
        normal = torch.linalg.cross(one, b)
        normal = normal / torch.linalg.vector_norm(normal, dim=1, keepdim=True)
        cell = torch.cat([cell[:, :k], torch.where(pbc[:, k, None], cell[:, k], normal)[:, None], cell[:, k + 1 :]], 1)
    return cell


def neighbor_list(bins, cutoff):
    """All pairs closer than `cutoff`, A, over periodic images, of many structures at once.

    bins: what `linked_cells` returns, on any device. Returns there senders (E,), receivers (E,) ascending, row_ptr (A+1,),
    shifts (E, 3), and the edge vectors (E, 3), float64, positions[sender] - positions[receiver] + shift @ cell. No atom is
    its own neighbour except through an image.

    Linked cells: a box is cut into bins about 3 A thick along each plane normal; an atom looks through the bins within
    reach, which wrap around the periodic boundaries as often as needed. Everything is in float64: that is cheap, and a
    pair is then found from both sides or from neither. On CUDA one kernel looks through the bins, which are better made on
    the host: a GPU that is busy should not be asked for two hundred small things.
    """
    on_cuda = bins["positions"].device.type == "cuda"
    return (kernels.find_pairs if on_cuda else find_pairs)(cutoff, **bins)


def linked_cells(positions, cell, pbc, structure, cutoff):
    """Bins for `find_pairs`, on the device of positions (A, 3) and cell (S, 3, 3) in A, float64, pbc (S, 3) bool, and structure
    (A,), ascending. Any cell: shorter than the cutoff, skewed, left-handed, periodic in some directions only; atoms may lie
    outside it. Needs A >= 1 and cells of non-zero volume.

    Returns these and, int64, of each atom its bin (A, 3) and the cells it is outside of its own, wrap (A, 3); of each
    structure its first bin, the numbers of bins along the axes (S, 3), and how many of them the cutoff reaches over; order:
    atoms by bin, those of bin b from start[b] to start[b+1]."""
    cell = complete_cell(cell, pbc)

    # Fractional coordinates in [0, 1). Where the box is open it spans the atoms.
    inverse = torch.linalg.inv(cell)
    frac = torch.einsum("ai,aij->aj", positions, inverse[structure])
    open_ = ~pbc[structure]
    index = structure[:, None].expand(-1, 3)
    low = frac.new_full((len(cell), 3), torch.inf).scatter_reduce(0, index, frac, "amin")
    high = frac.new_full((len(cell), 3), -torch.inf).scatter_reduce(0, index, frac, "amax")
    extent = torch.where(pbc, 1.0, (high - low).clamp(min=1.0))
    frac = torch.where(open_, (frac - low[structure]) / extent[structure], frac)
    wrap = torch.where(open_, 0, frac.floor()).long()
    frac = frac - wrap

    # Bins, and how many of them the cutoff spans.
    height = extent / torch.linalg.vector_norm(inverse, dim=1)  # distance of the planes that bound the box
    bins = (height / 3.0).long().clamp(1, 256)
    reach = ((cutoff + 1e-6) * bins / height).ceil().long()
    reach = torch.where(pbc, reach, torch.minimum(reach, bins - 1))
    n_bins = bins.prod(1)
    first_bin = n_bins.cumsum(0) - n_bins
    bins_a = bins[structure]
    bin3 = torch.minimum((frac * bins_a).long().clamp(min=0), bins_a - 1)  # (A, 3)
    bin_of_atom = bin_number(bin3, first_bin, bins, structure)
    count = torch.bincount(bin_of_atom, minlength=int(n_bins.sum()))
    start = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    atoms = dict(positions=positions, structure=structure, bin=bin3, wrap=wrap)
    structures = dict(cell=cell, pbc=pbc, bins=bins, reach=reach, first_bin=first_bin)
    return atoms | structures | dict(order=bin_of_atom.argsort(stable=True), start=start)


def bin_number(b, first_bin, bins, s):
    """Of a bin (.., 3) of structure s (..,) among all of them."""
    return first_bin[s] + (b[:, 0] * bins[s, 1] + b[:, 1]) * bins[s, 2] + b[:, 2]


def find_pairs(cutoff, positions, structure, bin, wrap, cell, pbc, bins, reach, first_bin, order, start):
    """The edges as `neighbor_list` returns them, on the CPU; kernels.py has the same for CUDA."""
    span, count = 2 * reach + 1, start.diff()
    n_visits = span.prod(1)[structure]  # bins that an atom looks through
    inside = positions - shift_vectors(wrap, cell, structure)
    out = []
    for block in torch.arange(len(positions)).split(50_000):  # bounds the memory of the candidates
        atom, visit = ragged(block, n_visits[block])
        s = structure[atom]
        step = torch.stack(
            [visit // (span[s, 1] * span[s, 2]), visit // span[s, 2] % span[s, 1], visit % span[s, 2]], 1
        )
        target = bin[atom] + step - reach[s]
        image = target.div(bins[s], rounding_mode="floor")
        target = bin_number(target - image * bins[s], first_bin, bins, s)
        keep = ((image == 0) | pbc[s]).all(1) & (count[target] > 0)
        atom, image, target = atom[keep], image[keep], target[keep]
        origin = shift_vectors(image, cell, structure[atom]) - inside[atom]

        # Candidates: first those near enough to rounding, a coordinate at a time; then the edges.
        pair, k = ragged(torch.arange(len(atom)), count[target])
        j = order[start[target][pair] + k]
        square = sum((x[j] + o[pair]).square() for x, o in zip(inside.T.contiguous(), origin.T.contiguous()))
        near = square < (cutoff + 1e-6) ** 2
        pair, j = pair[near], j[near]
        i = atom[pair]
        shift = image[pair] - wrap[j] + wrap[i]
        vector = positions[j] - positions[i] + shift_vectors(shift, cell, structure[i])
        keep = vector.square().sum(1) < cutoff**2
        keep &= (i != j) | (shift != 0).any(1)
        out.append((j[keep], i[keep], shift[keep], vector[keep]))
    senders, receivers, shifts, vectors = (torch.cat(x) for x in zip(*out))
    return senders, receivers, torch.searchsorted(receivers, torch.arange(len(positions) + 1)), shifts, vectors


def shift_vectors(shifts, cell, structure):
    """shifts (E, 3) @ cell (S, 3, 3) of each edge's structure (E,)."""
    a, b, c = shifts.to(cell).unsqueeze(2).unbind(1)
    return a * cell[structure, 0] + b * cell[structure, 1] + c * cell[structure, 2]


def ragged(values, counts):
    """Each value repeated as often as its count says, and the number of the repetition: 0, 1, ..."""
    repeat = torch.repeat_interleave(counts)
    return values[repeat], torch.arange(len(repeat)) - (counts.cumsum(0) - counts)[repeat]


# ----------------------------------------------------------------------------------------------------------------------
# Batch


@dataclass
class Batch:
    """Structures packed one after another: A atoms, E edges, S structures, on one device."""

    numbers: torch.Tensor  # (A,) int64
    positions: torch.Tensor  # (A, 3) A, float64
    cell: torch.Tensor  # (S, 3, 3) A, float64
    pbc: torch.Tensor  # (S, 3) bool
    n_atoms: torch.Tensor  # (S,) int64
    structure: torch.Tensor  # (A,) int64
    senders: torch.Tensor  # (E,) int64
    receivers: torch.Tensor  # (E,) int64, ascending
    row_ptr: torch.Tensor  # (A+1,) int64: the edges of receiver i are row_ptr[i]:row_ptr[i+1]
    shifts: torch.Tensor  # (E, 3) int64, cells crossed
    vectors: torch.Tensor  # (E, 3) A, float64, r_sender - r_receiver + shift @ cell
    energy: torch.Tensor = None  # (S,) eV, float64; labels are NaN where missing
    forces: torch.Tensor = None  # (A, 3) eV/A, float64
    stress: torch.Tensor = None  # (S, 3, 3) eV/A^3, float64


def make_batch(numbers, positions, cell, pbc, n_atoms, cutoff, device=None, **labels):
    """A Batch on `device` (None: where the arrays are) from packed arrays of any dtype, its neighbour list included."""
    numbers, positions, cell = numbers.long(), positions.double(), cell.double()
    structure = torch.repeat_interleave(torch.arange(len(cell), device=cell.device), n_atoms, output_size=len(numbers))
    bins = linked_cells(positions, cell, pbc, structure, cutoff)
    rest = dict(numbers=numbers, n_atoms=n_atoms, own_cell=cell, **{k: v.double() for k, v in labels.items()})
    there = moved(bins | rest, torch.device(device or positions.device))
    numbers, n_atoms, cell = (there.pop(k) for k in ("numbers", "n_atoms", "own_cell"))
    labels = {k: there.pop(k) for k in labels}
    system = numbers, there["positions"], cell, there["pbc"], n_atoms, there["structure"]
    return Batch(*system, *neighbor_list(there, cutoff), **labels)


def moved(tensors, device):
    """A dict of tensors, on `device`; from the host to a GPU by one copy of pinned memory, in place of one for each."""
    if device.type != "cuda" or any(t.is_cuda for t in tensors.values()):
        return {k: t.to(device) for k, t in tensors.items()}
    sizes = [-(-t.nbytes // 16) * 16 for t in tensors.values()]  # each begins where any type may
    host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    views = lambda memory: [
        p[: t.nbytes].view(t.dtype).view(t.shape) for p, t in zip(memory.split(sizes), tensors.values())
    ]
    torch._foreach_copy_(views(host), list(tensors.values()))
    return dict(zip(tensors, views(host.to(device, non_blocking=True))))


class PackedSet:
    """A packed set, for training and validation.

    The arrays stay memory-mapped. Raises FileNotFoundError or ValueError, a line, if `path` is not a whole packed set.
    """

    ARRAYS = "positions numbers forces cell pbc energy stress offsets ids split n_edges".split()

    def __init__(self, path, cutoff=CUTOFF, device="cpu"):
        self.path, self.cutoff, self.device = Path(path), cutoff, torch.device(device)
        if not (self.path / "meta.json").is_file():
            raise FileNotFoundError(
                f"no packed set at {path}: make one with `python data.py sample`, `mptrj` or `pack`"
            )
        try:
            self.meta = json.loads((self.path / "meta.json").read_text())
            a = {k: np.load(self.path / f"{k}.npy", mmap_mode="c") for k in self.ARRAYS}
            lengths = dict.fromkeys(self.ARRAYS, len(a["offsets"]) - 1) | dict(offsets=len(a["offsets"]))
            lengths |= dict.fromkeys(("positions", "numbers", "forces"), a["offsets"][-1])
            if any(len(a[k]) != n for k, n in lengths.items()) or not {"cutoff", "data_sha256"} <= self.meta.keys():
                raise ValueError("its parts disagree")
        except (OSError, ValueError, EOFError, IndexError) as e:
            raise ValueError(f"the packed set at {path} is damaged ({e}): pack it again") from None
        self.offsets, self.ids, self.split = np.array(a["offsets"]), a["ids"], np.array(a["split"])
        self.n_atoms = np.diff(self.offsets)
        self.has_energy = np.isfinite(a["energy"])
        self.has_stress = np.isfinite(a["stress"]).all((1, 2))
        self.has_forces = np.isfinite(a["forces"][self.offsets[:-1]]).all(1)  # of a frame's atoms all or none
        self.numbers = a["numbers"]
        keys = "numbers positions forces cell pbc energy stress".split()
        self.arrays = {k: torch.from_numpy(a[k]) for k in keys}
        self.n_edges = np.array(a["n_edges"])
        if cutoff != self.meta["cutoff"]:
            self.n_edges = self.count_edges()

    def indices(self, split):
        return np.flatnonzero(self.split == split)

    def name(self, index):
        return self.ids[index].decode()

    def batch(self, indices, labels=True):
        """The structures `indices` (S,) as a Batch on the device."""
        n_atoms = self.n_atoms[indices]
        first = np.cumsum(n_atoms) - n_atoms
        atoms = np.repeat(self.offsets[indices] - first, n_atoms) + np.arange(n_atoms.sum())
        rows = dict.fromkeys(("numbers", "positions", "forces"), atoms)
        get = lambda key: self.arrays[key][torch.from_numpy(rows.get(key, indices))]
        system = [get(k) for k in ("numbers", "positions", "cell", "pbc")]
        wanted = {k: get(k) for k in ("energy", "forces", "stress") if labels}
        return make_batch(*system, torch.from_numpy(n_atoms), self.cutoff, self.device, **wanted)

    def count_edges(self):
        """Edges of each structure within the cutoff, (S,)."""
        n_edges = np.zeros(len(self.n_atoms), np.int32)
        bar = tqdm(total=len(n_edges), desc=f"counting edges within {self.cutoff} A", unit="frame", disable=None)
        for part in micro_batches(np.arange(len(n_edges)), self.n_atoms, self.n_edges, 500, np.inf):
            b = self.batch(part, labels=False)
            n_edges[part] = torch.bincount(b.structure[b.receivers], minlength=len(part)).cpu().numpy()
            bar.update(len(part))
        return n_edges

    def statistics(self):
        """E0s and the three numbers of the model, from the training split; `atomic_numbers` are those of the whole set.

        Nequix' definitions: avg_n_neighbors = mean over structures of edges/atoms; shift = mean over structures of
        (E - sum of E0)/atoms, eV; scale = RMS force component, eV/A. Raises ValueError if there is nothing to fit.
        """
        train = self.indices(TRAIN)
        train_e = train[self.has_energy[train]]
        if len(train_e) == 0:
            raise ValueError(f"{self.path} has no training frame with an energy")
        energy = self.arrays["energy"].numpy()
        counts = composition(self.numbers, self.offsets)
        x, y = counts[train_e].astype(float), energy[train_e]
        e0, *_ = np.linalg.lstsq(x.T @ x, x.T @ y, rcond=None)  # least norm where compositions leave a choice
        numbers = np.flatnonzero(counts[self.split != EXCLUDED].any(0))
        shift = (energy[train_e] - counts[train_e] @ e0) / self.n_atoms[train_e]
        atoms = np.repeat((self.split == TRAIN) & self.has_forces, self.n_atoms)
        forces = self.arrays["forces"].numpy()[atoms]
        scale = float(np.sqrt(np.mean(forces.astype(float) ** 2))) if len(forces) else 1.0
        return dict(
            atomic_numbers=numbers.tolist(),
            atom_energies=e0[numbers].tolist(),
            avg_n_neighbors=max(float(np.mean(self.n_edges[train] / self.n_atoms[train])), 1e-3),
            shift=float(shift.mean()),
            scale=scale or 1.0,  # a set of relaxed structures has no forces to scale by
        )


def composition(numbers, offsets):
    """Atoms of each element in each structure, (S, 119)."""
    key = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * 119 + numbers
    return np.bincount(key, minlength=(len(offsets) - 1) * 119).reshape(-1, 119).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Order. The training frames pass in one endless stream, permutation after permutation, and step t takes its t-th piece of
# `batch` frames: the position in the data is the step number, for any number of ranks.


@functools.lru_cache(2)
def permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_indices(train, batch, seed, step):
    """The frames of a step, (batch,), out of `train` (n,)."""
    out, at, end = [], step * batch, (step + 1) * batch
    while at < end:
        epoch, first = divmod(at, len(train))
        out.append(permutation(len(train), seed, epoch)[first : first + end - at])
        at += len(out[-1])
    return train[np.concatenate(out)]


def deal(indices, n_edges, ranks):
    """Split frames among ranks so that edges balance: the largest first, each to the least loaded rank."""
    load, hands = [(0, rank) for rank in range(ranks)], [[] for _ in range(ranks)]
    edges = n_edges[indices]
    for k in np.argsort(-edges, kind="stable").tolist():
        least, rank = load[0]
        hands[rank].append(k)
        heapq.heapreplace(load, (least + int(edges[k]) + 1, rank))
    return [indices[np.array(h, dtype=np.int64)] for h in hands]


def micro_batches(indices, n_atoms, n_edges, max_atoms, max_edges):
    """Split frames into pieces within an atom and an edge budget; a frame beyond the budget is a piece of its own."""
    ends, atoms, edges = [], 0, 0
    for k, (a, e) in enumerate(zip(n_atoms[indices].tolist(), n_edges[indices].tolist())):
        atoms, edges = atoms + a, edges + e
        if k and (atoms > max_atoms or edges > max_edges):
            ends.append(k)
            atoms, edges = a, e
    return np.split(indices, ends) if len(indices) else []


def prefetch(packed, pieces):
    """Batches for the `pieces`, each built while the one before it is at work.

    On CUDA a thread builds them, on a stream of its own: the sizes of a neighbour list must reach the host, and neither
    the model's kernels nor the Python code that launches them should wait for that.
    """
    if packed.device.type != "cuda":
        yield from map(packed.batch, pieces)
        return
    ready, room, side = queue.Queue(), threading.Semaphore(2), torch.cuda.Stream(packed.device, priority=-1)
    wanted = True

    def build():
        try:
            with torch.cuda.stream(side):
                for piece in pieces:
                    room.acquire()
                    if not wanted:
                        return
                    batch = packed.batch(piece)
                    side.synchronize()
                    ready.put(batch)
            ready.put(None)
        except BaseException as e:  # handed to the consumer
            ready.put(e)

    threading.Thread(target=build, daemon=True).start()
    try:
        while (batch := ready.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            room.release()
            for tensor in vars(batch).values():
                tensor.record_stream(torch.cuda.current_stream())  # the allocator must not reuse it too early
            yield batch
    finally:  # the consumer may leave early
        wanted = False
        room.release()


# ----------------------------------------------------------------------------------------------------------------------
# Packing


def check_geometry(atoms):
    """Raises ValueError: why there can be no neighbour list of an ASE Atoms."""
    if len(atoms) == 0:
        raise ValueError("no atoms")
    unknown = atoms.numbers[(atoms.numbers < 1) | (atoms.numbers > 118)]
    if len(unknown):
        raise ValueError(f"an unknown element (atomic number {unknown[0]})")
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        raise ValueError("positions or cell are not finite")
    periodic = atoms.cell.array[atoms.pbc]
    if len(periodic) and np.linalg.det(periodic @ periodic.T) < 1e-6:
        raise ValueError("a periodic cell of zero volume")


def frame_arrays(atoms, name, max_force, need_stress):
    """The arrays of one frame, labels as ASE holds them before constraints. Raises ValueError: what is wrong with it."""
    results = atoms.calc.results if atoms.calc else {}
    energy, forces, stress = (results.get(k) for k in ("energy", "forces", "stress"))
    check_geometry(atoms)
    if not (atoms.pbc.all() and need_stress):
        stress = np.full((3, 3), np.nan)
    elif np.shape(stress) == (6,):
        stress = np.asarray(stress)[[[0, 5, 4], [5, 1, 3], [4, 3, 2]]]  # Voigt
    shapes = dict(energy=(), forces=(len(atoms), 3), stress=(3, 3))
    for label, what in ((energy, "energy"), (forces, "forces"), (stress, "stress")):
        if label is None:
            raise ValueError(f"no {what}" + " (--no-stress accepts that)" * (what == "stress"))
        if np.shape(label) != shapes[what] or np.asarray(label).dtype.kind not in "fiu":
            raise ValueError(f"{what} is not numbers of shape {shapes[what]}")
        if (what != "stress" or atoms.pbc.all() and need_stress) and not np.isfinite(label).all():
            raise ValueError(f"{what} not finite")
    if (largest := np.linalg.norm(forces, axis=1).max()) > max_force:
        raise ValueError(f"a force of {largest:.1f} eV/A (--max-force {max_force:g})")

    info = {k: str(v) for k, v in atoms.info.items()}
    if {"task_id", "calc_id", "ionic_step"} <= info.keys():  # MPtrj by Yuan
        info.setdefault("frame_id", f"{info['task_id']}-{info['calc_id']}-{info['ionic_step']}")
    frame_id = next(
        (info[k] for k in ("frame_id", "mptrj_snapshot_id", "alexandria_id", "internal_id") if k in info), name
    )
    material = next((info[k] for k in ("material_id", "mp_id", "mptrj_traj_id") if k in info), frame_id)
    arrays = dict(positions=atoms.positions, forces=forces, cell=atoms.cell.array[None], stress=stress[None])
    arrays = {k: v.astype(np.float32) for k, v in arrays.items()}
    texts = dict(ids=frame_id, materials=material, files=name.rpartition("#")[0])
    arrays |= {k: np.array([v.encode()]) for k, v in texts.items()}
    return arrays | dict(numbers=atoms.numbers.astype(np.uint8), pbc=atoms.pbc[None], energy=np.array([energy], float))


def read_job(job):
    """(name, Atoms or what is wrong) for each frame of a job: texts of extxyz frames, or files of other formats."""
    import ase.io

    for name, content in job:
        try:
            if isinstance(content, ValueError):
                yield name, str(content)
            elif isinstance(content, str):
                yield name, ase.io.read(io.StringIO(content), format="extxyz")
            else:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / Path(name.replace(":", "/")).name
                    path.write_bytes(content)
                    yield from ((f"{name}#{k}", atoms) for k, atoms in enumerate(ase.io.iread(path, index=":")))
        except Exception as e:  # ASE raises every kind on a file it can't read
            yield name, f"cannot be read ({type(e).__name__}: {e})"


def pack_job(job, max_force, need_stress):
    """The arrays of the good frames of a job, in one, and (name, what is wrong) of the others."""
    torch.set_num_threads(1)
    frames, problems = [], []
    for k, (name, atoms) in enumerate(read_job(job)):
        try:
            if isinstance(atoms, str):
                raise ValueError(atoms)
            frames.append((name, frame_arrays(atoms, name, max_force, need_stress) | dict(order=np.array([k]))))
        except ValueError as e:
            problems.append((name, str(e)))
    good, sizes = [], np.array([len(f["numbers"]) for _, f in frames], dtype=np.int64)
    for part in micro_batches(np.arange(len(frames)), sizes, sizes, 500, np.inf):
        arrays = [frames[i][1] for i in part]
        a = {k: np.concatenate([f[k] for f in arrays]) for k in ("numbers", "positions", "cell", "pbc")}
        n_atoms = torch.tensor([sizes[i] for i in part])
        b = make_batch(**{k: torch.from_numpy(v) for k, v in a.items()}, n_atoms=n_atoms, cutoff=CUTOFF)
        of = b.structure[b.receivers]
        nearest = torch.full((len(part),), torch.inf, dtype=torch.float64)
        nearest = nearest.scatter_reduce(0, of, b.vectors.norm(dim=1), "amin").tolist()
        for i, n, r in zip(part, torch.bincount(of, minlength=len(part)).tolist(), nearest):
            if r < 0.1:
                problems.append((frames[i][0], f"two atoms {r:.3f} A apart"))
            else:
                good.append(frames[i][1] | dict(n_edges=np.array([n], np.int32), sizes=np.array([sizes[i]])))
    return {k: np.concatenate([f[k] for f in good]) for k in good[0]} if good else None, problems


def names_of(files):
    """Of each file the name, where another has the same the whole path."""
    names = [Path(f).name for f in files]
    count = Counter(names)
    return [name if count[name] == 1 else str(f) for name, f in zip(names, files)]


def read_frames(files):
    """Yield (name, content, share read) of the frames in files and zips: the text of each extxyz frame, in order of file
    names; of other formats the whole file; a ValueError in its place where an extxyz file breaks off. Raises OSError."""
    members = []  # (name, how to open it, size)
    for path, known_as in zip(map(Path, files), names_of(files)):
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        if not zipfile.is_zipfile(path):
            members.append((known_as, functools.partial(open, path, "rb"), path.stat().st_size))
            continue
        archive = zipfile.ZipFile(path)
        for m in sorted(archive.infolist(), key=lambda m: m.filename):
            if not (m.is_dir() or m.filename.startswith("__MACOSX") or Path(m.filename).name.startswith(".")):
                members.append((f"{known_as}:{m.filename}", functools.partial(archive.open, m), m.file_size))
    done, total = 0, max(sum(size for *_, size in members), 1)
    for name, open_member, size in members:
        k = 0
        try:
            with open_member() as f:
                if not name.endswith(("xyz", "XYZ")):
                    yield name, f.read(), done / total
                    f = []
                text = io.TextIOWrapper(f, "utf-8") if f else f
                for first in text:  # a line with the number of atoms, a comment, a line an atom
                    if not first.strip():
                        continue
                    if not first.strip().isdigit():
                        raise ValueError(
                            f"expected a number of atoms, not {first.strip()[:40]!r}; the rest is not read"
                        )
                    lines = list(itertools.islice(text, int(first) + 1))
                    if len(lines) <= int(first):
                        raise ValueError("the file ends in the middle of it")
                    yield f"{name}#{k}", first + "".join(lines), done / total
                    k += 1
                if k == 0 and name.endswith(("xyz", "XYZ")):
                    raise ValueError("no frame in it")
        except (ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as e:  # a damaged zip, not UTF-8
            yield f"{name}#{k}", ValueError(str(e)), done / total
        done += size


def pack(files, out, source, split, bad="fail", max_force=np.inf, need_stress=True, unique=False, workers=None):
    """Parse files in parallel, check every frame, write a packed set.

    split(arrays, n) -> (S,) split of each frame, out of n read ("order" says which); bad: "skip" frames with problems, or
    "fail" after naming them; unique: drop frames whose numbers, positions and cell occurred before. Raises ValueError or
    OSError with a one-line reason.
    """
    out, workers = Path(out), workers or os.cpu_count()
    if out.exists():
        raise ValueError(f"{out} exists: remove it or choose another --out")
    parts, problems, n_read, futures, frames = [], [], 0, deque(), read_frames(files)
    work = functools.partial(pack_job, max_force=max_force, need_stress=need_stress)
    with (
        tqdm(desc=f"packing {out}", unit="frame", disable=None) as bar,
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
    ):
        try:
            while (job := list(itertools.islice(frames, 64))) or futures:
                if job:
                    futures.append(pool.submit(work, [frame[:2] for frame in job]))
                    bar.set_postfix_str(f"{job[-1][2]:.0%} of the files")
                while futures and (len(futures) > 4 * workers or not job):
                    arrays, wrong = futures.popleft().result()
                    if arrays:
                        arrays["order"] += n_read
                        parts.append(arrays)
                    problems += wrong
                    n = (len(arrays["sizes"]) if arrays else 0) + len(wrong)
                    n_read += n
                    bar.update(n)
        except BrokenProcessPool:
            raise ValueError("a worker process died (out of memory?): try --workers 1") from None
        finally:
            pool.shutdown(cancel_futures=True)
    for name, reason in problems[:20]:
        print(f"{'skipped' if bad == 'skip' else 'bad'}: {name}: {reason}")
    if len(problems) > 20:
        print(f"... and {len(problems) - 20} more")
    if problems and bad == "fail":
        raise ValueError(f"{len(problems)} frames are unusable; --bad skip drops them")
    if not parts:
        raise ValueError(f"no usable frame in {', '.join(map(str, files))}")

    a = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    offsets = np.cumsum(np.append(0, a["sizes"]))
    keep = np.ones(len(a["sizes"]), bool)
    if unique:
        seen = set()
        for i, atoms in enumerate(map(slice, offsets, offsets[1:])):
            key = a["numbers"][atoms].tobytes() + a["positions"][atoms].tobytes() + a["cell"][i].tobytes()
            keep[i] = key not in seen
            seen.add(key)
    atoms = np.repeat(keep, a["sizes"])
    a = {k: v[atoms if k in ("positions", "numbers", "forces") else keep] for k, v in a.items()}
    a["offsets"] = np.cumsum(np.append(0, a["sizes"]))
    a["split"] = split(a, n_read).astype(np.uint8)
    counts = dict(zip(("train", "val", "test", "excluded"), np.bincount(a["split"], minlength=4).tolist()))
    counts |= dict(skipped=len(problems), duplicates=int((~keep).sum()), atoms=len(a["numbers"]))
    hashes = {name: digest(f, "sha256") for name, f in zip(names_of(files), files)}
    write_set(out, a, dict(source=source, sha256=hashes, cutoff=CUTOFF, counts=counts))


def write_set(out, arrays, meta):
    """Write the folder under another name, add statistics, then rename: it is there as a whole or not at all."""
    tmp = Path(f"{out}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        data_hash = hashlib.sha256()
        for k in PackedSet.ARRAYS:
            np.save(tmp / f"{k}.npy", arrays[k])
            data_hash.update(np.ascontiguousarray(arrays[k]))
        meta["data_sha256"] = data_hash.hexdigest()
        (tmp / "meta.json").write_text(json.dumps(meta))
        meta["statistics"] = s = PackedSet(tmp).statistics()
        (tmp / "meta.json").write_text(json.dumps(meta, indent=1))
        tmp.rename(out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    size = sum(f.stat().st_size for f in Path(out).iterdir())
    print(f"{out}: {', '.join(f'{v} {k}' for k, v in meta['counts'].items())}; {size / 1e6:.1f} MB")
    print(
        f"{len(s['atomic_numbers'])} elements, {s['avg_n_neighbors']:.2f} neighbours within {CUTOFF} A, "
        f"scale {s['scale']:.4f} eV/A, shift {s['shift']:.4f} eV"
    )


def digest(path, kind):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, kind).hexdigest()


def split_by(kind, fraction):
    """The official split, by frame: the last `fraction` of RandomState(42).permutation(n), n counting the frames that were
    skipped, so that these move no other; or likewise by material."""

    def split(a, n):
        if kind == "material" and (a["materials"] == a["ids"]).all():
            raise ValueError("no frame names its material (material_id, mp_id or mptrj_traj_id): use --split frame")
        names, group = np.unique(a["materials"], return_inverse=True)
        if kind == "frame":
            names, group = range(n), a["order"]
        order = np.random.RandomState(42).permutation(len(names))
        return np.where(np.isin(group, order[int(len(order) * (1 - fraction)) :]), VAL, TRAIN)

    return split


# ----------------------------------------------------------------------------------------------------------------------
# Data sets

SAMPLE = "mattersim-1.2.3.tar.gz", "04bc55dd97bc1170c744ae93d30d773f3d8c07d35ad3efbeb817314ec0ecb16b"
MPTRJ = {  # figshare file: name, frames, md5 where it is known
    43302033: ("2023-11-22-mp-trj-extxyz-by-yuan.zip", 1_580_312, None),  # what Nequix was trained on
    49034296: ("2024-09-03-mp-trj.extxyz.zip", 1_580_395, "7f433171e4e5f2ef9304dccd42d5488f"),
}


def split_sample(a, n):
    """Validation and test: frames of mptrj-random-1k, by a hash of the mp-id. Frames of their materials elsewhere, and
    those with a force above 20 eV/A, are excluded: what is left to train on shares no mp-id with either."""
    draw = {m: int(hashlib.sha256(m).hexdigest(), 16) % 1000 for m in set(a["materials"])}
    draw = np.array([draw[m] for m in a["materials"]])
    held_out = np.where(draw < 300, VAL, np.where(draw < 550, TEST, TRAIN))
    random = a["files"] == b"mptrj-random-1k.xyz"
    others = np.isin(a["materials"], a["materials"][random & (held_out != TRAIN)])
    split = np.where(random, held_out, np.where(others, EXCLUDED, TRAIN))
    force = np.maximum.reduceat(np.linalg.norm(a["forces"], axis=1), a["offsets"][:-1])
    return np.where(force > 20, EXCLUDED, split)


def fetch_sample(out="data/sample", workers=None, more=()):
    """DFT (PBE, PBE+U) frames of the MatterSim benchmark sets, out of its source distribution, which pip fetches. more: files
    whose frames are trained on as well."""
    folder, (name, sha256) = Path(out).parent, SAMPLE
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        if not (folder / name).exists():
            print("fetching mattersim==1.2.3 with pip (27 MB; pip prepares its metadata too, which takes a while)")
            what = "download --no-deps --no-binary mattersim mattersim==1.2.3"
            run = subprocess.run(
                [sys.executable, "-m", "pip", *what.split(), "-d", tmp], capture_output=True, text=True
            )
            if run.returncode or not (Path(tmp) / name).exists():
                last = (run.stderr.strip() or "no output").splitlines()[-1]
                raise OSError(
                    f"pip could not fetch mattersim==1.2.3 ({last}). Offline? Run `pip {what}` on a machine with network "
                    f"and copy {name} to {folder}/"
                )
            os.replace(Path(tmp) / name, folder / name)
        if digest(folder / name, "sha256") != sha256:
            raise ValueError(f"{folder / name} has the wrong sha256 (damaged?): delete it and try again")
        files = []
        with tarfile.open(folder / name) as tar:
            for m in tar.getmembers():
                if "/data/benchmarks/" in m.name and m.name.endswith(".xyz"):
                    files.append(Path(tmp) / Path(m.name).name)
                    files[-1].write_bytes(tar.extractfile(m).read())
        source = ", ".join(["mattersim 1.2.3 data/benchmarks (MIT; MPtrj CC-BY-4.0)", *(Path(f).name for f in more)])
        pack([*sorted(files), *more], out, source, split_sample, unique=True, workers=workers)


def download(url, path):
    """Fetch to `path`, going on where an earlier try stopped. Raises OSError with a one-line reason."""
    part = Path(f"{path}.part")
    for _ in range(20):
        have = part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "modded-nequix"})
            with urllib.request.urlopen(request, timeout=60) as reply:
                if reply.status == 202:
                    raise OSError(f"{url} answers 202 (busy): try again later, or fetch it with a browser")
                have = have if reply.status == 206 else 0  # 200: no ranges here, from the start
                total = have + int(reply.headers.get("Content-Length") or 0)
                bar = tqdm(total=total, initial=have, desc=Path(path).name, unit="B", unit_scale=True, disable=None)
                with bar, open(part, "ab" if have else "wb") as f:
                    while chunk := reply.read(1 << 20):
                        f.write(chunk)
                        bar.update(len(chunk))
            if part.stat().st_size >= total:
                os.replace(part, path)
                return
        except urllib.error.URLError as e:
            if getattr(e, "code", None) == 416 and have:  # nothing is left to fetch
                os.replace(part, path)
                return
            raise OSError(f"cannot fetch {url} ({e}): fetch it elsewhere, as {path}") from None
        except (TimeoutError, ConnectionError):
            continue  # go on from where it broke off
    raise OSError(f"{url} broke off 20 times; the same command goes on from {part}")


def fetch_figshare(number, path, md5):
    """Path of a file of figshare, downloaded if it is not there, and checked if an md5 is known. Raises OSError or ValueError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        download(f"https://ndownloader.figshare.com/files/{number}", path)
    if md5 and digest(path, "md5") != md5:
        raise ValueError(f"{path} has the wrong md5 (damaged?): delete it and try again")
    return path


def from_pymatgen(structure):
    """Atoms of a structure in the JSON form of pymatgen. Raises KeyError, TypeError or IndexError for another form."""
    from ase import Atoms

    sites = structure["sites"]
    symbols, positions = [s["species"][0]["element"] for s in sites], [s["xyz"] for s in sites]
    return Atoms(symbols, positions, cell=structure["lattice"]["matrix"], pbc=True)


def fetch_mptrj(zip_path, out, split, workers=None):
    """Pack MPtrj from one of its zips; downloaded, if none is given."""
    if Path(out).exists():
        raise ValueError(f"{out} exists: remove it or choose another --out")
    if zip_path is None:
        number, (name, _, md5) = next(iter(MPTRJ.items()))
        zip_path = fetch_figshare(number, Path(out).parent / name, md5)
    zip_path = Path(zip_path)
    if not zip_path.is_file():
        raise FileNotFoundError(f"no file {zip_path}")
    if not zipfile.is_zipfile(zip_path):  # each member's checksum is checked when it is read
        raise ValueError(f"{zip_path} is not a whole zip (an interrupted download?): delete it and try again")
    _, frames, md5 = next((known for known in MPTRJ.values() if known[0] == zip_path.name), (None, None, None))
    if md5 and digest(zip_path, "md5") != md5:
        raise ValueError(f"{zip_path} has the wrong md5: delete it and try again")
    pack([zip_path], out, f"MPtrj (CC-BY-4.0), {zip_path.name}", split, bad="skip", workers=workers)
    counts = json.loads((Path(out) / "meta.json").read_text())["counts"]
    found = sum(counts[k] for k in ("train", "val", "test", "excluded", "skipped"))
    if frames and found != frames:
        print(f"warning: {found} frames, but {zip_path.name} is known to hold {frames}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    sample = commands.add_parser("sample", help="5,217 DFT frames, fetched with pip")
    mptrj = commands.add_parser("mptrj", help="MPtrj, 1.58 M frames")
    mptrj.add_argument("--zip", help="take this zip (either of the two on figshare) and download nothing")
    files = commands.add_parser("pack", help="any files ASE reads")
    files.add_argument("files", nargs="+")
    files.add_argument("--bad", choices=["fail", "skip"], default="fail", help="what to do about frames with problems")
    files.add_argument("--max-force", type=float, default=100.0, help="eV/A; a frame with a larger force is bad")
    files.add_argument("--no-stress", action="store_true", help="take no stress, also where there is one")
    for q, out in ((sample, "data/sample"), (mptrj, "data/mptrj"), (files, None)):
        q.add_argument("--out", default=out, required=out is None, help="folder of the packed set")
        q.add_argument("--workers", type=int, help="processes (default: one a core)")
    for q in (mptrj, files):
        q.add_argument("--split", choices=["frame", "material"], default="frame", help="what validation is drawn by")
        q.add_argument("--val", type=float, default=0.05, help="share of validation")
    a = p.parse_args()
    try:
        if a.command != "sample" and not 0 < a.val < 1:
            raise ValueError(f"--val is a share, between 0 and 1, not {a.val}")
        if a.command == "sample":
            fetch_sample(a.out, a.workers)
        elif a.command == "mptrj":
            fetch_mptrj(a.zip, a.out, split_by(a.split, a.val), a.workers)
        else:
            split, need_stress = split_by(a.split, a.val), not a.no_stress
            pack(a.files, a.out, " ".join(a.files), split, a.bad, a.max_force, need_stress, workers=a.workers)
    except (ValueError, OSError, zipfile.BadZipFile) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted: no set was written")


if __name__ == "__main__":
    main()
