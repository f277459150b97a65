"""Predict with Nequix: energies, forces and stresses, molecular dynamics, Hessians, relaxations by the thousand.

    python calc.py FILE... --weights nequix-mp-1 [--relax] [--out out.extxyz]

    calc = NequixCalculator("nequix-mp-1")                     # a name, an .nqx file, or a model.pt of train.py
    atoms.calc = calc                                          # an ASE calculator
    calc.predict(list_of_atoms)                                # many structures, packed into batches
    calc.hessian(atoms)
    for index, atoms, energy, converged, steps, error in calc.relax(stream_of_atoms, fmax=0.02, steps=500): ...

Units are those of ASE: eV, A, eV/A, eV/A^3, eV/A^2; a positive stress is tensile. Stress exists only where a cell is periodic
in all three directions. A structure may be periodic in any directions, its atoms may lie outside the cell, its cell may
be left-handed or shorter than the cutoff. Sizes in the comments: A atoms, E edges, S structures.
"""

import argparse
import copy
import dataclasses
import hashlib
import math
import sys
from collections import deque
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixSymmetry
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from ase.units import GPa

import data
import kernels
import model as nequix
from model import energy_forces_stress

SKIN = 0.5  # A: edges up to cutoff + SKIN are listed, and serve until an atom may have come from beyond
REPLAYED = 500_000  # edges of a structure up to which a GPU's step is a CUDA graph, which keeps its memory
NOT_FINITE = "the energy is not finite: two atoms at one place?"
COLLAPSED = 0.5  # A^3 an atom: a relaxation below it is given up, before its edges fill the memory

# ----------------------------------------------------------------------------------------------------------------------
# Neighbour list with a skin


def at(listed, positions, cell, cutoff):
    """A Batch with those edges of `listed` that are within the cutoff (A) at other positions (A, 3) and cell (S, 3, 3).

    Nothing waits for the GPU: the edges keep their number, and those from row_ptr[-1] on mean nothing. See `trimmed`.
    """
    b = dataclasses.replace(listed, positions=positions, cell=cell, shifts=None)
    vectors = positions[b.senders] - positions[b.receivers]
    vectors += (
        listed.shifts @ cell[0] if len(cell) == 1 else data.shift_vectors(listed.shifts, cell, b.structure[b.receivers])
    )
    index = torch.arange(len(vectors), device=vectors.device)
    within = (vectors.square().sum(1) < cutoff**2) & (index < b.row_ptr[-1])
    count = torch.nn.functional.pad(within.cumsum(0), (1, 0))
    b.row_ptr, to = count[b.row_ptr], torch.where(within, count[:-1], len(vectors))
    close_up = lambda t: torch.cat([t, t[-1:]]).index_copy_(0, to, t)[:-1]
    b.senders, b.receivers, b.vectors = (close_up(t) for t in (b.senders, b.receivers, vectors))
    return b


def trimmed(b):
    """Without the edges from row_ptr[-1] on, at the cost of a wait for the GPU."""
    n = int(b.row_ptr[-1])
    return dataclasses.replace(b, senders=b.senders[:n], receivers=b.receivers[:n], vectors=b.vectors[:n])


def still_complete(listed_positions, inverse_cell, positions, cell, structure, cutoff):
    """(S,) bool: no pair that was farther apart than cutoff + SKIN in the list's geometry can be within the cutoff now.

    The cell was deformed by F = inverse_cell (S, 3, 3) of the list @ cell; atoms moved to x0 F + u. So a pair that was d0 apart
    is at least sigma d0 - 2 max|u| apart, where sigma, the least singular value of F, is no less than 1 - |F - 1|.
    """
    f = inverse_cell @ cell
    u = positions - torch.einsum("ai,aij->aj", listed_positions, f[structure])
    farthest = u.new_zeros(len(cell)).scatter_reduce(0, structure, torch.linalg.vector_norm(u, dim=1), "amax")
    sigma = 1 - torch.linalg.matrix_norm(f - torch.eye(3, dtype=f.dtype, device=f.device))
    return sigma * (cutoff + SKIN) - 2 * farthest >= cutoff


