"""The dataset classes, the readers they are made of, and the loaders that mix them."""
