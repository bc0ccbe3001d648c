"""Trained models in files: our own safetensors, and those of PyTorch, Caffe and TensorFlow."""
