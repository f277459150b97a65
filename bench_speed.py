"""Time an ASE step, a training step and relaxations, beside every other potential that is installed; the energy drift of NVE.

    python bench_speed.py infer --weights nequix-mp-1                  # ASE steps of diamond and silicon, as the paper's Figure 3
    python bench_speed.py plot */infer.csv                             # one picture of several such races
    python bench_speed.py train data/random1k --tf32 --split           # structures/s, memory, and where the time goes
    torchrun --nproc_per_node=2 bench_speed.py train data/random1k --tf32 --models fused             # the same batch on two GPUs
    python bench_speed.py relax wbm.extxyz --weights nequix-mp-1       # structures/s against ASE one by one
    python bench_speed.py nve --weights nequix-mp-1                    # meV/atom/ps, float32 and float64

infer and train write a table, a CSV file and the log to --out (under torchrun the table alone). Each model runs in a process of
its own, and they take turns: size by size, one after another, on one GPU. Times are those of synchronised clocks: the median of
--steps steps after five that are not counted, with the first and the last decile. What is missing or fails is listed with the
reason.
"""

import argparse
import copy
import csv
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ase import units
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE

import kernels
from calc import NequixCalculator, read
from data import TRAIN, PackedSet, deal, make_batch, prefetch
from model import Nequix, energy_forces_stress
from muon import Muon
from train import Replay, label_counts, loss_and_gradient

WARM_UP = 5  # steps
MPTRJ = 1_500_000  # training frames, for the projection
PUBLISHED = """Published for an H100 by others, not measured here: ms a step of silicon with 64, 1,000 and 8,000 atoms: NequIP-MP-L
6.4, 26.4, 163; SevenNet-l3i5 42, 48.4, 97.9; MACE-MP-0 36.9, 54.3, 273; Nequix 10, 18, 99.5."""


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def gpu_or_cpu(device):
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def header(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}, {time.strftime('%Y-%m-%d')}"


def spread(seconds):
    """Median, first and last decile, in ms."""
    return dict(zip(("ms", "low", "high"), (1000 * np.quantile(seconds, [0.5, 0.1, 0.9])).tolist()))


def peak_memory():
    """GiB that this process's arrays took at most, since the last reset of torch's counter, and of JAX's since it began."""
    if not torch.cuda.is_available():
        return 0.0
    jax = sys.modules.get("jax")
    stats = (jax.devices()[0].memory_stats() or {}) if jax else {}
    return max(stats.get("peak_bytes_in_use", 0), torch.cuda.max_memory_allocated()) / 2**30


# ----------------------------------------------------------------------------------------------------------------------
# Models in processes of their own: a job a line in, its result a line out


