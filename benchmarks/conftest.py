"""Modules whose packages, those of the extra "bench", are not there are not looked at for doctests."""

import importlib.util

_MISSING = any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime"))

collect_ignore = ["integer.py", "onnx_twin.py"] if _MISSING else []
