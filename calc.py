"""Use Nequix: energies, forces, stresses, molecular dynamics, Hessians, and relaxations by the thousand.

    python calc.py FILE... --weights nequix-mp-1 [--relax] [--out out.extxyz]

    calc = NequixCalculator("nequix-mp-1")                     # a released name, an .nqx file, or a model.pt of train.py
    atoms.calc = calc                                          # an ASE calculator
    calc.predict(list_of_atoms)                                # many structures, packed into batches
    calc.hessian(atoms)
    for index, atoms, energy, converged, steps, error in calc.relax(stream_of_atoms, fmax=0.02, steps=500): ...

Units are those of ASE: eV, A, eV/A, eV/A^3, eV/A^2; a positive stress is tensile. Only a cell that is periodic in all three
directions has a stress. A structure may be periodic in any directions, its atoms may lie outside the cell, and its cell may
be left-handed or shorter than the cutoff. Sizes in the comments: A atoms, E edges, S structures.
"""

import argparse
import copy
import dataclasses
import hashlib
import importlib
import math
import os
import sys
from collections import deque, namedtuple
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixSymmetry
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from ase.units import GPa

import data
from model import add_options, energy_forces_stress, load

SKIN = 0.5  # A: edges up to cutoff + SKIN are listed, and serve until another pair may have come within the cutoff
GRAPH_EDGES = 500_000  # a structure with more gets no CUDA graph, which would hold on to its memory
COLLAPSED = 0.5  # A^3 an atom: a relaxation that comes below it has failed, and its edges would fill the memory
NOT_FINITE = "the energy is not finite: two atoms at one place?"
# A fork has none of its parent's OpenMP threads, and would wait for them forever. With one thread it asks for none.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

# ----------------------------------------------------------------------------------------------------------------------
# Neighbour list with a skin


def list_with_skin(numbers, positions, cell, pbc, n_atoms, cutoff, device=None):
    """A Batch with the edges up to cutoff + SKIN, and the shortest edge of each structure, (S,) A."""
    b = data.make_batch(numbers, positions, cell, pbc, n_atoms, cutoff + SKIN, device)
    b.shifts, nearest = b.shifts.double(), torch.linalg.vector_norm(b.vectors, dim=1)
    for n, index in ((len(b.numbers), b.receivers), (len(b.cell), b.structure)):  # by atom, then by structure
        nearest = nearest.new_full((n,), torch.inf).scatter_reduce(0, index, nearest, "amin")
    return b, nearest


def at(listed, positions, cell, cutoff, trim=True):
    """A Batch with those edges of `listed` that are within the cutoff (A) at other positions (A, 3) and cell (S, 3, 3).
    Without `trim` nothing waits for the GPU: edges keep their number, and those from row_ptr[-1] on mean nothing."""
    b = dataclasses.replace(listed, positions=positions, cell=cell, shifts=None)
    vectors, one = positions[b.senders] - positions[b.receivers], len(cell) == 1
    vectors += listed.shifts @ cell[0] if one else data.shift_vectors(listed.shifts, cell, b.structure[b.receivers])
    index = torch.arange(len(vectors), device=vectors.device)
    within = (vectors.square().sum(1) < cutoff**2) & (index < b.row_ptr[-1])
    count = torch.nn.functional.pad(within.cumsum(0), (1, 0))
    b.row_ptr, to = count[b.row_ptr], torch.where(within, count[:-1], len(vectors))
    close_up = lambda t: torch.cat([t, t[-1:]]).index_copy_(0, to, t)[:-1]
    edges = [close_up(t) for t in (b.senders, b.receivers, vectors)]
    n = int(b.row_ptr[-1]) if trim else None
    b.senders, b.receivers, b.vectors = (t[:n] for t in edges)
    return b


def still_complete(listed_positions, inverse_cell, positions, cell, structure, cutoff):
    """(S,) bool: no pair that was farther apart than cutoff + SKIN when the list was made can be within the cutoff now.
    With F = inverse_cell (S, 3, 3, of the list) @ cell, an atom has moved from x0 to x0 F + u. A pair that was d0 apart
    is now at least sigma d0 - 2 max|u| apart; sigma, the least singular value of F, is no less than 1 - |F - 1|."""
    f = inverse_cell @ cell
    u = positions - row_times(listed_positions, f, structure)
    farthest = u.new_zeros(len(cell)).scatter_reduce(0, structure, torch.linalg.vector_norm(u, dim=1), "amax")
    sigma = 1 - torch.linalg.matrix_norm(f - torch.eye(3, dtype=f.dtype, device=f.device))
    return sigma * (cutoff + SKIN) - 2 * farthest >= cutoff


