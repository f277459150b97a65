"""Phonons of the MDR benchmark, and the thermal conductivity of Matbench-Discovery (kappa_SRME).

    python eval_phonon.py mdr --weights nequix-mp-1 --out runs/mdr             # fetches the official files to data/phonon
    python eval_phonon.py mdr FILE_OR_FOLDER... --weights nequix-mp-1          # phonopy yaml with DFT forces, also .bz2
    python eval_phonon.py kappa --weights nequix-mp-1 --out runs/kappa
    python eval_phonon.py kappa --score kappas.json.gz                         # any model's, in the leaderboard's form

Both relax each material and take the forces of supercells with displaced atoms (--stage forces: a GPU, many materials at a
time), then make force constants, phonons and what follows from them (--stage transport: CPU processes, --workers). Every
material is on disk once it is done: rerunning a command goes on. --out gets settings.json, forces/ID.npz and results/ID.json.gz
(delete either to have it done again), mdr.csv or kappa.csv; for kappa conductivity.json.gz in the leaderboard's form; with --plot
mdr.png, bands.png (of one material) or kappa.png.

mdr: Loew et al. 2025 (npj Comput. Mater., doi:10.1038/s41524-025-01650-1); S, F and C_V of a mole of primitive cells.
kappa: Pota et al. 2024 (arXiv:2408.00755), by default with Nequix's settings; no kappa counts as an SRE and an SRME of 2.
"""

import argparse
import concurrent.futures
import csv
import gzip
import hashlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import threading
import time
import zlib
from collections import Counter, deque
from importlib import metadata
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from tqdm import tqdm

import data
from calc import NequixCalculator

KAPPA = {  # option: figshare file, name, md5 (these from data-files.yml of matbench-discovery)
    "structures": (52179965, "2024-11-09-phononDB-PBE-103-structures.extxyz", "0b149802835e260aa3ab0c7e3c88625b"),
    "reference": (59988539, "2024-11-09-kappas-phononDB-PBE-noNAC.json.gz", "70c7a8b0df4cbb4d98f12aea5f61aeee"),
}
MDR = "https://alexandria.icams.rub.de/data/phonon_benchmark/pbe/"
QUANTITIES = "omega_max (K)", "S (J/K/mol)", "F (kJ/mol)", "C_V (J/K/mol)"
LOWEST = "lowest frequency (THz)"
THZ_TO_K = 47.99243  # h / k_B
TEMPERATURE = 300  # K
NO_MODE = 1e-4  # THz: of the sums over modes, which leave out the acoustic ones at Gamma, 0 but for noise
UNSTABLE = -0.05  # THz: a commensurate mode below it makes a material unstable (our choice)
REFINE = 0.01  # A: relaxations keep the symmetry found at this precision, as with ASE's FixSymmetry by default
SYMPREC = 1e-5  # A: of phonopy and phono3py
RESTARTS, KEEP = 15, 0.005  # mdr: relaxations of --steps each; after the last, what is relaxed to this (eV/A) is kept
LENGTH = 10  # A: supercells of materials that come without any are at least so long
CHUNK = 256  # materials whose supercells are in memory at a time

# ----------------------------------------------------------------------------------------------------------------------
# Files


def need(*packages):
    for name in packages:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise ImportError(f"this needs {name}: pip install 'phono3py==3.30.*'") from None
        if name == "phono3py" and not version.startswith("3.30."):
            raise ImportError(f"phono3py {version}: later ones than 3.30 lack MS-SMM19; pip install 'phono3py==3.30.*'")


def official(option):
    """The path of an official file, fetched if it is not there; for "mdr" the folder. Raises OSError or ValueError."""
    if option != "mdr":
        number, name, md5 = KAPPA[option]
        return data.fetch_figshare(number, f"data/phonon/{name}", md5)
    folder = Path("data/phonon/mdr")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    if not path.exists():
        data.download(MDR, path)
    names = sorted(set(re.findall(r'href="([\w.-]+\.yaml\.bz2)"', path.read_text())))
    if not names:
        raise ValueError(f"{path}, from {MDR}, lists no .yaml.bz2: delete it and try again")
    for name in tqdm([n for n in names if not (folder / n).exists()], "fetching", unit="file", disable=None):
        data.download(MDR + name, folder / name)
    return folder


