"""The quickstart: a drawn world, its small vision weights, and the whole recipe on them in minutes."""
