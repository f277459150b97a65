"""Phonons of the MDR benchmark, and the thermal conductivity of Matbench-Discovery (kappa_SRME).

    python eval_phonon.py mdr --weights nequix-mp-1 --out runs/mdr             # fetches the official files to data/phonon
    python eval_phonon.py mdr FILE_OR_FOLDER... --weights nequix-mp-1          # phonopy yaml with DFT forces, also .bz2
    python eval_phonon.py kappa --weights nequix-mp-1 --out runs/kappa
    python eval_phonon.py kappa --score kappas.json.gz                         # any model's, in the leaderboard's form

First, --stage forces: relax each material, displace atoms in supercells, take the forces; on a GPU, many materials at a time.
Then, --stage transport: force constants, phonons and what follows from them, on --workers CPU processes. Each material is
written as soon as it is done; give the command again and it goes on. --out gets settings.json and sources.json, which a rerun
must match; forces/ID.npz and results/ID.json.gz (delete one to have it made again); mdr.csv or kappa.csv, and for kappa
conductivity.json.gz in the leaderboard's form.

mdr: Loew et al. 2025 (npj Comput. Mater., doi:10.1038/s41524-025-01650-1); S, F and C_V of a mole of primitive cells.
kappa: Pota et al. 2024 (arXiv:2408.00755) with Nequix's settings; a material without kappa has SRE 2 and SRME 2.
"""

import argparse
import concurrent.futures
import csv
import gzip
import io
import json
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
from eval_discovery import keep_settings, save
from model import add_options

# Figshare's number, file, md5; from data-files.yml of matbench-discovery.
STRUCTURES = 52179965, "data/phonon/2024-11-09-phononDB-PBE-103-structures.extxyz", "0b149802835e260aa3ab0c7e3c88625b"
REFERENCE = 59988539, "data/phonon/2024-11-09-kappas-phononDB-PBE-noNAC.json.gz", "70c7a8b0df4cbb4d98f12aea5f61aeee"
MDR = "https://alexandria.icams.rub.de/data/phonon_benchmark/pbe/"
OMEGA, S, F, C_V = QUANTITIES = "omega_max (K)", "S (J/K/mol)", "F (kJ/mol)", "C_V (J/K/mol)"
LOWEST = "lowest frequency (THz)"
THZ_TO_K = 47.99243  # h / k_B
TEMPERATURE = 300  # K
NO_MODE = 1e-4  # THz: S, F and C_V leave out modes below it: the acoustic ones at Gamma, 0 but for noise
UNSTABLE = -0.05  # THz: a material with a mode below it is unstable (our choice)
REFINE = 0.01  # A: relaxations keep the symmetry found at this precision, as with ASE's FixSymmetry by default
SYMPREC = 1e-5  # A: of phonopy and phono3py
RESTARTS, KEEP = 15, 0.005  # mdr: relaxations of --steps each; after the last, forces up to this (eV/A) are accepted
LENGTH = 10  # A: the least length of a supercell, where the file has none
CHUNK = 256  # materials whose supercells are in memory at a time
OUT_OF_MEMORY = re.compile("out of memory|MemoryError")  # not the material's fault: never a result

# ----------------------------------------------------------------------------------------------------------------------
# Files


def fetch_mdr():
    """The folder of the MDR files, fetched if they are not there. Raises OSError or ValueError."""
    folder = Path("data/phonon/mdr")
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "index.html"
    if not index.exists():
        data.download(MDR, index)
    names = sorted(set(re.findall(r'href="([\w.-]+\.yaml\.bz2)"', index.read_text())))
    if not names:
        raise ValueError(f"{index}, from {MDR}, lists no .yaml.bz2: delete it and try again")
    for name in tqdm([n for n in names if not (folder / n).exists()], "fetching", unit="file", disable=None):
        data.download(MDR + name, folder / name)
    return folder


def save_json(path, value):
    text = json.dumps(value, default=lambda array: array.tolist()).encode()
    save(path, gzip.compress(text) if path.suffix == ".gz" else text)


def save_csv(path, rows):
    f = io.StringIO()
    csv.writer(f, lineterminator="\n").writerows(rows)
    save(path, f.getvalue().encode())


