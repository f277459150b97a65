"""Whole training steps of the official Nequix code (nequix 0.4.5, and openequivariance 0.7.0) on one GPU, in PyTorch or JAX.

python peers.py --backend torch|jax --data data/random1k [--batch 256] [--steps 20] [--tf32] [--no-kernel] [--largest]
python peers.py --build DIR --extjax SOURCES     # compile openequivariance_extjax with g++ into DIR
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
p = argparse.ArgumentParser()
p.add_argument("--backend", choices=["torch", "jax"], default="torch")
p.add_argument("--batch", type=int, default=256)
p.add_argument("--steps", type=int, default=20)
p.add_argument("--warmup", type=int, default=5)
p.add_argument("--tf32", action="store_true")
p.add_argument("--no-kernel", action="store_true")
p.add_argument("--largest", action="store_true")
p.add_argument("--pad", type=float, default=1.1, help="jax: padding of atoms and edges (official buffer_factor: 1.1)")
p.add_argument("--data", default=str(ROOT / "data/random1k"))
p.add_argument("--build", metavar="DIR", help="only compile openequivariance_extjax into DIR")
p.add_argument("--extjax", type=Path, help="with --build: its source distribution, unpacked")
args = p.parse_args()


def build(out):
    import jax
    import nanobind

    src, nb = args.extjax / "src", Path(nanobind.__file__).parent
    from torch.utils.cpp_extension import CUDA_HOME

    homes = (Path(h) for h in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", CUDA_HOME) if h)
    paths = [h for h in homes if (h / "include/cuda_runtime.h").is_file()][:1] + [
        Path(s) / "nvidia/cu13" for s in sys.path if (Path(s) / "nvidia/cu13").is_dir()
    ]
    inc = [src, src / "extension", jax.ffi.include_dir(), nb / "include", nb / "ext/robin_map/include"]
    inc += [sysconfig.get_paths()["include"], *[c / "include" for c in paths]]
    libs = [d for c in paths for d in (c / "lib64", c / "lib", c / "lib64/stubs", c / "lib/stubs") if d.is_dir()]
    find = lambda n: next((f"{f}" for d in libs for f in sorted(d.glob(f"lib{n}.so*"))), None)
    Path(out).mkdir(parents=True, exist_ok=True)
    target = Path(out) / ("openequivariance_extjax" + sysconfig.get_config_var("EXT_SUFFIX"))
    cmd = ["g++", "-O2", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-w", "-DCUDA_BACKEND=1", "-DNDEBUG"]
    cmd += ["-fno-strict-aliasing", "-ffunction-sections", "-fdata-sections"] + [f"-I{i}" for i in inc]
    cmd += [str(src / s) for s in ("ffi_handlers.cpp", "jax_ffi_registration.cpp", "extension/json11/json11.cpp")]
    cmd += [str(nb / "src/nb_combined.cpp")] + [f for n in ("cudart", "nvrtc") if (f := find(n))]
    stub = Path(out) / "stub"  # names the driver's library as needed, without needing it to link
    stub.mkdir(exist_ok=True)
    driver = ["-xc", "/dev/null", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(stub / "libcuda.so.1")]
    subprocess.run(["gcc", *driver], check=True)
    cmd += ["-Wl,--no-as-needed", str(stub / "libcuda.so.1")]
    cmd += [f"-Wl,-rpath,{d}" for d in libs if d.name != "stubs"] + ["-o", str(target)]
    print(" ".join(cmd))
    subprocess.run(cmd, check=True)
    print("built", target)


if args.build:
    build(args.build)
    sys.exit()

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
if args.backend == "torch":
    os.environ["JAX_PLATFORMS"] = "cpu"  # the official package imports jax at its top; keep it off the GPU
else:
    os.environ["OEQ_NOTORCH"] = "1"  # torch is there for data.py alone: don't build OpenEquivariance's torch extension
sys.path[0] = str(ROOT)


class Stub(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


ALWAYS = "wandb wandb_osh wandb_osh.hooks matscipy matscipy.neighbours".split()
MISSING = "ase ase.db ase.geometry yaml cloudpickle torch_geometric torch_geometric.loader".split()
stubbed = []
for name in ALWAYS + MISSING:
    top = name.split(".")[0]
    if name in ALWAYS or top in stubbed or importlib.util.find_spec(top) is None:
        sys.modules[name] = Stub(name)
        stubbed.append(name)
        if "." in name:
            setattr(sys.modules[top], name.split(".")[1], sys.modules[name])

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402

# configs/nequix-mp-1.yml of the official repository
ATOMIC_NUMBERS = [*range(1, 84), *range(89, 95)]
MODEL = dict(
    n_species=len(ATOMIC_NUMBERS), hidden_irreps="128x0e + 64x1o + 32x2e + 32x3o", lmax=3, cutoff=6.0, n_layers=4,
    radial_basis_size=8, radial_mlp_size=64, radial_mlp_layers=2, radial_polynomial_p=6.0, mlp_init_scale=4.0,
    index_weights=False, layer_norm=True, shift=0.16502578765761478, scale=0.8066479563713074,
    avg_n_neighbors=57.413687022442645, atom_energies=[0.0] * len(ATOMIC_NUMBERS), kernel=not args.no_kernel,
)  # fmt: skip
WEIGHTS = (20.0, 20.0, 5.0)
LR, WARMUP_FACTOR, WEIGHT_DECAY, CLIP, EMA = 0.01, 0.2, 1e-3, 100.0, 0.999
STEPS_PER_EPOCH, EPOCHS, WARMUP_EPOCHS = 10000, 100, 0.1


class Frames:
    """Genuine frames, cut once into numpy arrays; `graph(n)` packs the first n of them, repeated cyclically."""

    def __init__(self, n):
        packed = data.PackedSet(args.data, 6.0, "cpu")
        idx = np.concatenate([packed.indices(0), packed.indices(1)])
        idx = idx if args.largest and args.backend == "torch" else idx[:n]
        index = np.full(120, -1)
        index[ATOMIC_NUMBERS] = np.arange(len(ATOMIC_NUMBERS))
        self.frames = []
        for part in np.array_split(idx, -(-len(idx) // 64)):
            b = packed.batch(part)
            s, A = b.structure.numpy(), np.cumsum([0, *b.n_atoms.tolist()])
            es = s[b.receivers.numpy()]
            assert (np.diff(es) >= 0).all()
            E = np.searchsorted(es, np.arange(len(part) + 1))
            f32 = lambda x: x.numpy().astype(np.float32)
            x, pos, cell, shifts = index[b.numbers.numpy()], f32(b.positions), f32(b.cell), f32(b.shifts)
            energy, forces, stress = f32(b.energy), f32(b.forces), f32(b.stress)
            assert (x >= 0).all() and all(np.isfinite(a).all() for a in (energy, forces, stress))
            send, recv = b.senders.numpy(), b.receivers.numpy()
            for i in range(len(part)):
                a, e = slice(A[i], A[i + 1]), slice(E[i], E[i + 1])
                self.frames.append(dict(
                    n_node=np.array([A[i + 1] - A[i]], np.int32), n_edge=np.array([E[i + 1] - E[i]], np.int32),
                    senders=(send[e] - A[i]).astype(np.int32), receivers=(recv[e] - A[i]).astype(np.int32),
                    species=x[a].astype(np.int32), positions=pos[a], shifts=shifts[e], cell=cell[i],
                    forces=forces[a], energy=energy[i : i + 1], stress=stress[i],
                ))  # fmt: skip

    def take(self, n):
        return [self.frames[i % len(self.frames)] for i in range(n)]


class TorchBatch(types.SimpleNamespace):
    """The fields that torch_geometric's DataLoader collates from the official dict_to_pytorch_geometric."""

    def __getitem__(self, key):
        return getattr(self, key)


