"""What a run leaves beside its cell and model: pictures, TensorBoard's files, model.onnx, versions."""
