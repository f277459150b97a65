"""Runs of the mini track: one recipe with several seeds, their means and spread, and whether these reach the targets.

    python records/mini.py runs/mini --seeds 5 [options of train.py]                # one after another, by the clock
    python records/mini.py runs/mini --seeds 5 --at-once 3 [options of train.py]    # several share the GPU: seconds mean nothing
    python records/mini.py runs/mini --seeds 5 --test [options of train.py]         # and the errors on the test split, once
    python records/mini.py runs/mini --seeds 5 --read                               # of logs that are there: nothing is trained

The options of train.py begin with --data data/sample --tf32. OUT/seedK gets the logs; a rerun goes on.
"""

import argparse
import concurrent.futures
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import stats

TRAIN = Path(__file__).parent.parent / "train.py", "--data", "data/sample", "--tf32"
COLUMNS = "energy MAE (meV/atom)", "force MAE (meV/A)", "stress MAE (meV/A^3/atom)", "GPU-seconds"
FINAL = re.compile(
    r"^final step=\d+ energy_mae_mev_atom=(\S+) force_mae_mev_A=(\S+) stress_mae_mev_A3_atom=(\S+) .*gpu_h=(\S+)", re.M
)
ERRORS = re.compile(r"energy MAE (\S+) meV/atom, force MAE (\S+) meV/A, stress MAE (\S+) meV")
SEEDS = 5  # at least, and
CONFIDENCE = 2.33  # (target - mean) sqrt(n) / sigma at least: one-sided p < 0.01


def python(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"{' '.join(map(str, command))}: {said} (exit status {done.returncode})")
    return done.stdout


def run(out, seed, options, read):
    """The three errors on the validation split, and GPU-seconds, of train.py with this seed; read: of a run before."""
    folder = out / f"seed{seed}"
    if not read:
        python(*TRAIN, *options, "--seed", seed, "--out", folder)
    found = FINAL.findall((folder / "log.txt").read_text())
    if not found:
        raise RuntimeError(f"{folder / 'log.txt'} has no final line")
    *mae, hours = map(float, found[-1])
    return [*mae, 3600 * hours]


def table(title, rows, seeds, targets=None):
    rows = np.array(rows)
    mean, sigma = rows.mean(0), rows.std(0, ddof=1) if len(rows) > 1 else np.full(rows.shape[1], np.nan)
    text = [f"{title:12}" + "".join(f"{c:>28}" for c in COLUMNS[: rows.shape[1]])]
    text += [f"seed {k:<7}" + "".join(f"{x:28.3f}" for x in row) for k, row in zip(seeds, rows)]
    text += [f"{name:12}" + "".join(f"{x:28.3f}" for x in row) for name, row in (("mean", mean), ("sigma", sigma))]
    if targets:
        z = (np.array(targets) - mean[:3]) * len(rows) ** 0.5 / sigma[:3]
        text.append(f"{'target':12}" + "".join(f"{x:28.3f}" for x in targets))
        reached = len(rows) >= SEEDS and (z >= CONFIDENCE).all()
        for name, p in (("p, normal", stats.norm.sf(z)), ("p, Student", stats.t.sf(z, len(rows) - 1))):
            text.append(f"{name:12}" + "".join(f"{x:28.1e}" for x in p))
        text.append(f"{'z':12}" + "".join(f"{x:28.2f}" for x in z) + ("  reached" if reached else "  not reached"))
    return "\n".join(text)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    p.add_argument("out", type=Path)
    p.add_argument("--seeds", type=int, default=5, help="default: 5")
    p.add_argument("--at-once", type=int, default=1, help="runs that share the GPU (default: 1)")
    p.add_argument("--read", action="store_true", help="train nothing: take the logs that are there")
    p.add_argument("--test", action="store_true", help="the errors on the test split too")
    p.add_argument("--targets", type=float, nargs=3, metavar="MAE", help="of energy, forces and stress")
    a, options = p.parse_known_args()
    if min(a.seeds, a.at_once) < 1:
        p.error("--seeds and --at-once must be positive")
    with concurrent.futures.ThreadPoolExecutor(a.at_once) as pool:
        rows = list(pool.map(lambda seed: run(a.out, seed, options, a.read), range(a.seeds)))
    text = table("validation", rows, range(a.seeds), a.targets)
    if a.at_once > 1:
        text += f"\nGPU-seconds of {a.at_once} runs at once: no record"
    print(text)
    (a.out / "summary.txt").write_text(" ".join(sys.argv) + "\n" + text + "\n")
    if a.test:
        validate = Path(__file__).parent / "validate.py", "--data", "data/sample", "--precision", "tf32", "--test"
        said = [python(*validate, a.out / f"seed{k}/model.pt") for k in range(a.seeds)]
        text = table("test", [[float(x) for x in ERRORS.search(s).groups()] for s in said], range(a.seeds))
        print(text)
        with open(a.out / "summary.txt", "a") as f:
            f.write(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, OSError) as e:
        sys.exit(f"error: {e}")
