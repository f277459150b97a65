"""The paper's Figure 2 on the sample: Muon and AdamW, with and without RMSNorm, at four learning rates; hidden 128x0e+64x1o.

python records/figure2.py runs/figure2 [--at-once 4] [options of train.py]       # figure2.png, table.txt, the logs; a rerun goes on
"""

import argparse
import concurrent.futures
import itertools
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from mini import TRAIN, python

ADAMW = "--optimizer", "adamw"
KINDS = {"Muon, RMSNorm": [], "Muon": ["--no-norm"], "AdamW, RMSNorm": ADAMW, "AdamW": [*ADAMW, "--no-norm"]}
RATES = 0.03, 0.01, 0.003, 0.001
POINT = re.compile(r"^step=(\d+)/\d+ energy=(\S+) meV/atom forces=(\S+) meV/A stress=(\S+) meV", re.M)


def run(out, kind, rate, options):
    """The validations of a run, (step, three errors) each, or why it ended: a run may diverge."""
    folder = out / f"{kind.replace(', ', '_')}_{rate}"
    try:
        shape = "--hidden", "128x0e+64x1o"
        python(*TRAIN, *shape, *KINDS[kind], "--lr", rate, *options, "--out", folder)
        why = ""
    except RuntimeError as e:
        why = str(e).split("error: ")[-1].split(";")[0]
    points = POINT.findall((folder / "log.txt").read_text()) if (folder / "log.txt").exists() else []
    return [[float(x) for x in p] for p in {p[0]: p for p in points}.values()], why  # a resumed run may repeat some


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    p.add_argument("out", type=Path)
    p.add_argument("--at-once", type=int, default=4, help="runs that share the GPU (default: 4)")
    a, options = p.parse_known_args()
    a.out.mkdir(parents=True, exist_ok=True)
    cases = list(itertools.product(KINDS, RATES))
    with concurrent.futures.ThreadPoolExecutor(a.at_once) as pool:
        results = dict(zip(cases, pool.map(lambda case: run(a.out, *case, options), cases)))
    text = [" ".join(sys.argv), f"{'':18}{'learning rate':>14}{'energy MAE':>12}{'force MAE':>12}{'stress MAE':>16}"]
    text += [f"{'':32}{'meV/atom':>12}{'meV/A':>12}{'meV/A^3/atom':>16}"]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained", sharey=True)
    for (kind, rate), (points, why) in results.items():
        last = "".join(f"{x:{form}}" for x, form in zip(points[-1][1:], ("12.2f", "12.2f", "16.3f"))) if points else ""
        text.append(f"{kind:18}{rate:14g}{last}  {why}")
        axis = axes[RATES.index(rate)]
        axis.semilogy([q[0] for q in points[1:]], [q[1] for q in points[1:]], ".-", ms=3, label=kind)
        axis.set(title=f"learning rate {rate}", xlabel="step")
    axes[0].set_ylabel("energy MAE, validation (meV/atom)")
    axes[0].legend()
    figure.savefig(a.out / "figure2.png", dpi=120)
    (a.out / "table.txt").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
