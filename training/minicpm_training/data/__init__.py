"""From text files to batches: sources, tokenized datasets, mixtures."""
