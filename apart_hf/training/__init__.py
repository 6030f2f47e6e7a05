"""The training loop; it knows no settings and no folder."""