class Replay:
    """Energy, stress and forces over a list of edges as a CUDA graph, one launch in place of a thousand; for positions, cells
    and then lists that change, of atoms that do not."""

    def __init__(self, model, listed):
        edges = len(listed.senders) * 9 // 8 + 256  # room for longer lists. Edges outside row_ptr count for nothing.
        self.place = torch.cat([listed.positions, listed.cell[0]])
        self.batch = b = dataclasses.replace(listed)
        b.senders, b.receivers = listed.senders.new_zeros(edges), listed.receivers.new_zeros(edges)
        b.row_ptr, b.shifts = listed.row_ptr.clone(), listed.shifts.new_ones(edges, 3)
        self.fill(listed)
        run = lambda: flat(energy_forces_stress(model, at(b, *apart(self.place), model.config["cutoff"])))
        self.graph, self.out = kernels.capture(run, b.senders.device)

    def fill(self, listed):
        """Take over another list of edges; False if there is no room."""
        n, b = len(listed.senders), self.batch
        if n > len(b.senders):
            return False
        b.senders[:n], b.receivers[:n], b.shifts[:n] = listed.senders, listed.receivers, listed.shifts
        b.row_ptr.copy_(listed.row_ptr)
        self.listed = listed
        return True

    def __call__(self, place):
        self.place.copy_(place)
        self.graph.replay()
        return self.out


def apart(place):
    """Positions (A, 3) and cell (1, 3, 3), which travel to the GPU as one tensor (A+3, 3)"""
    return place[:-3], place[None, -3:]


def flat(results):
    """(10 + 3A,): energy, stress and forces of one structure, to be fetched at once."""
    energy, forces, stress = results
    return torch.cat([energy, stress.flatten(), forces.flatten()])


# ----------------------------------------------------------------------------------------------------------------------
# Relaxation: FIRE (Bitzek et al. 2006) on positions and the logarithm of the deformation, as ASE's FIRE with its defaults
# on its FrechetCellFilter. The cell is cell0 @ F^T with F = exp(log_f); the variables are the positions without the
# deformation, x = r @ F^-T, and log_f times the number of atoms, three rows more.


def matrix_exp(m):
    """exp of small (..., k, k) matrices by scaling and squaring; torch's own makes the host wait. 1e-15 up to a norm of 2."""
    m = m / 16
    out = term = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).expand_as(m)
    for k in range(1, 11):
        term = term @ m / k
        out = out + term
    for _ in range(4):
        out = out @ out
    return out


def matrix_log(f):
    """log of (S, 3, 3) deformations: 2 artanh(z), z = (f - 1)/(f + 1). 1e-15 for strains up to 0.4."""
    one = torch.eye(3, dtype=f.dtype, device=f.device)
    z = (f - one) @ inverse(f + one)
    term, out = z, 0
    for k in range(1, 41, 2):
        out, term = out + 2 / k * term, term @ z @ z
    return out


def inverse(m):
    return torch.linalg.inv_ex(m).inverse  # inv() makes the host wait for its check


def generalized_forces(s, forces, stress, mask):
    """Forces on x (A, 3) and on n log_f (S, 3, 3), eV/A, as FrechetCellFilter has them; cells that stay get zero."""
    volume = torch.linalg.det(s["cell"]).abs()[:, None, None]
    virial = torch.where(s["pbc"].all(1)[:, None, None], -volume * stress, 0)
    virial = virial if mask is None else virial * mask
    f = matrix_exp(s["log_f"])
    # The adjoint of the derivative of exp at log_f is the derivative at its transpose: a block of a 6 x 6 exponential.
    block = f.new_zeros(len(f), 6, 6)
    block[:, :3, :3] = block[:, 3:, 3:] = s["log_f"].mT
    block[:, :3, 3:] = virial @ inverse(f.mT)
    cell_forces = matrix_exp(block)[:, :3, 3:] / s["n_atoms"][:, None, None]
    return row_times(forces, f, s["structure"]), cell_forces


