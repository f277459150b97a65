"""Data: DFT frames packed into flat arrays, batches dealt to GPUs, neighbour lists of many structures at once.

    python data.py sample                       # 5,217 DFT frames, fetched with pip, -> data/sample
    python data.py mptrj [--zip FILE]           # MPtrj, 1.58 M frames, -> data/mptrj
    python data.py pack FILE... --out DIR       # any files that ASE reads, or zips of them

A packed set is a folder of memory-mapped .npy files, for S frames (a structure with its labels) of A atoms in all:
positions (A, 3) A, numbers (A,), forces (A, 3) eV/A, cell (S, 3, 3) A, pbc (S, 3), energy (S,) eV, stress (S, 3, 3) eV/A^3
(positive is tensile, as in ASE), offsets (S+1,) (frame i has the atoms offsets[i]:offsets[i+1]), ids, split (0 train,
1 validation, 2 test, 3 excluded), n_edges (S,) (directed, within 6 A); and meta.json. A missing label is NaN. The file follows
a frame: read, checked, packed, drawn for a step, put into a batch with its edges.
"""

import argparse
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ARRAYS = "positions numbers forces cell pbc energy stress offsets ids split n_edges".split()
PER_ATOM = "positions", "numbers", "forces"
TRAIN, VAL, TEST, EXCLUDED = range(4)
CUTOFF, CLOSEST = 6.0, 0.1  # A: of n_edges as stored; two atoms closer than this are a mistake
open_zip = functools.lru_cache(1)(zipfile.ZipFile)  # the table of contents can be long: a worker reads it once

# ----------------------------------------------------------------------------------------------------------------------
# Reading


def names_of(files):
    """Base names, or full paths where they collide."""
    count = Counter(Path(f).name for f in files)
    return [Path(f).name if count[Path(f).name] == 1 else str(f) for f in files]


def read_frames(files):
    """Yield (name, content, its bytes, share of the bytes read before) for the frames in files and in zips of files, by name.
    content: the text of an extxyz frame; a ValueError where an extxyz file breaks off; for a file of another format, which
    holds any number of frames, (path, its name in the zip or None). Raises OSError."""
    members = []  # (name, path, name in the zip or None, how to open it, bytes)
    for path, name in zip(map(Path, files), names_of(files)):
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            for m in sorted(archive.infolist(), key=lambda m: m.filename):
                if not (m.is_dir() or Path(m.filename).name.startswith(".")):  # __MACOSX/._*, for one
                    opener = functools.partial(archive.open, m)
                    members.append((f"{name}:{m.filename}", path, m.filename, opener, m.file_size))
        else:
            members.append((name, path, None, functools.partial(open, path, "rb"), path.stat().st_size))
    done, total = 0, max(sum(size for *_, size in members), 1)
    for name, path, member, opener, size in members:
        frames = split_extxyz(name, opener) if name.endswith(("xyz", "XYZ")) else [(name, (path, member), size)]
        yield from ((*frame, done / total) for frame in frames)
        done += size


