"""A paper small enough for the tests of shared: dropout before a linear classifier of the embedded digits."""
