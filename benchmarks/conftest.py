"""Without the packages of the extra "bench", the modules that need them have no doctests."""

import importlib.util

_MISSING = any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime"))

collect_ignore = ["integer.py", "onnx_twin.py"] if _MISSING else []
