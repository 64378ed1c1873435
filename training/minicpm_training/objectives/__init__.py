"""What a batch is trained for, and where such batches come from: one file each."""