def row_times(rows, matrices, structure):
    """Rows (A, 3) times the matrices (S, 3, 3) of their structures."""
    return torch.einsum("ai,aij->aj", rows, matrices[structure])


class StepGraph:
    """Energy, stress and forces as a CUDA graph: one launch in place of a thousand. Positions, cell and list may change."""

    def __init__(self, model, listed):
        import kernels

        room = len(listed.senders) // 8 + 256  # for longer lists; edges outside row_ptr count for nothing
        more = lambda t: torch.cat([t, t[:1].repeat(room, *[1] * (t.ndim - 1))])
        edges = {k: more(getattr(listed, k)) for k in ("senders", "receivers", "shifts")}
        self.place = torch.cat([listed.positions, listed.cell[0]])
        self.batch = b = dataclasses.replace(listed, row_ptr=listed.row_ptr.clone(), **edges)
        step = lambda: flat(model, at(b, self.place[:-3], self.place[None, -3:], model.config["cutoff"], trim=False))
        self.graph, self.out = kernels.capture(step, self.place.device)

    def fill(self, listed):
        """Go on with another list of the same atoms; False if there is no room for it."""
        if len(listed.senders) > len(self.batch.senders):
            return False
        for k in ("senders", "receivers", "shifts", "row_ptr"):
            getattr(self.batch, k)[: len(getattr(listed, k))] = getattr(listed, k)
        return True

    def __call__(self, place):
        self.place.copy_(place)
        self.graph.replay()
        return self.out


def flat(model, batch):
    """(10 + 3A,): energy, stress and forces of one structure, to leave the GPU as one tensor."""
    energy, forces, stress = energy_forces_stress(model, batch)
    return torch.cat([energy, stress.flatten(), forces.flatten()])


# ----------------------------------------------------------------------------------------------------------------------
# Relaxation: FIRE (Bitzek et al. 2006) on positions and the logarithm of the deformation, step for step as ASE's FIRE with
# its defaults on ASE's FrechetCellFilter. The cell is cell0 @ F^T with F = exp(log_f). The variables are the positions
# without the deformation, x = r @ F^-T, and as three more rows log_f times the number of atoms.


def matrix_exp(m):
    """exp of small (..., k, k) matrices by scaling and squaring; torch's own waits for the GPU. 1e-15 up to a norm of 2."""
    m = m / 16
    out = term = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).expand_as(m)
    for k in range(1, 11):
        term = term @ m / k
        out = out + term
    return torch.linalg.matrix_power(out, 16)


def matrix_log(f):
    """log of deformations (S, 3, 3): 2 artanh(z), z = (f - 1)/(f + 1). 1e-15 for strains up to 0.4."""
    one = torch.eye(3, dtype=f.dtype, device=f.device)
    z = (f - one) @ inverse(f + one)
    term, out = z, 0
    for k in range(1, 41, 2):
        out, term = out + 2 / k * term, term @ z @ z
    return out


def inverse(m):
    return torch.linalg.inv_ex(m).inverse  # inv() would wait for the GPU to check it


def generalized_forces(s, forces, stress, mask):
    """Forces on x (A, 3) and on n log_f (S, 3, 3), eV/A, as of FrechetCellFilter; zero for a cell that stays."""
    volume = torch.linalg.det(s["cell"]).abs()[:, None, None]
    virial = torch.where(s["pbc"].all(1)[:, None, None], -volume * stress, 0) * (1 if mask is None else mask)
    f = matrix_exp(s["log_f"])
    # The adjoint of the derivative of exp at log_f is the derivative at its transpose: a block of a 6 x 6 exponential.
    block = f.new_zeros(len(f), 6, 6)
    block[:, :3, :3] = block[:, 3:, 3:] = s["log_f"].mT
    block[:, :3, 3:] = virial @ inverse(f.mT)
    cell_forces = matrix_exp(block)[:, :3, 3:] / s["n_atoms"][:, None, None]
    return row_times(forces, f, s["structure"]), cell_forces


