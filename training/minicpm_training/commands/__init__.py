"""What the commands do, given their parsed arguments."""
