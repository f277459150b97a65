"""Matbench-Discovery: relax the 256,963 WBM structures, predict which are stable, score it.

    python eval_discovery.py --weights nequix-mp-1 --out runs/discovery         # fetches the official files to data/wbm
    torchrun --nproc_per_node=8 eval_discovery.py --weights nequix-mp-1 --out runs/discovery
    python eval_discovery.py --weights nequix-mp-1 --n 10000 --out runs/random  # the same random 10,000 each time
    python eval_discovery.py --score preds.csv.gz --n 10000                     # any model's predictions, on the same rows

Every structure is on disk once it is relaxed: rerunning a command goes on, on any number of GPUs, also with another --n or
--shard. --out gets parts/, a file of extxyz frames for each process, which a rerun goes on from; when all is done
predictions.csv.gz and relaxed.extxyz; and with --plot discovery.png.

e_form = e_form of DFT + (E - uncorrected E of DFT) / atoms, eV/atom: the MP2020 correction is that of the DFT structure. The
leaderboard recomputes it on the relaxed structure, which differs for the few whose oxide type changes. An error above 5
eV/atom counts as no prediction; no prediction counts as unstable, and as an RMSD of 1, but not in MAE, RMSE and R2.
"""

import argparse
import contextlib
import csv
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

WBM = {  # option: figshare file, name, md5 (these from data-files.yml of matbench-discovery)
    "structures": (48169597, "2024-08-04-wbm-initial-atoms.extxyz.zip", "2a292211ca6acb30ed8416178d644098"),
    "summary": (64706751, "2023-12-13-wbm-summary.csv.gz", "1555268d3aa59d20262cb9d01ce0994b"),
    "relaxed": (48169600, "2024-08-04-wbm-relaxed-atoms.extxyz.zip", "4726643ac0dfbab69a4284454c891e68"),
}
E_FORM, HULL = "e_form_per_atom_mp2020_corrected", "e_above_hull_mp2020_corrected_ppd_mp"
COLUMNS = "material_id", "energy", "e_form_per_atom", "steps", "converged", "error"
ENERGY = re.compile(r"\benergy=(\S+)")
DAMAGE = ValueError, KeyError, TypeError, EOFError, zlib.error, gzip.BadGzipFile, csv.Error  # what reading may raise

# ----------------------------------------------------------------------------------------------------------------------
# Files


def official(option):
    """The path of an official file, fetched if it is not there. Raises OSError or ValueError with a one-line reason."""
    number, name, md5 = WBM[option]
    return str(data.fetch_figshare(number, f"data/wbm/{name}", md5))


def read_csv(path, *required):
    """The ids, energies (eV, eV/atom) and flags of a .csv or .csv.gz as {column: (S,)}. Raises OSError or ValueError."""
    try:
        with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as f:
            header, *rows = filter(None, csv.reader(f))
        table = {}
        for k, column in zip(header, zip(*rows, strict=True), strict=True):
            if k in ("material_id", "unique_prototype"):
                table[k] = np.array(column)
            elif k.startswith(("e_form_per_atom", "uncorrected_energy", HULL)):
                table[k] = np.array([float(x or "nan") for x in column])
    except DAMAGE as e:
        raise ValueError(f"{path} is damaged, or no table ({e})") from None
    if missing := [name for name in ("material_id", *required) if name not in table]:
        raise ValueError(f"{path} has no column {', '.join(missing)}, but {', '.join(header)}")
    if len(np.unique(table["material_id"])) < len(rows):
        raise ValueError(f"{path} has ids twice: {Counter(table['material_id'].tolist()).most_common(1)[0][0]}")
    return table


def read_summary(path, n=None, shard=None, need=()):
    """The WBM summary as {column: (S,)}; of n random rows, or of the i-th of n shards. Some metrics need more columns."""
    table = read_csv(path, E_FORM, *need)
    rows = slice(shard[0] - 1, None, shard[1]) if shard else slice(None)
    if n:
        rows = np.sort(np.random.RandomState(0).permutation(len(table["material_id"]))[:n])
    return {k: v[rows] for k, v in table.items()}


