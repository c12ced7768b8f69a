"""Running bundles on onnxruntime alone: no torch, no onnx, nothing that a device does not have."""
