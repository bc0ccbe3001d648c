"""Prints the oldest version of each dependency that pyproject.toml admits, as pip's constraints."""

import re
import tomllib

with open("pyproject.toml", "rb") as file:
    dependencies = tomllib.load(file)["project"]["dependencies"]
for dependency in dependencies:
    if found := re.fullmatch(r"([\w.-]+)>=([\w.]+)", dependency):
        print(f"{found[1]}=={found[2]}")