def torch_batch(frames, device):
    cat = lambda k: torch.from_numpy(np.concatenate([f[k] for f in frames]))
    stack = lambda k: torch.from_numpy(np.stack([f[k] for f in frames]))
    n_node, n_edge = cat("n_node"), cat("n_edge")
    first = torch.repeat_interleave(torch.cumsum(n_node, 0) - n_node, n_edge.long())
    b = dict(
        n_node=n_node, n_edge=n_edge, x=cat("species").long(), positions=cat("positions"), edge_attr=cat("shifts"),
        edge_index=torch.stack([cat("senders") + first, cat("receivers") + first]).long(), cell=stack("cell"),
        energy=cat("energy"), forces=cat("forces"), stress=stack("stress"),
        batch=torch.repeat_interleave(torch.arange(len(frames)), n_node.long()),
    )  # fmt: skip
    return TorchBatch(num_graphs=len(frames), **{k: v.to(device) for k, v in b.items()})


def torch_backend():
    import copy

    from nequix.torch_impl.model import NequixTorch
    from nequix.torch_impl.muon import SingleDeviceMuonWithAuxAdam, get_muon_param_groups
    from nequix.torch_impl.train import loss

    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")  # the package's own: highest
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(42)
    model = NequixTorch(**MODEL).to(device)
    optimizer = SingleDeviceMuonWithAuxAdam(get_muon_param_groups(model, LR, WEIGHT_DECAY))
    ema_model = copy.deepcopy(model).to(device)
    warmup_steps, total_steps = WARMUP_EPOCHS * STEPS_PER_EPOCH, EPOCHS * STEPS_PER_EPOCH

    def lr_lambda(step):
        if step < warmup_steps:
            return WARMUP_FACTOR + (1 - WARMUP_FACTOR) * step / warmup_steps
        progress = (step - warmup_steps) / (total_steps - warmup_steps)
        return 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi))).item()

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda)
    count = 0

    def step(batch):  # train_step of nequix/torch_impl/train.py
        nonlocal count
        batch.positions = batch.positions.detach()  # each official batch comes fresh
        model.train()
        optimizer.zero_grad()
        total_loss, metrics = loss(model, batch, *WEIGHTS, "mae", device)
        total_loss.backward()
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        decay = min(EMA, (1 + count) / (10 + count))
        with torch.no_grad():
            for ema_param, model_param in zip(ema_model.parameters(), model.parameters()):
                ema_param.data = ema_param.data * decay + model_param.data * (1 - decay)
        count += 1
        return total_loss, metrics

    cuda = device.type == "cuda"
    sync = torch.cuda.synchronize if cuda else lambda: None
    peak = lambda: torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    name = torch.cuda.get_device_name() if cuda else "cpu"
    return dict(
        name=name, batch=lambda f: torch_batch(f, device), step=step, sync=lambda out: sync(), peak=peak,
        params=sum(q.numel() for q in model.parameters()), note="as collated by torch_geometric, unpadded",
        size=lambda b: (len(b.x), b.edge_index.shape[1]),
    )  # fmt: skip


