"""The frozen trunk's activations: computed once, replayed afterwards."""
