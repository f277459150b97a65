"""bench_speed.py on a CPU: every row that was asked for is there, or the reason why not, and the figures agree with each other."""

import argparse
import csv

import ase.io
import numpy as np
import pytest
from ase.build import bulk, molecule

import bench_speed
from model import save
from test_data import labelled, run
from test_model import small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("speed"), np.random.default_rng(0)
    save(folder / "model.pt", small_model())
    frames = []
    for k in range(12):
        atoms = [bulk("NaCl", "rocksalt", 5.6), molecule("H2O")][k % 2]
        frames.append(
            labelled(atoms, -3.0 * len(atoms), rng.normal(size=(len(atoms), 3)), np.zeros(6), frame_id=f"frame-{k}")
        )
    ase.io.write(folder / "frames.extxyz", frames)
    run("data.py", "pack", folder / "frames.extxyz", "--out", folder / "set", "--val", "0.2", "--workers", 1)
    return folder


def rows(path):
    with open(path) as f:
        return list(csv.DictReader(f))


def test_infer(folder):
    said = run(
        "bench_speed.py", "infer", "--weights", folder / "model.pt", "--device", "cpu", "--models", "torch", "fused",
        "--sizes", "8", "64", "--steps", "4", "--crystals", "Si", "--out", folder / "infer",
    )  # fmt: skip
    assert "fused: left out: ValueError: --conv fused needs a CUDA device" in said
    got = rows(folder / "infer" / "infer.csv")
    assert [(r["model"], r["atoms"]) for r in got] == [("torch", "8"), ("torch", "64")]
    assert all(0 < float(r["low"]) <= float(r["ms"]) <= float(r["high"]) for r in got)
    assert (folder / "infer" / "infer.md").read_text() in said and (
        folder / "infer" / "speed.png"
    ).stat().st_size > 10_000
    twice = argparse.Namespace(files=[folder / "infer" / "infer.csv"] * 2, out=folder / "twice.png")
    bench_speed.plot(twice, None)
    assert twice.out.read_bytes() == (folder / "infer" / "speed.png").read_bytes()


def test_train(folder):
    said = run(
        "bench_speed.py", "train", folder / "set", "--device", "cpu", "--models", "torch", "oeq", "--batches", "2", "4",
        "--steps", "3", "--split", "--out", folder / "train",
    )  # fmt: skip
    assert "oeq: left out: " in said
    for r, size in zip(rows(folder / "train" / "train.csv"), (2, 4), strict=True):
        assert int(r["batch"]) == size and float(r["low"]) / 2 <= 1000 * size / float(r["rate"]) <= 2 * float(r["high"])
        assert float(r["edges_per_s"]) > float(r["atoms_per_s"]) > float(r["rate"])
        assert all(float(r[k]) > 0 for k in ("data_and_list_ms", "forward_ms", "optimizer_ms"))


def test_a_model_that_fails_is_asked_no_more(tmp_path, monkeypatch):
    """A size that is too much ends a model's race on that crystal; a process that dies or hangs, on all."""
    (tmp_path / "fake.py").write_text(
        "import json, sys, time\n"
        "print(json.dumps(dict(what='a fake')), flush=True)\n"
        "for line in sys.stdin:\n"
        "    job = json.loads(line)\n"
        "    if job['n'] == 3: sys.exit(7)\n"
        "    if job['n'] == 4: time.sleep(60)\n"
        "    print(json.dumps(dict(error='too much') if job['n'] == 2 else dict(ms=1.0)), flush=True)\n"
    )
    monkeypatch.setattr(bench_speed, "__file__", str(tmp_path / "fake.py"))

    options = argparse.Namespace(python=[], out=tmp_path, device="cpu", limit=2)

    def results(*jobs):
        jobs = [dict(symbol=s, n=n) for s, n in jobs]
        return [r.get("error", "fine") for r in bench_speed.race("infer", jobs, ["fake"], {}, options)[0]]

    assert results(("C", 1), ("C", 2), ("C", 3), ("Si", 1)) == ["fine", "too much", "fine"]
    assert results(("C", 1), ("C", 3), ("Si", 1)) == ["fine", "ended with status 7: see the log"]
    assert results(("C", 1), ("C", 4), ("Si", 1)) == ["fine", "not done in 2 s"]
