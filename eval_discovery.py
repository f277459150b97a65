"""Matbench-Discovery: relax the 256,963 WBM structures, predict which are stable, score the predictions.

    python eval_discovery.py --weights nequix-mp-1 --out runs/discovery         # fetches the official files to data/wbm
    torchrun --nproc_per_node=8 eval_discovery.py --weights nequix-mp-1 --out runs/discovery
    python eval_discovery.py --weights nequix-mp-1 --n 10000 --out runs/random  # the same random 10,000 each time
    python eval_discovery.py --score preds.csv.gz --n 10000                     # any model's predictions, on the same rows

Each structure is written as soon as it is relaxed. Give the command again and it goes on, on any number of GPUs, also with
another --n. --out gets settings.json, which a rerun must match, and parts/, a file of extxyz frames for each process; at the
end predictions.csv.gz and relaxed.extxyz. The tables need pandas, the RMSD needs pymatgen.

The predicted formation energy is that of DFT + (E of the model - uncorrected E of DFT) / atoms, in eV/atom: it has the MP2020
correction of the DFT structure. The leaderboard corrects the relaxed one, which differs for the few whose oxide type changes.
An error above 5 eV/atom counts as no prediction. A row without one is unstable, has RMSD 1, and is not in MAE, RMSE and R2.
"""

import argparse
import contextlib
import gzip
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import sys
import time
import zlib
from collections import Counter
from datetime import timedelta
from pathlib import Path

import ase.io
import numpy as np
import torch
import torch.distributed as dist
from ase import Atoms
from tqdm import tqdm

import data
from calc import NequixCalculator
from model import add_options

WBM = {  # option: figshare's number, file, md5; from data-files.yml of matbench-discovery
    "structures": (48169597, "data/wbm/2024-08-04-wbm-initial-atoms.extxyz.zip", "2a292211ca6acb30ed8416178d644098"),
    "summary": (64706751, "data/wbm/2023-12-13-wbm-summary.csv.gz", "1555268d3aa59d20262cb9d01ce0994b"),
    "relaxed": (48169600, "data/wbm/2024-08-04-wbm-relaxed-atoms.extxyz.zip", "4726643ac0dfbab69a4284454c891e68"),
}
E_DFT, E_FORM = "uncorrected_energy", "e_form_per_atom_mp2020_corrected"  # columns of the summary: eV and eV/atom
HULL = "e_above_hull_mp2020_corrected_ppd_mp"  # eV/atom

# ----------------------------------------------------------------------------------------------------------------------
# Files


