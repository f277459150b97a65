"""Other potentials and the official Nequix code, for bench_speed.py to time beside ours; and relaxation by torch-sim.

    python bench_speed.py infer --models fused mace sevennet-0
    python bench_speed.py train data/random1k --models fused nequix-torch nequix-jax --tf32
    python bench_speed.py relax wbm.extxyz --n-torch-sim 100
    python records/peers.py --build DIR --extjax SOURCES     # compiles openequivariance_extjax into DIR, for PYTHONPATH

Each function imports the package that it needs. PEERS["infer"]: name -> f(device "cpu" or "cuda", weights) -> (ASE
calculator in float32, description). PEERS["train"]: name -> f(torch.device, packed set, precision, structures) ->
(step, atoms, edges, description); step() takes one whole training step and waits for it. Where weights would have to be
downloaded, the architecture gets random ones: the speed is the same.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def installed(package):
    return importlib.util.find_spec(package) is not None


# ----------------------------------------------------------------------------------------------------------------------
# ASE calculators


def nequix_torch(device, weights):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX only reads the weights: keep it off the GPU
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
    os.environ |= dict(JAX_PLATFORMS=device, OEQ_NOTORCH="1", XLA_PYTHON_CLIENT_PREALLOCATE="false")
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
    shape = dict(hidden_irreps=o3.Irreps("128x0e+128x1o"), MLP_irreps=o3.Irreps("16x0e"), r_max=6.0, num_bessel=10)
    shape |= dict(max_ell=3, num_polynomial_cutoff=5, num_interactions=2, correlation=3, use_reduced_cg=False)
    shape |= dict(interaction_cls=block, interaction_cls_first=block, gate=torch.nn.functional.silu)
    shape |= dict(num_elements=len(numbers), atomic_numbers=numbers, atomic_energies=np.zeros(len(numbers)))
    shape |= dict(avg_num_neighbors=61.96, atomic_inter_scale=0.804, atomic_inter_shift=0.164)
    cueq = device == "cuda" and installed("cuequivariance_ops_torch")
    model = modules.ScaleShiftMACE(**shape).float()
    calc = MACECalculator(models=model, device=device, default_dtype="float32", enable_cueq=cueq)
    kernel = "cuEquivariance" if cueq else "e3nn"
    return calc, f"mace-torch {version('mace-torch')}, architecture of MACE-MP-0 medium, {kernel}, random weights"


def sevennet(name):
    def make(device, weights):
        from sevenn.calculator import SevenNetCalculator

        return SevenNetCalculator(name, device=device), f"sevenn {version('sevenn')}, {name}, e3nn"

    return make


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

    # downloads its weights
    model, adapter = pretrained.orb_v3_conservative_inf_mpa(device=device, precision="float32-highest")
    calc = ORBCalculator(model, adapter, device=device)
    return calc, f"orb-models {version('orb-models')}, orb-v3-conservative-inf-mpa"


PEERS = dict(
    infer={"nequix-torch": nequix_torch, "nequix-jax": nequix_jax, "mace": mace, "chgnet": chgnet, "orb": orb}
    | {"sevennet-0": sevennet("7net-0"), "sevennet-l3i5": sevennet("7net-l3i5"), "mattersim": mattersim}
    | {"nequip": nequip}
)

# ----------------------------------------------------------------------------------------------------------------------
# A training step of the official code (nequix 0.4.5): its model, loss, Muon, clipping, schedule and averaged weights.
# Data cost it nothing here: one batch, made before the clock starts, serves every step.

OFFICIAL = dict(hidden_irreps="128x0e + 64x1o + 32x2e + 32x3o", lmax=3, cutoff=6.0, n_layers=4, radial_basis_size=8)
OFFICIAL |= dict(radial_mlp_size=64, radial_mlp_layers=2, radial_polynomial_p=6.0, mlp_init_scale=4.0)
OFFICIAL |= dict(index_weights=False, layer_norm=True, shift=0.16502578765761478, scale=0.8066479563713074)
OFFICIAL |= dict(avg_n_neighbors=57.413687022442645)


def official_batch(path, device, size, precision):
    """The number of elements, and `size` training frames as a dict of float32 and int32 arrays."""
    from data import TRAIN, PackedSet

    if precision not in ("float32", "tf32"):
        raise ValueError(f"the official code is timed in float32 or tf32, not {precision}")
    packed, rng = PackedSet(path, 6.0, device), np.random.default_rng(0)
    frames = packed.indices(TRAIN)
    b = packed.batch(np.concatenate([rng.permutation(frames) for _ in range(-(-size // len(frames)))])[:size])
    elements = torch.tensor(packed.meta["statistics"]["atomic_numbers"], device=b.numbers.device)
    n_edge = torch.bincount(b.structure[b.receivers], minlength=size)
    integers = dict(n_node=b.n_atoms, n_edge=n_edge, senders=b.senders, receivers=b.receivers, structure=b.structure)
    integers |= dict(species=torch.searchsorted(elements, b.numbers))
    floats = {k: getattr(b, k) for k in ("positions", "shifts", "cell", "energy", "forces", "stress")}
    groups = (integers, np.int32), (floats, np.float32)
    return len(elements), {k: v.cpu().numpy().astype(kind) for group, kind in groups for k, v in group.items()}


def official_torch(device, path, precision, size):
    os.environ["JAX_PLATFORMS"] = "cpu"  # the package imports JAX: keep it off the GPU
    from nequix.torch_impl.model import NequixTorch
    from nequix.torch_impl.muon import SingleDeviceMuonWithAuxAdam, get_muon_param_groups
    from nequix.torch_impl.train import loss

    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    n_species, arrays = official_batch(path, device, size, precision)
    kernel = device.type == "cuda"
    model = NequixTorch(n_species=n_species, atom_energies=[0.0] * n_species, kernel=kernel, **OFFICIAL).to(device)
    optimizer, averaged = SingleDeviceMuonWithAuxAdam(get_muon_param_groups(model, 0.01, 1e-3)), copy.deepcopy(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    t = {k: torch.from_numpy(v).to(device) for k, v in arrays.items()}

    class Graphs(types.SimpleNamespace):  # as torch_geometric collates them
        __getitem__ = types.SimpleNamespace.__getattribute__

    graphs = Graphs(x=t["species"].long(), edge_attr=t["shifts"], batch=t["structure"].long(), num_graphs=size, **t)
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
        if kernel:
            torch.cuda.synchronize(device)

    what = f"nequix {version('nequix')}, PyTorch, {'OpenEquivariance' if kernel else 'no kernel'}"
    return step, len(arrays["species"]), len(arrays["senders"]), what


def official_jax(device, path, precision, size):
    os.environ |= dict(JAX_PLATFORMS=device.type, OEQ_NOTORCH="1", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    import equinox
    import jax
    import jraph
    import optax
    from nequix.model import Nequix, weight_decay_mask
    from nequix.train import loss

    jax.config.update("jax_default_matmul_precision", "tensorfloat32" if precision == "tf32" else "highest")
    n_species, x = official_batch(path, "cpu", size, precision)
    kernel = device.type == "cuda"
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

    groups = dict(nodes=("species", "positions", "forces"), edges=("shifts",), globals=("cell", "energy", "stress"))
    groups = {k: {name: x[name] for name in names} for k, names in groups.items()}
    graphs = jraph.GraphsTuple(**groups, **{k: x[k] for k in "n_node n_edge senders receivers".split()})
    room = [int(1.1 * len(x[k])) + 1 for k in ("species", "senders")]  # the official buffer_factor
    graphs = jax.device_put(jraph.pad_with_graphs(graphs, *room, size + 1))
    state = [model, jax.tree.map(lambda p: p, model), optimizer.init(equinox.filter(model, equinox.is_array))]

    def step():
        state[:] = train_step(*state, graphs)
        jax.block_until_ready(state)

    what = f"nequix {version('nequix')}, JAX {jax.__version__}, {'OpenEquivariance' if kernel else 'no kernel'}"
    return step, len(x["species"]), len(x["senders"]), what


PEERS["train"] = {"nequix-torch": official_torch, "nequix-jax": official_jax}

# ----------------------------------------------------------------------------------------------------------------------
# torch-sim


def torch_sim(structures, energies, calc, fmax, max_steps):
    """A line of text: structures/s of torch-sim's FIRE on its Frechet cell filter, with the model of `calc` and
    batches as large as those of calc.relax; and how far its energies are from `energies` (eV)."""
    import torch_sim as sim
    from torch_sim.autobatching import InFlightAutoBatcher
    from torch_sim.models.interface import ModelInterface

    from data import make_batch
    from model import energy_forces_stress

    class Wrapped(ModelInterface):
        def __init__(self):
            super().__init__()
            self._device, self._dtype, self._memory_scales_with = calc.device, torch.float64, "n_atoms_x_density"
            self._compute_stress = self._compute_forces = True

        def forward(self, s):
            n_atoms = torch.bincount(s.system_idx)
            pbc = torch.as_tensor(s.pbc, device=calc.device).expand(len(n_atoms), 3)
            cell = s.row_vector_cell.contiguous()
            batch = make_batch(s.atomic_numbers, s.positions, cell, pbc, n_atoms, calc.cutoff, calc.device)
            return dict(zip(("energy", "forces", "stress"), energy_forces_stress(calc.model, batch)))

    def relax(structures, steps):
        model = Wrapped()
        room = 1000 * calc.max_edges / (4 / 3 * np.pi * calc.cutoff**3)  # atoms times atoms/nm^3
        options = dict(autobatcher=InFlightAutoBatcher(model, max_memory_scaler=room), max_steps=steps)
        options |= dict(optimizer=sim.frechet_cell_fire)
        options |= dict(convergence_fn=sim.generate_force_convergence_fn(fmax, include_cell_forces=True))
        start = time.perf_counter()
        energies = sim.optimize([s.copy() for s in structures], model, **options).energy.tolist()
        return energies, time.perf_counter() - start

    relax(structures[:8], 5)  # compiles the kernels
    found, seconds = relax(structures, max_steps)
    apart = [1000 * abs(e - ours) / len(atoms) for e, ours, atoms in zip(found, energies, structures)]
    return (
        f"{len(structures) / seconds:.2f} structures/s (version {version('torch-sim-atomistic')}), energies differ by "
        f"{np.median(apart):.4f} meV/atom (median), {np.quantile(apart, 0.95):.4f} meV/atom (95% are below)"
    )


PEERS["relax"] = {"torch-sim": torch_sim}

# ----------------------------------------------------------------------------------------------------------------------
# OpenEquivariance's extension for JAX, with g++ and the CUDA headers of pip packages: no CUDA toolkit is needed


def build(out, source):
    """Compile the unpacked source distribution of openequivariance_extjax into the folder `out`."""
    import jax
    import nanobind
    from torch.utils.cpp_extension import CUDA_HOME

    source, nb = source / "src", Path(nanobind.__file__).parent
    homes = [Path(h) for h in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", CUDA_HOME) if h]
    cuda = [h for h in homes if (h / "include/cuda_runtime.h").is_file()][:1]
    cuda += [Path(s) / "nvidia/cu13" for s in sys.path if (Path(s) / "nvidia/cu13").is_dir()]
    include = [source, source / "extension", jax.ffi.include_dir(), nb / "include", nb / "ext/robin_map/include"]
    include += [sysconfig.get_paths()["include"], *[c / "include" for c in cuda]]
    folders = [d for c in cuda for d in (c / "lib64", c / "lib", c / "lib64/stubs", c / "lib/stubs") if d.is_dir()]
    libraries = [[str(f) for d in folders for f in sorted(d.glob(f"lib{n}.so*"))] for n in ("cudart", "nvrtc")]
    stub = out / "stub/libcuda.so.1"  # names the driver's library as needed, without one to link against
    stub.parent.mkdir(parents=True, exist_ok=True)
    driver = ["-xc", "/dev/null", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(stub)]
    subprocess.run(["gcc", *driver], check=True)
    files = [source / f for f in ("ffi_handlers.cpp", "jax_ffi_registration.cpp", "extension/json11/json11.cpp")]
    command = "g++ -O2 -std=c++17 -fPIC -shared -fvisibility=hidden -w -fno-strict-aliasing".split()
    command += "-ffunction-sections -fdata-sections -DCUDA_BACKEND=1 -DNDEBUG".split() + [f"-I{i}" for i in include]
    command += [*map(str, files), str(nb / "src/nb_combined.cpp"), *[found[0] for found in libraries if found]]
    command += ["-Wl,--no-as-needed", str(stub), *[f"-Wl,-rpath,{d}" for d in folders if d.name != "stubs"]]
    target = out / ("openequivariance_extjax" + sysconfig.get_config_var("EXT_SUFFIX"))
    subprocess.run([*command, "-o", str(target)], check=True)
    print("built", target)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--build", metavar="DIR", type=Path, required=True, help="compile openequivariance_extjax into DIR")
    p.add_argument("--extjax", metavar="SOURCES", type=Path, required=True, help="its source distribution, unpacked")
    a = p.parse_args()
    build(a.build, a.extjax)
