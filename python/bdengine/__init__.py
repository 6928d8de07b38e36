"""Backdoor attacks on, and defenses of, diffusion models: see README.md, or ``bdengine --help``."""

__version__ = "0.1.0"