def fire_step(s, forces, cell_forces, active, mask, symmetry):
    """One step of FIRE for the `active` structures (S,), with the forces of `generalized_forces`. Updates the state `s`."""
    structure, v, w, dt, mix = (s[k] for k in ("structure", "velocity", "cell_velocity", "dt", "mix"))

    total = lambda x, y: y.sum((1, 2)).index_add(0, structure, x.sum(1))  # of (A, 3) and (S, 3, 3): (S,)
    good = total(forces * v, cell_forces * w) > 0
    halt, faster = ~good & (s["step"] > 0), good & (s["downhill"] > 5)
    ratio = total(v * v, w * w) / total(forces**2, cell_forces**2).clamp(min=1e-300)
    keep, turn = torch.where(good, 1 - mix, 0), torch.where(good, mix * ratio.sqrt(), 0)
    new = dict(step=s["step"] + 1, downhill=torch.where(good, s["downhill"] + 1, 0))
    new["dt"] = dt = torch.where(faster, (1.1 * dt).clamp(max=1), torch.where(halt, 0.5 * dt, dt))
    new["mix"] = torch.where(faster, 0.99 * mix, torch.where(halt, 0.1, mix))
    new["velocity"] = v = keep[structure, None] * v + (turn + dt)[structure, None] * forces
    new["cell_velocity"] = w = keep[:, None, None] * w + (turn + dt)[:, None, None] * cell_forces
    dt = dt * (0.2 / (dt * total(v * v, w * w).sqrt()).clamp(min=0.2))  # no longer than 0.2 A, all in all

    one = torch.eye(3, dtype=dt.dtype, device=dt.device)
    x = row_times(s["positions"], inverse(matrix_exp(s["log_f"]).mT), structure) + dt[structure, None] * v
    log_f = s["log_f"] + dt[:, None, None] * w / s["n_atoms"][:, None, None]
    ft = matrix_exp(log_f).mT
    ft = ft if mask is None else one + (ft - one) * mask
    cell, positions = s["cell0"] @ ft, row_times(x, ft, structure)
    if symmetry:  # as FixSymmetry: of the change of the cell, and of the moves of the atoms within it
        to_new = inverse(s["cell"])
        change = symmetric_tensors((to_new @ cell).mT - one, s["cell"], symmetry)
        cell = s["cell"] @ (one + change).mT
        carried = row_times(s["positions"], to_new @ cell, structure)
        positions = carried + symmetric_vectors(positions - carried, cell, structure, symmetry)
    if symmetry or mask is not None:
        log_f = matrix_log((inverse(s["cell0"]) @ cell).mT)
    new |= dict(positions=positions, cell=cell, log_f=log_f)
    on = {k: (active[structure] if k in PER_ATOM else active).view(-1, *[1] * (v.ndim - 1)) for k, v in new.items()}
    s |= {k: torch.where(on[k], v, s[k]) for k, v in new.items()}  # all or nothing, should the memory run out


def pack_symmetry(records, device):
    """Rotations of fractional coordinates (T, 3, 3), the structure of each, and how many each structure has (S,); and for every
    pair of a rotation and an atom of its structure the rotation, the atom, and the atom that it becomes."""
    n_rotations, n_atoms = np.array([r["maps"].shape for r in records]).T
    of, first = np.repeat(np.arange(len(records)), n_rotations), np.cumsum(n_atoms) - n_atoms
    operation = np.repeat(np.arange(len(of)), n_atoms[of])
    source = np.concatenate([np.tile(np.arange(f, f + n), t) for f, n, t in zip(first, n_atoms, n_rotations)])
    target = np.concatenate([(f + r["maps"]).ravel() for f, r in zip(first, records)])
    rotation = np.concatenate([r["rotations"] for r in records]).astype(float)
    return [torch.from_numpy(x).to(device) for x in (rotation, of, n_rotations, operation, source, target)]


def symmetric_tensors(m, cell, symmetry):
    """(S, 3, 3) tensors averaged over the symmetry operations, as by ASE's symmetrize_rank2."""
    rotation, of, n_rotations = symmetry[:3]
    scaled = (cell @ m @ cell.mT)[of]
    scaled = torch.zeros_like(m).index_add(0, of, rotation.mT @ scaled @ rotation) / n_rotations[:, None, None]
    return inverse(cell) @ scaled @ inverse(cell).mT


