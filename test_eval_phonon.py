"""eval_phonon.py against phonopy's command line, naive sums, published scores, forces one by one; killed and not; bad input.

The conductivity of MgO too, some ten minutes: KAPPA=mp-1265 python -m pytest -s test_eval_phonon.py -k published
"""

import bz2
import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

import calc
import data
import eval_discovery
import eval_phonon
import train
from calc import NequixCalculator
from eval_phonon import QUANTITIES, main, mode_kappas, read_kappas, score_row
from model import save
from test_calc import MIXED
from test_data import HERE, run
from test_eval_discovery import error_of
from test_model import SHARED, needs_shared, released, small_model

KAPPAS, STRUCTURES = SHARED / "data/kappas_phononDB_PBE_noNAC.json.gz", SHARED / "data/phononDB-PBE-structures.extxyz"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small model; three crystals of which phonopy says what forces they have, in yaml; one with only its C_V."""
    phonopy = pytest.importorskip("phonopy")
    pytest.importorskip("spglib")
    folder = tmp_path_factory.mktemp("phonon")
    save(folder / "model.pt", small_model())
    (folder / "mdr").mkdir()
    rng = np.random.default_rng(0)
    for k, atoms in enumerate([bulk("Si"), bulk("NaCl", "rocksalt", 5.6), bulk("Pt")]):
        cell = phonopy.structure.atoms.PhonopyAtoms(atoms.symbols, cell=atoms.cell.array, positions=atoms.positions)
        ph = phonopy.Phonopy(cell, np.eye(3, dtype=int) * 2, primitive_matrix="auto")
        ph.generate_displacements(distance=0.01)
        n, spring = len(ph.supercell), np.diag(np.full(3, 4.0))  # of every atom to its place: the drift is subtracted
        forces = [np.zeros((n, 3)) for _ in ph.displacements]
        for f, (atom, *u) in zip(forces, ph.displacements):
            f[int(atom)] = -spring @ u + rng.normal(size=3) * 1e-4
            f -= f.mean(0)
        ph.forces = forces
        ph.save(folder / f"mdr/mp-{k}.yaml", settings=dict(force_sets=True, displacements=True))
    (folder / "mdr/mp-2.yaml.bz2").write_bytes(bz2.compress((folder / "mdr/mp-2.yaml").read_bytes()))
    (folder / "mdr/mp-2.yaml").unlink()
    sites = [dict(species=[dict(element="Si")], xyz=x) for x in bulk("Si").positions.tolist()]
    silicon = dict(lattice=dict(matrix=bulk("Si").cell.tolist()), sites=sites)
    entry = dict(mp_id="mp-9", structure=silicon, heat_capacity=40.0)
    (folder / "cv.json.gz").write_bytes(gzip.compress(json.dumps([entry]).encode()))
    return folder


def command(files, *more, fixed=("--device", "cpu", "--precision", "float64", "--workers", 1)):
    return [str(x) for x in (*more, "--weights", files / "model.pt", *fixed)]


def table(path):
    with open(path) as f:
        return {r["material_id"]: r for r in csv.DictReader(f)}


# ----------------------------------------------------------------------------------------------------------------------
# Scores


@needs_shared
def test_the_reference_scores_0_against_itself(tmp_path, capsys):
    main(["kappa", "--reference", str(KAPPAS), "--score", str(KAPPAS), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "103 of 103 materials, 0 without kappa: mean SRE 0.0000, SRME 0.0000" in said and "--srme 0.0000" in said
    assert {r["SRME"] for r in table(tmp_path / "kappa.csv").values()} == {"0.0"}


def rows(rng, q=4, s=3):
    """Two rows: one of each form that the tables come in."""
    modes, weights = rng.random((2, 1, q, s, 6)), rng.integers(1, 9, q)
    tensors = modes.sum((2, 3)) / weights.sum()
    a = dict(kappa_tot_rta=tensors[0].tolist(), mode_kappa_tot_rta=modes[0].tolist(), mode_weights=weights.tolist())
    b = dict(kappa_TOT_ave=tensors[1][:, :3].mean(-1).tolist(), mode_kappa_TOT_ave=modes[1][..., :3].mean(-1).tolist())
    return a, b | dict(weights=weights.tolist())


def test_scores_by_a_naive_loop_and_failures_count_2(tmp_path, capsys):
    rng = np.random.default_rng(0)
    a, b = rows(rng)
    k, true = np.mean(a["kappa_tot_rta"][0][:3]), b["kappa_TOT_ave"][0]
    total = 0
    for q in range(4):
        for s in range(3):
            total += abs(np.mean(a["mode_kappa_tot_rta"][0][q][s][:3]) - b["mode_kappa_TOT_ave"][0][q][s])
    srme, sre = 2 * total / sum(b["weights"]) / (k + true), 2 * abs(k - true) / (k + true)
    column = lambda values: {str(i): v for i, v in enumerate(values)}
    form = lambda ids, rows: {c: column(r.get(c) for r in rows) for c in rows[0]} | {"mp_id": column(ids)}
    predicted = [a, a | dict(kappa_tot_rta=None), a | dict(mode_kappa_tot_rta=[[[[1] * 6]]])]
    (tmp_path / "a.json").write_text(json.dumps(form(["x", "y", "z"], predicted)))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(form(["x", "y", "z", "w"], [b] * 4)).encode()))
    files = "--reference", tmp_path / "b.json.gz", "--score", tmp_path / "a.json", "--out", tmp_path
    main(["kappa", *map(str, files)])
    got = table(tmp_path / "kappa.csv")
    assert [float(got["x"][c]) for c in ("SRE", "SRME")] == pytest.approx([sre, srme], abs=1e-12)
    assert [got[k]["error"] for k in "yw"] == ["no conductivity", "not among the predictions"]
    assert [got[k]["SRME"] for k in "yzw"] == ["2.0"] * 3
    assert "modes (1, 1)" in got["z"]["error"]
    assert f"SRME {(srme + 6) / 4:.4f}" in capsys.readouterr().out
    truth = read_kappas(tmp_path / "b.json.gz")["x"]
    for failed in (dict(has_imag_ph_modes=True), dict(broken_symmetry=True), dict(errors=["no"])):
        assert score_row(a | failed, truth)[1:3] == (2, 2) and score_row(a | failed, truth)[3]


def test_coherences_are_shared_by_heat_capacity():
    rng = np.random.default_rng(0)
    p, c, h = rng.random((1, 2, 3, 6)), rng.random((1, 2, 3, 3, 6)), rng.random((1, 2, 3))
    h[0, 0, :2] = 0  # acoustic modes at Gamma
    expected = p.copy()
    for q in range(2):
        for s in range(3):
            for t in range(3):
                if h[0, q, s] + h[0, q, t]:
                    expected[0, q, t] += 2 * c[0, q, s, t] * h[0, q, s] / (h[0, q, s] + h[0, q, t])
    np.testing.assert_allclose(mode_kappas(p, c, h), expected)


def test_imaginary_modes():
    f = np.ones((3, 6))
    f[0, :3] = -0.009
    assert not eval_phonon.has_imaginary(f)
    for place, value in (((0, 0), -0.011), ((0, 3), -1e-6), ((1, 0), -1e-6)):
        g = f.copy()
        g[place] = value
        assert eval_phonon.has_imaginary(g)


# ----------------------------------------------------------------------------------------------------------------------
# Harmonic phonons


MDR = os.environ.get("MDR", "mp-241 mp-4790").split()  # cubic; a supercell that is not


@pytest.mark.parametrize("which", [0, *(pytest.param(k, marks=needs_shared) for k in MDR)])
def test_reference_quantities_equal_phonopys_command_line(files, tmp_path, which):
    """The commensurate q-points by trying all with denominators to 9."""
    path = files / "mdr/mp-0.yaml" if which == 0 else next((SHARED / "data").rglob(f"{which}.yaml*"))
    ph = eval_phonon.phonons(eval_phonon.read_mdr(path, {}))
    got, yaml = eval_phonon.quantities(ph), pytest.importorskip("yaml")
    tried = np.array(sorted({n / k for k in range(1, 10) for n in range(k)}))
    q = np.stack(np.meshgrid(tried, tried, tried), -1).reshape(-1, 3)
    whole = q @ (np.linalg.inv(ph.primitive_matrix) @ ph.supercell_matrix)
    q = q[(np.abs(whole - np.rint(whole)) < 1e-6).all(1)]
    assert len(q) == len(ph.supercell) / len(ph.primitive)
    code, options = "from phonopy.scripts.phonopy_load import run; run()", "--nonac --fc-calc traditional".split()
    thermal = "--mesh 100 -t --tmin 300 --tmax 300 --cutoff-freq 1e-4".split()
    for more in (["--qpoints", " ".join(map(str, q.ravel()))], thermal):
        command = [sys.executable, "-c", code, path, *options, *more]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    read = lambda name: yaml.safe_load((tmp_path / name).read_text())
    (t,) = read("thermal_properties.yaml")["thermal_properties"]
    frequencies = [band["frequency"] for point in read("qpoints.yaml")["phonon"] for band in point["band"]]
    thermal = [t[k] for k in ("entropy", "free_energy", "heat_capacity")]
    expected = [max(frequencies) * 47.99243, *thermal, min(frequencies)]
    assert [got[q] for q in (*QUANTITIES, eval_phonon.LOWEST)] == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def whole(files):
    """The folder of an uninterrupted run."""
    main(command(files, "mdr", files / "mdr", files / "cv.json.gz", "--out", files / "whole"))
    return files / "whole"


def test_forces_are_those_of_ase_one_by_one(files, whole):
    got = table(whole / "mdr.csv")
    assert [*got] == ["mp-0", "mp-1", "mp-2", "mp-9"] and not any(r["error"] for r in got.values())
    assert float(got["mp-9"]["C_V (J/K/mol), dft"]) == 40 and got["mp-9"]["S (J/K/mol), dft"] == ""
    x = np.load(whole / "forces/mp-1.npz")
    m = eval_phonon.read_mdr(files / "mdr/mp-1.yaml", {})
    atoms = Atoms(x["numbers"], x["positions"], cell=x["cell"], pbc=True)
    calc = NequixCalculator(files / "model.pt", "cpu", "float64")
    cells = eval_phonon.displaced(m, atoms, 0.01).supercells_with_displacements
    assert len(cells) == len(x["fc2_forces"])
    for cell, forces in zip(cells, x["fc2_forces"]):
        alone = Atoms(cell.numbers, cell.positions, cell=cell.cell, pbc=True, calculator=calc)
        np.testing.assert_allclose(alone.get_forces(), forces, atol=1e-9)


KILLED = """
import os, signal, eval_phonon
replace, done = os.replace, []
def once_more(a, b):
    if str(b).endswith("{kind}"):
        if len(done) == {n}:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(b)
    replace(a, b)
