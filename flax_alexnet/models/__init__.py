"""The variants of AlexNet, the module, and what is computed from its activations."""
