"""distill.py: labels against the calculator, first frames against ASE, the rules of the split, killed against uninterrupted."""

import bz2
import gzip
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.data import chemical_symbols, covalent_radii
from ase.neighborlist import neighbor_list

import data
import distill
import model as nequix
from calc import NequixCalculator
from data import EXCLUDED, TEST, TRAIN, VAL, PackedSet
from test_data import HERE
from test_model import SHARED, needs_shared
from test_train import go

GROUPS = [group.split() for group in distill.GROUPS.split(",")]
HELD_OUT = HERE / "records/held_out.txt"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Random weights, for elements of many groups."""
    torch.manual_seed(0)
    numbers = [1, 3, 8, 11, 13, 14, 16, 17, 19, 29, 31, 32, 34, 35, 47, 78]
    statistics = dict(atomic_numbers=numbers, atom_energies=[-0.1 * z for z in numbers], avg_n_neighbors=40.0)
    config = dict(hidden="8x0e+4x1o", lmax=1, layers=2, radial_size=16, cutoff=4.5, scale=60.0, shift=0.2)
    path = tmp_path_factory.mktemp("teacher") / "model.pt"
    nequix.save(path, nequix.Nequix(config | statistics).float())
    return path


@pytest.fixture(scope="module")
def structures(tmp_path_factory):
    """Crystals, a slab, a molecule, two from WBM, one that the teacher lacks, one that can't be, and one that is held out."""
    crystals = [bulk("NaCl", "rocksalt", 5.6), bulk("Si"), bulk("Cu", cubic=True), bulk("LiBr", "rocksalt", 5.5)]
    crystals += [bulk("KCl", "cesiumchloride", 3.6), bulk("GaSe", "zincblende", 5.9), fcc111("Ag", (1, 1, 3), vacuum=6)]
    crystals += [molecule("H2O"), bulk("Fe"), Atoms("Cu2", cell=[0, 0, 0], pbc=True), bulk("GeO", "rocksalt", 4.5)]
    crystals += [bulk(name, "zincblende", 5.9) for name in ("AlCl", "AgO", "CuAl", "LiS", "NaBr", "SiGe", "CuGa")]
    for k, atoms in enumerate(crystals):
        atoms.info["material_id"] = f"wbm-1-{k}" if k >= 11 else f"crystal-{k}"
    path = tmp_path_factory.mktemp("structures") / "crystals.extxyz"
    ase.io.write(path, crystals)
    return path


def made(out, structures, teacher, frames=60):
    distill.distill([structures], teacher, frames, out, ["OGe"], "cpu")
    return PackedSet(out, cutoff=4.5)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, structures, teacher):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "BLOCK", 8)
        return made(tmp_path_factory.mktemp("taught") / "set", structures, teacher, 320)


def frames_of(packed):
    energy, forces, stress = (packed.arrays[k].numpy() for k in ("energy", "forces", "stress"))
    for i in range(len(packed.ids)):
        yield packed.atoms(i), energy[i], forces[slice(*packed.offsets[i : i + 2])], stress[i]


def formula(atoms):
    return distill.formulas(np.bincount(atoms.numbers, minlength=119)[None])[0]


def test_labels_are_the_calculators(taught, teacher):
    frames = list(frames_of(taught))
    assert len(frames) == 320 and max(len(atoms) for atoms, *_ in frames) > 20
    results = NequixCalculator(teacher, "cpu").predict([atoms for atoms, *_ in frames])
    for (atoms, energy, forces, stress), r in zip(frames, results):
        assert energy == pytest.approx(r["energy"], abs=1e-5 * len(atoms))
        np.testing.assert_allclose(forces, r["forces"], atol=2e-5 * max(1, np.abs(forces).max()))
        if r["stress"] is None:
            assert np.isnan(stress).all() and not atoms.pbc.all()
        else:
            np.testing.assert_allclose(stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]], r["stress"], atol=2e-5)
    assert (taught.n_edges == taught.count_edges()).all()


def test_what_is_excluded(taught):
    bad = []
    for atoms, _, forces, _ in frames_of(taught):
        i, j, d = neighbor_list("ijd", atoms, 4.5)
        near = (d / (covalent_radii[atoms.numbers[i]] + covalent_radii[atoms.numbers[j]])).min(initial=np.inf)
        bad.append(np.linalg.norm(forces, axis=1).max() > 20 or near < 0.5)
    assert ((taught.split == EXCLUDED) == bad).all() and taught.meta["counts"]["excluded"] == sum(bad)