def load_json(path):
    """The content of a .json or .json.gz. Raises OSError or ValueError."""
    try:
        content = Path(path).read_bytes()
        return json.loads(gzip.decompress(content) if str(path).endswith(".gz") else content)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f"{path} is damaged, or no JSON ({e})") from None


def find_mdr(files):
    """{id: arguments of read_mdr}, sorted, of files and folders of yaml. Raises OSError or ValueError."""
    found, yaml = {}, re.compile(r"\.yaml(\.(bz2|gz|xz))?$")
    for file in map(Path, files):
        paths = sorted(p for p in file.iterdir() if yaml.search(p.name)) if file.is_dir() else [file]
        if not paths or not all(p.is_file() for p in paths):
            raise FileNotFoundError(f"no file {file}, or a folder without .yaml")
        for path in paths:
            if not yaml.search(path.name) and ".json" not in path.suffixes:
                raise ValueError(f"{path} is neither a phonopy .yaml (.bz2, .gz, .xz) nor a .json (.gz)")
            try:
                entries = [{}] if yaml.search(path.name) else load_json(path)
                new = [(yaml.sub("", path.name) if yaml.search(path.name) else e["mp_id"], (path, e)) for e in entries]
            except (KeyError, TypeError) as e:
                raise ValueError(f"{path} is no list of structures with an mp_id ({type(e).__name__} {e})") from None
            for k, where in new:
                if k in found:
                    raise ValueError(f"{found[k][0]} and {path} both have a material {k}: give them other names")
                found[k] = where
    return dict(sorted(found.items()))


def from_pymatgen(structure, name):
    """Atoms of a structure in pymatgen's JSON form. Raises ValueError if it is disordered, KeyError or TypeError for another
    form. name: for the message."""
    for k, site in enumerate(structure["sites"]):
        if [species.get("occu", 1) for species in site["species"]] != [1]:
            raise ValueError(f"{name}: site {k} is disordered, it should hold one whole atom: {site['species']}")
    symbols, positions = zip(*((site["species"][0]["element"], site["xyz"]) for site in structure["sites"]))
    return Atoms(symbols, positions, cell=structure["lattice"]["matrix"], pbc=True)


def read_mdr(path, entry):
    """A material of a phonopy yaml, or of an entry {mp_id, structure in pymatgen's form, heat_capacity (J/K/mol)} of a .json.

    It is a dict of atoms, supercell (3, 3), primitive (3, 3), and the DFT reference: phonopy's dataset with forces, or
    heat_capacity; magnetic moments, if the yaml has any, lower the symmetry as in phonopy. Raises OSError or ValueError.
    """
    if entry:
        atoms = from_pymatgen(entry["structure"], entry["mp_id"])
        supercell = np.diag(np.ceil(LENGTH / atoms.cell.lengths()).astype(int))
        return dict(atoms=atoms, supercell=supercell, primitive="auto", heat_capacity=entry["heat_capacity"])
    from phonopy.interface.phonopy_yaml import PhonopyYaml

    y = PhonopyYaml()  # phonopy.load would also look for files in the current folder
    try:
        y.read(path)
        x, random = y.unitcell, "displacements" in y.dataset  # of all atoms at once
        forces = [] if random else [d["forces"] for d in y.dataset["first_atoms"]]
        atoms = Atoms(x.numbers, x.positions, cell=x.cell, pbc=True, masses=x.masses)
    except Exception as e:  # the parser raises all kinds
        raise ValueError(f"{path.name} is damaged, or no phonopy yaml with forces ({type(e).__name__})") from None
    if random:
        raise ValueError(f"{path.name} has random displacements (phonopy's type 2), not those of one atom at a time")
    if not np.isfinite(forces).all():
        raise ValueError(f"{path.name}: the forces are not finite")
    m = dict(atoms=atoms, magnetic_moments=x.magnetic_moments, dataset=y.dataset, supercell=y.supercell_matrix)
    return m | dict(primitive="auto" if y.primitive_matrix is None else y.primitive_matrix)


