"""Hydra settings: YAML groups in this folder, dataclass schemas and composition in code."""