def test_nothing_unphysical_is_trained_on(tmp_path, structures, teacher, monkeypatch):
    monkeypatch.setattr(distill, "MAX_FORCE", 2.0)
    monkeypatch.setattr(distill, "NEAREST", 0.9)
    packed = made(tmp_path / "set", structures, teacher)
    counts = packed.meta["counts"]
    assert counts["(too strong)"] > 0 and counts["(too near)"] > 0 and counts["train"] > 0
    for k, (_, _, forces, _) in enumerate(frames_of(packed)):
        assert packed.split[k] == EXCLUDED or np.linalg.norm(forces, axis=1).max() <= 2


def test_frames_of_a_chain_go_downhill(taught):
    """Frame k + 1 of a chain is frame k after a step, by the labels of frame k. A block has its frames step by step."""
    frames, block = list(frames_of(taught)), 8
    for b in range(0, 80, block):
        m = min(block, 80 - b)
        for c in range(3 * m):
            (atoms, _, forces, stress), (after, *_) = frames[4 * b + c], frames[4 * b + c + m]
            assert taught.name(4 * b + c).rsplit(".")[0] == taught.name(4 * b + c + m).rsplit(".")[0]
            steps = np.minimum(0.02, 0.1 / np.linalg.norm(forces, axis=1).clip(1e-30))
            strain = 0 if np.isnan(stress).any() else np.clip(0.3 * stress, -0.02, 0.02)
            expected = (atoms.positions + forces * steps[:, None]) @ (np.eye(3) - strain)
            np.testing.assert_allclose(after.positions, expected, atol=1e-5)
            np.testing.assert_allclose(after.cell.array, atoms.cell.array @ (np.eye(3) - strain), atol=1e-5)
            assert (after.numbers == atoms.numbers).all() and (after.pbc == atoms.pbc).all()


class NotRandom:
    """Of `vary`: nothing exchanged, nothing strained, nothing rattled, the median size."""

    def random(self, size):
        return np.ones(size)

    def normal(self, loc=0.0, scale=1.0, size=None):
        return np.full(size, loc)

    def uniform(self, low, high, size):
        return np.full(size, 1.0)

    def integers(self, high, size):
        return np.zeros(size, int)


def test_repeats_are_those_of_ase(structures):
    crystals = ase.io.read(structures, ":")
    s = distill.read_structures([structures], range(119))
    assert len(s["ids"]) == len(crystals) - 1  # but for the one without a volume
    crystals = [atoms for atoms in crystals if not atoms.pbc.all() or atoms.cell.volume > 0]
    a, _ = distill.vary(s, np.arange(len(crystals)), distill.neighbours([]), (), NotRandom())
    a = {k: v.numpy() for k, v in a.items()}
    at = np.cumsum(np.append(0, a["n_atoms"]))
    for k, atoms in enumerate(crystals):
        got = Atoms(
            a["numbers"][at[k] : at[k + 1]], a["positions"][at[k] : at[k + 1]], cell=a["cell"][k], pbc=a["pbc"][k]
        )
        repeats = [round(y / x) if x else 1 for x, y in zip(atoms.cell.lengths(), got.cell.lengths())]
        expected = atoms.repeat(repeats)
        assert 10 < len(got) <= 20 or not atoms.pbc.any() or len(got) == len(atoms)
        np.testing.assert_allclose(got.cell.array, expected.cell.array, atol=1e-4)  # read to 1e-5 A
        np.testing.assert_allclose(got.positions, expected.positions, atol=1e-4)
        assert (got.numbers == expected.numbers).all()


