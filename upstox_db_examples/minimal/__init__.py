"""The smallest version of each pattern: one file to copy and to change. Nothing else in this package imports these."""