def save(path, write):
    """Whole or not at all, whatever happens to this process."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as f:
        write(f)
    os.replace(temporary, path)


def save_json(path, value):
    dump = json.dumps(value, default=lambda x: x.tolist()).encode()
    save(path, lambda f: f.write(gzip.compress(dump) if path.suffix == ".gz" else dump))


def save_csv(path, rows):
    f = io.StringIO()
    csv.writer(f, lineterminator="\n").writerows(rows)
    save(path, lambda binary: binary.write(f.getvalue().encode()))


def load_json(path):
    try:
        text = Path(path).read_bytes()
        return json.loads(gzip.decompress(text) if str(path).endswith(".gz") else text)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f"{path} is damaged, or no JSON ({e})") from None


def find_mdr(files):
    """{id: arguments of read_mdr}, sorted. Raises OSError or ValueError."""
    found, yaml = {}, re.compile(r"\.yaml(\.(bz2|gz|xz))?$")
    for file in map(Path, files):
        inside = sorted(p for p in file.iterdir() if yaml.search(p.name)) if file.is_dir() else [file]
        if not inside or not all(p.is_file() for p in inside):
            raise FileNotFoundError(f"no file {file}, or a folder without .yaml")
        for p in inside:
            try:
                new = (
                    [(e["mp_id"], (p, e)) for e in load_json(p)]
                    if ".json" in p.suffixes
                    else [(yaml.sub("", p.name), (p,))]
                )
            except (KeyError, TypeError) as e:
                raise ValueError(f"{p} is no list of structures with an mp_id ({type(e).__name__} {e})") from None
            for k, where in new:
                if k in found:
                    raise ValueError(f"{found[k][0]} and {p} both have a material {k}: give them other names")
                found[k] = where
    return dict(sorted(found.items()))


def read_mdr(path, entry=None):
    """A material: dict of atoms, supercell (3, 3), primitive (3, 3), and phonopy's dataset with DFT forces, from a yaml; or
    with C_V (J/K/mol), from an entry of a list of structures in the form of pymatgen. Raises ValueError."""
    if entry is not None:
        atoms = data.from_pymatgen(entry["structure"])
        supercell = np.diag(np.ceil(LENGTH / atoms.cell.lengths()).astype(int))
        return dict(atoms=atoms, supercell=supercell, primitive="auto", heat_capacity=entry["heat_capacity"])
    from phonopy.interface.phonopy_yaml import PhonopyYaml

    y = PhonopyYaml()  # phonopy.load would also look for files in the current folder
    try:
        y.read(path)
        forces = [d["forces"] for d in y.dataset["first_atoms"]]
        x = y.unitcell
        atoms = Atoms(x.numbers, x.positions, cell=x.cell, pbc=True, masses=x.masses)
    except Exception as e:  # the parser raises all kinds
        raise ValueError(f"{path.name} is damaged, or no phonopy yaml with forces ({type(e).__name__})") from None
    if not np.isfinite(forces).all():
        raise ValueError(f"{path.name}: the forces are not finite")
    return dict(atoms=atoms, supercell=y.supercell_matrix, primitive=y.primitive_matrix, dataset=y.dataset)


def read_kappa(path):
    """{id: material}: dict of atoms, name, supercell (of fc3) and fc2_supercell (3, 3), q_mesh (3,). Raises ValueError."""
    out = {}
    try:
        for atoms in ase.io.iread(path, ":", format="extxyz"):
            i = atoms.info
            m = dict(supercell=i["fc3_supercell"], fc2_supercell=i["fc2_supercell"], name=i["name"])
            m |= dict(q_mesh=i["q_mesh" if "q_mesh" in i else "q_point_mesh"])
            m |= dict(atoms=Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True))
            out[str(i["mp_id" if "mp_id" in i else "material_id"])] = m
    except Exception as e:  # ASE's readers raise all kinds
        raise ValueError(
            f"{path} can't be read, or has no supercells ({type(e).__name__} {e})".split("\n")[0]
        ) from None
    if not out:
        raise ValueError(f"{path} has no structures")
    return out


def fingerprint(source, entry=None):
    """Of a material: of its file, its entry of a file, or what read_kappa made of it."""
    if isinstance(source, Path) and entry is None:
        return hashlib.md5(source.read_bytes()).hexdigest()
    text = json.dumps(entry or source, default=lambda x: x.todict() if isinstance(x, Atoms) else x.tolist())
    return hashlib.md5(text.encode()).hexdigest()


def check_sources(out, materials):
    """Raises ValueError if forces in `out` are damaged, or were made of other materials of the same id."""
    for k, (_, *where) in materials.items():
        path = out / f"forces/{k}.npz"
        try:
            with np.load(path) as f:
                same = str(f["source"]) == fingerprint(*where)
        except FileNotFoundError:
            continue
        except Exception as e:  # numpy raises all kinds
            raise ValueError(
                f"{path} is damaged ({type(e).__name__}): delete it and run --stage forces again"
            ) from None
        if not same:
            raise ValueError(f"{path} was made of another {k}: choose another --out")


def read_kappas(path):
    """{id: {column: value}} of a table in the form of the leaderboard, or in its older form. Raises OSError or ValueError."""
    older = {"mp_id": "material_id", "weights": "mode_weights", "mode_kappa_tot": "mode_kappa_tot_rta"}
    try:
        table = {k.lower().replace("_ave", "_avg"): column for k, column in load_json(path).items()}
        table = {older.get(k, k): column for k, column in table.items()}
        return {str(m): {k: c.get(row) for k, c in table.items()} for row, m in table["material_id"].items()}
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is no table of conductivities ({type(e).__name__} {e})") from None


# ----------------------------------------------------------------------------------------------------------------------
# Forces


def displaced(m, atoms, distance):
    """Phonopy, or for a material with an fc2_supercell Phono3py, of the material's relaxed Atoms; distance: A."""
    from phonopy.structure.atoms import PhonopyAtoms

    cell = PhonopyAtoms(atoms.symbols, cell=atoms.cell.array, positions=atoms.positions, masses=m["atoms"].get_masses())
    if "fc2_supercell" in m:
        from phono3py import Phono3py

        how = dict(phonon_supercell_matrix=m["fc2_supercell"], primitive_matrix="auto", symprec=SYMPREC)
        ph = Phono3py(cell, m["supercell"], **how)
        ph.generate_displacements(distance=distance)
        ph.mesh_numbers = m["q_mesh"]
    else:
        from phonopy import Phonopy

        ph = Phonopy(cell, m["supercell"], primitive_matrix=m["primitive"], symprec=SYMPREC)
        ph.generate_displacements(distance=distance, is_diagonal=False)
    return ph


