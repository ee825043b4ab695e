"""Without the packages of the extra "bench", the modules that need them have no doctests."""

import importlib.util


def _missing(*names: str) -> bool:
    return any(importlib.util.find_spec(name) is None for name in names)


collect_ignore = [
    *(["integer.py", "onnx_twin.py"] if _missing("onnx", "onnxruntime") else []),
    *(["torch"] if _missing("torch") else []),
]