def read_kappa(path):
    """{id: material}: dict of atoms, name, supercell (of fc3) and fc2_supercell (3, 3), q_mesh (3,). Raises ValueError."""
    out = {}
    try:
        for atoms in ase.io.iread(path, ":", format="extxyz", do_not_split_by_at_sign=True):
            i = atoms.info  # calc checks the occupancy in it
            m = dict(supercell=i["fc3_supercell"], fc2_supercell=i["fc2_supercell"], name=i["name"])
            m |= dict(q_mesh=i["q_mesh" if "q_mesh" in i else "q_point_mesh"])
            m |= dict(atoms=Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True, info=i))
            out[str(i["mp_id" if "mp_id" in i else "material_id"])] = m
    except Exception as e:  # ASE's readers raise all kinds
        raise ValueError(f"{path} can't be read, or has no supercells ({type(e).__name__})") from None
    if not out:
        raise ValueError(f"{path} has no structures")
    return out


def read_kappas(path):
    """{id: {column: value}} of a table in the leaderboard's form, or in that of its reference. Raises OSError or ValueError."""
    names = {"mp_id": "material_id", "weights": "mode_weights", "mode_kappa_tot": "mode_kappa_tot_rta"}
    try:
        table = {k.lower().replace("_ave", "_avg"): column for k, column in load_json(path).items()}
        table = {names.get(k, k): column for k, column in table.items()}
        return {str(m): {k: c.get(row) for k, c in table.items()} for row, m in table["material_id"].items()}
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is no table of conductivities ({type(e).__name__} {e})") from None


# ----------------------------------------------------------------------------------------------------------------------
# Forces


def displaced(m, atoms, distance):
    """Phonopy, or for a material with an fc2_supercell Phono3py, of the material's relaxed Atoms; distance: A."""
    from phonopy.structure.atoms import PhonopyAtoms

    more = dict(masses=m["atoms"].get_masses(), magnetic_moments=m.get("magnetic_moments"))
    cell = PhonopyAtoms(atoms.symbols, cell=atoms.cell.array, positions=atoms.positions, **more)
    if "fc2_supercell" in m:
        from phono3py import Phono3py

        more = dict(phonon_supercell_matrix=m["fc2_supercell"], primitive_matrix="auto", symprec=SYMPREC)
        ph = Phono3py(cell, m["supercell"], **more)
        ph.generate_displacements(distance=distance)
        ph.mesh_numbers = m["q_mesh"]
    else:
        from phonopy import Phonopy

        ph = Phonopy(cell, m["supercell"], primitive_matrix=m["primitive"], symprec=SYMPREC)
        ph.generate_displacements(distance=distance, is_diagonal=False)
    return ph


def supercells(m, atoms, settings):
    """{name: (numbers (n,), cell (3, 3), positions (D, n, 3))} of the D displaced supercells for fc2_forces and fc3_forces."""
    ph = displaced(m, atoms, settings["displacement"])
    groups = {"fc2_forces": ph.supercells_with_displacements}
    if "fc2_supercell" in m:
        groups = {"fc2_forces": ph.phonon_supercells_with_displacements, "fc3_forces": ph.supercells_with_displacements}
    return {k: (g[0].numbers, g[0].cell, np.array([x.positions for x in g])) for k, g in groups.items()}


def end_with_parent():
    """In a worker: end it if its parent is killed."""
    gone = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (multiprocessing.connection.wait([gone]), os._exit(1)), daemon=True).start()


def attempt(job):
    """Call a function. job: it and its arguments. Returns (result, None), or (None, one line that says why not)."""
    function, *arguments = job
    try:
        return function(*arguments), None
    except Exception as e:  # phonopy raises all kinds, and one material stops no other
        return None, f"{'' if isinstance(e, ValueError) else type(e).__name__ + ': '}{e}".split("\n")[0]


