"""The tests' tensors are small: a second thread slows them down, and waits busily where processes share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
