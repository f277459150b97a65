"""How far apart two runs of eval_phonon.py mdr are: of the same materials, say in float32 and in float64.

python records/2026-11-23_phonons/compare.py runs/mdr32/mdr.csv runs/mdr64/mdr.csv
"""

import csv
import sys

import numpy as np

a, b = ({r["material_id"]: r for r in csv.DictReader(open(path))} for path in sys.argv[1:])
both = [k for k in a if k in b and not (a[k]["error"] or b[k]["error"])]
print(f"{len(both)} materials; in one run only {len(a) + len(b) - 2 * len(both)} (left out or not there)")
print(f"steps of the relaxations differ for {sum(a[k]['steps'] != b[k]['steps'] for k in both)}")
for column in (c for c in next(iter(a.values())) if c.endswith(", model")):
    apart = np.array([abs(float(a[k][column]) - float(b[k][column])) for k in both])
    where = both[int(apart.argmax())]
    print(f"{column[:-7]:24} median {np.median(apart):.2e}  mean {apart.mean():.2e}  most {apart.max():.2e} ({where})")
