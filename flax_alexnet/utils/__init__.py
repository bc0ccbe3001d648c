"""Errors, files, text, processes and plots, for all other packages."""
