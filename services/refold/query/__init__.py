"""Read models over HTTP."""
