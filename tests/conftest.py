"""One thread per test process: the suite runs in two processes, and threads that wait for each other are slow."""

import torch

torch.set_num_threads(1)