def fire_step(s, forces, cell_forces, active, mask, symmetry):
    """Move the `active` structures (S,) by one step of FIRE; forces as of generalized_forces. Updates the state `s`."""
    structure, v, w, dt, mix = (s[k] for k in ("structure", "velocity", "cell_velocity", "dt", "mix"))

    def total(x, y):  # over a structure's atoms (A, 3) and the rows of its cell (S, 3, 3): (S,)
        return y.sum((1, 2)).index_add(0, structure, x.sum(1))

    good = total(forces * v, cell_forces * w) > 0
    halt, faster = ~good & (s["step"] > 0), good & (s["downhill"] > 5)
    ratio = total(v * v, w * w) / total(forces**2, cell_forces**2).clamp(min=1e-300)
    keep, turn = torch.where(good, 1 - mix, 0), torch.where(good, mix * ratio.sqrt(), 0)
    new = dict(step=s["step"] + 1, downhill=torch.where(good, s["downhill"] + 1, 0))
    new["dt"] = dt = torch.where(faster, (1.1 * dt).clamp(max=1), torch.where(halt, 0.5 * dt, dt))
    new["mix"] = torch.where(faster, 0.99 * mix, torch.where(halt, 0.1, mix))
    new["velocity"] = v = keep[structure, None] * v + (turn + dt)[structure, None] * forces
    new["cell_velocity"] = w = keep[:, None, None] * w + (turn + dt)[:, None, None] * cell_forces
    dt = dt * (0.2 / (dt * total(v * v, w * w).sqrt()).clamp(min=0.2))  # no farther than 0.2 A, all in all

    one = torch.eye(3, dtype=dt.dtype, device=dt.device)
    x = row_times(s["positions"], inverse(matrix_exp(s["log_f"]).mT), structure) + dt[structure, None] * v
    log_f = s["log_f"] + dt[:, None, None] * w / s["n_atoms"][:, None, None]
    ft = matrix_exp(log_f).mT
    ft = ft if mask is None else one + (ft - one) * mask
    cell, positions = s["cell0"] @ ft, row_times(x, ft, structure)
    if symmetry:  # as FixSymmetry: of the change of the cell, and of what the atoms do beside following the cell
        to_new = inverse(s["cell"])
        change = symmetric_tensors((to_new @ cell).mT - one, s["cell"], symmetry)
        cell = s["cell"] @ (one + change).mT
        carried = row_times(s["positions"], to_new @ cell, structure)
        positions = carried + symmetric_vectors(positions - carried, cell, structure, symmetry)
    if symmetry or mask is not None:
        log_f = matrix_log((inverse(s["cell0"]) @ cell).mT)
    new |= dict(positions=positions, cell=cell, log_f=log_f)
    on = {k: (active[structure] if k in PER_ATOM else active).view(-1, *[1] * (v.ndim - 1)) for k, v in new.items()}
    s |= {k: torch.where(on[k], v, s[k]) for k, v in new.items()}  # all at once: memory may run out


def row_times(rows, matrices, structure):
    """(A, 3) times the matrix of each atom's structure (S, 3, 3)."""
    return torch.einsum("ai,aij->aj", rows, matrices[structure])


def symmetric_tensors(m, cell, symmetry):
    """(S, 3, 3) tensors averaged over the symmetry operations, as ASE's symmetrize_rank2."""
    rotation, of, n_rotations = symmetry[:3]
    scaled = (cell @ m @ cell.mT)[of]
    scaled = torch.zeros_like(m).index_add(0, of, rotation.mT @ scaled @ rotation) / n_rotations[:, None, None]
    return inverse(cell) @ scaled @ inverse(cell).mT


def symmetric_vectors(v, cell, structure, symmetry):
    """(A, 3) vectors averaged over the symmetry operations, as ASE's symmetrize_rank1."""
    rotation, _, n_rotations, operation, source, target = symmetry
    scaled = row_times(v, inverse(cell), structure)
    scaled = torch.zeros_like(v).index_add(0, target, torch.einsum("pij,pj->pi", rotation[operation], scaled[source]))
    return row_times(scaled / n_rotations[structure, None], cell, structure)


def pack_symmetry(rotations, maps, device):
    """Of each structure's rotations (T, 3, 3) of fractional coordinates, and the atom that each atom becomes (T, n):
    rotation (all T, 3, 3), its structure, rotations of a structure (S,); and for each pair of a rotation and an atom of
    its structure the rotation, the atom, and the atom it becomes."""
    n_rotations, n_atoms = (np.array([m.shape[k] for m in maps]) for k in (0, 1))
    of = np.repeat(np.arange(len(maps)), n_rotations)
    first = np.cumsum(n_atoms) - n_atoms
    operation = np.repeat(np.arange(len(of)), n_atoms[of])
    source = np.concatenate([np.tile(np.arange(f, f + n), t) for f, n, t in zip(first, n_atoms, n_rotations)])
    target = np.concatenate([(f + m).ravel() for f, m in zip(first, maps)])
    out = np.concatenate(rotations).astype(float), of, n_rotations, operation, source, target
    return [torch.from_numpy(x).to(device) for x in out]