def symmetric_vectors(v, cell, structure, symmetry):
    """(A, 3) vectors averaged over the symmetry operations, as by ASE's symmetrize_rank1."""
    rotation, _, n_rotations, operation, source, target = symmetry
    scaled = row_times(v, inverse(cell), structure)
    scaled = torch.zeros_like(v).index_add(0, target, torch.einsum("pij,pj->pi", rotation[operation], scaled[source]))
    return row_times(scaled / n_rotations[structure, None], cell, structure)


PER_ATOM = "numbers positions velocity forces".split()  # (A, ...); all else is (S, ...)
RESULT = "positions n_atoms cell step converged failed nearest energy forces stress".split()


def at_rest(records, device):
    """The state, a dict of tensors, of structures whose relaxation begins."""
    pack = lambda join, arrays: torch.from_numpy(join(list(arrays))).to(device)
    s = {k: pack(np.concatenate, (getattr(r["atoms"], k) for r in records)) for k in ("numbers", "positions")}
    s |= dict(pbc=pack(np.stack, (r["atoms"].pbc for r in records)), cell=pack(np.stack, (r["cell"] for r in records)))
    s["n_atoms"] = n = torch.tensor([len(r["atoms"]) for r in records], device=device)
    zero, none, tenth = torch.zeros_like(s["cell"]), torch.zeros_like(n), torch.full_like(n, 0.1, dtype=torch.float64)
    s |= dict(cell0=s["cell"], log_f=zero, cell_velocity=zero, velocity=torch.zeros_like(s["positions"]))
    return s | dict(dt=tenth, mix=tenth, downhill=none, step=none, converged=none > 0)


def picked(s, which, names):
    """What has these names in the state `s`, of the structures `which`, (S,) bool."""
    structures, atoms = (x.nonzero()[:, 0] for x in (which, which.repeat_interleave(s["n_atoms"])))
    return {k: s[k][atoms if k in PER_ATOM else structures] for k in names}


def until_some_finish(model, s, fmax, steps, mask, symmetry):
    """Take steps from the state `s` until a twentieth of the structures are finished. Yields in every step, while the GPU is
    at work. Adds to the state finished and failed (S,), and of the finished ones nearest, energy, forces and stress."""
    cutoff, n = model.config["cutoff"], s["n_atoms"]
    structure = s["structure"] = torch.repeat_interleave(torch.arange(len(n), device=n.device), n)
    n_finished, still = 0, False
    while n_finished < max(len(n) / 20, 1):
        if not still:
            arrays = (s[k] for k in ("numbers", "positions", "cell", "pbc", "n_atoms"))
            listed, s["nearest"] = list_with_skin(*arrays, cutoff)
            too_close = (s["nearest"] < data.CLOSEST) & (s["step"] == 0)
            inverse_cell = inverse(s["cell"])
        batch = at(listed, s["positions"], s["cell"], cutoff)
        s["energy"], s["forces"], s["stress"] = energy, forces, stress = energy_forces_stress(model, batch)
        if symmetry:
            forces = symmetric_vectors(forces, s["cell"], structure, symmetry)
            stress = symmetric_tensors(stress, s["cell"], symmetry)
        forces, cell_forces = generalized_forces(s, forces, stress, mask)
        norm = torch.linalg.vector_norm(forces, dim=1)
        norm = torch.linalg.vector_norm(cell_forces, dim=2).amax(1).scatter_reduce(0, structure, norm, "amax")
        s["converged"] |= norm < fmax
        collapsed = s["pbc"].all(1) & (s["step"] > 0) & (torch.linalg.det(s["cell"]).abs() < COLLAPSED * n)
        s["failed"] = ~torch.isfinite(norm + energy) | collapsed | too_close
        s["finished"] = finished = s["converged"] | s["failed"] | (s["step"] >= steps)
        fire_step(s, forces, cell_forces, ~finished, mask, symmetry)
        complete = still_complete(listed.positions, inverse_cell, s["positions"], s["cell"], structure, cutoff)
        flags = torch.stack([finished.sum(), complete.all()])
        yield
        n_finished, still = flags.tolist()  # the only wait for the GPU in a step, but for the number of edges


