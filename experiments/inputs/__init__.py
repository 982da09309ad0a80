"""What runs read: the files of `conf`, and those of benchmarks; errors that a user can act on."""