STATE = "numbers positions velocity pbc n_atoms cell0 cell log_f cell_velocity dt mix downhill step converged".split()
RESULT = "positions n_atoms cell step converged failed energy forces stress".split()
PER_ATOM = "numbers positions velocity forces".split()  # (A, ...); all else is (S, ...)


def at_rest(records, device):
    """The state of structures whose relaxation begins, as one dict of tensors."""
    atoms = [r["atoms"] for r in records]
    pack = lambda join, arrays: torch.from_numpy(join(list(arrays))).to(device)
    s = dict(numbers=pack(np.concatenate, (a.numbers for a in atoms)), pbc=pack(np.stack, (a.pbc for a in atoms)))
    s |= dict(
        positions=pack(np.concatenate, (a.positions for a in atoms)), cell=pack(np.stack, (r["cell"] for r in records))
    )
    s["n_atoms"] = n = torch.tensor([len(a) for a in atoms], device=device)
    tenth, zero = torch.full_like(n, 0.1, dtype=torch.float64), torch.zeros_like(s["cell"])
    s |= dict(
        velocity=torch.zeros_like(s["positions"]), cell0=s["cell"], log_f=zero, cell_velocity=zero, dt=tenth, mix=tenth
    )
    return s | dict(
        downhill=torch.zeros_like(n), step=torch.zeros_like(n), converged=torch.zeros_like(n, dtype=torch.bool)
    )


def picked(s, which, names):
    """What has these names in the state `s`, of those structures; which: (S,) bool."""
    structures, atoms = (x.nonzero()[:, 0] for x in (which, which.repeat_interleave(s["n_atoms"])))
    return {k: s[k][atoms if k in PER_ATOM else structures] for k in names}


def until_some_finish(model, s, fmax, steps, mask, symmetry):
    """Take steps with the state `s`, until a twentieth of the structures are finished. Yields in every step, while the GPU is
    at work. Adds to the state: finished and failed (S,); energy (S,), forces (A, 3), stress (S, 3, 3) of the finished ones.
    """
    cutoff, n = model.config["cutoff"], s["n_atoms"]
    structure = s["structure"] = torch.repeat_interleave(torch.arange(len(n), device=n.device), n)
    listed = None
    while True:
        if listed is None:
            listed = data.make_batch(*(s[k] for k in ("numbers", "positions", "cell", "pbc", "n_atoms")), cutoff + SKIN)
            listed.shifts = listed.shifts.double()
            inverse_cell = inverse(s["cell"])
        batch = trimmed(at(listed, s["positions"], s["cell"], cutoff))
        energy, forces, stress = energy_forces_stress(model, batch)
        result = dict(energy=energy, forces=forces, stress=stress)
        if symmetry:
            forces = symmetric_vectors(forces, s["cell"], structure, symmetry)
            stress = symmetric_tensors(stress, s["cell"], symmetry)
        forces, cell_forces = generalized_forces(s, forces, stress, mask)
        norm = torch.linalg.vector_norm(forces, dim=1)
        norm = torch.linalg.vector_norm(cell_forces, dim=2).amax(1).scatter_reduce(0, structure, norm, "amax")
        s["converged"] |= norm < fmax
        failed = ~torch.isfinite(norm + energy)
        failed |= s["pbc"].all(1) & (s["step"] > 0) & (torch.linalg.det(s["cell"]).abs() < COLLAPSED * n)
        finished = s["converged"] | failed | (s["step"] >= steps)
        fire_step(s, forces, cell_forces, ~finished, mask, symmetry)
        complete = still_complete(listed.positions, inverse_cell, s["positions"], s["cell"], structure, cutoff)
        flags = torch.stack([finished.sum(), complete.all()])
        yield
        n_finished, still = flags.tolist()  # the only wait for the GPU in a step, but for the edges
        if n_finished >= max(len(n) / 20, 1):
            s |= result | dict(finished=finished, failed=failed)
            return
        if not still:
            listed = None


# ----------------------------------------------------------------------------------------------------------------------
# Calculator


def check(atoms, model):
    """Raises ValueError: why the model can say nothing about these atoms."""
    data.check_geometry(atoms)
    unknown = set(atoms.numbers.tolist()) - set(model.config["atomic_numbers"])
    if unknown:
        raise ValueError(f"elements that the model lacks: {', '.join(chemical_symbols[z] for z in sorted(unknown))}")


