"""The training loop: one process against two, killed against uninterrupted, the loss against a naive loop, bad input."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

import data
import model as nequix
import muon
from data import PackedSet
from test_data import HERE, batch_of, labelled, run
from test_model import SHARED, needs_shared, small_model
from train import FAST, batch_loss, evaluate, label_counts, learning_rate, parse_args, train, trouble, validate_weights

SMALL = "--hidden 8x0e+4x1o --lmax 1 --layers 2 --radial-size 8 --batch 6 --dtype float64 --device cpu --seed 3".split()


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


def checkpoint(folder):
    """The last one, or None. While another is renamed, and after a kill just then, it is the one before."""
    for name in ("state.pt", "state.previous.pt"):
        with contextlib.suppress(FileNotFoundError):
            return torch.load(folder / name, weights_only=True)


def wait_for(step, folder, process):
    while (checkpoint(folder) or dict(step=0))["step"] < step:
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.01)


def weights(folder):
    state = checkpoint(folder)
    return state["step"], torch.cat([w.flatten() for w in [*state["model"].values(), *state["ema"].values()]])


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def command(packed, out, *more):
    return ["train.py", "--data", packed, "--out", out, *SMALL, *more]


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
    assert "ten times" in trouble([*calm, *[50.0] * 100])
    assert trouble([*calm, *[50.0] * 99, 1.0]) is None
    assert "not finite" in trouble([float("nan")])


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def test_two_processes_take_the_steps_of_one(packed, tmp_path):
    steps = "--steps", "5", "--max-edges", "300"
    run(*command(packed, tmp_path / "one", *steps))
    torchrun = "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"
    said = run(*torchrun, *command(packed, tmp_path / "two", *steps))
    assert "2 rank(s)" in said
    (step, one), (_, two) = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert step == 5 and ((one - two).abs() <= 1e-9 * one.abs().clamp(min=1e-6)).all()
    first, second = ((tmp_path / k / "log.txt").read_text().splitlines()[-1].split() for k in ("one", "two"))
    assert first[0] == "final" and first[1:5] == second[1:5]  # the errors too


@pytest.fixture(scope="module")
def uninterrupted(packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    said = run(*command(packed, out, "--steps", "40", "--eval-every", "20", "--save-every", "3"))
    assert said.splitlines()[-1].startswith("final step=40 energy_mae_mev_atom=")
    assert (out / "model.pt").exists() and (out / "curve.png").exists()
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_with_the_same_weights(packed, tmp_path, uninterrupted, number):
    """SIGKILL at any point; SIGTERM and SIGINT save the step they were in. The rerun goes on."""
    arguments = command(packed, tmp_path / "run", "--steps", "40", "--eval-every", "20", "--save-every", "3")
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=HERE, stdout=subprocess.PIPE, text=True)
    wait_for(6, tmp_path / "run", process)
    process.send_signal(number)
    said, _ = process.communicate()
    step, _ = weights(tmp_path / "run")
    assert 6 <= step < 40 and process.returncode != 0
    if number != signal.SIGKILL:
        assert f"stopped at step {step} of 40" in said
    assert f"resumed at step {step} of 40" in run(*arguments)
    (_, a), (_, b) = weights(uninterrupted), weights(tmp_path / "run")
    assert torch.equal(a, b)
    final = [(f / "log.txt").read_text().splitlines()[-1].split()[:5] for f in (uninterrupted, tmp_path / "run")]
    assert final[0] == final[1]


def test_a_finished_run_says_so_again(packed, uninterrupted, tmp_path):
    said = run(*command(packed, uninterrupted, "--steps", "40", "--eval-every", "20", "--save-every", "3"))
    assert said.splitlines()[-1] == (uninterrupted / "log.txt").read_text().splitlines()[-1]
    assert "other settings (lr: 0.01 -> 0.5)" in run(
        *command(packed, uninterrupted, "--lr", "0.5", "--steps", "40"), ok=False
    )
    state = torch.load(uninterrupted / "state.pt", weights_only=True)
    torch.save(state | dict(sources_sha256="of an older commit"), tmp_path / "state.pt")
    said = run(*command(packed, tmp_path, "--steps", "40", "--eval-every", "20", "--save-every", "3"), ok=False)
    assert "ended with other sources" in said


def test_the_log_proves_the_run(packed, uninterrupted):
    log = (uninterrupted / "log.txt").read_text()
    for source in ("train.py", "model.py", "muon.py", "data.py"):
        assert (HERE / source).read_text() in log
    assert PackedSet(packed).meta["data_sha256"] in log and torch.__version__ in log
    lines = [line for line in log.splitlines() if line.startswith("step=")]
    assert [line.split()[0] for line in lines] == ["step=0/40", "step=20/40", "step=40/40"]
    for unit in ("meV/atom", "meV/A", "meV/A^3/atom", "train_s=", "gpu_h=", "structures/s", "GiB"):
        assert all(unit in line for line in lines[1:])


@pytest.mark.parametrize("flags", [["--optimizer", "adamw"], ["--no-norm"], ["--optimizer", "adamw", "--no-norm"]])
def test_the_papers_figure_2_by_flags(packed, tmp_path, flags):
    said = run(*command(packed, tmp_path / "run", "--steps", "4", *flags))
    assert "final step=4" in said
    model = nequix.load(tmp_path / "run" / "model.pt")
    assert model.config["norm"] == ("--no-norm" not in flags)


def test_validate_prints_the_errors_of_weights(packed, uninterrupted):
    said = run(
        "train.py", "--validate", uninterrupted / "model.pt", "--data", packed, "--frames", "10", "--dtype", "float64"
    )
    assert "on 10 validation frames" in said
    model, p = nequix.load(uninterrupted / "model.pt", dtype=torch.float64), PackedSet(packed)
    frames = np.sort(np.random.RandomState(0).permutation(p.indices(data.VAL))[:10])
    mae, _ = evaluate(model, p, frames, 1000)
    assert f"energy MAE {mae[0]:.2f} meV/atom, force MAE {mae[1]:.2f} meV/A" in said


def test_validate_on_the_test_split(packed, uninterrupted, tmp_path, capsys):
    shutil.copytree(packed, tmp_path / "set")
    split = np.load(packed / "split.npy")
    split[np.flatnonzero(split == data.VAL)[:5]] = data.TEST
    np.save(tmp_path / "set/split.npy", split)
    a = parse_args(["--validate", str(uninterrupted / "model.pt"), "--data", str(tmp_path / "set"), "--test"])
    validate_weights(a, torch.device("cpu"), torch.float64)
    model, p = nequix.load(uninterrupted / "model.pt", dtype=torch.float64), PackedSet(tmp_path / "set")
    mae, _ = evaluate(model, p, p.indices(data.TEST), 1000)
    said = capsys.readouterr().out
    assert "on 5 test frames" in said and f"energy MAE {mae[0]:.2f} meV/atom, force MAE {mae[1]:.2f} meV/A" in said


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
    run("train.py", "--recipe", "fast", "--data", packed, "--device", "cpu", *flags, "--out", tmp_path / "run")
    final = re.search(
        r"^final .*mev_atom=(\S+) .*mev_A=(\S+) .*A3_atom=(\S+) train_s", (tmp_path / "run/log.txt").read_text(), re.M
    )
    try:
        result = ablate.run(packed, ablate.fast_recipe() | options)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert result["steps"] == 12 and result["0.9"] == pytest.approx([float(x) for x in final.groups()], abs=2e-3)
    assert result["last"][0] != pytest.approx(result["0.9"][0], abs=1e-2)

    for seed, lr in ((0, 0.1), (1, 0.1), (2, 0.2)):
        base = dict(base=dict(seed=seed, lr=lr, steps=12), device="CPU", data="a")
        lines = (
            base,
            {"0.9": [100.0 + seed, 200.0, 0.5], "steps": 12},
            {"0.9": [90.0, 200.0, 0.4], "steps": 6, "batch": 64, "ms": 1.0},
        )
        (tmp_path / str(seed)).write_text("\n".join(map(json.dumps, lines)))
    first, second = (
        line.split(maxsplit=7) for line in ablate.table([tmp_path / "0", tmp_path / "1"], "0.9").splitlines()[2:]
    )
    assert (
        first == ["2", "100.5", "(0.7)", "200.0", "(0.0)", "0.500", "(0.000)", "{}"]
        and second[-1] == '{"steps": 6, "batch": 64}'
    )
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
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    a = parse_args(
        ["--data", str(packed), "--batch", "6", "--steps", "24", "--eval-every", "24", "--out", str(tmp_path / "run")]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        train(a, torch.device("cuda", 0), torch.float32, 0, 1)
    assert taken == 24 and waits and not [w for w in waits if w[0]]


@needs_shared
def test_validate_released_weights_on_a_set_they_can_not_know(tmp_path):
    frames = [labelled(bulk("Po", "sc", 3.3))] * 4
    ase.io.write(tmp_path / "a.traj", frames)
    run("data.py", "pack", tmp_path / "a.traj", "--out", tmp_path / "set", "--val", "0.5", "--workers", 1)
    said = run("train.py", "--validate", SHARED / "weights/nequix-mp-1.nqx", "--data", tmp_path / "set", ok=False)
    assert "error: " in said and "elements that the model lacks: atomic numbers [84]" in said


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


def test_fine_tuning_improves_the_set_and_resumes_exactly(student, tmp_path):
    def tune(out, *more, ok=True):
        flags = "--batch 8 --dtype float64 --device cpu --lr 1e-3 --steps 20 --eval-every 10 --save-every 5".split()
        init = "--init", student / "student.pt", "--data", student / "set", "--out", tmp_path / out
        return run("train.py", *init, *flags, *more, ok=ok)

    tune("kept")
    tune("refit", "--refit-e0")
    kept, refit = validations(tmp_path / "kept"), validations(tmp_path / "refit")
    assert np.isfinite(kept).all() and np.isfinite(refit).all()
    assert refit[0, 0] < 0.1 * kept[0, 0] and refit[0, 1] == kept[0, 1]  # E0s are in no force
    assert refit[-1, 0] < 0.1 * kept[0, 0] and refit[-1, 1] < 0.8 * refit[0, 1], refit

    model, teacher = (
        nequix.load(f, dtype=torch.float64) for f in (tmp_path / "refit/model.pt", student / "teacher.pt")
    )
    assert model.config["hidden"] == teacher.config["hidden"] and model.e0.tolist() == model.config["atom_energies"]
    absent = [i for i, z in enumerate(model.config["atomic_numbers"]) if z in (6, 78)]
    old = nequix.load(student / "student.pt").e0
    assert torch.equal(model.e0[absent], old[absent]) and not torch.isclose(model.e0, old).all()

    # Stopped at step 10: the E0s are those of the state, not fitted again.
    state = torch.load(tmp_path / "refit/state.pt", weights_only=True)
    script = (
        "import sys, train; sys.argv = sys.argv[1:]; save = train.save_state\n"
        "def save_and_die(path, **state):\n"
        "    save(path, **state)\n"
        "    if state['step'] == 10: sys.exit('killed')\n"
        "train.save_state = save_and_die; train.main()"
    )
    arguments = "--init", student / "student.pt", "--refit-e0", "--data", student / "set", "--out", tmp_path / "killed"
    flags = "--batch 8 --dtype float64 --device cpu --lr 1e-3 --steps 20 --eval-every 10 --save-every 5".split()
    assert "killed" in run("-c", script, "train.py", *arguments, *flags, ok=False)
    assert "resumed at step 10" in tune("killed", "--refit-e0")
    again = torch.load(tmp_path / "killed/state.pt", weights_only=True)
    assert torch.equal(again["e0"], state["e0"]) and again["step"] == 20
    assert all(torch.equal(again[part][k], v) for part in ("model", "ema") for k, v in state[part].items())
    assert "--init takes the architecture from the weights: leave --lmax out" in tune("bad", "--lmax", 2, ok=False)


def test_e0s_refitted_on_two_processes(student, tmp_path):
    """Energies that differ from the model's by so much an atom of each element: that is found, however many share the work."""
    torchrun = "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"
    arguments = [
        "--init",
        student / "student.pt",
        "--refit-e0",
        "--data",
        student / "set",
        "--steps",
        1,
        "--device",
        "cpu",
    ]
    arguments += ["--dtype", "float64"]
    run("train.py", *arguments, "--out", tmp_path / "one")
    run(*torchrun, "train.py", *arguments, "--out", tmp_path / "two")
    one, two = (nequix.load(tmp_path / k / "model.pt").e0 for k in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line, no traceback


def test_bad_arguments_give_one_line(packed, uninterrupted, tmp_path):
    (tmp_path / "state.pt").touch()
    (tmp_path / "state.previous.pt").touch()
    (tmp_path / "text.pt").write_text("words")
    for arguments, words in {
        ("--lr", "nan"): "--lr must be positive",
        ("--epochs", "inf"): "--epochs must be positive",
        ("--grad-clip", "0"): "--grad-clip must be positive",
        ("--steps", "-1"): "--steps must not be negative",
        ("--energy-weight", "nan"): "--energy-weight must not be negative",
        ("--ema", "1"): "--ema must be at least 0 and below 1",
        ("--frames", "5"): "--frames needs --validate",
        ("--refit-e0",): "--refit-e0 needs --init",
        ("--test",): "--test needs --validate",
    }.items():
        with pytest.raises(ValueError, match=words) as e:
            parse_args(arguments)
        assert "\n" not in str(e.value)
    for arguments, words in {
        ("--data", tmp_path / "none"): "no packed set",
        ("--data", packed, "--batch", "0"): "--batch must be positive",
        ("--data", packed, "--hidden", "8x1o"): "hidden irreps",
        ("--data", packed, "--lmax", "7"): "lmax 7",
        ("--data", packed, "--conv", "oeq", "--device", "cpu"): "--conv oeq does not work here",
        (
            "--data",
            packed,
            "--out",
            tmp_path,
        ): f"state.pt can't be read (EOFError): remove it to go on from {tmp_path}/state.prev",
        ("--data", packed, "--init", tmp_path / "none.nqx"): "no weights at",
        ("--data", packed, "--validate", uninterrupted / "model.pt", "--test"): "has no test frames",
        ("--data", packed, "--validate", tmp_path / "none.nqx"): "no weights at",
        ("--data", packed, "--validate", tmp_path / "text.pt"): "neither a modded-nequix checkpoint nor",
    }.items():
        said = run("train.py", *arguments, ok=False)
        assert said.startswith("error: ") and words in said and len(said.splitlines()) == 1, said


def test_a_loss_that_is_not_finite_stops_and_names_the_frames(packed, tmp_path):
    """A run whose fifth checkpoint is poisoned: the weights of step 5 never come to be the ones to go on from."""
    flags = "--steps", "30", "--save-every", "1", "--eval-every", "30"
    script = (
        "import sys, torch, muon, train; sys.argv = sys.argv[1:]; step = muon.Muon.step\n"
        "def leap(self):\n"
        "    step(self)\n"
        "    if self.param_groups[0]['t'] == 5:\n"
        "        self.param_groups[0]['params'][0].data.mul_(1e300)\n"
        "muon.Muon.step = leap; train.main()"
    )
    said = run("-c", script, *command(packed, tmp_path / "run", *flags), ok=False)
    line = said.splitlines()[-1]
    assert line.startswith("error: the loss is not finite at step 5") and "the last good checkpoint is" in line
    p = PackedSet(packed)
    for i in data.step_indices(p.indices(data.TRAIN), 6, 3, 5):
        assert p.name(i) in line
    step, values = weights(tmp_path / "run")
    assert step == 4 and values.abs().max() < 100
    assert "final step=30" in run(*command(packed, tmp_path / "run", *flags))  # and it goes on from there


def test_a_signal_to_every_process_of_torchrun_saves(packed, tmp_path):
    """As a batch system does it: the workers get it twice, from it and from torchrun."""
    arguments = command(packed, tmp_path / "run", "--steps", "3000", "--eval-every", "1000", "--save-every", "5")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    process = subprocess.Popen(
        [*torchrun, *map(str, arguments)], cwd=HERE, start_new_session=True, stderr=subprocess.PIPE
    )
    wait_for(5, tmp_path / "run", process)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert f"stopped at step {weights(tmp_path / 'run')[0]} of 3000" in (tmp_path / "run" / "log.txt").read_text()


def test_a_lost_rank_ends_the_others_and_any_number_goes_on(packed, tmp_path, uninterrupted):
    """Two ranks, one is killed: the other says so and leaves. One process goes on, is stopped; two take it to the end."""
    arguments = command(packed, tmp_path / "run", "--steps", "40", "--eval-every", "20", "--save-every", "3")
    where = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    start = lambda rank: subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=HERE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | where | dict(RANK=str(rank)),
    )
    first, second = start(0), start(1)
    wait_for(3, tmp_path / "run", first)
    second.kill()
    _, said = first.communicate(timeout=60)
    assert first.returncode == 1 and "error on rank 0: rank 1 is gone" in said and "Traceback" not in said
    second.communicate()

    alone = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=HERE)
    wait_for(weights(tmp_path / "run")[0] + 3, tmp_path / "run", alone)
    alone.terminate()
    alone.communicate()
    step, _ = weights(tmp_path / "run")
    assert step < 40
    said = run("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *arguments)
    assert f"resumed at step {step} of 40" in said
    (_, a), (_, b) = weights(uninterrupted), weights(tmp_path / "run")
    assert ((a - b).abs() <= 1e-6 * a.abs().clamp(min=1e-3)).all()
