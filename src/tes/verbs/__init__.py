"""The jobs of the command line, one file each; the same functions are the Python interface."""
