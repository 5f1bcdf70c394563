"""The quickstart: a drawn world, small vision weights, and the whole recipe on them in minutes."""
