"""Two decoders in a package of their own. It imports nothing: the command line reads it to find the yaml files."""
