"""What a run writes besides its cell and model: pictures, TensorBoard files, model.onnx and package versions."""