def expected_edges(atoms, cell, cutoff):
    """Edges within the cutoff if the atoms were spread evenly, over the cell and where it is open over their extent."""
    n, volume = len(atoms), abs(np.linalg.det(cell))
    if not atoms.pbc.all():
        volume *= np.where(atoms.pbc, 1, np.ptp(atoms.positions @ np.linalg.inv(cell), axis=0) + 2).prod()
    return max(n * n / volume * 4 / 3 * math.pi * cutoff**3, n)


def start(index, atoms, model, symprec):
    """The record of a structure whose relaxation begins. Raises ValueError for bad input."""
    check(atoms, model)
    if atoms.constraints:
        raise ValueError("constraints are not supported here: use ASE's optimizers, or symprec for FixSymmetry")
    atoms, symmetry = atoms.copy(), {}
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
    return (
        dict(index=index, atoms=atoms, cell=cell, edges=expected_edges(atoms, cell, model.config["cutoff"])) | symmetry
    )


def end(r, x=None, error=None):
    """What relax yields of a record and, where it took part, its tensors."""
    atoms, periodic, steps = r["atoms"], r["atoms"].pbc.all(), 0
    if x:
        atoms.positions, steps = x["positions"].numpy(), x["step"].item()
        if periodic:
            atoms.cell = x["cell"].numpy()
        if x["failed"]:
            error = "the energy is not finite, or the cell collapsed"
    if error:
        return r["index"], atoms, math.nan, False, steps, error
    stress = full_3x3_to_voigt_6_stress(x["stress"].numpy()) if periodic else None
    atoms.calc = SinglePointCalculator(atoms, energy=x["energy"].item(), forces=x["forces"].numpy(), stress=stress)
    return r["index"], atoms, x["energy"].item(), x["converged"].item(), steps, None


