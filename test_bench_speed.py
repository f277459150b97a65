"""bench_speed.py on a CPU: there is a row for all that was asked for, or the reason why not, and the figures agree."""

import argparse
import csv
import sys

import ase.io
import numpy as np
import pytest
from ase.build import bulk, molecule

import bench_speed
from data import TRAIN, PackedSet
from model import save
from test_data import labelled, run
from test_model import small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("speed"), np.random.default_rng(0)
    save(folder / "model.pt", small_model())
    kinds = [bulk("NaCl", "rocksalt", 5.6), molecule("H2O")] * 4
    frames = [labelled(a, -3.0 * len(a), rng.normal(size=(len(a), 3)), np.zeros(6)) for a in kinds]
    ase.io.write(folder / "frames.extxyz", frames)
    run("data.py", "pack", folder / "frames.extxyz", "--out", folder / "set", "--val", "0.25", "--workers", 1)
    return folder


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_infer(folder, monkeypatch, capsys):
    words = f"--weights {folder}/model.pt --device cpu --precision float64 --models torch fused --sizes 64 8 --steps 4"
    monkeypatch.setattr(sys, "argv", f"bench_speed.py infer {words} --crystals Si --out {folder}/out".split())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bench_speed.main()
    said = capsys.readouterr().out
    assert said == (folder / "out/infer.md").read_text()
    small, failed, large = rows(folder / "out/infer.csv")
    assert "needs a CUDA device" in failed["error"] and f"| fused | Si | 8 | left out: {failed['error']} |" in said
    for row, n in ((small, "8"), (large, "64")):
        assert [row[k] for k in ("model", "atoms", "precision", "convolution")] == ["torch", n, "float64", "torch"]
        assert 0 < float(row["low"]) <= float(row["ms"]) <= float(row["high"]) and not row["error"]
    bench_speed.plot(argparse.Namespace(files=[folder / "out/infer.csv"] * 2, out=folder / "twice.png"))
    assert (folder / "twice.png").read_bytes() == (folder / "out/speed.png").read_bytes()


def test_train(folder, monkeypatch):
    """Where a batch is the whole set, atoms and edges a structure are known. Two ranks share such a batch."""
    packed = PackedSet(folder / "set", 6.0)
    frames = packed.indices(TRAIN)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = dict(hidden="16x0e+8x1o", lmax=1, layers=2)
    script = f"import sys; sys.path.insert(0, '.'); import bench_speed as b; b.Nequix.DEFAULTS |= {small}; b.main()"
    (folder / "small.py").write_text(script)
    words = f"train {folder}/set --device cpu --models torch --batches {len(frames)} --steps 3 --out {folder}/two"
    run("-m", "torch.distributed.run", "--nproc_per_node=2", folder / "small.py", *words.split())
    monkeypatch.setattr(bench_speed.Nequix, "DEFAULTS", bench_speed.Nequix.DEFAULTS | small)
    job = dict(path=f"{folder}/set", precision="float32", batch=len(frames), steps=3, profile=True)
    one = bench_speed.measure("train", "cpu", model="torch", **job)
    assert len(one["kernels"]) == 10 and (one["precision"], one["convolution"]) == ("float32", "torch")
    assert one["low"] <= 1000 * len(frames) / one["structures_per_s"] <= one["high"]
    for row in (one, *rows(folder / "two/train.csv")):
        for name, sizes in (("atoms_per_s", packed.n_atoms), ("edges_per_s", packed.n_edges)):
            assert float(row[name]) / float(row["structures_per_s"]) == pytest.approx(sizes[frames].mean())
    with pytest.raises(ValueError, match="fused does not work here: it needs a CUDA device"):
        bench_speed.measure("train", "cpu", model="fused", **job)


def test_a_model_that_fails_gets_no_larger_size(tmp_path, monkeypatch):
    """Whether it reports an error, dies or hangs; other crystals are still tried."""
    (tmp_path / "fake.py").write_text(
        "import json, sys, time\n"
        "n, row = json.loads(sys.argv[2])['atoms'], dict(ms=1, low=1, high=1, first_s=1, memory_GiB=1)\n"
        "if n == 3: sys.exit(7)\n"
        "if n == 4: time.sleep(60)\n"
        "print('noise\\n' + json.dumps(dict(error='too much') if n == 2 else row) + '\\nnoise')\n"
    )
    monkeypatch.setattr(bench_speed, "__file__", str(tmp_path / "fake.py"))
    jobs = [dict(model="fake", symbol=s, atoms=int(n)) for s, n in "A2 A1 B3 B1 C1 C4 C1".split()]
    bench_speed.race("infer", jobs, argparse.Namespace(out=tmp_path, limit=2, steps=1), bench_speed.torch.device("cpu"))
    errors = [row["error"].split(",")[0] for row in rows(tmp_path / "infer.csv")]
    assert errors == ["too much", "ended with status 7", "", "not done in 2 s"]