def split_extxyz(name, opener):
    """Yield (name#k, text, its length) for each frame k of an extxyz file; (name#k, ValueError, 0) where it breaks off."""
    k = 0
    try:
        with opener() as f:
            lines = io.TextIOWrapper(f, "utf-8")
            for first in filter(str.strip, lines):  # the number of atoms; a comment and a line for each atom follow
                if not first.strip().isdigit():
                    raise ValueError(f"no number of atoms, but {first.strip()[:40]!r}; the rest is not read")
                rest = list(itertools.islice(lines, int(first) + 1))
                if len(rest) <= int(first):
                    raise ValueError("the file ends in the middle of it")
                text = first + "".join(rest)
                yield f"{name}#{k}", text, len(text)
                k += 1
        if k == 0:
            raise ValueError("no frame in it")
    except (ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as e:  # not UTF-8, a damaged zip
        yield f"{name}#{k}", ValueError(str(e)), 0


def parse(job):
    """Yield (name, ASE Atoms or ValueError) for each frame of a job, a list of what `read_frames` yields."""
    import ase.io

    for name, content, *_ in job:
        try:
            if isinstance(content, ValueError):
                yield name, content
            elif isinstance(content, str):
                yield name, ase.io.read(io.StringIO(content), format="extxyz")
            else:
                path, member = content
                with tempfile.TemporaryDirectory() as folder:
                    path = open_zip(path).extract(member, folder) if member else path
                    k = 0
                    for k, atoms in enumerate(ase.io.iread(path, index=":", do_not_split_by_at_sign=True), 1):
                        yield f"{name}#{k - 1}", atoms
                    if k == 0:
                        raise ValueError("no structure in it")
        except Exception as e:  # ASE raises every kind on a file it can't read
            yield name, ValueError(f"cannot be read ({type(e).__name__}: {e})")


def check_geometry(atoms):
    """Raises ValueError, with the reason, if there can be no neighbour list of an ASE Atoms, or `atoms` is a ValueError."""
    if isinstance(atoms, ValueError):
        raise atoms
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
    occupancy = atoms.info.get("occupancy")  # of ASE's reader of .cif files, {site: {element: share}}: not whole atoms?
    for site, shares in occupancy.items() if isinstance(occupancy, dict) else ():
        if isinstance(shares, dict) and min(shares.values(), default=1) < 1:
            raise ValueError(f"site {site} is partly occupied ({', '.join(f'{k} {v:g}' for k, v in shares.items())})")


def frame_arrays(atoms, name, limits):
    """The arrays of one frame, labels as ASE holds them before constraints; the stress may be absent. limits: bounds on
    |energy|, eV/atom, force, eV/A, and |stress|, eV/A^3. Raises ValueError with what is wrong."""
    check_geometry(atoms)
    results = atoms.calc.results if atoms.calc else {}
    labels = {k: results.get(k) for k in ("energy", "forces", "stress")}
    if labels["stress"] is None and atoms.pbc.all() and "virial" in atoms.info:
        raise ValueError("a virial but no stress, which is -virial / volume in ASE")
    if labels["stress"] is None or not atoms.pbc.all():
        labels.pop("stress")
    elif np.shape(labels["stress"]) == (6,):
        labels["stress"] = np.asarray(labels["stress"])[[[0, 5, 4], [5, 1, 3], [4, 3, 2]]]  # Voigt order
    shapes = dict(energy=(), forces=(len(atoms), 3), stress=(3, 3))
    for what, label in labels.items():
        numbers = np.shape(label) == shapes[what] and np.asarray(label).dtype.kind in "fiu"
        if not (numbers and np.isfinite(label).all()):
            like = [k for k in (*results, *atoms.info, *atoms.arrays) if what[:5] in k.lower() and k != what]
            hint = f"; there is {', '.join(like)}" if like else ""
            raise ValueError(f"{what} not there, not finite, or not numbers of shape {shapes[what]}{hint}")
    energy, forces, stress = labels["energy"], labels["forces"], labels.get("stress", np.full((3, 3), np.nan))
    sizes = abs(energy) / len(atoms), np.linalg.norm(forces, axis=1).max(), np.abs(stress).max()
    units = "energy of {:.1f} eV/atom (meV?)", "force of {:.1f} eV/A (meV/A?)", "stress of {:.1f} eV/A^3 (GPa or kbar?)"
    for size, limit, text in zip(sizes, limits, units):
        if size > limit:
            raise ValueError(f"{text.format(size)} is above {limit:g} (--limits)")
    if np.abs(stress - stress.T).max() > 1e-3 + 0.01 * sizes[2]:
        raise ValueError("stress is not symmetric")

    info = {k: str(v) for k, v in atoms.info.items()}
    if {"task_id", "calc_id", "ionic_step"} <= info.keys():  # MPtrj by Yuan
        info.setdefault("frame_id", f"{info['task_id']}-{info['calc_id']}-{info['ionic_step']}")
    first = lambda keys, default: next((info[k] for k in keys.split() if k in info), default)
    frame_id = first("frame_id mptrj_snapshot_id alexandria_id internal_id", name)
    arrays = dict(positions=atoms.positions, cell=atoms.cell.array[None], forces=forces, stress=stress[None])
    arrays = {k: v.astype(np.float32) for k, v in arrays.items()}
    arrays |= dict(numbers=atoms.numbers.astype(np.uint8), pbc=atoms.pbc[None], energy=np.array([energy], float))
    key = hashlib.md5(b"".join(arrays[k].tobytes() for k in ("numbers", "positions", "cell", "pbc"))).hexdigest()
    texts = dict(names=name, ids=frame_id, materials=first("material_id mp_id mptrj_traj_id", frame_id), keys=key)
    return arrays | {k: np.array([v.encode()]) for k, v in texts.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Packing, and the packed set


def join(parts):
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def pack_job(job, limits):
    """[The arrays of the good frames of a job] or []; (name, what is wrong) of the others; and the number of all."""
    good, frames, problems = [], [], []
    for k, (name, atoms) in enumerate(parse(job)):
        try:
            frame = frame_arrays(atoms, name, limits)
            frames.append(frame | dict(order=np.array([k]), sizes=np.array([len(atoms)])))
        except ValueError as e:
            problems.append((name, str(e)))
    sizes = np.array([len(f["numbers"]) for f in frames], dtype=np.int64)
    for part in micro_batches(np.arange(len(frames)), sizes, sizes, 500, np.inf):
        a = join([frames[i] for i in part])
        b = make_batch(*(torch.from_numpy(a[k]) for k in "numbers positions cell pbc sizes".split()), CUTOFF)
        of, nearest = b.structure[b.receivers], torch.full((len(part),), torch.inf, dtype=torch.float64)
        nearest = nearest.scatter_reduce(0, of, b.vectors.norm(dim=1), "amin").tolist()
        for i, n, r in zip(part, torch.bincount(of, minlength=len(part)).tolist(), nearest):
            if r < CLOSEST:
                problems.append((frames[i]["names"][0].decode(), f"two atoms {r:.3f} A apart"))
            else:
                good.append(frames[i] | dict(n_edges=np.array([n], np.int32)))
    return [join(good)] if good else [], problems, len(good) + len(problems)


def tell(problems, word):
    """Print (name, what is wrong) of at most 20."""
    for name, reason in problems[:20]:
        print(f"{word}: {name}: {reason}")
    if len(problems) > 20:
        print(f"... and {len(problems) - 20} more")


def next_job(frames):
    """Up to 64 of the frames, or 4 MB and one."""
    job, size = [], 0
    for frame in frames:
        job.append(frame)
        size += frame[2]
        if len(job) == 64 or size > 4e6:
            break
    return job


def over_frames(work, files, desc, workers=None):
    """Yield work(job) for jobs as `parse` takes them, of all frames of the files, in order, done by processes. Its last item is the
    number of frames, for a progress bar. What waits is bounded. Raises OSError, and ValueError if a process dies."""
    futures, frames, workers = deque(), read_frames(files), workers or os.cpu_count()
    bar = tqdm(desc=desc, unit="frame", disable=None)
    with bar, ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            while (job := next_job(frames)) or futures:
                if job:
                    futures.append(pool.submit(work, job))
                    bar.set_postfix_str(f"{job[-1][3]:.0%} of the files")
                if len(futures) > 4 * workers or not job:
                    done = futures.popleft().result()
                    bar.update(done[-1])
                    yield done
        except BrokenExecutor:
            raise ValueError("a worker process died (out of memory?)") from None
        finally:
            pool.shutdown(cancel_futures=True)


def pack(files, out, source, split, bad="fail", limits=(), workers=None):
    """Parse files in parallel, check each frame, drop those that occurred before, write a packed set. bad: "skip" frames
    with problems, or "fail" after naming them. limits: of `frame_arrays`. split(arrays, n) -> (S,): TRAIN, VAL, .. of the
    frames, which are arrays["order"] of the n read. Raises ValueError or OSError with a one-line reason."""
    parts, problems, n_read = [], [], 0
    for arrays, wrong, n in over_frames(functools.partial(pack_job, limits=limits), files, f"packing {out}", workers):
        parts += [a | dict(order=a["order"] + n_read) for a in arrays]
        problems += wrong
        n_read += n
    tell(problems, "skipped" if bad == "skip" else "bad")
    if problems and bad == "fail":
        raise ValueError(f"unusable frames: {len(problems)}; --bad skip drops them")
    if len(problems) == n_read:
        raise ValueError(f"no usable frame in {', '.join(map(str, files))}")

    a = {k: np.concatenate([part.pop(k) for part in parts]) for k in list(parts[0])}  # and frees the parts
    keep = np.isin(np.arange(len(a["keys"])), np.unique(a["keys"], return_index=True)[1])  # the first of equal frames
    duplicates, atoms = len(keep) - keep.sum().item(), np.repeat(keep, a["sizes"])
    for k in a if duplicates else ():
        a[k] = a[k][atoms if k in PER_ATOM else keep]
    a["offsets"] = np.cumsum(np.append(0, a["sizes"]))
    a["split"] = split(a, n_read).astype(np.uint8)
    counts = dict(zip(("train", "val", "test", "excluded"), np.bincount(a["split"], minlength=4).tolist()))
    counts |= dict(skipped=len(problems), duplicates=duplicates, atoms=len(a["numbers"]))
    counts["without stress"] = int(np.isnan(a["stress"]).any((1, 2)).sum())
    hashes = {name: digest(f, "sha256") for name, f in zip(names_of(files), files)}
    write_set(out, a, dict(source=source, sha256=hashes, cutoff=CUTOFF, counts=counts))
    return n_read


def write_set(out, arrays, meta):
    """Write the folder under another name, add statistics, then rename: it is there as a whole or not at all. The set is known by
    meta["data_sha256"], if that is not given of its arrays."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(out).parent, prefix=f"{Path(out).name}.tmp") as tmp:
        folder, data_hash = Path(tmp) / "set", hashlib.sha256()
        folder.mkdir()
        for k in ARRAYS:
            np.save(folder / f"{k}.npy", arrays[k])
            data_hash.update(np.ascontiguousarray(arrays[k]))
        meta.setdefault("data_sha256", data_hash.hexdigest())
        (folder / "meta.json").write_text(json.dumps(meta))
        packed = PackedSet(folder, meta["cutoff"])
        meta["statistics"] = s = packed.statistics()
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
        folder.rename(out)
    print(f"{out}: {', '.join(f'{n} {k}' for k, n in meta['counts'].items())}")
    print(
        f"{len(s['atomic_numbers'])} elements, {s['avg_n_neighbors']:.2f} neighbours within {packed.cutoff} A, ", end=""
    )
    print(f"scale {s['scale']:.4f} eV/A, shift {s['shift']:.4f} eV")
    fitted = packed.numbers[np.repeat(packed.split == TRAIN, packed.n_atoms)]
    if unknown := sorted(set(s["atomic_numbers"]) - set(fitted.tolist())):
        print(f"warning: elements without a training frame, whose E0 is set to 0 eV: atomic numbers {unknown}")


def digest(path, kind):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, kind).hexdigest()


def split_by(kind, fraction, a, n):
    """A split for `pack`: the last `fraction` of RandomState(42).permutation, of all frames or materials, validates. By frame
    this is the official split of MPtrj, since skipped frames count."""
    if kind == "material" and (a["materials"] == a["ids"]).all():
        raise ValueError("no frame names its material (material_id, mp_id or mptrj_traj_id): use --split frame")
    names, group = np.unique(a["materials"], return_inverse=True)
    if kind == "frame":
        names, group = range(n), a["order"]
    order = np.random.RandomState(42).permutation(len(names))
    return np.where(np.isin(group, order[int(len(order) * (1 - fraction)) :]), VAL, TRAIN)


class PackedSet:
    """A packed set, its large arrays memory-mapped, with edges within `cutoff` A, whose batches are put on `device`.
    Raises FileNotFoundError or ValueError, a line, if `path` is not a whole packed set."""

    def __init__(self, path, cutoff=CUTOFF, device="cpu"):
        self.path, self.cutoff, self.device = Path(path), cutoff, torch.device(device)
        if not (self.path / "meta.json").is_file():
            raise FileNotFoundError(f"no packed set at {path}: `python data.py sample`, `mptrj` or `pack` makes one")
        try:
            self.meta = json.loads((self.path / "meta.json").read_text())
            a = {k: np.load(self.path / f"{k}.npy", mmap_mode="c") for k in ARRAYS}
            n, n_atoms = len(a["ids"]), a["offsets"][-1]
            whole = all(len(v) == (n_atoms if k in PER_ATOM else n + (k == "offsets")) for k, v in a.items())
            if not whole or not {"cutoff", "data_sha256"} <= self.meta.keys():
                raise ValueError("its parts disagree")
        except (OSError, ValueError, EOFError, IndexError) as e:
            raise ValueError(f"the packed set at {path} is damaged ({e}): pack it again") from None
        self.offsets, self.split, self.n_edges = (np.array(a[k]) for k in ("offsets", "split", "n_edges"))
        self.numbers, self.ids, self.n_atoms = a["numbers"], a["ids"], np.diff(self.offsets)
        self.has_energy = np.isfinite(a["energy"])
        self.has_stress = np.isfinite(a["stress"]).all((1, 2))
        self.has_forces = np.isfinite(a["forces"][self.offsets[:-1]]).all(1)  # all atoms of a frame have them, or none
        self.arrays = {k: torch.from_numpy(a[k]) for k in ARRAYS[:7]}  # of numbers, for batches
        if cutoff != self.meta["cutoff"]:
            self.n_edges = self.count_edges()

    def indices(self, split):
        return np.flatnonzero(self.split == split)

    def pieces(self, indices, max_edges):
        """Micro-batches of `indices`, of `max_edges` edges at most, and as many atoms for structures with few edges."""
        return micro_batches(indices, self.n_atoms, self.n_edges, max_edges, max_edges)

    def name(self, index):
        return self.ids[index].decode()

    def atoms(self, index):
        """A frame as an ASE Atoms, without labels."""
        from ase import Atoms

        at, a = slice(*self.offsets[index : index + 2]), {k: self.arrays[k].numpy() for k in ARRAYS[:5]}
        return Atoms(a["numbers"][at], a["positions"][at], cell=a["cell"][index], pbc=a["pbc"][index])

    def batch(self, indices):
        """The frames `indices` (S,) as a Batch on the device."""
        n_atoms = self.n_atoms[indices]
        atoms = np.repeat(self.offsets[indices] - np.cumsum(n_atoms) + n_atoms, n_atoms) + np.arange(n_atoms.sum())
        get = lambda k: self.arrays[k][torch.from_numpy(atoms if k in PER_ATOM else indices)]
        system = [get(k) for k in ("numbers", "positions", "cell", "pbc")]
        labels = {k: get(k) for k in ("energy", "forces", "stress")}
        return make_batch(*system, torch.from_numpy(n_atoms), self.cutoff, self.device, **labels)

    def count_edges(self):
        """The edges of each frame within the cutoff, (S,)."""
        n_edges = np.zeros(len(self.n_atoms), np.int32)
        parts = micro_batches(np.arange(len(n_edges)), self.n_atoms, self.n_edges, 500, np.inf)
        for part in tqdm(parts, f"counting edges within {self.cutoff} A", disable=None):
            b = self.batch(part)
            n_edges[part] = torch.bincount(b.structure[b.receivers], minlength=len(part)).cpu().numpy()
        return n_edges

    def statistics(self):
        """The E0s of all elements and three numbers, from the training split, by Nequix' definitions: avg_n_neighbors = mean
        over frames of edges/atoms; shift = mean over frames of (E - sum of E0)/atoms, eV; scale = RMS force component, eV/A.
        Raises ValueError if there is nothing to fit."""
        train, n_atoms = self.split == TRAIN, self.n_atoms
        fitted, energy, forces = train & self.has_energy, self.arrays["energy"].numpy(), self.arrays["forces"].numpy()
        if not fitted.any():
            raise ValueError("no training frame with an energy: pack more frames, or a smaller share for validation")
        xx, xy, share, there, squares = 0, 0, 0, False, []
        for lo in range(0, len(train), 50_000):  # bounds the memory
            of, offsets = slice(lo, lo + 50_000), self.offsets[lo : lo + 50_001]
            atoms = slice(offsets[0], offsets[-1])
            counts = composition(self.numbers[atoms], offsets - offsets[0])
            x, y = counts[fitted[of]].astype(float), energy[of][fitted[of]]
            xx, xy, share = xx + x.T @ x, xy + x.T @ y, share + (x.T / n_atoms[of][fitted[of]]).sum(1)
            there |= counts[self.split[of] != EXCLUDED].any(0)
            labelled = np.repeat((train & self.has_forces)[of], n_atoms[of])
            squares.append((forces[atoms][labelled].astype(float) ** 2).mean(1))
        e0, *_ = np.linalg.lstsq(xx, xy, rcond=None)  # least norm where compositions leave a choice
        shift = (energy / n_atoms)[fitted].mean() - share / fitted.sum() @ e0
        squares = np.concatenate(squares)
        scale = math.sqrt(squares.mean()) if len(squares) else 0.0
        neighbors = max(float((self.n_edges / n_atoms)[train].mean()), 1e-3)
        numbers = np.flatnonzero(there)
        s = dict(atomic_numbers=numbers.tolist(), atom_energies=e0[numbers].tolist(), avg_n_neighbors=neighbors)
        return s | dict(shift=float(shift), scale=scale or 1.0)  # relaxed structures have no forces to scale by


def composition(numbers, offsets):
    """Atoms of each element in each frame, (S, 119)."""
    key = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * 119 + numbers
    return np.bincount(key, minlength=(len(offsets) - 1) * 119).reshape(-1, 119).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Order of frames: one endless stream, a new permutation each epoch. Step t takes its t-th piece of `batch` frames, whatever
# the number of ranks: the step number alone says where in the data a run is.


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
    """Split frames among ranks so that edges balance: the largest first, each to the rank with the fewest edges."""
    load, hands, edges = [0] * ranks, [[] for _ in range(ranks)], n_edges[indices]
    for k in np.argsort(-edges, kind="stable").tolist():
        rank = load.index(min(load))
        hands[rank].append(k)
        load[rank] += int(edges[k]) + 1
    return [indices[np.array(h, dtype=np.int64)] for h in hands]


def micro_batches(indices, n_atoms, n_edges, max_atoms, max_edges):
    """Split frames into pieces within a budget of atoms and edges. A frame beyond the budget is a piece of its own."""
    ends, atoms, edges = [], 0, 0
    for k, (a, e) in enumerate(zip(n_atoms[indices].tolist(), n_edges[indices].tolist())):
        atoms, edges = atoms + a, edges + e
        if k and (atoms > max_atoms or edges > max_edges):
            ends.append(k)
            atoms, edges = a, e
    return np.split(indices, ends) if len(indices) else []


def prefetch(packed, pieces):
    """Yield the Batch of each piece, frames (S,), in `pieces`; on CUDA up to two more are built meanwhile, by a thread with
    its own stream: the host must wait for the size of a neighbour list, and the model's launches and kernels should not."""
    if packed.device.type != "cuda":
        yield from map(packed.batch, pieces)
        return
    pieces, side, pool = iter(pieces), torch.cuda.Stream(packed.device, priority=-1), ThreadPoolExecutor(1)

    def build():
        with torch.cuda.stream(side):
            batch = next(map(packed.batch, pieces), None)
            side.synchronize()
        return batch

    ready = deque([pool.submit(build), pool.submit(build)])
    try:
        while batch := ready.popleft().result():
            ready.append(pool.submit(build))
            for tensor in vars(batch).values():
                tensor.record_stream(torch.cuda.current_stream())  # the allocator must not reuse it too early
            yield batch
    finally:  # the consumer may leave early
        pool.shutdown(wait=False, cancel_futures=True)


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
    """A Batch on `device` (None: where the arrays are), with its neighbour list, from packed arrays of any dtype."""
    numbers, positions, cell = numbers.long(), positions.double(), cell.double()
    structure = torch.repeat_interleave(torch.arange(len(cell), device=cell.device), n_atoms, output_size=len(numbers))
    bins = linked_cells(positions, cell, pbc, structure, cutoff)
    rest = dict(numbers=numbers, n_atoms=n_atoms) | {k: v.double() for k, v in labels.items()}
    t = moved(bins | rest, torch.device(device or positions.device))
    system = (t[k] for k in "numbers positions cell pbc n_atoms structure".split())
    return Batch(*system, *neighbor_list({k: t[k] for k in bins}, cutoff), **{k: t[k] for k in labels})


def moved(tensors, device):
    """A dict of tensors, on `device`. From host to GPU they go as one copy of pinned memory, not one each."""
    if device.type != "cuda" or any(t.is_cuda for t in tensors.values()):
        return {k: t.to(device) for k, t in tensors.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # so that each is aligned
    sizes = [t.nbytes for t in tensors.values()]
    memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    torch.cat([t.flatten().view(torch.uint8) for t in tensors.values()], out=memory)
    parts = memory.to(device, non_blocking=True).split(sizes)
    return {k: part.view(t.dtype).view(t.shape) for (k, t), part in zip(tensors.items(), parts)}


# ----------------------------------------------------------------------------------------------------------------------
# Neighbour list: linked cells. A box is cut into bins about 3 A thick; an atom looks through the bins within reach, which
# wrap around periodic boundaries as often as needed. In float64, which is cheap, a pair is found from both sides or neither.


def complete_cell(cell, pbc):
    """cell (S, 3, 3) with the rows that are not periodic, by pbc (S, 3), replaced by unit vectors normal to the others."""
    cell = torch.where(pbc[:, :, None], cell, 0)
    axes = torch.eye(3, dtype=cell.dtype, device=cell.device)
    for k in range(3):
        a, b = cell[:, k - 2], cell[:, k - 1]
        a = torch.where(a.any(1, keepdim=True), a, axes[b.abs().argmin(1)])  # if missing, the axis most normal to b
        b = torch.where(b.any(1, keepdim=True), b, axes[a.abs().argmin(1)])
        cell[:, k] = torch.where(pbc[:, k, None], cell[:, k], torch.nn.functional.normalize(torch.linalg.cross(a, b)))
    return cell


def linked_cells(positions, cell, pbc, structure, cutoff):
    """Bins for `neighbor_list`, on the device of positions (A, 3) and cell (S, 3, 3), A, float64, pbc (S, 3) bool, structure
    (A,) ascending. A >= 1. Any cell with a volume: short, skewed, left-handed, partly periodic; atoms may lie outside.
    Returns these and, int64, of each atom its bin (A, 3) and wrap (A, 3), the cells it lies outside its own; of each
    structure its first bin, the number of bins along each axis (S, 3), and how many the cutoff reaches over; and order:
    atoms by bin, those of bin b from start[b] to start[b+1]."""
    # Fractional coordinates, and the cell they are in. Along an open direction the box spans the atoms.
    inverse = torch.linalg.inv(complete_cell(cell, pbc))
    frac = torch.einsum("ai,aij->aj", positions, inverse[structure])
    is_open = ~pbc[structure]
    index = structure[:, None].expand(-1, 3)
    low = frac.new_full((len(cell), 3), torch.inf).scatter_reduce(0, index, frac, "amin")
    high = frac.new_full((len(cell), 3), -torch.inf).scatter_reduce(0, index, frac, "amax")
    extent = torch.where(pbc, 1.0, (high - low).clamp(min=1.0))
    frac = torch.where(is_open, (frac - low[structure]) / extent[structure], frac)
    wrap = torch.where(is_open, 0, frac.floor()).long()

    # Bins, at most about 64 an atom, and how many of them the cutoff spans.
    height = extent / torch.linalg.vector_norm(inverse, dim=1)  # distance between opposite faces of the box
    bins = (height / 3.0).long().clamp(1, 256)
    excess = bins.prod(1) / bins.new_zeros(len(cell)).index_add(0, structure, torch.full_like(structure, 64))
    shrink = excess.clamp(min=1.0) ** (-1 / (bins > 1).sum(1).clamp(min=1))
    bins = (bins * shrink[:, None]).long().clamp(min=1)
    reach = ((cutoff + 1e-6) * bins / height).ceil().long()
    reach = torch.where(pbc, reach, torch.minimum(reach, bins - 1))
    n_bins = bins.prod(1)
    first_bin = n_bins.cumsum(0) - n_bins
    bin3 = torch.minimum(((frac - wrap) * bins[structure]).long().clamp(min=0), bins[structure] - 1)  # (A, 3)
    bin_of_atom = bin_number(bin3, first_bin, bins, structure)
    start = torch.nn.functional.pad(torch.bincount(bin_of_atom, minlength=int(n_bins.sum())).cumsum(0), (1, 0))
    atoms = dict(positions=positions, structure=structure, bin=bin3, wrap=wrap)
    structures = dict(cell=cell, pbc=pbc, bins=bins, reach=reach, first_bin=first_bin)
    return atoms | structures | dict(order=bin_of_atom.argsort(stable=True), start=start)


def bin_number(b, first_bin, bins, s):
    """The number among all bins of bin b (.., 3) of structure s (..,)."""
    return first_bin[s] + (b[:, 0] * bins[s, 1] + b[:, 1]) * bins[s, 2] + b[:, 2]


def neighbor_list(bins, cutoff):
    """All pairs closer than `cutoff`, A, over periodic images, from the bins of `linked_cells`. Returns, on their device,
    senders (E,), receivers (E,) ascending, row_ptr (A+1,), shifts (E, 3), and the edge vectors (E, 3), float64,
    positions[sender] - positions[receiver] + shift @ cell. An atom is its own neighbour only through an image.
    For CUDA, build the bins on the CPU and move them: 200 tiny launches would queue behind the model."""
    if bins["positions"].is_cuda:
        import kernels

        return kernels.find_pairs(cutoff, **bins)
    return find_pairs(cutoff, **bins)


def find_pairs(cutoff, positions, structure, bin, wrap, cell, pbc, bins, reach, first_bin, order, start):
    """The edges as `neighbor_list` returns them, on the CPU. Its twin for CUDA is in kernels.py."""
    span, count = 2 * reach + 1, start.diff()
    inside = positions - shift_vectors(wrap, cell, structure)
    out = []
    for block in torch.arange(len(positions)).split(50_000):  # bounds the memory of the candidates
        atom, visit = ragged(block, span.prod(1)[structure[block]])  # the bins that each atom looks through
        s = structure[atom]
        ny, nz = span[s, 1], span[s, 2]
        step = torch.stack([visit // (ny * nz), visit // nz % ny, visit % nz], 1)
        target = bin[atom] + step - reach[s]
        image = target.div(bins[s], rounding_mode="floor")
        target = bin_number(target - image * bins[s], first_bin, bins, s)
        keep = ((image == 0) | pbc[s]).all(1) & (count[target] > 0)
        atom, image, target = atom[keep], image[keep], target[keep]
        origin = shift_vectors(image, cell, structure[atom]) - inside[atom]

        # Candidates: first those near enough up to rounding, a coordinate at a time; then the edges.
        pair, k = ragged(torch.arange(len(atom)), count[target])
        j = order[start[target][pair] + k]
        square = sum((x[j] + o[pair]).square() for x, o in zip(inside.T.contiguous(), origin.T.contiguous()))
        near = square < (cutoff + 1e-6) ** 2
        pair, j = pair[near], j[near]
        i = atom[pair]
        shift = image[pair] - wrap[j] + wrap[i]
        vector = positions[j] - positions[i] + shift_vectors(shift, cell, structure[i])
        keep = (vector.square().sum(1) < cutoff**2) & ((i != j) | (shift != 0).any(1))
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
# Data sets

SAMPLE = "mattersim-1.2.3.tar.gz", "04bc55dd97bc1170c744ae93d30d773f3d8c07d35ad3efbeb817314ec0ecb16b"
MPTRJ = {  # name: number at figshare, frames (equal ones are dropped), md5 where it is known
    "2023-11-22-mp-trj-extxyz-by-yuan.zip": (43302033, 1_580_312, None),  # what Nequix was trained on
    "2024-09-03-mp-trj.extxyz.zip": (49034296, 1_580_395, "7f433171e4e5f2ef9304dccd42d5488f"),
}


def split_sample(a, n):
    """Validation and test: frames of mptrj-random-1k, by a hash of the mp-id. Frames of their materials in other files, and
    those with a force above 20 eV/A, are excluded: what is left to train on shares no mp-id with either."""
    draw = np.array([int(hashlib.sha256(m).hexdigest(), 16) % 1000 for m in a["materials"]])
    held_out = np.where(draw < 300, VAL, np.where(draw < 550, TEST, TRAIN))
    random = np.char.startswith(a["names"], b"mptrj-random-1k.xyz")
    others = np.isin(a["materials"], a["materials"][random & (held_out != TRAIN)])
    split = np.where(random, held_out, np.where(others, EXCLUDED, TRAIN))
    force = np.maximum.reduceat(np.linalg.norm(a["forces"], axis=1), a["offsets"][:-1])
    return np.where(force > 20, EXCLUDED, split)


def fetch_sample(out="data/sample", workers=None, more=()):
    """DFT (PBE, PBE+U) frames of the MatterSim benchmarks, from its source distribution; `more` files are for training."""
    folder, (name, sha256) = Path(out).parent, SAMPLE
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        if not (folder / name).exists():
            print(f"fetching mattersim==1.2.3 with pip to {folder.resolve()} (27 MB; pip takes a while to prepare it)")
            what = "download --no-deps --no-binary mattersim mattersim==1.2.3"
            subprocess.run([sys.executable, "-m", "pip", "-q", *what.split(), "-d", tmp])
            if not (Path(tmp) / name).exists():
                advice = f"run `pip {what}` on a machine with network and copy {name} to {folder}/"
                raise OSError(f"pip could not fetch mattersim==1.2.3. Offline? Then {advice}")
            os.replace(Path(tmp) / name, folder / name)
        if digest(folder / name, "sha256") != sha256:
            raise ValueError(f"{folder / name} has the wrong sha256 (damaged?): delete it and try again")
        shutil.unpack_archive(folder / name, tmp, filter="data")
        files = sorted(Path(tmp).glob("**/data/benchmarks/*.xyz"))
        source = ", ".join(["mattersim 1.2.3 data/benchmarks (MIT; MPtrj CC-BY-4.0)", *(Path(f).name for f in more)])
        pack([*files, *more], out, source, split_sample, workers=workers)


def download(url, path):
    """Fetch to `path`, going on where an earlier try stopped. Raises OSError with a one-line reason."""
    part = Path(f"{path}.part")
    for _ in range(20):
        have = max(part.stat().st_size - 1, 0) if part.exists() else 0  # the last byte again: a range is never empty
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "modded-nequix"})
            with urllib.request.urlopen(request, timeout=60) as reply, open(part, "ab") as f:
                if reply.status == 202:
                    raise OSError(f"{url} answers 202 (busy): try again later, or fetch it with a browser")
                have = have if reply.status == 206 else 0  # 200: no ranges here, from the start
                f.truncate(have)
                total = have + int(reply.headers.get("Content-Length") or 0)
                with tqdm.wrapattr(reply, "read", total, initial=have, desc=Path(path).name, disable=None) as body:
                    shutil.copyfileobj(body, f, 1 << 20)
            if part.stat().st_size >= total:
                return os.replace(part, path)
        except urllib.error.URLError as e:
            raise OSError(f"cannot fetch {url} ({e}): fetch it elsewhere, as {path}") from None
        except (TimeoutError, ConnectionError):
            continue  # go on from where it broke off
    raise OSError(f"{url} broke off 20 times; the same command goes on from {part}")


def fetch_figshare(number, path, md5):
    """Path of a figshare file, downloaded if not there, checked if an md5 is given. Raises OSError or ValueError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        download(f"https://ndownloader.figshare.com/files/{number}", path)
    if md5 and digest(path, "md5") != md5:
        raise ValueError(f"{path} has the wrong md5 (damaged?): delete it and try again")
    return path


def fetch_mptrj(path, out, split, workers=None):
    """Pack MPtrj from one of its two zips; the one that Nequix used is downloaded if none is given."""
    name = Path(path).name if path else next(iter(MPTRJ))
    number, frames, md5 = MPTRJ.get(name, (None, None, None))
    if path is None or Path(path).stat():  # raises OSError if there is no such file
        path = fetch_figshare(number, path or Path(out).parent / name, md5)
    if not zipfile.is_zipfile(path):  # the checksum of each member is checked when it is read
        raise ValueError(f"{path} is not a whole zip (an interrupted download?): delete it and try again")
    n = pack([path], out, f"MPtrj (CC-BY-4.0), {name}", split, bad="skip", workers=workers)
    if frames and n != frames:
        print(f"warning: {n} frames, but {name} holds {frames}: is it damaged? The split is not the official one")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    command = lambda name, text: commands.add_parser(name, help=text, description=text)
    sample = command("sample", "5,217 DFT frames, fetched with pip (27 MB)")
    mptrj = command("mptrj", "MPtrj, 1.58 M frames, fetched from figshare")
    mptrj.add_argument("--zip", help="pack this zip (either of the two on figshare), download nothing")
    files = command("pack", "labelled frames from any files that ASE reads, or zips of them")
    files.add_argument("files", nargs="+")
    files.add_argument("--bad", choices=["fail", "skip"], default="fail", help="what to do about frames with problems")
    what = "a frame is bad above these: |energy| in eV/atom, force in eV/A, |stress| in eV/A^3 (default: 1000 100 10)"
    files.add_argument("--limits", nargs=3, type=float, default=(1000, 100, 10), metavar=tuple("EFS"), help=what)
    for q, out in ((sample, "data/sample"), (mptrj, "data/mptrj"), (files, None)):
        q.add_argument("--out", default=out, required=out is None, help="folder of the packed set")
        q.add_argument("--workers", type=int, help="processes (default: one a core)")
    for q in (mptrj, files):
        q.add_argument("--split", choices=["frame", "material"], default="frame", help="what is drawn to validate on")
        q.add_argument("--val", type=float, default=0.05, help="share to validate on (default: 0.05)")
    a = p.parse_args()
    try:
        if Path(a.out).exists():
            raise ValueError(f"{a.out} exists: remove it or choose another --out")
        if a.command == "sample":
            return fetch_sample(a.out, a.workers)
        if not 0 < a.val < 1:
            raise ValueError(f"--val is a share, between 0 and 1, not {a.val}")
        split = functools.partial(split_by, a.split, a.val)
        if a.command == "mptrj":
            fetch_mptrj(a.zip, a.out, split, a.workers)
        else:
            pack(a.files, a.out, " ".join(a.files), split, a.bad, a.limits, a.workers)
    except (ValueError, OSError, zipfile.BadZipFile) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted: no set was written")


if __name__ == "__main__":
    main()