def start(index, atoms, model, steps, symprec):
    """The record of a structure whose relaxation begins. Raises ValueError for bad input."""
    check(atoms, model.config["atomic_numbers"])
    if atoms.constraints and steps:
        raise ValueError("constraints are not supported here: use ASE's optimizers, or symprec for FixSymmetry")
    atoms, symmetry, n, extent = atoms.copy(), {}, len(atoms), 1
    atoms.set_constraint()
    if symprec is not None:
        if not atoms.pbc.all():
            raise ValueError("keeping the symmetry needs a cell that is periodic in three directions")
        try:
            found = FixSymmetry(atoms, symprec)  # refines the atoms
        except Exception as e:  # spglib and ASE raise many kinds
            raise ValueError(f"no symmetry found at {symprec} A ({e})") from None
        symmetry = dict(rotations=found.rotations, maps=np.array(found.symm_map))
    cell = atoms.cell.array
    if not atoms.pbc.all():
        cell = data.complete_cell(torch.from_numpy(cell)[None], torch.from_numpy(atoms.pbc)[None])[0].numpy()
        extent = np.where(atoms.pbc, 1, np.ptp(atoms.positions @ np.linalg.inv(cell), axis=0) + 2).prod()
    sphere = 4 / 3 * math.pi * model.config["cutoff"] ** 3
    edges = n * max(n / (abs(np.linalg.det(cell)) * extent) * sphere, 1)  # if the atoms were spread evenly
    return dict(index=index, atoms=atoms, cell=cell, edges=edges) | symmetry


def end(r):
    """What relax yields of a record to which an error or results were added."""
    atoms, error, steps, stress = r["atoms"], r.get("error"), 0, None
    if not error:
        atoms.positions, steps = r["positions"].numpy(), r["step"].item()
        if atoms.pbc.all():
            atoms.cell, stress = r["cell"].numpy(), full_3x3_to_voigt_6_stress(r["stress"].numpy())
        if r["failed"]:
            error = "the energy is not finite, or the cell collapsed"
            if steps == 0 and r["nearest"] < data.CLOSEST:
                error = f"two atoms {r['nearest']:.2f} A apart"
    if error:
        return r["index"], atoms, math.nan, False, steps, error
    atoms.calc = SinglePointCalculator(atoms, energy=r["energy"].item(), forces=r["forces"].numpy(), stress=stress)
    return r["index"], atoms, r["energy"].item(), r["converged"].item(), steps, None


# ----------------------------------------------------------------------------------------------------------------------
# Calculator


def check(atoms, elements):
    """Raises ValueError: why a model of these elements (atomic numbers) can say nothing about the atoms."""
    data.check_geometry(atoms)
    unknown = set(atoms.numbers.tolist()) - set(elements)
    if unknown:
        raise ValueError(f"elements that the model lacks: {', '.join(chemical_symbols[z] for z in sorted(unknown))}")


SkinList = namedtuple("SkinList", "batch numbers pbc positions given_cell cell inverse_cell")  # on the host, but batch


