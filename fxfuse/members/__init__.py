"""Where members come from: checkpoints read tensor by tensor, processes that hold them."""
