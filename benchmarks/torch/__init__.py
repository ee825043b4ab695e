"""Whole networks beside PyTorch's multiplying ones: `python -m benchmarks.torch`."""
