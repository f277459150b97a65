"""The model against the released weights' reference values, e3nn and finite differences."""

import functools
import gzip
import hashlib
import io
import json
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111, molecule
from e3nn import o3

import model as nequix
from model import Nequix, energy_forces_stress, load, oeq_error, paths, save, torch_conv
from test_data import batch_of
from train import batch_loss

SHARED = Path(__file__).parent.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs public data sets in ../shared")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CONVS = [
    ("cpu", "torch"),
    *[("cuda", c) for c in ("torch", "oeq", "fused") if "cuda" in DEVICES and not (c == "oeq" and oeq_error())],
]


@functools.lru_cache
def find(name):
    """(Path of released weights, None), in ../shared, in the user's cache or fetched; or (None, why not)."""
    socket.setdefaulttimeout(10)
    try:
        path = SHARED / f"weights/{name}.nqx"
        return path if path.exists() else nequix.released(name), None
    except OSError as e:
        return None, str(e)


def released(name="nequix-mp-1"):
    """Path of released weights. Skips the test where there are none."""
    path, why_not = find(name)
    return path or pytest.skip(why_not)


def official_values():
    """39 structures and what nequix-mp-1 gives for them in the official PyTorch code, float64, on a CPU."""
    file = Path(__file__).parent / "records/official_nequix-mp-1.json.gz"
    return json.loads(gzip.decompress(file.read_bytes()))["cases"]


def to(batch, device):
    return type(batch)(**{k: v.to(device) for k, v in vars(batch).items() if v is not None})


def small_model(**config):
    torch.manual_seed(0)
    numbers = [1, 6, 8, 11, 14, 17, 78]
    statistics = dict(
        atomic_numbers=numbers, atom_energies=[-0.1 * z for z in numbers], avg_n_neighbors=40, scale=0.9, shift=0.2
    )
    config = dict(hidden="16x0e+8x1o+4x2e", lmax=2, layers=3, radial_size=16) | statistics | config
    return Nequix(config).double()


def small_batch(rattle=0.05):
    """Bulk, a skewed bulk cell, a slab, a molecule, and an atom alone."""
    structures = [bulk("NaCl", "rocksalt", 5.6), bulk("Si"), fcc111("Pt", (1, 1, 3), vacuum=8), molecule("CH3CH2OH")]
    structures += [molecule("O")]
    for k, atoms in enumerate(structures):
        atoms.rattle(rattle, seed=k)
    return batch_of(structures, 6.0)


# ----------------------------------------------------------------------------------------------------------------------
# Released weights


