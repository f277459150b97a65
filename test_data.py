"""Neighbour lists against ASE, packed sets against what went into them, the order and the dealing of batches."""

import contextlib
import hashlib
import io
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.geometry import complete_cell
from ase.neighborlist import primitive_neighbor_list

import data

HERE = Path(__file__).parent


def run(*command, ok=True):
    """What a script prints. "data.py" runs in this process, with threads for workers: importing torch takes seconds."""
    if command[0] != "data.py":
        out = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, text=True)
        code, said = out.returncode, out.stdout + out.stderr
    else:
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            patch.setattr(sys, "argv", list(map(str, command)))
            patch.setattr(data, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
            try:
                code = data.main()
            except SystemExit as e:
                code = e.code
        said = f"{out.getvalue()}{code or ''}"
    assert "Traceback" not in said and (not code) == ok, said
    return said


# ----------------------------------------------------------------------------------------------------------------------
# Neighbour list


def batch_of(structures, cutoff):
    join = lambda how, k: torch.from_numpy(how([np.asarray(getattr(a, k)) for a in structures]))
    system = *(join(np.concatenate, k) for k in ("numbers", "positions")), join(np.stack, "cell"), join(np.stack, "pbc")
    return data.make_batch(*system, torch.tensor([len(a) for a in structures]), cutoff)


def odd_structures():
    """Tiny, skewed, left-handed, unwrapped, huge, and partly periodic cells."""
    rng = np.random.default_rng(0)
    out = [bulk("W"), bulk("NaCl", "rocksalt", 5.6), Atoms("He", cell=[1.5, 20, 3], pbc=True), molecule("C6H6")]
    out += [Atoms("Ar", cell=[20, 20, 20], pbc=True), Atoms("Xe"), fcc111("Pt", (2, 2, 3), vacuum=9)]
    out += [Atoms("H2", [[0, 0, 0], [900, 0, 0.7]]), bulk("Si", cubic=True) * (5, 5, 5)]
    out += [Atoms("CO", [[0, 0, 0], [0, 0, 1.1]], cell=[0, 4, 0], pbc=[0, 1, 0])]
    for k in range(330):
        n = rng.integers(1, 30)
        cell = np.diag(rng.uniform(2, 12, 3)) + rng.normal(size=(3, 3)) * rng.choice([0.3, 2.5])
        if abs(np.linalg.det(cell)) < 15 or (k % 3 and np.linalg.det(cell) < 60):
            cell = np.diag([3.0, 4.0, -9.0])
        pbc = rng.random(3) < (1 if k % 3 else 0.5)
        if k % 10 == 0:  # no vectors where not periodic
            cell[~pbc] = 0
        out.append(Atoms(f"C{n}", rng.uniform(-9, 15, (n, 3)), cell=cell, pbc=pbc))
    return out


@pytest.mark.parametrize("cutoff, n", [(6.0, 340), (3.3, 60)])
def test_neighbor_list_equals_ase(cutoff, n):
    structures = odd_structures()[:n]
    b = batch_of(structures, cutoff)
    assert (b.receivers.diff() >= 0).all()
    assert (b.row_ptr.diff() == torch.bincount(b.receivers, minlength=len(b.numbers))).all()
    first, n_edges = 0, 0
    for atoms in structures:
        of = slice(b.row_ptr[first], b.row_ptr[first + len(atoms)])
        got = torch.cat([b.receivers[of, None] - first, b.senders[of, None] - first, b.shifts[of]], 1)
        cell = complete_cell(atoms.cell)  # ASE 3.29 misses pairs where a vector is zero
        i, j, d, s = primitive_neighbor_list("ijdS", atoms.pbc, cell, atoms.positions, cutoff)
        near = np.abs(d - cutoff) < 1e-9  # either answer is right to rounding
        expected = np.column_stack([i, j, s])[~near]
        sure = (b.vectors[of].norm(dim=1) - cutoff).abs() > 1e-9
        assert set(map(tuple, got[sure].tolist())) == set(map(tuple, expected.tolist())), atoms
        assert sure.sum() == len(expected)
        vectors = atoms.positions[got[:, 1]] - atoms.positions[got[:, 0]] + got[:, 2:].numpy() @ atoms.cell.array
        np.testing.assert_allclose(b.vectors[of].numpy(), vectors, atol=1e-9)
        first, n_edges = first + len(atoms), n_edges + len(expected)
    assert n_edges > 10_000


def test_memory_of_bins_is_bounded_by_the_atoms():
    far = Atoms("N3", [[0, 0, 0], [0, 0, 1.1], [900, 900, 900]])
    b = batch_of([far, *[Atoms("N2", [[0, 0, 0], [0, 0, 1.1]], cell=[200, 200, 200], pbc=True)] * 500], 6.0)
    assert b.senders[:2].tolist() == [1, 0] and len(b.senders) == 2 * 501
    assert len(data.linked_cells(b.positions, b.cell, b.pbc, b.structure, 6.0)["start"]) < 100 * len(b.positions)


# ----------------------------------------------------------------------------------------------------------------------
# Packing


def labelled(atoms, energy=-1.0, forces=None, stress=None, **info):
    atoms = atoms.copy()
    labels = dict(energy=energy, forces=np.zeros((len(atoms), 3)) if forces is None else forces)
    if stress is not False and atoms.pbc.all():
        labels["stress"] = np.arange(6.0) if stress is None else stress
    atoms.calc = SinglePointCalculator(atoms, **labels)
    atoms.info.update(info)
    return atoms


@pytest.fixture(scope="module")
def frames():
    """24 frames of six materials, one molecule among them, energies of known E0s."""
    rng = np.random.default_rng(1)
    out, e0 = [], {"Na": -1.5, "Cl": -2.0, "Si": -5.0, "H": -1.0, "O": -4.0}
    salt, silicon, sodium = bulk("NaCl", "rocksalt", 5.6), bulk("Si", cubic=True), bulk("Na")
    for k in range(24):
        atoms = [salt, bulk("Si"), molecule("H2O"), sodium, molecule("O2"), silicon][k % 6].copy()
        atoms.rattle(0.05, rng=rng)
        forces, stress = rng.normal(size=(len(atoms), 3)), rng.normal(size=6) * 0.01
        energy = sum(e0[s] for s in atoms.symbols) + 0.25 * len(atoms)
        out.append(labelled(atoms, energy, forces, stress, mp_id=f"mp-{k % 6}", frame_id=f"mp-{k % 6}-{k}"))
    return out


def pack(folder, *command, ok=True):
    command = [folder / c if "." in c else c for c in command]  # files, among options
    return run("data.py", "pack", *command, "--out", folder / "set", "--workers", 1, ok=ok)


@pytest.fixture(scope="module")
def packed(frames, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    ase.io.write(folder / "frames.extxyz", frames)
    run(HERE / "data.py", "pack", folder / "frames.extxyz", "--out", folder / "set", "--val", "0.2", "--workers", 1)
    return folder / "set"


def test_pack_keeps_every_number(frames, packed):
    p = data.PackedSet(packed)
    b = p.batch(np.arange(len(p.n_atoms)))
    for k, atoms in zip(range(len(b.cell)), frames, strict=True):
        of = b.structure == k
        assert p.name(k) == atoms.info["frame_id"]
        assert b.numbers[of].tolist() == atoms.numbers.tolist()
        assert b.energy[k].item() == atoms.get_potential_energy()
        np.testing.assert_allclose(b.positions[of], atoms.positions, atol=1e-6)
        np.testing.assert_allclose(b.forces[of], atoms.get_forces(), atol=1e-6)
        if atoms.pbc.all():
            np.testing.assert_allclose(b.stress[k], atoms.get_stress(voigt=False), atol=1e-8)
        else:
            assert b.stress[k].isnan().all() and not p.has_stress[k]
        assert p.n_edges[k] == len(primitive_neighbor_list("i", atoms.pbc, atoms.cell, atoms.positions, 6.0))
    assert (p.count_edges() == p.n_edges).all()
    official = np.random.RandomState(42).permutation(24)[19:]  # the last 20%
    assert sorted(p.indices(data.VAL)) == sorted(official)


def test_statistics_by_a_naive_loop(frames, packed):
    p = data.PackedSet(packed)
    s = p.meta["statistics"]
    train = [frames[i] for i in p.indices(data.TRAIN)]
    e0 = dict(zip(s["atomic_numbers"], s["atom_energies"]))
    left = [(a.get_potential_energy() - sum(e0[z] for z in a.numbers)) / len(a) for a in train]
    assert s["shift"] == pytest.approx(np.mean(left), abs=1e-6)
    assert np.std(left) < 1e-6  # energies are sums of E0s here
    forces = np.concatenate([a.get_forces() for a in train])
    assert s["scale"] == pytest.approx(np.sqrt(np.mean(forces**2)))
    neighbors = [len(primitive_neighbor_list("i", a.pbc, a.cell, a.positions, 6.0)) / len(a) for a in train]
    assert s["avg_n_neighbors"] == pytest.approx(np.mean(neighbors))


def test_mptrj_from_a_zip_of_its_form(frames, packed, tmp_path):
    """One extxyz a material in a folder, names out of order, __MACOSX litter: as in the official zips."""
    zip_path = tmp_path / "mp-trj.zip"
    with zipfile.ZipFile(zip_path, "w") as z:
        for k in reversed(range(6)):
            ase.io.write(tmp_path / "m.extxyz", frames[k::6])
            z.write(tmp_path / "m.extxyz", f"mptrj-gga-ggapu/mp-{k}.extxyz")
            z.writestr(f"__MACOSX/mptrj-gga-ggapu/._mp-{k}.extxyz", b"\x00\x05\x16\x07")
    command = ["data.py", "mptrj", "--zip", zip_path, "--out", tmp_path / "set", "--workers", 1]
    run(*command, "--split", "material", "--val", "0.3")
    p = data.PackedSet(tmp_path / "set")
    order = [k for m in range(6) for k in range(m, 24, 6)]  # sorted by file name
    assert [p.name(i) for i in range(24)] == [frames[k].info["frame_id"] for k in order]
    materials = [{p.name(i).rsplit("-", 1)[0] for i in p.indices(split)} for split in (data.TRAIN, data.VAL)]
    assert materials[0] and materials[1] and not materials[0] & materials[1]
    assert "exists" in run(*command, ok=False)


def test_other_formats_and_constraints(tmp_path):
    """Anything ASE reads, whatever its name; forces as computed, not zeroed on fixed atoms; in frames or not, no duplicate."""
    forces = [[0, 0, 0.5], [0, 0, -0.5]]
    frames = [labelled(bulk("NaCl", "rocksalt", a), -7.0, forces) for a in (5.6, 5.7, 5.8, 5.9, 5.8)]
    for atoms in frames:
        atoms.set_constraint(FixAtoms([0]))
    ase.io.write(tmp_path / "run@300K.traj", frames[:3])
    ase.io.write(tmp_path / "b.traj", frames[2:])
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as z:
        z.write(tmp_path / "b.traj", "inner/b@2.traj")
    said = pack(tmp_path, "run@300K.traj", "b.zip")
    p = data.PackedSet(tmp_path / "set")
    assert "0 skipped, 2 duplicates, 8 atoms" in said
    assert [p.name(i) for i in range(4)] == [*(f"run@300K.traj#{k}" for k in range(3)), "b.zip:inner/b@2.traj#1"]
    assert p.arrays["energy"].tolist() == [-7.0] * 4
    assert p.arrays["forces"][:, 2].tolist() == [0.5, -0.5] * 4


BAD = {
    "no labels": ("energy not there", bulk("Si")),
    "a name of its own": ("energy not there, not finite, or not numbers of shape (); there is REF_energy", bulk("Si")),
    "a virial": ("a virial but no stress", labelled(bulk("Si"), stress=False, virial=np.eye(3))),
    "NaN energy": ("energy not there, not finite", labelled(bulk("Si"), np.nan)),
    "NaN forces": ("forces not there, not finite", labelled(bulk("Si"), forces=np.full((2, 3), np.nan))),
    "NaN stress": ("stress not there, not finite", labelled(bulk("Si"), stress=np.full(6, np.nan))),
    "energy in meV": ("energy of 2500.0 eV/atom (meV?) is above 1000", labelled(bulk("Si"), -5000.0)),
    "stress in GPa": ("stress of 30.0 eV/A^3 (GPa or kbar?)", labelled(bulk("Si"), stress=np.full(6, 30.0))),
    "unknown element": ("unknown element", labelled(Atoms("X"))),
    "zero volume": ("zero volume", labelled(Atoms("Si", cell=[[1, 0, 0], [2, 0, 0], [0, 0, 3]], pbc=True))),
    "absurd force": ("force of 5000.0 eV/A", labelled(bulk("Si"), forces=[[5000, 0, 0], [0, 0, 0]])),
    "two at one place": ("two atoms 0.000 A apart", labelled(Atoms("Si2", [[0, 0, 0]] * 2, cell=[9] * 3, pbc=True))),
    "half an atom": ("site 0 is partly occupied (Si 0.5)", labelled(bulk("Si"), occupancy={"0": {"Si": 0.5}})),
    "NaN positions": ("positions or cell are not finite", labelled(Atoms("Si", [[np.nan, 0, 0]]))),
}

BAD["a name of its own"][1].info["REF_energy"] = -1.0


def test_bad_frames_are_named_and_skipped(tmp_path):
    whole = {"0": {"Si": 1.0}}
    good = [labelled(bulk("Si", a=5.4), occupancy=whole), labelled(bulk("Si", a=5.5), stress=False)]
    ase.io.write(tmp_path / "frames.traj", [good[0], *[atoms for _, atoms in BAD.values()], good[1]])
    text = "1\nenergy=-1 pbc=F Properties=species:S:1:pos:R:3:forces:R:3\nQq 0 0 0 0 0 0\n"
    (tmp_path / "text.extxyz").write_text(text)
    said = pack(tmp_path, "frames.traj", "text.extxyz", ok=False)
    for k, (reason, _) in enumerate(BAD.values(), 1):
        assert any(f"bad: frames.traj#{k}: " in line and reason in line for line in said.splitlines()), (reason, said)
    assert "bad: text.extxyz#0: cannot be read" in said and "unusable frames: 15;" in said
    said = pack(tmp_path, "frames.traj", "text.extxyz", "--bad", "skip")  # which fails if there was a set
    assert "15 skipped" in said and "1 without stress" in said
    assert data.PackedSet(tmp_path / "set").has_stress.tolist() == [True, False]
    with pytest.raises(ValueError, match="stress is not symmetric"):
        data.frame_arrays(labelled(bulk("Si"), stress=np.arange(9.0).reshape(3, 3)), "a.xyz#0", ())


def test_what_has_no_training_frame_is_told(tmp_path):
    lone = np.random.RandomState(42).permutation(20)[19]  # the only one to validate with
    frames = [labelled(bulk("Ge" if k == lone else "Si", "diamond", 5 + k / 10)) for k in range(20)]
    ase.io.write(tmp_path / "a.traj", frames)
    said = pack(tmp_path, "a.traj")
    assert "warning: elements without a training frame, whose E0 is set to 0 eV: atomic numbers [32]" in said
    shutil.rmtree(tmp_path / "set")
    ase.io.write(tmp_path / "one.traj", frames[0])
    said = pack(tmp_path, "one.traj", ok=False)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.traj", "one.traj"]
    assert "error: no training frame with an energy" in said


def test_what_breaks_off_is_skipped_and_moves_no_other_frame(tmp_path):
    """A blank line, a label of words, a cut last frame: the others stay on their side of the split of all 42."""
    frame = "1\nenergy={} pbc=F frame_id=f-{} Properties=species:S:1:pos:R:3:forces:R:3\nSi {} 0 0 0 0 0\n"
    text = "".join(frame.format("N/A" if k == 3 else -k, k, k) + "\n" * (k == 7) for k in range(41))
    (tmp_path / "a.extxyz").write_text(text + "3\nenergy=1\nSi 0 0 0\n")
    said = pack(tmp_path, "a.extxyz", "--bad", "skip")
    assert "skipped: a.extxyz#3: energy not there" in said and "a.extxyz#41: the file ends in the middle" in said
    p = data.PackedSet(tmp_path / "set")
    assert len(p.n_atoms) == 40
    official = {f"f-{k}" for k in np.random.RandomState(42).permutation(42)[39:]} - {"f-3", "f-41"}
    assert {p.name(i) for i in p.indices(data.VAL)} == official and official


def test_frames_of_files_of_one_name_and_without_a_material():
    assert data.names_of(["a/run.xyz", "b/run.xyz", "b/c.xyz"]) == ["a/run.xyz", "b/run.xyz", "c.xyz"]
    names = np.array([b"c.xyz#0", b"c.xyz#1"])
    with pytest.raises(ValueError, match="no frame names its material"):
        data.split_by("material", 0.5, dict(ids=names, materials=names), 2)


def test_bad_files_give_one_line(tmp_path):
    (tmp_path / "empty.extxyz").touch()
    (tmp_path / "text.extxyz").write_text("hello\n")
    (tmp_path / "latin.extxyz").write_bytes(b"1\nname=\xe9\nSi 0 0 0\n")
    with zipfile.ZipFile(tmp_path / "damaged.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.extxyz", "1\nenergy=1\nSi 0 0 0\n" * 500)
    whole = bytearray((tmp_path / "damaged.zip").read_bytes())
    whole[60:80] = b"x" * 20
    (tmp_path / "damaged.zip").write_bytes(whole)
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 and no more")
    bad = "empty.extxyz", "text.extxyz", "latin.extxyz", "damaged.zip"
    said = pack(tmp_path, *bad, ok=False)
    assert all(f"bad: {name}" in said for name in bad)
    assert said.splitlines()[-1] == "error: unusable frames: 4; --bad skip drops them"
    assert "error: [Errno 2] No such file" in pack(tmp_path, "none.extxyz", ok=False)
    assert "--val is a share, between 0 and 1, not 5" in pack(tmp_path, "text.extxyz", "--val", "5", ok=False)
    said = run("data.py", "mptrj", "--zip", tmp_path / "cut.zip", "--out", tmp_path / "s", ok=False)
    assert "not a whole zip" in said
    with pytest.raises(FileNotFoundError, match="no packed set"):
        data.PackedSet(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):  # what the disk says is not skipped: the rest of the file would be lost
        list(data.split_extxyz("a.xyz", lambda: open(tmp_path)))


def test_damaged_set_is_told(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "set")
    (tmp_path / "set" / "forces.npy").write_bytes((packed / "forces.npy").read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        data.PackedSet(tmp_path / "set")
    shutil.copy(packed / "forces.npy", tmp_path / "set")
    np.save(tmp_path / "set" / "stress.npy", np.zeros((2, 3, 3)))
    with pytest.raises(ValueError, match="parts disagree"):
        data.PackedSet(tmp_path / "set")


def test_sample_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    said = run("data.py", "sample", "--out", tmp_path / "data/sample", ok=False)
    assert "error: pip could not fetch" in said and "copy mattersim-1.2.3.tar.gz to" in said
    (tmp_path / "data" / "mattersim-1.2.3.tar.gz").write_bytes(b"not it")
    assert "wrong sha256" in run("data.py", "sample", "--out", tmp_path / "data/sample", ok=False)


def test_sample_split():
    """No material on two sides; nothing above 20 eV/A; validation and test from mptrj-random-1k."""
    rng, n = np.random.default_rng(0), 3000
    materials = np.array([f"mp-{i}".encode() for i in rng.integers(0, 1200, n)])
    names = rng.choice([b"mptrj-random-1k.xyz#7", b"mptrj-highest-stress-1k.xyz#7"], n)
    forces = rng.normal(size=(2 * n, 3)) * rng.choice([1, 12], (2 * n, 1), p=[0.95, 0.05])
    arrays = dict(materials=materials, names=names, forces=forces, offsets=np.arange(0, 2 * n + 1, 2))
    split = data.split_sample(arrays, n)
    sides = [set(materials[split == k]) for k in (data.TRAIN, data.VAL, data.TEST)]
    assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    largest = np.linalg.norm(forces, axis=1).reshape(n, 2).max(1)
    assert (split[largest > 20] == data.EXCLUDED).all() and largest[split != data.EXCLUDED].max() <= 20
    assert set(names[np.isin(split, [data.VAL, data.TEST])]) == {b"mptrj-random-1k.xyz#7"}
    assert all(int(hashlib.sha256(m).hexdigest(), 16) % 1000 < 300 for m in sides[1])


# ----------------------------------------------------------------------------------------------------------------------
# Order and dealing


def test_every_frame_once_an_epoch_and_reproducible():
    train = np.arange(100, 131)
    seen = np.concatenate([data.step_indices(train, 8, 5, step) for step in range(31)])  # 8 epochs
    assert all(sorted(epoch) == sorted(train) for epoch in seen.reshape(8, 31))
    assert (data.step_indices(train, 8, 5, 17) == seen[17 * 8 : 18 * 8]).all()
    assert (seen[:31] != seen[31:62]).any() and (data.step_indices(train, 8, 6, 0) != seen[:8]).any()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_deal_balances_and_micro_batches_keep_the_budget(ranks):
    rng = np.random.default_rng(0)
    n_atoms = rng.integers(1, 200, 5000)
    n_edges = n_atoms * rng.integers(5, 90, 5000)
    indices = rng.permutation(5000)[:256]
    hands = data.deal(indices, n_edges, ranks)
    assert sorted(np.concatenate(hands)) == sorted(indices)
    loads = [n_edges[h].sum() for h in hands]
    assert max(loads) < 1.02 * min(loads)
    for hand in hands:
        pieces = data.micro_batches(hand, n_atoms, n_edges, 4000, 50_000)
        assert np.concatenate(pieces).tolist() == hand.tolist()
        assert all(n_edges[p].sum() <= 50_000 and n_atoms[p].sum() <= 4000 for p in pieces)
    assert [len(p) for p in data.micro_batches(indices, n_atoms, n_edges, 1, 1)] == [1] * 256


def test_cutoff_of_its_own_recounts_edges(packed):
    p = data.PackedSet(packed, cutoff=4.0)
    b = p.batch(np.arange(len(p.n_atoms)))
    assert p.n_edges.tolist() == torch.bincount(b.structure[b.receivers], minlength=len(p.n_atoms)).tolist()
    assert p.n_edges.sum() < data.PackedSet(packed).n_edges.sum()


def test_what_waits_is_bounded(monkeypatch):
    """In frames, and in bytes where they are large: of a stream of frames, only so many are read ahead."""
    read = []

    def frames(size):
        for k in range(10_000):
            read.append(k)
            yield f"frame#{k}", "text", size, 0.5

    monkeypatch.setattr(data, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    for size, job in (100, 64), (3_000_000, 2), (50_000_000, 1):
        monkeypatch.setattr(data, "read_frames", lambda files, size=size: frames(size))
        read.clear()
        for n_done, (names, n) in enumerate(data.over_frames(lambda job: (job, len(job)), [], "test", 2), 1):
            assert n == job and len(read) <= (n_done + 9) * job
            if n_done == 20:
                break