class NequixCalculator(Calculator):
    """weights: a released name, an .nqx file or a model.pt; device: default CUDA if there is one; precision of the network:
    "float32", "tf32" (faster on CUDA, less exact) or "float64"; conv: as in model.choose_conv. Raises OSError or ValueError.
    A forked process goes on with one thread; not on CUDA, which torch refuses there: start processes by "spawn"."""

    implemented_properties = ["energy", "free_energy", "forces", "stress", "energies"]

    def __init__(self, weights="nequix-mp-1", device=None, precision="float32", conv="auto"):
        super().__init__()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda: torch sees no CUDA device")
        self.model = load(weights, self.device, precision, conv)
        self.cutoff = self.model.config["cutoff"]
        self.listed = self.step_graph = None  # the SkinList of the last calculate(), and perhaps a StepGraph
        # Edges of a batch: what fits in 0.6 of the free memory, by the bytes that an edge takes in the paper's network; on a CPU so
        # few that the caches hold much of it. relax halves it when the memory does not suffice all the same.
        size = dict(torch=180_000, oeq=40_000, fused=4_000)[self.model.chosen_conv()] * (1 + (precision == "float64"))
        on_cuda = self.device.type == "cuda"
        self.max_edges = min(int(0.6 * torch.cuda.mem_get_info(self.device)[0] / size), 1_000_000) if on_cuda else 5_000

    def fingerprint(self):
        """12 hexadecimal digits of the weights and E0s."""
        tensors = (self.model.e0, *self.model.parameters())
        return hashlib.sha256(b"".join(t.detach().float().cpu().numpy().tobytes() for t in tensors)).hexdigest()[:12]

    def check_state(self, atoms, tol=0):
        """What has changed since the last results, as ASE's own but by exact equality: an MD step asks three times."""
        if self.atoms is None:
            return all_changes
        names = ("positions", "numbers", "cell", "pbc")
        return [name for name in names if not np.array_equal(getattr(self.atoms, name), getattr(atoms, name))]

    @torch.inference_mode(False)  # here and below: forces are derivatives, whatever mode the caller is in
    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        if "stress" in properties and not (self.atoms if atoms is None else atoms).pbc.all():
            raise PropertyNotImplementedError("only a cell that is periodic in all three directions has a stress")
        super().calculate(atoms, properties, system_changes)
        self.results, before = {}, self.listed  # no results of other atoms, should these fail
        place = self.locate(self.atoms)
        if before is self.listed and not self.step_graph and 0 < len(before.batch.senders) <= GRAPH_EDGES:
            if self.model.chosen_conv() == "fused":
                with torch.cuda.device(self.device):
                    self.step_graph = StepGraph(self.model, self.listed.batch)
        out = self.step_graph(place) if self.step_graph else flat(self.model, self.moved(place))
        out = out.cpu().numpy()  # one wait for the GPU
        if not math.isfinite(out[0]):
            raise ValueError(NOT_FINITE)
        self.results = dict(energy=float(out[0]), free_energy=float(out[0]), forces=out[10:].reshape(-1, 3))
        if self.atoms.pbc.all():
            self.results["stress"] = full_3x3_to_voigt_6_stress(out[1:10].reshape(3, 3))
        if "energies" in properties:  # rarely asked for: another pass
            b = self.moved(place)
            energies = self.model(b.numbers, b.vectors, b.senders, b.row_ptr)
            self.results["energies"] = (energies + self.model.e0[self.model.species[b.numbers]]).cpu().numpy()

    def moved(self, place):
        """The Batch with positions and cell `place` (A+3, 3), from the list."""
        place = place.to(self.device)
        return at(self.listed.batch, place[:-3], place[None, -3:], self.cutoff)

    def locate(self, atoms):
        """Positions and completed cell as one tensor on the host, (A+3, 3). Makes a new list if the old one may lack an edge.
        Only then are the atoms checked, since no bad ones can share the list of good ones. Raises ValueError."""
        arrays = atoms.numbers, atoms.pbc[None], atoms.positions, atoms.cell.array[None]
        numbers, pbc, positions, given = map(torch.from_numpy, arrays)
        old, cutoff = self.listed, self.cutoff
        same = old is not None and torch.equal(numbers, old.numbers) and torch.equal(pbc, old.pbc)
        if same and torch.equal(given, old.given_cell):  # the common case, quickly
            cell, complete = old.cell, (positions - old.positions).square().sum(1).max() < (SKIN / 2) ** 2
        else:
            cell, one = data.complete_cell(given, pbc), torch.zeros_like(numbers)
            complete = same and still_complete(old.positions, old.inverse_cell, positions, cell, one, cutoff)
        if not complete:
            check(atoms, self.model.config["atomic_numbers"])
            n = torch.tensor([len(atoms)])
            batch, nearest = list_with_skin(numbers, positions, cell, pbc, n, cutoff, self.device)
            if nearest.item() < data.CLOSEST:
                raise ValueError(f"two atoms {nearest.item():.2f} A apart")
            if self.step_graph and not (same and self.step_graph.fill(batch)):
                self.step_graph = None
            self.listed = SkinList(batch, *(t.clone() for t in (numbers, pbc, positions, given)), cell, inverse(cell))
        return torch.cat([positions, cell[0]])

    @torch.inference_mode(False)
    def hessian(self, atoms):
        """d^2E / dr dr, (3n, 3n) eV/A^2, rows and columns atom by atom, x, y, z. Differentiates twice, by plain torch on any device:
        the fused kernels have no second derivative. Raises ValueError."""
        model, b = copy.copy(self.model), self.moved(self.locate(atoms))
        model.conv = "torch"

        def energy(positions):
            move = positions - b.positions  # zero, but for its derivative
            vectors = b.vectors + move[b.senders] - move[b.receivers]
            return model(b.numbers, vectors, b.senders, b.row_ptr).sum()

        hessian = torch.autograd.functional.hessian(energy, b.positions).view(3 * len(atoms), -1)
        if not hessian.isfinite().all():
            raise ValueError(NOT_FINITE)
        return hessian.cpu().numpy()

    def predict(self, structures):
        """Energy (eV), forces (n, 3) (eV/A) and stress ((6,) in Voigt order, eV/A^3; None where the cell is not periodic in
        three directions) of each of a list of Atoms, as a list of dicts. Ignores constraints. Raises ValueError for a bad one."""
        out = [None] * len(structures)
        for index, atoms, *_, error in self.relax(structures, fmax=0, steps=0):
            if error:
                raise ValueError(f"structure {index}: {error}")
            out[index] = {k: atoms.calc.results.get(k) for k in ("energy", "forces", "stress")}
        return out

    @torch.inference_mode(False)
    def relax(self, atoms_iterable, fmax, steps, cell_mask=None, symprec=None):
        """Relax a stream of Atoms, many at a time: positions and, where periodic in three directions, the cell.

        Same path as ASE's FIRE on FrechetCellFilter(atoms, mask=cell_mask), until every force and row of the cell's forces
        is below fmax (eV/A), or for `steps` steps. cell_mask: (6,) in Voigt order or (3, 3); zeros fix the cell.
        symprec: keep the symmetry found at this precision (A), as FixSymmetry does; needs spglib.
        Yields (index, atoms, energy, converged, steps, error) as structures finish: index in the stream, a new Atoms with
        results attached, eV, bool, steps taken, and None or one line. A bad structure stops no other. Reads the stream no
        farther ahead than a twentieth of a batch."""
        if symprec is not None:
            import spglib  # noqa: F401, FixSymmetry needs it
        mask = None if cell_mask is None or np.all(cell_mask) else np.asarray(cell_mask, float)
        if mask is not None:
            mask = (voigt_6_to_full_3x3_stress(mask) if mask.size == 6 else mask).reshape(3, 3)
            mask = torch.from_numpy(mask).to(self.device)
        stream, waiting, ended, live, s = enumerate(atoms_iterable), deque(), deque(), [], None

        def read():
            for index, atoms in stream:  # one more, to `waiting` or with an error to `ended`; None at the end
                try:
                    waiting.append(start(index, atoms, self.model, steps, symprec))
                except ValueError as e:
                    ended.append(dict(index=index, atoms=atoms, error=str(e)))
                return True

        def results():
            while ended:
                yield end(ended.popleft())

        while True:
            load, n = sum(r["edges"] for r in live), len(live)
            while len(live) < 4096 and (waiting or read()):
                if not waiting:
                    yield from results()
                elif live and load + waiting[0]["edges"] > self.max_edges:
                    break
                else:
                    live.append(waiting.popleft())
                    load += live[-1]["edges"]
            if not live:
                yield from results()
                return
            if live[n:]:
                new = at_rest(live[n:], self.device)
                s = {k: torch.cat([s[k], new[k]]) for k in new} if n else new

            names, symmetry = list(s), None if symprec is None else pack_symmetry(live, self.device)
            try:
                for _ in until_some_finish(self.model, s, fmax, steps, mask, symmetry):  # the GPU is at work:
                    yield from results()
                    while len(waiting) + len(ended) < len(live) / 20 and read():
                        pass
                finished = s["finished"]
            except torch.cuda.OutOfMemoryError:
                finished = None  # dealt with outside of the handler, which holds on to the failed graph
            if finished is None:
                torch.cuda.empty_cache()
                half = len(live) // 2
                keep = torch.arange(len(live), device=self.device) < half
                if half:
                    self.max_edges //= 2
                    waiting.extendleft(reversed(live[half:]))  # these start over
                else:
                    ended.append(live[0] | dict(error="out of memory with this structure alone"))
            else:
                done, keep = {k: v.cpu() for k, v in picked(s, finished, RESULT).items()}, ~finished
                columns = [v.split(done["n_atoms"].tolist()) if k in PER_ATOM else v for k, v in done.items()]
                records = [r for r, flag in zip(live, finished.tolist()) if flag]
                ended.extend(r | dict(zip(RESULT, x)) for r, *x in zip(records, *columns))
            s, live = picked(s, keep, names), [r for r, flag in zip(live, keep.tolist()) if flag]


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def read(files):
    """(name, Atoms) of every frame of the files. Raises ValueError if one can't be read."""
    for file in files:
        try:
            for k, atoms in enumerate(ase.io.iread(file, ":", do_not_split_by_at_sign=True)):
                yield f"{file}#{k}", atoms
        except Exception as e:  # ASE's readers raise all kinds
            raise ValueError(f"{file} cannot be read: {(str(e) or type(e).__name__).splitlines()[0]}") from None