def read_structures(path, wanted):
    """Yield (material_id, extxyz frame) of those in the set `wanted`, a frame at a time. From a zip of extxyz, one or many
    frames a member; or a .json.gz, a list of {material_id, energy, structure in the form of pymatgen}. Raises OSError or
    ValueError with a one-line reason."""
    for name, frame, _ in data.read_frames([path]):
        if name.endswith(".json.gz"):
            try:
                for entry in json.loads(gzip.decompress(frame)):
                    if entry["material_id"] in wanted:
                        atoms = data.from_pymatgen(entry["structure"])
                        atoms.info["energy"] = entry["energy"]
                        yield entry["material_id"], to_frame(atoms)
            except DAMAGE as e:
                raise ValueError(f"{path} is damaged, or has another form ({type(e).__name__} {e})") from None
            continue
        if not isinstance(frame, str):
            reason = frame if isinstance(frame, ValueError) else "no extxyz, nor a whole zip (an interrupted download?)"
            raise ValueError(f"{name}: {reason}")
        given = re.search(r'\bmaterial_id="?([^\s"]+)', frame.split("\n", 2)[1])
        material = given[1] if given else re.split("[:/]", name)[-1].split(".")[0]
        if material in wanted:
            yield material, frame


def to_atoms(material, frame):
    try:
        atoms = ase.io.read(io.StringIO(frame), format="extxyz")
    except Exception as e:  # ASE's readers raise all kinds
        raise ValueError(f"{material} cannot be read ({type(e).__name__} {e})".split("\n")[0]) from None
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=dict(material_id=material))


def to_frame(atoms):
    f = io.StringIO()
    ase.io.write(f, atoms, "extxyz", columns=["symbols", "positions"], write_results=False)
    return f.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Relaxation


def read_parts(out):
    """Yield ({material_id, energy, steps, converged, error, settings, device, seconds, part}, extxyz frame) of each structure
    that is done; last of those that did not fit the memory, which a rerun tries again."""
    seen, too_large = {None}, {}
    for name, frame, _ in data.read_frames(sorted(out.glob("parts/*.extxyz"))):
        if isinstance(frame, ValueError) or not frame.endswith("\n"):  # the last of a process that was killed
            continue
        record = {k: v.strip('"') for k, v in re.findall(r'(\w+)=("[^"]*"|\S+)', frame.split("\n", 2)[1])}
        if (material := record.get("material_id")) not in seen:
            result = record | dict(part=name.split("#")[0], converged=str(record["converged"] == "T")), frame
            if record.get("error", "").startswith("out of memory"):
                too_large[material] = result
            else:
                seen.add(material)
                yield result
    yield from (result for material, result in too_large.items() if material not in seen)


def relax(a, every, calc, rank, ranks, start):
    """Relax this rank's share of the materials `every`, those that are not done yet. start: of its clock, s."""
    done = set()
    settings = f"weights {calc.fingerprint()}, fmax {a.fmax:g}, steps {a.steps}, {a.dtype}, "
    settings += f"structures {data.digest(a.structures, 'md5')[:12]}"
    for record, _ in read_parts(a.out):
        if record["settings"] != settings:
            raise ValueError(f"{a.out} holds a run with {record['settings']}, not {settings}: choose another --out")
        if not record.get("error", "").startswith("out of memory"):
            done.add(record["material_id"])
    mine = every[rank::ranks]
    left = set(mine) - done
    device = torch.cuda.get_device_name(calc.device) if calc.device.type == "cuda" else "cpu"
    if rank == 0:
        print(
            f"{len(every)} structures, {len(done.intersection(every))} of them done before; {ranks} x {device}; {settings}"
        )
    if not left:
        return

    def stream():
        for material, frame in read_structures(a.structures, left):
            left.remove(material)  # should it come twice
            yield to_atoms(material, frame)

    (a.out / "parts").mkdir(parents=True, exist_ok=True)
    part = a.out / f"parts/{time.time_ns()}-{rank}.extxyz"  # its own: half a frame at the end of another spoils nothing
    bar = dict(total=len(mine), initial=len(mine) - len(left), unit="structure", disable=None if rank == 0 else True)
    with open(part, "x") as f, tqdm(**bar, desc=f"relaxing, rank 0 of {ranks}", smoothing=0.02) as bar:
        for _, atoms, energy, converged, steps, error in calc.relax(stream(), a.fmax, a.steps):
            atoms.info.update(energy=energy, steps=steps, converged=converged, settings=settings, device=device)
            atoms.info["seconds"] = round(time.perf_counter() - start, 3)
            if error:
                atoms.info["error"] = error.replace('"', "'")
            f.write(to_frame(atoms))
            f.flush()
            bar.update()


