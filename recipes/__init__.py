"""Programs that use a store: one file each, short enough to copy. README.md lists them."""
