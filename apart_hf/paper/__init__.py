"""The tables and figures of the paper, our study, and what they are made of."""
