"""What physics asks of an interatomic potential, one test a law; readable from top to bottom.

The energy of a structure must not depend on how we look at it: where it is, how it is turned, how its atoms are numbered,
which cell describes it. Forces turn with the structure. Forces, stress and Hessian must be derivatives of the energy, and
all of it must be smooth where a neighbour enters the cutoff. A small random model in float64 keeps all these exactly, since
they follow from the architecture and not from training: what is left is rounding, 1e-12, or the error of a finite difference.

That the parts are right, and not only consistent, is shown elsewhere: test_model.py holds harmonics, coupling coefficients
and every convolution against e3nn's own TensorProduct, and the whole against the official values of the released weights.
"""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, make_supercell, molecule
from scipy.spatial.transform import Rotation

from calc import NequixCalculator
from model import energy_forces_stress, save
from test_data import batch_of
from test_model import small_model

CUTOFF = 6.0  # A


@pytest.fixture(scope="module")
def calc(tmp_path_factory):
    path = tmp_path_factory.mktemp("equivariance") / "model.pt"
    save(path, small_model())
    return NequixCalculator(path, "cpu", "float64")


def structures():
    """A skewed crystal, a slab, a molecule, none of them symmetric."""
    out = [bulk("NaCl", "rocksalt", 5.6), fcc111("Pt", (1, 2, 3), vacuum=8), molecule("CH3CH2OH")]
    for k, atoms in enumerate(out):
        atoms.rattle(0.1, seed=k)
    return out


def evaluate(calc, atoms):
    """energy (eV), forces (n, 3) (eV/A), stress (3, 3) (eV/A^3) or None."""
    atoms = atoms.copy()
    atoms.calc = calc
    return atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False) if atoms.pbc.all() else None


def transformed(atoms, matrix):
    """Every vector r becomes r @ matrix, those of the cell as well."""
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ matrix)
    atoms.positions = atoms.positions @ matrix
    return atoms


# ----------------------------------------------------------------------------------------------------------------------
# Symmetry


@pytest.mark.parametrize("atoms", structures(), ids=str)
@pytest.mark.parametrize("handedness", [1, -1], ids=["rotation", "rotation and inversion"])
def test_rotation_and_inversion(calc, atoms, handedness):
    """E(R r) = E(r), F(R r) = R F(r), stress(R r) = R stress(r) R^T. The mirror image has a left-handed cell."""
    r = handedness * Rotation.random(random_state=0).as_matrix()
    energy, forces, stress = evaluate(calc, atoms)
    turned_energy, turned_forces, turned_stress = evaluate(calc, transformed(atoms, r))
    assert turned_energy == pytest.approx(energy, abs=1e-10)
    np.testing.assert_allclose(turned_forces, forces @ r, atol=1e-10)
    assert np.abs(forces).max() > 0.01  # there is something to turn
    if stress is not None:
        np.testing.assert_allclose(turned_stress, r.T @ stress @ r, atol=1e-12)


@pytest.mark.parametrize("atoms", structures(), ids=str)
def test_translation(calc, atoms):
    """Moving everything changes nothing, nor does moving single atoms by cell vectors: nobody need wrap positions."""
    energy, forces, _ = evaluate(calc, atoms)
    moved = atoms.copy()
    moved.positions += [1.234, -50.0, 7.7]
    rng = np.random.default_rng(0)
    moved.positions += (rng.integers(-3, 4, (len(atoms), 3)) * atoms.pbc) @ atoms.cell.array
    moved_energy, moved_forces, _ = evaluate(calc, moved)
    assert moved_energy == pytest.approx(energy, abs=1e-10)
    np.testing.assert_allclose(moved_forces, forces, atol=1e-10)
    np.testing.assert_allclose(forces.sum(0), 0, atol=1e-12)  # Newton's third law, which says the same


@pytest.mark.parametrize("atoms", structures(), ids=str)
def test_permutation(calc, atoms):
    """Atoms of an element are alike: numbering them otherwise numbers the forces otherwise."""
    order = np.random.default_rng(0).permutation(len(atoms))
    energy, forces, _ = evaluate(calc, atoms)
    permuted_energy, permuted_forces, _ = evaluate(calc, atoms[order])
    assert permuted_energy == pytest.approx(energy, abs=1e-10)
    np.testing.assert_allclose(permuted_forces, forces[order], atol=1e-10)


def test_supercells_are_additive(calc):
    """A crystal of 12 cells has 12 times the energy, the forces repeat, the stress stays; whatever shape the 12 have."""
    atoms = structures()[0]
    energy, forces, stress = evaluate(calc, atoms)
    for shape in (
        np.diag([2, 2, 3]),
        np.array([[2, 1, 0], [0, 2, -1], [0, 0, 3]]),
        np.array([[0, 2, 0], [2, 0, 1], [0, 0, -3]]),
    ):
        big = make_supercell(atoms, shape)
        assert len(big) == 24
        big_energy, big_forces, big_stress = evaluate(calc, big)
        assert big_energy == pytest.approx(12 * energy, abs=1e-9)
        np.testing.assert_allclose(big_stress, stress, atol=1e-12)
        for symbol in ("Na", "Cl"):
            np.testing.assert_allclose(
                big_forces[big.symbols == symbol], forces[atoms.symbols == symbol].repeat(12, 0), atol=1e-10
            )