@pytest.mark.parametrize("device, conv", CONVS)
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_released_weights_reproduce_the_official_values(device, conv, precision):
    """39 structures. Forces that vanish by symmetry are compared to 0.02 eV/A."""
    from ase import Atoms

    if conv == "fused" and precision == "float64":
        pytest.skip("the fused kernels have no float64")

    model = load(released(), device, precision, conv)
    assert sum(p.numel() for p in model.parameters()) == 707_569
    cases = official_values()
    assert len(cases) == 39
    worst = dict(energy=0, forces=0, relative=0, stress=0)
    for case in cases:
        atoms = Atoms(case["numbers"], case["positions"], cell=case["cell"], pbc=case["pbc"])
        b = to(batch_of([atoms], 6.0), device)
        assert len(b.senders) == case["n_edges"], case["name"]
        energy, forces, stress = (x.cpu() for x in energy_forces_stress(model, b))
        expected = torch.tensor(case["forces"], dtype=torch.float64)
        error = (forces - expected).abs().max().item()
        errors = dict(energy=abs(energy.item() - case["energy"]) / len(atoms), forces=error)
        errors["relative"] = error / max(expected.norm(dim=1).max().item(), 0.02)
        if case["stress"] is None:
            assert stress.isnan().all()
        else:
            errors["stress"] = (stress[0] - torch.tensor(case["stress"], dtype=torch.float64)).abs().max().item()
        worst |= {k: np.maximum(worst[k], v) for k, v in errors.items()}  # which keeps a NaN
    print(f"\n{device} {conv} {precision}: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
    if precision == "float64":
        assert worst["energy"] < 1e-6 and worst["forces"] < 1e-6 and worst["stress"] < 1e-7
    else:
        assert worst["energy"] < 2e-5 and worst["relative"] < 2e-4 and worst["stress"] < 1e-5


@pytest.mark.parametrize("name", ["nequix-mp-1", "nequix-mp-1-pft", "nequix-oam-1"])
def test_every_released_file_loads(name, tmp_path):
    model = load(released(name), precision="float64")
    save(tmp_path / "model.pt", model)
    again, b = load(tmp_path / "model.pt", precision="float64"), small_batch()
    for x, y in zip(energy_forces_stress(model, b), energy_forces_stress(again, b)):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------------------
# e3nn


def test_harmonics_and_coupling_equal_e3nn():
    u = torch.nn.functional.normalize(torch.randn(500, 3, dtype=torch.float64))
    expected = o3.spherical_harmonics([0, 1, 2, 3], u, True, "component")
    torch.testing.assert_close(nequix.harmonics(u), expected, rtol=0, atol=1e-12)
    for l3, l1, l2 in paths(3, 3, 3):
        expected = o3.wigner_3j(l1, l2, l3, dtype=torch.float64) * (2 * l3 + 1) ** 0.5
        torch.testing.assert_close(nequix.clebsch_gordan(l1, l2, l3), expected, rtol=0, atol=1e-9)


SHAPES = [  # channels in, lmax, highest l out: the three layers of the paper, and four others
    ((89,), 3, 3),
    ((128, 64, 32, 32), 3, 3),
    ((128, 64, 32, 32), 3, 0),
    ((16, 8), 1, 1),
    ((4, 3, 2), 3, 2),
    ((5, 7, 3, 2), 3, 1),
    ((8,), 0, 0),
]


@pytest.mark.parametrize("muls, lmax, l_out", SHAPES)
def test_convolution_equals_e3nn(muls, lmax, l_out):
    """The plain torch convolution against o3.TensorProduct edge by edge, one node without edges among the receivers."""
    torch.manual_seed(0)
    ps = paths(len(muls) - 1, lmax, l_out)
    parity = "eo"
    torch.set_default_dtype(torch.float64)  # e3nn rounds its coefficients to the default
    tp = o3.TensorProduct(
        "+".join(f"{m}x{l}{parity[l % 2]}" for l, m in enumerate(muls)),
        "+".join(f"1x{l}{parity[l % 2]}" for l in range(lmax + 1)),
        "+".join(f"{muls[l1]}x{l3}{parity[l3 % 2]}" for l3, l1, _ in ps),
        [(l1, l2, i, "uvu", True) for i, (_, l1, l2) in enumerate(ps)],
        shared_weights=False,
        internal_weights=False,
    )
    torch.set_default_dtype(torch.float32)
    n, degrees = 5, [3, 0, 7, 1, 4]
    row_ptr = torch.tensor([0, *np.cumsum(degrees)])
    senders, receivers = torch.randint(n, (15,)), torch.repeat_interleave(torch.arange(n), torch.tensor(degrees))
    x = torch.randn(n, sum((2 * l + 1) * m for l, m in enumerate(muls)), dtype=torch.float64)  # l, m, channel order
    sh = torch.randn(15, (lmax + 1) ** 2, dtype=torch.float64)
    hidden, w3 = torch.randn(15, 64, dtype=torch.float64), torch.randn(64, tp.weight_numel, dtype=torch.float64)
    out = torch_conv(muls, lmax, l_out, x.dtype, x.device)(x, sh, hidden, w3, senders, row_ptr)

    blocks = nequix.split_degrees(x, muls)
    channels_first = torch.cat([b.view(n, 2 * l + 1, -1).mT.flatten(1) for l, b in enumerate(blocks)], 1)
    messages = tp(channels_first[senders], sh, hidden @ w3)
    expected = torch.zeros(n, messages.shape[1], dtype=torch.float64).index_add(0, receivers, messages)
    expected = expected.split([(2 * l3 + 1) * muls[l1] for l3, l1, _ in ps], 1)
    expected = [e.view(n, muls[l1], 2 * l3 + 1).mT for e, (l3, l1, _) in zip(expected, ps)]
    degrees = [torch.cat([e for e, p in zip(expected, ps) if p[0] == l], 2) for l in range(l_out + 1)]
    torch.testing.assert_close(out, torch.cat([d.flatten(1) for d in degrees], 1), rtol=0, atol=1e-10)


@pytest.mark.skipif("cuda" not in DEVICES or oeq_error() is not None, reason=f"needs OpenEquivariance: {oeq_error()}")
def test_openequivariance_equals_plain_torch():
    """The loss' gradient, hence forward, backward and double backward, of the paper's layers."""
    config = dict(hidden=Nequix.DEFAULTS["hidden"], lmax=3, layers=3, radial_size=64)
    b = to(small_batch(), "cuda")
    labels = dict(energy=torch.zeros(5), forces=torch.ones(len(b.numbers), 3), stress=torch.full((5, 3, 3), torch.nan))
    for k, v in labels.items():
        setattr(b, k, v.double().cuda())
    grads = {}
    for conv in ("torch", "oeq"):
        model = small_model(**config).cuda()
        model.conv = conv
        batch_loss(b, energy_forces_stress(model, b, create_graph=True), (20, 20, 5), (5, 20, 1)).backward()
        grads[conv] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (grads["oeq"] - grads["torch"]).norm() < 1e-10 * grads["torch"].norm()


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives


def rebuilt(b, positions, cell):
    """The batch with its edges but other positions and cell."""
    vectors = (
        positions[b.senders] - positions[b.receivers] + (b.shifts[:, :, None] * cell[b.structure[b.receivers]]).sum(1)
    )
    return type(b)(**{**vars(b), "positions": positions, "cell": cell, "vectors": vectors})


def test_forces_and_stress_by_finite_differences():
    model, b, step = small_model(), small_batch(), 1e-4
    _, forces, stress = energy_forces_stress(model, b)
    for atom in range(0, len(b.numbers), 3):
        for k in range(3):
            energies = []
            for sign in (1, -1):
                moved = b.positions.clone()
                moved[atom, k] += sign * step
                energies.append(energy_forces_stress(model, rebuilt(b, moved, b.cell))[0].sum())
            assert forces[atom, k].item() == pytest.approx(-((energies[0] - energies[1]) / (2 * step)).item(), abs=1e-7)
    for i, j in ((0, 0), (1, 1), (0, 1), (2, 1)):
        energies = []
        for sign in (1, -1):
            strain = torch.eye(3, dtype=torch.float64)
            strain[i, j] += sign * step / 2
            strain[j, i] += sign * step / 2
            energies.append(energy_forces_stress(model, rebuilt(b, b.positions @ strain, b.cell @ strain))[0])
        expected = (energies[0] - energies[1]) / (2 * step) / b.cell.det().abs()
        torch.testing.assert_close(stress[:2, i, j], expected[:2], rtol=0, atol=1e-8)
    assert stress[2:].isnan().all() and (stress[:2] == stress[:2].mT).all()


@pytest.mark.parametrize("config", [{}, dict(norm=False), dict(layers=1), dict(hidden="8x0e", lmax=0)])
def test_loss_gradient_by_finite_differences(config):
    """Molecules and slabs without stress labels included: their gradients are finite."""
    model, b = small_model(**config), small_batch()
    torch.manual_seed(1)
    b.energy = torch.randn(5, dtype=torch.float64)
    b.forces = torch.randn(len(b.numbers), 3, dtype=torch.float64)
    b.stress = torch.where(b.pbc.all(1)[:, None, None], torch.randn(5, 3, 3, dtype=torch.float64), torch.nan)

    def loss():
        return batch_loss(b, energy_forces_stress(model, b, create_graph=True), (20, 20, 5), (5, len(b.numbers), 18))

    params = list(model.parameters())
    loss().backward(inputs=params)
    direction = [torch.randn_like(p) for p in params]
    slope = sum((p.grad * d).sum() for p, d in zip(params, direction)).item()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(params, direction):
                p += sign * 1e-6 * d
        values.append(loss().item())
        with torch.no_grad():
            for p, d in zip(params, direction):
                p -= sign * 1e-6 * d
    assert np.isfinite(slope) and slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_radial_mlp_starts_with_the_papers_variances():
    torch.manual_seed(0)
    config = dict(atomic_numbers=list(range(1, 90)), atom_energies=[0.0] * 89, avg_n_neighbors=57, scale=1, shift=0)
    layer = Nequix(config).layers[1]
    for w, variance in zip(layer.radial, (4 / 8, 4 / 64, 1 / 64)):
        assert w.var().item() == pytest.approx(variance, rel=0.15)
    for w in [*layer.linear_1, *layer.linear_2, *layer.skip]:
        assert w.var().item() == pytest.approx(1, rel=0.15)


# ----------------------------------------------------------------------------------------------------------------------
# Files and configurations


def test_bad_files_and_configurations_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load(tmp_path / "none.pt")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.nqx").write_text('{"cutoff": 6.0}\n')
    torch.save({"weights": 1}, tmp_path / "other.pt")
    save(tmp_path / "whole.pt", small_model())
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    for name, words in {
        "empty.pt": "neither",
        "text.nqx": "header lacks",
        "other.pt": "not a modded-nequix checkpoint",
        "cut.pt": "neither",
    }.items():
        with pytest.raises(ValueError, match=words):
            load(tmp_path / name)
    words = [dict(hidden=h) for h in ("16x0e+8x1e", "16x1o", "words", "0x0e", "16x0e+x1o", "8x0e+8x1o+8x2e+8x3o+8x4e")]
    for bad in (*words, dict(lmax=1), dict(lmax=4), dict(layers=0), dict(atom_energies=[0.0])):
        with pytest.raises(ValueError):
            small_model(**bad)
    with pytest.raises(ValueError, match="convolution oeq does not work here"):
        nequix.choose_conv("oeq", "cpu")
    with pytest.raises(ValueError, match="precision is one of float32, tf32, float64, not float16"):
        load(tmp_path / "whole.pt", precision="float16")


def test_precision_is_the_models_own():
    """It leaves torch's switch for the process as it was, whatever the user chose there."""
    model, batch = small_model(), small_batch()
    for chosen, tf32 in (("high", False), ("highest", True)):
        torch.set_float32_matmul_precision(chosen)
        model.tf32 = tf32
        with nequix.dense_products(tf32):
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        energy_forces_stress(model, batch)
        assert torch.get_float32_matmul_precision() == chosen
    assert model.precision == "float64" and model.float().precision == "tf32"
    model.tf32 = False
    assert model.precision == "float32"


def test_weights_by_name(tmp_path, monkeypatch):
    """Downloaded once, checked, into the cache. Offline or with a wrong file, one line says what to do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, content = tmp_path / "modded-nequix/nequix-mp-1.nqx", b"an error page"

    class Reply(io.BytesIO):
        info = lambda self: SimpleNamespace(get_all=lambda name: None)

    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Reply(content))
    save(tmp_path / "small.pt", small_model())
    for _ in range(2):
        with pytest.raises(OSError, match=f"cannot fetch .*hash.*get https://github.com/.*/models/.* put it at {path}"):
            load("nequix-mp-1")
        assert list(path.parent.iterdir()) == []
    content = (tmp_path / "small.pt").read_bytes()
    commit, _ = nequix.RELEASED["nequix-mp-1"]
    monkeypatch.setitem(nequix.RELEASED, "nequix-mp-1", (commit, hashlib.sha256(content).hexdigest()))
    assert load("nequix-mp-1").config == small_model().config and [p.name for p in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(torch.hub, "urlopen", None)
    load("nequix-mp-1")  # from the cache


def test_damaged_nqx_is_told(tmp_path):
    whole = released().read_bytes()
    (tmp_path / "cut.nqx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole Nequix file"):
        load(tmp_path / "cut.nqx")
