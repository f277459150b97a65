"""The training loop: one process against two, killed against uninterrupted, the loss against a naive loop, bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

import data
import model as nequix
import muon
from calc import NequixCalculator
from data import PackedSet
from test_data import HERE, batch_of, labelled, run
from test_model import small_model
from train import FAST, batch_loss, evaluate, label_counts, learning_rate, parse_args, read_state, train, trouble

SMALL = "--hidden 8x0e+4x1o --lmax 1 --layers 2 --batch 6 --precision float64 --device cpu --seed 3".split()
TORCHRUN = "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """60 frames, molecules without stress among them."""
    folder, rng = tmp_path_factory.mktemp("train"), np.random.default_rng(0)
    frames = []
    for k in range(60):
        atoms = [bulk("NaCl", "rocksalt", 5.6), molecule("H2O"), bulk("Si", cubic=True), molecule("O")][k % 4]
        atoms.rattle(0.1, rng=rng)
        forces, stress = rng.normal(size=(len(atoms), 3)), rng.normal(size=6) * 0.01
        frames.append(labelled(atoms, -3.0 * len(atoms) + rng.normal(), forces, stress, frame_id=f"frame-{k}"))
    ase.io.write(folder / "frames.extxyz", frames)
    run("data.py", "pack", folder / "frames.extxyz", "--out", folder / "set", "--val", "0.2", "--workers", 1)
    return folder / "set"


def weights(folder):
    """Of the last checkpoint: its step, and weights and averages in one tensor. Step 0 if there is none yet."""
    try:
        state = torch.load(folder / "state.pt", weights_only=True)
    except FileNotFoundError:
        return 0, None
    return state["step"], torch.cat([w.flatten() for w in [*state["model"].values(), *state["ema"].values()]])


def wait_for(step, folder, process):
    while weights(folder)[0] < step:
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.01)


def command(packed, out, *more):
    return ["train.py", "--data", packed, "--out", out, *SMALL, *more]


def go(packed, out, *more):
    """The same in this process."""
    train(parse_args([str(x) for x in command(packed, out, *more)[1:]]), torch.device("cpu"), 0, 1)


def final(out):
    """The last line of a log, without times."""
    return (out / "log.txt").read_text().splitlines()[-1].split()[:5]


# ----------------------------------------------------------------------------------------------------------------------
# Loss, errors, schedule


def test_loss_and_errors_equal_a_naive_loop(packed):
    """Frame by frame; the same whether in one micro-batch or many."""
    p = PackedSet(packed)
    torch.manual_seed(0)
    model = nequix.Nequix(p.meta["statistics"] | dict(hidden="8x0e+4x1o", lmax=1, layers=2)).double()
    indices = np.arange(12)
    de, df, df2, ds, ds_n = [], [], [], [], []
    for i in indices:
        b = p.batch(np.array([i]))
        energy, forces, stress = (x.detach().numpy() for x in nequix.energy_forces_stress(model, b))
        n = len(b.numbers)
        de.append(abs(energy[0] - b.energy.item()) / n)
        df += np.linalg.norm(forces - b.forces.numpy(), axis=1).tolist()
        df2 += np.abs(forces - b.forces.numpy()).ravel().tolist()
        if p.has_stress[i]:
            ds += np.abs(stress[0] - b.stress[0].numpy()).ravel().tolist()
            ds_n += (np.abs(stress[0] - b.stress[0].numpy()) / n).ravel().tolist()
    expected = 20 * np.mean(de) + 20 * np.mean(df) + 5 * np.mean(ds)
    counts = label_counts(p, indices)
    for pieces in ([indices], np.split(indices, [1, 5])):
        loss = sum(
            batch_loss(b, nequix.energy_forces_stress(model, b), (20, 20, 5), counts).item()
            for b in map(p.batch, pieces)
        )
        assert loss == pytest.approx(expected, rel=1e-12)
        mae, _ = evaluate(model, p, indices, max_edges=max(len(pieces[0]), 1) * 100)
        assert mae == pytest.approx([1000 * np.mean(x) for x in (de, df2, ds_n)], rel=1e-12)


def test_learning_rate_of_optax():
    """warmup_cosine_decay_schedule(0.002, 0.01, 10, 100, 1e-6): values printed by optax 0.2.5."""
    rates = [learning_rate(step, 100, 10, 0.01) for step in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0.002, 0.006, 0.01, 0.0050005, 1e-6], rel=1e-9)


def test_linear_decay_of_torch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, 1, 10)
    down = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 1e-4, 90)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], [10])
    for step in range(100):
        assert learning_rate(step, 100, 10, 0.01, "linear") == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()


def test_recipes():
    """The fast recipe changes defaults; what is given on the command line counts; weights bring their own cutoff."""
    fast, paper = (parse_args(["--recipe", name, "--batch", "7"]) for name in ("fast", "paper"))
    assert fast.batch == paper.batch == 7 and paper == parse_args(["--batch", "7"])
    assert {k: getattr(fast, k) for k in FAST if k != "batch"} == {k: v for k, v in FAST.items() if k != "batch"}
    assert parse_args(["--recipe", "fast", "--init", "x"]).lr == FAST["lr"]


def test_a_loss_that_explodes_is_told():
    calm = [1 + 0.1 * (k % 7) for k in range(300)]
    assert trouble(calm) is None and trouble(calm[:5] + [1e9]) is None
    assert trouble([*calm, *[50.0] * 99]) is None  # not long enough
    assert trouble([*calm, *[50.0] * 100]) == (399, "has been over ten times its running median for 100 steps")
    assert trouble([*calm, *[50.0] * 99, 1.0]) is None
    assert trouble([1.0, float("nan"), 1.0]) == (1, "is not finite")


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("ranks", [4, 8])
def test_processes_take_the_steps_of_one(packed, tmp_path, ranks):
    """A batch has 6 frames: two of 8 ranks have none."""
    steps = "--steps", "5", "--max-edges", "300"
    go(packed, tmp_path / "one", *steps)
    torchrun = [f"--nproc_per_node={ranks}" if "nproc" in x else x for x in TORCHRUN]
    assert f"{ranks} rank(s)" in run(*torchrun, *command(packed, tmp_path / "all", *steps))
    (step, one), (_, all_ranks) = weights(tmp_path / "one"), weights(tmp_path / "all")
    assert step == 5 and ((one - all_ranks).abs() <= 1e-9 * one.abs().clamp(min=1e-6)).all()
    assert final(tmp_path / "one") == final(tmp_path / "all")  # the errors too


STEPS = "--steps", "40", "--eval-every", "20", "--save-every", "0"


@pytest.fixture(scope="module")
def uninterrupted(packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    go(packed, out, *STEPS)
    assert final(out)[:2] == ["final", "step=40"] and (out / "model.pt").exists() and (out / "curve.png").exists()
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_with_the_same_weights(packed, tmp_path, uninterrupted, number, capsys):
    """At any point. The rerun goes on from the last checkpoint."""
    arguments = command(packed, tmp_path / "run", *STEPS)
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=HERE, stdout=subprocess.PIPE, text=True)
    wait_for(6, tmp_path / "run", process)
    process.send_signal(number)
    said, _ = process.communicate()
    step, _ = weights(tmp_path / "run")
    assert 6 <= step < 40 and process.returncode != 0
    if number != signal.SIGKILL:
        assert f"interrupted; the same command goes on from step {step} of 40" in said
    go(packed, tmp_path / "run", *STEPS)
    assert f"resumed at step {step} of 40" in capsys.readouterr().out
    (_, a), (_, b) = weights(uninterrupted), weights(tmp_path / "run")
    assert torch.equal(a, b) and final(uninterrupted) == final(tmp_path / "run")


def test_a_finished_run_says_so_again(packed, uninterrupted, tmp_path, capsys):
    before = (uninterrupted / "log.txt").read_text().splitlines()[-1]
    go(packed, uninterrupted, *STEPS)
    assert capsys.readouterr().out.splitlines()[-1] == before
    with pytest.raises(ValueError, match="other settings .lr: 0.01 -> 0.5."):
        go(packed, uninterrupted, "--lr", "0.5", *STEPS)
    state = torch.load(uninterrupted / "state.pt", weights_only=True)
    torch.save(state | dict(sources_sha256="of an older commit"), tmp_path / "state.pt")
    with pytest.raises(ValueError, match="ended with other sources"):
        go(packed, tmp_path, *STEPS)
    del state["fixed"]["decay"]  # a checkpoint from before there was such an option
    torch.save(state, tmp_path / "state.pt")
    assert (
        read_state(tmp_path / "state.pt", state["fixed"] | dict(decay="linear"), 40, state["sources_sha256"])["step"]
        == 40
    )


def test_the_log_proves_the_run(packed, uninterrupted):
    log = (uninterrupted / "log.txt").read_text()
    for source in ("train.py", "model.py", "muon.py", "data.py"):
        assert (HERE / source).read_text() in log
    assert (
        PackedSet(packed).meta["data_sha256"] in log
        and torch.__version__ in log
        and "float64, convolution: torch" in log
    )
    lines = [line for line in log.splitlines() if line.startswith("step=")]
    assert [line.split()[0] for line in lines] == ["step=0/40", "step=20/40", "step=40/40"]
    for unit in ("meV/atom", "meV/A", "meV/A^3/atom", "loss=", "train_s=", "structures/s"):
        assert all(unit in line for line in lines[1:])
    rows = (uninterrupted / "log.csv").read_text().splitlines()
    assert rows[0] == "step,energy_mev_atom,force_mev_A,stress_mev_A3_atom,train_s,loss,gpu_h" and len(rows) == 4
    for row, line in zip(rows[1:], lines):  # the same numbers, by their names
        row, text = row.split(","), dict(re.findall(r"(\w+)=([\d.]+)", line))
        names = "step energy forces stress".split() + (["train_s", "loss"] if row[0] != "0" else [])
        assert all(float(x) == pytest.approx(float(text[k]), abs=0.06) for x, k in zip(row, names))


def test_sources_are_in_the_log_once_and_the_screen_says_where_it_writes(packed, tmp_path, capsys, monkeypatch):
    out, source = tmp_path / "run", (HERE / "train.py").read_text()
    with pytest.raises(KeyboardInterrupt):
        a = parse_args([str(x) for x in command(packed, out, "--steps", "40000000")[1:]])
        train(a, torch.device("cpu"), 0, 1, told=[0.0])
    said = capsys.readouterr().out
    assert re.search(r"on this CPU about [\d.e-]+ s a step, \d+ days?, .* in all; the README's first command", said)
    shutil.rmtree(out)
    go(packed, out, "--steps", "4", "--eval-every", "2")
    (out / "state.pt").unlink()  # killed before the first checkpoint
    (out / "curve.png").unlink()
    go(packed, out, "--steps", "4", "--eval-every", "2")
    said = capsys.readouterr().out
    assert re.search(r"on this CPU about [\d.e-]+ s a step, 0:00:\d\d in all\n", said)
    assert f"in {out}: model.pt (averaged weights), log.txt, log.csv, curve.png, state.pt (to resume)\n" in said
    log = (out / "log.txt").read_text()
    assert (
        log.count(source) == 1 and len(re.findall(r"sources: sha256 \w{64}", log)) == 2 and (out / "curve.png").exists()
    )
    monkeypatch.setattr("train.sources", lambda: ("edited\n", "of others"))
    with pytest.raises(ValueError, match="ended with other sources"):
        go(packed, out, "--steps", "4", "--eval-every", "2")
    (out / "state.pt").unlink()
    go(packed, out, "--steps", "4", "--eval-every", "2")
    assert "edited\n====" in (out / "log.txt").read_text()


@pytest.mark.parametrize("flags", [["--optimizer", "adamw"], ["--no-norm"], ["--optimizer", "adamw", "--no-norm"]])
def test_the_papers_figure_2_by_flags(packed, tmp_path, flags):
    go(packed, tmp_path / "run", "--steps", "4", *flags)
    assert final(tmp_path / "run")[1] == "step=4"
    assert nequix.load(tmp_path / "run" / "model.pt").config["norm"] == ("--no-norm" not in flags)


def test_validate_prints_the_errors_of_weights(packed, uninterrupted, tmp_path, monkeypatch, capsys):
    """records/validate.py: as evaluate() finds them, on a part of the validation split or on the test split."""
    monkeypatch.syspath_prepend(HERE / "records")
    import validate

    model, p = nequix.load(uninterrupted / "model.pt", precision="float64"), PackedSet(packed)
    p.split[p.indices(data.VAL)[:2]] = data.TEST
    monkeypatch.setattr(validate, "PackedSet", lambda *_: p)
    some = np.sort(np.random.RandomState(0).permutation(p.indices(data.VAL))[:5])
    for more, split, indices in (("--frames 5", "validation", some), ("--test", "test", p.indices(data.TEST))):
        common = f"validate.py {uninterrupted / 'model.pt'} --data {packed} --precision float64 --device cpu"
        monkeypatch.setattr(sys, "argv", f"{common} {more}".split())
        validate.main()
        (mae, _), said = evaluate(model, p, indices, 1000), capsys.readouterr().out
        assert f"on {len(indices)} {split} frames" in said
        assert f"energy MAE {mae[0]:.2f} meV/atom, force MAE {mae[1]:.2f} meV/A, stress MAE {mae[2]:.3f}" in said


def test_a_wrong_frame_moves_no_slope(packed, monkeypatch):
    """Of labels in other units and of the other sign, one crystal of twelve frames a thousand times off."""
    monkeypatch.syspath_prepend(HERE / "records")
    import validate

    model, b = small_model(), PackedSet(packed).batch(np.arange(12))
    _, forces, stress = nequix.energy_forces_stress(model, b)
    off = torch.ones(12).index_fill(0, torch.tensor(2), 1000.0)
    b.forces, b.stress = 160 * forces * off[b.structure, None], -stress * off[:, None, None]
    monkeypatch.setattr(validate, "prefetch", lambda *_: [b])
    assert validate.slopes(model, None, None) == pytest.approx([160, -1])


def test_scripts_of_the_records(uninterrupted, monkeypatch):
    """They read what train.py writes; the statistics of three runs, by hand."""
    monkeypatch.syspath_prepend(HERE / "records")
    import figure2
    import mini

    log = (uninterrupted / "log.txt").read_text()
    final, points = mini.FINAL.findall(log)[-1], figure2.POINT.findall(log)
    assert [float(x) for x in points[-1][1:]] == pytest.approx([float(x) for x in final[:3]], abs=6e-3)
    rows = [[100, 200, 0.40, 60], [102, 198, 0.41, 61], [98, 202, 0.39, 62]] + [[100, 200, 0.40, 60]] * 2
    text = mini.table("validation", rows, range(5), [104, 206, 0.42])
    assert text.splitlines()[-1].split() == ["z", "6.32", "9.49", "6.32", "reached"]
    assert mini.table("validation", rows, range(5), [101, 206, 0.42]).endswith("not reached")
    assert mini.table("validation", rows[:4], range(4), [104, 206, 0.42]).endswith("not reached")


def test_an_ablation_of_nothing_is_the_recipe(packed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE / "records")
    import ablate

    monkeypatch.setattr(ablate, "DEVICE", torch.device("cpu"))
    options = dict(hidden="8x0e+4x1o", lmax=1, layers=2, batch=6, steps=12, seed=3)
    flags = [str(x) for k, v in options.items() for x in ("--" + k, v)]
    arguments = ["--recipe", "fast", "--data", str(packed), *flags, "--out", str(tmp_path / "run")]
    train(parse_args(arguments), torch.device("cpu"), 0, 1)
    errors = [float(x.split("=")[1]) for x in final(tmp_path / "run")[2:]]
    result = ablate.run(packed, ablate.fast_recipe() | options)
    assert result["steps"] == 12 and result["0.9"] == pytest.approx(errors, abs=2e-3)
    assert result["last"][0] != pytest.approx(result["0.9"][0], abs=1e-2)
    for change in (dict(cautious=1, adam_ends=1, momentum_warmup=5), dict(energy_first=0.5, normuon=0.9), dict(soap=1)):
        other = ablate.run(packed, ablate.fast_recipe() | options | dict(steps=4) | change)
        assert np.isfinite(other["last"]).all() and other["last"] != result["last"]

    for seed, lr in ((0, 0.1), (1, 0.1), (2, 0.2)):
        lines = [dict(base=dict(seed=seed, lr=lr, steps=12), device="CPU", data="a")]
        lines += [{"0.9": [100.0 + seed, 200.0, 0.5], "steps": 12}]
        lines += [{"0.9": [90.0, 200.0, 0.4], "steps": 6, "vector_lr": 2, "ms": 1.0}]
        (tmp_path / str(seed)).write_text("\n".join(map(json.dumps, lines)))
    table = ablate.table([tmp_path / "0", tmp_path / "1"], "0.9").splitlines()[2:]
    first, second = (line.split(maxsplit=7) for line in table)
    assert first == ["2", "100.5", "(0.7)", "200.0", "(0.0)", "0.500", "(0.000)", "{}"]
    assert second[-1] == '{"steps": 6, "vector_lr": 2}'
    with pytest.raises(ValueError, match="different bases"):
        ablate.table([tmp_path / "0", tmp_path / "2"], "0.9")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_never_waits_for_the_gpu(packed, tmp_path, monkeypatch):
    """The thread of the data does, which shows that waits are seen."""
    waits, taken, step = [], 0, muon.Muon.step

    def note(message, category, filename, line, *_):
        if "called a synchronizing" in str(message):
            waits.append((threading.current_thread() is threading.main_thread(), filename, line))

    def watched_step(self):
        nonlocal taken
        taken += 1
        if taken in (3, 20):
            torch.cuda.set_sync_debug_mode("warn" if taken == 3 else "default")
        step(self)

    monkeypatch.setattr(muon.Muon, "step", watched_step)
    monkeypatch.setattr(warnings, "showwarning", note)
    flags = "--batch 6 --steps 24 --eval-every 24 --device cuda".split()
    a = parse_args(["--data", str(packed), *flags, "--out", str(tmp_path / "run")])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        train(a, torch.device("cuda", 0), 0, 1)
    assert taken == 24 and waits and not [w for w in waits if w[0]]


def test_only_elements_that_were_trained_on(tmp_path, capsys, monkeypatch):
    """A lone germanium, which falls to validation: the run is as without it, and calc refuses it."""
    monkeypatch.syspath_prepend(HERE / "records")
    import validate

    lone, frames = np.random.RandomState(42).permutation(20)[19], []
    for k in range(20):
        frames.append(labelled(bulk("Ge" if k == lone else "Si", "diamond", 5 + k / 20), -5.0 - k / 9))
    ase.io.write(tmp_path / "frames.traj", frames)
    pack = "data.py", "pack", tmp_path / "frames.traj", "--val", "0.2", "--workers", 1, "--out"
    run(*pack, tmp_path / "set")
    go(tmp_path / "set", tmp_path / "run", "--steps", "3")
    left_out = "validation leaves out frames with elements that are not trained on: atomic numbers [32]\n"
    said = capsys.readouterr().out
    assert left_out in said and "training frames: 16, to validate on: 3;" in said
    model = nequix.load(tmp_path / "run/model.pt", precision="float64")
    assert model.config["atomic_numbers"] == [14] and len(model.e0) == 1
    with pytest.raises(ValueError, match="lacks: Ge"):
        NequixCalculator(tmp_path / "run/model.pt", "cpu").predict([bulk("Ge")])
    p = PackedSet(tmp_path / "set")
    silicon = p.indices(data.VAL)[p.indices(data.VAL) != lone]
    errors = [float(x.split("=")[1]) for x in final(tmp_path / "run")[2:]]
    assert errors == pytest.approx(evaluate(model, p, silicon, 1000)[0], abs=1e-4)
    go(tmp_path / "set", tmp_path / "run", "--steps", "3")  # resumes
    argv = f"validate.py {tmp_path / 'run/model.pt'} --data {tmp_path / 'set'} --precision float64 --device cpu"
    monkeypatch.setattr(sys, "argv", argv.split())
    validate.main()
    said = capsys.readouterr().out
    assert "left out: validation frames with elements that the model lacks: atomic numbers [32]" in said
    assert f"energy MAE {errors[0]:.2f} meV/atom" in said
    nequix.save(tmp_path / "more.pt", small_model(atomic_numbers=[14, 32], atom_energies=[0.0, 0.0]))
    more = ["--init", tmp_path / "more.pt", "--data", tmp_path / "set", "--out", tmp_path / "more", "--steps", "1"]
    train(parse_args([str(x) for x in more]), torch.device("cpu"), 0, 1)  # which know both
    assert "to validate on: 4;" in capsys.readouterr().out
    assert nequix.load(tmp_path / "more/model.pt").config["atomic_numbers"] == [14, 32]


def test_elements_that_the_weights_lack(packed, tmp_path):
    weights = small_model(atomic_numbers=[1, 8], atom_energies=[0.0, 0.0])
    nequix.save(tmp_path / "water.pt", weights)
    a = parse_args(["--init", str(tmp_path / "water.pt"), "--data", str(packed), "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=r"elements that the model lacks: atomic numbers \[11, 14, 17\]"):
        train(a, torch.device("cpu"), 0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Fine-tuning


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A set labelled by a teacher, and weights near its own, whose E0s are of another reference."""
    folder, rng = tmp_path_factory.mktemp("student"), np.random.default_rng(0)
    teacher = small_model()
    nequix.save(folder / "teacher.pt", teacher)
    frames = []
    for k in range(60):
        atoms = [bulk("NaCl", "rocksalt", 5.6), molecule("H2O"), bulk("Si", cubic=True), bulk("Na")][k % 4]
        atoms.rattle(0.1, rng=rng)
        e, f, s = (x.numpy() for x in nequix.energy_forces_stress(teacher, batch_of([atoms], 6.0)))
        frames.append(labelled(atoms, float(e[0]), f, s[0]))
    ase.io.write(folder / "frames.traj", frames)
    run("data.py", "pack", folder / "frames.traj", "--out", folder / "set", "--val", "0.2", "--workers", 1)
    torch.manual_seed(1)
    for p in teacher.parameters():
        p.data += 0.1 * torch.randn_like(p) * p.std()
    teacher.config["atom_energies"] = [e + 0.1 * z for z, e in enumerate(teacher.config["atom_energies"])]
    nequix.save(folder / "student.pt", teacher)
    return folder


