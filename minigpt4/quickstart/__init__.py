"""The quickstart: a synthetic world of drawn images, small vision weights, and the whole recipe on them in minutes."""
