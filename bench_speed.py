"""Time Nequix: steps of molecular dynamics, training steps and relaxations. Measure its energy drift in NVE.

    python bench_speed.py infer                                  # ms a step of diamond and silicon
    python bench_speed.py infer --models fused mace sevennet-0   # beside other potentials that are installed
    python bench_speed.py train data/sample --tf32 --profile     # structures/s, memory and the longest CUDA kernels
    torchrun --nproc_per_node=2 bench_speed.py train data/sample --tf32 --models fused    # the same batch on two GPUs
    python bench_speed.py relax wbm.extxyz                       # structures/s, against ASE one structure at a time
    python bench_speed.py nve                                    # meV/atom/ps in float32 and in float64
    python bench_speed.py plot runs/speed/infer.csv              # steps/day against atoms, of one or several races

infer and train time each model at each size in a process of its own, one after another. A model that fails or is too
slow at a size is not asked for larger ones. Results are appended to a table (.md) and a CSV file in --out as they come;
what the models print goes to log.txt there. Under torchrun the ranks themselves time all sizes.

A time is the median over --steps steps, with the first and last decile. At least five steps before them are not
counted: they compile kernels and capture CUDA graphs. The models "fused", "oeq" and "torch" are ours, named by their
convolution; records/peers.py has the others. One that needs its own Python environment is timed by running this script
there with the same --out.
"""

import argparse
import csv
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ase import units
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE

from calc import NequixCalculator, read
from data import TRAIN, PackedSet, deal, prefetch, step_indices
from model import Nequix, add_options
from muon import Muon
from train import Trainer, label_counts

WARM_UP = 5  # steps before the timed ones
OURS = ["fused", "oeq", "torch"]


def peer(command, model):
    """The function of records/peers.py that makes the other potential `model`. Raises ValueError if there is none."""
    sys.path.append(str(Path(__file__).parent / "records"))
    import peers  # imports the other packages only where they are used

    known = peers.PEERS[command]
    if model not in known:
        raise ValueError(f"no model {model}; there are {', '.join([*OURS, *known])}")
    return known[model]


# ----------------------------------------------------------------------------------------------------------------------
# Clocks, memory and the profiler


