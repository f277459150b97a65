"""eval_discovery.py against ASE's relaxations one by one, known scores of published predictions, naive loops; killed and not.

All 60 relaxations, not 3: RELAXATIONS=60 python -m pytest -s test_eval_discovery.py -k ase (half an hour on a CPU)
"""

import csv
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import zipfile

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

import eval_discovery
from calc import NequixCalculator
from eval_discovery import E_DFT, E_FORM, HULL, main, metrics, read_parts, read_predictions
from eval_discovery import read_structures, read_table, score, to_atoms
from model import save
from test_calc import MIXED, ase_relaxed
from test_data import HERE
from test_model import SHARED, needs_shared, released, small_model

SUMMARY, WBM = SHARED / "data/wbm-summary-partial.csv.gz", SHARED / "data/wbm-initial-atoms.extxyz.zip"
COLUMNS, N = ["material_id", E_DFT, E_FORM], 12
pd = pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small model, crystals in a zip of each form, and their summary."""
    folder = tmp_path_factory.mktemp("discovery")
    save(folder / "model.pt", small_model())
    rng, structures = np.random.default_rng(0), []
    for k in range(N):
        atoms = [bulk("NaCl", "rocksalt", 5.6), bulk("Si"), bulk("Pt"), bulk("NaCl", "rocksalt", 5.4)][k % 4]
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(size=(3, 3)) * 0.02), scale_atoms=True)
        atoms.rattle(0.05, rng=rng)
        structures.append(atoms)
    with zipfile.ZipFile(folder / "one.zip", "w") as z:  # as the official one: the id is the name
        for k, atoms in enumerate(structures):
            ase.io.write(folder / "one.extxyz", atoms)
            z.write(folder / "one.extxyz", f"wbm-1-{k}.extxyz")
    for k, atoms in enumerate(structures):
        atoms.info["material_id"] = f"wbm-1-{k}"
    with zipfile.ZipFile(folder / "many.zip", "w") as z:
        for k in range(3):
            ase.io.write(folder / "many.extxyz", structures[k::3])
            z.write(folder / "many.extxyz", f"part-{k}.extxyz")
    hulls = [0.02 * (k % 7) - 0.03 if k != 3 else "" for k in range(N)]
    rows = [[f"wbm-1-{k}", 0.1 * k - 2, 0.01 * k, hulls[k], k % 2 == 0] for k in range(N)]
    write_csv(folder / "summary.csv", [*COLUMNS, HULL, "unique_prototype"], rows)
    return folder


def write_csv(path, header, rows):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    return path


def command(files, out, *more, structures="many.zip"):
    fixed = "--weights", files / "model.pt", "--structures", files / structures, "--summary", files / "summary.csv"
    return [str(x) for x in (*fixed, "--out", out, "--device", "cpu", "--precision", "float64", "--steps", 30, *more)]


def predictions(out):
    with gzip.open(out / "predictions.csv.gz", "rt") as f:
        return {r["material_id"]: r for r in csv.DictReader(f)}


def same(out, expected):
    """Energies to 1e-6 eV/atom, flags and steps exactly: what shares a batch changes the rounding."""
    a, b = predictions(out), predictions(expected)
    assert a.keys() == b.keys()
    for k in a:
        assert all(a[k][c] == b[k][c] for c in ("steps", "converged", "error")), k
        assert float(a[k]["e_form_per_atom"]) == pytest.approx(float(b[k]["e_form_per_atom"]), abs=1e-6)


@pytest.fixture(scope="module")
def whole(files):
    """The folder of an uninterrupted run."""
    main(command(files, files / "whole"))
    return files / "whole"


def error_of(capsys, main, arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main([str(x) for x in arguments])
    said = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 1 and said[-1].startswith("error: ") and len(said) == 1, said
    return said[-1]


# ----------------------------------------------------------------------------------------------------------------------
# Scores


@needs_shared
def test_published_predictions_get_their_known_scores():
    summary = read_table(SUMMARY)
    for peer, mae, f1 in (("chgnet-0.3.0", 0.061, 0.663), ("mace-mp-0", 0.055, 0.6681)):
        error = read_predictions(SHARED / f"data/wbm_peers/{peer}.csv.gz", summary)
        m = score(summary, error, np.full(len(error), np.nan))["all"]
        assert m["rows"] == 256_963 and m["  with a DFT hull distance"] == 52_975
        assert m["MAE (eV/atom)"] == pytest.approx(mae, abs=5e-4) and m["F1"] == pytest.approx(f1, abs=5e-4)
    there = np.isfinite(error)
    assert (~there).sum() == 7735 + 6  # missing, and off by more than 5 eV/atom
    assert metrics(error[there], summary[HULL][there], error[there])["F1"] == pytest.approx(0.6793, abs=5e-5)


def naive(error, hull, distance, srme, prevalence):
    tp = fp = tn = fn = 0
    for e, h in zip(error, hull):
        stable, called = h <= 0, not np.isnan(e) and h + e <= 0
        tp, fp = tp + (stable and called), fp + (not stable and called)
        tn, fn = tn + (not stable and not called), fn + (stable and not called)
    p, r, kept = tp / (tp + fp), tp / (tp + fn), [(e, h) for e, h in zip(error, hull) if not np.isnan(e)]
    h, y = np.array([h for _, h in kept]), np.array([h + e for e, h in kept])
    f1, d = 2 * p * r / (p + r), np.mean(distance)
    out = {"F1": f1, "precision": p, "recall (TPR)": r, "FPR": fp / (fp + tn), "accuracy": (tp + tn) / len(error)}
    out |= {"DAF": p / (prevalence or (tp + fn) / len(error)), "MAE (eV/atom)": np.mean(np.abs(y - h))}
    out |= {"RMSE (eV/atom)": np.sqrt(np.mean((y - h) ** 2)), "RMSD / (V/n)^(1/3)": d}
    out["R2 of hull distances"] = 1 - np.sum((y - h) ** 2) / np.sum((h - h.mean()) ** 2)
    out["CPS-1"] = 0.5 * f1 + 0.4 * (1 - srme / 2) + 0.1 * min(max(1 - d / 0.15, 0), 1)
    return out


def test_metrics_by_a_naive_loop():
    """All three subsets, with missing predictions."""
    rng, n = np.random.default_rng(0), 30_000
    hull, error, distance = rng.normal(0.1, 0.2, n), rng.normal(0.01, 0.1, n), rng.uniform(0, 0.2, n)
    error[rng.random(n) < 0.02] = np.nan
    unique = rng.random(n) < 0.8
    summary = pd.DataFrame({HULL: hull, "unique_prototype": np.where(unique, "True", "False")})
    table = score(summary, error, distance, 0.446)
    best = sorted(np.flatnonzero(unique & np.isfinite(error)), key=lambda k: hull[k] + error[k])[:10_000]
    rows = {"all": np.arange(n), "unique prototypes": np.flatnonzero(unique), "10k most stable": np.array(best)}
    assert table.keys() == rows.keys()
    for subset, i in rows.items():
        prevalence = (hull[unique] <= 0).mean() if subset == "10k most stable" else None
        expected = naive(error[i], hull[i], distance[i], 0.446, prevalence)
        assert {k: v for k, v in table[subset].items() if k in expected} == pytest.approx(expected), subset
    for name, rest in (("F1", "MAE (eV/atom)"), ("CPS-1", "F1")):
        unlabelled = metrics(error, hull * np.nan if name == "F1" else hull, distance)
        assert name not in unlabelled and rest in unlabelled


def test_cps_of_the_paper():
    """Published for Nequix MP: F1 0.751, RMSD 0.085, SRME 0.446, CPS 0.729."""
    hull, error = np.repeat([-1.0, 1.0], [1000, 1000]), np.zeros(2000)
    error[:249], error[1000:1249] = 2, -2  # 751 true, 249 false positives and negatives each
    assert metrics(error, hull, np.full(2000, 0.085), 0.446)["CPS-1"] == pytest.approx(0.729, abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def test_run_is_the_calculators(files, whole, capsys):
    """Both forms of zip, predictions and structures as calc.relax has them; --score on what was written."""
    calc = NequixCalculator(files / "model.pt", "cpu", "float64")
    structures = [to_atoms(*s) for s in read_structures(files / "one.zip", {f"wbm-1-{k}" for k in range(N)})]
    relaxed = {r[1].info["material_id"]: r for r in calc.relax(structures, 0.02, 30)}
    main(command(files, files / "one", structures="one.zip"))
    same(files / "one", whole)
    summary, got = read_table(files / "summary.csv"), predictions(whole)
    written = {a.info["material_id"]: a for a in ase.io.read(whole / "relaxed.extxyz", ":")}
    assert list(got) == summary.index.tolist() and len(written) == N
    for k, (_, atoms, energy, converged, steps, error) in relaxed.items():
        assert float(got[k]["energy"]) == pytest.approx(energy, abs=1e-6) and got[k]["converged"] == str(converged)
        e_form = summary[E_FORM][k] + (energy - summary[E_DFT][k]) / len(atoms)
        assert float(got[k]["e_form_per_atom"]) == pytest.approx(e_form, abs=1e-6) and int(got[k]["steps"]) == steps
        np.testing.assert_allclose(written[k].positions, atoms.positions, atol=1e-6)
        assert written[k].get_potential_energy() == pytest.approx(energy, abs=1e-6)
    capsys.readouterr()
    main(command(files, whole, "--srme", 0.5))  # nothing is left to do
    said = capsys.readouterr().out
    assert f"cpu, float64, convolution torch, fmax 0.02 eV/A, 30 steps; done before: {N} of {N}" in said
    assert len([*whole.glob("parts/*")]) == 1
    table = said[said.index("column e_form") :]
    scored = "--score", whole / "predictions.csv.gz", "--summary", files / "summary.csv", "--out", files / "p"
    main([*map(str, scored), "--srme", "0.5"])
    assert capsys.readouterr().out.endswith(table)
    assert "unique prototypes" in table and "left out: 1 rows without a DFT hull distance" in table
    assert "left out: 10k" in table and "left out: RMSD" in table and "left out: CPS-1" in table


KILLED = """
import os, signal, eval_discovery
left, to_frame = int({frames}), eval_discovery.to_frame

