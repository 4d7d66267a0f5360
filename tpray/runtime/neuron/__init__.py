"""NeuronCores: `torchneuron` and `xla` are the two stacks, `graph` what both do. The only importers of Neuron's
packages, and only within a rank."""
