"""calc.py against ASE's own optimizers and filters, the official values of the released weights, and new neighbour lists."""

import io
import itertools
import os
import re
import subprocess
import sys
import zipfile

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import Calculator, PropertyNotImplementedError
from ase.constraints import FixAtoms, FixSymmetry
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE

import calc as calc_module
import data
from calc import NequixCalculator, at, matrix_exp, matrix_log
from model import energy_forces_stress, save
from test_data import HERE, batch_of, odd_structures, run
from test_model import SHARED, needs_shared, official_values, released, small_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("calc") / "model.pt"
    save(path, small_model())
    return path


@pytest.fixture
def calc(weights):
    return NequixCalculator(weights, "cpu", "float64")


@pytest.fixture(scope="module")
def mp1():
    return NequixCalculator(released(), "cpu", "float64")


# ----------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_calculator_reproduces_the_official_values(mp1, precision):
    """Structures from the official code in float64 (all of them on a GPU, else the small ones), one after the other through one
    calculator. Float32 forces relative to the largest of a structure; where they vanish by symmetry, to 0.02 eV/A."""
    calc = mp1 if precision == "float64" else NequixCalculator(released())
    assert calc.model.precision == precision
    cases = [c for c in official_values() if len(c["numbers"]) <= (1000 if calc.device.type == "cuda" else 8)]
    assert len(cases) > 10
    worst = dict(energy=0, energies=0, forces=0, relative=0, stress=0)
    for case in cases:
        atoms = Atoms(case["numbers"], case["positions"], cell=case["cell"], pbc=case["pbc"], calculator=calc)
        energy = atoms.get_potential_energy()
        assert atoms.get_potential_energy(force_consistent=True) == energy
        errors = dict(energy=(energy - case["energy"]) / len(atoms), forces=atoms.get_forces() - case["forces"])
        errors["relative"] = errors["forces"] / max(np.linalg.norm(case["forces"], axis=1).max(), 0.02)
        if len(atoms) < 4:
            errors["energies"] = atoms.get_potential_energies().sum() - energy
        if case["stress"] is None:
            with pytest.raises(PropertyNotImplementedError):
                atoms.get_stress()
        else:
            errors["stress"] = atoms.get_stress(voigt=False) - case["stress"]
        worst |= {k: np.maximum(worst[k], np.abs(v).max()) for k, v in errors.items()}  # which keeps a NaN
    if precision == "float64":
        assert worst["energy"] < 1e-6 and worst["energies"] < 1e-9 and worst["forces"] < 1e-6 and worst["stress"] < 1e-7
    else:
        assert worst["energy"] < 2e-5 and worst["energies"] < 1e-5
        assert worst["relative"] < 2e-4 and worst["stress"] < 1e-5


def test_slabs_and_wires_equal_the_same_with_vacuum_periodic(mp1):
    """The official code drops the images unless all three directions are periodic, and is wrong here: so the comparison is
    with a cell that is periodic everywhere and so wide that the images do not meet."""
    slab = fcc111("Pt", (1, 1, 3), vacuum=8)
    wire = Atoms("NaCl", [[0, 0, 0], [2.6, 0.3, 0]], cell=[5.4, 20, 20], pbc=[1, 0, 0])
    skewed = Atoms("Si", cell=[[2.5, 0, 0], [1.2, 2.2, 0.4], [0, 0, 0]], pbc=[1, 1, 0])
    for atoms in (slab, wire, skewed):
        atoms.rattle(0.1, seed=0)
        periodic = atoms.copy()
        if not periodic.cell[2].any():
            periodic.cell[2] = 30 * np.cross(*periodic.cell[:2]) / np.linalg.norm(np.cross(*periodic.cell[:2]))
        periodic.pbc = True
        atoms.calc = periodic.calc = mp1
        assert atoms.get_potential_energy() == pytest.approx(periodic.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(atoms.get_forces(), periodic.get_forces(), atol=1e-9)


def test_energies_are_per_atom_in_the_callers_order(calc):
    atoms = Atoms("NaHNaCl", [[0, 0, 0], [50, 0, 0], [100, 0, 0], [102, 0, 0]], calculator=calc)
    energies = atoms.get_potential_energies()
    assert energies.sum() == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
    for i in (0, 1):
        alone = atoms[[i]]
        alone.calc = calc
        assert energies[i] == pytest.approx(alone.get_potential_energy(), abs=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Neighbour list with a skin


def fresh(calc, atoms):
    return [x.numpy() for x in energy_forces_stress(calc.model, batch_of([atoms], 6.0))]


@pytest.mark.parametrize("pbc", [[1, 1, 1], [1, 1, 0], [0, 0, 0]])
def test_list_with_a_skin_is_exact(calc, pbc):
    """Positions and cell change by steps small and large: the values are always those of a new list, though not every step makes
    one."""
    rng = np.random.default_rng(0)
    atoms, lists = bulk("NaCl", "rocksalt", 5.6) * (2, 1, 2), set()
    atoms.pbc = pbc
    atoms.calc = calc
    for step in range(30):
        atoms.positions += rng.normal(size=(8, 3)) * (0.5 if step % 10 == 9 else 0.02)
        if step % 3 == 0:
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(size=(3, 3)) * 0.004), scale_atoms=step % 2 == 0)
        if step == 15:
            atoms.wrap()
        energy, forces, stress = fresh(calc, atoms)
        assert atoms.get_potential_energy() == pytest.approx(energy[0], abs=1e-10)
        np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-10)
        if all(pbc):
            np.testing.assert_allclose(atoms.get_stress(voigt=False), stress[0], atol=1e-11)
        lists.add(id(calc.listed.batch))
    assert 3 <= len(lists) < 20


