"""Where neuronx-distributed has some of its layers; tpray's are in `tpray.parallel_layers`."""