def save(path, content):
    """Write bytes to a new file, then put it in place: `path` is never half written, even if this process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def keep_settings(out, now):
    """Write out/settings.json. Raises ValueError if `out` holds parts or forces made with other settings."""
    path, there = out / "settings.json", any(f.stat().st_size for f in [*out.glob("parts/*"), *out.glob("forces/*")])
    found = json.loads(path.read_text()) if path.exists() else {}
    if there and (differ := [f"{k} {found.get(k)}, not {v}" for k, v in now.items() if found.get(k) != v]):
        raise ValueError(f"{out} holds a run with {'; '.join(differ)}: choose another --out")
    save(path, json.dumps(now).encode())


def read_table(path, *required):
    """A .csv or .csv.gz of energies as a DataFrame with material_id as its index. Raises OSError or ValueError."""
    import pandas as pd

    try:
        table = pd.read_csv(path, index_col="material_id", dtype=str)
        table = table.astype({k: float for k in table if k.startswith(("e_form_per_atom", E_DFT, HULL))})
        table.index[0]  # IndexError if it has no rows
    except (ValueError, IndexError, EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f"{path} is damaged, or no table of materials ({e})".replace("\n", " ")) from None
    if missing := [column for column in required if column not in table]:
        raise ValueError(f"{path} has no column {', '.join(missing)}, but {', '.join(table)}")
    if table.index.has_duplicates:
        raise ValueError(f"{path} has ids twice: {table.index[table.index.duplicated()][0]}")
    return table


def read_structures(path, wanted):
    """Yield (material_id, extxyz frame) of each of the materials `wanted`, a frame at a time. Raises OSError or ValueError.

    path: an .extxyz, or a zip of them; the id of a frame is its material_id or, if it has none, the name of its file.
    """
    left = set(wanted)
    for name, frame, *_ in data.read_frames([path]):
        if not isinstance(frame, str):
            reason = frame if isinstance(frame, ValueError) else "no extxyz, nor a whole zip (an interrupted download?)"
            raise ValueError(f"{name}: {reason}")
        given = re.search(r'\bmaterial_id="?([^\s"]+)', frame.split("\n", 2)[1])
        material = given[1] if given else re.split("[:/]", name)[-1].split(".")[0]
        if material in left:
            left.remove(material)
            yield material, frame


def to_atoms(material, frame):
    try:
        atoms = ase.io.read(io.StringIO(frame), format="extxyz")
    except Exception as e:  # ASE's readers raise all kinds
        raise ValueError(f"{material} cannot be read ({type(e).__name__} {e})".split("\n")[0]) from None
    info = dict(material_id=material) | {k: v for k, v in atoms.info.items() if k == "occupancy"}  # which calc checks
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=info)


def to_frame(atoms):
    f = io.StringIO()
    ase.io.write(f, atoms, "extxyz", columns=["symbols", "positions"], write_results=False)
    return f.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Relaxation


def read_parts(out):
    """Yield ({material_id, energy, steps, converged, error}, extxyz frame) of each material that is done, once."""
    seen = set()
    for _, frame, *_ in data.read_frames(sorted(out.glob("parts/*.extxyz"))):
        if isinstance(frame, ValueError) or not frame.endswith("\n"):  # cut off when its process was killed
            continue
        record = {k: v.strip('"') for k, v in re.findall(r'(\w+)=("[^"]*"|\S+)', frame.split("\n", 2)[1])}
        if record["material_id"] not in seen:
            seen.add(record["material_id"])
            yield record | dict(converged=record["converged"] == "T"), frame


def relax(a, materials, calc, rank, ranks):
    """Relax this rank's share of the ids `materials` that are not done yet."""
    done = {record["material_id"] for record, _ in read_parts(a.out)}
    mine = materials[rank::ranks]
    left = set(mine) - done
    if rank == 0:
        device = torch.cuda.get_device_name(calc.device) if calc.device.type == "cuda" else "cpu"
        about = f"{calc.model.precision}, convolution {calc.model.chosen_conv()}, fmax {a.fmax:g} eV/A, {a.steps} steps"
        print(
            f"{a.weights}, {ranks} x {device}, {about}; done before: {len(done & {*materials})} of {len(materials)}; to {a.out}"
        )
    if not left:
        return
    (a.out / "parts").mkdir(exist_ok=True)
    part = a.out / f"parts/{time.time_ns()}-{rank}.extxyz"  # a new one: the last may end in half a frame
    bar = dict(total=len(mine), initial=len(mine) - len(left), unit="structure", disable=None if rank == 0 else True)
    structures = (to_atoms(*found) for found in read_structures(a.structures, left))
    with open(part, "x") as f, tqdm(**bar, desc=f"relaxing, rank 0 of {ranks}", smoothing=0.02) as bar:
        for _, atoms, energy, converged, steps, error in calc.relax(structures, a.fmax, a.steps):
            bar.update()
            if "out of memory" in (error or ""):  # not the structure's fault
                tqdm.write(f"{atoms.info['material_id']}: {error}; a rerun tries it again", sys.stderr)
                continue
            atoms.info |= dict(error=error.replace('"', "'")) if error else dict(energy=energy)
            atoms.info |= dict(steps=steps, converged=converged, conv=calc.model.chosen_conv())
            f.write(to_frame(atoms))
            f.flush()