def test_list_follows_every_change_of_the_atoms(calc):
    """Elements, number of atoms, periodicity, and a calculator passed from one structure to another."""
    for atoms in odd_structures()[:9]:
        for symbol in ("Na", "Si"):
            for pbc in (atoms.pbc, [False] * 3):
                atoms.symbols, atoms.pbc, atoms.calc = symbol, pbc, calc
                energy, forces, _ = fresh(calc, atoms)
                if np.isfinite(energy[0]):
                    assert atoms.get_potential_energy() == pytest.approx(energy[0], rel=1e-9, abs=1e-9)
                    np.testing.assert_allclose(atoms.get_forces(), forces, rtol=1e-9, atol=1e-9)


def test_list_keeps_nothing_that_the_caller_may_change(calc):
    atoms = bulk("NaCl", "rocksalt", 5.6)
    calc.hessian(atoms)
    atoms.positions[0] += 3.0
    atoms.cell[0] *= 1.3
    assert calc.get_potential_energy(atoms) == pytest.approx(fresh(calc, atoms)[0][0], abs=1e-10)
    calc.atoms.positions[0] -= 1.5
    calc.calculate()
    assert calc.results["energy"] == pytest.approx(fresh(calc, calc.atoms)[0][0], abs=1e-10)


def test_edges_within_the_cutoff_are_those_of_a_list_made_anew():
    """From a list with a skin and room for more, after a move. The edges behind row_ptr[-1] must at least be finite."""
    rng = np.random.default_rng(0)
    for atoms in [*odd_structures()[:40], Atoms("Si", cell=[30, 30, 30], pbc=True)]:
        listed, moved = batch_of([atoms], 6.5), atoms.copy()
        moved.positions += rng.normal(size=moved.positions.shape) * 0.05
        moved.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(size=(3, 3)) * 0.002))
        if len(listed.senders):
            room = lambda t: torch.cat([t, torch.full((9, *t.shape[1:]), t.ndim - 1)])  # as of a CUDA graph
            for k in ("senders", "receivers", "shifts"):
                setattr(listed, k, room(getattr(listed, k)))
        listed.shifts = listed.shifts.double()
        anew = batch_of([moved], 6.0)
        place = anew.positions, data.complete_cell(anew.cell, anew.pbc)
        got = at(listed, *place, 6.0, trim=False)
        assert len(got.senders) == len(listed.senders)
        assert all(((0 <= t) & (t < len(atoms))).all() for t in (got.senders, got.receivers))
        assert torch.isfinite(got.vectors).all() and (got.vectors.abs().sum(1) > 0).all()
        got = at(listed, *place, 6.0)
        assert torch.equal(got.row_ptr, anew.row_ptr) and torch.equal(got.receivers, anew.receivers)
        rows = [torch.cat([b.receivers[:, None], b.senders[:, None], b.vectors], 1).numpy() for b in (got, anew)]
        got, anew = (r[np.lexsort(r.round(9).T[::-1])] for r in rows)
        np.testing.assert_allclose(got, anew, atol=1e-9)