def last_words(atoms):
    global left
    left -= 1
    return to_frame(atoms) if left >= 0 else os.kill(os.getpid(), signal.SIGKILL)

eval_discovery.to_frame = last_words
eval_discovery.main({arguments})
"""


def test_killed_and_rerun(files, whole, tmp_path):
    """SIGKILL after some structures, twice, with half a frame left behind; then a part of the rest, and all."""
    for _ in range(2):
        code = KILLED.format(frames=4, arguments=command(files, tmp_path / "run"))
        p = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
        assert p.returncode == -signal.SIGKILL, p.stderr
    parts = sorted(tmp_path.glob("run/parts/*"))
    done = [re.findall(r"material_id=(\S+)", f.read_text()) for f in parts]
    assert [*map(len, done)] == [4, 4] and len({*sum(done, [])}) == 8
    assert not (tmp_path / "run/predictions.csv.gz").exists()
    for part, (first, *_), other in zip(parts, done, sorted(predictions(whole).keys() - sum(done, []))):
        lines = part.read_text().splitlines(keepends=True)
        frame = "".join(lines[: int(lines[0]) + 2]).replace(f"={first} ", f"={other} ")
        with open(part, "a") as f:
            f.write(frame[:-3])  # of another structure, cut in the middle of a number
    kept = [f.read_bytes() for f in parts]
    main(command(files, tmp_path / "run", "--n", 4))
    assert len(predictions(tmp_path / "run")) == 4
    main(command(files, tmp_path / "run"))
    same(tmp_path / "run", whole)
    assert [f.read_bytes() for f in parts] == kept and len(ase.io.read(tmp_path / "run/relaxed.extxyz", ":")) == N


def test_two_processes_go_on_from_one(files, whole, tmp_path):
    main(command(files, tmp_path / "run", "--n", 5))
    torchrun = f"{sys.executable} -m torch.distributed.run --nproc_per_node=2 --standalone eval_discovery.py".split()
    out = subprocess.run([*torchrun, *command(files, tmp_path / "run")], cwd=HERE, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert f"done before: 5 of {N}" in out.stdout and "2 x cpu" in out.stdout and out.stdout.count("MAE (eV/atom)") == 1
    assert len(list(tmp_path.glob("run/parts/*"))) == 3
    same(tmp_path / "run", whole)


def test_failures_count_as_unstable_and_are_told(files, tmp_path, capsys):
    """An element that the model lacks, a site with parts of two atoms, and a row without a structure."""
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as z:
        for k, atoms in enumerate([bulk("Si"), bulk("Fe"), bulk("Pt"), MIXED]):
            ase.io.write(tmp_path / "s.extxyz", atoms)
            z.write(tmp_path / "s.extxyz", f"wbm-1-{k}.extxyz")
    summary = write_csv(tmp_path / "s.csv", [*COLUMNS, HULL], [[f"wbm-1-{k}", 0, 0, -5 + 3 * k] for k in range(5)])
    for _ in range(2):  # a rerun has nothing to do
        main(command(files, tmp_path / "run", "--structures", tmp_path / "s.zip", "--summary", summary))
        said = capsys.readouterr().out
        assert "no prediction for 1: elements that the model lacks: Fe" in said
        assert "no prediction for 1: site 0 is partly occupied (Na 0.5, Si 0.5)" in said
        assert "no prediction for 1: not in " in said
    rows = predictions(tmp_path / "run")
    assert rows["wbm-1-1"]["energy"] == rows["wbm-1-1"]["e_form_per_atom"] == rows["wbm-1-4"]["steps"] == ""
    assert "lacks: Fe" in rows["wbm-1-1"]["error"] and "2 of 5 relaxed" in said
    assert len(ase.io.read(tmp_path / "run/relaxed.extxyz", ":")) == 2


@needs_shared
def test_parity_with_ase(tmp_path):
    """nequix-mp-1 in float64 on structures of at most 12 atoms (of 4, if few) from all over WBM, against ASE's FIRE on its
    FrechetCellFilter one by one: steps and flags are the same, energies to 1e-6 eV/atom."""
    n = int(os.environ.get("RELAXATIONS", 3))
    some = read_table(SUMMARY).sample(3 * n + 20, random_state=0)
    atoms_of = {k: to_atoms(k, frame) for k, frame in read_structures(WBM, some.index)}
    some = some[[len(atoms_of[k]) <= (12 if n > 10 else 4) for k in some.index]][:n]
    rows = list(some[COLUMNS[1:]].itertuples(name=None))
    write_csv(tmp_path / "s.csv", COLUMNS, rows)
    files = "--weights", released(), "--structures", WBM, "--summary", tmp_path / "s.csv", "--out", tmp_path / "run"
    main([*map(str, files), "--device", "cpu", "--precision", "float64"])
    calc, got, off = NequixCalculator(released(), "cpu", "float64"), predictions(tmp_path / "run"), []
    for k, dft, dft_e_form in rows:
        atoms, energy, converged, steps = ase_relaxed(atoms_of[k], calc, 0.02, 500)
        off.append(abs(float(got[k]["energy"]) - energy) / len(atoms))
        print(f"{k} {atoms.symbols}: {off[-1]:.1e} eV/atom, {got[k]['steps']} steps, ASE {steps}, {converged}")
        assert [got[k]["converged"], int(got[k]["steps"])] == [str(converged), steps]
        e_form = dft_e_form + (energy - dft) / len(atoms)
        assert off[-1] < 1e-6 and float(got[k]["e_form_per_atom"]) == pytest.approx(e_form, abs=1e-6)
    counts, _ = np.histogram(np.log10(np.maximum(off, 1e-15)), range(-15, -4))
    print("eV/atom: " + ", ".join(f"1e{e}: {c}" for e, c in zip(range(-15, -5), counts)))
    assert len(got) == len(off) == n


@needs_shared
def test_rmsd():
    """Of DFT-relaxed structures: rattled, the same, missing, not asked for, and of something else."""
    pytest.importorskip("pymatgen")
    from eval_phonon import from_pymatgen

    with gzip.open(SHARED / "data/wbm-random-pbe52-equilibrium-2025.1.json.gz") as f:
        atoms = {e["material_id"]: from_pymatgen(e["structure"], "") for e in json.load(f)[:4]}
    frames, first = {k: eval_discovery.to_frame(a) for k, a in atoms.items()}, next(iter(atoms))
    a = atoms[first]
    still = a.positions.copy()
    a.rattle(0.05, seed=0)
    moved = {k: eval_discovery.to_frame(a) if k == first else frames[k] for k in [*frames][:3]}
    out = eval_discovery.rmsds([*frames, "other"], moved, frames)
    d = a.positions - still
    expected = np.sqrt(((d - d.mean(0)) ** 2).sum(1).mean()) / (a.get_volume() / len(a)) ** (1 / 3)
    assert out[:4] == pytest.approx([expected, 0, 0, 1], abs=1e-4) and np.isnan(out[4])
    lone = eval_discovery.to_frame(Atoms("Xe", cell=[4, 4, 4], pbc=True))
    assert eval_discovery.rmsd((lone, frames[first])) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def test_what_did_not_fit_the_memory_is_tried_again(files, tmp_path, monkeypatch, capsys):
    """It is not the structure's fault, so it is no result: a rerun computes it, and nothing else."""
    relax, given = NequixCalculator.relax, []

    def small_memory(self, stream, *settings):
        for index, (i, atoms, *rest, error) in enumerate(relax(self, stream, *settings)):
            given.append(atoms.info["material_id"])
            yield i, atoms, *rest, "out of memory with this structure alone" if index == 1 and len(given) < 9 else error

    monkeypatch.setattr(NequixCalculator, "relax", small_memory)
    for failed in (1, 0):
        main(command(files, tmp_path, "--n", 4))
        said = capsys.readouterr()
        assert f"{4 - failed} of 4 relaxed" in said.out and ("a rerun tries it again" in said.err) == bool(failed)
    assert len(given) == 5 and given[4] == given[1] and len([*read_parts(tmp_path)]) == 4