def finish(a, summary):
    """Write relaxed.extxyz and predictions.csv.gz, print what failed. Returns {material_id: frame} of the relaxed."""
    import pandas as pd

    done = {record["material_id"]: (record, frame) for record, frame in read_parts(a.out)}
    rows, relaxed, missing = [], {}, dict(error=f"not in {a.structures}, or out of memory")
    for material, e_form, e_dft in zip(summary.index, summary[E_FORM], summary[E_DFT]):
        record, frame = done.get(material, (missing, None))
        if "error" not in record:
            relaxed[material] = frame
            e_form += (float(record["energy"]) - e_dft) / int(frame.split("\n", 1)[0])
            record = record | dict(e_form_per_atom=round(e_form, 9))
        rows.append(record | dict(material_id=material))
    if done.keys().isdisjoint(summary.index):
        raise ValueError(f"nothing was relaxed, perhaps the ids do not match: {a.summary} has {summary.index[0]}")
    columns = ["material_id", "energy", "e_form_per_atom", "steps", "converged", "error"]
    save(a.out / "predictions.csv.gz", gzip.compress(pd.DataFrame(rows, columns=columns).to_csv(index=False).encode()))
    save(a.out / "relaxed.extxyz", "".join(relaxed.values()).encode())
    n, loose = len(relaxed), sum(not done[material][0]["converged"] for material in relaxed)
    print(f"{n} of {len(rows)} relaxed; not converged, but kept: {loose} ({loose / max(n, 1):.2%})")
    for error, count in Counter(row["error"] for row in rows if "error" in row).most_common(10):
        print(f"no prediction for {count}: {error}")
    return relaxed


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def rmsd(frames):
    """RMSD of a predicted and a DFT-relaxed structure, in units of (volume/atoms)^(1/3); 1 if they do not match."""
    from pymatgen.analysis.structure_matcher import StructureMatcher
    from pymatgen.core import Structure

    pair = [to_atoms("structure", frame) for frame in frames]
    pair = [Structure(x.cell.array, list(x.symbols), x.positions, coords_are_cartesian=True) for x in pair]
    found = StructureMatcher(stol=1.0, scale=False).get_rms_dist(*pair)
    return 1.0 if found is None else float(found[0])