def test_changes_are_those_that_ase_sees(calc):
    atoms = bulk("NaCl", "rocksalt", 5.6)
    calc.get_potential_energy(atoms)
    changes = dict(positions=lambda a: a.rattle(1e-6), numbers=lambda a: a.set_atomic_numbers([11, 12]))
    changes |= dict(cell=lambda a: a.set_cell(a.cell * 1.01), pbc=lambda a: a.set_pbc([1, 1, 0]))
    changes |= dict(none=lambda a: a.copy(), more=lambda a: a.append("Na"))
    for name, change in changes.items():
        other = atoms.copy()
        change(other)
        assert set(calc.check_state(other)) == set(Calculator.check_state(calc, other)), name


@pytest.mark.parametrize("precision, tolerance", [("float64", 0.02), ("float32", 0.05)])
def test_nve_conserves_energy(precision, tolerance):
    """2 atoms of silicon at 600 K, 60 fs; bench_speed.py nve does 1 ps of 64 and 216 atoms."""
    atoms, rng = bulk("Si"), np.random.default_rng(0)
    atoms.rattle(0.02, seed=0)
    atoms.calc = NequixCalculator(released(), "cpu", precision)
    atoms.set_momenta(rng.normal(size=(2, 3)) * np.sqrt(600 * units.kB * atoms.get_masses())[:, None])
    md, energies = VelocityVerlet(atoms, 1 * units.fs), []
    md.attach(lambda: energies.append(atoms.get_total_energy() / len(atoms) * 1000))
    md.run(60)
    assert np.ptp(energies) < 1.0 and abs(np.mean(energies[-20:]) - np.mean(energies[:20])) < tolerance


# ----------------------------------------------------------------------------------------------------------------------
# Relaxation


def test_matrix_functions():
    import scipy.linalg

    m = torch.randn(50, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.15
    expected = torch.from_numpy(np.stack([scipy.linalg.expm(x) for x in m.numpy()]))
    torch.testing.assert_close(matrix_exp(m), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(matrix_log(expected), m, rtol=0, atol=1e-13)


def ase_relaxed(atoms, calc, fmax, steps, mask=None, symprec=None):
    atoms = atoms.copy()
    atoms.calc = calc
    if symprec is not None:
        atoms.set_constraint(FixSymmetry(atoms, symprec))
    optimizer = FIRE(FrechetCellFilter(atoms, mask=mask) if atoms.pbc.all() else atoms, logfile=None)
    converged = optimizer.run(fmax, steps)
    return atoms, atoms.get_potential_energy(), bool(converged), optimizer.nsteps


def distorted():
    """Strained and rattled; a left-handed cell, one shorter than the cutoff, a slab, molecules, atoms alone."""
    out = [bulk("NaCl", "rocksalt", 5.9), bulk("Si", cubic=True), bulk("Pt"), Atoms("CO", cell=[3, 3.3, 3.1], pbc=True)]
    out[3].positions[1] = [0.4, 0.3, 1.3]
    rng = np.random.default_rng(0)
    for atoms in out:
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(size=(3, 3)) * 0.03), scale_atoms=True)
        atoms.rattle(0.08, rng=rng)
    out[1].cell[[0, 1]] = out[1].cell[[1, 0]]
    out += [fcc111("Pt", (1, 1, 3), vacuum=8), molecule("H2O"), Atoms("Na"), Atoms("Na", cell=[4, 4, 4], pbc=True)]
    out[4].rattle(0.1, rng=rng)
    out[5].rattle(0.1, rng=rng)
    return out