os.replace = once_more
eval_phonon.main({arguments})
"""


def test_killed_anywhere_it_ends_the_same(files, whole, tmp_path):
    arguments = command(files, "mdr", files / "mdr", files / "cv.json.gz", "--out", tmp_path)
    for kind, n in (("npz", 2), (".json.gz", 1)):
        code = KILLED.format(kind=kind, n=n, arguments=arguments)
        p = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
        assert p.returncode == -signal.SIGKILL, p.stderr
        assert len([*tmp_path.glob(f"*/*{kind}")]) == n
    kept = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*/mp*") if f.suffix != ".tmp"}
    main([*arguments[:-1], "2"])  # in two processes
    assert all(f.stat().st_mtime_ns == t for f, t in kept.items()) and len(kept) == 5
    a, b = table(tmp_path / "mdr.csv"), table(whole / "mdr.csv")
    for k in b:
        for q in QUANTITIES:
            assert float(a[k][f"{q}, model"]) == pytest.approx(float(b[k][f"{q}, model"]), rel=1e-6)


def test_failures_are_recorded_and_the_rest_goes_on(files, tmp_path, capsys):
    text = (files / "mdr/mp-0.yaml").read_text()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/good.yaml").write_text(text)
    (tmp_path / "in/cut.yaml").write_text(text[:400])
    (tmp_path / "in/iron.yaml").write_text(text.replace("Si", "Fe"))
    (tmp_path / "in/odd.yaml").write_text(text.replace("supercell_matrix:", "supercell_matrix:\n- [1, 1, 1]\nnone:"))
    for _ in range(2):  # a rerun has nothing to do
        main(command(files, "mdr", tmp_path / "in", "--out", tmp_path / "out"))
        said = capsys.readouterr().out
        assert "1 of 4 materials scored" in said and "left out, 1: elements that the model lacks: Fe" in said
    got = table(tmp_path / "out/mdr.csv")
    assert "damaged" in got["cut"]["error"] and got["odd"]["error"] and not got["good"]["error"]
    far = command(files, "mdr", files / "mdr/mp-1.yaml", "--out", tmp_path / "far", "--fmax", 1e-9, "--steps", 1)
    why = "not relaxed to 0.005 eV/A in 15 steps"
    assert error_of(capsys, main, far) == f"error: no material was scored: {why}"
    assert table(tmp_path / "far/mdr.csv")["mp-1"]["error"] == why


def test_what_did_not_fit_the_memory_is_tried_again(files, tmp_path, monkeypatch, capsys):
    """In the relaxation and in a process of the second stage; neither is a result, and the other material is done."""
    two = command(files, "mdr", files / "mdr/mp-0.yaml", files / "mdr/mp-1.yaml", "--out", tmp_path)
    relax, quantities = NequixCalculator.relax, eval_phonon.quantities

    def small_gpu(self, stream, *settings, **how):
        for i, atoms, *rest, error in relax(self, stream, *settings, **how):
            failed = "symprec" in how and "Si" in atoms.symbols
            yield i, atoms, *rest, "out of memory with this structure alone" if failed else error

    def small_cpu(ph):
        raise MemoryError("Unable to allocate 1 TiB")

    monkeypatch.setattr(NequixCalculator, "relax", small_gpu)
    main(two)
    said = capsys.readouterr()
    assert "1 of 1 materials scored" in said.out and "mp-0: out of memory" in said.err and "left out, 1: no" in said.out
    monkeypatch.setattr(NequixCalculator, "relax", relax)
    monkeypatch.setattr(eval_phonon, "quantities", small_cpu)
    assert "out of memory with mp-0: fewer --workers?" in error_of(capsys, main, two)
    monkeypatch.setattr(eval_phonon, "quantities", quantities)
    main(two)
    assert "2 of 2 materials scored" in capsys.readouterr().out


def test_magnetic_moments_lower_the_symmetry(tmp_path):
    """Two sites with moments of their own have a displacement each; without the moments they are one site."""
    phonopy = pytest.importorskip("phonopy")
    given = dict(cell=np.eye(3) * 2.8, scaled_positions=[[0] * 3, [0.5] * 3], magnetic_moments=[2, 1])
    ph = phonopy.Phonopy(phonopy.structure.atoms.PhonopyAtoms(["Fe"] * 2, **given), np.eye(3, dtype=int) * 2)
    ph.generate_displacements(distance=0.01)
    ph.forces = np.zeros((len(ph.displacements), 16, 3))
    ph.save(tmp_path / "fe.yaml", settings=dict(force_sets=True, displacements=True))
    m = eval_phonon.read_mdr(tmp_path / "fe.yaml", {})
    n = [len(eval_phonon.displaced(x, m["atoms"], 0.01).displacements) for x in (m, m | dict(magnetic_moments=None))]
    assert n == [len(ph.displacements), 1] == [2, 1]


# ----------------------------------------------------------------------------------------------------------------------
# Thermal conductivity


def structures(path, q=5):
    """Rock salt, and an element that the small model lacks, with supercells and meshes that take no time."""
    for atoms, name in ((bulk("NaCl", "rocksalt", 5.6), "NaCl"), (bulk("FeO", "rocksalt", 4.3), "FeO")):
        two, mesh = [[2, 0, 0], [0, 2, 0], [0, 0, 2]], [q] * 3
        one = np.eye(3, dtype=int).tolist()
        atoms.info = dict(mp_id=name, name=name, fc2_supercell=two, fc3_supercell=one, q_mesh=mesh)
        ase.io.write(path, atoms, format="extxyz", append=True)
    return path


def test_conductivity_end_to_end(files, tmp_path, capsys):
    """In two stages; between them forces of springs take the place of the small model's, which would be unstable."""
    pytest.importorskip("phono3py")
    given, out, reference = structures(tmp_path / "s.extxyz"), tmp_path / "out", tmp_path / "r.json"
    truth = {c: {"0": v, "1": v} for c, v in rows(np.random.default_rng(0))[1].items()}
    reference.write_text(json.dumps(truth | {"mp_id": {"0": "NaCl", "1": "FeO"}}))
    fixed = "kappa", "--structures", given, "--reference", reference, "--out", out
    main(command(files, *fixed, "--stage", "forces"))
    x = dict(np.load(out / "forces/NaCl.npz"))
    assert x["fc2_forces"].shape[1:] == (16, 3) and x["fc3_forces"].shape[1:] == (2, 3)
    relaxed = Atoms(x["numbers"], x["positions"], cell=x["cell"], pbc=True)
    ph = eval_phonon.displaced(eval_phonon.read_kappa(given)["NaCl"], relaxed, 0.03)
    second, third = ph.phonon_supercells_with_displacements, ph.supercells_with_displacements
    for name, cells, perfect in (("fc2_forces", second, ph.phonon_supercell), ("fc3_forces", third, ph.supercell)):
        u = np.array([c.positions for c in cells]) - perfect.positions
        stretch = u[:, :, None] - u[:, None]
        z = perfect.numbers
        sign = np.sign(z[:, None, None] - z[None, :, None])  # Na pulls harder than it is pushed
        x[name] = -(stretch - 0.5 * stretch**2 * sign).sum(2) / 4
    np.savez_compressed(out / "forces/NaCl.npz", **x)
    main(command(files, *fixed, "--stage", "transport"))
    got = table(out / "kappa.csv")
    assert "lacks: Fe" in got["FeO"]["error"] and got["FeO"]["SRME"] == "2.0"
    row = read_kappas(out / "conductivity.json.gz")["NaCl"]
    assert row["spg_num"] == row["relaxed_space_group_number"] == 225
    assert not row["has_imag_ph_modes"] and not row["errors"]
    weights, tensor = row["mode_weights"], np.array(row["kappa_tot_rta"])[0]
    assert np.sum(weights) == 125 and tensor[0] > 0
    np.testing.assert_allclose(np.array(row["mode_kappa_tot_rta"])[0].sum((0, 1)) / np.sum(weights), tensor, atol=1e-9)
    fixed = "kappa", "--structures", given, "--reference", out / "conductivity.json.gz", "--out", out, "--only", "NaCl"
    main(command(files, *fixed))  # against itself
    assert table(out / "kappa.csv")["NaCl"]["SRME"] == "0.0"


