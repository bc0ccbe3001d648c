"""Errors, files, text, processes and plots: what every other package may use."""