def forces_stage(a, materials, settings, calc, mapped):
    """Write forces/ID.npz of the materials that have none: the relaxed cell and the forces of its supercells, or an error.

    materials: {id: job for `attempt` that reads it}; mapped: map, or that of a pool of processes.
    """
    files = {k: a.out / f"forces/{k}.npz" for k in materials}
    waiting = deque((k, None, 0) for k, file in files.items() if not file.exists())  # id, atoms, steps so far
    n, start, conv = len(waiting), time.perf_counter(), calc.model.chosen_conv()
    about = ", ".join(f"{k} {v}{dict(fmax=' eV/A', displacement=' A').get(k, '')}" for k, v in settings.items())
    print(f"materials: {len(files)}, their forces done before: {len(files) - n}; {calc.device}, conv {conv}; {about}")
    print(f"results go to {a.out}")
    how = dict(symprec=REFINE, cell_mask=[1, 1, 1, 0, 0, 0] if a.task == "kappa" else None)
    bar = tqdm(desc="forces", total=len(files), initial=len(files) - n, unit="material", disable=None)

    def finish(k, error=None, **arrays):
        bar.update()
        if error and OUT_OF_MEMORY.search(error):
            return tqdm.write(f"{k}: {error}; a rerun tries it again", sys.stderr)
        np.savez_compressed(content := io.BytesIO(), **(dict(error=error) if error else arrays))
        save(files[k], content.getvalue())

    def displace(relaxed, arrays, missing):
        """Yield supercells; enters in arrays {id: what to store}, and in missing {id: how many forces are still to come}."""
        jobs = [(supercells, m, atoms, settings) for _, m, atoms, _ in relaxed]
        for (k, _, _, known), (groups, error) in zip(relaxed, mapped(attempt, jobs)):
            if error:
                finish(k, error)
                continue
            arrays[k], missing[k] = known, sum(len(positions) for _, _, positions in groups.values())
            for name, (numbers, cell, positions) in groups.items():
                known[name] = np.empty(positions.shape)
                for d, x in enumerate(positions):
                    yield Atoms(numbers, x, cell=cell, pbc=True, info=dict(place=(k, name, d)))

    while waiting:
        chunk, ready, relaxed = [waiting.popleft() for _ in range(min(len(waiting), CHUNK))], [], []
        for (k, atoms, steps), (m, error) in zip(chunk, mapped(attempt, [materials[k] for k, *_ in chunk])):
            finish(k, error) if error else ready.append((k, m, m["atoms"] if atoms is None else atoms, steps))
        for index, atoms, _, converged, steps, error in calc.relax((r[2] for r in ready), a.fmax, a.steps, **how):
            k, m, _, before = ready[index]
            steps += before
            if a.task == "mdr" and not (converged or error):
                if steps < RESTARTS * a.steps:
                    waiting.appendleft((k, atoms, steps))  # with the next chunk, so that the GPU stays busy
                    continue
                if not next(calc.relax([atoms], KEEP, 0, **how))[3]:
                    error = f"not relaxed to {KEEP} eV/A in {steps} steps"
            known = dict(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array)
            known |= dict(steps=steps, converged=converged, conv=conv)
            finish(k, error) if error else relaxed.append((k, m, atoms, known))
        arrays, missing = {}, {}
        for _, atoms, *_, error in calc.relax(displace(relaxed, arrays, missing), fmax=0, steps=0):
            k, name, d = atoms.info["place"]
            if k not in arrays:  # another of its supercells failed
                continue
            if not error:
                arrays[k][name][d] = atoms.calc.results["forces"]
                missing[k] -= 1
            if error or not missing[k]:
                finish(k, error, **arrays.pop(k))
    bar.close()
    print(f"forces of materials: {n}, in {time.perf_counter() - start:.1f} s")


# ----------------------------------------------------------------------------------------------------------------------
# Harmonic phonons


def phonons(m, settings=None, x=None):
    """Phonopy with symmetrised force constants: of a material's DFT forces, or of what forces_stage wrote (x)."""
    if x is None:
        ph = displaced(m, m["atoms"], 0.01)
        ph.dataset = m["dataset"]
    else:
        ph = displaced(m, Atoms(x["numbers"], x["positions"], cell=x["cell"]), settings["displacement"])
        ph.forces = x["fc2_forces"] - x["fc2_forces"].mean(1, keepdims=True)  # no drift
    ph.produce_force_constants(calculate_full_force_constants=False, show_drift=False)
    ph.symmetrize_force_constants(show_drift=False)
    return ph


