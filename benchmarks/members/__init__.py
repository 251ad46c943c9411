"""Members trained on CIFAR-10, whose weights lie in `weights/`, and what trained them."""
