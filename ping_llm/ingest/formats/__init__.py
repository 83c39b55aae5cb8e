"""How each format of input files is read."""
