"""The variants of AlexNet, the module, and functions of its activations."""