def rmsds(materials, relaxed, truth):
    """RMSD (S,) of ids: NaN if not in `truth`, 1 if in it but not in `relaxed`; both are {material_id: extxyz frame}."""
    out = np.array([1.0 if k in truth else np.nan for k in materials])
    rows = [row for row, k in enumerate(materials) if k in truth and k in relaxed]
    pairs = [(relaxed[materials[row]], truth[materials[row]]) for row in rows]
    workers = min(os.cpu_count(), 32, len(pairs) // 200)  # a worker takes seconds to start
    with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else contextlib.nullcontext() as pool:
        found = pool.imap(rmsd, pairs, 16) if pool else map(rmsd, pairs)
        out[rows] = list(tqdm(found, "RMSD", len(pairs), unit="structure", disable=None))
    return out


def metrics(error, hull, distance, srme=None, prevalence=None):
    """{name: value} of the metrics that the data allow.

    Per row: error, predicted - DFT formation energy, eV/atom (NaN: no prediction); hull, DFT hull distance, eV/atom, and
    distance, RMSD (NaN: unknown). prevalence: share of stable rows by which the DAF divides; default: that of these rows.
    """
    there, known, both = np.isfinite(error), np.isfinite(hull), np.isfinite(hull + error)
    stable, called = hull <= 0, hull + error <= 0
    tp, fp, positive = (x.sum().item() for x in (stable & called, known & ~stable & called, stable))
    rows = known.sum().item()
    out = {"rows": len(error), "  with a prediction": there.sum(), "  with a DFT hull distance": rows}
    out["  with a DFT structure"] = np.isfinite(distance).sum()
    if 0 < positive < rows:
        precision = tp / (tp + fp) if tp + fp else math.nan
        out |= {"F1": 2 * tp / (tp + fp + positive), "DAF": precision / (prevalence or positive / rows)}
        out |= {"precision": precision, "recall (TPR)": tp / positive, "FPR": fp / (rows - positive)}
        out["accuracy"] = (rows - positive - fp + tp) / rows
    if there.any():
        out |= {"MAE (eV/atom)": np.abs(error[there]).mean(), "RMSE (eV/atom)": (error[there] ** 2).mean() ** 0.5}
    if both.sum() > 1 and np.ptp(hull[both]) > 0:
        out["R2 of hull distances"] = 1 - (error[both] ** 2).mean() / hull[both].var()
    if np.isfinite(distance).any():
        out["RMSD / (V/n)^(1/3)"] = d = np.nanmean(distance)
        if srme is not None and "F1" in out:
            out["CPS-1"] = 0.5 * out["F1"] + 0.4 * (1 - srme / 2) + 0.1 * np.clip(1 - d / 0.15, 0, 1)
    return out


def score(summary, error, distance, srme=None):
    """Print the metrics of each subset that the summary allows, and what is left out; arguments as in `metrics`, a row a
    material. Returns {subset: metrics}."""
    unknown = np.full(len(error), np.nan)
    hull, unique = (np.asarray(summary.get(k, unknown)) for k in (HULL, "unique_prototype"))
    unique = unique == "True"
    of = lambda rows, **more: metrics(error[rows], hull[rows], distance[rows], srme, **more)
    table = {"all": of(slice(None))} | ({"unique prototypes": of(unique)} if unique.any() else {})
    if np.isfinite(hull[unique]).all() and np.isfinite(error[unique]).sum() >= 10_000:
        best = np.argsort(np.where(unique, hull + error, np.nan), kind="stable")[:10_000]  # NaN comes last
        table["10k most stable"] = of(best, prevalence=(hull[unique] <= 0).mean())
    pymatgen = "" if importlib.util.find_spec("pymatgen") else ", and pymatgen"
    left_out = {
        f"{np.isnan(hull).sum()} rows without a DFT hull distance, but for MAE, RMSE and RMSD": np.isnan(hull).any(),
        "unique prototypes: the summary names no unique_prototype": not unique.any(),
        "10k most stable: needs all hull distances and 10,000 predictions of unique prototypes": len(table) < 3,
        f"RMSD: needs relaxed structures, those of DFT (--relaxed){pymatgen}": np.isnan(distance).all(),
        "CPS-1: needs --srme, F1 and RMSD": "CPS-1" not in table["all"],
    }
    print(f"{'':26}" + "".join(f"{subset:>20}" for subset in table))
    for name in table["all"]:
        values = [m.get(name, "-") for m in table.values()]
        print(f"{name:26}" + "".join(f"{v:20.4f}" if isinstance(v, float) else f"{v:>20}" for v in values))
    print("".join(f"left out: {what}\n" for what, holds in left_out.items() if holds), end="")
    return table


def read_predictions(path, summary):
    """Predicted - DFT formation energy of the rows of the summary, (S,), eV/atom, by the first column e_form_per_atom...; NaN
    without a prediction, or if off by more than 5 eV/atom. Raises OSError or ValueError."""
    table = read_table(path)
    columns = [k for k in table if k.startswith("e_form_per_atom")]
    if not columns:
        raise ValueError(f"{path} has no column e_form_per_atom...")
    if table.index.intersection(summary.index).empty:
        raise ValueError(f"the ids do not match: {path} has none like {summary.index[0]}")
    print(f"{path}, column {columns[0]}")
    error = (table[columns[0]].reindex(summary.index) - summary[E_FORM]).to_numpy()
    return np.where(np.abs(error) > 5, np.nan, error)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--structures", help="zip of extxyz: one a material, or many frames a member (default: fetched)")
    p.add_argument("--summary", help=".csv or .csv.gz of DFT energies and hull distances (default: fetched)")
    p.add_argument("--relaxed", help="DFT-relaxed structures, for the RMSD (default: fetched, if --structures is)")
    p.add_argument("--n", type=int, help="so many structures, drawn at random, the same each time (default: all)")
    p.add_argument("--fmax", type=float, default=0.02, help="largest force after a relaxation, eV/A (default: 0.02)")
    p.add_argument("--steps", type=int, default=500, help="steps of a relaxation, at most (default: 500)")
    p.add_argument(
        "--out", type=Path, default=Path("runs/discovery"), help="folder of the results (default: runs/discovery)"
    )
    p.add_argument("--score", metavar="CSV", help="score these predictions, relax nothing")
    p.add_argument("--srme", type=float, help="SRME that eval_phonon.py kappa has printed, for the CPS-1")
    add_options(p)
    a = p.parse_args(argv)
    rank, ranks, index = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        if a.n is not None and a.n < 1:
            raise ValueError("--n must be positive")
        if a.score and (a.relaxed or a.structures or ranks > 1):
            raise ValueError("--score takes neither --relaxed nor --structures nor torchrun")
        run(a, rank, ranks, index)
        if dist.is_initialized():  # without the end of the process group's threads, which may abort a process
            sys.stdout.flush()
            os._exit(0)
    except (ValueError, OSError, ImportError) as e:
        hint = f": pip install {e.name}" if isinstance(e, ImportError) and e.name else ""
        print(f"error{f' on rank {rank}' if ranks > 1 else ''}: {e}{hint}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError:
        time.sleep(10 * dist.is_initialized())  # if another rank is gone, torchrun ends this one
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def run(a, rank, ranks, index):
    """Rank 0 fetches and scores, all relax. index: of this rank's GPU."""
    if a.relaxed:
        importlib.import_module("pymatgen")  # should it be missing, now
    start, barrier = time.perf_counter(), lambda: None
    if ranks > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=100))  # the ranks only wait for each other
        barrier = dist.barrier
    if a.device != "cpu" and torch.cuda.is_available():
        if index >= torch.cuda.device_count():
            raise ValueError(f"more processes than the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(index)
        a.device = f"cuda:{index}"
    if rank:
        barrier()  # until rank 0 has fetched the files and checked the settings
    a.summary = a.summary or data.fetch_figshare(*WBM["summary"])
    summary = read_table(a.summary, E_FORM, *[E_DFT] * (not a.score))
    summary = summary.iloc[np.sort(np.random.RandomState(0).permutation(len(summary))[: a.n])]
    materials, truth, distance = summary.index.tolist(), {}, np.full(len(summary), np.nan)
    if not a.score:
        if not a.structures and importlib.util.find_spec("pymatgen"):
            a.relaxed = a.relaxed or data.fetch_figshare(*WBM["relaxed"])
        a.structures = a.structures or data.fetch_figshare(*WBM["structures"])
        calc = NequixCalculator(a.weights, a.device, a.precision, a.conv)
        if rank == 0:
            settings = dict(weights=calc.fingerprint(), fmax=a.fmax, steps=a.steps, precision=calc.model.precision)
            settings |= dict(structures=data.digest(a.structures, "md5")[:12])
            keep_settings(a.out, settings)
            truth = dict(read_structures(a.relaxed, materials)) if a.relaxed else {}  # now, should it be damaged
            if a.relaxed and not truth:
                raise ValueError(f"the ids do not match: {a.relaxed} has none like {materials[0]}")
            barrier()
        relax(a, materials, calc, rank, ranks)
        barrier()
        if rank:
            return
        print(f"relaxed; {time.perf_counter() - start:.1f} s from the start")
        relaxed = finish(a, summary)
        a.score = a.out / "predictions.csv.gz"
        distance = rmsds(materials, relaxed, truth) if truth else distance
    score(summary, read_predictions(a.score, summary), distance, a.srme)


if __name__ == "__main__":
    main()