def quantities(ph):
    """{name: value} of QUANTITIES and LOWEST, as Loew et al. have them: frequencies at the q-points that are commensurate with
    the supercell, but S, F and C_V of the modes on phonopy's default mesh that are not imaginary."""
    from phonopy.harmonic.dynmat_to_fc import get_commensurate_points

    repeats = np.linalg.inv(ph.primitive_matrix) @ ph.supercell_matrix
    ph.run_qpoints(get_commensurate_points(np.rint(repeats).astype(int)))
    frequencies = ph.get_qpoints_dict()["frequencies"]
    ph.run_mesh()
    ph.run_thermal_properties(temperatures=[TEMPERATURE], cutoff_frequency=NO_MODE)
    thermal = ph.get_thermal_properties_dict()
    values = {OMEGA: frequencies.max() * THZ_TO_K, S: thermal["entropy"][0], F: thermal["free_energy"][0]}
    values |= {C_V: thermal["heat_capacity"][0], LOWEST: frequencies.min()}
    return {k: float(v) for k, v in values.items()}


def mdr_result(m, x, settings):
    ph = phonons(m, settings, x)
    dft = {C_V: m["heat_capacity"]} if "heat_capacity" in m else quantities(phonons(m))
    return dict(atoms=len(ph.primitive), steps=int(x["steps"]), dft=dft, model=quantities(ph))


def score_mdr(out, results, functional):
    """Write mdr.csv and print the errors of {id: mdr_result or dict(error=)}. Raises ValueError if there is nothing to score."""
    good = [r for r in results.values() if "error" not in r]
    sides = [(q, side) for q in (*QUANTITIES, LOWEST) for side in ("dft", "model")]
    header = ["material_id", "atoms", "steps", *(f"{q}, {side}" for q, side in sides), "error"]
    flat = lambda k, r: {"material_id": k} | r | {f"{q}, {side}": r[side].get(q) for q, side in sides if side in r}
    save_csv(out / "mdr.csv", [header, *(map(flat(k, r).get, header) for k, r in results.items())])
    print(f"{len(good)} of {len(results)} materials scored; reference: {functional}", end="")
    print("" if functional == "PBE" else ", not the PBE of the training data: this tests the pipeline, not the model")
    for error, count in Counter(r["error"] for r in results.values() if "error" in r).most_common():
        print(f"left out, {count}: {error}")
    if not good:
        raise ValueError(f"no material was scored: {next(iter(results.values()))['error']}")
    print(f"{'':24}{'MAE':>12}{'mean error':>12}{'materials':>12}")
    for q, name in [*zip(QUANTITIES, QUANTITIES), ("C_V (J/K/mol of atoms)", C_V)]:
        off = [(r["model"][name] - r["dft"][name]) / (1 if q == name else r["atoms"]) for r in good if name in r["dft"]]
        if off:
            print(f"{q:24}{np.abs(off).mean():12.4f}{np.mean(off):12.4f}{len(off):12}")
    n = Counter(tuple(r[side][LOWEST] >= UNSTABLE for side in ("dft", "model")) for r in good if LOWEST in r["dft"])
    if n:
        print(f"stable (no mode below {UNSTABLE} THz) by DFT and the model: {n[True, True]}, by DFT only ", end="")
        print(f"{n[True, False]}, by the model only {n[False, True]}, by neither {n[False, False]}")


# ----------------------------------------------------------------------------------------------------------------------
# Thermal conductivity


def mode_kappas(population, coherence, heat_capacity):
    """Conductivity of each mode (T, q, s, 6), W/m/K: that of the population (T, q, s, 6) and its share of the coherences
    (T, q, s, s', 6), by heat capacities (T, q, s), Simoncelli et al. 2022 (PRX 12, 041011). Like the benchmark, sums over the
    first s."""
    c = heat_capacity[..., None, None]
    total = c + c.swapaxes(2, 3)
    return population + 2 * (coherence * np.divide(c, total, out=np.zeros_like(total), where=total > 0)).sum(2)


def has_imaginary(f):
    """Whether any of the frequencies (q, s), THz, Gamma first, is negative; acoustic ones at Gamma: below -0.01 THz."""
    return bool((f[0, :3] < -0.01).any() or (f[0, 3:] < 0).any() or (f[1:] < 0).any())