def supercells(m, atoms, s):
    """{what for: (numbers (n,), cell (3, 3), positions (D, n, 3))}; with --hessian fc2 needs one, with nothing displaced."""
    ph = displaced(m, atoms, s["displacement"])
    third = "fc2_supercell" in m
    second = ph.phonon_supercells_with_displacements if third else ph.supercells_with_displacements
    groups = {"fc2_forces": second}
    if s["hessian"]:
        groups = {"fc2": [ph.phonon_supercell if third else ph.supercell]}
    if third:
        groups["fc3_forces"] = ph.supercells_with_displacements
    return {k: (g[0].numbers, g[0].cell, np.array([x.positions for x in g])) for k, g in groups.items()}


def force_constants(calc, atoms):
    """(n, n, 3, 3), eV/A^2, in phonopy's order"""
    return calc.hessian(atoms).reshape(len(atoms), 3, -1, 3).swapaxes(1, 2)


def end_with_parent():
    """In a worker: should the parent be killed, it does not stay."""
    gone = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (multiprocessing.connection.wait([gone]), os._exit(1)), daemon=True).start()


def attempt(job):
    """A function and its arguments: (result, None), or (None, a line that tells why not). In a process of its own."""
    function, *arguments = job
    try:
        return function(*arguments), None
    except Exception as e:  # phonopy raises all kinds, and one material stops no other
        return None, f"{'' if isinstance(e, ValueError) else type(e).__name__ + ': '}{e}".split("\n")[0]