def finish(a, summary):
    """Write relaxed.extxyz and predictions.csv.gz, and tell what failed."""
    every, records, last, hours = summary["material_id"].tolist(), {}, {}, Counter()
    wanted = set(every)
    with open(a.out / "relaxed.extxyz.tmp", "w") as f:
        for r, frame in read_parts(a.out):
            last[r["part"]] = r
            if r["material_id"] in wanted:
                records[r["material_id"]] = {k: r[k] for k in COLUMNS if k in r} | dict(n=int(frame.split("\n", 1)[0]))
                if "error" not in r:
                    f.write(frame)
    if not records:
        raise ValueError(f"the ids do not match: {a.structures} has none of {a.summary}, such as {every[0]}")
    with gzip.open(a.out / "predictions.csv.gz.tmp", "wt") as f:
        table = csv.DictWriter(f, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for material, dft, e_form in zip(every, summary["uncorrected_energy"], summary[E_FORM]):
            r = records.setdefault(material, dict(material_id=material, error=f"not in {a.structures}"))
            e_form += (float(r["energy"]) - dft) / r["n"] if "error" not in r else np.nan
            table.writerow(r | (dict(energy="") if "error" in r else dict(e_form_per_atom=f"{e_form:.9f}")))
    for name in ("relaxed.extxyz", "predictions.csv.gz"):
        os.replace(a.out / f"{name}.tmp", a.out / name)
    errors = Counter(r["error"] for r in records.values() if "error" in r)
    n, loose = len(every) - errors.total(), sum(r["converged"] == "False" for r in records.values() if "error" not in r)
    print(f"{n} of {len(every)} relaxed; not converged, but kept: {loose} ({loose / max(n, 1):.2%})")
    for error, count in errors.most_common(10):
        print(f"no prediction for {count}: {error}")
    for r in last.values():
        hours["CPU-hours" if r["device"] == "cpu" else f"GPU-hours of {r['device']}"] += float(r["seconds"]) / 3600
    print("time, of each process until its last structure: " + ", ".join(f"{h:.4f} {of}" for of, h in hours.items()))


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def rmsd(frames):
    """Of a predicted and a DFT-relaxed structure, in units of (volume/atoms)^(1/3); 1 if they do not match."""
    from pymatgen.analysis.structure_matcher import StructureMatcher
    from pymatgen.core import Structure

    pair = [to_atoms("structure", frame) for frame in frames]
    pair = [Structure(x.cell.array, list(x.symbols), x.positions, coords_are_cartesian=True) for x in pair]
    found = StructureMatcher(stol=1.0, scale=False).get_rms_dist(*pair)
    return 1.0 if found is None else float(found[0])


def rmsds(every, relaxed, truth):
    """(S,): NaN for materials not in `truth`, 1 for those in it but not in `relaxed`; both are {material_id: frame}."""
    out = np.array([1.0 if material in truth else np.nan for material in every])
    rows = [k for k, material in enumerate(every) if material in truth and material in relaxed]
    pairs = [(relaxed[every[k]], truth[every[k]]) for k in rows]
    workers = min(os.cpu_count(), 32, len(pairs) // 200)  # each takes seconds to start
    with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else contextlib.nullcontext() as pool:
        found = pool.imap(rmsd, pairs, 16) if pool else map(rmsd, pairs)
        out[rows] = list(tqdm(found, "RMSD", len(pairs), unit="structure", disable=None))
    energies = [(ENERGY.search(p), ENERGY.search(t), int(p.split()[0])) for p, t in pairs]
    if off := [abs(float(p[1]) - float(t[1])) / n for p, t, n in energies if t]:
        print(
            f"energies of {len(off)} structures, against those with the DFT-relaxed: MAE {1000 * np.mean(off):.2f} meV/atom"
        )
    return out


def metrics(error, hull, distance, srme=None, prevalence=None):
    """{name: value} of what can be had. error (S,): predicted - DFT formation energy, eV/atom, NaN: no prediction; hull (S,):
    DFT hull distance, eV/atom, and distance (S,): RMSD, NaN: unknown. prevalence: of stable rows, for DAF."""
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
    if both.sum() > 1:
        out["R2 of hull distances"] = 1 - (error[both] ** 2).mean() / hull[both].var()
    if np.isfinite(distance).any():
        out["RMSD / (V/n)^(1/3)"] = d = np.nanmean(distance)
        if srme is not None and "F1" in out:
            out["CPS-1"] = 0.5 * out["F1"] + 0.4 * (1 - srme / 2) + 0.1 * np.clip(1 - d / 0.15, 0, 1)
    return out


def score(summary, error, distance, srme=None):
    """Print the metrics of each subset that the summary allows, and what is left out. Returns {subset: metrics}."""
    hull, unique = (
        summary.get(HULL, np.full(len(error), np.nan)),
        summary.get("unique_prototype", np.array([""])) == "True",
    )
    of = lambda rows, **kwargs: metrics(error[rows], hull[rows], distance[rows], srme, **kwargs)
    table, left_out = {"all": of(slice(None))}, []
    if np.isnan(hull).any():
        left_out.append(f"{np.isnan(hull).sum()} rows without a DFT hull distance, but for MAE, RMSE and RMSD")
    if not unique.any():
        left_out.append("unique prototypes and the 10k most stable: the summary names no unique_prototype")
    else:
        table["unique prototypes"] = of(unique)
        best = np.argsort(np.where(unique, hull + error, np.nan), kind="stable")[:10_000]  # NaN last
        if len(best) < 10_000 or np.isnan(hull[unique]).any() or np.isnan(error[best]).any() or not unique[best].all():
            left_out.append(
                "10k most stable: needs 10,000 predictions, and all hull distances, among the unique prototypes"
            )
        else:
            table["10k most stable"] = of(best, prevalence=(hull[unique] <= 0).mean())
    if np.isnan(distance).all():
        left_out.append("RMSD: needs relaxed structures, those of DFT (--relaxed), and pymatgen")
    if "CPS-1" not in table["all"]:
        left_out.append("CPS-1: needs --srme, F1 and RMSD")
    print(f"{'':26}" + "".join(f"{subset:>20}" for subset in table))
    for name in table["all"]:
        values = [m.get(name, "-") for m in table.values()]
        print(f"{name:26}" + "".join(f"{v:20.4f}" if isinstance(v, float) else f"{v:>20}" for v in values))
    print("".join(f"left out: {line}\n" for line in left_out), end="")
    return table


def plot(path, hull, error):
    """Hull distances, predicted against DFT; the mean |error| in windows of 0.04 eV/atom of the DFT hull distance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    there = np.isfinite(hull + error)
    x, e, centres = hull[there], error[there], np.linspace(-0.2, 0.2, 81)
    windows = [np.abs(e[np.abs(x - c) <= 0.02]) for c in centres]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    left.plot(x, x + e, ".", [-1, 1, np.nan, 0, 0], [0, 0, np.nan, -1, 1], "k-", ms=1, lw=0.5)
    left.set(
        xlim=(-0.4, 0.4), ylim=(-0.4, 0.4), ylabel="predicted hull distance (eV/atom)", title=f"{len(x)} structures"
    )
    right.plot(centres, [w.mean() if len(w) else np.nan for w in windows])
    right.fill_between([-0.2, 0, 0.2], [0.2, 0, 0.2], 0.2, color="0.9", label="|error| > |hull distance|")
    right.set(xlim=(-0.2, 0.2), ylim=(0, 0.2), ylabel="MAE within 0.02 eV/atom (eV/atom)")
    right.legend()
    figure.supxlabel("DFT hull distance (eV/atom)", fontsize="medium")
    figure.savefig(path, dpi=150)


def read_predictions(path, summary):
    """predicted - DFT formation energy (S,), eV/atom, by the first column e_form_per_atom...; NaN without a prediction, or
    beyond 5. Raises OSError or ValueError."""
    table = read_csv(path)
    column = next((k for k in table if k.startswith("e_form_per_atom")), None)
    if column is None:
        raise ValueError(f"{path} has no column e_form_per_atom...")
    predicted = dict(zip(table["material_id"].tolist(), table[column]))
    if predicted.keys().isdisjoint(every := summary["material_id"].tolist()):
        raise ValueError(f"the ids do not match: {path} has none like {every[0]}")
    print(f"{path}, column {column}")
    error = np.array([predicted.get(material, np.nan) for material in every]) - summary[E_FORM]
    return np.where(np.abs(error) > 5, np.nan, error)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", default="nequix-mp-1", help="a released name, an .nqx file or a model.pt")
    p.add_argument("--structures", help="zip of extxyz: one a material, or many frames a member (default: fetched)")
    p.add_argument("--summary", help=".csv or .csv.gz of DFT energies and hull distances (default: fetched)")
    p.add_argument("--relaxed", help="DFT-relaxed structures, for the RMSD (default: fetched, if --structures is)")
    rows = p.add_mutually_exclusive_group()
    rows.add_argument("--n", type=int, help="so many rows at random, the same each time")
    rows.add_argument("--shard", metavar="I/N", help="every N-th row from the I-th on; I from 1 to N")
    p.add_argument("--fmax", type=float, default=0.02, help="eV/A (default: 0.02)")
    p.add_argument("--steps", type=int, default=500, help="at most so many (default: 500)")
    p.add_argument("--out", type=Path, default=Path("runs/discovery"), help="folder (default: runs/discovery)")
    p.add_argument("--score", metavar="CSV", help="score these predictions, relax nothing")
    p.add_argument("--srme", type=float, help="of the thermal conductivity, for CPS-1")
    p.add_argument("--plot", action="store_true", help="draw discovery.png in --out")
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    p.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="of the network")
    p.add_argument("--conv", choices=["auto", "torch", "oeq", "fused"], default="auto", help="convolution")
    a = p.parse_args(argv)
    rank, ranks, index = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        a.shard = a.shard and [int(x) for x in a.shard.split("/")]
        if a.shard and not (len(a.shard) == 2 and 1 <= a.shard[0] <= a.shard[1]):
            raise ValueError("--shard is I/N, with I from 1 to N")
        if a.n is not None and a.n < 1:
            raise ValueError("--n must be positive")
        if a.score and (a.relaxed or a.structures):
            raise ValueError("--score has no structures: leave --relaxed and --structures out")
        run(a, time.perf_counter(), rank, ranks, index)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError, ImportError) as e:
        print(f"error: {e}" if ranks == 1 else f"error on rank {rank}: {e}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError:
        time.sleep(10 * dist.is_initialized())  # if another rank is gone, torchrun ends this one
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def run(a, start, rank, ranks, index):
    """Rank 0 fetches and scores; all relax. start: of the clock, s; index: of the GPU of this rank."""
    matcher, barrier = importlib.util.find_spec("pymatgen"), lambda: None
    if a.relaxed and not matcher:
        raise ImportError("--relaxed needs pymatgen: pip install pymatgen")
    if ranks > 1:  # gloo: they only wait for each other
        dist.init_process_group("gloo", timeout=timedelta(days=100))
        barrier = dist.barrier
    if a.device != "cpu" and torch.cuda.is_available():
        if index >= torch.cuda.device_count():
            raise ValueError(f"more processes than the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(index)
        a.device = f"cuda:{index}"
    for turn in (rank == 0, rank > 0):  # the others find what rank 0 fetched
        if turn:
            a.summary = a.summary or official("summary")
            if not a.score:
                a.relaxed = a.relaxed or (official("relaxed") if matcher and not a.structures else None)
                a.structures = a.structures or official("structures")
                calc = NequixCalculator(a.weights, a.device, a.dtype, a.conv)
        barrier()
    summary = read_summary(a.summary, a.n, a.shard, [HULL] * a.plot + ["uncorrected_energy"] * (not a.score))
    every = summary["material_id"].tolist()
    distance = np.full(len(every), np.nan)
    if not a.score:
        truth = (
            dict(read_structures(a.relaxed, set(every))) if a.relaxed and rank == 0 else {}
        )  # soon, should it be damaged
        if a.relaxed and rank == 0 and not truth:
            raise ValueError(f"the ids do not match: {a.relaxed} has none of {a.summary}, such as {every[0]}")
        relax(a, every, calc, rank, ranks, start)
        barrier()
        if rank:
            return
        finish(a, summary)
        a.score = str(a.out / "predictions.csv.gz")
        if truth:
            distance = rmsds(every, dict(read_structures(a.out / "relaxed.extxyz", truth)), truth)
    error = read_predictions(a.score, summary)
    score(summary, error, distance, a.srme)
    if a.plot:
        a.out.mkdir(parents=True, exist_ok=True)
        plot(a.out / "discovery.png", summary[HULL], error)


if __name__ == "__main__":
    main()