def test_far_apart_is_additive(calc):
    """Two molecules beyond each other's cutoff know nothing of each other; a lone atom has its own energy, and no force."""
    one, other, atom = molecule("CH3CH2OH"), molecule("C6H6"), Atoms("Na")
    other.positions += [30, 0, 0]
    atom.positions += [0, 30, 0]
    parts = [evaluate(calc, x) for x in (one, other, atom)]
    energy, forces, _ = evaluate(calc, one + other + atom)
    assert energy == pytest.approx(sum(p[0] for p in parts), abs=1e-10)
    np.testing.assert_allclose(forces, np.concatenate([p[1] for p in parts]), atol=1e-11)
    assert (forces[-1] == 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives


@pytest.mark.parametrize("atoms", structures(), ids=str)
def test_forces_are_the_derivative_of_the_energy(calc, atoms):
    """F = -dE/dr, by central differences."""
    _, forces, _ = evaluate(calc, atoms)
    step = 1e-4  # A
    for i in range(len(atoms)):
        k, energies = i % 3, []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[i, k] += sign * step
            energies.append(evaluate(calc, moved)[0])
        assert forces[i, k] == pytest.approx(-(energies[0] - energies[1]) / (2 * step), abs=1e-7)


def test_stress_is_the_derivative_of_the_energy(calc):
    """stress = dE/dstrain / V, where strain e takes every vector r to r (1 + e), e symmetric."""
    atoms = structures()[0]
    _, _, stress = evaluate(calc, atoms)
    step = 1e-5
    for i, j in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
        energies = []
        for sign in (1, -1):
            strain = np.zeros((3, 3))
            strain[i, j] += sign * step / 2
            strain[j, i] += sign * step / 2
            energies.append(evaluate(calc, transformed(atoms, np.eye(3) + strain))[0])
        assert stress[i, j] == pytest.approx((energies[0] - energies[1]) / (2 * step) / atoms.get_volume(), abs=1e-8)
    assert (stress == stress.T).all()


@pytest.mark.parametrize("atoms", [*structures(), Atoms("NaCl", [[0, 0, 0], [20, 0, 0]])], ids=str)
def test_hessian_is_symmetric_and_the_derivative_of_the_forces(calc, atoms):
    """H = d^2E/dr dr = -dF/dr is symmetric, and moving the whole structure costs nothing."""
    h = calc.hessian(atoms)
    np.testing.assert_allclose(h, h.T, atol=1e-11)
    np.testing.assert_allclose(h.reshape(len(h), -1, 3).sum(1), 0, atol=1e-11)
    step = 1e-4
    for column in range(0, len(h), 4):
        forces = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[column // 3, column % 3] += sign * step
            forces.append(evaluate(calc, moved)[1].ravel())
        np.testing.assert_allclose(h[:, column], -(forces[0] - forces[1]) / (2 * step), atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The cutoff


def pair(distance):
    """Two atoms of a trimer approach a third one from beyond its cutoff."""
    return Atoms("NaCl2", [[0, 0, 0], [distance, 0, 0], [distance, 2, 0]])


def test_energy_and_forces_are_smooth_through_the_cutoff(calc):
    """Where a neighbour enters, nothing jumps: at 6 A - x the energy has moved by O(x^3), the force by O(x^2)."""
    outside, forces_outside, _ = evaluate(calc, pair(CUTOFF + 0.01))
    energy, forces, _ = evaluate(calc, pair(CUTOFF))
    assert energy == outside
    moved, pushed = [], []
    for x in (0.1, 0.05, 0.025):
        energy, forces, _ = evaluate(calc, pair(CUTOFF - x))
        moved.append(abs(energy - outside))
        pushed.append(np.abs(forces - forces_outside).max())
    for values, order in ((moved, 3), (pushed, 2)):
        assert values[0] > 0
        for far, near in zip(values, values[1:]):  # half the distance: at most 2^-order of it, 10% for the next order
            assert near < 1.1 * far / 2**order
    fine = np.linspace(CUTOFF - 0.02, CUTOFF + 0.02, 41)
    energies = np.array([evaluate(calc, pair(d))[0] for d in fine])
    assert np.abs(np.diff(energies)).max() < 1e-6


def test_edges_beyond_the_cutoff_count_for_exactly_nothing(calc):
    """So a list of neighbours may hold more than it must, and MD need not make it anew each step."""
    for atoms in [*structures()[:2], pair(CUTOFF + 1)]:
        few, many = batch_of([atoms], CUTOFF), batch_of([atoms], CUTOFF + 2)
        beyond = many.vectors.norm(dim=1) >= CUTOFF
        assert beyond.sum() == len(many.senders) - len(few.senders) > 0
        vectors = many.vectors.requires_grad_()
        energy = calc.model(many.numbers, vectors, many.senders, many.row_ptr).sum()
        (gradient,) = torch.autograd.grad(energy, vectors)
        assert (gradient[beyond] == 0).all() and (gradient[~beyond] != 0).any()
        for x, y in zip(energy_forces_stress(calc.model, few), energy_forces_stress(calc.model, many)):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def test_batched_equals_one_by_one(calc):
    """Structures of a batch do not see each other, in any order."""
    many = [*structures(), bulk("Si"), Atoms("H"), *structures()[::-1]]
    for atoms, together in zip(many, calc.predict(many)):
        energy, forces, stress = evaluate(calc, atoms)
        assert together["energy"] == pytest.approx(energy, abs=1e-11)
        np.testing.assert_allclose(together["forces"], forces, atol=1e-12)
        if stress is None:
            assert together["stress"] is None
        else:
            np.testing.assert_allclose(together["stress"], stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]], atol=1e-13)