def forces_stage(a, materials, s, calc, mapped):
    """Write forces/ID.npz for those of {id: function and arguments that give the material} that have none; s: settings."""
    files = {k: a.out / f"forces/{k}.npz" for k in materials}
    todo, unrelaxed = deque(k for k in materials if not files[k].exists()), deque()
    about = ", ".join(f"{k} {v}" for k, v in s.items())
    print(f"{len(materials)} materials, the forces of {len(materials) - len(todo)} done before; {calc.device}; {about}")
    (a.out / "forces").mkdir(parents=True, exist_ok=True)
    how = dict(symprec=REFINE, cell_mask=[1, 1, 1, 0, 0, 0] if s["task"] == "kappa" else None)
    n, start = len(todo), time.perf_counter()
    with tqdm(desc="forces", total=len(materials), initial=len(materials) - n, unit="material", disable=None) as bar:

        def finish(k, error=None, **arrays):
            arrays = (dict(error=error) if error else arrays) | dict(source=fingerprint(*materials[k][1:]))
            save(files[k], lambda f: np.savez_compressed(f, **arrays))
            bar.update()

        def displacements():  # of the relaxed ones; whose each is goes to `order`
            jobs = [(supercells, m, atoms, s) for _, m, atoms, _ in relaxed]
            for (k, _, _, about), (groups, error) in zip(relaxed, mapped(attempt, jobs)):
                if error:
                    finish(k, error)
                    continue
                if "fc2" in groups:
                    numbers, cell, (x,) = groups.pop("fc2")
                    hessian, error = attempt((force_constants, calc, Atoms(numbers, x, cell=cell, pbc=True)))
                    if error or not groups:
                        finish(k, error, **about, fc2=hessian)
                        continue
                    about["fc2"] = hessian
                arrays[k], left[k] = about, sum(len(x) for *_, x in groups.values())
                for name, (numbers, cell, positions) in groups.items():
                    about[name] = np.empty(positions.shape)
                    for d, x in enumerate(positions):
                        order.append((k, name, d))
                        yield Atoms(numbers, x, cell=cell, pbc=True)

        while todo or unrelaxed:
            batch = [unrelaxed.popleft() for _ in range(min(len(unrelaxed), CHUNK))]
            fresh = [todo.popleft() for _ in range(min(len(todo), CHUNK - len(batch)))]
            for k, (m, error) in zip(fresh, mapped(attempt, [materials[k] for k in fresh])):
                finish(k, error) if error else batch.append((k, m, m["atoms"], 0))
            relaxed, arrays, left, order = [], {}, {}, []
            for index, atoms, _, converged, steps, error in calc.relax(
                (b[2] for b in batch), s["fmax"], s["steps"], **how
            ):
                k, m, _, before = batch[index]
                steps += before
                if s["task"] == "mdr" and not (converged or error):
                    if steps < RESTARTS * s["steps"]:
                        unrelaxed.append((k, m, atoms, steps))
                        continue
                    if not next(calc.relax([atoms], KEEP, 0, **how))[3]:
                        error = f"not relaxed to {KEEP} eV/A in {steps} steps"
                about = dict(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array)
                about |= dict(steps=steps, converged=converged)
                finish(k, error) if error else relaxed.append((k, m, atoms, about))
            for index, atoms, *_, error in calc.relax(displacements(), fmax=0, steps=0):  # predict() stops at an error
                k, name, d = order[index]
                if k not in arrays:
                    continue
                if error:
                    finish(k, error)
                    del arrays[k]
                    continue
                arrays[k][name][d] = atoms.calc.results["forces"]
                left[k] -= 1
                if not left[k]:
                    finish(k, **arrays.pop(k))
    seconds = time.perf_counter() - start
    print(f"forces of {n} materials in {seconds:.1f} s: {3600 * n / seconds:.0f} an hour")


# ----------------------------------------------------------------------------------------------------------------------
# Harmonic phonons


def phonons(m, s=None, x=None):
    """Phonopy with symmetrised force constants: of the material's own DFT forces, or of what forces_stage wrote, x."""
    atoms = m["atoms"] if x is None else Atoms(x["numbers"], x["positions"], cell=x["cell"])
    ph = displaced(m, atoms, 0.01 if x is None else s["displacement"])
    if x is not None and "fc2" in x:
        ph.force_constants = x["fc2"]
    else:
        if x is None:
            ph.dataset = m["dataset"]
        else:
            ph.forces = x["fc2_forces"] - x["fc2_forces"].mean(1, keepdims=True)  # no drift
        ph.produce_force_constants(calculate_full_force_constants=False, show_drift=False)
    ph.symmetrize_force_constants(show_drift=False)
    return ph


def quantities(ph):
    """QUANTITIES of Loew et al. and LOWEST, of modes at the q-points commensurate with the supercell; but S, F and C_V of
    the modes on phonopy's default mesh that are not imaginary."""
    from phonopy.harmonic.dynmat_to_fc import get_commensurate_points

    ph.run_qpoints(
        get_commensurate_points(np.rint(np.linalg.inv(ph.primitive_matrix) @ ph.supercell_matrix).astype(int))
    )
    frequencies = ph.get_qpoints_dict()["frequencies"]
    ph.run_mesh()
    ph.run_thermal_properties(temperatures=[TEMPERATURE], cutoff_frequency=NO_MODE)
    t = ph.get_thermal_properties_dict()
    values = (
        frequencies.max() * THZ_TO_K,
        *(t[k][0] for k in ("entropy", "free_energy", "heat_capacity")),
        frequencies.min(),
    )
    return dict(zip([*QUANTITIES, LOWEST], map(float, values)))


def mdr_result(m, x, s):
    ph = phonons(m, s, x)
    dft = {QUANTITIES[3]: m["heat_capacity"]} if "heat_capacity" in m else quantities(phonons(m))
    return dict(atoms=len(ph.primitive), steps=int(x["steps"]), dft=dft, model=quantities(ph))