def jax_backend():
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jraph
    import optax
    from nequix.data import dict_to_graphstuple
    from nequix.model import Nequix, weight_decay_mask
    from nequix.train import loss

    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if args.tf32 else "highest")
    model = Nequix(jax.random.key(0), **MODEL)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=LR * WARMUP_FACTOR, peak_value=LR, end_value=1e-6,
        warmup_steps=WARMUP_EPOCHS * STEPS_PER_EPOCH, decay_steps=EPOCHS * STEPS_PER_EPOCH,
    )  # fmt: skip
    optim = optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.contrib.muon(
            learning_rate=schedule, weight_decay=WEIGHT_DECAY, weight_decay_mask=weight_decay_mask(model)
        ),
    )
    opt_state = optim.init(eqx.filter(model, eqx.is_array))
    ema_model = jax.tree.map(lambda x: x.copy(), model)
    state = [model, ema_model, opt_state, jnp.array(0)]

    @eqx.filter_jit  # train_step of nequix/train.py; there filter_pmap and a pmean of the gradient, of no use to one GPU
    def train_step(model, ema_model, step, opt_state, batch):
        (total_loss, metrics), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model, batch, *WEIGHTS, "mae")
        metrics["grad_norm"] = optax.global_norm(grads)
        updates, opt_state = optim.update(grads, opt_state, eqx.filter(model, eqx.is_array))
        model = eqx.apply_updates(model, updates)
        decay = jnp.minimum(EMA, (1 + step) / (10 + step))
        ema_params, ema_static = eqx.partition(ema_model, eqx.is_array)
        model_params = eqx.filter(model, eqx.is_array)
        new_ema_params = jax.tree.map(lambda ep, mp: ep * decay + mp * (1 - decay), ema_params, model_params)
        ema_model = eqx.combine(ema_static, new_ema_params)
        return model, ema_model, opt_state, total_loss, metrics

    def step(batch):
        state[0], state[1], state[2], total_loss, metrics = train_step(state[0], state[1], state[3], state[2], batch)
        state[3] = state[3] + 1
        return total_loss, metrics

    def make(frames):
        g = jraph.batch_np([dict_to_graphstuple(f) for f in frames])
        n_node = int(np.ceil(args.pad * g.n_node.sum())) + 1
        n_edge = max(int(np.ceil(args.pad * g.n_edge.sum())), int(g.n_edge.sum()))
        return jax.device_put(jraph.pad_with_graphs(g, n_node, n_edge, len(frames) + 1))

    device = jax.devices()[0]
    peak = lambda: (device.memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 2**30
    params = sum(q.size for q in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    return dict(
        name=device.device_kind, batch=make, step=step, sync=lambda out: jax.block_until_ready((out, state)), peak=peak,
        params=params, note=f"jraph graph padded x{args.pad}", size=lambda b: (len(b.nodes["species"]), len(b.senders)),
    )  # fmt: skip


def version(name):
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} ?"


def largest(B, frames):
    def fits(n):
        gc.collect()
        torch.cuda.empty_cache()
        t0, b, why = time.perf_counter(), None, ""
        torch.cuda.reset_peak_memory_stats()
        try:
            b = B["batch"](frames.take(n))
            B["step"](b)
            torch.cuda.synchronize()
            ok = True
        except torch.cuda.OutOfMemoryError:
            ok, why = False, "out of memory"
        except RuntimeError as e:
            ok, why = False, f"{type(e).__name__}: {e}".split("\n")[0][:200]
        atoms, edges = B["size"](b) if b is not None else (0, 0)
        print(f"  batch {n}: {atoms} atoms, {edges} edges: {'fits' if ok else why}, peak {B['peak']():.1f} GiB, "
              f"{time.perf_counter() - t0:.1f} s", flush=True)  # fmt: skip
        return ok

    lo, hi = 0, args.batch
    while fits(hi):
        lo, hi = hi, 2 * hi
    while hi - lo > 32:
        mid = lo + max((hi - lo) // 64 * 32, 32)
        if mid >= hi:
            break
        lo, hi = (mid, hi) if fits(mid) else (lo, mid)
    print(f"largest batch that fits: {lo} (frames repeated cyclically; {hi} does not)", flush=True)


def main():
    t0 = time.perf_counter()
    frames = Frames(args.batch)
    chosen = frames.take(args.batch)
    atoms, edges = (sum(int(f[k][0]) for f in chosen) for k in ("n_node", "n_edge"))
    t1 = time.perf_counter()
    B = torch_backend() if args.backend == "torch" else jax_backend()
    batch = B["batch"](chosen)
    names = "nequix openequivariance torch e3nn".split() if args.backend == "torch" else (
        "nequix openequivariance openequivariance_extjax jax jaxlib equinox optax e3nn_jax".split())  # fmt: skip
    print(f"official Nequix, {args.backend}, {'no kernel' if args.no_kernel else 'OpenEquivariance kernel'}, "
          f"{'tf32' if args.tf32 else 'fp32 (highest)'}, on {B['name']}; {', '.join(map(version, names))}; "
          f"{B['params']} parameters; stubbed: {' '.join(stubbed)}")  # fmt: skip
    print(f"batch {args.batch}: {atoms} atoms, {edges} edges (in the batch: {B['size'](batch)}, {B['note']}); one fixed "
          f"batch made before the clock: data are free; frames {t1 - t0:.1f} s, model {time.perf_counter() - t1:.1f} s", flush=True)  # fmt: skip
    for i in range(args.warmup):
        t = time.perf_counter()
        out = B["step"](batch)
        B["sync"](out)
        print(f"  warm-up {i}: loss {float(out[0].detach() if args.backend == 'torch' else out[0]):.4f}, "
              f"grad norm {float(out[1]['grad_norm']):.4g}, {time.perf_counter() - t:.3f} s", flush=True)  # fmt: skip
    n, ms = max(args.steps // 3, 1), []
    for _ in range(3):
        t = time.perf_counter()
        for _ in range(n):
            out = B["step"](batch)
        B["sync"](out)
        ms.append((time.perf_counter() - t) / n * 1e3)
    final = float(out[0].detach() if args.backend == "torch" else out[0])
    print(f"RESULT {args.backend} {'tf32' if args.tf32 else 'fp32'} batch {args.batch}: "
          f"{' '.join(f'{x:.1f}' for x in ms)} ms/step ({n} steps each), {args.batch * 1e3 / np.median(ms):.0f} structures/s, "
          f"peak {B['peak']():.2f} GiB, final loss {final:.4f}", flush=True)  # fmt: skip
    if args.largest:
        if args.backend == "jax" or B["name"] == "cpu":
            print("--largest: torch on a GPU only, skipped")
        else:
            del batch, out
            largest(B, frames)


main()