def serve(kind, name, device, options):
    """The process. First a line that says what the model is, then one for each job."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    try:
        case, what = MODELS[kind][name](gpu_or_cpu(device), **options)
    except Exception as e:  # of any library
        reply = dict(error=f"{type(e).__name__}: {e}".splitlines()[0])
    else:
        reply = dict(what=what)
    print(json.dumps(reply), file=out, flush=True)
    for line in sys.stdin if "what" in reply else ():
        try:
            reply = case(**json.loads(line)) | dict(memory_GiB=peak_memory())
        except Exception as e:
            memory = "out of memory" in str(e).lower() or "RESOURCE_EXHAUSTED" in str(e)
            reply = dict(error="out of memory" if memory else f"{type(e).__name__}: {e}".splitlines()[0])
        gc.collect()  # outside of the handler, which holds on to what failed. The memory is the next one's
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        print(json.dumps(reply), file=out, flush=True)


class Remote:
    """One such process, of `name`, seen from outside; its first reply says what it is."""

    def __init__(self, kind, name, device, options, log, limit, python):
        command = [python, __file__, "serve", kind, name, json.dumps(options)]
        command += ["--device", device] if device else []
        environment = os.environ | dict(XLA_PYTHON_CLIENT_PREALLOCATE="false")
        self.process = subprocess.Popen(command, text=True, stdin=-1, stdout=-1, stderr=log, env=environment)
        self.name, self.limit = name, limit

    def reply(self):
        timer = threading.Timer(self.limit, self.process.kill)
        timer.daemon = True  # Ctrl-C does not wait for it
        timer.start()
        line = self.process.stdout.readline()
        late = not timer.is_alive()
        timer.cancel()
        if line:
            return json.loads(line)
        status = self.process.wait()
        return dict(error=f"not done in {self.limit:g} s" if late else f"ended with status {status}: see the log")

    def ask(self, **job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.reply()

    def close(self):
        self.process.kill()
        self.process.wait()


def race(kind, jobs, models, options, a):
    """The jobs (dicts) in order, each asked of one model after another; a model that fails gets no larger job of that kind
    (jobs alike but for their last item). Prints and returns rows, and what the models are."""
    if not all("=" in p for p in a.python):
        raise ValueError("--python takes MODEL=INTERPRETER")
    pythons = dict(p.split("=", 1) for p in a.python)
    if unknown := pythons.keys() - MODELS[kind].keys():
        raise ValueError(f"--python: no model {', '.join(unknown)}")
    rows, lines = [], []
    with open(a.out / "log.txt", "w") as log:
        remotes = [
            Remote(kind, name, a.device, options, log, a.limit, pythons.get(name, sys.executable)) for name in models
        ]
        try:
            first = {r.name: r.reply() for r in remotes}  # they start side by side
            lines += [f"{name}: {reply.get('what') or 'left out: ' + reply['error']}" for name, reply in first.items()]
            print("\n".join(lines), flush=True)
            given_up = {name: reply["error"] for name, reply in first.items() if "error" in reply}
            for job, r in itertools.product(jobs, remotes):
                group = (r.name, *list(job.values())[:-1])
                if r.name in given_up or group in given_up:
                    continue
                reply = r.ask(**job)
                rows.append(dict(model=r.name, **job, **reply))
                if "error" in reply:
                    given_up[r.name if r.process.poll() is not None else group] = reply["error"]
                print(
                    "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()),
                    flush=True,
                )
        except KeyboardInterrupt:
            lines.append("stopped before the end")
        finally:  # what still compiles would be in the way of whatever comes next
            for r in remotes:
                r.close()
    if not rows:
        raise ValueError(f"no model could be timed; {a.out / 'log.txt'} may say more")
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    with open(a.out / f"{kind}.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return rows, lines


def markdown(rows, line, column, value):
    """A table of value(row): a line for each line(row), a column for each column(row), in order of appearance."""
    lines, columns = (list(dict.fromkeys(map(f, rows))) for f in (line, column))
    cells = {(line(r), column(r)): r["error"] if "error" in r else value(r) for r in rows}
    text = [
        ["", *columns],
        ["---"] * (1 + len(columns)),
        *([k, *(cells.get((k, c), "") for c in columns)] for k in lines),
    ]
    return "\n".join("| " + " | ".join(map(str, t)) + " |" for t in text)


# ----------------------------------------------------------------------------------------------------------------------
# An ASE step: molecular dynamics and what it pays: new positions, neighbour list, energy, forces and stress, back in numpy


def crystal(symbol, n):
    """A cubic supercell of about n atoms of the diamond structure."""
    return bulk(symbol, cubic=True) * max(round((n / 8) ** (1 / 3)), 1)


def warm(atoms, kelvin=300):
    """Velocities of twice the temperature: from rest in a perfect crystal, half of it goes into the potential energy."""
    sigma = np.sqrt(2 * units.kB * kelvin * atoms.get_masses())[:, None]
    momenta = sigma * np.random.default_rng(0).normal(size=(len(atoms), 3))
    atoms.set_momenta(momenta - momenta.mean(0))


def ase_steps(calc, device):
    """case(symbol, n, steps): velocity Verlet at 300 K, 1 fs."""

    def case(symbol, steps, n):
        atoms, seconds = crystal(symbol, n), []
        warm(atoms)
        atoms.calc = calc
        md = VelocityVerlet(atoms, 1 * units.fs)
        try:
            for _ in range(WARM_UP + steps):
                start = clock(device)
                md.run(1)
                atoms.get_stress()
                seconds.append(clock(device) - start)
        finally:
            if isinstance(calc, NequixCalculator):
                calc.listed = calc.replay = None  # their memory is the next one's
        return dict(atoms=len(atoms), **spread(seconds[WARM_UP:]), first_s=seconds[0])

    return case


def ours(conv):
    def make(device, weights, dtype):
        calc = NequixCalculator(weights, device, dtype, conv)
        return ase_steps(calc, device), f"this repository, {dtype}, convolution {conv}"

    return make


# ----------------------------------------------------------------------------------------------------------------------
# Peers, in float32, each by its own ASE calculator. Where weights would have to be fetched, the architecture gets random ones.


def peer(make):
    def start(device, weights, dtype):
        calc, what = make(device.type, weights)
        return ase_steps(calc, device), what

    return start


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def installed(package):
    return importlib.util.find_spec(package) is not None


def nequix_torch(device, weights):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # it reads the weights: off the GPU
    from nequix.calculator import NequixCalculator
    from nequix.model import load_model
    from nequix.torch_impl.model import save_model
    from nequix.torch_impl.utils import convert_model_jax_to_torch

    kernel = device == "cuda" and installed("openequivariance")
    with tempfile.NamedTemporaryFile(suffix=".pt") as f:
        save_model(f.name, *convert_model_jax_to_torch(*load_model(weights), False))
        calc = NequixCalculator(model_path=f.name, backend="torch", use_kernel=kernel)
    calc.device = torch.device(device)
    calc.model.to(device)
    return calc, f"nequix {version('nequix')}, PyTorch, {'OpenEquivariance' if kernel else 'no kernel'}"


def nequix_jax(device, weights):
    os.environ |= dict(JAX_PLATFORMS=device, OEQ_NOTORCH="1")
    from nequix.calculator import NequixCalculator

    kernel = device == "cuda" and installed("openequivariance_extjax")
    calc = NequixCalculator(model_path=weights, backend="jax", use_kernel=kernel)
    return calc, f"nequix {version('nequix')}, JAX {version('jax')}, {'OpenEquivariance' if kernel else 'no kernel'}"


def mace(device, weights):
    torch.serialization.add_safe_globals([slice])  # in a file of e3nn 0.4.4
    from e3nn import o3
    from mace import modules
    from mace.calculators import MACECalculator

    numbers = [*range(1, 84), *range(89, 95)]
    torch.manual_seed(0)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    shape = dict(
        hidden_irreps=o3.Irreps("128x0e+128x1o"), MLP_irreps=o3.Irreps("16x0e"), r_max=6.0, num_bessel=10, max_ell=3
    )
    shape |= dict(
        num_polynomial_cutoff=5, num_interactions=2, correlation=3, interaction_cls=block, interaction_cls_first=block
    )
    shape |= dict(
        num_elements=len(numbers), atomic_numbers=numbers, atomic_energies=np.zeros(len(numbers)), use_reduced_cg=False
    )
    shape |= dict(
        avg_num_neighbors=61.96, atomic_inter_scale=0.804, atomic_inter_shift=0.164, gate=torch.nn.functional.silu
    )
    cueq = device == "cuda" and installed("cuequivariance_ops_torch")
    model = modules.ScaleShiftMACE(**shape).float()
    calc = MACECalculator(models=model, device=device, default_dtype="float32", enable_cueq=cueq)
    kernel = "cuEquivariance" if cueq else "e3nn"
    return calc, f"mace-torch {version('mace-torch')}, architecture of MACE-MP-0 medium, {kernel}, random weights"


def sevennet(name):
    def make(device, weights):
        from sevenn.calculator import SevenNetCalculator

        return SevenNetCalculator(name, device=device), f"sevenn {version('sevenn')}, {name}, e3nn"

    return peer(make)


def chgnet(device, weights):
    from chgnet.model.dynamics import CHGNetCalculator

    return CHGNetCalculator(use_device=device, on_isolated_atoms="ignore"), f"chgnet {version('chgnet')}"


def mattersim(device, weights):
    from mattersim.forcefield import MatterSimCalculator, Potential
    from mattersim.forcefield.m3gnet.m3gnet import M3Gnet

    shape = dict(num_blocks=3, units=128, max_l=4, max_n=4, cutoff=5.0, threebody_cutoff=4.0, device=device)
    potential = Potential(M3Gnet(**shape).to(device), device=device)
    what = f"mattersim {version('mattersim')}, architecture of MatterSim-v1 1M, random weights"
    return MatterSimCalculator(potential, device=device), what


def nequip(device, weights):
    from ase.data import chemical_symbols
    from nequip.integrations.ase import NequIPCalculator
    from nequip.integrations.utils import basic_transforms
    from nequip.model import PresetNequIPGNNModel
    from nequip.utils.global_state import set_global_state

    set_global_state(allow_tf32=False)
    symbols = [chemical_symbols[z] for z in [*range(1, 84), *range(89, 95)]]
    shape = dict(preset="L", seed=0, model_dtype="float32", r_max=6.0, type_names=symbols, avg_num_neighbors=60.0)
    model = PresetNequIPGNNModel(**shape, per_type_energy_scales=1.0, per_type_energy_shifts=0.0).eval()
    transforms = basic_transforms(model.metadata, 6.0, symbols, {s: s for s in symbols})
    what = f"nequip {version('nequip')}, preset L, not compiled, random weights"
    return NequIPCalculator(model, device=device, transforms=transforms), what


def orb(device, weights):
    from orb_models.forcefield import pretrained
    from orb_models.forcefield.inference.calculator import ORBCalculator

    model, adapter = pretrained.orb_v3_conservative_inf_mpa(
        device=device, precision="float32-highest"
    )  # fetches weights
    return ORBCalculator(
        model, adapter, device=device
    ), f"orb-models {version('orb-models')}, orb-v3-conservative-inf-mpa"


PEERS = {"nequix-torch": peer(nequix_torch), "nequix-jax": peer(nequix_jax), "mace": peer(mace)}
PEERS |= {"sevennet-0": sevennet("7net-0"), "sevennet-l3i5": sevennet("7net-l3i5"), "chgnet": peer(chgnet)}
PEERS |= {"mattersim": peer(mattersim), "nequip": peer(nequip), "orb": peer(orb)}


def infer(a, device):
    sizes = a.sizes or ([8, 64, 216, 1000, 8000, 64000] if device.type == "cuda" else [8, 64, 216])
    jobs = [dict(symbol=symbol, steps=a.steps, n=n) for symbol in a.crystals for n in sizes]
    options = dict(weights=a.weights, dtype=a.dtype)
    rows, lines = race("infer", jobs, a.models or list(MODELS["infer"]), options, a)
    done = [r for r in rows if "ms" in r]
    text, crystals = [header(device), "", *lines, ""], list(dict.fromkeys(r["symbol"] for r in rows))
    for symbol in crystals:
        mine = [r for r in rows if r["symbol"] == symbol]
        text += [f"{symbol}, ms a step: median of {a.steps} (first to last decile)", ""]
        value = lambda r: "{ms:.2f} ({low:.2f} to {high:.2f})".format(**r)
        text += [markdown(mine, lambda r: r["model"], lambda r: r["n"], value), ""]
        text += ["First step, with what is compiled in it, s; peak memory, GiB", ""]
        value = lambda r: "{first_s:.1f}; {memory_GiB:.2f}".format(**r)
        text += [markdown(mine, lambda r: r["model"], lambda r: r["n"], value), ""]
        for model in dict.fromkeys(r["model"] for r in done):
            large = [r for r in done if (r["model"], r["symbol"]) == (model, symbol) and r["atoms"] >= 1000]
            large = list({r["atoms"]: r for r in large}.values())  # two sizes may give one crystal
            if len(large) > 1:
                slope = np.polyfit(*np.log([[r["atoms"], r["ms"]] for r in large]).T, 1)[0]
                extra = (
                    (large[-1]["memory_GiB"] - large[-2]["memory_GiB"])
                    / (large[-1]["atoms"] - large[-2]["atoms"])
                    * 2**20
                )
                text.append(
                    f"{model}: time grows as atoms^{slope:.2f} from {large[0]['atoms']} atoms on; {extra:.1f} KiB an atom"
                )
        text.append("")
    text.append(PUBLISHED)
    (a.out / "infer.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))
    if done:
        draw(done, crystals, a.out / "speed.png", header(device))


def draw(rows, symbols, path, title):
    """Steps a day against atoms, as the paper's Figure 3."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(symbols), figsize=(5 * len(symbols), 4), layout="constrained", sharey=True, squeeze=False
    )
    for axis, symbol in zip(axes[0], symbols):
        for model in dict.fromkeys(r["model"] for r in rows):
            mine = [r for r in rows if (r["model"], r["symbol"]) == (model, symbol)]
            axis.loglog([r["atoms"] for r in mine], [86_400_000 / r["ms"] for r in mine], "o-", ms=4, label=model)
        axis.set(xlabel="atoms", title=dict(C="diamond", Si="silicon")[symbol])
    axes[0][0].set_ylabel("steps/day")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)