def score_mdr(out, results, functional):
    """Write mdr.csv, print the errors of {id: mdr_result or dict(error=)}. Returns {quantity: (2, S)}, DFT's and ours."""
    good, pairs, columns = [r for r in results.values() if "error" not in r], {}, [*QUANTITIES, LOWEST]
    sides = [(q, side) for q in columns for side in ("dft", "model")]
    header = ["material_id", "atoms", "steps", *(f"{q}, {side}" for q, side in sides), "error"]
    flat = [
        dict(material_id=k) | r | {f"{q}, {s}": r[s].get(q) for q, s in sides if s in r} for k, r in results.items()
    ]
    save_csv(out / "mdr.csv", [header, *([r.get(c) for c in header] for r in flat)])
    print(f"{len(good)} of {len(results)} materials scored; reference: {functional}", end="")
    print("" if functional == "PBE" else ", not the PBE of the training data: this tests the pipeline, not the model")
    for error, count in Counter(r["error"] for r in results.values() if "error" in r).most_common():
        print(f"left out, {count}: {error}")
    print(f"{'':24}{'MAE':>12}{'mean error':>12}{'materials':>12}")
    for q in (*QUANTITIES, "C_V (J/K/mol of atoms)"):
        name, per = (q, False) if q in QUANTITIES else (QUANTITIES[3], True)
        both = [[r[k][name] / (r["atoms"] if per else 1) for k in ("dft", "model")] for r in good if name in r["dft"]]
        if both:
            both = np.array(both).T
            pairs[q], error = both, both[1] - both[0]
            print(f"{q:24}{np.abs(error).mean():12.4f}{error.mean():12.4f}{error.size:12}")
    n = Counter(tuple(bool(r[k][LOWEST] >= UNSTABLE) for k in ("dft", "model")) for r in good if LOWEST in r["dft"])
    if n:
        print(
            f"stable (no mode below {UNSTABLE} THz) by DFT and the model: {n[True, True]}, by DFT only {n[True, False]}, "
            f"by the model only {n[False, True]}, by neither {n[False, False]}"
        )
    return pairs


# ----------------------------------------------------------------------------------------------------------------------
# Thermal conductivity


def mode_kappas(population, coherence, heat_capacity):
    """Conductivity of each mode (T, q, s, 6), W/m/K: that of the population and its share of the coherences (T, q, s, s', 6),
    by heat capacities (T, q, s), Simoncelli et al. 2022 (PRX 12, 041011). Summed over the first s, as in the benchmark."""
    c = heat_capacity[..., None, None]
    total = c + c.swapaxes(2, 3)
    return population + 2 * (coherence * np.divide(c, total, out=np.zeros_like(total), where=total > 0)).sum(2)


def has_imaginary(f):
    """Of frequencies (q, s), THz, Gamma first: any negative one, but for acoustic ones at Gamma down to -0.01 THz."""
    return bool((f[0, :3] < -0.01).any() or (f[0, 3:] < 0).any() or (f[1:] < 0).any())


def kappa_result(m, x, s):
    """A row of the leaderboard's table; x: what forces_stage wrote. phono3py in the relaxation-time approximation, with
    isotopes and the Wigner transport equation (Simoncelli, Marzari, Mauri 2019); conductivities W/m/K, frequencies THz."""
    import spglib

    relaxed = Atoms(x["numbers"], x["positions"], cell=x["cell"], pbc=True)
    number = lambda y: spglib.get_symmetry_dataset((y.cell.array, y.get_scaled_positions(), y.numbers), SYMPREC).number
    row = dict(formula=m["name"], spg_num=number(m["atoms"]), relaxed_space_group_number=number(relaxed), errors=[])
    row |= dict(
        broken_symmetry=row["spg_num"] != row["relaxed_space_group_number"], reached_max_steps=not x["converged"]
    )
    ph = displaced(m, relaxed, s["displacement"])
    if "fc2" in x:
        ph.fc2 = x["fc2"]
        ph.symmetrize_fc2()
    else:
        ph.phonon_forces = x["fc2_forces"]
        ph.produce_fc2(symmetrize_fc2=True)
    ph.init_phph_interaction(symmetrize_fc3q=False)
    ph.run_phonon_solver()
    row["ph_freqs"] = ph.get_phonon_data()[0]
    row["has_imag_ph_modes"] = has_imaginary(row["ph_freqs"])
    if row["has_imag_ph_modes"] or row["broken_symmetry"]:
        return row
    ph.forces = x["fc3_forces"]
    ph.produce_fc3(symmetrize_fc3r=True)
    ph.init_phph_interaction(symmetrize_fc3q=False)
    how = dict(is_isotope=True, transport_type="MS-SMM19", boundary_mfp=1e6)  # um: next to no boundary
    ph.run_thermal_conductivity(temperatures=[TEMPERATURE], **how)
    t = ph.thermal_conductivity
    modes = mode_kappas(t.mode_kappa[0], t.mode_kappa_C[0], t.mode_heat_capacities)
    row |= dict(
        kappa_tot_rta=t.kappa_TOT_RTA[0], kappa_p_rta=t.kappa_P_RTA[0], kappa_c=t.kappa_C[0], q_points=t.qpoints
    )
    return row | dict(mode_kappa_tot_rta=modes, mode_weights=t.grid_weights)