def clock(device):
    """Seconds, once the GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(seconds):
    """Median, first and last decile, ms."""
    return dict(zip(("ms", "low", "high"), (1000 * np.quantile(seconds, [0.5, 0.1, 0.9])).tolist()))


def peak_memory():
    """Largest GPU memory, GiB, of torch's tensors since the last reset of its counter, and of JAX's arrays."""
    if not torch.cuda.is_available():
        return 0.0
    jax = sys.modules.get("jax")
    of_jax = (jax.devices()[0].memory_stats() or {}) if jax else {}
    return max(of_jax.get("peak_bytes_in_use", 0), torch.cuda.max_memory_allocated()) / 2**30


def profiled(step, device):
    """Of WARM_UP calls of step(): kernels, the ten that take longest as [name, ms a step] (on a CPU, operators); and
    busy_percent, the share of the time in which the GPU runs any kernel or copy."""
    cuda, activity = device.type == "cuda", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profile:
        for _ in range(WARM_UP):
            step()
        clock(device)
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [e for e in profile.events() if e.device_type == kind and not e.is_user_annotation]
    total = Counter()
    for e in events:
        total[e.name] += (e.time_range.elapsed_us() if cuda else e.self_cpu_time_total) / 1000 / WARM_UP
    out = dict(kernels=total.most_common(10))
    if cuda and events:
        start, end = np.array(sorted((e.time_range.start, e.time_range.end) for e in events)).T
        end = np.maximum.accumulate(end)  # kernels of several streams overlap
        idle = (start[1:] - end[:-1]).clip(min=0).sum()
        out["busy_percent"] = float(100 - 100 * idle / (end[-1] - start[0]))
    return out


def time_steps(step, steps, profile, device):
    """A row with the times of step(), and its profile."""
    times = [clock(device)]
    for _ in range(WARM_UP + steps):
        step()
        times.append(clock(device))
    seconds = np.diff(times)
    row = spread(seconds[WARM_UP:]) | dict(first_s=seconds[0])
    return row | (profiled(step, device) if profile else {})


def what_ran(model):
    """How `model` runs. Raises ValueError if its convolution does not work here."""
    return dict(what="this repository", precision=model.precision, convolution=model.chosen_conv())


# ----------------------------------------------------------------------------------------------------------------------
# A step of molecular dynamics through ASE: new positions, neighbour list, energy, forces and stress, back in numpy


def crystal(symbol, n):
    """A cubic supercell of about n atoms in the diamond structure."""
    return bulk(symbol, cubic=True) * max(round((n / 8) ** (1 / 3)), 1)


def verlet(atoms, kelvin=300):
    """Velocity Verlet with 1 fs. Velocities of twice the temperature: half turns into potential energy."""
    sigma = np.sqrt(2 * units.kB * kelvin * atoms.get_masses())[:, None]
    momenta = sigma * np.random.default_rng(0).normal(size=(len(atoms), 3))
    atoms.set_momenta(momenta - momenta.mean(0))
    return VelocityVerlet(atoms, 1 * units.fs)


def time_dynamics(model, device, weights, precision, symbol, atoms, steps, profile):
    structure = crystal(symbol, atoms)
    if model in OURS:
        structure.calc = NequixCalculator(weights, device, precision, model)
        ran = what_ran(structure.calc.model)
    elif precision == "float32":
        structure.calc, what = peer("infer", model)(device.type, weights)
        ran = dict(what=what, precision=precision)
    else:
        raise ValueError("other potentials are timed in float32 only")
    md = verlet(structure)

    def step():
        md.run(1)
        structure.get_stress()

    return ran | time_steps(step, steps, profile, device)


# ----------------------------------------------------------------------------------------------------------------------
# A training step: neighbour list, loss, gradient, Muon, averaged weights. Each batch is taken in one piece.


def stamp(device):
    """The present time: of the GPU, which works behind the CPU, without waiting for it."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def time_training(model, device, path, precision, batch, steps, profile):
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if model not in OURS:
        if ranks > 1:
            raise ValueError("torchrun is for our own models")
        step, atoms, edges, what = peer("train", model)(device, path, precision, batch)
        row = dict(what=what, precision=precision) | time_steps(step, steps, profile, device)
        return row | rates(row["ms"] / 1000, batch, atoms, edges)

    packed = PackedSet(path, Nequix.DEFAULTS["cutoff"], device)
    torch.manual_seed(0)
    network = Nequix(packed.meta["statistics"], model, tf32=precision == "tf32")
    network = network.to(device, torch.float64 if precision == "float64" else torch.float32)
    ran = what_ran(network)
    trainer = Trainer(network, Muon(network.parameters(), lr=0.01), (20, 20, 5))
    frames = packed.indices(TRAIN)
    batches = [step_indices(frames, batch, 0, step) for step in range(WARM_UP + steps)]
    mine = [deal(indices, packed.n_edges, ranks)[rank] for indices in batches]
    timed = range(WARM_UP, WARM_UP + steps)
    # The largest batches come first: a CUDA graph with room for them is not captured again. The last two are not used:
    # so, while steps are timed, as many batches are built as used.
    plan = [max(timed, key=lambda i: sizes[mine[i]].sum()) for sizes in (packed.n_atoms, packed.n_edges)]
    plan += [*range(WARM_UP), *timed, *(range(WARM_UP) if profile else ()), 0, 0]
    stream, upcoming = prefetch(packed, [mine[i] for i in plan]), enumerate(plan)

    def run(n):
        """Take the next n steps of the plan; returns the seconds of each."""
        stamps = [stamp(device)]
        for t, i in itertools.islice(upcoming, n):
            if trainer.step(itertools.islice(stream, 1), label_counts(packed, batches[i]), 0.01, t) is None:
                raise MemoryError("out of memory")
            stamps.append(stamp(device))
        clock(device)
        return np.diff(stamps if device.type == "cpu" else [stamps[0].elapsed_time(s) / 1000 for s in stamps])

    first = run(2 + WARM_UP)[0]
    seconds = run(steps)
    atoms, edges = (np.mean([sizes[batches[i]].sum() for i in timed]) for sizes in (packed.n_atoms, packed.n_edges))
    row = ran | dict(first_s=first) | spread(seconds) | rates(seconds.mean(), batch, atoms, edges)
    return row | (profiled(lambda: run(1), device) if profile else {})