def kappa_result(m, x, settings):
    """A row of the leaderboard's table, from what forces_stage wrote (x): conductivities in W/m/K, frequencies in THz.

    phono3py's relaxation-time approximation with isotopes, and the Wigner transport equation (Simoncelli, Marzari, Mauri
    2019). A material with imaginary modes or broken symmetry gets no conductivity.
    """
    import spglib

    relaxed = Atoms(x["numbers"], x["positions"], cell=x["cell"], pbc=True)
    group = lambda y: spglib.get_symmetry_dataset((y.cell.array, y.get_scaled_positions(), y.numbers), SYMPREC).number
    row = dict(formula=m["name"], spg_num=group(m["atoms"]), relaxed_space_group_number=group(relaxed), errors=[])
    row["broken_symmetry"] = row["spg_num"] != row["relaxed_space_group_number"]
    row["reached_max_steps"] = not x["converged"]
    ph = displaced(m, relaxed, settings["displacement"])
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
    row |= dict(kappa_tot_rta=t.kappa_TOT_RTA[0], kappa_p_rta=t.kappa_P_RTA[0], kappa_c=t.kappa_C[0])
    row["mode_kappa_tot_rta"] = mode_kappas(t.mode_kappa[0], t.mode_kappa_C[0], t.mode_heat_capacities)
    return row | dict(q_points=t.qpoints, mode_weights=t.grid_weights)


def average(row, name):
    """Mean of the diagonal of tensors, at the first temperature; NaN if there are none."""
    if row.get(f"{name}_avg") is not None:
        return np.array(row[f"{name}_avg"], float)[0]
    return np.array(row[f"{name}_rta"], float)[0, ..., :3].mean(-1) if row.get(f"{name}_rta") is not None else np.nan


def score_row(row, truth):
    """(kappa (W/m/K), SRE, SRME, why it failed or None) of a row of read_kappas or kappa_result against that of DFT.

    Pota et al. 2024: SRE = 2 |k - k'| / (k + k'), SRME = 2 sum_modes |k_mode - k'_mode| / sum_q w / (k + k').
    """
    kappa, true = (average(r, "kappa_tot") for r in (row, truth))
    modes, true_modes = (average(r, "mode_kappa_tot") for r in (row, truth))
    reasons = {
        "; ".join(row.get("errors") or []): row.get("errors"),
        "imaginary frequencies": row.get("has_imag_ph_modes"),
        "broken symmetry": row.get("broken_symmetry"),
        "no conductivity": not (np.isfinite(kappa) and np.isfinite(modes).all()),
        "no mode weights": row.get("mode_weights") is None,
        f"modes {np.shape(modes)}, of the reference {np.shape(true_modes)}": np.shape(modes) != np.shape(true_modes),
    }
    if why := next((k for k, holds in reasons.items() if holds), None):
        return np.nan, 2.0, 2.0, why
    error = np.abs(modes - true_modes).sum() / np.sum(row["mode_weights"])
    return float(kappa), float(2 * abs(kappa - true) / (kappa + true)), float(2 * error / (kappa + true)), None


def score_kappa(out, rows, truth):
    """Write kappa.csv and print the scores of {id: row or None}; truth: {id: row of DFT}."""
    print(f"{'':24}{'kappa':>12}{'DFT':>12}{'SRE':>10}{'SRME':>10}\n{'':24}{'W/m/K':>12}{'W/m/K':>12}")
    table = [["material_id", "name", "kappa (W/m/K)", "kappa DFT (W/m/K)", "SRE", "SRME", "error"]]
    for k, row in rows.items():
        kappa, sre, srme, why = score_row(row or dict(errors=["not among the predictions"]), truth[k])
        name, true = truth[k].get("name") or (row or {}).get("formula", ""), float(average(truth[k], "kappa_tot"))
        table.append([k, name, kappa, true, sre, srme, why])
        print("{:14}{:10}{:12.4f}{:12.4f}{:10.4f}{:10.4f}  {}".format(*table[-1][:-1], why or ""))
    save_csv(out / "kappa.csv", table)
    sre, srme, why = zip(*(line[4:] for line in table[1:]))
    print(f"{len(rows)} of {len(truth)} materials, {len(rows) - why.count(None)} without kappa: ", end="")
    print(f"mean SRE {np.mean(sre):.4f}, SRME {np.mean(srme):.4f}")
    if len(rows) == len(truth):
        print(f"for the CPS-1: eval_discovery.py --srme {np.mean(srme):.4f}")