def check_out(path, n_frames=1):
    """Raises ValueError if so many frames can't be written there."""
    if not Path(path).parent.is_dir():
        raise ValueError(f"--out: there is no folder {Path(path).parent}")
    try:
        known = ase.io.formats.get_ioformat(ase.io.formats.filetype(path, read=False))
    except ase.io.formats.UnknownFileTypeError as e:
        raise ValueError(f"--out {path}: ASE knows no such format ({e})") from None
    if not known.can_write or known.single and n_frames > 1:
        raise ValueError(f"--out {path}: ASE cannot write {n_frames} structures as {known.name}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", metavar="FILE", help="anything ASE reads, all frames")
    p.add_argument("--relax", action="store_true", help="relax positions and cell first")
    p.add_argument("--fmax", type=float, default=0.02, help="with --relax: force to reach, eV/A (default: 0.02)")
    p.add_argument("--steps", type=int, default=500, help="with --relax: at most so many (default: 500)")
    p.add_argument("--symprec", type=float, help="with --relax: keep the symmetry found at this precision, A")
    p.add_argument("--out", help="write the structures with their results, in the format of its suffix (.extxyz, ...)")
    add_options(p)
    a, out, failed = p.parse_args(argv), {}, 0
    try:
        frames = list(read(a.files))
        if not frames:
            raise ValueError(f"no structures in {', '.join(a.files)}")
        if a.out:
            check_out(a.out, len(frames))
        if a.relax and a.symprec is not None:
            importlib.import_module("spglib")  # should it be missing, now
        calc = NequixCalculator(a.weights, a.device, a.precision, a.conv)
        print(f"{a.weights}, {calc.model.precision}, convolution {calc.model.chosen_conv()}, device {calc.device}")
        if a.relax and not all(atoms.pbc.all() for _, atoms in frames):
            print("cells that are not periodic in all three directions stay as they are")
        row = "{:32} {:>16} {:>12} {:>12} {:>10} {:>10} {:>6}".format
        print(row("structure", "formula", "energy", "energy/atom", "max force", "pressure", "steps"))
        print(row("", "", "eV", "eV", "eV/A", "GPa", ""))
        how = dict(steps=a.steps, symprec=a.symprec) if a.relax else dict(steps=0)
        try:
            for index, atoms, energy, converged, steps, error in calc.relax((x for _, x in frames), a.fmax, **how):
                name, formula = frames[index][0], str(atoms.symbols)[:16]
                if error:
                    failed += 1
                    print(f"{name[-32:]:32} {formula:>16} error: {error}")
                    continue
                r, out[index] = atoms.calc.results, atoms
                atoms.info |= dict(structure=name) | (dict(steps=steps, converged=converged) if a.relax else {})
                force = np.linalg.norm(r["forces"], axis=1).max()
                pressure = f"{-r['stress'][:3].mean() / GPa:.3f}" if "stress" in r else "-"
                numbers = f"{energy:.5f}", f"{energy / len(atoms):.5f}", f"{force:.4f}", pressure, steps
                print(row(name[-32:], formula, *numbers) + " not converged" * (a.relax and not converged))
        finally:  # what was finished, also when interrupted
            if a.out and out:
                ase.io.write(a.out, [out[i] for i in sorted(out)])
                print(f"structures written to {a.out}: {len(out)}")
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"error: {e}{f': pip install {e.name}' if isinstance(e, ImportError) else ''}")
    except KeyboardInterrupt:
        sys.exit(130)
    if failed:
        sys.exit(f"error: {failed} of {len(frames)} structures failed")


if __name__ == "__main__":
    main()
