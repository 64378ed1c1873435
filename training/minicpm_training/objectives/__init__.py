"""What a batch is trained for, one file each."""
