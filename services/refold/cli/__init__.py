"""The `refold` command."""