def test_exchange_stays_in_the_groups(taught, structures):
    """An element becomes the next one, up or down, that the teacher knows."""
    known = NequixCalculator(taught.meta["source"].split("labels by ")[1].split()[0], "cpu").model.config[
        "atomic_numbers"
    ]
    columns = [[z for z in map(chemical_symbols.index, g) if z in known] for g in GROUPS]
    pairs = {(a, b) for c in columns for a, b in zip(c, c[1:])}
    before = {a.info["material_id"]: a for a in ase.io.read(structures, ":")}
    exchanged = 0
    for i, (atoms, *_) in enumerate(frames_of(taught)):
        first = before[taught.name(i).split()[0]].numbers
        changed = {(a, b) for a, b in zip(first.tolist(), atoms.numbers[: len(first)].tolist()) if a != b}
        assert all((a, b) in pairs or (b, a) in pairs for a, b in changed)
        exchanged += bool(changed)
    assert 0.05 < exchanged / 320 < 0.3


def test_materials_on_one_side_and_held_out(taught, structures):
    """No formula of the list or of WBM's half, not by exchange either; a formula trains or validates, not both."""
    held_out = {"OGe"}
    names = {formula(a): a.info["material_id"] for a in ase.io.read(structures, ":")}
    wbm = {f for f, name in names.items() if name.startswith("wbm")}
    half = {f for f in wbm if int(hashlib.sha256(f.encode()).hexdigest(), 16) % 1000 < 500}
    assert half and wbm - half
    sides = {}
    for i, (atoms, *_) in enumerate(frames_of(taught)):
        sides.setdefault(formula(atoms), set()).add(int(taught.split[i]))
    assert not sides.keys() & (held_out | half) and sides.keys() & (wbm - half)
    assert all(len(side - {EXCLUDED}) <= 1 for side in sides.values())
    assert len(sides.keys() - names.keys()) >= 3  # materials that exchange has made


@needs_shared
def test_the_list_of_what_is_held_out():
    """The formulas of `sample`'s frames that are not for training, of the conductivity task, of the phonon sets, and of
    the binaries whose heat capacity is scored."""
    listed = set(HELD_OUT.read_text().split())
    found = {formula(a) for a in ase.io.iread(SHARED / "data/phononDB-PBE-structures.extxyz", ":")}
    with gzip.open(SHARED / "data/alexandria-binary-pbe-phonon-2025.1.json.gz") as f:
        for row in json.load(f):
            found.add(formula(Atoms([site["species"][0]["element"] for site in row["structure"]["sites"]])))
    with tarfile.open(SHARED / "data/mdr_pbe.tar") as tar:
        files = [tar.extractfile(m).read() for m in tar if m.name.endswith(".bz2")]
    files += [f.read_bytes() for f in (SHARED / "data/phonondb_pbesol").glob("*.bz2")]
    for content in files:
        unit_cell = bz2.decompress(content).decode().split("\nunit_cell:")[1].split("\nsupercell:")[0]
        found.add(formula(Atoms(re.findall(r"symbol: *(\w+)", unit_cell))))
    assert len(found) > 650 and found <= listed
    sample = HERE / "data/sample"
    if sample.exists():
        packed = PackedSet(sample)
        held = {
            formula(a) for a, split in zip((a for a, *_ in frames_of(packed)), packed.split) if split in (VAL, TEST)
        }
        assert listed == found | held


def test_the_same_set_again_and_another(taught, tmp_path, structures, teacher, monkeypatch):
    """The order and the hash do not depend on how much fits the memory at once."""
    monkeypatch.setattr(distill, "BLOCK", 8)
    calculator = lambda *a: setattr(c := NequixCalculator(*a), "max_edges", 10**9) or c
    monkeypatch.setattr(distill, "NequixCalculator", calculator)
    again, other = (made(tmp_path / f"{n}", structures, teacher, n) for n in (320, 296))
    assert again.meta["data_sha256"] == taught.meta["data_sha256"] != other.meta["data_sha256"]
    assert again.ids.tolist() == taught.ids.tolist()
    for k, x in again.arrays.items():
        np.testing.assert_allclose(x.numpy(), taught.arrays[k].numpy(), atol=1e-4)


def test_last_digits_of_a_reader_do_not_count(structures, tmp_path):
    crystals = ase.io.read(structures, ":")
    for atoms, sign in zip(crystals, [1, -1] * 9):
        atoms.positions += sign * 1e-14
    ase.io.write(tmp_path / "crystals.traj", [x for x in crystals if not x.pbc.all() or x.cell.volume])
    a, b = (distill.read_structures([f], range(119)) for f in (structures, tmp_path / "crystals.traj"))
    assert all(a[k].tobytes() == b[k].tobytes() for k in ("numbers", "positions", "cell", "pbc", "offsets"))