def average(row, name):
    """Mean of the diagonal of tensors, at the first temperature; NaN if there are none."""
    if row.get(f"{name}_avg") is not None:
        return np.array(row[f"{name}_avg"], float)[0]
    return np.array(row[f"{name}_rta"], float)[0, ..., :3].mean(-1) if row.get(f"{name}_rta") is not None else math.nan


def score_row(row, truth):
    """(kappa (W/m/K), SRE, SRME, why it failed or None) of a row of read_kappas or kappa_result against that of DFT.

    Pota et al. 2024: SRE = 2 |k - k'| / (k + k'), SRME = 2 sum_modes |k_mode - k'_mode| / sum_q w / (k + k').
    """
    (kappa, true), (modes, true_modes) = (
        [average(r, k) for r in (row, truth)] for k in ("kappa_tot", "mode_kappa_tot")
    )
    reasons = {
        "; ".join(row.get("errors") or []): row.get("errors"),
        "imaginary frequencies": row.get("has_imag_ph_modes"),
        "broken symmetry": row.get("broken_symmetry"),
        "no conductivity": not (np.isfinite(kappa) and np.isfinite(modes).all()),
        "no mode weights": row.get("mode_weights") is None,
        f"modes {np.shape(modes)}, of the reference {np.shape(true_modes)}": np.shape(modes) != np.shape(true_modes),
    }
    if why := next((k for k, holds in reasons.items() if holds), None):
        return math.nan, 2.0, 2.0, why
    error = np.abs(modes - true_modes).sum() / np.sum(row["mode_weights"])
    return float(kappa), float(2 * abs(kappa - true) / (kappa + true)), float(2 * error / (kappa + true)), None


def score_kappa(out, rows, truth):
    """Write kappa.csv, print the scores of {id: row}; truth: {id: row of DFT}. Returns (2, S): DFT's kappa and ours, W/m/K."""
    if missing := [k for k in rows if k not in truth]:
        raise ValueError(f"the ids do not match: the reference lacks {missing[0]}")
    print(f"{'':24}{'kappa':>12}{'DFT':>12}{'SRE':>10}{'SRME':>10}\n{'':24}{'W/m/K':>12}{'W/m/K':>12}")
    table = [["material_id", "name", "kappa (W/m/K)", "kappa DFT (W/m/K)", "SRE", "SRME", "error"]]
    for k, row in rows.items():
        kappa, sre, srme, why = score_row(row or dict(errors=["not among the predictions"]), truth[k])
        true = float(average(truth[k], "kappa_tot"))
        table.append([k, truth[k].get("name") or (row or {}).get("formula", ""), kappa, true, sre, srme, why])
        print("{:14}{:10}{:12.4f}{:12.4f}{:10.4f}{:10.4f}  {}".format(*table[-1][:-1], why or ""))
    out.mkdir(parents=True, exist_ok=True)
    save_csv(out / "kappa.csv", table)
    kappas, true, sre, srme, why = zip(*(t[2:] for t in table[1:]))
    print(
        f"{len(rows)} of {len(truth)} materials, {len(rows) - why.count(None)} without kappa: "
        f"mean SRE {np.mean(sre):.4f}, SRME {np.mean(srme):.4f}"
    )
    if len(rows) == len(truth):
        print(f"for the CPS-1: eval_discovery.py --srme {np.mean(srme):.4f}")
    return np.array([true, kappas])


# ----------------------------------------------------------------------------------------------------------------------
# Both


def result(k, out, source, s):
    """Write results/ID.json.gz of a material whose forces are there."""
    with np.load(out / f"forces/{k}.npz") as f:
        x = dict(f)
    row, (m, error) = None, attempt(source)
    error = str(x["error"]) if "error" in x else error
    if not error:
        row, error = attempt((mdr_result if s["task"] == "mdr" else kappa_result, m, x, s))
    if (error or "").startswith("MemoryError"):
        raise MemoryError(f"out of memory with {k}: fewer --workers?")  # another run may do it
    if error:
        row = dict(error=error) if s["task"] == "mdr" else dict(formula=m["name"], errors=[error])
    save_json(out / f"results/{k}.json.gz", row)