@needs_shared
@pytest.mark.skipif("KAPPA" not in os.environ, reason="a quarter of an hour a material: KAPPA='mp-1265 ...'")
def test_published_conductivities(tmp_path):
    """nequix-mp-1 as on the leaderboard: SRME to 0.03."""
    pytest.importorskip("phono3py")
    ids = os.environ["KAPPA"].split()
    fixed = "--weights", released(), "--structures", STRUCTURES, "--reference", KAPPAS, "--out", tmp_path
    main([*map(str, ("kappa", *fixed)), "--only", *ids])
    published = json.loads((SHARED / "reference/nequix-mp-1-kappa.json").read_text())["materials"]
    for m in published:
        if m["mp_id"] in ids:
            ours = table(tmp_path / "kappa.csv")[m["mp_id"]]
            print(f"{ours}; published: {m}")
            assert float(ours["SRME"]) == pytest.approx(m["srme"], abs=0.03)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def test_bad_input_gives_one_line(files, whole, tmp_path, capsys, monkeypatch):
    mdr = lambda *more: error_of(capsys, main, command(files, "mdr", *more))
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b"[" * 99)[:40])
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "si.cif").write_text("data_Si")
    assert "no file" in mdr(tmp_path / "none.yaml") and "no file" in mdr(tmp_path)
    assert "is damaged" in mdr(tmp_path / "cut.json.gz") and "must be positive" in mdr(files / "mdr", "--n", 0)
    assert "si.cif is neither a phonopy .yaml" in mdr(tmp_path / "si.cif")
    assert "holds a run with fmax 0.0025, not 0.1: choose" in mdr(files / "mdr", "--out", whole, "--fmax", 0.1)
    tf32 = command(files, "mdr", files / "mdr", "--out", whole, fixed=("--device", "cpu", "--tf32"))
    assert "holds a run with precision float64, not tf32: choose" in error_of(capsys, main, tf32)
    assert "run --stage forces first" in mdr(files / "mdr", "--out", tmp_path / "new", "--stage", "transport")
    assert "is no list of structures with an mp_id" in mdr(tmp_path / "list.json")
    (tmp_path / "a").mkdir()
    shutil.copy(files / "mdr/mp-0.yaml", tmp_path / "a/mp-1.yaml")
    assert "both have a material mp-1" in mdr(files / "mdr", tmp_path / "a")
    shutil.copytree(whole, tmp_path / "whole")
    assert "was made of another mp-1" in mdr(tmp_path / "a", "--out", tmp_path / "whole")
    (tmp_path / "whole/forces/mp-0.npz").write_bytes(b"PK")
    assert "mp-0.npz is damaged" in mdr(files / "mdr", "--out", tmp_path / "whole", "--stage", "transport")
    scored = ["kappa", "--score", "none.json", "--reference", tmp_path / "list.json"]
    assert "no table of conductivities" in error_of(capsys, main, scored)
    version = metadata.version
    monkeypatch.setattr(eval_phonon.metadata, "version", lambda name: "4.2.0")
    assert "phono3py 4.2.0: later ones than 3.30 lack MS-SMM19: pip" in error_of(capsys, main, ["kappa"])
    monkeypatch.setattr(eval_phonon.metadata, "version", lambda name: version(f"no-{name}"))
    assert "for no-phonopy: pip install 'phono3py==3.30.*'" in mdr(files / "mdr")


