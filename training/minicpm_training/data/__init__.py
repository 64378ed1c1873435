"""From text files to batches: sources, prepared token sets, mixtures."""
