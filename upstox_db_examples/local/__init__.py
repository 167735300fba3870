"""What runs here in place of the outside world."""
