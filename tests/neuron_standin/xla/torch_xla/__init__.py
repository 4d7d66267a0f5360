"""A stand-in for torch-xla as torch-neuronx 2.9 brings it; see `torch_neuronx` beside it."""

import neuron_rules  # noqa: F401

__version__ = "2.9.0"