def plot(a, device):
    """The picture of several races on one kind of machine; of a size that was timed more than once, the median."""
    times, titles = {}, []
    for file in a.files:
        with open(file, newline="") as f:
            for r in csv.DictReader(f):
                if r.get("ms") and r.get("symbol"):
                    times.setdefault((r["model"], r["symbol"], int(r["atoms"])), []).append(float(r["ms"]))
        titles.append(file.with_suffix(".md").read_text().splitlines()[0])  # the machine
    if not times:
        raise ValueError("no ASE steps in these files: they are the infer.csv of races")
    rows = [
        dict(model=m, symbol=s, atoms=n, ms=statistics.median(ms))
        for (m, s, n), ms in sorted(times.items(), key=lambda t: t[0][2])
    ]
    draw(rows, sorted({r["symbol"] for r in rows}), a.out, "; ".join(dict.fromkeys(titles)))


# ----------------------------------------------------------------------------------------------------------------------
# A training step: neighbour list, loss, gradient, Muon, averaged weights; each batch in one piece


def our_training(conv):
    def make(device, path, tf32, split):
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        packed = PackedSet(path, Nequix.DEFAULTS["cutoff"], device)
        frames = packed.indices(TRAIN)
        torch.manual_seed(0)
        model = Nequix(packed.meta["statistics"], conv).to(device)
        params = list(model.parameters())
        averaged, optimizer = [p.detach().clone() for p in params], Muon(params, lr=0.01)
        flat = torch.zeros(sum(p.numel() for p in params), device=device)
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad = g.view_as(p)

        @torch.no_grad()
        def update():
            flat.mul_((100 / torch.linalg.vector_norm(flat)).clamp(max=1))
            optimizer.step()
            torch._foreach_lerp_(averaged, params, 0.001)

        def case(steps, batch):
            rng, replay = np.random.default_rng(0), Replay(model, (20.0, 20.0, 5.0))
            counts, marks, sizes = label_counts(packed, frames) * batch / len(frames), [], []
            order = np.concatenate(
                [rng.permutation(frames) for _ in range(-(-(WARM_UP + steps) * batch // len(frames)))]
            )
            pieces = [
                deal(order[i * batch : (i + 1) * batch], packed.n_edges, ranks)[rank] for i in range(WARM_UP + steps)
            ]

            def run(pieces):
                for b in prefetch(packed, pieces):
                    marks.append(mark(device))
                    sizes.append([len(b.numbers), len(b.senders)])
                    flat.zero_()
                    replay(b, counts)
                    if ranks > 1:
                        dist.all_reduce(flat)
                    update()
                marks.append(mark(device))

            largest = [max(pieces, key=lambda piece: n[piece].sum()) for n in (packed.n_atoms, packed.n_edges)]
            run(pieces[:WARM_UP] + largest)  # no graph is captured after these
            marks.clear()
            start = clock(device)
            run(pieces[WARM_UP:])
            whole = (clock(device) - start) / steps
            atoms, edges = (float(x) for x in ranks * np.mean(sizes[WARM_UP + 2 :], axis=0))
            result = spread(between(marks)) | dict(
                rate=batch / whole, atoms_per_s=atoms / whole, edges_per_s=edges / whole
            )
            if split:
                result |= busy_share(lambda: run(pieces[:5]), device) | parts_of_a_step(
                    packed, pieces[0], model, counts, update
                )
            return result

        return (
            case,
            f"this repository, {'TF32' if tf32 else 'float32'}, convolution {model.chosen_conv()}, {ranks} rank(s)",
        )

    return make


def mark(device):
    """A point of time: of the GPU's work, without a wait for it; or now."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(marks):
    """Seconds from each point of time to the next."""
    if isinstance(marks[0], float):
        return np.diff(marks)
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in zip(marks, marks[1:])]


def parts_of_a_step(packed, piece, model, counts, update):
    """ms of each part alone, and waited for; of fused kernels as CUDA graphs, as far as `Replay` would: without the launches."""
    device, weights, fused = packed.device, (20.0, 20.0, 5.0), model.chosen_conv() == "fused"
    batch = packed.batch(piece)
    vectors = batch.vectors.detach().requires_grad_()
    inputs = batch.numbers, vectors, batch.senders, batch.row_ptr
    scale = torch.from_numpy(counts).to(device)
    if fused:
        first = lambda: model.fused(*inputs, keep=True)
        second = lambda: torch.autograd.grad(first()[0].sum(), vectors)
    else:
        first = lambda: model(*inputs)
        second = lambda: energy_forces_stress(model, batch, create_graph=True)
    third = lambda: loss_and_gradient(model, batch, weights, scale)

    def milliseconds(run, graph=False):
        if graph and device.type == "cuda" and fused and len(batch.senders) <= Replay.MOST:
            run = kernels.capture(run, device)[0].replay
        times = []
        for _ in range(12):
            start = clock(device)
            run()
            times.append(1000 * (clock(device) - start))
        return statistics.median(times[2:])

    a, b, c = (milliseconds(f, graph=True) for f in (first, second, third))
    parts = dict(data_and_list_ms=milliseconds(lambda: packed.batch(piece)), forward_ms=a, force_backward_ms=b - a)
    return parts | dict(loss_backward_ms=c - b, optimizer_ms=milliseconds(update))


def busy_share(run, device):
    """The share of the time, from the first kernel to the last, in which a kernel or a copy runs on the GPU."""
    if device.type == "cpu":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    spans = [
        (e.time_range.start, e.time_range.end)
        for e in profile.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    busy, last = 0, min(spans)[0]
    for start, end in sorted(spans):
        busy, last = busy + max(end - max(start, last), 0), max(last, end)
    return dict(busy_percent=100 * busy / (last - min(spans)[0]))


# The official code (nequix 0.4.5): its model, loss, Muon, clipping, schedule and averaged weights. Its data are free: each batch is
# one that is made before the clock.

OFFICIAL = dict(hidden_irreps="128x0e + 64x1o + 32x2e + 32x3o", lmax=3, cutoff=6.0, n_layers=4, radial_basis_size=8)
OFFICIAL |= dict(
    radial_mlp_size=64, radial_mlp_layers=2, radial_polynomial_p=6.0, mlp_init_scale=4.0, index_weights=False
)
OFFICIAL |= dict(
    layer_norm=True, shift=0.16502578765761478, scale=0.8066479563713074, avg_n_neighbors=57.413687022442645
)


def official_batch(packed, size):
    """A batch as numpy arrays, edges numbered within the batch; float32, int32."""
    frames, rng = packed.indices(TRAIN), np.random.default_rng(0)
    b = packed.batch(np.concatenate([rng.permutation(frames) for _ in range(-(-size // len(frames)))])[:size])
    elements = torch.tensor(packed.meta["statistics"]["atomic_numbers"], device=b.numbers.device)
    integers = dict(
        n_node=b.n_atoms, n_edge=torch.bincount(b.structure[b.receivers], minlength=size), senders=b.senders
    )
    integers |= dict(receivers=b.receivers, species=torch.searchsorted(elements, b.numbers), structure=b.structure)
    floats = {k: getattr(b, k) for k in ("positions", "shifts", "cell", "energy", "forces", "stress")}
    return {k: v.cpu().numpy().astype(t) for g, t in ((integers, np.int32), (floats, np.float32)) for k, v in g.items()}


def describe(kernel, tf32):
    return f"{'OpenEquivariance' if kernel else 'no kernel'}, {'TF32' if tf32 else 'float32'}"


def official_rates(step, wait, steps, size, arrays):
    """Of step(), which wait() waits for."""
    for _ in range(WARM_UP):
        step()
    wait()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - start)
    whole = sum(seconds) / steps
    more = dict(
        rate=size / whole, atoms_per_s=len(arrays["species"]) / whole, edges_per_s=len(arrays["senders"]) / whole
    )
    return spread(seconds) | more


def official_torch(device, path, tf32, split):
    os.environ["JAX_PLATFORMS"] = "cpu"  # the package imports jax: off the GPU
    from nequix.torch_impl.model import NequixTorch
    from nequix.torch_impl.muon import SingleDeviceMuonWithAuxAdam, get_muon_param_groups
    from nequix.torch_impl.train import loss

    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    packed, kernel = PackedSet(path, 6.0, device), device.type == "cuda"
    n_species = len(packed.meta["statistics"]["atomic_numbers"])
    model = NequixTorch(n_species=n_species, atom_energies=[0.0] * n_species, kernel=kernel, **OFFICIAL).to(device)
    optimizer, averaged = SingleDeviceMuonWithAuxAdam(get_muon_param_groups(model, 0.01, 1e-3)), copy.deepcopy(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def case(steps, batch):
        arrays = official_batch(packed, batch)
        t = {k: torch.from_numpy(v).to(device) for k, v in arrays.items()}

        class Graphs(types.SimpleNamespace):  # as torch_geometric's collate has it
            __getitem__ = types.SimpleNamespace.__getattribute__

        graphs = Graphs(
            x=t["species"].long(), edge_attr=t["shifts"], batch=t["structure"].long(), num_graphs=batch, **t
        )
        graphs.edge_index = torch.stack([t["senders"], t["receivers"]]).long()

        def step():  # train_step of nequix/torch_impl/train.py
            graphs.positions = graphs.positions.detach()
            model.train()
            optimizer.zero_grad()
            loss(model, graphs, 20.0, 20.0, 5.0, "mae", device)[0].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                for a, p in zip(averaged.parameters(), model.parameters()):
                    a.data = a.data * 0.999 + p.data * 0.001

        return official_rates(step, lambda: clock(device), steps, batch, arrays)

    return case, f"nequix {version('nequix')}, PyTorch, {describe(kernel, tf32)}"


def official_jax(device, path, tf32, split):
    os.environ |= dict(JAX_PLATFORMS=device.type, OEQ_NOTORCH="1")
    import equinox
    import jax
    import jraph
    import optax
    from nequix.model import Nequix, weight_decay_mask
    from nequix.train import loss

    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if tf32 else "highest")
    packed, kernel = PackedSet(path, 6.0, "cpu"), device.type == "cuda"
    n_species = len(packed.meta["statistics"]["atomic_numbers"])
    model = Nequix(jax.random.key(0), n_species=n_species, atom_energies=[0.0] * n_species, kernel=kernel, **OFFICIAL)
    schedule = optax.warmup_cosine_decay_schedule(0.002, 0.01, 1000, 1_000_000, 1e-6)
    muon = optax.contrib.muon(schedule, weight_decay=1e-3, weight_decay_mask=weight_decay_mask(model))
    optimizer = optax.chain(optax.clip_by_global_norm(100.0), muon)

    @equinox.filter_jit  # train_step of nequix/train.py, without its pmap over one device
    def train_step(model, averaged, state, graphs):
        (value, _), grads = equinox.filter_value_and_grad(loss, has_aux=True)(model, graphs, 20.0, 20.0, 5.0, "mae")
        updates, state = optimizer.update(grads, state, equinox.filter(model, equinox.is_array))
        model = equinox.apply_updates(model, updates)
        old, static = equinox.partition(averaged, equinox.is_array)
        new = jax.tree.map(lambda a, p: a * 0.999 + p * 0.001, old, equinox.filter(model, equinox.is_array))
        return model, equinox.combine(new, static), state

    def case(steps, batch):
        x = official_batch(packed, batch)
        nodes, labels = ("species", "positions", "forces"), ("cell", "energy", "stress")
        groups = dict(nodes=nodes, edges=("shifts",), globals=labels)
        graphs = jraph.GraphsTuple(
            **{k: {n: x[n] for n in names} for k, names in groups.items()},
            **{k: x[k] for k in "n_node n_edge senders receivers".split()},
        )
        room = [int(1.1 * len(x[k])) + 1 for k in ("species", "senders")]  # the official buffer_factor
        graphs = jax.device_put(jraph.pad_with_graphs(graphs, *room, batch + 1))
        state = [model, jax.tree.map(lambda p: p, model), optimizer.init(equinox.filter(model, equinox.is_array))]

        def step():
            state[:] = train_step(*state, graphs)

        return official_rates(step, lambda: jax.block_until_ready(state), steps, batch, x)

    return case, f"nequix {version('nequix')}, JAX {jax.__version__}, {describe(kernel, tf32)}"


def training(a, device):
    jobs = [dict(steps=a.steps, batch=batch) for batch in a.batches]
    options = dict(path=a.data, tf32=a.tf32, split=a.split)
    if "WORLD_SIZE" in os.environ:  # torchrun: these processes are the ranks of ours
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        rows, lines, rank = [], [], dist.get_rank()
        for name in a.models or ["fused"]:
            case, what = MODELS["train"][name](device, **options)
            rows += [dict(model=name, **job, **case(**job), memory_GiB=peak_memory()) for job in jobs]
            lines.append(f"{name}: {what}")
        dist.destroy_process_group()
        if rank:
            return
    else:
        rows, lines = race("train", jobs, a.models or list(MODELS["train"]), options, a)
    text = [header(device), f"{a.data}; {a.steps} steps of each batch", "", *lines, ""]
    value = lambda r: f"{r['rate']:.4g}; {r['ms']:.1f} ({r['low']:.1f} to {r['high']:.1f}); {r['memory_GiB']:.1f}"
    text += ["Structures/s; ms a step, median (first to last decile); peak memory, GiB", ""]
    text += [markdown(rows, lambda r: r["model"], lambda r: r["batch"], value), ""]
    text += ["Atoms/s, edges/s", ""]
    value = lambda r: f"{r['atoms_per_s']:.0f}, {r['edges_per_s']:.0f}"
    text += [markdown(rows, lambda r: r["model"], lambda r: r["batch"], value), ""]
    if a.split:
        of = [
            k for k in dict.fromkeys(itertools.chain.from_iterable(rows)) if k.startswith("busy") or k.endswith("_ms")
        ]
        value = lambda r: ", ".join(f"{r[k]:.2f}" for k in of if k in r)
        text += [", ".join(of), "", markdown(rows, lambda r: r["model"], lambda r: r["batch"], value), ""]
    value = lambda r: f"{100 * MPTRJ / r['rate'] / 3600 * int(os.environ.get('WORLD_SIZE', 1)):.1f}"
    text += [f"Projection, not a measurement: GPU-hours for 100 epochs of {MPTRJ} frames at this rate", ""]
    text += [markdown(rows, lambda r: r["model"], lambda r: r["batch"], value)]
    (a.out / "train.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


# ----------------------------------------------------------------------------------------------------------------------
# Relaxations, and the drift of the energy


def relaxations(a, device):
    """Throughput of relax on the first n structures of a file; ASE's FIRE one by one on n_ase of them, evenly spread."""
    calc = NequixCalculator(a.weights, a.device, a.dtype, a.conv)
    print(f"{header(device)}, {a.weights}, {a.dtype}, convolution {calc.model.chosen_conv()}")
    structures = [atoms for _, atoms in itertools.islice(read([a.file]), a.n)]
    if not structures:
        raise ValueError(f"no structures in {a.file}")
    for _ in calc.relax(structures[:8], a.fmax, 3):  # kernels are built, the memory is measured
        pass
    start, results = clock(device), {}
    for i, atoms, energy, converged, taken, error in calc.relax(structures, a.fmax, a.max_steps):
        results[i] = energy, converged, taken, error
    seconds = clock(device) - start
    converged, failed = sum(r[1] for r in results.values()), sum(r[3] is not None for r in results.values())
    taken = sum(r[2] for r in results.values())
    size = sum(map(len, structures)) / len(structures)
    print(f"{len(structures)} structures, {size:.1f} atoms on average, of {a.file}: ", end="")
    print(f"fmax {a.fmax} eV/A, at most {a.max_steps} steps")
    print(
        f"relax: {seconds:.1f} s, {len(structures) / seconds:.2f} structures/s, {taken / seconds:.0f} steps/s; ", end=""
    )
    print(f"converged {converged / len(structures):.2%}, failed {failed}; batches of {calc.max_edges} edges")

    fit = [i for i, atoms in enumerate(structures) if atoms.pbc.all() and not results[i][3]]  # for ASE's filter
    picks = [fit[i] for i in np.unique(np.linspace(0, len(fit) - 1, min(a.n_ase, len(fit))).astype(int))]
    start, apart, same = clock(device), [], 0
    for i in picks:
        atoms = structures[i].copy()
        atoms.calc = calc
        done = FIRE(FrechetCellFilter(atoms), logfile=None).run(a.fmax, a.max_steps)
        apart.append(1000 * abs(atoms.get_potential_energy() - results[i][0]) / len(atoms))
        same += done == results[i][1]
    if picks:
        one_by_one = (clock(device) - start) / len(picks)
        faster = one_by_one * len(structures) / seconds
        print(
            f"ASE one by one, {len(picks)} of them: {1 / one_by_one:.3f} structures/s; relax is {faster:.1f} times faster"
        )
        print(
            f"energies differ by {np.median(apart):.4f} meV/atom (median), {max(apart):.4f} (most); converged alike: {same}"
        )

    few = structures[: a.n_torch_sim]
    try:
        energies, seconds = torch_sim_relaxed(few, calc, a.fmax, a.max_steps)
    except Exception as e:  # of any library
        return print(f"torch-sim: left out: {type(e).__name__}: {e}".splitlines()[0])
    start = clock(device)
    for _ in calc.relax(few, a.fmax, a.max_steps):
        pass
    own = clock(device) - start
    apart = [1000 * abs(e - results[i][0]) / len(few[i]) for i, e in enumerate(energies)]
    print(f"torch-sim {version('torch-sim-atomistic')} with the same model, the first {len(few)}: ", end="")
    print(f"{len(few) / seconds:.2f} structures/s, relax of these {len(few) / own:.2f}; ", end="")
    print(f"energies differ by {np.median(apart):.4f} meV/atom (median), {np.quantile(apart, 0.95):.4f} (95% of them)")


def torch_sim_relaxed(structures, calc, fmax, max_steps):
    """Energies, eV, by torch-sim's FIRE on its Frechet cell with batches in flight, as large as those of relax; and seconds."""
    import torch_sim
    from torch_sim.autobatching import InFlightAutoBatcher
    from torch_sim.models.interface import ModelInterface

    class Wrapped(ModelInterface):
        def __init__(self):
            super().__init__()
            self._device, self._dtype, self._compute_stress, self._compute_forces = (
                calc.device,
                torch.float64,
                True,
                True,
            )
            self._memory_scales_with = "n_atoms_x_density"

        def forward(self, s):
            n_atoms = torch.bincount(s.system_idx)
            pbc = torch.as_tensor(s.pbc, device=calc.device).expand(len(n_atoms), 3)
            cell = s.row_vector_cell.contiguous()
            batch = make_batch(s.atomic_numbers, s.positions, cell, pbc, n_atoms, calc.cutoff, calc.device)
            return dict(zip(("energy", "forces", "stress"), energy_forces_stress(calc.model, batch)))

    def relaxed(structures, steps):
        model = Wrapped()
        room = 1000 * calc.edge_budget() / (4 / 3 * np.pi * calc.cutoff**3)  # atoms times atoms a nm^3
        options = dict(autobatcher=InFlightAutoBatcher(model, max_memory_scaler=room), max_steps=steps)
        options |= dict(optimizer=torch_sim.frechet_cell_fire)
        options |= dict(convergence_fn=torch_sim.generate_force_convergence_fn(fmax, include_cell_forces=True))
        start = clock(calc.device)
        energies = torch_sim.optimize([s.copy() for s in structures], model, **options).energy.tolist()
        return energies, clock(calc.device) - start

    relaxed(structures[:8], 5)  # kernels are built
    return relaxed(structures, max_steps)


def nve(a, device):
    """Drift of the total energy: a line fitted to it over the run after 0.1 ps."""
    print(f"{header(device)}, {a.weights}, convolution {a.conv}")
    for n, dtype in itertools.product(a.sizes, ("float32", "float64")):
        atoms = crystal("Si", n)
        atoms.calc = NequixCalculator(a.weights, a.device, dtype, a.conv)
        warm(atoms)
        md, energies = VelocityVerlet(atoms, 1 * units.fs), []
        md.run(100)
        md.attach(lambda: energies.append(1000 * atoms.get_total_energy() / len(atoms)))
        md.run(round(1000 * a.ps))
        drift = np.polyfit(np.arange(len(energies)) / 1000, energies, 1)[0]
        print(
            f"Si {len(atoms)} atoms, 300 K, {a.ps} ps, 1 fs, {dtype}: drift {drift:+.5f} meV/atom/ps, "
            f"standard deviation {np.std(energies):.5f} meV/atom"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Command line

MODELS = dict(
    infer={"fused": ours("fused"), "oeq": ours("oeq"), "torch": ours("torch"), **PEERS},
    train={"fused": our_training("fused"), "oeq": our_training("oeq"), "torch": our_training("torch")}
    | {"nequix-torch": official_torch, "nequix-jax": official_jax},
)


def main():
    if sys.argv[1:2] == ["serve"]:
        kind, name, options, *device = sys.argv[2:]
        return serve(kind, name, device[1] if device else None, json.loads(options))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)

    def command(name, run, help, weights=True):
        c = commands.add_parser(name, help=help)
        c.set_defaults(run=run)
        c.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
        if weights:
            c.add_argument("--weights", default="nequix-mp-1", help="a released name, an .nqx file or a model.pt")
            c.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="of the network")
        return c

    def racing(c, kind):
        c.add_argument("--models", nargs="+", choices=MODELS[kind], help="default: all that are installed")
        c.add_argument("--steps", type=int, default=20, help="steps timed (default: 20)")
        c.add_argument(
            "--python",
            nargs="+",
            default=[],
            metavar="MODEL=INTERPRETER",
            help="of packages in environments of their own",
        )
        c.add_argument(
            "--limit", type=float, default=300, help="s; a model slower than that is left out of a size (default: 300)"
        )
        c.add_argument("--out", type=Path, default=Path(f"runs/speed_{kind}"), help=f"default: runs/speed_{kind}")

    c = command("infer", infer, "ASE steps of diamond and silicon")
    racing(c, "infer")
    c.add_argument("--sizes", type=int, nargs="+", help="atoms (default: 8 to 64000; on a CPU to 216)")
    c.add_argument("--crystals", nargs="+", default=["C", "Si"], choices=["C", "Si"], help="default: both")
    c = commands.add_parser("plot", help="speed.png of several races of infer")
    c.set_defaults(run=plot, device="cpu")
    c.add_argument("files", type=Path, nargs="+", help="infer.csv of each, infer.md beside it")
    c.add_argument("--out", type=Path, default=Path("speed.png"), help="default: speed.png")
    c = command("train", training, "training steps", weights=False)
    racing(c, "train")
    c.add_argument("data", help="a packed set")
    c.add_argument(
        "--batches", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="structures (default: 64 to 1024)"
    )
    c.add_argument("--tf32", action="store_true", help="TF32 matrix products")
    c.add_argument("--split", action="store_true", help="also each part of a step, and how busy the GPU is")
    c = command("relax", relaxations, "structures/s of relax")
    c.add_argument("file", help="structures, anything ASE reads")
    c.add_argument("--n", type=int, default=2000, help="so many of them (default: 2000)")
    c.add_argument("--n-ase", type=int, default=20, help="so many with ASE too (default: 20)")
    c.add_argument("--n-torch-sim", type=int, default=200, help="so many with torch-sim, if installed (default: 200)")
    c.add_argument("--fmax", type=float, default=0.02, help="eV/A (default: 0.02)")
    c.add_argument("--max-steps", type=int, default=500, help="default: 500")
    c.add_argument("--conv", choices=["auto", "torch", "oeq", "fused"], default="auto", help="convolution")
    c = command("nve", nve, "drift of the energy of silicon")
    c.add_argument("--sizes", type=int, nargs="+", default=[64, 216], help="atoms (default: 64 216)")
    c.add_argument("--ps", type=float, default=1.0, help="so long (default: 1 ps)")
    c.add_argument("--conv", choices=["auto", "torch", "oeq", "fused"], default="auto", help="convolution")
    a = p.parse_args()
    try:
        if a.command in MODELS:
            a.out.mkdir(parents=True, exist_ok=True)
        a.run(a, gpu_or_cpu(a.device))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