def test_help_names_the_weights_and_says_what_a_command_does(capsys):
    commands = [(calc.main, []), (eval_discovery.main, []), (train.parse_args, []), (main, ["mdr"]), (main, ["kappa"])]
    for entry, command in commands:
        with pytest.raises(SystemExit):
            entry([*command, "-h"])
        said = "".join(capsys.readouterr().out.split())
        assert "nequix-oam-1(fetchedonfirstuse),an.nqxfile" in said and "plaintorch;auto:thefastest" in said
    assert "thermalconductivityof103materialsagainstthatofDFT" in said
    assert "labelled frames from any files that ASE reads" in run("data.py", "pack", "-h")


def test_what_is_wrong_with_a_material(files, tmp_path):
    """Random displacements; a site with part of an atom, and one with two species; in a file whose name ASE would split."""
    text = (files / "mdr/mp-0.yaml").read_text().split("displacements:")[0]
    (tmp_path / "random.yaml").write_text(text + "dataset:\n  displacements: [[[0, 0, 0]]]\n")
    with pytest.raises(ValueError, match="random.yaml has random displacements .phonopy's type 2"):
        eval_phonon.read_mdr(tmp_path / "random.yaml", {})
    text = (files / "mdr/mp-0.yaml").read_text()
    for first, end in (("primitive_matrix:", "supercell_matrix:"), ("primitive_cell:", "unit_cell:")):
        text = text[: text.index(first)] + text[text.index(end) :]
    (tmp_path / "unit.yaml").write_text(text)  # phonopy's default has changed
    assert eval_phonon.read_mdr(tmp_path / "unit.yaml", {})["primitive"] == "auto"
    site = lambda *species: dict(species=[dict(element=e, occu=x) for e, x in species], xyz=[0, 0, 0])
    structure = lambda last: dict(lattice=dict(matrix=np.eye(3) * 4), sites=[site(("Na", 1)), last])
    assert str(eval_phonon.from_pymatgen(structure(site(("Cl", 1.0))), "x").symbols) == "NaCl"
    for last in (site(("Cl", 0.5)), site(("Cl", 0.5), ("Br", 0.5))):
        with pytest.raises(ValueError, match="x: site 1 is disordered.*Cl"):
            eval_phonon.from_pymatgen(structure(last), "x")
    info = dict(mp_id="x", name="x", fc2_supercell=[1], fc3_supercell=[1], q_mesh=[1]) | MIXED.info
    ase.io.write(tmp_path / "mixed@1.extxyz", Atoms(MIXED, info=info))
    mixed = eval_phonon.read_kappa(tmp_path / "mixed@1.extxyz")["x"]["atoms"]
    with pytest.raises(ValueError, match="site 0 is partly occupied"):
        data.check_geometry(mixed)


def test_workers_of_a_killed_process_end(tmp_path):
    code = (
        "import concurrent.futures, multiprocessing, os, signal\n"
        "from eval_phonon import end_with_parent\n"
        "pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), end_with_parent)\n"
        "print(pool.submit(os.getpid).result(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=HERE)
    assert said.returncode == -signal.SIGKILL
    for _ in range(100):
        try:
            os.kill(int(said.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def test_official_files_are_fetched_once_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fetched = []

    def download(url, path):
        fetched.append(url)
        path.write_text('<a href="mp-1.yaml.bz2">x</a> <a href="../other.tar">y</a>')

    monkeypatch.setattr(eval_phonon.data, "download", download)
    for _ in range(2):
        assert str(eval_phonon.fetch_mdr()) == "data/phonon/mdr"
        assert "wrong md5 (damaged?): delete it" in error_of(capsys, main, ["kappa", "--score", "none.json"])
    given = [eval_phonon.MDR, f"{eval_phonon.MDR}mp-1.yaml.bz2", "https://ndownloader.figshare.com/files/59988539"]
    assert fetched == given