def transport_stage(a, materials, s, mapped):
    """{id: result} of the materials whose forces are there, made if there is none, or an older one."""
    forces, results = (
        {k: a.out / name.format(k) for k in materials} for name in ("forces/{}.npz", "results/{}.json.gz")
    )
    there = [k for k, f in forces.items() if f.exists()]
    if len(there) < len(forces):
        print(f"{len(forces) - len(there)} materials are left out: no forces yet (--stage forces)")
    (a.out / "results").mkdir(parents=True, exist_ok=True)
    made = lambda f: f.stat().st_mtime if f.exists() else -1
    todo = [k for k in there if made(results[k]) < made(forces[k])]
    bar = dict(total=len(there), initial=len(there) - len(todo), unit="material", disable=None)
    done = tqdm(mapped(attempt, [(result, k, a.out, materials[k], s) for k in todo]), "phonons", **bar)
    if errors := [error for _, error in done if error]:
        raise OSError(errors[0])
    return {k: load_json(results[k]) for k in there}


def settings(a, calc):
    """What the forces in --out depend on: of this command, or without a calculator as found there. Raises ValueError if --out
    holds another run; so the displacements, which are made again, are the same."""
    path = a.out / "settings.json"
    if not (calc or path.exists()):
        raise FileNotFoundError(f"there are no forces in {a.out}: run --stage forces first")
    found = load_json(path) if path.exists() or not calc else None
    now = dict(task=a.task) | {
        name: metadata.version(name) for name in ("phonopy", "phono3py")[: 1 + (a.task == "kappa")]
    }
    if calc:
        now |= dict(weights=calc.fingerprint()) | {
            k: getattr(a, k) for k in ("fmax", "steps", "displacement", "hessian", "dtype")
        }
    if differ := [f"{k} {found.get(k)}, not {v}" for k, v in now.items() if found and found.get(k) != v]:
        raise ValueError(f"{a.out} holds a run with {'; '.join(differ)}: choose another --out")
    a.out.mkdir(parents=True, exist_ok=True)
    save_json(path, now := now if calc else found)
    return now


def plot_parity(path, pairs, scale="linear"):
    """pairs: {label: (2, S)}, DFT and the model"""
    figure, axes = panels(len(pairs))
    for ax, (label, (x, y)) in zip(axes, pairs.items()):
        ax.plot(x, x, "k-", x, y, ".", lw=0.5)
        ax.set(xlabel=f"{label}, DFT", ylabel="model", xscale=scale, yscale=scale)
        ax.set_title(f"materials: {np.isfinite(x + y).sum()}")
    figure.savefig(path, dpi=150)


def plot_bands(path, m, s, x):
    """The bands of a material along ASE's path through the Brillouin zone, of DFT too where there are its forces."""
    sides = ({"DFT": phonons(m)} if "dataset" in m else {}) | {"model": phonons(m, s, x)}
    way = Atoms(cell=sides["model"].primitive.cell, pbc=True).cell.bandpath(npoints=300)
    along, ticks, names = way.get_linear_kpoint_axis()
    figure, (ax,) = panels(1)
    for label, ph in sides.items():
        ph.run_qpoints(way.kpts)
        ax.plot(along, ph.get_qpoints_dict()["frequencies"], color=dict(DFT="k", model="C1")[label], lw=1)[0].set_label(
            label
        )
    ax.set(xlim=(0, along[-1]), ylabel="frequency (THz); imaginary: negative", title=str(m["atoms"].symbols))
    ax.set_xticks(ticks, names)
    ax.legend()
    figure.savefig(path, dpi=150)