# ----------------------------------------------------------------------------------------------------------------------
# Both


def result(k, out, source, settings):
    """Write results/ID.json.gz of a material whose forces are there. source: job for `attempt` that reads the material.
    Raises OSError or MemoryError where another run may succeed."""
    path = out / f"forces/{k}.npz"
    x, error = attempt((lambda: dict(np.load(path)),))
    if error:
        raise OSError(f"{path} is damaged ({error}): delete it and run --stage forces again")
    m, error = attempt(source)
    error = str(x["error"]) if "error" in x else error
    if not error:
        row, error = attempt((mdr_result if settings["task"] == "mdr" else kappa_result, m, x, settings))
    if error and OUT_OF_MEMORY.search(error):
        raise MemoryError(f"out of memory with {k}: fewer --workers?")
    if error:
        row = dict(error=error) if settings["task"] == "mdr" else dict(formula=m["name"], errors=[error])
    save_json(out / f"results/{k}.json.gz", row)


def transport_stage(a, materials, settings, mapped):
    """{id: result} of the materials whose forces are there, made if it is not there, or older than the forces."""
    forces = {k: file for k in materials if (file := a.out / f"forces/{k}.npz").exists()}
    results = {k: a.out / f"results/{k}.json.gz" for k in forces}
    if n := len(materials) - len(forces):
        print(f"left out, {n}: no forces yet (--stage forces)")
    if not forces:
        raise ValueError(f"no material has forces in {a.out}")
    todo = [k for k, f in forces.items() if not results[k].exists() or results[k].stat().st_mtime < f.stat().st_mtime]
    bar = dict(total=len(forces), initial=len(forces) - len(todo), unit="material", disable=None)
    jobs = [(result, k, a.out, materials[k], settings) for k in todo]
    if errors := [error for _, error in tqdm(mapped(attempt, jobs), "phonons", **bar) if error]:
        raise OSError(errors[0])
    return {k: load_json(file) for k, file in results.items()}


