"""Other people's training loops, each imported where it is used."""