class NequixCalculator(Calculator):
    """weights: a released name, an .nqx file or a model.pt; device: default CUDA if there is one; dtype: of the network,
    "float32" or "float64"; conv: as in model.choose_conv. Raises OSError or ValueError with a one-line reason."""

    implemented_properties = ["energy", "free_energy", "forces", "stress", "energies"]

    def __init__(self, weights="nequix-mp-1", device=None, dtype="float32", conv="auto"):
        super().__init__()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda: torch sees no CUDA device")
        if dtype not in ("float32", "float64"):
            raise ValueError(f'dtype is "float32" or "float64", not "{dtype}"')
        nequix.choose_conv(conv, self.device)
        self.model = nequix.load(weights, self.device, getattr(torch, dtype), conv)
        self.cutoff = self.model.config["cutoff"]
        self.listed = None  # of calculate(): a Batch up to cutoff + SKIN, and on the host where its atoms were
        self.max_edges = None  # of a batch; measured when first needed
        self.replay = self.replayed = None  # a CUDA graph, and whose

    def fingerprint(self):
        """12 hexadecimal digits of the weights and E0s."""
        weights = b"".join(
            p.detach().float().cpu().numpy().tobytes() for p in [self.model.e0, *self.model.parameters()]
        )
        return hashlib.sha256(weights).hexdigest()[:12]

    def check_state(self, atoms, tol=0):
        """What has changed since the last results, as ASE's own but by exact equality: an MD step asks three times."""
        if self.atoms is None:
            return all_changes
        names = ("positions", "numbers", "cell", "pbc")
        return [name for name in names if not np.array_equal(getattr(self.atoms, name), getattr(atoms, name))]

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        check(atoms, self.model)
        if "stress" in properties and not atoms.pbc.all():
            raise PropertyNotImplementedError("stress exists only where the cell is periodic in three directions")
        before = self.listed
        place = self.locate(atoms)
        out = self.evaluate(place, again=before is self.listed).cpu().numpy()  # one wait for the GPU
        if not math.isfinite(out[0]):
            raise ValueError(NOT_FINITE)
        self.results = dict(energy=float(out[0]), free_energy=float(out[0]), forces=out[10:].reshape(-1, 3))
        if atoms.pbc.all():
            self.results["stress"] = full_3x3_to_voigt_6_stress(out[1:10].reshape(3, 3))
        if "energies" in properties:  # seldom asked for: another pass
            batch = self.batch(atoms)
            energies = self.model(batch.numbers, batch.vectors, batch.senders, batch.row_ptr)
            energies = energies + self.model.e0[self.model.species[batch.numbers]]
            self.results["energies"] = energies.cpu().numpy()

    def evaluate(self, place, again):
        """`flat` results; by a CUDA graph once a structure has come again, if it is not too large."""
        listed, numbers, pbc = self.listed[:3]
        if self.model.chosen_conv() == "fused" and 0 < len(listed.senders) <= REPLAYED:
            same = self.replay is not None and all(map(torch.equal, self.replayed, (numbers, pbc)))
            if same and (self.replay.listed is listed or self.replay.fill(listed)):
                return self.replay(place)
            if again:
                self.replay, self.replayed = None, (numbers, pbc)
                with torch.cuda.device(self.device):
                    self.replay = Replay(self.model, listed)
                return self.replay(place)
        return flat(energy_forces_stress(self.model, self.moved(place)))

    def batch(self, atoms):
        """One structure as a Batch, from the list with a skin while that is complete."""
        return self.moved(self.locate(atoms))

    def moved(self, place):
        return trimmed(at(self.listed[0], *apart(place.to(self.device)), self.cutoff))

    def locate(self, atoms):
        """Positions and cell, (A+3, 3) on the host; for which the list is then complete."""
        numbers, positions, pbc = (torch.from_numpy(x) for x in (atoms.numbers, atoms.positions, atoms.pbc[None]))
        cell = torch.from_numpy(atoms.cell.array)[None]
        if self.listed is not None:
            listed, at_numbers, at_pbc, at_positions, given, completed, inverse_cell = self.listed
            if torch.equal(numbers, at_numbers) and torch.equal(pbc, at_pbc):
                if torch.equal(cell, given):  # the common case, quickly
                    complete = (positions - at_positions).square().sum(1).max() < (SKIN / 2) ** 2
                else:
                    completed, structure = data.complete_cell(cell, pbc), torch.zeros(len(atoms), dtype=torch.int64)
                    complete = still_complete(at_positions, inverse_cell, positions, completed, structure, self.cutoff)
                if complete:
                    return torch.cat([positions, completed[0]])
        numbers, positions, pbc, cell = (
            x.clone() for x in (numbers, positions, pbc, cell)
        )  # those of atoms may change
        n_atoms, completed = torch.tensor([len(atoms)]), data.complete_cell(cell, pbc)
        listed = data.make_batch(numbers, positions, completed, pbc, n_atoms, self.cutoff + SKIN, self.device)
        listed.shifts = listed.shifts.double()
        self.listed = listed, numbers, pbc, positions, cell, completed, torch.linalg.inv(completed)
        return torch.cat([positions, completed[0]])

    # ------------------------------------------------------------------------------------------------------------------
    # Many structures

    def edge_budget(self):
        """Edges of a batch: what fits 0.6 of the free memory, by the memory that 11,000 edges take, and a million at most; on a
        CPU so few that it takes the same memory again and again."""
        if self.max_edges is None:
            self.max_edges = 5_000
            if self.device.type == "cuda":
                crystal = Atoms([self.model.config["atomic_numbers"][0]] * 343, cell=[18.9] * 3, pbc=True)
                crystal.positions = 2.7 * np.stack(np.meshgrid(*[np.arange(7.0)] * 3), -1).reshape(-1, 3)
                batch, self.listed = self.batch(crystal), None
                energy_forces_stress(self.model, batch)  # kernels are built
                before = torch.cuda.memory_allocated(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
                energy_forces_stress(self.model, batch)
                used = torch.cuda.max_memory_allocated(self.device) - before
                torch.cuda.empty_cache()
                free = torch.cuda.mem_get_info(self.device)[0]
                self.max_edges = int(min(0.6 * free / used * len(batch.senders), 1_000_000))
        return self.max_edges

    def predict(self, structures):
        """Energy (eV), forces (n, 3) (eV/A) and stress ((6,) in Voigt order, eV/A^3; None where the cell is not periodic in
        three directions) of each of a list of Atoms, as a list of dicts. Raises ValueError for a bad one."""
        out = [None] * len(structures)
        free = (Atoms(a.numbers, a.positions, cell=a.cell, pbc=a.pbc) for a in structures)  # of constraints
        for index, atoms, *_, error in self.relax(free, fmax=0, steps=0):
            if error:
                raise ValueError(f"structure {index}: {error}")
            out[index] = {k: atoms.calc.results.get(k) for k in ("energy", "forces", "stress")}
        return out

    def relax(self, atoms_iterable, fmax, steps, cell_mask=None, symprec=None):
        """Relax a stream of Atoms, positions and, where periodic in three directions, the cell; many at a time.

        Same path as ASE's FIRE on FrechetCellFilter(atoms, mask=cell_mask): until every force and row of the cell's forces
        is below fmax (eV/A), or for `steps` steps. cell_mask: (6,) in Voigt order or (3, 3); zeros fix the cell.
        symprec: keep the symmetry found at this precision (A), as FixSymmetry does; needs spglib.
        Yields (index, atoms, energy, converged, steps, error) as structures finish: index in the stream, a new Atoms with
        results attached, eV, bool, steps taken, and None or one line. A bad structure stops no other. Reads the
        stream no farther ahead than a twentieth of a batch.
        """
        if symprec is not None:
            try:
                import spglib  # noqa: F401, FixSymmetry needs it
            except ImportError:
                raise ImportError("keeping the symmetry needs spglib: pip install spglib") from None
        mask = None
        if cell_mask is not None and not np.all(cell_mask):
            mask = np.asarray(cell_mask, float)
            if mask.shape not in ((6,), (3, 3)):
                raise ValueError(f"cell_mask has shape {mask.shape}: it should be (6,) or (3, 3)")
            mask = torch.from_numpy(voigt_6_to_full_3x3_stress(mask) if mask.shape == (6,) else mask).to(self.device)
        stream, more, waiting, ended, live, s = enumerate(atoms_iterable), True, deque(), deque(), [], None

        def read():
            nonlocal more
            index, atoms = next(stream, (None, None))
            more = index is not None
            try:
                if more:
                    waiting.append(start(index, atoms, self.model, symprec))
            except ValueError as e:
                ended.append((dict(index=index, atoms=atoms), None, str(e)))

        while True:
            load, new = sum(r["edges"] for r in live), []
            while len(live) + len(new) < 4096 and (waiting or more):
                if not waiting:
                    read()
                    while ended and not waiting:
                        yield end(*ended.popleft())
                elif (live or new) and load + waiting[0]["edges"] > self.edge_budget():
                    break
                else:
                    new.append(waiting.popleft())
                    load += new[-1]["edges"]
            if new:
                begun = at_rest(new, self.device)
                s = {k: torch.cat([s[k], begun[k]]) for k in STATE} if live else begun
                live += new
            if not live:
                while ended:
                    yield end(*ended.popleft())
                return

            symmetry = symprec and pack_symmetry([r["rotations"] for r in live], [r["maps"] for r in live], self.device)
            try:
                for _ in until_some_finish(self.model, s, fmax, steps, mask, symmetry):  # at work on the GPU
                    while ended:
                        yield end(*ended.popleft())
                    while more and len(waiting) + len(ended) < len(live) / 20:
                        read()
                finished = s["finished"]
            except torch.cuda.OutOfMemoryError:
                finished = None  # dealt with outside of the handler, which holds on to the failed graph
            if finished is None:
                torch.cuda.empty_cache()
                half = len(live) // 2
                if half:
                    self.max_edges //= 2
                waiting.extendleft(reversed(live[half:]))  # these start over
                if not half:
                    ended.append((waiting.popleft(), None, "out of memory with this structure alone"))
                live, s = live[:half], picked(s, torch.arange(len(live), device=self.device) < half, STATE)
                continue
            done = {k: v.cpu() for k, v in picked(s, finished, RESULT).items()}
            s, flags, sizes = picked(s, ~finished, STATE), finished.tolist(), done["n_atoms"].tolist()
            done = zip(*(v.split(sizes) if k in PER_ATOM else v for k, v in done.items()))
            ended.extend((r, dict(zip(RESULT, x))) for r, x in zip([r for r, flag in zip(live, flags) if flag], done))
            live = [r for r, flag in zip(live, flags) if not flag]

    def hessian(self, atoms):
        """d^2E / dr dr, (3n, 3n) eV/A^2, rows and columns atom by atom, x, y, z; by differentiating twice, symmetric to rounding.
        Plain torch on any device: the other convolutions need not have second derivatives."""
        check(atoms, self.model)
        model, b = copy.copy(self.model), self.batch(atoms)
        model.conv = "torch"
        positions = b.positions.clone().requires_grad_()
        move = positions - b.positions  # zero, but for its derivative
        vectors = b.vectors + move[b.senders] - move[b.receivers]
        energy = model(b.numbers, vectors, b.senders, b.row_ptr).sum() + 0 * (positions**2).sum()
        (gradient,) = torch.autograd.grad(energy, positions, create_graph=True)
        if not gradient.isfinite().all():
            raise ValueError(NOT_FINITE)
        rows = [torch.autograd.grad(g, positions, retain_graph=True)[0].flatten() for g in gradient.flatten()]
        return torch.stack(rows).cpu().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def read(files):
    """(name, Atoms) of every frame of the files. Raises ValueError if one can't be read."""
    for file in files:
        try:
            for k, atoms in enumerate(ase.io.iread(file, ":")):
                yield f"{file}#{k}", atoms
        except Exception as e:  # ASE's readers raise all kinds
            raise ValueError(
                f"{file} cannot be read: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
            ) from None


def check_out(path):
    """Raises ValueError if nothing can be written there."""
    if not Path(path).parent.is_dir():
        raise ValueError(f"--out: there is no folder {Path(path).parent}")
    try:
        known = ase.io.formats.get_ioformat(ase.io.formats.filetype(path, read=False))
    except ase.io.formats.UnknownFileTypeError as e:
        raise ValueError(f"--out {path}: ASE knows no such format ({e})") from None
    if not known.can_write:
        raise ValueError(f"--out {path}: ASE does not write the format {known.name}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", metavar="FILE", help="anything ASE reads, all frames")
    p.add_argument("--weights", default="nequix-mp-1", help="a released name, an .nqx file or a model.pt")
    p.add_argument("--relax", action="store_true", help="relax positions and cell first")
    p.add_argument("--fmax", type=float, default=0.02, help="eV/A, with --relax (default: 0.02)")
    p.add_argument("--steps", type=int, default=500, help="with --relax: at most so many (default: 500)")
    p.add_argument("--symprec", type=float, help="A, with --relax: keep the symmetry found at this precision")
    p.add_argument("--out", help="write the structures with their results; extxyz, or by the suffix what ASE writes")
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    p.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="of the network")
    p.add_argument("--conv", choices=["auto", "torch", "oeq", "fused"], default="auto", help="convolution")
    a, failed, out = p.parse_args(), 0, {}
    try:
        if a.out:
            check_out(a.out)
        calc = NequixCalculator(a.weights, a.device, a.dtype, a.conv)
        frames = list(read(a.files))
        if not frames:
            raise ValueError(f"no structures in {', '.join(a.files)}")
        names, structures = zip(*frames)
        print(
            f"{'structure':32} {'formula':>16} {'energy':>12} {'energy/atom':>12} {'max force':>10} {'pressure':>10}",
            end="",
        )
        print(f"{'steps':>7}" if a.relax else "")
        print(f"{'':32} {'':>16} {'eV':>12} {'eV':>12} {'eV/A':>10} {'GPa':>10}")
        if not a.relax:  # constraints take no part
            for atoms in structures:
                atoms.set_constraint()
        results = calc.relax(structures, a.fmax, a.steps if a.relax else 0, symprec=a.symprec if a.relax else None)
        try:
            for index, atoms, energy, converged, steps, error in results:
                row = f"{names[index][-32:]:32} {str(atoms.symbols)[:16]:>16} "
                if error:
                    print(f"{row}error: {error}")
                    failed += 1
                    continue
                out[index], stress = atoms, atoms.calc.results.get("stress")
                atoms.info |= dict(structure=names[index]) | (dict(steps=steps, converged=converged) if a.relax else {})
                force = np.linalg.norm(atoms.calc.results["forces"], axis=1).max()
                pressure = "-" if stress is None else f"{-stress[:3].mean() / GPa:.3f}"
                row += f"{energy:12.5f} {energy / len(atoms):12.5f} {force:10.4f} {pressure:>10}"
                print(f"{row}{steps:7}{'' if converged else ' not converged'}" if a.relax else row)
        finally:  # what was finished, also when interrupted
            if a.out and out:
                ase.io.write(a.out, [out[i] for i in sorted(out)])
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
    if failed:
        sys.exit(f"error: {failed} of {len(structures)} structures failed")


if __name__ == "__main__":
    main()