def panels(n):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, n, figsize=(1 + 4 * n, 4.5), layout="constrained", squeeze=False)
    return figure, axes[0]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = p.add_subparsers(dest="task", required=True)
    mdr, kappa = (tasks.add_parser(k, description="see eval_phonon.py -h") for k in ("mdr", "kappa"))
    mdr.add_argument(
        "files",
        nargs="*",
        metavar="FILE_OR_FOLDER",
        help="phonopy yaml (.bz2, .xz, .gz) with DFT forces, or .json.gz of structures and C_V (default: fetched)",
    )
    mdr.add_argument("--functional", default="PBE", help="of the reference, printed with the scores (default: PBE)")
    kappa.add_argument("--structures", help="extxyz with supercells and q-meshes (default: fetched)")
    kappa.add_argument("--reference", help=".json.gz of DFT conductivities (default: fetched)")
    kappa.add_argument("--only", nargs="+", metavar="ID", help="these materials")
    kappa.add_argument("--score", metavar="JSON", help="score these conductivities, calculate nothing")
    for q, fmax, displacement in ((mdr, 0.0025, 0.01), (kappa, 0.02, 0.03)):
        q.add_argument("--weights", default="nequix-mp-1", help="a released name, an .nqx file or a model.pt")
        q.add_argument("--out", type=Path, help="folder (default: runs/mdr or runs/kappa)")
        q.add_argument("--stage", choices=["forces", "transport"], help="only this one (default: both in turn)")
        q.add_argument("--workers", type=int, default=os.cpu_count(), help="CPU processes (default: as many as cores)")
        q.add_argument("--n", type=int, help="so many materials at random, the same each time")
        q.add_argument("--fmax", type=float, default=fmax, help=f"eV/A (default: {fmax})")
        q.add_argument("--steps", type=int, default=500, help="of a relaxation, at most (default: 500)")
        q.add_argument("--displacement", type=float, default=displacement, help=f"A (default: {displacement})")
        q.add_argument(
            "--hessian", action="store_true", help="harmonic force constants by differentiation, not displacements"
        )
        q.add_argument("--plot", action="store_true", help="draw into --out")
        q.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
        q.add_argument(
            "--dtype", choices=["float32", "float64"], default="float32", help="of the network (default: float32)"
        )
        q.add_argument("--conv", choices=["auto", "torch", "oeq", "fused"], default="auto", help="convolution")
    a = p.parse_args(argv)
    a.out = a.out or Path("runs") / a.task
    try:
        if a.workers < 1 or (a.n is not None and a.n < 1):
            raise ValueError("--workers and --n must be positive")
        run(a)
    except (ValueError, OSError, ImportError, concurrent.futures.BrokenExecutor) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def run(a):
    if a.task == "mdr":
        need("phonopy", "spglib")
        materials = {k: (read_mdr, *where) for k, where in find_mdr(a.files or [official("mdr")]).items()}
    else:
        truth = read_kappas(a.reference or official("reference"))
        if a.score:
            if a.n:
                raise ValueError("--score takes --only, not --n")
            rows = read_kappas(a.score)
            kappas = score_kappa(a.out, {k: rows.get(k) for k in a.only or truth}, truth)
            if a.plot:
                plot_parity(a.out / "kappa.png", {"kappa (W/m/K)": kappas}, "log")
            return
        need("phono3py", "phonopy", "spglib")
        materials = {k: (dict, m) for k, m in read_kappa(a.structures or official("structures")).items()}
        if missing := [k for k in a.only or materials if k not in materials or k not in truth]:
            raise ValueError(f"the ids do not match: no structure or no reference of {missing[0]}")
        materials = {k: materials[k] for k in a.only or materials}
    if a.n:
        every = list(materials)
        materials = {
            every[k]: materials[every[k]] for k in sorted(np.random.RandomState(0).permutation(len(every))[: a.n])
        }
    calc = None if a.stage == "transport" else NequixCalculator(a.weights, a.device, a.dtype, a.conv)
    s, mapped, pool = settings(a, calc), map, None
    check_sources(a.out, materials)
    if (workers := min(a.workers, len(materials))) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(os.cpu_count() // workers, 1)))  # of the processes to come
        pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent)
        mapped = pool.map
    try:
        if calc:
            forces_stage(a, materials, s, calc, mapped)
        if a.stage == "forces":
            return
        results = transport_stage(a, materials, s, mapped)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    if a.task == "kappa":
        columns = dict.fromkeys(c for row in results.values() for c in row)
        table = {c: {str(i): row.get(c) for i, row in enumerate(results.values())} for c in columns}
        save_json(a.out / "conductivity.json.gz", dict(material_id={str(i): k for i, k in enumerate(results)}) | table)
        pairs = {"kappa (W/m/K)": score_kappa(a.out, results, truth)} if results else {}
    else:
        pairs = score_mdr(a.out, results, a.functional)
    if a.plot and pairs:
        plot_parity(a.out / f"{a.task}.png", pairs, "linear" if a.task == "mdr" else "log")
        if a.task == "mdr" and len(results) == 1:
            (k,) = results
            plot_bands(a.out / "bands.png", read_mdr(*materials[k][1:]), s, dict(np.load(a.out / f"forces/{k}.npz")))


if __name__ == "__main__":
    main()