def test_bad_input_gives_one_line(files, whole, tmp_path, capsys, monkeypatch):
    on = lambda *more: error_of(capsys, main, command(files, tmp_path / "run", *more))
    damaged = bytearray((files / "many.zip").read_bytes())
    damaged[200:240] = b"x" * 40
    (tmp_path / "damaged.zip").write_bytes(damaged)
    (tmp_path / "cut.zip").write_bytes(damaged[:1000])
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress((files / "summary.csv").read_bytes())[:100])
    write_csv(tmp_path / "columns.csv", ["material_id", E_FORM], [["wbm-1-0", 0]])
    write_csv(tmp_path / "ids.csv", COLUMNS, [["mp-1", 0, 0]])
    write_csv(tmp_path / "twice.csv", COLUMNS, [["wbm-1-1", 0, 0]] * 2)
    write_csv(tmp_path / "words.csv", COLUMNS, [["wbm-1-1", "lots", 0]])
    write_csv(tmp_path / "no_id.csv", COLUMNS[1:], [[0, 0]])
    (tmp_path / "empty.csv").touch()
    assert "damaged.zip:part-0.extxyz#0: " in on("--structures", tmp_path / "damaged.zip")
    assert "nor a whole zip" in on("--structures", tmp_path / "cut.zip")
    assert "none.zip" in on("--structures", tmp_path / "none.zip")
    assert "no column uncorrected_energy, but e_form" in on("--summary", tmp_path / "columns.csv")
    assert "the ids do not match" in on("--summary", tmp_path / "ids.csv")
    assert "ids twice: wbm-1-1" in on("--summary", tmp_path / "twice.csv")
    for name in ("cut.csv.gz", "words.csv", "no_id.csv", "empty.csv"):
        assert f"{name} is damaged" in on("--summary", tmp_path / name)
    assert "none.csv" in on("--summary", tmp_path / "none.csv")
    assert "must be positive" in on("--n", 0)
    for more, words in (("--fmax", 0.05), "fmax 0.02, not 0.05"), (("--tf32",), "precision float64, not tf32"):
        assert f"holds a run with {words}: choose" in error_of(capsys, main, command(files, whole, *more))
    assert "structures" in error_of(capsys, main, command(files, whole, structures="one.zip"))
    (tmp_path / "older/parts").mkdir(parents=True)
    (tmp_path / "older/parts/1-0.extxyz").write_text("1")
    assert "holds a run with weights None, not " in error_of(capsys, main, command(files, tmp_path / "older"))
    assert "--score takes neither" in on("--score", tmp_path / "ids.csv", "--relaxed", files / "one.zip")
    for column, ids, words in (("x", "wbm-1-1", "no column e_form"), ("e_form_per_atom_x", "mp-1", "ids do not match")):
        scored = write_csv(tmp_path / "p.csv", ["material_id", column], [[ids, 0]])
        assert words in error_of(capsys, main, ["--summary", files / "summary.csv", "--score", scored])
    for name, more in (("pandas", []), ("pymatgen", ["--relaxed", files / "one.zip"])):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, name, None)
            assert f"pip install {name}" in on(*more)


def test_official_files_are_fetched_once_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fetched = []

    def download(url, path):
        fetched.append(url)
        path.write_bytes(b"not it")

    monkeypatch.setattr(eval_discovery.data, "download", download)
    for _ in range(2):
        assert "wbm-summary.csv.gz has the wrong md5" in error_of(capsys, main, ["--score", "p.csv"])
    assert fetched == ["https://ndownloader.figshare.com/files/64706751"]