def test_killed_and_rerun(taught, tmp_path, structures, teacher):
    call = f"[{str(structures)!r}], {str(teacher)!r}, 320, {str(tmp_path / 'set')!r}, ['OGe'], 'cpu'"
    command = [sys.executable, "-c", f"import distill; distill.BLOCK = 8; distill.distill({call})"]
    process = subprocess.Popen(command, cwd=HERE)
    while len(list(tmp_path.glob("set.part-*/*[0-9].npz"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    next(tmp_path.glob("set.part-*/*[0-9].npz")).write_bytes(b"PK")  # as a power cut may leave it
    there = {f: f.stat().st_mtime_ns for f in tmp_path.glob("set.part-*/*[0-9].npz")}
    assert 3 <= len(there) < 10 and not (tmp_path / "set").exists()
    said = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert [f.name for f in tmp_path.iterdir() if "set" in f.name] == ["set"]
    packed = PackedSet(tmp_path / "set", cutoff=4.5)
    assert packed.meta["data_sha256"] == taught.meta["data_sha256"]
    for k, x in packed.arrays.items():
        np.testing.assert_allclose(x.numpy(), taught.arrays[k].numpy(), atol=1e-4)  # threads may differ


def test_a_run_goes_on_with_labels_made_elsewhere(taught, tmp_path, capsys):
    """They differ in the last digits, and so do the E0s; the hash does not."""
    shutil.copytree(taught.path, tmp_path / "set")
    np.save(tmp_path / "set/energy.npy", np.load(taught.path / "energy.npy") * (1 + 1e-9))
    meta = json.loads((tmp_path / "set/meta.json").read_text())
    meta["statistics"], before = PackedSet(tmp_path / "set", 4.5).statistics(), meta["statistics"]
    (tmp_path / "set/meta.json").write_text(json.dumps(meta))
    assert meta["statistics"]["atom_energies"] != before["atom_energies"]
    steps = "--cutoff", "4.5", "--steps", "2", "--eval-every", "2"
    for folder in taught.path, tmp_path / "set":
        go(folder, tmp_path / "run", *steps)
    assert "resumed at step 2 of 2\n" in capsys.readouterr().out


def test_bad_input(tmp_path, structures, teacher, monkeypatch, capsys):
    def said(*arguments):
        monkeypatch.setattr(sys, "argv", ["distill.py", *map(str, arguments), "--device", "cpu"])
        with pytest.raises(SystemExit) as e:
            distill.main()
        return str(e.value)

    out = "--out", tmp_path / "set", "--weights", teacher
    assert "No such file" in said(tmp_path / "none.cif", *out)
    (tmp_path / "broken.cif").write_text("data_x\n_cell_length_a 5\n")
    assert "--frames must be positive" in said(structures, *out, "--frames", 0)
    assert f"{tmp_path} exists: choose another --out" in said(structures, "--out", tmp_path)
    ase.io.write(tmp_path / "iron.cif", bulk("Fe"))
    assert "no usable structure" in said(tmp_path / "iron.cif", tmp_path / "broken.cif", *out)
    why = capsys.readouterr().out
    assert "left out: iron.cif#0: elements that the model lacks: Fe" in why and "left out: broken.cif: " in why
    ase.io.write(tmp_path / "NaCl.cif", bulk("NaCl", "rocksalt", 5.6))  # among the binaries with a heat capacity
    assert "all structures are held out" in said(tmp_path / "NaCl.cif", *out)
    ase.io.write(tmp_path / "silver.cif", bulk("Ag"))
    nothing = said(tmp_path / "silver.cif", *out[2:], "--out", f"{tmp_path / 'set'}/", "--frames", 8)
    assert "nothing to train on or to validate on" in nothing
    assert not (tmp_path / "set").exists() and list(tmp_path.glob("set.part-*/0.npz"))


def test_a_packed_set_as_structures(taught, teacher):
    """Of a packed set, those of its training frames."""
    s = distill.read_structures([taught.path], range(119))
    assert s["ids"].tolist() == taught.ids[taught.indices(TRAIN)].tolist()
    assert (s["counts"] == data.composition(taught.numbers, taught.offsets)[taught.indices(TRAIN)]).all()