MASKS = [None, [1, 1, 1, 0, 0, 0], [0] * 6, [1, 0, 1, 1, 0, 1], np.ones((3, 3)) - np.eye(3)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_relax_takes_the_path_of_ase(calc, mask):
    """In float64 step for step: as many steps, the same positions and cell; whatever is in the batch with it."""
    structures, seen = distorted(), []
    for i, atoms, energy, converged, steps, error in calc.relax(structures, 0.03, 25, cell_mask=mask):
        expected, expected_energy, *rest = ase_relaxed(structures[i], calc, 0.03, 25, mask)
        assert error is None and [converged, steps] == rest, (i, atoms)
        assert energy == pytest.approx(expected_energy, abs=1e-8) == atoms.get_potential_energy()
        np.testing.assert_allclose(atoms.positions, expected.positions, atol=1e-7)
        np.testing.assert_allclose(atoms.cell.array, expected.cell.array, atol=1e-7)
        seen.append(i)
    assert sorted(seen) == list(range(len(structures)))


@pytest.mark.parametrize("mask", MASKS[:2], ids=str)
def test_relax_keeps_symmetry_as_ase(calc, mask):
    """FixSymmetry on a tetragonal, a cubic, a hexagonal and a rhombohedral crystal."""
    pytest.importorskip("spglib")
    rutile, u, v = Atoms("Pt2O4", cell=[4.6, 4.6, 3.0], pbc=True), 0.31, 0.81
    rutile.set_scaled_positions([[0, 0, 0], [0.5] * 3, [u, u, 0], [-u, -u, 0], [v, -v, 0.5], [-v, v, 0.5]])
    hexagonal = Atoms("Si2", cell=[[3, 0, 0], [-1.5, 1.5 * 3**0.5, 0], [0, 0, 5]], pbc=True)
    hexagonal.set_scaled_positions([[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]])
    rhombohedral = bulk("NaCl", "rocksalt", 5.4)
    rhombohedral.set_cell(rhombohedral.cell.array @ (np.eye(3) + 0.03 * MASKS[4]), scale_atoms=True)
    rhombohedral.positions[1] += 0.1
    structures = [rutile, bulk("Si", cubic=True), hexagonal, rhombohedral]
    for atoms in structures:
        atoms.rattle(1e-4, seed=0)  # within symprec
    for i, atoms, energy, converged, steps, error in calc.relax(structures, 0.01, 30, mask, symprec=0.01):
        expected, expected_energy, *rest = ase_relaxed(structures[i], calc, 0.01, 30, mask, symprec=0.01)
        assert error is None and [converged, steps] == rest, (i, atoms)
        assert energy == pytest.approx(expected_energy, abs=1e-8)
        np.testing.assert_allclose(atoms.cell.array, expected.cell.array, atol=1e-7)
        np.testing.assert_allclose(atoms.positions, expected.positions, atol=1e-7)


@needs_shared
def test_relax_reaches_ases_own_minimum(mp1):
    """Small structures from all over WBM, nequix-mp-1, one by one by ASE in float64 and as a batch in float32: to 1 meV/atom."""
    with zipfile.ZipFile(SHARED / "data/wbm-initial-atoms.extxyz.zip") as z:
        members = sorted(z.namelist())
        picks = [members[i] for i in np.linspace(0, len(members) - 1, 3).astype(int)]
        frames = [ase.io.read(io.StringIO(z.read(m).decode()), ":100", format="extxyz") for m in picks]
    structures = [next(a for a in some if len(a) <= 4 + k % 3) for k, some in enumerate(frames)]
    f32 = NequixCalculator(released(), "cpu")
    for i, atoms, energy, converged, steps, error in f32.relax(structures, 0.02, 500):
        _, expected_energy, *_ = ase_relaxed(structures[i], mp1, 0.02, 500)
        assert error is None and abs(energy - expected_energy) / len(atoms) < 1e-3


def test_relax_streams(calc):
    """An endless stream: results come while it is read, and it is read little more than a batch ahead."""
    calc.max_edges, read, seen = 1000, itertools.count(), []
    stream = (Atoms(bulk("NaCl", "rocksalt", 5.6 + 0.01 * (k % 7)), info=dict(k=k)) for k in read)
    for i, atoms, *_, error in itertools.islice(calc.relax(stream, 0.05, 10), 60):
        assert error is None and atoms.info["k"] == i
        seen.append(i)
    assert len(set(seen)) == 60 and next(read) < 80


def test_bad_structures_stop_no_other(calc):
    pytest.importorskip("spglib")
    fixed = bulk("Si")
    fixed.set_constraint(FixAtoms([0]))
    bad = [*BAD.values(), (fixed, "constraints")]
    structures = [bad[k // 2][0] if k % 2 else bulk("Si") for k in range(2 * len(bad))]
    results = {r[0]: r for r in calc.relax(structures, 0.05, 5)}
    assert len(results) == len(structures)
    for k in range(len(structures)):
        _, atoms, energy, converged, steps, error = results[k]
        if k % 2:
            assert re.search(bad[k // 2][1], error) and not converged and np.isnan(energy) and "\n" not in error
        else:
            assert error is None and np.isfinite(energy)
    assert np.isfinite(calc.predict([fixed])[0]["energy"])  # where nothing moves, constraints do not matter
    (result,) = calc.relax([molecule("H2O")], 0.05, 5, symprec=0.01)
    assert "periodic in three" in result[-1]


def test_out_of_memory_halves_the_budget(calc, monkeypatch):
    """The model fails above 700 edges: the results are the same, except of what does not fit at all."""
    small = [bulk("NaCl", "rocksalt", 5.6 + 0.05 * k) for k in range(16)]
    large = bulk("Si", cubic=True) * 4
    expected = {r[0]: r for r in calc.relax(small, 0.03, 8)}

    def limited(model, batch):
        if len(batch.senders) > 700:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return energy_forces_stress(model, batch)

    monkeypatch.setattr(calc_module, "energy_forces_stress", limited)
    results = {r[0]: r for r in calc.relax([*small, large], 0.03, 8)}
    assert calc.max_edges < 5_000 and "out of memory" in results.pop(16)[-1]
    assert results.keys() == expected.keys()
    for k, (_, atoms, energy, *rest) in results.items():
        assert energy == pytest.approx(expected[k][2], abs=1e-9) and tuple(rest) == expected[k][3:]
    with pytest.raises(ValueError, match="structure 16: out of memory"):
        calc.predict([*small, large])
    before = calc.max_edges  # which one structure alone does not lower
    assert "out of memory" in next(calc.relax([large], 0.03, 8))[-1] and calc.max_edges == before


# ----------------------------------------------------------------------------------------------------------------------
# Bad input, command line, weights by name

MIXED = bulk("NaCl", "rocksalt", 5.6)
MIXED.info["occupancy"] = {"0": {"Na": 0.5, "Si": 0.5}, "1": {"Cl": 1.0}}  # as ASE reads it from .cif files
BAD = {
    "empty": (Atoms(), "no atoms"),
    "NaN positions": (Atoms("Na", [[np.nan, 0, 0]]), "not finite"),
    "NaN cell": (Atoms("Na", cell=[np.nan, 3, 3], pbc=True), "not finite"),
    "lacking element": (Atoms("NaFe"), "lacks: Fe"),
    "no element": (Atoms("X"), "unknown element"),
    "element 200": (Atoms([200]), "atomic number 200"),
    "zero volume": (Atoms("Na", cell=[[1, 0, 0], [2, 0, 0], [0, 0, 3]], pbc=True), "zero volume"),
    "no cell": (Atoms("Na", pbc=True), "zero volume"),
    "at one place": (Atoms("Na2", np.zeros((2, 3))), "two atoms 0.00 A apart"),
    "too close": (Atoms("NaCl", [[0, 0, 0], [0, 0, 4.95]], cell=[5, 5, 5], pbc=True), "two atoms 0.05 A apart"),
    "partly occupied": (MIXED, r"site 0 is partly occupied \(Na 0.5, Si 0.5\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_atoms_are_refused(calc, name):
    atoms, words = BAD[name]
    calc.get_potential_energy(bulk("Si"))
    calls = [calc.calculate, calc.get_potential_energy, calc.hessian, lambda a: calc.predict([bulk("Si"), a])]
    for ask in [*calls, calc.get_potential_energy]:  # again: there are no results of the atoms before
        with pytest.raises(ValueError, match=words):
            ask(atoms)


def test_atoms_that_meet_later_are_refused(calc):
    atoms = Atoms("Na2", [[0, 0, 0], [0, 0, 0.15]], calculator=calc)
    atoms.get_potential_energy()
    atoms.positions[1] = 0  # the list still serves
    for ask in (calc.get_potential_energy, calc.hessian):
        with pytest.raises(ValueError, match="not finite: two atoms at one place"):
            ask(atoms)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_around_it(weights, calc, mode):
    """Inside, and afterwards outside: nothing that is kept may be an inference tensor."""
    si = bulk("Si")
    ask = lambda c: (c.get_potential_energy(si), c.hessian(si), c.predict([si])[0]["energy"], *fresh(c, si))
    expected = ask(calc)
    with mode():
        inside = NequixCalculator(weights, "cpu", "float64")
        for c in (inside, calc):
            assert all(map(np.array_equal, ask(c), expected))
    si = bulk("Si", a=5.5)
    assert all(map(np.array_equal, ask(inside), ask(calc)))


def test_after_a_fork(weights):
    """A child of a process whose threads have computed gets the same energy, and does not wait for ever."""
    code = f"""import os, signal, sys
from ase.build import bulk
from calc import NequixCalculator
calc = NequixCalculator({str(weights)!r}, "cpu")
energy = lambda: calc.predict([bulk("Si", cubic=True) * 2])[0]["energy"]
first = energy()
if not os.fork():
    signal.alarm(20)
    os._exit(abs(energy() - first) > 1e-4)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))"""
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "2"}).returncode
        == 0
    )


@pytest.fixture
def command(weights, capsys):
    def command(*arguments, ok=True):
        """What calc.py prints, in this process."""
        arguments += "--weights", weights, "--device", "cpu", "--precision", "float64"
        try:
            calc_module.main(list(map(str, arguments)))
            assert ok
        except SystemExit as e:
            print(e.code)
            assert not ok
        return capsys.readouterr().out

    return command


def test_command_line(weights, command, tmp_path):
    frames = [Atoms(a.numbers, a.positions, cell=a.cell, pbc=a.pbc) for a in distorted()[:6]]
    frames[0].set_constraint(FixAtoms([0]))
    ase.io.write(tmp_path / "a.traj", frames)
    cif, out = tmp_path / "b@1.cif", tmp_path / "out@1.extxyz"  # ASE would split the first name at its @
    ase.io.write(cif, bulk("Si"))
    said = command(tmp_path / "a.traj", cif, "--out", out)
    assert "eV/A" in said and "GPa" in said and len(said.splitlines()) == 3 + 7 + 1, said
    assert said.endswith(f"structures written to {out}: 7\n")
    assert said.startswith(f"{weights}, float64, convolution torch, device cpu\n")
    calc = NequixCalculator(weights, "cpu", "float64")
    out = out.rename(tmp_path / "out.extxyz")
    written = ase.io.read(out, ":")
    for atoms, expected in zip(written, frames):
        expected.set_constraint()
        expected.calc = calc
        assert atoms.get_potential_energy() == pytest.approx(expected.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(atoms.get_forces(), expected.get_forces(), atol=1e-6)
    assert written[1].info["structure"] == f"{tmp_path}/a.traj#1" and "steps" not in written[1].info
    said = command(cif, "--relax", "--steps", 3, "--out", out)
    assert said.splitlines()[-2].endswith("3 not converged") and "steps" in said and "stay" not in said
    assert ase.io.read(out).info["converged"] == False  # noqa: E712, numpy's
    ase.io.write(tmp_path / "slab.traj", fcc111("Pt", (1, 1, 2), vacuum=8))
    assert "not periodic in all three directions stay" in command(tmp_path / "slab.traj", "--relax", "--steps", 1)
    outs = {"none/out.extxyz": "there is no folder", "out.foo": "knows no such format", "out": "no such format"}
    for name, words in (outs | {"out.vasp": "cannot write 2 structures as vasp"}).items():
        with pytest.raises(ValueError, match=words):
            calc_module.check_out(tmp_path / name, 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "spglib", None)
        said = command(cif, "--relax", "--symprec", 0.01, ok=False)
    assert said == "error: import of spglib halted; None in sys.modules: pip install spglib\n"

    ase.io.write(tmp_path / "bad.traj", [bulk("Si"), Atoms("Fe"), bulk("Si")])
    said = command(tmp_path / "bad.traj", ok=False)
    assert "error: elements that the model lacks: Fe" in said and said.endswith("error: 1 of 3 structures failed\n")
    (tmp_path / "text.xyz").write_text("hello\n")
    (tmp_path / "blank.extxyz").write_text("\n")
    assert "error: no structures in" in command(tmp_path / "blank.extxyz", ok=False)
    for bad in ("none.cif", "text.xyz"):
        said = command(tmp_path / bad, ok=False).strip()
        assert said.startswith("error: ") and f"{bad} cannot be read" in said and len(said.splitlines()) == 1
    said = run("calc.py", cif, "--weights", tmp_path / "none.pt", ok=False)
    assert "error: no weights at" in said and "nequix-mp-1" in said
