"""What the command line runs: a model and a text at hand, comparisons with the full cache, benchmarks."""