def validations(out):
    """(energy, force) errors of each validation of a run."""
    lines = [line.split() for line in (out / "log.txt").read_text().splitlines() if line.startswith("step=")]
    return np.array([[float(line[1].split("=")[1]), float(line[3].split("=")[1])] for line in lines])


def test_fine_tuning_improves_the_set_and_resumes_exactly(student, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(HERE / "records")
    import validate

    def tune(out, init, *more, told=()):
        flags = "--batch 8 --precision float64 --device cpu --lr 1e-3 --steps 20 --eval-every 10 --save-every 0".split()
        flags += ["--init", str(init), "--data", str(student / "set"), "--out", str(tmp_path / out), *more]
        train(parse_args(flags), torch.device("cpu"), 0, 1, told)

    refitted = tmp_path / "refitted.pt"
    argv = f"validate.py {student / 'student.pt'} --data {student / 'set'} --precision float64 --device cpu"
    monkeypatch.setattr(sys, "argv", [*argv.split(), "--refit-e0", str(refitted)])
    validate.main()
    tune("kept", student / "student.pt")
    tune("refit", refitted)
    kept, refit = validations(tmp_path / "kept"), validations(tmp_path / "refit")
    assert np.isfinite(kept).all() and np.isfinite(refit).all()
    assert refit[0, 0] < 0.1 * kept[0, 0] and refit[0, 1] == kept[0, 1]  # E0s are in no force
    assert refit[-1, 0] < 0.1 * kept[0, 0] and refit[-1, 1] < 0.8 * refit[0, 1], refit

    model, teacher = (
        nequix.load(f, precision="float64") for f in (tmp_path / "refit/model.pt", student / "teacher.pt")
    )
    assert model.config["hidden"] == teacher.config["hidden"] and model.e0.tolist() == model.config["atom_energies"]
    absent = [i for i, z in enumerate(model.config["atomic_numbers"]) if z in (6, 78)]
    old = nequix.load(student / "student.pt").e0
    assert torch.equal(model.e0[absent], old[absent]) and not torch.isclose(model.e0, old).all()

    state, told, lerp = torch.load(tmp_path / "refit/state.pt", weights_only=True), [], torch._foreach_lerp_
    monkeypatch.setattr(
        torch, "_foreach_lerp_", lambda *x: (lerp(*x), told.append(1) if len(steps) == 9 else steps.append(1))
    )
    steps = []
    with pytest.raises(KeyboardInterrupt):
        tune("killed", refitted, told=told)
    monkeypatch.setattr(torch, "_foreach_lerp_", lerp)
    tune("killed", refitted)
    assert "resumed at step 10 of 20" in capsys.readouterr().out
    again = torch.load(tmp_path / "killed/state.pt", weights_only=True)
    assert all(torch.equal(again[part][k], v) for part in ("model", "ema") for k, v in state[part].items())
    with pytest.raises(ValueError, match="other settings .E0s"):  # the same name, other E0s
        refitted.write_bytes((student / "student.pt").read_bytes())
        tune("killed", refitted)
    with pytest.raises(SystemExit):
        tune("bad", refitted, "--lmax", "2")
    assert "--init takes the architecture from the weights: leave --lmax out" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line, no traceback
def test_bad_arguments_give_one_line(packed, tmp_path, capsys):
    (tmp_path / "state.pt").touch()
    for arguments, words in {
        "--lr nan": "--lr nan is out of range",
        "--epochs inf": "--epochs inf is out of range",
        "--grad-clip 0": "--grad-clip must be positive",
        "--batch 0": "--batch must be positive",
        "--steps -1": "--steps -1 is out of range",
        "--energy-weight nan": "--energy-weight nan is out of range",
        "--ema 1": "--ema 1.0 is out of range",
    }.items():
        with pytest.raises(SystemExit):
            parse_args(arguments.split())
        assert words in capsys.readouterr().err
    for arguments, words in {
        f"--data {tmp_path}/none": "no packed set",
        f"--data {packed} --hidden 8x1o": "hidden irreps",
        f"--data {packed} --lmax 7": "lmax 7",
        f"--data {packed} --conv oeq": "convolution oeq does not work here",
        f"--data {packed} --out {tmp_path}": f"state.pt can't be read .EOFError.: remove {tmp_path} to start anew",
        f"--data {packed} --init {tmp_path}/none.nqx": "no weights at",
    }.items():
        with pytest.raises((ValueError, OSError), match=words) as e:
            train(parse_args(arguments.split()), torch.device("cpu"), 0, 1)
        assert "\n" not in str(e.value)
    said = run("train.py", "--data", tmp_path / "none", ok=False)
    assert said.startswith("error: no packed set") and len(said.splitlines()) == 1


def test_a_loss_that_is_not_finite_stops_and_names_the_frames(packed, tmp_path, monkeypatch):
    """Weights that do not work are in no checkpoint: those of step 5 are spoiled, so the last one is of step 4."""
    flags, step = ("--steps", "30", "--save-every", "0", "--eval-every", "30"), muon.Muon.step

    def leap(self):
        step(self)
        if self.param_groups[0]["t"] == 5:
            self.param_groups[0]["params"][0].data.mul_(1e300)

    monkeypatch.setattr(muon.Muon, "step", leap)
    with pytest.raises(ValueError) as e:
        go(packed, tmp_path / "run", *flags)
    said = str(e.value)
    assert said.startswith("the loss is not finite at step 5") and "the last good checkpoint is" in said
    p = PackedSet(packed)
    for i in data.step_indices(p.indices(data.TRAIN), 6, 3, 5):
        assert p.name(i) in said
    last, values = weights(tmp_path / "run")
    assert last == 4 and values.abs().max() < 100
    monkeypatch.setattr(muon.Muon, "step", step)
    go(packed, tmp_path / "run", *flags)  # and it goes on from there
    assert final(tmp_path / "run")[1] == "step=30"


def test_a_lost_rank_ends_the_others_and_any_number_goes_on(packed, tmp_path, uninterrupted):
    """Two ranks, of which one is killed: torchrun ends the other. One process goes on and is stopped; two take it to the end."""
    arguments = command(packed, tmp_path / "run", *STEPS)
    both = subprocess.Popen([sys.executable, *TORCHRUN, *map(str, arguments)], cwd=HERE, stderr=subprocess.DEVNULL)
    wait_for(3, tmp_path / "run", both)
    ranks = Path(f"/proc/{both.pid}/task/{both.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert both.wait(timeout=60) != 0 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)

    alone = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=HERE)
    wait_for(weights(tmp_path / "run")[0] + 3, tmp_path / "run", alone)
    alone.terminate()
    alone.wait()
    step, _ = weights(tmp_path / "run")
    assert step < 40 and f"resumed at step {step} of 40" in run(*TORCHRUN, *arguments)
    (_, a), (_, b) = weights(uninterrupted), weights(tmp_path / "run")
    assert ((a - b).abs() <= 1e-6 * a.abs().clamp(min=1e-3)).all()