def rates(seconds, structures, atoms, edges):
    """Of a step that takes so many seconds."""
    return dict(structures_per_s=structures / seconds, atoms_per_s=atoms / seconds, edges_per_s=edges / seconds)


# ----------------------------------------------------------------------------------------------------------------------
# A process for each model and size


def measure(command, device, **job):
    """A row of results: the keys are COLUMNS, and kernels with a profile."""
    if torch.cuda.is_available():  # a rank of torchrun has done other jobs before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row = (time_dynamics if command == "infer" else time_training)(device=torch.device(device), **job)
    return row | dict(memory_GiB=peak_memory())


def measure_and_print(job):
    """The process of its own: prints the row, or dict(error=...), as a line of JSON."""
    try:
        row = measure(**job)
    except Exception as e:  # of any library
        memory = "out of memory" in str(e).lower() or "RESOURCE_EXHAUSTED" in str(e)
        row = dict(error="out of memory" if memory else f"{type(e).__name__}: {e}".splitlines()[0])
    print("\n" + json.dumps(row), flush=True)


def measure_apart(job, log, limit):
    """The row of `job` from a process of its own, or dict(error=...) if it fails or takes longer than `limit` s."""
    command = [sys.executable, __file__, "measure", json.dumps(job)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return dict(error=f"not done in {limit:g} s")
    log.write(done.stdout)
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(rows[-1]) if rows else dict(error=f"ended with status {done.returncode}, see {log.name}")


KEYS = ["model", "symbol", "atoms", "batch"]  # which job a row is of; the last that there is is the size
RATES = ["structures_per_s", "atoms_per_s", "edges_per_s"]
RAN = ["what", "precision", "convolution"]
COLUMNS = [*KEYS, "steps", "ms", "low", "high", *RATES, "first_s", "memory_GiB", "busy_percent", *RAN]
COLUMNS += ["ranks", "machine", "error"]
TABLES = dict(
    infer="model | crystal | atoms | ms a step (first to last decile) | first step, s | peak memory, GiB | what ran",
    train="model | structures a step | ms a step (first to last decile) | first step, s | peak memory, GiB | what ran"
    " | structures/s | atoms/s | edges/s",
)


def table_line(row):
    """A line of the table of a row of results, or of the reason why there is none."""
    cells = [str(row[k]) for k in KEYS if k in row]
    if "error" in row:
        cells += [f"left out: {row['error']}"]
    else:
        cells += "{ms:.2f} ({low:.2f} to {high:.2f})|{first_s:.1f}|{memory_GiB:.2f}".format(**row).split("|")
        cells += [", ".join(row[k] for k in RAN if row[k]), *(f"{row[k]:.1f}" for k in RATES if k in row)]
    return f"| {' | '.join(cells)} |"


def race(command, jobs, a, device):
    """Time all jobs (dicts, small sizes first), each in a process of its own except under torchrun, and print the
    table. Raises ValueError if no job succeeds."""
    a.out.mkdir(parents=True, exist_ok=True)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    path, rows, given_up, append = a.out / f"{command}.csv", [], set(), functools.partial(open, mode="a", newline="")
    with append(a.out / f"{command}.md") as report, append(path) as csv_file, append(a.out / "log.txt") as log:

        def say(text):
            print(text, flush=True)
            print(text, file=report, flush=True)

        writer = csv.DictWriter(csv_file, COLUMNS, restval="", extrasaction="ignore")
        if not path.stat().st_size:
            writer.writeheader()
        say(f"{header(device)}, {ranks} process(es), {a.steps} steps each: {' '.join(map(str, sys.argv))}\n")
        say(f"| {TABLES[command]} |\n{'| --- ' * (1 + TABLES[command].count('|'))}|")
        for job in jobs:
            kind = job["model"], job.get("symbol")
            if kind in given_up:
                continue
            asked = dict(command=command, device=str(device), **job)
            row = measure(**asked) if dist.is_initialized() else measure_apart(asked, log, a.limit)
            if "error" in row:
                given_up.add(kind)
            rows.append(job | dict.fromkeys(RAN, "") | dict(ranks=ranks, machine=header(device)) | row)
            writer.writerow(rows[-1])
            csv_file.flush()
            say(table_line(rows[-1]))
        for row in rows:
            if "kernels" in row:
                busy = f"GPU busy {row['busy_percent']:.1f}% of the time, " if "busy_percent" in row else ""
                say(f"\n{', '.join(str(row[k]) for k in KEYS if k in row)}: {busy}the longest kernels, ms a step\n")
                say("\n".join(f"    {ms:8.3f}  {name[:100]}" for name, ms in row["kernels"]))
        say("")
    if all("error" in row for row in rows):
        raise ValueError(f"nothing could be timed; {a.out / 'log.txt'} may say more")


def header(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}, {time.strftime('%F')}"


def infer(a, device):
    sizes = a.sizes or ([8, 64, 216, 1000, 8000, 64000] if device.type == "cuda" else [8, 64, 216])
    options = dict(weights=a.weights, precision=a.precision, steps=a.steps, profile=a.profile)
    crystals = dict.fromkeys((symbol, len(crystal(symbol, n))) for symbol in a.crystals for n in sorted(sizes))
    jobs = [dict(model=model, **options, symbol=symbol, atoms=n) for symbol, n in crystals for model in a.models]
    race("infer", jobs, a, device)
    plot(argparse.Namespace(files=[a.out / "infer.csv"], out=a.out / "speed.png"))


def train(a, device):
    options = dict(path=a.data, precision=a.precision, steps=a.steps, profile=a.profile)
    jobs = [dict(model=model, **options, batch=batch) for batch in sorted(set(a.batches)) for model in a.models]
    if "WORLD_SIZE" not in os.environ:
        return race("train", jobs, a, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() == 0:
        race("train", jobs, a, device)
    else:
        for job in jobs:
            measure(command="train", device=str(device), **job)
    dist.barrier()  # no rank leaves before the last results are written
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# A picture of steps/day against atoms, as the paper's Figure 3


def plot(a, device=None):
    """The picture a.out of CSV files of infer. Of a size that was timed more than once, the median."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = []
    for file in a.files:
        with open(file, newline="") as f:
            rows += [row for row in csv.DictReader(f) if row.get("ms") and row.get("symbol")]
    if not rows:
        raise ValueError("no steps of molecular dynamics in these files: plot takes infer.csv, the results of infer")
    name = lambda row: ", ".join([row["model"], *{row.get("precision") or "float32"} - {"float32"}])
    symbols, models = sorted({row["symbol"] for row in rows}), dict.fromkeys(map(name, rows))
    size = 5 * len(symbols), 4
    figure, axes = plt.subplots(1, len(symbols), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axis, symbol in zip(axes[0], symbols):
        for model in models:
            times = {}  # atoms -> ms of every timing
            for row in rows:
                if (name(row), row["symbol"]) == (model, symbol):
                    times.setdefault(int(row["atoms"]), []).append(float(row["ms"]))
            atoms = sorted(times)
            axis.loglog(atoms, [86_400_000 / np.median(times[n]) for n in atoms], "o-", ms=4, label=model)
        axis.set(xlabel="atoms", title=dict(C="diamond", Si="silicon").get(symbol, symbol))
    axes[0][0].set_ylabel("steps/day")
    axes[0][0].legend(fontsize=8)
    figure.suptitle("; ".join(sorted({row["machine"] for row in rows if row.get("machine")})), fontsize=9)
    figure.savefig(a.out, dpi=120)


# ----------------------------------------------------------------------------------------------------------------------
# Relaxations, and the drift of the energy


def relax(a, device):
    """Structures/s of calc.relax on the first --n structures of a file, and of ASE's FIRE on some, evenly spread."""
    calc = NequixCalculator(a.weights, a.device, a.precision, a.conv)
    ran = what_ran(calc.model)
    print(f"{header(device)}, {a.weights}, {ran['precision']}, convolution {ran['convolution']}")
    structures = [atoms for _, atoms in itertools.islice(read([a.file]), a.n)]
    if not structures:
        raise ValueError(f"no structures in {a.file}")

    def relaxed(structures, max_steps=a.max_steps):
        """What calc.relax yields after the index and the structure, in order; and seconds."""
        start, results = clock(device), {}
        for index, _, *result in calc.relax(structures, a.fmax, max_steps):
            results[index] = result
        return [results[i] for i in range(len(structures))], clock(device) - start

    relaxed(structures[:8], 3)  # compiles the kernels and measures the memory
    results, seconds = relaxed(structures)
    energies, converged, taken, errors = zip(*results)
    n, size = len(structures), sum(map(len, structures)) / len(structures)
    print(f"{n} structures of {a.file}, {size:.1f} atoms on average; fmax {a.fmax} eV/A, at most {a.max_steps} steps")
    print(f"relax: {seconds:.1f} s, {n / seconds:.2f} structures/s, {sum(taken) / seconds:.0f} steps/s", end="; ")
    print(f"{sum(converged) / n:.2%} converged, {n - errors.count(None)} failed; batches of {calc.max_edges} edges")

    fit = [i for i, atoms in enumerate(structures) if atoms.pbc.all() and not errors[i]]  # for ASE's cell filter
    picks = [fit[i] for i in np.unique(np.linspace(0, len(fit) - 1, min(a.n_ase, len(fit))).astype(int))]
    if picks:
        start, apart, same = clock(device), [], 0
        for i in picks:
            atoms = structures[i].copy()
            atoms.calc = calc
            same += FIRE(FrechetCellFilter(atoms), logfile=None).run(a.fmax, a.max_steps) == converged[i]
            apart.append(1000 * abs(atoms.get_potential_energy() - energies[i]) / len(atoms))
        rate = len(picks) / (clock(device) - start)
        print(f"ASE's FIRE, {len(picks)} of them one at a time: {rate:.3f} structures/s", end="; ")
        print(f"relax is {n / seconds / rate:.1f} times as fast; {same} agree in whether they converged")
        print(f"energies differ by {np.median(apart):.4f} meV/atom (median), {max(apart):.4f} meV/atom (largest)")

    if a.n_torch_sim:
        few = structures[: a.n_torch_sim]
        try:
            result = peer("relax", "torch-sim")(few, energies, calc, a.fmax, a.max_steps)
            result += f"; relax: {len(few) / relaxed(few)[1]:.2f} structures/s"
        except Exception as e:  # of any library
            result = f"left out: {type(e).__name__}: {e}".splitlines()[0]
        print(f"torch-sim, the same model, the first {len(few)}: {result}")


def nve(a, device):
    """Drift of the total energy of silicon: the slope of a line fitted to it, after 0.1 ps of equilibration."""
    print(f"{header(device)}, {a.weights}")
    for n, precision in itertools.product(a.sizes, ("float32", "float64")):
        atoms = crystal("Si", n)
        atoms.calc = NequixCalculator(a.weights, a.device, precision, a.conv)
        print(f"Si, {len(atoms)} atoms, 300 K, {a.ps} ps, steps of 1 fs, {precision}", end=", ", flush=True)
        try:
            ran = what_ran(atoms.calc.model)
        except ValueError as e:
            print(f"left out: {e}")
            continue
        md, energies = verlet(atoms), []
        md.run(100)
        md.attach(lambda: energies.append(1000 * atoms.get_total_energy() / len(atoms)))
        md.run(round(1000 * a.ps))
        drift = np.polyfit(np.arange(len(energies)) / 1000, energies, 1)[0]
        print(f"convolution {ran['convolution']}: drift {drift:+.5f} meV/atom/ps", end=", ")
        print(f"standard deviation {np.std(energies):.5f} meV/atom")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def main():
    if sys.argv[1:2] == ["measure"]:
        return measure_and_print(json.loads(sys.argv[2]))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    shared = {k: argparse.ArgumentParser(add_help=False) for k in ("device", "weights", "precision", "conv", "race")}
    group = {k: parser.add_argument_group("model and device") for k, parser in shared.items()}
    for k in group:
        add_options(group[k], k)
    group["race"].add_argument("--models", nargs="+", default=OURS, help="models to time (default: fused oeq torch)")
    add = shared["race"].add_argument_group("timing and results").add_argument
    add("--steps", type=int, default=20, help="timed steps (default: 20)")
    add("--limit", type=float, default=300, help="s, for one model at one size, start included (default: 300)")
    add("--profile", action="store_true", help="also the ten longest CUDA kernels, and how busy the GPU is")
    add("--out", type=Path, default=Path("runs/speed"), help="folder of the results (default: runs/speed)")

    def command(run, help, parents):
        parents = [shared[k] for k in parents.split()]
        parser = commands.add_parser(run.__name__, help=help, description=help, parents=parents)
        parser.set_defaults(run=run)
        return parser.add_argument

    add = command(infer, "steps of molecular dynamics through ASE", "weights device precision race")
    add("--sizes", type=int, nargs="+", help="about how many atoms (default: 8 to 64000; CPU: to 216)")
    add("--crystals", nargs="+", default=["C", "Si"], choices=["C", "Si"], help="default: both")
    add = command(train, "training steps of the paper's network, random weights", "device precision race")
    add("data", help="a packed set")
    batches = [64, 128, 256, 512, 1024]
    add("--batches", type=int, nargs="+", default=batches, help="structures a step (default: 64 to 1024)")
    add = command(relax, "relaxations, against ASE's FIRE", "weights device precision conv")
    add("file", help="structures, anything ASE reads")
    add("--n", type=int, default=2000, help="structures to relax (default: 2000)")
    add("--n-ase", type=int, default=20, help="of these, so many by ASE too (default: 20)")
    add("--n-torch-sim", type=int, default=0, help="of these, so many by torch-sim too (default: 0)")
    add("--fmax", type=float, default=0.02, help="largest force, eV/A (default: 0.02)")
    add("--max-steps", type=int, default=500, help="steps at most (default: 500)")
    add = command(nve, "energy drift of silicon in molecular dynamics", "weights device conv")
    add("--sizes", type=int, nargs="+", default=[64, 216], help="atoms, about (default: 64 216)")
    add("--ps", type=float, default=1.0, help="length of a run, ps (default: 1)")
    add = command(plot, "steps/day against atoms", "")
    add("files", type=Path, nargs="+", help="infer.csv of one or several runs of infer")
    add("--out", type=Path, default=Path("speed.png"), help="default: speed.png")
    a = p.parse_args()
    try:
        a.run(a, torch.device(getattr(a, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")))
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    main()
