"""Make Vision Transformers small and fast, ship them to boards over SSH, measure them there."""

import os

# From 1.29 on, ONNX Runtime's Linux wheels report models and devices to their maker unless told not to before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
