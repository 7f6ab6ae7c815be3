"""Tests run tiny models: one thread is faster than two, and sums are the same everywhere."""

import torch

torch.set_num_threads(1)