def check_out(a, sources, calc):
    """The settings on which the results in --out depend; without a calculator those of the forces are as found there.
    sources: {id: its file}. Raises OSError, or ValueError if --out holds results of other settings or files."""
    path = a.out / "settings.json"
    if not (calc or path.exists()):
        raise FileNotFoundError(f"there are no forces in {a.out}: run --stage forces first")
    now = (load_json(path) if path.exists() else {}) | dict(task=a.task) | a.versions
    if calc:
        now |= dict(weights=calc.fingerprint(), fmax=a.fmax, steps=a.steps, displacement=a.displacement)
        now |= dict(precision=calc.model.precision)
    keep_settings(a.out, now)
    path, digests = a.out / "sources.json", {file: data.digest(file, "md5") for file in set(sources.values())}
    known, given = load_json(path) if path.exists() else {}, {k: digests[file] for k, file in sources.items()}
    if other := [k for k in given if known.get(k) != given[k] and (a.out / f"forces/{k}.npz").exists()]:
        raise ValueError(f"{a.out} was made of another {other[0]}: choose another --out")
    save_json(path, known | given)
    return now


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = p.add_subparsers(dest="task", required=True)
    about = dict(mdr="phonons against those of DFT, of the MDR benchmark or of your files")
    about |= dict(kappa="thermal conductivity of 103 materials against that of DFT, and its SRME")
    mdr, kappa = (tasks.add_parser(k, help=text, description=text) for k, text in about.items())
    what = "phonopy yaml (.bz2, .xz, .gz) with DFT forces, or .json (.gz) of structures and C_V (default: fetched)"
    mdr.add_argument("files", nargs="*", metavar="FILE_OR_FOLDER", help=what)
    mdr.add_argument("--functional", default="PBE", help="that of the DFT, printed with the scores (default: PBE)")
    mdr.set_defaults(score=None)
    kappa.add_argument("--structures", help="extxyz with supercells and q-meshes (default: fetched)")
    kappa.add_argument("--reference", help=".json.gz of DFT conductivities (default: fetched)")
    kappa.add_argument("--only", nargs="+", metavar="ID", help="only materials of these ids")
    kappa.add_argument("--score", metavar="JSON", help="score these conductivities, calculate nothing")
    for q, fmax, displacement in ((mdr, 0.0025, 0.01), (kappa, 0.02, 0.03)):
        q.add_argument("--out", type=Path, help="folder of the results (default: runs/mdr or runs/kappa)")
        q.add_argument("--stage", choices=["forces", "transport"], help="only this one (default: both in turn)")
        q.add_argument("--workers", type=int, default=os.cpu_count(), help="CPU processes (default: as many as cores)")
        q.add_argument("--n", type=int, help="so many materials, drawn at random, the same each time (default: all)")
        q.add_argument("--fmax", type=float, default=fmax, help=f"force to relax to, eV/A (default: {fmax})")
        q.add_argument("--steps", type=int, default=500, help="steps of a relaxation, at most (default: 500)")
        what = f"displacement of atoms, A (default: {displacement})"
        q.add_argument("--displacement", type=float, default=displacement, help=what)
        add_options(q)
    a = p.parse_args(argv)
    a.out = a.out or Path("runs") / a.task
    try:
        if a.workers < 1 or (a.n is not None and a.n < 1):
            raise ValueError("--workers and --n must be positive")
        if a.score and a.n:
            raise ValueError("--score takes --only, not --n")
        run(a)
    except (ValueError, OSError, ImportError, concurrent.futures.BrokenExecutor) as e:
        hint = ": pip install 'phono3py==3.30.*'" if isinstance(e, ImportError) else ""
        print(f"error: {e}{hint}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def run(a):
    packages = ["phonopy"] + ["phono3py"] * (a.task == "kappa")  # they make the displacements, both times the same
    a.versions = {} if a.score else {name: metadata.version(name) for name in packages}
    if not a.versions.get("phono3py", "3.30.").startswith("3.30."):
        raise ImportError(f"phono3py {a.versions['phono3py']}: later ones than 3.30 lack MS-SMM19")
    if a.task == "mdr":
        found = find_mdr(a.files or [fetch_mdr()])
        materials, sources = {k: (read_mdr, *where) for k, where in found.items()}, {k: x[0] for k, x in found.items()}
    else:
        truth = read_kappas(a.reference or data.fetch_figshare(*REFERENCE))
        path = a.score or a.structures or data.fetch_figshare(*STRUCTURES)
        found = read_kappas(path) if a.score else read_kappa(path)
        ids = a.only or (truth if a.score else found)
        if missing := [k for k in ids if k not in truth or not (a.score or k in found)]:
            raise ValueError(f"the ids do not match: no structure or no reference of {missing[0]}")
        if a.score:
            return score_kappa(a.out, {k: found.get(k) for k in ids}, truth)
        materials, sources = {k: (dict, found[k]) for k in ids}, dict.fromkeys(ids, path)
    chosen = set(np.random.RandomState(0).permutation(len(materials))[: a.n].tolist())
    materials = {k: job for i, (k, job) in enumerate(materials.items()) if i in chosen}
    calc = None if a.stage == "transport" else NequixCalculator(a.weights, a.device, a.precision, a.conv)
    settings, workers = check_out(a, {k: sources[k] for k in materials}, calc), max(1, min(a.workers, len(materials)))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(os.cpu_count() // workers, 1)))  # of processes to come
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent)
    mapped = pool.map if workers > 1 else map  # the pool starts no process before it gets work
    try:
        if calc:
            forces_stage(a, materials, settings, calc, mapped)
        if a.stage == "forces":
            return
        results = transport_stage(a, materials, settings, mapped)
    finally:
        pool.shutdown(cancel_futures=True)
    if a.task == "mdr":
        return score_mdr(a.out, results, a.functional)
    columns = dict.fromkeys(column for row in results.values() for column in row)
    table = {c: {str(i): row.get(c) for i, row in enumerate(results.values())} for c in columns}
    save_json(a.out / "conductivity.json.gz", dict(material_id={str(i): k for i, k in enumerate(results)}) | table)
    score_kappa(a.out, results, truth)


if __name__ == "__main__":
    main()
